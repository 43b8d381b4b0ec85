/**
 * A thread of `waking.ts`: the driver, who plays the device, or who only reads.
 */
import { workerData } from 'node:worker_threads';
import { eventfd, read } from '../src/sys/libc.ts';
import { mapAnonymous } from '../src/sys/memory.ts';
import type { QueueHandle } from '../src/worker/handle.ts';
import { loopDevice, loopRing, type PairRings } from './shared-pair.ts';
import { clock, Signal, sleepAndWake, WAKES, WakeTimes, Word } from './waking.ts';

export type WakeThreadData = {
  readonly words: Int32Array;
  readonly times: SharedArrayBuffer;
  /** A blocking eventfd. */
  readonly reader: number;
} & (
  | { readonly role: 'driver'; readonly handle: QueueHandle }
  | { readonly role: 'device'; readonly rings: PairRings }
  | { readonly role: 'reader' }
);

/** Milliseconds that everybody sleeps, in turns. */
const NAPS = [1, 2, 3, 4, 5];
/** Milliseconds between looks whether somebody is ready. */
const LOOK = 0.2;

const data: WakeThreadData = workerData;
const { words } = data;
const times = new WakeTimes(data.times);

function waitUntil(done: () => boolean): void {
  while (!done() && Atomics.load(words, Word.stop) === 0) Atomics.wait(words, Word.never, 0, LOOK);
}

/** Says when, and signals. Another eventfd is signalled before: what takes the time is the system, not code that has not run for a while. */
function signalNow(signal: Signal, fd: number, other: number): void {
  times.written[0] = clock();
  signal.write(other);
  times.written[0] = clock();
  signal.write(fd);
}

function playDevice(rings: PairRings): void {
  waitUntil(() => Atomics.load(words, Word.ready) === 2);
  const device = loopDevice(rings);
  const tx = loopRing(rings.tx);
  const avail = ((tx.driverArea - tx.memory.iova) >>> 1) + 1;
  const interrupt = rings.interrupt ?? -1;
  const signal = new Signal();
  const other = eventfd();
  for (let i = 0; i < WAKES; i++) {
    const nap = NAPS[i % NAPS.length];
    waitUntil(() => Atomics.load(tx.memory.u16, avail) === 2 * (i + 1));
    Atomics.wait(words, Word.never, 0, nap);
    device.run();
    signalNow(signal, interrupt, other);
    waitUntil(() => Atomics.load(words, Word.driver) > i);
    Atomics.wait(words, Word.never, 0, nap);
    signalNow(signal, data.reader, other);
    waitUntil(() => Atomics.load(words, Word.reader) > i);
  }
}

function readOnly(): void {
  const { address } = mapAnonymous(8);
  Atomics.add(words, Word.ready, 1);
  for (let i = 0; i < WAKES; i++) {
    read(data.reader, address, 8);
    times.reader[i] = clock() - times.written[0];
    Atomics.store(words, Word.reader, i + 1);
  }
}

switch (data.role) {
  case 'driver':
    await sleepAndWake(data.handle, words, times);
    break;
  case 'device':
    playDevice(data.rings);
    break;
  case 'reader':
    readOnly();
    break;
}
