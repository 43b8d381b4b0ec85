/**
 * MSI-X interrupts as eventfds on the event loop.
 *
 * One eventfd per vector; the device (or the kernel for it) adds one for each interrupt. A vector that fires while
 * nobody waits stays pending until the next `wait`. Interrupts that come close together count as one, as with MSI-X
 * itself. Whether the device interrupts at all is steered at the rings and in the MSI-X table, not here.
 */
import { VfioError } from '../errors.ts';
import { EventFd } from '../sys/eventfd.ts';
import { ffi, type Watch } from '../sys/ffi/ffi.ts';
import type { DeviceFunction } from './function.ts';

interface Waiter {
  readonly resolve: (fired: boolean) => void;
  readonly reject: (error: Error) => void;
  readonly timer: NodeJS.Timeout | null;
}

interface Vector {
  readonly eventfd: EventFd;
  readonly watch: Watch;
  readonly waiters: Set<Waiter>;
  readonly listeners: Set<() => void>;
  /** Fired while nobody waited. */
  pending: boolean;
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
      for (let i = 0; i < count; i++) this.#vectors.push(this.#open());
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
    entry.watch.close();
    return entry.eventfd.fd;
  }

  /** Makes whoever waits for `vector` look, as if it had fired. */
  wake(vector: number): void {
    this.#at(vector).eventfd.signal();
  }

  /**
   * Resolves to true when `vector` fires, or has fired since it was last waited for; to false after `timeoutMs`.
   * Rejects with VfioError when the function is lost or the interrupts are closed. Holds the event loop open.
   */
  wait(vector: number, timeoutMs = Infinity): Promise<boolean> {
    if (this.#failure !== null) return Promise.reject(this.#failure);
    const entry = this.#here(vector);
    // Look at the counter itself: the event loop may not have got round to it.
    if (entry.eventfd.drain() > 0 || entry.pending) {
      entry.pending = false;
      return Promise.resolve(true);
    }
    return new Promise((resolve, reject) => {
      const expire = () => {
        entry.waiters.delete(waiter);
        this.#hold(entry);
        resolve(false);
      };
      const timer = timeoutMs === Infinity ? null : setTimeout(expire, timeoutMs);
      const waiter: Waiter = { resolve, reject, timer };
      entry.waiters.add(waiter);
      this.#hold(entry);
    });
  }

  /**
   * Calls `listener` from the event loop each time `vector` fires; returns how to stop. Does not hold the event loop
   * open.
   */
  listen(vector: number, listener: () => void): () => void {
    if (this.#failure !== null) throw this.#failure;
    const entry = this.#here(vector);
    entry.listeners.add(listener);
    return () => entry.listeners.delete(listener);
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

  #open(): Vector {
    const eventfd = EventFd.create();
    const vector: Vector = {
      eventfd,
      watch: ffi().watch(eventfd.fd, () => this.#fired(vector)),
      waiters: new Set(),
      listeners: new Set(),
      pending: false,
      away: false,
    };
    vector.watch.unref();
    return vector;
  }

  #fired(vector: Vector): void {
    // `wait` may have been quicker than the event loop.
    if (vector.eventfd.drain() === 0) return;
    vector.pending = vector.waiters.size === 0 && vector.listeners.size === 0;
    for (const waiter of vector.waiters) {
      if (waiter.timer !== null) clearTimeout(waiter.timer);
      waiter.resolve(true);
    }
    vector.waiters.clear();
    this.#hold(vector);
    for (const listener of [...vector.listeners]) listener();
  }

  #fail(error: VfioError): void {
    this.#failure ??= error;
    for (const vector of this.#vectors) {
      for (const waiter of vector.waiters) {
        if (waiter.timer !== null) clearTimeout(waiter.timer);
        waiter.reject(error);
      }
      vector.waiters.clear();
      this.#hold(vector);
    }
  }

  #release(): void {
    for (const vector of this.#vectors.splice(0)) {
      vector.watch.close();
      vector.eventfd.close();
    }
  }

  /** The event loop stays for a vector that someone waits for. */
  #hold(vector: Vector): void {
    if (vector.waiters.size > 0) vector.watch.ref();
    else vector.watch.unref();
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
