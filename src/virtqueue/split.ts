/**
 * The driver side of a split virtqueue (Virtio 1.4, 2.7), with indirect descriptors (2.7.5.3), event indices (2.7.7,
 * 2.7.10) and IN_ORDER (2.7.9).
 *
 * The device is not trusted. What was handed out is remembered in private arrays (`#capacity`, `#token`, `#chain`), so
 * the device cannot change it afterwards; the used ring is read once per entry and checked against them. Of the shared
 * memory only the used ring and the two event fields are ever read.
 *
 * Most devices return buffers in the order in which they got them. As long as one does, and buffers are single
 * descriptors of one direction, the queue is *ordered*: the buffer at position n of the available ring uses descriptor n,
 * so that ring and half of each descriptor never change, and no free list is needed. The first buffer that comes out of
 * order, and the first chain, end that for good. With IN_ORDER, descriptors are still used in the order of the table then,
 * and a used entry that is not the next buffer's names the last of several.
 *
 * Ordering: descriptors and ring entries are plain stores, then the index is one `Atomics.store`, a full fence; only after
 * that is the device's wish for notifications read. The used index is one `Atomics.load` per burst, then plain reads.
 */
import { VirtioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';
import {
  chainCapacity,
  checkQueueSize,
  DESCRIPTOR_BYTES,
  DESCRIPTOR_WORDS,
  DescriptorFlag,
  writePiece,
} from './descriptor.ts';
import { NEXT_SHIFT, NO_NOTIFICATIONS, RingField, splitLayout } from './split-layout.ts';
import { STOPPED, type Virtqueue, type VirtqueueOptions } from './virtqueue.ts';

export class SplitVirtqueue implements Virtqueue {
  readonly index: number;
  readonly size: number;
  readonly memory: DmaMemory;
  /** IOVA of the descriptor area (descriptor table), driver area (available ring) and device area (used ring). */
  readonly descriptorArea: number;
  readonly driverArea: number;
  readonly deviceArea: number;

  readonly #mask: number;
  readonly #eventIdx: boolean;
  readonly #inOrder: boolean;
  readonly #iovaLow: number;
  readonly #iovaHigh: number;
  readonly #headroom: number;
  readonly #indirectEntries: number;
  /** Byte offset in `memory` of the indirect tables. */
  readonly #indirect: number;
  readonly #bytes: number;
  readonly #u16: Uint16Array;
  readonly #u32: Uint32Array;
  // Positions in #u16, and of the used ring's first element in #u32.
  readonly #availFlags: number;
  readonly #availIdx: number;
  readonly #availRing: number;
  readonly #usedEvent: number;
  readonly #usedFlags: number;
  readonly #usedIdx: number;
  readonly #usedRing: number;
  readonly #availEvent: number;

  /** See above. `#direction` is the descriptor flags that all free descriptors of an ordered queue have; -1 before the first. */
  #ordered = true;
  #direction = -1;
  // By descriptor, for heads of buffers that are out: bytes that the device may write, plus 1; the token; and the number
  // of descriptors of a chain less 1, whose others follow in #next. Unless ordered, capacity 0 says that it is not out.
  readonly #capacity: Uint32Array;
  readonly #token: Uint32Array;
  readonly #chain: Uint16Array;
  readonly #next: Uint16Array;
  /** Stack of free descriptors, unless ordered or IN_ORDER. */
  readonly #freeIds: Uint16Array;
  /** With IN_ORDER: head of the buffer by its place in the available ring; and the next descriptor of the table to use. */
  readonly #heads: Uint16Array;
  #nextDescriptor = 0;
  /** Buffers that the device has returned by naming the last of them, and that were not taken; what it wrote into that one. */
  #batch = 0;
  #batchBytes = 0;
  #free: number;
  /** Buffers that are out and have more than one descriptor. */
  #chained = 0;
  /** Index of the next available entry to write; of the next one that the device does not know; of the next used one to read. */
  #nextAvail = 0;
  #published = 0;
  #lastUsed = 0;
  /** Published buffers that the device has not returned. */
  #outstanding = 0;
  #broken: VirtioError | null = null;

  /**
   * A queue in `memory`, of at least `splitVirtqueueBytes(options)`, which is cleared. Interrupts are off.
   * Throws `VirtioError` QUEUE_SIZE.
   */
  constructor(memory: DmaMemory, options: VirtqueueOptions) {
    const { index, size } = options;
    checkQueueSize(index, size, true);
    const at = splitLayout(options);
    if (memory.size < at.bytes)
      throw new RangeError(`queue ${index}: ${memory.size} bytes of memory, needs ${at.bytes}`);
    this.index = index;
    this.size = size;
    this.memory = memory;
    this.descriptorArea = memory.iova;
    this.driverArea = memory.iova + at.driver;
    this.deviceArea = memory.iova + at.device;
    this.#mask = size - 1;
    this.#eventIdx = options.eventIdx ?? false;
    this.#inOrder = options.inOrder ?? false;
    this.#iovaLow = options.iovaLow ?? 0;
    this.#iovaHigh = options.iovaHigh ?? 0;
    this.#headroom = options.headroom ?? 0;
    this.#indirectEntries = options.indirectEntries ?? 0;
    this.#indirect = at.indirect;
    this.#bytes = at.bytes;
    this.#u16 = memory.u16;
    this.#u32 = memory.u32;
    const avail = at.driver >>> 1;
    const used = at.device >>> 1;
    this.#availFlags = avail + RingField.flags;
    this.#availIdx = avail + RingField.idx;
    this.#availRing = avail + RingField.ring;
    this.#usedEvent = this.#availRing + size;
    this.#usedFlags = used + RingField.flags;
    this.#usedIdx = used + RingField.idx;
    this.#usedRing = (used + RingField.ring) >>> 1;
    this.#availEvent = used + RingField.ring + 4 * size;
    this.#capacity = new Uint32Array(size);
    this.#token = new Uint32Array(size);
    this.#chain = new Uint16Array(size);
    this.#next = new Uint16Array(size);
    this.#freeIds = new Uint16Array(size);
    this.#heads = new Uint16Array(size);
    this.#free = size;
    this.#clearMemory();
  }

  #clearMemory(): void {
    this.memory.u8.fill(0, 0, this.#bytes);
    for (let i = 0; i < this.size; i++) {
      this.#u16[this.#availRing + i] = i;
      this.#heads[i] = i;
    }
    this.disableInterrupts();
  }

  get free(): number {
    return this.#broken === null ? this.#free : 0;
  }

  get broken(): VirtioError | null {
    return this.#broken === STOPPED ? null : this.#broken;
  }

  get next(): number {
    return this.#nextAvail;
  }

  fail(reason: VirtioError): void {
    if (this.#broken === null || this.#broken === STOPPED) this.#broken = reason;
  }

  stop(): void {
    this.#broken ??= STOPPED;
  }

  postBurst(
    tokens: Uint32Array,
    from: number,
    to: number,
    offset: Uint32Array,
    length: Uint32Array,
    deviceWrites: boolean,
  ): number {
    // hot:
    if (this.#broken !== null) return 0;
    const n = Math.max(Math.min(to - from, this.#free), 0) | 0;
    const flags = deviceWrites ? DescriptorFlag.WRITE : 0;
    if (this.#ordered && flags !== this.#direction) this.#setDirection(flags);
    if (!this.#ordered) return this.#postAnywhere(tokens, from, n, offset, length, flags);
    const u32 = this.#u32;
    const token = this.#token;
    const capacity = this.#capacity;
    // Integers in locals, so that the loop converts nothing.
    const mask = this.#mask | 0;
    const headroom = this.#headroom | 0;
    const low = (this.#iovaLow - headroom) | 0;
    const writable = deviceWrites ? -1 : 0;
    const end = (from + n) | 0;
    let avail = this.#nextAvail | 0;
    let i = from;
    // Four at a time: what an access to an array costs besides the access itself is then paid once for four.
    for (; i + 4 <= end; i += 4) {
      const t0 = tokens[i];
      const t1 = tokens[i + 1];
      const t2 = tokens[i + 2];
      const t3 = tokens[i + 3];
      const id0 = avail & mask;
      const id1 = (avail + 1) & mask;
      const id2 = (avail + 2) & mask;
      const id3 = (avail + 3) & mask;
      const bytes0 = (length[t0] + headroom) | 0;
      const bytes1 = (length[t1] + headroom) | 0;
      const bytes2 = (length[t2] + headroom) | 0;
      const bytes3 = (length[t3] + headroom) | 0;
      u32[id0 << 2] = (low + offset[t0]) | 0;
      u32[(id0 << 2) + 2] = bytes0;
      u32[id1 << 2] = (low + offset[t1]) | 0;
      u32[(id1 << 2) + 2] = bytes1;
      u32[id2 << 2] = (low + offset[t2]) | 0;
      u32[(id2 << 2) + 2] = bytes2;
      u32[id3 << 2] = (low + offset[t3]) | 0;
      u32[(id3 << 2) + 2] = bytes3;
      token[id0] = t0;
      token[id1] = t1;
      token[id2] = t2;
      token[id3] = t3;
      capacity[id0] = ((bytes0 & writable) + 1) | 0;
      capacity[id1] = ((bytes1 & writable) + 1) | 0;
      capacity[id2] = ((bytes2 & writable) + 1) | 0;
      capacity[id3] = ((bytes3 & writable) + 1) | 0;
      avail = (avail + 4) | 0;
    }
    for (; i < end; i++) {
      const t = tokens[i];
      const id = avail & mask;
      const bytes = (length[t] + headroom) | 0;
      u32[id << 2] = (low + offset[t]) | 0;
      u32[(id << 2) + 2] = bytes;
      token[id] = t;
      capacity[id] = ((bytes & writable) + 1) | 0;
      avail = (avail + 1) | 0;
    }
    this.#nextAvail = avail & 0xffff;
    this.#free -= n;
    return n;
  }

  /** hot: as `postBurst`, with free descriptors from the stack, or with IN_ORDER from the table in turn. */
  #postAnywhere(
    tokens: Uint32Array,
    from: number,
    n: number,
    offset: Uint32Array,
    length: Uint32Array,
    flags: number,
  ): number {
    const u16 = this.#u16;
    const u32 = this.#u32;
    const freeIds = this.#freeIds;
    const mask = this.#mask;
    const ring = this.#availRing;
    const inOrder = this.#inOrder;
    const headroom = this.#headroom;
    const low = (this.#iovaLow - headroom) | 0;
    const writable = flags === 0 ? 0 : -1;
    let free = this.#free;
    let avail = this.#nextAvail;
    for (let i = from; i < from + n; i++) {
      const t = tokens[i];
      free--;
      let id = freeIds[free];
      if (inOrder) {
        id = this.#nextDescriptor;
        this.#nextDescriptor = (id + 1) & mask;
        this.#heads[avail & mask] = id;
      }
      const bytes = (length[t] + headroom) | 0;
      const w = id * DESCRIPTOR_WORDS;
      u32[w] = (low + offset[t]) | 0;
      u32[w + 1] = this.#iovaHigh;
      u32[w + 2] = bytes;
      u32[w + 3] = flags;
      this.#token[id] = t;
      this.#capacity[id] = ((bytes & writable) + 1) | 0;
      u16[ring + (avail & mask)] = id;
      avail++;
    }
    this.#nextAvail = avail & 0xffff;
    this.#free = free;
    return n;
  }

  /** Writes the half of each descriptor that stays the same as long as the queue is ordered. */
  #setDirection(flags: number): void {
    if (this.#direction !== -1) {
      this.#endOrder();
      return;
    }
    this.#direction = flags;
    for (let id = 0; id < this.size; id++) {
      this.#u32[id * DESCRIPTOR_WORDS + 1] = this.#iovaHigh;
      this.#u32[id * DESCRIPTOR_WORDS + 3] = flags;
    }
  }

  /**
   * From an ordered queue to one with a free list: what is not between the used and the available index is free. With IN_ORDER,
   * to one that uses the table in turn: entries of the available ring are written from now on.
   */
  #endOrder(): void {
    if (!this.#ordered) return;
    this.#ordered = false;
    this.#nextDescriptor = this.#nextAvail & this.#mask;
    for (let i = 0; i < this.#free; i++) {
      const id = (this.#nextAvail + this.#free - 1 - i) & this.#mask;
      this.#freeIds[i] = id;
      this.#capacity[id] = 0;
    }
  }

  postChain(token: number, pieces: Uint32Array, readable: number, writable: number): boolean {
    const count = readable + writable;
    if (this.#broken !== null || count === 0) return false;
    const capacity = chainCapacity(this.size, pieces, readable, writable);
    this.#endOrder();

    const indirect = count > 1 && count <= this.#indirectEntries;
    const descriptors = indirect ? 1 : count;
    if (descriptors > this.#free) return false;
    const head = this.#descriptor(0);
    if (indirect) {
      const table = this.#indirect + head * this.#indirectEntries * DESCRIPTOR_BYTES;
      for (let i = 0; i < count; i++) {
        this.#writePiece((table >>> 2) + i * DESCRIPTOR_WORDS, pieces, i, readable, i + 1 < count ? i + 1 : -1);
      }
      const { iovaLow, iovaHigh } = this.memory;
      const whole = Uint32Array.of(iovaLow + table, iovaHigh, count * DESCRIPTOR_BYTES);
      writePiece(this.#u32, head * DESCRIPTOR_WORDS, whole, 0, DescriptorFlag.INDIRECT);
    } else {
      for (let i = 0; i < count; i++) {
        const id = this.#descriptor(i);
        const next = i + 1 < count ? this.#descriptor(i + 1) : -1;
        this.#writePiece(id * DESCRIPTOR_WORDS, pieces, i, readable, next);
        if (next >= 0) this.#next[id] = next;
      }
    }
    this.#free -= descriptors;
    this.#nextDescriptor = (this.#nextDescriptor + descriptors) & this.#mask;
    this.#token[head] = token;
    this.#capacity[head] = capacity + 1;
    this.#chain[head] = descriptors - 1;
    if (descriptors > 1) this.#chained++;
    this.#heads[this.#nextAvail & this.#mask] = head;
    this.#u16[this.#availRing + (this.#nextAvail & this.#mask)] = head;
    this.#nextAvail = (this.#nextAvail + 1) & 0xffff;
    return true;
  }

  /** The descriptor for piece `i` of a chain. */
  #descriptor(i: number): number {
    return this.#inOrder ? (this.#nextDescriptor + i) & this.#mask : this.#freeIds[this.#free - 1 - i];
  }

  #writePiece(w: number, pieces: Uint32Array, i: number, readable: number, next: number): void {
    const flags = i < readable ? 0 : DescriptorFlag.WRITE;
    writePiece(this.#u32, w, pieces, i, next < 0 ? flags : flags | DescriptorFlag.NEXT | (next << NEXT_SHIFT));
  }

  publish(): boolean {
    // hot:
    const avail = this.#nextAvail;
    const added = (avail - this.#published) & 0xffff;
    if (added === 0 || this.#broken !== null) return false;
    const u16 = this.#u16;
    Atomics.store(u16, this.#availIdx, avail);
    this.#published = avail;
    this.#outstanding += added;
    // 2.7.10: notify when avail_event lies among the entries just added; or unless the device said that it need not be.
    if (this.#eventIdx) return ((avail - Atomics.load(u16, this.#availEvent) - 1) & 0xffff) < added;
    return (Atomics.load(u16, this.#usedFlags) & NO_NOTIFICATIONS) === 0;
  }

  take(tokens: Uint32Array, written: Uint32Array, max: number): number {
    // hot:
    if (this.#broken !== null) return 0;
    let last = this.#lastUsed | 0;
    const used = (Atomics.load(this.#u16, this.#usedIdx) - last) & 0xffff;
    if (used === 0) return 0;
    if (used > this.#outstanding) {
      this.#break('USED_INDEX', `the used index is ${used} ahead with ${this.#outstanding} buffers out`);
      return 0;
    }
    const n = Math.min(used, max) | 0;
    let i = 0;
    if (this.#ordered && this.#batch === 0) {
      const u32 = this.#u32;
      const capacity = this.#capacity;
      const token = this.#token;
      const mask = this.#mask | 0;
      const ring = this.#usedRing | 0;
      for (; i + 4 <= n; i += 4) {
        const id0 = last & mask;
        const id1 = (last + 1) & mask;
        const id2 = (last + 2) & mask;
        const id3 = (last + 3) & mask;
        const at0 = ring + (id0 << 1);
        const at1 = ring + (id1 << 1);
        const at2 = ring + (id2 << 1);
        const at3 = ring + (id3 << 1);
        const disorder = (u32[at0] ^ id0) | (u32[at1] ^ id1) | (u32[at2] ^ id2) | (u32[at3] ^ id3);
        const bytes0 = u32[at0 + 1];
        const bytes1 = u32[at1 + 1];
        const bytes2 = u32[at2 + 1];
        const bytes3 = u32[at3 + 1];
        if (disorder !== 0 || bytes0 >= capacity[id0] || bytes1 >= capacity[id1]) break;
        if (bytes2 >= capacity[id2] || bytes3 >= capacity[id3]) break;
        tokens[i] = token[id0];
        tokens[i + 1] = token[id1];
        tokens[i + 2] = token[id2];
        tokens[i + 3] = token[id3];
        written[i] = bytes0;
        written[i + 1] = bytes1;
        written[i + 2] = bytes2;
        written[i + 3] = bytes3;
        last = (last + 4) | 0;
      }
      for (; i < n; i++) {
        const id = last & mask;
        const at = ring + (id << 1);
        const bytes = u32[at + 1];
        if (u32[at] !== id || bytes >= capacity[id]) break;
        tokens[i] = token[id];
        written[i] = bytes;
        last = (last + 1) | 0;
      }
      this.#lastUsed = last & 0xffff;
      this.#free += i;
      this.#outstanding -= i;
      if (i === n) return n;
    }
    if (this.#inOrder) return this.#takeInTurn(tokens, written, i, n, used - i);
    this.#endOrder();
    return this.#takeAny(tokens, written, i, n);
  }

  /** With IN_ORDER: takes chains and batches out of `used` buffers into `tokens[i]` up to `tokens[n - 1]`; returns where it ended. */
  #takeInTurn(tokens: Uint32Array, written: Uint32Array, start: number, n: number, used: number): number {
    let i = start;
    for (; i < n; i++) {
      const place = this.#lastUsed & this.#mask;
      const head = this.#heads[place];
      if (this.#batch === 0) {
        const at = this.#usedRing + place * 2;
        const id = this.#u32[at];
        const count = this.#buffersTo(id, used - (i - start));
        if (count === 0) {
          this.#break('USED_ID', `used id ${id} was not given out, or not before what it is used with`);
          break;
        }
        const bytes = this.#u32[at + 1];
        if (bytes >= this.#capacity[id]) {
          this.#break('USED_LENGTH', `used length ${bytes} for a buffer of ${this.#capacity[id] - 1} writable bytes`);
          break;
        }
        this.#batch = count;
        this.#batchBytes = bytes;
      }
      this.#batch--;
      tokens[i] = this.#token[head];
      // 2.7.9: of a batch all but the last were used completely.
      written[i] = this.#batch === 0 ? this.#batchBytes : this.#capacity[head] - 1;
      this.#free += this.#chain[head] + 1;
      if (this.#chain[head] !== 0) this.#chained--;
      this.#chain[head] = 0;
      this.#capacity[head] = 0;
      this.#outstanding--;
      this.#lastUsed = (this.#lastUsed + 1) & 0xffff;
    }
    return i;
  }

  /** How many buffers are used up to and including the one with head `id`, of `used` ones; 0 when that is not one of them. */
  #buffersTo(id: number, used: number): number {
    for (let count = 1; count <= used; count++) {
      if (this.#heads[(this.#lastUsed + count - 1) & this.#mask] === id) return count;
    }
    return 0;
  }

  /** hot: takes used buffers in any order into `tokens[i]` up to `tokens[n - 1]`; returns where it ended. */
  #takeAny(tokens: Uint32Array, written: Uint32Array, start: number, n: number): number {
    const u32 = this.#u32;
    const capacity = this.#capacity;
    const token = this.#token;
    const freeIds = this.#freeIds;
    const mask = this.#mask;
    const ring = this.#usedRing;
    const size = this.size;
    const chained = this.#chained !== 0;
    let last = this.#lastUsed;
    let free = this.#free;
    let i = start;
    for (; i < n; i++) {
      const at = ring + (last & mask) * 2;
      const id = u32[at];
      const bytes = u32[at + 1];
      if (id >= size) {
        this.#break('USED_ID', `used id ${id} in a queue of ${size}`);
        break;
      }
      const limit = capacity[id];
      if (bytes >= limit) {
        if (limit === 0) this.#break('USED_ID', `used id ${id} was not given out`);
        else this.#break('USED_LENGTH', `used length ${bytes} for a buffer of ${limit - 1} writable bytes`);
        break;
      }
      capacity[id] = 0;
      tokens[i] = token[id];
      written[i] = bytes;
      freeIds[free++] = id;
      if (chained && this.#chain[id] !== 0) free = this.#freeChain(id, free);
      last++;
    }
    this.#free = free;
    this.#lastUsed = last & 0xffff;
    this.#outstanding -= i - start;
    return i;
  }

  /** Frees the descriptors after `head` of a chain; returns the new height of the stack. */
  #freeChain(head: number, free: number): number {
    let height = free;
    let id = head;
    for (let left = this.#chain[head]; left > 0; left--) {
      id = this.#next[id];
      this.#freeIds[height++] = id;
    }
    this.#chain[head] = 0;
    this.#chained--;
    return height;
  }

  #break(code: string, message: string): void {
    this.fail(new VirtioError(code, `queue ${this.index}: ${message}`));
  }

  enableInterrupts(): boolean {
    if (this.#broken !== null) return false;
    const u16 = this.#u16;
    if (this.#eventIdx) Atomics.store(u16, this.#usedEvent, this.#lastUsed);
    else Atomics.store(u16, this.#availFlags, 0);
    return Atomics.load(u16, this.#usedIdx) !== this.#lastUsed;
  }

  disableInterrupts(): void {
    if (this.#broken !== null) return;
    // With event indices `flags` must stay 0 (2.7.7.1): name the entry that is furthest away.
    if (this.#eventIdx) Atomics.store(this.#u16, this.#usedEvent, (this.#lastUsed - 1) & 0xffff);
    else Atomics.store(this.#u16, this.#availFlags, NO_NOTIFICATIONS);
  }

  reclaimAll(tokens: Uint32Array): number {
    this.fail(new VirtioError('QUEUE_CLOSED', `queue ${this.index} was reset`));
    this.#endOrder();
    let n = 0;
    for (let id = 0; id < this.size; id++) {
      if (this.#capacity[id] === 0) continue;
      tokens[n++] = this.#token[id];
      this.#capacity[id] = 0;
    }
    this.#outstanding = 0;
    return n;
  }

  restart(): void {
    this.#ordered = true;
    this.#direction = -1;
    this.#chain.fill(0);
    this.#free = this.size;
    this.#chained = 0;
    this.#batch = 0;
    this.#nextAvail = 0;
    this.#published = 0;
    this.#lastUsed = 0;
    this.#outstanding = 0;
    this.#broken = null;
    this.#clearMemory();
  }
}
