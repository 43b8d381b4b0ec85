/**
 * Warnings of a device, of which a client can cause as many as it likes: so many in a while are told, of the others how many there were.
 */

/** So many in so many milliseconds. */
const MOST = 10;
const WHILE_MS = 60_000;

export class BoundedWarnings {
  readonly #tell: (text: string) => void;
  readonly #now: () => number;
  #since = Number.NEGATIVE_INFINITY;
  #told = 0;
  #untold = 0;

  /** `now` gives milliseconds. */
  constructor(tell: (text: string) => void, now: () => number = () => performance.now()) {
    this.#tell = tell;
    this.#now = now;
  }

  warn(text: string): void {
    const now = this.#now();
    if (now - this.#since >= WHILE_MS) {
      if (this.#untold > 0) this.#tell(`${this.#untold} more warnings were left out`);
      this.#since = now;
      this.#told = 0;
      this.#untold = 0;
    }
    if (this.#told >= MOST) this.#untold++;
    else {
      this.#told++;
      this.#tell(text);
    }
  }
}
