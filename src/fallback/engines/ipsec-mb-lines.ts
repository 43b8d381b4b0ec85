/**
 * Which cache lines of a key slot a job reads, and reading them ahead for a whole burst.
 *
 * With many SAs a key schedule is in no cache. The library would meet each missing line on its own, in the middle of a
 * packet; a loop that does nothing but read one word of each line has two dozen misses under way at a time
 * (docs/decisions.md). Reading too few or too many lines costs time and nothing else.
 */
import type { ContextNumbers } from './checks.ts';
import { type CryptoBurst, MAX_BURST, type Transform } from './engine.ts';
import * as keys from './ipsec-mb-keys.ts';

// Bound in this module: V8 folds constants of its own module only.
const { KeySlot, REGION_MASK } = keys;

/** Bytes and words of a cache line. */
const LINE = 64;
const LINE_WORDS = LINE >> 2;
/** Lines side by side that one round of a loop reads at most. */
const RUN = 4;
/** What AES-128 with GCM or a hash needs, in one loop, which is a tenth faster than two: the round keys, and two lines elsewhere. */
const HEAD = 3;
const TAIL = 2;
/** While there are no more contexts than this, their schedules stay in the cache. */
const CACHED_CONTEXTS = 4096;
/** Bytes before the hash keys in `gcm_key_data`: round keys for AES-256. */
const GCM_ROUND_KEYS = 240;
/** Up to this size (SSE, AVX2) the library keeps few powers of the hash key; above (AVX-512) many, the lowest ones last. */
const GCM_SMALL = 512;
/** Lines with the lowest powers, the bytes of text that they are enough for, and the bytes that four powers in a line are for. */
const GCM_SHORT_LINES = 2;
const GCM_SHORT = 96;
const GCM_LINE = 64;

/** Lines of a key slot that lie side by side: 1 to `RUN`, or `HEAD` of them with `TAIL` more elsewhere. */
interface Run {
  /** The first word of the first line, and of the tail's. */
  readonly word: number;
  readonly tail: number;
  readonly lines: number;
  /** Texts of fewer bytes do not need it. */
  readonly from: number;
}

/** Runs in the order of `from`. */
export type KeyLines = readonly Run[];

/** `gcmEnd`: bytes of `gcm_key_data` that the library fills on this processor. */
export function keyLines(transform: Transform, encrypting: boolean, gcmEnd: number): KeyLines {
  const { cipher, auth } = transform;
  const schedule = 16 * (7 + transform.cipherKeyLength / 4);
  if (cipher === 'aes-gcm' || auth === 'aes-gmac') {
    if (gcmEnd <= GCM_SMALL) return runs(0, gcmEnd);
    const lowest = LINE * (Math.ceil(gcmEnd / LINE) - GCM_SHORT_LINES);
    return [...joined([...runs(0, schedule), ...runs(lowest, gcmEnd - lowest)]), ...morePowers(schedule, lowest)];
  }
  const lines: Run[] = [];
  if (cipher === 'chacha20-poly1305') lines.push(...runs(KeySlot.cipher, transform.cipherKeyLength));
  else if (cipher === '3des-cbc') lines.push(...runs(KeySlot.cipher, KeySlot.desPointers + LINE));
  else if (cipher === 'aes-cbc' && !encrypting) lines.push(...runs(KeySlot.decrypt, schedule));
  else if (cipher !== undefined && cipher !== 'null') lines.push(...runs(KeySlot.cipher, schedule));
  if (auth === 'aes-xcbc' || auth === 'aes-cmac') lines.push(...runs(KeySlot.auth, KeySlot.end - KeySlot.auth));
  else if (auth !== undefined) lines.push(...runs(KeySlot.auth, 2 * LINE));
  return joined(lines);
}

/** The lines of `length` bytes at `at`. */
function runs(at: number, length: number): Run[] {
  const all: Run[] = [];
  const end = Math.ceil((at + length) / LINE);
  for (let line = Math.floor(at / LINE); line < end; line += RUN) {
    all.push({ word: line * LINE_WORDS, tail: 0, lines: Math.min(RUN, end - line), from: 0 });
  }
  return all;
}

