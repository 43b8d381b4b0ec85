/**
 * ESP encapsulation (RFC 4303, 3.3): a run of packets of one group, in place, in two passes around one engine call.
 *
 * ```
 *   tunnel      | link | outer IP | UDP? | ESP | IV | inner packet  TFC? | padding | length | next | ICV |
 *   transport   | link | IP …     | UDP? | ESP | IV | payload            | padding | length | next | ICV |
 * ```
 *
 * Everything in front of the payload goes into the headroom, the rest into the tailroom; the payload does not move.
 * A packet that fails a check has used no sequence number.
 */
import * as fields from '../packet/fields.ts';
import * as pools from '../packet/pool.ts';
import type { DataPath, Group } from './burst.ts';
import * as bursts from './burst.ts';
import * as engines from './engines/engine.ts';
import { closeEsnGap, openEsnGap } from './esn-gap.ts';
import { encapsulateSimple } from './esp-outbound-simple.ts';
import { Chain, insertionPoint } from './extension-headers.ts';
import { renewGrant } from './grant.ts';
import { setAad, setNonce, swapBytes } from './jobs.ts';
import { RandomIv } from './random-iv.ts';
import * as table from './sa-table.ts';
import { carry, writeNumber } from './sequence.ts';
import { carrier, moveDown, rewriteHeader } from './transport.ts';
import { decrementTtl, trafficClass, writeOuter4, writeOuter6 } from './tunnel.ts';
import { writeUdp6Checksum } from './udp-encap.ts';
import * as verdictNumbers from './verdict.ts';

// Bound in this module: V8 folds constants of its own module only.
const { Esp, Ethernet, IpProtocol, Ipv4, Ipv6, Udp } = fields;
const { PacketFlag } = pools;
const { At, Scratch } = bursts;
const { position: positions, state } = Scratch;
const { authLength, authOffset, cipherLength, cipherOffset, context, icvOffset, status } = Scratch.jobs;
const { JobStatus } = engines;
const { drop, Outer, RECORD, SaKind, SaWord, Sizes } = table;
const { Verdict } = verdictNumbers;

/** EtherTypes as their 16-bit words are in memory. */
const ETHERTYPE_IPV4 = 0x0008;
const ETHERTYPE_IPV6 = 0xdd86;

const chain = new Uint32Array(Chain.length);
const random = new RandomIv();

/** Flags that speak of the packet as it was before protection. */
const STALE_FLAGS = PacketFlag.needsChecksum | PacketFlag.checksumValid | PacketFlag.secured | PacketFlag.securityError;

/**
 * Encapsulates the packets `order[from]` to `order[to - 1]` of the burst, which begins at `packets[base]`.
 * `linkHeader` is even. Verdicts go to `verdicts[base + position]`.
 */
export function encapsulate(
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
  const { jobs, order } = burst;
  const words = path.table.words;
  const isSimpleLink = linkHeader === 0 || linkHeader === Ethernet.length;
  jobs.count = 0;
  path.encapsulated = false;
  for (let k = from; k < to; k++) {
    if ((words[state[(order[k] << 3) + At.record]] & SaKind.simple) !== 0 && isSimpleLink && !path.dummy) {
      k = encapsulateSimple(path, base, k, to, linkHeader, verdicts, group.esn);
      if (k === to) break;
    }
    const position = order[k];
    const verdict = encapsulateOne(path, group, packets[base + position], position, jobs.count, linkHeader);
    verdicts[base + position] = verdict;
    if (verdict === Verdict.ok) positions[jobs.count++] = position;
    else drop(path.table, state[(position << 3) + At.record], verdict);
  }
  if (jobs.count === 0) return;
  jobs.aadLength = group.aadLength;
  group.engine.encrypt(group.transform, jobs);
  finish(path, group, packets, base, linkHeader, verdicts);
}

