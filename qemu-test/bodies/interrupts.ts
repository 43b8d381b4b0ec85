/**
 * Interrupts of a virtio-net function through MSI-X and eventfds, below the NIC: one vector for configuration changes, one for
 * the receive queue.
 */
import type { PciFunction } from '../../src/index.ts';
import { Feature, FeatureSet } from '../../src/index.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { Interrupts } from '../../src/vfio/interrupts.ts';
import { GENERIC_FEATURES, initializeDevice, resetDevice } from '../../src/virtio/initialize.ts';
import { openStandardTransport } from '../../src/virtio/standard.ts';
import type { VirtioTransport } from '../../src/virtio/transport.ts';
import { readNetConfig } from '../../src/virtio-net/config.ts';
import { netHeaderLayout } from '../../src/virtio-net/header.ts';
import { RxQueue } from '../../src/virtio-net/rx.ts';
import { allocateVirtqueue } from '../../src/virtqueue/create.ts';
import type { Virtqueue } from '../../src/virtqueue/virtqueue.ts';

const Vector = { config: 0, receive: 1, count: 2 } as const;
const QUEUE_SIZE = 64;
const PACKETS = 256;
const STRIDE = 2048;

export class InterruptDriven {
  readonly rx: RxQueue;
  readonly packets: PacketPool;
  readonly #interrupts: Interrupts;
  readonly #transport: VirtioTransport;
  readonly #linkUp: () => boolean;

  private constructor(parts: {
    rx: RxQueue;
    packets: PacketPool;
    interrupts: Interrupts;
    transport: VirtioTransport;
    linkUp: () => boolean;
  }) {
    this.rx = parts.rx;
    this.packets = parts.packets;
    this.#interrupts = parts.interrupts;
    this.#transport = parts.transport;
    this.#linkUp = parts.linkUp;
  }

  /** Initialises the device behind `fn` with a receive queue that interrupts. */
  static async open(fn: PciFunction): Promise<InterruptDriven> {
    const transport = openStandardTransport(fn);
    const interrupts = new Interrupts(fn, Vector.count);
    const packets = new PacketPool(fn.allocateDma(PACKETS * STRIDE), { stride: STRIDE });
    const wanted = GENERIC_FEATURES.with(Feature.MAC, Feature.STATUS);
    let made: RxQueue | undefined;
    const features = await initializeDevice(transport, {
      required: FeatureSet.of(Feature.ACCESS_PLATFORM),
      wanted,
      setup: (negotiated) => {
        transport.setConfigVector(Vector.config);
        const layout = netHeaderLayout(negotiated, 'virtio-1.4');
        const { iovaLow, iovaHigh } = packets;
        const eventIdx = negotiated.has(Feature.EVENT_IDX);
        const options = { index: 0, size: QUEUE_SIZE, eventIdx, iovaLow, iovaHigh, headroom: layout.length };
        const queue = allocateVirtqueue('split', fn, options);
        const notifier = transport.enableQueue(0, { size: QUEUE_SIZE, ...areas(queue), vector: Vector.receive });
        const sas = { resourceId: new Uint32Array(0), handle: new Uint32Array(0) };
        made = new RxQueue({ queue, notifier, pool: packets, layout, sas });
        made.refill(false);
      },
    });
    if (made === undefined) throw new Error('the device was not set up');
    made.start();
    const linkUp = () => readNetConfig(transport, features).linkUp;
    return new InterruptDriven({ rx: made, packets, interrupts, transport, linkUp });
  }

  /** Waits for the interrupt that says that the link went `up`, or down. */
  async link(up: boolean, timeoutMs: number): Promise<void> {
    if (!(await this.#interrupts.wait(Vector.config, timeoutMs))) throw new Error(`no interrupt in ${timeoutMs} ms`);
    if (this.#linkUp() !== up) throw new Error(`the link is ${up ? 'down' : 'up'}`);
  }

  /** Receives `count` frames for which `wanted` holds, asleep between them; returns how often it was woken. */
  async receive(count: number, wanted: (frame: Uint8Array) => boolean, timeoutMs: number): Promise<number> {
    const burst = new Uint32Array(QUEUE_SIZE);
    let received = 0;
    let woken = 0;
    while (received < count) {
      const n = this.rx.burst(burst, QUEUE_SIZE);
      for (let i = 0; i < n; i++) if (wanted(this.packets.read(burst[i]))) received++;
      this.packets.free(burst, n);
      if (n > 0 || this.rx.enableInterrupts()) continue;
      if (!(await this.#interrupts.wait(Vector.receive, timeoutMs))) {
        throw new Error(`${received} of ${count} frames, then no interrupt in ${timeoutMs} ms`);
      }
      woken++;
    }
    return woken;
  }

  /** Whether the receive queue interrupts within `timeoutMs`. */
  interrupted(timeoutMs: number): Promise<boolean> {
    return this.#interrupts.wait(Vector.receive, timeoutMs);
  }

  async close(): Promise<void> {
    this.#interrupts.close();
    await resetDevice(this.#transport);
  }
}

function areas({ descriptorArea, driverArea, deviceArea }: Virtqueue) {
  return { descriptorArea, driverArea, deviceArea };
}
