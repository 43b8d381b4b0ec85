/**
 * IPsec as an application sees it: one interface, whether the NIC or the library does the work.
 *
 * `addSa` returns a handle; a packet carries its number (`pool.sa[p] = handle.handle`) to be protected by it, and a received packet
 * that was protected has the number of the SA that protected it. 0 is in the clear.
 */
import type { EngineName } from '../fallback/engines/engine.ts';
import type { InlineCapability } from './capability.ts';
import type { Description } from './describe.ts';
import type { MoveOptions } from './move.ts';
import type { Placement, Where } from './placement.ts';
import type { Direction, Mode, Protocol } from './sa.ts';
import type { SecurityAssociationInput } from './validate.ts';
import type { SaObject } from './wire/codec.ts';

/**
 * What happens to an SA, each told once per key and place: from the device's flags, from the driver's counters of inline SAs, from the
 * counters of software SAs. The limits of an inbound SA on the device are the device's to enforce; the driver tells of the hard one when what
 * it was given has used it up, so a device that drops packets on the way may have ended the SA sooner. The soft one is what to act on.
 */
export interface SaEvents {
  /** A soft limit was reached: time to negotiate a new SA. */
  'soft-expiry': [limit: 'packets' | 'bytes' | 'device'];
  /** A hard limit was reached: the SA carries nothing more. */
  'hard-expiry': [limit: 'packets' | 'bytes'];
  /** Fewer than 2^29 sequence numbers are left. */
  'sequence-low': [];
  /** None is left: the SA carries nothing more (RFC 4303, 3.3.3). */
  'sequence-overflow': [];
}

/** One entry of the stream of all SAs' events. */
export interface SaNotification {
  readonly sa: SaHandle;
  readonly event: keyof SaEvents;
  /** Which limit was reached, when the event is about one. */
  readonly limit: 'packets' | 'bytes' | 'device' | null;
}

/** Traffic of one SA. */
export interface SaTraffic {
  readonly packets: bigint;
  /** Bytes of IP packet without protection. For an inline SA counted by the driver, from what was sent and delivered. */
  readonly bytes: bigint;
  /** Packets dropped on this SA in the driver, by reason; names as `vipsec esp --json` has them. */
  readonly dropped: Readonly<Record<string, number>>;
  readonly softExpired: boolean;
  /** Software only: number of the next packet (outbound), or the highest accepted (inbound). */
  readonly sequence?: bigint;
  /** Software only: what does the arithmetic. */
  readonly engine?: EngineName;
}

/** An SA object as the device keeps it, without its keys and salt. */
export interface RedactedSaObject extends Omit<SaObject, 'cipherKey' | 'authKey' | 'salt'> {
  readonly cipherKeyLength: number;
  readonly authKeyLength: number;
}

