/**
 * Where AES-GMAC in ESP wants the high half of an extended sequence number: between SPI and low half (RFC 4543, 3.4), while
 * everything that is authenticated has to be contiguous in memory.
 */

/**
 * GMAC authenticates SPI, high half, low half, IV, payload in this order (RFC 4543, 3.4): the SPI moves four bytes to the
 * front for the time of the computation. What was there goes to `saved`. Returns where the range begins.
 */
export function openEsnGap(u16: Uint16Array, esp: number, high: number, saved: Int32Array, position: number): number {
  const e = esp >>> 1;
  saved[position] = u16[e - 2] | (u16[e - 1] << 16);
  u16[e - 2] = u16[e];
  u16[e - 1] = u16[e + 1];
  u16[e] = ((high >>> 24) & 0xff) | ((high >>> 8) & 0xff00);
  u16[e + 1] = ((high >>> 8) & 0xff) | ((high & 0xff) << 8);
  return esp - 4;
}

/** Undoes `openEsnGap`. */
export function closeEsnGap(u16: Uint16Array, esp: number, saved: number): void {
  const e = esp >>> 1;
  u16[e] = u16[e - 2];
  u16[e + 1] = u16[e - 1];
  u16[e - 2] = saved;
  u16[e - 1] = saved >>> 16;
}
