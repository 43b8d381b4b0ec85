import { describe, expect, it } from 'vitest';
import { IpsecError, VirtioError } from '../../src/errors.ts';
import { SoftwareIpsec } from '../../src/fallback/software.ts';
import { InlineIpsec, type MutableSaTable } from '../../src/ipsec/inline.ts';
import { IpsecManager } from '../../src/ipsec/manager.ts';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import { SaPair } from '../../src/ipsec/rekey.ts';
import { countsBuffer, sharedCounts } from '../../src/ipsec/sa-state.ts';
import type { SaEntry, SaProgress, SaThread, SaThreads } from '../../src/ipsec/sa-thread.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { NOT_INLINE } from '../../src/virtio-net/sa-table.ts';
import { packSa, wipeParcel } from '../../src/worker/sa-parcel.ts';
import { WorkerIpsec } from '../../src/worker/worker-ipsec.ts';
import { plainMemory } from '../fallback/node-engine.ts';
import { ipsecDevice } from './fake-device.ts';
import { inbound, key, outbound } from './support.ts';

const HANDLES = 8;
const code = (name: string) => expect.objectContaining({ code: name });
const gone = new VirtioError('QUEUE_GONE', 'gone');
const late = new VirtioError('QUEUE_TIMEOUT', 'late');

type Step = 'add' | 'take' | 'sent';

/** A thread with the SAs of a real one, that fails as a test says; `after` means that it has done what it does not answer. */
class ModelThread implements SaThread {
  readonly index: number;
  readonly counts;
  readonly ipsec: WorkerIpsec;
  fail: { step: Step; error: Error; after?: boolean } | null = null;
  /** Called in front of each step. */
  onStep: (step: Step) => void = () => {};

  constructor(index: number, owners: SharedArrayBuffer) {
    this.index = index;
    const counts = countsBuffer(HANDLES);
    this.counts = sharedCounts(HANDLES, counts);
    const sas = { handles: HANDLES, inboundLimit: 0, owners, counts, engine: 'noble' as const };
    this.ipsec = new WorkerIpsec(sas, new PacketPool(plainMemory(8 * 2048)), 1500, () => {});
  }

  async #step<T>(step: Step, work: () => T): Promise<T> {
    this.onStep(step);
    const fail = this.fail?.step === step ? this.fail : null;
    if (fail !== null) this.fail = null;
    if (fail !== null && fail.after !== true) throw fail.error;
    const value = work();
    if (fail !== null) throw fail.error;
    return value;
  }

  add(entry: SaEntry): Promise<void> {
    const sa = packSa(entry.sa, true);
    return this.#step('add', () => this.ipsec.add({ ...entry, sa })).finally(() => wipeParcel(sa));
  }

  take(handle: number): Promise<SaProgress> {
    return this.#step('take', () => structuredClone(this.ipsec.take(handle)));
  }

  /** Whether the device takes what was given to it. */
  drains = true;

  async sent(): Promise<boolean> {
    this.onStep('sent');
    return this.drains;
  }

  async modify(entry: SaEntry, rekeyed: boolean): Promise<bigint | null> {
    return this.ipsec.modify({ ...entry, sa: packSa(entry.sa, true) }, rekeyed);
  }

  async remove(handle: number): Promise<bigint | null> {
    return this.ipsec.remove(handle);
  }

  has(handle: number): boolean {
    return this.ipsec.state.place[handle] !== 0;
  }
}

function setup(inline: InlineIpsec | null = null) {
  const shared = new SharedArrayBuffer(2 * (HANDLES + 1));
  const list = [new ModelThread(1, shared), new ModelThread(2, shared)];
  const threads: SaThreads = {
    owners: new Uint16Array(shared),
    owner: (queue) => list.find(({ index }) => index === queue) ?? null,
    open: () => list,
  };
  const pool = new PacketPool(plainMemory(8 * 2048));
  const manager = new IpsecManager({
    inline,
    inlineObstacle: inline === null ? 'no device' : null,
    software: (onEvent) => new SoftwareIpsec(pool, { engine: 'noble', onEvent }),
    guard: new NonceGuard({ memory: new NonceMemory() }),
    mtu: 1500,
    handles: HANDLES,
    threads,
  });
  const [first, second] = list;
  return { manager, first, second, owners: threads.owners };
}

