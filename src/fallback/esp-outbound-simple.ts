/**
 * ESP encapsulation of the simple case, which is nearly all of the traffic: an AEAD with a counting IV, a tunnel, a whole
 * IP packet behind an Ethernet header or none, room on both sides, numbers and lifetime left. The steps are those of
 * `esp-outbound.ts`, which does everything else.
 *
 * Why a loop of its own: V8 keeps what it knows about typed arrays (shape, length, address) through a round of a loop
 * only while the loop has no other loop in it and calls nothing that is not inlined, not even where it never gets to;
 * otherwise each access costs ten instructions more. So a packet that is not simple ends the loop, and what would be an
 * inner loop is written out. Constants are bound here, because V8 folds constants of its own module only, and so are the
 * arrays of the burst, which it knows without looking. All that halves the time (docs/decisions.md).
 */
import * as fields from '../packet/fields.ts';
import * as pools from '../packet/pool.ts';
import * as bursts from './burst.ts';
import * as engines from './engines/engine.ts';
import * as table from './sa-table.ts';
import * as verdictNumbers from './verdict.ts';

// Bound in this module, see above.
const { Esp, IpProtocol, Ipv4, Ipv6 } = fields;
const { NO_PACKET, PacketFlag } = pools;
const { Outer, RECORD, RECORD_SHIFT, SaKind, SaWord, Sizes } = table;
const { Verdict } = verdictNumbers;
const { At, Scratch } = bursts;
const { position: positions, state } = Scratch;
const { cipherLength, cipherOffset, context, icvOffset } = Scratch.jobs;
const { BurstOffset } = engines;
const {
  bytesLeft: SA_WORD_BYTES_LEFT,
  context: SA_WORD_CONTEXT,
  group: SA_WORD_GROUP,
  ivHigh: SA_WORD_IV_HIGH,
  ivLow: SA_WORD_IV_LOW,
  kind: SA_WORD_KIND,
  mtu: SA_WORD_MTU,
  outer: SA_WORD_OUTER,
  outer4Destination: SA_WORD_OUTER4_DESTINATION,
  outer4Source: SA_WORD_OUTER4_SOURCE,
  outerFields: SA_WORD_OUTER_FIELDS,
  packetsLeft: SA_WORD_PACKETS_LEFT,
  salt: SA_WORD_SALT,
  sequenceHigh: SA_WORD_SEQUENCE_HIGH,
  sequenceLow: SA_WORD_SEQUENCE_LOW,
  sizes: SA_WORD_SIZES,
  spi: SA_WORD_SPI,
} = SaWord;
const {
  copyDf: SA_KIND_COPY_DF,
  copyDscp: SA_KIND_COPY_DSCP,
  df: SA_KIND_DF,
  ecn: SA_KIND_ECN,
  outbound: SA_KIND_OUTBOUND,
  outer6: SA_KIND_OUTER6,
  simple: SA_KIND_SIMPLE,
} = SaKind;
const { sum: OUTER_SUM, tos: OUTER_TOS } = Outer;
const { icv: SIZES_ICV, padMask: SIZES_PAD_MASK } = Sizes;
const { minLength: IPV4_MIN_LENGTH } = Ipv4;
const { length: IPV6_LENGTH } = Ipv6;
const { length: ESP_LENGTH, trailerLength: ESP_TRAILER_LENGTH } = Esp;
const { esp: IP_PROTOCOL_ESP, ipv4: IP_PROTOCOL_IPV4, ipv6: IP_PROTOCOL_IPV6 } = IpProtocol;
const { noRoom: VERDICT_NO_ROOM, noSa: VERDICT_NO_SA, notIpsec: VERDICT_NOT_IPSEC, ok: VERDICT_OK } = Verdict;
const {
  checksumValid: PACKET_FLAG_CHECKSUM_VALID,
  needsChecksum: PACKET_FLAG_NEEDS_CHECKSUM,
  secured: PACKET_FLAG_SECURED,
  securityError: PACKET_FLAG_SECURITY_ERROR,
} = PacketFlag;
const { packet: AT_PACKET, record: AT_RECORD } = At;

/** Fields as their 16-bit words are in memory, bytes swapped. */
const ETHERTYPE_IPV4 = 0x0008;
const ETHERTYPE_IPV6 = 0xdd86;
const DONT_FRAGMENT = 0x0040;
/** Words of `CryptoBurst.memory` where the nonces and the AAD begin. */
const IV = BurstOffset.iv >> 2;
const AAD = BurstOffset.aad >> 2;
/** ESP header and the explicit IV of an AEAD. */
const AEAD_HEADER = ESP_LENGTH + 8;

