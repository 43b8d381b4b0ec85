/**
 * ESP decapsulation of the simple case: an AEAD with a counting IV, a tunnel with nothing unusual, no options or extension
 * headers outside, no more padding than needed. The steps are those of `classify.ts`, `esp-inbound.ts` and `deliver.ts`,
 * which do everything else.
 *
 * Two loops in which nothing is called and nothing loops, with constants of this module; why, says
 * `esp-outbound-simple.ts`. A packet that is not simple ends the loop.
 */
import * as fields from '../packet/fields.ts';
import * as pools from '../packet/pool.ts';
import * as bursts from './burst.ts';
import * as engines from './engines/engine.ts';
import * as table from './sa-table.ts';
import * as sad from './sad.ts';
import * as numbers from './sequence.ts';
import * as verdictNumbers from './verdict.ts';

// Bound in this module, see above.
const { Esp, IpProtocol, Ipv4, Ipv6 } = fields;
const { NO_PACKET, PacketFlag } = pools;
const { BurstOffset, JobStatus } = engines;
const { RECORD, RECORD_SHIFT, SaKind, SaWord, Sizes } = table;
const { GOLDEN } = sad;
const { NO_WINDOW_SPAN, Resync } = numbers;
const { Verdict } = verdictNumbers;
const { At, Scratch } = bursts;
const { position: positions, state } = Scratch;
const { cipherLength, cipherOffset, context, icvOffset, status } = Scratch.jobs;
const {
  arrived: SA_WORD_ARRIVED,
  bytesLeft: SA_WORD_BYTES_LEFT,
  context: SA_WORD_CONTEXT,
  destination: SA_WORD_DESTINATION,
  destination4: SA_WORD_DESTINATION4,
  destinationBits: SA_WORD_DESTINATION_BITS,
  failures: SA_WORD_FAILURES,
  group: SA_WORD_GROUP,
  kind: SA_WORD_KIND,
  mask: SA_WORD_MASK,
  packetsLeft: SA_WORD_PACKETS_LEFT,
  salt: SA_WORD_SALT,
  sequenceHigh: SA_WORD_SEQUENCE_HIGH,
  sequenceLow: SA_WORD_SEQUENCE_LOW,
  sizes: SA_WORD_SIZES,
  window: SA_WORD_WINDOW,
  windowBase: SA_WORD_WINDOW_BASE,
  windowMask: SA_WORD_WINDOW_MASK,
} = SaWord;
const {
  destination4: SA_KIND_DESTINATION4,
  esn: SA_KIND_ESN,
  esp: SA_KIND_ESP,
  expired: SA_KIND_EXPIRED,
  inbound: SA_KIND_INBOUND,
  simple: SA_KIND_SIMPLE,
  softExpired: SA_KIND_SOFT_EXPIRED,
} = SaKind;
const { icv: SIZES_ICV, padMask: SIZES_PAD_MASK } = Sizes;
const { minLength: IPV4_MIN_LENGTH } = Ipv4;
const { length: IPV6_LENGTH } = Ipv6;
const { length: ESP_LENGTH, trailerLength: ESP_TRAILER_LENGTH } = Esp;
const { esp: IP_PROTOCOL_ESP, ipv4: IP_PROTOCOL_IPV4, ipv6: IP_PROTOCOL_IPV6 } = IpProtocol;
const { ok: VERDICT_OK } = Verdict;
const {
  checksumValid: PACKET_FLAG_CHECKSUM_VALID,
  needsChecksum: PACKET_FLAG_NEEDS_CHECKSUM,
  secured: PACKET_FLAG_SECURED,
  securityError: PACKET_FLAG_SECURITY_ERROR,
  softExpiry: PACKET_FLAG_SOFT_EXPIRY,
} = PacketFlag;
const { ok: JOB_STATUS_OK } = JobStatus;
const { failures: RESYNC_FAILURES } = Resync;
const { high: AT_HIGH, ip: AT_IP, low: AT_LOW, packet: AT_PACKET, record: AT_RECORD } = At;

/** Fields as their 16-bit words are in memory, bytes swapped. */
const ETHERTYPE_IPV4 = 0x0008;
const ETHERTYPE_IPV6 = 0xdd86;
/** Fragment offset and "more fragments". */
const FRAGMENT = 0xff3f;

const OURS = SA_KIND_INBOUND | SA_KIND_ESP | SA_KIND_SIMPLE;
/** Words of `CryptoBurst.memory` where the nonces and the AAD begin. */
const IV = BurstOffset.iv >> 2;
const AAD = BurstOffset.aad >> 2;
/** ESP header and the explicit IV of an AEAD. */
const AEAD_HEADER = ESP_LENGTH + 8;
/** Padding that AEADs need at most. */
const MOST_PADDING = 3;
/** Says that a record begins at no negative index and has room behind it, which saves overflow checks. */
const RECORD_MASK = 0x7fffffff & -RECORD;
const STALE_FLAGS =
  PACKET_FLAG_NEEDS_CHECKSUM | PACKET_FLAG_CHECKSUM_VALID | PACKET_FLAG_SECURITY_ERROR | PACKET_FLAG_SOFT_EXPIRY;

