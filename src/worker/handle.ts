/**
 * A queue pair on its way to another thread: what `WorkerQueue.transfer` makes and `openQueue` takes. It is plain data and a port; to
 * be posted as `worker.postMessage(handle, [handle.port])`, or in `workerData`, and opened once, in the same process.
 *
 * Descriptors belong to the NIC, which closes them when the queue has come back. The thread that opens the queue maps memory by itself, so
 * that its mappings live as long as it needs them, whatever the NIC does meanwhile.
 */
import type { MessagePort } from 'node:worker_threads';
import type { EngineName } from '../fallback/engines/engine.ts';
import type { SharedDma } from '../vfio/function.ts';
import type { WireRevision } from '../virtio/revision.ts';
import type { Doorbell } from '../virtio/transport.ts';
import type { VirtqueueOptions } from '../virtqueue/virtqueue.ts';

/** How the owner of a ring tells the device of new buffers. */
export type WorkerDoorbell =
  | Doorbell
  /** By telling the control thread, which then tells the device. */
  | { readonly relay: number };

export interface RingHandle {
  readonly options: VirtqueueOptions;
  readonly memory: SharedDma;
  readonly doorbell: WorkerDoorbell;
}

/** What a thread must know of SAs before there are any. */
export interface SaHandling {
  /** Handles are 1 to this. */
  readonly handles: number;
  /** Object ids of inbound SAs of the device are below this. */
  readonly inboundLimit: number;
  /** By handle: which thread has the SA. */
  readonly owners: SharedArrayBuffer;
  /** What this thread counts. */
  readonly counts: SharedArrayBuffer;
  /** `null` when software IPsec is not wanted. */
  readonly engine: 'auto' | EngineName | null;
}

export interface QueueHandle {
  /** Index of the queue pair. */
  readonly index: number;
  /** Address of the device, for messages. */
  readonly address: string;
  /** Words of the negotiated features. */
  readonly features: readonly number[];
  readonly wire: WireRevision;
  readonly mtu: number;
  readonly mac: Uint8Array;
  readonly rx: RingHandle;
  readonly tx: RingHandle;
  readonly pool: {
    readonly memory: SharedDma;
    readonly stride: number;
    readonly headroom: number;
    readonly references?: number;
  };
  /** Eventfd of the receive queue's interrupt; null without. */
  readonly interrupt: number | null;
  readonly control: SharedArrayBuffer;
  /** Where the thread writes down what it maps: see `sys/mapping-ledger.ts`. */
  readonly ledger: SharedArrayBuffer;
  readonly sas: SaHandling;
  /** Commands, answers and events; to be transferred with the handle. */
  readonly port: MessagePort;
}