const COPIES = SA_KIND_COPY_DSCP | SA_KIND_ECN | SA_KIND_COPY_DF;
/** Says that a record begins at no negative index and has room behind it, which saves overflow checks. */
const RECORD_MASK = 0x7fffffff & -RECORD;
const STALE_FLAGS =
  PACKET_FLAG_NEEDS_CHECKSUM | PACKET_FLAG_CHECKSUM_VALID | PACKET_FLAG_SECURED | PACKET_FLAG_SECURITY_ERROR;

/** `path.mixed` of a burst whose packets are of several groups. */
export const MIXED = -2;

/**
 * Finds the SAs of packets `from` to `n - 1` of the burst: fills `record` and `order`, and verdicts for those without. Stops at a
 * packet at an odd offset and returns its position, `n` otherwise. `path.alive` counts on; `path.group` becomes the group
 * of all of them, or `MIXED`.
 */
export function lookUp(
  path: bursts.DataPath,
  slotOf: Int32Array,
  packets: Uint32Array,
  base: number,
  from: number,
  n: number,
  verdicts: Uint8Array,
): number {
  // hot:
  const pool = path.pool;
  const offsets = pool.offset;
  const handles = pool.sa;
  const next = pool.next;
  const words = path.table.words;
  const burst = path.burst;
  const order = burst.order;
  const handleEnd = slotOf.length | 0;
  let alive = path.alive | 0;
  let group = path.group | 0;
  let touched = 0;
  let i = from | 0;
  for (; i < n; i++) {
    const p = packets[(base + i) | 0] & 0x7fffffff;
    const handle = handles[p] | 0;
    const record = handle > 0 && handle < handleEnd ? (slotOf[handle] << RECORD_SHIFT) & RECORD_MASK : 0;
    let verdict: number = VERDICT_OK;
    const kind = words[record + SA_WORD_KIND];
    if ((kind & SA_KIND_OUTBOUND) === 0) {
      verdict = handle === 0 ? VERDICT_NOT_IPSEC : VERDICT_NO_SA;
    } else if (next[p] !== NO_PACKET) {
      verdict = VERDICT_NO_ROOM;
    }
    if (verdict !== VERDICT_OK) {
      state[(i << 3) + AT_RECORD] = 0;
      verdicts[(base + i) | 0] = verdict;
      continue;
    }
    if ((offsets[p] & 1) !== 0) break;
    const s = (i & 0xff) << 3;
    state[s + AT_RECORD] = record;
    state[s + AT_PACKET] = p;
    order[alive] = i;
    alive = (alive + 1) | 0;
    const own = words[record + SA_WORD_GROUP];
    // The record on its way to the cache, for all packets at once; the second line when it will be needed.
    touched |= words[record + ((kind & SA_KIND_OUTER6) === 0 ? 0 : SA_WORD_OUTER)];
    if (own !== group) group = group === -1 ? own : MIXED;
  }
  path.touched = touched;
  path.alive = alive;
  path.group = group;
  return i;
}

/**
 * Encapsulates packets from `order[from]` on and adds their jobs to the burst, up to the first that is not simple. Returns
 * where it stopped, `to` at most. `linkHeader` is 0 or 14.
 */
