/**
 * The receive side of a network function (Virtio 1.4, 5.1.9.4): from the link through flow filter and IPsec to the queue that a frame
 * belongs to. `place.ts` puts it into the buffers.
 *
 * The order is the standard's: flow filter rules, and only for packets to which no rule applied, receive steering.
 * Frames for which there is no buffer wait in a short backlog.
 *
 * Frames of another function of this device may be unfinished, when the driver has said that it takes such (`unfinished.ts`). Those of an
 * outside link have their checksums verified for a driver that has GUEST_CSUM.
 */
import { Verdict } from '../fallback/verdict.ts';
import { fillChecksum } from '../packet/fill-checksum.ts';
import { GsoSet, GsoType } from '../packet/gso.ts';
import { PacketFlag } from '../packet/pool.ts';
import { ChecksumState, transportChecksum } from '../packet/transport-checksum.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { FlowFilterAction } from '../virtio-net/flow-filter-wire.ts';
import type { NetHeaderLayout } from '../virtio-net/header.ts';
import { NetCounter } from './counters.ts';
import type { FaultSet } from './faults.ts';
import type { FlowFilter } from './flow-filter.ts';
import { NO_MATCH } from './flow-matcher.ts';
import type { FramePool } from './frame-pool.ts';
import type { FrameSource } from './frame-source.ts';
import { isIpFrame } from './frames.ts';
import type { GuestMemory } from './guest-memory.ts';
import { type DeviceIpsec, isUntouched } from './ipsec.ts';
import { type FrameSink, LINK_BURST } from './links/link.ts';
import { FramePlacer } from './place.ts';
import { type QueueStatistics, Stat } from './queue-statistics.ts';
import type { DeviceQueue } from './queues.ts';
import type { ReceiveFilter } from './rx-filter.ts';
import type { Steering } from './steering.ts';
import { Unfinished, unfinishedFor } from './unfinished.ts';

/** Frames that wait for a receive buffer, for each queue; a power of two. */
const BACKLOG = 1024;
/** Most frames that one poll puts into a queue. */
const BURST = 64;
const UNFINISHED = PacketFlag.needsChecksum | PacketFlag.segmented;

/** Packets that are several UDP packets on the wire. */
const OVER_UDP = (1 << GsoType.UDP_L4) | GsoSet.tunnel;

/** Where a frame goes: a queue pair, or one of these. */
const Target = { steer: -1, drop: -2 } as const;

export interface ReceiverOptions {
  readonly pool: FramePool;
  readonly memory: GuestMemory;
  /** Whether frames come from outside of this device. */
  readonly isOutside: boolean;
  readonly ipsec: DeviceIpsec | null;
  readonly flowFilter: FlowFilter | null;
  readonly counters: Float64Array;
  readonly steering: Steering;
  readonly receiveFilter: ReceiveFilter;
  readonly statistics: QueueStatistics;
  readonly mtu: number;
  readonly faults: FaultSet;
  /** Whether the driver is ready. */
  isLive(): boolean;
  /** Frames have arrived: the event loop must poll. */
  readonly wake: () => void;
}

/** A ring of packet numbers. */
class Backlog {
  readonly packets = new Uint32Array(BACKLOG);
  head = 0;
  count = 0;
}

export class Receiver implements FrameSink {
  readonly #options: ReceiverOptions;
  readonly #pool: FramePool;
  readonly #counters: Float64Array;
  readonly #queues: (DeviceQueue | null)[];
  readonly #backlogs: Backlog[];
  readonly #targets = new Int16Array(LINK_BURST);
  readonly #toOpen = new Uint32Array(LINK_BURST);
  readonly #openedAt = new Uint8Array(LINK_BURST);
  readonly #recirculate = new Uint8Array(LINK_BURST);
  readonly #verdicts = new Uint8Array(LINK_BURST);
  readonly #dropped = new Uint32Array(LINK_BURST);
  readonly #done = new Uint32Array(BURST);
  readonly #single = new Uint32Array(1);
  readonly #placer: FramePlacer;
  #drops = 0;
  #isStarted = false;
  #reportsHash = false;
  /** `Unfinished`: what the driver takes. */
  #taken: number = Unfinished.nothing;
  /** By queue pair: frames that `receiveDirect` has put into buffers since the last poll. */
  readonly #direct: Uint32Array;

