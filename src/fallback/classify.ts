/**
 * Finds the IPsec packets of a received burst and their SAs (RFC 4301, 5.2, steps 1 to 3a).
 *
 * Left alone (`notIpsec`) is what is not ESP, AH or UDP-encapsulated ESP: other protocols, other EtherTypes, IKE,
 * keep-alives. What claims to be IPsec has to be whole: fragments are dropped (RFC 4303, 3.4.1; reassemble first), and
 * so is what has no SA. An SA with UDP encapsulation takes encapsulated packets only, one without takes none of them.
 */
import * as fields from '../packet/fields.ts';
import * as pools from '../packet/pool.ts';
import type { DataPath } from './burst.ts';
import * as bursts from './burst.ts';
import { MIXED } from './esp-outbound-simple.ts';
import { Chain, walkIpv6 } from './extension-headers.ts';
import * as table from './sa-table.ts';
import type { SaDatabase } from './sad.ts';
import { classifyDatagram, Datagram, udpChecksumValid } from './udp-encap.ts';
import * as verdictNumbers from './verdict.ts';

// Bound in this module: V8 folds constants of its own module only.
const { Ah, Esp, IpProtocol, Ipv4, Ipv6, Udp } = fields;
const { NO_PACKET } = pools;
const { At, align, Scratch } = bursts;
const { state } = Scratch;
const { RECORD_SHIFT, SaKind, SaWord } = table;
const { Verdict } = verdictNumbers;

const chain = new Uint32Array(Chain.length);

/** Length of the shortest link header that ends in an EtherType. */
const LINK_WITH_TYPE = 14;

/** Fields as their 16-bit words are in memory, bytes swapped. */
const Swapped = {
  ethertypeIpv4: 0x0008,
  ethertypeIpv6: 0xdd86,
  fragmentOffset: 0xff1f,
  moreFragments: 0x0020,
} as const;

/**
 * Looks at packets `start` to `n - 1` of the burst, which begins at `packets[base]`. Fills the burst (record, order, ip, header, udp,
 * nextHeaderAt, end) for those with an SA and `verdicts` for the others. `path.alive` is how many have one, `path.group`
 * the group of all of them, or `MIXED`.
 */
export function classify(
  path: DataPath,
  sad: SaDatabase,
  espPorts: Uint8Array,
  packets: Uint32Array,
  base: number,
  start: number,
  n: number,
  linkHeader: number,
  verdicts: Uint8Array,
): void {
  // hot:
  const { burst } = path;
  const { words } = path.table;
  path.alive = 0;
  path.group = -1;
  for (let i = start; i < n; i++) {
    state[(i << 3) + At.record] = 0;
    const verdict = classifyOne(path, sad, espPorts, packets[base + i], i, linkHeader);
    verdicts[base + i] = verdict;
    if (verdict !== Verdict.ok) continue;
    burst.order[path.alive++] = i;
    const own = words[state[(i << 3) + At.record] + SaWord.group];
    if (own !== path.group) path.group = path.group === -1 ? own : MIXED;
  }
}

