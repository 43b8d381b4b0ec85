/** How the faults of `faults.ts` that concern configuration space are made. */
import { VirtioCapField, VirtioCapLength, VirtioCfgType, VirtioPciId } from '../virtio/pci-layout.ts';
import type { FaultName, FaultSet } from './faults.ts';
import { CapabilityKind, ConfigField, type ConfigSpace, MsixCap } from './pci.ts';
import { VirtioBar } from './personalities/standard.ts';

/** Offsets of the capabilities, in the order of the list. */
function capabilities(config: ConfigSpace): number[] {
  const list: number[] = [];
  for (let at = config.bytes[ConfigField.capabilities]; at !== 0; at = config.bytes[at + VirtioCapField.next]) {
    list.push(at);
  }
  return list;
}

/** Where things are in configuration space. */
interface Places {
  readonly first: number;
  readonly last: number;
  readonly common: number;
  readonly notify: number;
  readonly isr: number;
  readonly device: number;
  readonly pci: number;
  readonly msix: number;
}

/** Bytes to write: where, how many, what. */
type Patch = readonly [at: number, width: number, value: number];

const Cap = VirtioCapField;
/** A type of structure that nobody knows. */
const UNKNOWN_TYPE = 0x77;
/** `struct virtio_pci_cap64` and where a second one goes. */
const CAP64 = { size: 24, stride: 28 } as const;
/** `struct virtio_pci_vndr_data` (4.1.4.8). */
const VendorData = { length: 10, vendorId: 4 } as const;

/** Where extended capabilities begin, and the header of SR-IOV, version 1 (PCI Express 5.0, 9.3.3). */
const EXTENDED_CAPABILITIES = 0x100;
const SR_IOV_HEADER = 0x00010010;

/** Changes to configuration space. What needs room takes the place of the last capability, PCI Express. */
const PATCHES: Partial<Record<FaultName, (at: Places) => readonly Patch[]>> = {
  'capability-loop': ({ first, last }) => [[last + Cap.next, 1, first]],
  'capability-outside-config': ({ last }) => [[last + Cap.next, 1, ConfigField.bar0]],
  'capability-outside-bar': ({ common }) => [[common + Cap.offset, 4, 0x7ffffff0]],
  'capability-bad-bar': ({ notify }) => [[notify + Cap.bar, 1, 5]],
  'capability-short': ({ notify }) => [[notify + Cap.length, 1, VirtioCapLength.plain]],
  'no-common-config': ({ common }) => [[common + Cap.cfgType, 1, UNKNOWN_TYPE]],
  'no-notify': ({ notify }) => [[notify + Cap.cfgType, 1, UNKNOWN_TYPE]],
  'no-isr': ({ isr }) => [[isr + Cap.cfgType, 1, UNKNOWN_TYPE]],
  'no-pci-cfg': ({ pci }) => [[pci + Cap.cfgType, 1, UNKNOWN_TYPE]],
  'common-misaligned': ({ common }) => [[common + Cap.offset, 4, 2]],
  'device-misaligned': ({ device }) => [[device + Cap.offset, 4, VirtioBar.device + 2]],
  'notify-misaligned': ({ notify }) => [[notify + Cap.offset, 4, VirtioBar.notify + 1]],
  'notify-multiplier': ({ notify }) => [[notify + Cap.notifyOffMultiplier, 4, 3]],
  'notify-short': ({ notify }) => [[notify + Cap.structureLength, 4, 1]],
  'notification-data': ({ notify }) => [
    [notify + Cap.offset, 4, VirtioBar.notify + 2],
    [notify + Cap.structureLength, 4, 3],
    [notify + Cap.notifyOffMultiplier, 4, 2],
  ],
  'shared-memory': ({ last }) => [...sharedMemory(last, last + CAP64.stride), ...sharedMemory(last + CAP64.stride, 0)],
  'vendor-data': ({ last }) => [
    [last, 1, CapabilityKind.vendor],
    [last + Cap.next, 1, 0],
    [last + Cap.length, 1, VendorData.length],
    [last + Cap.cfgType, 1, VirtioCfgType.VENDOR],
    [last + VendorData.vendorId, 2, VirtioPciId.vendor],
  ],
  'msix-one': ({ msix }) => [[msix + MsixCap.control, 2, 0]],
  'sr-iov-silent': () => [[EXTENDED_CAPABILITIES, 4, SR_IOV_HEADER]],
  'pci-vendor': () => [[ConfigField.vendorId, 2, VirtioPciId.vendor + 1]],
  'pci-device-id': () => [[ConfigField.deviceId, 2, VirtioPciId.transitionalLast]],
  'pci-revision': () => [[ConfigField.revisionId, 1, 0]],
  'pci-subsystem': () => [[ConfigField.subsystemId, 2, 1]],
};

/** A region that ends outside of its BAR, with an id that another has. */
function sharedMemory(at: number, next: number): Patch[] {
  return [
    [at, 1, CapabilityKind.vendor],
    [at + Cap.next, 1, next],
    [at + Cap.length, 1, CAP64.size],
    [at + Cap.cfgType, 1, VirtioCfgType.SHARED_MEMORY],
    [at + Cap.bar, 1, VirtioBar.index],
    [at + Cap.id, 1, 1],
    [at + Cap.offset, 4, 0],
    [at + Cap.structureLength, 4, 2 * VirtioBar.size],
    [at + VirtioCapLength.plain, 4, 0],
    [at + VirtioCapLength.plain + 4, 4, 0],
  ];
}

/** Breaks configuration space as told. */
export function applyLayoutFaults(config: ConfigSpace, faults: FaultSet): void {
  const list = capabilities(config);
  const last = list[list.length - 1];
  const structure = (type: number) =>
    list.find((at) => config.bytes[at] === CapabilityKind.vendor && config.bytes[at + Cap.cfgType] === type) ?? last;
  const places: Places = {
    first: list[0],
    last,
    common: structure(VirtioCfgType.COMMON),
    notify: structure(VirtioCfgType.NOTIFY),
    isr: structure(VirtioCfgType.ISR),
    device: structure(VirtioCfgType.DEVICE),
    pci: structure(VirtioCfgType.PCI),
    msix: config.msixAt,
  };
  for (const name of faults) {
    for (const [at, width, value] of PATCHES[name]?.(places) ?? []) config.patch(at, width, value);
  }
}
