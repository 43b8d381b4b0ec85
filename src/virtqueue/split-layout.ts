/**
 * Where the parts of a split virtqueue are in its memory (Virtio 1.4, 2.7).
 *
 * ```
 *   | descriptor table 16 * size | available ring 6 + 2 * size | used ring 6 + 8 * size | indirect tables |
 *     written by the driver        written by the driver         written by the device    by the driver
 * ```
 */
import { VirtioError } from '../errors.ts';

/** `struct virtq_desc` (2.7.5), in 32-bit words: address low, address high, length, flags and next. */
export const DESCRIPTOR_BYTES = 16;
export const DESCRIPTOR_WORDS = 4;
export const DescriptorFlag = { NEXT: 1, WRITE: 2, INDIRECT: 4 } as const;
/** `next` is the upper half of the last word. */
export const NEXT_SHIFT = 16;

/** `struct virtq_avail` and `struct virtq_used` (2.7.6, 2.7.8), in 16-bit units. */
export const RingField = { flags: 0, idx: 1, ring: 2 } as const;
export const NO_NOTIFICATIONS = 1;

/** Largest queue (2.7). */
const MAX_QUEUE_SIZE = 32768;
/** Parts start on cache lines of their own: one side writes each. The standard asks for 16, 2 and 4 bytes. */
const PART_ALIGNMENT = 64;

export interface SplitVirtqueueOptions {
  /** Index of the queue on the device. */
  readonly index: number;
  /** Number of descriptors: a power of two, 1 to 32768. */
  readonly size: number;
  /** True when EVENT_IDX was negotiated. */
  readonly eventIdx?: boolean;
  /** Entries of each buffer's indirect table; 0 (the default) when INDIRECT_DESC was not negotiated or is not wanted. */
  readonly indirectEntries?: number;
  /** IOVA that `offset` of `postBurst` counts from: the packet pool's. */
  readonly iovaLow?: number;
  readonly iovaHigh?: number;
  /** Bytes in front of `offset` that belong to each buffer of `postBurst`: the packet header's. Default 0. */
  readonly headroom?: number;
}

/** Byte offsets of the parts; the descriptor table is at 0. */
export interface SplitLayout {
  readonly driver: number;
  readonly device: number;
  readonly indirect: number;
  readonly bytes: number;
}

export function splitLayout(size: number, indirectEntries: number): SplitLayout {
  const align = (n: number) => Math.ceil(n / PART_ALIGNMENT) * PART_ALIGNMENT;
  const driver = align(DESCRIPTOR_BYTES * size);
  const device = align(driver + 6 + 2 * size);
  const indirect = align(device + 6 + 8 * size);
  return { driver, device, indirect, bytes: indirect + size * indirectEntries * DESCRIPTOR_BYTES };
}

/** Throws `VirtioError` QUEUE_SIZE. */
export function checkSize(index: number, size: number): void {
  const power = Number.isInteger(size) && size >= 1 && size <= MAX_QUEUE_SIZE && (size & (size - 1)) === 0;
  if (!power) {
    throw new VirtioError(
      'QUEUE_SIZE',
      `queue ${index}: size ${size} is not a power of two from 1 to ${MAX_QUEUE_SIZE}`,
    );
  }
}

/** Bytes of memory that a queue needs. Throws `VirtioError` QUEUE_SIZE. */
export function splitVirtqueueBytes(options: SplitVirtqueueOptions): number {
  checkSize(options.index, options.size);
  return splitLayout(options.size, options.indirectEntries ?? 0).bytes;
}
