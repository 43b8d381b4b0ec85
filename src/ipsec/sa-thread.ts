/**
 * Threads that have SAs of their own: what the control path asks of them, however they are reached. An SA is on the data path of one thread
 * (an inbound SA of the device on all, because the device counts its numbers), so its sequence numbers, nonces and replay window are kept
 * in one place.
 */
import type { SoftwareProgress } from '../fallback/sa-progress.ts';
import type { SaEvents } from './ipsec.ts';
import type { Where } from './placement.ts';
import type { SecurityAssociation } from './sa.ts';
import type { SaCounts, StateProgress } from './sa-state.ts';

/** How far an SA has come on one data path, for it to go on on another. It holds no key. */
export interface SaProgress {
  readonly state: StateProgress;
  /** Null for an SA of the device, which does the counting. */
  readonly software: SoftwareProgress | null;
}

/** An SA for the data path of a thread. */
export interface SaEntry {
  readonly handle: number;
  readonly where: Where;
  readonly sa: SecurityAssociation;
  /** Inline: id of the object on the device, and whether the id had another SA before. */
  readonly object: { readonly id: number; readonly reused: boolean } | null;
  /** When it has been on another data path. */
  readonly progress?: SaProgress;
}

/** A data path to which an SA can go: that of a thread, or of the thread that opened the NIC. */
export interface SaPath {
  /** As `SaThread.add`. */
  add(entry: SaEntry): Promise<void>;
  /** Resolves when what was given to the device before has been sent; to false when it has not after time enough. Never rejects. */
  sent(): Promise<boolean>;
}

/**
 * A thread with an open queue. Each method resolves when the thread has done it, between two bursts, and rejects with VirtioError
 * `QUEUE_TIMEOUT` or `QUEUE_GONE` when it does not come to it.
 */
export interface SaThread extends SaPath {
  /** Index of its queue pair. */
  readonly index: number;
  readonly counts: SaCounts;
  /**
   * Takes the SA off, for it to go on elsewhere: from now on packets that name it are dropped, and how far it has come stays true. When it rejects with
   * `QUEUE_TIMEOUT`, the SA is where it was.
   */
  take(handle: number): Promise<SaProgress>;
  /** Throws also what `SoftwareIpsec.add` throws. After any error the SA is not on the data path, or its thread is gone. */
  add(entry: SaEntry): Promise<void>;
  /** Resolves to the sequence number that the next packet would have had; null when it did not run in software. */
  modify(entry: SaEntry, rekeyed: boolean): Promise<bigint | null>;
  /** Like `modify`. When the thread was too slow, it will remove the SA when it comes to it. */
  remove(handle: number): Promise<bigint | null>;
}

export interface SaThreads {
  /** By handle: 0, 1 for the control thread, or 2 and more for others. Shared. */
  readonly owners: Uint16Array;
  /**
   * The thread that has queue pair `queue`, or that of SAs for which none is named; null for the control thread. Throws IpsecError
   * `SA_QUEUE` when nobody has it.
   */
  owner(queue: number | undefined): SaThread | null;
  /** All of them. */
  open(): readonly SaThread[];
}

/** What is told to whoever manages the SAs. */
export interface ThreadListener {
  threadOpened(thread: SaThread): void;
  threadEnded(
    thread: SaThread,
    sequences: ReadonlyMap<number, bigint>,
    closing: boolean,
    isSent: boolean,
  ): Promise<void>;
  threadReset(thread: SaThread): void;
  threadEvent(handle: number, event: keyof SaEvents, args: SaEvents[keyof SaEvents]): void;
}

/** In `owners`. */
const CONTROL_THREAD = 1;

export function ownerNumber(thread: SaThread | null): number {
  return thread === null ? CONTROL_THREAD : thread.index + 2;
}
