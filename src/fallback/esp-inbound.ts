/**
 * ESP decapsulation (RFC 4303, 3.4): a run of packets of one group, in place, in two passes around one engine call.
 *
 * Order of checks: sequence number against the window, ICV, window again and only then update, lifetime, padding,
 * inner headers, selector, ECN, TTL. Everything before the ICV is told by a liar, so it only ever leads to a drop;
 * what the window learns, it learns after the ICV.
 *
 * `classify.ts` has found the SA and put the offsets of the headers into the burst.
 */
import { Esp, IpProtocol } from '../packet/fields.ts';
import type { DataPath, Group } from './burst.ts';
import { accept, charge, deliver } from './deliver.ts';
import { JobStatus } from './engines/engine.ts';
import { closeEsnGap, openEsnGap } from './esp-outbound.ts';
import { isNew } from './replay.ts';
import { SaKind, SaWord, Sizes } from './sa-table.ts';
import { inferHigh, NO_WINDOW_SPAN, Resync, writeNumber } from './sequence.ts';
import { Verdict } from './verdict.ts';

/**
 * Decapsulates the packets `order[from]` to `order[to - 1]` of the burst, which begins at `packets[base]`.
 * `linkHeader` is even. Verdicts go to `verdicts[base + position]`.
 */
export function decapsulate(
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
  const stride = pool.stride;
  const words = path.table.words;
  const windows = path.table.windows;
  const burst = path.burst;
  const order = burst.order;
  const records = burst.record;
  const headers = burst.header;
  const ends = burst.end;
  const lows = burst.low;
  const highs = burst.high;
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
  const forcedHigh = path.forcedHigh;
  let candidate = -1;
  let n = 0;

  for (let k = from; k < to; k++) {
    const position = order[k];
    const record = records[position];
    const kind = words[record + SaWord.kind];
    const sizes = words[record + SaWord.sizes];
    const esp = headers[position];
    const e = esp >>> 1;

    // 1. Lengths: at least a trailer, and whole blocks.
    const ivLength = (sizes >>> Sizes.iv) & 0xff;
    const icvLength = (sizes >>> Sizes.icv) & 0xff;
    const body = esp + Esp.length + ivLength;
    const icv = ends[position] - icvLength;
    const plain = icv - body;
    if (plain < Esp.trailerLength || (plain & (sizes >>> Sizes.padMask) & 0xff) !== 0) {
      verdicts[base + position] = Verdict.malformed;
      continue;
    }

    // 2. Sequence number: its high half (RFC 4303, A2.2), and the window.
    const sequence = (u16[e + 2] | (u16[e + 3] << 16)) >>> 0;
    const low = ((sequence >>> 24) | ((sequence >>> 8) & 0xff00) | ((sequence & 0xff00) << 8) | (sequence << 24)) >>> 0;
    const window = words[record + SaWord.window];
    const topLow = words[record + SaWord.sequenceLow];
    const topHigh = words[record + SaWord.sequenceHigh];
    let high = 0;
    if (esn) {
      high = inferHigh(low, topLow, topHigh, window === 0 ? NO_WINDOW_SPAN : window);
      if (forcedHigh >= 0) high = forcedHigh;
      else if (candidate < 0 && words[record + SaWord.failures] >= Resync.failures) {
        candidate = k;
        keepCopy(path, esp, ends[position]);
      }
    }
    if (
      window !== 0 &&
      !isNew(
        windows,
        words[record + SaWord.windowBase],
        words[record + SaWord.windowMask],
        window,
        topLow,
        topHigh,
        low,
        high,
      )
    ) {
      verdicts[base + position] = Verdict.replay;
      continue;
    }
    if ((kind & SaKind.expired) !== 0) {
      verdicts[base + position] = Verdict.expired;
      continue;
    }
    lows[position] = low;
    highs[position] = high;

    // 3. The job.
    const j4 = n * 4;
    if ((kind & SaKind.counterIv) !== 0) {
      const first = u16[e + 4] | (u16[e + 5] << 16);
      const second = u16[e + 6] | (u16[e + 7] << 16);
      const salt = words[record + SaWord.salt];
      if ((kind & SaKind.ccm) === 0) {
        iv[j4] = salt;
        iv[j4 + 1] = first;
        iv[j4 + 2] = second;
        iv[j4 + 3] = 0x01000000;
      } else {
        iv[j4] = salt | (first << 24);
        iv[j4 + 1] = (first >>> 8) | (second << 24);
        iv[j4 + 2] = second >>> 8;
      }
    } else {
      for (let w = 0; w < ivLength >>> 2; w++) iv[j4 + w] = u16[e + 4 + 2 * w] | (u16[e + 5 + 2 * w] << 16);
    }
    context[n] = words[record + SaWord.context];
    cipherOffset[n] = body;
    cipherLength[n] = plain;
    icvOffset[n] = icv;
    if (isAead) {
      aad[j4] = words[record + SaWord.spi];
      if (esn) {
        aad[j4 + 1] = (high >>> 24) | ((high >>> 8) & 0xff00) | ((high & 0xff00) << 8) | (high << 24);
        aad[j4 + 2] = sequence;
      } else {
        aad[j4 + 1] = sequence;
      }
    } else {
      authOffset[n] = esp;
      authLength[n] = icv - esp;
      if (esn) {
        authLength[n] += 4;
        if (isGmac) {
          authOffset[n] = openEsnGap(u16, esp, high, burst.savedA, position);
        } else {
          // The ICV makes room for the high half (RFC 4303, 2.2.1).
          if (icv + icvLength + 4 > (packets[base + position] + 1) * stride) {
            verdicts[base + position] = Verdict.noRoom;
            continue;
          }
          u8.copyWithin(icv + 4, icv, icv + icvLength);
          writeNumber(u8, icv, high);
          icvOffset[n] = icv + 4;
        }
      }
    }
    verdicts[base + position] = Verdict.ok;
    positions[n++] = position;
  }
  if (n === 0) return;

  // 4. Authenticate and decrypt, all at once.
  jobs.count = n;
  jobs.aadLength = group.aadLength;
  group.engine.decrypt(group.transform, jobs);

  // 5. What came out, in the order of arrival.
  for (let j = 0; j < n; j++) {
    const position = positions[j];
    const record = records[position];
    let verdict: number = Verdict.ok;
    if (jobs.status[j] !== JobStatus.ok) {
      verdict = jobs.status[j] === JobStatus.icv ? Verdict.icv : Verdict.engine;
      if (verdict === Verdict.icv) words[record + SaWord.failures]++;
    } else {
      if (isGmac && esn) closeEsnGap(u16, authOffset[j] + 4, burst.savedA[position]);
      words[record + SaWord.failures] = 0;
      verdict = accept(path, record, lows[position], highs[position]);
      if (verdict === Verdict.ok) {
        verdict = open(path, packets[base + position], position, record, cipherOffset[j], cipherLength[j], linkHeader);
      }
    }
    verdicts[base + position] = verdict;
  }
  if (candidate >= 0 && verdicts[base + order[candidate]] === Verdict.icv) {
    resynchronize(path, group, packets, base, candidate, linkHeader, verdicts);
  }
}

