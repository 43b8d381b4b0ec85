/**
 * Waiting in a worker thread: the eventfd of the receive queue's interrupt on this thread's event loop. No sleep is longer than
 * `RECHECK_MS`, and commands of the control thread end it.
 */
import { NAP_MS, RECHECK_MS, type Sleeper } from '../nic/interrupts.ts';
import { EventFd } from '../sys/eventfd.ts';
import { ffi, type Watch } from '../sys/ffi/ffi.ts';

export class WorkerSleeper implements Sleeper {
  readonly #eventfd: EventFd | null;
  readonly #watch: Watch | null;
  readonly #sleepers = new Set<() => void>();

  /** `fd` is the eventfd, which stays the NIC's, or null: then nobody sleeps longer than `NAP_MS`. */
  constructor(fd: number | null) {
    this.#eventfd = fd === null ? null : EventFd.adopt(fd);
    this.#watch = fd === null ? null : ffi().watch(fd, () => this.#fired());
    this.#watch?.unref();
  }

  sleep(_pair: number, ms: number): Promise<void> {
    if (this.#eventfd !== null && this.#eventfd.drain() > 0) return Promise.resolve();
    return new Promise((resolve) => {
      const end = () => {
        clearTimeout(timer);
        this.#sleepers.delete(end);
        resolve();
      };
      // The timer holds the event loop open; the interrupt need not.
      const timer = setTimeout(end, Math.min(ms, this.#eventfd === null ? NAP_MS : RECHECK_MS));
      this.#sleepers.add(end);
    });
  }

  wake(): void {
    for (const end of [...this.#sleepers]) end();
  }

  close(): void {
    this.#watch?.close();
    this.wake();
  }

  #fired(): void {
    if (this.#eventfd?.drain() !== 0) this.wake();
  }
}
