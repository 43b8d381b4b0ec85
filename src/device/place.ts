/**
 * Puts frames into receive buffers, with the header in front (Virtio 1.4, 5.1.9.3.1, 5.1.9.4). The header is written into the headroom of
 * the frame, so that both are one copy into a buffer that is long enough.
 *
 * With MRG_RXBUF a frame is spread over several buffers. Their number stands in the first one, before it is known how long the others are:
 * it is worked out as if all were like the first, and done again in the rare case that they are not. All buffers of a frame are
 * completed together or not at all, so that a queue that is reset never holds a part of one.
 *
 * A large frame that another driver of the same device sends is copied from its buffer straight into ours (`FrameSource`).
 */
import { Ethernet, EtherType, Tcp, Udp, Vlan } from '../packet/fields.ts';
import { baseType, GSO_TUNNEL, GsoType } from '../packet/gso.ts';
import { PacketFlag, type PacketPool } from '../packet/pool.ts';
import { ResourceType } from '../virtio/admin-wire.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import {
  encodeNetHeader,
  NetHeader,
  NetHeaderField,
  NetHeaderFlag,
  type NetHeaderLayout,
  networkHeaderOffset,
} from '../virtio-net/header.ts';
import { NetCounter } from './counters.ts';
import { type FrameFaults, frameFaults } from './fault-frames.ts';
import type { FaultSet } from './faults.ts';
import type { FrameSource } from './frame-source.ts';
import { etherTypeOf } from './frames.ts';
import type { GuestMemory } from './guest-memory.ts';
import type { DeviceIpsec } from './ipsec.ts';
import { type QueueStatistics, Stat } from './queue-statistics.ts';
import { type DeviceQueue, NO_BUFFER } from './queues.ts';
import { Unfinished } from './unfinished.ts';

/** Most buffers of one frame (MRG_RXBUF). */
const MAX_BUFFERS = 1024;
/** A packed queue counts no more available buffers than this. */
const COUNTED = 128;
/** Times that a frame is spread over buffers whose lengths differ from what they were a moment ago. */
const ATTEMPTS = 3;
const MAX_U16 = 0xffff;
/** Bytes that a fault says were received. */
const RUNT = 4;

export interface PlacerOptions {
  readonly pool: PacketPool;
  /** That of the driver that receives. */
  readonly memory: GuestMemory;
  readonly ipsec: DeviceIpsec | null;
  readonly counters: Float64Array;
  readonly statistics: QueueStatistics;
  readonly mtu: number;
  readonly faults: FaultSet;
  readonly pairs: number;
}

export class FramePlacer {
  readonly #options: PlacerOptions;
  readonly #pool: PacketPool;
  readonly #counters: Float64Array;
  readonly #faults: FrameFaults | null;
  readonly #makesRunts: boolean;
  readonly #header = new NetHeader();
  /** By queue pair: how many buffers were there when they were too few for the next frame. */
  readonly #tooFew: Uint16Array;
  readonly #ids = new Uint32Array(MAX_BUFFERS);
  readonly #written = new Uint32Array(MAX_BUFFERS);
  #layout: NetHeaderLayout | null = null;
  #mergeable = false;
  #limitMtu = false;
  #reportsHash = false;
  /** Whether headers say how long the headers of a packet are at most: with a feature for large packets (5.1.9.4.1). */
  #hintsLength = false;
  #taken: number = Unfinished.nothing;
  /** Frames so far whose header said something about a checksum. */
  checksummed = 0;

  constructor(options: PlacerOptions) {
    this.#options = options;
    this.#pool = options.pool;
    this.#counters = options.counters;
    this.#faults = frameFaults(options.faults);
    this.#makesRunts = options.faults.has('rx-runt');
    this.#tooFew = new Uint16Array(options.pairs);
  }

  start(layout: NetHeaderLayout, features: FeatureSet): void {
    this.#layout = layout;
    this.#mergeable = features.has(Feature.MRG_RXBUF);
    this.#limitMtu = features.has(Feature.MTU) && !this.#options.faults.has('rx-mtu-ignored');
    this.#reportsHash = features.has(Feature.HASH_REPORT);
    const { GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6 } = Feature;
    this.#hintsLength = features.hasAny(GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6);
    this.#tooFew.fill(0);
  }

  stop(): void {
    this.#layout = null;
  }

  /** What the driver takes now: `Unfinished`. */
  set taken(taken: number) {
    this.#taken = taken;
  }

  /** How many buffers of a queue are not enough for the frame that waits. */
  tooFew(pair: number): number {
    return this.#tooFew[pair];
  }

  /** Queue `pair` has other buffers now. */
  forget(pair: number): void {
    this.#tooFew[pair] = 0;
  }

