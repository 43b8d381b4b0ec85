/**
 * SAs on the data path of the thread that opened the NIC, as the manager sees them; `queue-sas.ts` has those of other threads. Everything here
 * is done at once, between two bursts.
 */
import { IpsecError } from '../errors.ts';
import type { SaEvent, SoftwareIpsec } from '../fallback/software.ts';
import type { InlineIpsec } from './inline.ts';
import type { SaTraffic } from './ipsec.ts';
import type { ManagedSa } from './managed-sa.ts';
import type { NonceClaim, NonceGuard } from './nonce-guard.ts';
import type { Where } from './placement.ts';
import type { SecurityAssociation } from './sa.ts';
import { longestFrame, placeOf, selectorOf, withNonces } from './sa-facts.ts';
import { SaPlace, type SaState, type StateProgress } from './sa-state.ts';
import type { SaEntry, SaPath, SaProgress } from './sa-thread.ts';

/** What is used of `SoftwareIpsec`. */
export type SoftwareSide = Pick<
  SoftwareIpsec,
  'add' | 'modify' | 'remove' | 'take' | 'counters' | 'setMtu' | 'protect' | 'unprotect' | 'close'
>;

/** Makes the software side. */
export type SoftwareFactory = (onEvent: (handle: number, event: SaEvent) => void) => SoftwareSide;

export interface OwnSasOptions {
  readonly device: Pick<InlineIpsec, 'carry' | 'leave' | 'quiesce'> | null;
  readonly state: SaState;
  readonly guard: NonceGuard;
  /** Bytes of the longest IP packet on the link. */
  readonly mtu: number;
  /** Null when software is not wanted. */
  readonly software: SoftwareFactory | null;
  readonly onEvent: (handle: number, event: SaEvent) => void;
}

export class OwnSas implements SaPath {
  /** Made with the first software SA. */
  software: SoftwareSide | null = null;
  readonly #options: OwnSasOptions;

  constructor(options: OwnSasOptions) {
    this.#options = options;
  }

  /** Why there is no software side, or null. */
  get obstacle(): string | null {
    return this.#options.software === null ? 'software IPsec is not wanted' : null;
  }

  /** The software side, made if need be. Throws IpsecError `SOFTWARE_NOT_AVAILABLE`. */
  side(): SoftwareSide {
    const { software, onEvent } = this.#options;
    if (software === null) throw new IpsecError('SOFTWARE_NOT_AVAILABLE', 'software IPsec is not wanted');
    this.software ??= software(onEvent);
    return this.software;
  }

  /** Makes a software SA; returns the claim on its nonces. Throws what `SoftwareIpsec.add` throws, IpsecError `NONCE_REUSE`. */
  addSoftware(handle: number, sa: SecurityAssociation): NonceClaim {
    const software = this.side();
    const claim = this.#options.guard.claim(sa, 'software');
    try {
      software.add(handle, sa);
    } catch (error) {
      claim.cancel();
      throw error;
    }
    this.enter(handle, sa, 'software');
    return claim;
  }

  /** From now on packets may name the SA, which has been made `where`. With `progress` its counters go on. */
  enter(handle: number, sa: SecurityAssociation, where: Where, progress?: SaProgress): void {
    const { state, mtu } = this.#options;
    if (where === 'software' && sa.direction === 'outbound') this.software?.setMtu(handle, mtu);
    const selector = where === 'inline' ? selectorOf(sa) : null;
    state.add(handle, sa, placeOf(sa, where), longestFrame(sa, mtu), selector, progress?.state);
  }

  /** Enters an SA that comes from the data path of a thread. Throws what `SoftwareIpsec.add` throws. */
  async add({ handle, sa, where, progress }: SaEntry): Promise<void> {
    if (where === 'software') this.side().add(handle, sa, progress?.software);
    else this.#options.device?.carry(handle);
    this.enter(handle, sa, where, progress);
  }

  /** As `SaThread.take`, at once. */
  take(handle: number): SaProgress {
    const { state, device } = this.#options;
    if (state.place[handle] === SaPlace.inlineOutbound) {
      const counted = state.progress(handle);
      device?.leave(handle);
      state.remove(handle);
      return { state: counted, software: null };
    }
    const software = this.side().take(handle);
    const { packets, bytes, told } = software.lifetime;
    state.remove(handle);
    const counted: StateProgress = {
      packets: Number(packets),
      bytes: Number(bytes),
      dropped: software.dropped,
      softExpired: told.includes('soft-packets') || told.includes('soft-bytes'),
      limits: null,
    };
    return { state: counted, software };
  }

  async sent(): Promise<boolean> {
    return (await this.#options.device?.quiesce()) ?? true;
  }

  /** With the key and salt that it has, a software SA goes on counting; with new ones it begins anew. */
  modifySoftware(managed: ManagedSa, sa: SecurityAssociation): void {
    const { handle } = managed;
    const software = this.side();
    if (sa.direction === 'inbound' || managed.claim.covers(sa)) {
      managed.claim.checkModify(sa);
      software.modify(handle, sa);
      managed.became(sa);
      return;
    }
    const next = software.counters(handle).sequence;
    const claim = this.#options.guard.claim(withNonces(sa, managed.keyId), 'software');
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

  /** The device has new parameters for an SA, which may be on this data path. */
  replaceInline(handle: number, sa: SecurityAssociation, rekeyed: boolean): void {
    const { state, mtu } = this.#options;
    if (state.place[handle] === SaPlace.none) return;
    state.replace(handle, sa, placeOf(sa, 'inline'), longestFrame(sa, mtu), selectorOf(sa), rekeyed);
  }

  /** Ends a software SA and its claim. */
  removeSoftware(managed: ManagedSa): void {
    if (this.software === null) return;
    const { sequence } = this.software.counters(managed.handle);
    this.software.remove(managed.handle);
    managed.claim.release(sequence);
  }

  /** What a software SA that is there has carried; null when there is no software side. */
  traffic(handle: number): SaTraffic | null {
    if (this.software === null) return null;
    const { packets, bytes, dropped, sequence, engine, softExpired } = this.software.counters(handle);
    return { packets, bytes, dropped, softExpired, sequence, engine };
  }

  /** Wipes all keys. */
  close(): void {
    this.software?.close();
    this.software = null;
  }
}
