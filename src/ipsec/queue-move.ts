/**
 * Moves a live SA from the data path of one thread to that of another, in software or, outbound, on the device.
 *
 * ```
 *   take   the thread that has it lets go of it, between two bursts, and says how far it has come      failure: all is as it was
 *          on no thread: its packets are dropped as `foreign-sa`, inbound ones stay what they are
 *   sent   what that thread has given to the device has been sent, so that packets keep their order
 *   add    the other thread goes on behind it                                                         failure: back to where it was
 * ```
 *
 * The numbers go on where they ended, because the one has stopped before the other begins, and what it said is used once. When a thread ends while
 * the SA is its own, or on the way to it, the SA is over, and its claim on nonces ends as ever: with what the thread has said when it let go, else
 * all of them count as used. The SA is what it was in everything; `modify` changes it.
 */
import { IpsecError } from '../errors.ts';
import type { InlineIpsec } from './inline.ts';
import type { ManagedSa } from './managed-sa.ts';
import type { OwnSas } from './own-sas.ts';
import type { QueueSas } from './queue-sas.ts';
import type { SecurityAssociation } from './sa.ts';
import type { SaRegistry } from './sa-registry.ts';
import type { SaPath, SaProgress, SaThread } from './sa-thread.ts';
import type { ThreadSas } from './thread-sas.ts';

/** What is used of the manager's parts. */
export interface QueueMoveParts {
  readonly own: Pick<OwnSas, 'take' | keyof SaPath>;
  readonly registry: SaRegistry;
  readonly queues: QueueSas;
  readonly threads: ThreadSas;
  readonly device: Pick<InlineIpsec, 'objectOf'> | null;
}

/** `to` is null for the thread that opened the NIC. Throws as `SaHandle.moveToQueue`. */
export async function moveToQueue(
  parts: QueueMoveParts,
  managed: ManagedSa,
  sa: SecurityAssociation,
  to: SaThread | null,
): Promise<void> {
  const { registry, queues, threads } = parts;
  const from = managed.thread;
  checkMove(managed, sa, to);
  const progress = from === null ? parts.own.take(managed.handle) : await from.take(managed.handle);
  checkThere(registry, managed);
  managed.leaveFor(to, progress.state);
  try {
    const isSent = await pathOf(parts, from).sent();
    managed.lingers ||= !isSent && managed.placement.where === 'inline';
    await enter(parts, managed, sa, progress);
  } catch (error) {
    // A thread that has ended has taken the SA with it.
    if (!registry.has(managed)) throw error;
    managed.thread = from;
    try {
      await enter(parts, managed, sa, progress);
    } catch {
      if (registry.has(managed)) await threads.lost(managed);
      throw error;
    }
    managed.arrived();
    throw error;
  }
  queues.own(managed.handle, to);
  managed.arrived();
}

function checkMove(managed: ManagedSa, sa: SecurityAssociation, to: SaThread | null): void {
  managed.refuseOther(sa);
  if (managed.placement.where === 'inline' && managed.direction === 'inbound') {
    throw new IpsecError('SA_MOVE', 'an inbound SA of the device is on all queues');
  }
  if (!managed.is(sa)) {
    const hint = 'Give the SA as it was made or last modified, with its key.';
    throw new IpsecError('SA_MOVE', 'a move to another queue changes nothing of an SA', { hint });
  }
  if (managed.thread === to) throw new IpsecError('SA_MOVE', 'the thread of that queue has the SA already');
}

function pathOf({ own }: QueueMoveParts, thread: SaThread | null): SaPath {
  return thread ?? own;
}

/** Its thread, or the NIC, may have ended meanwhile. */
function checkThere(registry: SaRegistry, managed: ManagedSa): void {
  if (!registry.has(managed)) throw new IpsecError('NO_SUCH_SA', 'the SA was over before it could move');
}

/** Enters the SA on the data path of `managed.thread`. */
async function enter(
  parts: QueueMoveParts,
  managed: ManagedSa,
  sa: SecurityAssociation,
  progress: SaProgress,
): Promise<void> {
  checkThere(parts.registry, managed);
  const { handle, thread } = managed;
  const { where } = managed.placement;
  const object = where === 'inline' ? (parts.device?.objectOf(handle) ?? null) : null;
  await pathOf(parts, thread).add({ handle, sa, where, object, progress });
  checkThere(parts.registry, managed);
}
