/**
 * What the data path knows of SAs: typed arrays by handle, so that a burst costs no object.
 *
 * The driver counts what an inline SA carries, because nobody else does: the device tells of soft expiry on receive only, and the
 * standard does not say what it does when sequence numbers run out. So an inline outbound SA stops here, at its hard limit or after its
 * last sequence number, whatever the device would do. An inline inbound SA is stopped by the device; the driver tells
 * of its limits from what was delivered, which a device that dropped packets afterwards may have reached sooner.
 */
import { VERDICTS, Verdict, verdictNames } from '../fallback/verdict.ts';
import { Ipv4 } from '../packet/fields.ts';
import type { SaEvents } from './ipsec.ts';
import type { SecurityAssociation, Selector } from './sa.ts';
import { type Limits, limitsOf, numbersOf } from './sa-limits.ts';

/** Where the packets of a handle go. */
export const SaPlace = {
  none: 0,
  inlineOutbound: 1,
  softwareOutbound: 2,
  inlineInbound: 3,
  softwareInbound: 4,
} as const;

export type SaPlace = (typeof SaPlace)[keyof typeof SaPlace];

type Tell = <E extends keyof SaEvents>(handle: number, event: E, ...args: SaEvents[E]) => void;

/** Bytes of an IP packet without payload: with less left of a hard limit, an SA carries nothing more. */
const SMALLEST_PACKET = Ipv4.minLength;

/** More than a burst can count; a small integer. */
const FAR = 0x3fffffff;

/** What an SA has been said to have reached. */
const Told = { soft: 1, hard: 2, low: 4, overflow: 8 } as const;

/**
 * What a thread counts for SAs, by handle. One thread writes; in shared memory others may look at any time: a count is one aligned
 * store of 64 bits.
 */
export interface SaCounts {
  readonly packets: Float64Array;
  readonly bytes: Float64Array;
  /** `VERDICTS` for each handle; null to keep them elsewhere, which no other thread can see. */
  readonly dropped: Float64Array | null;
}

/** How far the limits of an inline SA are used up: see `Limits`. */
interface LimitsProgress {
  readonly packetsBefore: number;
  readonly bytesBefore: number;
  readonly lastAt: number;
  /** Bits of `Told`, and a `Verdict`. */
  readonly told: number;
  readonly over: number;
}

/** What has been counted for an SA, for it to go on on the data path of another thread. Plain data, which a message can carry. */
export interface StateProgress {
  readonly packets: number;
  readonly bytes: number;
  /** By `Verdict`. */
  readonly dropped: Float64Array;
  /** A soft limit has been reached, as far as is known there. */
  readonly softExpired: boolean;
  /** Null for a software SA. */
  readonly limits: LimitsProgress | null;
}

/** Counts for handles up to `capacity`, in shared memory. */
export function sharedCounts(capacity: number, buffer: SharedArrayBuffer = countsBuffer(capacity)): SaCounts {
  const n = capacity + 1;
  return {
    packets: new Float64Array(buffer, 0, n),
    bytes: new Float64Array(buffer, 8 * n, n),
    dropped: new Float64Array(buffer, 16 * n, n * VERDICTS),
  };
}

/** Most of it is never touched, and costs nothing then. */
export function countsBuffer(capacity: number): SharedArrayBuffer {
  return new SharedArrayBuffer(8 * (capacity + 1) * (2 + VERDICTS));
}

export class SaState {
  /** Handles are 1 to `capacity`. */
  readonly capacity: number;
  /** By handle: `SaPlace`. */
  readonly place: Uint8Array;
  /** Inline SAs, by handle: what has passed. */
  readonly packets: Float64Array;
  readonly bytes: Float64Array;
  /** Inline SAs, by handle: from here on `check` is to be asked. */
  readonly packetsAlert: Float64Array;
  readonly bytesAlert: Float64Array;
  /** Outbound SAs, by handle: the longest IP packet that fits the link when it is protected. */
  readonly longest: Uint32Array;
  /** Inline inbound SAs, by handle: 1 when the inner packet is to be held against a selector. */
  readonly selective: Uint8Array;
  /** By handle: 0, or which thread has the SA; null when there is one thread. Shared. */
  owners: Uint16Array | null = null;
  /** How many SAs there are of each kind. */
  outbound = 0;
  inlineInbound = 0;
  softwareInbound = 0;
  readonly #selectors = new Map<number, Selector>();
  /** Inline SAs, by handle. */
  readonly #limits: (Limits | undefined)[] = [];
  /** Inline SAs, by handle: bits of `Told`; and why nothing more may pass, once that is so. */
  readonly #told: Uint8Array;
  readonly #over: Uint8Array;
  readonly #dropped = new Map<number, Float64Array>();
  readonly #sharedDropped: Float64Array | null;
  readonly #softExpired = new Set<number>();
  readonly #tell: Tell;

