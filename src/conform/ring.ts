/**
 * What checks know of a virtqueue, split (`ring-split.ts`) or packed (`ring-packed.ts`): buffers are made available and taken back
 * one by one, and nothing is hidden.
 */
import type { DmaMemory } from '../sys/memory.ts';
import { Failed } from './check.ts';
import type { Patience } from './time.ts';

export type RingFormat = 'split' | 'packed';

/** Descriptor flags of both formats (2.7.5, 2.8). */
export const DescriptorFlag = { NEXT: 1, WRITE: 2, INDIRECT: 4 } as const;
/** Bytes of a descriptor of both formats. */
export const DESCRIPTOR = 16;
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

export interface RingOptions {
  readonly index: number;
  /** Descriptors. */
  readonly size: number;
  /** EVENT_IDX and IN_ORDER are negotiated. */
  readonly eventIdx: boolean;
  readonly inOrder: boolean;
}

export function align(at: number): number {
  return Math.ceil(at / ALIGNMENT) * ALIGNMENT;
}

export abstract class CheckRing {
  readonly memory: DmaMemory;
  readonly index: number;
  readonly size: number;
  readonly eventIdx: boolean;
  protected readonly inOrder: boolean;
  /** Offsets in `memory` of what the driver tells the device of (4.1.4.3). */
  abstract readonly descriptors: number;
  abstract readonly driverArea: number;
  abstract readonly deviceArea: number;

  constructor(memory: DmaMemory, { index, size, eventIdx, inOrder }: RingOptions) {
    this.memory = memory;
    this.index = index;
    this.size = size;
    this.eventIdx = eventIdx;
    this.inOrder = inOrder;
  }

  /** Gives a buffer an id, which it keeps; it is not available yet. */
  abstract chain(...pieces: readonly Piece[]): number;
  /** Makes the buffer `id` available, for the first time or again after it was used. */
  abstract available(id: number): void;
  /** Whether the device wants to be told of what was made available since this was asked last (2.7.10, 2.8.10). */
  abstract wantsNotification(): boolean;
  /** `next_off` and `next_wrap` of a notification with data (2.9). */
  abstract readonly position: number;
  /** Buffers that were used and not taken. */
  abstract readonly pending: number;
  /** The next used buffer; null when there is none. Throws `Failed` when it is none that is out. */
  abstract take(): UsedEntry | null;
  /** Advises the device not to notify of used buffers (2.7.7, 2.8.10). */
  abstract suppressInterrupts(): void;
  /** Writes descriptor `d` of a table of indirect ones at offset `table`. */
  abstract describeIndirect(table: number, d: number, piece: Piece, next: number | null): void;

  /** Makes a new buffer available; returns its id. */
  offer(...pieces: readonly Piece[]): number {
    const id = this.chain(...pieces);
    this.available(id);
    return id;
  }

  /** Waits for the next used buffer. */
  async wait(patience: Patience, limit?: number): Promise<UsedEntry> {
    await patience.until(() => this.pending > 0, limit);
    const entry = this.take();
    if (entry === null) throw new Failed(`queue ${this.index}: a buffer was made available and not used in time`);
    return entry;
  }

  /** A copy of the descriptors. */
  table(): Uint8Array {
    return this.memory.u8.slice(this.descriptors, this.descriptors + this.size * DESCRIPTOR);
  }

  /** Address and length of a descriptor; its last word is another in each format. */
  protected describe(offset: number, { at, length }: Piece, last: number): void {
    const word = offset >>> 2;
    const { u32 } = this.memory;
    u32[word] = this.memory.iovaLow + at;
    u32[word + 1] = this.memory.iovaHigh;
    u32[word + 2] = length;
    u32[word + 3] = last;
  }
}

/** WRITE and INDIRECT of a descriptor. */
export function pieceFlags({ write, indirect }: Piece): number {
  return (write === true ? DescriptorFlag.WRITE : 0) | (indirect === true ? DescriptorFlag.INDIRECT : 0);
}
