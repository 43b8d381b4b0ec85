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
import { Esp, IpProtocol, Ipv4, Ipv6, Udp } from '../packet/fields.ts';
import { PacketFlag } from '../packet/pool.ts';
import type { DataPath, Group } from './burst.ts';
import { JobStatus } from './engines/engine.ts';
import { Chain, insertionPoint } from './extension-headers.ts';
import { renewGrant } from './grant.ts';
import { RandomIv } from './random-iv.ts';
import { RECORD, SaKind, SaWord, Sizes } from './sa-table.ts';
import { writeNumber } from './sequence.ts';
import { carrier, moveDown, rewriteHeader } from './transport.ts';
import { decrementTtl, trafficClass, writeOuter4, writeOuter6 } from './tunnel.ts';
import { writeUdp6Checksum } from './udp-encap.ts';
import { Verdict } from './verdict.ts';

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
  const pool = path.pool;
  const u8 = pool.u8;
  const u16 = pool.u16;
  const offsets = pool.offset;
  const lengths = pool.length;
  const flags = pool.flags;
  const stride = pool.stride;
  const words = path.table.words;
  const halves = path.table.halves;
  const burst = path.burst;
  const order = burst.order;
  const records = burst.record;
  const positions = burst.position;
  const jobs = burst.jobs;
  const context = jobs.context;
  const cipherOffset = jobs.cipherOffset;
  const cipherLength = jobs.cipherLength;
  const authOffset = jobs.authOffset;
  const authLength = jobs.authLength;
  const icvOffset = jobs.icvOffset;
  const iv = jobs.iv;
  const aad = jobs.aad;
  const isAead = group.family === 'aead';
  const isGmac = group.family === 'gmac';
  const esn = group.esn;
  const dummy = path.dummy;
  let identification = path.identification;
  let n = 0;

  for (let k = from; k < to; k++) {
    const position = order[k];
    const p = packets[base + position];
    const record = records[position];
    const kind = words[record + SaWord.kind];
    const sizes = words[record + SaWord.sizes];
    const at = offsets[p];
    const ip = at + linkHeader;

    // 1. The packet: a whole IP packet; what follows it is padding of the link. A dummy in a tunnel can be anything.
    let total = lengths[p] - linkHeader;
    const version = u8[ip] >>> 4;
    const raw = dummy && (kind & SaKind.tunnel) !== 0;
    if (!raw) {
      let claimed = 0;
      if (total >= Ipv4.minLength && version === 4) {
        claimed = (u8[ip + Ipv4.totalLength] << 8) | u8[ip + Ipv4.totalLength + 1];
        const headerLength = (u8[ip] & 15) * 4;
        if (headerLength < Ipv4.minLength || claimed < headerLength) claimed = 0;
      } else if (total >= Ipv6.length && version === 6) {
        claimed = Ipv6.length + ((u8[ip + Ipv6.payloadLength] << 8) | u8[ip + Ipv6.payloadLength + 1]);
        // A length of 0 before hop-by-hop options is a jumbogram (RFC 2675).
        if (claimed === Ipv6.length && u8[ip + Ipv6.nextHeader] === IpProtocol.hopByHop) claimed = 0;
      }
      if (claimed === 0 || claimed > total) {
        verdicts[base + position] = Verdict.malformed;
        continue;
      }
      total = claimed;
    }

    // 2. What is protected: the packet (tunnel), or what follows its headers (transport).
    let body = ip;
    let payload = total;
    let nextHeader: number = version === 4 ? IpProtocol.ipv4 : IpProtocol.ipv6;
    let nextHeaderAt = 0;
    if ((kind & SaKind.tunnel) === 0) {
      const verdict = insertionPoint(u8, ip, ip + total, chain);
      if (verdict !== Verdict.ok) {
        verdicts[base + position] = verdict;
        continue;
      }
      body = chain[Chain.offset];
      payload = ip + total - body;
      nextHeader = chain[Chain.protocol];
      nextHeaderAt = chain[Chain.nextHeaderAt];
    }
    if (dummy) nextHeader = IpProtocol.none;

    // 3. Lengths: padding, and room for everything.
    const ivLength = (sizes >>> Sizes.iv) & 0xff;
    const icvLength = (sizes >>> Sizes.icv) & 0xff;
    const tfc = words[record + SaWord.tfc];
    const padLength = -(payload + tfc + Esp.trailerLength) & ((sizes >>> Sizes.padMask) & 0xff);
    const plain = payload + tfc + padLength + Esp.trailerLength;
    const esp = body - ivLength - Esp.length;
    let outer = (kind & SaKind.udp) === 0 ? esp : esp - Udp.length;
    if ((kind & SaKind.tunnel) === 0) outer -= body - ip;
    else outer -= (kind & SaKind.outer6) === 0 ? Ipv4.minLength : Ipv6.length;
    const end = body + plain + icvLength;
    if (end - outer > words[record + SaWord.mtu]) {
      verdicts[base + position] = Verdict.tooBig;
      continue;
    }
    const slotStart = p * stride;
    if (outer - linkHeader < slotStart || end > slotStart + stride) {
      verdicts[base + position] = Verdict.noRoom;
      continue;
    }

    // 4. TTL, and what changes in the SA: lifetime and sequence number.
    if ((kind & SaKind.decrementTtl) !== 0 && !raw) {
      const verdict = decrementTtl(u8, ip);
      if (verdict !== Verdict.ok) {
        verdicts[base + position] = verdict;
        continue;
      }
    }
    const bytes = dummy ? 0 : total;
    if (words[record + SaWord.packetsLeft] === 0 || words[record + SaWord.bytesLeft] < bytes) {
      const verdict = renewGrant(path, record, bytes);
      if (verdict !== Verdict.ok) {
        verdicts[base + position] = verdict;
        continue;
      }
    }
    words[record + SaWord.packetsLeft]--;
    words[record + SaWord.bytesLeft] -= bytes;
    const low = words[record + SaWord.sequenceLow];
    const high = words[record + SaWord.sequenceHigh];
    words[record + SaWord.sequenceLow] = low + 1;
    if (low === 0xffffffff) words[record + SaWord.sequenceHigh] = high + 1;

    // 5. Trailer (RFC 4303, 2.4 to 2.7).
    let t = body + payload;
    if (tfc !== 0) {
      u8.fill(0, t, t + tfc);
      t += tfc;
    }
    for (let pad = 1; pad <= padLength; pad++) u8[t++] = pad;
    u8[t] = padLength;
    u8[t + 1] = nextHeader;

    // 6. Link and outer headers.
    if ((kind & SaKind.tunnel) !== 0) {
      let tos = words[record + SaWord.tos];
      let df = (kind & SaKind.df) !== 0;
      if ((kind & (SaKind.copyDscp | SaKind.ecn | SaKind.copyDf)) !== 0 && !raw) {
        const inner = trafficClass(u8, ip);
        if ((kind & SaKind.copyDscp) !== 0) tos = inner & 0xfc;
        if ((kind & SaKind.ecn) !== 0) tos |= inner & 3;
        if ((kind & SaKind.copyDf) !== 0 && version === 4) df = (u8[ip + Ipv4.flagsFragment] & 0x40) !== 0;
      }
      const o = outer >>> 1;
      const from16 = at >>> 1;
      const to16 = (outer - linkHeader) >>> 1;
      const outer6 = (kind & SaKind.outer6) !== 0;
      const link16 = linkHeader >>> 1;
      if (link16 !== 0) {
        for (let w = 0; w < link16 - 1; w++) u16[to16 + w] = u16[from16 + w];
        u16[to16 + link16 - 1] = outer6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4;
      }
      const template = (record + SaWord.outer) * 2;
      if (outer6) {
        writeOuter6(u16, o, halves, template, end - outer - Ipv6.length, tos);
      } else {
        writeOuter4(u16, o, halves, template, end - outer, tos, identification, df, words[record + SaWord.outerSum]);
        identification = (identification + 1) & 0xffff;
      }
    } else {
      moveDown(u16, at, outer - linkHeader, body - at);
      const protocol = carrier(IpProtocol.esp, (kind & SaKind.udp) !== 0);
      rewriteHeader(u8, outer, end - outer, nextHeaderAt - (ip - outer), body - ip, protocol);
    }

    // 7. UDP (RFC 3948, 2.1), the checksum over IPv6 being written when there is something to sum up.
    const e = esp >>> 1;
    if ((kind & SaKind.udp) !== 0) {
      const length = end - esp + Udp.length;
      u16[e - 4] = halves[(record + SaWord.ports) * 2];
      u16[e - 3] = halves[(record + SaWord.ports) * 2 + 1];
      u16[e - 2] = ((length & 0xff) << 8) | (length >>> 8);
      u16[e - 1] = 0;
    }

    // 8. ESP header and IV.
    const spi = words[record + SaWord.spi];
    const sequence = ((low >>> 24) | ((low >>> 8) & 0xff00) | ((low & 0xff00) << 8) | (low << 24)) >>> 0;
    u16[e] = spi;
    u16[e + 1] = spi >>> 16;
    u16[e + 2] = sequence;
    u16[e + 3] = sequence >>> 16;
    const j4 = n * 4;
    if ((kind & SaKind.counterIv) !== 0) {
      const ivLow = low + words[record + SaWord.ivLow];
      const ivHigh = high + words[record + SaWord.ivHigh] + (ivLow > 0xffffffff ? 1 : 0);
      const first = ((ivHigh >>> 24) & 0xff) | ((ivHigh >>> 8) & 0xff00) | ((ivHigh & 0xff00) << 8) | (ivHigh << 24);
      const second = ((ivLow >>> 24) & 0xff) | ((ivLow >>> 8) & 0xff00) | ((ivLow & 0xff00) << 8) | (ivLow << 24);
      u16[e + 4] = first;
      u16[e + 5] = first >>> 16;
      u16[e + 6] = second;
      u16[e + 7] = second >>> 16;
      const salt = words[record + SaWord.salt];
      if ((kind & SaKind.ccm) === 0) {
        iv[j4] = salt;
        iv[j4 + 1] = first;
        iv[j4 + 2] = second;
        // AES-CTR: the block counter starts at 1 (RFC 3686, 4); AEADs do not look at it.
        iv[j4 + 3] = 0x01000000;
      } else {
        iv[j4] = salt | (first << 24);
        iv[j4 + 1] = (first >>> 8) | (second << 24);
        iv[j4 + 2] = second >>> 8;
      }
    } else if (ivLength !== 0) {
      const source = random.words;
      const r = random.take(4);
      if ((kind & SaKind.givenIv) !== 0) useGivenIv(path, record, source, r);
      for (let w = 0; w < ivLength >>> 2; w++) {
        const word = source[r + w];
        iv[j4 + w] = word;
        u16[e + 4 + 2 * w] = word;
        u16[e + 5 + 2 * w] = word >>> 16;
      }
    }

    // 9. The job.
    context[n] = words[record + SaWord.context];
    icvOffset[n] = body + plain;
    if (isAead) {
      cipherOffset[n] = body;
      cipherLength[n] = plain;
      aad[j4] = spi;
      if (esn) {
        aad[j4 + 1] = (high >>> 24) | ((high >>> 8) & 0xff00) | ((high & 0xff00) << 8) | (high << 24);
        aad[j4 + 2] = sequence;
      } else {
        aad[j4 + 1] = sequence;
      }
    } else {
      cipherOffset[n] = body;
      cipherLength[n] = plain;
      authOffset[n] = esp;
      authLength[n] = body + plain - esp;
      if (esn) {
        if (isGmac) authOffset[n] = openEsnGap(u16, esp, high, burst.savedA, position);
        else writeNumber(u8, body + plain, high);
        authLength[n] += 4;
      }
    }
    positions[n++] = position;
    offsets[p] = outer - linkHeader;
    lengths[p] = end - outer + linkHeader;
    flags[p] &= ~STALE_FLAGS;
    verdicts[base + position] = Verdict.ok;
  }
  path.identification = identification;
  if (n === 0) return;

  // 10. Encrypt and authenticate, all at once.
  jobs.count = n;
  jobs.aadLength = group.aadLength;
  group.engine.encrypt(group.transform, jobs);
  finish(path, group, packets, base, linkHeader, verdicts);
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
  const { status, count } = burst.jobs;
  const gap = group.family === 'gmac' && group.esn;
  for (let j = 0; j < count; j++) {
    const position = burst.position[j];
    const record = burst.record[position];
    const kind = words[record + SaWord.kind];
    if (status[j] !== JobStatus.ok) {
      // It may still be plain text: nothing of it must be left to send.
      pool.length[packets[base + position]] = 0;
      verdicts[base + position] = Verdict.engine;
      continue;
    }
    if (gap) closeEsnGap(pool.u16, burst.jobs.authOffset[j] + 4, burst.savedA[position]);
    if ((kind & SaKind.udp) !== 0) {
      const ip = pool.offset[packets[base + position]] + linkHeader;
      if (pool.u8[ip] >>> 4 === 6) {
        const esp = burst.jobs.cipherOffset[j] - ((words[record + SaWord.sizes] >>> Sizes.iv) & 0xff) - Esp.length;
        writeUdp6Checksum(pool.u8, ip, esp - Udp.length);
      }
    }
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

/**
 * GMAC authenticates SPI, high half, low half, IV, payload in this order (RFC 4543, 3.4): the SPI moves four bytes to the
 * front for the time of the computation. What was there goes to `saved`. Returns where the range begins.
 */
export function openEsnGap(u16: Uint16Array, esp: number, high: number, saved: Uint32Array, position: number): number {
  const e = esp >>> 1;
  saved[position] = u16[e - 2] | (u16[e - 1] << 16);
  u16[e - 2] = u16[e];
  u16[e - 1] = u16[e + 1];
  u16[e] = ((high >>> 24) & 0xff) | ((high >>> 8) & 0xff00);
  u16[e + 1] = ((high >>> 8) & 0xff) | ((high & 0xff) << 8);
  return esp - 4;
}

/** Undoes `openEsnGap`. */
export function closeEsnGap(u16: Uint16Array, esp: number, saved: number): void {
  const e = esp >>> 1;
  u16[e] = u16[e - 2];
  u16[e + 1] = u16[e - 1];
  u16[e - 2] = saved;
  u16[e - 1] = saved >>> 16;
}
