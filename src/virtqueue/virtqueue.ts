/**
 * The driver side of a virtqueue, split or packed (Virtio 1.4, 2.7 and 2.8).
 *
 * A buffer is named by a token that the caller chooses (a packet number). The queue shadows every descriptor it hands
 * out: the device can neither change what a token's buffer is, nor return a token that is not out, nor claim to have
 * written more than the buffer holds. Any of these closes the queue: `broken` names the error, and every later call does nothing.
 */
import type { VirtioError } from '../errors.ts';

export interface Virtqueue {
  /** Index of the queue on the device. */
  readonly index: number;
  /** Number of descriptors. */
  readonly size: number;
  /** Descriptors that are free now. */
  readonly free: number;
  /** Set when the device broke the rules. */
  readonly broken: VirtioError | null;

  /**
   * hot: posts one-descriptor buffers for `tokens[from]` to `tokens[to - 1]`; token t is the `length[t]` bytes at IOVA
   * (`iovaHigh`, `iovaLow + offset[t]`), and the queue's `headroom` bytes right in front of them. Returns how many fitted. They become visible with `publish`.
   */
  postBurst(
    tokens: Uint32Array,
    from: number,
    to: number,
    offset: Uint32Array,
    length: Uint32Array,
    deviceWrites: boolean,
  ): number;
  /**
   * Posts one buffer of several pieces: first `readable`, then `writable` ones. Each piece is three numbers: IOVA low, IOVA
   * high, length. `pieces` holds them in that order. Returns false when there is no room; throws RangeError for more
   * pieces than the queue has descriptors.
   */
  postChain(token: number, pieces: Uint32Array, readable: number, writable: number): boolean;
  /** hot: makes posted buffers visible to the device; true when the device wants a notification. */
  publish(): boolean;
  /**
   * hot: takes up to `max` used buffers: their tokens, and how many bytes the device wrote (checked against the buffer).
   * Returns how many.
   */
  take(tokens: Uint32Array, written: Uint32Array, max: number): number;
  /** Asks the device to interrupt at the next used buffer; returns true when one is there already (poll again). */
  enableInterrupts(): boolean;
  disableInterrupts(): void;
  /** Gives back the tokens of buffers that the device still holds; only after the queue or the device was reset. */
  reclaimAll(tokens: Uint32Array): number;
}
