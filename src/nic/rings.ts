/**
 * The memory and the rings of a NIC: the packet pool, a receive and a transmit ring for each queue pair, and the control queue that
 * says how many pairs are in use (Virtio 1.4, 5.1.2, 5.1.5, 5.1.9.5.6). All rings have one format, split or packed.
 */
import { InputError, type VipsecError, VirtioError } from '../errors.ts';
import { Ethernet } from '../packet/fields.ts';
import { MAX_POOL_BYTES, PacketPool } from '../packet/pool.ts';
import type { DmaMemory } from '../sys/memory.ts';
import { type DeviceFunction, releaseDma, type SharedDma } from '../vfio/function.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { NO_VECTOR } from '../virtio/pci-layout.ts';
import { ringFormat } from '../virtio/ring-format.ts';
import type { VirtioTransport } from '../virtio/transport.ts';
import type { NetConfig } from '../virtio-net/config.ts';
import { ControlQueue } from '../virtio-net/control.ts';
import { NetControl } from '../virtio-net/net-control.ts';
import type { RxQueue } from '../virtio-net/rx.ts';
import type { SaTable } from '../virtio-net/sa-table.ts';
import { TxCounter, type TxQueue } from '../virtio-net/tx.ts';
import { createVirtqueue, virtqueueBytes } from '../virtqueue/create.ts';
import type { VirtqueueOptions } from '../virtqueue/virtqueue.ts';
import { CauseInterrupts } from './causes.ts';
import { NicInterrupts } from './interrupts.ts';
import { makeQueues, type PairSettings, virtqueueOptions } from './pair.ts';
import { takeAll } from './release.ts';
import { NicRing } from './ring.ts';
import type { OpenOptions } from './wire.ts';

/** Bytes in front of a packet: its header, and what IPsec puts in front of it. */
const HEADROOM = 128;
/** Bytes behind the longest packet: ESP padding and trailer, ICV, and what AH and ESN need for a moment. */
const TAILROOM = 128;
const SLOT_ALIGNMENT = 64;
const MIN_STRIDE = 2112;

/** How long the packets of an SA that is removed may take to leave the transmit rings. */
const QUIESCE_MS = 100;

interface RingPair {
  readonly rx: RxQueue;
  readonly tx: TxQueue;
  readonly rxRing: NicRing;
  readonly txRing: NicRing;
}

/** A ring that another thread drives; here it is only given to the device, and reset. */
export interface WorkerRing {
  readonly ring: NicRing;
  readonly options: VirtqueueOptions;
  readonly memory: DmaMemory;
  /** Where the ring stands, for a notification that is made here. */
  readonly position: { next: number };
}

/** A queue pair for another thread, with memory for its packets. */
export interface WorkerPair {
  readonly index: number;
  readonly rx: WorkerRing;
  readonly tx: WorkerRing;
  readonly pool: DmaMemory;
  readonly stride: number;
  readonly headroom: number;
  /** As in `PacketPoolOptions`. */
  readonly references: number;
}

/** Pieces of the application's memory that may be on their way at one time. */
const REFERENCES = 1024;

/** Packets of a NIC whose queue pairs are all for other threads: the control path has use for a few. */
const FEW_PACKETS = 64;

