/**
 * Nonces and additional authenticated data as the transforms of ESP and AH want them.
 *
 * | transform         | nonce                                            | RFC           |
 * |-------------------|--------------------------------------------------|---------------|
 * | GCM, GMAC, ChaCha | salt (4), IV (8)                                 | 4106, 4543, 7634 |
 * | CCM               | salt (3), IV (8)                                 | 4309          |
 * | CTR               | salt (4), IV (8), block counter 1 (4)            | 3686          |
 * | AEADs             | AAD: SPI, high half if extended, low half        | 4106, 5       |
 *
 * Words are in memory order: their bytes in memory are those of the packet.
 */
import type { CryptoBurst } from './engines/engine.ts';
import { SaKind } from './sa-table.ts';

/** Swaps between a number and its big-endian bytes in memory. */
export function swapBytes(x: number): number {
  // hot:
  return (x >>> 24) | ((x >>> 8) & 0xff00) | ((x & 0xff00) << 8) | (x << 24);
}

/** The nonce of job `n` of an SA of `kind` with `salt`, for the explicit IV `first`, `second`. */
export function setNonce(
  jobs: CryptoBurst,
  n: number,
  kind: number,
  salt: number,
  first: number,
  second: number,
): void {
  // hot:
  const iv = jobs.iv;
  const w = n * 4;
  if ((kind & SaKind.ccm) === 0) {
    iv[w] = salt;
    iv[w + 1] = first;
    iv[w + 2] = second;
    iv[w + 3] = 0x01000000;
  } else {
    iv[w] = salt | (first << 24);
    iv[w + 1] = (first >>> 8) | (second << 24);
    iv[w + 2] = second >>> 8;
  }
}

/** The AAD of job `n`: `spi` and `low` in memory order, `high` a number. */
export function setAad(jobs: CryptoBurst, n: number, spi: number, low: number, high: number, esn: boolean): void {
  // hot:
  const aad = jobs.aad;
  const w = n * 4;
  aad[w] = spi;
  if (esn) {
    aad[w + 1] = swapBytes(high);
    aad[w + 2] = low;
  } else {
    aad[w + 1] = low;
  }
}
