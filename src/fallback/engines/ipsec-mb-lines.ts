/**
 * Which cache lines of a key slot a job reads, and reading them ahead for a whole burst.
 *
 * With many SAs a key schedule is in no cache. The library would meet each missing line on its own, in the middle of a
 * packet; a loop that does nothing but read one word of each line has a dozen misses under way at a time, which is three
 * times as fast (docs/decisions.md). Reading too few or too many lines costs time and nothing else.
 */
import type { CryptoBurst, Transform } from './engine.ts';
import * as keys from './ipsec-mb-keys.ts';

// Bound in this module: V8 folds constants of its own module only.
const { KeySlot, REGION_MASK } = keys;

/** Bytes of a cache line. */
const LINE = 64;
/** Lines that one round of the loop reads. */
const GROUP = 6;
/** Bytes before the hash keys in `gcm_key_data`: round keys for AES-256. */
const GCM_ROUND_KEYS = 240;
/** Up to this size (SSE, AVX2) the library keeps few powers of the hash key; above (AVX-512) many, the lowest ones last. */
const GCM_SMALL = 512;
/** Bytes of text that the powers in the last two lines are enough for, and those in six more lines: four powers a line. */
const GCM_SHORT = 96;
const GCM_STEP = GROUP * 64;

export interface KeyLines {
  /** A word (index) in each line, `GROUP` after `GROUP`; a group that is not full says lines again. */
  readonly words: Uint16Array;
  /** The first group is all that a text of so many bytes needs; each further one serves `GCM_STEP` more. */
  readonly short: number;
}

/** `gcmEnd`: bytes of `gcm_key_data` that the library fills on this processor. */
export function keyLines(transform: Transform, encrypting: boolean, gcmEnd: number): KeyLines {
  const { cipher, auth } = transform;
  const schedule = 16 * (7 + transform.cipherKeyLength / 4);
  if (cipher === 'aes-gcm' || auth === 'aes-gmac') {
    if (gcmEnd <= GCM_SMALL) return inGroups(range(0, gcmEnd), Infinity);
    const roundKeys = range(0, schedule);
    const powers = range(GCM_ROUND_KEYS, gcmEnd - GCM_ROUND_KEYS)
      .filter((word) => !roundKeys.includes(word))
      .reverse();
    const first = full([...roundKeys, ...powers.slice(0, 2)]);
    return inGroups([...first, ...powers.slice(2)], GCM_SHORT);
  }
  const lines: number[] = [];
  if (cipher === 'chacha20-poly1305') lines.push(...range(KeySlot.cipher, transform.cipherKeyLength));
  else if (cipher === '3des-cbc') lines.push(...range(KeySlot.cipher, KeySlot.desPointers + LINE));
  else if (cipher === 'aes-cbc' && !encrypting) lines.push(...range(KeySlot.decrypt, schedule));
  else if (cipher !== undefined && cipher !== 'null') lines.push(...range(KeySlot.cipher, schedule));
  if (auth === 'aes-xcbc' || auth === 'aes-cmac') lines.push(...range(KeySlot.auth, KeySlot.end - KeySlot.auth));
  else if (auth !== undefined) lines.push(...range(KeySlot.auth, 2 * LINE));
  return inGroups(lines, 0);
}

/** A word in each line of a range of bytes. */
function range(from: number, length: number): number[] {
  const words: number[] = [];
  for (let at = Math.floor(from / LINE) * LINE; at < from + length; at += LINE) words.push(at >> 2);
  return words;
}

/** The first line again and again until the last group is full. */
function full(words: readonly number[]): number[] {
  return [...words, ...Array<number>((GROUP - (words.length % GROUP)) % GROUP).fill(words[0])];
}

function inGroups(words: readonly number[], short: number): KeyLines {
  return { words: Uint16Array.from(full(words)), short };
}

/**
 * Reads the lines that jobs `start` to `start + n - 1` need, and what `kinds` says of their contexts. Those outside of
 * region 1 (`ipsec-mb-keys.ts`) are few, and read as if they were in it.
 */
export function touchKeys(
  slots: keys.KeySlots,
  kinds: Uint16Array,
  lines: KeyLines,
  burst: CryptoBurst,
  start: number,
  n: number,
): void {
  // hot:
  const view = slots.many;
  if (view === undefined) return;
  const end = start + n;
  const { cipherLength, context } = burst;
  const { words, short } = lines;
  let longest = 0;
  for (let k = start; k < end; k++) longest |= cipherLength[k];
  let touched = 0;
  for (let g = 0, covered = short; g < words.length; g += GROUP, covered += GCM_STEP) {
    touched |= touchGroup(view, slots.slotSize >> 2, kinds, words, g, context, start, end);
    if (short !== 0 && covered >= longest) break;
  }
  slots.touched = touched;
}

/** One group for all jobs. The reads are written out: with a loop around them a third of the misses overlap. */
function touchGroup(
  view: Uint32Array,
  slotWords: number,
  kinds: Uint16Array,
  words: Uint16Array,
  g: number,
  contexts: Uint32Array,
  start: number,
  end: number,
): number {
  // hot:
  const a = words[g];
  const b = words[g + 1];
  const c = words[g + 2];
  const d = words[g + 3];
  const e = words[g + 4];
  const f = words[g + 5];
  // One read of each array before the loop: what V8 then knows about it holds in the loop.
  let touched = contexts[0] | kinds[0] | view[0];
  for (let k = start; k < end; k++) {
    const context = contexts[k] | 0;
    const at = Math.imul(context & REGION_MASK, slotWords);
    touched |= kinds[context] | view[(at + a) | 0] | view[(at + b) | 0] | view[(at + c) | 0];
    touched |= view[(at + d) | 0] | view[(at + e) | 0] | view[(at + f) | 0];
  }
  return touched;
}
