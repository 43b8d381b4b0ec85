/**
 * What a session with a device over one socket is, whichever protocol it speaks (`user-session.ts`, `virtio/vhost-user-session.ts`).
 *
 * Whatever breaks the protocol, the socket or a deadline ends the session: the stream cannot be trusted to be in step any more. The
 * first error says why, later calls throw `DEVICE_GONE` with it as their cause. Only a request that the device has refused leaves the
 * session as it was.
 *
 * Every call holds its thread up, and to open or close a function takes hundreds of them: a device that answers each one just in time
 * would stop a program for as long as it likes. A session therefore has patience for a few such calls, which comes back slowly; with
 * none left, a call has the time of a prompt one.
 */
import { VfioError } from '../errors.ts';
import { ffi, type Watch } from '../sys/ffi/ffi.ts';

/** Milliseconds that a call may take without being called slow. */
const PROMPT = 250;
/** How many calls may take their whole time one after the other. */
const SLOW_CALLS = 4;
/** What part of the time that passes comes back as patience. */
const RECOVERY = 0.1;

export abstract class SocketSession {
  readonly #socket: { close(): void };
  readonly #timeoutMs: number;
  readonly #watch: Watch;
  readonly #what: string;
  readonly #listeners: ((reason: VfioError) => void)[] = [];
  #failure: VfioError | null = null;
  #closed = false;
  /** Milliseconds that slow calls may still take, as it was at `#lastSlow`. */
  #patience: number;
  #lastSlow = 0;

  /** Owns `socket`. `timeoutMs` is the deadline of every call while there is patience; `what` is closed when the session is. */
  constructor(socket: { readonly fd: number; close(): void }, timeoutMs: number, what: string) {
    this.#socket = socket;
    this.#timeoutMs = timeoutMs;
    this.#patience = SLOW_CALLS * timeoutMs;
    this.#what = what;
    this.#watch = ffi().watch(socket.fd, () => this.#idle());
    this.#watch.unref();
  }

  /** Something came while nobody waited for it. */
  protected abstract serveIdle(): void;
  /** What an error of `guard` means for the session. */
  protected abstract translate(error: unknown): VfioError;

  /** Whether the session was lost; closing it on purpose does not count. */
  get lost(): boolean {
    return this.#failure !== null;
  }

  onLost(listener: (reason: VfioError) => void): void {
    if (this.#failure !== null) listener(this.#failure);
    else this.#listeners.push(listener);
  }

  /** Throws unless the session is there. */
  check(): void {
    if (this.#failure !== null) {
      throw new VfioError('DEVICE_GONE', `the device is gone (${this.#failure.message})`, { cause: this.#failure });
    }
    if (this.#closed) throw new VfioError('DEVICE_GONE', `the ${this.#what} is closed`);
  }

  /** Ends the session because of what the device did. Returns the error to throw. */
  fail(error: VfioError): VfioError {
    if (this.#failure === null && !this.#closed) {
      this.#failure = error;
      this.#end();
      for (const listener of this.#listeners.splice(0)) listener(error);
    }
    return error;
  }

  /** Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#end();
  }

  #end(): void {
    this.#watch.close();
    this.#socket.close();
  }

  /** Time by which a call that begins now must have ended, as `performance.now` says it. */
  protected deadline(): number {
    const now = performance.now();
    return now + Math.min(this.#timeoutMs, Math.max(PROMPT, this.#patienceAt(now)));
  }

  #patienceAt(now: number): number {
    return Math.min(this.#patience + (now - this.#lastSlow) * RECOVERY, SLOW_CALLS * this.#timeoutMs);
  }

  /** A call has taken from `start` to now. What went beyond its deadline is not the device's: this process was held up. */
  #spend(start: number): void {
    const now = performance.now();
    const slow = Math.min(now - start, this.#timeoutMs) - PROMPT;
    if (slow <= 0) return;
    this.#patience = this.#patienceAt(now) - slow;
    this.#lastSlow = now;
  }

  /** Runs `work`; any error but a refused request ends the session. */
  protected guard<T>(work: () => T): T {
    const start = performance.now();
    try {
      return work();
    } catch (error) {
      if (error instanceof VfioError && error.code === 'DEVICE_REFUSED') throw error;
      throw this.fail(this.translate(error));
    } finally {
      this.#spend(start);
    }
  }

  #idle(): void {
    if (this.#failure !== null || this.#closed) return;
    try {
      this.guard(() => this.serveIdle());
    } catch (error) {
      // `fail` has told the listeners, and later calls throw it.
      if (!(error instanceof VfioError)) throw error;
    }
  }
}
