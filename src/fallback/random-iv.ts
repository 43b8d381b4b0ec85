/**
 * Unpredictable IVs for CBC (RFC 3602, 2.1: unpredictable to who can choose plain text), fetched from the operating system's
 * generator in bulk: one call for some hundred packets.
 */
import { randomFillSync } from 'node:crypto';

/** Words fetched at once. */
const BATCH = 4096;

export class RandomIv {
  readonly words = new Uint32Array(BATCH);
  #next = BATCH;

  /** Index in `words` of `count` fresh random words, to be used once. */
  take(count: number): number {
    // hot:
    let at = this.#next;
    if (at + count > BATCH) {
      randomFillSync(this.words);
      at = 0;
    }
    this.#next = at + count;
    return at;
  }
}
