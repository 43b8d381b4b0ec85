import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { VirtioError } from '../../src/errors.ts';
import { allocateVirtqueue } from '../../src/virtqueue/create.ts';
import { PackedVirtqueue } from '../../src/virtqueue/packed.ts';
import type { Virtqueue, VirtqueueOptions } from '../../src/virtqueue/virtqueue.ts';
import { runs } from '../depth.ts';
import { NaivePackedDevice } from './packed-support.ts';
import { type Chain, setupOf, TestMemory } from './support.ts';

const SIZE = 8;
const AVAIL = 0x0080;
const USED = 0x8000;
const WRITE = 2;

function make(options: Partial<VirtqueueOptions> = {}) {
  const memory = new TestMemory();
  const queue = allocateVirtqueue('packed', memory, { index: 7, size: SIZE, ...options });
  return { memory, queue, device: new NaivePackedDevice(memory, setupOf(queue), options.eventIdx) };
}

const TOKENS = 64;
const offset = Uint32Array.from({ length: TOKENS }, (_, t) => 4096 * t);
const length = Uint32Array.from({ length: TOKENS }, (_, t) => 100 + t);

function post(queue: Virtqueue, tokens: number[], deviceWrites = true): number {
  return queue.postBurst(Uint32Array.from(tokens), 0, tokens.length, offset, length, deviceWrites);
}

function take(queue: Virtqueue): { token: number; written: number }[] {
  const tokens = new Uint32Array(queue.size);
  const written = new Uint32Array(queue.size);
  const n = queue.take(tokens, written, queue.size);
  return Array.from({ length: n }, (_, i) => ({ token: tokens[i], written: written[i] }));
}

function fetchAll(device: NaivePackedDevice): Chain[] {
  const chains: Chain[] = [];
  for (let chain = device.fetch(); chain !== undefined; chain = device.fetch()) chains.push(chain);
  return chains;
}

/** Sends `count` buffers there and back. */
function turn(queue: Virtqueue, device: NaivePackedDevice, count: number): void {
  for (let i = 0; i < count; i++) {
    post(queue, [i % TOKENS]);
    queue.publish();
    for (const { head } of fetchAll(device)) device.complete(head, 1);
    if (take(queue).length !== 1) throw new Error(`lost at ${i}`);
  }
}

