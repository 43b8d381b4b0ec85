/**
 * A worker thread with queue pairs of its own, for `workers.ts`: it sends its share of the datagrams of `flows.ts`, and receives what comes by
 * its queues, whosever it is.
 */
import { setTimeout as sleep, setImmediate as turn } from 'node:timers/promises';
import { parentPort } from 'node:worker_threads';
import type { QueueHandle, WorkerNicQueue } from '../../src/index.ts';
// Not from the index: a thread under emulation takes seconds to load the rest.
import { openQueue } from '../../src/worker/open-queue.ts';
import { checkAnswer, completeChecksum, datagram, FLOWS, indexOf, isAnswer, type Peer, TOTAL } from './datagrams.ts';
import type { Waiting } from './flows.ts';
import { udpFrame } from './packets.ts';

/** `seen` is what the threads share: 32-bit words that say how often each datagram has come back, to whichever of them. */
export type FlowCommand =
  /** Takes the queue of a pair over. What it had of that pair before is over. */
  | { readonly kind: 'open'; readonly pair: number; readonly handle: QueueHandle; readonly peer: Peer }
  /** Sends the flows with `flow % of === pair`, and receives until all `TOTAL` datagrams have come back. */
  | {
      readonly kind: 'exchange';
      readonly pair: number;
      readonly of: number;
      readonly waiting: Waiting;
      readonly seen: SharedArrayBuffer;
    }
  /** Sends and receives without end, and never comes to the event loop. */
  | { readonly kind: 'flood'; readonly pair: number; readonly seen: SharedArrayBuffer };

export type FlowAnswer =
  /** A command was carried out; `received`: datagrams that came by this queue. */
  { readonly kind: 'done'; readonly received: number } | { readonly kind: 'failed'; readonly message: string };

/** Index of a datagram that is sent without end: it stands behind the others in the words that the threads share. */
const FLOOD = TOTAL;
/** Datagrams of a thread on their way at a time; one by one they find their receiver asleep, after so many milliseconds. */
const IN_FLIGHT = 16;
const GAP_MS = 2;
const BURST = 32;
const TIMEOUT_MS = 20_000;
const LOOK_MS = 20;
/** A flood goes on after so long when nothing comes back. */
const FLOOD_PATIENCE_MS = 50;

const burst = new Uint32Array(BURST);
const one = new Uint32Array(1);

/** What the thread does with one queue pair. */
class Flows {
  readonly #queue: WorkerNicQueue;
  readonly #peer: Peer;

  constructor(queue: WorkerNicQueue, peer: Peer) {
    this.#queue = queue;
    this.#peer = peer;
  }

  async exchange({ pair, of, waiting, seen }: Extract<FlowCommand, { kind: 'exchange' }>): Promise<number> {
    const { rx } = this.#queue;
    rx.policy = waiting;
    const words = new Int32Array(seen);
    const all = Array.from({ length: TOTAL }, (_, i) => i);
    const mine = all.filter((i) => (i % FLOWS) % of === pair);
    const isMissing = (i: number) => Atomics.load(words, i) === 0;
    const deadline = performance.now() + TIMEOUT_MS;
    const window = waiting === 'interrupt' ? 1 : IN_FLIGHT;
    let received = 0;
    const goesOn = () => {
      if (this.#queue.broken !== null) throw this.#queue.broken;
      const missing = all.filter(isMissing).length;
      if (missing > 0 && performance.now() > deadline) throw new Error(`${missing} datagrams did not come back`);
      return missing > 0;
    };
    const feed = async () => {
      for (let sent = 0; sent < mine.length && goesOn(); ) {
        if (mine.slice(0, sent).filter(isMissing).length < window && this.#send(mine[sent])) sent++;
        await (waiting === 'interrupt' ? sleep(GAP_MS) : turn());
      }
    };
    const take = async () => {
      while (goesOn()) {
        if (await rx.wait(LOOK_MS)) received += this.#receive(words);
        await turn();
      }
    };
    await Promise.all([take(), feed()]);
    return received;
  }

  flood(seen: SharedArrayBuffer): never {
    const words = new Int32Array(seen);
    let sent = 0;
    for (let last = performance.now(); ; ) {
      if (this.#queue.broken !== null) throw this.#queue.broken;
      const back = Atomics.load(words, FLOOD);
      const now = performance.now();
      // What is lost on the way does not end it.
      if (now - last > FLOOD_PATIENCE_MS) sent = back;
      if (sent - back < IN_FLIGHT && this.#send(FLOOD)) {
        sent++;
        last = now;
      }
      this.#receive(words);
    }
  }

  /** False when there is no room. */
  #send(index: number): boolean {
    const { tx, packets } = this.#queue;
    tx.reclaim();
    if (packets.allocate(one, 1) === 0) return false;
    packets.write(one[0], udpFrame(datagram(this.#queue, this.#peer, index)));
    if (tx.burst(one, 1) === 1) return true;
    packets.free(one, 1);
    return false;
  }

  /** Takes what has come, and says how many datagrams of an exchange there were. */
  #receive(seen: Int32Array): number {
    const { rx, packets } = this.#queue;
    const n = rx.burst(burst, BURST);
    let received = 0;
    for (let i = 0; i < n; i++) {
      const frame = packets.read(burst[i]);
      if (!isAnswer(frame)) continue;
      completeChecksum(packets, burst[i], frame);
      const index = indexOf(frame);
      checkAnswer(frame, datagram(this.#queue, this.#peer, index));
      if (Atomics.add(seen, index, 1) !== 0 && index !== FLOOD) throw new Error(`datagram ${index} came twice`);
      if (index !== FLOOD) received++;
    }
    packets.free(burst, n);
    return received;
  }
}

const pairs = new Map<number, Flows>();

async function obey(command: FlowCommand): Promise<number> {
  if (command.kind === 'open') {
    pairs.set(command.pair, new Flows(openQueue(command.handle), command.peer));
    return 0;
  }
  const flows = pairs.get(command.pair);
  if (flows === undefined) throw new Error(`pair ${command.pair} is another thread's`);
  return command.kind === 'flood' ? flows.flood(command.seen) : flows.exchange(command);
}

parentPort?.on('message', async (command: FlowCommand) => {
  let answer: FlowAnswer;
  try {
    answer = { kind: 'done', received: await obey(command) };
  } catch (error) {
    answer = { kind: 'failed', message: error instanceof Error ? `${error.message} (${error.stack})` : String(error) };
  }
  parentPort?.postMessage(answer);
});
