/**
 * The memory and the rings of a NIC: the packet pool, a receive and a transmit ring for each queue pair, and the control queue that
 * says how many pairs are in use (Virtio 1.4, 5.1.2, 5.1.5, 5.1.9.5.6). All rings have one format, split or packed.
 */
import { type VipsecError, VirtioError } from './errors.ts';
import { NicInterrupts } from './nic-interrupts.ts';
import { NicRing } from './nic-ring.ts';
import type { OpenOptions } from './nic-wire.ts';
import { Ethernet } from './packet/fields.ts';
import { PacketPool } from './packet/pool.ts';
import type { DmaMemory } from './sys/memory.ts';
import { type DeviceFunction, releaseDma } from './vfio/function.ts';
import { Feature, type FeatureSet } from './virtio/features.ts';
import { NO_VECTOR } from './virtio/pci-layout.ts';
import { ringFormat, ringOptions } from './virtio/ring-format.ts';
import type { VirtioTransport } from './virtio/transport.ts';
import type { NetConfig } from './virtio-net/config.ts';
import { ControlQueue } from './virtio-net/control.ts';
import { netHeaderLayout, receivedGsoTypes, sentGsoTypes } from './virtio-net/header.ts';
import { NetControl } from './virtio-net/net-control.ts';
import type { RxQueue } from './virtio-net/rx.ts';
import { createRxQueue } from './virtio-net/rx-merge.ts';
import type { SaTable } from './virtio-net/sa-table.ts';
import { MAX_CHAIN, TxCounter, TxQueue } from './virtio-net/tx.ts';
import { createVirtqueue, virtqueueBytes } from './virtqueue/create.ts';

/** Bytes in front of a packet: its header, and what IPsec puts in front of it. */
const HEADROOM = 128;
/** Bytes behind the longest packet: ESP padding and trailer, ICV, and what AH and ESN need for a moment. */
const TAILROOM = 128;
const SLOT_ALIGNMENT = 64;
const MIN_STRIDE = 2048;

/** How long the packets of an SA that is removed may take to leave the transmit rings. */
const QUIESCE_MS = 100;

interface RingPair {
  readonly rx: RxQueue;
  readonly tx: TxQueue;
  readonly rxRing: NicRing;
  readonly txRing: NicRing;
}

export class NicRings {
  readonly pool: PacketPool;
  readonly pairs: readonly RingPair[];
  /** Bytes of the longest IP packet. */
  readonly mtu: number;
  /** Called when a notification finds the device lost. */
  onLost: (error: VipsecError) => void = () => {};
  readonly #fn: DeviceFunction;
  readonly #features: FeatureSet;
  readonly #resetTimeout: number;
  /** Null without CTRL_VQ. */
  readonly control: NetControl | null;
  readonly #control: ControlQueue | null;
  readonly interrupts: NicInterrupts;
  readonly #memories: DmaMemory[] = [];
  #closed = false;

