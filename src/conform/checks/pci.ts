/** PCI: discovery and the capabilities that lead to the virtio structures (Virtio 1.4, 4.1.2 to 4.1.4). */
import { readIdentity, type VirtioCapability } from '../../vfio/config-space.ts';
import { CommonCfgField, DeviceType, VirtioCapLength, VirtioCfgType, VirtioPciId } from '../../virtio/pci-layout.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, hex, must, need, should, untried } from '../check.ts';
import { capabilities, expectAligned, expectPresent } from './pci-support.ts';

/** The transitional id of a network device (table in 4.1.2.1). */
const TRANSITIONAL_NET = 0x1000;
const IO_BAR = 1;
const BAR0 = 0x10;
/** `struct virtio_pci_cap64` (4.1.4). */
const CAP64_LENGTH = 24;
const COMMON_MIN = 56;

function identity(bench: Bench) {
  const ids = readIdentity(bench.target.fn.config);
  bench.log(
    `ids ${hex(ids.vendorId, 4)}:${hex(ids.deviceId, 4)} subsystem ${hex(ids.subsystemId, 4)} revision ${ids.revisionId}`,
  );
  return ids;
}

/** A device with a legacy interface in an I/O BAR is transitional. */
function needNonTransitional(bench: Bench): void {
  const ids = readIdentity(bench.target.fn.config);
  const io = (bench.target.fn.config.read32(BAR0) & IO_BAR) !== 0;
  need(!(ids.deviceId < VirtioPciId.modern && io), 'the device is transitional');
}

/** Lengths of the capabilities' structures by type (4.1.4). */
const EXTRA_LENGTH: Readonly<Record<number, number>> = {
  [VirtioCfgType.NOTIFY]: VirtioCapLength.notify,
  [VirtioCfgType.PCI]: VirtioCapLength.notify,
  [VirtioCfgType.SHARED_MEMORY]: CAP64_LENGTH,
};

/** Offset and length of a 64-bit capability: the upper halves follow the lower ones. */
function wide(cap: VirtioCapability): { offset: number; length: number } {
  const high = (at: number) =>
    (cap.extra[at] | (cap.extra[at + 1] << 8) | (cap.extra[at + 2] << 16) | (cap.extra[at + 3] << 24)) >>> 0;
  return { offset: cap.offset + high(0) * 2 ** 32, length: cap.length + high(4) * 2 ** 32 };
}

const DISCOVERY = '4.1.2.1';