export class NicRings {
  readonly settings: PairSettings;
  readonly pool: PacketPool;
  /** The queue pairs of this thread, and after them those of others. */
  readonly pairs: readonly RingPair[];
  readonly workerPairs: readonly WorkerPair[];
  /** Whether the device tells of changes of its configuration. */
  readonly tellsOfChanges: boolean;
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
    this.settings = { features, wire: options.wire, mtu: this.mtu };
    const { queuePairs, workerQueues, queueSize } = options;
    const own = queuePairs - workerQueues;
    if (queuePairs > config.maxQueuePairs) {
      throw new VirtioError('QUEUE_PAIRS', `the device has ${config.maxQueuePairs} queue pairs, not ${queuePairs}`);
    }
    const mergeable = features.has(Feature.MRG_RXBUF);
    // Software IPsec works on packets in one slot, so that a packet as the link carries it has to fit.
    const isSpread = mergeable && options.ipsec === 'off';
    const stride = options.packetStride ?? (isSpread ? MIN_STRIDE : strideFor(this.mtu));
    const share = Math.floor((options.packets ?? 4 * queuePairs * 2 * queueSize) / queuePairs);
    const { causes } = transport;
    this.interrupts =
      causes === undefined
        ? new NicInterrupts(fn, queuePairs, options.interrupts, workerQueues)
        : new CauseInterrupts(fn, transport, causes, options.interrupts);
    try {
      const { configVector } = this.interrupts;
      this.tellsOfChanges = configVector !== NO_VECTOR && mapConfigVector(transport, configVector);
      const packets = own === 0 ? FEW_PACKETS : own * share;
      const memory = this.#packetMemory(packets * stride, 2 * own * queueSize * stride, options);
      this.pool = new PacketPool(memory, { stride, headroom: HEADROOM, references: REFERENCES });
      this.pairs = Array.from({ length: own }, (_, i) => this.#pair(i, transport, sas, queueSize));
      this.workerPairs = Array.from({ length: workerQueues }, (_, i) =>
        this.#workerPair(own + i, transport, share * stride, stride, queueSize),
      );
      this.#control = features.has(Feature.CTRL_VQ)
        ? new ControlQueue(fn, transport, features, 2 * config.maxQueuePairs, options.commandTimeout)
        : null;
      this.control = this.#control === null ? null : new NetControl(this.#control, features, config, queuePairs);
      this.pool.keepForReceive(this.pairs.reduce((sum, { rxRing }) => sum + rxRing.queue.size, 0));
      for (const { rx } of this.pairs) {
        rx.refill(false);
        // Such a device asks only now, and never again.
        if (causes !== undefined && options.interrupts) rx.enableInterrupts();
      }
    } catch (error) {
      try {
        takeAll([() => this.interrupts.close(), ...this.#memories.map((memory) => () => releaseDma(fn, memory))]);
      } catch {
        // What led here is what is to be told.
      }
      throw error;
    }
  }

  /** Memory for packets: `size` bytes of ours, or what the application has brought, at least `least` bytes. */
  #packetMemory(size: number, least: number, { packetMemory: brought }: OpenOptions): DmaMemory {
    const bytes = brought?.size ?? size;
    if (bytes > MAX_POOL_BYTES || (brought !== undefined && bytes < least)) {
      throw new InputError('NIC_OPTION', `${bytes} bytes of packets: from ${least} to ${MAX_POOL_BYTES}`);
    }
    if (brought === undefined) return this.#allocate(size);
    const fn = this.#fn;
    if (fn.importDma === undefined) {
      throw new VirtioError('NO_ARENAS', `${fn.address} takes no memory of the application`);
    }
    const memory = fn.importDma(brought.fd, brought.offset, brought.size);
    this.#memories.push(memory);
    return memory;
  }

  #allocate(size: number): DmaMemory {
    const memory = this.#fn.allocateDma(size);
    this.#memories.push(memory);
    return memory;
  }

