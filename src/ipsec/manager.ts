/**
 * The SAs of a NIC: validates them, places them, guards their nonces, numbers them, and has them changed, moved and removed where they are.
 *
 * Inline and software SAs live side by side behind `Ipsec`. When the device refuses an SA that it should take, the SA
 * goes to software, with that as the reason, unless inline is required. Nothing here is on the data path but the arrays of `SaState`.
 */
import { AdminCommandError, IpsecError, VipsecError } from '../errors.ts';
import { type InlineCapability, whyNotInline } from './capability.ts';
import type { InlineIpsec } from './inline.ts';
import type {
  AddSaOptions,
  Ipsec,
  KeyReservation,
  RedactedSaObject,
  SaHandle,
  SaNotification,
  SaTraffic,
} from './ipsec.ts';
import { saId } from './key-id.ts';
import { ManagedSa } from './managed-sa.ts';
import { type MoveOptions, type MoveParts, moveSa } from './move.ts';
import type { NonceClaim, NonceGuard } from './nonce-guard.ts';
import { Obstacles } from './obstacles.ts';
import { OwnSas, type SoftwareFactory, type SoftwareSide } from './own-sas.ts';
import { type Placement, place, type Where } from './placement.ts';
import { moveToQueue, type QueueMoveParts } from './queue-move.ts';
import { QueueSas } from './queue-sas.ts';
import type { SecurityAssociation } from './sa.ts';
import { eventOf } from './sa-facts.ts';
import { SaListeners } from './sa-listeners.ts';
import { SaRegistry } from './sa-registry.ts';
import { SaState } from './sa-state.ts';
import type { SaThread, SaThreads } from './sa-thread.ts';
import { wipeKeys } from './secret.ts';
import { ThreadSas } from './thread-sas.ts';
import { type SecurityAssociationInput, validateSa } from './validate.ts';

export interface IpsecManagerOptions {
  readonly inline: InlineIpsec | null;
  /** Why there is no inline IPsec, when there is none. */
  readonly inlineObstacle: string | null;
  /** Makes the software side, when the first SA needs it; null when it is not wanted. */
  readonly software: SoftwareFactory | null;
  readonly guard: NonceGuard;
  /** Bytes of the longest IP packet on the link. */
  readonly mtu: number;
  /** Handles are 1 to this. */
  readonly handles: number;
  /** What `addSa` does without `require`. */
  readonly require?: Where;
  /** Other threads that can have SAs. */
  readonly threads?: SaThreads;
}

/** Refusals of the device or its flow filter after which software is as good a place as before. */
function isRefusal(error: unknown): error is VipsecError {
  return error instanceof AdminCommandError || (error instanceof VipsecError && error.code.startsWith('FLOW_'));
}

export class IpsecManager implements Ipsec {
  readonly inline: InlineCapability | null;
  readonly inlineObstacle: string | null;
  readonly state: SaState;
  readonly device: InlineIpsec | null;
  /** What worker threads tell goes there. */
  readonly threads: ThreadSas;
  readonly #options: IpsecManagerOptions;
  readonly #registry: SaRegistry;
  readonly #listeners: SaListeners;
  readonly #own: OwnSas;
  readonly #queues: QueueSas;
  readonly #obstacles: Obstacles;
  #closed: VipsecError | null = null;