/** Builds the packet `p` and job `n` for it, step by step; returns the verdict. */
function encapsulateOne(
  path: DataPath,
  group: Group,
  p: number,
  position: number,
  n: number,
  linkHeader: number,
): number {
  // hot:
  const { pool, burst, dummy } = path;
  const { u8, u16, u32, offset: offsets, length: lengths, flags, stride } = pool;
  const { words, halves } = path.table;
  const { jobs } = burst;
  const record = state[(position << 3) + At.record];
  const kind = words[record + SaWord.kind];
  const sizes = words[record + SaWord.sizes];
  const at = offsets[p] | 0;
  const ip = (at + linkHeader) | 0;

  // 1. The packet: a whole IP packet; what follows it is padding of the link. A dummy in a tunnel can be anything.
  let total = (lengths[p] - linkHeader) | 0;
  const first = u8[ip];
  const version = first >> 4;
  const raw = dummy && (kind & SaKind.tunnel) !== 0;
  if (!raw) {
    let claimed = 0;
    if (total >= Ipv4.minLength && version === 4) {
      const length = u16[(ip >> 1) + 1];
      claimed = ((length & 0xff) << 8) | (length >> 8);
      const headerLength = (first & 15) << 2;
      if (headerLength < Ipv4.minLength || claimed < headerLength) claimed = 0;
    } else if (total >= Ipv6.length && version === 6) {
      const length = u16[(ip >> 1) + 2];
      claimed = (Ipv6.length + (((length & 0xff) << 8) | (length >> 8))) | 0;
      // A length of 0 before hop-by-hop options is a jumbogram (RFC 2675).
      if (claimed === Ipv6.length && u8[ip + Ipv6.nextHeader] === IpProtocol.hopByHop) claimed = 0;
    }
    if (claimed === 0 || claimed > total) return Verdict.malformed;
    total = claimed;
  }

  // 2. What is protected: the packet (tunnel), or what follows its headers (transport).
  let body = ip;
  let payload = total;
  let nextHeader: number = version === 4 ? IpProtocol.ipv4 : IpProtocol.ipv6;
  let nextHeaderAt = 0;
  if ((kind & SaKind.tunnel) === 0) {
    const verdict = insertionPoint(u8, ip, ip + total, chain);
    if (verdict !== Verdict.ok) return verdict;
    body = chain[Chain.offset] | 0;
    payload = (ip + total - body) | 0;
    nextHeader = chain[Chain.protocol];
    nextHeaderAt = chain[Chain.nextHeaderAt];
  }
  if (dummy) nextHeader = IpProtocol.none;

  // 3. Lengths: padding, and room for everything.
  const ivLength = (sizes >> Sizes.iv) & 0xff;
  const icvLength = (sizes >> Sizes.icv) & 0xff;
  const tfc = words[record + SaWord.tfc];
  const unpadded = (payload + tfc + Esp.trailerLength) | 0;
  const padLength = -unpadded & ((sizes >> Sizes.padMask) & 0xff);
  const plain = (unpadded + padLength) | 0;
  const esp = (body - ivLength - Esp.length) | 0;
  let front = (kind & SaKind.udp) === 0 ? 0 : Udp.length;
  if ((kind & SaKind.tunnel) === 0) front = (front + body - ip) | 0;
  else front = (front + ((kind & SaKind.outer6) === 0 ? Ipv4.minLength : Ipv6.length)) | 0;
  const outer = (esp - front) | 0;
  const start = (outer - linkHeader) | 0;
  const icv = (body + plain) | 0;
  const end = (icv + icvLength) | 0;
  const wire = (end - outer) | 0;
  if (wire > words[record + SaWord.mtu]) return Verdict.tooBig;
  const slotStart = Math.imul(p, stride);
  if (start < slotStart || end > ((slotStart + stride) | 0)) return Verdict.noRoom;

  // 4. TTL, and what changes in the SA: lifetime and sequence number.
  if ((kind & SaKind.decrementTtl) !== 0 && !raw) {
    const verdict = decrementTtl(u8, ip);
    if (verdict !== Verdict.ok) return verdict;
  }
  const bytes = dummy ? 0 : total;
  if (words[record + SaWord.packetsLeft] === 0 || words[record + SaWord.bytesLeft] < bytes) {
    const verdict = renewGrant(path, record, bytes);
    if (verdict !== Verdict.ok) return verdict;
  }
  words[record + SaWord.packetsLeft]--;
  words[record + SaWord.bytesLeft] -= bytes;
  const low = words[record + SaWord.sequenceLow];
  const high = words[record + SaWord.sequenceHigh];
  words[record + SaWord.sequenceLow] = low + 1;
  if (low === -1) words[record + SaWord.sequenceHigh] = high + 1;

  // 5. Trailer (RFC 4303, 2.4 to 2.7).
  let t = (body + payload) | 0;
  if (tfc !== 0) {
    u8.fill(0, t, t + tfc);
    t = (t + tfc) | 0;
  }
  for (let pad = 1; pad <= padLength; pad++) u8[t++] = pad;
  u8[t] = padLength;
  u8[t + 1] = nextHeader;

  // 6. Link and outer headers.
  if ((kind & SaKind.tunnel) !== 0) {
    let tos = (words[record + SaWord.outerFields] >>> Outer.tos) & 0xff;
    let df = (kind & SaKind.df) !== 0;
    if ((kind & (SaKind.copyDscp | SaKind.ecn | SaKind.copyDf)) !== 0 && !raw) {
      const inner = trafficClass(u8, ip);
      if ((kind & SaKind.copyDscp) !== 0) tos = inner & 0xfc;
      if ((kind & SaKind.ecn) !== 0) tos |= inner & 3;
      if ((kind & SaKind.copyDf) !== 0 && version === 4) df = (u8[ip + Ipv4.flagsFragment] & 0x40) !== 0;
    }
    const outer6 = (kind & SaKind.outer6) !== 0;
    if (linkHeader !== 0) {
      moveDown(u16, u32, at, start, linkHeader - 2);
      u16[(outer >> 1) - 1] = outer6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4;
    }
    if (outer6) {
      writeOuter6(u16, outer >> 1, halves, (record + SaWord.outer) * 2, wire - Ipv6.length, tos);
    } else {
      writeOuter4(u16, u32, outer, words, record, wire, tos, path.identification, df);
      path.identification = (path.identification + 1) & 0xffff;
    }
  } else {
    moveDown(u16, u32, at, start, body - at);
    const protocol = carrier(IpProtocol.esp, (kind & SaKind.udp) !== 0);
    rewriteHeader(u8, outer, wire, nextHeaderAt - (ip - outer), body - ip, protocol);
  }

  // 7. UDP (RFC 3948, 2.1), the checksum over IPv6 being written when there is something to sum up.
  const e = esp >> 1;
  if ((kind & SaKind.udp) !== 0) {
    path.encapsulated = true;
    const length = end - esp + Udp.length;
    u16[e - 4] = halves[(record + SaWord.ports) * 2];
    u16[e - 3] = halves[(record + SaWord.ports) * 2 + 1];
    u16[e - 2] = ((length & 0xff) << 8) | (length >>> 8);
    u16[e - 1] = 0;
  }

  // 8. ESP header and IV.
  const spi = words[record + SaWord.spi];
  const sequence = swapBytes(low);
  u16[e] = spi;
  u16[e + 1] = spi >>> 16;
  u16[e + 2] = sequence;
  u16[e + 3] = sequence >>> 16;
  if ((kind & SaKind.counterIv) !== 0) {
    const ivLow = (low + words[record + SaWord.ivLow]) | 0;
    const ivHigh = (high + words[record + SaWord.ivHigh] + carry(low, ivLow)) | 0;
    const first = swapBytes(ivHigh);
    const second = swapBytes(ivLow);
    u16[e + 4] = first;
    u16[e + 5] = first >>> 16;
    u16[e + 6] = second;
    u16[e + 7] = second >>> 16;
    setNonce(jobs, n, kind, words[record + SaWord.salt], first, second);
  } else if (ivLength !== 0) {
    writeRandomIv(path, record, n, e, ivLength >> 2);
  }

  // 9. The job.
  context[n] = words[record + SaWord.context];
  icvOffset[n] = icv;
  cipherOffset[n] = body;
  cipherLength[n] = plain;
  if (group.family === 'aead') {
    setAad(jobs, n, spi, sequence, high, group.esn);
  } else {
    authOffset[n] = esp;
    authLength[n] = icv - esp;
    if (group.esn) {
      if (group.family === 'gmac') authOffset[n] = openEsnGap(u16, esp, high, burst.savedA, position);
      else writeNumber(u8, icv, high);
      authLength[n] += 4;
    }
  }
  offsets[p] = start;
  lengths[p] = end - start;
  flags[p] &= ~STALE_FLAGS;
  return Verdict.ok;
}

