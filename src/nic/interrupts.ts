/**
 * The interrupts of a NIC (Virtio 1.4, 4.1.5.1.2): one vector for configuration changes, one for each receive queue, as far as the device has
 * as many; with fewer, receive queues share, but never with one of another thread, which then has none. Transmit queues have none: what was sent is reclaimed when there is something to send.
 *
 * And waiting for packets: rings are polled first or not, by policy, and only while somebody waits is the device asked for an interrupt. No
 * sleep is longer than `RECHECK_MS`: an interrupt that is lost, or a ring that was reset meanwhile, delays but never hangs.
 */
import { VirtioError } from '../errors.ts';
import type { Wake } from '../sys/eventfd-sleepers.ts';
import type { DeviceFunction } from '../vfio/function.ts';
import { Interrupts } from '../vfio/interrupts.ts';
import { NO_VECTOR } from '../virtio/pci-layout.ts';
import type { RxQueue } from '../virtio-net/rx.ts';

/**
 * How a receive queue waits. `poll` looks again and again and takes a whole core; `interrupt` sleeps at once; `adaptive` looks for
 * a moment, because where packets come one after the other the next is here sooner than an interrupt, and then sleeps.
 */
export type WaitPolicy = 'poll' | 'interrupt' | 'adaptive';

/** Milliseconds that `adaptive` looks before it sleeps: a few times what waking up takes. */
const LOOK_MS = 0.2;
/** Milliseconds after which who sleeps looks again anyway. */
export const RECHECK_MS = 100;
/** The same where the device has no interrupts. */
export const NAP_MS = 1;

const CONFIG_VECTOR = 0;
const FIRST_RECEIVE_VECTOR = 1;

/** Who sleeps until a receive queue may have packets. */
export interface Sleeper {
  /** Calls `wake`, but not at once, when the receive queue of `pair` may have packets, or after `ms`; with an error when the function is lost. */
  sleep(pair: number, ms: number, wake: Wake): void;
  /** Ends the sleep of whoever waits for the receive queue of `pair`. */
  wake(pair: number): void;
}

export class NicInterrupts implements Sleeper {
  readonly #interrupts: Interrupts | null;
  /** Queue pairs of this thread, which come first, and the vectors that they have together. */
  readonly #pairs: number;
  readonly #shared: number;
  /** Pairs whose receive queue the device could not give its vector. */
  readonly #without = new Set<number>();

