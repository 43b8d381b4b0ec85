/**
 * The transmit side of a network function (Virtio 1.4, 5.1.9.2): from transmit queues through IPsec to the link.
 *
 * A buffer is copied once, header and frame together, into a packet of the pool; everything after that looks at the
 * copy, which the driver cannot change. A frame that asked for SECURITY goes out protected or not at all.
 *
 * A checksum that the driver has left open stays open when the other end takes such (`unfinished.ts`), else the device fills it. Packets that
 * stand for several are the business of `transmit-large.ts`. What asked for SECURITY is always finished first: segments are protected one by one.
 */
import { Verdict } from '../fallback/verdict.ts';
import { addBytes, addWords, finish } from '../packet/checksum.ts';
import { Ethernet } from '../packet/fields.ts';
import { PacketFlag } from '../packet/pool.ts';
import { MAX_SEGMENTS } from '../packet/segment.ts';
import { ResourceType } from '../virtio/admin-wire.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import {
  decodeNetHeader,
  GsoType,
  isAcceptable,
  NetHeader,
  NetHeaderField,
  NetHeaderFlag,
  type NetHeaderLayout,
  sentGsoTypes,
} from '../virtio-net/header.ts';
import type { Arena } from './arena.ts';
import { NetCounter } from './counters.ts';
import { type FrameFaults, frameFaults } from './fault-frames.ts';
import type { FaultSet } from './faults.ts';
import type { FramePool } from './frame-pool.ts';
import { isIpFrame } from './frames.ts';
import type { GuestMemory } from './guest-memory.ts';
import type { DeviceIpsec } from './ipsec.ts';
import type { Link } from './links/link.ts';
import { type QueueStatistics, Stat } from './queue-statistics.ts';
import { type DeviceQueue, NO_BUFFER } from './queues.ts';
import type { Steering } from './steering.ts';
import { Fate, LargePackets } from './transmit-large.ts';
import { Unfinished } from './unfinished.ts';

/** Most frames that one poll takes from a queue. */
const BURST = 64;
export interface TransmitterOptions {
  readonly arena: Arena;
  readonly pool: FramePool;
  /** That of the driver that sends. */
  readonly memory: GuestMemory;
  readonly ipsec: DeviceIpsec | null;
  readonly link: Link;
  readonly counters: Float64Array;
  readonly steering: Steering;
  readonly statistics: QueueStatistics;
  /** Bytes of the largest frame. */
  readonly maxFrame: number;
  readonly faults: FaultSet;
}

export class Transmitter {
  /** Set when frames were left in a queue because the link has no room, or the pool no packet. */
  blocked = false;
  readonly #options: TransmitterOptions;
  readonly #pool: FramePool;
  readonly #counters: Float64Array;
  readonly #header = new NetHeader();
  readonly #fresh = new Uint32Array(BURST);
  /** Frames that are ready to be sent, and how many of them. */
  readonly #out = new Uint32Array(BURST);
  #ready = 0;
  /** Whether one of them asked for IPsec. */
  #secured = false;
  readonly #segments = new Uint32Array(MAX_SEGMENTS);
  readonly #large: LargePackets;
  readonly #dropped = new Uint32Array(BURST);
  readonly #refused = new Uint32Array(BURST);
  readonly #verdicts = new Uint8Array(BURST);
  readonly #faults: FrameFaults | null;
  readonly #completes: boolean;
  #layout: NetHeaderLayout | null = null;
  #checksums = false;
  /** `Unfinished`: what the other end takes during this poll. */
  #taken: number = Unfinished.nothing;
  /** The queue that is polled, and its packets so far whose checksum was left to the device. */
  #queue = 0;
  #checksummed = 0;

  constructor(options: TransmitterOptions) {
    this.#options = options;
    this.#pool = options.pool;
    this.#counters = options.counters;
    this.#faults = frameFaults(options.faults);
    this.#completes = !options.faults.has('tx-never-completes');
    this.#large = new LargePackets(options, this.#header, () => this.#flush());
  }

  close(): void {
    this.#large.close();
  }

  start(layout: NetHeaderLayout, features: FeatureSet): void {
    this.#layout = layout;
    this.#checksums = features.has(Feature.CSUM);
    this.#large.start(sentGsoTypes(features));
    this.blocked = false;
  }

  stop(): void {
    this.#layout = null;
    this.#large.stop();
    this.blocked = false;
  }

