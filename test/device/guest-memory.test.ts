import { readdirSync } from 'node:fs';
import fc from 'fast-check';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { Arena } from '../../src/device/arena.ts';
import { BackingFiles } from '../../src/device/backing.ts';
import { GuestMemory, type MemoryLimits } from '../../src/device/guest-memory.ts';
import {
  close,
  FcntlCommand,
  fcntl,
  ftruncate,
  MemfdFlag,
  memfdCreate,
  OpenFlag,
  open,
  PAGE_SIZE,
  Seal,
} from '../../src/sys/libc.ts';
import { mapShared, unmapMemory } from '../../src/sys/memory.ts';

const arena = new Arena(256 * 2 ** 20);
const memories: GuestMemory[] = [];
const DUPLICATE = 0;

function guest(limits?: MemoryLimits): GuestMemory {
  const memory = new GuestMemory(arena, new BackingFiles(arena), limits);
  memories.push(memory);
  return memory;
}

/** A file of `pages` pages, each filled with its number. */
function file(pages: number, flags: number = MemfdFlag.cloexec): number {
  const fd = memfdCreate('test', flags);
  ftruncate(fd, pages * PAGE_SIZE);
  const view = mapShared(fd, 0, pages * PAGE_SIZE, { write: true });
  for (let p = 0; p < pages; p++) view.u8.fill(p + 1, p * PAGE_SIZE, (p + 1) * PAGE_SIZE);
  unmapMemory(view);
  return fd;
}

const duplicate = (fd: number) => fcntl(fd, DUPLICATE);

afterEach(() => {
  for (const memory of memories.splice(0)) memory.clear();
});
afterAll(() => arena.close());

