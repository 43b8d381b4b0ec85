/**
 * A packed virtqueue for checks (Virtio 1.4, 2.8): descriptors, flags and event suppression can be set and read one by one.
 *
 * Buffer ids are none of the numbers that stand elsewhere: they count down from the largest, so that a device that mistakes the place of
 * a descriptor for the id of its buffer is found out.
 */
import type { DmaMemory } from '../sys/memory.ts';
import {
  EVENT_FLAG_MASK,
  EventFlag,
  FLAGS_HALF,
  FLAGS_SHIFT,
  isAmongNext,
  RING_FLAGS,
  RingFlag,
  ringPosition,
} from '../virtqueue/packed-layout.ts';
import { Failed } from './check.ts';
import {
  align,
  CheckRing,
  DESCRIPTOR,
  DescriptorFlag,
  type Piece,
  pieceFlags,
  type RingOptions,
  type UsedEntry,
} from './ring.ts';

/** `struct pvirtq_event_suppress` (2.8.14), in 16-bit words. */
const Event = { position: 0, flags: 1 } as const;
const EVENT_BYTES = 4;

export class PackedRing extends CheckRing {
  readonly descriptors: number;
  readonly driverArea: number;
  readonly deviceArea: number;
  /** The next descriptor to make available, and its ring flags. */
  #availAt = 0;
  #availFlags: number = RingFlag.AVAIL;
  /** Where the next used descriptor must be, and its ring flags. */
  #usedAt = 0;
  #usedFlags: number = RING_FLAGS;
  #nextId: number;
  readonly #buffers = new Map<number, readonly Piece[]>();
  /** Buffers that are out, in the order in which they were made available. */
  readonly #out: number[] = [];
  /** Descriptors that were made available since `wantsNotification` was asked, and where the first of them is. */
  #fresh = 0;
  #freshFrom = ringPosition(0, RingFlag.AVAIL);

  /** `at` is a multiple of 64; the memory there is zero. */
  constructor(memory: DmaMemory, at: number, options: RingOptions) {
    super(memory, options);
    this.descriptors = at;
    this.driverArea = align(at + this.size * DESCRIPTOR);
    this.deviceArea = align(this.driverArea + EVENT_BYTES);
    this.#nextId = this.size;
  }

  /** Bytes of a ring of `size` descriptors. */
  static bytes(size: number): number {
    return align(align(align(size * DESCRIPTOR) + EVENT_BYTES) + EVENT_BYTES);
  }

  describeIndirect(table: number, d: number, piece: Piece): void {
    // The order is that of the table, and all flags but WRITE are reserved (2.8.7).
    this.describe(table + d * DESCRIPTOR, piece, (pieceFlags(piece) & DescriptorFlag.WRITE) << FLAGS_SHIFT);
  }