export function encapsulateSimple(
  path: bursts.DataPath,
  base: number,
  from: number,
  to: number,
  linkHeader: number,
  verdicts: Uint8Array,
  esn: boolean,
): number {
  // hot:
  const pool = path.pool;
  const u8 = pool.u8;
  const u16 = pool.u16;
  const u32 = pool.u32;
  const offsets = pool.offset;
  const lengths = pool.length;
  const flags = pool.flags;
  const stride = pool.stride | 0;
  const words = path.table.words;
  const burst = path.burst;
  const order = burst.order;
  const jobs = burst.jobs;
  const nonces = jobs.memory.u32;
  const link = linkHeader | 0;
  let identification = path.identification | 0;
  let n = jobs.count | 0;
  let k = from | 0;
  for (; k < to; k++) {
    const position = order[k];
    const s = (position & 0xff) << 3;
    const record = state[s + AT_RECORD] & RECORD_MASK;
    const p = state[s + AT_PACKET] & 0x7fffffff;
    const kind = words[record + SA_WORD_KIND];
    if ((kind & SA_KIND_SIMPLE) === 0) break;
    const at = offsets[p] | 0;
    const ip = (at + link) | 0;
    const q = ip >> 1;

    // 1. A whole IP packet.
    const available = (lengths[p] - link) | 0;
    if (available < IPV4_MIN_LENGTH) break;
    const first = u16[q];
    let nextHeader: number = IP_PROTOCOL_IPV4;
    let total = 0;
    if ((first & 0xff) === 0x45) {
      const length = u16[q + 1];
      total = ((length & 0xff) << 8) | (length >> 8);
      if (total < IPV4_MIN_LENGTH) break;
    } else if ((first & 0xf0) === 0x60 && available >= IPV6_LENGTH) {
      const length = u16[q + 2];
      total = (IPV6_LENGTH + (((length & 0xff) << 8) | (length >> 8))) | 0;
      if (total === IPV6_LENGTH) break;
      nextHeader = IP_PROTOCOL_IPV6;
    } else break;
    if (total > available) break;

    // 3. Lengths.
    const sizes = words[record + SA_WORD_SIZES];
    const unpadded = (total + ESP_TRAILER_LENGTH) | 0;
    const padLength = -unpadded & ((sizes >> SIZES_PAD_MASK) & 0xff);
    const plain = (unpadded + padLength) | 0;
    const esp = (ip - AEAD_HEADER) | 0;
    const isOuter6 = (kind & SA_KIND_OUTER6) !== 0;
    const outer = (esp - (isOuter6 ? IPV6_LENGTH : IPV4_MIN_LENGTH)) | 0;
    const start = (outer - link) | 0;
    const icv = (ip + plain) | 0;
    const end = (icv + ((sizes >> SIZES_ICV) & 0xff)) | 0;
    const wire = (end - outer) | 0;
    const slot = Math.imul(p, stride);
    if (wire > words[record + SA_WORD_MTU] || start < slot || end > ((slot + stride) | 0)) break;

    // 4. Lifetime and sequence number.
    const packetsLeft = words[record + SA_WORD_PACKETS_LEFT];
    const bytesLeft = words[record + SA_WORD_BYTES_LEFT];
    const low = words[record + SA_WORD_SEQUENCE_LOW];
    if (packetsLeft === 0 || bytesLeft < total || low === -1) break;
    const high = words[record + SA_WORD_SEQUENCE_HIGH];
    words[record + SA_WORD_PACKETS_LEFT] = packetsLeft - 1;
    words[record + SA_WORD_BYTES_LEFT] = bytesLeft - total;
    words[record + SA_WORD_SEQUENCE_LOW] = low + 1;

    // 5. Trailer.
    const trailer = (icv - ESP_TRAILER_LENGTH) | 0;
    if (padLength > 0) u8[(trailer - padLength) | 0] = 1;
    if (padLength > 1) u8[(trailer - padLength + 1) | 0] = 2;
    if (padLength > 2) u8[(trailer - 1) | 0] = 3;
    u8[trailer] = padLength;
    u8[(trailer + 1) | 0] = nextHeader;

    // 6. Link and outer headers.
    const fields = words[record + SA_WORD_OUTER_FIELDS];
    let tos = (fields >> OUTER_TOS) & 0xff;
    let df = (kind & SA_KIND_DF) !== 0 ? DONT_FRAGMENT : 0;
    if ((kind & COPIES) !== 0) {
      const isV4 = nextHeader === IP_PROTOCOL_IPV4;
      const inner = isV4 ? first >> 8 : ((first & 15) << 4) | (first >> 12);
      if ((kind & SA_KIND_COPY_DSCP) !== 0) tos = inner & 0xfc;
      if ((kind & SA_KIND_ECN) !== 0) tos |= inner & 3;
      if ((kind & SA_KIND_COPY_DF) !== 0 && isV4) df = u16[q + 3] & DONT_FRAGMENT;
    }
    const o = outer >> 1;
    if (link !== 0) {
      // Both addresses: 12 bytes.
      if (((at | start) & 3) === 0) {
        const a = at >> 2;
        const b = start >> 2;
        u32[b] = u32[a];
        u32[b + 1] = u32[a + 1];
        u32[b + 2] = u32[a + 2];
      } else {
        const a = at >> 1;
        const b = start >> 1;
        u16[b] = u16[a];
        u16[b + 1] = u16[a + 1];
        u16[b + 2] = u16[a + 2];
        u16[b + 3] = u16[a + 3];
        u16[b + 4] = u16[a + 4];
        u16[b + 5] = u16[a + 5];
      }
      u16[o - 1] = isOuter6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4;
    }
    if (isOuter6) {
      const template = (record + SA_WORD_OUTER) | 0;
      const payload = (wire - IPV6_LENGTH) | 0;
      const w0 = words[template] | (tos >>> 4) | ((tos & 15) << 12);
      const w1 = words[template + 1] | ((payload & 0xff) << 8) | (payload >> 8);
      const w2 = words[template + 2];
      const w3 = words[template + 3];
      const w4 = words[template + 4];
      const w5 = words[template + 5];
      const w6 = words[template + 6];
      const w7 = words[template + 7];
      const w8 = words[template + 8];
      const w9 = words[template + 9];
      const w = outer >> 2;
      if ((outer & 3) === 0) {
        u32[w] = w0;
        u32[w + 1] = w1;
        u32[w + 2] = w2;
        u32[w + 3] = w3;
        u32[w + 4] = w4;
        u32[w + 5] = w5;
        u32[w + 6] = w6;
        u32[w + 7] = w7;
        u32[w + 8] = w8;
        u32[w + 9] = w9;
      } else {
        u16[o] = w0;
        u32[w + 1] = (w0 >>> 16) | (w1 << 16);
        u32[w + 2] = (w1 >>> 16) | (w2 << 16);
        u32[w + 3] = (w2 >>> 16) | (w3 << 16);
        u32[w + 4] = (w3 >>> 16) | (w4 << 16);
        u32[w + 5] = (w4 >>> 16) | (w5 << 16);
        u32[w + 6] = (w5 >>> 16) | (w6 << 16);
        u32[w + 7] = (w6 >>> 16) | (w7 << 16);
        u32[w + 8] = (w7 >>> 16) | (w8 << 16);
        u32[w + 9] = (w8 >>> 16) | (w9 << 16);
        u16[o + 19] = w9 >>> 16;
      }
    } else {
      const version = 0x45 | (tos << 8);
      const length = ((wire & 0xff) << 8) | (wire >> 8);
      let check = ((fields >>> OUTER_SUM) + (tos << 8) + length + identification + df) | 0;
      check = ((check & 0xffff) + (check >>> 16)) | 0;
      check = ~(check + (check >>> 16)) & 0xffff;
      const life = (fields & 0xff) | (IP_PROTOCOL_ESP << 8);
      const source = words[record + SA_WORD_OUTER4_SOURCE];
      const destination = words[record + SA_WORD_OUTER4_DESTINATION];
      const w = outer >> 2;
      if ((outer & 3) === 0) {
        u32[w] = version | (length << 16);
        u32[w + 1] = identification | (df << 16);
        u32[w + 2] = life | (check << 16);
        u32[w + 3] = source;
        u32[w + 4] = destination;
      } else {
        u16[o] = version;
        u32[w + 1] = length | (identification << 16);
        u32[w + 2] = df | (life << 16);
        u32[w + 3] = check | (source << 16);
        u32[w + 4] = (source >>> 16) | (destination << 16);
        u16[o + 9] = destination >>> 16;
      }
      identification = (identification + 1) & 0xffff;
    }

    // 8. ESP header and IV.
    const e = esp >> 1;
    const spi = words[record + SA_WORD_SPI];
    const ivLow = (low + words[record + SA_WORD_IV_LOW]) | 0;
    const carry = ivLow >>> 0 < low >>> 0 ? 1 : 0;
    const ivHigh = (high + words[record + SA_WORD_IV_HIGH] + carry) | 0;
    const sequence = (low >>> 24) | ((low >>> 8) & 0xff00) | ((low & 0xff00) << 8) | (low << 24);
    const ivFirst = (ivHigh >>> 24) | ((ivHigh >>> 8) & 0xff00) | ((ivHigh & 0xff00) << 8) | (ivHigh << 24);
    const ivSecond = (ivLow >>> 24) | ((ivLow >>> 8) & 0xff00) | ((ivLow & 0xff00) << 8) | (ivLow << 24);
    if ((esp & 3) === 0) {
      const w = esp >> 2;
      u32[w] = spi;
      u32[w + 1] = sequence;
      u32[w + 2] = ivFirst;
      u32[w + 3] = ivSecond;
    } else {
      const w = e >> 1;
      u16[e] = spi;
      u32[w + 1] = (spi >>> 16) | (sequence << 16);
      u32[w + 2] = (sequence >>> 16) | (ivFirst << 16);
      u32[w + 3] = (ivFirst >>> 16) | (ivSecond << 16);
      u16[e + 7] = ivSecond >>> 16;
    }

    // 9. The job.
    const j = (n & 0xff) << 2;
    nonces[j + IV] = words[record + SA_WORD_SALT];
    nonces[j + IV + 1] = ivFirst;
    nonces[j + IV + 2] = ivSecond;
    nonces[j + AAD] = spi;
    if (esn) {
      nonces[j + AAD + 1] = (high >>> 24) | ((high >>> 8) & 0xff00) | ((high & 0xff00) << 8) | (high << 24);
      nonces[j + AAD + 2] = sequence;
    } else {
      nonces[j + AAD + 1] = sequence;
    }
    context[n] = words[record + SA_WORD_CONTEXT];
    icvOffset[n] = icv;
    cipherOffset[n] = ip;
    cipherLength[n] = plain;
    positions[n] = position;
    n = (n + 1) | 0;
    offsets[p] = start;
    lengths[p] = end - start;
    flags[p] &= ~STALE_FLAGS;
    verdicts[(base + position) | 0] = VERDICT_OK;
  }
  path.identification = identification;
  jobs.count = n;
  return k;
}