  /**
   * hot: moves up to a burst of frames from `queue`, the transmit queue of `pair`; returns how many buffers it took.
   */
  poll(queue: DeviceQueue, pair: number): number {
    const layout = this.#layout;
    if (layout === null) return 0;
    const waiting = queue.available();
    if (waiting === 0) return 0;
    const room = this.#options.link.room();
    if (room === 0) {
      this.blocked = true;
      return 0;
    }
    const want = Math.min(waiting, room, BURST);
    const got = this.#pool.allocate(this.#fresh, want);
    if (got < want) this.blocked = true;
    let taken = 0;
    let drops = 0;
    this.#ready = 0;
    this.#secured = false;
    let left = room;
    this.#taken = this.#options.link.taken;
    this.#large.taken = this.#taken;
    const { statistics } = this.#options;
    const packetsBefore = this.#counters[NetCounter.txPackets];
    const bytesBefore = this.#counters[NetCounter.txBytes];
    const malformedBefore = this.#counters[NetCounter.txLength];
    let lost = 0;
    this.#queue = queue.index;
    this.#checksummed = 0;
    for (; taken < got; taken++) {
      const id = queue.take();
      if (id === NO_BUFFER) break;
      const packet = this.#fresh[taken];
      const isLarge = this.#large.isLarge(queue, layout);
      const count = isLarge ? this.#large.stage(queue, layout, packet) : this.#receive(queue, layout, packet);
      if (queue.broken !== null) break;
      if (count > left || count > this.#pool.available) {
        queue.putBack(1);
        this.blocked = true;
        break;
      }
      if (this.#completes) queue.complete(id, 0);
      if (count === Fate.whole || count === Fate.unfinished) this.#emit(packet, pair);
      else this.#dropped[drops++] = packet;
      if (count > 0) this.#segment(count, pair);
      else if (count <= Fate.unfinished) this.#countWhole(packet, count === Fate.passed, pair);
      if (count === Fate.dropped) lost++;
      left -= count < 0 ? 1 : count;
    }
    for (let i = taken; i < got; i++) this.#fresh[i - taken] = this.#fresh[i];
    this.#pool.free(this.#fresh, got - taken);
    this.#pool.free(this.#dropped, drops);
    this.#flush();
    statistics.add(queue.index, Stat.packets, this.#counters[NetCounter.txPackets] - packetsBefore);
    statistics.add(queue.index, Stat.bytes, this.#counters[NetCounter.txBytes] - bytesBefore);
    statistics.add(queue.index, Stat.drops, lost);
    statistics.add(queue.index, Stat.special, this.#counters[NetCounter.txLength] - malformedBefore);
    statistics.add(queue.index, Stat.txNeedsChecksum, this.#checksummed);
    statistics.add(queue.index, Stat.txChecksumNone, taken - this.#checksummed);
    return taken;
  }

  /** hot: a packet that goes on without having been segmented; `passed`: it has gone already. */
  #countWhole(packet: number, passed: boolean, pair: number): void {
    const { statistics, steering } = this.#options;
    const { u8, offset, length } = this.#pool;
    const bytes = length[packet];
    this.#checksummed++;
    this.#counters[NetCounter.txUnfinished]++;
    statistics.add(this.#queue, Stat.txGsoPackets, 1);
    statistics.add(this.#queue, Stat.txGsoBytes, bytes);
    statistics.add(this.#queue, Stat.txGsoWholePackets, 1);
    statistics.add(this.#queue, Stat.txGsoWholeBytes, bytes);
    if (!passed) return;
    steering.sent(u8, offset[packet], bytes, pair);
    this.#counters[NetCounter.txPackets]++;
    this.#counters[NetCounter.txBytes] += bytes;
  }

  /** hot: */
  #refuse(counter: number): number {
    this.#counters[counter]++;
    return Fate.dropped;
  }

  /** hot: emits the `count` segments of the planned packet, for which the pool has room. */
  #segment(count: number, pair: number): void {
    const pool = this.#pool;
    const { statistics } = this.#options;
    const { segmenter } = this.#large;
    this.#checksummed++;
    const isSecured = (this.#header.flags & NetHeaderFlag.SECURITY) !== 0;
    const handle = isSecured ? this.#outboundHandle() : 0;
    if (isSecured && handle === 0) return;
    pool.allocate(this.#segments, count);
    const { isTunnel } = this.#large;
    let segmentBytes = 0;
    for (let k = 0; k < count; k++) {
      const packet = this.#segments[k];
      pool.length[packet] = segmenter.cut(k, pool.offset[packet]);
      pool.sa[packet] = handle;
      if (!isTunnel) pool.flags[packet] = PacketFlag.checksumValid;
      segmentBytes += pool.length[packet];
      this.#emit(packet, pair);
    }
    statistics.add(this.#queue, Stat.txGsoPackets, 1);
    statistics.add(this.#queue, Stat.txGsoBytes, segmenter.length);
    statistics.add(this.#queue, Stat.txGsoSegments, count);
    statistics.add(this.#queue, Stat.txGsoSegmentBytes, segmentBytes);
    this.#counters[NetCounter.txSegmented]++;
    this.#counters[NetCounter.txSegments] += count;
  }

  /** hot: puts a frame among those that are ready. */
  #emit(packet: number, pair: number): void {
    const { u8, offset, length, sa } = this.#pool;
    this.#options.steering.sent(u8, offset[packet], length[packet], pair);
    this.#out[this.#ready++] = packet;
    this.#secured ||= sa[packet] !== 0;
    if (this.#ready === BURST) this.#flush();
  }

  /** hot: protects and sends what is ready. */
  #flush(): void {
    const n = this.#secured ? this.#protect(this.#ready) : this.#ready;
    if (n > 0) this.#send(n);
    this.#ready = 0;
    this.#secured = false;
  }

  /** hot: copies the buffer that was taken last into `packet` and checks it: `Fate`, or a number of segments as `#stage`. */
  #receive(queue: DeviceQueue, layout: NetHeaderLayout, packet: number): number {
    const pool = this.#pool;
    const { u8 } = pool;
    const frame = queue.readableBytes - layout.length;
    if (frame < Ethernet.length || frame > this.#options.maxFrame) return this.#refuse(NetCounter.txLength);
    const at = pool.offset[packet];
    const headerAt = at - layout.length;
    if (queue.gather(0, queue.readableBytes, headerAt) < 0) return Fate.dropped;
    pool.length[packet] = frame;
    if (this.#faults?.sent({ layout, u8, header: headerAt, frame: at, length: frame }) === false) return Fate.dropped;
    // Most headers ask for nothing.
    if (u8[headerAt] === 0 && u8[headerAt + NetHeaderField.gsoType] === GsoType.NONE) return Fate.whole;
    const header = this.#header;
    decodeNetHeader(layout, u8, headerAt, at, header);
    if (header.gsoType !== GsoType.NONE) return this.#large.short(packet);
    if (!isAcceptable(header.flags, header.gsoType, true)) return this.#refuse(NetCounter.txHeader);
    if ((header.flags & NetHeaderFlag.NEEDS_CSUM) !== 0) {
      if (!this.#leaveChecksum(packet, frame) && !this.#fillChecksum(at, frame)) {
        return this.#refuse(NetCounter.txHeader);
      }
    }
    if ((header.flags & NetHeaderFlag.SECURITY) === 0) return Fate.whole;
    if (!isIpFrame(u8, at)) return this.#refuse(NetCounter.txIpsec);
    const handle = this.#outboundHandle();
    pool.sa[packet] = handle;
    return handle === 0 ? Fate.dropped : Fate.whole;
  }

  /** hot: leaves a checksum to the driver at the other end, when it takes that and the frame goes out as it is. */
  #leaveChecksum(packet: number, length: number): boolean {
    const { flags, csumStart, csumOffset } = this.#header;
    if ((this.#taken & Unfinished.checksum) === 0 || (flags & NetHeaderFlag.SECURITY) !== 0) return false;
    if (!this.#checksums || csumStart >= length || csumStart + csumOffset + 2 > length) return false;
    const pool = this.#pool;
    this.#checksummed++;
    pool.flags[packet] = PacketFlag.needsChecksum;
    pool.checksumStart[packet] = csumStart;
    pool.checksumOffset[packet] = csumOffset;
    return true;
  }

  /** hot: computes the checksum that the driver left to the device (5.1.9.2.2). */
  #fillChecksum(at: number, length: number): boolean {
    const start = this.#header.csumStart;
    const place = start + this.#header.csumOffset;
    if (!this.#checksums || start >= length || place + 2 > length) return false;
    this.#checksummed++;
    const { u8, u16 } = this.#pool;
    const bytes = length - start;
    const sum = ((at + start) & 1) === 0 ? addWords(u16, u8, at + start, bytes, 0) : addBytes(u8, at + start, bytes, 0);
    // A result of zero means "no checksum" to UDP, and 0xffff is the same number.
    const value = finish(sum) || 0xffff;
    u8[at + place] = value >>> 8;
    u8[at + place + 1] = value & 0xff;
    return true;
  }

  /** hot: the SA that the header asks for; 0, and counted, when it is none. */
  #outboundHandle(): number {
    const ipsec = this.#options.ipsec;
    const isOutbound = this.#header.resourceType === ResourceType.NET_IPSEC_OUTB_SA;
    const handle = ipsec !== null && isOutbound ? ipsec.outboundHandle(this.#header.resourceId) : 0;
    if (handle === 0) this.#counters[NetCounter.txNoSa]++;
    return handle;
  }

  /** hot: protects what asked for it; what cannot be protected is dropped. Returns how many are left. */
  #protect(n: number): number {
    const { ipsec } = this.#options;
    if (ipsec === null) return 0;
    const { u8, sa, offset, length } = this.#pool;
    ipsec.protect(this.#out, n, this.#verdicts);
    let kept = 0;
    let drops = 0;
    for (let i = 0; i < n; i++) {
      const packet = this.#out[i];
      const verdict = this.#verdicts[i];
      if (verdict === Verdict.ok) this.#faults?.protected(u8, offset[packet], length[packet]);
      if (verdict === Verdict.ok || (verdict === Verdict.notIpsec && sa[packet] === 0)) this.#out[kept++] = packet;
      else this.#refused[drops++] = packet;
    }
    this.#counters[NetCounter.txIpsec] += drops;
    this.#pool.free(this.#refused, drops);
    return kept;
  }

  /** hot: */
  #send(n: number): void {
    const { length, sa } = this.#pool;
    let bytes = 0;
    for (let i = 0; i < n; i++) {
      const packet = this.#out[i];
      bytes += length[packet];
      sa[packet] = 0;
    }
    this.#counters[NetCounter.txPackets] += n;
    this.#counters[NetCounter.txBytes] += bytes;
    this.#options.link.send(this.#out, n);
  }
}
