/**
 * Moves a live SA between the device and software, or refuses: `move-plan.ts` has the rules.
 *
 * The SA is made in its new place first, unreachable for packets; then, between two bursts, everything that a packet looks at is switched; then
 * the old place lets go. If anything fails before the switch, the SA is as it was. Outbound no packet is lost. Inbound,
 * packets that the device has processed before the switch, or that are in a ring then, may count as not secured.
 */
import { AdminCommandError, IpsecError, type VipsecError } from '../errors.ts';
import type { InlineIpsec } from './inline.ts';
import type { SaTraffic } from './ipsec.ts';
import { keyId } from './key-id.ts';
import type { ManagedSa } from './managed-sa.ts';
import { type MovePlan, planMove } from './move-plan.ts';
import type { MoveTarget, NonceClaim, NonceGuard } from './nonce-guard.ts';
import type { SoftwareSide } from './own-sas.ts';
import type { Where } from './placement.ts';
import type { Lifetime, SecurityAssociation } from './sa.ts';

export interface MoveOptions {
  /** The device is known to use the sequence number of a packet as its explicit IV. No revision of virtio says so. */
  readonly deviceIvIsSequence?: boolean;
}

/** What a move needs of the manager. */
export interface MoveParts {
  readonly guard: NonceGuard;
  readonly device: () => InlineIpsec;
  readonly software: () => SoftwareSide;
  readonly traffic: (managed: ManagedSa) => SaTraffic;
  /** Why `sa`, which is `managed` now, cannot be there, or null. */
  readonly obstacle: (managed: ManagedSa, sa: SecurityAssociation, where: Where) => string | null;
  /** Takes the SA off one side of the data path, with what it has carried, and enters it on the other. */
  readonly switchOver: (managed: ManagedSa, sa: SecurityAssociation, where: Where) => void;
  /** Why there are no SAs any more, or null. */
  readonly closed: () => VipsecError | null;
}

const HINT = 'Give the SA a new key, or make a new SA beside it and let the old one go.';

/** `sa` is the SA as it is to be, with its key. Throws as `SaHandle.move` says. */
export async function moveSa(
  parts: MoveParts,
  managed: ManagedSa,
  where: Where,
  sa: SecurityAssociation,
  options: MoveOptions,
): Promise<void> {
  // An SA may keep the key of its authenticator and get another one for its cipher, which has nonces of its own.
  const sameKey = managed.keyId === keyId(sa) && managed.claim.covers(sa);
  const target: MoveTarget = where === 'inline' && options.deviceIvIsSequence === true ? 'inline-sequence' : where;
  const before = parts.traffic(managed);
  const plan = planned(parts, managed, sa, where, sameKey, before);
  const initial = plan.initial === 'given' ? sa.initial : { ...sa.initial, sequence: plan.initial };
  const lifetime = (now: SaTraffic) => (sameKey ? remaining(sa.lifetime, managed.used(now)) : sa.lifetime);
  const moved: SecurityAssociation = { ...sa, initial, lifetime: lifetime(before) };
  const obstacle = parts.obstacle(managed, moved, where);
  if (obstacle !== null) {
    const code = where === 'inline' ? 'NOT_OFFLOADABLE' : 'SOFTWARE_NOT_AVAILABLE';
    throw new IpsecError(code, `the SA cannot move: ${obstacle}`);
  }
  const nonces = new NonceMove(parts, managed, moved, target, sameKey);
  if (where === 'software') return toSoftware(parts, managed, moved, nonces);
  await toInline(parts, managed, moved, nonces, () => {
    const now = parts.traffic(managed);
    if (sameKey) checkStillTrue(managed, moved, now);
    nonces.check();
    return { ...moved, lifetime: lifetime(now) };
  });
}

function planned(
  parts: MoveParts,
  managed: ManagedSa,
  sa: SecurityAssociation,
  to: Where,
  sameKey: boolean,
  traffic: SaTraffic,
): Exclude<MovePlan, { refused: string }> {
  const plan = planMove({
    direction: managed.direction,
    to,
    sameKey,
    untouched: traffic.packets === 0n,
    sequence: traffic.sequence ?? null,
    start: managed.start,
    esn: sa.options.esn,
    windows: [managed.replayWindow, sa.replayWindow],
    hasInitialSequence: to === 'inline' && parts.device().capability.wire.hasInitialSequence,
  });
  if ('refused' in plan) throw refusal(plan.refused);
  return plan;
}

function refusal(why: string): IpsecError {
  return new IpsecError('SA_MOVE', `the SA cannot move: ${why}`, { hint: HINT });
}

