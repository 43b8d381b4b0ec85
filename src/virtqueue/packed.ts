/**
 * The driver side of a packed virtqueue (Virtio 1.4, 2.8), with indirect descriptors (2.8.7), IN_ORDER (2.8.8) and events for
 * a descriptor (2.8.10).
 *
 * The device is not trusted. What was handed out is remembered in private arrays by buffer id (`driver-queue.ts`), so the
 * device cannot change it afterwards; each used descriptor is read once and checked against them, and no descriptor
 * is taken for used that was not published. Descriptors are written whole each time, because devices write to them.
 *
 * Most devices return buffers in the order in which they got them. As long as one does, the queue is *ordered*: the id of a
 * buffer is the position of its first descriptor, and no free list is needed. The first buffer that comes out of order ends
 * that for good, or, with IN_ORDER, names the last of several.
 *
 * Publication: all descriptors since the last `publish` are complete but for the first, which still looks as if it had been used
 * in the last round; storing its flags shows them all. Flags and id of a used descriptor are one 32-bit load, and its length is
 * loaded from an address that depends on them: no processor reads it earlier.
 */
import { DescriptorFlag } from './descriptor.ts';
import { PackedDescriptors } from './packed-descriptors.ts';
import {
  EVENT_FLAG_MASK,
  EventFlag,
  FLAGS_HALF,
  FLAGS_SHIFT,
  isAmongNext,
  RING_FLAGS,
  ringPosition,
} from './packed-layout.ts';
import type { Virtqueue } from './virtqueue.ts';

/** Descriptors in a cache line. */
const LINE_DESCRIPTORS = 4;

/** What must be right in the last word of a used descriptor: the two ring flags and the id. */
const USED_MASK = (RING_FLAGS << FLAGS_SHIFT) | 0xffff;

/**
 * A queue in memory of at least `virtqueueBytes('packed', options)`, which is cleared. Interrupts are off. The constructor throws
 * `VirtioError` QUEUE_SIZE.
 */
export class PackedVirtqueue extends PackedDescriptors implements Virtqueue {
  get next(): number {
    return ringPosition(this.nextAvail, this.availFlags);
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
    if (this.closed !== null) return 0;
    const n = Math.min(to - from, this.unused) | 0;
    if (n <= 0) return 0;
    const flags = deviceWrites ? DescriptorFlag.WRITE : 0;
    if (!this.ordered) return this.postAnywhere(tokens, from, n, offset, length, flags);
    // The device looks at the first of them until it may have it. Its cache line is written last and in one go, so that it moves once.
    const first = this.pending === 0 ? Math.min(n, LINE_DESCRIPTORS - (this.nextAvail % LINE_DESCRIPTORS)) : 0;
    const hold = this.beginBurst(flags);
    const at = this.nextAvail;
    const ring = this.availFlags;
    this.#skip(first);
    if (first < n) this.#write(tokens, from + first, from + n, offset, length, flags, 0);
    const next = this.nextAvail;
    const nextRing = this.availFlags;
    if (first > 0) {
      this.nextAvail = at;
      this.availFlags = ring;
      this.#write(tokens, from, from + first, offset, length, flags, hold);
      this.nextAvail = next;
      this.availFlags = nextRing;
    }
    this.unused -= n;
    this.pending += n;
    return n;
  }

