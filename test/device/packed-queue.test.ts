import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { Arena } from '../../src/device/arena.ts';
import { GuestMemory } from '../../src/device/guest-memory.ts';
import { PackedDeviceQueue } from '../../src/device/packed-queue.ts';
import { NO_BUFFER, type QueueOptions } from '../../src/device/queues.ts';
import { SplitDeviceQueue } from '../../src/device/split-queue.ts';
import { ftruncate, memfdCreate } from '../../src/sys/libc.ts';
import { type DmaMemory, mapShared } from '../../src/sys/memory.ts';
import { createVirtqueue, virtqueueBytes } from '../../src/virtqueue/create.ts';
import { runs } from '../depth.ts';
import { GUEST_IOVA, GUEST_SIZE } from './helpers/mini-driver.ts';
import { AVAIL, PackedRing, USED } from './helpers/packed-ring.ts';

const NEXT = 1;
const WRITE = 2;
const INDIRECT = 4;
const SIZE = 8;
const DATA = 0x100000;

const arena = new Arena(64 * 2 ** 20);
const scratch = arena.allocate(1024 * 16);
const fd = memfdCreate('guest');
ftruncate(fd, GUEST_SIZE);
const shared = mapShared(fd, 0, GUEST_SIZE, { write: true });
const memory = new GuestMemory(arena);
memory.map(GUEST_IOVA, GUEST_SIZE, fd, 0, true);
const out = arena.allocate(64 * 4096);

afterAll(() => {
  memory.clear();
  arena.close();
});

function addresses(descriptors: number, driver: number, device: number): QueueOptions['addresses'] {
  const low = (offset: number) => (GUEST_IOVA + offset) % 2 ** 32;
  const high = (offset: number) => Math.floor((GUEST_IOVA + offset) / 2 ** 32);
  return {
    descriptorLow: low(descriptors),
    descriptorHigh: high(descriptors),
    driverLow: low(driver),
    driverHigh: high(driver),
    deviceLow: low(device),
    deviceHigh: high(device),
  };
}

function make(options: Partial<QueueOptions> = {}): { ring: PackedRing; queue: PackedDeviceQueue } {
  const size = options.size ?? SIZE;
  const ring = new PackedRing(shared, 0, size);
  shared.u8.fill(0, 0, ring.end);
  const where = addresses(ring.descriptors, ring.driver, ring.device);
  const queue = new PackedDeviceQueue(memory, {
    ...{ index: 0, size, addresses: where, eventIdx: false, indirect: true, scratch },
    ...options,
  });
  return { ring, queue };
}

function table(offset: number, entries: readonly (readonly [number, number, number])[]): void {
  for (const [i, [at, length, flags]] of entries.entries()) {
    const word = (offset + 16 * i) >>> 2;
    const address = GUEST_IOVA + at;
    shared.u32[word] = address;
    shared.u32[word + 1] = Math.floor(address / 2 ** 32);
    shared.u32[word + 2] = length;
    shared.u32[word + 3] = (flags << 16) >>> 0;
  }
}

