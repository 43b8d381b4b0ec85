/** Capabilities and objects of the flow filter (Virtio 1.4, 5.1.9.6.4). */
import { AdminQualifier, AdminStatus, CapabilityId, ResourceType as R } from '../../virtio/admin-wire.ts';
import { Feature } from '../../virtio/features.ts';
import { FlowFilterAction as Action, encodeGroup, SelectorFlag } from '../../virtio-net/flow-filter-wire.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, need, should } from '../check.ts';
import { type AdminConsole, outcome, type Reply } from '../console.ts';
import { type Limits, type Offer, offeredCapabilities, succeeded, useCapabilities, useCommands } from '../offer.ts';
import { type Classification, classification, classifierBytes, portMatch, ruleBytes } from '../samples.ts';

const SECTION = '5.1.9.6.4';
const CAPABILITIES = [CapabilityId.NET_FF_RESOURCE, CapabilityId.NET_FF_SELECTOR, CapabilityId.NET_FF_ACTION];
const TYPES = [R.NET_FF_GROUP, R.NET_FF_CLASSIFIER, R.NET_FF_RULE];
/** Ports of test packets. */
export const PORT = 4002;
/** An index that no receive queue has: transmitq1. */
const TRANSMIT_QUEUE = 1;
const RESERVED_ACTION = 0xee;

export interface Filter {
  readonly admin: AdminConsole;
  readonly offer: Offer;
}

export function needFlow(offer: Offer): void {
  need(offer.flow !== null && offer.selectors.length > 0 && offer.actions.length > 0, 'the device has no flow filter');
}

async function start(bench: Bench, limits: Limits = {}): Promise<Filter> {
  const admin = bench.console(await bench.up({ ipsec: limits }));
  const offer = await offeredCapabilities(admin);
  needFlow(offer);
  return { admin, offer };
}

export const group = (priority: number) => encodeGroup({ priority });

function expectStatus(reply: Reply, status: number): void {
  expect(
    reply.status === status,
    () => `${reply.name}: expected ${outcome({ status, qualifier: 0 }).split('/')[0]}, came ${outcome(reply)}`,
  );
}

function expectRefused(reply: Reply, what: string): void {
  expect(reply.status !== AdminStatus.OK, `${reply.name} succeeded with ${what}`);
}

/** Group 0 and classifier 0, which looks at the UDP destination port. */
export async function basis({ admin, offer }: Filter, port = PORT): Promise<Classification> {
  const classified = classification(offer, portMatch(port));
  succeeded(await admin.create(R.NET_FF_GROUP, 0, group(10)));
  succeeded(await admin.create(R.NET_FF_CLASSIFIER, 0, classifierBytes(classified)));
  return classified;
}

/** Commands on a resource type while a capability is disabled: INVALID_OPCODE as qualifier or, literally, as status. */
export async function expectDisabled(admin: AdminConsole, types: readonly number[]): Promise<void> {
  for (const type of types) {
    const object = new Uint8Array(16);
    const replies = [
      await admin.create(type, 0, object),
      await admin.modify(type, 0, object),
      await admin.query(type, 0),
      await admin.destroy(type, 0),
    ];
    for (const reply of replies) {
      const { status, qualifier } = reply;
      const literal = status === AdminQualifier.INVALID_OPCODE;
      const read = status === AdminStatus.EINVAL && qualifier === AdminQualifier.INVALID_OPCODE;
      expect(literal || read, `${reply.name}: expected EINVAL/INVALID_OPCODE, came ${outcome(reply)}`);
    }
  }
}

/** A bench with all capabilities set but `id`. */
export async function withoutCapability(bench: Bench, id: number): Promise<{ admin: AdminConsole; offer: Offer }> {
  const driver = await bench.bringUp(bench.target, { features: [Feature.ADMIN_VQ, Feature.IPSEC] });
  const admin = bench.console(driver);
  await useCommands(admin);
  const offer = await offeredCapabilities(admin);
  await useCapabilities(admin, offer, { without: [id] });
  return { admin, offer };
}

export function ruleCreate(
  { admin }: Filter,
  id: number,
  classified: Classification,
  change: Partial<Parameters<typeof ruleBytes>[1]> = {},
): Promise<Reply> {
  const rule = { group: 0, classifier: 0, priority: 1, action: Action.directRxVq, ...change };
  return admin.create(R.NET_FF_RULE, id, ruleBytes(classified, rule));
}

