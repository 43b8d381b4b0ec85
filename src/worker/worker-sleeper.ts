/**
 * Waiting in a worker thread: poll(2) on the eventfd of the receive queue's interrupt, a few milliseconds at a time, with a turn of the event loop in between.
 *
 * The thread itself sleeps, which wakes in half the time that the event loop needs (55 to 92 instead of 125 to 155 µs), and nothing is called back while
 * the thread is being ended: koffi ends the process when a callback of a poll handle meets that. The price is that timers and messages of a
 * thread that waits for packets come up to `LONGEST_NAP_MS` late, commands of the control thread too. No sleep is longer than `RECHECK_MS`.
 */
import { setTimeout as pause, setImmediate as turn } from 'node:timers/promises';
import { NAP_MS, RECHECK_MS, type Sleeper } from '../nic/interrupts.ts';
import { EventFd } from '../sys/eventfd.ts';
import { PollEvent, poll } from '../sys/libc.ts';

/** Milliseconds that the thread sleeps before the first turn of the event loop, twice as long before the next, at most so long. */
const FIRST_NAP_MS = 1;
const LONGEST_NAP_MS = 8;

export class WorkerSleeper implements Sleeper {
  readonly #eventfd: EventFd | null;
  /** How often sleepers were woken. */
  #calls = 0;

  /** `fd` is the eventfd, which stays the NIC's, or null: then nobody sleeps longer than `NAP_MS`. */
  constructor(fd: number | null) {
    this.#eventfd = fd === null ? null : EventFd.adopt(fd);
  }

  async sleep(_pair: number, ms: number): Promise<void> {
    const eventfd = this.#eventfd;
    if (eventfd === null) return pause(Math.min(ms, NAP_MS));
    const end = performance.now() + Math.min(ms, RECHECK_MS);
    const { fd } = eventfd;
    const calls = this.#calls;
    for (let nap = FIRST_NAP_MS; calls === this.#calls; nap = Math.min(2 * nap, LONGEST_NAP_MS)) {
      const left = end - performance.now();
      if (left <= 0) return;
      if (poll(fd, PollEvent.in, Math.min(nap, left)) !== 0) {
        eventfd.drain();
        this.wake();
        return;
      }
      await turn();
    }
  }

  /** Ends all sleeps. */
  wake(): void {
    this.#calls++;
  }
}
