/**
 * Those who sleep until an eventfd is signalled: each of them is woken, and what was signalled while nobody slept wakes the next one at once.
 */
import type { EventFd } from './eventfd.ts';
import { type Waiting, whenReadable } from './readable.ts';

interface Sleeper {
  readonly resolve: (signalled: boolean) => void;
  readonly reject: (error: Error) => void;
  readonly waiting: Waiting;
}

export class EventFdSleepers {
  readonly #eventfd: EventFd;
  /** Those who sleep, and some who have been woken. */
  #sleepers: Sleeper[] = [];

  /** The eventfd stays the caller's, and open while somebody sleeps. */
  constructor(eventfd: EventFd) {
    this.#eventfd = eventfd;
  }

  /**
   * Resolves to true when the eventfd is signalled, or has been since somebody slept last; to false after `ms` milliseconds. The signal that woke the last one is
   * still there, so that who sleeps again is woken once more for nothing. Holds the event loop open.
   */
  sleep(ms: number): Promise<boolean> {
    // Here and not when somebody is woken: a system call less between the signal and who is woken by it.
    if (this.#eventfd.drain() > 0) {
      // It may have been for somebody else, who sleeps.
      this.wake();
      return Promise.resolve(true);
    }
    this.#sleepers = this.#sleepers.filter(({ waiting }) => !waiting.over);
    return new Promise((resolve, reject) => {
      this.#sleepers.push({ resolve, reject, waiting: whenReadable(this.#eventfd.fd, ms, resolve) });
    });
  }

  /** Wakes all. */
  wake(): void {
    for (const { resolve } of this.#takeAll()) resolve(true);
  }

  /** Rejects all. */
  fail(error: Error): void {
    for (const { reject } of this.#takeAll()) reject(error);
  }

  #takeAll(): Sleeper[] {
    const all = this.#sleepers.filter(({ waiting }) => !waiting.over);
    this.#sleepers = [];
    for (const { waiting } of all) waiting.over = true;
    return all;
  }
}
