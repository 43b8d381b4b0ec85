/** One of the two threads of `line.ts`. */
import { workerData } from 'node:worker_threads';
import { COUNT_AT, type LineThreadData, STOP_AT } from './line.ts';
import { pinThread } from './pin.ts';

/** Rounds between looks whether it is over. */
const ROUNDS = 1000;

const { side, words }: LineThreadData = workerData;

/** hot: waits for the other side's number and answers with the next one. */
function rounds(from: number): number {
  let next = from;
  for (let i = 0; i < ROUNDS; i++) {
    while (Atomics.load(words, 0) !== next) if (words[STOP_AT] !== 0) return -1;
    Atomics.store(words, 0, next + 1);
    next += 2;
  }
  return next;
}

pinThread(side);
for (let next = side as number; next >= 0; next = rounds(next)) {
  if (side === 0 && next > 0) Atomics.add(words, COUNT_AT, ROUNDS);
}
