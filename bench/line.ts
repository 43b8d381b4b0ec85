/**
 * How far the two cores of `nic.forward` are from each other: what it takes a cache line that one thread has written to reach another one that looks at it all the time.
 * A virtual machine does not say which of its cores share a cache, and its host may change that while it runs.
 */
import { Worker } from 'node:worker_threads';

export interface LineThreadData {
  readonly side: 0 | 1;
  /** Element 0 goes back and forth, element `COUNT_AT` counts rounds, element `STOP_AT` ends them: each in a line of its own. */
  readonly words: Int32Array;
}

export const COUNT_AT = 32;
export const STOP_AT = 64;
const SAMPLE_MS = 200;
const SAMPLES = 15;
const WARMUP_MS = 500;

const wait = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** Nanoseconds from one core to the other, several times. */
export async function lineTimes(): Promise<number[]> {
  const words = new Int32Array(new SharedArrayBuffer(4 * 96));
  const threads = ([0, 1] as const).map((side) => {
    const workerData: LineThreadData = { side, words };
    return new Worker(new URL('./line-thread.js', import.meta.url), { workerData });
  });
  try {
    while (Atomics.load(words, COUNT_AT) === 0) await wait(1);
    await wait(WARMUP_MS);
    const times: number[] = [];
    while (times.length < SAMPLES) {
      const start = performance.now();
      const from = Atomics.load(words, COUNT_AT);
      await wait(SAMPLE_MS);
      const rounds = Atomics.load(words, COUNT_AT) - from;
      if (rounds === 0) throw new Error('nothing moves: the machine is too busy to measure this');
      // There and back.
      times.push(((performance.now() - start) * 1e6) / (2 * rounds));
    }
    return times;
  } finally {
    Atomics.store(words, STOP_AT, 1);
    await Promise.all(threads.map((thread) => thread.terminate()));
  }
}
