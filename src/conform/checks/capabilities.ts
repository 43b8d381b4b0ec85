/** Device and driver capabilities (Virtio 1.4, 2.12.1.2.4). */
import { ipsecWire } from '../../ipsec/wire/revisions.ts';
import { AdminOpcode, AdminStatus, CapabilityId, ResourceType } from '../../virtio/admin-wire.ts';
import { encodeFlowFilterLimits, encodeGroup, encodeSelectorCapability } from '../../virtio-net/flow-filter-wire.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, need, should } from '../check.ts';
import { type AdminConsole, outcome, type Reply } from '../console.ts';
import {
  driverCapabilities,
  type Offer,
  offeredCapabilities,
  succeeded,
  useCapabilities,
  useCommands,
} from '../offer.ts';

const SECTION = '2.12.1.2.4';
const SR_IOV = 1;
const BAD_GROUP = 0x7777;

/** All commands in use, no capability set. */
async function unset(bench: Bench): Promise<{ admin: AdminConsole; offer: Offer }> {
  const driver = await bench.bringUp(bench.target, { admin: true, features: [] });
  const admin = bench.console(driver);
  await useCommands(admin);
  const offer = await offeredCapabilities(admin);
  need(offer.ids.length > 0, 'the device has no capabilities');
  return { admin, offer };
}

/** Halves of all limits, rounded down. */
function halved<T extends object>(limits: T): T {
  return {
    ...limits,
    ...Object.fromEntries(Object.entries(limits).map(([name, value]) => [name, Number(value) >>> 1])),
  };
}

/** The commands of capabilities for another group than the function itself. */
async function forGroup(admin: AdminConsole, offer: Offer, groupType: number): Promise<Reply[]> {
  const [id] = offer.ids;
  const bytes = driverCapabilities(admin, offer).get(id) ?? new Uint8Array(8);
  const suffix = `of group ${groupType}`;
  return [
    await admin.capabilityIds({ groupType, name: `CAP_ID_LIST_QUERY ${suffix}` }),
    await admin.capabilityGet(id, { groupType, name: `DEVICE_CAP_GET ${suffix}` }),
    await admin.capabilitySet(id, bytes, { groupType, name: `DRIVER_CAP_SET ${suffix}` }),
  ];
}

function expectStatus(reply: Reply, status: number): void {
  expect(
    reply.status === status,
    () => `${reply.name}: expected ${outcome({ status, qualifier: 0 }).split('/')[0]}, came ${outcome(reply)}`,
  );
}

/** An id that the device does not report. */
function unknownId(offer: Offer): number {
  return [0x7ff, 0x7fe, 0x700].find((id) => !offer.ids.includes(id)) ?? 0x6ff;
}

