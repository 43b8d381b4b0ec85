/**
 * The SAs that a NIC has: by their numbers, with the numbers that are free, and the SPIs of those that receive in software.
 */
import { IpsecError } from '../errors.ts';
import { ObjectIds } from '../virtio/object-ids.ts';
import type { SaHandle } from './ipsec.ts';
import type { ManagedSa } from './managed-sa.ts';
import type { SecurityAssociation } from './sa.ts';
import { identityOf } from './sa-facts.ts';

export class SaRegistry {
  readonly #ids: ObjectIds;
  readonly #sas = new Map<number, ManagedSa>();
  /** Protocol and SPI of software inbound SAs, and how many have them. */
  readonly #softwareInbound = new Map<string, number>();

  /** Handles are 1 to `handles`. */
  constructor(handles: number) {
    this.#ids = new ObjectIds(handles);
  }

  /** Takes a handle that nobody has. Throws IpsecError `SA_LIMIT`. */
  take(): number {
    const taken = this.#ids.take();
    if (taken === null) throw new IpsecError('SA_LIMIT', `there are ${this.#ids.limit} SAs already`);
    return taken.id + 1;
  }

  /** Nobody can take the handle for an SA any more. */
  give(handle: number): void {
    this.#ids.give(handle - 1);
  }

  get(handle: number): ManagedSa | undefined {
    return this.#sas.get(handle);
  }

  /** Oldest first. */
  list(): ManagedSa[] {
    return [...this.#sas.values()];
  }

  has(managed: ManagedSa): boolean {
    return this.#sas.get(managed.handle) === managed;
  }

  enter(managed: ManagedSa): void {
    this.#sas.set(managed.handle, managed);
  }

  /** The SA is over; its handle is still taken. */
  leave(managed: ManagedSa): void {
    this.#sas.delete(managed.handle);
  }

  /** All are over. */
  clear(): void {
    this.#sas.clear();
  }

  /** How many software inbound SAs have the protocol and SPI of `sa`. They may share them when their destinations differ. */
  twins(sa: Pick<SecurityAssociation, 'protocol' | 'spi'>): number {
    return this.#softwareInbound.get(identityOf(sa)) ?? 0;
  }

  /** A software SA has come, or gone; outbound ones do not count. */
  countTwins(sa: Pick<SaHandle, 'direction' | 'protocol' | 'spi'>, by: 1 | -1): void {
    if (sa.direction === 'outbound') return;
    const identity = identityOf(sa);
    const count = (this.#softwareInbound.get(identity) ?? 0) + by;
    if (count === 0) this.#softwareInbound.delete(identity);
    else this.#softwareInbound.set(identity, count);
  }
}
