/**
 * Path MTU (RFC 4301, 8.2): how large a packet an SA can carry over a link, exactly, and the ICMP message that tells its
 * sender (RFC 1191, 4; RFC 4443, 3.2).
 */

import type { Protocol, SecurityAssociation } from '../ipsec/sa.ts';
import { addBytes, checksum, finish, ipv6PseudoSum, setIpv4Checksum } from '../packet/checksum.ts';
import { EtherType, Icmp, IpProtocol, Ipv4, Ipv6, Udp } from '../packet/fields.ts';
import type { PacketPool } from '../packet/pool.ts';
import { transformOf } from './engines/transform.ts';
import { largestEspPayload, type PacketSizes, packetSizes } from './esp.ts';

/** Largest IP packets that a 16-bit length can describe. */
export const MaxPacket = { ipv4: 65535, ipv6: 65535 + Ipv6.length } as const;

/** How an SA wraps a packet: all that decides how much longer it gets. Holds no key. */
export interface Encapsulation {
  readonly protocol: Protocol;
  /** Version of the outer header; undefined in transport mode. */
  readonly outer: 4 | 6 | undefined;
  readonly udp: boolean;
  readonly tfcPadding: number;
  readonly sizes: PacketSizes;
}

/** Throws `IpsecError` `TRANSFORM_UNKNOWN` for algorithms that there are not. */
export function encapsulationOf(sa: SecurityAssociation): Encapsulation {
  return {
    protocol: sa.protocol,
    outer: sa.tunnel === undefined ? undefined : sa.tunnel.source.length === 4 ? 4 : 6,
    udp: sa.udpEncap !== undefined,
    tfcPadding: sa.mode === 'tunnel' ? sa.tfcPadding : 0,
    sizes: packetSizes(transformOf(sa), sa.protocol),
  };
}

/**
 * The largest IP packet, in bytes, that fits: the protected packet is at most `mtu` bytes long (IP packet, no link
 * header); 0 if none fits. In transport mode the packet's headers in front of ESP or AH take `headerLength` bytes
 * (20 for IPv4 without options, 40 for IPv6 without extension headers).
 */
export function largestInner(how: Encapsulation, mtu: number, headerLength: number = Ipv4.minLength): number {
  const { outer, sizes } = how;
  const isV6 = outer === undefined ? headerLength >= Ipv6.length : outer === 6;
  const limit = Math.min(mtu, isV6 ? MaxPacket.ipv6 : MaxPacket.ipv4);
  const kept = outer === undefined ? headerLength : 0;
  const header = outer === undefined ? headerLength : isV6 ? Ipv6.length : Ipv4.minLength;
  const room = limit - header - (how.udp ? Udp.length : 0);
  const payload =
    how.protocol === 'ah' ? room - (isV6 ? sizes.ah6 : sizes.ah4) : largestEspPayload(sizes, room) - how.tfcPadding;
  return payload < 0 ? 0 : Math.min(payload + kept, MaxPacket.ipv6);
}

/** How much of the packet an ICMP message quotes: all that keeps it within the minimum MTU (RFC 1812, 4.3.2.3; RFC 4443, 2.4 c). */
const LARGEST_ERROR = { ipv4: 576, ipv6: 1280 } as const;
const TTL = 64;
/** Type and code of "fragmentation needed and DF set" (RFC 792) and of "packet too big" (RFC 4443, 3.2). */
const TooBig = { ipv4Type: 3, ipv4Code: 4, ipv6Type: 2, ipv6Code: 0 } as const;

/**
 * Writes into packet `out` the ICMP message that tells the sender of `packet` to use packets of at most `mtu` bytes.
 * `source` is the address that it comes from, of the packet's family, in network order. On Ethernet (`linkHeader` 14) the
 * addresses are exchanged. Returns false, with `out` untouched, when RFC 1122, 3.2.2 or RFC 4443, 2.4 e forbid an answer
 * (ICMP errors, fragments but the first, multicast) or when IPv4 may be fragmented (no DF): then it is the caller who
 * fragments.
 */
