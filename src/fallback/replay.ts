/**
 * Anti-replay windows (RFC 4303, 3.4.3; RFC 6479): a ring of 32-bit blocks in which a bit is a sequence number, one
 * block more than the window needs, so that moving the window clears blocks and shifts nothing.
 *
 * ```
 *   block (number >> 5) & mask, bit number & 31
 *        … | behind the window | seen or not seen ………………… top | not yet: cleared when the top gets there | …
 * ```
 *
 * All windows live in one array; a window is where it begins (`base`, in words), how many blocks it has (`mask` + 1, a
 * power of two), and its highest number. Check before the ICV, update only after it: between the two nothing changes,
 * so `update` checks again (two copies in one burst pass the check both).
 */

/** Blocks (words) for a window of `size` packets: a power of two, one block more than the window can touch. */
export function windowBlocks(size: number): number {
  let blocks = 2;
  while (blocks * 32 < size + 32) blocks *= 2;
  return blocks;
}

/**
 * Starts a window at its highest number accepted, low half `topLow`. What is at or behind that number counts as seen: which
 * of them really were is not known, and in doubt a packet is dropped.
 */
export function startWindow(bits: Uint32Array, base: number, mask: number, topLow: number): void {
  bits.fill(0xffffffff, base, base + mask + 1);
  // Numbers behind the top in its own block are seen, those before it not.
  const bit = topLow & 31;
  bits[base + ((topLow >>> 5) & mask)] = bit === 31 ? 0xffffffff : (2 << bit) - 1;
}

/** Starts a window with all that another one, of any size, knows about the numbers up to `topLow`, its top. */
export function carryWindow(
  bits: Uint32Array,
  from: number,
  fromMask: number,
  to: number,
  toMask: number,
  topLow: number,
): void {
  startWindow(bits, to, toMask, topLow);
  const topBlock = topLow >>> 5;
  for (let k = Math.min(fromMask, toMask); k >= 0; k--) {
    bits[to + ((topBlock - k) & toMask)] = bits[from + ((topBlock - k) & fromMask)];
  }
}

/** Whether number `high`:`low` is new: ahead of the top, or inside the window and not seen. Halves are of either sign. */
export function isNew(
  bits: Uint32Array,
  base: number,
  mask: number,
  size: number,
  topLow: number,
  topHigh: number,
  low: number,
  high: number,
): boolean {
  // hot:
  if (high === topHigh) {
    if (low >>> 0 > topLow >>> 0) return true;
    if ((topLow - low) >>> 0 >= size) return false;
  } else {
    const behind = ((topHigh >>> 0) - (high >>> 0)) * 0x100000000 + ((topLow >>> 0) - (low >>> 0));
    if (behind < 0) return true;
    if (behind >= size) return false;
  }
  return (bits[base + ((low >>> 5) & mask)] & (1 << (low & 31))) === 0;
}

/**
 * Marks `high`:`low` as seen and clears the blocks that the window moves over. The number must be new (`isNew`). The
 * caller stores it as the top when it is ahead of it.
 */
export function markSeen(
  bits: Uint32Array,
  base: number,
  mask: number,
  topLow: number,
  topHigh: number,
  low: number,
  high: number,
): void {
  // hot:
  const block = low >>> 5;
  const topBlock = topLow >>> 5;
  let ahead = block - topBlock;
  // Exact where it matters: a difference that a double cannot hold is larger than any window.
  if (high !== topHigh) ahead = Math.min(((high >>> 0) - (topHigh >>> 0)) * 0x8000000 + ahead, mask + 1);
  if (ahead > mask) ahead = mask + 1;
  for (let k = 1; k <= ahead; k++) bits[base + ((topBlock + k) & mask)] = 0;
  bits[base + (block & mask)] |= 1 << (low & 31);
}
