import { describe, expect, it } from 'vitest';
import { IpsecError, VirtioError } from '../../src/errors.ts';
import { InboundRules } from '../../src/ipsec/inbound-rules.ts';
import { InlineIpsec } from '../../src/ipsec/inline.ts';
import { IpsecManager } from '../../src/ipsec/manager.ts';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import type { SoftwareSide } from '../../src/ipsec/own-sas.ts';
import { QueueSas } from '../../src/ipsec/queue-sas.ts';
import { SaState, sharedCounts } from '../../src/ipsec/sa-state.ts';
import type { SaEntry, SaProgress, SaThread, SaThreads } from '../../src/ipsec/sa-thread.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { FlowFilter } from '../../src/virtio-net/flow-filter.ts';
import { ipsecDevice } from './fake-device.ts';
import { inbound, key, outbound } from './support.ts';

const HANDLES = 8;
/** Capabilities of flow filter and IPsec. */
const IDS = [0x800, 0x801, 0x802, 0x803, 0x804];
const code = (name: string) => expect.objectContaining({ code: name });

/** A thread that does what it is told, or fails as the test says. */
class FakeThread implements SaThread {
  readonly index: number;
  readonly counts = sharedCounts(HANDLES);
  readonly entries = new Map<number, SaEntry>();
  /** Next sequence numbers by handle. */
  readonly next = new Map<number, bigint>();
  failure: Error | null = null;
  /** Whether the device takes what was given to it. */
  drains = true;

  constructor(index: number) {
    this.index = index;
  }

  async add(entry: SaEntry): Promise<void> {
    if (this.failure !== null) throw this.failure;
    this.entries.set(entry.handle, entry);
    this.next.set(entry.handle, entry.sa.initial.sequence);
  }

  async modify(entry: SaEntry): Promise<bigint | null> {
    if (this.failure !== null) throw this.failure;
    this.entries.set(entry.handle, entry);
    return this.next.get(entry.handle) ?? null;
  }

  async take(): Promise<SaProgress> {
    throw this.failure ?? new IpsecError('NO_SUCH_SA', 'not here');
  }

  async sent(): Promise<boolean> {
    return this.drains;
  }

  async remove(handle: number): Promise<bigint | null> {
    if (this.failure !== null) throw this.failure;
    this.entries.delete(handle);
    return this.next.get(handle) ?? null;
  }
}

class FakeThreads implements SaThreads {
  readonly owners = new Uint16Array(HANDLES + 1);
  readonly threads = [new FakeThread(1), new FakeThread(2)];
  /** Those that have opened their queues. */
  opened: readonly FakeThread[] = this.threads;

  owner(queue: number | undefined): SaThread | null {
    return this.threads.find(({ index }) => index === queue) ?? null;
  }

  open(): readonly SaThread[] {
    return this.opened;
  }
}

function setup(inline: InlineIpsec | null = null, sequence = 1n) {
  const threads = new FakeThreads();
  const software: SoftwareSide = {
    add: () => {},
    modify: () => {},
    remove: () => {},
    take: () => {
      throw new IpsecError('NO_SUCH_SA', 'not here');
    },
    counters: () => ({
      packets: 0n,
      bytes: 0n,
      dropped: {},
      sequence,
      engine: 'noble',
      transform: 'aes-128-gcm-16',
      softExpired: false,
    }),
    setMtu: () => {},
    protect: () => {},
    unprotect: () => {},
    close: () => {},
  };
  const manager = new IpsecManager({
    inline,
    inlineObstacle: inline === null ? 'no device' : null,
    software: () => software,
    guard: new NonceGuard({ memory: new NonceMemory() }),
    mtu: 1500,
    handles: HANDLES,
    threads,
  });
  const [first] = threads.threads;
  return { manager, threads, first };
}

const sa = (n = 0) => outbound({ aead: { name: 'aes-gcm', key: key(16, n), salt: key(4), icvLength: 16 } });
const gone = new VirtioError('QUEUE_GONE', 'gone');
const late = new VirtioError('QUEUE_TIMEOUT', 'late');

