/**
 * The device's share of the event loop: polls functions and links while there is work, and sleeps when there is none.
 *
 * While awake, drivers are asked not to notify. Going to sleep: ask them to notify, look once more, and only then
 * stop, so that no notification is lost. Between bursts the event loop gets its turn (setImmediate), for messages and
 * other links.
 */

/** A function, or a link. */
export interface Pollable {
  /** hot: does some work; returns how much. */
  poll(): number;
  /** Before sleep: asks for notifications; true when there is work already. */
  arm(): boolean;
  /** After sleep: asks for none. */
  suppress(): void;
  /** Whether it holds something back that nobody will notify about. */
  readonly blocked: boolean;
}

/** Rounds over all pollables in one turn of the event loop. */
const ROUNDS = 64;
/** Turns without work before going to sleep: about twice as long as a wake-up takes. More would cost more than it saves. */
const IDLE_TURNS = 50;
/** Milliseconds between looks while something is held back: doubled each time in vain. */
const BLOCKED_DELAY = { min: 1, max: 16 } as const;

export class Pump {
  readonly #pollables: Pollable[] = [];
  /** Called with what a pollable threw: a fault of this program, which must not end it. */
  readonly #onError: (error: unknown) => void;
  #awake = false;
  #closed = false;
  #idleTurns = 0;
  #delay: number = BLOCKED_DELAY.min;
  #timer: NodeJS.Timeout | null = null;
  readonly #turn = (): void => this.#run();

  constructor(onError: (error: unknown) => void) {
    this.#onError = onError;
  }

  add(pollable: Pollable): void {
    this.#pollables.push(pollable);
  }

  remove(pollable: Pollable): void {
    const at = this.#pollables.indexOf(pollable);
    if (at >= 0) this.#pollables.splice(at, 1);
  }

  /** hot: there may be work. */
  wake(): void {
    this.#idleTurns = 0;
    if (this.#awake || this.#closed) return;
    this.#awake = true;
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    for (const pollable of this.#pollables) pollable.suppress();
    setImmediate(this.#turn);
  }

  close(): void {
    this.#closed = true;
    this.#pollables.length = 0;
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
  }

  #run(): void {
    if (this.#closed) return;
    try {
      if (this.#poll() > 0) {
        this.#idleTurns = 0;
        this.#delay = BLOCKED_DELAY.min;
      } else if (++this.#idleTurns > IDLE_TURNS && !this.#arm()) {
        this.#sleep();
        return;
      }
    } catch (error) {
      this.#onError(error);
    }
    setImmediate(this.#turn);
  }

  /** hot: */
  #poll(): number {
    let work = 0;
    for (let round = 0; round < ROUNDS; round++) {
      let done = 0;
      for (let i = 0; i < this.#pollables.length; i++) done += this.#pollables[i].poll();
      if (done === 0) break;
      work += done;
    }
    return work;
  }

  #arm(): boolean {
    let ready = false;
    for (const pollable of this.#pollables) ready = pollable.arm() || ready;
    if (!ready) return false;
    for (const pollable of this.#pollables) pollable.suppress();
    this.#idleTurns = 0;
    return true;
  }

  #sleep(): void {
    this.#awake = false;
    if (this.#pollables.some((pollable) => pollable.blocked)) {
      this.#timer = setTimeout(() => {
        this.wake();
        // One look, and back to sleep if it was in vain.
        this.#idleTurns = IDLE_TURNS;
      }, this.#delay);
      this.#delay = Math.min(2 * this.#delay, BLOCKED_DELAY.max);
    }
  }
}
