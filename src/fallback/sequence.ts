/**
 * Sequence numbers of 32 and 64 bits (RFC 4303, 2.2.1, 3.3.3, 3.4.3 and appendix A), as two unsigned 32-bit halves.
 *
 * A packet carries the low half only; the receiver infers the high half from its window, and the ICV says whether it
 * was right. Two ways to infer it: from the window (appendix A2.2), and the stateless one of the RDMA verbs
 * (`ibv_flow_action_esp`), where the caller moves an `esn` and an overlap flag every 2^31 packets.
 */

/** The middle of the 32-bit space. */
export const HALF_SPACE = 0x80000000;

/** With no replay window the nearest number is meant: half the space behind the highest one and half before it. */
export const NO_WINDOW_SPAN = HALF_SPACE;

/**
 * The high half that belongs to the received low half `low` (RFC 4303, A2.2), where `topLow`/`topHigh` is the highest
 * number accepted and `window` the size of the window, 1 to 2^31. Halves are 32-bit numbers of either sign, the result is
 * signed. A number behind the window is read as one of the next
 * 2^32. Subspace -1 does not exist: what would be in it is read as subspace 0.
 */
export function inferHigh(low: number, topLow: number, topHigh: number, window: number): number {
  // hot:
  const bottom = (topLow - window + 1) | 0;
  const ahead = low >>> 0 >= bottom >>> 0;
  if (topLow >>> 0 >= window - 1) return ahead ? topHigh : (topHigh + 1) | 0;
  // The window spans two subspaces.
  return ahead && topHigh !== 0 ? topHigh - 1 : topHigh;
}

/** The stateless scheme of the verbs: `overlap` says that the bottom of the window is in the upper half of subspace `esn`. */
export function statelessHigh(low: number, esn: number, overlap: boolean): number {
  // hot:
  return overlap && low < HALF_SPACE ? (esn + 1) >>> 0 : esn;
}

/**
 * When inference has lost the subspace (2^32 or more packets in a row were lost) every packet fails its ICV. After
 * `failures` such packets in a row one packet of a burst is tried with the next `candidates` high halves
 * (RFC 4303, A2.3). Only a right ICV moves the window, and only forward. The work is bounded: one packet a burst, so
 * many candidates, and not again before as many packets have failed again.
 */
export const Resync = { failures: 64, candidates: 4 } as const;

/** Remaining numbers of the sequence space at which the user is told, once: an eighth of 32 bits. */
export const SEQUENCE_LOW = 0x20000000n;

/** Writes a 32-bit number at any offset, most significant byte first. */
export function writeNumber(u8: Uint8Array, at: number, value: number): void {
  // hot:
  u8[at] = value >>> 24;
  u8[at + 1] = value >>> 16;
  u8[at + 2] = value >>> 8;
  u8[at + 3] = value;
}

/** 1 if adding something to `before` (32 bits of either sign) gave `after` and went over. */
export function carry(before: number, after: number): number {
  // hot:
  return after >>> 0 < before >>> 0 ? 1 : 0;
}
