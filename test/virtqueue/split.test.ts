import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { VirtioError } from '../../src/errors.ts';
import { allocateVirtqueue } from '../../src/virtqueue/create.ts';
import { SplitVirtqueue } from '../../src/virtqueue/split.ts';
import type { Virtqueue, VirtqueueOptions } from '../../src/virtqueue/virtqueue.ts';
import { runs } from '../depth.ts';
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
      { numRuns: runs(200) },
    );
  });
});
