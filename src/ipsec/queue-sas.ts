/**
 * SAs on the data paths of worker threads, as the manager sees them. An SA that a packet can name is entered in one thread, with an
 * acknowledgement; an inbound SA of the device is entered in all of them, because the device has checked the packet and any queue may get it.
 *
 * Sound when a thread is slow or dies: nonces count as used unless the thread has said how far it came, and an object id is not used
 * again while a thread may still take it for an SA. A thread that does not know an inbound SA yet counts its packets as not secured.
 */
import { IpsecError, VipsecError } from '../errors.ts';
import { VERDICTS } from '../fallback/verdict.ts';
import type { InlineIpsec } from './inline.ts';
import type { SaTraffic } from './ipsec.ts';
import type { ManagedSa } from './managed-sa.ts';
import type { NonceClaim, NonceGuard } from './nonce-guard.ts';
import type { SecurityAssociation } from './sa.ts';
import { withNonces } from './sa-facts.ts';
import { namedCounters, type SaState } from './sa-state.ts';
import { ownerNumber, type SaEntry, type SaThread, type SaThreads } from './sa-thread.ts';

/** Milliseconds between looks at what all queues together have received on SAs that have limits. */
const LIMITS_MS = 100;

const NO_LIMITS = { softPackets: 0n, hardPackets: 0n, softBytes: 0n, hardBytes: 0n } as const;

export class QueueSas {
  readonly #threads: SaThreads | null;
  readonly #device: Pick<InlineIpsec, 'objectOf' | 'destroy'> | null;
  readonly #guard: NonceGuard;
  readonly #state: SaState;
  /** Inbound SAs of the device, without keys. */
  readonly #inbound = new Map<number, SaEntry>();
  /** Those that have limits. */
  readonly #limited = new Set<number>();
  #timer: NodeJS.Timeout | null = null;
  #closed = false;

  constructor(
    threads: SaThreads | null,
    device: Pick<InlineIpsec, 'objectOf' | 'destroy'> | null,
    guard: NonceGuard,
    state: SaState,
  ) {
    this.#threads = threads;
    this.#device = device;
    this.#guard = guard;
    this.#state = state;
  }

  /** Whether any thread has a queue open. */
  get open(): boolean {
    return this.#open.length > 0;
  }

