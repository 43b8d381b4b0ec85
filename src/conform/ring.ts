/**
 * A split virtqueue for checks (Virtio 1.4, 2.7): descriptors, indices and flags can be set and read one by one.
 *
 * It keeps no record of descriptors: a check uses few, and knows which.
 */
import type { DmaMemory } from '../sys/memory.ts';
import { Failed } from './check.ts';
import type { Patience } from './time.ts';

/** Descriptor flags (2.7.5). */
export const DescriptorFlag = { NEXT: 1, WRITE: 2, INDIRECT: 4 } as const;

const DESCRIPTOR = 16;
/** 16-bit words of the available ring (2.7.6) and of the used ring (2.7.8). */
const Ring = { flags: 0, index: 1, entries: 2 } as const;
const USED_ENTRY_WORDS = 4;
const ALIGNMENT = 64;

export interface UsedEntry {
  readonly id: number;
  readonly length: number;
}

/** A piece of a buffer: where in DMA memory, and how long. */
export interface Piece {
  readonly at: number;
  readonly length: number;
  /** The device writes it. */
  readonly write?: boolean;
  /** It holds a table of further descriptors. */
  readonly indirect?: boolean;
}

/** Bytes of a ring of `size` descriptors, rounded up. */
export function ringBytes(size: number): number {
  const avail = size * DESCRIPTOR;
  const used = align(avail + 2 * (Ring.entries + size + 1));
  return align(used + 2 * (Ring.entries + size * USED_ENTRY_WORDS + 1));
}

function align(at: number): number {
  return Math.ceil(at / ALIGNMENT) * ALIGNMENT;
}

export class CheckRing {
  readonly index: number;
  readonly size: number;
  readonly memory: DmaMemory;
  /** Offsets in `memory`. */
  readonly descriptors: number;
  readonly avail: number;
  readonly used: number;
  readonly eventIdx: boolean;
  #nextAvail = 0;
  #nextUsed = 0;
  #nextDescriptor = 0;

  /** `at` is a multiple of 64; the memory there is zero. */
  constructor(memory: DmaMemory, at: number, index: number, size: number, eventIdx: boolean) {
    this.memory = memory;
    this.index = index;
    this.size = size;
    this.eventIdx = eventIdx;
    this.descriptors = at;
    this.avail = at + size * DESCRIPTOR;
    this.used = align(this.avail + 2 * (Ring.entries + size + 1));
  }

  /** Writes one descriptor. */
  describe(d: number, { at, length, write, indirect }: Piece, next: number | null): void {
    this.#describeAt(
      this.descriptors + d * DESCRIPTOR,
      { at, length, ...(write && { write }), ...(indirect && { indirect }) },
      next,
    );
  }

  /** Writes descriptor `d` of a table of indirect ones at offset `table`. */
  describeIndirect(table: number, d: number, piece: Piece, next: number | null): void {
    this.#describeAt(table + d * DESCRIPTOR, piece, next);
  }

  #describeAt(offset: number, piece: Piece, next: number | null): void {
    const word = offset >>> 2;
    const { u32 } = this.memory;
    const flags =
      (next === null ? 0 : DescriptorFlag.NEXT) |
      (piece.write === true ? DescriptorFlag.WRITE : 0) |
      (piece.indirect === true ? DescriptorFlag.INDIRECT : 0);
    u32[word] = this.memory.iovaLow + piece.at;
    u32[word + 1] = this.memory.iovaHigh;
    u32[word + 2] = piece.length;
    u32[word + 3] = flags | ((next ?? 0) << 16);
  }

  /** Writes a chain into the next descriptors, round the table, and makes it available; returns its head. */
  offer(...pieces: readonly Piece[]): number {
    const head = this.chain(...pieces);
    this.available(head);
    return head;
  }

  /** Writes a chain into the next descriptors; returns its head. */
  chain(...pieces: readonly Piece[]): number {
    const head = this.#nextDescriptor;
    for (const [i, piece] of pieces.entries()) {
      const d = (head + i) % this.size;
      this.describe(d, piece, i + 1 < pieces.length ? (d + 1) % this.size : null);
    }
    this.#nextDescriptor = (head + pieces.length) % this.size;
    return head;
  }

  /** Makes the buffer that starts at descriptor `head` available. */
  available(head: number): void {
    const { u16 } = this.memory;
    const ring = this.avail >>> 1;
    u16[ring + Ring.entries + (this.#nextAvail % this.size)] = head;
    this.#nextAvail = (this.#nextAvail + 1) & 0xffff;
    Atomics.store(u16, ring + Ring.index, this.#nextAvail);
  }

  get availIndex(): number {
    return this.#nextAvail;
  }

  /** `flags` of the available ring: 1 advises the device not to interrupt. */
  set interruptFlags(flags: number) {
    this.memory.u16[(this.avail >>> 1) + Ring.flags] = flags;
  }

  set usedEvent(index: number) {
    this.memory.u16[(this.avail >>> 1) + Ring.entries + this.size] = index;
  }

  get usedFlags(): number {
    return this.memory.u16[(this.used >>> 1) + Ring.flags];
  }

  get availEvent(): number {
    return this.memory.u16[(this.used >>> 1) + Ring.entries + this.size * USED_ENTRY_WORDS];
  }

  get usedIndex(): number {
    return Atomics.load(this.memory.u16, (this.used >>> 1) + Ring.index);
  }

  /** Used entries that were not taken. */
  get pending(): number {
    return (this.usedIndex - this.#nextUsed) & 0xffff;
  }

  /** Whether the device wants to be told of what was made available since index `before` (2.7.10). */
  wantsNotification(before: number): boolean {
    if (!this.eventIdx) return (this.usedFlags & 1) === 0;
    return ((this.#nextAvail - this.availEvent - 1) & 0xffff) < ((this.#nextAvail - before) & 0xffff);
  }

  /** The next used entry; null when there is none. */
  take(): UsedEntry | null {
    const { pending } = this;
    if (pending === 0) return null;
    if (pending > this.size)
      throw new Failed(`queue ${this.index}: the used index is ahead by ${pending}, the queue holds ${this.size}`);
    const at = (this.used + 2 * Ring.entries + (this.#nextUsed % this.size) * 2 * USED_ENTRY_WORDS) >>> 2;
    this.#nextUsed = (this.#nextUsed + 1) & 0xffff;
    const entry = { id: this.memory.u32[at], length: this.memory.u32[at + 1] };
    if (entry.id >= this.size)
      throw new Failed(`queue ${this.index}: used entry with id ${entry.id}, the queue holds ${this.size}`);
    return entry;
  }

  /** Waits for the next used entry. */
  async wait(patience: Patience, limit?: number): Promise<UsedEntry> {
    await patience.until(() => this.pending > 0, limit);
    const entry = this.take();
    if (entry === null) throw new Failed(`queue ${this.index}: a buffer was made available and not used in time`);
    return entry;
  }

  /** A copy of the descriptor table. */
  table(): Uint8Array {
    return this.memory.u8.slice(this.descriptors, this.descriptors + this.size * DESCRIPTOR);
  }
}