/** After the engine: what it refused, and what had to wait for the cipher text. */
function finish(
  path: DataPath,
  group: Group,
  packets: Uint32Array,
  base: number,
  linkHeader: number,
  verdicts: Uint8Array,
): void {
  // hot:
  const { pool, burst } = path;
  const words = path.table.words;
  const { count } = burst.jobs;
  const gap = group.family === 'gmac' && group.esn;
  if (!gap && !path.encapsulated && allDone(status, count)) return;
  for (let j = 0; j < count; j++) {
    const position = positions[j];
    const record = state[(position << 3) + At.record];
    const kind = words[record + SaWord.kind];
    if (status[j] !== JobStatus.ok) {
      // It may still be plain text: nothing of it must be left to send.
      pool.length[packets[base + position]] = 0;
      verdicts[base + position] = drop(path.table, record, Verdict.engine);
      continue;
    }
    if (gap) closeEsnGap(pool.u16, authOffset[j] + 4, burst.savedA[position]);
    if ((kind & SaKind.udp) !== 0) {
      const ip = pool.offset[packets[base + position]] + linkHeader;
      if (pool.u8[ip] >>> 4 === 6) {
        const esp = cipherOffset[j] - ((words[record + SaWord.sizes] >>> Sizes.iv) & 0xff) - Esp.length;
        writeUdp6Checksum(pool.u8, ip, esp - Udp.length);
      }
    }
  }
}

