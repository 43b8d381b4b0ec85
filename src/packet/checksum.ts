/**
 * The Internet checksum (RFC 1071), its incremental update (RFC 1624) and the pseudo headers of the transport
 * protocols (RFC 793 and 768 over IPv4; RFC 8200, 8.1 over IPv6).
 *
 * Everything works on a `Uint8Array` and a byte offset and allocates nothing. A *sum* is the plain sum of big-endian
 * 16-bit words, not yet folded; it stays below 2^32 for anything an IP packet can hold. A *checksum* is the 16-bit
 * number that stands in a header.
 */
import { Ipv4, Ipv6 } from './fields.ts';

/** Adds the `length` bytes at `offset` to `sum`; an odd last byte counts as the upper half of a word (RFC 1071, 1). */
export function addBytes(u8: Uint8Array, offset: number, length: number, sum: number): number {
  // hot:
  const end = offset + length;
  const evenEnd = end - (length & 1);
  let total = sum;
  for (let i = offset; i < evenEnd; i += 2) total += (u8[i] << 8) | u8[i + 1];
  if (evenEnd !== end) total += u8[evenEnd] << 8;
  return total;
}

/**
 * As `addBytes`, for an even `offset`: reads two bytes at once. `u8` and `u16` are views of the same memory. Words are added as this machine has
 * them, which is little-endian, and the folded sum is turned around (RFC 1071, 2 (B)). `length` is at most 65535.
 */
export function addWords(u16: Uint16Array, u8: Uint8Array, offset: number, length: number, sum: number): number {
  // hot:
  let w = offset >>> 1;
  const end = (offset + length) >>> 1;
  let total = 0;
  // Four at a time: what an access to an array costs besides the access itself is then paid once for four.
  for (; w + 4 <= end; w += 4) total = (total + u16[w] + u16[w + 1] + u16[w + 2] + u16[w + 3]) | 0;
  for (; w < end; w++) total = (total + u16[w]) | 0;
  let folded = (total >>> 16) + (total & 0xffff);
  folded = (folded >>> 16) + (folded & 0xffff);
  const swapped = ((folded & 0xff) << 8) | (folded >>> 8);
  return sum + swapped + ((length & 1) === 0 ? 0 : u8[offset + length - 1] << 8);
}

/** Folds a sum to 16 bits and complements it. */
export function finish(sum: number): number {
  // hot:
  let folded = (sum >>> 16) + (sum & 0xffff);
  folded = (folded >>> 16) + (folded & 0xffff);
  return ~folded & 0xffff;
}

/** The checksum over the `length` bytes at `offset`. Over data that contains a right checksum it is 0. */
export function checksum(u8: Uint8Array, offset: number, length: number): number {
  // hot:
  return finish(addBytes(u8, offset, length, 0));
}

/** Puts the checksum into the IPv4 header of `headerLength` bytes at `ip`. */
export function setIpv4Checksum(u8: Uint8Array, ip: number, headerLength: number): void {
  // hot:
  u8[ip + Ipv4.checksum] = 0;
  u8[ip + Ipv4.checksum + 1] = 0;
  const value = checksum(u8, ip, headerLength);
  u8[ip + Ipv4.checksum] = value >>> 8;
  u8[ip + Ipv4.checksum + 1] = value & 0xff;
}

/**
 * The checksum after one 16-bit word under it changed from `before` to `after`: HC' = ~(~HC + ~m + m') (RFC 1624,
 * equation 3, which never yields the wrong zero).
 */
export function updateChecksum(old: number, before: number, after: number): number {
  // hot:
  return finish((~old & 0xffff) + (~before & 0xffff) + after);
}

/** Sum of the IPv4 pseudo header for `protocol` and `length` bytes of transport header and data; addresses are taken from the header at `ip`. */
export function ipv4PseudoSum(u8: Uint8Array, ip: number, protocol: number, length: number): number {
  // hot:
  return addBytes(u8, ip + Ipv4.source, 8, protocol + length);
}

/** Sum of the IPv6 pseudo header (RFC 8200, 8.1); addresses are taken from the header at `ip`. */
export function ipv6PseudoSum(u8: Uint8Array, ip: number, protocol: number, length: number): number {
  // hot:
  return addBytes(u8, ip + Ipv6.source, 32, protocol + (length >>> 16) + (length & 0xffff));
}