describe('the device side of a packed virtqueue', () => {
  it('finds nothing in an empty ring', () => {
    const { queue } = make();
    expect(queue.available()).toBe(0);
    expect(queue.take()).toBe(NO_BUFFER);
    expect(queue.publish()).toBe(false);
    expect(queue.broken).toBeNull();
  });

  it('takes lists of readable and writable descriptors and returns them, with ids of its driver’s choice', () => {
    const { ring, queue } = make();
    ring.offer(0xfffe, [
      [DATA, 10, 0],
      [DATA + 100, 20, WRITE],
      [DATA + 200, 30, WRITE],
    ]);
    ring.offer(3, [[DATA, 5, 0]]);
    expect(queue.available()).toBe(2);
    expect(queue.take()).toBe(0xfffe);
    expect([queue.readable, queue.segments, queue.readableBytes, queue.writableBytes]).toEqual([1, 3, 10, 50]);
    queue.complete(0xfffe, 42);
    expect(ring.take()).toBeNull();
    expect(queue.publish()).toBe(true);
    expect(ring.take()).toEqual({ id: 0xfffe, length: 42, write: true });
    expect(queue.take()).toBe(3);
    queue.complete(3, 0);
    queue.publish();
    expect(ring.take()).toEqual({ id: 3, length: 0, write: false });
  });

  it('shows what was used since the last time by the first descriptor, which is written last', () => {
    const { ring, queue } = make();
    for (let i = 0; i < 3; i++) ring.offer(i, [[DATA, 4, WRITE]]);
    for (let i = 0; i < 3; i++) {
      queue.take();
      queue.complete(i, i);
    }
    expect(ring.flags(0) & (AVAIL | USED)).toBe(AVAIL);
    expect([1, 2].map((at) => ring.flags(at) & (AVAIL | USED))).toEqual([AVAIL | USED, AVAIL | USED]);
    queue.publish();
    expect([ring.take(), ring.take(), ring.take(), ring.take()].map((entry) => entry?.id)).toEqual([
      0,
      1,
      2,
      undefined,
    ]);
  });

  it('takes an indirect table as a whole, whatever flags but WRITE its entries have', () => {
    const { ring, queue } = make();
    table(DATA, [
      [DATA + 0x1000, 5, 0],
      [DATA + 0x2000, 6, WRITE | INDIRECT],
    ]);
    ring.offer(4, [[DATA, 32, INDIRECT | WRITE]]);
    expect(queue.take()).toBe(4);
    expect([queue.segments, queue.readableBytes, queue.writableBytes]).toEqual([2, 5, 6]);
  });

  it('completes in any order', () => {
    const { ring, queue } = make();
    ring.offer(0, [
      [DATA, 4, 0],
      [DATA, 4, WRITE],
    ]);
    ring.offer(1, [[DATA, 4, WRITE]]);
    ring.offer(2, [[DATA, 4, WRITE]]);
    expect([queue.take(), queue.take(), queue.take()]).toEqual([0, 1, 2]);
    for (const id of [2, 0, 1]) queue.complete(id, 1);
    queue.publish();
    expect([ring.take(), ring.take(), ring.take()].map((entry) => entry?.id)).toEqual([2, 0, 1]);
    expect(ring.used).toEqual({ at: 4, wrap: true });
  });

  it.each<[string, (ring: PackedRing) => void]>([
    [
      'a readable descriptor after a writable one',
      (ring) =>
        ring.offer(0, [
          [DATA, 4, WRITE],
          [DATA, 4, 0],
        ]),
    ],
    [
      'INDIRECT together with NEXT',
      (ring) =>
        ring.offer(0, [
          [DATA, 16, INDIRECT],
          [DATA, 4, 0],
        ]),
    ],
    [
      'an indirect descriptor at the end of a list',
      (ring) =>
        ring.offer(0, [
          [DATA, 16, 0],
          [DATA, 16, INDIRECT],
        ]),
    ],
    ['an indirect table of no bytes', (ring) => ring.offer(0, [[DATA, 0, INDIRECT]])],
    ['an indirect table of 17 bytes', (ring) => ring.offer(0, [[DATA, 17, INDIRECT]])],
    ['an indirect table of more descriptors than the queue has', (ring) => ring.offer(0, [[DATA, 16 * 9, INDIRECT]])],
    ['an indirect table of almost 4 GiB', (ring) => ring.offer(0, [[DATA, 0xfffffff0, INDIRECT]])],
    ['an indirect table that is not mapped', (ring) => ring.offer(0, [[GUEST_SIZE, 16, INDIRECT]])],
    [
      'a buffer of more than 4 GiB',
      (ring) =>
        ring.offer(0, [
          [DATA, 0xffffffff, 0],
          [DATA, 2, 0],
        ]),
    ],
    [
      'a list without an end',
      (ring) => {
        for (let at = 0; at < SIZE; at++) ring.write(at, true, DATA, 1, NEXT, 0);
      },
    ],
  ])('is broken by %s, and does nothing more', (_, prepare) => {
    const { ring, queue } = make();
    prepare(ring);
    expect(queue.take()).toBe(NO_BUFFER);
    expect(queue.broken).not.toBeNull();
    queue.complete(0, 0);
    expect(queue.publish()).toBe(false);
    expect(queue.available()).toBe(0);
    expect(queue.arm(0)).toBe(false);
  });

  it('is broken by an id that is out already', () => {
    const { ring, queue } = make();
    ring.offer(5, [[DATA, 4, 0]]);
    ring.offer(5, [[DATA, 4, 0]]);
    expect(queue.take()).toBe(5);
    expect(queue.take()).toBe(NO_BUFFER);
    expect(queue.broken).toMatch(/id 5/);
  });

  it('is broken by an indirect descriptor that was not negotiated', () => {
    const { ring, queue } = make({ indirect: false });
    ring.offer(0, [[DATA, 16, INDIRECT]]);
    expect(queue.take()).toBe(NO_BUFFER);
    expect(queue.broken).toMatch(/INDIRECT/);
  });

  it('is broken when the driver takes a descriptor back, or makes a list longer, after it was seen', () => {
    for (const spoil of [
      (ring: PackedRing) => ring.write(0, false, DATA, 4, 0, 0),
      (ring: PackedRing) => ring.write(0, true, DATA, 4, NEXT, 0),
    ]) {
      const { ring, queue } = make();
      ring.offer(0, [[DATA, 4, 0]]);
      expect(queue.available()).toBe(1);
      spoil(ring);
      expect(queue.take()).toBe(NO_BUFFER);
      expect(queue.broken).not.toBeNull();
    }
  });

  it('does not take again what it has and has not returned, though the driver offers it in the next round', () => {
    const { ring, queue } = make();
    for (let i = 0; i < SIZE; i++) ring.offer(i, [[DATA, 4, 0]]);
    for (let i = 0; i < SIZE; i++) expect(queue.take()).toBe(i);
    for (let i = 0; i < SIZE; i++) ring.offer(100 + i, [[DATA, 4, 0]]);
    expect(queue.available()).toBe(0);
    expect(queue.take()).toBe(NO_BUFFER);
    expect(queue.broken).toBeNull();
  });

  it('takes a list of exactly as many descriptors as the queue has', () => {
    const { ring, queue } = make();
    ring.offer(
      0,
      Array.from({ length: SIZE }, (_, i) => [DATA + i, 1, 0] as const),
    );
    expect(queue.take()).toBe(0);
    expect(queue.segments).toBe(SIZE);
  });

  it('gathers and scatters across pieces', () => {
    const { ring, queue } = make();
    for (let i = 0; i < 30; i++) shared.u8[DATA + i] = i;
    shared.u8[DATA + 100] = 0;
    ring.offer(0, [
      [DATA, 10, 0],
      [DATA + 10, 20, 0],
      [DATA + 100, 3, WRITE],
      [DATA + 200, 100, WRITE],
    ]);
    queue.take();
    expect(queue.gather(5, 1000, out)).toBe(25);
    expect(queue.scatter(1, 10, out)).toBe(10);
    expect([...shared.u8.subarray(DATA + 100, DATA + 103)]).toEqual([0, 5, 6]);
    expect([...shared.u8.subarray(DATA + 200, DATA + 208)]).toEqual([7, 8, 9, 10, 11, 12, 13, 14]);
  });

  it.each([3, 8])('takes buffers again that were put back, around the end of a ring of %i', (size) => {
    const { ring, queue } = make({ size });
    for (let round = 0; round < 4 * size; round++) {
      ring.offer(1, [[DATA, 4, WRITE]]);
      ring.offer(2, [
        [DATA, 4, WRITE],
        [DATA, 4, WRITE],
      ]);
      expect([queue.take(), queue.take(), queue.take()]).toEqual([1, 2, NO_BUFFER]);
      queue.putBack(1);
      expect(queue.take()).toBe(2);
      queue.putBack(2);
      expect(queue.available()).toBe(2);
      expect([queue.take(), queue.take()]).toEqual([1, 2]);
      queue.complete(1, 1);
      queue.complete(2, 2);
      queue.publish();
      expect([ring.take()?.id, ring.take()?.id]).toEqual([1, 2]);
    }
    expect(queue.broken).toBeNull();
  });

  it('asks not to be notified, then to be, and respects what the driver asks, without EVENT_IDX', () => {
    const { ring, queue } = make();
    const use = () => {
      ring.offer(0, [[DATA, 4, WRITE]]);
      queue.take();
      queue.complete(0, 0);
      const wanted = queue.publish();
      ring.take();
      return wanted;
    };
    expect(use()).toBe(true);
    ring.driverEvent(1);
    expect(use()).toBe(false);
    queue.suppress();
    expect(ring.deviceEvent.flags).toBe(1);
    expect(queue.arm(0)).toBe(false);
    expect(ring.deviceEvent.flags).toBe(0);
    ring.offer(0, [[DATA, 4, WRITE]]);
    expect(queue.arm(0), 'one came').toBe(true);
    expect(queue.arm(1)).toBe(false);
  });

  it('interrupts at the descriptor that the driver named, and names the first that it has not seen, with EVENT_IDX', () => {
    for (const size of [1, 3, 8]) {
      const { ring, queue } = make({ eventIdx: true, size });
      for (let round = 0; round < 5 * size; round++) {
        const count = 1 + (round % size);
        for (let ahead = 0; ahead < 2 * size; ahead++) {
          const event = { ...ring.used };
          for (let i = 0; i < ahead; i++) ring.advance(event);
          ring.driverEvent(2, event);
          for (let i = 0; i < count; i++) ring.offer(i, [[DATA, 4, WRITE]]);
          expect(queue.arm(count)).toBe(false);
          expect(ring.deviceEvent).toEqual({ flags: 2, ...ring.avail });
          for (let i = 0; i < count; i++) {
            queue.take();
            queue.complete(i, 0);
          }
          expect(queue.publish()).toBe(ahead < count);
          for (let i = 0; i < count; i++) expect(ring.take()?.id).toBe(i);
        }
      }
    }
  });

  it('with IN_ORDER lets the last of several buffers that were only read stand for all, but shows each that was written', () => {
    const { ring, queue } = make({ inOrder: true });
    for (let i = 0; i < 3; i++) ring.offer(i, [[DATA, 4, 0]]);
    for (let i = 0; i < 3; i++) queue.complete(queue.take(), 0);
    expect(queue.publish()).toBe(true);
    expect(ring.flags(0) & (AVAIL | USED)).toBe(AVAIL | USED);
    expect(ring.flags(1) & (AVAIL | USED)).toBe(AVAIL);
    expect(ring.take()).toEqual({ id: 2, length: 0, write: false });
    ring.advance(ring.used, 2);
    for (let i = 3; i < 6; i++) ring.offer(i, [[DATA, 4, WRITE]]);
    for (let i = 3; i < 6; i++) queue.complete(queue.take(), i - 2);
    queue.publish();
    expect([ring.take(), ring.take(), ring.take()].map((entry) => [entry?.id, entry?.length])).toEqual([
      [3, 1],
      [4, 2],
      [5, 3],
    ]);
  });

  it('survives any content of the ring, and never takes more than the ring holds', () => {
    const word = fc.oneof(fc.integer({ min: 0, max: 40 }), fc.integer({ min: 0, max: 0xffffffff }));
    const descriptor = fc.record({
      at: fc.nat(SIZE - 1),
      offset: fc.oneof(fc.constant(DATA), fc.nat(2 ** 40)),
      length: word,
      flags: fc.oneof(fc.constantFrom(0, NEXT, WRITE, NEXT | WRITE, INDIRECT), fc.nat(0xffff)),
      wrap: fc.boolean(),
      id: fc.oneof(fc.nat(3), fc.nat(0xffff)),
      complete: fc.boolean(),
    });
    fc.assert(
      fc.property(fc.boolean(), fc.boolean(), fc.array(descriptor, { maxLength: 60 }), (eventIdx, inOrder, steps) => {
        const { ring, queue } = make({ eventIdx, inOrder });
        const held: number[] = [];
        for (const { at, offset, length, flags, wrap, id, complete } of steps) {
          ring.write(at, wrap, offset, length, flags, id);
          ring.driverEvent(flags & 3, { at: length & 0x7fff, wrap });
          for (let taken = queue.take(); taken !== NO_BUFFER; taken = queue.take()) {
            held.push(taken);
            if (held.length > SIZE) throw new Error(`${held.length} chains`);
            if (queue.segments > SIZE) throw new Error(`a chain of ${queue.segments} segments`);
            queue.gather(0, 4096, out);
            queue.scatter(0, 4096, out);
          }
          if (complete && held.length > 0) queue.complete(held.shift() ?? 0, length);
          queue.publish();
          queue.arm(0);
        }
      }),
      { numRuns: runs(300) },
    );
  });
});

