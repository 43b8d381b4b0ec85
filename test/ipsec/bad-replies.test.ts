import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { VipsecError } from '../../src/errors.ts';
import { InboundRules } from '../../src/ipsec/inbound-rules.ts';
import { InlineIpsec, type MutableSaTable } from '../../src/ipsec/inline.ts';
import { recogniseRevision } from '../../src/ipsec/wire/recognise.ts';
import { ipsecWire, WIRE_REVISIONS } from '../../src/ipsec/wire/revisions.ts';
import { AdminQueue } from '../../src/virtio/admin.ts';
import { encodeAdminReply } from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { findObjectOpcodes } from '../../src/virtio/objects.ts';
import { DeviceStatus } from '../../src/virtio/pci-layout.ts';
import { FlowFilter } from '../../src/virtio-net/flow-filter.ts';
import { encodeGroup, FlowFilterObject } from '../../src/virtio-net/flow-filter-wire.ts';
import { AdminBench } from '../device/helpers/admin.ts';
import { FakeDevice, receiveCommands } from '../virtio/fake-device.ts';
import type { NaiveSplitDevice } from '../virtqueue/support.ts';
import { inbound, key, outbound } from './support.ts';

/** What becomes of the reply to one command. */
interface Spoiled {
  /** Which command, counted from 0. */
  readonly which: number;
  readonly bytes?: Uint8Array | undefined;
  readonly changes: readonly [number, number][];
  readonly length?: number | undefined;
}

const edge = fc.constantFrom(0, 1, 2, 3, 6, 0x7f, 0x80, 0xfe, 0xff);
const spoiled: fc.Arbitrary<Spoiled> = fc.record({
  which: fc.nat(24),
  bytes: fc.option(fc.uint8Array({ maxLength: 300 }), { nil: undefined, freq: 3 }),
  changes: fc.array(fc.tuple(fc.nat(220), edge), { maxLength: 5 }),
  length: fc.option(fc.nat(300), { nil: undefined }),
});

/** Everything that a driver does with its administration queue, on a device that does it right but for some replies. */
async function drive(bench: AdminBench, spoil: readonly Spoiled[]): Promise<number> {
  const { revision } = bench;
  const device = new FakeDevice();
  const features = FeatureSet.of(Feature.VERSION_1, Feature.ADMIN_VQ, Feature.IPSEC, Feature.INDIRECT_DESC);
  device.accepted = features;
  const admin = new AdminQueue(device, device, features, { revision, timeout: 200 });
  device.status = DeviceStatus.DRIVER_OK;
  const queue = device.queues.get(2) as NaiveSplitDevice;
  let served = 0;
  device.onNotify = () => {
    setImmediate(() => {
      for (const command of receiveCommands(device, queue)) {
        const reply = encodeAdminReply(bench.raw(command.shared.slice()));
        const what = spoil.find(({ which }) => which === served);
        served++;
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
    quiesceTransmit: async () => {},
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

describe.each(WIRE_REVISIONS)('a driver that speaks %s', (revision) => {
  const bench = new AdminBench(revision);
  afterAll(() => bench.close());

  it('gets done what it wants of a device that answers rightly', async () => {
    expect(await drive(bench, [])).toBeGreaterThan(24);
  });

  it('takes any reply of a device, or fails with a typed error', async () => {
    const outcome = { done: 0, codes: new Set<string>() };
    await fc.assert(
      fc.asyncProperty(fc.array(spoiled, { minLength: 1, maxLength: 3 }), async (spoil) => {
        try {
          await drive(bench, spoil);
          outcome.done++;
        } catch (error) {
          if (!(error instanceof VipsecError)) throw error;
          expect(error.code).toMatch(/^[A-Z][A-Z0-9_]+$/);
          expect(error.message).not.toContain([...key(16)].join());
          outcome.codes.add(error.code);
        }
      }),
      { numRuns: 200 },
    );
    expect(outcome.done).toBeGreaterThan(5);
    // Which ones is chance; that there are several is not.
    expect(outcome.codes.size).toBeGreaterThan(1);
  }, 60_000);
});
