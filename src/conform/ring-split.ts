/**
 * A split virtqueue for checks (Virtio 1.4, 2.7): descriptors, indices and flags can be set and read one by one.
 *
 * It keeps no record of descriptors: a check uses few, and knows which.
 */
import type { DmaMemory } from '../sys/memory.ts';
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

/** 16-bit words of the available ring (2.7.6) and of the used ring (2.7.8). */
const Ring = { flags: 0, index: 1, entries: 2 } as const;
const USED_ENTRY_WORDS = 4;
const NEXT_SHIFT = 16;

export class SplitRing extends CheckRing {
  readonly descriptors: number;
  readonly driverArea: number;
  readonly deviceArea: number;
  #nextAvail = 0;
  #nextUsed = 0;
  #nextDescriptor = 0;
  /** The available index when `wantsNotification` was asked last. */
  #told = 0;
  /** Buffers that are out, in the order in which they were made available. */
  readonly #out: number[] = [];

  /** `at` is a multiple of 64; the memory there is zero. */
  constructor(memory: DmaMemory, at: number, options: RingOptions) {
    super(memory, options);
    this.descriptors = at;
    this.driverArea = at + this.size * DESCRIPTOR;
    this.deviceArea = align(this.driverArea + 2 * (Ring.entries + this.size + 1));
  }

  /** Bytes of a ring of `size` descriptors. */
  static bytes(size: number): number {
    const used = align(size * DESCRIPTOR + 2 * (Ring.entries + size + 1));
    return align(used + 2 * (Ring.entries + size * USED_ENTRY_WORDS + 1));
  }

  describeIndirect(table: number, d: number, piece: Piece, next: number | null): void {
    this.#describeAt(table + d * DESCRIPTOR, piece, next);
  }

  #describeAt(offset: number, piece: Piece, next: number | null): void {
    const flags = pieceFlags(piece) | (next === null ? 0 : DescriptorFlag.NEXT);
    this.describe(offset, piece, flags | ((next ?? 0) << NEXT_SHIFT));
  }

  /** Writes a chain into the next descriptors, round the table; its id is its head. */
  chain(...pieces: readonly Piece[]): number {
    const head = this.#nextDescriptor;
    for (const [i, piece] of pieces.entries()) {
      const d = (head + i) % this.size;
      const next = i + 1 < pieces.length ? (d + 1) % this.size : null;
      this.#describeAt(this.descriptors + d * DESCRIPTOR, piece, next);
    }
    this.#nextDescriptor = (head + pieces.length) % this.size;
    return head;
  }

  available(head: number): void {
    const { u16 } = this.memory;
    const ring = this.driverArea >>> 1;
    u16[ring + Ring.entries + (this.#nextAvail % this.size)] = head;
    this.#out.push(head);
    this.#nextAvail = (this.#nextAvail + 1) & 0xffff;
    Atomics.store(u16, ring + Ring.index, this.#nextAvail);
  }

  get position(): number {
    return this.#nextAvail;
  }

  /** `flags` of the available ring: 1 advises the device not to interrupt. */
  set interruptFlags(flags: number) {
    this.memory.u16[(this.driverArea >>> 1) + Ring.flags] = flags;
  }

  suppressInterrupts(): void {
    this.interruptFlags = 1;
  }

  set usedEvent(index: number) {
    this.memory.u16[(this.driverArea >>> 1) + Ring.entries + this.size] = index;
  }

  get usedFlags(): number {
    return this.memory.u16[(this.deviceArea >>> 1) + Ring.flags];
  }

  get #availEvent(): number {
    return this.memory.u16[(this.deviceArea >>> 1) + Ring.entries + this.size * USED_ENTRY_WORDS];
  }

  get #usedIndex(): number {
    return Atomics.load(this.memory.u16, (this.deviceArea >>> 1) + Ring.index);
  }

  get pending(): number {
    return (this.#usedIndex - this.#nextUsed) & 0xffff;
  }

  wantsNotification(): boolean {
    const before = this.#told;
    // The index is out before the device's wish is read.
    Atomics.load(this.memory.u16, this.driverArea >>> 1);
    this.#told = this.#nextAvail;
    if (!this.eventIdx) return (this.usedFlags & 1) === 0;
    return ((this.#nextAvail - this.#availEvent - 1) & 0xffff) < ((this.#nextAvail - before) & 0xffff);
  }

  take(): UsedEntry | null {
    const { pending } = this;
    if (pending === 0) return null;
    if (pending > this.size)
      throw new Failed(`queue ${this.index}: the used index is ahead by ${pending}, the queue holds ${this.size}`);
    const at = (this.deviceArea + 2 * Ring.entries + (this.#nextUsed % this.size) * 2 * USED_ENTRY_WORDS) >>> 2;
    const entry = { id: this.memory.u32[at], length: this.memory.u32[at + 1] };
    if (entry.id >= this.size)
      throw new Failed(`queue ${this.index}: used entry with id ${entry.id}, the queue holds ${this.size}`);
    const place = this.#out.indexOf(entry.id);
    if (place < 0) throw new Failed(`queue ${this.index}: used entry with id ${entry.id}, which is not out`);
    // In order, an entry stands for all buffers up to it, and the next one is as many places ahead (2.7.9).
    const batch = this.inOrder ? place + 1 : 1;
    if (batch > pending)
      throw new Failed(`queue ${this.index}: the buffer made available as number ${batch} was used before number 1`);
    this.#out.splice(this.inOrder ? 0 : place, batch);
    this.#nextUsed = (this.#nextUsed + batch) & 0xffff;
    return entry;
  }
}