  /**
   * hot: puts frame `packet` into the next buffers of `queue`, that of `pair`; false when there are none, or the queue is broken. True also when the
   * frame had to be dropped, which is counted. Nothing is published.
   */
  place(queue: DeviceQueue, packet: number, pair: number, source: FrameSource | null): boolean {
    const layout = this.#layout;
    if (layout === null) return false;
    const pool = this.#pool;
    const length = pool.length[packet];
    const total = layout.length + length;
    if (this.#limitMtu && !this.#fitsMtu(packet, length)) return this.#refuse(NetCounter.rxTooLong);
    const at = pool.offset[packet] - layout.length;
    if (at < pool.slot(packet)) return this.#refuse(NetCounter.rxNoRoom);
    // Another look would find no more than the last one.
    const few = this.#tooFew[pair];
    if (few !== 0 && few < COUNTED && queue.available() <= few) return false;
    this.#tooFew[pair] = 0;
    const first = queue.take();
    if (first === NO_BUFFER) return false;
    const room = queue.writableBytes;
    if (room >= total) {
      this.#writeHeader(layout, packet, at, 1);
      if (!this.#copy(queue, 0, total, at, source)) {
        if (queue.broken === null) queue.putBack(1);
        return false;
      }
      queue.complete(first, this.#makesRunts ? RUNT : total);
    } else {
      // "each buffer MUST be at least the size of the header" (5.1.9.3.1).
      if (!this.#mergeable || room < layout.length) {
        queue.putBack(1);
        return this.#refuse(NetCounter.rxTooLong);
      }
      const spread = this.#spread(queue, packet, pair, first, at, total, source);
      if (spread !== Spread.done) return spread === Spread.refused;
    }
    this.#count(queue, packet, length);
    return true;
  }

  /** hot: spreads a frame over several buffers, of which `first` has been taken. */
  #spread(
    queue: DeviceQueue,
    packet: number,
    pair: number,
    first: number,
    at: number,
    total: number,
    source: FrameSource | null,
  ): number {
    const layout = this.#layout;
    if (layout === null) return Spread.none;
    let buffers = Math.ceil(total / queue.writableBytes);
    let id = first;
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      this.#writeHeader(layout, packet, at, buffers);
      const count = this.#fill(queue, pair, id, at, total, source);
      if (count <= 0) return count;
      if (count === buffers) {
        for (let i = 0; i < count; i++) queue.complete(this.#ids[i], this.#written[i]);
        return Spread.done;
      }
      queue.putBack(count);
      buffers = count;
      id = queue.take();
      if (id === NO_BUFFER) return Spread.none;
    }
    // A driver that changes buffers under our hands loses the frame.
    queue.putBack(1);
    this.#refuse(NetCounter.rxTooLong);
    return Spread.refused;
  }

  /** hot: copies header and frame into buffers, the first of them `id`; returns how many it took, or `Spread.none` or `refused` after having put them back. */
  #fill(
    queue: DeviceQueue,
    pair: number,
    first: number,
    at: number,
    total: number,
    source: FrameSource | null,
  ): number {
    const { size } = queue;
    let id = first;
    let count = 0;
    let pieces = 0;
    let done = 0;
    for (;;) {
      const n = Math.min(queue.writableBytes, total - done);
      if (!this.#copy(queue, done, n, at, source)) {
        if (queue.broken === null) queue.putBack(count + 1);
        return Spread.none;
      }
      this.#ids[count] = id;
      this.#written[count] = n;
      count++;
      pieces += queue.segments;
      done += n;
      if (done === total) return count;
      // When the whole queue is not enough there is nothing to wait for.
      if (count === MAX_BUFFERS || pieces >= size) {
        queue.putBack(count);
        this.#refuse(NetCounter.rxTooLong);
        return Spread.refused;
      }
      id = queue.take();
      if (id === NO_BUFFER) {
        if (queue.broken === null) queue.putBack(count);
        this.#tooFew[pair] = count;
        return Spread.none;
      }
    }
  }