  /** Step 7 of the initialisation. Throws VirtioError `QUEUE_SIZE`, `QUEUE_PAIRS`, `QUEUE_COUNT`; VfioError. */
  constructor(
    fn: DeviceFunction,
    transport: VirtioTransport,
    features: FeatureSet,
    config: NetConfig,
    sas: SaTable,
    options: OpenOptions,
  ) {
    this.#fn = fn;
    this.#features = features;
    this.#resetTimeout = options.resetTimeout;
    this.mtu = config.mtu ?? options.mtu;
    const { queuePairs, queueSize } = options;
    if (queuePairs > config.maxQueuePairs) {
      throw new VirtioError('QUEUE_PAIRS', `the device has ${config.maxQueuePairs} queue pairs, not ${queuePairs}`);
    }
    const mergeable = features.has(Feature.MRG_RXBUF);
    const stride = options.packetStride ?? (mergeable ? MIN_STRIDE : strideFor(this.mtu));
    const packets = options.packets ?? 4 * queuePairs * 2 * queueSize;
    this.interrupts = new NicInterrupts(fn, queuePairs, options.interrupts);
    try {
      const { configVector } = this.interrupts;
      if (configVector !== NO_VECTOR) mapConfigVector(transport, configVector);
      this.pool = new PacketPool(this.#allocate(packets * stride), { stride, headroom: HEADROOM });
      this.pairs = Array.from({ length: queuePairs }, (_, i) => this.#pair(i, transport, features, sas, options));
      this.#control = features.has(Feature.CTRL_VQ)
        ? new ControlQueue(fn, transport, features, 2 * config.maxQueuePairs, options.commandTimeout)
        : null;
      this.control = this.#control === null ? null : new NetControl(this.#control, features, config, queuePairs);
      for (const { rx } of this.pairs) rx.refill(false);
    } catch (error) {
      this.interrupts.close();
      for (const memory of this.#memories) releaseDma(fn, memory);
      throw error;
    }
  }

  #allocate(size: number): DmaMemory {
    const memory = this.#fn.allocateDma(size);
    this.#memories.push(memory);
    return memory;
  }

  #pair(index: number, transport: VirtioTransport, features: FeatureSet, sas: SaTable, options: OpenOptions): RingPair {
    const { pool } = this;
    const layout = netHeaderLayout(features, options.wire);
    const receive = this.#ring(2 * index, transport, features, options.queueSize, layout.length);
    const transmit = this.#ring(2 * index + 1, transport, features, options.queueSize, layout.length);
    const receiving = {
      guestChecksum: features.has(Feature.GUEST_CSUM),
      mergeable: features.has(Feature.MRG_RXBUF),
      gsoTypes: receivedGsoTypes(features),
    };
    const transmitting = {
      checksum: features.has(Feature.CSUM),
      gsoTypes: sentGsoTypes(features),
      maxLength: this.mtu + Ethernet.length,
    };
    const common = { pool, layout, sas };
    return {
      rx: createRxQueue({ ...common, ...receiving, queue: receive.queue, notifier: receive }),
      tx: new TxQueue({ ...common, ...transmitting, queue: transmit.queue, notifier: transmit }),
      rxRing: receive,
      txRing: transmit,
    };
  }

  #ring(index: number, transport: VirtioTransport, features: FeatureSet, wanted: number, headroom: number): NicRing {
    const max = transport.maxQueueSize(index);
    const options = {
      index,
      size: Math.min(wanted, max),
      ...ringOptions(features),
      iovaLow: this.pool.iovaLow,
      iovaHigh: this.pool.iovaHigh,
      headroom,
      // Only what is sent is ever a chain.
      indirectEntries: features.has(Feature.INDIRECT_DESC) && index % 2 === 1 ? MAX_CHAIN : 0,
    };
    if (max === 0) throw new VirtioError('QUEUE_SIZE', `the device has no queue ${index}`);
    const format = ringFormat(features);
    const queue = createVirtqueue(format, this.#allocate(virtqueueBytes(format, options)), options);
    const vector = index % 2 === 0 ? this.interrupts.receiveVector(index / 2) : NO_VECTOR;
    const ring = new NicRing(transport, queue, vector, (error) => this.onLost(asVipsecError(error)));
    if (ring.vector !== vector) this.interrupts.withdraw(index / 2);
    return ring;
  }

  /**
   * Resets the receive or the transmit queue of a pair, and enables it again, while all others run. Throws VirtioError `NO_RING_RESET`,
   * and what `NicRing.reset` throws.
   */
  async resetQueue(pair: number, which: 'rx' | 'tx'): Promise<void> {
    if (!this.#features.has(Feature.RING_RESET)) {
      throw new VirtioError('NO_RING_RESET', 'the device cannot reset a single queue');
    }
    const { rx, tx, rxRing, txRing } = this.pairs[pair];
    const [ring, queue] = which === 'rx' ? [rxRing, rx] : [txRing, tx];
    await ring.reset(() => queue.close(), this.#resetTimeout);
    if (which === 'rx') rx.refill();
  }

  /** Tells the device how many queue pairs to use, when that is not one. After DRIVER_OK. */
  async setQueuePairs(pairs: number): Promise<void> {
    if (pairs > 1 && this.#features.has(Feature.MQ)) await this.control?.setQueuePairs(pairs);
  }

  /** First notifications, after DRIVER_OK. */
  start(): void {
    for (const { rx } of this.pairs) rx.start();
  }

  /** Resolves when what the transmit rings hold now has been sent, or after a while. */
  async quiesceTransmit(): Promise<void> {
    const deadline = performance.now() + QUIESCE_MS;
    for (const { tx, txRing } of this.pairs) {
      const until = tx.counters[TxCounter.packets];
      for (;;) {
        if (tx.broken !== null) break;
        tx.reclaim();
        const out = txRing.queue.size - txRing.queue.free;
        if (tx.counters[TxCounter.packets] - out >= until || performance.now() >= deadline) break;
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    }
  }

  /** From now on bursts give 0 and touch no shared memory. */
  fail(reason: VipsecError): void {
    const error = reason instanceof VirtioError ? reason : new VirtioError(reason.code, reason.message);
    for (const { rxRing, txRing } of this.pairs) {
      rxRing.queue.fail(error);
      txRing.queue.fail(error);
    }
    this.#control?.close(error);
  }

  /** Wipes and frees everything. Only after the device was reset, or is gone. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.fail(new VirtioError('NIC_CLOSED', `${this.#fn.address} was closed`));
    this.#control?.release();
    this.interrupts.close();
    // Packets may hold what should have been protected.
    this.pool.u8.fill(0);
    for (const memory of this.#memories) releaseDma(this.#fn, memory);
  }
}

/** A device that cannot map it (4.1.5.1.2.1) tells of no changes. */
function mapConfigVector(transport: VirtioTransport, vector: number): void {
  try {
    transport.setConfigVector(vector);
  } catch (error) {
    if (!(error instanceof VirtioError && error.code === 'MSIX_VECTOR')) throw error;
  }
}

/** Slots that hold the longest packet with all that IPsec adds. */
function strideFor(mtu: number): number {
  const bytes = HEADROOM + Ethernet.length + mtu + TAILROOM;
  return Math.max(MIN_STRIDE, Math.ceil(bytes / SLOT_ALIGNMENT) * SLOT_ALIGNMENT);
}

function asVipsecError(error: unknown): VipsecError {
  if (error instanceof VirtioError) return error;
  const message = error instanceof Error ? error.message : String(error);
  const code = error instanceof Error && 'code' in error ? String(error.code) : 'DEVICE_GONE';
  return new VirtioError(code, message);
}