describe('an outbound SA of the device on a thread', () => {
  it.each([true, false])(
    'gives the id of its object back when all its packets have left the ring: %s',
    async (drains) => {
      const admin = ipsecDevice({ inbound: 0, outbound: 1 });
      const inline = await InlineIpsec.open(admin, [0x803, 0x804], {
        wire: ipsecWire('virtio-1.4'),
        rules: null,
        table: { resourceId: new Uint32Array(0), handle: new Uint32Array(0) },
        handles: HANDLES,
        maxSas: HANDLES,
        quiesceTransmit: async () => true,
        receiveQueues: 0,
      });
      const { manager, first } = setup(inline);
      const one = await manager.addSa(sa(1), { queue: 1 });
      expect(one.placement.where).toBe('inline');
      first.drains = drains;
      await one.remove();
      expect(admin.objects.size).toBe(0);
      const two = await manager.addSa(sa(2), { queue: 1 });
      expect(two.placement.where).toBe(drains ? 'inline' : 'software');
    },
  );
});

describe('an inbound SA of the device on all threads', () => {
  it('is one for threads that open their queues after it has moved to the device, and none after it has moved away', async () => {
    const admin = ipsecDevice({ inbound: 1, outbound: 0 });
    const filter = await FlowFilter.open(admin, IDS);
    const inline = await InlineIpsec.open(admin, IDS, {
      wire: ipsecWire('virtio-1.4'),
      rules: filter === null ? null : new InboundRules(filter),
      table: { resourceId: new Uint32Array(0), handle: new Uint32Array(0) },
      handles: HANDLES,
      maxSas: HANDLES,
      quiesceTransmit: async () => true,
      receiveQueues: 0,
    });
    const { manager, threads, first } = setup(inline, 0n);
    threads.opened = [];
    const one = await manager.addSa(inbound(), { require: 'software' });
    await one.move('inline', inbound());
    manager.threads.threadOpened(first);
    expect(first.entries.get(one.handle)).toMatchObject({ where: 'inline', object: { id: 0, reused: false } });
    await first.remove(one.handle);
    await one.move('software', inbound());
    // The id has another SA now: packets of it are no business of the first.
    const two = await manager.addSa(
      { ...sa(9), direction: 'inbound', spi: 2, initial: { sequence: 0n } },
      { require: 'inline' },
    );
    manager.threads.threadOpened(first);
    expect([...first.entries.keys()]).toEqual([two.handle]);
    await one.remove();
    await two.remove();
  });

  it('is lost to a thread that is too slow to learn of a new selector', async () => {
    const threads = new FakeThreads();
    const [slow, quick] = threads.threads;
    const device = { objectOf: () => ({ id: 0, reused: false }), destroy: async () => null };
    const state = new SaState(HANDLES, () => {});
    const queues = new QueueSas(threads, device, new NonceGuard({ memory: new NonceMemory() }), state);
    queues.addEverywhere(1, inbound());
    slow.modify = async () => {
      throw late;
    };
    const selector = { protocol: 17 };
    await queues.replaceInline(null, 1, inbound({ selector }), false);
    expect(slow.entries.size).toBe(0);
    expect(quick.entries.get(1)?.sa.selector).toEqual(selector);
    queues.close();
  });
});

