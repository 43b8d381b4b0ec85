/**
 * Looks after a transmit ring whose device has stopped: it has packets, returns none, and has not asked to be told of more. Then it is notified
 * once more, which the standard allows at any time (Virtio 1.4, 2.7.10, 2.8.10: suppression is a hint). A device that misses or forgets a
 * notification goes on so; one that only has nowhere to send to takes no harm.
 *
 * The looks cost the data path nothing per packet: one in so many reclaims that gave nothing, for a thread that never comes to its event loop,
 * and a timer that runs while the device has packets.
 */
/** One in so many reclaims in vain; a power of two. */
const LOOK_AT = 256;
/** Milliseconds of the timer. */
const TIMER_MS = 25;
/** Milliseconds without a packet back before the first notification, and the longest pause between two: each is twice the one before. */
const PATIENCE_MS = { first: 10, longest: 1000 } as const;

export interface WatchedRing {
  /** Descriptors that the device has. */
  readonly out: number;
}

export class TxWatch {
  /** The timer runs. */
  armed = false;
  /** The device has returned packets since the last look. */
  moved = true;
  readonly #ring: WatchedRing;
  readonly #reclaim: () => unknown;
  readonly #renotify: () => void;
  #timer: NodeJS.Timeout | null = null;
  #inVain = 0;
  #since = 0;
  #patience: number = PATIENCE_MS.first;

  /** `reclaim` takes back what the device has returned, and sets `moved`; `renotify` notifies the device. */
  constructor(ring: WatchedRing, reclaim: () => unknown, renotify: () => void) {
    this.#ring = ring;
    this.#reclaim = reclaim;
    this.#renotify = renotify;
  }

  /** Starts the timer. It does not hold the event loop open. */
  arm(): void {
    this.armed = true;
    if (this.#timer === null) {
      this.#timer = setTimeout(() => this.#tick(), TIMER_MS);
      this.#timer.unref();
    } else {
      this.#timer.refresh();
    }
  }

  #tick(): void {
    this.armed = false;
    if (this.#ring.out === 0) return;
    this.#reclaim();
    this.look();
    if (this.#ring.out > 0) this.arm();
  }

  /** hot: a reclaim gave nothing. */
  inVain(): void {
    this.#inVain = (this.#inVain + 1) & (LOOK_AT - 1);
    if (this.#inVain === 0) this.look();
  }

  /** Notifies if the device has packets and has returned none for a while. */
  look(): void {
    const now = performance.now();
    if (this.moved || this.#ring.out === 0) {
      this.moved = false;
      this.#since = now;
      this.#patience = PATIENCE_MS.first;
      return;
    }
    if (now - this.#since < this.#patience) return;
    this.#since = now;
    this.#patience = Math.min(2 * this.#patience, PATIENCE_MS.longest);
    this.#renotify();
  }
}
