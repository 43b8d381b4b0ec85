/**
 * What happens to an authentic packet, ESP or AH: the window and the lifetime learn of it, the inner packet is checked,
 * the headers close up (RFC 4301, 5.2; RFC 4303, 3.4.4.1; RFC 6040, 4.2).
 *
 * Every address, length and version inside was protected, but by a peer that may be wrong: it is checked like any other.
 */
import { IpProtocol, Ipv4, Ipv6 } from '../packet/fields.ts';
import { PacketFlag } from '../packet/pool.ts';
import type { DataPath } from './burst.ts';
import { renewGrant } from './grant.ts';
import { isNew, markSeen } from './replay.ts';
import { RECORD, SaKind, SaWord } from './sa-table.ts';
import { selectorMatches } from './selector.ts';
import { moveUp, rewriteHeader } from './transport.ts';
import { decrementTtl, ECN_DROP, ecnAfter, setTrafficClass, trafficClass } from './tunnel.ts';
import { Verdict } from './verdict.ts';

/** EtherTypes as their 16-bit words are in memory. */
const ETHERTYPE_IPV4 = 0x0008;
const ETHERTYPE_IPV6 = 0xdd86;

/** Flags that speak of the packet as it was on the wire. */
const STALE_FLAGS =
  PacketFlag.needsChecksum | PacketFlag.checksumValid | PacketFlag.securityError | PacketFlag.softExpiry;

/** Tells the window of number `high`:`low`, unless another copy in the same burst has (RFC 4303, 3.4.3). */
export function accept(path: DataPath, record: number, low: number, high: number): number {
  // hot:
  const table = path.table;
  const words = table.words;
  const topLow = words[record + SaWord.sequenceLow];
  const topHigh = words[record + SaWord.sequenceHigh];
  const window = words[record + SaWord.window];
  if (window !== 0) {
    const windowBase = words[record + SaWord.windowBase];
    const mask = words[record + SaWord.windowMask];
    if (!isNew(table.windows, windowBase, mask, window, topLow, topHigh, low, high)) return Verdict.replay;
    markSeen(table.windows, windowBase, mask, topLow, topHigh, low, high);
  }
  if (high > topHigh || (high === topHigh && low > topLow)) {
    words[record + SaWord.sequenceLow] = low;
    words[record + SaWord.sequenceHigh] = high;
  }
  return Verdict.ok;
}

/** Counts a packet of `bytes` bytes against the lifetime. */
export function charge(path: DataPath, record: number, bytes: number): number {
  // hot:
  const words = path.table.words;
  if (words[record + SaWord.packetsLeft] === 0 || words[record + SaWord.bytesLeft] < bytes) {
    const verdict = renewGrant(path, record, bytes);
    if (verdict !== Verdict.ok) return verdict;
  }
  words[record + SaWord.packetsLeft]--;
  words[record + SaWord.bytesLeft] -= bytes;
  return Verdict.ok;
}

/**
 * Makes the packet `p` what it was before protection: `payload` bytes at `body`, of protocol `nextHeader`.
 * Returns the verdict.
 */
