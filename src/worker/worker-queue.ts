/**
 * A queue pair for worker threads, as the thread that opened the NIC sees it: it hands the pair over, has commands carried out by whoever has
 * it, and takes it back when that thread lets go or ends.
 *
 * ```
 *   free ── transfer() ──▶ offered ── openQueue() ──▶ open ── close(), end of the thread, end of the NIC ──▶ free
 * ```
 *
 * A pair that was open before is reset on the device before it is handed over again (RING_RESET).
 */
import { IpsecError, type VipsecError, VirtioError } from '../errors.ts';
import type { SaEvents } from '../ipsec/ipsec.ts';
import type { SaCounts } from '../ipsec/sa-state.ts';
import type { SaEntry, SaProgress, SaThread } from '../ipsec/sa-thread.ts';
import type { NicArenas } from '../nic/arenas.ts';
import type { NicRings, WorkerPair, WorkerRing } from '../nic/rings.ts';
import type { PacketArena } from '../packet/references.ts';
import { EventFd } from '../sys/eventfd.ts';
import { ffi } from '../sys/ffi/ffi.ts';
import { abandonMapping } from '../sys/memory.ts';
import { type ArenaHandle, ArenaLoans, refusalOf } from './arena-loans.ts';
import { ControlBlock, Owner, type PairCounters, Wish } from './control-block.ts';
import type { QueueHandle, RingHandle, SaHandling } from './handle.ts';
import { type Answer, type Command, type Granted, makeTicket, takeTicket, type WorkerMessage } from './messages.ts';
import { packSa, wipeParcel } from './sa-parcel.ts';
import { duplicate, endTenancy, makeTenancy, settle, type Tenancy } from './tenancy.ts';

export type WorkerQueueState = 'free' | 'offered' | 'open';

/** How a queue came back: its thread let go, or ended without a word. */
export type QueueEnd = 'released' | 'died';

/** How long what was sent may take to leave a ring whose SA is removed or taken away. */
const UNSENT_MS = 100;
const UNSENT_STEP_MS = 2;

export interface WorkerQueueParts {
  readonly rings: NicRings;
  readonly arenas: NicArenas;
  readonly pair: WorkerPair;
  readonly address: string;
  readonly mac: Uint8Array;
  readonly sas: SaHandling;
  readonly counts: SaCounts;
  /** Milliseconds for a command. */
  readonly commandTimeout: number;
  readonly onBroken: (error: VipsecError) => void;
  readonly onEvent: (handle: number, event: keyof SaEvents, args: SaEvents[keyof SaEvents]) => void;
  readonly onOpened: (queue: WorkerQueue) => void;
  /** The rings are as new. */
  readonly onReset: (queue: WorkerQueue) => void;
  /** Resolves when nothing of the thread that has ended is under way any more; never rejects. */
  readonly onEnded: (queue: WorkerQueue, sequences: ReadonlyMap<number, bigint>, isSent: boolean) => Promise<void>;
}

type Released = Extract<WorkerMessage, { readonly type: 'released' }>;

export class WorkerQueue implements SaThread {
  /** Index of the queue pair. */
  readonly index: number;
  readonly counts: SaCounts;
  readonly #parts: WorkerQueueParts;
  readonly #loans: ArenaLoans;
  #state: WorkerQueueState = 'free';
  #tenancy: Tenancy | null = null;
  /** The rings are not as new. */
  #used = false;
  /** They are being made as new. */
  #renewal: Promise<void> | null = null;
  #nextId = 1;
  /** Why the NIC is over. */
  #over: VipsecError | null = null;
  /** What was counted by threads that have ended. */
  readonly #past = new ControlBlock().counters;
  readonly #listeners = new Set<(end: QueueEnd) => void>();

  /** Not to be called: `nic.workerQueues` has them. */
  constructor(parts: WorkerQueueParts) {
    this.#parts = parts;
    this.index = parts.pair.index;
    this.counts = parts.counts;
    this.#loans = new ArenaLoans(parts.arenas);
  }

