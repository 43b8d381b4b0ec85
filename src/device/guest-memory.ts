/**
 * What a driver has mapped for DMA: I/O virtual addresses (IOVA) to offsets in the arena.
 *
 * Nothing the driver says is an address until it has been through `translate`: an address outside every window, or a
 * write to a window that is only readable, is -1, and whoever asked turns that into an error of the device. An
 * address is two 32-bit halves, because a 64-bit number is slow. Windows are whole pages, at most 2^53.
 *
 * Memory that a client maps without a descriptor (it wants DMA_READ and DMA_WRITE messages) cannot be reached: it has
 * no window, and a driver that points at it gets a device error.
 */
import { VfioError } from '../errors.ts';
import { PAGE_SIZE } from '../sys/libc.ts';
import type { Arena } from './arena.ts';
import { type Backing, BackingFiles, type Chunk } from './backing.ts';

/** Most windows at one time, announced as `max_dma_maps`. */
export const MAX_WINDOWS = 65535;
/** Most files that they may be of: each is a descriptor of this process, which others need too. 2 GiB in huge pages of their own are 1024. */
export const MAX_FILES = 1024;

/** Entries of the page cache, a power of two. */
const CACHE_SIZE = 1024;
const PAGE_SHIFT = 12;
/** Largest length that a translation promises at once. */
const RUN_MAX = 2 ** 30;

/** What one driver may use. */
export interface MemoryLimits {
  readonly windows: number;
  readonly files: number;
}

const LIMITS: MemoryLimits = { windows: MAX_WINDOWS, files: MAX_FILES };

interface Window {
  start: number;
  end: number;
  /** Arena offset of `start`. */
  offset: number;
  readonly writable: boolean;
  readonly chunk: Chunk;
}

/** Memory that a ring lives in, in one piece. */
export interface Pin {
  readonly start: number;
  readonly end: number;
  /** Arena offset of the first byte. */
  readonly offset: number;
  /** False once the driver has unmapped a part of it: the ring must be found again, or is broken. */
  valid: boolean;
  /** Bytes of arena that were allocated for it; 0 when the windows were adjacent anyway. */
  readonly stitched: number;
  /** Arena offset of the allocation. */
  readonly stitchedAt: number;
}

export class GuestMemory {
  readonly arena: Arena;
  /** After a successful `translate`: how many bytes follow in one piece, at most 1 GiB. */
  run = 0;
  readonly #files: BackingFiles;
  readonly #most: MemoryLimits;
  /** Ascending, disjoint. */
  #windows: Window[] = [];
  /** Windows of each file. */
  readonly #backings = new Map<Backing, number>();
  readonly #pins = new Set<Pin>();

  // The same windows for the hot path, in the same order.
  #starts = new Float64Array(64);
  #ends = new Float64Array(64);
  #offsets = new Int32Array(64);
  #writables = new Uint8Array(64);
  #last = 0;
  readonly #cachePage = new Uint32Array(CACHE_SIZE);
  readonly #cacheHigh = new Uint32Array(CACHE_SIZE);
  /** Window of a cached page, or -1. */
  readonly #cacheWindow = new Int32Array(CACHE_SIZE).fill(-1);

  /** `files` of the same arena, which others may use too: two functions of one guest have its memory once. */
  constructor(arena: Arena, files: BackingFiles = new BackingFiles(arena), most: MemoryLimits = LIMITS) {
    this.arena = arena;
    this.#files = files;
    this.#most = most;
    this.#refresh();
  }

  get windows(): number {
    return this.#windows.length;
  }

  /** Files held open: for tests and statistics. */
  get files(): number {
    return this.#files.size;
  }

  /**
   * Maps `size` bytes at `iova` to the file behind `fd` from `fileOffset`. The descriptor is closed or kept, in any
   * case taken. Throws VfioError `DMA_INVALID` (not whole pages, too large, file too short), `DMA_EXISTS` (overlaps),
   * `DMA_LIMIT`; SystemError and `ARENA_FULL` when it cannot be mapped. On an error nothing has changed.
   */
  map(iova: number, size: number, fd: number, fileOffset: number, writable: boolean): void {
    const end = fileOffset + size;
    const problem = this.#problem(iova, size, end);
    // The descriptor is given to `open` even when the request is bad: it closes it.
    const backing = this.#files.open(fd, writable, problem === null && fileOffset % PAGE_SIZE === 0 ? end : Infinity);
    if (problem !== null) throw problem;
    if (backing === null) throw new VfioError('DMA_INVALID', `the file of a DMA mapping does not hold ${end} bytes`);
    const added: Window[] = [];
    try {
      if (!this.#backings.has(backing) && this.#backings.size >= this.#most.files) {
        throw new VfioError('DMA_LIMIT', `DMA mappings of more than ${this.#most.files} files`);
      }
      for (let done = 0; done < size; ) {
        const chunk = this.#files.reference(backing, fileOffset + done, end);
        const into = fileOffset + done - chunk.fileOffset;
        const length = Math.min(chunk.size - into, size - done);
        const start = iova + done;
        added.push({ start, end: start + length, offset: chunk.offset + into, writable, chunk });
        done += length;
      }
    } catch (error) {
      for (const window of added) this.#files.dereference(window.chunk);
      this.#files.settle(backing);
      throw error;
    }
    const at = this.#windows.findIndex((window) => window.start > iova);
    this.#windows.splice(at < 0 ? this.#windows.length : at, 0, ...added);
    for (const { chunk } of added) this.#count(chunk.backing, 1);
    this.#refresh();
  }

