/**
 * AH (RFC 4302): runs of packets of one group, in place. It authenticates the whole packet but for what changes on the
 * way (`ah-mutable.ts`): those fields are zeroed for the time of the computation and put back.
 *
 * ```
 *   tunnel     | link | outer IP | AH: next, length, 0, SPI, number, IV?, ICV, padding | inner packet |
 *   transport  | link | IP …     | AH                                                 | payload      |
 * ```
 *
 * AH is a multiple of 4 bytes over IPv4 and of 8 over IPv6 (2.2); a peer that pads IPv4 to 8 too is understood. With
 * AES-GMAC (RFC 4543) the ICV field is the 8-byte IV and the tag, of which the tag counts as zero and the IV as what it
 * is. The high half of an extended sequence number is authenticated behind the packet (3.3.3.2.2). The headers in front
 * of AH are at most `MAX_SAVED` bytes, since a copy is kept.
 */
import { Ah, IpProtocol, Ipv4, Ipv6 } from '../packet/fields.ts';
import { PacketFlag } from '../packet/pool.ts';
import { zeroMutable } from './ah-mutable.ts';
import { keepHeaders, MAX_SAVED, restoreHeaders } from './ah-saved.ts';
import { At, type DataPath, type Group } from './burst.ts';
import { complete } from './deliver.ts';
import { JobStatus } from './engines/engine.ts';
import { Chain, insertionPoint } from './extension-headers.ts';
import { renewGrant } from './grant.ts';
import { setNonce, swapBytes } from './jobs.ts';
import { isNew } from './replay.ts';
import { keepCandidate, resynchronize, shouldResynchronize } from './resync.ts';
import { drop, Outer, SaKind, SaWord, Sizes } from './sa-table.ts';
import { carry, inferHigh, NO_WINDOW_SPAN, Resync, writeNumber } from './sequence.ts';
import { moveDown, rewriteHeader } from './transport.ts';
import { decrementTtl, trafficClass, writeOuter4, writeOuter6 } from './tunnel.ts';
import { Verdict } from './verdict.ts';

const ETHERTYPE_IPV4 = 0x0008;
const ETHERTYPE_IPV6 = 0xdd86;
const STALE_FLAGS = PacketFlag.needsChecksum | PacketFlag.checksumValid | PacketFlag.secured | PacketFlag.securityError;
/** Bytes of the high half of the sequence number. */
const ESN_LENGTH = 4;

const chain = new Uint32Array(Chain.length);
/** The packet's length as its header says, or 0 if that cannot be. */
function claimedLength(u8: Uint8Array, ip: number, available: number): number {
  const version = u8[ip] >>> 4;
  if (version === 4 && available >= Ipv4.minLength) {
    const total = (u8[ip + Ipv4.totalLength] << 8) | u8[ip + Ipv4.totalLength + 1];
    const headerLength = (u8[ip] & 15) * 4;
    return headerLength >= Ipv4.minLength && total >= headerLength && total <= available ? total : 0;
  }
  if (version === 6 && available >= Ipv6.length) {
    const total = Ipv6.length + ((u8[ip + Ipv6.payloadLength] << 8) | u8[ip + Ipv6.payloadLength + 1]);
    if (total === Ipv6.length && u8[ip + Ipv6.nextHeader] === IpProtocol.hopByHop) return 0;
    return total <= available ? total : 0;
  }
  return 0;
}

