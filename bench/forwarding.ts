/**
 * Forwarding by queue pairs in threads of their own, as an application has them: each thread opens its pair with `openQueue`, receives bursts,
 * swaps the MAC addresses of each packet, and sends it. Rings and packets are in shared memory (a memfd), which every thread maps.
 *
 * What plays the device is the loop device of `loop-device.ts`, which copies each packet from the transmitted to the received buffer. It
 * is in a thread of its own (`separate`), or in the driver's, after each burst (`together`), where the cores do not suffice for both.
 */
import { Worker } from 'node:worker_threads';
import { TxCounter } from '../src/virtio-net/tx.ts';
import type { QueueHandle } from '../src/worker/handle.ts';
import type { ThreadData, ThreadRole } from './forward-thread.ts';
import { makePair, type SharedPair } from './shared-pair.ts';

/** Indices of words that all threads share. */
export const Shared = { stop: 0, active: 1, ready: 2 } as const;

export interface ForwardingOptions {
  readonly pairs: number;
  readonly device: 'separate' | 'together';
}

interface Pair extends SharedPair {
  readonly threads: readonly Worker[];
}

export class Forwarding {
  readonly words = new Int32Array(new SharedArrayBuffer(64));
  readonly #pairs: readonly Pair[];
  #failure: Error | null = null;

  constructor(options: ForwardingOptions) {
    this.#pairs = Array.from({ length: options.pairs }, (_, index) => this.#pair(index, options));
  }

  /** Resolves when all threads run. */
  async ready(): Promise<void> {
    const threads = this.#pairs.reduce((sum, pair) => sum + pair.threads.length, 0);
    while (Atomics.load(this.words, Shared.ready) < threads) await this.wait(1);
  }

  /** Lets only the pairs forward from now on whose bits are set. */
  activate(pairs: number): void {
    Atomics.store(this.words, Shared.active, pairs);
  }

  /** Packets forwarded so far. */
  get packets(): number {
    return this.#pairs.reduce((sum, { control }) => sum + control.counters.tx.counters[TxCounter.packets], 0);
  }

  /** Mpps over about `ms` milliseconds. */
  async rate(ms: number): Promise<number> {
    const start = performance.now();
    const from = this.packets;
    await this.wait(ms);
    if (this.packets === from) throw new Error('nothing moves: the machine is too busy to measure this');
    return (this.packets - from) / (performance.now() - start) / 1000;
  }

  async wait(ms: number): Promise<void> {
    await new Promise((resolve) => setTimeout(resolve, ms));
    if (this.#failure !== null) throw this.#failure;
  }

  async close(): Promise<void> {
    Atomics.store(this.words, Shared.stop, 1);
    await Promise.all(this.#pairs.flatMap(({ threads }) => threads.map((thread) => thread.terminate())));
    for (const pair of this.#pairs) pair.close();
  }

  #pair(index: number, { device }: ForwardingOptions): Pair {
    const pair = makePair(index);
    const start = (role: ThreadRole, handle: QueueHandle | null) => {
      const workerData: ThreadData = { role, index, handle, rings: pair.rings, words: this.words };
      const thread = new Worker(new URL('./forward-thread.js', import.meta.url), {
        workerData,
        transferList: handle === null ? [] : [handle.port],
      });
      thread.on('error', (error) => {
        this.#failure = error;
      });
      return thread;
    };
    const threads =
      device === 'together' ? [start('both', pair.handle)] : [start('forward', pair.handle), start('device', null)];
    return { ...pair, threads };
  }
}