  /** A window of a file has come, or gone. */
  #count(backing: Backing, by: 1 | -1): void {
    const windows = (this.#backings.get(backing) ?? 0) + by;
    if (windows === 0) this.#backings.delete(backing);
    else this.#backings.set(backing, windows);
  }

  #problem(iova: number, size: number, end: number): VfioError | null {
    const last = iova + size;
    if (iova % PAGE_SIZE !== 0 || size % PAGE_SIZE !== 0 || size === 0) {
      return new VfioError('DMA_INVALID', `a DMA mapping of ${size} bytes at ${iova}: whole pages only`);
    }
    if (!Number.isSafeInteger(last) || !Number.isSafeInteger(end)) {
      return new VfioError('DMA_INVALID', 'a DMA mapping beyond 2^53');
    }
    if (this.#windows.some((window) => window.start < last && iova < window.end)) {
      return new VfioError('DMA_EXISTS', `a DMA mapping at ${iova} overlaps another`);
    }
    return this.#windows.length >= this.#most.windows ? this.#tooMany() : null;
  }

  #tooMany(): VfioError {
    return new VfioError('DMA_LIMIT', `more than ${this.#most.windows} DMA mappings`);
  }

  /**
   * Unmaps `size` bytes at `iova`: any number of windows, none too, and parts of windows. Returns the bytes that were
   * mapped. Throws VfioError `DMA_LIMIT`, with nothing changed, when a hole in a window makes one window too many.
   */
  unmap(iova: number, size: number): number {
    const last = iova + size;
    if (this.#windows.length >= this.#most.windows) {
      const cut = this.#windows.some(({ start, end }) => start < iova && last < end);
      if (cut) throw this.#tooMany();
    }
    let removed = 0;
    const kept: Window[] = [];
    for (const window of this.#windows) {
      if (window.end <= iova || window.start >= last) {
        kept.push(window);
        continue;
      }
      const { start, end, offset, writable, chunk } = window;
      if (start < iova) kept.push({ start, end: iova, offset, writable, chunk });
      if (end > last) kept.push({ start: last, end, offset: offset + (last - start), writable, chunk });
      if (start < iova && end > last) {
        this.#files.addReference(chunk);
        this.#count(chunk.backing, 1);
      }
      if (start >= iova && end <= last) {
        this.#count(chunk.backing, -1);
        this.#files.dereference(chunk);
      }
      removed += Math.min(end, last) - Math.max(start, iova);
    }
    if (removed === 0) return 0;
    this.#windows = kept;
    for (const pin of this.#pins) if (pin.start < last && iova < pin.end) pin.valid = false;
    this.#refresh();
    return removed;
  }

  /** Unmaps everything and closes all files: the end of a session. */
  clear(): void {
    for (const window of this.#windows) this.#files.dereference(window.chunk);
    this.#windows = [];
    this.#backings.clear();
    for (const pin of this.#pins) pin.valid = false;
    this.#files.clear();
    this.#refresh();
  }

  /**
   * hot: arena offset of the byte at IOVA (`high`, `low`), or -1. `run` then says how many bytes follow it in one
   * piece. `write`: the device wants to write there.
   */
  translate(low: number, high: number, write: boolean): number {
    const at = high * 0x100000000 + low;
    let w = this.#last;
    if (!(at >= this.#starts[w] && at < this.#ends[w])) {
      w = this.#find(low, high, at);
      if (w < 0) return -1;
      this.#last = w;
    }
    if (write && this.#writables[w] === 0) return -1;
    const run = this.#ends[w] - at;
    this.run = run < RUN_MAX ? run | 0 : RUN_MAX;
    return (this.#offsets[w] + (at - this.#starts[w])) | 0;
  }

  /** hot: the window that holds `at`, or -1. */
  #find(low: number, high: number, at: number): number {
    const page = low >>> PAGE_SHIFT;
    const slot = (page ^ high) & (CACHE_SIZE - 1);
    if (this.#cachePage[slot] === page && this.#cacheHigh[slot] === high && this.#cacheWindow[slot] >= 0) {
      return this.#cacheWindow[slot];
    }
    let from = 0;
    let to = this.#windows.length;
    while (from < to) {
      const middle = (from + to) >>> 1;
      if (this.#ends[middle] <= at) from = middle + 1;
      else to = middle;
    }
    if (from >= this.#windows.length || at < this.#starts[from]) return -1;
    this.#cachePage[slot] = page;
    this.#cacheHigh[slot] = high;
    this.#cacheWindow[slot] = from;
    return from;
  }

  /**
   * hot: copies `length` bytes from the guest to arena offset `to`. False, with part of it done, when some are not
   * mapped.
   */
  read(low: number, high: number, length: number, to: number): boolean {
    let at = low;
    let upper = high;
    let left = length;
    let target = to;
    while (left > 0) {
      const from = this.translate(at, upper, false);
      if (from < 0) return false;
      const n = Math.min(left, this.run);
      this.arena.u8.copyWithin(target, from, from + n);
      left -= n;
      target += n;
      at += n;
      if (at >= 0x100000000) {
        at -= 0x100000000;
        upper++;
      }
    }
    return true;
  }

  /**
   * hot: copies `length` bytes from arena offset `from` to the guest. False, with part of it done, when some cannot
   * be written.
   */
  write(low: number, high: number, length: number, from: number): boolean {
    let at = low;
    let upper = high;
    let left = length;
    let source = from;
    while (left > 0) {
      const to = this.translate(at, upper, true);
      if (to < 0) return false;
      const n = Math.min(left, this.run);
      this.arena.u8.copyWithin(to, source, source + n);
      left -= n;
      source += n;
      at += n;
      if (at >= 0x100000000) {
        at -= 0x100000000;
        upper++;
      }
    }
    return true;
  }

  /**
   * Holds on to `size` bytes at an IOVA as one piece of the arena: a ring. Pages that are scattered over the guest's
   * memory are mapped a second time, side by side. Null when some of it is not mapped, or not writable when it must
   * be. Throws DeviceError `ARENA_FULL` or SystemError when there is no room to map it a second time.
   */
  pin(low: number, high: number, size: number, writable: boolean): Pin | null {
    const start = high * 0x100000000 + low;
    const pieces = this.#pieces(start, start + size, writable);
    if (pieces === null) return null;
    const adjacent = pieces.every((piece, i) => i === 0 || piece.offset === pieces[i - 1].offset + pieces[i - 1].size);
    const pin = adjacent ? pinAt(start, size, pieces[0].offset) : this.#stitch(start, size, pieces);
    this.#pins.add(pin);
    return pin;
  }

  unpin(pin: Pin): void {
    if (!this.#pins.delete(pin) || pin.stitched === 0) return;
    this.arena.release(pin.stitchedAt, pin.stitched);
  }

  /** The pieces of windows that make up a range, or null when there is a gap. */
  #pieces(start: number, end: number, writable: boolean): Piece[] | null {
    const pieces: Piece[] = [];
    for (let at = start; at < end; ) {
      const window = this.#windows.find((candidate) => candidate.start <= at && at < candidate.end);
      if (window === undefined || (writable && !window.writable)) return null;
      const size = Math.min(window.end, end) - at;
      pieces.push({ offset: window.offset + (at - window.start), size, chunk: window.chunk });
      at += size;
    }
    return pieces.length === 0 ? null : pieces;
  }

  #stitch(start: number, size: number, pieces: readonly Piece[]): Pin {
    const lead = start % PAGE_SIZE;
    const stitched = Math.ceil((lead + size) / PAGE_SIZE) * PAGE_SIZE;
    const stitchedAt = this.arena.allocate(stitched);
    let page = stitchedAt;
    try {
      for (const { offset, size: length, chunk } of pieces) {
        // Only the first piece can begin inside a page, only the last can end in one.
        const from = offset - (offset % PAGE_SIZE);
        const bytes = Math.ceil((offset - from + length) / PAGE_SIZE) * PAGE_SIZE;
        const backing: Backing = chunk.backing;
        this.arena.mapFile(page, bytes, backing.fd, chunk.fileOffset + (from - chunk.offset), backing.writable);
        page += bytes;
      }
    } catch (error) {
      this.arena.release(stitchedAt, stitched);
      throw error;
    }
    return { ...pinAt(start, size, stitchedAt + lead), stitched, stitchedAt };
  }

  #refresh(): void {
    const n = this.#windows.length;
    if (n > this.#starts.length) {
      const capacity = 2 * n;
      this.#starts = new Float64Array(capacity);
      this.#ends = new Float64Array(capacity);
      this.#offsets = new Int32Array(capacity);
      this.#writables = new Uint8Array(capacity);
    }
    for (let i = 0; i < n; i++) {
      const { start, end, offset, writable } = this.#windows[i];
      this.#starts[i] = start;
      this.#ends[i] = end;
      this.#offsets[i] = offset;
      this.#writables[i] = writable ? 1 : 0;
    }
    // No address is in an empty window: nothing stale can be found.
    this.#starts.fill(0, n);
    this.#ends.fill(0, n);
    this.#last = 0;
    this.#cacheWindow.fill(-1);
  }
}

interface Piece {
  readonly offset: number;
  readonly size: number;
  readonly chunk: Chunk;
}

function pinAt(start: number, size: number, offset: number): Pin {
  return { start, end: start + size, offset, valid: true, stitched: 0, stitchedAt: 0 };
}
