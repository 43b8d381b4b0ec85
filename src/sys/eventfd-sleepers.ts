/**
 * Those who sleep until an eventfd is signalled: each of them is woken, and what was signalled while nobody slept wakes the next one at once.
 */
import type { EventFd } from './eventfd.ts';
import { type Waiting, whenReadable } from './readable.ts';

/** Is told true when something was signalled, false when the time is over, or why there is nothing to wait for any more. Must not throw. */
export type Wake = (result: boolean | Error) => void;

interface Sleeper {
  readonly wake: Wake;
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
   * Calls `wake` with true when the eventfd is signalled, or has been since somebody slept last; with false after `ms` milliseconds. Never before this has
   * returned. The signal that woke the last one is still there, so that who sleeps again is woken once more for nothing. Holds the event loop open.
   */
  sleep(ms: number, wake: Wake): void {
    // Here and not when somebody is woken: a system call less between the signal and who is woken by it.
    if (this.#eventfd.drain() > 0) {
      // It may have been for somebody else, who sleeps.
      this.end(true);
      setImmediate(wake, true);
      return;
    }
    this.#sleepers = this.#sleepers.filter(({ waiting }) => !waiting.over);
    this.#sleepers.push({ wake, waiting: whenReadable(this.#eventfd.fd, ms, wake) });
  }

  /** Ends all sleeps with this result. */
  end(result: boolean | Error): void {
    const all = this.#sleepers.filter(({ waiting }) => !waiting.over);
    this.#sleepers = [];
    for (const { waiting } of all) waiting.over = true;
    for (const { wake } of all) wake(result);
  }
}
