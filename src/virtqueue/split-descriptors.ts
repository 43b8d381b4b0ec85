/**
 * The descriptors of a split virtqueue on the driver side (Virtio 1.4, 2.7.5), and all that is less common than the bursts of
 * `split.ts`: buffers of several descriptors, buffers that come back in another order, and with IN_ORDER (2.7.9) several of
 * them at once.
 *
 * Free descriptors are on a stack, as soon as the queue is not ordered any more. With IN_ORDER there is no stack: descriptors are
 * used in the order of the table.
 */
import type { DmaMemory } from '../sys/memory.ts';
import { DESCRIPTOR_WORDS, DescriptorFlag, writePiece } from './descriptor.ts';
import { DriverQueue } from './driver-queue.ts';
import { NEXT_SHIFT, RingField, splitLayout } from './split-layout.ts';
import type { VirtqueueOptions } from './virtqueue.ts';

export abstract class SplitDescriptors extends DriverQueue {
  protected readonly mask: number;
  // Positions in u16, and of the used ring's first element in u32.
  protected readonly availFlags: number;
  protected readonly availIdx: number;
  protected readonly availRing: number;
  protected readonly usedEvent: number;
  protected readonly usedFlags: number;
  protected readonly usedIdx: number;
  protected readonly usedRing: number;
  protected readonly availEvent: number;

  /** The descriptor flags that all free descriptors of an ordered queue have; -1 before the first. */
  protected direction = -1;
  /** Index of the next available entry to write; of the next one that the device does not know; of the next used one to read. */
  protected nextAvail = 0;
  protected published = 0;
  protected lastUsed = 0;
  /** By descriptor: the one that follows in its chain. */
  readonly #next: Uint16Array;
  /** With IN_ORDER: head of the buffer by its place in the available ring; and the next descriptor of the table to use. */
  readonly #heads: Uint16Array;
  #nextDescriptor = 0;

  /** Throws `VirtioError` QUEUE_SIZE. */
  constructor(memory: DmaMemory, options: VirtqueueOptions) {
    const layout = splitLayout(options);
    super(memory, options, layout);
    const { size } = options;
    this.mask = size - 1;
    const avail = layout.driver >>> 1;
    const used = layout.device >>> 1;
    this.availFlags = avail + RingField.flags;
    this.availIdx = avail + RingField.idx;
    this.availRing = avail + RingField.ring;
    this.usedEvent = this.availRing + size;
    this.usedFlags = used + RingField.flags;
    this.usedIdx = used + RingField.idx;
    this.usedRing = (used + RingField.ring) >>> 1;
    this.availEvent = used + RingField.ring + 4 * size;
    this.#next = new Uint16Array(size);
    this.#heads = new Uint16Array(size);
    this.restart();
  }

  abstract disableInterrupts(): void;

  protected override begin(): void {
    this.direction = -1;
    this.nextAvail = 0;
    this.published = 0;
    this.lastUsed = 0;
    for (let i = 0; i < this.size; i++) {
      this.u16[this.availRing + i] = i;
      this.#heads[i] = i;
    }
    this.disableInterrupts();
  }

  /** hot: as `postBurst`, with free descriptors from the stack, or with IN_ORDER from the table in turn. */
  protected postAnywhere(
    tokens: Uint32Array,
    from: number,
    n: number,
    offset: Uint32Array,
    length: Uint32Array,
    flags: number,
  ): number {
    const { u16, u32, freeIds, mask, headroom } = this;
    const ring = this.availRing;
    const low = (this.iovaLow - headroom) | 0;
    const writable = flags === 0 ? 0 : -1;
    let unused = this.unused;
    let avail = this.nextAvail;
    for (let i = from; i < from + n; i++) {
      const t = tokens[i];
      unused--;
      let id = freeIds[unused];
      if (this.inOrder) {
        id = this.#nextDescriptor;
        this.#nextDescriptor = (id + 1) & mask;
        this.#heads[avail & mask] = id;
      }
      const bytes = (length[t] + headroom) | 0;
      const w = id * DESCRIPTOR_WORDS;
      u32[w] = (low + offset[t]) | 0;
      u32[w + 1] = this.iovaHigh;
      u32[w + 2] = bytes;
      u32[w + 3] = flags;
      this.token[id] = t;
      this.capacity[id] = ((bytes & writable) + 1) | 0;
      u16[ring + (avail & mask)] = id;
      avail++;
    }
    this.nextAvail = avail & 0xffff;
    this.unused = unused;
    return n;
  }

  /** Writes the half of each descriptor that stays the same as long as the queue is ordered. */
  protected setDirection(flags: number): void {
    if (this.direction !== -1) {
      this.endOrder();
      return;
    }
    this.direction = flags;
    for (let id = 0; id < this.size; id++) {
      this.u32[id * DESCRIPTOR_WORDS + 1] = this.iovaHigh;
      this.u32[id * DESCRIPTOR_WORDS + 3] = flags;
    }
  }

