/**
 * Reads what is known of the SAs of a burst before it is used, so that the cache misses of many packets are under way at once.
 *
 * With many SAs each packet misses the cache two to four times in a row: handle or hash table, record, replay window. A
 * processor overlaps as many misses as it has loads within some 300 instructions, so the reads are in loops that do
 * nothing else, one for each step of the way (docs/decisions.md). Nothing is checked or decided here: a packet that is not
 * what it seems, or that is left over when four at a time have been taken, only misses later.
 */
import * as fields from '../packet/fields.ts';
import type { DataPath } from './burst.ts';
import * as engines from './engines/engine.ts';
import * as table from './sa-table.ts';
import * as sad from './sad.ts';

// Bound in this module: V8 folds constants of its own module only.
const { Ipv4, Ipv6 } = fields;
const { MAX_BURST } = engines;
const { RECORD, RECORD_SHIFT, SaWord } = table;
const { GOLDEN } = sad;
const { minLength: IPV4_MIN_LENGTH } = Ipv4;
const { length: IPV6_LENGTH } = Ipv6;
const { windowBase: SA_WORD_WINDOW_BASE } = SaWord;
const RECORD_MASK = 0x7fffffff & -RECORD;
/** Halfwords from the start of an IPv6 header to the end of the SPI behind it. */
const SPI_END = (IPV6_LENGTH >> 1) + 2;

/** While there are no more SAs than this, what is known of them stays in the cache. */
const CACHED_SAS = 2048;

/** By position in the burst: where to read next, and the SPI. */
const places = new Int32Array(MAX_BURST);
const spis = new Int32Array(MAX_BURST);

/** Packets `base` to `base + n - 1` are to be protected. `slotOf` is that of the SA database: its length is a power of two. */
export function readAheadOutbound(
  path: DataPath,
  slotOf: Int32Array,
  packets: Uint32Array,
  base: number,
  n: number,
): void {
  // hot:
  if (path.table.end <= CACHED_SAS) return;
  const handles = path.pool.sa;
  const mask = slotOf.length - 1;
  for (let i = 0; i < n; i++) places[i] = handles[packets[base + i] & 0x7fffffff] & mask;
  path.touched |= read(slotOf, n);
  for (let i = 0; i < n; i++) places[i] = (slotOf[places[i]] << RECORD_SHIFT) & RECORD_MASK;
  path.touched |= read(path.table.words, n);
}

/**
 * Packets `base` to `base + n - 1` have been received: SAs by the SPI that is there if it is ESP in plain IPv4 or IPv6.
 * `hash` and `shift` are those of the SA database.
 */
export function readAheadInbound(
  path: DataPath,
  hash: Int32Array,
  shift: number,
  packets: Uint32Array,
  base: number,
  n: number,
  linkHeader: number,
): void {
  // hot:
  if (path.table.end <= CACHED_SAS) return;
  const { u16, offset: offsets } = path.pool;
  const { words, windows } = path.table;
  const mask = hash.length - 1;
  const last = u16.length - SPI_END;
  for (let i = 0; i < n; i++) {
    const q = Math.min((offsets[packets[base + i] & 0x7fffffff] + linkHeader) >> 1, last);
    const h = q + ((u16[q] & 0xf0) === 0x60 ? IPV6_LENGTH >> 1 : IPV4_MIN_LENGTH >> 1);
    const spi = u16[h] | (u16[h + 1] << 16);
    spis[i] = spi;
    places[i] = ((Math.imul(spi, GOLDEN) >>> shift) << 1) & mask;
  }
  path.touched |= read(hash, n);
  for (let i = 0; i < n; i++) {
    // The second pair when the first has another SPI, without a branch that would be foretold wrongly.
    const home = places[i];
    const differing = hash[home] ^ spis[i];
    const pair = (home + (((differing | -differing) >>> 31) << 1)) & mask;
    places[i] = (hash[pair + 1] << RECORD_SHIFT) & RECORD_MASK;
  }
  path.touched |= read(words, n);
  for (let i = 0; i < n; i++) places[i] = words[places[i] + SA_WORD_WINDOW_BASE];
  path.touched |= readWindows(windows, n);
}

/** Reads `array` at the first `n` places: few instructions for each, so that many are under way. */
function read(array: Int32Array, n: number): number {
  // hot:
  let touched = array[0];
  for (let i = 3; i < n; i += 4) {
    touched |= array[places[i - 3]] | array[places[i - 2]] | array[places[i - 1]] | array[places[i]];
  }
  return touched;
}

/** The same for replay windows: a function of its own, because V8 makes better code for one that only knows one kind of array. */
function readWindows(array: Uint32Array, n: number): number {
  // hot:
  let touched = array[0];
  for (let i = 3; i < n; i += 4) {
    touched |= array[places[i - 3]] | array[places[i - 2]] | array[places[i - 1]] | array[places[i]];
  }
  return touched;
}
