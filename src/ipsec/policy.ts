/**
 * Outbound policy: which SA protects a packet (RFC 4301, 4.4.1 and 5.1). Entries are tried in order and the first
 * match wins, as in an SPD; a packet that matches none is to be left alone.
 *
 * In doubt a packet is dropped, never let through: a fragment that does not show the ports or the protocol that an entry
 * asks for (RFC 4301, 7) gives `Verdict.fragment`, an IP packet whose headers cannot be followed `Verdict.malformed`.
 * The search is linear; a table of thousands of entries wants something else.
 */
import { Chain, walkIpv6 } from '../fallback/extension-headers.ts';
import { hasPorts } from '../fallback/selector.ts';
import { Verdict } from '../fallback/verdict.ts';
import { Ethernet, EtherType, IpProtocol, Ipv4, Ipv4Fragment, Ipv6, Ports } from '../packet/fields.ts';
import type { PacketPool } from '../packet/pool.ts';
import type { Prefix, Selector } from './sa.ts';

/** A field of an entry that matches everything. */
const ANY = -1;

/** One entry, compiled to numbers: every entry has the same shape. */
class Entry {
  readonly handle: number;
  /** 4, 6 or `ANY`. */
  readonly family: number;
  readonly protocol: number;
  readonly sourcePort: number;
  readonly destinationPort: number;
  /** Big-endian words and masks; 0 words of an IPv4 entry behind the first are unused. */
  readonly source: Uint32Array;
  readonly sourceMask: Uint32Array;
  readonly destination: Uint32Array;
  readonly destinationMask: Uint32Array;

  constructor(selector: Selector, handle: number) {
    const address = selector.source ?? selector.destination;
    this.handle = handle;
    this.family = address === undefined ? ANY : address.address.length === 4 ? 4 : 6;
    this.protocol = selector.protocol ?? ANY;
    this.sourcePort = selector.sourcePort ?? ANY;
    this.destinationPort = selector.destinationPort ?? ANY;
    [this.source, this.sourceMask] = words(selector.source);
    [this.destination, this.destinationMask] = words(selector.destination);
  }
}

function words(prefix: Prefix | undefined): [Uint32Array, Uint32Array] {
  const value = new Uint32Array(4);
  const mask = new Uint32Array(4);
  if (prefix === undefined) return [value, mask];
  for (let i = 0; i < prefix.address.length / 4; i++) {
    const bits = Math.min(32, Math.max(0, prefix.length - 32 * i));
    mask[i] = bits === 0 ? 0 : 0xffffffff << (32 - bits);
    value[i] = word(prefix.address, 4 * i) & mask[i];
  }
  return [value, mask];
}

function word(u8: Uint8Array, at: number): number {
  // hot:
  return (u8[at] << 24) | (u8[at + 1] << 16) | (u8[at + 2] << 8) | u8[at + 3];
}

function inPrefix(u8: Uint8Array, at: number, count: number, value: Uint32Array, mask: Uint32Array): boolean {
  // hot:
  for (let i = 0; i < count; i++) if (((word(u8, at + 4 * i) ^ value[i]) & mask[i]) !== 0) return false;
  return true;
}

function isExtension(protocol: number): boolean {
  return (
    protocol === IpProtocol.hopByHop ||
    protocol === IpProtocol.routing ||
    protocol === IpProtocol.destinationOptions ||
    protocol === IpProtocol.fragment
  );
}

/** An ordered list of selectors, each with the handle of the SA that protects what matches. */
export class OutboundPolicy {
  readonly #entries: readonly Entry[];
  readonly #chain = new Uint32Array(Chain.length);

  /** Handles are positive. An empty selector matches every IP packet. */
  constructor(entries: readonly { readonly selector: Selector; readonly handle: number }[]) {
    for (const { handle } of entries) {
      if (!Number.isInteger(handle) || handle < 1) throw new RangeError(`handle ${handle} is not a positive integer`);
    }
    this.#entries = entries.map(({ selector, handle }) => new Entry(selector, handle));
  }

  /**
   * Looks up `n` packets that carry `linkHeader` bytes (whose last two are the EtherType) before the IP header; without
   * a link header, every packet is IP. Sets `pool.sa[p]` to the SA's handle or 0, and `verdicts[i]` to `Verdict.ok` (an
   * SA applies), `notIpsec` (none does), `fragment` or `malformed` (drop it).
   */
  classify(pool: PacketPool, packets: Uint32Array, n: number, linkHeader: number, verdicts: Uint8Array): void {
    // hot:
    const u8 = pool.u8;
    for (let i = 0; i < n; i++) {
      const p = packets[i];
      const at = pool.offset[p];
      const verdict = this.#classifyOne(u8, at, at + pool.length[p], linkHeader);
      pool.sa[p] = Math.max(verdict, 0);
      verdicts[i] = verdict > 0 ? Verdict.ok : -verdict;
    }
  }

