/**
 * Memory for native libraries: nonces, keys, scratch. Structures hold addresses as two 32-bit words; memory from here never
 * crosses a multiple of 4 GiB, so the upper word of an address is the same for all of it.
 */
import { type AnonymousOptions, type MappedMemory, mapAnonymous, unmapMemory } from '../../sys/memory.ts';

const HIGH = 2 ** 32;

/** Lower 32 bits of an address. */
export function low(address: number): number {
  return address >>> 0;
}

/** Upper bits of an address (below 2^53). */
export function high(address: number): number {
  return Math.floor(address / HIGH);
}

/** Bytes from `address` to the next multiple of 4 GiB. */
export function untilCarry(address: number): number {
  return HIGH - low(address);
}

/** Fresh zeroed memory within one aligned range of 4 GiB, left out of core files. `size` is at most 2^31. */
export function mapUnbroken(size: number, wanted: AnonymousOptions = {}): MappedMemory {
  const options = { ...wanted, secret: true };
  const memory = mapAnonymous(size, options);
  if (memory.size <= untilCarry(memory.address)) return memory;
  // The boundary is inside of that range: while it is held, no other range can contain the boundary.
  const other = mapAnonymous(size, options);
  unmapMemory(memory);
  return other;
}