  /** Handles are 1 to `capacity`; `counts` is where to count, default private memory. */
  constructor(capacity: number, tell: Tell, counts?: SaCounts) {
    this.capacity = capacity;
    this.#tell = tell;
    this.place = new Uint8Array(capacity + 1);
    this.packets = counts?.packets ?? new Float64Array(capacity + 1);
    this.bytes = counts?.bytes ?? new Float64Array(capacity + 1);
    this.#sharedDropped = counts?.dropped ?? null;
    this.packetsAlert = new Float64Array(capacity + 1);
    this.bytesAlert = new Float64Array(capacity + 1);
    this.longest = new Uint32Array(capacity + 1);
    this.selective = new Uint8Array(capacity + 1);
    this.#told = new Uint8Array(capacity + 1);
    this.#over = new Uint8Array(capacity + 1);
  }

  /** Enters an SA: from now on packets may name it. `longest` counts for outbound SAs. With `progress` counters and limits go on from there. */
  add(
    handle: number,
    sa: SecurityAssociation,
    place: SaPlace,
    longest: number,
    selector: Selector | null,
    progress: StateProgress | null = null,
  ): void {
    this.packets[handle] = progress?.packets ?? 0;
    this.bytes[handle] = progress?.bytes ?? 0;
    this.#sharedDropped?.fill(0, handle * VERDICTS, (handle + 1) * VERDICTS);
    this.#limits[handle] = undefined;
    this.replace(handle, sa, place, longest, selector, true);
    if (progress !== null) this.#goOn(handle, sa, progress);
    this.place[handle] = place;
    this.#count(place, 1);
  }

  /** What was counted so far for an SA that is there, and how far its limits are used up. */
  progress(handle: number): StateProgress {
    const limits = this.#limits[handle];
    return {
      packets: this.packets[handle],
      bytes: this.bytes[handle],
      dropped:
        this.#sharedDropped?.slice(handle * VERDICTS, (handle + 1) * VERDICTS) ??
        this.#dropped.get(handle)?.slice() ??
        new Float64Array(VERDICTS),
      softExpired: this.#softExpired.has(handle),
      limits:
        limits === undefined
          ? null
          : {
              packetsBefore: limits.packetsBefore,
              bytesBefore: limits.bytesBefore,
              lastAt: limits.lastAt,
              told: this.#told[handle],
              over: this.#over[handle],
            },
    };
  }

  #goOn(handle: number, { lifetime }: SecurityAssociation, { dropped, limits }: StateProgress): void {
    if (this.#sharedDropped !== null) this.#sharedDropped.set(dropped, handle * VERDICTS);
    else if (dropped.some((count) => count !== 0)) this.#dropped.set(handle, dropped.slice());
    if (limits === null) return;
    const { packetsBefore, bytesBefore, lastAt, told, over } = limits;
    const own = limitsOf(packetsBefore, bytesBefore, lastAt, lifetime);
    this.#limits[handle] = own;
    this.#told[handle] = told;
    this.#over[handle] = over;
    if ((told & Told.soft) !== 0) this.#softExpired.add(handle);
    this.#arm(handle, own);
    if (over !== Verdict.ok) this.packetsAlert[handle] = 0;
  }

  /**
   * New parameters for an SA that is there; what it has carried stays counted. With a new key, `rekeyed`, its limits and its sequence
   * numbers begin anew.
   */
  replace(
    handle: number,
    sa: SecurityAssociation,
    place: SaPlace,
    longest: number,
    selector: Selector | null,
    rekeyed: boolean,
  ): void {
    this.longest[handle] = longest;
    this.#softExpired.delete(handle);
    if (selector === null) this.#selectors.delete(handle);
    else this.#selectors.set(handle, selector);
    this.selective[handle] = selector === null ? 0 : 1;
    if (place === SaPlace.inlineOutbound || place === SaPlace.inlineInbound) this.#setLimits(handle, sa, rekeyed);
  }

  /** From now on packets that name the SA are dropped. Its counters stay until the handle is used again. */
  remove(handle: number): void {
    this.#count(this.place[handle], -1);
    this.place[handle] = SaPlace.none;
    this.selective[handle] = 0;
    this.#selectors.delete(handle);
    this.#limits[handle] = undefined;
    this.#dropped.delete(handle);
    this.#softExpired.delete(handle);
  }

  selector(handle: number): Selector | undefined {
    return this.#selectors.get(handle);
  }

