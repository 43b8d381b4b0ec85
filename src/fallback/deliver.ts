/**
 * What happens to an authentic packet, ESP or AH: the window and the lifetime learn of it, the inner packet is checked,
 * the headers close up (RFC 4301, 5.2; RFC 4303, 3.4.4.1; RFC 6040, 4.2).
 *
 * Every address, length and version inside was protected, but by a peer that may be wrong: it is checked like any other.
 */
import * as fields from '../packet/fields.ts';
import * as pools from '../packet/pool.ts';
import { restoreHeaders } from './ah-saved.ts';
import type { DataPath, Group } from './burst.ts';
import * as bursts from './burst.ts';
import * as engines from './engines/engine.ts';
import { closeEsnGap } from './esn-gap.ts';
import { completeSimple } from './esp-inbound-simple.ts';
import { renewGrant } from './grant.ts';
import { correctChecksum } from './nat.ts';
import { isNew, markSeen } from './replay.ts';
import * as table from './sa-table.ts';
import { selectorMatches } from './selector.ts';
import { moveUp, rewriteHeader } from './transport.ts';
import { decrementTtl, ECN_DROP, ecnAfter, setTrafficClass, trafficClass } from './tunnel.ts';
import * as verdictNumbers from './verdict.ts';

// Bound in this module: V8 folds constants of its own module only.
const { Ah, Esp, Ethernet, IpProtocol, Ipv4, Ipv6, Udp } = fields;
const { PacketFlag } = pools;
const { At, Scratch } = bursts;
const { position: positions, state } = Scratch;
const { cipherLength, cipherOffset, status } = Scratch.jobs;
const { JobStatus } = engines;
const { drop, RECORD, SaKind, SaWord } = table;
const { Verdict } = verdictNumbers;

/** EtherTypes as their 16-bit words are in memory. */
const ETHERTYPE_IPV4 = 0x0008;
const ETHERTYPE_IPV6 = 0xdd86;

/** Failures in a row are not counted further. */
const MAX_FAILURES = 1 << 20;

/** Flags that speak of the packet as it was on the wire. */
const STALE_FLAGS =
  PacketFlag.needsChecksum | PacketFlag.checksumValid | PacketFlag.securityError | PacketFlag.softExpiry;

/**
 * Goes through the jobs of a run after the engine: drops what failed, tells the window, reads the trailer of ESP, and makes
 * of each packet what it was before protection. Verdicts go to `verdicts[base + position]`.
 */
export function complete(
  path: DataPath,
  group: Group,
  packets: Uint32Array,
  base: number,
  linkHeader: number,
  verdicts: Uint8Array,
): void {
  // hot:
  const { burst, table } = path;
  const { count } = burst.jobs;
  const isSimpleLink = linkHeader === 0 || linkHeader === Ethernet.length;
  const isSimple = group.protocol === 'esp' && group.family === 'aead' && isSimpleLink;
  for (let j = 0; j < count; j++) {
    if (isSimple) {
      j = completeSimple(path, base, j, linkHeader, verdicts);
      if (j === count) break;
    }
    const position = positions[j];
    const verdict = completeOne(path, group, packets[base + position], position, j, linkHeader);
    verdicts[base + position] = verdict;
    if (verdict !== Verdict.ok) drop(table, state[(position << 3) + At.record], verdict);
  }
}