/** Adds AH to the packets `order[from]` to `order[to - 1]` of the burst. */
export function authenticate(
  path: DataPath,
  group: Group,
  packets: Uint32Array,
  base: number,
  from: number,
  to: number,
  linkHeader: number,
  verdicts: Uint8Array,
): void {
  // hot:
  const { burst, pool } = path;
  const { jobs } = burst;
  let n = 0;
  for (let k = from; k < to; k++) {
    const position = burst.order[k];
    const p = packets[base + position];
    const verdict = addHeader(path, group, p, position, n, linkHeader);
    verdicts[base + position] = verdict;
    if (verdict === Verdict.ok) burst.position[n++] = position;
    else drop(path.table, burst.state[(position << 3) + At.record], verdict);
  }
  if (n === 0) return;
  jobs.count = n;
  jobs.aadLength = 0;
  group.engine.encrypt(group.transform, jobs);
  for (let j = 0; j < n; j++) {
    const position = burst.position[j];
    const ah = burst.state[(position << 3) + At.header];
    if (jobs.status[j] !== JobStatus.ok) {
      pool.length[packets[base + position]] = 0;
      verdicts[base + position] = drop(path.table, burst.state[(position << 3) + At.record], Verdict.engine);
      continue;
    }
    restoreHeaders(pool.u8, position, burst.state[(position << 3) + At.ip], ah);
  }
}

/** Builds the packet and job `n` for it; the steps are those of ESP (`esp-outbound.ts`). */
function addHeader(path: DataPath, group: Group, p: number, position: number, n: number, linkHeader: number): number {
  // hot:
  const { burst, pool } = path;
  const { u8, u16, u32 } = pool;
  const { words, halves } = path.table;
  const { jobs } = burst;
  const record = burst.state[(position << 3) + At.record];
  const kind = words[record + SaWord.kind];
  const sizes = words[record + SaWord.sizes];
  const at = pool.offset[p];
  const ip = at + linkHeader;
  const tunnel = (kind & SaKind.tunnel) !== 0;

  // 1. The packet and where AH goes.
  const total = claimedLength(u8, ip, pool.length[p] - linkHeader);
  if (total === 0) return Verdict.malformed;
  const version = u8[ip] >>> 4;
  let body = ip;
  let nextHeader: number = version === 4 ? IpProtocol.ipv4 : IpProtocol.ipv6;
  let nextHeaderAt = 0;
  if (!tunnel) {
    const verdict = insertionPoint(u8, ip, ip + total, chain);
    if (verdict !== Verdict.ok) return verdict;
    body = chain[Chain.offset];
    nextHeader = chain[Chain.protocol];
    nextHeaderAt = chain[Chain.nextHeaderAt];
    if (body - ip > MAX_SAVED) return Verdict.malformed;
  }

  // 2. Lengths.
  const outer6 = tunnel ? (kind & SaKind.outer6) !== 0 : version === 6;
  const ahLength = ((sizes >>> Sizes.ah) + (outer6 ? 7 : 3)) & (outer6 ? ~7 : ~3);
  const headerLength = tunnel ? (outer6 ? Ipv6.length : Ipv4.minLength) : body - ip;
  const ah = body - ahLength;
  const outer = ah - headerLength;
  const end = ip + total;
  if (end - outer > words[record + SaWord.mtu]) return Verdict.tooBig;
  const slot = pool.slot(p);
  if (outer - linkHeader < slot || end + ESN_LENGTH > slot + pool.stride) return Verdict.noRoom;

  // 3. TTL, lifetime, sequence number.
  if ((kind & SaKind.decrementTtl) !== 0) {
    const verdict = decrementTtl(u8, ip);
    if (verdict !== Verdict.ok) return verdict;
  }
  if (words[record + SaWord.packetsLeft] === 0 || words[record + SaWord.bytesLeft] < total) {
    const verdict = renewGrant(path, record, total);
    if (verdict !== Verdict.ok) return verdict;
  }
  words[record + SaWord.packetsLeft]--;
  words[record + SaWord.bytesLeft] -= total;
  const low = words[record + SaWord.sequenceLow];
  const high = words[record + SaWord.sequenceHigh];
  words[record + SaWord.sequenceLow] = low + 1;
  if (low === -1) words[record + SaWord.sequenceHigh] = high + 1;

  // 4. Link and IP headers.
  if (tunnel) {
    const inner = trafficClass(u8, ip);
    let tos = (words[record + SaWord.outerFields] >>> Outer.tos) & 0xff;
    let df = (kind & SaKind.df) !== 0;
    if ((kind & SaKind.copyDscp) !== 0) tos = inner & 0xfc;
    if ((kind & SaKind.ecn) !== 0) tos |= inner & 3;
    if ((kind & SaKind.copyDf) !== 0 && version === 4) df = (u8[ip + Ipv4.flagsFragment] & 0x40) !== 0;
    moveDown(u16, u32, at, outer - linkHeader, linkHeader);
    if (linkHeader !== 0) u16[(outer >>> 1) - 1] = outer6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4;
    const template = (record + SaWord.outer) * 2;
    if (outer6) writeOuter6(u16, outer >> 1, halves, template, end - outer - Ipv6.length, tos);
    else {
      writeOuter4(u16, u32, outer, words, record, end - outer, tos, path.identification, df);
      path.identification = (path.identification + 1) & 0xffff;
    }
  } else {
    moveDown(u16, u32, at, outer - linkHeader, body - at);
    rewriteHeader(u8, outer, end - outer, nextHeaderAt - (ip - outer), headerLength, IpProtocol.ah);
  }

  // 5. AH, its ICV zero.
  const ivLength = (sizes >>> Sizes.iv) & 0xff;
  u8.fill(0, ah, body);
  u8[ah + Ah.nextHeader] = nextHeader;
  u8[ah + Ah.payloadLength] = ahLength / 4 - 2;
  const spi = words[record + SaWord.spi];
  u8[ah + Ah.spi] = spi;
  u8[ah + Ah.spi + 1] = spi >>> 8;
  u8[ah + Ah.spi + 2] = spi >>> 16;
  u8[ah + Ah.spi + 3] = spi >>> 24;
  writeNumber(u8, ah + Ah.sequence, low);

  // 6. The job: mutable fields zeroed, high half behind the packet.
  keepHeaders(u8, position, outer, ah);
  burst.state[(position << 3) + At.ip] = outer;
  burst.state[(position << 3) + At.header] = ah;
  if (!zeroMutable(u8, outer, ah, true)) return Verdict.malformed;
  jobs.context[n] = words[record + SaWord.context];
  jobs.authOffset[n] = outer;
  jobs.authLength[n] = end - outer;
  jobs.icvOffset[n] = ah + Ah.length + ivLength;
  if (group.esn) {
    writeNumber(u8, end, high);
    jobs.authLength[n] += ESN_LENGTH;
  }
  if (ivLength !== 0) {
    const ivLow = (low + words[record + SaWord.ivLow]) | 0;
    const ivHigh = (high + words[record + SaWord.ivHigh] + carry(low, ivLow)) | 0;
    setNonce(jobs, n, kind, words[record + SaWord.salt], swapBytes(ivHigh), swapBytes(ivLow));
    writeNumber(u8, ah + Ah.length, ivHigh);
    writeNumber(u8, ah + Ah.length + 4, ivLow);
  }
  pool.offset[p] = outer - linkHeader;
  pool.length[p] = end - outer + linkHeader;
  pool.flags[p] &= ~STALE_FLAGS;
  return Verdict.ok;
}

