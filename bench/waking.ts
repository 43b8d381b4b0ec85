/**
 * How long it takes from an interrupt to the code behind `await rx.wait()`, and beside it, turn about, the barest wake-up that there is: from a write to an
 * eventfd to a thread that was blocked in read(2). What plays the device is a thread that sleeps for 1 to 5 ms, so that everybody else sleeps too, writes to the
 * one, sleeps again, and writes to the other.
 *
 * The time begins right before the write to the eventfd, of which the first half runs on the device's side: it is in both.
 */
import { setTimeout as pause } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { openQueue } from '../src/index.ts';
import { close, EventfdFlag, eventfd, write } from '../src/sys/libc.ts';
import { mapAnonymous } from '../src/sys/memory.ts';
import type { QueueHandle } from '../src/worker/handle.ts';
import { frame, makePair, type PairRings } from './shared-pair.ts';
import type { WakeThreadData } from './wake-thread.ts';

/** Indices of words that all threads share; `driver` and `reader` count their wake-ups. */
export const Word = { stop: 0, ready: 1, never: 2, driver: 16, reader: 32 } as const;
/** Wake-ups of each; those that come first run code for the first time. */
export const WAKES = 320;
const FIRST = 20;
/** Wake-ups of one sample of a ratio. */
const BLOCK = 20;

export type WakingDriver = 'worker' | 'main';

/** Microseconds of a clock that all threads have in common. */
export const clock = () => Number(process.hrtime.bigint()) / 1000;

/** Writes to eventfds, with nothing around the system call. */
export class Signal {
  readonly #one = mapAnonymous(8);

  constructor() {
    this.#one.u32[0] = 1;
  }

  write(fd: number): void {
    write(fd, this.#one.address, 8);
  }
}

/** When the device has written last, @0, and for each wake-up how long it took, in microseconds. */
export class WakeTimes {
  readonly buffer: SharedArrayBuffer;
  readonly written: Float64Array;
  readonly driver: Float64Array;
  readonly reader: Float64Array;

  constructor(buffer: SharedArrayBuffer = new SharedArrayBuffer(8 * (8 + 2 * WAKES))) {
    this.buffer = buffer;
    this.written = new Float64Array(buffer, 0, 1);
    this.driver = new Float64Array(buffer, 64, WAKES);
    this.reader = new Float64Array(buffer, 64 + 8 * WAKES, WAKES);
  }
}

/** Sends a packet, sleeps until it comes back, and notes when it woke. */
export async function sleepAndWake(handle: QueueHandle, words: Int32Array, times: WakeTimes): Promise<void> {
  using queue = openQueue(handle);
  const { packets: pool, rx, tx } = queue;
  const burst = new Uint32Array(32);
  rx.policy = 'interrupt';
  Atomics.add(words, Word.ready, 1);
  for (let i = 0; i < WAKES; i++) {
    if (pool.allocate(burst, 2) !== 2) throw new Error('there are too few packets');
    // The loop device moves two at a time.
    for (let k = 0; k < 2; k++) pool.write(burst[k], frame());
    tx.burst(burst, 2);
    await rx.wait();
    times.driver[i] = clock() - times.written[0];
    Atomics.store(words, Word.driver, i + 1);
    const n = rx.burst(burst, burst.length);
    if (n !== 2) throw new Error('woken for nothing');
    pool.free(burst, n);
    tx.reclaim();
  }
}

/** Measures with the driver in a worker thread or in this one: microseconds, of the driver and of the thread that only reads. */
export async function wakeTimes(driver: WakingDriver): Promise<{ driver: number[]; reader: number[] }> {
  const words = new Int32Array(new SharedArrayBuffer(256));
  const times = new WakeTimes();
  const pair = makePair(0);
  const blocking = eventfd(0, EventfdFlag.cloexec);
  let failure: Error | null = null;
  const threads: Worker[] = [];
  const start = (
    data: { role: 'driver'; handle: QueueHandle } | { role: 'reader' } | { role: 'device'; rings: PairRings },
  ) => {
    const workerData: WakeThreadData = { ...data, words, times: times.buffer, reader: blocking };
    const transferList = data.role === 'driver' ? [data.handle.port] : [];
    const thread = new Worker(new URL('./wake-thread.js', import.meta.url), { workerData, transferList });
    thread.on('error', (error) => {
      failure = error;
    });
    threads.push(thread);
  };
  try {
    start({ role: 'reader' });
    start({ role: 'device', rings: pair.rings });
    if (driver === 'worker') start({ role: 'driver', handle: pair.handle });
    else await sleepAndWake(pair.handle, words, times);
    while (Atomics.load(words, Word.reader) < WAKES) {
      if (failure !== null) throw failure;
      await pause(10);
    }
    return { driver: [...times.driver.subarray(FIRST)], reader: [...times.reader.subarray(FIRST)] };
  } finally {
    Atomics.store(words, Word.stop, 1);
    // Who is blocked in read(2) does not see that it is ended.
    new Signal().write(blocking);
    await Promise.all(threads.map((thread) => thread.terminate()));
    close(blocking);
    pair.close();
  }
}

/** For each block of wake-ups, the median of `a` over that of `b`. */
export function blockRatios(a: readonly number[], b: readonly number[]): number[] {
  const middle = (of: readonly number[], at: number) => of.slice(at, at + BLOCK).sort((x, y) => x - y)[BLOCK >> 1];
  const ratios: number[] = [];
  for (let at = 0; at + BLOCK <= a.length; at += BLOCK) ratios.push(middle(a, at) / middle(b, at));
  return ratios;
}