/** Reads the trailer and hands the payload on (RFC 4303, 2.4 to 2.7). */
function open(
  path: DataPath,
  p: number,
  position: number,
  record: number,
  body: number,
  plain: number,
  linkHeader: number,
): number {
  // hot:
  const u8 = path.pool.u8;
  const trailer = body + plain - Esp.trailerLength;
  const padLength = u8[trailer];
  const nextHeader = u8[trailer + 1];
  const payload = plain - Esp.trailerLength - padLength;
  if (payload < 0) return Verdict.malformed;
  for (let pad = 1, at = body + payload; pad <= padLength; pad++, at++) {
    if (u8[at] !== pad) return Verdict.malformed;
  }
  if (nextHeader === IpProtocol.none) {
    const verdict = charge(path, record, 0);
    return verdict === Verdict.ok ? Verdict.dummy : verdict;
  }
  return deliver(path, p, position, record, body, payload, nextHeader, linkHeader);
}

/** Keeps what decryption would destroy of the ESP packet from `esp` to `end`, and the four bytes before it. */
function keepCopy(path: DataPath, esp: number, end: number): void {
  const size = end - esp + 4;
  if (path.copy.length < size) path.copy = new Uint8Array(size);
  path.copy.set(path.pool.u8.subarray(esp - 4, end));
}

/** Tries the packet `order[k]`, which failed its ICV, with the next high halves (RFC 4303, A2.3). */
function resynchronize(
  path: DataPath,
  group: Group,
  packets: Uint32Array,
  base: number,
  k: number,
  linkHeader: number,
  verdicts: Uint8Array,
): void {
  const { burst, pool } = path;
  const position = burst.order[k];
  const record = burst.record[position];
  const esp = burst.header[position];
  const size = burst.end[position] - esp + 4;
  const inferred = burst.high[position];
  for (let step = 1; step <= Resync.candidates && inferred + step <= 0xffffffff; step++) {
    pool.u8.set(path.copy.subarray(0, size), esp - 4);
    path.forcedHigh = inferred + step;
    decapsulate(path, group, packets, base, k, k + 1, linkHeader, verdicts);
    if (verdicts[base + position] !== Verdict.icv) break;
  }
  path.forcedHigh = -1;
  path.table.words[record + SaWord.failures] = 0;
}
