import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { type DeviceQueue, NO_BUFFER } from '../../src/device/queues.ts';
import { ipsecWire, WIRE_REVISIONS } from '../../src/ipsec/wire/revisions.ts';
import {
  AdminOpcode,
  AdminQualifier,
  AdminStatus,
  CapabilityId,
  encodeAdminCommand,
  encodeCapabilityCommand,
  encodeResourceCommand,
  ResourceType,
} from '../../src/virtio/admin-wire.ts';
import type { WireRevision } from '../../src/virtio/revision.ts';
import {
  encodeClassifier,
  encodeGroup,
  encodeRule,
  FlowFilterAction,
  SELECTOR_LENGTH,
} from '../../src/virtio-net/flow-filter-wire.ts';
import { runs } from '../depth.ts';
import { AdminBench } from './helpers/admin.ts';
import { encodeSa, inboundObject, saObject } from './helpers/sa.ts';

const GUARD = 0xa5;

/** A queue that holds one command, and sees what the device does with its buffers. */
class OneCommand implements DeviceQueue {
  readonly index = 2;
  readonly size = 8;
  readonly broken = null;
  readonly low = new Uint32Array(0);
  readonly high = new Uint32Array(0);
  readonly length = new Uint32Array(0);
  readonly readable = 1;
  readonly segments = 2;
  readonly readableBytes: number;
  readonly writableBytes: number;
  /** The device-writable part, and bytes behind it that nobody may touch. */
  readonly reply: Uint8Array;
  readonly #u8: Uint8Array;
  readonly #command: Uint8Array;
  #left = 1;
  used = -1;

  constructor(u8: Uint8Array, command: Uint8Array, writable: number) {
    this.#u8 = u8;
    this.#command = command;
    this.readableBytes = command.length;
    this.writableBytes = writable;
    this.reply = new Uint8Array(writable + 64).fill(GUARD);
  }