/** `again` repeats the checks, because packets may have passed while the device was being told, and gives the SA as it is then. */
async function toInline(
  parts: MoveParts,
  managed: ManagedSa,
  sa: SecurityAssociation,
  nonces: NonceMove,
  again: () => SecurityAssociation,
): Promise<void> {
  const device = parts.device();
  const { handle } = managed;
  try {
    await device.create(handle, sa, true);
  } catch (error) {
    nonces.undo(error);
    throw error;
  }
  const closed = parts.closed();
  if (closed !== null) {
    nonces.undo(closed);
    throw closed;
  }
  let now: SecurityAssociation;
  try {
    now = again();
  } catch (error) {
    await device.destroy(handle).catch(() => {});
    nonces.undo(error);
    throw error;
  }
  nonces.done();
  parts.switchOver(managed, now, 'inline');
  if (sa.direction === 'inbound') device.deliver(handle);
}

/** The numbers that were used must still be behind those that will be, and a windowed SA untouched. */
function checkStillTrue(managed: ManagedSa, sa: SecurityAssociation, now: SaTraffic): void {
  const { sequence = 0n } = now;
  const touched = now.packets !== 0n;
  const inTime = sa.direction === 'outbound' ? sequence <= sa.initial.sequence : managed.replayWindow === 0;
  if (touched && !inTime) throw refusal('packets passed while the device was being told');
}

async function toSoftware(
  parts: MoveParts,
  managed: ManagedSa,
  sa: SecurityAssociation,
  nonces: NonceMove,
): Promise<void> {
  const device = parts.device();
  const { handle } = managed;
  try {
    parts.software().add(handle, sa);
  } catch (error) {
    nonces.cancel();
    throw error;
  }
  if (sa.direction === 'inbound') device.silence(handle);
  nonces.done();
  parts.switchOver(managed, sa, 'software');
  await device.destroy(handle);
}

/** What is left of the limits after what has passed. Throws IpsecError `SA_MOVE` when it is nothing. */
function remaining(lifetime: Lifetime, { packets, bytes }: Pick<SaTraffic, 'packets' | 'bytes'>): Lifetime {
  const hard = (limit: bigint, used: bigint) => {
    if (limit !== 0n && limit <= used) throw refusal('a hard limit of it has been reached');
    return limit === 0n ? 0n : limit - used;
  };
  // A soft limit that was reached has been told of.
  const soft = (limit: bigint, used: bigint) => (limit > used ? limit - used : 0n);
  return {
    softPackets: soft(lifetime.softPackets, packets),
    softBytes: soft(lifetime.softBytes, bytes),
    hardPackets: hard(lifetime.hardPackets, packets),
    hardBytes: hard(lifetime.hardBytes, bytes),
  };
}

/** The nonces of an SA that moves: the claim that it has goes along, or a new key gets a claim of its own. */
class NonceMove {
  readonly #parts: MoveParts;
  readonly #managed: ManagedSa;
  readonly #sa: SecurityAssociation;
  readonly #target: MoveTarget;
  /** Of a new key. */
  readonly #claim: NonceClaim | null;

  /** Throws IpsecError `NONCE_REUSE`. */
  constructor(parts: MoveParts, managed: ManagedSa, sa: SecurityAssociation, target: MoveTarget, sameKey: boolean) {
    this.#parts = parts;
    this.#managed = managed;
    this.#sa = sa;
    this.#target = target;
    this.#claim = sameKey ? null : parts.guard.claim(sa, target === 'software' ? 'software' : 'inline');
    this.check();
  }

  /** Throws IpsecError `NONCE_REUSE` when the nonces that come would repeat those that were. */
  check(): void {
    if (this.#claim !== null) return;
    this.#managed.claim.checkMove(this.#sa, this.#target, this.#next());
  }

  /** The number of the next packet where the SA is; null when none was sent. */
  #next(): bigint | null {
    const { packets, sequence } = this.#parts.traffic(this.#managed);
    if (packets === 0n) return null;
    return sequence ?? 1n << 64n;
  }

  done(): void {
    const next = this.#next();
    if (this.#claim === null) {
      this.#managed.claim.move(this.#sa, this.#target, next);
      return;
    }
    if (this.#managed.placement.where === 'software' && next !== null) this.#managed.claim.release(next);
    else if (next === null) this.#managed.claim.cancel();
    else this.#managed.claim.release();
    this.#managed.claim = this.#claim;
  }

  cancel(): void {
    this.#claim?.cancel();
  }

  /** Like `cancel`, but the device may have the SA unless it said no. */
  undo(error: unknown): void {
    if (error instanceof AdminCommandError || error instanceof IpsecError) this.#claim?.cancel();
    else this.#claim?.release();
  }
}
