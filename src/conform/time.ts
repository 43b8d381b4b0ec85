/** Waiting, always with an end. */
import { setTimeout as sleep, setImmediate as turn } from 'node:timers/promises';
import { Failed } from './check.ts';

/** Milliseconds of eager polling before the pauses begin. */
const EAGER = 3;
/** Answers of the other side that `quietly` waits for. */
const ANSWERS = 16;

/** How long things may take, in milliseconds. */
export class Patience {
  /** What a device may take to answer. */
  readonly timeout: number;
  /** How long nothing must happen before it counts as not happening. */
  readonly quiet: number;
  /** When the check that runs must be over. */
  deadline = Number.POSITIVE_INFINITY;

  constructor(timeout: number) {
    this.timeout = timeout;
    this.quiet = Math.min(100, Math.max(10, timeout / 20));
  }

  /**
   * Waits until `condition` holds; false when it does not within `limit`. Throws `Failed` when the check's time is
   * over.
   */
  async until(condition: () => boolean, limit = this.timeout): Promise<boolean> {
    const start = performance.now();
    for (;;) {
      if (condition()) return true;
      const now = performance.now();
      if (now >= this.deadline) throw new Failed('the check took too long');
      if (now - start >= limit) return false;
      if (now - start < EAGER) await turn();
      else await sleep(1);
    }
  }

  /**
   * Waits for as long as nothing must happen, and until the other side has answered `probe` a few times; or until `condition` holds
   * after all: then false.
   */
  async quietly(condition: () => boolean, probe: () => unknown): Promise<boolean> {
    const start = performance.now();
    for (let answers = 0; answers < ANSWERS || performance.now() - start < this.quiet; answers++) {
      if (condition()) return false;
      probe();
      await sleep(1);
    }
    return !condition();
  }
}
