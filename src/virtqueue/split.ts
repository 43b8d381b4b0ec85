/**
 * The driver side of a split virtqueue (Virtio 1.4, 2.7), with indirect descriptors (2.7.5.3), event indices (2.7.7,
 * 2.7.10) and IN_ORDER (2.7.9).
 *
 * The device is not trusted. What was handed out is remembered in private arrays (`driver-queue.ts`), so
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
import { DescriptorFlag } from './descriptor.ts';
import { SplitDescriptors } from './split-descriptors.ts';
import { NO_NOTIFICATIONS } from './split-layout.ts';
import type { Virtqueue } from './virtqueue.ts';

/**
 * A queue in memory of at least `virtqueueBytes('split', options)`, which is cleared. Interrupts are off. The constructor throws
 * `VirtioError` QUEUE_SIZE.
 */
export class SplitVirtqueue extends SplitDescriptors implements Virtqueue {
  get next(): number {
    return this.nextAvail;
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
    const n = Math.max(Math.min(to - from, this.unused), 0) | 0;
    const flags = deviceWrites ? DescriptorFlag.WRITE : 0;
    if (this.ordered && flags !== this.direction) this.setDirection(flags);
    if (!this.ordered) return this.postAnywhere(tokens, from, n, offset, length, flags);
    const u32 = this.u32;
    const token = this.token;
    const capacity = this.capacity;
    // Integers in locals, so that the loop converts nothing.
    const mask = this.mask | 0;
    const headroom = this.headroom | 0;
    const low = (this.iovaLow - headroom) | 0;
    const writable = deviceWrites ? -1 : 0;
    const end = (from + n) | 0;
    let avail = this.nextAvail | 0;
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
    this.nextAvail = avail & 0xffff;
    this.unused -= n;
    return n;
  }

  publish(): boolean {
    // hot:
    const avail = this.nextAvail;
    const added = (avail - this.published) & 0xffff;
    if (added === 0 || this.closed !== null) return false;
    const u16 = this.u16;
    Atomics.store(u16, this.availIdx, avail);
    this.published = avail;
    this.outstanding += added;
    // 2.7.10: notify when avail_event lies among the entries just added; or unless the device said that it need not be.
    if (this.eventIdx) return ((avail - Atomics.load(u16, this.availEvent) - 1) & 0xffff) < added;
    return (Atomics.load(u16, this.usedFlags) & NO_NOTIFICATIONS) === 0;
  }

  take(tokens: Uint32Array, written: Uint32Array, max: number): number {
    // hot:
    if (this.closed !== null) return 0;
    let last = this.lastUsed | 0;
    const used = (Atomics.load(this.u16, this.usedIdx) - last) & 0xffff;
    if (used === 0) return 0;
    if (used > this.outstanding) {
      this.refuse('USED_INDEX', `the used index is ${used} ahead with ${this.outstanding} buffers out`);
      return 0;
    }
    const n = Math.min(used, max) | 0;
    let i = 0;
    if (this.ordered && this.batch === 0) {
      const u32 = this.u32;
      const capacity = this.capacity;
      const token = this.token;
      const mask = this.mask | 0;
      const ring = this.usedRing | 0;
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
      this.lastUsed = last & 0xffff;
      this.unused += i;
      this.outstanding -= i;
      if (i === n) return n;
    }
    if (this.inOrder) return this.takeInTurn(tokens, written, i, n, used - i);
    this.endOrder();
    return this.takeAny(tokens, written, i, n);
  }

  enableInterrupts(): boolean {
    if (this.closed !== null) return false;
    const u16 = this.u16;
    if (this.eventIdx) Atomics.store(u16, this.usedEvent, this.lastUsed);
    else Atomics.store(u16, this.availFlags, 0);
    return Atomics.load(u16, this.usedIdx) !== this.lastUsed;
  }

  disableInterrupts(): void {
    if (this.closed !== null) return;
    // With event indices `flags` must stay 0 (2.7.7.1): name the entry that is furthest away.
    if (this.eventIdx) Atomics.store(this.u16, this.usedEvent, (this.lastUsed - 1) & 0xffff);
    else Atomics.store(this.u16, this.availFlags, NO_NOTIFICATIONS);
  }
}