describe('a packed virtqueue whose device knows of buffers from notifications alone', () => {
  /** A position as a notification says it. */
  const position = ({ at, wrap }: { at: number; wrap: boolean }) => at | (wrap ? 0x8000 : 0);

  it('has none before the first notification, and no more than was notified of', () => {
    const reach = { next: 0x8000 };
    const { ring, queue } = make({ reach });
    ring.offer(1, [[DATA, 100, 0]]);
    expect([queue.available(), queue.take(), queue.arm(0)]).toEqual([0, NO_BUFFER, false]);
    reach.next = position(ring.avail);
    ring.offer(2, [[DATA, 100, 0]]);
    expect(queue.available()).toBe(1);
    expect([queue.take(), queue.take()]).toEqual([1, NO_BUFFER]);
    reach.next = position(ring.avail);
    expect(queue.take()).toBe(2);
  });

  it('does not wait for a list that was notified of in the middle', () => {
    const reach = { next: 0x8001 };
    const { ring, queue } = make({ reach });
    ring.offer(1, [
      [DATA, 10, 0],
      [DATA + 100, 10, WRITE],
    ]);
    expect([queue.take(), queue.broken]).toEqual([NO_BUFFER, null]);
    reach.next = 0x8002;
    expect(queue.take()).toBe(1);
  });

  it('leaves the suppression structures alone: it always wants notifications, and tells the window of all that was used', () => {
    const reach = { next: 0x8000 };
    const { ring, queue } = make({ reach });
    queue.suppress();
    expect(ring.deviceEvent).toEqual({ flags: 0, at: 0, wrap: false });
    ring.offer(1, [[DATA, 10, WRITE]]);
    reach.next = position(ring.avail);
    ring.driverEvent(1);
    expect(queue.wantsInterrupts()).toBe(false);
    queue.complete(queue.take(), 4);
    expect(queue.publish()).toBe(true);
    ring.driverEvent(0);
    expect(queue.wantsInterrupts()).toBe(true);
  });

  it('never takes what is not available, wherever a notification points to', () => {
    const numbers = fc.array(fc.tuple(fc.integer({ min: 0, max: 4 }), fc.integer({ min: 0, max: 0xffff })), {
      maxLength: 40,
    });
    fc.assert(
      fc.property(numbers, (steps) => {
        const reach = { next: 0x8000 };
        const { ring, queue } = make({ reach });
        let id = 0;
        let [offered, taken, done] = [0, 0, 0];
        const held: number[] = [];
        for (const [count, wild] of steps) {
          for (let i = 0; i < count && offered - done < SIZE; i++, offered++)
            ring.offer(id++ % 64, [[DATA, 10, WRITE]]);
          // Now and then nonsense; the driver's own place otherwise.
          reach.next = wild % 3 === 0 ? wild : position(ring.avail);
          for (let got = queue.take(); got !== NO_BUFFER; got = queue.take(), taken++) held.push(got);
          expect(taken).toBeLessThanOrEqual(offered);
          if (wild % 3 !== 0) expect(taken).toBe(offered);
          for (const one of held.splice(0, wild % 5)) {
            queue.complete(one, 1);
            done++;
          }
          queue.publish();
          while (ring.take() !== null);
        }
        expect(queue.broken).toBeNull();
      }),
    );
  });
});