/** Job `j`, of packet `p`; returns the verdict. */
function completeOne(path: DataPath, group: Group, p: number, position: number, j: number, linkHeader: number): number {
  // hot:
  const { pool, burst } = path;
  const { u8, u16, u32 } = pool;
  const { words, windows } = path.table;
  const { jobs } = burst;
  const record = state[(position << 3) + At.record];
  const isEsp = group.protocol === 'esp';
  const gap = isEsp && group.family === 'gmac' && group.esn;

  // 1. The ICV.
  if (status[j] !== JobStatus.ok) {
    if (words[record + SaWord.failures] < MAX_FAILURES) words[record + SaWord.failures]++;
    return status[j] === JobStatus.icv ? Verdict.icv : Verdict.engine;
  }
  if (gap) closeEsnGap(u16, jobs.authOffset[j] + 4, burst.savedA[position]);

  // 2. The window learns of the number, unless another copy in the same burst was faster (RFC 4303, 3.4.3).
  const low = state[(position << 3) + At.low];
  const high = state[(position << 3) + At.high];
  const topLow = words[record + SaWord.sequenceLow];
  const topHigh = words[record + SaWord.sequenceHigh];
  const window = words[record + SaWord.window];
  words[record + SaWord.failures] = 0;
  if (window !== 0) {
    const windowBase = words[record + SaWord.windowBase];
    const mask = words[record + SaWord.windowMask];
    if (!isNew(windows, windowBase, mask, window, topLow, topHigh, low, high)) return Verdict.replay;
    markSeen(windows, windowBase, mask, topLow, topHigh, low, high);
  }
  if (high === topHigh ? low >>> 0 > topLow >>> 0 : high >>> 0 > topHigh >>> 0) {
    words[record + SaWord.sequenceLow] = low;
    words[record + SaWord.sequenceHigh] = high;
  }

  // 3. ESP: the trailer (RFC 4303, 2.4 to 2.7). AH: what follows it.
  let body = 0;
  let payload = 0;
  let nextHeader = 0;
  if (isEsp) {
    body = cipherOffset[j] | 0;
    const trailer = (body + cipherLength[j] - Esp.trailerLength) | 0;
    const padLength = u8[trailer];
    nextHeader = u8[trailer + 1];
    payload = (trailer - body - padLength) | 0;
    let pad = payload < 0 ? 0 : padLength;
    while (pad > 0 && u8[trailer - 1 - padLength + pad] === pad) pad--;
    if (payload < 0 || pad !== 0) return Verdict.malformed;
    if (nextHeader === IpProtocol.none) {
      const verdict = charge(path, record, 0);
      return verdict === Verdict.ok ? Verdict.dummy : verdict;
    }
  } else {
    const ah = state[(position << 3) + At.header];
    restoreHeaders(u8, position, state[(position << 3) + At.ip], ah);
    body = (ah + (u8[ah + Ah.payloadLength] + 2) * 4) | 0;
    payload = (state[(position << 3) + At.end] - body) | 0;
    nextHeader = u8[ah + Ah.nextHeader];
  }
  const kind = words[record + SaWord.kind];
  if ((kind & SaKind.tunnel) === 0) {
    return deliverTransport(path, p, position, record, body, payload, nextHeader, linkHeader);
  }

  // 4. The inner packet is of the version that the next header says, and as long as it says (the rest is TFC padding).
  const first = u8[body];
  let total = 0;
  if (nextHeader === IpProtocol.ipv4 && payload >= Ipv4.minLength && first >> 4 === 4) {
    const length = u16[(body >> 1) + 1];
    total = ((length & 0xff) << 8) | (length >> 8);
    const headerLength = (first & 15) << 2;
    if (headerLength < Ipv4.minLength || headerLength > total) total = 0;
  } else if (nextHeader === IpProtocol.ipv6 && payload >= Ipv6.length && first >> 4 === 6) {
    const length = u16[(body >> 1) + 2];
    total = (Ipv6.length + (((length & 0xff) << 8) | (length >> 8))) | 0;
  }
  if (total === 0 || total > payload) return Verdict.malformed;

  // 5. Lifetime, selector, ECN, TTL.
  if (words[record + SaWord.packetsLeft] === 0 || words[record + SaWord.bytesLeft] < total) {
    const verdict = renewGrant(path, record, total);
    if (verdict !== Verdict.ok) return verdict;
  }
  words[record + SaWord.packetsLeft]--;
  words[record + SaWord.bytesLeft] -= total;
  const outer = state[(position << 3) + At.ip];
  if ((kind & CHECKED) !== 0) {
    const verdict = checkInner(path, record, kind, outer, body, body + total);
    if (verdict !== Verdict.ok) return verdict;
  }

  // 6. The link header follows the inner packet.
  const start = (body - linkHeader) | 0;
  if (linkHeader !== 0) {
    moveUp(u16, u32, outer - linkHeader, start, linkHeader - 2);
    u16[(body >> 1) - 1] = nextHeader === IpProtocol.ipv4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6;
  }
  pool.offset[p] = start;
  pool.length[p] = total + linkHeader;
  pool.sa[p] = words[record + SaWord.handle];
  pool.flags[p] = securedFlags(pool.flags[p], words[record + SaWord.kind]);
  return Verdict.ok;
}

