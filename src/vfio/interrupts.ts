/**
 * MSI-X interrupts as eventfds.
 *
 * One eventfd per vector; the device (or the kernel for it) adds one for each interrupt. Who waits sleeps on it (`sys/readable.ts`), listeners are
 * called from the event loop. A vector that fires while nobody waits stays pending until the next `wait`. Interrupts that come close together count as one, as with MSI-X
 * itself. Whether the device interrupts at all is steered at the rings and in the MSI-X table, not here.
 */
import { VfioError } from '../errors.ts';
import { EventFd } from '../sys/eventfd.ts';
import { EventFdSleepers, type Wake } from '../sys/eventfd-sleepers.ts';
import { ffi, type Watch } from '../sys/ffi/ffi.ts';
import type { DeviceFunction } from './function.ts';

interface Vector {
  readonly eventfd: EventFd;
  readonly sleepers: EventFdSleepers;
  readonly listeners: Set<() => void>;
  /** While there are listeners. */
  watch: Watch | null;
  /** Another thread watches it. */
  away: boolean;
}

export class Interrupts {
  readonly #fn: DeviceFunction;
  readonly #vectors: Vector[] = [];
  #failure: VfioError | null = null;

  /** Routes vectors 0 to `count - 1` of `fn` to new eventfds. Throws RangeError when the function has fewer. */
  constructor(fn: DeviceFunction, count: number) {
    if (!Number.isInteger(count) || count < 1 || count > fn.interruptVectors) {
      throw new RangeError(`${count} vectors of ${fn.interruptVectors}`);
    }
    this.#fn = fn;
    try {
      for (let i = 0; i < count; i++) this.#vectors.push(open());
      fn.setInterrupts(this.#vectors.map((vector) => vector.eventfd.fd));
    } catch (error) {
      this.#release();
      throw error;
    }
    fn.onGone?.((error) => this.#fail(error));
  }

  /** Number of vectors. */
  get count(): number {
    return this.#vectors.length;
  }

  /** Descriptor of a vector's eventfd. */
  eventfd(vector: number): number {
    return this.#at(vector).eventfd.fd;
  }

  /**
   * Stops watching `vector`, for another thread that does from now on, and returns the descriptor of its eventfd, which stays ours to close.
   * Nobody can wait for it or listen to it here then.
   */
  handOver(vector: number): number {
    const entry = this.#at(vector);
    entry.away = true;
    entry.listeners.clear();
    unwatch(entry);
    return entry.eventfd.fd;
  }

  /** Makes whoever waits for `vector` look, as if it had fired. */
  wake(vector: number): void {
    this.#at(vector).eventfd.signal();
  }

  /**
   * Resolves to true when `vector` fires, or has fired since it was last waited for, the interrupt that ended that wait included; to false after `timeoutMs`.
   * Rejects with VfioError when the function is lost or the interrupts are closed. Holds the event loop open.
   */
  wait(vector: number, timeoutMs = Infinity): Promise<boolean> {
    if (this.#failure !== null) return Promise.reject(this.#failure);
    const { sleepers } = this.#here(vector);
    return new Promise((resolve, reject) => {
      sleepers.sleep(timeoutMs, (result) => (result instanceof Error ? reject(result) : resolve(result)));
    });
  }

  /** As `wait`, with less between the interrupt and who waits for it. */
  sleep(vector: number, timeoutMs: number, wake: Wake): void {
    if (this.#failure !== null) setImmediate(wake, this.#failure);
    else this.#here(vector).sleepers.sleep(timeoutMs, wake);
  }

  /**
   * Calls `listener` from the event loop each time `vector` fires; returns how to stop. Does not hold the event loop
   * open.
   */
  listen(vector: number, listener: () => void): () => void {
    if (this.#failure !== null) throw this.#failure;
    const entry = this.#here(vector);
    entry.listeners.add(listener);
    entry.watch ??= watch(entry);
    return () => {
      entry.listeners.delete(listener);
      if (entry.listeners.size === 0) unwatch(entry);
    };
  }

  /**
   * Disables the interrupts of the function if it is still there, rejects who waits, closes the eventfds. Idempotent.
   */
  close(): void {
    if (this.#vectors.length === 0) return;
    try {
      if (!this.#fn.gone) this.#fn.setInterrupts([]);
    } catch (error) {
      // A function that was closed before has no interrupts either.
      if (!(error instanceof VfioError && error.code === 'DEVICE_GONE')) throw error;
    } finally {
      this.#fail(new VfioError('INTERRUPTS_CLOSED', 'the interrupts of the function were closed'));
      this.#release();
    }
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #fail(error: VfioError): void {
    this.#failure ??= error;
    for (const { sleepers } of this.#vectors) sleepers.end(error);
  }

  #release(): void {
    for (const vector of this.#vectors.splice(0)) {
      unwatch(vector);
      vector.eventfd.close();
    }
  }

  #here(vector: number): Vector {
    const entry = this.#at(vector);
    if (entry.away) throw new RangeError(`another thread watches interrupt vector ${vector}`);
    return entry;
  }

  #at(vector: number): Vector {
    const entry = this.#vectors[vector];
    if (entry === undefined) throw new RangeError(`interrupt vector ${vector} of ${this.#vectors.length}`);
    return entry;
  }
}

function open(): Vector {
  const eventfd = EventFd.create();
  return { eventfd, sleepers: new EventFdSleepers(eventfd), listeners: new Set(), watch: null, away: false };
}

/** Calls the listeners of a vector when it fires, and does not hold the event loop open for them. */
function watch({ eventfd, sleepers, listeners }: Vector): Watch {
  const watch = ffi().watch(eventfd.fd, () => {
    if (eventfd.drain() === 0) return;
    sleepers.end(true);
    for (const listener of [...listeners]) listener();
  });
  watch.unref();
  return watch;
}

function unwatch(vector: Vector): void {
  vector.watch?.close();
  vector.watch = null;
}