/** Verifies and removes AH from the packets `order[from]` to `order[to - 1]` of the burst. */
export function verify(
  path: DataPath,
  group: Group,
  packets: Uint32Array,
  base: number,
  from: number,
  to: number,
  linkHeader: number,
  verdicts: Uint8Array,
): void {
  // hot:
  const { burst } = path;
  const { jobs } = burst;
  path.candidate = -1;
  let n = 0;
  for (let k = from; k < to; k++) {
    const position = burst.order[k];
    const verdict = prepareCheck(path, group, packets[base + position], position, n);
    verdicts[base + position] = verdict;
    if (verdict === Verdict.ok) burst.position[n++] = position;
    else drop(path.table, burst.state[(position << 3) + At.record], verdict);
  }
  if (n === 0) return;
  jobs.count = n;
  jobs.aadLength = 0;
  group.engine.decrypt(group.transform, jobs);
  complete(path, group, packets, base, linkHeader, verdicts);
  if (!shouldResynchronize(path, base, verdicts)) return;
  const ip = burst.state[(path.candidate << 3) + At.ip];
  const end = burst.state[(path.candidate << 3) + At.end];
  resynchronize(path, base, ip, end, verdicts, () => {
    verify(path, group, packets, base, 0, 1, linkHeader, verdicts);
  });
}

