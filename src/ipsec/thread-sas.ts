/**
 * What becomes of SAs of worker threads: when one is removed, when its thread tells something, lets go of its queue, or dies.
 */
import type { InlineIpsec } from './inline.ts';
import type { SaEvents } from './ipsec.ts';
import type { ManagedSa } from './managed-sa.ts';
import type { QueueSas } from './queue-sas.ts';
import type { SaListeners } from './sa-listeners.ts';
import type { SaRegistry } from './sa-registry.ts';
import type { SaState } from './sa-state.ts';
import type { SaThread, ThreadListener } from './sa-thread.ts';

/** What is used of the manager's parts. */
export interface ThreadSasParts {
  readonly registry: SaRegistry;
  readonly queues: QueueSas;
  readonly listeners: SaListeners;
  readonly state: SaState;
  readonly device: Pick<InlineIpsec, 'destroy' | 'reuse'> | null;
}

export class ThreadSas implements ThreadListener {
  readonly #parts: ThreadSasParts;
  /** Ids of objects of which packets may be in the rings of threads that have ended. */
  readonly #named = new Map<SaThread, number[]>();

  constructor(parts: ThreadSasParts) {
    this.#parts = parts;
  }

  /** Ends an SA once its thread has let go of it. A handle of which that is not known is not used again. */
  async remove(managed: ManagedSa, thread: SaThread): Promise<void> {
    const { registry, queues } = this.#parts;
    registry.leave(managed);
    const gone = await queues.remove(thread, managed);
    managed.keepTraffic();
    // In software what is in the ring is protected already, and names no object.
    const isSent = managed.placement.where === 'software' || (gone && (await thread.sent()));
    await this.#end(managed, gone, isSent);
  }

  /** An SA is on no data path, and on none where it could go on: it is over, and all its nonces count as used. */
  async lost(managed: ManagedSa): Promise<void> {
    this.#parts.registry.leave(managed);
    managed.keepTraffic();
    managed.claim.release();
    await this.#end(managed, true);
  }

  /** `isSent`: no packet that names its object is in the thread's ring any more. Else resolves to the id, if that ring alone may have it. */
  async #end(managed: ManagedSa, gone: boolean, isSent = true): Promise<number | null> {
    const { registry, queues, device } = this.#parts;
    const { handle } = managed;
    let id: number | null = null;
    if (managed.placement.where === 'software') registry.countTwins(managed, -1);
    else id = (await device?.destroy(handle, !gone || !isSent || managed.lingers)) ?? null;
    queues.own(handle, undefined);
    if (gone) registry.give(handle);
    return managed.lingers ? null : id;
  }

  /**
   * A thread has let go of its queue, or died: its SAs are over. `sequences` are the next sequence numbers of those that sent in software;
   * of others every number counts as used. With `closing` their objects are left to the reset of the device that follows. Unless `isSent`, the
   * ids of these are not used again until the ring has been reset.
   */
  async threadEnded(
    thread: SaThread,
    sequences: ReadonlyMap<number, bigint>,
    closing = false,
    isSent = false,
  ): Promise<void> {
    const { registry, queues } = this.#parts;
    const ends: Promise<unknown>[] = [];
    const end = async (managed: ManagedSa) => {
      const id = await this.#end(managed, true, isSent);
      if (id !== null) this.#named.set(thread, [...(this.#named.get(thread) ?? []), id]);
    };
    for (const managed of registry.list()) {
      if (managed.thread !== thread) continue;
      registry.leave(managed);
      managed.keepTraffic();
      managed.claim.release(sequences.get(managed.handle));
      if (!closing) ends.push(end(managed));
    }
    queues.ended(thread);
    await Promise.allSettled(ends);
  }

  /** The ring of a thread that has ended is empty. */
  threadReset(thread: SaThread): void {
    for (const id of this.#named.get(thread) ?? []) this.#parts.device?.reuse(id);
    this.#named.delete(thread);
  }

  /** A thread has opened its queue: it learns of the inbound SAs of the device. */
  threadOpened(thread: SaThread): void {
    this.#parts.queues.opened(thread);
  }

  /** A thread tells of an SA. */
  threadEvent(handle: number, event: keyof SaEvents, args: SaEvents[keyof SaEvents]): void {
    const { registry, state, listeners } = this.#parts;
    const managed = registry.get(handle);
    if (managed === undefined) return;
    if (managed.thread === null) {
      // Several queues may see the same flag of the device.
      if (event === 'soft-expiry') state.deviceSoftExpiry(handle);
      return;
    }
    if (event === 'soft-expiry') managed.softExpired = true;
    listeners.tell(handle, event, args);
  }
}