/** An SA that exists. */
export interface SaHandle {
  /** The number that packets carry: 1 or more. */
  readonly handle: number;
  readonly name: string | undefined;
  readonly direction: Direction;
  readonly protocol: Protocol;
  readonly mode: Mode;
  readonly spi: number;
  readonly placement: Placement;
  /** Queue pair whose worker thread has the SA; null for the thread that opened the NIC. An inbound SA of the device is on all queues. */
  readonly queue: number | null;
  traffic(): SaTraffic;
  /** Inline only: asks the device what it keeps (RESOURCE_OBJ_QUERY). Null for a software SA. */
  query(): Promise<RedactedSaObject | null>;
  /**
   * Replaces the parameters of the SA where it is. Direction, protocol, mode and SPI stay. Fails as a whole or not at all. Throws IpsecError
   * `SA_MODIFY`, `NONCE_REUSE`, `NOT_OFFLOADABLE`, those of validation; AdminCommandError.
   */
  modify(sa: SecurityAssociationInput): Promise<void>;
  /**
   * Moves the SA from the device to software or back. `sa` is the SA with its key, because the driver keeps none; with the key that it
   * has, its numbers go on and `initial` is not looked at. Allowed only where it surely repeats no sequence number and no nonce and
   * accepts no packet twice; the table is in `move-plan.ts`. Fails as a whole or not at all; but when only letting go of the old place
   * fails, the SA has moved and `placement` says so. Throws IpsecError `SA_MOVE`, `NONCE_REUSE`, `SA_MODIFY`, `NOT_OFFLOADABLE`,
   * `SOFTWARE_NOT_AVAILABLE`, those of validation; AdminCommandError; VirtioError.
   */
  move(where: Where, sa: SecurityAssociationInput, options?: MoveOptions): Promise<void>;
  /**
   * Moves an outbound SA, or a software inbound one, to the thread that has queue pair `queue`, while packets flow. `sa` is the SA as it was made
   * or last modified, with its key, because the driver keeps none; `name` and `initial` are not looked at. Sequence number, IV, replay window,
   * counters and limits go on; on the way, its packets are dropped as `foreign-sa`, and inbound ones delivered as the ESP that they are. The
   * packets of an inbound SA have to be steered to the new queue by whoever steers. When it fails the SA is where it was, or over if a thread ended:
   * then `Ipsec.get` has it no more. Throws IpsecError `SA_MOVE`, `SA_MODIFY`, `SA_QUEUE`, `NO_SUCH_SA`, those of validation; VirtioError
   * `QUEUE_TIMEOUT`, `QUEUE_GONE`.
   */
  moveToQueue(queue: number, sa: SecurityAssociationInput): Promise<void>;
  /** Ends the SA. Packets that still name it are dropped. Idempotent. */
  remove(): Promise<void>;
  on<E extends keyof SaEvents>(event: E, listener: (...args: SaEvents[E]) => void): this;
  off<E extends keyof SaEvents>(event: E, listener: (...args: SaEvents[E]) => void): this;
  /** What `JSON.stringify` writes: what the SA is, where it runs, what it has carried; no key. */
  toJSON(): Description;
}

/** A key whose nonces somebody counts outside of an SA. */
export interface KeyReservation {
  /** It is over: explicit IVs below `nextIv` have been used. */
  release(nextIv: bigint): void;
}

export interface AddSaOptions {
  /** Refuse the SA rather than place it elsewhere. */
  readonly require?: Where;
  /**
   * The queue pair that is to use the SA, and with it its thread: packets for it are dropped on queues of other threads. Its worker must
   * have opened it. Without it an SA is for the thread that opened the NIC, or for queue pair 0 when that thread has no queues. An inbound
   * SA that runs on the device is on all queues.
   */
  readonly queue?: number;
}

export interface Ipsec {
  /** What the device does inline; null when it does nothing, and then `inlineObstacle` says why. */
  readonly inline: InlineCapability | null;
  readonly inlineObstacle: string | null;
  /**
   * Makes an SA, inline when the device can express all of it, else in software. Keys are copied where they are used and kept nowhere
   * else. Throws IpsecError: those of validation; `NOT_OFFLOADABLE`, `SOFTWARE_NOT_AVAILABLE`, `NO_PLACE_FOR_SA`; `SA_EXISTS`; `SA_LIMIT`;
   * `NONCE_REUSE`; `SA_QUEUE` when no thread has opened the queue; VirtioError `QUEUE_TIMEOUT`, `QUEUE_GONE`; or AdminCommandError when inline is required and the device refuses.
   */
  addSa(sa: SecurityAssociationInput, options?: AddSaOptions): Promise<SaHandle>;
  /** The SA with number `handle`. */
  get(handle: number): SaHandle | undefined;
  /** All SAs, oldest first. */
  list(): SaHandle[];
  /**
   * Reserves the key and salt of `sa` for somebody who encrypts with them and counts IVs up from 0. No SA gets them meanwhile, and none
   * afterwards that would repeat an IV. Throws IpsecError `NONCE_REUSE`, those of validation.
   */
  reserveKey(sa: SecurityAssociationInput): KeyReservation;
  /** Calls `listener` when the NIC ends and with it all SAs, for whoever has keys of its own to wipe. Returns how to stop. */
  onClose(listener: () => void): () => void;
  /** Calls `listener` with what happens to any SA, as `SaHandle.on` does for one. Returns how to stop. */
  onSaEvent(listener: (notification: SaNotification) => void): () => void;
}
