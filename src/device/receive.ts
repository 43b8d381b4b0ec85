/**
 * The receive side of a network function (Virtio 1.4, 5.1.9.3 and 5.1.9.4): from the link through flow filter and
 * IPsec into receive buffers.
 *
 * The order is the standard's: flow filter rules, and only for packets to which no rule applied, receive steering.
 * The header is written into the headroom of the packet, so that header and frame are one copy into the driver's
 * buffer. Frames for which there is no buffer wait in a short backlog.
 *
 * Left out: GSO: a frame comes in as it was on the link.
 */
import { Verdict } from '../fallback/verdict.ts';
import { Ethernet, EtherType, Vlan } from '../packet/fields.ts';
import { PacketFlag, type PacketPool } from '../packet/pool.ts';
import { ResourceType } from '../virtio/admin-wire.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { FlowFilterAction } from '../virtio-net/flow-filter-wire.ts';
import {
  encodeNetHeader,
  GsoType,
  NetHeader,
  NetHeaderField,
  NetHeaderFlag,
  type NetHeaderLayout,
  networkHeaderOffset,
} from '../virtio-net/header.ts';
import { NetCounter } from './counters.ts';
import { type FrameFaults, frameFaults } from './fault-frames.ts';
import type { FaultSet } from './faults.ts';
import type { FlowFilter } from './flow-filter.ts';
import { NO_MATCH } from './flow-matcher.ts';
import { etherTypeOf, isIpFrame } from './frames.ts';
import { type DeviceIpsec, isUntouched } from './ipsec.ts';
import { type FrameSink, LINK_BURST } from './links/link.ts';
import { type QueueStatistics, Stat } from './queue-statistics.ts';
import { type DeviceQueue, NO_BUFFER } from './queues.ts';
import type { ReceiveFilter } from './rx-filter.ts';
import type { Steering } from './steering.ts';

/** Frames that wait for a receive buffer, for each queue; a power of two. */
const BACKLOG = 1024;
/** Most buffers of one frame (MRG_RXBUF). */
const MAX_BUFFERS = 64;
/** Most frames that one poll puts into a queue. */
const BURST = 64;

/** Where a frame goes: a queue pair, or one of these. */
const Target = { steer: -1, drop: -2 } as const;

export interface ReceiverOptions {
  readonly pool: PacketPool;
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
  readonly #pool: PacketPool;
  readonly #counters: Float64Array;
  readonly #queues: (DeviceQueue | null)[];
  readonly #backlogs: Backlog[];
  readonly #header = new NetHeader();
  readonly #targets = new Int16Array(LINK_BURST);
  readonly #toOpen = new Uint32Array(LINK_BURST);
  readonly #openedAt = new Uint8Array(LINK_BURST);
  readonly #recirculate = new Uint8Array(LINK_BURST);
  readonly #verdicts = new Uint8Array(LINK_BURST);
  readonly #dropped = new Uint32Array(LINK_BURST);
  readonly #done = new Uint32Array(BURST);
  /** By queue pair: how many buffers were there when they were too few for the next frame. */
  readonly #tooFew: Uint16Array;
  #drops = 0;
  readonly #faults: FrameFaults | null;
  #layout: NetHeaderLayout | null = null;
  #mergeable = false;
  #limitMtu = false;
  #reportsHash = false;

  constructor(options: ReceiverOptions, pairs: number) {
    this.#options = options;
    this.#pool = options.pool;
    this.#counters = options.counters;
    this.#faults = frameFaults(options.faults);
    this.#queues = new Array<DeviceQueue | null>(pairs).fill(null);
    this.#backlogs = Array.from({ length: pairs }, () => new Backlog());
    this.#tooFew = new Uint16Array(pairs);
  }

  start(layout: NetHeaderLayout, features: FeatureSet): void {
    this.#layout = layout;
    this.#mergeable = features.has(Feature.MRG_RXBUF);
    this.#limitMtu = features.has(Feature.MTU) && !this.#options.faults.has('rx-mtu-ignored');
    this.#reportsHash = features.has(Feature.HASH_REPORT);
  }

