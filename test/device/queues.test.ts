import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { Arena } from '../../src/device/arena.ts';
import { GuestMemory } from '../../src/device/guest-memory.ts';
import { NO_BUFFER } from '../../src/device/queues.ts';
import { SplitDeviceQueue } from '../../src/device/split-queue.ts';
import { close, FcntlCommand, fcntl, ftruncate, memfdCreate, PAGE_SIZE } from '../../src/sys/libc.ts';
import { mapShared } from '../../src/sys/memory.ts';
import { runs } from '../depth.ts';
import { GUEST_IOVA, GUEST_SIZE, Ring } from './helpers/mini-driver.ts';

const NEXT = 1;
const WRITE = 2;
const INDIRECT = 4;
const SIZE = 16;
const DATA = 0x100000;

const arena = new Arena(64 * 2 ** 20);
const scratch = arena.allocate(4096);
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

function make(options: { eventIdx?: boolean; indirect?: boolean; size?: number } = {}): {
  ring: Ring;
  queue: SplitDeviceQueue;
} {
  const size = options.size ?? SIZE;
  const ring = new Ring(shared, 0, size);
  shared.u8.fill(0, 0, ring.end + 16);
  const address = (offset: number) => GUEST_IOVA + offset;
  const low = (offset: number) => address(offset) % 2 ** 32;
  const high = (offset: number) => Math.floor(address(offset) / 2 ** 32);
  const queue = new SplitDeviceQueue(memory, {
    index: 0,
    size,
    addresses: {
      descriptorLow: low(ring.descriptors),
      descriptorHigh: high(ring.descriptors),
      driverLow: low(ring.avail),
      driverHigh: high(ring.avail),
      deviceLow: low(ring.used),
      deviceHigh: high(ring.used),
    },
    eventIdx: options.eventIdx ?? false,
    indirect: options.indirect ?? true,
    scratch,
  });
  return { ring, queue };
}

/** Writes an indirect table at `offset` and points descriptor 0 to it. */
function table(ring: Ring, offset: number, entries: readonly (readonly [number, number, number, number])[]): void {
  for (const [i, [at, length, flags, next]] of entries.entries()) {
    const word = (offset + 16 * i) >>> 2;
    const address = GUEST_IOVA + at;
    shared.u32[word] = address;
    shared.u32[word + 1] = Math.floor(address / 2 ** 32);
    shared.u32[word + 2] = length;
    shared.u32[word + 3] = flags | (next << 16);
  }
  ring.descriptor(0, offset, 16 * entries.length, INDIRECT);
}