describe('SAs on other threads', () => {
  it('have an owner, which every thread can see', async () => {
    const { manager, threads, first } = setup();
    const [mine, theirs] = [await manager.addSa(sa(1)), await manager.addSa(sa(2), { queue: 1 })];
    expect([mine.queue, theirs.queue]).toEqual([null, 1]);
    expect([...threads.owners.subarray(1, 3)]).toEqual([1, 3]);
    expect([...first.entries.keys()]).toEqual([theirs.handle]);
    await theirs.remove();
    expect([...threads.owners.subarray(1, 3)]).toEqual([1, 0]);
    expect(first.entries.size).toBe(0);
    manager.close(gone);
    expect(threads.owners.every((owner) => owner === 0)).toBe(true);
  });

  it('may come back with their key behind the number that the thread has said', async () => {
    const { manager, first } = setup();
    const one = await manager.addSa(sa(), { queue: 1 });
    first.next.set(one.handle, 1000n);
    await one.remove();
    const behind = (sequence: bigint) => ({ ...sa(), initial: { sequence } });
    await expect(manager.addSa(behind(999n), { queue: 1 })).rejects.toThrow(code('NONCE_REUSE'));
    await expect(manager.addSa(behind(1000n), { queue: 2 })).resolves.toBeDefined();
  });

  it('refused by the thread are as if they had never been', async () => {
    const { manager, threads, first } = setup();
    for (const failure of [new IpsecError('TRANSFORM_UNSUPPORTED', 'no engine'), late]) {
      first.failure = failure;
      await expect(manager.addSa(sa(), { queue: 1 })).rejects.toThrow(code(failure.code));
    }
    first.failure = null;
    expect(manager.list()).toEqual([]);
    expect(threads.owners[1]).toBe(0);
    await expect(manager.addSa(sa(), { queue: 1 })).resolves.toBeDefined();
  });

  it('of a thread that has died meanwhile have used all their nonces', async () => {
    const { manager, first } = setup();
    first.failure = gone;
    await expect(manager.addSa(sa(1), { queue: 1 })).rejects.toThrow(code('QUEUE_GONE'));
    await expect(manager.addSa(sa(1))).rejects.toThrow(code('NONCE_REUSE'));
    first.failure = null;
    const two = await manager.addSa(sa(2), { queue: 1 });
    first.next.set(two.handle, 7n);
    first.failure = gone;
    await two.remove();
    await expect(manager.addSa({ ...sa(2), initial: { sequence: 1_000_000n } })).rejects.toThrow(code('NONCE_REUSE'));
    first.failure = null;
    const three = await manager.addSa(sa(3), { queue: 1 });
    await manager.threads.threadEnded(first, new Map());
    expect(manager.get(three.handle)).toBeUndefined();
    await expect(manager.addSa(sa(3))).rejects.toThrow(code('NONCE_REUSE'));
    const four = await manager.addSa(sa(4), { queue: 2 });
    expect(manager.get(four.handle)).toBe(four);
  });

  it('that a slow thread may still have keep their handle, and the key is used up', async () => {
    const { manager, first } = setup();
    const one = await manager.addSa(sa(), { queue: 1 });
    first.failure = late;
    await one.remove();
    first.failure = null;
    await expect(manager.addSa(sa())).rejects.toThrow(code('NONCE_REUSE'));
    for (let n = 1; n < HANDLES; n++) expect((await manager.addSa(sa(n))).handle).not.toBe(one.handle);
    await expect(manager.addSa(sa(HANDLES))).rejects.toThrow(code('SA_LIMIT'));
  });

  it('end with what the thread says when it lets go', async () => {
    const { manager, first } = setup();
    const one = await manager.addSa(sa(), { queue: 1 });
    first.counts.packets[one.handle] = 41;
    await manager.threads.threadEnded(first, new Map([[one.handle, 42n]]));
    expect(one.traffic().packets).toBe(41n);
    await expect(manager.addSa({ ...sa(), initial: { sequence: 41n } })).rejects.toThrow(code('NONCE_REUSE'));
    await expect(manager.addSa({ ...sa(), initial: { sequence: 42n } })).resolves.toBeDefined();
  });

  it('with a new key are changed only together with their nonces', async () => {
    const { manager, first } = setup();
    const one = await manager.addSa(sa(1), { queue: 1 });
    first.next.set(one.handle, 100n);
    await one.modify(sa(2));
    await expect(manager.addSa({ ...sa(1), initial: { sequence: 99n } })).rejects.toThrow(code('NONCE_REUSE'));
    await expect(manager.addSa({ ...sa(1), initial: { sequence: 100n } })).resolves.toBeDefined();
    first.failure = late;
    await expect(one.modify(sa(3))).rejects.toThrow(code('QUEUE_TIMEOUT'));
    first.failure = null;
    // The new key was not used, and the old one is still in use.
    await expect(manager.addSa(sa(3))).resolves.toBeDefined();
    await expect(manager.addSa(sa(2))).rejects.toThrow(code('NONCE_REUSE'));
  });

  it('tell of themselves only while they are there, and stay where they are', async () => {
    const { manager } = setup();
    const told: string[] = [];
    manager.onSaEvent(({ event }) => told.push(event));
    const one = await manager.addSa(sa(), { queue: 1 });
    manager.threads.threadEvent(one.handle, 'soft-expiry', ['packets']);
    await Promise.resolve();
    expect(one.traffic().softExpired).toBe(true);
    await expect(one.move('inline', sa())).rejects.toThrow(code('SA_MOVE'));
    await one.remove();
    manager.threads.threadEvent(one.handle, 'hard-expiry', ['packets']);
    manager.threads.threadEvent(77, 'hard-expiry', ['packets']);
    await Promise.resolve();
    expect(told).toEqual(['soft-expiry']);
  });

  it('that are inbound have no nonces, and one thread', async () => {
    const { manager, first, threads } = setup();
    const one = await manager.addSa(inbound(), { queue: 1 });
    expect([...first.entries.keys()]).toEqual([one.handle]);
    expect(threads.threads[1].entries.size).toBe(0);
    await one.remove();
    await expect(manager.addSa(inbound(), { queue: 2 })).resolves.toBeDefined();
  });
});
