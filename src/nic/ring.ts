/**
 * One ring of a NIC: its place on the device, notifications that do not throw into a burst, and its reset while the others run
 * (Virtio 1.4, 2.6.1).
 */
import { VirtioError } from '../errors.ts';
import { resetQueue } from '../virtio/initialize.ts';
import { NO_VECTOR } from '../virtio/pci-layout.ts';
import type { Doorbell, QueueNotifier, VirtioTransport } from '../virtio/transport.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';

export class NicRing implements QueueNotifier {
  readonly queue: Virtqueue;
  readonly #transport: VirtioTransport;
  /** Its interrupt, or `NO_VECTOR`, also when the device could not map the one that was wanted. */
  vector: number;
  readonly #onLost: (error: unknown) => void;
  readonly #position: { readonly next: number };
  #device: QueueNotifier;
  #reset: Promise<void> | null = null;

  /**
   * Enables `queue` on the device, with an interrupt `vector` or `NO_VECTOR`, in step 7 of the initialisation. `onLost` is told when a
   * notification finds the device lost. `position` says where the queue stands, when not `queue` itself does.
   */
  constructor(
    transport: VirtioTransport,
    queue: Virtqueue,
    vector: number,
    onLost: (error: unknown) => void,
    position: { readonly next: number } = queue,
  ) {
    this.queue = queue;
    this.#position = position;
    this.vector = vector;
    this.#transport = transport;
    this.#onLost = onLost;
    this.#device = this.#enable();
  }

  #enable(): QueueNotifier {
    try {
      return this.#enableWith(this.vector);
    } catch (error) {
      if (this.vector === NO_VECTOR || !(error instanceof VirtioError && error.code === 'MSIX_VECTOR')) throw error;
      this.vector = NO_VECTOR;
      return this.#enableWith(NO_VECTOR);
    }
  }

  #enableWith(vector: number): QueueNotifier {
    const { index, size, descriptorArea, driverArea, deviceArea } = this.queue;
    const areas = { descriptorArea, driverArea, deviceArea };
    return this.#transport.enableQueue(index, { size, ...areas, vector, position: this.#position });
  }

  share(): Doorbell | null {
    return this.#device.share?.() ?? null;
  }

  notify(): void {
    // hot:
    try {
      this.#device.notify();
    } catch (error) {
      this.#onLost(error);
    }
  }

  /**
   * Resets the queue and enables it again; meanwhile bursts give 0. `empty` takes back what the device had. Throws VirtioError
   * `QUEUE_RESET_TIMEOUT`, which breaks the queue, and VfioError. A second call waits for the first.
   */
  reset(empty: () => void, timeout: number): Promise<void> {
    this.#reset ??= this.#run(empty, timeout).finally(() => {
      this.#reset = null;
    });
    return this.#reset;
  }

  async #run(empty: () => void, timeout: number): Promise<void> {
    const { queue } = this;
    if (queue.broken !== null) throw queue.broken;
    queue.stop();
    try {
      await resetQueue(this.#transport, queue.index, timeout);
      // Whoever failed the queue meanwhile has its memory now.
      if (queue.broken !== null) throw queue.broken;
      empty();
      queue.restart();
      this.#device = this.#enable();
    } catch (error) {
      const text = `queue ${queue.index} could not be reset`;
      queue.fail(error instanceof VirtioError ? error : new VirtioError('QUEUE_RESET', text, { cause: error }));
      throw error;
    }
  }
}
