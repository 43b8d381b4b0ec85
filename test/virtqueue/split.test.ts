import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { VirtioError } from '../../src/errors.ts';
import { allocateVirtqueue } from '../../src/virtqueue/create.ts';
import { SplitVirtqueue } from '../../src/virtqueue/split.ts';
import type { Virtqueue, VirtqueueOptions } from '../../src/virtqueue/virtqueue.ts';
import { type Chain, NaiveSplitDevice, setupOf, TestMemory } from './support.ts';

const IOVA_LOW = 0x2000_0000;
const IOVA_HIGH = 3;

function make(options: Partial<VirtqueueOptions> = {}) {
  const memory = new TestMemory();
  const queue = allocateVirtqueue('split', memory, {
    index: 7,
    size: 8,
    iovaLow: IOVA_LOW,
    iovaHigh: IOVA_HIGH,
    ...options,
  });
  return { memory, queue, device: new NaiveSplitDevice(memory, setupOf(queue), options.eventIdx) };
}

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

function fetchAll(device: NaiveSplitDevice): Chain[] {
  const chains: Chain[] = [];
  for (let chain = device.fetch(); chain !== undefined; chain = device.fetch()) chains.push(chain);
  return chains;
}

describe('a split virtqueue', () => {
  it.each([0, 3, 6, 100, -8, 1.5, 65536, Number.NaN])('refuses size %s', (size) => {
    const make = () => allocateVirtqueue('split', new TestMemory(), { index: 0, size });
    expect(make).toThrow(VirtioError);
    expect(make).toThrow(expect.objectContaining({ code: 'QUEUE_SIZE' }));
  });

  it.each([1, 2, 4, 256, 32768])('accepts size %s and aligns its parts as the standard asks', (size) => {
    const { queue } = make({ size });
    expect(queue.free).toBe(size);
    expect(queue.descriptorArea % 16).toBe(0);
    expect(queue.driverArea % 2).toBe(0);
    expect(queue.deviceArea % 4).toBe(0);
    expect(queue.driverArea).toBeGreaterThanOrEqual(queue.descriptorArea + 16 * size);
    expect(queue.deviceArea).toBeGreaterThanOrEqual(queue.driverArea + 6 + 2 * size);
  });

  it('refuses memory that is too small', () => {
    expect(() => new SplitVirtqueue(new TestMemory().allocateDma(4096), { index: 0, size: 1024 })).toThrow(RangeError);
  });

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
    for (const outOfOrder of [false, true]) {
      const { queue, device } = make({ size: 4 });
      for (let i = 0; i < 70_000; i += 2) {
        expect(post(queue, [i % TOKENS, (i + 1) % TOKENS])).toBe(2);
        queue.publish();
        const heads = fetchAll(device).map((chain) => chain.head);
        if (outOfOrder) heads.reverse();
        for (const head of heads) device.complete(head, i % 90);
        const tokens = take(queue).map(({ token }) => token);
        if (outOfOrder) tokens.reverse();
        if (tokens[0] !== i % TOKENS || tokens[1] !== (i + 1) % TOKENS) expect(tokens).toEqual([i, i + 1]);
      }
      expect(queue.broken).toBeNull();
      expect(queue.free).toBe(4);
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
});

describe('notifications of a split virtqueue', () => {
  it('are wanted unless the device has said NO_NOTIFY', () => {
    const { queue, device } = make();
    post(queue, [1]);
    expect(queue.publish()).toBe(true);
    expect(queue.publish(), 'nothing new').toBe(false);
    device.suppressNotifications(true);
    post(queue, [2]);
    expect(queue.publish()).toBe(false);
  });

  it('with EVENT_IDX are wanted exactly when the awaited entry was written', () => {
    fc.assert(
      fc.property(
        fc.array(fc.tuple(fc.integer({ min: 1, max: 8 }), fc.integer({ min: 0, max: 12 })), { maxLength: 40 }),
        (steps) => {
          const { queue, device } = make({ eventIdx: true });
          let idx = 0;
          for (const [count, ahead] of steps) {
            const event = (idx + ahead) & 0xffff;
            device.setAvailEvent(event);
            // The lower bit of `flags` must be ignored.
            device.suppressNotifications(ahead % 2 === 0);
            post(
              queue,
              Array.from({ length: count }, (_, i) => i),
            );
            expect(queue.publish()).toBe(ahead < count);
            for (const chain of fetchAll(device)) device.complete(chain.head, 0);
            take(queue);
            idx += count;
          }
        },
      ),
    );
  });

  it('with EVENT_IDX are found across the wrap of the index', () => {
    const { queue, device } = make({ eventIdx: true });
    for (let i = 0; i < 65_534; i += 2) {
      post(queue, [0, 1]);
      queue.publish();
      for (const chain of fetchAll(device)) device.complete(chain.head, 0);
      take(queue);
    }
    device.setAvailEvent(1);
    post(queue, [0, 1, 2, 3]);
    expect(queue.publish()).toBe(true);
    post(queue, [4]);
    expect(queue.publish()).toBe(false);
  });
});

describe('interrupts of a split virtqueue', () => {
  it.each([false, true])('are off until asked for, with EVENT_IDX %s', (eventIdx) => {
    const { queue, device } = make({ eventIdx });
    post(queue, [1, 2, 3]);
    queue.publish();
    const heads = fetchAll(device).map((chain) => chain.head);
    // With EVENT_IDX a fresh queue cannot say no to entry 65535 only; entry 0 is not wanted.
    expect(device.complete(heads[0], 0)).toBe(false);
    take(queue);
    expect(queue.enableInterrupts(), 'nothing is there').toBe(false);
    expect(device.complete(heads[1], 0)).toBe(true);
    queue.disableInterrupts();
    expect(device.complete(heads[2], 0)).toBe(false);
    expect(queue.enableInterrupts(), 'two are there').toBe(true);
    expect(take(queue)).toHaveLength(2);
    if (eventIdx) expect(device.avail.getUint16(0, true), 'flags stay 0').toBe(0);
  });
});

describe('a malicious device', () => {
  const cases: { name: string; code: string; act(device: NaiveSplitDevice, heads: number[]): void }[] = [
    { name: 'an id beyond the table', code: 'USED_ID', act: (d) => d.complete(8, 0) },
    { name: 'an id of 32 bits', code: 'USED_ID', act: (d, heads) => d.complete(heads[0] + 0x1_0000, 0) },
    { name: 'an id that was never given out', code: 'USED_ID', act: (d) => d.complete(6, 0) },
    {
      name: 'one id twice',
      code: 'USED_ID',
      act: (d, heads) => {
        d.complete(heads[1], 0);
        d.complete(heads[1], 0);
      },
    },
    { name: 'a length that is one too long', code: 'USED_LENGTH', act: (d, heads) => d.complete(heads[0], 101) },
    { name: 'a length of 4 GiB', code: 'USED_LENGTH', act: (d, heads) => d.complete(heads[0], 0xffffffff) },
    {
      name: 'more used buffers than are out',
      code: 'USED_INDEX',
      act: (d, heads) => {
        for (const head of [...heads, 0]) d.writeUsed(head, 0);
        d.publishUsed();
      },
    },
    {
      name: 'a used index that goes backwards',
      code: 'USED_INDEX',
      act: (d) => {
        d.usedIdx = 0xfff0;
        d.publishUsed();
      },
    },
  ];

  it.each(cases)('that returns $name closes the queue with $code', ({ code, act }) => {
    const { queue, device } = make();
    post(queue, [0, 1, 2]);
    queue.publish();
    act(
      device,
      fetchAll(device).map((chain) => chain.head),
    );
    for (const { token, written } of take(queue)) {
      expect(token).toBeLessThan(3);
      expect(written).toBeLessThanOrEqual(length[token]);
    }
    expect(queue.broken).toBeInstanceOf(VirtioError);
    expect(queue.broken?.code).toBe(code);
    expect(take(queue)).toEqual([]);
    expect(post(queue, [5])).toBe(0);
    expect(queue.postChain(5, Uint32Array.of(0, 0, 1), 1, 0)).toBe(false);
    expect(queue.publish()).toBe(false);
    expect(queue.enableInterrupts()).toBe(false);
  });

  it('that spoils one entry of many is found at that entry, and those before it are given back', () => {
    const bad = [
      { code: 'USED_LENGTH', id: (head: number) => head, bytes: 101 + TOKENS },
      { code: 'USED_ID', id: () => 77, bytes: 0 },
      { code: 'USED_ID', id: () => 0x8000_0001, bytes: 0 },
    ];
    for (let at = 0; at < 8; at++) {
      for (const { code, id, bytes } of bad) {
        const { queue, device } = make();
        post(queue, [0, 1, 2, 3, 4, 5, 6, 7]);
        queue.publish();
        for (const [i, { head }] of fetchAll(device).entries()) {
          if (i === at) device.writeUsed(id(head), bytes);
          else device.writeUsed(head, 50 + i);
        }
        device.publishUsed();
        expect(take(queue)).toEqual(Array.from({ length: at }, (_, i) => ({ token: i, written: 50 + i })));
        expect(queue.broken?.code).toBe(code);
      }
    }
  });

  it('that says it wrote into a readable buffer closes the queue', () => {
    const { queue, device } = make();
    post(queue, [0], false);
    queue.publish();
    device.complete(fetchAll(device)[0].head, 1);
    expect(take(queue)).toEqual([]);
    expect(queue.broken?.code).toBe('USED_LENGTH');
  });

  it('that scribbles over descriptors and the available ring changes nothing of what tokens mean', () => {
    const { memory, queue, device } = make();
    post(queue, [30, 31]);
    queue.publish();
    const heads = fetchAll(device).map((chain) => chain.head);
    memory.bytes(queue.descriptorArea, 16 * 8).fill(0xff);
    memory.bytes(queue.driverArea, 6 + 16).fill(0xee);
    device.complete(heads[1], 131);
    expect(take(queue)).toEqual([{ token: 31, written: 131 }]);
  });

  it('that returns anything at all never makes the queue throw, or return a token that is not out', () => {
    const entry = fc.record({
      id: fc.oneof(fc.integer({ min: 0, max: 9 }), fc.nat(0xffffffff)),
      length: fc.oneof(fc.integer({ min: 0, max: 140 }), fc.nat(0xffffffff)),
      jump: fc.oneof({ weight: 8, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.nat(0xffff) }),
      posts: fc.integer({ min: 0, max: 3 }),
    });
    fc.assert(
      fc.property(fc.boolean(), fc.array(entry, { maxLength: 30 }), (eventIdx, entries) => {
        const { queue, device } = make({ eventIdx });
        const out = new Set<number>();
        let next = 0;
        for (const { id, length: bytes, jump, posts } of entries) {
          for (let i = 0; i < posts; i++) {
            const token = next++ % TOKENS;
            if (out.has(token) || post(queue, [token]) === 0) continue;
            out.add(token);
          }
          queue.publish();
          device.writeUsed(id, bytes);
          device.usedIdx = (device.usedIdx + jump) & 0xffff;
          device.publishUsed();
          for (const { token, written } of take(queue)) {
            expect(out.delete(token)).toBe(true);
            expect(written).toBeLessThanOrEqual(length[token]);
          }
        }
        const tokens = new Uint32Array(8);
        const left = [...tokens.subarray(0, queue.reclaimAll(tokens))].sort();
        expect(left).toEqual([...out].sort());
      }),
      { numRuns: 500 },
    );
  });
});

describe('a split virtqueue against a naive model', () => {
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
    });
    fc.assert(
      fc.property(options, fc.array(step, { maxLength: 120 }), ({ indirectEntries, eventIdx, ordered }, steps) => {
        const { queue, device } = make({ indirectEntries, eventIdx });
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
      }),
      { numRuns: 1000 },
    );
  });
});
