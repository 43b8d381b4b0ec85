/**
 * An SA as the application holds it: its number, its listeners, its last counters.
 */
import { inspect } from 'node:util';
import { IpsecError } from '../errors.ts';
import { type Description, describeHandle } from './describe.ts';
import type { RedactedSaObject, SaEvents, SaHandle, SaTraffic } from './ipsec.ts';
import { keyId } from './key-id.ts';
import type { MoveOptions } from './move.ts';
import type { NonceClaim } from './nonce-guard.ts';
import type { Placement, Where } from './placement.ts';
import type { Direction, Mode, Protocol, SecurityAssociation } from './sa.ts';
import { namedCounters, type StateProgress } from './sa-state.ts';
import type { SaThread } from './sa-thread.ts';
import type { SecurityAssociationInput } from './validate.ts';

/** Who does what an SA is asked to do: the manager. */
export interface SaOwner {
  traffic(sa: ManagedSa): SaTraffic;
  query(sa: ManagedSa): Promise<RedactedSaObject | null>;
  modify(sa: ManagedSa, input: SecurityAssociationInput): Promise<void>;
  move(sa: ManagedSa, where: Where, input: SecurityAssociationInput, options: MoveOptions): Promise<void>;
  moveToQueue(sa: ManagedSa, queue: number, input: SecurityAssociationInput): Promise<void>;
  /** What `ManagedSa.is` compares. */
  idOf(sa: SecurityAssociation): string;
  remove(sa: ManagedSa): Promise<void>;
}

type Used = Pick<SaTraffic, 'packets' | 'bytes'>;

const NOTHING_USED: Used = { packets: 0n, bytes: 0n };

type Listeners = { [E in keyof SaEvents]: Set<(...args: SaEvents[E]) => void> };

/** An SA as the application holds it. It knows no key. */
export class ManagedSa implements SaHandle {
  readonly handle: number;
  readonly name: string | undefined;
  readonly direction: Direction;
  readonly protocol: Protocol;
  readonly mode: Mode;
  readonly spi: number;
  placement: Placement;
  claim: NonceClaim;
  /** Stands for its key; see `keyId`. */
  keyId: string;
  /** The sequence number that it started with, in the words of `SecurityAssociation.initial`. */
  start: bigint;
  replayWindow: number;
  /** The thread that has it on its data path, or to which it is on its way; null for the one that opened the NIC. */
  thread: SaThread | null;
  /** A thread that has had it may still have packets in its ring that name its object. */
  lingers = false;
  /** A thread has told that a soft limit was reached. */
  softExpired = false;
  /** What its key carried where it was before. */
  usedBefore: Used = NOTHING_USED;
  /** Settles when the modify or move that is under way has ended. */
  #busy: Promise<void> | null = null;
  /** What the rules of an inbound SA look at. */
  readonly #way: string;
  readonly #owner: SaOwner;
  #listeners: Listeners | null = null;
  /** What it had carried where it was before. */
  #carried: SaTraffic | null = null;
  #finalTraffic: SaTraffic | null = null;
  /** What it has carried, while it is on no data path. */
  #underway: SaTraffic | null = null;
  #id: string;

  constructor(
    owner: SaOwner,
    handle: number,
    sa: SecurityAssociation,
    placement: Placement,
    claim: NonceClaim,
    thread: SaThread | null = null,
  ) {
    this.#owner = owner;
    this.thread = thread;
    this.handle = handle;
    this.name = sa.name;
    this.direction = sa.direction;
    this.protocol = sa.protocol;
    this.mode = sa.mode;
    this.spi = sa.spi;
    this.placement = placement;
    this.claim = claim;
    this.keyId = keyId(sa);
    this.#id = owner.idOf(sa);
    this.start = sa.initial.sequence;
    this.replayWindow = sa.replayWindow;
    this.#way = sa.direction === 'inbound' ? wayOf(sa) : '';
  }

  get queue(): number | null {
    return this.thread?.index ?? null;
  }

  traffic(): SaTraffic {
    if (this.#finalTraffic !== null) return this.#finalTraffic;
    const now = this.#underway ?? this.#owner.traffic(this);
    return this.#carried === null ? now : sum(this.#carried, now);
  }

  query(): Promise<RedactedSaObject | null> {
    return this.#owner.query(this);
  }

  modify(sa: SecurityAssociationInput): Promise<void> {
    return this.#owner.modify(this, sa);
  }

  move(where: Where, sa: SecurityAssociationInput, options: MoveOptions = {}): Promise<void> {
    return this.#owner.move(this, where, sa, options);
  }

  moveToQueue(queue: number, sa: SecurityAssociationInput): Promise<void> {
    return this.#owner.moveToQueue(this, queue, sa);
  }

  get busy(): boolean {
    return this.#busy !== null;
  }

  remove(): Promise<void> {
    return this.#owner.remove(this);
  }

  toJSON(): Description {
    return describeHandle(this);
  }

  [inspect.custom](): Description {
    return describeHandle(this);
  }

  on<E extends keyof SaEvents>(event: E, listener: (...args: SaEvents[E]) => void): this {
    this.#listeners ??= {
      'soft-expiry': new Set(),
      'hard-expiry': new Set(),
      'sequence-low': new Set(),
      'sequence-overflow': new Set(),
    };
    this.#listeners[event].add(listener);
    return this;
  }