/** A device that has room for one outbound SA. */
async function smallDevice(): Promise<{ inline: InlineIpsec; table: MutableSaTable }> {
  const table: MutableSaTable = { resourceId: new Uint32Array(0), handle: new Uint32Array(0) };
  const inline = await InlineIpsec.open(ipsecDevice({ inbound: 0, outbound: 1 }), [0x803, 0x804], {
    wire: ipsecWire('virtio-1.4'),
    rules: null,
    table,
    handles: HANDLES,
    maxSas: HANDLES,
    quiesceTransmit: async () => true,
    receiveQueues: 0,
  });
  if (inline === null) throw new Error('the device offers no IPsec');
  return { inline, table };
}

const sa = (n = 0) => outbound({ aead: { name: 'aes-gcm', key: key(16, n), salt: key(4), icvLength: 16 } });
const later = (sequence: bigint) => ({ ...sa(), initial: { sequence } });

describe('an SA on its way to another thread', () => {
  it('is on no thread between the two, and every thread knows whose it is', async () => {
    const { manager, first, second, owners } = setup();
    const one = await manager.addSa(sa(), { queue: 1 });
    const seen: [boolean, boolean, number][] = [];
    for (const thread of [first, second]) {
      thread.onStep = (step) => {
        if (step !== 'take') seen.push([first.has(one.handle), second.has(one.handle), owners[one.handle]]);
      };
    }
    await one.moveToQueue(2, sa());
    expect(seen).toEqual([
      [false, false, 3],
      [false, false, 3],
    ]);
    expect([first.has(one.handle), second.has(one.handle), owners[one.handle], one.queue]).toEqual([false, true, 4, 2]);
    await one.moveToQueue(0, sa());
    expect([second.has(one.handle), owners[one.handle], one.queue]).toEqual([false, 1, null]);
    expect(one.traffic()).toMatchObject({ packets: 0n, sequence: 1n });
    await one.remove();
    await expect(manager.addSa(sa(), { queue: 2 })).resolves.toBeDefined();
  });

  it('is where it was when the thread that has it does not answer', async () => {
    const { manager, first, second } = setup();
    const one = await manager.addSa(sa(), { queue: 1 });
    first.fail = { step: 'take', error: late };
    await expect(one.moveToQueue(2, sa())).rejects.toThrow(code('QUEUE_TIMEOUT'));
    expect([first.has(one.handle), second.has(one.handle), one.queue]).toEqual([true, false, 1]);
    await one.moveToQueue(2, sa());
  });

  it('goes back when the other thread refuses it, or does not answer', async () => {
    const { manager, first, second, owners } = setup();
    for (const error of [new IpsecError('TRANSFORM_UNSUPPORTED', 'no engine'), late]) {
      const one = await manager.addSa(later(100n), { queue: 1 });
      second.fail = { step: 'add', error };
      await expect(one.moveToQueue(2, sa())).rejects.toThrow(code(error.code));
      expect([first.has(one.handle), second.has(one.handle), one.queue, owners[one.handle]]).toEqual([
        true,
        false,
        1,
        3,
      ]);
      expect(first.ipsec.software?.sequence(one.handle)).toBe(100n);
      await one.remove();
    }
  });

  it('is over when it can neither go on nor back, and its nonces are used', async () => {
    const { manager, first, second, owners } = setup();
    const one = await manager.addSa(sa(), { queue: 1 });
    second.fail = { step: 'add', error: late };
    first.fail = { step: 'add', error: gone };
    await expect(one.moveToQueue(2, sa())).rejects.toThrow(code('QUEUE_TIMEOUT'));
    expect(manager.get(one.handle)).toBeUndefined();
    expect(owners[one.handle]).toBe(0);
    expect(one.traffic().packets).toBe(0n);
    for (const queue of [0, 1, 2]) {
      await expect(manager.addSa(later(1_000_000n), { queue })).rejects.toThrow(code('NONCE_REUSE'));
    }
    // Its number is free again.
    for (let n = 1; n <= HANDLES; n++) await manager.addSa(sa(n));
  });

  it.each([
    ['before it has it', false],
    ['when it has it', true],
  ])('is over with the thread that it goes to, %s', async (_, after) => {
    const { manager, first, second } = setup();
    const one = await manager.addSa(sa(), { queue: 1 });
    second.fail = { step: 'add', error: gone, after };
    second.onStep = () => void manager.threads.threadEnded(second, new Map());
    await expect(one.moveToQueue(2, sa())).rejects.toThrow(code('QUEUE_GONE'));
    expect(manager.get(one.handle)).toBeUndefined();
    expect(first.has(one.handle)).toBe(false);
    await expect(manager.addSa(later(1_000_000n), { queue: 1 })).rejects.toThrow(code('NONCE_REUSE'));
  });

  it('may come back with its key behind the number that the thread has said that it went to, and that has let go', async () => {
    const { manager, second } = setup();
    const one = await manager.addSa(later(50n), { queue: 1 });
    await one.moveToQueue(2, sa());
    await manager.threads.threadEnded(second, new Map([[one.handle, 60n]]));
    await expect(manager.addSa(later(59n), { queue: 1 })).rejects.toThrow(code('NONCE_REUSE'));
    await expect(manager.addSa(later(60n), { queue: 1 })).resolves.toBeDefined();
  });

  it('is not touched by the end of the thread that has let go of it', async () => {
    const { manager, first, second } = setup();
    const one = await manager.addSa(sa(), { queue: 1 });
    first.onStep = (step) => {
      if (step === 'sent') void manager.threads.threadEnded(first, new Map());
    };
    await one.moveToQueue(2, sa());
    expect([second.has(one.handle), one.queue]).toEqual([true, 2]);
  });

  it('is over when the NIC ends, and is not entered afterwards', async () => {
    const { manager, first, second } = setup();
    for (const queue of [0, 2]) {
      const { manager, first, second } = setup();
      const one = await manager.addSa(sa(), { queue: 1 });
      first.onStep = (step) => {
        if (step === 'sent') manager.close(new VirtioError('NIC_CLOSED', 'closed'));
      };
      await expect(one.moveToQueue(queue, sa())).rejects.toThrow(code('NIC_CLOSED'));
      expect([first.has(one.handle), second.has(one.handle), manager.software]).toEqual([false, false, null]);
    }
    const one = await manager.addSa(sa());
    const moving = one.moveToQueue(1, sa());
    manager.close(new VirtioError('NIC_CLOSED', 'closed'));
    await expect(moving).rejects.toThrow(code('NIC_CLOSED'));
    expect([first.has(one.handle), second.has(one.handle)]).toEqual([false, false]);
  });

  it('waits for a change that is under way, and is waited for', async () => {
    const { manager, first, second } = setup();
    const one = await manager.addSa(sa(), { queue: 1 });
    const longer = { ...sa(), lifetime: { softPackets: 10n, hardPackets: 0n, softBytes: 0n, hardBytes: 0n } };
    const done = [one.modify(longer), one.moveToQueue(2, longer), one.moveToQueue(1, longer), one.remove()];
    await Promise.all(done);
    expect([first.has(one.handle), second.has(one.handle), manager.list()]).toEqual([false, false, []]);
  });

  it('is itself: the same in everything but its name and what it began with', async () => {
    const { manager } = setup();
    const one = await manager.addSa({ ...inbound(), name: 'one' }, { queue: 1 });
    for (const other of [
      inbound({ replayWindow: 32 }),
      inbound({ aead: { name: 'aes-gcm', key: key(16, 7), salt: key(4, 0x50), icvLength: 16 } }),
      inbound({ aead: { name: 'aes-gcm', key: key(16), salt: key(4, 0x51), icvLength: 16 } }),
      inbound({ aead: { name: 'aes-gcm', key: key(16), salt: key(4, 0x50), icvLength: 8 } }),
      inbound({ options: { ...inbound().options, esn: true } }),
      inbound({ selector: { source: { address: Uint8Array.of(10, 0, 0, 0), length: 8 } } }),
    ]) {
      await expect(one.moveToQueue(2, other)).rejects.toThrow(code('SA_MOVE'));
    }
    await one.moveToQueue(2, { ...inbound(), name: 'two', initial: { sequence: 5n } });
    expect(one.queue).toBe(2);
  });
});