describe('guest memory', () => {
  it('finds the bytes of a file at the addresses that they were mapped to', () => {
    const memory = guest();
    memory.map(0x7_0000_0000, 4 * PAGE_SIZE, file(4), 0, true);
    const at = memory.translate(2 * PAGE_SIZE + 5, 7, false);
    expect(arena.u8[at]).toBe(3);
    expect(memory.run).toBe(2 * PAGE_SIZE - 5);
  });

  it('honours the offset in the file', () => {
    const memory = guest();
    memory.map(0, PAGE_SIZE, file(4), 3 * PAGE_SIZE, true);
    expect(arena.u8[memory.translate(0, 0, false)]).toBe(4);
  });

  it.each([
    ['below the window', 0x0fff, 0],
    ['behind the window', 0x3000, 0],
    ['in another upper half', 0x1000, 1],
  ])('refuses an address %s', (_, low, high) => {
    const memory = guest();
    memory.map(0x1000, 2 * PAGE_SIZE, file(2), 0, true);
    expect(memory.translate(0x1000, 0, true)).toBeGreaterThanOrEqual(0);
    expect(memory.translate(low, high, false)).toBe(-1);
  });

  it('refuses a write to a window that is readable only', () => {
    const memory = guest();
    memory.map(0, PAGE_SIZE, file(1), 0, false);
    expect(memory.translate(0, 0, false)).toBeGreaterThanOrEqual(0);
    expect(memory.translate(0, 0, true)).toBe(-1);
  });

  it('keeps one descriptor and one mapping for many descriptors of one file', () => {
    const memory = guest();
    const fd = file(64);
    const before = arena.available;
    for (let p = 0; p < 64; p++) memory.map(p * 0x10000, PAGE_SIZE, duplicate(fd), p * PAGE_SIZE, true);
    expect(memory.files).toBe(1);
    expect(memory.windows).toBe(64);
    expect(before - arena.available).toBe(64 * PAGE_SIZE);
    for (let p = 0; p < 64; p++) expect(arena.u8[memory.translate(p * 0x10000, 0, false)]).toBe(p + 1);
    close(fd);
  });

  it('accepts an unmap that covers many windows, parts of windows, or none', () => {
    const memory = guest();
    const fd = file(8);
    for (let p = 0; p < 4; p++) memory.map(p * 2 * PAGE_SIZE, 2 * PAGE_SIZE, duplicate(fd), 0, true);
    close(fd);
    expect(memory.unmap(0x100000, 0x1000)).toBe(0);
    expect(memory.unmap(PAGE_SIZE, 5 * PAGE_SIZE)).toBe(5 * PAGE_SIZE);
    expect(memory.translate(0, 0, false)).toBeGreaterThanOrEqual(0);
    expect(memory.translate(PAGE_SIZE, 0, false)).toBe(-1);
    expect(memory.translate(6 * PAGE_SIZE, 0, false)).toBeGreaterThanOrEqual(0);
    memory.map(PAGE_SIZE, 5 * PAGE_SIZE, file(5), 0, true);
    expect(memory.unmap(0, 2 ** 53)).toBe(8 * PAGE_SIZE);
    expect(memory.windows).toBe(0);
  });

  it('cuts a hole into a window', () => {
    const memory = guest();
    memory.map(0, 3 * PAGE_SIZE, file(3), 0, true);
    memory.unmap(PAGE_SIZE, PAGE_SIZE);
    expect(arena.u8[memory.translate(0, 0, false)]).toBe(1);
    expect(memory.translate(PAGE_SIZE, 0, false)).toBe(-1);
    expect(arena.u8[memory.translate(2 * PAGE_SIZE, 0, false)]).toBe(3);
  });

  it.each([
    ['a file that is too short', 0, 3 * PAGE_SIZE, 0, 'DMA_INVALID'],
    ['an offset that runs over the end of the file', 0, 2 * PAGE_SIZE, PAGE_SIZE, 'DMA_INVALID'],
    ['half a page', 0, 100, 0, 'DMA_INVALID'],
    ['an address inside a page', 100, PAGE_SIZE, 0, 'DMA_INVALID'],
    ['an offset inside a page', 0, PAGE_SIZE, 100, 'DMA_INVALID'],
    ['an end beyond 2^53', 2 ** 53 - PAGE_SIZE, 2 * PAGE_SIZE, 0, 'DMA_INVALID'],
    ['an overlap', 0x10000 + PAGE_SIZE, PAGE_SIZE, 0, 'DMA_EXISTS'],
  ])('refuses %s and is as it was', (_, iova, size, offset, code) => {
    const memory = guest();
    memory.map(0x10000, 2 * PAGE_SIZE, file(2), 0, true);
    expect(() => memory.map(iova, size, file(2), offset, true)).toThrow(expect.objectContaining({ code }));
    expect(memory.windows).toBe(1);
    expect(memory.files).toBe(1);
  });

  it('copies across windows that are neighbours by address and scattered in the file', () => {
    const memory = guest();
    const fd = file(4);
    for (let p = 0; p < 4; p++) memory.map(p * PAGE_SIZE, PAGE_SIZE, duplicate(fd), (3 - p) * PAGE_SIZE, true);
    const to = arena.allocate(4 * PAGE_SIZE);
    expect(memory.read(PAGE_SIZE - 2, 0, PAGE_SIZE + 4, to)).toBe(true);
    expect([arena.u8[to], arena.u8[to + 2], arena.u8[to + 1 + PAGE_SIZE], arena.u8[to + PAGE_SIZE + 3]]).toEqual([
      4, 3, 3, 2,
    ]);
    arena.u8.fill(9, to, to + PAGE_SIZE);
    expect(memory.write(PAGE_SIZE - 2, 0, 4, to)).toBe(true);
    expect(arena.u8[memory.translate(PAGE_SIZE + 1, 0, false)]).toBe(9);
    expect(memory.read(3 * PAGE_SIZE, 0, PAGE_SIZE + 1, to)).toBe(false);
    arena.release(to, 4 * PAGE_SIZE);
    close(fd);
  });

  it('pins scattered pages as one piece that shows later changes', () => {
    const memory = guest();
    const fd = file(4);
    for (let p = 0; p < 4; p++) memory.map(p * PAGE_SIZE, PAGE_SIZE, duplicate(fd), (3 - p) * PAGE_SIZE, true);
    const pin = memory.pin(PAGE_SIZE - 16, 0, PAGE_SIZE + 32, true);
    if (pin === null) throw new Error('not pinned');
    expect([arena.u8[pin.offset], arena.u8[pin.offset + 16], arena.u8[pin.offset + PAGE_SIZE + 16]]).toEqual([4, 3, 2]);
    arena.u8[memory.translate(PAGE_SIZE, 0, true)] = 77;
    expect(arena.u8[pin.offset + 16]).toBe(77);
    expect(pin.valid).toBe(true);
    memory.unmap(2 * PAGE_SIZE, PAGE_SIZE);
    expect(pin.valid).toBe(false);
    memory.unpin(pin);
    close(fd);
  });

  it('has a file once, whatever is mapped for reading only, and whoever maps it', () => {
    const small = new Arena(32 * PAGE_SIZE);
    const files = new BackingFiles(small);
    const [a, b] = [new GuestMemory(small, files), new GuestMemory(small, files)];
    const fd = file(20);
    a.map(0, 20 * PAGE_SIZE, duplicate(fd), 0, true);
    a.map(0x100_0000, 20 * PAGE_SIZE, duplicate(fd), 0, false);
    b.map(0x200_0000, 20 * PAGE_SIZE, fd, 0, false);
    expect(b.files).toBe(1);
    expect(a.translate(0x100_3000, 0, false)).toBe(a.translate(0x3000, 0, true));
    expect(b.translate(0x200_3000, 0, false)).toBe(a.translate(0x3000, 0, true));
    expect([a.translate(0x100_3000, 0, true), b.translate(0x200_3000, 0, true)]).toEqual([-1, -1]);
    a.clear();
    expect(small.u8[b.translate(0x200_3000, 0, false)]).toBe(4);
    b.clear();
    expect(b.files).toBe(0);
    small.close();
  });

  it('lets nobody write to a file that others may write to', () => {
    const files = new BackingFiles(arena);
    const [a, b] = [new GuestMemory(arena, files), new GuestMemory(arena, files)];
    memories.push(a, b);
    const fd = file(2);
    const readOnly = () => open(`/proc/self/fd/${fd}`, OpenFlag.readOnly);
    const view = readOnly();
    a.map(0, 2 * PAGE_SIZE, fd, 0, true);
    expect(() => b.map(0, 2 * PAGE_SIZE, view, 0, true)).toThrow(expect.objectContaining({ code: 'EACCES' }));
    b.map(0, 2 * PAGE_SIZE, readOnly(), 0, false);
    expect(arena.u8[b.translate(0x1000, 0, false)]).toBe(2);
    expect(b.translate(0x1000, 0, true)).toBe(-1);
  });

  it('maps a file that is sealed against writing, for reading', () => {
    const fd = file(2, MemfdFlag.cloexec | MemfdFlag.allowSealing);
    fcntl(fd, FcntlCommand.addSeals, Seal.write);
    const memory = guest();
    memory.map(0, 2 * PAGE_SIZE, fd, 0, false);
    expect(arena.u8[memory.translate(0x1000, 0, false)]).toBe(2);
  });

  it('does not pin what is not all mapped, or not writable', () => {
    const memory = guest();
    memory.map(0, PAGE_SIZE, file(1), 0, false);
    expect(memory.pin(0, 0, PAGE_SIZE + 1, false)).toBeNull();
    expect(memory.pin(0, 0, 16, true)).toBeNull();
    expect(memory.pin(0, 0, 16, false)).not.toBeNull();
  });

  it('gives address space back when files go, and closes them', () => {
    const memory = guest();
    const before = arena.available;
    for (let round = 0; round < 100; round++) {
      memory.map(0, 16 * PAGE_SIZE, file(16), 0, true);
      memory.unmap(0, 16 * PAGE_SIZE);
    }
    expect(memory.files).toBeLessThanOrEqual(16);
    memory.clear();
    expect(memory.files).toBe(0);
    expect(arena.available).toBe(before);
  });

  it('makes room for new files by letting unused ones go', () => {
    const small = new Arena(64 * PAGE_SIZE);
    const memory = new GuestMemory(small);
    for (let round = 0; round < 8; round++) {
      memory.map(0, 40 * PAGE_SIZE, file(40), 0, true);
      expect(small.u8[memory.translate(39 * PAGE_SIZE, 0, false)]).toBe(40);
      memory.unmap(0, 40 * PAGE_SIZE);
    }
    memory.map(0, 40 * PAGE_SIZE, file(40), 0, true);
    expect(() => memory.map(0x1000000, 40 * PAGE_SIZE, file(40), 0, true)).toThrow(
      expect.objectContaining({ code: 'ARENA_FULL' }),
    );
    expect(memory.windows).toBe(1);
    memory.clear();
    small.close();
  });

  it('keeps a file open that has grown while nothing of it was mapped', () => {
    const memory = guest();
    const fd = file(1);
    memory.map(0, PAGE_SIZE, duplicate(fd), 0, true);
    memory.unmap(0, PAGE_SIZE);
    ftruncate(fd, 3 * PAGE_SIZE);
    memory.map(0, 3 * PAGE_SIZE, duplicate(fd), 0, true);
    memory.unmap(PAGE_SIZE, PAGE_SIZE);
    // Would get the number of a descriptor that was closed by mistake, and with it the place of the file.
    const other = file(4);
    memory.map(PAGE_SIZE, PAGE_SIZE, duplicate(other), 3 * PAGE_SIZE, true);
    const pin = memory.pin(0, 0, 3 * PAGE_SIZE, true);
    const at = pin?.offset ?? 0;
    arena.u8[memory.translate(2 * PAGE_SIZE, 0, true)] = 77;
    expect([arena.u8[at], arena.u8[at + PAGE_SIZE], arena.u8[at + 2 * PAGE_SIZE]]).toEqual([1, 4, 77]);
    expect(memory.files).toBe(2);
    if (pin !== null) memory.unpin(pin);
    for (const one of [fd, other]) close(one);
  });

  it('gives no address space back twice when a file has grown and there is little', () => {
    const small = new Arena(8 * PAGE_SIZE);
    const memory = new GuestMemory(small);
    const fd = file(3);
    memory.map(0, 3 * PAGE_SIZE, duplicate(fd), 0, true);
    memory.unmap(0, 3 * PAGE_SIZE);
    ftruncate(fd, 6 * PAGE_SIZE);
    // What is unused has to go for the longer piece of the same file.
    memory.map(0, 6 * PAGE_SIZE, duplicate(fd), 0, true);
    expect(small.available).toBe(2 * PAGE_SIZE);
    expect(memory.files).toBe(1);
    memory.clear();
    expect([small.available, memory.files]).toEqual([8 * PAGE_SIZE, 0]);
    close(fd);
    small.close();
  });

  it('keeps a file open while its unused pieces make room for another one of it', () => {
    const chunk = 256 * 2 ** 20;
    const small = new Arena(chunk + PAGE_SIZE);
    const memory = new GuestMemory(small);
    const fd = memfdCreate('test', MemfdFlag.cloexec);
    ftruncate(fd, 2 * chunk);
    memory.map(0, PAGE_SIZE, duplicate(fd), 0, true);
    memory.unmap(0, PAGE_SIZE);
    memory.map(0, PAGE_SIZE, duplicate(fd), chunk, true);
    small.u8[memory.translate(0, 0, true)] = 5;
    const view = mapShared(fd, chunk, PAGE_SIZE, { write: true });
    expect([view.u8[0], memory.files]).toEqual([5, 1]);
    unmapMemory(view);
    memory.clear();
    expect([small.available, memory.files]).toEqual([chunk + PAGE_SIZE, 0]);
    close(fd);
    small.close();
  });

  it('refuses an unmapping that would leave one window too many, and is then as it was', () => {
    const memory = guest({ windows: 3, files: 8 });
    memory.map(0, 9 * PAGE_SIZE, file(9), 0, true);
    for (const page of [1, 3]) memory.unmap(page * PAGE_SIZE, PAGE_SIZE);
    expect(memory.windows).toBe(3);
    expect(() => memory.unmap(5 * PAGE_SIZE, PAGE_SIZE)).toThrow(expect.objectContaining({ code: 'DMA_LIMIT' }));
    expect(arena.u8[memory.translate(5 * PAGE_SIZE, 0, true)]).toBe(6);
    // What makes no further window is done.
    expect(memory.unmap(8 * PAGE_SIZE, PAGE_SIZE)).toBe(PAGE_SIZE);
    expect(memory.unmap(0, 9 * PAGE_SIZE)).toBe(6 * PAGE_SIZE);
  });

  it('takes so many files of one driver and no more, and new ones for those that it has let go', () => {
    const before = readdirSync('/proc/self/fd').length;
    const memory = guest({ windows: 64, files: 2 });
    const place = (page: number) => page * PAGE_SIZE;
    memory.map(place(0), PAGE_SIZE, file(1), 0, true);
    const second = file(2);
    memory.map(place(1), PAGE_SIZE, duplicate(second), 0, true);
    expect(() => memory.map(place(2), PAGE_SIZE, file(1), 0, true)).toThrow(
      expect.objectContaining({ code: 'DMA_LIMIT' }),
    );
    expect(memory.files).toBe(2);
    memory.map(place(2), PAGE_SIZE, second, PAGE_SIZE, true);
    memory.unmap(place(1), PAGE_SIZE);
    expect(() => memory.map(place(1), PAGE_SIZE, file(1), 0, true)).toThrow();
    memory.unmap(0, PAGE_SIZE);
    memory.map(place(1), PAGE_SIZE, file(1), 0, true);
    memory.clear();
    expect(readdirSync('/proc/self/fd').length).toBe(before);
  });

  it('gives back what it took for a ring in scattered pages when there is no room for it', () => {
    const small = new Arena(6 * PAGE_SIZE);
    const memory = new GuestMemory(small);
    const fd = file(4);
    memory.map(0, 2 * PAGE_SIZE, duplicate(fd), 2 * PAGE_SIZE, true);
    memory.map(2 * PAGE_SIZE, 2 * PAGE_SIZE, fd, 0, true);
    expect(() => memory.pin(0, 0, 4 * PAGE_SIZE, true)).toThrow(expect.objectContaining({ code: 'ARENA_FULL' }));
    expect(small.available).toBe(2 * PAGE_SIZE);
    memory.clear();
    small.close();
  });

  it('agrees with a map of pages for any sequence of maps and unmaps', () => {
    const fd = file(32);
    const step = fc.record({
      map: fc.boolean(),
      page: fc.integer({ min: 0, max: 40 }),
      pages: fc.integer({ min: 1, max: 12 }),
      filePage: fc.integer({ min: 0, max: 20 }),
    });
    fc.assert(
      fc.property(fc.array(step, { maxLength: 30 }), (steps) => {
        const memory = new GuestMemory(arena);
        const model = new Map<number, number>();
        for (const { map, page, pages, filePage } of steps) {
          if (!map) {
            memory.unmap(page * PAGE_SIZE, pages * PAGE_SIZE);
            for (let p = page; p < page + pages; p++) model.delete(p);
            continue;
          }
          const free = Array.from({ length: pages }, (_, i) => page + i).every((p) => !model.has(p));
          const attempt = () =>
            memory.map(page * PAGE_SIZE, pages * PAGE_SIZE, duplicate(fd), filePage * PAGE_SIZE, true);
          if (!free) {
            expect(attempt).toThrow();
            continue;
          }
          attempt();
          for (let i = 0; i < pages; i++) model.set(page + i, filePage + i + 1);
        }
        for (let p = 0; p < 56; p++) {
          const at = memory.translate(p * PAGE_SIZE + 7, 0, true);
          expect(at < 0 ? undefined : arena.u8[at]).toBe(model.get(p));
        }
        memory.clear();
      }),
      { numRuns: 150 },
    );
    close(fd);
  });
});

describe('the arena', () => {
  it('joins neighbouring holes, so that what was taken in pieces can be taken as a whole', () => {
    const own = new Arena(16 * PAGE_SIZE);
    const pieces = Array.from({ length: 16 }, () => own.allocate(PAGE_SIZE));
    expect(() => own.allocate(PAGE_SIZE)).toThrow(expect.objectContaining({ code: 'ARENA_FULL' }));
    for (const i of [3, 1, 2, 15, 0, 14, 7, 5, 6, 4, 8, 13, 9, 12, 10, 11]) own.release(pieces[i], PAGE_SIZE);
    expect(own.allocate(16 * PAGE_SIZE)).toBe(0);
    own.close();
  });

  it('aligns, and reads zeros where something was', () => {
    const own = new Arena(16 * PAGE_SIZE);
    own.allocate(PAGE_SIZE);
    const at = own.allocate(PAGE_SIZE, 4 * PAGE_SIZE);
    expect(at % (4 * PAGE_SIZE)).toBe(0);
    own.u8[at] = 5;
    own.release(at, PAGE_SIZE);
    expect(own.u8[at]).toBe(0);
    own.u8[at] = 5;
    own.close();
    expect(own.u8[at]).toBe(0);
  });
});