  off<E extends keyof SaEvents>(event: E, listener: (...args: SaEvents[E]) => void): this {
    this.#listeners?.[event].delete(listener);
    return this;
  }

  tell<E extends keyof SaEvents>(event: E, args: SaEvents[E]): void {
    if (this.#listeners === null) return;
    for (const listener of this.#listeners[event]) listener(...args);
  }

  /** The counters are about to go: keeps them as they are. */
  keepTraffic(): void {
    this.#finalTraffic = this.traffic();
  }

  /** Resolves when no modify or move is under way; at once when there is none. */
  async idle(): Promise<void> {
    while (this.#busy !== null) await this.#busy;
  }

  /** Runs a modify or move behind those that are under way. */
  async exclusive(work: () => Promise<void>): Promise<void> {
    // Whoever waits looks again himself: another may have been faster.
    while (this.#busy !== null) await this.#busy;
    const done = work();
    this.#busy = done.catch(() => {});
    try {
      await done;
    } finally {
      this.#busy = null;
    }
  }

  /** What its key has carried, given what it has where it is: not less, when the key was changed there. */
  used({ packets, bytes }: Used): Used {
    return { packets: packets + this.usedBefore.packets, bytes: bytes + this.usedBefore.bytes };
  }

  /** It goes on elsewhere as `sa`, where counters begin anew; keeps what was counted so far. */
  moved(sa: SecurityAssociation, placement: Placement): void {
    const here = this.#owner.traffic(this);
    this.#carried = this.traffic();
    const used = this.used(here);
    this.usedBefore = this.became(sa) ? NOTHING_USED : used;
    this.start = sa.initial.sequence;
    this.placement = placement;
  }

  /** Whether it is on no data path, on the way from one thread to another. */
  get isUnderway(): boolean {
    return this.#underway !== null;
  }

  /** Its thread has let go of it, when it had come so far; `thread` is to have it. */
  leaveFor(thread: SaThread | null, { packets, bytes, dropped, softExpired }: StateProgress): void {
    this.softExpired ||= softExpired;
    this.#underway = {
      packets: BigInt(packets),
      bytes: BigInt(bytes),
      dropped: namedCounters(dropped),
      softExpired: this.softExpired,
    };
    this.thread = thread;
  }

  /** Its thread has it. */
  arrived(): void {
    this.#underway = null;
  }

  /** Whether `sa` is this SA, whatever its name and what it begins with. */
  is(sa: SecurityAssociation): boolean {
    return this.#owner.idOf(sa) === this.#id;
  }

  /** It has new parameters. Says whether they come with a new key. */
  became(sa: SecurityAssociation): boolean {
    const id = keyId(sa);
    const rekeyed = id !== this.keyId;
    if (rekeyed) {
      this.softExpired = false;
      this.start = sa.initial.sequence;
      this.usedBefore = NOTHING_USED;
    }
    this.keyId = id;
    this.#id = this.#owner.idOf(sa);
    this.replayWindow = sa.replayWindow;
    return rekeyed;
  }

  /** Throws unless `sa` is this SA with other parameters. */
  refuseOther(sa: SecurityAssociation): void {
    if (this.#finalTraffic !== null) throw new IpsecError('NO_SUCH_SA', 'the SA was removed');
    for (const field of ['direction', 'protocol', 'mode', 'spi'] as const) {
      if (sa[field] === this[field]) continue;
      throw new IpsecError('SA_MODIFY', `a modify cannot change the ${field} of an SA`, { path: `sa.${field}` });
    }
    if (sa.direction === 'inbound' && wayOf(sa) !== this.#way) {
      throw new IpsecError('SA_MODIFY', 'a modify cannot change how packets find an inbound SA', { path: 'sa.tunnel' });
    }
  }
}

/** `now` with the counts of `before` added. */
function sum(before: SaTraffic, now: SaTraffic): SaTraffic {
  const dropped = { ...before.dropped };
  for (const [why, count] of Object.entries(now.dropped)) dropped[why] = (dropped[why] ?? 0) + count;
  const softExpired = before.softExpired || now.softExpired;
  return { ...now, packets: before.packets + now.packets, bytes: before.bytes + now.bytes, dropped, softExpired };
}

/** How packets find an inbound SA: destination and UDP encapsulation, as bytes. */
function wayOf(sa: SecurityAssociation): string {
  const destination = sa.tunnel?.destination ?? sa.selector.destination?.address ?? [];
  const ports = sa.udpEncap === undefined ? [] : [sa.udpEncap.sourcePort, sa.udpEncap.destinationPort];
  return Buffer.from([...destination, ...ports.flatMap((port) => [port >>> 8, port & 0xff])]).toString('latin1');
}
