/** Device resource objects (Virtio 1.4, 2.12.1.3.5), tried with the objects of the flow filter and SAs. */
import { IpProtocol } from '../../packet/fields.ts';
import { AdminStatus, ResourceType as R } from '../../virtio/admin-wire.ts';
import { encodeGroup, FlowFilterAction } from '../../virtio-net/flow-filter-wire.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, need, should } from '../check.ts';
import { type AdminConsole, outcome, type Reply } from '../console.ts';
import { excerpt } from '../frames.ts';
import { type Limits, type Offer, offeredCapabilities, succeeded } from '../offer.ts';
import { anySa, type Classification, classification, classifierBytes, ruleBytes, saBytes } from '../samples.ts';

const SECTION = '2.12.1.3.5';

async function start(bench: Bench, limits: Limits = {}): Promise<{ admin: AdminConsole; offer: Offer }> {
  const admin = bench.console(await bench.up({ ipsec: limits }));
  const offer = await offeredCapabilities(admin);
  need(offer.flow !== null && offer.flow.groups > 0, 'the device has no flow filter');
  return { admin, offer };
}

const group = (priority: number) => encodeGroup({ priority });

function expectStatus(reply: Reply, ...statuses: readonly number[]): void {
  const names = statuses.map((status) => outcome({ status, qualifier: 0 }).split('/')[0]);
  expect(
    statuses.includes(reply.status),
    () => `${reply.name}: expected ${names.join(' or ')}, came ${outcome(reply)}`,
  );
}

/** A group, a classifier and a rule that depends on both, all with id 0. */
async function withRule(bench: Bench): Promise<{ admin: AdminConsole; classified: Classification }> {
  const { admin, offer } = await start(bench);
  const classified = classification(offer, { protocol: IpProtocol.udp });
  succeeded(await admin.create(R.NET_FF_GROUP, 0, group(1)));
  succeeded(await admin.create(R.NET_FF_CLASSIFIER, 0, classifierBytes(classified)));
  succeeded(await admin.create(R.NET_FF_RULE, 0, rule(classified)));
  return { admin, classified };
}

function rule(classified: Classification, priority = 1): Uint8Array {
  return ruleBytes(classified, { group: 0, classifier: 0, priority, action: FlowFilterAction.directRxVq });
}

/** What QUERY gives must be what was set; missing bytes are zeros. */
function expectSame(reply: Reply, object: Uint8Array): void {
  const result = succeeded(reply);
  const same = object.every((byte, i) => byte === (result[i] ?? 0));
  expect(same, `${reply.name} gives ${excerpt(result)}, not what was set: ${excerpt(object)}`);
}

