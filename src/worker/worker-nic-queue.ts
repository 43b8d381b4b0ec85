/**
 * A queue pair in the worker thread that has opened it: bursts, packets and SAs of its own, nothing of which another thread touches. Once
 * per burst it looks whether the control thread wants something: a load and a comparison.
 */
import type { MessagePort } from 'node:worker_threads';
import { receiveMessageOnPort } from 'node:worker_threads';
import { VipsecError, VirtioError } from '../errors.ts';
import type { NicQueueOptions } from '../nic/data-path.ts';
import { NicRxQueue, type NicRxQueueOptions, type RxRing } from '../nic/rx-queue.ts';
import { NicTxQueue, type TxRing } from '../nic/tx-queue.ts';
import type { PacketPool } from '../packet/pool.ts';
import type { PacketArena } from '../packet/references.ts';
import { dropLedger, type MappingLedger } from '../sys/mapping-ledger.ts';
import { type MappedMemory, unmapMemory } from '../sys/memory.ts';
import type { RxQueue } from '../virtio-net/rx.ts';
import type { TxQueue } from '../virtio-net/tx.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';
import type { ArenaHandle } from './arena-loans.ts';
import { ATTENTION, type ControlBlock, Owner, Wish } from './control-block.ts';
import { type Answer, type Command, type CommandMessage, takeTicket, type WorkerMessage } from './messages.ts';
import type { WorkerArenas } from './worker-arenas.ts';
import type { WorkerIpsec } from './worker-ipsec.ts';
import type { WorkerSleeper } from './worker-sleeper.ts';

/** What `openQueue` has put together. */
export interface WorkerParts {
  readonly index: number;
  readonly mac: Uint8Array;
  readonly mtu: number;
  readonly pool: PacketPool;
  readonly rings: { readonly rx: Virtqueue; readonly tx: Virtqueue };
  readonly queues: { readonly rx: RxQueue; readonly tx: TxQueue };
  readonly control: ControlBlock;
  readonly ipsec: WorkerIpsec;
  readonly arenas: WorkerArenas;
  readonly sleeper: WorkerSleeper;
  readonly port: MessagePort;
  readonly mappings: readonly MappedMemory[];
  readonly ledger: MappingLedger;
}

export class WorkerNicQueue implements Disposable {
  /** Index of the queue pair. */
  readonly index: number;
  /** The packets of this queue pair; a packet of another pool means nothing here. */
  readonly packets: PacketPool;
  readonly mac: Uint8Array;
  /** Bytes of the longest IP packet. */
  readonly mtu: number;
  readonly rx: NicRxQueue;
  readonly tx: NicTxQueue;
  readonly #parts: WorkerParts;
  readonly #attendant: Attendant;
  #end: VirtioError | null = null;
  #stopped = false;
  #toldBroken = false;