describe('an SA of the device on its way to another thread', () => {
  it('takes its object along: one thread at a time can name it', async () => {
    const { inline, table } = await smallDevice();
    const { manager, first, second } = setup(inline);
    const one = await manager.addSa(sa(), { queue: 1 });
    const { handle } = one;
    expect(one.placement.where).toBe('inline');
    const named = () =>
      [table, first.ipsec.table, second.ipsec.table].map((of) => of.resourceId[handle] !== NOT_INLINE);
    for (const [queue, want] of [
      [2, [false, false, true]],
      [0, [true, false, false]],
      [1, [false, true, false]],
    ] as const) {
      await one.moveToQueue(queue, sa());
      expect(named()).toEqual(want);
    }
    await one.remove();
    expect(named()).toEqual([false, false, false]);
  });

  it.each([true, false])(
    'gives its id back if all packets had left the ring from which it came: %s',
    async (drains) => {
      for (const last of [0, 2]) {
        const { inline } = await smallDevice();
        const { manager, first } = setup(inline);
        const one = await manager.addSa(sa(), { queue: 1 });
        first.drains = drains;
        await one.moveToQueue(last, sa());
        first.drains = true;
        await one.remove();
        expect((await manager.addSa(sa(1))).placement.where).toBe(drains ? 'inline' : 'software');
      }
    },
  );
});

