/**
 * The device's request to announce the addresses (Virtio 1.4, 5.1.9.5.4; GUEST_ANNOUNCE): after it has moved, its neighbours have to learn
 * where it is. What is to be sent, ARP or neighbour advertisements, only the application knows; the device is told when it has done so.
 */
import { VipsecError } from '../errors.ts';

/** Sends what makes the addresses known. */
export type Announcer = () => void | Promise<void>;

export class Announcements {
  readonly #isAsked: () => boolean;
  readonly #acknowledge: () => Promise<void>;
  readonly #announcers = new Set<Announcer>();
  #running = false;

  /** `isAsked` reads the device's request, `acknowledge` tells it that it was followed. */
  constructor(isAsked: () => boolean, acknowledge: () => Promise<void>) {
    this.#isAsked = isAsked;
    this.#acknowledge = acknowledge;
  }

  /** Whether anybody wants to hear of requests. */
  get wanted(): boolean {
    return this.#announcers.size > 0;
  }

  /** From now on `announcer` is called. Returns how to stop. */
  add(announcer: Announcer): () => void {
    this.#announcers.add(announcer);
    return () => this.#announcers.delete(announcer);
  }

  /** Looks whether the device asks, once for each change of its configuration: a request that stays is not followed twice. */
  look(): void {
    if (this.#running || !this.wanted || !this.#isAsked()) return;
    this.#running = true;
    void this.#follow().finally(() => {
      this.#running = false;
    });
  }

  /** A request that nobody could follow stays. */
  async #follow(): Promise<void> {
    try {
      for (const announcer of [...this.#announcers]) await announcer();
    } catch (error) {
      // The application's own: where it would have gone from any other listener.
      queueMicrotask(() => {
        throw error;
      });
      return;
    }
    try {
      await this.#acknowledge();
    } catch (error) {
      // The NIC was closed meanwhile, or the device does not want to know.
      if (!(error instanceof VipsecError)) throw error;
    }
  }
}
