/**
 * Memory-mapped registers: loads and stores of exactly 8, 16 or 32 bits.
 *
 * Aligned typed-array elements compile to one access of their width in every tier. DataView and Buffer accessors do
 * not,
 * `.set` and `.fill` may use any width, and Atomics on device memory are locked read-modify-writes: none of them is
 * used here. Little-endian machines only, as PCI registers are (Virtio 1.4, 4.1.3.1).
 */
import type { MappedMemory } from './memory.ts';

/**
 * Registers `0` to `size - 1` are the bytes from `start` on of mapped memory. Accesses out of range or not aligned
 * throw RangeError.
 */
export class Registers {
  readonly size: number;
  readonly #start: number;
  readonly #u8: Uint8Array;
  readonly #u16: Uint16Array;
  readonly #u32: Uint32Array;

  constructor(memory: MappedMemory, start = 0, size: number = memory.size - start) {
    if (!Number.isInteger(start) || !Number.isInteger(size) || start < 0 || size < 0 || start % 4 !== 0) {
      throw new RangeError(`registers at ${start}, ${size} bytes: not aligned`);
    }
    if (start + size > Math.min(memory.size, 2 ** 32))
      throw new RangeError(`registers at ${start}, ${size} bytes: outside of the memory`);
    this.size = size;
    this.#start = start;
    this.#u8 = memory.u8;
    this.#u16 = memory.u16;
    this.#u32 = memory.u32;
  }

  read8(offset: number): number {
    return this.#u8[this.#index(offset, 1)];
  }

  read16(offset: number): number {
    return this.#u16[this.#index(offset, 2) >>> 1];
  }

  read32(offset: number): number {
    return this.#u32[this.#index(offset, 4) >>> 2];
  }

  write8(offset: number, value: number): void {
    this.#u8[this.#index(offset, 1)] = value;
  }

  write16(offset: number, value: number): void {
    this.#u16[this.#index(offset, 2) >>> 1] = value;
  }

  write32(offset: number, value: number): void {
    this.#u32[this.#index(offset, 4) >>> 2] = value;
  }

  #index(offset: number, width: number): number {
    checkAccess(offset, width, this.size);
    return this.#start + offset;
  }
}

/** Throws RangeError unless `width` bytes at `offset` are aligned to their width and inside of `size` bytes. */
export function checkAccess(offset: number, width: number, size: number): void {
  // Alignment with a mask: also false for what is not an integer below 2^32.
  if (offset >>> 0 !== offset || (offset & (width - 1)) !== 0 || offset + width > size) {
    throw new RangeError(`access of ${width} bytes at ${offset}: not aligned or outside of ${size} bytes`);
  }
}
