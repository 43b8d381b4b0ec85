/**
 * The driver side of a virtqueue, split or packed (Virtio 1.4, 2.7 and 2.8).
 *
 * A buffer is named by a token that the caller chooses (a packet number). The queue shadows every descriptor it hands
 * out: the device can neither change what a token's buffer is, nor return a token that is not out, nor claim to have
 * written more than the buffer holds. Any of these closes the queue: `broken` names the error, and every later call does nothing.
 *
 * Memory ordering, both formats: descriptors are plain stores; what publishes them is one `Atomics.store` of 16 bits; after it, the
 * device's wish for notifications is one `Atomics.load`, and only then may a notification register be written. On x86-64
 * the store is a full fence; on arm64 the pair is a store-release and a load-acquire, which keep that order for
 * the register too. So nothing changes with ORDER_PLATFORM (6): these are the barriers that hardware needs on platforms where DMA is
 * coherent with the caches, and no others are supported.
 */
import { VirtioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';

export interface VirtqueueOptions {
  /** Index of the queue on the device. */
  readonly index: number;
  /** Number of descriptors: 1 to 32768, for a split queue a power of two. */
  readonly size: number;
  /** True when EVENT_IDX was negotiated. */
  readonly eventIdx?: boolean;
  /** True when IN_ORDER was negotiated: the device may then return several buffers by naming the last of them. */
  readonly inOrder?: boolean;
  /** Entries of each buffer's indirect table; 0 (the default) when INDIRECT_DESC was not negotiated or is not wanted. */
  readonly indirectEntries?: number;
  /** IOVA that `offset` of `postBurst` counts from: the packet pool's. */
  readonly iovaLow?: number;
  readonly iovaHigh?: number;
  /** Bytes in front of `offset` that belong to each buffer of `postBurst`: the packet header's. Default 0. */
  readonly headroom?: number;
}

export interface Virtqueue {
  /** Index of the queue on the device. */
  readonly index: number;
  /** Number of descriptors. */
  readonly size: number;
  readonly memory: DmaMemory;
  /** IOVAs for the device. Split: descriptor table, available ring, used ring; packed: descriptor ring, driver and device event suppression. */
  readonly descriptorArea: number;
  readonly driverArea: number;
  readonly deviceArea: number;
  /** Descriptors that are free now; 0 once the queue is stopped or broken. */
  readonly free: number;
  /** Descriptors that the device has, or is going to have; 0 once the queue is stopped or broken. */
  readonly out: number;
  /** Set when the device broke the rules, or `fail` was called. */
  readonly broken: VirtioError | null;
  /** Where the next buffer will be made available, as a notification says it (2.9): `next_off`, and `next_wrap` in bit 15. */
  readonly next: number;

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
  /** Closes the queue for good: every later call does nothing, so that its memory may go away. The first reason stays. */
  fail(reason: VirtioError): void;
  /** Every call does nothing from now on, until `restart`: the queue is going to be reset. */
  stop(): void;
  /**
   * Closes the queue and gives back the tokens of buffers that the device still holds; only after the queue or the
   * device was reset.
   */
  reclaimAll(tokens: Uint32Array): number;
  /** As new, in the same memory, with interrupts off. Only after `reclaimAll`, and before the device is given the queue again. */
  restart(): void;
}

/** What stands in the place of an error while a queue is stopped; never shown. */
export const STOPPED = new VirtioError('QUEUE_STOPPED', 'the queue is being reset');