/**
 * Takes packets from position `from` of the burst on, up to the first that is not simple: finds the SA, checks number and window, and
 * adds a job. Returns where it stopped, `n` at most. All are of group `path.group`, which the first packet decides when
 * it is -1. `linkHeader` is 0 or 14.
 */
export function openSimple(
  path: bursts.DataPath,
  hash: Int32Array,
  shift: number,
  packets: Uint32Array,
  base: number,
  from: number,
  n: number,
  linkHeader: number,
): number {
  // hot:
  const pool = path.pool;
  const u16 = pool.u16;
  const offsets = pool.offset;
  const lengths = pool.length;
  const next = pool.next;
  const words = path.table.words;
  const windows = path.table.windows;
  const burst = path.burst;
  const jobs = burst.jobs;
  const nonces = jobs.memory.u32;
  const mask = (hash.length - 1) | 0;
  const link = linkHeader | 0;
  let group = path.group | 0;
  let count = jobs.count | 0;
  let i = from | 0;
  for (; i < n; i++) {
    const p = packets[(base + i) | 0] & 0x7fffffff;
    const at = offsets[p] | 0;
    const available = (lengths[p] - link) | 0;
    if ((at & 1) !== 0 || next[p] !== NO_PACKET || available < IPV4_MIN_LENGTH) break;
    const ip = (at + link) | 0;
    const q = ip >> 1;

    // 1. ESP in plain IPv4 or IPv6, whole, with a right header checksum.
    const first = u16[q];
    let total = 0;
    let header = 0;
    let destination = 0;
    const isV4 = (first & 0xff) === 0x45;
    if (isV4) {
      if (link !== 0 && u16[q - 1] !== ETHERTYPE_IPV4) break;
      const length = u16[q + 1];
      const fragment = u16[q + 3];
      const life = u16[q + 4];
      const to = u16[q + 8] | (u16[q + 9] << 16);
      if (life >> 8 !== IP_PROTOCOL_ESP || (fragment & FRAGMENT) !== 0) break;
      let sum = (first + length + u16[q + 2] + fragment + life + u16[q + 5] + u16[q + 6] + u16[q + 7]) | 0;
      sum = (sum + (to & 0xffff) + (to >>> 16)) | 0;
      sum = ((sum & 0xffff) + (sum >>> 16)) | 0;
      if (sum !== 0xffff) break;
      total = ((length & 0xff) << 8) | (length >> 8);
      header = (ip + IPV4_MIN_LENGTH) | 0;
      destination = to;
    } else if ((first & 0xf0) === 0x60 && available >= IPV6_LENGTH) {
      if (link !== 0 && u16[q - 1] !== ETHERTYPE_IPV6) break;
      if ((u16[q + 3] & 0xff) !== IP_PROTOCOL_ESP) break;
      const length = u16[q + 2];
      total = (IPV6_LENGTH + (((length & 0xff) << 8) | (length >> 8))) | 0;
      header = (ip + IPV6_LENGTH) | 0;
    } else break;
    const end = (ip + total) | 0;
    if (total > available || header + AEAD_HEADER > end) break;

    // 2. The SA, if the first two pairs of the hash table hold it.
    const h = header >> 1;
    const spi = u16[h] | (u16[h + 1] << 16);
    let pair = ((Math.imul(spi, GOLDEN) >>> shift) << 1) & mask;
    if (hash[pair] !== spi) pair = (pair + 2) & mask;
    if (hash[pair] !== spi) break;
    const record = (hash[pair + 1] << RECORD_SHIFT) & RECORD_MASK;
    const kind = words[record + SA_WORD_KIND];
    if ((kind & (OURS | SA_KIND_EXPIRED)) !== OURS) break;
    if ((kind & SA_KIND_DESTINATION4) !== 0) {
      if (!isV4 || destination !== words[record + SA_WORD_DESTINATION4]) break;
    } else {
      const bits = words[record + SA_WORD_DESTINATION_BITS];
      if (isV4) {
        const differing = destination ^ words[record + SA_WORD_DESTINATION];
        if (bits !== 0 && (bits >> 8 !== 4 || (differing & words[record + SA_WORD_MASK]) !== 0)) break;
      } else if (bits !== 0) {
        const d = (q + 12) | 0;
        const d0 = (u16[d] | (u16[d + 1] << 16)) ^ words[record + SA_WORD_DESTINATION];
        const d1 = (u16[d + 2] | (u16[d + 3] << 16)) ^ words[record + SA_WORD_DESTINATION + 1];
        const d2 = (u16[d + 4] | (u16[d + 5] << 16)) ^ words[record + SA_WORD_DESTINATION + 2];
        const d3 = (u16[d + 6] | (u16[d + 7] << 16)) ^ words[record + SA_WORD_DESTINATION + 3];
        const differing =
          (d0 & words[record + SA_WORD_MASK]) |
          (d1 & words[record + SA_WORD_MASK + 1]) |
          (d2 & words[record + SA_WORD_MASK + 2]) |
          (d3 & words[record + SA_WORD_MASK + 3]);
        if (bits >> 8 !== 6 || differing !== 0) break;
      }
    }
    const own = words[record + SA_WORD_GROUP];
    if (own !== group) {
      if (group !== -1) break;
      group = own;
    }

    // 3. Lengths.
    const sizes = words[record + SA_WORD_SIZES];
    const body = (header + AEAD_HEADER) | 0;
    const icv = (end - ((sizes >> SIZES_ICV) & 0xff)) | 0;
    const plain = (icv - body) | 0;
    if (plain < ESP_TRAILER_LENGTH || (plain & (sizes >> SIZES_PAD_MASK) & 0xff) !== 0) break;

    // 4. Sequence number and window: `inferHigh` and `isNew`, written out.
    const sequence = u16[h + 2] | (u16[h + 3] << 16);
    const low = (sequence >>> 24) | ((sequence >>> 8) & 0xff00) | ((sequence & 0xff00) << 8) | (sequence << 24);
    const window = words[record + SA_WORD_WINDOW];
    const topLow = words[record + SA_WORD_SEQUENCE_LOW];
    const topHigh = words[record + SA_WORD_SEQUENCE_HIGH];
    const esn = (kind & SA_KIND_ESN) !== 0;
    let high = 0;
    if (esn) {
      if (words[record + SA_WORD_FAILURES] >= RESYNC_FAILURES) break;
      const span = window === 0 ? NO_WINDOW_SPAN : window;
      const bottom = (topLow - span + 1) | 0;
      const isAhead = low >>> 0 >= bottom >>> 0;
      high = topHigh;
      if (topLow >>> 0 >= span - 1) {
        if (!isAhead) high = (topHigh + 1) | 0;
      } else if (isAhead && topHigh !== 0) high = (topHigh - 1) | 0;
    }
    if (window !== 0) {
      if (high !== topHigh) break;
      if (low >>> 0 <= topLow >>> 0) {
        if ((topLow - low) >>> 0 >= window) break;
        const block = (words[record + SA_WORD_WINDOW_BASE] + ((low >>> 5) & words[record + SA_WORD_WINDOW_MASK])) | 0;
        if ((windows[block] & (1 << (low & 31))) !== 0) break;
      }
    }

    // 5. The job.
    const j = (count & 0xff) << 2;
    nonces[j + IV] = words[record + SA_WORD_SALT];
    nonces[j + IV + 1] = u16[h + 4] | (u16[h + 5] << 16);
    nonces[j + IV + 2] = u16[h + 6] | (u16[h + 7] << 16);
    nonces[j + AAD] = spi;
    if (esn) {
      nonces[j + AAD + 1] = (high >>> 24) | ((high >>> 8) & 0xff00) | ((high & 0xff00) << 8) | (high << 24);
      nonces[j + AAD + 2] = sequence;
    } else {
      nonces[j + AAD + 1] = sequence;
    }
    context[count] = words[record + SA_WORD_CONTEXT];
    cipherOffset[count] = body;
    cipherLength[count] = plain;
    icvOffset[count] = icv;
    positions[count] = i;
    count = (count + 1) | 0;
    const s = (i & 0xff) << 3;
    state[s + AT_RECORD] = record;
    state[s + AT_PACKET] = p;
    state[s + AT_IP] = ip;
    state[s + AT_LOW] = low;
    state[s + AT_HIGH] = high;
  }
  path.group = group;
  jobs.count = count;
  return i;
}

