/**
 * The descriptors of a packed virtqueue on the driver side (Virtio 1.4, 2.8.1, 2.8.13), and all that is less common than the
 * bursts of `packed.ts`: buffers of several descriptors, buffers that come back in another order, and with IN_ORDER (2.8.8)
 * several of them at once.
 */
import type { DmaMemory } from '../sys/memory.ts';
import { DESCRIPTOR_WORDS, DescriptorFlag, writePiece } from './descriptor.ts';
import { DriverQueue } from './driver-queue.ts';
import { FLAGS_SHIFT, packedLayout, RING_FLAGS, RingFlag } from './packed-layout.ts';
import type { VirtqueueOptions } from './virtqueue.ts';

/** Makes the word of an available descriptor look like that of one used in the last round. */
const HELD = RingFlag.AVAIL << FLAGS_SHIFT;
const WRITE = DescriptorFlag.WRITE << FLAGS_SHIFT;

export abstract class PackedDescriptors extends DriverQueue {
  // Positions in u32.
  protected readonly driverEvent: number;
  protected readonly deviceEvent: number;

  /** Where the next available descriptor goes, and its ring flags, which say the wrap counter. */
  protected nextAvail = 0;
  protected availFlags: number = RingFlag.AVAIL;
  /** The descriptors that the device does not know: where they begin, flags of the first, how many. */
  protected head = 0;
  protected headFlags = 0;
  protected pending = 0;
  /** Where the next used descriptor will be, and its ring flags. */
  protected nextUsed = 0;
  protected usedFlags: number = RING_FLAGS;
  /** Height of the stack of free ids, unless ordered. */
  #freeIdCount = 0;

  /** Throws `VirtioError` QUEUE_SIZE. */
  constructor(memory: DmaMemory, options: VirtqueueOptions) {
    const layout = packedLayout(options);
    super(memory, options, layout);
    this.driverEvent = layout.driver >>> 2;
    this.deviceEvent = layout.device >>> 2;
    this.restart();
  }

  abstract disableInterrupts(): void;

  protected override begin(): void {
    this.nextAvail = 0;
    this.availFlags = RingFlag.AVAIL;
    this.pending = 0;
    this.nextUsed = 0;
    this.usedFlags = RING_FLAGS;
    this.#freeIdCount = 0;
    this.disableInterrupts();
  }

  /** Before descriptors are written: what the word of the first one must differ in from what it will be, until `publish`. */
  protected beginBurst(flags: number): number {
    if (this.pending !== 0) return 0;
    this.head = this.nextAvail;
    this.headFlags = flags | this.availFlags;
    return HELD;
  }

  /** hot: as `postBurst`, with free ids from the stack. */
  protected postAnywhere(
    tokens: Uint32Array,
    from: number,
    n: number,
    offset: Uint32Array,
    length: Uint32Array,
    flags: number,
  ): number {
    const u32 = this.u32;
    const headroom = this.headroom;
    const low = (this.iovaLow - headroom) | 0;
    const writable = flags === 0 ? 0 : -1;
    let hold = this.beginBurst(flags);
    for (let i = from; i < from + n; i++) {
      const t = tokens[i];
      const id = this.freeIds[--this.#freeIdCount];
      const bytes = (length[t] + headroom) | 0;
      const w = this.nextAvail * DESCRIPTOR_WORDS;
      u32[w] = (low + offset[t]) | 0;
      u32[w + 1] = this.iovaHigh;
      u32[w + 2] = bytes;
      u32[w + 3] = (((flags | this.availFlags) << FLAGS_SHIFT) | id) ^ hold;
      hold = 0;
      this.token[id] = t;
      this.capacity[id] = ((bytes & writable) + 1) | 0;
      this.#advanceAvail();
    }
    return n;
  }

  /** One descriptor was written. */
  #advanceAvail(): void {
    this.unused--;
    this.pending++;
    if (++this.nextAvail < this.size) return;
    this.nextAvail = 0;
    this.availFlags ^= RING_FLAGS;
  }