  /** hot: copies `n` bytes from byte `from` of header and frame on into the buffer that was taken last. The header begins at `at`. */
  #copy(queue: DeviceQueue, from: number, n: number, at: number, source: FrameSource | null): boolean {
    if (source === null) return queue.scatter(0, n, at + from) === n;
    const layout = this.#layout;
    if (layout === null) return false;
    const own = layout.length + source.head;
    const near = from < own ? Math.min(own - from, n) : 0;
    if (near > 0 && queue.scatter(0, near, at + from) !== near) return false;
    return near === n || this.#copyFrom(source, from + near - layout.length, queue, near, n - near);
  }

  /** hot: copies `bytes` from byte `from` of a frame on to the buffer of `queue`, behind its first `over` bytes. */
  #copyFrom(source: FrameSource, from: number, queue: DeviceQueue, over: number, bytes: number): boolean {
    const { memory } = this.#options;
    let skip = over;
    let left = bytes;
    for (let i = queue.readable; i < queue.segments && left > 0; i++) {
      const length = queue.length[i];
      while (skip < length && left > 0) {
        const low = queue.low[i] + skip;
        const carry = low >= 0x100000000 ? 1 : 0;
        const to = memory.translate(low - carry * 0x100000000, queue.high[i] + carry, true);
        if (to < 0) return false;
        const n = Math.min(length - skip, left, memory.run);
        if (!source.copy(from + bytes - left, n, to)) return false;
        left -= n;
        skip += n;
      }
      skip -= length;
    }
    return left === 0;
  }

  /** hot: */
  #writeHeader(layout: NetHeaderLayout, packet: number, at: number, buffers: number): void {
    const pool = this.#pool;
    const header = this.#header;
    const flags = pool.flags[packet];
    const length = pool.length[packet];
    if (flags === 0 && !this.#reportsHash && ((at | layout.length) & 3) === 0 && this.#faults === null) {
      // Nothing to say but the number of buffers, which is the upper half of the third word, a hint of how long the headers are, and
      // where the IP header is.
      const u32 = pool.u32;
      for (let w = at >>> 2; w < (at + layout.length) >>> 2; w++) u32[w] = 0;
      if (this.#hintsLength) u32[at >>> 2] = length << 16;
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
    if ((this.#taken & Unfinished.checksum) !== 0) wire |= this.#checksumFlags(flags);
    header.flags = wire;
    header.hdrLen = this.#hintsLength ? Math.min(length, MAX_U16) : 0;
    this.#describe(packet, flags);
    header.numBuffers = buffers;
    header.hashValue = pool.hash[packet];
    header.hashReport = pool.hashReport[packet];
    header.outerNhOffset = layout.outerNhOffset >= 0 ? this.#networkHeader(packet) : 0;
    this.#faults?.received(header);
    encodeNetHeader(layout, header, pool.u8, at);
    this.#faults?.written(layout, pool.u8, at);
  }

  /** hot: */
  #checksumFlags(flags: number): number {
    if ((flags & PacketFlag.needsChecksum) === 0) {
      return (flags & PacketFlag.checksumValid) !== 0 ? NetHeaderFlag.DATA_VALID : 0;
    }
    return NetHeaderFlag.NEEDS_CSUM | ((flags & PacketFlag.outerChecksum) !== 0 ? NetHeaderFlag.UDP_TUNNEL_CSUM : 0);
  }

  /** hot: the fields of an unfinished frame; zeros of any other. */
  #describe(packet: number, flags: number): void {
    const pool = this.#pool;
    const header = this.#header;
    const needs = (flags & PacketFlag.needsChecksum) !== 0;
    header.csumStart = needs ? pool.checksumStart[packet] : 0;
    header.csumOffset = needs ? pool.checksumOffset[packet] : 0;
    const segmented = (flags & PacketFlag.segmented) !== 0;
    header.gsoType = segmented ? pool.gsoType[packet] : GsoType.NONE;
    header.gsoSize = segmented ? pool.gsoSize[packet] : 0;
    const tunnel = segmented && (header.gsoType & GSO_TUNNEL) !== 0;
    header.outerThOffset = tunnel ? pool.outerTransport[packet] : 0;
    header.innerNhOffset = tunnel ? pool.innerNetwork[packet] : 0;
    if (segmented) header.hdrLen = this.#headersOf(packet);
  }

  /** hot: bytes of all headers of a frame that stands for several; they were checked when it was sent. */
  #headersOf(packet: number): number {
    const { u8, offset, checksumStart, gsoType } = this.#pool;
    const transport = checksumStart[packet];
    if (baseType(gsoType[packet]) === GsoType.UDP_L4) return transport + Udp.length;
    return transport + (u8[offset[packet] + transport + Tcp.dataOffset] >>> 4) * 4;
  }

  /** hot: where the IP header of a frame is, or 0. */
  #networkHeader(packet: number): number {
    const { u8, offset, length } = this.#pool;
    const at = networkHeaderOffset(u8, offset[packet]);
    return at < length[packet] ? at : 0;
  }

  /** hot: whether a frame, or each of those that it stands for, may be passed to the driver. */
  #fitsMtu(packet: number, length: number): boolean {
    const { u8, offset, flags, gsoSize } = this.#pool;
    const tagged = etherTypeOf(u8, offset[packet]) === EtherType.vlan;
    const largest = this.#options.mtu + Ethernet.length + (tagged ? Vlan.length : 0);
    const segmented = (flags[packet] & PacketFlag.segmented) !== 0;
    return (segmented ? this.#headersOf(packet) + gsoSize[packet] : length) <= largest;
  }

  /** hot: */
  #refuse(counter: number): true {
    this.#counters[counter]++;
    return true;
  }

  /** hot: */
  #count(queue: DeviceQueue, packet: number, bytes: number): void {
    this.#counters[NetCounter.rxPackets]++;
    this.#counters[NetCounter.rxBytes] += bytes;
    const flags = this.#pool.flags[packet];
    if ((flags & (PacketFlag.needsChecksum | PacketFlag.checksumValid)) === 0) return;
    const { statistics } = this.#options;
    const needs = (flags & PacketFlag.needsChecksum) !== 0;
    this.checksummed++;
    statistics.add(queue.index, needs ? Stat.rxNeedsChecksum : Stat.rxChecksumValid, 1);
    if ((flags & PacketFlag.segmented) === 0) return;
    statistics.add(queue.index, Stat.rxGsoPackets, 1);
    statistics.add(queue.index, Stat.rxGsoBytes, bytes);
  }
}

/** What became of spreading a frame, if not a number of buffers. */
const Spread = { done: 1, none: 0, refused: -1 } as const;