/** Whether all jobs of an AEAD are done; then nothing is left to do, unless it is in UDP. */
function allDone(status: Uint8Array, count: number): boolean {
  // hot:
  let all = 0;
  for (let j = 0; j < count; j++) all |= status[j];
  return all === JobStatus.ok;
}

/** CBC: an IV that nobody can foresee, `count` words, into the packet at 16-bit index `e` and into job `n`. */
function writeRandomIv(path: DataPath, record: number, n: number, e: number, count: number): void {
  // hot:
  const u16 = path.pool.u16;
  const iv = path.burst.jobs.iv;
  const source = random.words;
  const at = random.take(4);
  if ((path.table.words[record + SaWord.kind] & SaKind.givenIv) !== 0) useGivenIv(path, record, source, at);
  for (let w = 0; w < count; w++) {
    const word = source[at + w];
    iv[n * 4 + w] = word;
    u16[e + 4 + 2 * w] = word;
    u16[e + 5 + 2 * w] = word >>> 16;
  }
}

/** Puts the IV that the caller chose where the next random one would be taken from. */
function useGivenIv(path: DataPath, record: number, source: Uint32Array, at: number): void {
  path.table.words[record + SaWord.kind] &= ~SaKind.givenIv;
  const slot = record / RECORD;
  const given = path.givenIv[slot];
  path.givenIv[slot] = undefined;
  if (given !== undefined) new Uint8Array(source.buffer).set(given, at * 4);
}
