import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { VipsecError } from '../../src/errors.ts';
import { InboundRules } from '../../src/ipsec/inbound-rules.ts';
import { InlineIpsec, type MutableSaTable } from '../../src/ipsec/inline.ts';
import { recogniseRevision } from '../../src/ipsec/wire/recognise.ts';
import { ipsecWire, WIRE_REVISIONS } from '../../src/ipsec/wire/revisions.ts';
import { AdminQueue } from '../../src/virtio/admin.ts';
import { AdminStatus, adminOpcodeName, encodeAdminReply } from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { findObjectOpcodes } from '../../src/virtio/objects.ts';
import { DeviceStatus } from '../../src/virtio/pci-layout.ts';
import { FlowFilter } from '../../src/virtio-net/flow-filter.ts';
import { encodeGroup, FlowFilterObject } from '../../src/virtio-net/flow-filter-wire.ts';
import { runs } from '../depth.ts';
import { AdminBench } from '../device/helpers/admin.ts';
import { FakeDevice, receiveCommands } from '../virtio/fake-device.ts';
import type { NaiveSplitDevice } from '../virtqueue/support.ts';
import { inbound, key, outbound } from './support.ts';

/** Milliseconds: every command is answered, however busy the machine is. */
const TIMEOUT = 30_000;

/** What becomes of the reply to one command. */
interface Spoiled {
  /** Which command, counted from 0. */
  readonly which: number;
  readonly bytes?: Uint8Array | undefined;
  readonly changes: readonly [number, number][];
  readonly length?: number | undefined;
  /** Instead of the right reply. */
  readonly replace?: (reply: Uint8Array) => Uint8Array;
}

const edge = fc.constantFrom(0, 1, 2, 3, 6, 0x7f, 0x80, 0xfe, 0xff);
const spoiled: fc.Arbitrary<Spoiled> = fc.record({
  which: fc.nat(24),
  bytes: fc.option(fc.uint8Array({ maxLength: 300 }), { nil: undefined, freq: 3 }),
  changes: fc.array(fc.tuple(fc.nat(220), edge), { maxLength: 5 }),
  length: fc.option(fc.nat(300), { nil: undefined }),
});

/** Everything that a driver does with its administration queue, on a device that does it right but for some replies. */
async function drive(bench: AdminBench, spoil: readonly Spoiled[]): Promise<string[]> {
  const { revision } = bench;
  const device = new FakeDevice();
  const features = FeatureSet.of(Feature.VERSION_1, Feature.ADMIN_VQ, Feature.IPSEC, Feature.INDIRECT_DESC);
  device.accepted = features;
  const admin = new AdminQueue(device, device, features, { revision, timeout: TIMEOUT });
  device.status = DeviceStatus.DRIVER_OK;
  const queue = device.queues.get(2) as NaiveSplitDevice;
  const served: string[] = [];
  device.onNotify = () => {
    setImmediate(() => {
      for (const command of receiveCommands(device, queue)) {
        const bytes = command.shared.slice();
        const right = encodeAdminReply(bench.raw(bytes));
        const what = spoil.find(({ which }) => which === served.length);
        const reply = what?.replace?.(right) ?? right;
        served.push(adminOpcodeName(bytes[0] | (bytes[1] << 8)));
        const room = new Uint8Array(Math.min(command.writable, Math.max(reply.length, what?.length ?? 0)));
        room.set((what?.bytes ?? reply).subarray(0, room.length));
        for (const [at, value] of what?.changes ?? []) if (at < room.length) room[at] = value;
        command.answer(room, Math.min(what?.length ?? room.length, command.writable));
      }
    });
  };
  try {
    await use(admin, revision);
  } finally {
    admin.close();
    bench.admin.clear();
  }
  return served;
}

async function use(admin: AdminQueue, revision: (typeof WIRE_REVISIONS)[number]): Promise<void> {
  await admin.listUse(await admin.listQuery());
  const ids = await admin.capabilityIds();
  recogniseRevision(await admin.deviceCapability(0x804));
  const filter = await FlowFilter.open(admin, ids);
  if (filter !== null) {
    const group = await filter.addGroup(7);
    await findObjectOpcodes(admin, FlowFilterObject.group, group.id, encodeGroup(group));
    await filter.removeGroup(group);
  }
  const table: MutableSaTable = { resourceId: new Uint32Array(0), handle: new Uint32Array(0) };
  const inline = await InlineIpsec.open(admin, ids, {
    wire: ipsecWire(revision),
    rules: filter === null ? null : new InboundRules(filter),
    table,
    handles: 16,
    maxSas: 8,
    quiesceTransmit: async () => true,
    receiveQueues: 1,
  });
  if (inline === null) return;
  for (const [handle, sa] of [outbound(), inbound({ spi: 0x2000 })].entries()) {
    if (inline.obstacle(sa) !== null) continue;
    await inline.create(handle + 1, sa);
    const kept = await inline.query(handle + 1);
    expect(JSON.stringify(kept, (_, value) => (typeof value === 'bigint' ? `${value}` : value))).not.toContain(
      [...key(16)].join(),
    );
    await inline.modify(handle + 1, {
      ...sa,
      aead: { name: 'aes-gcm', key: key(16, 99), salt: key(4), icvLength: 16 },
    });
    await inline.destroy(handle + 1);
  }
}