  /** Leaves `count` descriptors, no more than a ring, for later. */
  #skip(count: number): void {
    this.nextAvail += count;
    if (this.nextAvail < this.size) return;
    this.nextAvail -= this.size;
    this.availFlags ^= RING_FLAGS;
  }

  /** hot: writes descriptors for `tokens[from]` to `tokens[end - 1]` from `nextAvail` on; the word of the first one differs by `differs`. */
  #write(
    tokens: Uint32Array,
    from: number,
    end: number,
    offset: Uint32Array,
    length: Uint32Array,
    flags: number,
    differs: number,
  ): void {
    const u32 = this.u32;
    const token = this.token;
    const capacity = this.capacity;
    // Integers in locals, so that the loop converts nothing.
    const size = this.size | 0;
    const headroom = this.headroom | 0;
    const low = (this.iovaLow - headroom) | 0;
    const high = this.iovaHigh | 0;
    const writable = flags === 0 ? 0 : -1;
    let hold = differs | 0;
    let ring = this.availFlags | 0;
    let at = this.nextAvail | 0;
    let i = from | 0;
    while (i < end) {
      // The flags stay the same to the end of the ring.
      const word = (flags | ring) << FLAGS_SHIFT;
      const stop = Math.min(end, i + size - at) | 0;
      // Four at a time: what an access to an array costs besides the access itself is then paid once for four.
      for (; i + 4 <= stop; i += 4) {
        const t0 = tokens[i];
        const t1 = tokens[i + 1];
        const t2 = tokens[i + 2];
        const t3 = tokens[i + 3];
        const bytes0 = (length[t0] + headroom) | 0;
        const bytes1 = (length[t1] + headroom) | 0;
        const bytes2 = (length[t2] + headroom) | 0;
        const bytes3 = (length[t3] + headroom) | 0;
        const w = at << 2;
        u32[w] = (low + offset[t0]) | 0;
        u32[w + 1] = high;
        u32[w + 2] = bytes0;
        u32[w + 3] = (word | at) ^ hold;
        u32[w + 4] = (low + offset[t1]) | 0;
        u32[w + 5] = high;
        u32[w + 6] = bytes1;
        u32[w + 7] = word | (at + 1);
        u32[w + 8] = (low + offset[t2]) | 0;
        u32[w + 9] = high;
        u32[w + 10] = bytes2;
        u32[w + 11] = word | (at + 2);
        u32[w + 12] = (low + offset[t3]) | 0;
        u32[w + 13] = high;
        u32[w + 14] = bytes3;
        u32[w + 15] = word | (at + 3);
        token[at] = t0;
        token[at + 1] = t1;
        token[at + 2] = t2;
        token[at + 3] = t3;
        capacity[at] = ((bytes0 & writable) + 1) | 0;
        capacity[at + 1] = ((bytes1 & writable) + 1) | 0;
        capacity[at + 2] = ((bytes2 & writable) + 1) | 0;
        capacity[at + 3] = ((bytes3 & writable) + 1) | 0;
        at = (at + 4) | 0;
        hold = 0;
      }
      for (; i < stop; i++) {
        const t = tokens[i];
        const bytes = (length[t] + headroom) | 0;
        const w = at << 2;
        u32[w] = (low + offset[t]) | 0;
        u32[w + 1] = high;
        u32[w + 2] = bytes;
        u32[w + 3] = (word | at) ^ hold;
        token[at] = t;
        capacity[at] = ((bytes & writable) + 1) | 0;
        at = (at + 1) | 0;
        hold = 0;
      }
      if (at === size) {
        at = 0;
        ring ^= RING_FLAGS;
      }
    }
    this.nextAvail = at;
    this.availFlags = ring;
  }

  publish(): boolean {
    // hot:
    const added = this.pending;
    if (added === 0 || this.closed !== null) return false;
    Atomics.store(this.u16, (this.head << 3) + FLAGS_HALF, this.headFlags);
    this.pending = 0;
    this.outstanding += added;
    const event = Atomics.load(this.u32, this.deviceEvent);
    const flags = (event >>> FLAGS_SHIFT) & EVENT_FLAG_MASK;
    if (flags !== EventFlag.DESC || !this.eventIdx) return flags !== EventFlag.DISABLE;
    return isAmongNext(event & 0xffff, ringPosition(this.head, this.headFlags), added, this.size);
  }

  take(tokens: Uint32Array, written: Uint32Array, max: number): number {
    // hot:
    if (this.closed !== null) return 0;
    const u16 = this.u16;
    let at = this.nextUsed | 0;
    let ring = this.usedFlags | 0;
    if (this.batch === 0 && (Atomics.load(u16, (at << 3) + FLAGS_HALF) & RING_FLAGS) !== ring) return 0;
    if (!this.ordered) return this.takeAny(tokens, written, 0, max);
    let i = 0;
    if ((this.chained | this.batch) === 0) {
      // A buffer is a descriptor: these many can be used.
      const left = Math.min(max, this.outstanding) | 0;
      const u32 = this.u32;
      const token = this.token;
      const capacity = this.capacity;
      const size = this.size | 0;
      const mask = USED_MASK | 0;
      while (i < left) {
        const expected = ring << FLAGS_SHIFT;
        const stop = Math.min(left, i + size - at) | 0;
        for (; i + 4 <= stop; i += 4) {
          const w = at << 2;
          // 0 when the descriptor is used and has the id that is its position.
          const other0 = (u32[w + 3] & mask) ^ (expected | at);
          const other1 = (u32[w + 7] & mask) ^ (expected | (at + 1));
          const other2 = (u32[w + 11] & mask) ^ (expected | (at + 2));
          const other3 = (u32[w + 15] & mask) ^ (expected | (at + 3));
          if ((other0 | other1 | other2 | other3) !== 0) break;
          const bytes0 = u32[w + other0 + 2];
          const bytes1 = u32[w + other1 + 6];
          const bytes2 = u32[w + other2 + 10];
          const bytes3 = u32[w + other3 + 14];
          if (bytes0 >= capacity[at] || bytes1 >= capacity[at + 1]) break;
          if (bytes2 >= capacity[at + 2] || bytes3 >= capacity[at + 3]) break;
          tokens[i] = token[at];
          tokens[i + 1] = token[at + 1];
          tokens[i + 2] = token[at + 2];
          tokens[i + 3] = token[at + 3];
          written[i] = bytes0;
          written[i + 1] = bytes1;
          written[i + 2] = bytes2;
          written[i + 3] = bytes3;
          at = (at + 4) | 0;
        }
        for (; i < stop; i++) {
          const w = at << 2;
          const other = (u32[w + 3] & mask) ^ (expected | at);
          if (other !== 0) break;
          const bytes = u32[w + other + 2];
          if (bytes >= capacity[at]) break;
          tokens[i] = token[at];
          written[i] = bytes;
          at = (at + 1) | 0;
        }
        if (i < stop) break;
        if (at === size) {
          at = 0;
          ring ^= RING_FLAGS;
        }
      }
      this.nextUsed = at;
      this.usedFlags = ring;
      this.unused += i;
      this.outstanding -= i;
      if (i === left || (u16[(at << 3) + FLAGS_HALF] & RING_FLAGS) !== ring) return i;
    }
    return this.takeInTurn(tokens, written, i, max);
  }

  enableInterrupts(): boolean {
    if (this.closed !== null) return false;
    const event = this.eventIdx
      ? (EventFlag.DESC << FLAGS_SHIFT) | ringPosition(this.nextUsed, this.usedFlags)
      : EventFlag.ENABLE << FLAGS_SHIFT;
    Atomics.store(this.u32, this.driverEvent, event);
    if (this.batch !== 0) return true;
    if (this.outstanding === 0) return false;
    return (Atomics.load(this.u16, (this.nextUsed << 3) + FLAGS_HALF) & RING_FLAGS) === this.usedFlags;
  }

  disableInterrupts(): void {
    if (this.closed !== null) return;
    Atomics.store(this.u32, this.driverEvent, EventFlag.DISABLE << FLAGS_SHIFT);
  }
}
