/**
 * Transport mode behind a NAT (RFC 3948, 3.1.2): the checksum of TCP and UDP covers the addresses that the peer sent the
 * packet with, and the NAT could not correct it under ESP.
 *
 * | the SA knows                                 | checksum                                                    |
 * |----------------------------------------------|-------------------------------------------------------------|
 * | an original address (NAT-OA, RFC 3947, 5.2)  | corrected by the difference: what was wrong stays wrong (1) |
 * | none                                         | computed anew, which the ICV has earned (2)                 |
 *
 * A UDP checksum of 0 says that there is none, and stays. Left alone, too: a header that does not fit, a UDP length beyond
 * the packet, other protocols (the RFC speaks of TCP and UDP right behind ESP).
 */
import { addBytes, finish, ipv4PseudoSum, ipv6PseudoSum } from '../packet/checksum.ts';
import { IpProtocol, Ipv4, Ipv6, Tcp, Udp } from '../packet/fields.ts';
import { SaWord } from './sa-table.ts';

/** Set in a word that holds an address: a sum may be 0. */
const KNOWN = 0x10000;

/** What an SA's record keeps of an original address: its sum, or 0 for none. */
export function originalAddress(address: Uint8Array | undefined): number {
  return address === undefined ? 0 : KNOWN | fold(addBytes(address, 0, address.length, 0));
}

/**
 * Corrects the checksum of the TCP or UDP header at `at`, the packet being the one at `ip` that ends at `end`, for the inbound SA
 * of `record`. `protocol` is that of the header.
 */
export function correctChecksum(
  words: Int32Array,
  record: number,
  u8: Uint8Array,
  ip: number,
  at: number,
  end: number,
  protocol: number,
): void {
  // hot:
  let length = end - at;
  let field = at;
  if (protocol === IpProtocol.tcp && length >= Tcp.minLength) field += Tcp.checksum;
  else if (protocol === IpProtocol.udp && length >= Udp.length) {
    field += Udp.checksum;
    const claimed = (u8[at + Udp.udpLength] << 8) | u8[at + Udp.udpLength + 1];
    if (claimed < Udp.length || claimed > length || (u8[field] | u8[field + 1]) === 0) return;
    length = claimed;
  } else return;

  const source = words[record + SaWord.originalSource];
  const destination = words[record + SaWord.originalDestination];
  const isV4 = u8[ip] >>> 4 === 4;
  let check = 0;
  if ((source | destination) === 0) {
    u8[field] = 0;
    u8[field + 1] = 0;
    const pseudo = isV4 ? ipv4PseudoSum(u8, ip, protocol, length) : ipv6PseudoSum(u8, ip, protocol, length);
    check = finish(addBytes(u8, at, length, pseudo));
  } else {
    // RFC 1624, equation 3, with all words of an address at once.
    const size = isV4 ? 4 : 16;
    let sum = ~((u8[field] << 8) | u8[field + 1]) & 0xffff;
    if (source !== 0) {
      sum += (~source & 0xffff) + fold(addBytes(u8, ip + (isV4 ? Ipv4.source : Ipv6.source), size, 0));
    }
    if (destination !== 0) {
      sum += (~destination & 0xffff) + fold(addBytes(u8, ip + (isV4 ? Ipv4.destination : Ipv6.destination), size, 0));
    }
    check = finish(sum);
  }
  if (check === 0 && protocol === IpProtocol.udp) check = 0xffff;
  u8[field] = check >>> 8;
  u8[field + 1] = check & 0xff;
}

/** 16 bits of a sum of 16-bit words, carries added. */
function fold(sum: number): number {
  // hot:
  const once = (sum & 0xffff) + (sum >>> 16);
  return (once & 0xffff) + (once >>> 16);
}