  constructor(options: IpsecManagerOptions) {
    this.#options = options;
    this.device = options.inline;
    this.inline = options.inline?.capability ?? null;
    this.inlineObstacle = options.inline === null ? (options.inlineObstacle ?? 'the device has no inline IPsec') : null;
    const registry = new SaRegistry(options.handles);
    const listeners = new SaListeners(registry);
    const { guard, mtu, software } = options;
    const state = new SaState(options.handles, (handle, event, ...args) => listeners.tell(handle, event, args));
    state.owners = options.threads?.owners ?? null;
    const queues = new QueueSas(options.threads ?? null, options.inline, guard, state);
    this.#registry = registry;
    this.#listeners = listeners;
    this.state = state;
    this.#queues = queues;
    this.#own = new OwnSas({
      device: options.inline,
      ...{ state, guard, mtu, software },
      onEvent: (handle, event) => listeners.tell(handle, ...eventOf(event)),
    });
    this.#obstacles = new Obstacles(this.inlineObstacle, options.inline, registry);
    this.threads = new ThreadSas({ registry, queues, listeners, state, device: options.inline });
  }

  /** The software side of this thread, once there is one. */
  get software(): SoftwareSide | null {
    return this.#own.software;
  }

  get(handle: number): SaHandle | undefined {
    return this.#registry.get(handle);
  }

  list(): SaHandle[] {
    return this.#registry.list();
  }

  async addSa(input: SecurityAssociationInput, options: AddSaOptions = {}): Promise<SaHandle> {
    if (this.#closed !== null) throw this.#closed;
    const sa = validateSa(input);
    try {
      return await this.#add(sa, options.require ?? this.#options.require, this.#queues.owner(options.queue));
    } finally {
      wipeKeys(sa);
    }
  }

  async #add(sa: SecurityAssociation, require: Where | undefined, thread: SaThread | null): Promise<SaHandle> {
    this.#obstacles.refuseDuplicate(sa);
    const inlineObstacle = this.#obstacles.inline(sa);
    const softwareObstacle = this.#own.obstacle;
    const placement = place({ sa, inlineObstacle, softwareObstacle, ...(require === undefined ? {} : { require }) });
    const handle = this.#registry.take();
    try {
      const fallback = softwareObstacle === null && require === undefined;
      return await this.#create(handle, sa, placement, fallback, thread);
    } catch (error) {
      this.#registry.give(handle);
      throw error;
    }
  }

  async #create(
    handle: number,
    sa: SecurityAssociation,
    placement: Placement,
    fallback: boolean,
    thread: SaThread | null,
  ): Promise<SaHandle> {
    if (placement.where === 'software') return this.#createSoftware(handle, sa, placement, thread);
    const device = this.#device();
    const claim = this.#options.guard.claim(sa, 'inline');
    // Inbound, the device counts: any queue may deliver.
    const owner = sa.direction === 'outbound' ? thread : null;
    try {
      // What an inbound SA receives counts as secured by it only when its selector is known here.
      await device.create(handle, sa, sa.direction === 'inbound', owner !== null);
    } catch (error) {
      if (!isRefusal(error)) {
        claim.release();
        throw error;
      }
      claim.cancel();
      if (!fallback || this.#closed !== null) throw error;
      const because = `the device refused it with ${error.code}`;
      return this.#createSoftware(handle, sa, { where: 'software', because }, thread);
    }
    if (owner !== null) {
      await this.#queues.addInline(owner, handle, sa, claim);
    } else {
      if (this.#closed !== null) {
        claim.release();
        throw this.#closed;
      }
      this.#own.enter(handle, sa, 'inline');
      if (sa.direction === 'inbound') {
        device.deliver(handle);
        this.#queues.addEverywhere(handle, sa);
      }
    }
    return this.#enter(handle, sa, placement, claim, owner);
  }

  async #createSoftware(
    handle: number,
    sa: SecurityAssociation,
    placement: Placement,
    thread: SaThread | null,
  ): Promise<SaHandle> {
    const claim =
      thread === null ? this.#own.addSoftware(handle, sa) : await this.#queues.addSoftware(thread, handle, sa);
    this.#registry.countTwins(sa, 1);
    return this.#enter(handle, sa, placement, claim, thread);
  }

  #enter(
    handle: number,
    sa: SecurityAssociation,
    placement: Placement,
    claim: NonceClaim,
    thread: SaThread | null,
  ): SaHandle {
    const managed = new ManagedSa(this, handle, sa, placement, claim, thread);
    this.#registry.enter(managed);
    this.#queues.own(handle, thread);
    return managed;
  }

  traffic(managed: ManagedSa): SaTraffic {
    const { handle, placement } = managed;
    if (managed.thread !== null) return this.#queues.traffic(managed.thread, handle, managed.softExpired);
    const own = placement.where === 'software' && this.#registry.has(managed) ? this.#own.traffic(handle) : null;
    return own ?? this.#queues.inlineTraffic(handle);
  }

  async query(managed: ManagedSa): Promise<RedactedSaObject | null> {
    return managed.placement.where === 'inline' ? this.#device().query(managed.handle) : null;
  }

  modify(managed: ManagedSa, input: SecurityAssociationInput): Promise<void> {
    return managed.exclusive(() => this.#modify(managed, input));
  }

  async #modify(managed: ManagedSa, input: SecurityAssociationInput): Promise<void> {
    if (this.#closed !== null) throw this.#closed;
    const sa = validateSa(input);
    try {
      managed.refuseOther(sa);
      if (managed.thread !== null && managed.placement.where === 'software') {
        await this.#queues.modifySoftware(managed.thread, managed, sa);
      } else if (managed.placement.where === 'software') this.#own.modifySoftware(managed, sa);
      else await this.#modifyInline(managed, sa);
    } finally {
      wipeKeys(sa);
    }
  }

  /**
   * The standard does not say whether a modify restarts the sequence numbers of an outbound SA. So it must bring a key and salt that were
   * never used, or nonces might repeat.
   */
  async #modifyInline(managed: ManagedSa, sa: SecurityAssociation): Promise<void> {
    const { handle } = managed;
    const device = this.#device();
    const why = whyNotInline(sa, device.capability);
    if (why !== null) throw new IpsecError('NOT_OFFLOADABLE', `the SA cannot stay inline: ${why}`);
    const claim = this.#options.guard.claim(sa, 'inline');
    try {
      await device.modify(handle, sa);
    } catch (error) {
      if (isRefusal(error)) claim.cancel();
      else claim.release();
      throw error;
    }
    managed.claim.release();
    managed.claim = claim;
    const rekeyed = managed.became(sa);
    this.#own.replaceInline(handle, sa, rekeyed);
    if (managed.thread !== null || managed.direction === 'inbound') {
      await this.#queues.replaceInline(managed.thread, handle, sa, rekeyed);
    }
  }

  move(managed: ManagedSa, where: Where, input: SecurityAssociationInput, options: MoveOptions): Promise<void> {
    return managed.exclusive(async () => {
      if (this.#closed !== null) throw this.#closed;
      const sa = validateSa(input);
      try {
        await this.#move(managed, where, sa, options);
      } finally {
        wipeKeys(sa);
      }
    });
  }

  async #move(managed: ManagedSa, where: Where, sa: SecurityAssociation, options: MoveOptions): Promise<void> {
    managed.refuseOther(sa);
    if (managed.thread !== null || this.#queues.open) {
      throw new IpsecError('SA_MOVE', 'an SA cannot move while worker threads use the NIC', { hint: 'Make a new SA.' });
    }
    if (managed.placement.where === where) throw new IpsecError('SA_MOVE', `the SA is ${where} already`);
    const parts: MoveParts = {
      guard: this.#options.guard,
      device: () => this.#device(),
      software: () => this.#own.side(),
      traffic: (one) => this.traffic(one),
      obstacle: (_, moved, to) => (to === 'inline' ? this.#obstacles.inline(moved, true) : this.#own.obstacle),
      switchOver: (one, moved, to) => this.#switchOver(one, moved, to),
      closed: () => this.#closed,
    };
    await moveSa(parts, managed, where, sa, options);
  }

  moveToQueue(managed: ManagedSa, queue: number, input: SecurityAssociationInput): Promise<void> {
    return managed.exclusive(async () => {
      if (this.#closed !== null) throw this.#closed;
      const sa = validateSa(input);
      const parts: QueueMoveParts = {
        own: this.#own,
        registry: this.#registry,
        queues: this.#queues,
        threads: this.threads,
        device: this.device,
      };
      try {
        await moveToQueue(parts, managed, sa, this.#queues.owner(queue));
      } catch (error) {
        throw this.#closed ?? error;
      } finally {
        wipeKeys(sa);
      }
    });
  }

  /** SAs move between threads only where there are any. */
  idOf(sa: SecurityAssociation): string {
    return this.#options.threads === undefined ? '' : saId(sa);
  }

  /** Between two bursts: the SA, which is in both places, is from now on `where`. */
  #switchOver(managed: ManagedSa, sa: SecurityAssociation, where: Where): void {
    const { handle } = managed;
    managed.moved(sa, { where, because: 'it was moved' });
    this.state.remove(handle);
    if (where === 'inline') this.software?.remove(handle);
    this.#registry.countTwins(managed, where === 'inline' ? -1 : 1);
    this.#own.enter(handle, sa, where);
    if (sa.direction === 'outbound') return;
    // Threads that open their queues later learn of the SAs that are on the device then, and of no others.
    if (where === 'inline') this.#queues.addEverywhere(handle, sa);
    else this.#queues.forget(handle);
  }

  async remove(managed: ManagedSa): Promise<void> {
    const { handle } = managed;
    while (managed.busy) await managed.idle();
    if (!this.#registry.has(managed)) return;
    if (managed.thread !== null) return this.threads.remove(managed, managed.thread);
    managed.keepTraffic();
    this.#registry.leave(managed);
    this.#queues.own(handle, undefined);
    const receivesInline = managed.placement.where === 'inline' && managed.direction === 'inbound';
    if (receivesInline) this.device?.silence(handle);
    this.state.remove(handle);
    if (receivesInline) {
      const gone = await this.#queues.removeEverywhere(handle);
      await this.device?.destroy(handle, !gone);
    } else if (managed.placement.where === 'software') {
      this.#removeSoftware(managed);
    } else {
      managed.claim.release();
      await this.device?.destroy(handle, managed.lingers);
    }
    this.#registry.give(handle);
  }

  #removeSoftware(managed: ManagedSa): void {
    this.#own.removeSoftware(managed);
    this.#registry.countTwins(managed, -1);
  }

  /** Ends all SAs, wipes the keys of the software side, and refuses new ones with `reason`. The device has been reset, or is gone. */
  close(reason: VipsecError): void {
    if (this.#closed !== null) return;
    this.#closed = reason;
    for (const managed of this.#registry.list()) {
      managed.keepTraffic();
      this.#queues.own(managed.handle, undefined);
      if (managed.thread !== null || managed.isUnderway) {
        managed.claim.release();
        continue;
      }
      this.state.remove(managed.handle);
      if (managed.placement.where === 'software') this.#removeSoftware(managed);
      else managed.claim.release();
    }
    this.#registry.clear();
    this.#queues.close();
    this.#listeners.closed();
    this.#own.close();
    this.#options.guard.close();
  }

  reserveKey(input: SecurityAssociationInput): KeyReservation {
    if (this.#closed !== null) throw this.#closed;
    const sa = validateSa(input);
    try {
      // The first packet's IV is 0, one behind its sequence number.
      const initial = { sequence: 1n, iv: new Uint8Array(8) };
      const claim = this.#options.guard.claim({ ...sa, initial, options: { ...sa.options, esn: true } }, 'software');
      return { release: (nextIv) => claim.release(nextIv + 1n) };
    } finally {
      wipeKeys(sa);
    }
  }

  onClose(listener: () => void): () => void {
    return this.#listeners.onClose(listener);
  }

  onSaEvent(listener: (notification: SaNotification) => void): () => void {
    return this.#listeners.onSaEvent(listener);
  }

  #device(): InlineIpsec {
    if (this.device === null) throw new IpsecError('NOT_OFFLOADABLE', this.inlineObstacle ?? 'no inline IPsec');
    return this.device;
  }
}