describe('a packed virtqueue', () => {
  it.each([0, -8, 1.5, 32769, Number.NaN])('refuses size %s', (size) => {
    const make = () => allocateVirtqueue('packed', new TestMemory(), { index: 0, size });
    expect(make).toThrow(VirtioError);
    expect(make).toThrow(expect.objectContaining({ code: 'QUEUE_SIZE' }));
  });

  it.each([1, 2, 3, 7, 100, 255, 256, 32768])('accepts size %s and aligns its parts as the standard asks', (size) => {
    const { queue } = make({ size });
    expect(queue.free).toBe(size);
    expect(queue.descriptorArea % 16).toBe(0);
    expect(queue.driverArea % 4).toBe(0);
    expect(queue.deviceArea % 4).toBe(0);
    expect(queue.driverArea).toBeGreaterThanOrEqual(queue.descriptorArea + 16 * size);
    expect(queue.deviceArea).toBeGreaterThanOrEqual(queue.driverArea + 4);
  });

  it('refuses memory that is too small', () => {
    expect(() => new PackedVirtqueue(new TestMemory().allocateDma(4096), { index: 0, size: 1024 })).toThrow(RangeError);
  });

  it('keeps the first descriptor of what was posted from the device until publish, wherever the ring ends', () => {
    for (const size of [1, 3, 5, 8]) {
      const { queue, device } = make({ size });
      for (let turns = 0; turns < 4 * size; turns++) {
        const count = 1 + (turns % size);
        const tokens = Array.from({ length: count }, (_, i) => i);
        post(queue, tokens.slice(0, 1));
        expect(device.waiting).toBe(0);
        post(queue, tokens.slice(1));
        expect(device.waiting).toBe(0);
        queue.publish();
        expect(device.waiting).toBe(count);
        for (const { head } of fetchAll(device)) device.complete(head, 0);
        expect(take(queue).map(({ token }) => token)).toEqual(tokens);
      }
    }
  });

  it('keeps a chain from the device until publish, also when it goes around the end', () => {
    const { queue, device } = make();
    const pieces = Uint32Array.of(0x1000, 0, 24, 0x2000, 0, 8, 0x3000, 0, 16);
    for (let round = 0; round < 20; round++) {
      expect(queue.postChain(round, pieces, 1, 2)).toBe(true);
      post(queue, [round], false);
      expect(queue.postChain(30 + round, pieces, 2, 1)).toBe(true);
      expect(device.waiting).toBe(0);
      queue.publish();
      const chains = fetchAll(device);
      expect(chains.map((chain) => chain.pieces.map((piece) => piece.writable))).toEqual([
        [false, true, true],
        [false],
        [false, false, true],
      ]);
      for (const { head } of chains.slice().reverse()) device.complete(head, 0);
      expect(take(queue).map(({ token }) => token)).toEqual([30 + round, round, round]);
      expect(queue.free).toBe(SIZE);
    }
  });

  it('says where the next descriptor goes, with the wrap counter', () => {
    const { queue, device } = make({ size: 3 });
    const seen: number[] = [];
    for (let i = 0; i < 7; i++) {
      seen.push(queue.next);
      turn(queue, device, 1);
    }
    expect(seen).toEqual([0x8000, 0x8001, 0x8002, 0, 1, 2, 0x8000]);
  });

  it('shows a used buffer only once the first descriptor of the burst is used', () => {
    const { queue, device } = make();
    post(queue, [0, 1, 2]);
    queue.publish();
    fetchAll(device);
    device.writeRaw(1, 1, 5, AVAIL | USED | WRITE);
    device.writeRaw(2, 2, 5, AVAIL | USED | WRITE);
    expect(take(queue)).toEqual([]);
    device.writeRaw(0, 0, 4, AVAIL | USED | WRITE);
    expect(take(queue).map(({ written }) => written)).toEqual([4, 5, 5]);
  });

  it('never takes for used what was not published, whatever the device writes there', () => {
    const { queue, device } = make();
    post(queue, [0, 1]);
    queue.publish();
    post(queue, [2]);
    for (let at = 0; at < SIZE; at++) device.writeRaw(at, at, 0, AVAIL | USED);
    expect(take(queue).map(({ token }) => token)).toEqual([0, 1]);
    expect(take(queue)).toEqual([]);
    queue.publish();
    expect(take(queue)).toEqual([]);
    expect(queue.broken).toBeNull();
  });

  it.each([
    { bytes: 55, flags: 0, readable: 0, writable: 55, what: 'without WRITE, as QEMU does' },
    { bytes: 0, flags: WRITE, readable: 0, writable: 0, what: 'of 0 with WRITE' },
    { bytes: 101, flags: 0, readable: 0, writable: null, what: 'too long without WRITE' },
    { bytes: 1, flags: WRITE, readable: null, writable: 1, what: 'of 1 with WRITE' },
  ])('reads a used length $what by what the buffer can hold', ({ bytes, flags, readable, writable }) => {
    for (const [deviceWrites, expected] of [
      [false, readable],
      [true, writable],
    ] as const) {
      const { queue, device } = make();
      post(queue, [0, 1], deviceWrites);
      queue.publish();
      fetchAll(device);
      device.writeRaw(0, 0, bytes, AVAIL | USED | flags);
      expect(take(queue)).toEqual(expected === null ? [] : [{ token: 0, written: expected }]);
      expect(queue.broken?.code).toBe(expected === null ? 'USED_LENGTH' : undefined);
    }
  });
});

describe('notifications of a packed virtqueue', () => {
  it('are wanted unless the device has said DISABLE', () => {
    const { queue, device } = make();
    post(queue, [1]);
    expect(queue.publish()).toBe(true);
    expect(queue.publish(), 'nothing new').toBe(false);
    device.suppressNotifications(true);
    post(queue, [2]);
    expect(queue.publish()).toBe(false);
  });

  it.each([1, 3, 5, 8])(
    'with EVENT_IDX are wanted exactly when the awaited descriptor was made available, size %i',
    (size) => {
      const steps = fc.array(fc.tuple(fc.integer({ min: 1, max: size }), fc.integer({ min: 0, max: 2 * size - 1 })), {
        maxLength: 40,
      });
      fc.assert(
        fc.property(steps, (turns) => {
          const { queue, device } = make({ eventIdx: true, size });
          for (const [count, steps] of turns) {
            device.setAvailEvent(device.ahead(steps));
            post(
              queue,
              Array.from({ length: count }, (_, i) => i),
            );
            expect(queue.publish()).toBe(steps < count);
            for (const { head } of fetchAll(device)) device.complete(head, 0);
            take(queue);
          }
        }),
      );
    },
  );

  it('ignore the event offset without EVENT_IDX', () => {
    const { queue, device } = make();
    device.setAvailEvent(device.ahead(5));
    post(queue, [1]);
    expect(queue.publish()).toBe(true);
  });
});