  /**
   * From an ordered queue to one with a free list: what is not between the used and the available index is free. With IN_ORDER,
   * to one that uses the table in turn: entries of the available ring are written from now on.
   */
  protected override endOrder(): void {
    if (!this.ordered) return;
    this.ordered = false;
    this.#nextDescriptor = this.nextAvail & this.mask;
    for (let i = 0; i < this.unused; i++) {
      const id = (this.nextAvail + this.unused - 1 - i) & this.mask;
      this.freeIds[i] = id;
      this.capacity[id] = 0;
    }
  }

  protected override chainId(): number {
    this.endOrder();
    return this.#descriptor(0);
  }

  /** The descriptor for piece `i` of a chain. */
  #descriptor(i: number): number {
    return this.inOrder ? (this.#nextDescriptor + i) & this.mask : this.freeIds[this.unused - 1 - i];
  }

  protected override writeList(
    head: number,
    pieces: Uint32Array,
    readable: number,
    count: number,
    flags: number,
  ): void {
    for (let i = 0; i < count; i++) {
      const id = this.#descriptor(i);
      let last = i < readable ? flags : flags | DescriptorFlag.WRITE;
      if (i + 1 < count) {
        const next = this.#descriptor(i + 1);
        this.#next[id] = next;
        last |= DescriptorFlag.NEXT | (next << NEXT_SHIFT);
      }
      writePiece(this.u32, id * DESCRIPTOR_WORDS, pieces, i, last);
    }
    this.unused -= count;
    this.#nextDescriptor = (this.#nextDescriptor + count) & this.mask;
    const place = this.nextAvail & this.mask;
    this.#heads[place] = head;
    this.u16[this.availRing + place] = head;
    this.nextAvail = (this.nextAvail + 1) & 0xffff;
  }

  protected override tableWord(flags: number, next: number): number {
    return next === 0 ? flags : flags | DescriptorFlag.NEXT | (next << NEXT_SHIFT);
  }

  /** With IN_ORDER: takes chains and batches out of `used` buffers into `tokens[i]` up to `tokens[n - 1]`; returns where it ended. */
  protected takeInTurn(tokens: Uint32Array, written: Uint32Array, start: number, n: number, used: number): number {
    let i = start;
    for (; i < n; i++) {
      const place = this.lastUsed & this.mask;
      const head = this.#heads[place];
      if (this.batch === 0 && !this.#beginBatch(place, used - (i - start))) break;
      this.batch--;
      tokens[i] = this.token[head];
      // 2.7.9: of a batch all but the last were used completely.
      written[i] = this.batch === 0 ? this.batchBytes : this.capacity[head] - 1;
      this.unused += this.chain[head] + 1;
      if (this.chain[head] !== 0) this.chained--;
      this.chain[head] = 0;
      this.capacity[head] = 0;
      this.outstanding--;
      this.lastUsed = (this.lastUsed + 1) & 0xffff;
    }
    return i;
  }

  /** Reads the used entry at `place`, which names the last of one or more of the `used` buffers; false when it does not. */
  #beginBatch(place: number, used: number): boolean {
    const at = this.usedRing + place * 2;
    const id = this.u32[at];
    const count = this.#buffersTo(id, used);
    if (count === 0) {
      this.refuseId(id);
      return false;
    }
    const bytes = this.u32[at + 1];
    if (bytes >= this.capacity[id]) {
      this.refuseLength(id, bytes);
      return false;
    }
    this.batch = count;
    this.batchBytes = bytes;
    return true;
  }

  /** How many buffers are used up to and including the one with head `id`, of `used` ones; 0 when that is not one of them. */
  #buffersTo(id: number, used: number): number {
    for (let count = 1; count <= used; count++) {
      if (this.#heads[(this.lastUsed + count - 1) & this.mask] === id) return count;
    }
    return 0;
  }

  /** hot: takes used buffers in any order into `tokens[i]` up to `tokens[n - 1]`; returns where it ended. */
  protected takeAny(tokens: Uint32Array, written: Uint32Array, start: number, n: number): number {
    const { u32, capacity, token, freeIds, mask, size } = this;
    const ring = this.usedRing;
    const chained = this.chained !== 0;
    let last = this.lastUsed;
    let unused = this.unused;
    let i = start;
    for (; i < n; i++) {
      const at = ring + (last & mask) * 2;
      const id = u32[at];
      const bytes = u32[at + 1];
      // Also 0 beyond the table.
      const limit = id < size ? capacity[id] : 0;
      if (bytes >= limit) {
        if (limit === 0) this.refuseId(id);
        else this.refuseLength(id, bytes);
        break;
      }
      capacity[id] = 0;
      tokens[i] = token[id];
      written[i] = bytes;
      freeIds[unused++] = id;
      if (chained && this.chain[id] !== 0) unused = this.#freeChain(id, unused);
      last++;
    }
    this.unused = unused;
    this.lastUsed = last & 0xffff;
    this.outstanding -= i - start;
    return i;
  }

  /** Frees the descriptors after `head` of a chain; returns the new height of the stack. */
  #freeChain(head: number, unused: number): number {
    let height = unused;
    let id = head;
    for (let left = this.chain[head]; left > 0; left--) {
      id = this.#next[id];
      this.freeIds[height++] = id;
    }
    this.chain[head] = 0;
    this.chained--;
    return height;
  }
}