export const capabilityChecks: readonly Check[] = [
  must(
    'CAP-001',
    SECTION,
    'A device with capabilities supports CAP_ID_LIST_QUERY, DEVICE_CAP_GET and DRIVER_CAP_SET',
    ['cap-get-missing'],
    async (bench) => {
      const admin = bench.console(await bench.up({ admin: true }));
      const supported = await useCommands(admin);
      const needed = [AdminOpcode.CAP_ID_LIST_QUERY, AdminOpcode.DEVICE_CAP_GET, AdminOpcode.DRIVER_CAP_SET];
      const found = needed.filter((opcode) => supported.includes(opcode));
      need(found.length > 0, 'the device has no capabilities');
      expect(found.length === needed.length, `only ${found.length} of the three commands are supported`);
    },
  ),
  must('CAP-002', SECTION, 'A limit can be set to what the device offers', ['cap-same-refused'], async (bench) => {
    const { admin, offer } = await unset(bench);
    const all = driverCapabilities(admin, offer);
    const ids = [CapabilityId.NET_FF_RESOURCE, CapabilityId.NET_IPSEC_RESOURCE].filter((id) => all.has(id));
    need(ids.length > 0, 'the device has no capability with limits');
    for (const id of ids) succeeded(await admin.capabilitySet(id, all.get(id) ?? new Uint8Array(0)));
  }),
  must(
    'CAP-003',
    SECTION,
    'A limit can be set to less than the device offers',
    ['cap-smaller-refused'],
    async (bench) => {
      const { admin, offer } = await unset(bench);
      need(offer.flow !== null || offer.sas !== null, 'the device has no capability with limits');
      const wire = ipsecWire(admin.revision);
      if (offer.flow !== null)
        succeeded(await admin.capabilitySet(CapabilityId.NET_FF_RESOURCE, encodeFlowFilterLimits(halved(offer.flow))));
      if (offer.sas !== null)
        succeeded(await admin.capabilitySet(CapabilityId.NET_IPSEC_RESOURCE, wire.encodeSaLimits(halved(offer.sas))));
    },
  ),
  must('CAP-004', SECTION, 'All flag bits that the device offers can be set', ['cap-same-refused'], async (bench) => {
    const { admin, offer } = await unset(bench);
    const all = driverCapabilities(admin, offer);
    const ids = [CapabilityId.NET_FF_SELECTOR, CapabilityId.NET_IPSEC_SA].filter((id) => all.has(id));
    need(ids.length > 0, 'the device has no capability with flags');
    for (const id of ids) succeeded(await admin.capabilitySet(id, all.get(id) ?? new Uint8Array(0)));
  }),
  must(
    'CAP-005',
    SECTION,
    'Fewer flag bits than the device offers can be set',
    ['cap-smaller-refused'],
    async (bench) => {
      const { admin, offer } = await unset(bench);
      need(offer.selectors.length > 0 || offer.modes.length > 0, 'the device has no capability with flags');
      const wire = ipsecWire(admin.revision);
      if (offer.selectors.length > 0) {
        const selectors = offer.selectors.map((selector) => ({ ...selector, flags: 0 }));
        succeeded(await admin.capabilitySet(CapabilityId.NET_FF_SELECTOR, encodeSelectorCapability(selectors)));
      }
      if (offer.modes.length > 0) {
        const modes = offer.modes.map((mode) => ({ ...mode, options: 0 }));
        succeeded(await admin.capabilitySet(CapabilityId.NET_IPSEC_SA, wire.encodeModes(modes)));
      }
    },
  ),
  must(
    'CAP-006',
    SECTION,
    'The capability commands fail with EINVAL for the SR-IOV group',
    ['adm-group-unchecked'],
    async (bench) => {
      const { admin, offer } = await unset(bench);
      for (const reply of await forGroup(admin, offer, SR_IOV)) expectStatus(reply, AdminStatus.EINVAL);
    },
  ),
  should(
    'CAP-007',
    SECTION,
    'The capability commands fail with EINVAL for a group that does not exist',
    ['adm-group-unchecked'],
    async (bench) => {
      const { admin, offer } = await unset(bench);
      for (const reply of await forGroup(admin, offer, BAD_GROUP)) expectStatus(reply, AdminStatus.EINVAL);
    },
  ),
  should(
    'CAP-008',
    SECTION,
    'A capability with objects cannot be disabled: EBUSY',
    ['cap-busy-unchecked'],
    async (bench) => {
      const { admin, offer } = await unset(bench);
      need(offer.flow !== null, 'the device has no flow filter');
      await useCapabilities(admin, offer);
      succeeded(await admin.create(ResourceType.NET_FF_GROUP, 0, encodeGroup({ priority: 5 })));
      const none = {
        groups: 0,
        classifiers: 0,
        rules: 0,
        rulesPerGroup: 0,
        lastRulePriority: 0,
        selectorsPerClassifier: 0,
      };
      expectStatus(
        await admin.capabilitySet(CapabilityId.NET_FF_RESOURCE, encodeFlowFilterLimits(none)),
        AdminStatus.EBUSY,
      );
    },
  ),
  should(
    'CAP-009',
    SECTION,
    'DEVICE_CAP_GET of a capability that is not reported fails with ENXIO',
    ['cap-unknown-as-einval'],
    async (bench) => {
      const { admin, offer } = await unset(bench);
      expectStatus(await admin.capabilityGet(unknownId(offer)), AdminStatus.ENXIO);
    },
  ),
  should(
    'CAP-010',
    SECTION,
    'DRIVER_CAP_SET of a capability that is not reported fails with ENXIO',
    ['cap-unknown-as-einval'],
    async (bench) => {
      const { admin, offer } = await unset(bench);
      expectStatus(await admin.capabilitySet(unknownId(offer), new Uint8Array(8)), AdminStatus.ENXIO);
    },
  ),
  should(
    'CAP-011',
    SECTION,
    'Limits that the driver has not set count as zero',
    ['cap-unset-allowed'],
    async (bench) => {
      const { admin, offer } = await unset(bench);
      need(offer.flow !== null, 'the device has no flow filter');
      await useCapabilities(admin, offer, { without: [CapabilityId.NET_FF_RESOURCE] });
      const reply = await admin.create(ResourceType.NET_FF_GROUP, 0, encodeGroup({ priority: 5 }));
      expect(reply.status !== AdminStatus.OK, `${reply.name} succeeded, though no limit was set`);
    },
  ),
];
