/**
 * The chain of headers between the IP header and what it carries (RFC 8200, 4), as far as IPsec needs it: where ESP
 * or AH stands in a received packet, and where it goes in a packet to be sent (RFC 4303, 3.1.1; RFC 4302, 3.1.1).
 *
 * Where a header goes: behind hop-by-hop options, destination options that stand before the upper layer or a routing
 * header, the routing header and an atomic fragment header; destination options that follow a routing header are for
 * the final destination and are protected. RFC 4303 leaves the choice; this one is that of Linux.
 *
 * A walk never leaves the packet and takes at most `MAX_HEADERS` steps. Results go to a caller's `Uint32Array`, so that
 * nothing is allocated. Left out: jumbograms (RFC 2675), which no 16-bit length can describe.
 */
import { IpProtocol, Ipv4, Ipv4Fragment, Ipv6, Ipv6Extension, Ipv6Fragment } from '../packet/fields.ts';
import { Verdict } from './verdict.ts';

/** More headers than this are an attack, not a packet. */
export const MAX_HEADERS = 16;

/** Indices of the result of a walk. */
export const Chain = {
  /** Protocol number of the header where the walk stopped. */
  protocol: 0,
  /** Offset in memory of that header. */
  offset: 1,
  /** Offset in memory of the byte that names that protocol. */
  nextHeaderAt: 2,
  /** 0: whole packet; 1: first fragment; 2: later fragment, of which no header behind the fragment header is visible. */
  fragment: 3,
  length: 4,
} as const;

/**
 * Walks an IPv6 packet of `end - ip` bytes at `ip` up to the first header that is not an extension header, or up to
 * ESP or AH. With `insert` it stops at the place where ESP or AH goes. Returns `Verdict.ok` or `Verdict.malformed`.
 */
export function walkIpv6(u8: Uint8Array, ip: number, end: number, insert: boolean, out: Uint32Array): number {
  let nextHeaderAt = ip + Ipv6.nextHeader;
  let at = ip + Ipv6.length;
  let routed = false;
  out[Chain.fragment] = 0;
  for (let step = 0; step < MAX_HEADERS; step++) {
    const protocol = u8[nextHeaderAt];
    let length = 0;
    if (protocol === IpProtocol.hopByHop) {
      // It may stand only right behind the IPv6 header (RFC 8200, 4.1).
      if (step !== 0) return Verdict.malformed;
      length = -1;
    } else if (protocol === IpProtocol.routing) {
      routed = true;
      length = -1;
    } else if (protocol === IpProtocol.destinationOptions && !(insert && routed)) {
      length = -1;
    } else if (protocol === IpProtocol.fragment) {
      length = Ipv6Fragment.length;
    }
    if (length === 0) {
      out[Chain.protocol] = protocol;
      out[Chain.offset] = at;
      out[Chain.nextHeaderAt] = nextHeaderAt;
      return Verdict.ok;
    }
    if (at + Ipv6Extension.unit > end) return Verdict.malformed;
    if (length < 0) length = (u8[at + Ipv6Extension.lengthUnits] + 1) * Ipv6Extension.unit;
    if (protocol === IpProtocol.fragment) {
      const word = (u8[at + Ipv6Fragment.offsetMore] << 8) | u8[at + Ipv6Fragment.offsetMore + 1];
      if ((word & (Ipv6Fragment.offsetMask | Ipv6Fragment.moreFragments)) !== 0) {
        // What follows in a later fragment is not a header: go by what the first one says it is.
        out[Chain.fragment] = (word & Ipv6Fragment.offsetMask) === 0 ? 1 : 2;
        out[Chain.protocol] = u8[at];
        out[Chain.offset] = at + length;
        out[Chain.nextHeaderAt] = at;
        return Verdict.ok;
      }
    }
    if (at + length > end) return Verdict.malformed;
    nextHeaderAt = at;
    at += length;
  }
  return Verdict.malformed;
}

/**
 * Where ESP or AH goes in the transport-mode packet of `end - ip` bytes at `ip` (RFC 4303, 3.1.1). Returns `Verdict.ok`,
 * `malformed`, or `fragment`: transport mode protects whole packets only (RFC 4303, 3.3.4).
 */
export function insertionPoint(u8: Uint8Array, ip: number, end: number, out: Uint32Array): number {
  if (u8[ip] >>> 4 === 6) {
    const verdict = walkIpv6(u8, ip, end, true, out);
    return verdict === Verdict.ok && out[Chain.fragment] !== 0 ? Verdict.fragment : verdict;
  }
  const fragment = (u8[ip + Ipv4.flagsFragment] << 8) | u8[ip + Ipv4.flagsFragment + 1];
  if ((fragment & (Ipv4Fragment.moreFragments | Ipv4Fragment.offsetMask)) !== 0) return Verdict.fragment;
  out[Chain.protocol] = u8[ip + Ipv4.protocol];
  out[Chain.offset] = ip + (u8[ip] & 15) * 4;
  out[Chain.nextHeaderAt] = ip + Ipv4.protocol;
  out[Chain.fragment] = 0;
  return Verdict.ok;
}
