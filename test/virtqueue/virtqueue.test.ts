import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { VirtioError } from '../../src/errors.ts';
import { allocateVirtqueue, type RingFormat } from '../../src/virtqueue/create.ts';
import type { Virtqueue, VirtqueueOptions } from '../../src/virtqueue/virtqueue.ts';
import { runs } from '../depth.ts';
import { NaivePackedDevice } from './packed-support.ts';
import { type Chain, type NaiveDevice, NaiveSplitDevice, setupOf, TestMemory } from './support.ts';

const IOVA_LOW = 0x2000_0000;
const IOVA_HIGH = 3;

/** Buffers by token: token t is `length[t]` bytes at offset 4096 * t. */
const TOKENS = 64;
const offset = Uint32Array.from({ length: TOKENS }, (_, t) => 4096 * t);
const length = Uint32Array.from({ length: TOKENS }, (_, t) => 100 + t);

function post(queue: Virtqueue, tokens: number[], deviceWrites = true): number {
  return queue.postBurst(Uint32Array.from(tokens), 0, tokens.length, offset, length, deviceWrites);
}

function take(queue: Virtqueue, max = 1000): { token: number; written: number }[] {
  const tokens = new Uint32Array(queue.size);
  const written = new Uint32Array(queue.size);
  const n = queue.take(tokens, written, Math.min(max, queue.size));
  return Array.from({ length: n }, (_, i) => ({ token: tokens[i], written: written[i] }));
}

function fetchAll(device: NaiveDevice): Chain[] {
  const chains: Chain[] = [];
  for (let chain = device.fetch(); chain !== undefined; chain = device.fetch()) chains.push(chain);
  return chains;
}

