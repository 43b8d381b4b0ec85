/**
 * The interrupts of a NIC on a device that maps them itself: several queues and the configuration share a vector, and a flag says what an
 * interrupt was for (`InterruptCauses`, an octeon_ep class function).
 *
 * Which queue has which vector has changed with the firmware, so nothing here depends on it: whatever fires, the flags of those who sleep are
 * looked at. Queues of other threads have no interrupt of their own, and look by themselves. The device looks only once, when it is started,
 * whether interrupts are wanted; from then on they come whether anybody sleeps or not.
 */
import { VfioError } from '../errors.ts';
import type { Wake } from '../sys/eventfd-sleepers.ts';
import type { DeviceFunction } from '../vfio/function.ts';
import { Interrupts } from '../vfio/interrupts.ts';
import { IsrBit, NO_VECTOR } from '../virtio/pci-layout.ts';
import type { InterruptCauses, VirtioTransport } from '../virtio/transport.ts';
import { NAP_MS, NicInterrupts, RECHECK_MS } from './interrupts.ts';

/** Configuration changes come here. */
const CONFIG_VECTOR = 0;

interface Sleep {
  readonly queue: number;
  readonly end: () => void;
}

export class CauseInterrupts extends NicInterrupts {
  readonly #transport: Pick<VirtioTransport, 'readIsr'>;
  readonly #causes: InterruptCauses;
  readonly #vectors: Interrupts | null;
  readonly #sleeps = new Set<Sleep>();

  /** With `wanted` false, or on a device without vectors, there are none. Throws VfioError. */
  constructor(
    fn: DeviceFunction,
    transport: Pick<VirtioTransport, 'readIsr' | 'interruptVectors'>,
    causes: InterruptCauses,
    wanted: boolean,
  ) {
    super(fn, 1, false);
    this.#transport = transport;
    this.#causes = causes;
    const count = wanted ? transport.interruptVectors : 0;
    this.#vectors = count === 0 ? null : new Interrupts(fn, count);
    for (let vector = 0; vector < count; vector++) this.#vectors?.listen(vector, () => this.#fired());
  }

  override get configVector(): number {
    return this.#vectors === null ? NO_VECTOR : CONFIG_VECTOR;
  }

  override onConfigChange(listener: () => void): (() => void) | false {
    if (this.#vectors === null) return false;
    return this.#vectors.listen(CONFIG_VECTOR, () => {
      if (this.#read(() => (this.#transport.readIsr() & IsrBit.CONFIG) !== 0)) listener();
    });
  }

  override sleep(pair: number, ms: number, wake: Wake): void {
    if (this.#vectors === null) {
      setTimeout(wake, Math.min(ms, NAP_MS), false);
      return;
    }
    const queue = 2 * pair;
    try {
      // An interrupt of before, for which nobody was waiting.
      if (this.#causes.take(queue)) {
        setImmediate(wake, true);
        return;
      }
    } catch (error) {
      if (!(error instanceof VfioError)) throw error;
      setImmediate(wake, error);
      return;
    }
    const end = () => {
      clearTimeout(timer);
      this.#sleeps.delete(entry);
      wake(true);
    };
    const timer = setTimeout(end, Math.min(ms, RECHECK_MS));
    const entry: Sleep = { queue, end };
    this.#sleeps.add(entry);
  }

  override wake(pair: number): void {
    for (const { queue, end } of [...this.#sleeps]) if (queue === 2 * pair) end();
  }

  override close(): void {
    this.#vectors?.close();
    for (const { end } of [...this.#sleeps]) end();
  }

  /** One of the vectors: for whom, the flags say. */
  #fired(): void {
    for (const { queue, end } of [...this.#sleeps]) if (this.#read(() => this.#causes.take(queue))) end();
  }

  /** A device that is lost wakes everybody, who then find that out. */
  #read(look: () => boolean): boolean {
    try {
      return look();
    } catch (error) {
      if (error instanceof VfioError) return true;
      throw error;
    }
  }
}
