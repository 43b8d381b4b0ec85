/**
 * The SAs of a worker thread: those that the control thread has given to its queue, and every inbound SA of the device, whose packets come to
 * any queue. What a packet looks at is this thread's alone; nothing of it is locked or shared but the counters.
 *
 * An outbound SA is in one thread, so its sequence numbers are counted in one place. The handle of an SA of another thread means nothing
 * here but that packets for it are dropped as `foreign-sa`.
 */
import { IpsecError } from '../errors.ts';
import type { EngineName } from '../fallback/engines/engine.ts';
import type { SaEvents } from '../ipsec/ipsec.ts';
import { eventOf, longestFrame, placeOf, selectorOf } from '../ipsec/sa-facts.ts';
import { SaPlace, SaState, sharedCounts } from '../ipsec/sa-state.ts';
import type { SaEntry, SaProgress } from '../ipsec/sa-thread.ts';
import { wipeKeys } from '../ipsec/secret.ts';
import type { PacketPool } from '../packet/pool.ts';
import { createSaTable, NOT_INLINE, type SaTable } from '../virtio-net/sa-table.ts';
import { CountedSoftware } from './counted-software.ts';
import type { SaHandling } from './handle.ts';
import { unpackSa } from './sa-parcel.ts';

type Tell = (handle: number, event: keyof SaEvents, args: SaEvents[keyof SaEvents]) => void;

/** An inbound SA of the device whose id had another SA: it means the new one only when the ring has been seen empty. */
interface Awaited {
  readonly id: number;
  readonly handle: number;
}

export class WorkerIpsec {
  readonly state: SaState;
  readonly table: SaTable;
  software: CountedSoftware | null = null;
  /** The receive queue asks it whether to say that it has seen its ring empty. */
  readonly device = { awaitsDrain: false, drained: () => this.#drained() };
  readonly #engine: 'auto' | EngineName | null;
  readonly #pool: PacketPool;
  readonly #mtu: number;
  readonly #tell: Tell;
  #awaited: Awaited[] = [];
  /** Object id of each inline SA. */
  readonly #objects = new Map<number, number>();

  constructor(sas: SaHandling, pool: PacketPool, mtu: number, tell: Tell) {
    this.state = new SaState(
      sas.handles,
      (handle, event, ...args) => tell(handle, event, args),
      sharedCounts(sas.handles, sas.counts),
    );
    this.state.owners = new Uint16Array(sas.owners);
    this.table = createSaTable(sas.handles + 1, sas.inboundLimit);
    this.#engine = sas.engine;
    this.#pool = pool;
    this.#mtu = mtu;
    this.#tell = tell;
  }

  /** Enters an SA. Throws what `SoftwareIpsec.add` throws; then nothing has changed. */
  add(entry: SaEntry): void {
    const { handle, where, object, progress } = entry;
    const sa = unpackSa(entry.sa);
    try {
      if (where === 'software') this.#software().add(handle, sa, this.#mtu, progress?.software);
      const place = placeOf(sa, where);
      this.state.add(handle, sa, place, longestFrame(sa, this.#mtu), selectorOf(sa), progress?.state);
      if (object === null) return;
      this.#objects.set(handle, object.id);
      if (place === SaPlace.inlineOutbound) this.table.resourceId[handle] = object.id;
      else if (object.reused) this.#await(object.id, handle);
      else this.table.handle[object.id] = handle;
    } finally {
      wipeKeys(sa);
    }
  }

  /** Gives an SA new parameters; returns the sequence number that its next packet would have had. Throws like `add`. */
  modify(entry: SaEntry, rekeyed: boolean): bigint | null {
    const { handle, where } = entry;
    const sa = unpackSa(entry.sa);
    try {
      if (this.state.place[handle] === SaPlace.none) return null;
      let next: bigint | null = null;
      if (where === 'software') {
        const software = this.#software();
        next = software.sequence(handle);
        software.modify(handle, sa);
      }
      this.state.replace(handle, sa, placeOf(sa, where), longestFrame(sa, this.#mtu), selectorOf(sa), rekeyed);
      return next;
    } finally {
      wipeKeys(sa);
    }
  }

  /** From now on packets that name the SA are dropped. Returns the next sequence number of one that ran in software, else null. */
  remove(handle: number): bigint | null {
    if (this.state.place[handle] === SaPlace.none) return null;
    let next: bigint | null = null;
    if (this.#isSoftware(handle)) {
      next = this.#software().sequence(handle);
      this.#software().remove(handle);
    }
    this.#leave(handle);
    return next;
  }

  /** Like `remove`, for an SA that goes on elsewhere. Throws IpsecError `NO_SUCH_SA`. */
  take(handle: number): SaProgress {
    if (this.state.place[handle] === SaPlace.none)
      throw new IpsecError('NO_SUCH_SA', 'the thread does not have the SA');
    const software = this.#isSoftware(handle) ? this.#software().take(handle) : null;
    const state = this.state.progress(handle);
    this.#leave(handle);
    return { state, software: software === null ? null : { ...software, dropped: state.dropped } };
  }

  #isSoftware(handle: number): boolean {
    const place = this.state.place[handle];
    return place === SaPlace.softwareOutbound || place === SaPlace.softwareInbound;
  }

  #leave(handle: number): void {
    const object = this.#objects.get(handle);
    this.#objects.delete(handle);
    this.table.resourceId[handle] = NOT_INLINE;
    this.#awaited = this.#awaited.filter((one) => one.handle !== handle);
    this.device.awaitsDrain = this.#awaited.length > 0;
    if (object !== undefined && this.table.handle[object] === handle) this.table.handle[object] = 0;
    this.state.remove(handle);
  }

  /** Ends all SAs and wipes their keys; returns the next sequence numbers of those that sent in software. */
  close(): Map<number, bigint> {
    const sequences = new Map<number, bigint>();
    const { place, capacity } = this.state;
    for (let handle = 1; handle <= capacity; handle++) {
      const outbound = place[handle] === SaPlace.softwareOutbound;
      const next = place[handle] === SaPlace.none ? null : this.remove(handle);
      if (outbound && next !== null) sequences.set(handle, next);
    }
    this.software?.close();
    this.software = null;
    return sequences;
  }

  #await(id: number, handle: number): void {
    this.#awaited.push({ id, handle });
    this.device.awaitsDrain = true;
  }

  #drained(): void {
    for (const { id, handle } of this.#awaited) this.table.handle[id] = handle;
    this.#awaited = [];
    this.device.awaitsDrain = false;
  }

  #software(): CountedSoftware {
    this.software ??= new CountedSoftware(this.#pool, this.state, {
      engine: this.#engine ?? 'auto',
      onEvent: (handle, event) => this.#tell(handle, ...eventOf(event)),
    });
    return this.software;
  }
}