describe.each(['split', 'packed'] as const satisfies RingFormat[])('a %s virtqueue', (format) => {
  function make(options: Partial<VirtqueueOptions> = {}) {
    const memory = new TestMemory();
    const all = { index: 7, size: 8, iovaLow: IOVA_LOW, iovaHigh: IOVA_HIGH, ...options };
    const queue = allocateVirtqueue(format, memory, all);
    const Device = format === 'split' ? NaiveSplitDevice : NaivePackedDevice;
    return { memory, queue, device: new Device(memory, setupOf(queue), options.eventIdx) as NaiveDevice };
  }

  it('shows the device nothing before publish, then every buffer with its address, length and direction', () => {
    const { queue, device } = make({ headroom: 12 });
    expect(post(queue, [3, 5], false)).toBe(2);
    expect(device.waiting).toBe(0);
    queue.publish();
    const base = IOVA_HIGH * 2 ** 32 + IOVA_LOW;
    expect(fetchAll(device).map((chain) => chain.pieces)).toEqual([
      [{ iova: base + 3 * 4096 - 12, length: 103 + 12, writable: false }],
      [{ iova: base + 5 * 4096 - 12, length: 105 + 12, writable: false }],
    ]);
  });

  it('takes as many buffers as there are descriptors, and says how many', () => {
    const { queue } = make({ size: 4 });
    expect(post(queue, [0, 1, 2])).toBe(3);
    expect(post(queue, [3, 4, 5])).toBe(1);
    expect(post(queue, [6])).toBe(0);
    expect(queue.free).toBe(0);
  });

  it('posts a part of a burst', () => {
    const { queue, device } = make();
    expect(queue.postBurst(Uint32Array.of(9, 8, 7, 6), 1, 3, offset, length, true)).toBe(2);
    expect(queue.postBurst(Uint32Array.of(9), 1, 1, offset, length, true)).toBe(0);
    expect(queue.postBurst(Uint32Array.of(9), 1, 0, offset, length, true)).toBe(0);
    queue.publish();
    expect(fetchAll(device).map((chain) => chain.pieces[0].length)).toEqual([108, 107]);
  });

  it('gives used buffers back in the order in which the device returned them', () => {
    const { queue, device } = make();
    post(queue, [10, 11, 12, 13, 14, 15]);
    queue.publish();
    const heads = fetchAll(device).map((chain) => chain.head);
    device.complete(heads[0], 5);
    device.complete(heads[3], 6);
    device.complete(heads[1], 111);
    expect(take(queue, 2)).toEqual([
      { token: 10, written: 5 },
      { token: 13, written: 6 },
    ]);
    expect(take(queue)).toEqual([{ token: 11, written: 111 }]);
    expect(take(queue)).toEqual([]);
    expect(queue.free).toBe(5);
  });

  it('goes on after 65536 buffers, where all indices wrap', () => {
    const burst = Array.from({ length: 16 }, (_, i) => i);
    for (const outOfOrder of [false, true]) {
      const { queue, device } = make({ size: 16 });
      for (let i = 0; i < 70_000; i += burst.length) {
        post(queue, burst);
        queue.publish();
        const heads = fetchAll(device).map((chain) => chain.head);
        if (outOfOrder) heads.reverse();
        for (const head of heads) device.writeUsed(head, i % 90);
        device.publishUsed();
        const used = take(queue);
        if (outOfOrder) used.reverse();
        const right = used.every(({ token, written }, k) => token === k && written === i % 90);
        if (used.length !== burst.length || !right) throw new Error(`after ${i} buffers: ${JSON.stringify(used)}`);
      }
      expect(queue.broken).toBeNull();
      expect(queue.free).toBe(16);
    }
  });

  it.each([
    { indirectEntries: 0, name: 'a descriptor for each piece', descriptors: 4 },
    { indirectEntries: 4, name: 'one descriptor with an indirect table', descriptors: 1 },
    { indirectEntries: 3, name: 'direct descriptors when the table is too small', descriptors: 4 },
  ])('posts a chain with $name', ({ indirectEntries, descriptors }) => {
    const { queue, device } = make({ indirectEntries });
    const pieces = Uint32Array.of(0x1000, 1, 24, 0x2000, 0, 8, 0x3000, 2, 16, 0x4000, 0, 100);
    expect(queue.postChain(42, pieces, 2, 2)).toBe(true);
    expect(queue.free).toBe(8 - descriptors);
    queue.publish();
    const [chain] = fetchAll(device);
    expect(chain.indirect).toBe(descriptors === 1);
    expect(chain.pieces).toEqual([
      { iova: 0x1_0000_1000, length: 24, writable: false },
      { iova: 0x2000, length: 8, writable: false },
      { iova: 0x2_0000_3000, length: 16, writable: true },
      { iova: 0x4000, length: 100, writable: true },
    ]);
    device.complete(chain.head, 116);
    expect(take(queue)).toEqual([{ token: 42, written: 116 }]);
    expect(queue.free).toBe(8);
  });

  it('uses no indirect table for one piece, and refuses a chain without pieces or without room', () => {
    const { queue, device } = make({ size: 2, indirectEntries: 2 });
    expect(queue.postChain(1, Uint32Array.of(), 0, 0)).toBe(false);
    expect(queue.postChain(1, Uint32Array.of(16, 0, 4), 1, 0)).toBe(true);
    expect(queue.postChain(2, Uint32Array.of(16, 0, 4, 32, 0, 4), 1, 1)).toBe(true);
    expect(queue.postChain(3, Uint32Array.of(16, 0, 4), 1, 0)).toBe(false);
    queue.publish();
    expect(fetchAll(device)[0].indirect).toBe(false);
  });

  it('refuses a chain of more pieces than it has descriptors, even in an indirect table', () => {
    const { queue } = make({ size: 2, indirectEntries: 4 });
    expect(() => queue.postChain(1, new Uint32Array(9), 1, 2)).toThrow(RangeError);
  });

  it('frees buffers that are out only when it is told that the queue was reset', () => {
    const { queue, device } = make();
    post(queue, [20, 21, 22]);
    queue.publish();
    device.complete(fetchAll(device)[0].head, 0);
    take(queue);
    const tokens = new Uint32Array(8);
    expect(queue.reclaimAll(tokens)).toBe(2);
    expect([...tokens.subarray(0, 2)].sort()).toEqual([21, 22]);
    expect(queue.broken?.code).toBe('QUEUE_CLOSED');
    expect(post(queue, [1])).toBe(0);
  });
  it.each([false, true])('interrupts only when asked to, with EVENT_IDX %s', (eventIdx) => {
    const { queue, device } = make({ eventIdx });
    post(queue, [1, 2, 3]);
    queue.publish();
    const heads = fetchAll(device).map((chain) => chain.head);
    expect(device.complete(heads[0], 0)).toBe(false);
    take(queue);
    expect(queue.enableInterrupts(), 'nothing is there').toBe(false);
    expect(device.complete(heads[1], 0)).toBe(true);
    queue.disableInterrupts();
    expect(device.complete(heads[2], 0)).toBe(false);
    expect(queue.enableInterrupts(), 'two are there').toBe(true);
    expect(take(queue)).toHaveLength(2);
  });

  it('is closed when the device says that it wrote into a readable buffer', () => {
    const { queue, device } = make();
    post(queue, [0], false);
    queue.publish();
    device.complete(fetchAll(device)[0].head, 1);
    expect(take(queue)).toEqual([]);
    expect(queue.broken?.code).toBe('USED_LENGTH');
  });

  type Step =
    | { kind: 'burst'; count: number; write: boolean }
    | { kind: 'chain'; readable: number; writable: number }
    | { kind: 'publish' }
    | { kind: 'use'; picks: number[] }
    | { kind: 'take'; max: number };
  const step: fc.Arbitrary<Step> = fc.oneof(
    fc.record({ kind: fc.constant('burst' as const), count: fc.integer({ min: 1, max: 9 }), write: fc.boolean() }),
    fc.record({
      kind: fc.constant('chain' as const),
      readable: fc.integer({ min: 0, max: 3 }),
      writable: fc.integer({ min: 0, max: 3 }),
    }),
    fc.record({ kind: fc.constant('publish' as const) }),
    fc.record({ kind: fc.constant('use' as const), picks: fc.array(fc.nat(7), { maxLength: 8 }) }),
    fc.record({ kind: fc.constant('take' as const), max: fc.integer({ min: 1, max: 8 }) }),
  );

  it('carries every buffer there and back, whatever is posted, in whatever order it is used', () => {
    const options = fc.record({
      indirectEntries: fc.constantFrom(0, 2, 6),
      eventIdx: fc.boolean(),
      ordered: fc.boolean(),
      inOrder: fc.boolean(),
    });
    fc.assert(
      fc.property(
        options,
        fc.array(step, { maxLength: 120 }),
        ({ indirectEntries, eventIdx, ordered, inOrder }, steps) => {
          const { queue, device } = make({ indirectEntries, eventIdx, inOrder });
          let token = 0;
          let free = 8;
          /** What was posted, in order, and not fetched by the device: token, pieces, descriptors. */
          const posted: { token: number; pieces: number; writable: number; descriptors: number }[] = [];
          const held: { entry: (typeof posted)[number]; head: number }[] = [];
          const used: { token: number; written: number; descriptors: number }[] = [];
          for (const s of steps) {
            if (s.kind === 'burst') {
              const tokens = Uint32Array.from({ length: s.count }, (_, i) => token + i);
              const at = new Uint32Array(token + s.count).fill(64);
              const n = queue.postBurst(tokens, 0, s.count, at, at, s.write);
              expect(n).toBe(Math.min(s.count, free));
              for (let i = 0; i < n; i++)
                posted.push({ token: token++, pieces: 1, writable: s.write ? 64 : 0, descriptors: 1 });
              free -= n;
            } else if (s.kind === 'chain') {
              const count = s.readable + s.writable;
              const pieces = Uint32Array.from({ length: 3 * count }, (_, i) => (i % 3 === 2 ? 10 : 0));
              const descriptors = count > 1 && count <= indirectEntries ? 1 : count;
              const room = count > 0 && descriptors <= free;
              expect(queue.postChain(token, pieces, s.readable, s.writable)).toBe(room);
              if (!room) continue;
              posted.push({ token: token++, pieces: count, writable: 10 * s.writable, descriptors });
              free -= descriptors;
            } else if (s.kind === 'publish') {
              queue.publish();
              for (let chain = device.fetch(); chain !== undefined; chain = device.fetch()) {
                const entry = posted.shift();
                if (entry === undefined) throw new Error('the device sees a buffer that was not posted');
                expect(chain.pieces).toHaveLength(entry.pieces);
                expect(chain.pieces.reduce((sum, p) => sum + (p.writable ? p.length : 0), 0)).toBe(entry.writable);
                held.push({ entry, head: chain.head });
              }
              expect(posted).toHaveLength(0);
            } else if (s.kind === 'use' && inOrder) {
              // All at once, by naming the last.
              const batch = held.splice(0, s.picks.length);
              if (batch.length === 0) continue;
              const last = batch.length - 1;
              const bytes = Math.min(s.picks[0] * 9, batch[last].entry.writable);
              device.completeBatch(
                batch.map(({ head }) => head),
                bytes,
              );
              for (const [i, { entry }] of batch.entries()) {
                const written = i === last ? bytes : entry.writable;
                used.push({ token: entry.token, written, descriptors: entry.descriptors });
              }
            } else if (s.kind === 'use') {
              for (const pick of s.picks) {
                const [one] = held.splice(ordered ? 0 : pick % Math.max(held.length, 1), 1);
                if (one === undefined) break;
                const written = Math.min(pick * 9, one.entry.writable);
                device.complete(one.head, written);
                used.push({ token: one.entry.token, written, descriptors: one.entry.descriptors });
              }
            } else {
              const expected = used.splice(0, s.max);
              expect(take(queue, s.max)).toEqual(expected.map(({ token, written }) => ({ token, written })));
              for (const { descriptors } of expected) free += descriptors;
            }
            expect(queue.free).toBe(free);
          }
          expect(queue.broken).toBeNull();
        },
      ),
      { numRuns: runs(300) },
    );
  });

  it('gives no tokens twice and none that are not out, whatever a device writes that has IN_ORDER', () => {
    const entry = fc.record({
      id: fc.oneof(fc.integer({ min: 0, max: 9 }), fc.nat(0xffff)),
      length: fc.oneof(fc.integer({ min: 0, max: 140 }), fc.nat(0xffffffff)),
      posts: fc.integer({ min: 0, max: 3 }),
      max: fc.integer({ min: 1, max: 8 }),
    });
    fc.assert(
      fc.property(fc.array(entry, { maxLength: 30 }), (entries) => {
        const { queue, device } = make({ inOrder: true });
        const out = new Set<number>();
        let next = 0;
        for (const { id, length: bytes, posts, max } of entries) {
          for (let i = 0; i < posts; i++) {
            const token = next++ % TOKENS;
            if (!out.has(token) && post(queue, [token]) === 1) out.add(token);
          }
          queue.publish();
          device.complete(id, bytes);
          for (const { token, written } of take(queue, max)) {
            expect(out.delete(token)).toBe(true);
            expect(written).toBeLessThanOrEqual(length[token]);
          }
        }
        const tokens = new Uint32Array(8);
        const left = [...tokens.subarray(0, queue.reclaimAll(tokens))].sort();
        expect(left).toEqual([...out].sort());
      }),
      { numRuns: runs(200) },
    );
  });

  it('reads one used entry as many buffers with IN_ORDER, and the skipped ones as used completely', () => {
    const { queue, device } = make({ inOrder: true });
    post(queue, [10, 11, 12, 13, 14]);
    queue.publish();
    const heads = fetchAll(device).map((chain) => chain.head);
    device.completeBatch(heads.slice(0, 3), 7);
    expect(take(queue, 2)).toEqual([
      { token: 10, written: 110 },
      { token: 11, written: 111 },
    ]);
    expect(queue.free).toBe(5);
    expect(queue.enableInterrupts(), 'one is left').toBe(true);
    device.completeBatch(heads.slice(3), 0);
    expect(take(queue)).toEqual([
      { token: 12, written: 7 },
      { token: 13, written: 113 },
      { token: 14, written: 0 },
    ]);
    expect(queue.free).toBe(8);
    expect(queue.broken).toBeNull();
  });

  it('is closed by a device with IN_ORDER that names a buffer which is not out', () => {
    for (const id of [3, 6, 200]) {
      const { queue, device } = make({ inOrder: true });
      post(queue, [10, 11, 12]);
      queue.publish();
      fetchAll(device);
      device.complete(id, 0);
      expect(take(queue)).toEqual([]);
      expect(queue.broken?.code).toBe('USED_ID');
    }
  });

  it('does nothing while it is stopped, gives back what was out, and is as new when it is restarted', () => {
    for (const disorder of [false, true]) {
      const { memory, queue, device } = make({ indirectEntries: 2 });
      post(queue, [20, 21, 22, 23, 24]);
      queue.publish();
      const heads = fetchAll(device).map((chain) => chain.head);
      device.complete(heads[disorder ? 1 : 0], 0);
      expect(take(queue)).toHaveLength(1);
      queue.enableInterrupts();
      post(queue, [25]);

      queue.stop();
      expect(queue.broken).toBeNull();
      expect([queue.free, post(queue, [30]), queue.publish(), take(queue)]).toEqual([0, 0, false, []]);
      device.complete(heads[2], 0);
      expect(take(queue)).toEqual([]);
      const tokens = new Uint32Array(8);
      expect(queue.reclaimAll(tokens)).toBe(5);
      expect([...tokens.subarray(0, 5)].sort()).toEqual(disorder ? [20, 22, 23, 24, 25] : [21, 22, 23, 24, 25]);

      queue.restart();
      expect(queue.broken).toBeNull();
      expect(queue.free).toBe(8);
      const Device = format === 'split' ? NaiveSplitDevice : NaivePackedDevice;
      const fresh: NaiveDevice = new Device(memory, setupOf(queue));
      expect(fresh.waiting).toBe(0);
      for (let round = 0; round < 5; round++) {
        expect(post(queue, [1, 2, 3])).toBe(3);
        expect(queue.publish()).toBe(true);
        for (const { head } of fetchAll(fresh)) expect(fresh.complete(head, round), 'interrupts are off').toBe(false);
        expect(take(queue)).toEqual([1, 2, 3].map((token) => ({ token, written: round })));
      }
    }
  });

  it('stays closed when it was failed while it was stopped', () => {
    const { queue } = make();
    queue.stop();
    queue.fail(new VirtioError('GONE', 'gone'));
    expect(queue.broken?.code).toBe('GONE');
    queue.stop();
    expect(queue.broken?.code).toBe('GONE');
  });
});