  /** hot: counts what an inline SA has carried. */
  count(handle: number, packets: number, bytes: number): void {
    this.packets[handle] += packets;
    this.bytes[handle] += bytes;
  }

  /** hot: counts what an inline inbound SA has delivered, and tells what there is to tell. */
  countInbound(handle: number, packets: number, bytes: number): void {
    const allPackets = this.packets[handle] + packets;
    const allBytes = this.bytes[handle] + bytes;
    this.packets[handle] = allPackets;
    this.bytes[handle] = allBytes;
    if (allPackets >= this.packetsAlert[handle] || allBytes >= this.bytesAlert[handle]) {
      this.checkInbound(handle, allPackets, allBytes);
    }
  }

  /** The how-manieth packet from now on is the one for which `check` is to be asked; far away is `FAR`. */
  packetsUntilAlert(handle: number): number {
    const left = this.packetsAlert[handle] - this.packets[handle];
    return Math.min(left, FAR);
  }

  /** With how many more bytes `check` is to be asked; far away is `FAR`. */
  bytesUntilAlert(handle: number): number {
    const left = this.bytesAlert[handle] - this.bytes[handle];
    return Math.min(left, FAR);
  }

  /**
   * The packet that was just counted reached an alert: tells what there is to tell and returns `Verdict.ok`, or why the packet must not
   * go; then it is not counted.
   */
  check(handle: number, bytes: number): number {
    const limits = this.#limits[handle];
    if (limits === undefined) return Verdict.noSa;
    const packets = this.packets[handle];
    const total = this.bytes[handle];
    const verdict = this.#verdict(handle, limits, packets, total);
    if (verdict !== Verdict.ok) {
      this.packets[handle] = packets - 1;
      this.bytes[handle] = total - bytes;
      return verdict;
    }
    this.#checkSoft(handle, limits, packets, total);
    if (packets >= limits.lowAt && this.#first(handle, Told.low)) this.#tell(handle, 'sequence-low');
    this.#arm(handle, limits);
    return Verdict.ok;
  }

  /**
   * Tells what there is to tell of an inline inbound SA that has delivered so much, on all queues together. The device stops the SA,
   * so the driver sees no packet too many: no packet fits any more.
   */
  checkInbound(handle: number, packets: number, bytes: number): void {
    const limits = this.#limits[handle];
    if (limits === undefined) return;
    this.#checkSoft(handle, limits, packets, bytes);
    if (packets >= limits.hardPackets) this.#hard(handle, 'packets');
    else if (bytes + SMALLEST_PACKET > limits.hardBytes) this.#hard(handle, 'bytes');
    this.#arm(handle, limits);
  }

  /** Whether the packet that was counted last may go; when not, none after it may. */
  #verdict(handle: number, limits: Limits, packets: number, total: number): number {
    if (this.#over[handle] !== Verdict.ok) return this.#over[handle];
    if (packets > limits.lastAt) {
      this.#over[handle] = Verdict.sequenceOverflow;
      if (this.#first(handle, Told.overflow)) this.#tell(handle, 'sequence-overflow');
    } else if (packets > limits.hardPackets) this.#hard(handle, 'packets');
    else if (total > limits.hardBytes) this.#hard(handle, 'bytes');
    else return Verdict.ok;
    this.packetsAlert[handle] = 0;
    return this.#over[handle];
  }

  #hard(handle: number, limit: 'packets' | 'bytes'): void {
    this.#over[handle] = Verdict.expired;
    if (this.#first(handle, Told.hard)) this.#tell(handle, 'hard-expiry', limit);
  }

  #checkSoft(handle: number, limits: Limits, packets: number, bytes: number): void {
    if (packets >= limits.softPackets) this.#soft(handle, 'packets');
    else if (bytes >= limits.softBytes) this.#soft(handle, 'bytes');
  }

  #soft(handle: number, limit: 'packets' | 'bytes' | 'device'): void {
    this.#softExpired.add(handle);
    if (this.#first(handle, Told.soft)) this.#tell(handle, 'soft-expiry', limit);
  }

  /** The device says that an inbound SA has passed its soft limit. */
  deviceSoftExpiry(handle: number): void {
    if (this.#softExpired.has(handle) || this.place[handle] !== SaPlace.inlineInbound) return;
    this.#soft(handle, 'device');
  }

  softExpired(handle: number): boolean {
    return this.#softExpired.has(handle);
  }

  /** Why a packet for a handle that is no outbound SA of this thread is dropped. */
  whyUnknown(handle: number): number {
    const { owners } = this;
    const elsewhere = owners !== null && this.place[handle] === SaPlace.none && owners[handle] > 0;
    return elsewhere ? Verdict.foreignSa : Verdict.noSa;
  }

  /** Counts a packet that was dropped on the SA. */
  drop(handle: number, verdict: number): void {
    if (this.#sharedDropped !== null) {
      if (handle <= this.capacity && this.place[handle] !== SaPlace.none) {
        this.#sharedDropped[handle * VERDICTS + verdict]++;
      }
      return;
    }
    let counters = this.#dropped.get(handle);
    if (counters === undefined) {
      if (this.place[handle] === SaPlace.none) return;
      counters = new Float64Array(VERDICTS);
      this.#dropped.set(handle, counters);
    }
    counters[verdict]++;
  }

  /** Adds what another thread has counted before it ended. */
  absorb(handle: number, counts: SaCounts): void {
    this.packets[handle] += counts.packets[handle];
    this.bytes[handle] += counts.bytes[handle];
    counts.packets[handle] = 0;
    counts.bytes[handle] = 0;
    if (counts.dropped === null) return;
    const theirs = counts.dropped.subarray(handle * VERDICTS, (handle + 1) * VERDICTS);
    if (theirs.every((count) => count === 0)) return;
    const mine = this.#dropped.get(handle) ?? new Float64Array(VERDICTS);
    theirs.forEach((count, verdict) => {
      mine[verdict] += count;
    });
    this.#dropped.set(handle, mine);
    theirs.fill(0);
  }

  /** How many packets were dropped, for an SA that somebody else counts. Only with shared counts. */
  setDropped(handle: number, verdict: number, count: number): void {
    if (this.#sharedDropped !== null) this.#sharedDropped[handle * VERDICTS + verdict] = count;
  }

  /** What was dropped, by name. */
  dropped(handle: number): Record<string, number> {
    const counters = this.#dropped.get(handle);
    if (this.#sharedDropped !== null) {
      return namedCounters(this.#sharedDropped.subarray(handle * VERDICTS, (handle + 1) * VERDICTS));
    }
    return counters === undefined ? {} : namedCounters(counters);
  }

  #count(place: number, by: number): void {
    if (place === SaPlace.inlineOutbound || place === SaPlace.softwareOutbound) this.outbound += by;
    else if (place === SaPlace.inlineInbound) this.inlineInbound += by;
    else if (place === SaPlace.softwareInbound) this.softwareInbound += by;
  }

  /**
   * Whether a device restarts the sequence numbers of an SA that it modifies is not said. With the key that it has the SA
   * gets no new ones.
   */
  #setLimits(handle: number, sa: SecurityAssociation, rekeyed: boolean): void {
    const before = rekeyed ? undefined : this.#limits[handle];
    const packetsBefore = before?.packetsBefore ?? this.packets[handle];
    const bytesBefore = before?.bytesBefore ?? this.bytes[handle];
    const lastAt = Math.min(packetsBefore + numbersOf(sa), before?.lastAt ?? Number.POSITIVE_INFINITY);
    const limits = limitsOf(packetsBefore, bytesBefore, lastAt, sa.lifetime);
    this.#told[handle] = before === undefined ? 0 : this.#told[handle] & (Told.low | Told.overflow);
    this.#over[handle] = Verdict.ok;
    this.#limits[handle] = limits;
    this.#arm(handle, limits);
  }

  /** True the first time that an SA is to be told of as `what`. */
  #first(handle: number, what: number): boolean {
    if ((this.#told[handle] & what) !== 0) return false;
    this.#told[handle] |= what;
    return true;
  }

  /** The next packet or byte count at which something happens. */
  #arm(handle: number, limits: Limits): void {
    const packets = this.packets[handle];
    const bytes = this.bytes[handle];
    const next = (now: number, ...at: number[]) =>
      Math.min(...at.filter((count) => count > now), Number.POSITIVE_INFINITY);
    const { softPackets, softBytes, lowAt, hardPackets, hardBytes, lastAt } = limits;
    if (lastAt === Number.POSITIVE_INFINITY) {
      this.packetsAlert[handle] = next(packets, softPackets, hardPackets);
      this.bytesAlert[handle] = next(bytes, softBytes, hardBytes - SMALLEST_PACKET + 1);
      return;
    }
    // What ends the SA ends it also when it has been passed already: limits can be lowered.
    this.packetsAlert[handle] = Math.min(next(packets, softPackets, lowAt), hardPackets + 1, lastAt + 1);
    this.bytesAlert[handle] = Math.min(next(bytes, softBytes), hardBytes + 1);
  }
}

/** Counters by `Verdict` as an object with names; only those that are not 0. */
export function namedCounters(counters: Float64Array): Record<string, number> {
  const named: Record<string, number> = {};
  counters.forEach((count, verdict) => {
    if (count !== 0) named[verdictNames[verdict]] = count;
  });
  return named;
}
