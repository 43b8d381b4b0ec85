/**
 * Forwarding by queue pairs in threads of their own, as an application has them: each thread opens its pair with `openQueue`, receives bursts,
 * swaps the MAC addresses of each packet, and sends it. Rings and packets are in shared memory (a memfd), which every thread maps.
 *
 * What plays the device is the loop device of `loop-device.ts`, which copies each packet from the transmitted to the received buffer. It
 * is in a thread of its own (`separate`), or in the driver's, after each burst (`together`), where the cores do not suffice for both.
 */
import { MessageChannel, Worker } from 'node:worker_threads';
import { countsBuffer } from '../src/ipsec/sa-state.ts';
import { layoutOf, virtqueueOptions } from '../src/nic/pair.ts';
import { EventFd } from '../src/sys/eventfd.ts';
import { close, ftruncate, memfdCreate } from '../src/sys/libc.ts';
import { MappingLedger } from '../src/sys/mapping-ledger.ts';
import { Feature, FeatureSet } from '../src/virtio/features.ts';
import { TxCounter } from '../src/virtio-net/tx.ts';
import { virtqueueBytes } from '../src/virtqueue/create.ts';
import { ControlBlock } from '../src/worker/control-block.ts';
import type { QueueHandle, RingHandle } from '../src/worker/handle.ts';
import type { ThreadData, ThreadRole } from './forward-thread.ts';

const RING = 256;
const PACKETS = 1024;
const STRIDE = 2048;
const HEADROOM = 128;
const PAGE = 4096;
const HANDLES = 64;
/** Addresses of the device: any. */
const IOVA = 0x1000_0000;

/** Indices of words that all threads share. */
export const Shared = { stop: 0, active: 1, ready: 2 } as const;

export interface ForwardingOptions {
  readonly pairs: number;
  readonly device: 'separate' | 'together';
  /** What the driver threads do; default forward. */
  readonly role?: Extract<ThreadRole, 'forward' | 'wake'>;
}

interface Pair {
  readonly control: ControlBlock;
  readonly threads: readonly Worker[];
  readonly descriptors: readonly number[];
}

export class Forwarding {
  readonly words = new Int32Array(new SharedArrayBuffer(64));
  /** What `wake` has measured, in microseconds; `words[Shared.active]` counts. */
  readonly times = new Float64Array(new SharedArrayBuffer(8 * 1024));
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
    for (const { descriptors } of this.#pairs) for (const fd of descriptors) close(fd);
  }

  #pair(index: number, { device, role = 'forward' }: ForwardingOptions): Pair {
    const settings = {
      features: FeatureSet.of(Feature.VERSION_1, Feature.IPSEC),
      wire: 'virtio-1.4',
      mtu: 1500,
    } as const;
    const pool = { offset: 0, size: PACKETS * STRIDE, iova: IOVA };
    const memory = memfdCreate('vipsec-bench');
    const interrupt = EventFd.create();
    const kick = EventFd.create();
    let offset = pool.size;
    const ring = (which: 0 | 1): RingHandle => {
      const options = virtqueueOptions(settings, 2 * index + which, RING, { iovaLow: IOVA, iovaHigh: 0 });
      const size = Math.ceil(virtqueueBytes('split', options) / PAGE) * PAGE;
      const at = { fd: memory, offset, size, iova: IOVA + offset };
      offset += size;
      return { options, memory: at, doorbell: { relay: kick.fd } };
    };
    const [rx, tx] = [ring(0), ring(1)];
    ftruncate(memory, offset);
    const control = new ControlBlock();
    const { port1, port2 } = new MessageChannel();
    port1.unref();
    const handle: QueueHandle = {
      index,
      address: 'bench',
      features: [...settings.features.words],
      wire: settings.wire,
      mtu: settings.mtu,
      mac: new Uint8Array(6),
      rx,
      tx,
      pool: { memory: { fd: memory, ...pool }, stride: STRIDE, headroom: HEADROOM },
      interrupt: interrupt.fd,
      control: control.buffer,
      ledger: new MappingLedger().buffer,
      sas: {
        handles: HANDLES,
        inboundLimit: HANDLES,
        owners: new SharedArrayBuffer(2 * (HANDLES + 1)),
        counts: countsBuffer(HANDLES),
        engine: null,
      },
      port: port2,
    };
    const header = layoutOf(settings).length;
    const { port: _port, ...rings } = handle;
    const start = (one: ThreadRole, given: QueueHandle | null) => {
      const workerData: ThreadData = {
        role: one,
        index,
        handle: given,
        rings,
        header,
        words: this.words,
        times: this.times,
      };
      const thread = new Worker(new URL('./forward-thread.js', import.meta.url), {
        workerData,
        transferList: given === null ? [] : [given.port],
      });
      thread.on('error', (error) => {
        this.#failure = error;
      });
      return thread;
    };
    const driver = start(device === 'together' ? 'both' : role, handle);
    const threads =
      device === 'together' ? [driver] : [driver, start(role === 'wake' ? 'sleepy-device' : 'device', null)];
    return { control, threads, descriptors: [memory, interrupt.fd, kick.fd] };
  }
}