  /** Not to be called: use `openQueue`. */
  constructor(parts: WorkerParts) {
    this.#parts = parts;
    const { index, pool, queues, ipsec, control, sleeper, port } = parts;
    this.index = index;
    this.packets = pool;
    this.mac = parts.mac;
    this.mtu = parts.mtu;
    this.#attendant = { words: control.words, seen: control.attention - 1, attend: () => this.#attend() };
    const onBroken = () => this.#tellBroken();
    const { rx, tx } = control.counters;
    this.rx = new WorkerRxQueue(index, queues.rx, pool, ipsec, this.#attendant, {
      onBroken,
      dropped: rx.dropped,
      sleeper,
    });
    this.tx = new WorkerTxQueue(queues.tx, pool, ipsec, this.#attendant, { onBroken, dropped: tx.dropped });
    port.on('message', (message: CommandMessage) => {
      this.#execute(message);
      this.#attend();
    });
    port.on('close', () => this.#release(new VirtioError('NIC_CLOSED', 'the thread that opened the NIC has ended')));
  }

  /** Why the queue carries nothing any more, or null. */
  get broken(): VirtioError | null {
    if (this.#parts.control.attention !== this.#attendant.seen) this.#attend();
    // Whoever reads it here may never try another burst.
    this.#tellBroken();
    return this.#end ?? this.rx.broken ?? this.tx.broken;
  }

  /**
   * Gives the queue back: ends its SAs and wipes their keys, unmaps its memory. Packets of the pool are gone. Idempotent. The NIC can
   * hand the queue over again if the device can reset a single queue.
   */
  close(): void {
    this.#release(new VirtioError('QUEUE_CLOSED', `queue pair ${this.index} was given back`));
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /**
   * Opens memory that `WorkerQueue.lendMemory` has lent to this queue pair: `packets.refer` puts pieces of it into chains that are sent, without a
   * copy. A handle is opened once. Throws VirtioError `NO_ARENA` when it was lent to another or opened before, `ARENA_LIMIT`; SystemError; why the queue has ended.
   */
  openMemory(handle: ArenaHandle): PacketArena {
    return this.#parts.arenas.open(handle);
  }

  /**
   * As `Nic.registerMemory`, by way of the control thread; `fd` is to stay open until then. Resolves when this thread comes to its event loop. Rejects with
   * VirtioError, whose `code` is that of `Nic.registerMemory`, and why the queue has ended.
   */
  registerMemory(fd: number, offset: number, size: number): Promise<PacketArena> {
    return this.#parts.arenas.register(fd, offset, size);
  }

  /**
   * Gives memory back that was lent, and has such unregistered that was registered here: its views read zeros from now on. Throws VirtioError
   * `ARENA_BUSY` while pieces of it are in packets. Idempotent.
   */
  unregisterMemory(arena: PacketArena): void {
    this.#parts.arenas.close(arena);
  }

  /** Carries out what the control thread wants; between two bursts. */
  #attend(): void {
    const { control, port } = this.#parts;
    this.#attendant.seen = control.attention;
    if (this.#end !== null) return;
    for (let next = receiveMessageOnPort(port); next !== undefined; next = receiveMessageOnPort(port)) {
      this.#execute(next.message);
      if (this.#end !== null) return;
    }
    const { wish, reason } = control;
    if (wish === Wish.run || reason === null) return;
    const error = new VirtioError(reason.code, reason.message);
    if (wish === Wish.close) this.#release(error);
    else this.#stop(error);
  }

  #execute({ id, ticket, command }: CommandMessage): void {
    if (this.#end !== null || command.name === 'look' || !takeTicket(ticket)) return;
    try {
      this.#send({ type: 'answer', id, value: this.#carryOut(command) });
    } catch (error) {
      const code = error instanceof VipsecError ? error.code : 'QUEUE_COMMAND';
      this.#send({ type: 'failure', id, code, message: error instanceof Error ? error.message : String(error) });
    }
  }

  #carryOut(command: Exclude<Command, { name: 'look' }>): Answer {
    const { ipsec, arenas, queues, rings } = this.#parts;
    switch (command.name) {
      case 'add':
        ipsec.add(command.entry);
        return null;
      case 'modify':
        return ipsec.modify(command.entry, command.rekeyed);
      case 'remove':
        return ipsec.remove(command.handle);
      case 'take':
        return ipsec.take(command.handle);
      case 'granted':
        arenas.granted(command.request, command.result);
        return null;
      case 'unsent':
        queues.tx.reclaim();
        return rings.tx.broken === null ? rings.tx.size - rings.tx.free : 0;
    }
  }

  /** The device is lost: nothing is sent or received any more, no key is kept. */
  #stop(reason: VirtioError): void {
    if (this.#stopped) return;
    this.#stopped = true;
    const { rings, ipsec, sleeper } = this.#parts;
    rings.rx.fail(reason);
    rings.tx.fail(reason);
    ipsec.close();
    sleeper.wake();
  }

  #release(reason: VirtioError): void {
    if (this.#end !== null) return;
    this.#end = reason;
    const { rings, queues, ipsec, arenas, sleeper, control, port, mappings, ledger } = this.#parts;
    queues.tx.reclaim();
    const kept = arenas.end(reason);
    const isSent = rings.tx.broken === null && rings.tx.free === rings.tx.size;
    rings.rx.fail(reason);
    rings.tx.fail(reason);
    // What is known of sequence numbers after a stop is known no more: all of them count as used.
    const sequences = this.#stopped ? new Map<number, bigint>() : ipsec.close();
    this.#stopped = true;
    sleeper.wake();
    // The device may still send what is in the ring: the NIC wipes the packets when it has been reset.
    for (const memory of mappings) unmapMemory(memory);
    dropLedger(ledger);
    control.pass(Owner.worker, Owner.none);
    this.#send({ type: 'released', sequences, arenas: kept, isSent });
    port.close();
  }

  #tellBroken(): void {
    const error = this.rx.broken ?? this.tx.broken;
    if (error === null || this.#toldBroken || this.#stopped) return;
    this.#toldBroken = true;
    this.#send({ type: 'broken', code: error.code, message: error.message });
  }

  #send(message: WorkerMessage): void {
    this.#parts.port.postMessage(message);
  }
}

/** Looks after the control thread's wishes. */
interface Attendant {
  readonly words: Int32Array;
  /** Value of the word `ATTENTION` when it last looked. */
  seen: number;
  attend(): void;
}

class WorkerRxQueue extends NicRxQueue {
  readonly #attendant: Attendant;
  readonly #ipsec: WorkerIpsec;

  constructor(
    index: number,
    ring: RxRing,
    pool: PacketPool,
    ipsec: WorkerIpsec,
    attendant: Attendant,
    options: NicRxQueueOptions,
  ) {
    super(index, ring, pool, ipsec, options);
    this.#attendant = attendant;
    this.#ipsec = ipsec;
  }

  override burst(out: Uint32Array, max: number): number {
    // hot:
    const attendant = this.#attendant;
    if (attendant.words[ATTENTION] !== attendant.seen) attendant.attend();
    const n = super.burst(out, max);
    const { software } = this.#ipsec;
    if (software?.stale === true) software.publish();
    return n;
  }
}

class WorkerTxQueue extends NicTxQueue {
  readonly #attendant: Attendant;

  constructor(ring: TxRing, pool: PacketPool, ipsec: WorkerIpsec, attendant: Attendant, options: NicQueueOptions) {
    super(ring, pool, ipsec, options);
    this.#attendant = attendant;
  }

  override burst(packets: Uint32Array, n: number): number {
    // hot:
    const attendant = this.#attendant;
    if (attendant.words[ATTENTION] !== attendant.seen) attendant.attend();
    return super.burst(packets, n);
  }
}