describe('an SA of the device whose thread ends', () => {
  it.each([true, false])('gives its id back when the ring of the thread is empty, which is now: %s', async (isSent) => {
    const { inline } = await smallDevice();
    const { manager, first } = setup(inline);
    const where = async (n: number) => {
      const one = await manager.addSa(sa(n));
      await one.remove();
      return one.placement.where;
    };
    await manager.addSa(sa(), { queue: 1 });
    await manager.threads.threadEnded(first, new Map(), false, isSent);
    expect(await where(1)).toBe(isSent ? 'inline' : 'software');
    // The queue pair is reset before the next thread gets it.
    manager.threads.threadReset(first);
    expect(await where(2)).toBe('inline');
  });
});

describe('a pair of SAs', () => {
  it('is followed by the next one on the queues to which it has moved', async () => {
    const { manager } = setup();
    const sas = (n: number) => ({
      outbound: { ...sa(n), spi: 0x100 + n },
      inbound: inbound({ spi: 0x200 + n }),
    });
    const pair = await SaPair.open(manager, sas(1), { queue: 1, graceMs: 0 });
    expect([pair.outbound.queue, pair.inbound.queue]).toEqual([1, 1]);
    await pair.outbound.moveToQueue(2, sas(1).outbound);
    await pair.inbound.moveToQueue(0, sas(1).inbound);
    const { done } = await pair.rekey(sas(2));
    expect([pair.outbound.queue, pair.inbound.queue]).toEqual([2, null]);
    await done;
    await pair.close();
    expect(manager.list()).toEqual([]);
  });
});
