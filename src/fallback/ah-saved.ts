/** The headers in front of AH as they were, kept while their mutable fields are zero. */
import { MAX_BURST } from './engines/engine.ts';

/** Longest chain of headers in front of AH, bytes. */
export const MAX_SAVED = 512;

/** By position in the burst. */
const saved = new Uint8Array(MAX_BURST * MAX_SAVED);

/** Keeps the bytes from `ip` to `end`, at most `MAX_SAVED`. */
export function keepHeaders(u8: Uint8Array, position: number, ip: number, end: number): void {
  // hot:
  const to = position * MAX_SAVED;
  for (let i = ip; i < end; i++) saved[to + i - ip] = u8[i];
}

/** Puts them back. */
export function restoreHeaders(u8: Uint8Array, position: number, ip: number, end: number): void {
  // hot:
  const from = position * MAX_SAVED;
  for (let i = ip; i < end; i++) u8[i] = saved[from + i - ip];
}
