/**
 * Finds the IPsec packets of a received burst and their SAs (RFC 4301, 5.2, steps 1 to 3a).
 *
 * Left alone (`notIpsec`) is what is not ESP, AH or UDP-encapsulated ESP: other protocols, other EtherTypes, IKE,
 * keep-alives. What claims to be IPsec has to be whole: fragments are dropped (RFC 4303, 3.4.1; reassemble first), and
 * so is what has no SA. An SA with UDP encapsulation takes encapsulated packets only, one without takes none of them.
 */
import { EtherType, IpProtocol, Ipv4, Ipv4Fragment, Ipv6, Udp } from '../packet/fields.ts';
import { NO_PACKET } from '../packet/pool.ts';
import { type DataPath, normalize } from './burst.ts';
import { Chain, walkIpv6 } from './extension-headers.ts';
import { RECORD, SaKind, SaWord } from './sa-table.ts';
import type { SaDatabase } from './sad.ts';
import { classifyDatagram, Datagram, udpChecksumValid } from './udp-encap.ts';
import { Verdict } from './verdict.ts';

const chain = new Uint32Array(Chain.length);

/** Length of the shortest link header that ends in an EtherType. */
const LINK_WITH_TYPE = 14;

/**
 * Looks at `n` packets from `packets[base]`. Fills the burst (record, order, ip, header, udp, nextHeaderAt, end) for those with an SA
 * and `verdicts` for the others. Returns how many have one; the result is negative when they are of several groups.
 */
export function classify(
  path: DataPath,
  sad: SaDatabase,
  espPorts: Uint8Array,
  packets: Uint32Array,
  base: number,
  n: number,
  linkHeader: number,
  verdicts: Uint8Array,
): number {
  // hot:
  const pool = path.pool;
  const u8 = pool.u8;
  const offsets = pool.offset;
  const lengths = pool.length;
  const words = path.table.words;
  const burst = path.burst;
  const records = burst.record;
  const order = burst.order;
  let alive = 0;
  let group = -1;
  let mixed = false;

  for (let i = 0; i < n; i++) {
    const p = packets[base + i];
    const at = offsets[p];
    const ip = at + linkHeader;
    const available = lengths[p] - linkHeader;
    records[i] = 0;
    verdicts[base + i] = Verdict.malformed;

    // 1. IPv4 or IPv6, as the link header says.
    if (linkHeader >= LINK_WITH_TYPE) {
      if (available < 0) continue;
      const type = (u8[ip - 2] << 8) | u8[ip - 1];
      if (type !== (u8[ip] >>> 4 === 4 ? EtherType.ipv4 : EtherType.ipv6)) {
        if (type !== EtherType.ipv4 && type !== EtherType.ipv6) verdicts[base + i] = Verdict.notIpsec;
        continue;
      }
    }
    if (available < Ipv4.minLength) continue;
    const version = u8[ip] >>> 4;

    // 2. The header that may be ESP, AH or UDP.
    let protocol = 0;
    let header = 0;
    let nextHeaderAt = 0;
    let total = 0;
    let fragment = 0;
    if (version === 4) {
      const headerLength = (u8[ip] & 15) * 4;
      if (headerLength < Ipv4.minLength) continue;
      protocol = u8[ip + Ipv4.protocol];
      header = ip + headerLength;
      nextHeaderAt = ip + Ipv4.protocol;
      total = (u8[ip + Ipv4.totalLength] << 8) | u8[ip + Ipv4.totalLength + 1];
      const word = (u8[ip + Ipv4.flagsFragment] << 8) | u8[ip + Ipv4.flagsFragment + 1];
      if ((word & Ipv4Fragment.offsetMask) !== 0) fragment = 2;
      else if ((word & Ipv4Fragment.moreFragments) !== 0) fragment = 1;
    } else if (version === 6) {
      if (available < Ipv6.length) continue;
      total = Ipv6.length + ((u8[ip + Ipv6.payloadLength] << 8) | u8[ip + Ipv6.payloadLength + 1]);
      protocol = u8[ip + Ipv6.nextHeader];
      header = ip + Ipv6.length;
      nextHeaderAt = ip + Ipv6.nextHeader;
      if (isExtension(protocol)) {
        if (walkIpv6(u8, ip, ip + Math.min(total, available), false, chain) !== Verdict.ok) continue;
        protocol = chain[Chain.protocol];
        header = chain[Chain.offset];
        nextHeaderAt = chain[Chain.nextHeaderAt];
        fragment = chain[Chain.fragment];
      }
    } else continue;

    // 3. Is it ours?
    let udp = 0;
    if (protocol === IpProtocol.udp) {
      const port = header + Udp.destinationPort;
      if (fragment === 2 || port + 2 > at + lengths[p] || espPorts[(u8[port] << 8) | u8[port + 1]] === 0) {
        verdicts[base + i] = Verdict.notIpsec;
        continue;
      }
      udp = Udp.length;
    } else if (protocol !== IpProtocol.esp && protocol !== IpProtocol.ah) {
      verdicts[base + i] = Verdict.notIpsec;
      continue;
    }

    // 4. It is: whole, in one piece, at an even offset.
    if (fragment !== 0) {
      verdicts[base + i] = Verdict.fragment;
      continue;
    }
    const end = ip + total;
    if (pool.next[p] !== NO_PACKET) {
      verdicts[base + i] = Verdict.noRoom;
      continue;
    }
    if (total > available || header > end) continue;
    if ((at & 1) !== 0) {
      // Once more, from where it is now.
      const verdict = normalize(path, p);
      if (verdict === Verdict.ok) i--;
      else verdicts[base + i] = verdict;
      continue;
    }
    if (version === 4 && !headerChecksumValid(pool.u16, ip, header)) continue;
    if (udp !== 0) {
      const what = classifyDatagram(u8, header, end);
      if (what === Datagram.other) verdicts[base + i] = Verdict.notIpsec;
      if (what !== Datagram.esp || !udpChecksumValid(u8, ip, header, end - header)) continue;
      header += udp;
    }

    // 5. Its SA.
    const isAh = protocol === IpProtocol.ah;
    const spiAt = isAh ? header + 4 : header;
    if (header + (isAh ? 12 : 8) > end) continue;
    const spi = (u8[spiAt] | (u8[spiAt + 1] << 8) | (u8[spiAt + 2] << 16) | (u8[spiAt + 3] << 24)) >>> 0;
    const slot = sad.lookup(spi, isAh ? SaKind.ah : SaKind.esp, u8, ip);
    const record = slot * RECORD;
    if (slot === 0 || ((words[record + SaWord.kind] & SaKind.udp) !== 0) !== (udp !== 0)) {
      verdicts[base + i] = Verdict.noSa;
      continue;
    }
    burst.ip[i] = ip;
    burst.header[i] = header;
    burst.udp[i] = udp;
    burst.nextHeaderAt[i] = nextHeaderAt;
    burst.end[i] = end;
    records[i] = record;
    order[alive++] = i;
    const own = words[record + SaWord.group];
    if (group < 0) group = own;
    else if (own !== group) mixed = true;
  }
  return mixed ? -alive : alive;
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

/** A host must drop a packet with a wrong header checksum (RFC 1122, 3.2.1.2). */
function headerChecksumValid(u16: Uint16Array, ip: number, end: number): boolean {
  // hot:
  let sum = 0;
  for (let i = ip >>> 1; i < end >>> 1; i++) sum += u16[i];
  sum = (sum & 0xffff) + (sum >>> 16);
  return (sum & 0xffff) + (sum >>> 16) === 0xffff;
}