export function deliver(
  path: DataPath,
  p: number,
  position: number,
  record: number,
  body: number,
  payload: number,
  nextHeader: number,
  linkHeader: number,
): number {
  // hot:
  const pool = path.pool;
  const words = path.table.words;
  const kind = words[record + SaWord.kind];
  if ((kind & SaKind.tunnel) === 0) {
    return deliverTransport(path, p, position, record, body, payload, nextHeader, linkHeader);
  }
  const u8 = pool.u8;
  const u16 = pool.u16;

  // 1. The inner packet is of the version that the next header says, and as long as it says (the rest is TFC padding).
  let total = 0;
  if (nextHeader === IpProtocol.ipv4) {
    if (payload < Ipv4.minLength || u8[body] >>> 4 !== 4) return Verdict.malformed;
    const headerLength = (u8[body] & 15) * 4;
    total = (u8[body + Ipv4.totalLength] << 8) | u8[body + Ipv4.totalLength + 1];
    if (headerLength < Ipv4.minLength || total < headerLength) return Verdict.malformed;
  } else if (nextHeader === IpProtocol.ipv6) {
    if (payload < Ipv6.length || u8[body] >>> 4 !== 6) return Verdict.malformed;
    total = Ipv6.length + ((u8[body + Ipv6.payloadLength] << 8) | u8[body + Ipv6.payloadLength + 1]);
  } else return Verdict.malformed;
  if (total > payload) return Verdict.malformed;

  // 2. Lifetime.
  if (words[record + SaWord.packetsLeft] === 0 || words[record + SaWord.bytesLeft] < total) {
    const verdict = renewGrant(path, record, total);
    if (verdict !== Verdict.ok) return verdict;
  }
  words[record + SaWord.packetsLeft]--;
  words[record + SaWord.bytesLeft] -= total;

  // 3. Selector, ECN, TTL.
  const outer = path.burst.ip[position];
  if ((kind & (SaKind.selector | SaKind.ecn | SaKind.decrementTtl)) !== 0) {
    if ((kind & SaKind.selector) !== 0 && !fitsSelector(path, record, body, body + total)) return Verdict.selector;
    if ((kind & SaKind.ecn) !== 0) {
      const inner = trafficClass(u8, body);
      const after = ecnAfter[((inner & 3) << 2) | (trafficClass(u8, outer) & 3)];
      if (after === ECN_DROP) return Verdict.ecn;
      if (after !== (inner & 3)) setTrafficClass(u8, body, (inner & 0xfc) | after);
    }
    if ((kind & SaKind.decrementTtl) !== 0) {
      const verdict = decrementTtl(u8, body);
      if (verdict !== Verdict.ok) return verdict;
    }
  }

  // 4. The link header follows the inner packet.
  const start = body - linkHeader;
  const link16 = linkHeader >>> 1;
  if (link16 !== 0) {
    const from16 = (outer - linkHeader) >>> 1;
    const to16 = start >>> 1;
    for (let w = link16 - 2; w >= 0; w--) u16[to16 + w] = u16[from16 + w];
    u16[to16 + link16 - 1] = nextHeader === IpProtocol.ipv4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6;
  }
  pool.offset[p] = start;
  pool.length[p] = total + linkHeader;
  markSecured(path, p, record);
  return Verdict.ok;
}

/** Transport mode: the IP header moves up to its payload and names its protocol again. */
function deliverTransport(
  path: DataPath,
  p: number,
  position: number,
  record: number,
  body: number,
  payload: number,
  nextHeader: number,
  linkHeader: number,
): number {
  // hot:
  const { pool, burst } = path;
  const outer = burst.ip[position];
  const headerLength = burst.header[position] - outer - burst.udp[position];
  const total = headerLength + payload;
  const verdict = charge(path, record, total);
  if (verdict !== Verdict.ok) return verdict;
  const start = body - headerLength - linkHeader;
  const shift = start + linkHeader - outer;
  moveUp(pool.u16, outer - linkHeader, start, linkHeader + headerLength);
  const ip = start + linkHeader;
  rewriteHeader(pool.u8, ip, total, burst.nextHeaderAt[position] + shift, headerLength, nextHeader);
  if ((path.table.words[record] & SaKind.selector) !== 0 && !fitsSelector(path, record, ip, ip + total)) {
    return Verdict.selector;
  }
  pool.offset[p] = start;
  pool.length[p] = total + linkHeader;
  markSecured(path, p, record);
  return Verdict.ok;
}

function markSecured(path: DataPath, p: number, record: number): void {
  // hot:
  const pool = path.pool;
  const words = path.table.words;
  const soft = (words[record + SaWord.kind] & SaKind.softExpired) !== 0 ? PacketFlag.softExpiry : 0;
  pool.sa[p] = words[record + SaWord.handle];
  pool.flags[p] = (pool.flags[p] & ~STALE_FLAGS) | PacketFlag.secured | soft;
}

function fitsSelector(path: DataPath, record: number, ip: number, end: number): boolean {
  const selector = path.selectors[record / RECORD];
  return selector !== undefined && selectorMatches(selector, path.pool.u8, ip, end);
}