  get #open(): readonly SaThread[] {
    return this.#threads?.open() ?? [];
  }

  /** Throws IpsecError `SA_QUEUE`. */
  owner(queue: number | undefined): SaThread | null {
    return this.#threads?.owner(queue) ?? null;
  }

  /** Notes whose SA a handle is: `null` the control thread's, `undefined` nobody's. */
  own(handle: number, thread: SaThread | null | undefined): void {
    const { owners } = this.#state;
    if (owners !== null) owners[handle] = thread === undefined ? 0 : ownerNumber(thread);
  }

  /** Enters a software SA; returns the claim on its nonces. Throws as `SaThread.add`, IpsecError `NONCE_REUSE`. */
  async addSoftware(thread: SaThread, handle: number, sa: SecurityAssociation): Promise<NonceClaim> {
    const claim = this.#guard.claim(sa, 'software');
    try {
      await thread.add({ handle, sa, where: 'software', object: null });
    } catch (error) {
      give(claim, error);
      throw error;
    }
    this.#checkOpen(claim);
    return claim;
  }

  /** Enters an outbound SA of the device; when that fails, its object goes. Throws as `SaThread.add`. */
  async addInline(thread: SaThread, handle: number, sa: SecurityAssociation, claim: NonceClaim): Promise<void> {
    const device = this.#theDevice();
    try {
      await thread.add({ handle, sa, where: 'inline', object: device.objectOf(handle) });
    } catch (error) {
      give(claim, error);
      await device.destroy(handle).catch(() => {});
      throw error;
    }
    this.#checkOpen(claim);
  }

  /** Tells all threads of an inbound SA of the device; nobody waits for them. */
  addEverywhere(handle: number, sa: SecurityAssociation): void {
    if (this.#threads === null) return;
    const entry = this.#entryOf(handle, sa);
    this.#inbound.set(handle, entry);
    this.#watchLimits(handle, sa);
    for (const thread of this.#open) thread.add(entry).catch(() => {});
  }

  /**
   * The same for parameters that have changed, on the thread that has the SA, or on all. Throws as `SaThread.modify`. A thread that is too slow for those
   * of an inbound SA loses it: with the selector of before it would let packets through that the new one is against.
   */
  async replaceInline(
    thread: SaThread | null,
    handle: number,
    sa: SecurityAssociation,
    rekeyed: boolean,
  ): Promise<void> {
    if (thread !== null) {
      await thread.modify({ handle, sa, where: 'inline', object: null }, rekeyed);
      return;
    }
    if (!this.#inbound.has(handle)) return;
    const entry = this.#entryOf(handle, sa);
    this.#inbound.set(handle, entry);
    this.#watchLimits(handle, sa);
    await Promise.allSettled(this.#open.map((one) => one.modify(entry, rekeyed).catch(() => one.remove(handle))));
  }

  /** As the manager does for its own: with the key that it has the SA goes on counting, with another it begins anew. */
  async modifySoftware(thread: SaThread, managed: ManagedSa, sa: SecurityAssociation): Promise<void> {
    const entry: SaEntry = { handle: managed.handle, sa, where: 'software', object: null };
    if (sa.direction === 'inbound' || managed.claim.covers(sa)) {
      managed.claim.checkModify(sa);
      await thread.modify(entry, false);
      managed.became(sa);
      return;
    }
    const claim = this.#guard.claim(withNonces(sa, managed.keyId), 'software');
    let next: bigint | null;
    try {
      next = await thread.modify(entry, true);
    } catch (error) {
      give(claim, error);
      throw error;
    }
    managed.claim.release(next ?? undefined);
    managed.claim = claim;
    managed.became(sa);
  }

  /** Takes an SA off its thread and ends its claim. False when the thread may still have it. */
  async remove(thread: SaThread, managed: ManagedSa): Promise<boolean> {
    try {
      const next = await thread.remove(managed.handle);
      managed.claim.release(next ?? undefined);
      return true;
    } catch (error) {
      managed.claim.release();
      return isGone(error);
    }
  }

  /** An inbound SA is not on the device any more, or never was; no thread has it. Says whether it was. */
  forget(handle: number): boolean {
    this.#limited.delete(handle);
    return this.#inbound.delete(handle);
  }

  /** Takes an inbound SA of the device off all threads. False when one may still have it. */
  async removeEverywhere(handle: number): Promise<boolean> {
    if (!this.forget(handle)) return true;
    const ends = await Promise.allSettled(this.#open.map((thread) => thread.remove(handle)));
    return ends.every((end) => end.status === 'fulfilled' || isGone(end.reason));
  }

  /** What a thread has counted for an SA of its own. */
  traffic({ counts }: SaThread, handle: number, softExpired: boolean): SaTraffic {
    return {
      packets: BigInt(counts.packets[handle]),
      bytes: BigInt(counts.bytes[handle]),
      dropped: namedCounters(droppedOf(counts.dropped, handle)),
      softExpired,
    };
  }

  /** What all threads have counted for an SA of the device. */
  inlineTraffic(handle: number): SaTraffic {
    const state = this.#state;
    const dropped: Record<string, number> = { ...state.dropped(handle) };
    if (this.#inbound.has(handle)) {
      for (const { counts } of this.#open) {
        for (const [why, count] of Object.entries(namedCounters(droppedOf(counts.dropped, handle)))) {
          dropped[why] = (dropped[why] ?? 0) + count;
        }
      }
    }
    const [packets, bytes] = this.#received(handle);
    return { packets: BigInt(packets), bytes: BigInt(bytes), dropped, softExpired: state.softExpired(handle) };
  }

  /** A thread has opened its queue. */
  opened(thread: SaThread): void {
    for (const entry of this.#inbound.values()) thread.add(entry).catch(() => {});
  }

  /** A thread counts no more: what it has counted on SAs of all goes on here. */
  ended({ counts }: SaThread): void {
    for (const handle of this.#inbound.keys()) this.#state.absorb(handle, counts);
  }

  close(): void {
    this.#closed = true;
    if (this.#timer !== null) clearInterval(this.#timer);
    this.#timer = null;
    this.#inbound.clear();
  }

  #received(handle: number): [packets: number, bytes: number] {
    let packets = this.#state.packets[handle];
    let bytes = this.#state.bytes[handle];
    if (!this.#inbound.has(handle)) return [packets, bytes];
    for (const { counts } of this.#open) {
      packets += counts.packets[handle];
      bytes += counts.bytes[handle];
    }
    return [packets, bytes];
  }

  /** No thread can tell of limits alone. */
  #watchLimits(handle: number, { lifetime }: SecurityAssociation): void {
    const { softPackets, hardPackets, softBytes, hardBytes } = lifetime;
    if ((softPackets | hardPackets | softBytes | hardBytes) === 0n) this.#limited.delete(handle);
    else this.#limited.add(handle);
    if (this.#timer !== null || this.#limited.size === 0) return;
    this.#timer = setInterval(() => {
      for (const one of this.#limited) this.#state.checkInbound(one, ...this.#received(one));
    }, LIMITS_MS);
    this.#timer.unref();
  }

  #entryOf(handle: number, sa: SecurityAssociation): SaEntry {
    const { aead: _aead, cipher: _cipher, auth: _auth, ...keyless } = sa;
    const object = this.#theDevice().objectOf(handle);
    return { handle, sa: { ...keyless, lifetime: NO_LIMITS }, where: 'inline', object };
  }

  #theDevice(): Pick<InlineIpsec, 'objectOf' | 'destroy'> {
    if (this.#device === null) throw new IpsecError('NOT_OFFLOADABLE', 'the device has no inline IPsec');
    return this.#device;
  }

  #checkOpen(claim: NonceClaim): void {
    if (!this.#closed) return;
    claim.release();
    throw new IpsecError('CLOSED', 'the NIC was closed meanwhile');
  }
}

/** After a refusal the thread surely has sent nothing; when it is gone, nobody knows. */
function give(claim: NonceClaim, error: unknown): void {
  if (isGone(error)) claim.release();
  else claim.cancel();
}

function isGone(error: unknown): boolean {
  return error instanceof VipsecError && error.code === 'QUEUE_GONE';
}

function droppedOf(dropped: Float64Array | null, handle: number): Float64Array {
  return dropped?.subarray(handle * VERDICTS, (handle + 1) * VERDICTS) ?? new Float64Array(0);
}
