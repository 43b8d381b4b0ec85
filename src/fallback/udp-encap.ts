/**
 * UDP encapsulation of ESP (RFC 3948): telling ESP, IKE and keep-alives apart, and the checksum.
 *
 * | first bytes of the payload    | what it is        |                       |
 * |-------------------------------|-------------------|-----------------------|
 * | one byte 0xff                 | NAT keep-alive    | left alone (2.3)      |
 * | four zero bytes               | IKE               | left alone (2.2)      |
 * | no more than an ESP header    | not ESP           | left alone            |
 * | an SPI, which is never 0      | ESP               | ours (2.1)            |
 *
 * The checksum over IPv4 is 0 (2.1); over IPv6 it is computed, and a zero one is refused (RFC 8200, 8.1: zero needs
 * an agreement that RFC 6935 describes and that this SA does not carry). A checksum that is not zero is verified.
 * `nat.ts` corrects the inner checksums that a NAT broke in transport mode (3.1.2).
 */
import { addBytes, finish, ipv4PseudoSum, ipv6PseudoSum } from '../packet/checksum.ts';
import { Esp, IpProtocol, Udp } from '../packet/fields.ts';

/** What a UDP datagram to a port of ours is. */
export const Datagram = { esp: 0, other: 1, malformed: 2 } as const;

/** Classifies the UDP datagram at `udp` in the packet that ends at `end`. */
export function classifyDatagram(u8: Uint8Array, udp: number, end: number): number {
  // hot:
  if (udp + Udp.length > end) return Datagram.malformed;
  const length = (u8[udp + Udp.udpLength] << 8) | u8[udp + Udp.udpLength + 1];
  if (length < Udp.length || udp + length > end) return Datagram.malformed;
  const data = udp + Udp.length;
  const size = length - Udp.length;
  // Keep-alives, and whatever else is too short to be ESP.
  if (size <= Esp.length) return Datagram.other;
  if ((u8[data] | u8[data + 1] | u8[data + 2] | u8[data + 3]) === 0) return Datagram.other;
  return udp + length === end ? Datagram.esp : Datagram.malformed;
}

/** Whether the checksum of the datagram of `length` bytes at `udp` in the IP packet at `ip` is right or rightly absent. */
export function udpChecksumValid(u8: Uint8Array, ip: number, udp: number, length: number): boolean {
  // hot:
  const version = u8[ip] >>> 4;
  if ((u8[udp + Udp.checksum] | u8[udp + Udp.checksum + 1]) === 0) return version === 4;
  const pseudo =
    version === 4 ? ipv4PseudoSum(u8, ip, IpProtocol.udp, length) : ipv6PseudoSum(u8, ip, IpProtocol.udp, length);
  return finish(addBytes(u8, udp, length, pseudo)) === 0;
}

/** Computes the checksum of the datagram at `udp` in the IPv6 packet at `ip`; a result of 0 is sent as 0xffff (RFC 768). */
export function writeUdp6Checksum(u8: Uint8Array, ip: number, udp: number): void {
  // hot:
  const length = (u8[udp + Udp.udpLength] << 8) | u8[udp + Udp.udpLength + 1];
  u8[udp + Udp.checksum] = 0;
  u8[udp + Udp.checksum + 1] = 0;
  let check = finish(addBytes(u8, udp, length, ipv6PseudoSum(u8, ip, IpProtocol.udp, length)));
  if (check === 0) check = 0xffff;
  u8[udp + Udp.checksum] = check >>> 8;
  u8[udp + Udp.checksum + 1] = check & 0xff;
}