  chain(...pieces: readonly Piece[]): number {
    do this.#nextId = (this.#nextId === 0 ? this.size : this.#nextId) - 1;
    while (this.#out.includes(this.#nextId));
    this.#buffers.set(this.#nextId, pieces);
    return this.#nextId;
  }

  available(id: number): void {
    const first = this.#availAt;
    const flags = this.write(id);
    this.show(first, flags);
  }

  /** Writes the descriptors of buffer `id`, all but the flags of the first one, which are returned. */
  write(id: number): number {
    const pieces = this.#buffers.get(id) ?? [];
    if (this.#outstanding() + pieces.length > this.size) throw new RangeError(`queue ${this.index} has no room`);
    const first = this.#availAt;
    let firstFlags = 0;
    for (const [i, piece] of pieces.entries()) {
      const isLast = i + 1 === pieces.length;
      const flags = this.#availFlags | pieceFlags(piece) | (isLast ? 0 : DescriptorFlag.NEXT);
      const offset = this.descriptors + this.#availAt * DESCRIPTOR;
      const old = this.#flagsAt(this.#availAt);
      // The id of a buffer stands in its last descriptor (2.8.6).
      this.describe(offset, piece, (isLast ? id : 0) | ((this.#availAt === first ? old : flags) << FLAGS_SHIFT));
      if (i === 0) firstFlags = flags;
      this.#availAt++;
      if (this.#availAt < this.size) continue;
      this.#availAt = 0;
      this.#availFlags ^= RING_FLAGS;
    }
    this.#out.push(id);
    this.#fresh += pieces.length;
    return firstFlags;
  }

  /** Makes what `write` wrote from descriptor `first` on available. */
  show(first: number, flags: number): void {
    Atomics.store(this.memory.u16, this.#half(first), flags);
  }

  /** Index of the next descriptor to make available. */
  get next(): number {
    return this.#availAt;
  }

  #half(d: number): number {
    return ((this.descriptors + d * DESCRIPTOR) >>> 1) + FLAGS_HALF;
  }

  #flagsAt(d: number): number {
    return Atomics.load(this.memory.u16, this.#half(d));
  }

  #count(id: number): number {
    return this.#buffers.get(id)?.length ?? 0;
  }

  #outstanding(): number {
    return this.#out.reduce((sum, id) => sum + this.#count(id), 0);
  }

  get position(): number {
    return ringPosition(this.#availAt, this.#availFlags);
  }

  /** Where the next used descriptor will be, as events say it. */
  get usedPosition(): number {
    return ringPosition(this.#usedAt, this.#usedFlags);
  }

  /** Driver event suppression: when the device is to notify. */
  wantInterrupts(flags: number, position = 0): void {
    const { u16 } = this.memory;
    const at = this.driverArea >>> 1;
    u16[at + Event.position] = position;
    Atomics.store(u16, at + Event.flags, flags);
  }

  suppressInterrupts(): void {
    this.wantInterrupts(EventFlag.DISABLE);
  }

  /** `flags` of the device event suppression structure, all 16 bits. */
  get deviceEventFlags(): number {
    return Atomics.load(this.memory.u16, (this.deviceArea >>> 1) + Event.flags);
  }

  wantsNotification(): boolean {
    const count = this.#fresh;
    const from = this.#freshFrom;
    this.#fresh = 0;
    this.#freshFrom = this.position;
    // Atomic, so that the descriptors are out before the device's wish is read.
    const flags = this.deviceEventFlags & EVENT_FLAG_MASK;
    if (flags !== EventFlag.DESC || !this.eventIdx) return flags !== EventFlag.DISABLE;
    return isAmongNext(this.memory.u16[(this.deviceArea >>> 1) + Event.position], from, count, this.size);
  }

  get pending(): number {
    let at = this.#usedAt;
    let flags = this.#usedFlags;
    let buffers = 0;
    while (buffers < this.#out.length && (this.#flagsAt(at) & RING_FLAGS) === flags) {
      const id = this.#idAt(at);
      buffers++;
      at += Math.max(this.#count(id), 1);
      if (at < this.size) continue;
      at -= this.size;
      flags ^= RING_FLAGS;
    }
    return buffers;
  }

  #idAt(d: number): number {
    return this.memory.u16[(this.descriptors + d * DESCRIPTOR + 12) >>> 1];
  }

  take(): UsedEntry | null {
    if ((this.#flagsAt(this.#usedAt) & RING_FLAGS) !== this.#usedFlags) return null;
    const id = this.#idAt(this.#usedAt);
    const length = this.memory.u32[(this.descriptors + this.#usedAt * DESCRIPTOR + 8) >>> 2];
    const place = this.#out.indexOf(id);
    if (place < 0) throw new Failed(`queue ${this.index}: used descriptor with id ${id}, which is not out`);
    // In order, a descriptor stands for all buffers up to it, and the next one is behind all of theirs (2.8.8).
    const done = this.inOrder ? this.#out.splice(0, place + 1) : this.#out.splice(place, 1);
    this.#usedAt += done.reduce((sum, one) => sum + this.#count(one), 0);
    if (this.#usedAt >= this.size) {
      this.#usedAt -= this.size;
      this.#usedFlags ^= RING_FLAGS;
    }
    return { id, length };
  }

  /** Flags of the used descriptor that `take` will take next. */
  get usedDescriptorFlags(): number {
    return this.#flagsAt(this.#usedAt);
  }
}
