/**
 * The SAs of a NIC: validates them, places them, guards their nonces, numbers them, and tells what happens to them.
 *
 * Inline and software SAs live side by side behind `Ipsec`. When the device refuses an SA that it should take, the SA
 * goes to software, with that as the reason, unless inline is required. Nothing here is on the data path but the arrays of `SaState`.
 */
import { AdminCommandError, IpsecError, VipsecError } from '../errors.ts';
import type { SaEvent, SoftwareIpsec } from '../fallback/software.ts';
import { ObjectIds } from '../virtio/object-ids.ts';
import { type InlineCapability, whyNotInline } from './capability.ts';
import type { InlineIpsec } from './inline.ts';
import type {
  AddSaOptions,
  Ipsec,
  KeyReservation,
  RedactedSaObject,
  SaEvents,
  SaHandle,
  SaNotification,
  SaTraffic,
} from './ipsec.ts';
import { ManagedSa } from './managed-sa.ts';
import { type MoveOptions, type MoveParts, moveSa } from './move.ts';
import type { NonceClaim, NonceGuard } from './nonce-guard.ts';
import { type Placement, place, type Where } from './placement.ts';
import { QueueSas } from './queue-sas.ts';
import type { SecurityAssociation } from './sa.ts';
import { eventOf, identityOf, longestFrame, placeOf, selectorOf, wipeKeys } from './sa-facts.ts';
import { SaPlace, SaState } from './sa-state.ts';
import type { SaThread, SaThreads } from './sa-thread.ts';
import { type SecurityAssociationInput, validateSa } from './validate.ts';

/** What is used of `SoftwareIpsec`. */
export type SoftwareSide = Pick<
  SoftwareIpsec,
  'add' | 'modify' | 'remove' | 'counters' | 'setMtu' | 'protect' | 'unprotect' | 'close'
>;

export interface IpsecManagerOptions {
  readonly inline: InlineIpsec | null;
  /** Why there is no inline IPsec, when there is none. */
  readonly inlineObstacle: string | null;
  /** Makes the software side, when the first SA needs it; null when it is not wanted. */
  readonly software: ((onEvent: (handle: number, event: SaEvent) => void) => SoftwareSide) | null;
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
  /** Made with the first software SA. */
  software: SoftwareSide | null = null;
  readonly #options: IpsecManagerOptions;
  readonly #ids: ObjectIds;
  readonly #queues: QueueSas;
  readonly #sas = new Map<number, ManagedSa>();
  /** Protocol and SPI of software inbound SAs, and how many have them. */
  readonly #softwareInbound = new Map<string, number>();
  readonly #listeners = new Set<(notification: SaNotification) => void>();
  readonly #closeListeners = new Set<() => void>();
  #closed: VipsecError | null = null;

