/**
 * What a session with a device over one socket is, whichever protocol it speaks (`user-session.ts`, `virtio/vhost-user-session.ts`).
 *
 * Whatever breaks the protocol, the socket or a deadline ends the session: the stream cannot be trusted to be in step any more. The
 * first error says why, later calls throw `DEVICE_GONE` with it as their cause. Only a request that the device has refused leaves the
 * session as it was.
 */
import { VfioError } from '../errors.ts';
import { ffi, type Watch } from '../sys/ffi/ffi.ts';

export abstract class SocketSession {
  readonly #socket: { close(): void };
  readonly #timeoutMs: number;
  readonly #watch: Watch;
  readonly #what: string;
  readonly #listeners: ((reason: VfioError) => void)[] = [];
  #failure: VfioError | null = null;
  #closed = false;

  /** Owns `socket`. `timeoutMs` is the deadline of every call; `what` is closed when the session is. */
  constructor(socket: { readonly fd: number; close(): void }, timeoutMs: number, what: string) {
    this.#socket = socket;
    this.#timeoutMs = timeoutMs;
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
    return performance.now() + this.#timeoutMs;
  }

  /** Runs `work`; any error but a refused request ends the session. */
  protected guard<T>(work: () => T): T {
    try {
      return work();
    } catch (error) {
      if (error instanceof VfioError && error.code === 'DEVICE_REFUSED') throw error;
      throw this.fail(this.translate(error));
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
