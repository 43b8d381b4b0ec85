/**
 * The driver side of a packed virtqueue (Virtio 1.4, 2.8), with indirect descriptors (2.8.7), IN_ORDER (2.8.8) and events for
 * a descriptor (2.8.10).
 *
 * The device is not trusted. What was handed out is remembered in private arrays by buffer id (`#capacity`, `#token`,
 * `#chain`), so the device cannot change it afterwards; each used descriptor is read once and checked against them, and no descriptor
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
import {
  EVENT_FLAG_MASK,
  EventFlag,
  FLAGS_HALF,
  FLAGS_SHIFT,
  isAmongNext,
  packedLayout,
  RING_FLAGS,
  RingFlag,
  ringPosition,
} from './packed-layout.ts';
import { STOPPED, type Virtqueue, type VirtqueueOptions } from './virtqueue.ts';

/** Makes the word of an available descriptor look like that of one used in the last round. */
const HELD = RingFlag.AVAIL << FLAGS_SHIFT;
/** What must be right in the last word of a used descriptor: the two ring flags and the id. */
const USED_MASK = (RING_FLAGS << FLAGS_SHIFT) | 0xffff;
const WRITE = DescriptorFlag.WRITE << FLAGS_SHIFT;

export class PackedVirtqueue implements Virtqueue {
  readonly index: number;
  readonly size: number;
  readonly memory: DmaMemory;
  /** IOVA of the descriptor ring, and of the driver's and the device's event suppression structures. */
  readonly descriptorArea: number;
  readonly driverArea: number;
  readonly deviceArea: number;

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
  // Positions in #u32.
  readonly #driverEvent: number;
  readonly #deviceEvent: number;

  /** See above: ids are positions. */
  #ordered = true;
  // By id, for buffers that are out: bytes that the device may write, plus 1; the token; the number of descriptors less 1.
  // Unless ordered, capacity 0 says that the id is free.
  readonly #capacity: Uint32Array;
  readonly #token: Uint32Array;
  readonly #chain: Uint16Array;
  /** Stack of free ids, unless ordered. */
  readonly #freeIds: Uint16Array;
  #freeIdCount = 0;
  /** Free descriptors. */
  #free: number;
  /** Buffers that are out and have more than one descriptor. */
  #chained = 0;
  /** Where the next available descriptor goes, and its ring flags, which say the wrap counter. */
  #nextAvail = 0;
  #availFlags: number = RingFlag.AVAIL;
  /** The descriptors that the device does not know: where they begin, flags of the first, how many. */
  #head = 0;
  #headFlags = 0;
  #pending = 0;
  /** Where the next used descriptor will be, and its ring flags; published descriptors that have not come back. */
  #nextUsed = 0;
  #usedFlags: number = RING_FLAGS;
  #outstanding = 0;
  /** Buffers that the device has returned by naming the last of them, and that were not taken; what it wrote into that one. */
  #batch = 0;
  #batchBytes = 0;
  #broken: VirtioError | null = null;

  /**
   * A queue in `memory`, of at least `packedVirtqueueBytes(options)`, which is cleared. Interrupts are off.
   * Throws `VirtioError` QUEUE_SIZE.
   */
  constructor(memory: DmaMemory, options: VirtqueueOptions) {
    const { index, size } = options;
    checkQueueSize(index, size, false);
    const at = packedLayout(options);
    if (memory.size < at.bytes)
      throw new RangeError(`queue ${index}: ${memory.size} bytes of memory, needs ${at.bytes}`);
    this.index = index;
    this.size = size;
    this.memory = memory;
    this.descriptorArea = memory.iova;
    this.driverArea = memory.iova + at.driver;
    this.deviceArea = memory.iova + at.device;
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
    this.#driverEvent = at.driver >>> 2;
    this.#deviceEvent = at.device >>> 2;
    this.#capacity = new Uint32Array(size);
    this.#token = new Uint32Array(size);
    this.#chain = new Uint16Array(size);
    this.#freeIds = new Uint16Array(size);
    this.#free = size;
    memory.u8.fill(0, 0, at.bytes);
    this.disableInterrupts();
  }

  get free(): number {
    return this.#broken === null ? this.#free : 0;
  }

  get broken(): VirtioError | null {
    return this.#broken === STOPPED ? null : this.#broken;
  }