  #pair(index: number, transport: VirtioTransport, sas: SaTable, size: number): RingPair {
    const { pool } = this;
    const { ring: rxRing } = this.#ring(2 * index, transport, pool, size);
    const { ring: txRing } = this.#ring(2 * index + 1, transport, pool, size);
    const receive = { queue: rxRing.queue, notifier: rxRing };
    const transmit = { queue: txRing.queue, notifier: txRing };
    return { ...makeQueues(this.settings, pool, sas, receive, transmit), rxRing, txRing };
  }

  #workerPair(index: number, transport: VirtioTransport, bytes: number, stride: number, size: number): WorkerPair {
    const pool = this.#allocate(bytes);
    const ring = (which: 0 | 1) => this.#ring(2 * index + which, transport, pool, size, { next: 0 });
    return { index, rx: ring(0), tx: ring(1), pool, stride, headroom: HEADROOM, references: REFERENCES };
  }

  /** Makes virtqueue `index` for packets in `pool`. With `position` another thread drives it. */
  #ring(
    index: number,
    transport: VirtioTransport,
    pool: { readonly iovaLow: number; readonly iovaHigh: number },
    wanted: number,
    position?: { next: number },
  ): WorkerRing {
    const { features } = this.settings;
    const max = transport.maxQueueSize(index);
    if (max === 0) throw new VirtioError('QUEUE_SIZE', `the device has no queue ${index}`);
    const options = virtqueueOptions(this.settings, index, Math.min(wanted, max), pool);
    const format = ringFormat(features);
    const memory = this.#allocate(virtqueueBytes(format, options));
    const queue = createVirtqueue(format, memory, options);
    const vector = index % 2 === 0 ? this.interrupts.receiveVector(index / 2) : NO_VECTOR;
    const ring = new NicRing(transport, queue, vector, (error) => this.onLost(asVipsecError(error)), position);
    if (ring.vector !== vector) this.interrupts.withdraw(index / 2);
    return { ring, options, memory, position: position ?? { next: 0 } };
  }

  /** Where memory of a worker pair is in its file. Throws VirtioError `NO_SHARED_MEMORY`. */
  shareMemory(memory: DmaMemory): SharedDma {
    const shared = this.#fn.shareDma?.(memory);
    if (shared === undefined) throw new VirtioError('NO_SHARED_MEMORY', 'the memory of this device is for one thread');
    return shared;
  }

  /** Both rings of a worker pair as new, when nobody drives them any more. Throws as `resetQueue`. */
  async resetWorkerPair({ rx, tx }: WorkerPair): Promise<void> {
    this.#checkCanReset();
    for (const { ring } of [rx, tx]) {
      const none = new Uint32Array(ring.queue.size);
      await ring.reset(() => ring.queue.reclaimAll(none), this.#resetTimeout);
    }
  }

  #checkCanReset(): void {
    if (this.#features.has(Feature.RING_RESET)) return;
    throw new VirtioError('NO_RING_RESET', 'the device cannot reset a single queue');
  }

  /**
   * Resets the receive or the transmit queue of a pair, and enables it again, while all others run. Throws VirtioError `NO_RING_RESET`,
   * and what `NicRing.reset` throws.
   */
  async resetQueue(pair: number, which: 'rx' | 'tx'): Promise<void> {
    this.#checkCanReset();
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

  /** Resolves when what the transmit rings hold now has been sent; to false when it has not after a while. */
  async quiesceTransmit(): Promise<boolean> {
    const deadline = performance.now() + QUIESCE_MS;
    for (const { tx, txRing } of this.pairs) {
      const until = tx.counters[TxCounter.packets];
      for (;;) {
        if (tx.broken !== null) break;
        tx.reclaim();
        const out = txRing.queue.size - txRing.queue.free;
        if (tx.counters[TxCounter.packets] - out >= until) break;
        if (performance.now() >= deadline) return false;
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    }
    return true;
  }

  /** From now on bursts give 0 and touch no shared memory. */
  fail(reason: VipsecError): void {
    const error = reason instanceof VirtioError ? reason : new VirtioError(reason.code, reason.message);
    for (const { rxRing, txRing } of this.pairs) {
      rxRing.queue.fail(error);
      txRing.queue.fail(error);
    }
    for (const { rx, tx } of this.workerPairs) {
      rx.ring.queue.fail(error);
      tx.ring.queue.fail(error);
    }
    this.#control?.close(error);
  }

  /**
   * Wipes and frees everything. Only after the device was reset, or is gone. Idempotent. Throws what the device refuses first, but does all the
   * rest; memory that it does not let go of goes with the function.
   */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.fail(new VirtioError('NIC_CLOSED', `${this.#fn.address} was closed`));
    // Packets may hold what should have been protected.
    this.pool.u8.fill(0);
    for (const { pool } of this.workerPairs) pool.u8.fill(0);
    takeAll([
      () => this.#control?.release(),
      () => this.interrupts.close(),
      ...this.#memories.map((memory) => () => releaseDma(this.#fn, memory)),
    ]);
  }
}

/** A device that cannot map it (4.1.5.1.2.1) tells of no changes; nor does one that has no way to. Says whether this one does. */
function mapConfigVector(transport: VirtioTransport, vector: number): boolean {
  try {
    transport.setConfigVector(vector);
    return transport.announcesChanges !== false;
  } catch (error) {
    if (!(error instanceof VirtioError && error.code === 'MSIX_VECTOR')) throw error;
    return false;
  }
}

/**
 * Slots that hold the longest packet with all that IPsec adds: an odd number of cache lines, so that the headers of all packets do not
 * compete for the few places of a cache that have the same address bits.
 */
function strideFor(mtu: number): number {
  const lines = Math.ceil((HEADROOM + Ethernet.length + mtu + TAILROOM) / SLOT_ALIGNMENT);
  return Math.max(MIN_STRIDE, (lines | 1) * SLOT_ALIGNMENT);
}

function asVipsecError(error: unknown): VipsecError {
  if (error instanceof VirtioError) return error;
  const message = error instanceof Error ? error.message : String(error);
  const code = error instanceof Error && 'code' in error ? String(error.code) : 'DEVICE_GONE';
  return new VirtioError(code, message);
}