  get state(): WorkerQueueState {
    return this.#state;
  }

  /**
   * Makes the handle to post to a worker thread of this process, which opens it with `openQueue`: `worker.postMessage(handle,
   * [handle.port])`. Until then the device drops what it would deliver to the queue. Throws VirtioError `QUEUE_TAKEN` when somebody has the queue or
   * a handle of it, `NO_RING_RESET` when it was used before and the device cannot reset one queue, `NO_SHARED_MEMORY`; why the NIC is broken.
   */
  async transfer(): Promise<QueueHandle> {
    if (this.#over !== null) throw this.#over;
    if (this.#state !== 'free') {
      throw new VirtioError('QUEUE_TAKEN', `queue pair ${this.index} is ${this.#state} already`);
    }
    this.#state = 'offered';
    try {
      if (this.#used) await this.#renew();
      if (this.#over !== null) throw this.#over;
      this.#used = true;
      return this.#offer();
    } catch (error) {
      this.#state = 'free';
      throw error;
    }
  }

  /** Resets both rings, which nobody drives any more; what is asked for meanwhile is the same reset. */
  #renew(): Promise<void> {
    const { rings, pair, onReset } = this.#parts;
    const run = async () => {
      await rings.resetWorkerPair(pair);
      this.#used = false;
      this.#loans.reset();
      onReset(this);
    };
    this.#renewal ??= run().finally(() => {
      this.#renewal = null;
    });
    return this.#renewal;
  }

  /** Memory of the application that a thread had when it ended is not to wait for the next one; without RING_RESET it has to. */
  async #freeLoans(): Promise<void> {
    if (this.#state !== 'free' || this.#over !== null || !this.#loans.areStuck) return;
    await this.#renew().catch(() => {});
  }