export const flowFilterChecks: readonly Check[] = [
  must(
    'FLT-001',
    SECTION,
    'FF_RESOURCE, FF_SELECTOR and FF_ACTION are among the capabilities',
    ['cap-list-short'],
    async (bench) => {
      const admin = bench.console(await bench.bringUp(bench.target, { features: [Feature.ADMIN_VQ] }));
      await useCommands(admin);
      const { ids } = await offeredCapabilities(admin);
      need(
        CAPABILITIES.some((id) => ids.includes(id)),
        'the device has no flow filter',
      );
      const missing = CAPABILITIES.filter((id) => !ids.includes(id));
      expect(missing.length === 0, `missing: ${missing.map((id) => `0x${id.toString(16)}`).join(', ')}`);
    },
  ),
  must(
    'FLT-002',
    SECTION,
    'Groups, classifiers and rules can be created, modified, queried and destroyed',
    ['obj-modify-refused', 'obj-two-only'],
    async (bench) => {
      const filter = await start(bench);
      const { admin } = filter;
      const classified = await basis(filter);
      succeeded(await ruleCreate(filter, 0, classified));
      succeeded(
        await admin.modify(
          R.NET_FF_RULE,
          0,
          ruleBytes(classified, { group: 0, classifier: 0, priority: 2, action: Action.drop }),
        ),
      );
      for (const type of TYPES) succeeded(await admin.query(type, 0));
      succeeded(await admin.destroy(R.NET_FF_RULE, 0));
      succeeded(await admin.modify(R.NET_FF_GROUP, 0, group(11)));
      succeeded(await admin.modify(R.NET_FF_CLASSIFIER, 0, classifierBytes(classified)));
      succeeded(await admin.destroy(R.NET_FF_CLASSIFIER, 0));
      succeeded(await admin.destroy(R.NET_FF_GROUP, 0));
    },
  ),
  ...CAPABILITIES.map((capability, i) =>
    should(
      `FLT-00${3 + i}`,
      SECTION,
      `While ${['FF_RESOURCE', 'FF_SELECTOR', 'FF_ACTION'][i]} is disabled, commands on the objects of the flow filter fail with INVALID_OPCODE`,
      ['obj-disabled-as-enomem'],
      async (bench) => {
        const { admin, offer } = await withoutCapability(bench, capability);
        needFlow(offer);
        await expectDisabled(admin, TYPES);
      },
    ),
  ),
  should(
    'FLT-006',
    SECTION,
    'CREATE of a group whose priority another has fails with EINVAL',
    ['obj-invalid-accepted'],
    async (bench) => {
      const { admin } = await start(bench);
      succeeded(await admin.create(R.NET_FF_GROUP, 0, group(10)));
      expectStatus(await admin.create(R.NET_FF_GROUP, 1, group(10)), AdminStatus.EINVAL);
    },
  ),
  should(
    'FLT-007',
    SECTION,
    'CREATE of more groups than groups_limit or rules_per_group_limit fails with ENOSPC',
    ['obj-full-as-einval'],
    async (bench) => {
      const { admin } = await start(bench, { flow: { groups: 8, rulesPerGroup: 2 } });
      for (const id of [0, 1]) succeeded(await admin.create(R.NET_FF_GROUP, id, group(id)));
      expectStatus(await admin.create(R.NET_FF_GROUP, 2, group(2)), AdminStatus.ENOSPC);
    },
  ),
  should(
    'FLT-008',
    SECTION,
    'CREATE of more classifiers than classifiers_limit fails with ENOSPC',
    ['obj-full-as-einval'],
    async (bench) => {
      const { admin, offer } = await start(bench, { flow: { classifiers: 2 } });
      const bytes = classifierBytes(classification(offer, portMatch(PORT)));
      for (const id of [0, 1]) succeeded(await admin.create(R.NET_FF_CLASSIFIER, id, bytes));
      expectStatus(await admin.create(R.NET_FF_CLASSIFIER, 2, bytes), AdminStatus.ENOSPC);
    },
  ),
  should(
    'FLT-009',
    SECTION,
    'DESTROY of a group with rules fails with EBUSY',
    ['obj-busy-unchecked'],
    async (bench) => {
      const filter = await start(bench);
      succeeded(await ruleCreate(filter, 0, await basis(filter)));
      expectStatus(await filter.admin.destroy(R.NET_FF_GROUP, 0), AdminStatus.EBUSY);
    },
  ),
  should(
    'FLT-010',
    SECTION,
    'DESTROY of a classifier with rules fails with EBUSY',
    ['obj-busy-unchecked'],
    async (bench) => {
      const filter = await start(bench);
      succeeded(await ruleCreate(filter, 0, await basis(filter)));
      expectStatus(await filter.admin.destroy(R.NET_FF_CLASSIFIER, 0), AdminStatus.EBUSY);
    },
  ),
  should(
    'FLT-011',
    SECTION,
    'CREATE of a rule that directs to what is no receive queue fails',
    ['obj-invalid-accepted'],
    async (bench) => {
      const filter = await start(bench);
      const classified = await basis(filter);
      expectRefused(await ruleCreate(filter, 0, classified, { queue: TRANSMIT_QUEUE }), 'vq_index 1');
      expectRefused(await ruleCreate(filter, 0, classified, { queue: 0xfffe }), 'vq_index 0xfffe');
      succeeded(await ruleCreate(filter, 0, classified, { queue: 0 }));
    },
  ),
  should(
    'FLT-012',
    SECTION,
    'CREATE of a rule whose priority is not below last_rule_priority fails',
    ['obj-invalid-accepted'],
    async (bench) => {
      const last = 10;
      const filter = await start(bench, { flow: { lastRulePriority: last } });
      need((filter.offer.flow?.lastRulePriority ?? 0) >= last, 'the device has fewer priorities');
      const classified = await basis(filter);
      expectRefused(
        await ruleCreate(filter, 0, classified, { priority: last }),
        `rule_priority ${last}, which last_rule_priority is`,
      );
      succeeded(await ruleCreate(filter, 0, classified, { priority: last - 1 }));
    },
  ),
  should(
    'FLT-013',
    SECTION,
    'CREATE of a rule whose id is not below rules_limit and rules_per_group_limit fails',
    ['obj-invalid-accepted'],
    async (bench) => {
      const filter = await start(bench, { flow: { rules: 8, rulesPerGroup: 4 } });
      const classified = await basis(filter);
      expectRefused(await ruleCreate(filter, 4, classified), 'id 4, which rules_per_group_limit is');
      succeeded(await ruleCreate(filter, 3, classified));
    },
  ),
  should(
    'FLT-014',
    SECTION,
    'CREATE of a rule whose keys are not as long as the masks of its classifier fails',
    ['obj-invalid-accepted'],
    async (bench) => {
      const filter = await start(bench);
      const classified = await basis(filter);
      const { key } = classified;
      expectRefused(
        await ruleCreate(filter, 0, { ...classified, key: key.subarray(0, key.length - 1) }),
        'a key that is one byte short',
      );
      expectRefused(
        await ruleCreate(filter, 0, { ...classified, key: Uint8Array.of(...key, 0) }),
        'a key that is one byte long',
      );
      succeeded(await ruleCreate(filter, 0, classified));
    },
  ),
  should(
    'FLT-015',
    SECTION,
    'CREATE of a rule with an action that is not in FF_ACTION fails',
    ['obj-invalid-accepted'],
    async (bench) => {
      const filter = await start(bench);
      expectRefused(
        await ruleCreate(filter, 0, await basis(filter), { action: RESERVED_ACTION }),
        `action ${RESERVED_ACTION}`,
      );
    },
  ),
  must(
    'FLT-025',
    SECTION,
    'A classifier can be created with flags PARTIAL_MASK when its selectors support partial masks',
    ['obj-flags-refused'],
    async (bench) => {
      const { admin, offer } = await start(bench);
      const classified = classification(offer, portMatch(PORT));
      const partial = classified.selectors.every(({ type }) =>
        offer.selectors.some((one) => one.type === type && (one.flags & SelectorFlag.partialMask) !== 0),
      );
      need(partial, 'the device does not support partial masks');
      const flagged = classified.selectors.map((selector) => ({ ...selector, flags: SelectorFlag.partialMask }));
      const bytes = classifierBytes({ ...classified, selectors: flagged });
      succeeded(await admin.create(R.NET_FF_CLASSIFIER, 0, bytes, BigInt(SelectorFlag.partialMask)));
    },
  ),
];
