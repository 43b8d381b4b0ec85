/**
 * What split and packed virtqueues share: the size and flags of a descriptor (Virtio 1.4, 2.7.5 and 2.8.13), and the pieces
 * of a chain.
 */
import { VirtioError } from '../errors.ts';

/** 32-bit words: address low, address high, length, and one that the formats use differently. */
export const DESCRIPTOR_BYTES = 16;
export const DESCRIPTOR_WORDS = 4;
export const DescriptorFlag = { NEXT: 1, WRITE: 2, INDIRECT: 4 } as const;

/** Largest queue (2.7, 2.8). */
export const MAX_QUEUE_SIZE = 32768;

/** Parts start on cache lines of their own: one side writes each. The standard asks for 16 bytes at most. */
const PART_ALIGNMENT = 64;

export function alignPart(offset: number): number {
  return Math.ceil(offset / PART_ALIGNMENT) * PART_ALIGNMENT;
}

/** Throws `VirtioError` QUEUE_SIZE unless `size` is from 1 to 32768, and a power of two if it must be. */
export function checkQueueSize(index: number, size: number, powerOfTwo: boolean): void {
  const inRange = Number.isInteger(size) && size >= 1 && size <= MAX_QUEUE_SIZE;
  if (inRange && (!powerOfTwo || (size & (size - 1)) === 0)) return;
  const what = powerOfTwo ? 'a power of two' : 'a number';
  throw new VirtioError('QUEUE_SIZE', `queue ${index}: size ${size} is not ${what} from 1 to ${MAX_QUEUE_SIZE}`);
}

/**
 * Bytes that the device may write into a chain. Throws RangeError for a chain that a queue of `size` must not
 * have (2.7.5.3.1, 2.8.19: with an indirect table too), or whose length cannot be said.
 */
export function chainCapacity(size: number, pieces: Uint32Array, readable: number, writable: number): number {
  const count = readable + writable;
  if (count > size) throw new RangeError(`a chain of ${count} pieces in a queue of ${size}`);
  let capacity = 0;
  for (let i = readable; i < count; i++) capacity += pieces[3 * i + 2];
  if (capacity >= 0xffffffff) throw new RangeError(`a buffer of ${capacity} writable bytes`);
  return capacity;
}

/** Writes address and length of piece `i` of a chain to the descriptor at word `w`, and `last` as its fourth word. */
export function writePiece(u32: Uint32Array, w: number, pieces: Uint32Array, i: number, last: number): void {
  u32[w] = pieces[3 * i];
  u32[w + 1] = pieces[3 * i + 1];
  u32[w + 2] = pieces[3 * i + 2];
  u32[w + 3] = last;
}
