/**
 * ESP decapsulation (RFC 4303, 3.4): a run of packets of one group, in place, in two passes around one engine call.
 *
 * Order of checks: sequence number against the window, ICV, window again and only then update, lifetime, padding,
 * inner headers, selector, ECN, TTL. Everything before the ICV is told by a liar, so it only ever leads to a drop;
 * what the window learns, it learns after the ICV.
 *
 * `classify.ts` finds the SA and puts the offsets of the headers into the burst.
 */
import * as fields from '../packet/fields.ts';
import type { DataPath, Group } from './burst.ts';
import * as bursts from './burst.ts';
import { classifyOne } from './classify.ts';
import { complete } from './deliver.ts';
import { openEsnGap } from './esn-gap.ts';
import { openSimple } from './esp-inbound-simple.ts';
import { setAad, setNonce, swapBytes } from './jobs.ts';
import { readAheadInbound } from './read-ahead.ts';
import { isNew } from './replay.ts';
import { keepCandidate, resynchronize, shouldResynchronize } from './resync.ts';
import * as table from './sa-table.ts';
import type { SaDatabase } from './sad.ts';
import { inferHigh, NO_WINDOW_SPAN, Resync, writeNumber } from './sequence.ts';
import * as verdictNumbers from './verdict.ts';

// Bound in this module: V8 folds constants of its own module only.
const { Esp } = fields;
const { At, Scratch } = bursts;
const { position: positions, state } = Scratch;
const { authLength, authOffset, cipherLength, cipherOffset, context, icvOffset } = Scratch.jobs;
const { drop, SaKind, SaWord, Sizes } = table;
const { Verdict } = verdictNumbers;

/** Bytes in front of ESP that `openEsnGap` changes. */
const ESN_GAP = 4;

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
  const { burst } = path;
  burst.jobs.count = 0;
  path.candidate = -1;
  for (let k = from; k < to; k++) {
    const position = burst.order[k];
    const verdict = openOne(path, group, packets[base + position], position);
    verdicts[base + position] = verdict;
  }
  decryptJobs(path, group, packets, base, linkHeader, verdicts);
}

/**
 * The usual burst: ESP of one group, mostly simple. Takes packets from the first on; stops at the first of another group and
 * returns its position, `n` when there is none. `linkHeader` is 0 or 14.
 */
export function decapsulateUniform(
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
  const { burst } = path;
  const words = path.table.words;
  burst.jobs.count = 0;
  path.candidate = -1;
  path.group = -1;
  readAheadInbound(path, sad.hash, sad.shift, packets, base, n, linkHeader);
  let i = 0;
  // Whether the next packet may be simple: if the last one was on a simple SA, and to begin with.
  let trySimple = true;
  for (; i < n; i++) {
    if (trySimple) i = openSimple(path, sad.hash, sad.shift, packets, base, i, n, linkHeader);
    if (i === n) break;
    const p = packets[base + i];
    const verdict = classifyOne(path, sad, espPorts, p, i, linkHeader);
    if (verdict === Verdict.ok) {
      const record = state[(i << 3) + At.record];
      const own = words[record + SaWord.group];
      trySimple = (words[record + SaWord.kind] & SaKind.simple) !== 0;
      const group = path.groups[own];
      if ((path.group !== -1 && path.group !== own) || group.protocol !== 'esp') break;
      path.group = own;
      verdicts[base + i] = openOne(path, group, p, i);
    } else {
      state[(i << 3) + At.record] = 0;
      verdicts[base + i] = verdict;
    }
  }
  if (path.group !== -1) decryptJobs(path, path.groups[path.group], packets, base, linkHeader, verdicts);
  return i;
}

/** Authenticates and decrypts all jobs at once; then what came out, in the order of arrival. */
function decryptJobs(
  path: DataPath,
  group: Group,
  packets: Uint32Array,
  base: number,
  linkHeader: number,
  verdicts: Uint8Array,
): void {
  // hot:
  const { jobs } = path.burst;
  if (jobs.count === 0) return;
  jobs.aadLength = group.aadLength;
  group.engine.decrypt(group.transform, jobs);
  complete(path, group, packets, base, linkHeader, verdicts);
  if (!shouldResynchronize(path, base, verdicts)) return;
  const { candidate } = path;
  const esp = state[(candidate << 3) + At.header];
  const end = state[(candidate << 3) + At.end];
  resynchronize(path, base, esp - ESN_GAP, end, verdicts, () => {
    decapsulate(path, group, packets, base, 0, 1, linkHeader, verdicts);
  });
}