export const objectChecks: readonly Check[] = [
  should(
    'OBJ-001',
    SECTION,
    'CREATE of an object that exists fails with EEXIST',
    ['obj-exists-as-einval'],
    async (bench) => {
      const { admin } = await start(bench);
      succeeded(await admin.create(R.NET_FF_GROUP, 0, group(1)));
      expectStatus(await admin.create(R.NET_FF_GROUP, 0, group(2)), AdminStatus.EEXIST);
    },
  ),
  should(
    'OBJ-002',
    SECTION,
    'MODIFY of an object that does not exist fails with ENXIO',
    ['obj-missing-as-einval'],
    async (bench) => {
      const { admin } = await start(bench);
      expectStatus(await admin.modify(R.NET_FF_GROUP, 0, group(1)), AdminStatus.ENXIO);
    },
  ),
  should(
    'OBJ-003',
    SECTION,
    'QUERY of an object that does not exist fails with ENXIO',
    ['obj-missing-as-einval'],
    async (bench) => {
      const { admin } = await start(bench);
      expectStatus(await admin.query(R.NET_FF_GROUP, 0), AdminStatus.ENXIO);
    },
  ),
  should(
    'OBJ-004',
    SECTION,
    'DESTROY of an object that does not exist fails with ENXIO',
    ['obj-missing-as-einval'],
    async (bench) => {
      const { admin } = await start(bench);
      expectStatus(await admin.destroy(R.NET_FF_GROUP, 0), AdminStatus.ENXIO);
    },
  ),
  should(
    'OBJ-005',
    SECTION,
    'CREATE fails with ENOSPC when the device fails to create the object',
    ['obj-full-as-einval'],
    async (bench) => {
      const { admin } = await start(bench, { flow: { groups: 2 } });
      for (const id of [0, 1]) succeeded(await admin.create(R.NET_FF_GROUP, id, group(id)));
      expectStatus(await admin.create(R.NET_FF_GROUP, 2, group(2)), AdminStatus.ENOSPC);
    },
  ),
  should(
    'OBJ-006',
    SECTION,
    'MODIFY of an object that others depend on fails with EBUSY',
    ['obj-busy-unchecked'],
    async (bench) => {
      const { admin } = await withRule(bench);
      expectStatus(await admin.modify(R.NET_FF_GROUP, 0, group(9)), AdminStatus.EBUSY);
    },
  ),
  should(
    'OBJ-007',
    SECTION,
    'DESTROY of an object that others depend on fails with EBUSY',
    ['obj-busy-unchecked'],
    async (bench) => {
      const { admin } = await withRule(bench);
      expectStatus(await admin.destroy(R.NET_FF_GROUP, 0), AdminStatus.EBUSY);
    },
  ),
  must(
    'OBJ-008',
    SECTION,
    'An object that was destroyed can be created again without a reset',
    ['obj-id-once'],
    async (bench) => {
      const { admin } = await start(bench);
      for (let time = 0; time < 3; time++) {
        succeeded(await admin.create(R.NET_FF_GROUP, 0, group(time)));
        succeeded(await admin.destroy(R.NET_FF_GROUP, 0));
      }
    },
  ),
  should(
    'OBJ-009',
    SECTION,
    'An object can be created with any id that is free',
    ['obj-ids-in-order'],
    async (bench) => {
      const { admin, offer } = await start(bench);
      const last = (offer.flow?.groups ?? 1) - 1;
      for (const id of new Set([last, 0, last >>> 1])) succeeded(await admin.create(R.NET_FF_GROUP, id, group(id)));
    },
  ),
  should(
    'OBJ-010',
    SECTION,
    'As many objects can be created as the driver capability says',
    ['obj-two-only'],
    async (bench) => {
      const wanted = 8;
      const { admin, offer } = await start(bench, {
        flow: { groups: wanted },
        sas: { inbound: wanted, outbound: wanted },
      });
      const groups = Math.min(wanted, offer.flow?.groups ?? 0, offer.flow?.rulesPerGroup ?? 0);
      for (let id = 0; id < groups; id++) succeeded(await admin.create(R.NET_FF_GROUP, id, group(id)));
      for (let id = 0; id < Math.min(wanted, offer.sas?.outbound ?? 0); id++) {
        succeeded(
          await admin.create(
            R.NET_IPSEC_OUTB_SA,
            id,
            saBytes(admin.revision, anySa(offer, 'outbound', 0x2000 + id), id),
          ),
        );
      }
    },
  ),
  must(
    'OBJ-011',
    SECTION,
    'A MODIFY that fails has no side effects on the object',
    ['obj-modify-destroys'],
    async (bench) => {
      const { admin, offer } = await start(bench);
      const sa = saBytes(admin.revision, anySa(offer, 'inbound'), 0);
      succeeded(await admin.create(R.NET_IPSEC_INB_SA, 0, sa));
      const wrong = sa.slice();
      // The first byte is `mode`: this one is reserved.
      wrong[0] = 0xff;
      const reply = await admin.modify(R.NET_IPSEC_INB_SA, 0, wrong);
      need(reply.status !== AdminStatus.OK, 'the device took an SA with a reserved mode');
      expectSame(await admin.query(R.NET_IPSEC_INB_SA, 0), sa);
    },
  ),
  must('OBJ-012', SECTION, 'QUERY gives what CREATE has set', ['obj-query-zeros'], async (bench) => {
    const { admin, classified } = await withRule(bench);
    const offer = await offeredCapabilities(admin);
    expectSame(await admin.query(R.NET_FF_GROUP, 0), group(1));
    expectSame(await admin.query(R.NET_FF_CLASSIFIER, 0), classifierBytes(classified));
    expectSame(await admin.query(R.NET_FF_RULE, 0), rule(classified));
    for (const [type, direction] of [
      [R.NET_IPSEC_OUTB_SA, 'outbound'],
      [R.NET_IPSEC_INB_SA, 'inbound'],
    ] as const) {
      const sa = saBytes(admin.revision, anySa(offer, direction), 0);
      succeeded(await admin.create(type, 0, sa));
      expectSame(await admin.query(type, 0), sa);
    }
  }),
  must('OBJ-013', SECTION, 'QUERY gives what the last MODIFY has set', ['obj-query-stale'], async (bench) => {
    const { admin, classified } = await withRule(bench);
    const modified = rule(classified, 2);
    succeeded(await admin.modify(R.NET_FF_RULE, 0, modified));
    expectSame(await admin.query(R.NET_FF_RULE, 0), modified);
    succeeded(await admin.create(R.NET_FF_GROUP, 1, group(5)));
    succeeded(await admin.modify(R.NET_FF_GROUP, 1, group(6)));
    expectSame(await admin.query(R.NET_FF_GROUP, 1), group(6));
  }),
];