  /**
   * For `pairs` queue pairs of `fn`, of which the last `workers` are those of other threads; with `wanted` false, or on a function without
   * vectors, there are none. Throws VfioError.
   */
  constructor(fn: DeviceFunction, pairs: number, wanted: boolean, workers = 0) {
    const vectors = wanted ? Math.min(fn.interruptVectors, FIRST_RECEIVE_VECTOR + pairs) : 0;
    const receive = Math.max(0, vectors - FIRST_RECEIVE_VECTOR);
    this.#pairs = pairs - workers;
    const atLeast = Math.min(1, this.#pairs, receive);
    this.#shared = Math.max(atLeast, receive - workers);
    this.#interrupts = vectors === 0 ? null : new Interrupts(fn, vectors);
  }

  /** Vector of configuration changes, or `NO_VECTOR`. */
  get configVector(): number {
    return this.#interrupts === null ? NO_VECTOR : CONFIG_VECTOR;
  }

  /** Vector of the receive queue of `pair`, or `NO_VECTOR`. */
  receiveVector(pair: number): number {
    if (this.#interrupts === null || this.#without.has(pair)) return NO_VECTOR;
    if (pair < this.#pairs) return this.#shared < 1 ? NO_VECTOR : FIRST_RECEIVE_VECTOR + (pair % this.#shared);
    const own = FIRST_RECEIVE_VECTOR + this.#shared + pair - this.#pairs;
    return own < this.#interrupts.count ? own : NO_VECTOR;
  }

  /** The eventfd of the receive queue of `pair`, for the thread that has the queue; null when the device cannot interrupt it. */
  handOver(pair: number): number | null {
    const vector = this.receiveVector(pair);
    return this.#interrupts === null || vector === NO_VECTOR ? null : this.#interrupts.handOver(vector);
  }

  /** The device could not map the vector of the receive queue of `pair` (4.1.5.1.2.1): its waiters look by themselves. */
  withdraw(pair: number): void {
    this.#without.add(pair);
  }

  /** Calls `listener` when the configuration has changed; returns how to stop. False without interrupts. */
  onConfigChange(listener: () => void): (() => void) | false {
    return this.#interrupts === null ? false : this.#interrupts.listen(CONFIG_VECTOR, listener);
  }

  sleep(pair: number, ms: number, wake: Wake): void {
    const vector = this.receiveVector(pair);
    if (this.#interrupts === null || vector === NO_VECTOR) setTimeout(wake, Math.min(ms, NAP_MS), false);
    else this.#interrupts.sleep(vector, Math.min(ms, RECHECK_MS), wake);
  }

  wake(pair: number): void {
    const vector = this.receiveVector(pair);
    if (vector !== NO_VECTOR) this.#interrupts?.wake(vector);
  }

  close(): void {
    this.#interrupts?.close();
  }
}

/** What is used of a receive ring. */
export type WaitableRing = Pick<RxQueue, 'broken' | 'enableInterrupts' | 'disableInterrupts'>;

/**
 * Who finds packets each time that he looks never sleeps, and promises alone give the event loop no turn: timers, messages and the control path would
 * wait as long as somebody sends. So one of as many looks is made in the loop's next turn.
 */
export const LOOKS_PER_TURN = 32;

/**
 * Resolves to true when `ring` has packets, to false when it has none within `timeout` milliseconds. Rejects with the reason when the
 * ring is broken or closed; `onBroken` is called before. With `afterTurn` the first look is made in the next turn of the event loop.
 */
export function waitForPackets(
  ring: WaitableRing,
  pair: number,
  interrupts: Sleeper,
  policy: WaitPolicy,
  timeout: number,
  onBroken: () => void,
  afterTurn = false,
): Promise<boolean> {
  const start = performance.now();
  const looking = policy === 'poll' ? timeout : policy === 'adaptive' ? LOOK_MS : 0;
  // Callbacks up to here, because each promise in between would take 10 µs after a sleep.
  return new Promise((resolve, reject) => {
    const look = (result: unknown) => {
      if (ring.broken !== null) {
        onBroken();
        // Who is woken because the NIC ends is told why it did.
        reject(ring.broken);
      } else if (result instanceof Error) {
        ring.disableInterrupts();
        reject(result);
      } else if (ring.enableInterrupts()) {
        // It asks for the interrupt and looks, in this order, so that none is missed.
        ring.disableInterrupts();
        resolve(true);
      } else {
        again();
      }
    };
    const again = () => {
      const waited = performance.now() - start;
      if (waited >= timeout) {
        ring.disableInterrupts();
        resolve(false);
      } else if (waited < looking) {
        setImmediate(look);
      } else {
        interrupts.sleep(pair, timeout - waited, look);
      }
    };
    if (afterTurn) setImmediate(look);
    else look(null);
  });
}

/** What is used of a receive queue. */
export interface BurstSource {
  burst(out: Uint32Array, max: number): number;
  wait(): Promise<boolean>;
}

/** Packets of a burst when nobody says how many. */
const DEFAULT_BURST = 64;

/**
 * Bursts of at most `max` packets, as they come. The memory of the array is the same each time; the packets are the caller's. Ends when the
 * NIC is closed; throws when it breaks.
 *
 * ```ts
 * for await (const packets of queue.rx) {
 *   …
 *   nic.packets.free(packets, packets.length);
 * }
 * ```
 */
export async function* burstsOf(
  queue: BurstSource,
  max: number = DEFAULT_BURST,
): AsyncGenerator<Uint32Array, void, void> {
  const packets = new Uint32Array(max);
  try {
    for (let looks = 1; ; looks++) {
      const n = queue.burst(packets, max);
      if (n > 0) yield packets.subarray(0, n);
      else await queue.wait();
      if (looks % LOOKS_PER_TURN === 0) await new Promise((resolve) => setImmediate(resolve));
    }
  } catch (error) {
    if (!(error instanceof VirtioError && error.code === 'NIC_CLOSED')) throw error;
  }
}