  protected override chainId(): number {
    return this.ordered ? this.nextAvail : this.freeIds[--this.#freeIdCount];
  }

  protected override writeList(id: number, pieces: Uint32Array, readable: number, count: number, flags: number): void {
    for (let i = 0; i < count; i++) {
      const direction = i < readable ? 0 : DescriptorFlag.WRITE;
      const own = flags | direction | (i + 1 < count ? DescriptorFlag.NEXT : 0);
      const hold = this.beginBurst(own);
      const word = ((own | this.availFlags) << FLAGS_SHIFT) | id;
      writePiece(this.u32, this.nextAvail * DESCRIPTOR_WORDS, pieces, i, word ^ hold);
      this.#advanceAvail();
    }
  }

  /** 2.8.7: the entries of a table follow each other, and of their flags only WRITE counts. */
  protected override tableWord(flags: number): number {
    return flags << FLAGS_SHIFT;
  }

  /** Takes used buffers of an ordered queue into `tokens[i]` up to `tokens[max - 1]`: chains, batches, odd lengths. Returns where it ended. */
  protected takeInTurn(tokens: Uint32Array, written: Uint32Array, start: number, max: number): number {
    let i = start;
    while (i < max && this.outstanding > 0) {
      if (this.batch === 0) {
        const word = this.#usedWord();
        if (((word >>> FLAGS_SHIFT) & RING_FLAGS) !== this.usedFlags) break;
        const id = word & 0xffff;
        if (id !== this.nextUsed && !this.inOrder) {
          this.endOrder();
          return this.takeAny(tokens, written, i, max);
        }
        const count = this.#buffersTo(id);
        if (count === 0) {
          this.refuseId(id);
          break;
        }
        const bytes = this.#usedLength(id, word);
        if (bytes < 0) break;
        this.batch = count;
        this.batchBytes = bytes;
      }
      const id = this.nextUsed;
      this.batch--;
      tokens[i] = this.token[id];
      // 2.8.8: of a batch all but the last were used completely.
      written[i] = this.batch === 0 ? this.batchBytes : this.capacity[id] - 1;
      i++;
      this.#return(id);
    }
    return i;
  }

  /** hot: takes used buffers in any order into `tokens[i]` up to `tokens[max - 1]`; returns where it ended. */
  protected takeAny(tokens: Uint32Array, written: Uint32Array, start: number, max: number): number {
    let i = start;
    while (i < max && this.outstanding > 0) {
      const word = this.#usedWord();
      if (((word >>> FLAGS_SHIFT) & RING_FLAGS) !== this.usedFlags) break;
      const id = word & 0xffff;
      if (id >= this.size || this.capacity[id] === 0) {
        this.refuseId(id);
        break;
      }
      const bytes = this.#usedLength(id, word);
      if (bytes < 0) break;
      tokens[i] = this.token[id];
      written[i] = bytes;
      i++;
      this.capacity[id] = 0;
      this.freeIds[this.#freeIdCount++] = id;
      this.#return(id);
    }
    return i;
  }

  /** Id and flags of the next used descriptor. */
  #usedWord(): number {
    return this.u32[this.nextUsed * DESCRIPTOR_WORDS + 3];
  }

  /**
   * Bytes that the device wrote into buffer `id`, or -1 when the buffer does not hold them. The length is reserved when WRITE is not set
   * (2.8.4), but QEMU never sets it: so it counts whenever the buffer has a writable part.
   */
  #usedLength(id: number, word: number): number {
    const capacity = this.capacity[id];
    if (capacity === 1 && (word & WRITE) === 0) return 0;
    // Adds 0: the ring flags are as expected. See above.
    const behind = ((word >>> FLAGS_SHIFT) & RING_FLAGS) ^ this.usedFlags;
    const bytes = this.u32[this.nextUsed * DESCRIPTOR_WORDS + 2 + behind];
    if (bytes < capacity) return bytes;
    this.refuseLength(id, bytes);
    return -1;
  }

  /** How many buffers of an ordered queue are out up to and including `id`; 0 when that is not one of them. */
  #buffersTo(id: number): number {
    let at = this.nextUsed;
    let left = this.outstanding;
    for (let count = 1; left > 0; count++) {
      if (at === id) return count;
      const descriptors = this.chain[at] + 1;
      left -= descriptors;
      at += descriptors;
      if (at >= this.size) at -= this.size;
    }
    return 0;
  }

  /** The device is done with the buffer whose used descriptor is next: skips and frees its descriptors. */
  #return(id: number): void {
    const descriptors = this.chain[id] + 1;
    if (descriptors > 1) {
      this.chain[id] = 0;
      this.chained--;
    }
    this.unused += descriptors;
    this.outstanding -= descriptors;
    this.nextUsed += descriptors;
    if (this.nextUsed < this.size) return;
    this.nextUsed -= this.size;
    this.usedFlags ^= RING_FLAGS;
  }

  /** From ids that are positions to ids from a stack: those that are not out are free. */
  protected override endOrder(): void {
    if (!this.ordered) return;
    this.ordered = false;
    const out = new Uint8Array(this.size);
    let at = this.nextUsed;
    for (let left = this.outstanding + this.pending; left > 0; ) {
      out[at] = 1;
      const descriptors = this.chain[at] + 1;
      left -= descriptors;
      at = (at + descriptors) % this.size;
    }
    for (let id = 0; id < this.size; id++) {
      if (out[id] === 1) continue;
      this.capacity[id] = 0;
      this.freeIds[this.#freeIdCount++] = id;
    }
  }
}