function prepareCheck(path: DataPath, group: Group, p: number, position: number, n: number): number {
  // hot:
  const { burst, pool } = path;
  const { u8 } = pool;
  const { words } = path.table;
  const { jobs } = burst;
  const record = burst.state[(position << 3) + At.record];
  const kind = words[record + SaWord.kind];
  const sizes = words[record + SaWord.sizes];
  const ip = burst.state[(position << 3) + At.ip];
  const ah = burst.state[(position << 3) + At.header];
  const end = burst.state[(position << 3) + At.end];
  if (ah - ip > MAX_SAVED) return Verdict.malformed;

  // 1. The length of AH: what the transform needs, padded to 4 or to 8.
  const ahLength = (u8[ah + Ah.payloadLength] + 2) * 4;
  const needed = sizes >>> Sizes.ah;
  if (ahLength < needed || ahLength > needed + 7 || ah + ahLength > end) return Verdict.malformed;

  // 2. Sequence number and window.
  const s = ah + Ah.sequence;
  const low = (u8[s] << 24) | (u8[s + 1] << 16) | (u8[s + 2] << 8) | u8[s + 3];
  const window = words[record + SaWord.window];
  const topLow = words[record + SaWord.sequenceLow];
  const topHigh = words[record + SaWord.sequenceHigh];
  let high = 0;
  if (group.esn) {
    if (path.resyncing) high = path.forcedHigh;
    else {
      high = inferHigh(low, topLow, topHigh, window === 0 ? NO_WINDOW_SPAN : window);
      if (path.candidate < 0 && words[record + SaWord.failures] >= Resync.failures) {
        keepCandidate(path, position, ip, end);
      }
    }
  }
  const windowBase = words[record + SaWord.windowBase];
  const mask = words[record + SaWord.windowMask];
  if (window !== 0 && !isNew(path.table.windows, windowBase, mask, window, topLow, topHigh, low, high)) {
    return Verdict.replay;
  }
  if ((kind & SaKind.expired) !== 0) return Verdict.expired;
  burst.state[(position << 3) + At.low] = low;
  burst.state[(position << 3) + At.high] = high;

  // 3. The ICV moves behind the packet, its field becomes zero.
  const ivLength = (sizes >>> Sizes.iv) & 0xff;
  const icvLength = (sizes >>> Sizes.icv) & 0xff;
  if (end + ESN_LENGTH + icvLength > pool.slot(p) + pool.stride) return Verdict.noRoom;
  const field = ah + Ah.length;
  if (ivLength !== 0) {
    const first = (u8[field] | (u8[field + 1] << 8) | (u8[field + 2] << 16) | (u8[field + 3] << 24)) >>> 0;
    const second = (u8[field + 4] | (u8[field + 5] << 8) | (u8[field + 6] << 16) | (u8[field + 7] << 24)) >>> 0;
    setNonce(jobs, n, kind, words[record + SaWord.salt], first, second);
  }
  const icv = end + ESN_LENGTH;
  u8.copyWithin(icv, field + ivLength, field + ivLength + icvLength);
  u8.fill(0, field + ivLength, field + ivLength + icvLength);

  // 4. Mutable fields, high half, job.
  keepHeaders(u8, position, ip, ah);
  if (!zeroMutable(u8, ip, ah, false)) return Verdict.malformed;
  jobs.context[n] = words[record + SaWord.context];
  jobs.authOffset[n] = ip;
  jobs.authLength[n] = end - ip;
  jobs.icvOffset[n] = icv;
  if (group.esn) {
    writeNumber(u8, end, high);
    jobs.authLength[n] += ESN_LENGTH;
  }
  return Verdict.ok;
}