export const pciChecks: readonly Check[] = [
  must(
    'PCI-001',
    '4.1.1',
    'The list of PCI capabilities is as PCI wants it: no loop, inside configuration space',
    ['capability-loop', 'capability-outside-config'],
    (bench) => {
      bench.log(`${bench.target.structures.capabilities.length} capabilities`);
    },
  ),
  must('PCI-002', DISCOVERY, 'The PCI vendor id is 0x1AF4', ['pci-vendor'], (bench) => {
    const { vendorId } = identity(bench);
    expect(vendorId === VirtioPciId.vendor, `the vendor id is ${hex(vendorId, 4)}`);
  }),
  must(
    'PCI-003',
    DISCOVERY,
    'The PCI device id is 0x1040 plus the virtio device id, or the transitional id of the device type',
    ['pci-device-id'],
    (bench) => {
      const { deviceId } = identity(bench);
      const modern = VirtioPciId.modern + DeviceType.NET;
      expect(
        deviceId === modern || deviceId === TRANSITIONAL_NET,
        `the device id is ${hex(deviceId, 4)}, of a network device it is ${hex(modern, 4)} or ${hex(TRANSITIONAL_NET, 4)}`,
      );
    },
  ),
  should(
    'PCI-004',
    DISCOVERY,
    'A non-transitional device has a PCI device id from 0x1040 to 0x107f',
    ['pci-device-id'],
    (bench) => {
      needNonTransitional(bench);
      const { deviceId } = identity(bench);
      expect(
        deviceId >= VirtioPciId.modern && deviceId <= VirtioPciId.modernLast,
        `the device id is ${hex(deviceId, 4)}`,
      );
    },
  ),
  should(
    'PCI-005',
    DISCOVERY,
    'A non-transitional device has a PCI revision id of 1 or higher',
    ['pci-revision'],
    (bench) => {
      needNonTransitional(bench);
      expect(identity(bench).revisionId >= 1, 'the revision id is 0');
    },
  ),
  should(
    'PCI-006',
    DISCOVERY,
    'A non-transitional device has a PCI subsystem device id of 0x40 or higher',
    ['pci-subsystem'],
    (bench) => {
      needNonTransitional(bench);
      const { subsystemId } = identity(bench);
      expect(subsystemId >= 0x40, `the subsystem device id is ${hex(subsystemId)}`);
    },
  ),
  must(
    'PCI-007',
    '4.1.3.2',
    'The halves of 64-bit fields can be accessed independently',
    ['address-halves'],
    (bench) => {
      const { common } = bench.target.structures;
      common.write16(CommonCfgField.queueSelect, 0);
      for (const field of [CommonCfgField.queueDesc, CommonCfgField.queueDriver, CommonCfgField.queueDevice]) {
        common.write32(field, 0x1000);
        common.write32(field + 4, 0x12);
        common.write32(field, 0x2000);
        const [low, high] = [common.read32(field), common.read32(field + 4)];
        bench.log(`field ${hex(field)}: wrote 0x1000, 0x12 above it, 0x2000; read ${hex(low)} and ${hex(high)}`);
        expect(
          low === 0x2000 && high === 0x12,
          `the 64-bit field at ${hex(field)} reads ${hex(high)} and ${hex(low)}, not 0x12 and 0x2000`,
        );
      }
    },
  ),
  must('PCI-008', '4.1.4.2', 'cap_len of each capability includes all of its fields', ['capability-short'], (bench) => {
    for (const cap of bench.target.structures.virtio) {
      const needed = EXTRA_LENGTH[cap.type] ?? VirtioCapLength.plain;
      const length = VirtioCapLength.plain + cap.extra.length;
      bench.log(`capability at ${hex(cap.at)}: type ${cap.type}, cap_len ${length}`);
      expect(
        length >= needed,
        `capability ${hex(cap.at)} of type ${cap.type} has cap_len ${length}, its structure ${needed} bytes`,
      );
    }
  }),
  untried(
    'PCI-009',
    '4.1.4.2',
    'SHOULD',
    'Several structures of one type are ordered from optimal to least optimal',
    'which structure is the better one is known to the device alone',
  ),
  must(
    'PCI-010',
    '4.1.4.3.1',
    'The offset of the common configuration structure is 4-byte aligned',
    ['common-misaligned'],
    (bench) => {
      expectAligned(bench, VirtioCfgType.COMMON, 'common configuration', 4);
    },
  ),
  must('PCI-011', '4.1.4.3.1', 'There is a common configuration capability', ['no-common-config'], (bench) => {
    expectPresent(bench, VirtioCfgType.COMMON, 'common configuration');
    const cap = bench.target.structures.capability(VirtioCfgType.COMMON);
    expect(
      cap !== undefined && cap.length >= COMMON_MIN && cap.offset + cap.length <= bench.target.fn.bar(cap.bar).size,
      'the common configuration structure is not inside its BAR',
    );
  }),
  must('PCI-021', '4.1.4.5.1', 'There is an ISR status capability', ['no-isr'], (bench) =>
    expectPresent(bench, VirtioCfgType.ISR, 'ISR status'),
  ),
  must(
    'PCI-022',
    '4.1.4.6.1',
    'The offset of the device-specific configuration is 4-byte aligned',
    ['device-misaligned'],
    (bench) => {
      expectAligned(bench, VirtioCfgType.DEVICE, 'device configuration', 4);
    },
  ),
  must('PCI-023', '4.1.4.7.1', 'Each shared memory region is contained in its BAR', ['shared-memory'], (bench) => {
    const found = capabilities(bench, VirtioCfgType.SHARED_MEMORY);
    need(found.length > 0, 'the device has no shared memory');
    for (const cap of found) {
      const { offset, length } = wide(cap);
      const { size } = bench.target.fn.bar(Math.min(cap.bar, 5));
      expect(
        cap.bar <= 5 && offset + length <= size,
        `region ${cap.id} ends at ${hex(offset + length)} of BAR ${cap.bar}, which has ${hex(size)} bytes`,
      );
    }
  }),
  must('PCI-024', '4.1.4.7.1', 'The ids of shared memory regions are unique', ['shared-memory'], (bench) => {
    const found = capabilities(bench, VirtioCfgType.SHARED_MEMORY);
    need(found.length > 0, 'the device has no shared memory');
    const ids = found.map(({ id }) => id);
    expect(new Set(ids).size === ids.length, `the ids are ${ids.join(', ')}`);
  }),
  must('PCI-025', '4.1.4.8.1', 'vendor_id of a vendor data capability is not 0x1AF4', ['vendor-data'], (bench) => {
    const found = vendorData(bench);
    for (const cap of found)
      expect(cap.vendor !== VirtioPciId.vendor, `vendor_id of capability ${hex(cap.at)} is ${hex(cap.vendor, 4)}`);
  }),
  must('PCI-026', '4.1.4.8.1', 'The size of a vendor data capability is a multiple of 4', ['vendor-data'], (bench) => {
    for (const cap of vendorData(bench))
      expect(cap.length % 4 === 0, `capability ${hex(cap.at)} has ${cap.length} bytes`);
  }),
  untried(
    'PCI-027',
    '4.1.4.8.1',
    'MUST',
    'Reading a vendor data capability has no side effects',
    'what the effects could be is known to the vendor alone',
  ),
  must('PCI-028', '4.1.4.9.1', 'There is a PCI configuration access capability', ['no-pci-cfg'], (bench) =>
    expectPresent(bench, VirtioCfgType.PCI, 'PCI configuration access'),
  ),
  must('PCI-029', '4.1.4.9.1', 'A write to pci_cfg_data writes to the BAR', ['pci-cfg-write'], (bench) => {
    const { common } = bench.target.structures;
    const cap = accessWindow(bench, CommonCfgField.queueSelect, 2);
    common.write16(CommonCfgField.queueSelect, 0);
    bench.target.fn.config.write16(cap.at + VirtioCapLength.plain, 1);
    const came = common.read16(CommonCfgField.queueSelect);
    bench.log(`wrote 1 to pci_cfg_data, queue_select reads ${came}`);
    expect(came === 1, `queue_select reads ${came}, not the 1 written through pci_cfg_data`);
  }),
  must('PCI-030', '4.1.4.9.1', 'A read of pci_cfg_data reads from the BAR', ['pci-cfg-read'], (bench) => {
    const { common } = bench.target.structures;
    const cap = accessWindow(bench, CommonCfgField.queueSelect, 2);
    for (const value of [1, 0]) {
      common.write16(CommonCfgField.queueSelect, value);
      const came = bench.target.fn.config.read16(cap.at + VirtioCapLength.plain);
      bench.log(`queue_select is ${value}, pci_cfg_data reads ${came}`);
      expect(came === value, `pci_cfg_data reads ${came}, queue_select is ${value}`);
    }
  }),
  untried(
    'PCI-031',
    '4.1.4.10.1',
    'SHOULD',
    'A non-transitional device lets legacy drivers fail gracefully',
    'it concerns platforms with legacy drivers of the same ids, and needs a legacy driver',
  ),
];

/** Points the PCI configuration access capability at a field of the common configuration. */
function accessWindow(bench: Bench, field: number, width: number): VirtioCapability {
  const { config } = bench.target.fn;
  const cap = capabilities(bench, VirtioCfgType.PCI)[0];
  const common = bench.target.structures.capability(VirtioCfgType.COMMON);
  need(cap !== undefined && common !== undefined, 'there is no such capability');
  config.write8(cap.at + 4, common.bar);
  config.write32(cap.at + 8, common.offset + field);
  config.write32(cap.at + 12, width);
  return cap;
}

/** Vendor data capabilities: `vendor_id` stands where others have `bar` (4.1.4.8). */
function vendorData(bench: Bench): { at: number; vendor: number; length: number }[] {
  const { config } = bench.target.fn;
  const found: { at: number; vendor: number; length: number }[] = [];
  for (const { id, offset: at } of bench.target.structures.capabilities) {
    if (id !== 0x09 || config.read8(at + 3) !== VirtioCfgType.VENDOR) continue;
    found.push({ at, vendor: config.read16(at + 4), length: config.read8(at + 2) });
  }
  need(found.length > 0, 'the device has no vendor data');
  return found;
}