describe('the device side of a split virtqueue', () => {
  it('finds nothing in an empty ring', () => {
    const { queue } = make();
    expect(queue.available()).toBe(0);
    expect(queue.take()).toBe(NO_BUFFER);
    expect(queue.publish()).toBe(false);
    expect(queue.broken).toBeNull();
  });

  it('takes a chain of readable and writable descriptors, and returns it', () => {
    const { ring, queue } = make();
    ring.descriptor(3, DATA, 10, NEXT, 7);
    ring.descriptor(7, DATA + 100, 20, NEXT | WRITE, 1);
    ring.descriptor(1, DATA + 200, 30, WRITE);
    ring.offer(3);
    expect(queue.available()).toBe(1);
    expect(queue.take()).toBe(3);
    expect([queue.readable, queue.segments, queue.readableBytes, queue.writableBytes]).toEqual([1, 3, 10, 50]);
    queue.complete(3, 42);
    expect(ring.usedIndex).toBe(0);
    expect(queue.publish()).toBe(true);
    expect(ring.take()).toEqual({ id: 3, length: 42 });
  });

  it('walks an indirect table, also behind ordinary descriptors', () => {
    const { ring, queue } = make();
    table(ring, DATA, [
      [DATA + 0x1000, 5, NEXT, 2],
      [0, 0, 0, 0],
      [DATA + 0x2000, 6, WRITE, 0],
    ]);
    ring.descriptor(4, DATA + 0x3000, 7, NEXT, 0);
    ring.offer(4);
    expect(queue.take()).toBe(4);
    expect([queue.readableBytes, queue.writableBytes]).toEqual([12, 6]);
  });

  it('ignores the WRITE flag of a descriptor that refers to an indirect table', () => {
    const { ring, queue } = make();
    table(ring, DATA, [[DATA + 0x1000, 5, 0, 0]]);
    ring.descriptor(0, DATA, 16, INDIRECT | WRITE);
    ring.offer(0);
    expect(queue.take()).toBe(0);
    expect([queue.readableBytes, queue.writableBytes]).toEqual([5, 0]);
  });

  it.each<[string, (ring: Ring) => void]>([
    [
      'a chain that loops',
      (ring) => {
        ring.descriptor(0, DATA, 4, NEXT, 1);
        ring.descriptor(1, DATA, 4, NEXT, 0);
        ring.offer(0);
      },
    ],
    [
      'a descriptor that is its own successor',
      (ring) => {
        ring.descriptor(0, DATA, 4, NEXT, 0);
        ring.offer(0);
      },
    ],
    ['a head beyond the table', (ring) => ring.offer(SIZE)],
    ['a head of 65535', (ring) => ring.offer(0xffff)],
    [
      'a next beyond the table',
      (ring) => {
        ring.descriptor(0, DATA, 4, NEXT, SIZE);
        ring.offer(0);
      },
    ],
    [
      'a readable descriptor after a writable one',
      (ring) => {
        ring.descriptor(0, DATA, 4, NEXT | WRITE, 1);
        ring.descriptor(1, DATA, 4, 0);
        ring.offer(0);
      },
    ],
    [
      'INDIRECT together with NEXT',
      (ring) => {
        ring.descriptor(0, DATA, 16, INDIRECT | NEXT, 1);
        ring.offer(0);
      },
    ],
    [
      'an indirect table of no bytes',
      (ring) => {
        ring.descriptor(0, DATA, 0, INDIRECT);
        ring.offer(0);
      },
    ],
    [
      'an indirect table of 17 bytes',
      (ring) => {
        ring.descriptor(0, DATA, 17, INDIRECT);
        ring.offer(0);
      },
    ],
    [
      'an indirect table of more descriptors than the queue has',
      (ring) => {
        ring.descriptor(0, DATA, 16 * (SIZE + 1), INDIRECT);
        ring.offer(0);
      },
    ],
    [
      'an indirect table of almost 4 GiB',
      (ring) => {
        ring.descriptor(0, DATA, 0xfffffff0, INDIRECT);
        ring.offer(0);
      },
    ],
    [
      'an indirect table that is not mapped',
      (ring) => {
        ring.descriptor(0, GUEST_SIZE, 16, INDIRECT);
        ring.offer(0);
      },
    ],
    [
      'an indirect table in an indirect table',
      (ring) => {
        table(ring, DATA, [[DATA, 16, INDIRECT, 0]]);
        ring.offer(0);
      },
    ],
    [
      'an indirect chain that loops',
      (ring) => {
        table(ring, DATA, [
          [DATA, 16, NEXT, 1],
          [DATA, 16, NEXT, 0],
        ]);
        ring.offer(0);
      },
    ],
    [
      'an indirect next beyond the table',
      (ring) => {
        table(ring, DATA, [[DATA, 16, NEXT, 1]]);
        ring.offer(0);
      },
    ],
    [
      'a buffer of more than 4 GiB',
      (ring) => {
        ring.descriptor(0, DATA, 0xffffffff, NEXT, 1);
        ring.descriptor(1, DATA, 2, 0);
        ring.offer(0);
      },
    ],
    [
      'an available index that runs ahead of the ring',
      (ring) => {
        ring.nextAvail = SIZE;
        ring.offer(0);
      },
    ],
  ])('is broken by %s, and does nothing more', (_, prepare) => {
    const { ring, queue } = make();
    prepare(ring);
    expect(queue.take()).toBe(NO_BUFFER);
    expect(queue.broken).not.toBeNull();
    queue.complete(0, 0);
    expect(queue.publish()).toBe(false);
    expect(ring.usedIndex).toBe(0);
    expect(queue.available()).toBe(0);
    expect(queue.arm(0)).toBe(false);
  });

  it('is broken by an indirect descriptor that was not negotiated', () => {
    const { ring, queue } = make({ indirect: false });
    table(ring, DATA, [[DATA, 16, 0, 0]]);
    ring.offer(0);
    expect(queue.take()).toBe(NO_BUFFER);
    expect(queue.broken).toMatch(/INDIRECT/);
  });

  it('takes a chain of exactly as many descriptors as the queue has', () => {
    const { ring, queue } = make();
    for (let i = 0; i < SIZE; i++) ring.descriptor(i, DATA + i, 1, i === SIZE - 1 ? 0 : NEXT, i + 1);
    ring.offer(0);
    expect(queue.take()).toBe(0);
    expect(queue.segments).toBe(SIZE);
  });

  it('gathers and scatters across pieces, from any byte on', () => {
    const { ring, queue } = make();
    for (let i = 0; i < 30; i++) shared.u8[DATA + i] = i;
    ring.descriptor(0, DATA, 10, NEXT, 1);
    ring.descriptor(1, DATA + 10, 0, NEXT, 2);
    ring.descriptor(2, DATA + 10, 20, NEXT, 3);
    ring.descriptor(3, DATA + 100, 3, NEXT | WRITE, 4);
    ring.descriptor(4, DATA + 200, 100, WRITE);
    ring.offer(0);
    queue.take();
    expect(queue.gather(5, 1000, out)).toBe(25);
    expect([...arena.u8.subarray(out, out + 25)]).toEqual(Array.from({ length: 25 }, (_, i) => i + 5));
    expect(queue.scatter(1, 10, out)).toBe(10);
    expect([...shared.u8.subarray(DATA + 100, DATA + 103)]).toEqual([0, 5, 6]);
    expect([...shared.u8.subarray(DATA + 200, DATA + 209)]).toEqual([7, 8, 9, 10, 11, 12, 13, 14, 0]);
    expect(queue.gather(30, 10, out)).toBe(0);
    expect(queue.scatter(100, 10, out)).toBe(3);
  });

  it.each([
    ['reads from', 0, 'gather'],
    ['writes to', WRITE, 'scatter'],
  ] as const)('is broken when it %s memory that is not mapped', (_, flag, call) => {
    const { ring, queue } = make();
    ring.descriptor(0, GUEST_SIZE - 10, 100, flag);
    ring.offer(0);
    expect(queue.take()).toBe(0);
    expect(queue[call](0, 100, out)).toBe(-1);
    expect(queue.broken).toMatch(/not mapped/);
  });

  it('takes buffers again that were put back', () => {
    const { ring, queue } = make();
    for (let i = 0; i < 3; i++) {
      ring.descriptor(i, DATA, 4, WRITE);
      ring.offer(i);
    }
    expect([queue.take(), queue.take(), queue.take(), queue.take()]).toEqual([0, 1, 2, NO_BUFFER]);
    queue.putBack(2);
    expect([queue.take(), queue.take(), queue.take()]).toEqual([1, 2, NO_BUFFER]);
  });

  it('wraps around its indices at 65536', () => {
    const { ring, queue } = make();
    for (let i = 0; i < 65536 + 3 * SIZE; i++) {
      const head = i % SIZE;
      ring.descriptor(head, DATA, 4, WRITE);
      ring.offer(head);
      if (queue.take() !== head) throw new Error(`lost at ${i}`);
      queue.complete(head, i & 0xff);
      queue.publish();
      const used = ring.take();
      if (used?.id !== head || used.length !== (i & 0xff)) throw new Error(`used ${JSON.stringify(used)} at ${i}`);
    }
    expect(queue.broken).toBeNull();
  });

  it('respects NO_INTERRUPT and sets NO_NOTIFY without EVENT_IDX', () => {
    const { ring, queue } = make();
    const flags = ring.avail >>> 1;
    const use = () => {
      ring.descriptor(0, DATA, 4, WRITE);
      ring.offer(0);
      queue.take();
      queue.complete(0, 0);
      return queue.publish();
    };
    expect(use()).toBe(true);
    shared.u16[flags] = 1;
    expect(use()).toBe(false);
    queue.suppress();
    expect(shared.u16[ring.used >>> 1]).toBe(1);
    expect(queue.arm(0)).toBe(false);
    expect(shared.u16[ring.used >>> 1]).toBe(0);
  });

  it('interrupts at used_event and asks for a notification at avail_event with EVENT_IDX', () => {
    const { ring, queue } = make({ eventIdx: true });
    const usedEvent = (ring.avail >>> 1) + 2 + SIZE;
    const availEvent = (ring.used >>> 1) + 2 + 4 * SIZE;
    const use = (n: number) => {
      for (let i = 0; i < n; i++) {
        ring.descriptor(0, DATA, 4, WRITE);
        ring.offer(0);
        queue.take();
        queue.complete(0, 0);
      }
      return queue.publish();
    };
    shared.u16[usedEvent] = 0;
    expect(use(1)).toBe(true);
    shared.u16[usedEvent] = 3;
    expect([use(1), use(1), use(1), use(1)]).toEqual([false, false, true, false]);
    shared.u16[usedEvent] = 7;
    expect(use(5)).toBe(true);
    // The flags count for nothing now.
    shared.u16[ring.avail >>> 1] = 1;
    shared.u16[usedEvent] = 10;
    expect(use(1)).toBe(true);
    expect(queue.arm(0)).toBe(false);
    expect(shared.u16[availEvent]).toBe(11);
    queue.suppress();
    expect(shared.u16[availEvent]).toBe(11);
    expect(shared.u16[ring.used >>> 1]).toBe(0);
  });

  it('sees a buffer that came while it was asking for notifications', () => {
    const { ring, queue } = make();
    ring.descriptor(0, DATA, 4, WRITE);
    ring.offer(0);
    expect(queue.arm(0)).toBe(true);
    expect(queue.arm(1)).toBe(false);
  });

  it('asks to be notified of the first buffer that it has not seen, though it has not taken those before', () => {
    const { ring, queue } = make({ eventIdx: true });
    for (let i = 0; i < 3; i++) {
      ring.descriptor(i, DATA, 4, WRITE);
      ring.offer(i);
    }
    queue.take();
    expect(queue.arm(2)).toBe(false);
    expect(shared.u16[(ring.used >>> 1) + 2 + 4 * SIZE]).toBe(3);
  });

  it('finds its ring again after the driver has mapped it elsewhere, and is broken without it', () => {
    const { ring, queue } = make();
    ring.descriptor(0, DATA, 4, WRITE);
    ring.offer(0);
    expect(queue.available()).toBe(1);
    memory.unmap(GUEST_IOVA, GUEST_SIZE);
    const again = memfdCreate('guest');
    ftruncate(again, GUEST_SIZE);
    memory.map(GUEST_IOVA, GUEST_SIZE, again, 0, true);
    // The ring is now in the new memory, where nothing has been made available.
    expect(queue.available()).toBe(0);
    expect(queue.broken).toBeNull();
    memory.unmap(GUEST_IOVA, GUEST_SIZE);
    expect(queue.available()).toBe(0);
    expect(queue.broken).toMatch(/not mapped/);
    const back = memfdCreate('guest');
    ftruncate(back, GUEST_SIZE);
    memory.map(GUEST_IOVA, GUEST_SIZE, back, 0, true);
  });

  it('is broken, and nothing is thrown, when there is no room to map a ring in scattered pages', () => {
    const pages = 4;
    const small = new Arena(pages * PAGE_SIZE);
    const guest = new GuestMemory(small);
    const file = memfdCreate('scattered');
    ftruncate(file, pages * PAGE_SIZE);
    for (let page = 0; page < pages; page++) {
      guest.map(page * PAGE_SIZE, PAGE_SIZE, fcntl(file, FcntlCommand.duplicate), (pages - 1 - page) * PAGE_SIZE, true);
    }
    close(file);
    const [descriptorHigh, driverHigh, deviceHigh] = [0, 0, 0];
    const queue = new SplitDeviceQueue(guest, {
      index: 3,
      size: 512,
      addresses: {
        ...{ descriptorLow: 0, descriptorHigh },
        ...{ driverLow: 2 * PAGE_SIZE, driverHigh },
        ...{ deviceLow: 3 * PAGE_SIZE, deviceHigh },
      },
      ...{ eventIdx: false, indirect: false, scratch: 0 },
    });
    expect(queue.available()).toBe(0);
    expect(queue.broken).toMatch(/^queue 3: the ring cannot be mapped: /);
    expect(queue.take()).toBe(NO_BUFFER);
    expect(small.available).toBe(0);
    guest.clear();
    small.close();
  });

  it('survives any content of the ring', () => {
    const again = memfdCreate('random');
    ftruncate(again, GUEST_SIZE);
    memory.unmap(GUEST_IOVA, GUEST_SIZE);
    const view = mapShared(again, 0, GUEST_SIZE, { write: true });
    memory.map(GUEST_IOVA, GUEST_SIZE, again, 0, true);
    const word = fc.oneof(fc.integer({ min: 0, max: 40 }), fc.integer({ min: 0, max: 0xffffffff }));
    const descriptor = fc.record({
      low: fc.oneof(fc.constant(GUEST_IOVA % 2 ** 32), word),
      high: fc.oneof(fc.constant(1), word),
      length: word,
      flags: fc.integer({ min: 0, max: 7 }),
      next: fc.integer({ min: 0, max: SIZE + 1 }),
    });
    const content = fc.record({
      descriptors: fc.array(descriptor, { minLength: SIZE, maxLength: SIZE }),
      heads: fc.array(fc.integer({ min: 0, max: SIZE }), { minLength: SIZE, maxLength: SIZE }),
      index: fc.integer({ min: 0, max: SIZE + 2 }),
    });
    fc.assert(
      fc.property(content, ({ descriptors, heads, index }) => {
        const { ring, queue } = make();
        for (const [i, d] of descriptors.entries()) {
          const at = (ring.descriptors + 16 * i) >>> 2;
          view.u32[at] = d.low;
          view.u32[at + 1] = d.high;
          view.u32[at + 2] = d.length;
          view.u32[at + 3] = d.flags | (d.next << 16);
        }
        for (const [i, head] of heads.entries()) view.u16[(ring.avail >>> 1) + 2 + i] = head;
        view.u16[(ring.avail >>> 1) + 1] = index;
        let taken = 0;
        for (let id = queue.take(); id !== NO_BUFFER; id = queue.take()) {
          taken++;
          expect(queue.segments).toBeLessThanOrEqual(SIZE);
          queue.gather(0, 4096, out);
          queue.scatter(0, 4096, out);
          queue.complete(id, 0);
        }
        queue.publish();
        expect(taken).toBeLessThanOrEqual(SIZE);
        if (queue.broken === null) expect(taken).toBe(index);
        // What the random writes did to the ring itself must not reach the next run.
        view.u8.fill(0, 0, 3 * 4096);
      }),
      { numRuns: runs(200) },
    );
  });
});