  get next(): number {
    return ringPosition(this.#nextAvail, this.#availFlags);
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
    const n = Math.min(to - from, this.#free) | 0;
    if (n <= 0) return 0;
    const flags = deviceWrites ? DescriptorFlag.WRITE : 0;
    if (!this.#ordered) return this.#postAnywhere(tokens, from, n, offset, length, flags);
    const u32 = this.#u32;
    const token = this.#token;
    const capacity = this.#capacity;
    // Integers in locals, so that the loop converts nothing.
    const size = this.size | 0;
    const headroom = this.#headroom | 0;
    const low = (this.#iovaLow - headroom) | 0;
    const high = this.#iovaHigh | 0;
    const writable = deviceWrites ? -1 : 0;
    const end = (from + n) | 0;
    let hold = this.#beginBurst(flags) | 0;
    let ring = this.#availFlags | 0;
    let at = this.#nextAvail | 0;
    let i = from;
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
    this.#nextAvail = at;
    this.#availFlags = ring;
    this.#free -= n;
    this.#pending += n;
    return n;
  }

  /** Before descriptors are written: what the word of the first one must differ in from what it will be, until `publish`. */
  #beginBurst(flags: number): number {
    if (this.#pending !== 0) return 0;
    this.#head = this.#nextAvail;
    this.#headFlags = flags | this.#availFlags;
    return HELD;
  }

  /** hot: as `postBurst`, with free ids from the stack. */
  #postAnywhere(
    tokens: Uint32Array,
    from: number,
    n: number,
    offset: Uint32Array,
    length: Uint32Array,
    flags: number,
  ): number {
    const u32 = this.#u32;
    const headroom = this.#headroom;
    const low = (this.#iovaLow - headroom) | 0;
    const writable = flags === 0 ? 0 : -1;
    let hold = this.#beginBurst(flags);
    for (let i = from; i < from + n; i++) {
      const t = tokens[i];
      const id = this.#freeIds[--this.#freeIdCount];
      const bytes = (length[t] + headroom) | 0;
      const w = this.#nextAvail * DESCRIPTOR_WORDS;
      u32[w] = (low + offset[t]) | 0;
      u32[w + 1] = this.#iovaHigh;
      u32[w + 2] = bytes;
      u32[w + 3] = (((flags | this.#availFlags) << FLAGS_SHIFT) | id) ^ hold;
      hold = 0;
      this.#token[id] = t;
      this.#capacity[id] = ((bytes & writable) + 1) | 0;
      this.#advanceAvail();
    }
    return n;
  }

  /** One descriptor was written. */
  #advanceAvail(): void {
    this.#free--;
    this.#pending++;
    if (++this.#nextAvail < this.size) return;
    this.#nextAvail = 0;
    this.#availFlags ^= RING_FLAGS;
  }

  postChain(token: number, pieces: Uint32Array, readable: number, writable: number): boolean {
    const count = readable + writable;
    if (this.#broken !== null || count === 0) return false;
    const capacity = chainCapacity(this.size, pieces, readable, writable);
    const indirect = count > 1 && count <= this.#indirectEntries;
    const descriptors = indirect ? 1 : count;
    if (descriptors > this.#free) return false;
    const id = this.#ordered ? this.#nextAvail : this.#freeIds[--this.#freeIdCount];
    const pieceFlags = (i: number) => (i < readable ? 0 : DescriptorFlag.WRITE);
    if (indirect) {
      const table = this.#indirect + id * this.#indirectEntries * DESCRIPTOR_BYTES;
      for (let i = 0; i < count; i++) {
        writePiece(this.#u32, (table >>> 2) + i * DESCRIPTOR_WORDS, pieces, i, pieceFlags(i) << FLAGS_SHIFT);
      }
      const { iovaLow, iovaHigh } = this.memory;
      this.#writeDescriptor(
        Uint32Array.of(iovaLow + table, iovaHigh, count * DESCRIPTOR_BYTES),
        0,
        DescriptorFlag.INDIRECT,
        id,
      );
    } else {
      for (let i = 0; i < count; i++) {
        const flags = pieceFlags(i) | (i + 1 < count ? DescriptorFlag.NEXT : 0);
        this.#writeDescriptor(pieces, i, flags, id);
      }
    }
    this.#token[id] = token;
    this.#capacity[id] = capacity + 1;
    this.#chain[id] = descriptors - 1;
    if (descriptors > 1) this.#chained++;
    return true;
  }

  #writeDescriptor(pieces: Uint32Array, i: number, flags: number, id: number): void {
    const hold = this.#beginBurst(flags);
    const word = ((flags | this.#availFlags) << FLAGS_SHIFT) | id;
    writePiece(this.#u32, this.#nextAvail * DESCRIPTOR_WORDS, pieces, i, word ^ hold);
    this.#advanceAvail();
  }

  publish(): boolean {
    // hot:
    const added = this.#pending;
    if (added === 0 || this.#broken !== null) return false;
    Atomics.store(this.#u16, (this.#head << 3) + FLAGS_HALF, this.#headFlags);
    this.#pending = 0;
    this.#outstanding += added;
    const event = Atomics.load(this.#u32, this.#deviceEvent);
    const flags = (event >>> FLAGS_SHIFT) & EVENT_FLAG_MASK;
    if (flags !== EventFlag.DESC || !this.#eventIdx) return flags !== EventFlag.DISABLE;
    return isAmongNext(event & 0xffff, ringPosition(this.#head, this.#headFlags), added, this.size);
  }

  take(tokens: Uint32Array, written: Uint32Array, max: number): number {
    // hot:
    if (this.#broken !== null) return 0;
    const u16 = this.#u16;
    let at = this.#nextUsed | 0;
    let ring = this.#usedFlags | 0;
    if (this.#batch === 0 && (Atomics.load(u16, (at << 3) + FLAGS_HALF) & RING_FLAGS) !== ring) return 0;
    if (!this.#ordered) return this.#takeAny(tokens, written, 0, max);
    let i = 0;
    if ((this.#chained | this.#batch) === 0) {
      // A buffer is a descriptor: these many can be used.
      const left = Math.min(max, this.#outstanding) | 0;
      const u32 = this.#u32;
      const token = this.#token;
      const capacity = this.#capacity;
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
      this.#nextUsed = at;
      this.#usedFlags = ring;
      this.#free += i;
      this.#outstanding -= i;
      if (i === left || (u16[(at << 3) + FLAGS_HALF] & RING_FLAGS) !== ring) return i;
    }
    return this.#takeInTurn(tokens, written, i, max);
  }

  /** Takes used buffers of an ordered queue into `tokens[i]` up to `tokens[max - 1]`: chains, batches, odd lengths. Returns where it ended. */
  #takeInTurn(tokens: Uint32Array, written: Uint32Array, start: number, max: number): number {
    let i = start;
    while (i < max && this.#outstanding > 0) {
      if (this.#batch === 0) {
        const word = this.#usedWord();
        if (((word >>> FLAGS_SHIFT) & RING_FLAGS) !== this.#usedFlags) break;
        const id = word & 0xffff;
        if (id !== this.#nextUsed && !this.#inOrder) {
          this.#endOrder();
          return this.#takeAny(tokens, written, i, max);
        }
        const count = this.#buffersTo(id);
        if (count === 0) {
          this.#break('USED_ID', `used id ${id} was not given out`);
          break;
        }
        const bytes = this.#usedLength(id, word);
        if (bytes < 0) break;
        this.#batch = count;
        this.#batchBytes = bytes;
      }
      const id = this.#nextUsed;
      this.#batch--;
      tokens[i] = this.#token[id];
      // 2.8.8: of a batch all but the last were used completely.
      written[i] = this.#batch === 0 ? this.#batchBytes : this.#capacity[id] - 1;
      i++;
      this.#return(id);
    }
    return i;
  }

  /** hot: takes used buffers in any order into `tokens[i]` up to `tokens[max - 1]`; returns where it ended. */
  #takeAny(tokens: Uint32Array, written: Uint32Array, start: number, max: number): number {
    let i = start;
    while (i < max && this.#outstanding > 0) {
      const word = this.#usedWord();
      if (((word >>> FLAGS_SHIFT) & RING_FLAGS) !== this.#usedFlags) break;
      const id = word & 0xffff;
      if (id >= this.size || this.#capacity[id] === 0) {
        this.#break('USED_ID', `used id ${id} was not given out`);
        break;
      }
      const bytes = this.#usedLength(id, word);
      if (bytes < 0) break;
      tokens[i] = this.#token[id];
      written[i] = bytes;
      i++;
      this.#capacity[id] = 0;
      this.#freeIds[this.#freeIdCount++] = id;
      this.#return(id);
    }
    return i;
  }

  /** Id and flags of the next used descriptor. */
  #usedWord(): number {
    return this.#u32[this.#nextUsed * DESCRIPTOR_WORDS + 3];
  }

  /**
   * Bytes that the device wrote into buffer `id`, or -1 when the buffer does not hold them. The length is reserved when WRITE is not set
   * (2.8.4), but QEMU never sets it: so it counts whenever the buffer has a writable part.
   */
  #usedLength(id: number, word: number): number {
    const capacity = this.#capacity[id];
    if (capacity === 1 && (word & WRITE) === 0) return 0;
    // Adds 0: the ring flags are as expected. See above.
    const behind = ((word >>> FLAGS_SHIFT) & RING_FLAGS) ^ this.#usedFlags;
    const bytes = this.#u32[this.#nextUsed * DESCRIPTOR_WORDS + 2 + behind];
    if (bytes < capacity) return bytes;
    this.#break('USED_LENGTH', `used length ${bytes} for a buffer of ${capacity - 1} writable bytes`);
    return -1;
  }

  /** How many buffers of an ordered queue are out up to and including `id`; 0 when that is not one of them. */
  #buffersTo(id: number): number {
    let at = this.#nextUsed;
    let left = this.#outstanding;
    for (let count = 1; left > 0; count++) {
      if (at === id) return count;
      const descriptors = this.#chain[at] + 1;
      left -= descriptors;
      at += descriptors;
      if (at >= this.size) at -= this.size;
    }
    return 0;
  }

  /** The device is done with the buffer whose used descriptor is next: skips and frees its descriptors. */
  #return(id: number): void {
    const descriptors = this.#chain[id] + 1;
    if (descriptors > 1) {
      this.#chain[id] = 0;
      this.#chained--;
    }
    this.#free += descriptors;
    this.#outstanding -= descriptors;
    this.#nextUsed += descriptors;
    if (this.#nextUsed < this.size) return;
    this.#nextUsed -= this.size;
    this.#usedFlags ^= RING_FLAGS;
  }

  /** From ids that are positions to ids from a stack: those that are not out are free. */
  #endOrder(): void {
    if (!this.#ordered) return;
    this.#ordered = false;
    const out = new Uint8Array(this.size);
    let at = this.#nextUsed;
    for (let left = this.#outstanding + this.#pending; left > 0; ) {
      out[at] = 1;
      const descriptors = this.#chain[at] + 1;
      left -= descriptors;
      at = (at + descriptors) % this.size;
    }
    for (let id = 0; id < this.size; id++) {
      if (out[id] === 1) continue;
      this.#capacity[id] = 0;
      this.#freeIds[this.#freeIdCount++] = id;
    }
  }

  #break(code: string, message: string): void {
    this.fail(new VirtioError(code, `queue ${this.index}: ${message}`));
  }

  enableInterrupts(): boolean {
    if (this.#broken !== null) return false;
    const event = this.#eventIdx
      ? (EventFlag.DESC << FLAGS_SHIFT) | ringPosition(this.#nextUsed, this.#usedFlags)
      : EventFlag.ENABLE << FLAGS_SHIFT;
    Atomics.store(this.#u32, this.#driverEvent, event);
    if (this.#batch !== 0) return true;
    if (this.#outstanding === 0) return false;
    return (Atomics.load(this.#u16, (this.#nextUsed << 3) + FLAGS_HALF) & RING_FLAGS) === this.#usedFlags;
  }

  disableInterrupts(): void {
    if (this.#broken !== null) return;
    Atomics.store(this.#u32, this.#driverEvent, EventFlag.DISABLE << FLAGS_SHIFT);
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
    this.#pending = 0;
    return n;
  }

  restart(): void {
    this.#ordered = true;
    this.#chain.fill(0);
    this.#freeIdCount = 0;
    this.#free = this.size;
    this.#chained = 0;
    this.#nextAvail = 0;
    this.#availFlags = RingFlag.AVAIL;
    this.#pending = 0;
    this.#nextUsed = 0;
    this.#usedFlags = RING_FLAGS;
    this.#outstanding = 0;
    this.#batch = 0;
    this.#broken = null;
    this.memory.u8.fill(0, 0, this.#bytes);
    this.disableInterrupts();
  }
}