  constructor(options: IpsecManagerOptions) {
    this.#options = options;
    this.device = options.inline;
    this.inline = options.inline?.capability ?? null;
    this.inlineObstacle = options.inline === null ? (options.inlineObstacle ?? 'the device has no inline IPsec') : null;
    this.#ids = new ObjectIds(options.handles);
    this.state = new SaState(options.handles, (handle, event, ...args) => this.#tell(handle, event, args));
    this.state.owners = options.threads?.owners ?? null;
    this.#queues = new QueueSas(options.threads ?? null, options.inline, options.guard, this.state);
  }

  get(handle: number): SaHandle | undefined {
    return this.#sas.get(handle);
  }

  list(): SaHandle[] {
    return [...this.#sas.values()];
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
    this.#refuseDuplicate(sa);
    const inlineObstacle = this.inlineObstacle ?? this.device?.obstacle(sa) ?? this.#twinInSoftware(sa);
    const softwareObstacle = this.#options.software === null ? 'software IPsec is not wanted' : null;
    const placement = place({ sa, inlineObstacle, softwareObstacle, ...(require === undefined ? {} : { require }) });
    const taken = this.#ids.take();
    if (taken === null) throw new IpsecError('SA_LIMIT', `there are ${this.#ids.limit} SAs already`);
    const handle = taken.id + 1;
    try {
      const fallback = softwareObstacle === null && require === undefined;
      return await this.#create(handle, sa, placement, fallback, thread);
    } catch (error) {
      this.#ids.give(taken.id);
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
      await device.create(handle, sa, false, owner !== null);
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
      this.state.add(handle, sa, placeOf(sa, 'inline'), longestFrame(sa, this.#options.mtu), selectorOf(sa));
      if (sa.direction === 'inbound') this.#queues.addEverywhere(handle, sa);
    }
    return this.#enter(handle, sa, placement, claim, owner);
  }

  async #createSoftware(
    handle: number,
    sa: SecurityAssociation,
    placement: Placement,
    thread: SaThread | null,
  ): Promise<SaHandle> {
    if (thread !== null) {
      const claim = await this.#queues.addSoftware(thread, handle, sa);
      this.#countTwins(sa, 1);
      return this.#enter(handle, sa, placement, claim, thread);
    }
    const software = this.#software();
    const claim = this.#options.guard.claim(sa, 'software');
    try {
      software.add(handle, sa);
      if (sa.direction === 'outbound') software.setMtu(handle, this.#options.mtu);
    } catch (error) {
      claim.cancel();
      throw error;
    }
    this.state.add(handle, sa, placeOf(sa, 'software'), longestFrame(sa, this.#options.mtu), null);
    this.#countTwins(sa, 1);
    return this.#enter(handle, sa, placement, claim, null);
  }

  #enter(
    handle: number,
    sa: SecurityAssociation,
    placement: Placement,
    claim: NonceClaim,
    thread: SaThread | null,
  ): SaHandle {
    const managed = new ManagedSa(this, handle, sa, placement, claim, thread);
    this.#sas.set(handle, managed);
    this.#queues.own(handle, thread);
    return managed;
  }

  /** The device finds an inbound SA by SPI alone, so a second one with the same SPI would get the first one's packets. */
  #refuseDuplicate(sa: SecurityAssociation): void {
    if (sa.direction === 'inbound' && this.device?.hasInbound(sa) === true) {
      const spi = `0x${sa.spi.toString(16)}`;
      throw new IpsecError('SA_EXISTS', `an inbound SA with SPI ${spi} is on the device`, { path: 'sa.spi' });
    }
  }

  #twinInSoftware(sa: SecurityAssociation): string | null {
    const twin = sa.direction === 'inbound' && this.#softwareInbound.has(identityOf(sa));
    return twin ? 'a software SA has the same SPI' : null;
  }

  /** Software inbound SAs may share an SPI when their destinations differ. */
  #countTwins(sa: Pick<SaHandle, 'direction' | 'protocol' | 'spi'>, by: 1 | -1): void {
    if (sa.direction === 'outbound') return;
    const identity = identityOf(sa);
    const count = (this.#softwareInbound.get(identity) ?? 0) + by;
    if (count === 0) this.#softwareInbound.delete(identity);
    else this.#softwareInbound.set(identity, count);
  }

  traffic(managed: ManagedSa): SaTraffic {
    const { handle, placement } = managed;
    if (managed.thread !== null) return this.#queues.traffic(managed.thread, handle, managed.softExpired);
    if (placement.where === 'software' && this.software !== null && this.#sas.has(handle)) {
      const { packets, bytes, dropped, sequence, engine, softExpired } = this.software.counters(handle);
      return { packets, bytes, dropped, softExpired, sequence, engine };
    }
    return this.#queues.inlineTraffic(handle);
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
      } else if (managed.placement.where === 'software') this.#modifySoftware(managed, sa);
      else await this.#modifyInline(managed, sa);
    } finally {
      wipeKeys(sa);
    }
  }

  /** With the key and salt that it has, a software SA goes on counting; with new ones it begins anew. */
  #modifySoftware(managed: ManagedSa, sa: SecurityAssociation): void {
    const { handle } = managed;
    const software = this.#software();
    if (sa.direction === 'inbound' || managed.claim.covers(sa)) {
      software.modify(handle, sa);
      managed.became(sa);
      return;
    }
    const next = software.counters(handle).sequence;
    const claim = this.#options.guard.claim(sa, 'software');
    try {
      software.modify(handle, sa);
    } catch (error) {
      claim.cancel();
      throw error;
    }
    managed.claim.release(next);
    managed.claim = claim;
    managed.became(sa);
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
    if (managed.thread !== null || managed.direction === 'inbound') {
      await this.#queues.replaceInline(managed.thread, handle, sa, rekeyed);
    }
    if (this.state.place[handle] === SaPlace.none) return;
    const where = placeOf(sa, 'inline');
    this.state.replace(handle, sa, where, longestFrame(sa, this.#options.mtu), selectorOf(sa), rekeyed);
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
      software: () => this.#software(),
      traffic: (one) => this.traffic(one),
      obstacle: (_, moved, to) => this.#obstacleThere(moved, to),
      switchOver: (one, moved, to) => this.#switchOver(one, moved, to),
      closed: () => this.#closed,
    };
    await moveSa(parts, managed, where, sa, options);
  }

  /** Why an SA of the other place cannot be `where`, or null. */
  #obstacleThere(sa: SecurityAssociation, where: Where): string | null {
    if (where === 'software') return this.#options.software === null ? 'software IPsec is not wanted' : null;
    const others = (this.#softwareInbound.get(identityOf(sa)) ?? 0) > 1;
    const twin = sa.direction === 'inbound' && others ? 'another software SA has the same SPI' : null;
    return this.inlineObstacle ?? this.device?.obstacle(sa) ?? twin;
  }

  /** Between two bursts: the SA, which is in both places, is from now on `where`. */
  #switchOver(managed: ManagedSa, sa: SecurityAssociation, where: Where): void {
    const { handle } = managed;
    managed.moved(sa, { where, because: 'it was moved' });
    this.state.remove(handle);
    if (where === 'inline') {
      this.software?.remove(handle);
      this.#countTwins(managed, -1);
      this.state.add(handle, sa, placeOf(sa, where), longestFrame(sa, this.#options.mtu), selectorOf(sa));
    } else {
      if (sa.direction === 'outbound') this.software?.setMtu(handle, this.#options.mtu);
      this.#countTwins(managed, 1);
      this.state.add(handle, sa, placeOf(sa, where), longestFrame(sa, this.#options.mtu), null);
    }
  }

  async remove(managed: ManagedSa): Promise<void> {
    const { handle } = managed;
    while (managed.busy) await managed.idle();
    if (this.#sas.get(handle) !== managed) return;
    if (managed.thread !== null) return this.#removeElsewhere(managed, managed.thread);
    managed.keepTraffic();
    this.#sas.delete(handle);
    this.#queues.own(handle, undefined);
    this.state.remove(handle);
    if (managed.placement.where === 'inline' && managed.direction === 'inbound') {
      const gone = await this.#queues.removeEverywhere(handle);
      await this.device?.destroy(handle, !gone);
    } else if (managed.placement.where === 'software') {
      this.#removeSoftware(managed);
    } else {
      managed.claim.release();
      await this.device?.destroy(handle);
    }
    this.#ids.give(handle - 1);
  }

  /** Once its thread has let go of it. A handle of which that is not known is not used again. */
  async #removeElsewhere(managed: ManagedSa, thread: SaThread): Promise<void> {
    const { handle } = managed;
    this.#sas.delete(handle);
    const gone = await this.#queues.remove(thread, managed);
    managed.keepTraffic();
    await this.#endElsewhere(managed, gone);
  }

  async #endElsewhere(managed: ManagedSa, gone: boolean): Promise<void> {
    const { handle } = managed;
    if (managed.placement.where === 'software') this.#countTwins(managed, -1);
    else await this.device?.destroy(handle, !gone);
    this.#queues.own(handle, undefined);
    if (gone) this.#ids.give(handle - 1);
  }

  /**
   * A thread has let go of its queue, or died: its SAs are over. `sequences` are the next sequence numbers of those that sent in software;
   * of others every number counts as used. With `closing` their objects are left to the reset of the device that follows.
   */
  async threadEnded(thread: SaThread, sequences: ReadonlyMap<number, bigint>, closing = false): Promise<void> {
    const ends: Promise<void>[] = [];
    for (const managed of [...this.#sas.values()]) {
      if (managed.thread !== thread) continue;
      this.#sas.delete(managed.handle);
      managed.keepTraffic();
      managed.claim.release(sequences.get(managed.handle));
      if (!closing) ends.push(this.#endElsewhere(managed, true));
    }
    this.#queues.ended(thread);
    await Promise.allSettled(ends);
  }

  /** A thread has opened its queue: it learns of the inbound SAs of the device. */
  threadOpened(thread: SaThread): void {
    this.#queues.opened(thread);
  }

  /** A thread tells of an SA. */
  threadEvent(handle: number, event: keyof SaEvents, args: SaEvents[keyof SaEvents]): void {
    const managed = this.#sas.get(handle);
    if (managed === undefined) return;
    if (managed.thread === null) {
      // Several queues may see the same flag of the device.
      if (event === 'soft-expiry') this.state.deviceSoftExpiry(handle);
      return;
    }
    if (event === 'soft-expiry') managed.softExpired = true;
    this.#tell(handle, event, args);
  }

  #removeSoftware(managed: ManagedSa): void {
    if (this.software === null) return;
    const { sequence } = this.software.counters(managed.handle);
    this.software.remove(managed.handle);
    this.#countTwins(managed, -1);
    managed.claim.release(sequence);
  }

  /** Ends all SAs, wipes the keys of the software side, and refuses new ones with `reason`. The device has been reset, or is gone. */
  close(reason: VipsecError): void {
    if (this.#closed !== null) return;
    this.#closed = reason;
    for (const managed of this.#sas.values()) {
      managed.keepTraffic();
      this.#queues.own(managed.handle, undefined);
      if (managed.thread !== null) {
        managed.claim.release();
        continue;
      }
      this.state.remove(managed.handle);
      if (managed.placement.where === 'software') this.#removeSoftware(managed);
      else managed.claim.release();
    }
    this.#sas.clear();
    this.#queues.close();
    for (const listener of [...this.#closeListeners]) listener();
    this.software?.close();
    this.software = null;
    this.#options.guard.close();
  }

  /** Events reach listeners after the burst in which they arose, so that a listener may do anything. */
  #tell<E extends keyof SaEvents>(handle: number, event: E, args: SaEvents[E]): void {
    const managed = this.#sas.get(handle);
    if (managed === undefined) return;
    queueMicrotask(() => {
      managed.tell(event, args);
      for (const listener of this.#listeners) listener({ sa: managed, event, limit: args[0] ?? null });
    });
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
    this.#closeListeners.add(listener);
    return () => this.#closeListeners.delete(listener);
  }

  onSaEvent(listener: (notification: SaNotification) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  #softwareEvent(handle: number, event: SaEvent): void {
    const [name, args] = eventOf(event);
    this.#tell(handle, name, args);
  }

  #software(): SoftwareSide {
    if (this.#options.software === null) throw new IpsecError('SOFTWARE_NOT_AVAILABLE', 'software IPsec is not wanted');
    this.software ??= this.#options.software((handle, event) => this.#softwareEvent(handle, event));
    return this.software;
  }

  #device(): InlineIpsec {
    if (this.device === null) throw new IpsecError('NOT_OFFLOADABLE', this.inlineObstacle ?? 'no inline IPsec');
    return this.device;
  }
}