  constructor(options: ReceiverOptions, pairs: number) {
    this.#options = options;
    this.#pool = options.pool;
    this.#counters = options.counters;
    this.#placer = new FramePlacer({ ...options, pairs });
    this.#queues = new Array<DeviceQueue | null>(pairs).fill(null);
    this.#backlogs = Array.from({ length: pairs }, () => new Backlog());
    this.#direct = new Uint32Array(pairs);
  }

  start(layout: NetHeaderLayout, features: FeatureSet): void {
    this.#reportsHash = features.has(Feature.HASH_REPORT);
    this.#placer.start(layout, features);
    this.#isStarted = true;
    this.setOffloads(features);
  }

  /** Forgets frames that wait. */
  stop(): void {
    this.#isStarted = false;
    this.#taken = Unfinished.nothing;
    this.#placer.stop();
    for (const [pair, backlog] of this.#backlogs.entries()) {
      this.#queues[pair] = null;
      this.#empty(backlog);
    }
  }

  attach(pair: number, queue: DeviceQueue | null): void {
    this.#queues[pair] = queue;
    this.#placer.forget(pair);
    this.#direct[pair] = 0;
    if (queue === null) this.#empty(this.#backlogs[pair]);
  }

  /** The driver uses receive offloads as with `active` from now on, and no others. What waits and cannot be passed any more is finished, or dropped. */
  setOffloads(active: FeatureSet): void {
    this.#taken = unfinishedFor(active);
    this.#placer.taken = this.#taken;
    for (const backlog of this.#backlogs) this.#finish(backlog);
  }

  get taken(): number {
    const { flowFilter } = this.#options;
    if (!this.#isStarted || !this.#options.isLive()) return Unfinished.nothing;
    // A rule may say that UDP packets are IPsec: it has to see each of them.
    const filtered = flowFilter !== null && flowFilter.size > 0;
    return filtered ? this.#taken & ~OVER_UDP : this.#taken;
  }

  /** How many buffers of a queue are not enough for the frame that waits. */
  tooFew(pair: number): number {
    return this.#placer.tooFew(pair);
  }

  /** Frames that wait for buffers of a queue. */
  waiting(pair: number): number {
    return this.#backlogs[pair].count;
  }

  get ready(): boolean {
    return this.#isStarted && this.#options.isLive();
  }

  room(): number {
    // hot:
    if (!this.#options.isLive()) return BACKLOG;
    let room = BACKLOG;
    for (let pair = 0; pair < this.#options.steering.pairs; pair++) {
      room = Math.min(room, BACKLOG - this.#backlogs[pair].count);
    }
    return room;
  }

  deliver(packets: Uint32Array, n: number): void {
    // hot:
    if (!this.#isStarted || !this.#options.isLive()) {
      this.#counters[NetCounter.rxNotReady] += n;
      this.#pool.free(packets, n);
      return;
    }
    for (let from = 0; from < n; from += LINK_BURST) this.#deliverBurst(packets, from, Math.min(n - from, LINK_BURST));
    this.#options.wake();
  }

  receiveDirect(packet: number, source: FrameSource): boolean {
    // hot:
    const { steering, flowFilter, receiveFilter, faults, statistics } = this.#options;
    const pool = this.#pool;
    if (faults.size > 0 || (flowFilter !== null && flowFilter.size > 0)) return false;
    if (!receiveFilter.accepts(pool.u8, pool.offset[packet])) return false;
    if (this.#reportsHash || steering.isByHash) steering.calculate(pool, packet);
    const pair = steering.pick(pool, packet);
    const queue = this.#queues[pair];
    // Not before those that wait.
    if (queue === null || this.#backlogs[pair].count > 0) return false;
    const before = this.#counters[NetCounter.rxPackets];
    if (!this.#placer.place(queue, packet, pair, source)) return false;
    const delivered = this.#counters[NetCounter.rxPackets] - before;
    statistics.add(queue.index, Stat.packets, delivered);
    statistics.add(queue.index, Stat.bytes, delivered * pool.length[packet]);
    statistics.add(queue.index, Stat.drops, 1 - delivered);
    this.#direct[pair]++;
    this.#options.wake();
    return true;
  }

  /** hot: up to `LINK_BURST` frames of `packets` from `from` on. */
  #deliverBurst(packets: Uint32Array, from: number, n: number): void {
    const pool = this.#pool;
    this.#drops = 0;
    const toOpen = this.#filter(packets, from, n);
    if (toOpen > 0) this.#open(packets, from, toOpen);
    for (let i = 0; i < n; i++) {
      const packet = packets[from + i];
      let target = this.#targets[i];
      if (target === Target.drop) continue;
      const { steering } = this.#options;
      if (this.#reportsHash || steering.isByHash) steering.calculate(pool, packet);
      if (target === Target.steer) target = steering.pick(pool, packet);
      if (this.#options.isOutside && (this.#taken & Unfinished.checksum) !== 0) this.#verify(packet, 2 * target);
      this.#enqueue(target, packet);
    }
    pool.free(this.#dropped, this.#drops);
  }

  /** hot: applies the flow filter; returns how many frames are to go through IPsec. */
  #filter(packets: Uint32Array, from: number, n: number): number {
    const filter = this.#options.flowFilter;
    const { receiveFilter } = this.#options;
    const isEmpty = filter === null || filter.size === 0;
    let toOpen = 0;
    for (let i = 0; i < n; i++) {
      const packet = packets[from + i];
      const at = this.#pool.offset[packet];
      if (!receiveFilter.accepts(this.#pool.u8, at)) {
        this.#drop(i, packet, NetCounter.rxNotForUs);
        continue;
      }
      if (isEmpty) {
        this.#targets[i] = Target.steer;
        continue;
      }
      const rule = filter.match(this.#pool.u8, at, this.#pool.length[packet]);
      const action = rule === NO_MATCH ? 0 : filter.action(rule);
      const isIpsec = action === FlowFilterAction.ipsec || action === FlowFilterAction.ipsecRecirculate;
      if (isIpsec && isIpFrame(this.#pool.u8, at)) {
        this.#toOpen[toOpen] = packet;
        this.#openedAt[toOpen] = i;
        this.#recirculate[toOpen] = action === FlowFilterAction.ipsecRecirculate ? 1 : 0;
        this.#targets[i] = Target.steer;
        toOpen++;
      } else {
        this.#apply(i, packet, action, rule);
      }
    }
    return toOpen;
  }

  /** hot: an action other than IPsec. */
  #apply(i: number, packet: number, action: number, rule: number): void {
    if (action === FlowFilterAction.drop) {
      this.#drop(i, packet, NetCounter.rxFiltered);
      return;
    }
    if (action !== FlowFilterAction.directRxVq) {
      this.#targets[i] = Target.steer;
      return;
    }
    const filter = this.#options.flowFilter;
    const pair = filter === null ? 0 : filter.queueIndex(rule) >>> 1;
    // "if the receive virtqueue is reset, the device MUST drop such packets" (5.1.9.6.4).
    if (pair < this.#queues.length && this.#queues[pair] !== null) this.#targets[i] = pair;
    else if (this.#options.faults.has('flow-reset-queue-steers')) this.#targets[i] = Target.steer;
    else this.#drop(i, packet, NetCounter.rxNoQueue);
  }

  /** hot: */
  #drop(i: number, packet: number, counter: number): void {
    this.#targets[i] = Target.drop;
    this.#dropped[this.#drops++] = packet;
    this.#counters[counter]++;
  }

  /** hot: verifies and opens the `n` packets of `#toOpen`. */
  #open(packets: Uint32Array, from: number, n: number): void {
    const { ipsec, flowFilter } = this.#options;
    if (ipsec === null || flowFilter === null) return;
    const { flags, sa, u8, offset, length } = this.#pool;
    ipsec.unprotect(this.#toOpen, n, this.#verdicts);
    for (let j = 0; j < n; j++) {
      const i = this.#openedAt[j];
      const packet = packets[from + i];
      const verdict = this.#verdicts[j];
      if (verdict === Verdict.ok) {
        const soft = ipsec.softExpired(sa[packet]) ? PacketFlag.softExpiry : 0;
        flags[packet] = PacketFlag.secured | soft;
        if (this.#recirculate[j] === 0) continue;
        const rule = flowFilter.match(u8, offset[packet], length[packet]);
        // A second IPsec action is not taken: recirculation happens once (5.1.9.7.1).
        if (rule !== NO_MATCH) this.#apply(i, packet, flowFilter.action(rule), rule);
      } else if (isUntouched(verdict)) {
        flags[packet] |= PacketFlag.securityError;
      } else if (verdict !== Verdict.notIpsec) {
        this.#drop(i, packet, NetCounter.rxIpsec);
      }
    }
  }

  /** hot: */
  #enqueue(pair: number, packet: number): void {
    const backlog = this.#backlogs[pair];
    if (backlog.count === BACKLOG || this.#queues[pair] === null) {
      this.#counters[NetCounter.rxNoBuffer]++;
      this.#options.statistics.add(2 * pair, Stat.drops, 1);
      this.#options.statistics.add(2 * pair, Stat.special, 1);
      this.#dropped[this.#drops++] = packet;
      return;
    }
    backlog.packets[(backlog.head + backlog.count) & (BACKLOG - 1)] = packet;
    backlog.count++;
  }

  /** hot: marks a frame whose checksum is right; counts a wrong one, which is passed on without the mark (5.1.9.4). */
  #verify(packet: number, queue: number): void {
    const pool = this.#pool;
    if ((pool.flags[packet] & (PacketFlag.needsChecksum | PacketFlag.securityError)) !== 0) return;
    const state = transportChecksum(pool, pool.offset[packet], pool.length[packet]);
    if (state === ChecksumState.valid) pool.flags[packet] |= PacketFlag.checksumValid;
    else if (state === ChecksumState.wrong) this.#options.statistics.add(queue, Stat.rxChecksumBad, 1);
  }

  /**
   * hot: moves waiting frames into the buffers of one queue; returns how many left the backlog, or went past it. The caller publishes.
   */
  poll(pair: number): number {
    const queue = this.#queues[pair];
    const backlog = this.#backlogs[pair];
    if (queue === null || !this.#isStarted) return 0;
    const direct = this.#direct[pair];
    this.#direct[pair] = 0;
    if (backlog.count === 0) return direct;
    let moved = 0;
    const placer = this.#placer;
    const packetsBefore = this.#counters[NetCounter.rxPackets];
    const bytesBefore = this.#counters[NetCounter.rxBytes];
    const checksummedBefore = placer.checksummed;
    while (moved < BURST && backlog.count > 0) {
      const packet = backlog.packets[backlog.head];
      if (!placer.place(queue, packet, pair, null)) break;
      backlog.head = (backlog.head + 1) & (BACKLOG - 1);
      backlog.count--;
      this.#done[moved++] = packet;
    }
    this.#pool.free(this.#done, moved);
    const { statistics } = this.#options;
    const delivered = this.#counters[NetCounter.rxPackets] - packetsBefore;
    statistics.add(queue.index, Stat.packets, delivered);
    statistics.add(queue.index, Stat.bytes, this.#counters[NetCounter.rxBytes] - bytesBefore);
    statistics.add(queue.index, Stat.rxChecksumNone, delivered - (placer.checksummed - checksummedBefore));
    statistics.add(queue.index, Stat.drops, moved - delivered);
    return direct + moved;
  }

  /** Takes out of a backlog what the driver does not take any more, and fills checksums that it does not fill. */
  #finish(backlog: Backlog): void {
    const pool = this.#pool;
    for (let left = backlog.count; left > 0; left--) {
      const packet = backlog.packets[backlog.head];
      backlog.head = (backlog.head + 1) & (BACKLOG - 1);
      backlog.count--;
      const flags = pool.flags[packet];
      if ((flags & PacketFlag.segmented) !== 0) {
        this.#single[0] = packet;
        pool.free(this.#single, 1);
        this.#counters[NetCounter.rxTooLong]++;
        continue;
      }
      if ((flags & UNFINISHED) !== 0 && (this.#taken & Unfinished.checksum) === 0) fillChecksum(pool, packet);
      backlog.packets[(backlog.head + backlog.count) & (BACKLOG - 1)] = packet;
      backlog.count++;
    }
  }

  #empty(backlog: Backlog): void {
    for (; backlog.count > 0; backlog.count--) {
      this.#done[0] = backlog.packets[backlog.head];
      this.#pool.free(this.#done, 1);
      backlog.head = (backlog.head + 1) & (BACKLOG - 1);
    }
  }
}
