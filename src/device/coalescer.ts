/**
 * Coalescing of used buffer notifications (Virtio 1.4, 5.1.9.5.10; NOTF_COAL, VQ_NOTF_COAL): an interrupt that the driver wants is held
 * back until so many packets or so much time have gone by.
 *
 * Time is looked at while the event loop is awake. Before it sleeps, all that is held back is sent: the standard allows
 * notifications more often than asked for, and a packet never waits for the next one.
 */
import type { Coalescing } from '../virtio-net/control-wire.ts';
import type { FaultSet } from './faults.ts';

const NONE: Coalescing = { maxPackets: 0, maxMicroseconds: 0 };

export class Coalescer {
  readonly #interrupt: (index: number) => void;
  /** By virtqueue index. */
  readonly #settings: Coalescing[];
  readonly #packets: Float64Array;
  /** Milliseconds of `performance.now()` at which what is held back is sent; 0 when nothing is. */
  readonly #deadline: Float64Array;
  /** What was set for all receive and all transmit queues: a queue that is enabled again begins with it. */
  readonly #all: [Coalescing, Coalescing] = [NONE, NONE];
  #held = 0;
  readonly #keeps: boolean;

  constructor(queues: number, interrupt: (index: number) => void, faults: FaultSet) {
    this.#interrupt = interrupt;
    this.#keeps = faults.has('coal-kept');
    this.#settings = new Array<Coalescing>(queues).fill(NONE);
    this.#packets = new Float64Array(queues);
    this.#deadline = new Float64Array(queues);
  }

  /** As after a reset. */
  clear(): void {
    this.#packets.fill(0);
    this.#deadline.fill(0);
    this.#held = 0;
    if (this.#keeps) return;
    this.#settings.fill(NONE);
    this.#all.fill(NONE);
  }

  /** Receive queues are the even ones. */
  setAll(parity: 0 | 1, coalescing: Coalescing): void {
    this.#all[parity] = coalescing;
    for (let index = parity; index < this.#settings.length; index += 2) this.set(index, coalescing);
  }

  set(index: number, coalescing: Coalescing): void {
    this.#settings[index] = coalescing;
    // The conditions of the new parameters may be met already.
    if (this.#deadline[index] !== 0) this.#fire(index);
  }

  get(index: number): Coalescing {
    return this.#settings[index];
  }

  /** Queue `index` was disabled or enabled. */
  forget(index: number): void {
    if (index >= this.#settings.length) return;
    if (this.#deadline[index] !== 0) this.#held--;
    this.#deadline[index] = 0;
    this.#packets[index] = 0;
    if (!this.#keeps) this.#settings[index] = this.#all[index & 1 ? 1 : 0];
  }

  /** hot: `packets` more were used in queue `index`; `wanted` when the driver wants to be told of them. */
  used(index: number, packets: number, wanted: boolean): void {
    const { maxPackets, maxMicroseconds } = this.#settings[index];
    if (maxPackets === 0 || maxMicroseconds === 0) {
      if (wanted) this.#interrupt(index);
      return;
    }
    if (wanted && this.#deadline[index] === 0) {
      this.#deadline[index] = performance.now() + maxMicroseconds / 1000;
      this.#held++;
    }
    this.#packets[index] += packets;
    if (this.#deadline[index] !== 0 && this.#packets[index] >= maxPackets) this.#fire(index);
  }

  /** hot: sends what has waited long enough, or, with `all`, everything. */
  expire(all: boolean): void {
    if (this.#held === 0) return;
    const now = performance.now();
    for (let index = 0; index < this.#deadline.length; index++) {
      const deadline = this.#deadline[index];
      if (deadline !== 0 && (all || now >= deadline)) this.#fire(index);
    }
  }

  #fire(index: number): void {
    this.#deadline[index] = 0;
    this.#packets[index] = 0;
    this.#held--;
    this.#interrupt(index);
  }
}