  /** Forgets frames that wait. */
  stop(): void {
    this.#layout = null;
    for (const [pair, backlog] of this.#backlogs.entries()) {
      this.#queues[pair] = null;
      this.#empty(backlog);
    }
  }

  attach(pair: number, queue: DeviceQueue | null): void {
    this.#queues[pair] = queue;
    if (queue === null) this.#empty(this.#backlogs[pair]);
  }

  /** How many buffers of a queue are not enough for the frame that waits. */
  tooFew(pair: number): number {
    return this.#tooFew[pair];
  }

  /** Frames that wait for buffers of a queue. */
  waiting(pair: number): number {
    return this.#backlogs[pair].count;
  }

  get ready(): boolean {
    return this.#layout !== null && this.#options.isLive();
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
    if (this.#layout === null || !this.#options.isLive()) {
      this.#counters[NetCounter.rxNotReady] += n;
      this.#pool.free(packets, n);
      return;
    }
    for (let from = 0; from < n; from += LINK_BURST) this.#deliverBurst(packets, from, Math.min(n - from, LINK_BURST));
    this.#options.wake();
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
        flags[packet] = PacketFlag.securityError;
      } else if (verdict === Verdict.notIpsec) {
        flags[packet] = 0;
      } else {
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

  /**
   * hot: moves waiting frames into the buffers of one queue; returns how many left the backlog. The caller publishes.
   */
  poll(pair: number): number {
    const queue = this.#queues[pair];
    const backlog = this.#backlogs[pair];
    const layout = this.#layout;
    if (queue === null || layout === null || backlog.count === 0) return 0;
    let moved = 0;
    const packetsBefore = this.#counters[NetCounter.rxPackets];
    const bytesBefore = this.#counters[NetCounter.rxBytes];
    while (moved < BURST && backlog.count > 0) {
      const packet = backlog.packets[backlog.head];
      this.#tooFew[pair] = 0;
      if (!this.#place(queue, layout, packet, pair)) break;
      backlog.head = (backlog.head + 1) & (BACKLOG - 1);
      backlog.count--;
      this.#done[moved++] = packet;
    }
    this.#pool.free(this.#done, moved);
    const { statistics } = this.#options;
    const delivered = this.#counters[NetCounter.rxPackets] - packetsBefore;
    statistics.add(queue.index, Stat.packets, delivered);
    statistics.add(queue.index, Stat.bytes, this.#counters[NetCounter.rxBytes] - bytesBefore);
    statistics.add(queue.index, Stat.rxChecksumNone, delivered);
    statistics.add(queue.index, Stat.drops, moved - delivered);
    return moved;
  }

  /**
   * hot: puts a frame into the next buffers; false when there are none, or the queue is broken. True also when it had
   * to be dropped.
   */
  #place(queue: DeviceQueue, layout: NetHeaderLayout, packet: number, pair: number): boolean {
    const pool = this.#pool;
    const length = pool.length[packet];
    const total = layout.length + length;
    if (this.#limitMtu && length > this.#largest(packet)) return this.#refuse(NetCounter.rxTooLong);
    const at = pool.offset[packet] - layout.length;
    if (at < pool.slot(packet)) return this.#refuse(NetCounter.rxNoRoom);
    const first = queue.take();
    if (first === NO_BUFFER) return false;
    if (queue.writableBytes >= total) {
      this.#writeHeader(layout, packet, at, 1);
      if (queue.scatter(0, total, at) !== total) return false;
      queue.complete(first, this.#options.faults.has('rx-runt') ? 4 : total);
      this.#count(length);
      return true;
    }
    if (this.#mergeable) return this.#placeMerged(queue, layout, packet, pair, at, total);
    queue.putBack(1);
    return this.#refuse(NetCounter.rxTooLong);
  }

  /** hot: spreads a frame over several buffers (MRG_RXBUF, 5.1.9.4); one has been taken and is too small. */
  #placeMerged(
    queue: DeviceQueue,
    layout: NetHeaderLayout,
    packet: number,
    pair: number,
    at: number,
    total: number,
  ): boolean {
    // Their number must be in the header, which is in the first one: count, put back, and take them again.
    let room = queue.writableBytes;
    let count = 1;
    // "each buffer MUST be at least the size of the header" (5.1.9.3.1).
    if (room < layout.length) {
      queue.putBack(1);
      return this.#refuse(NetCounter.rxTooLong);
    }
    while (room < total) {
      if (count === MAX_BUFFERS) {
        queue.putBack(count);
        return this.#refuse(NetCounter.rxTooLong);
      }
      if (queue.take() === NO_BUFFER) {
        queue.putBack(count);
        this.#tooFew[pair] = count;
        return false;
      }
      room += queue.writableBytes;
      count++;
    }
    queue.putBack(count);
    this.#writeHeader(layout, packet, at, count);
    let done = 0;
    for (let i = 0; i < count; i++) {
      const id = queue.take();
      if (id === NO_BUFFER) return false;
      const n = queue.scatter(0, total - done, at + done);
      if (n < 0) return false;
      queue.complete(id, n);
      done += n;
    }
    this.#count(total - layout.length);
    return true;
  }

  /** hot: */
  #writeHeader(layout: NetHeaderLayout, packet: number, at: number, buffers: number): void {
    const pool = this.#pool;
    const header = this.#header;
    const flags = pool.flags[packet];
    if (flags === 0 && !this.#reportsHash && ((at | layout.length) & 3) === 0 && this.#faults === null) {
      // Nothing to say but the number of buffers, which is the upper half of the third word, and where the IP header is.
      const u32 = pool.u32;
      for (let w = at >>> 2; w < (at + layout.length) >>> 2; w++) u32[w] = 0;
      u32[(at + NetHeaderField.csumOffset) >>> 2] = buffers << 16;
      if (layout.outerNhOffset >= 0) pool.u8[at + layout.outerNhOffset] = this.#networkHeader(packet);
      return;
    }
    let wire = 0;
    header.resourceId = 0;
    header.resourceType = 0;
    const { ipsec } = this.#options;
    if ((flags & PacketFlag.secured) !== 0 && ipsec !== null) {
      wire = NetHeaderFlag.SECURITY;
      if ((flags & PacketFlag.softExpiry) !== 0) wire |= NetHeaderFlag.SECURITY_SA_SOFT_EXPIRY_WARN;
      header.resourceId = ipsec.resourceId(pool.sa[packet]);
      header.resourceType = ResourceType.NET_IPSEC_INB_SA;
    } else if ((flags & PacketFlag.securityError) !== 0) {
      wire = NetHeaderFlag.SECURITY | NetHeaderFlag.SECURITY_ERR;
    }
    header.flags = wire;
    header.gsoType = GsoType.NONE;
    header.numBuffers = buffers;
    header.hashValue = pool.hash[packet];
    header.hashReport = pool.hashReport[packet];
    header.outerNhOffset = layout.outerNhOffset >= 0 ? this.#networkHeader(packet) : 0;
    this.#faults?.received(header);
    encodeNetHeader(layout, header, pool.u8, at);
    this.#faults?.written(layout, pool.u8, at);
  }

  /** hot: where the IP header of a frame is, or 0. */
  #networkHeader(packet: number): number {
    const { u8, offset, length } = this.#pool;
    const at = networkHeaderOffset(u8, offset[packet]);
    return at < length[packet] ? at : 0;
  }

  /** hot: bytes of the largest frame that may be passed to the driver. */
  #largest(packet: number): number {
    const tagged = etherTypeOf(this.#pool.u8, this.#pool.offset[packet]) === EtherType.vlan;
    return this.#options.mtu + Ethernet.length + (tagged ? Vlan.length : 0);
  }

  /** hot: */
  #refuse(counter: number): true {
    this.#counters[counter]++;
    return true;
  }

  /** hot: */
  #count(bytes: number): void {
    this.#counters[NetCounter.rxPackets]++;
    this.#counters[NetCounter.rxBytes] += bytes;
  }

  #empty(backlog: Backlog): void {
    for (; backlog.count > 0; backlog.count--) {
      this.#done[0] = backlog.packets[backlog.head];
      this.#pool.free(this.#done, 1);
      backlog.head = (backlog.head + 1) & (BACKLOG - 1);
    }
  }
}