/** The same with the first two runs as one, when that is possible. */
function joined(all: readonly Run[]): readonly Run[] {
  const [head, tail, ...rest] = all;
  if (head?.lines !== HEAD || tail?.lines !== TAIL) return all;
  return [{ ...head, tail: tail.word, lines: HEAD + TAIL }, ...rest];
}

/** The powers between the round keys and the lowest powers, from the lower ones to the higher. */
function morePowers(schedule: number, lowest: number): Run[] {
  const all: Run[] = [];
  const begin = Math.max(Math.floor(GCM_ROUND_KEYS / LINE), Math.ceil(schedule / LINE));
  let from = GCM_SHORT;
  for (let end = lowest / LINE; end > begin; end -= RUN) {
    const lines = Math.min(RUN, end - begin);
    all.push({ word: (end - lines) * LINE_WORDS, tail: 0, lines, from });
    from += lines * GCM_LINE;
  }
  return all;
}

/** By job of the run: the first word of its key slot. */
const places = new Int32Array(MAX_BURST);

/**
 * Reads the lines that jobs `start` to `start + n - 1` need, and what `contexts` says of theirs. Those outside of region 1
 * (`ipsec-mb-keys.ts`) are few, and read as if they were in it.
 */
export function touchKeys(
  slots: keys.KeySlots,
  contexts: ContextNumbers,
  shape: { readonly index: number; readonly lines: KeyLines },
  burst: CryptoBurst,
  start: number,
  n: number,
): void {
  // hot:
  const view = slots.many;
  if (contexts.capacity <= CACHED_CONTEXTS || view === undefined) return;
  const { index, lines } = shape;
  const members = contexts.membersOf(index);
  const { cipherLength, context } = burst;
  const slotWords = slots.slotSize >> 2;
  let touched = 0;
  let longest = 0;
  for (let k = 0; k < n; k++) {
    const c = context[start + k];
    places[k] = Math.imul(c & REGION_MASK, slotWords);
    touched |= members[c >>> 5];
    longest |= cipherLength[start + k];
  }
  // The first one outside of the loop: there V8 makes better code of the loop inside (docs/decisions.md).
  slots.touched = touched | touchRun(view, lines[0], n);
  for (let r = 1; r < lines.length && lines[r].from <= longest; r++) slots.touched |= touchRun(view, lines[r], n);
}

/**
 * One run for all jobs. A loop for each number of lines, with as little in it as can be: the fewer instructions there are
 * between two reads, the more of them are under way. A loop over the lines inside would let a third of them overlap.
 */
function touchRun(view: Uint32Array, { word, tail, lines }: Run, n: number): number {
  // hot:
  // One read of each array before the loop: what V8 then knows about it holds in the loop.
  let touched = view[0] | places[0];
  if (lines === 1) {
    for (let k = 0; k < n; k++) touched |= view[(places[k] + word) | 0];
  } else if (lines === 2) {
    for (let k = 0; k < n; k++) {
      const at = (places[k] + word) | 0;
      touched |= view[at] | view[(at + LINE_WORDS) | 0];
    }
  } else if (lines === 3) {
    for (let k = 0; k < n; k++) {
      const at = (places[k] + word) | 0;
      touched |= view[at] | view[(at + LINE_WORDS) | 0] | view[(at + 2 * LINE_WORDS) | 0];
    }
  } else if (lines === RUN) {
    for (let k = 0; k < n; k++) {
      const at = (places[k] + word) | 0;
      touched |= view[at] | view[(at + LINE_WORDS) | 0] | view[(at + 2 * LINE_WORDS) | 0];
      touched |= view[(at + 3 * LINE_WORDS) | 0];
    }
  } else {
    for (let k = 0; k < n; k++) {
      const at = (places[k] + word) | 0;
      const end = (places[k] + tail) | 0;
      touched |= view[at] | view[(at + LINE_WORDS) | 0] | view[(at + 2 * LINE_WORDS) | 0];
      touched |= view[end] | view[(end + LINE_WORDS) | 0];
    }
  }
  return touched;
}