/**
 * Delivers the packets of jobs from `from` on, up to the first that is not simple: it failed, it is a replay within the
 * burst, its padding or inner packet is unusual, its lifetime has to be looked at. Returns where it stopped, the number of
 * jobs at most. `linkHeader` is 0 or 14.
 */
export function completeSimple(
  path: bursts.DataPath,
  base: number,
  from: number,
  linkHeader: number,
  verdicts: Uint8Array,
): number {
  // hot:
  const pool = path.pool;
  const u8 = pool.u8;
  const u16 = pool.u16;
  const u32 = pool.u32;
  const offsets = pool.offset;
  const lengths = pool.length;
  const handles = pool.sa;
  const flags = pool.flags;
  const words = path.table.words;
  const windows = path.table.windows;
  const burst = path.burst;
  const jobs = burst.jobs;
  const count = jobs.count | 0;
  const link = linkHeader | 0;
  let j = from | 0;
  for (; j < count; j++) {
    const position = positions[j];
    const s = (position & 0xff) << 3;
    const record = state[s + AT_RECORD] & RECORD_MASK;
    const kind = words[record + SA_WORD_KIND];
    if (status[j] !== JOB_STATUS_OK || (kind & SA_KIND_SIMPLE) === 0) break;
    const p = state[s + AT_PACKET] & 0x7fffffff;

    // 2. The window moves by a block at most, and the number is still new.
    const low = state[s + AT_LOW];
    const topLow = words[record + SA_WORD_SEQUENCE_LOW];
    const isAhead = low >>> 0 > topLow >>> 0;
    if (state[s + AT_HIGH] !== words[record + SA_WORD_SEQUENCE_HIGH]) break;
    const window = words[record + SA_WORD_WINDOW];
    const windowBase = words[record + SA_WORD_WINDOW_BASE];
    const mask = words[record + SA_WORD_WINDOW_MASK];
    const block = low >>> 5;
    const blocks = (block - (topLow >>> 5)) | 0;
    const at = (windowBase + (block & mask)) | 0;
    const bit = 1 << (low & 31);
    if (window !== 0) {
      if (isAhead) {
        if (blocks > 1) break;
      } else if ((topLow - low) >>> 0 >= window || (windows[at] & bit) !== 0) break;
    }

    // 3. Trailer.
    const body = cipherOffset[j] | 0;
    const trailer = (body + cipherLength[j] - ESP_TRAILER_LENGTH) | 0;
    const padLength = u8[trailer];
    const nextHeader = u8[(trailer + 1) | 0];
    const payload = (trailer - body - padLength) | 0;
    if (padLength > MOST_PADDING || payload < IPV4_MIN_LENGTH) break;
    if (padLength > 0 && u8[(trailer - padLength) | 0] !== 1) break;
    if (padLength > 1 && u8[(trailer - padLength + 1) | 0] !== 2) break;
    if (padLength > 2 && u8[(trailer - 1) | 0] !== 3) break;

    // 4. The inner packet.
    const b = body >> 1;
    const first = u16[b] & 0xff;
    let total = 0;
    let type = ETHERTYPE_IPV4;
    if (nextHeader === IP_PROTOCOL_IPV4) {
      if (first !== 0x45) break;
      const length = u16[b + 1];
      total = ((length & 0xff) << 8) | (length >> 8);
    } else if (nextHeader === IP_PROTOCOL_IPV6) {
      if (first >> 4 !== 6) break;
      const length = u16[b + 2];
      total = (IPV6_LENGTH + (((length & 0xff) << 8) | (length >> 8))) | 0;
      type = ETHERTYPE_IPV6;
    } else break;
    if (total !== payload) break;

    // 5. Lifetime. From here on nothing can fail.
    const packetsLeft = words[record + SA_WORD_PACKETS_LEFT];
    const bytesLeft = words[record + SA_WORD_BYTES_LEFT];
    if (packetsLeft === 0 || bytesLeft < total) break;
    words[record + SA_WORD_PACKETS_LEFT] = packetsLeft - 1;
    words[record + SA_WORD_BYTES_LEFT] = bytesLeft - total;
    words[record + SA_WORD_FAILURES] = 0;
    if (window !== 0) windows[at] = isAhead && blocks === 1 ? bit : windows[at] | bit;
    if (isAhead) words[record + SA_WORD_SEQUENCE_LOW] = low;

    // 6. The link header follows the inner packet: both addresses, 12 bytes.
    const start = (body - link) | 0;
    if (link !== 0) {
      const outer = (state[s + AT_IP] - link) | 0;
      if (((outer | start) & 3) === 0) {
        const x = outer >> 2;
        const y = start >> 2;
        u32[y + 2] = u32[x + 2];
        u32[y + 1] = u32[x + 1];
        u32[y] = u32[x];
      } else {
        const x = outer >> 1;
        const y = start >> 1;
        u16[y + 5] = u16[x + 5];
        u16[y + 4] = u16[x + 4];
        u16[y + 3] = u16[x + 3];
        u16[y + 2] = u16[x + 2];
        u16[y + 1] = u16[x + 1];
        u16[y] = u16[x];
      }
      u16[b - 1] = type;
    }
    offsets[p] = start;
    lengths[p] = total + link;
    handles[p] = words[record + SA_WORD_ARRIVED];
    const soft = (kind & SA_KIND_SOFT_EXPIRED) !== 0 ? PACKET_FLAG_SOFT_EXPIRY : 0;
    flags[p] = (flags[p] & ~STALE_FLAGS) | PACKET_FLAG_SECURED | soft;
    verdicts[(base + position) | 0] = VERDICT_OK;
  }
  return j;
}