  /** A positive handle, or a negated verdict. */
  #classifyOne(u8: Uint8Array, start: number, end: number, linkHeader: number): number {
    // hot:
    const ip = start + linkHeader;
    let version = ip < end ? u8[ip] >>> 4 : 0;
    if (linkHeader !== 0) {
      if (ip > end || linkHeader < Ethernet.length) return -Verdict.notIpsec;
      const type = (u8[ip - 2] << 8) | u8[ip - 1];
      const announced = type === EtherType.ipv4 ? 4 : type === EtherType.ipv6 ? 6 : 0;
      if (announced === 0) return -Verdict.notIpsec;
      if (announced !== version) version = 0;
    }
    if (this.#entries.length === 0) return -Verdict.notIpsec;
    const found =
      version === 4 ? this.#ipv4(u8, ip, end) : version === 6 ? this.#ipv6(u8, ip, end) : -Verdict.malformed;
    return found === 0 ? -Verdict.notIpsec : found;
  }

  /** The handle, 0 for none, or a negated verdict. */
  #ipv4(u8: Uint8Array, ip: number, limit: number): number {
    // hot:
    if (ip + Ipv4.minLength > limit) return -Verdict.malformed;
    const header = (u8[ip + Ipv4.versionIhl] & 15) * 4;
    const end = ip + ((u8[ip + Ipv4.totalLength] << 8) | u8[ip + Ipv4.totalLength + 1]);
    if (header < Ipv4.minLength || ip + header > end || end > limit) return -Verdict.malformed;
    const fragment = (u8[ip + Ipv4.flagsFragment] << 8) | u8[ip + Ipv4.flagsFragment + 1];
    const offset = fragment & Ipv4Fragment.offsetMask;
    const fragmented = (fragment & (Ipv4Fragment.offsetMask | Ipv4Fragment.moreFragments)) !== 0;
    return this.#match(u8, ip, 4, u8[ip + Ipv4.protocol], ip + header, end, fragmented, offset !== 0);
  }

  /** The handle, 0 for none, or a negated verdict. */
  #ipv6(u8: Uint8Array, ip: number, limit: number): number {
    // hot:
    if (ip + Ipv6.length > limit) return -Verdict.malformed;
    const payload = (u8[ip + Ipv6.payloadLength] << 8) | u8[ip + Ipv6.payloadLength + 1];
    const end = ip + Ipv6.length + payload;
    if (end > limit) return -Verdict.malformed;
    const chain = this.#chain;
    if (walkIpv6(u8, ip, end, false, chain) !== Verdict.ok) return -Verdict.malformed;
    const fragment = chain[Chain.fragment];
    return this.#match(u8, ip, 6, chain[Chain.protocol], chain[Chain.offset], end, fragment !== 0, fragment === 2);
  }

  #match(
    u8: Uint8Array,
    ip: number,
    family: number,
    protocol: number,
    transport: number,
    end: number,
    fragmented: boolean,
    later: boolean,
  ): number {
    // hot:
    const count = family === 4 ? 1 : 4;
    const source = ip + (family === 4 ? Ipv4.source : Ipv6.source);
    const destination = ip + (family === 4 ? Ipv4.destination : Ipv6.destination);
    const withPorts = hasPorts(protocol);
    const portsVisible = withPorts && !later && transport + Ports.length <= end;
    const sourcePort = portsVisible ? (u8[transport + Ports.source] << 8) | u8[transport + Ports.source + 1] : ANY;
    const destinationPort = portsVisible
      ? (u8[transport + Ports.destination] << 8) | u8[transport + Ports.destination + 1]
      : ANY;
    // Behind a fragment header there may be more extension headers, which are not followed: the protocol is not known.
    const hidden = family === 6 && fragmented && isExtension(protocol);
    const entries = this.#entries;
    for (let i = 0; i < entries.length; i++) {
      const entry = entries[i];
      if (entry.family !== ANY && entry.family !== family) continue;
      if (!inPrefix(u8, source, count, entry.source, entry.sourceMask)) continue;
      if (!inPrefix(u8, destination, count, entry.destination, entry.destinationMask)) continue;
      const wantsPorts = entry.sourcePort !== ANY || entry.destinationPort !== ANY;
      if (hidden && (entry.protocol !== ANY || wantsPorts)) return -Verdict.fragment;
      if (entry.protocol !== ANY && entry.protocol !== protocol) continue;
      if (wantsPorts) {
        if (!withPorts) continue;
        if (!portsVisible) return fragmented ? -Verdict.fragment : -Verdict.malformed;
        if (entry.sourcePort !== ANY && entry.sourcePort !== sourcePort) continue;
        if (entry.destinationPort !== ANY && entry.destinationPort !== destinationPort) continue;
      }
      return entry.handle;
    }
    return 0;
  }
}