describe('interrupts of a packed virtqueue', () => {
  it('with EVENT_IDX are asked for at the next descriptor to be used, in either round', () => {
    const { queue, device } = make({ eventIdx: true, size: 3 });
    for (let i = 0; i < 7; i++) {
      post(queue, [1, 2]);
      queue.publish();
      const heads = fetchAll(device).map((chain) => chain.head);
      expect(queue.enableInterrupts()).toBe(false);
      expect(device.complete(heads[0], 0)).toBe(true);
      expect(device.complete(heads[1], 0), 'asked for once').toBe(false);
      expect(queue.enableInterrupts(), 'two are there').toBe(true);
      expect(take(queue)).toHaveLength(2);
    }
  });
});

describe('a malicious device on a packed ring', () => {
  const cases: { name: string; code: string; act(device: NaivePackedDevice, heads: number[]): void }[] = [
    { name: 'an id beyond the table', code: 'USED_ID', act: (d) => d.complete(SIZE, 0) },
    { name: 'an id of 65535', code: 'USED_ID', act: (d) => d.complete(0xffff, 0) },
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

  it('that spoils one descriptor of many is found at that one, and those before it are given back', () => {
    const bad = [
      { code: 'USED_LENGTH', id: (at: number) => at, bytes: 101 + TOKENS },
      { code: 'USED_ID', id: () => 77, bytes: 0 },
    ];
    for (const begin of [0, 3, 7]) {
      for (let at = 0; at < SIZE; at++) {
        for (const { code, id, bytes } of bad) {
          const { queue, device } = make();
          turn(queue, device, begin);
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
    }
  });

  it('that scribbles over descriptors and event structures changes nothing of what tokens mean, and the next burst is right', () => {
    const { memory, queue, device } = make({ iovaHigh: 5 });
    post(queue, [30, 31]);
    queue.publish();
    fetchAll(device);
    memory.bytes(queue.descriptorArea, 16 * SIZE).fill(0x7f);
    memory.bytes(queue.driverArea, 4).fill(0);
    device.complete(1, 131);
    device.complete(0, 1);
    expect(take(queue)).toEqual([
      { token: 31, written: 131 },
      { token: 30, written: 1 },
    ]);
    const tokens = Array.from({ length: SIZE }, (_, i) => 40 + i);
    post(queue, tokens);
    queue.publish();
    expect(fetchAll(device).map((chain) => chain.pieces)).toEqual(
      tokens.map((t) => [{ iova: 5 * 2 ** 32 + 4096 * t, length: 100 + t, writable: true }]),
    );
  });

  it('that writes anything at all never makes the queue throw, or return a token that is not out', () => {
    const write = fc.record({
      at: fc.nat(SIZE - 1),
      id: fc.oneof(fc.nat(9), fc.nat(0xffff)),
      length: fc.oneof(fc.integer({ min: 0, max: 140 }), fc.nat(0xffffffff)),
      flags: fc.oneof(fc.constantFrom(0, AVAIL | USED, AVAIL | USED | WRITE, WRITE), fc.nat(0xffff)),
      posts: fc.integer({ min: 0, max: 3 }),
      chain: fc.boolean(),
      max: fc.integer({ min: 1, max: SIZE }),
    });
    fc.assert(
      fc.property(fc.boolean(), fc.boolean(), fc.array(write, { maxLength: 40 }), (eventIdx, inOrder, writes) => {
        const { queue, device } = make({ eventIdx, inOrder });
        const out = new Set<number>();
        let next = 0;
        for (const { at, id, length: bytes, flags, posts, chain, max } of writes) {
          for (let i = 0; i < posts; i++) {
            const token = next++ % TOKENS;
            if (out.has(token)) continue;
            const pieces = Uint32Array.of(0, 0, 40, 0, 0, 60);
            if (chain ? queue.postChain(token, pieces, 0, 2) : post(queue, [token]) === 1) out.add(token);
          }
          queue.publish();
          device.writeRaw(at, id, bytes, flags);
          const tokens = new Uint32Array(SIZE);
          const written = new Uint32Array(SIZE);
          const n = queue.take(tokens, written, max);
          for (let i = 0; i < n; i++) {
            expect(out.delete(tokens[i])).toBe(true);
            expect(written[i]).toBeLessThanOrEqual(length[tokens[i]]);
          }
          expect(queue.free).toBeLessThanOrEqual(SIZE - out.size);
        }
        const tokens = new Uint32Array(SIZE);
        const left = [...tokens.subarray(0, queue.reclaimAll(tokens))].sort();
        expect(left).toEqual([...out].sort());
      }),
      { numRuns: runs(300) },
    );
  });
});