/** Looks at packet `p`, at position `i` of the burst; `Verdict.ok` when it has an SA, whose record is then in the burst. */
export function classifyOne(
  path: DataPath,
  sad: SaDatabase,
  espPorts: Uint8Array,
  p: number,
  i: number,
  linkHeader: number,
): number {
  // hot:
  const { pool } = path;
  const { u8, u16, offset: offsets, length: lengths, next } = pool;
  const { words } = path.table;
  const at = (offsets[p] & 1) === 0 ? offsets[p] | 0 : align(pool, p);
  const ip = (at + linkHeader) | 0;
  const available = (lengths[p] - linkHeader) | 0;
  const q = ip >> 1;

  // 1. IPv4 or IPv6, as the link header says.
  if (available < 0) return Verdict.malformed;
  if (linkHeader >= LINK_WITH_TYPE) {
    const type = u16[q - 1];
    if (type !== Swapped.ethertypeIpv4 && type !== Swapped.ethertypeIpv6) return Verdict.notIpsec;
    if (available < Ipv4.minLength || (type === Swapped.ethertypeIpv4 ? 4 : 6) !== u8[ip] >> 4)
      return Verdict.malformed;
  } else if (available < Ipv4.minLength) return Verdict.malformed;

  // 2. The header that may be ESP, AH or UDP.
  const first = u8[ip];
  const version = first >> 4;
  let protocol = 0;
  let header = 0;
  let nextHeaderAt = 0;
  let total = 0;
  let fragment = 0;
  if (version === 4) {
    const headerLength = (first & 15) << 2;
    if (headerLength < Ipv4.minLength) return Verdict.malformed;
    protocol = u16[q + 4] >> 8;
    header = (ip + headerLength) | 0;
    nextHeaderAt = (ip + Ipv4.protocol) | 0;
    const length = u16[q + 1];
    total = ((length & 0xff) << 8) | (length >> 8);
    const word = u16[q + 3];
    if ((word & Swapped.fragmentOffset) !== 0) fragment = 2;
    else if ((word & Swapped.moreFragments) !== 0) fragment = 1;
  } else if (version === 6) {
    if (available < Ipv6.length) return Verdict.malformed;
    const length = u16[q + 2];
    total = (Ipv6.length + ((length & 0xff) << 8)) | 0;
    total = (total + (length >> 8)) | 0;
    protocol = u8[ip + Ipv6.nextHeader];
    header = (ip + Ipv6.length) | 0;
    nextHeaderAt = (ip + Ipv6.nextHeader) | 0;
    if (isExtension(protocol)) {
      if (walkIpv6(u8, ip, ip + Math.min(total, available), false, chain) !== Verdict.ok) return Verdict.malformed;
      protocol = chain[Chain.protocol];
      header = chain[Chain.offset] | 0;
      nextHeaderAt = chain[Chain.nextHeaderAt] | 0;
      fragment = chain[Chain.fragment];
    }
  } else return Verdict.malformed;

  // 3. Is it ours?
  let udp = 0;
  if (protocol !== IpProtocol.esp && protocol !== IpProtocol.ah) {
    const port = (header + Udp.destinationPort) | 0;
    if (
      protocol !== IpProtocol.udp ||
      fragment === 2 ||
      port + 2 - ip > available ||
      espPorts[(u8[port] << 8) | u8[port + 1]] === 0
    ) {
      return Verdict.notIpsec;
    }
    udp = Udp.length;
  }

  // 4. It is: whole, and in one piece.
  if (fragment !== 0) return Verdict.fragment;
  const end = (ip + total) | 0;
  if (next[p] !== NO_PACKET) return Verdict.noRoom;
  if (total > available || header > end) return Verdict.malformed;
  if (version === 4 && !headerChecksumValid(u16, q, header >> 1)) return Verdict.malformed;
  if (udp !== 0) {
    const what = classifyDatagram(u8, header, end);
    if (what === Datagram.other) return Verdict.notIpsec;
    if (what !== Datagram.esp || !udpChecksumValid(u8, ip, header, end - header)) return Verdict.malformed;
    header = (header + udp) | 0;
  }

  // 5. Its SA.
  let spiAt = header >> 1;
  let protocolBit: number = SaKind.esp;
  let least: number = Esp.length;
  if (protocol === IpProtocol.ah) {
    spiAt += Ah.spi >> 1;
    protocolBit = SaKind.ah;
    least = Ah.length;
  }
  if (header + least > end) return Verdict.malformed;
  const spi = u16[spiAt] | (u16[spiAt + 1] << 16);
  const slot = sad.lookup(spi, protocolBit, u16, ip, version);
  const record = slot << RECORD_SHIFT;
  if (slot === 0 || ((words[record + SaWord.kind] & SaKind.udp) !== 0) !== (udp !== 0)) return Verdict.noSa;
  state[(i << 3) + At.packet] = p;
  state[(i << 3) + At.ip] = ip;
  state[(i << 3) + At.header] = header;
  state[(i << 3) + At.nextHeaderAt] = nextHeaderAt;
  state[(i << 3) + At.end] = end;
  state[(i << 3) + At.record] = record;
  return Verdict.ok;
}

function isExtension(protocol: number): boolean {
  // hot:
  return (
    protocol === IpProtocol.hopByHop ||
    protocol === IpProtocol.routing ||
    protocol === IpProtocol.fragment ||
    protocol === IpProtocol.destinationOptions
  );
}

/** A host must drop a packet with a wrong header checksum (RFC 1122, 3.2.1.2). The header is given by 16-bit indices. */
function headerChecksumValid(u16: Uint16Array, from: number, to: number): boolean {
  // hot:
  let sum = 0;
  for (let i = from; i < to; i++) sum = (sum + u16[i]) | 0;
  sum = (sum & 0xffff) + (sum >>> 16);
  return (sum & 0xffff) + (sum >>> 16) === 0xffff;
}