  /**
   * Lends memory that was registered with the NIC to the thread that has the queue, or is about to open it: to be posted to it, which opens it with
   * `openMemory`. The NIC has it, too; who writes where is for the application to see to. It cannot be unregistered until the thread has given it back, or
   * has ended with nothing of it in its ring; else until the device has reset the pair, which it is asked to then, or when the pair is handed over again. Throws VirtioError `NO_ARENA`, `QUEUE_GONE`.
   */
  lendMemory(arena: PacketArena): ArenaHandle {
    if (this.#tenancy === null) throw gone(this.index);
    return this.#loans.lend(this.#tenancy.control.tenancy, arena);
  }

  /** Calls `listener` each time that the queue comes back. Returns how to stop. */
  onEnd(listener: (end: QueueEnd) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** What the queue has counted, in parts to be summed up; the last part goes on counting. */
  get counters(): readonly PairCounters[] {
    return this.#tenancy === null ? [this.#past] : [this.#past, this.#tenancy.control.counters];
  }

  async add(entry: SaEntry): Promise<void> {
    await this.#withParcel(entry, (packed) => this.#command({ name: 'add', entry: packed }));
  }

  async modify(entry: SaEntry, rekeyed: boolean): Promise<bigint | null> {
    const answer = await this.#withParcel(entry, (packed) => this.#command({ name: 'modify', entry: packed, rekeyed }));
    return typeof answer === 'bigint' ? answer : null;
  }

  async remove(handle: number): Promise<bigint | null> {
    const answer = await this.#command({ name: 'remove', handle }, false);
    return typeof answer === 'bigint' ? answer : null;
  }

  async take(handle: number): Promise<SaProgress> {
    const answer = await this.#command({ name: 'take', handle });
    if (typeof answer === 'object' && answer !== null) return answer;
    throw new IpsecError('NO_SUCH_SA', `the thread does not have SA ${handle}`);
  }

  async sent(): Promise<boolean> {
    const deadline = performance.now() + UNSENT_MS;
    while ((await this.#command({ name: 'unsent' }).catch(() => null)) !== 0) {
      if (performance.now() >= deadline) return false;
      await new Promise((resolve) => setTimeout(resolve, UNSENT_STEP_MS));
    }
    return true;
  }

  /** The device is lost: the thread touches its rings no more. */
  stop(reason: VipsecError): void {
    this.#over ??= reason;
    this.#ask(Wish.stop, reason);
  }

  /** The NIC ends: resolves when the thread has let go of everything, or after `ms` milliseconds. */
  async release(reason: VipsecError, ms: number): Promise<void> {
    this.#over ??= reason;
    const tenancy = this.#tenancy;
    if (tenancy === null) return;
    if (tenancy.control.pass(Owner.offered, Owner.none)) {
      this.#end(tenancy, { sequences: new Map(), arenas: [], isSent: true });
      return;
    }
    const ended = new Promise<void>((resolve) => {
      const stop = this.onEnd(() => {
        stop();
        clearTimeout(timer);
        resolve();
      });
      const timer = setTimeout(resolve, ms);
    });
    this.#ask(Wish.close, reason);
    await ended;
  }

  #ask(wish: number, reason: VipsecError): void {
    const tenancy = this.#tenancy;
    if (tenancy === null) return;
    tenancy.control.ask(wish, reason);
    // Wakes a thread that waits; one that polls has seen the word.
    tenancy.port.postMessage({ id: 0, ticket: makeTicket(), command: { name: 'look' } });
  }

  #offer(): QueueHandle {
    const { rings, pair, address, mac, sas } = this.#parts;
    const { settings } = rings;
    const { tenancy, theirs } = makeTenancy();
    const { control, port } = tenancy;
    try {
      const interrupt = rings.interrupts.handOver(pair.index);
      const handle: QueueHandle = {
        index: pair.index,
        address,
        features: [...settings.features.words],
        wire: settings.wire,
        mtu: settings.mtu,
        mac,
        rx: this.#ring(tenancy, pair.rx, 'rx'),
        tx: this.#ring(tenancy, pair.tx, 'tx'),
        pool: {
          memory: this.#share(tenancy, pair.pool),
          stride: pair.stride,
          headroom: pair.headroom,
          references: pair.references,
        },
        interrupt: interrupt === null ? null : duplicate(tenancy, interrupt),
        control: control.buffer,
        ledger: tenancy.ledger.buffer,
        sas,
        port: theirs,
      };
      port.on('message', (message: WorkerMessage) => this.#receive(tenancy, message));
      port.on('close', () => this.#end(tenancy, null));
      port.unref();
      this.#tenancy = tenancy;
      return handle;
    } catch (error) {
      endTenancy(tenancy);
      throw error;
    }
  }

  #ring(tenancy: Tenancy, { ring, options, memory, position }: WorkerRing, which: 'rx' | 'tx'): RingHandle {
    const shared = this.#share(tenancy, memory);
    const doorbell = ring.share();
    if (doorbell !== null) {
      tenancy.descriptors.push(doorbell.register.fd);
      return { options, memory: shared, doorbell };
    }
    const eventfd = EventFd.create();
    const theirs = tenancy.control.position(which);
    const watch = ffi().watch(eventfd.fd, () => {
      if (eventfd.drain() === 0) return;
      position.next = theirs.next;
      ring.notify();
    });
    watch.unref();
    tenancy.relays.push({ eventfd, watch });
    return { options, memory: shared, doorbell: { relay: eventfd.fd } };
  }

  #share(tenancy: Tenancy, memory: WorkerPair['pool']): QueueHandle['pool']['memory'] {
    const shared = this.#parts.rings.shareMemory(memory);
    return { ...shared, fd: duplicate(tenancy, shared.fd) };
  }

  async #withParcel(entry: SaEntry, send: (packed: SaEntry) => Promise<Answer>): Promise<Answer> {
    const sa = packSa(entry.sa, entry.where === 'software');
    try {
      return await send({ ...entry, sa });
    } finally {
      // Nobody takes the keys out any more: the command was carried out, or its ticket was.
      wipeParcel(sa);
    }
  }