  available(): number {
    return this.#left;
  }
  take(): number {
    return this.#left-- > 0 ? 3 : NO_BUFFER;
  }
  putBack(): void {
    this.#left++;
  }
  complete(id: number, written: number): void {
    expect(id).toBe(3);
    this.used = written;
  }
  publish(): boolean {
    return false;
  }
  gather(skip: number, max: number, to: number): number {
    const bytes = this.#command.subarray(skip, skip + max);
    this.#u8.set(bytes, to);
    return bytes.length;
  }
  scatter(skip: number, bytes: number, from: number): number {
    const n = Math.max(0, Math.min(bytes, this.writableBytes - skip));
    this.reply.set(this.#u8.subarray(from, from + n), skip);
    return n;
  }
  suppress(): void {}
  arm(): boolean {
    return false;
  }
  close(): void {}
}

const benches: AdminBench[] = [];
afterEach(() => {
  for (const bench of benches.splice(0)) bench.close();
});

const TYPES = Object.values(ResourceType);
const IDS = [0, 1, 2, 3];
const { NET_IPSEC_OUTB_SA, NET_IPSEC_INB_SA, NET_FF_GROUP, NET_FF_CLASSIFIER, NET_FF_RULE } = ResourceType;

/** A device with some objects of each type, as a driver that knows what it does has made them. */
function inUse(revision: WireRevision): { bench: AdminBench; objects: Map<string, Uint8Array> } {
  const bench = new AdminBench(revision).enable();
  benches.push(bench);
  const wire = ipsecWire(revision);
  const objects = new Map<string, Uint8Array>();
  const create = (type: number, id: number, object: Uint8Array) => {
    expect(bench.create(type, id, object)).toMatchObject({ status: AdminStatus.OK });
    objects.set(`${type}`, object);
  };
  create(NET_IPSEC_OUTB_SA, 1, encodeSa(wire, saObject({ objectId: 1, cipherKey: new Uint8Array(16).fill(9) })));
  create(NET_IPSEC_INB_SA, 1, encodeSa(wire, inboundObject({ objectId: 1 })));
  create(NET_FF_GROUP, 1, encodeGroup({ priority: 77 }));
  const mask = (type: number, at: number, length: number) => ({
    type,
    flags: 0,
    mask: new Uint8Array(SELECTOR_LENGTH[type]).fill(0xff, at, at + length),
  });
  create(NET_FF_CLASSIFIER, 1, encodeClassifier({ selectors: [mask(1, 12, 2), mask(2, 9, 1), mask(6, 0, 4)] }));
  const key = new Uint8Array(42);
  key.set([8, 0], 12);
  key[23] = 50;
  const rule = { groupId: 1, classifierId: 1, priority: 1, action: FlowFilterAction.ipsec, queueIndex: 0, key };
  create(NET_FF_RULE, 1, encodeRule(rule));
  return { bench, objects };
}

/** All that the device keeps for the driver. */
function stateOf(bench: AdminBench): string {
  const text = (value: unknown) =>
    JSON.stringify(value, (_, part) =>
      typeof part === 'bigint' ? `${part}` : part instanceof Uint8Array ? [...part] : part,
    );
  const objects = TYPES.flatMap((type) =>
    IDS.map((id) =>
      type >= NET_IPSEC_OUTB_SA
        ? bench.ipsec.query(type, id)
        : bench.flowFilter.has(type, id) && bench.query(type, id).result,
    ),
  );
  const { flow, ipsec } = bench.capabilities;
  return text([objects, flow, ipsec, bench.flowFilter.size, bench.flowFilter.inUse, bench.ipsec.inUse]);
}

const edge = fc.constantFrom(0, 1, 2, 3, 4, 7, 0x7f, 0x80, 0xfe, 0xff);
/** Changes to some bytes, then a length. */
const damage = fc.record({
  changes: fc.array(fc.tuple(fc.nat(260), edge), { maxLength: 4 }),
  cut: fc.option(fc.nat(260), { nil: undefined }),
  extra: fc.oneof(fc.constant(0), fc.nat(64), fc.constantFrom(4096, 65536 - 300)),
});

function damaged(
  bytes: Uint8Array,
  { changes, cut, extra }: { changes: [number, number][]; cut?: number | undefined; extra: number },
): Uint8Array {
  const out = new Uint8Array(bytes.length + extra);
  out.set(bytes);
  for (const [at, value] of changes) if (at < out.length) out[at] = value;
  return cut === undefined ? out : out.subarray(0, Math.min(cut, out.length));
}

const id = fc.constantFrom(0, 1, 2, 65535, 65536, 0xffffffff);
const OBJECT_OPCODES = [0xa, 0xb, 0xc, 0xd];

/** A command that was right before something happened to it, or noise. */
function commands(
  revision: WireRevision,
  objects: ReadonlyMap<string, Uint8Array>,
  bench: AdminBench,
): fc.Arbitrary<Uint8Array> {
  const whole = (opcode: number, data: Uint8Array, groupType = 0, groupMemberId = 0n): Uint8Array => {
    const out = new Uint8Array(8192);
    return out.slice(0, encodeAdminCommand(out, { opcode, groupType, groupMemberId, data }));
  };
  const object = fc
    .tuple(
      fc.constantFrom(...OBJECT_OPCODES),
      fc.oneof(fc.constantFrom(...TYPES), fc.nat(0xffff)),
      id,
      fc.constantFrom(...objects.values()),
    )
    .map(([opcode, type, number, any]) => {
      const own = objects.get(`${type}`) ?? any;
      return whole(opcode, encodeResourceCommand(revision, opcode, { type, id: number, object: own }));
    });
  const capability = fc.constantFrom(...Object.values(CapabilityId)).map((number) => {
    const data = bench.getCapability(number).result ?? new Uint8Array(0);
    return whole(AdminOpcode.DRIVER_CAP_SET, encodeCapabilityCommand(number, data));
  });
  const list = fc
    .tuple(
      fc.nat(0x12),
      fc.uint8Array({ maxLength: 24 }),
      fc.constantFrom(0, 0, 1, 0xffff),
      fc.constantFrom(0n, 0n, 1n),
    )
    .map(([opcode, data, group, member]) => whole(opcode, data, group, member));
  const noise = fc.uint8Array({ maxLength: 400 });
  return fc
    .tuple(fc.oneof(object, object, capability, capability, list, noise), damage)
    .map(([bytes, what]) => damaged(bytes, what));
}

describe.each(WIRE_REVISIONS)('any command of a driver to a device that speaks %s', (revision) => {
  it('has a defined answer inside its buffer, and changes nothing when it fails', () => {
    const { bench, objects } = inUse(revision);
    const { u8 } = bench.arena;
    const outcome = { ok: 0, failed: 0 };
    const writable = fc.oneof(fc.nat(64), fc.constantFrom(8, 256, 2048, 65536));
    fc.assert(
      fc.property(commands(revision, objects, bench), writable, (bytes, room) => {
        const before = stateOf(bench);
        const queue = new OneCommand(u8, bytes, room);
        expect(bench.admin.poll(queue)).toBe(1);
        // Exactly what it says that it wrote, and all of the reply that fits.
        const { used, reply } = queue;
        expect(used).toBeGreaterThanOrEqual(Math.min(room, 8));
        expect(used).toBeLessThanOrEqual(room);
        expect(reply.subarray(room).every((byte) => byte === GUARD)).toBe(true);
        if (room < 4) {
          // Whether it was done is not to be seen.
          bench.admin.clear();
          rebuild(bench, objects);
          return;
        }
        const status = reply[0] | (reply[1] << 8);
        const qualifier = reply[2] | (reply[3] << 8);
        expect(Object.values<number>(AdminStatus)).toContain(status);
        expect(Object.values<number>(AdminQualifier)).toContain(qualifier);
        if (status === AdminStatus.OK) {
          expect(qualifier).toBe(AdminQualifier.OK);
          outcome.ok++;
          // A LIST_USE that blocks commands would end the test here.
          bench.admin.clear();
          rebuild(bench, objects);
        } else {
          outcome.failed++;
          expect(stateOf(bench)).toBe(before);
        }
        // Nothing of the command, which may hold keys, is left where packets are.
        expect(u8.subarray(POOL_END, POOL_END + 8192).every((byte) => byte === 0)).toBe(true);
      }),
      { numRuns: runs(500) },
    );
    expect(outcome.ok).toBeGreaterThan(runs(25));
    expect(outcome.failed).toBeGreaterThan(runs(200));
  }, 60_000);
});

/** `AdminBench` has its pool there, and behind it the scratch memory of the administration processor. */
const POOL_END = 2 ** 20;

/** The objects of `inUse` again. */
function rebuild(bench: AdminBench, objects: ReadonlyMap<string, Uint8Array>): void {
  bench.enable();
  for (const [type, object] of objects) {
    expect(bench.create(Number(type), 1, object)).toMatchObject({ status: AdminStatus.OK });
  }
}