export function writeTooBig(
  pool: PacketPool,
  out: number,
  packet: number,
  linkHeader: number,
  mtu: number,
  source: Uint8Array,
): boolean {
  const u8 = pool.u8;
  const from = pool.offset[packet] + linkHeader;
  const available = pool.length[packet] - linkHeader;
  const version = u8[from] >>> 4;
  const isV6 = version === 6;
  if (available < (isV6 ? Ipv6.length : Ipv4.minLength) || source.length !== (isV6 ? 16 : 4)) return false;
  if (isV6 ? !mayAnswer6(u8, from) : !mayAnswer4(u8, from, available)) return false;
  const headerLength = isV6 ? Ipv6.length : Ipv4.minLength;
  const quoted = Math.min(available, (isV6 ? LARGEST_ERROR.ipv6 : LARGEST_ERROR.ipv4) - headerLength - Icmp.length);
  const total = headerLength + Icmp.length + quoted;
  const at = pool.slot(out) + pool.headroom;
  if (pool.headroom + linkHeader + total > pool.stride) return false;
  const ip = at + linkHeader;
  u8.fill(0, ip, ip + headerLength + Icmp.length);
  u8.copyWithin(ip + headerLength + Icmp.length, from, from + quoted);
  const icmp = ip + headerLength;
  if (isV6) {
    u8[ip] = 0x60;
    put16(u8, ip + Ipv6.payloadLength, Icmp.length + quoted);
    u8[ip + Ipv6.nextHeader] = IpProtocol.icmpv6;
    u8[ip + Ipv6.hopLimit] = TTL;
    u8.set(source, ip + Ipv6.source);
    u8.copyWithin(ip + Ipv6.destination, from + Ipv6.source, from + Ipv6.source + 16);
    u8[icmp + Icmp.type] = TooBig.ipv6Type;
    u8[icmp + Icmp.code] = TooBig.ipv6Code;
    put16(u8, icmp + 4, mtu >>> 16);
    put16(u8, icmp + 6, mtu & 0xffff);
    const pseudo = ipv6PseudoSum(u8, ip, IpProtocol.icmpv6, Icmp.length + quoted);
    put16(u8, icmp + Icmp.checksum, finish(addBytes(u8, icmp, Icmp.length + quoted, pseudo)));
  } else {
    u8[ip] = 0x45;
    put16(u8, ip + Ipv4.totalLength, total);
    u8[ip + Ipv4.ttl] = TTL;
    u8[ip + Ipv4.protocol] = IpProtocol.icmp;
    u8.set(source, ip + Ipv4.source);
    u8.copyWithin(ip + Ipv4.destination, from + Ipv4.source, from + Ipv4.source + 4);
    setIpv4Checksum(u8, ip, headerLength);
    u8[icmp + Icmp.type] = TooBig.ipv4Type;
    u8[icmp + Icmp.code] = TooBig.ipv4Code;
    put16(u8, icmp + 6, Math.min(mtu, 0xffff));
    put16(u8, icmp + Icmp.checksum, checksum(u8, icmp, Icmp.length + quoted));
  }
  if (linkHeader > 0) {
    u8.copyWithin(at, from - linkHeader, from);
    if (linkHeader >= 14) {
      u8.copyWithin(at, from - linkHeader + 6, from - linkHeader + 12);
      u8.copyWithin(at + 6, from - linkHeader, from - linkHeader + 6);
      put16(u8, ip - 2, isV6 ? EtherType.ipv6 : EtherType.ipv4);
    }
  }
  pool.offset[out] = at;
  pool.length[out] = linkHeader + total;
  return true;
}

function put16(u8: Uint8Array, at: number, value: number): void {
  u8[at] = value >>> 8;
  u8[at + 1] = value & 0xff;
}

/** ICMP messages that are answers or questions, not errors (RFC 792; RFC 1122, 3.2.2). */
const ICMP_QUERIES: ReadonlySet<number> = new Set([0, 8, 9, 10, 13, 14, 15, 16, 17, 18]);

function mayAnswer4(u8: Uint8Array, ip: number, available: number): boolean {
  const fragment = (u8[ip + Ipv4.flagsFragment] << 8) | u8[ip + Ipv4.flagsFragment + 1];
  if ((fragment & 0x1fff) !== 0 || (fragment & 0x4000) === 0) return false;
  const header = (u8[ip] & 15) * 4;
  if (u8[ip + Ipv4.protocol] === IpProtocol.icmp && (header >= available || !ICMP_QUERIES.has(u8[ip + header]))) {
    return false;
  }
  const [source, destination] = [u8[ip + Ipv4.source], u8[ip + Ipv4.destination]];
  return source !== 0 && source !== 127 && source < 224 && destination < 224;
}

function mayAnswer6(u8: Uint8Array, ip: number): boolean {
  // "Packet too big" is the one answer that may go to a packet for a multicast group (RFC 4443, 2.4 e.3).
  if (u8[ip + Ipv6.nextHeader] === IpProtocol.icmpv6 && u8[ip + Ipv6.length] < 128) return false;
  const source = u8.subarray(ip + Ipv6.source, ip + Ipv6.source + 16);
  return source[0] !== 0xff && source.some((byte) => byte !== 0);
}
