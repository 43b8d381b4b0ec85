/**
 * What an application with several threads does: a queue pair for each, traffic by all at once, a thread that ends in the middle of it and
 * whose queue the other one takes over. Every datagram must come back once, byte for byte, by whichever queue.
 */
import { type MessagePort, Worker } from 'node:worker_threads';
import { type FeatureBit, type Nic, openNic } from '../../src/index.ts';
import { same } from '../guest/guest.ts';
import { FLOWS, type Peer, TOTAL } from './datagrams.ts';
import type { FlowAnswer, FlowCommand } from './flow-worker.ts';
import type { Waiting } from './flows.ts';
import { poll } from './frames.ts';
import type { Place } from './place.ts';

const PAIRS = 2;
const TIMEOUT_MS = 20_000;
/** Datagrams of a flood that come back before its thread is ended. */
const IN_FULL_SWING = 100;
/** Interrupts that each queue must have had that was slept for: under emulation most answers are there before their receiver sleeps. */
const FEW = 1;
const { url } = import.meta;
/** A worker thread runs what was built, also when a test runs the sources. */
const SCRIPT = new URL(url.endsWith('.ts') ? '../../dist/qemu-test/bodies/flow-worker.js' : 'flow-worker.js', url);

type Ring = 'split' | 'packed';

export const workersName = (ring: Ring, waiting: Waiting): string => `${ring}, ${PAIRS} worker threads, ${waiting}`;
export const killedName = (ring: Ring): string => `${ring}: a thread is ended in mid-traffic, the other goes on`;
export const replacedName = (ring: Ring): string => `${ring}: another thread takes its queue over`;

export const workerChecks = (ring: Ring, ending = true): string[] => [
  workersName(ring, 'poll'),
  workersName(ring, 'interrupt'),
  ...(ending ? [killedName(ring), replacedName(ring)] : []),
];

export interface WorkerSetup {
  readonly ring: Ring;
  readonly peer: Peer;
  readonly features: readonly FeatureBit[];
  /** How worker threads must be able to notify the device: by its register, or by an eventfd. */
  readonly doorbell: 'memory' | 'eventfd';
  /** Whether a thread is ended, and the other one takes its queue over. It is the last that the crew does. Default true. */
  readonly ending?: boolean;
}

/** Two worker threads on two queue pairs. The device must be able to reset a single queue. */
export async function workerBody(place: Place, crew: FlowCrew, setup: WorkerSetup): Promise<void> {
  const { ring, features } = setup;
  await using nic = await openNic(place.address, { queuePairs: PAIRS, workerQueues: PAIRS, ring, ipsec: 'off' });
  if (!nic.features.hasAll(...features)) throw new Error(`negotiated ${nic.features.names().join(' ')}`);
  const [first, second] = crew.threads;
  await first.open(0, nic, setup);
  await second.open(1, nic, setup);
  for (const waiting of ['poll', 'interrupt'] as const) {
    await place.check(workersName(ring, waiting), () => allAtOnce(place, nic, [first, second], waiting));
  }
  if (setup.ending === false) return;
  await place.check(killedName(ring), () => endOne(nic, crew));
  await place.check(replacedName(ring), async () => {
    await first.open(1, nic, setup);
    return allAtOnce(place, nic, [first, first], 'interrupt');
  });
}

/** Traffic by all queues; `threads` are those that have them. */
async function allAtOnce(place: Place, nic: Nic, threads: readonly FlowThread[], waiting: Waiting): Promise<string> {
  const interrupts = () => threads.map((_, pair) => place.interrupts?.(pair) ?? Number.NaN);
  const before = interrupts();
  const sentBefore = nic.statistics().tx.packets;
  const seen = seenWords();
  const received = await Promise.all(threads.map((thread, pair) => thread.exchange(pair, PAIRS, waiting, seen)));
  const sent = nic.statistics().tx.packets - sentBefore;
  same('datagrams received and sent', [received.reduce((a, b) => a + b), sent], [TOTAL, TOTAL]);
  if (received.some((n) => n === 0)) throw new Error(`datagrams by queue: ${received.join(', ')}`);
  const fired = interrupts().map((n, i) => n - before[i]);
  if (waiting === 'interrupt' && fired.some((n) => n < FEW)) throw new Error(`interrupts: ${fired}`);
  return `${received.join(' + ')} datagrams of ${FLOWS} flows, ${fired.join(' + ')} interrupts`;
}

/** Ends the second thread while datagrams of its go both ways, and the first one is at work. */
async function endOne(nic: Nic, { threads: [first, second] }: FlowCrew): Promise<string> {
  const seen = seenWords();
  const words = new Int32Array(seen);
  const flooded = () => Atomics.load(words, TOTAL);
  second.order({ kind: 'flood', pair: 1, seen });
  await poll(() => flooded() >= IN_FULL_SWING || second.failure !== null, TIMEOUT_MS, 'a flood');
  same('the flood', second.failure, null);
  const end = async () => {
    await second.worker.terminate();
    await poll(() => nic.workerQueues[1].state === 'free', TIMEOUT_MS, 'the end of the thread');
  };
  await Promise.all([first.exchange(0, 1, 'adaptive', seen), end()]);
  same('broken', nic.broken, null);
  return `after ${flooded()} datagrams of its`;
}

function seenWords(): SharedArrayBuffer {
  return new SharedArrayBuffer(4 * (TOTAL + 1));
}

/** Threads for `workerBody`, one for each queue pair; they serve one NIC after the other, because each takes a while to start. */
export class FlowCrew {
  readonly threads = Array.from({ length: PAIRS }, () => new FlowThread());

  async end(): Promise<void> {
    for (const { worker } of this.threads) await worker.terminate();
  }
}

class FlowThread {
  readonly worker = new Worker(SCRIPT);
  /** What went wrong in it. */
  failure: string | null = null;
  readonly #waiting: ((answer: FlowAnswer) => void)[] = [];

  constructor() {
    this.worker.on('message', (answer: FlowAnswer) => this.#heard(answer));
    this.worker.on('error', (error) => this.#heard({ kind: 'failed', message: error.message }));
  }

  /** Takes the queue of a pair over. */
  async open(pair: number, nic: Nic, { peer, doorbell }: WorkerSetup): Promise<void> {
    const queue = nic.workerQueues[pair];
    const handle = await queue.transfer();
    const { tx } = handle;
    same('doorbell', 'register' in tx.doorbell ? tx.doorbell.register.kind : 'relay', doorbell);
    await this.#ask({ kind: 'open', pair, handle, peer }, handle.port);
    await poll(() => queue.state === 'open', TIMEOUT_MS, 'the opening of the queue');
  }

  /** Sends the share of the flows that the queue of `pair` has; returns how many datagrams came by it. */
  exchange(pair: number, of: number, waiting: Waiting, seen: SharedArrayBuffer): Promise<number> {
    return this.#ask({ kind: 'exchange', pair, of, waiting, seen });
  }

  /** Has it do something that it does not come back from. */
  order(command: FlowCommand): void {
    this.worker.postMessage(command);
  }

  #ask(command: FlowCommand, ...transfer: MessagePort[]): Promise<number> {
    this.worker.postMessage(command, transfer);
    return new Promise((resolve, reject) => {
      this.#waiting.push((answer) => {
        if (answer.kind === 'failed') reject(new Error(answer.message));
        else resolve(answer.received);
      });
    });
  }

  #heard(answer: FlowAnswer): void {
    if (answer.kind === 'failed') this.failure ??= answer.message;
    this.#waiting.shift()?.(answer);
  }
}