/** What tunnel mode does beyond taking the packet out, when the SA says so. */
const CHECKED = SaKind.selector | SaKind.ecn | SaKind.decrementTtl;

/** Selector (RFC 4301, 5.2, step 4), ECN (RFC 6040, 4.2) and TTL of the inner packet at `inner`. */
function checkInner(path: DataPath, record: number, kind: number, outer: number, inner: number, end: number): number {
  // hot:
  const u8 = path.pool.u8;
  if ((kind & SaKind.selector) !== 0 && !fitsSelector(path, record, inner, end)) return Verdict.selector;
  if ((kind & SaKind.ecn) !== 0) {
    const before = trafficClass(u8, inner);
    const after = ecnAfter[((before & 3) << 2) | (trafficClass(u8, outer) & 3)];
    if (after === ECN_DROP) return Verdict.ecn;
    if (after !== (before & 3)) setTrafficClass(u8, inner, (before & 0xfc) | after);
  }
  return (kind & SaKind.decrementTtl) === 0 ? Verdict.ok : decrementTtl(u8, inner);
}

/** Counts a packet of `bytes` bytes against the lifetime. */
function charge(path: DataPath, record: number, bytes: number): number {
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
  const { pool } = path;
  const outer = state[(position << 3) + At.ip];
  const udp = (path.table.words[record] & SaKind.udp) === 0 ? 0 : Udp.length;
  const headerLength = state[(position << 3) + At.header] - outer - udp;
  const total = headerLength + payload;
  const verdict = charge(path, record, total);
  if (verdict !== Verdict.ok) return verdict;
  const start = body - headerLength - linkHeader;
  const shift = start + linkHeader - outer;
  moveUp(pool.u16, pool.u32, outer - linkHeader, start, linkHeader + headerLength);
  const ip = start + linkHeader;
  rewriteHeader(pool.u8, ip, total, state[(position << 3) + At.nextHeaderAt] + shift, headerLength, nextHeader);
  if (udp !== 0) correctChecksum(path.table.words, record, pool.u8, ip, ip + headerLength, ip + total, nextHeader);
  if ((path.table.words[record] & SaKind.selector) !== 0 && !fitsSelector(path, record, ip, ip + total)) {
    return Verdict.selector;
  }
  pool.offset[p] = start;
  pool.length[p] = total + linkHeader;
  pool.sa[p] = path.table.words[record + SaWord.handle];
  pool.flags[p] = securedFlags(pool.flags[p], path.table.words[record + SaWord.kind]);
  return Verdict.ok;
}

function securedFlags(flags: number, kind: number): number {
  // hot:
  const soft = (kind & SaKind.softExpired) !== 0 ? PacketFlag.softExpiry : 0;
  return (flags & ~STALE_FLAGS) | PacketFlag.secured | soft;
}

function fitsSelector(path: DataPath, record: number, ip: number, end: number): boolean {
  const selector = path.selectors[record / RECORD];
  return selector !== undefined && selectorMatches(selector, path.pool.u8, ip, end);
}
