/**
 * All queue pairs of a NIC that are for worker threads, and which thread has which SA.
 */
import { IpsecError, type VipsecError } from '../errors.ts';
import type { EngineName } from '../fallback/engines/engine.ts';
import { countsBuffer, sharedCounts } from '../ipsec/sa-state.ts';
import type { SaThread, SaThreads, ThreadListener } from '../ipsec/sa-thread.ts';
import type { NicArenas } from '../nic/arenas.ts';
import type { NicRings } from '../nic/rings.ts';
import { WorkerQueue } from './worker-queue.ts';

export interface WorkerQueuesOptions {
  readonly rings: NicRings;
  readonly arenas: NicArenas;
  readonly address: string;
  readonly mac: Uint8Array;
  readonly handles: number;
  /** Object ids of inbound SAs of the device are below this. */
  readonly inboundLimit: number;
  readonly engine: 'auto' | EngineName | null;
  readonly commandTimeout: number;
  /** A thread has found its ring broken. */
  readonly onBroken: (error: VipsecError) => void;
}

export class WorkerQueues implements SaThreads {
  readonly list: readonly WorkerQueue[];
  readonly owners: Uint16Array;
  /** Queue pairs of the control thread, which come first. */
  readonly #own: number;
  #listener: ThreadListener | null = null;
  #closing = false;

  constructor(options: WorkerQueuesOptions) {
    const { rings, handles, inboundLimit, engine } = options;
    this.#own = rings.pairs.length;
    const owners = new SharedArrayBuffer(2 * (handles + 1));
    this.owners = new Uint16Array(owners);
    this.list = rings.workerPairs.map((pair) => {
      const counts = countsBuffer(handles);
      return new WorkerQueue({
        rings,
        arenas: options.arenas,
        pair,
        address: options.address,
        mac: options.mac,
        sas: { handles, inboundLimit, owners, counts, engine },
        counts: sharedCounts(handles, counts),
        commandTimeout: options.commandTimeout,
        onBroken: options.onBroken,
        onEvent: (handle, event, args) => this.#listener?.threadEvent(handle, event, args),
        onOpened: (queue) => this.#listener?.threadOpened(queue),
        onReset: (queue) => this.#listener?.threadReset(queue),
        onEnded: (queue, sequences, isSent) => this.#ended(queue, sequences, isSent),
      });
    });
  }

  set listener(listener: ThreadListener) {
    this.#listener = listener;
  }

  owner(queue: number | undefined): SaThread | null {
    const index = queue ?? 0;
    if (!Number.isInteger(index) || index < 0 || index >= this.#own + this.list.length) {
      throw new IpsecError('SA_QUEUE', `there is no queue pair ${index}`, { path: 'queue' });
    }
    if (index < this.#own) return null;
    const thread = this.list[index - this.#own];
    if (thread.state === 'open') return thread;
    throw new IpsecError('SA_QUEUE', `no thread has queue pair ${index} open`, {
      path: 'queue',
      hint: 'Hand the queue pair to a worker first, and wait until it has opened it.',
    });
  }

  open(): readonly WorkerQueue[] {
    return this.list.filter((queue) => queue.state === 'open');
  }

  /** The device is lost. */
  stop(reason: VipsecError): void {
    for (const queue of this.list) queue.stop(reason);
  }

  /** The NIC ends: resolves when all threads have let go, or after `ms` milliseconds. */
  async release(reason: VipsecError, ms: number): Promise<void> {
    this.#closing = true;
    await Promise.all(this.list.map((queue) => queue.release(reason, ms)));
  }

  async #ended(queue: WorkerQueue, sequences: ReadonlyMap<number, bigint>, isSent: boolean): Promise<void> {
    // It never rejects.
    await this.#listener?.threadEnded(queue, sequences, this.#closing, isSent);
  }
}