/** Adds a job for packet `p` if nothing speaks against it; returns the verdict so far. */
function openOne(path: DataPath, group: Group, p: number, position: number): number {
  // hot:
  const { burst } = path;
  const verdict = buildJob(path, group, p, position, burst.jobs.count);
  if (verdict === Verdict.ok) positions[burst.jobs.count++] = position;
  else drop(path.table, state[(position << 3) + At.record], verdict);
  return verdict;
}

/** Checks what can be checked before the ICV and builds job `n`; returns the verdict. */
function buildJob(path: DataPath, group: Group, p: number, position: number, n: number): number {
  // hot:
  const { pool, burst } = path;
  const { u8, u16, stride } = pool;
  const { words, windows } = path.table;
  const { jobs } = burst;
  const record = state[(position << 3) + At.record];
  const end = state[(position << 3) + At.end];
  const kind = words[record + SaWord.kind];
  const sizes = words[record + SaWord.sizes];
  const esp = state[(position << 3) + At.header];
  const e = esp >> 1;

  // 1. Lengths: at least a trailer, and whole blocks.
  const ivLength = (sizes >> Sizes.iv) & 0xff;
  const icvLength = (sizes >> Sizes.icv) & 0xff;
  const body = (esp + Esp.length + ivLength) | 0;
  const icv = (end - icvLength) | 0;
  const plain = (icv - body) | 0;
  if (plain < Esp.trailerLength || (plain & (sizes >> Sizes.padMask) & 0xff) !== 0) return Verdict.malformed;

  // 2. Sequence number: its high half (RFC 4303, A2.2), and the window.
  const sequence = u16[e + 2] | (u16[e + 3] << 16);
  const low = swapBytes(sequence);
  const window = words[record + SaWord.window];
  const topLow = words[record + SaWord.sequenceLow];
  const topHigh = words[record + SaWord.sequenceHigh];
  let high = 0;
  if (group.esn) {
    if (path.resyncing) high = path.forcedHigh;
    else {
      high = inferHigh(low, topLow, topHigh, window === 0 ? NO_WINDOW_SPAN : window);
      if (path.candidate < 0 && words[record + SaWord.failures] >= Resync.failures) {
        keepCandidate(path, position, esp - ESN_GAP, end);
      }
    }
  }
  if (window !== 0) {
    const windowBase = words[record + SaWord.windowBase];
    const mask = words[record + SaWord.windowMask];
    if (!isNew(windows, windowBase, mask, window, topLow, topHigh, low, high)) return Verdict.replay;
  }
  if ((kind & SaKind.expired) !== 0) return Verdict.expired;
  state[(position << 3) + At.low] = low;
  state[(position << 3) + At.high] = high;

  // 3. The job.
  if ((kind & SaKind.counterIv) !== 0) {
    const first = u16[e + 4] | (u16[e + 5] << 16);
    const second = u16[e + 6] | (u16[e + 7] << 16);
    setNonce(jobs, n, kind, words[record + SaWord.salt], first, second);
  } else {
    for (let w = 0; w < ivLength >> 2; w++) jobs.iv[n * 4 + w] = u16[e + 4 + 2 * w] | (u16[e + 5 + 2 * w] << 16);
  }
  context[n] = words[record + SaWord.context];
  cipherOffset[n] = body;
  cipherLength[n] = plain;
  icvOffset[n] = icv;
  if (group.family === 'aead') {
    setAad(jobs, n, words[record + SaWord.spi], sequence, high, group.esn);
  } else {
    authOffset[n] = esp;
    authLength[n] = icv - esp;
    if (group.esn) {
      authLength[n] += 4;
      if (group.family === 'gmac') {
        authOffset[n] = openEsnGap(u16, esp, high, burst.savedA, position);
      } else {
        // The ICV makes room for the high half (RFC 4303, 2.2.1).
        if (icv + icvLength + 4 > (p + 1) * stride) return Verdict.noRoom;
        u8.copyWithin(icv + 4, icv, icv + icvLength);
        writeNumber(u8, icv, high);
        icvOffset[n] = icv + 4;
      }
    }
  }
  return Verdict.ok;
}