  /**
   * Has a command carried out. Throws VirtioError `QUEUE_GONE`; `QUEUE_TIMEOUT`, after which it never is, unless `withdraw` is false;
   * IpsecError with the code that the thread gave.
   */
  #command(command: Command, withdraw = true): Promise<Answer> {
    const tenancy = this.#tenancy;
    if (tenancy === null || this.#state !== 'open') return Promise.reject(gone(this.index));
    const id = this.#nextId++;
    const ticket = makeTicket();
    return new Promise<Answer>((resolve, reject) => {
      const late = () => {
        // A command that is being carried out is answered, or its thread dies.
        if (withdraw && !takeTicket(ticket)) return;
        settle(tenancy, id)?.reject(
          new VirtioError('QUEUE_TIMEOUT', `the thread with queue pair ${this.index} does not look at its queue`),
        );
      };
      const timer = setTimeout(late, this.#parts.commandTimeout);
      tenancy.pending.set(id, { resolve, reject, timer });
      tenancy.port.postMessage({ id, ticket, command });
      tenancy.control.callAttention();
    });
  }

  #receive(tenancy: Tenancy, message: WorkerMessage): void {
    if (this.#tenancy !== tenancy) return;
    const { onOpened, onBroken, onEvent } = this.#parts;
    switch (message.type) {
      case 'opened':
        this.#state = 'open';
        onOpened(this);
        return;
      case 'answer':
        settle(tenancy, message.id)?.resolve(message.value);
        return;
      case 'failure':
        settle(tenancy, message.id)?.reject(new IpsecError(message.code, message.message));
        return;
      case 'broken':
        onBroken(new VirtioError(message.code, message.message));
        return;
      case 'event':
        onEvent(message.handle, message.event, message.args);
        return;
      case 'register':
        this.#register(tenancy, message);
        return;
      case 'arena':
        this.#loans.giveBack(message.id);
        return;
      case 'released':
        this.#end(tenancy, message);
        return;
    }
  }

  /** Registers memory for the thread, and tells it. */
  #register(tenancy: Tenancy, { request, fd, offset, size }: Extract<WorkerMessage, { type: 'register' }>): void {
    let result: Granted;
    try {
      if (this.#over !== null) throw this.#over;
      result = this.#loans.register(tenancy.control.tenancy, fd, offset, size);
    } catch (error) {
      result = refusalOf(error);
    }
    this.#command({ name: 'granted', request, result }).catch(() => {
      // It was not taken, or cannot be mapped there.
      if ('id' in result) this.#loans.giveBack(result.id);
    });
  }

  /** The thread has let go, and says how far its SAs came and which arenas are in its ring; or it has died, and nobody knows. */
  #end(tenancy: Tenancy, last: Omit<Released, 'type'> | null): void {
    if (this.#tenancy !== tenancy) return;
    this.#tenancy = null;
    this.#state = 'free';
    tenancy.control.pass(Owner.offered, Owner.none);
    // Packets and crypto contexts, with the keys in them.
    if (last === null) for (const { address, size } of tenancy.ledger.entries) abandonMapping(address, size);
    for (const id of [...tenancy.pending.keys()]) settle(tenancy, id)?.reject(gone(this.index));
    addCounters(this.#past, tenancy.control.counters);
    endTenancy(tenancy);
    this.#loans.ended(last?.arenas ?? null);
    void this.#parts.onEnded(this, last?.sequences ?? new Map(), last?.isSent ?? false).then(() => this.#freeLoans());
    for (const listener of [...this.#listeners]) listener(last === null ? 'died' : 'released');
  }
}

function gone(index: number): VirtioError {
  return new VirtioError('QUEUE_GONE', `no thread has queue pair ${index} open`);
}

function addCounters(sum: PairCounters, more: PairCounters): void {
  for (const which of ['rx', 'tx'] as const) {
    for (const kind of ['counters', 'dropped'] as const) {
      more[which][kind].forEach((count, i) => {
        sum[which][kind][i] += count;
      });
    }
  }
}
