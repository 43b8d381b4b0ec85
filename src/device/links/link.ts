/**
 * Where frames go after IPsec processing, and come from before it.
 *
 * Frames are packet numbers of the process's one pool, so that a link between two functions of the process copies
 * nothing. Whoever is given packets owns them, and frees them when done. Only a receiver that takes such frames is given unfinished ones
 * (`unfinished.ts`).
 */
import type { FrameSource } from '../frame-source.ts';
import type { Pollable } from '../pump.ts';

/** The receiving side of a function. */
export interface FrameSink {
  /** hot: takes over `n` frames. */
  deliver(packets: Uint32Array, n: number): void;
  /** hot: how many frames can be delivered now without dropping any, because the driver has buffers or soon will. */
  room(): number;
  /** Whether there is a driver that takes frames. */
  readonly ready: boolean;
  /** `Unfinished`: which frames that are not finished are taken now. */
  readonly taken: number;
  /**
   * hot: puts a frame that is still in the buffer of another driver into the buffers of ours at once; false, with nothing done, when that cannot
   * be. `packet` has its length and headers, and stays the caller's.
   */
  receiveDirect(packet: number, source: FrameSource): boolean;
}

/** What a link has counted. */
export interface LinkCounters {
  sent: number;
  received: number;
  /** Nobody there to take them, or a frame that makes no sense. */
  dropped: number;
}

/** One function's end of a link. */
export interface Link {
  readonly counters: LinkCounters;
  /** Whether there is somebody at the other end: `VIRTIO_NET_S_LINK_UP`. */
  readonly up: boolean;
  /** Whether the other end is outside of this device, so that nobody knows whether its frames are good. */
  readonly isOutside: boolean;
  /** `Unfinished`: which frames that are not finished the other end takes now. */
  readonly taken: number;
  /** hot: as `FrameSink.receiveDirect`, at the other end. */
  sendDirect(packet: number, source: FrameSource): boolean;
  /** hot: takes over `n` frames. */
  send(packets: Uint32Array, n: number): void;
  /** hot: how many frames it takes now. The sender holds back the others. */
  room(): number;
  /** hot: moves what has arrived or waits to be sent; returns how many frames it moved. */
  poll(): number;
  /** Before the event loop sleeps: finishes what can wait; true when there is more to do at once. */
  idle(): boolean;
  /** Whether something is held back that no event will announce: the event loop looks again soon. */
  readonly blocked: boolean;
  /** Connects the function; once. `changed` tells it that `up` has changed, `wake` makes the event loop poll. */
  attach(sink: FrameSink, changed: () => void, wake: () => void): void;
  close(): void;
}

/** Frames per call. */
export const LINK_BURST = 64;

/** `room` of a link that never holds anything back. */
export const ANY_ROOM = 0x7fffffff;

/** A link as the pump takes it. */
export function pollableLink(link: Link): Pollable {
  return {
    poll: () => link.poll(),
    arm: () => link.idle(),
    suppress: () => {},
    get blocked() {
      return link.blocked;
    },
  };
}
