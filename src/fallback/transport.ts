/**
 * Headers in transport mode (RFC 4303, 3.1.1; RFC 4302, 3.1.1): they move to make or close the gap in which ESP or AH
 * stands, and lengths, protocol and checksum follow.
 */
import { IpProtocol, Ipv4, Ipv6 } from '../packet/fields.ts';

/** Moves `length` bytes from `from` to `to`, at least four bytes below it. All are even. */
export function moveDown(u16: Uint16Array, u32: Uint32Array, from: number, to: number, length: number): void {
  // hot:
  let done = 0;
  if (((from | to) & 3) === 0) {
    const source = from >> 2;
    const target = to >> 2;
    const count = length >> 2;
    for (let i = 0; i < count; i++) u32[target + i] = u32[source + i];
    done = count << 1;
  }
  const source = from >> 1;
  const target = to >> 1;
  const count = length >> 1;
  for (let i = done; i < count; i++) u16[target + i] = u16[source + i];
}

/** Moves `length` bytes from `from` to `to`, at least four bytes above it. All are even. */
export function moveUp(u16: Uint16Array, u32: Uint32Array, from: number, to: number, length: number): void {
  // hot:
  const source = from >> 1;
  const target = to >> 1;
  const aligned = ((from | to) & 3) === 0 ? length & ~3 : 0;
  for (let i = (length >> 1) - 1; i >= aligned >> 1; i--) u16[target + i] = u16[source + i];
  for (let i = (aligned >> 2) - 1; i >= 0; i--) u32[(to >> 2) + i] = u32[(from >> 2) + i];
}

/**
 * Makes the IP header of `headerLength` bytes (extension headers included) at `ip` say that the packet is `total` bytes
 * long and that the header after it is `protocol`. `nextHeaderAt` is the offset of the byte that names it.
 */
export function rewriteHeader(
  u8: Uint8Array,
  ip: number,
  total: number,
  nextHeaderAt: number,
  headerLength: number,
  protocol: number,
): void {
  // hot:
  u8[nextHeaderAt] = protocol;
  if (u8[ip] >>> 4 === 6) {
    const payload = total - Ipv6.length;
    u8[ip + Ipv6.payloadLength] = payload >>> 8;
    u8[ip + Ipv6.payloadLength + 1] = payload;
    return;
  }
  u8[ip + Ipv4.totalLength] = total >>> 8;
  u8[ip + Ipv4.totalLength + 1] = total;
  u8[ip + Ipv4.checksum] = 0;
  u8[ip + Ipv4.checksum + 1] = 0;
  let sum = 0;
  for (let i = ip; i < ip + headerLength; i += 2) sum += (u8[i] << 8) | u8[i + 1];
  sum = (sum & 0xffff) + (sum >>> 16);
  sum = ~((sum & 0xffff) + (sum >>> 16)) & 0xffff;
  u8[ip + Ipv4.checksum] = sum >>> 8;
  u8[ip + Ipv4.checksum + 1] = sum & 0xff;
}

/** What stands behind the IP header of a protected packet: UDP when it is encapsulated, else the protocol itself. */
export function carrier(protocol: number, udp: boolean): number {
  return udp ? IpProtocol.udp : protocol;
}
