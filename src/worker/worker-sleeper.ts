/**
 * Waiting in a worker thread: for the eventfd of the receive queue's interrupt, asleep in poll(2) (`sys/readable.ts`). Nothing is called back while the thread is being
 * ended: koffi ends the process when a callback of a poll handle meets that.
 */
import { NAP_MS, RECHECK_MS, type Sleeper } from '../nic/interrupts.ts';
import { EventFd } from '../sys/eventfd.ts';
import { EventFdSleepers, type Wake } from '../sys/eventfd-sleepers.ts';

export class WorkerSleeper implements Sleeper {
  readonly #sleepers: EventFdSleepers | null;

  /** `fd` is the eventfd, which stays the NIC's, or null: then nobody sleeps longer than `NAP_MS`. */
  constructor(fd: number | null) {
    this.#sleepers = fd === null ? null : new EventFdSleepers(EventFd.adopt(fd));
  }

  sleep(_pair: number, ms: number, wake: Wake): void {
    if (this.#sleepers === null) setTimeout(wake, Math.min(ms, NAP_MS), false);
    else this.#sleepers.sleep(Math.min(ms, RECHECK_MS), wake);
  }

  /** Ends all sleeps. */
  wake(): void {
    this.#sleepers?.end(true);
  }
}