describe.each(['split', 'packed'] as const)('driver and device on one %s ring', (format) => {
  it.each([
    { eventIdx: false, inOrder: false },
    { eventIdx: true, inOrder: false },
    { eventIdx: true, inOrder: true },
  ])('agree about every buffer, with EVENT_IDX $eventIdx and IN_ORDER $inOrder', ({ eventIdx, inOrder }) => {
    const step = fc.record({
      bursts: fc.integer({ min: 0, max: 5 }),
      write: fc.boolean(),
      chain: fc.integer({ min: 0, max: 3 }),
      use: fc.integer({ min: 0, max: 8 }),
      reverse: fc.boolean(),
      max: fc.integer({ min: 1, max: SIZE }),
    });
    const indirect = fc.constantFrom(0, 3);
    fc.assert(
      fc.property(indirect, fc.array(step, { maxLength: 60 }), (indirectEntries, steps) => {
        const options = { index: 0, size: SIZE, eventIdx, inOrder, indirectEntries };
        const bytes = virtqueueBytes(format, options);
        const guest: DmaMemory = { ...shared, iova: GUEST_IOVA, iovaLow: GUEST_IOVA % 2 ** 32, iovaHigh: 1 };
        const driver = createVirtqueue(format, guest, options);
        const offset = (area: number) => area - GUEST_IOVA;
        const where = addresses(offset(driver.descriptorArea), offset(driver.driverArea), offset(driver.deviceArea));
        const Queue = format === 'packed' ? PackedDeviceQueue : SplitDeviceQueue;
        const device = new Queue(memory, { ...options, addresses: where, indirect: indirectEntries > 0, scratch });
        expect(bytes).toBeLessThan(DATA);
        let token = 0;
        const posted: { token: number; bytes: number; written: number }[] = [];
        const held: { id: number; token: number; written: number }[] = [];
        const used: { token: number; written: number }[] = [];
        for (const { bursts, write, chain, use, reverse, max } of steps) {
          const tokens = Uint32Array.from({ length: bursts }, (_, i) => token + i);
          const lengths = new Uint32Array(token + bursts).fill(64);
          const n = driver.postBurst(tokens, 0, bursts, lengths, lengths, write);
          for (let i = 0; i < n; i++) posted.push({ token: token++, bytes: 64, written: write ? 3 : 0 });
          const pieces = Uint32Array.from({ length: 3 * chain }, (_, i) => [DATA, 1, 10][i % 3]);
          if (driver.postChain(token, pieces, 1, chain - 1)) {
            posted.push({ token: token++, bytes: 10 * chain, written: chain > 1 ? 7 : 0 });
          }
          driver.publish();
          expect(device.available()).toBe(posted.length);
          const wanted = Math.min(use, posted.length);
          for (let i = 0; i < wanted; i++) {
            const id = device.take();
            const entry = posted.shift();
            if (entry === undefined) throw new Error('unreachable');
            expect(device.readableBytes + device.writableBytes).toBe(entry.bytes);
            if (inOrder) {
              device.complete(id, entry.written);
              used.push({ token: entry.token, written: entry.written });
            } else {
              held.push({ id, ...entry });
            }
          }
          if (!inOrder) {
            const back = held.splice(0, use);
            for (const { id, token: t, written } of reverse ? back.reverse() : back) {
              device.complete(id, written);
              used.push({ token: t, written });
            }
          }
          device.publish();
          const taken = new Uint32Array(SIZE);
          const written = new Uint32Array(SIZE);
          const count = driver.take(taken, written, max);
          const expected = used.splice(0, max);
          expect(Array.from({ length: count }, (_, i) => ({ token: taken[i], written: written[i] }))).toEqual(expected);
        }
        expect([driver.broken, device.broken]).toEqual([null, null]);
        device.close();
      }),
      { numRuns: runs(150) },
    );
  });
});