/** The code with which the driver fails when one reply is another; `done` when it gets through. */
async function outcome(bench: AdminBench, spoil: Spoiled): Promise<string> {
  try {
    await drive(bench, [spoil]);
    return 'done';
  } catch (error) {
    if (error instanceof VipsecError) return error.code;
    throw error;
  }
}

/** What `use` asks for, in this order. */
const COMMANDS = [
  'LIST_QUERY',
  'LIST_USE',
  'CAP_ID_LIST_QUERY',
  ...['DEVICE_CAP_GET', 'DEVICE_CAP_GET', 'DEVICE_CAP_GET', 'DEVICE_CAP_GET'],
  ...['DRIVER_CAP_SET', 'DRIVER_CAP_SET', 'DRIVER_CAP_SET'],
  ...['RESOURCE_OBJ_CREATE', 'RESOURCE_OBJ_QUERY', 'RESOURCE_OBJ_DESTROY'],
  ...['DEVICE_CAP_GET', 'DEVICE_CAP_GET', 'DRIVER_CAP_SET', 'DRIVER_CAP_SET'],
  // An outbound SA, and an inbound one with group, classifier and rule.
  ...['RESOURCE_OBJ_CREATE', 'RESOURCE_OBJ_QUERY', 'RESOURCE_OBJ_MODIFY', 'RESOURCE_OBJ_DESTROY'],
  ...['RESOURCE_OBJ_CREATE', 'RESOURCE_OBJ_CREATE', 'RESOURCE_OBJ_CREATE', 'RESOURCE_OBJ_CREATE'],
  ...['RESOURCE_OBJ_QUERY', 'RESOURCE_OBJ_MODIFY'],
  ...['RESOURCE_OBJ_DESTROY', 'RESOURCE_OBJ_DESTROY', 'RESOURCE_OBJ_DESTROY'],
];
/** Where the result of a reply begins. */
const RESULT = 8;

/** What a result of ones leads to, by command. Limits of ones are set, and refused by the device. */
const ONES: Readonly<Record<number, string>> = {
  0: 'ADMIN_EINVAL',
  4: 'ADMIN_EINVAL',
  5: 'MALFORMED_CAPABILITY',
  6: 'MALFORMED_CAPABILITY',
  11: 'ADMIN_EINVAL',
  14: 'MALFORMED_CAPABILITY',
  18: 'MALFORMED_OBJECT',
  25: 'MALFORMED_OBJECT',
};

/** What a result that is missing, and counts as zero, leads to, by command. */
const MISSING: Readonly<Record<number, string>> = {
  0: 'ADMIN_EINVAL',
  4: 'FLOW_LIMIT',
  5: 'ADMIN_EINVAL',
  6: 'ADMIN_EINVAL',
  11: 'ADMIN_EINVAL',
};

describe.each(WIRE_REVISIONS)('a driver that speaks %s', (revision) => {
  const bench = new AdminBench(revision);
  afterAll(() => bench.close());

  it('gets done what it wants of a device that answers rightly', async () => {
    expect(await drive(bench, [])).toEqual(COMMANDS);
  });

  const places = COMMANDS.map((name, which) => ({ name, which }));

  it.each(places)('fails with what the device says when it refuses $name, command $which', async ({ which }) => {
    const replace = () => Uint8Array.of(AdminStatus.EINVAL, 0, 0, 0, 0, 0, 0, 0);
    expect(await outcome(bench, { which, changes: [], replace })).toBe('ADMIN_EINVAL');
  });

  it.each(places)('fails when nothing was written for $name, command $which', async ({ which }) => {
    expect(await outcome(bench, { which, changes: [], replace: () => new Uint8Array(0) })).toBe('ADMIN_REPLY');
  });

  it.each(places)('finds out about a result of ones for $name, command $which', async ({ which }) => {
    const replace = (reply: Uint8Array) => reply.slice().fill(0xff, RESULT);
    expect(await outcome(bench, { which, changes: [], replace })).toBe(ONES[which] ?? 'done');
  });

  it.each(places)('lives with a result that is missing for $name, command $which', async ({ which }) => {
    const replace = (reply: Uint8Array) => reply.subarray(0, RESULT);
    expect(await outcome(bench, { which, changes: [], replace })).toBe(MISSING[which] ?? 'done');
  });

  it('takes any reply of a device, or fails with a typed error', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(spoiled, { minLength: 1, maxLength: 3 }), async (spoil) => {
        try {
          await drive(bench, spoil);
        } catch (error) {
          if (!(error instanceof VipsecError)) throw error;
          expect(error.code).toMatch(/^[A-Z][A-Z0-9_]+$/);
          expect(error.message).not.toContain([...key(16)].join());
        }
      }),
      { numRuns: runs(100) },
    );
  }, 60_000);
});
