/**
 * What the rest of the device knows of a virtqueue, split (`split-queue.ts`) or packed (`packed-queue.ts`).
 */

/** `take` found no buffer. */
export const NO_BUFFER = -1;

/** Alignment of the three areas (2.7, 2.8.10.1). */
export const AREA_ALIGNMENT = {
  split: { descriptor: 16, driver: 2, device: 4 },
  packed: { descriptor: 16, driver: 4, device: 4 },
} as const;

/** Where a driver has put a queue, as written to the common configuration structure. */
export interface QueueAddresses {
  readonly descriptorLow: number;
  readonly descriptorHigh: number;
  readonly driverLow: number;
  readonly driverHigh: number;
  readonly deviceLow: number;
  readonly deviceHigh: number;
}

export interface DeviceQueue {
  readonly index: number;
  /** Number of descriptors. */
  readonly size: number;
  /** What the driver did wrong; nothing works after that. */
  readonly broken: string | null;

  /**
   * The pieces of the buffer that was taken last, as IOVA and length: first `readable` device-readable ones, then
   * device-writable ones.
   */
  readonly low: Uint32Array;
  readonly high: Uint32Array;
  readonly length: Uint32Array;
  readonly readable: number;
  readonly segments: number;
  /** Bytes of the readable and of the writable pieces. */
  readonly readableBytes: number;
  readonly writableBytes: number;

  /** hot: number of buffers that the driver has made available and that were not taken; a packed queue may count up to 128 only. */
  available(): number;
  /** hot: takes the next buffer and returns its id, or `NO_BUFFER`. */
  take(): number;
  /** hot: puts back the last `count` buffers taken. None of them may have been completed. */
  putBack(count: number): void;
  /**
   * hot: notes that buffer `id` is used and that `written` bytes were written to it. The driver sees it after
   * `publish`.
   */
  complete(id: number, written: number): void;
  /** hot: shows completed buffers to the driver; true when it wants a notification. */
  publish(): boolean;
  /**
   * hot: copies readable bytes of the buffer taken last, from byte `skip` on, to arena offset `to`; returns how many,
   * or -1 when one is unmapped.
   */
  gather(skip: number, max: number, to: number): number;
  /**
   * hot: copies from arena offset `from` to the writable pieces, from their byte `skip` on; returns how many fitted,
   * or -1.
   */
  scatter(skip: number, bytes: number, from: number): number;
  /** Asks the driver not to notify. */
  suppress(): void;
  /** Asks the driver to notify of buffers to come; true when more than `seen` are there already. */
  arm(seen: number): boolean;
  /** Lets go of the ring. */
  close(): void;
}

export interface QueueOptions {
  readonly index: number;
  /** For a split queue a power of two. */
  readonly size: number;
  readonly addresses: QueueAddresses;
  readonly eventIdx: boolean;
  readonly indirect: boolean;
  /** IN_ORDER: buffers are completed in the order in which they were taken, and several may be shown by the last of them. */
  readonly inOrder?: boolean;
  /**
   * Only for packed queues of a device that knows of buffers from notifications alone (2.9): where the driver says that it stands. Descriptors
   * from there on are not looked at, and the driver's and device's event suppression structures are left alone.
   */
  readonly reach?: { readonly next: number };
  /** Arena offset of `size * 16` private bytes: indirect tables are copied there. */
  readonly scratch: number;
}
