/**
 * Packets that a driver wants segmented (Virtio 1.4, 5.1.9.2). Such a packet goes on as it is when the other end takes it (`unfinished.ts`), one that is
 * longer than a frame straight from buffer to buffer if that can be. Else it is cut, from a place of its own (`packet/segment.ts`).
 *
 * Header and headers are copied once, and only the copy is looked at.
 */
import { GSO_TUNNEL, GsoSet, isAmong } from '../packet/gso.ts';
import { PacketFlag } from '../packet/pool.ts';
import { MAX_LARGE_FRAME, Segmenter } from '../packet/segment.ts';
import {
  decodeNetHeader,
  isAcceptable,
  type NetHeader,
  NetHeaderFlag,
  type NetHeaderLayout,
} from '../virtio-net/header.ts';
import type { Arena } from './arena.ts';
import { NetCounter } from './counters.ts';
import type { FramePool } from './frame-pool.ts';
import { FrameSource } from './frame-source.ts';
import type { GuestMemory } from './guest-memory.ts';
import type { Link } from './links/link.ts';
import type { DeviceQueue } from './queues.ts';
import { takesLarge, Unfinished } from './unfinished.ts';

/** Private bytes for one packet that is to be segmented, its header in front. */
const Place = { headroom: 64, size: 0x11000 } as const;
/** Bytes of a large packet that are looked at before anything else: header and all headers. */
const HEAD = 1024;

/** What becomes of a buffer, if not a number of segments. */
export const Fate = {
  dropped: 0,
  /** Sent as a frame. */
  whole: -1,
  /** Sent as a packet that stands for several. */
  unfinished: -2,
  /** The same, and the other end has it already. */
  passed: -3,
} as const;

export interface LargePacketsOptions {
  readonly arena: Arena;
  readonly pool: FramePool;
  /** That of the driver that sends. */
  readonly memory: GuestMemory;
  readonly link: Link;
  readonly counters: Float64Array;
  /** Bytes of the largest frame. */
  readonly maxFrame: number;
}

export class LargePackets {
  /** The packet that was planned last. */
  readonly segmenter: Segmenter;
  /** `Unfinished`: what the other end takes now. */
  taken: number = Unfinished.nothing;
  readonly #options: LargePacketsOptions;
  readonly #pool: FramePool;
  readonly #header: NetHeader;
  readonly #sendEarlier: () => void;
  readonly #place: number;
  /** The packet that was taken last, as `sendDirect` is told of it. */
  #source: FrameSource | null = null;
  #types = 0;

  /** `header` is where the headers of packets are decoded; `sendEarlier` sends what was emitted before. */
  constructor(options: LargePacketsOptions, header: NetHeader, sendEarlier: () => void) {
    this.#options = options;
    this.#pool = options.pool;
    this.#header = header;
    this.#sendEarlier = sendEarlier;
    this.#place = options.arena.allocate(Place.size);
    this.segmenter = new Segmenter(options.pool);
  }

  close(): void {
    this.#options.arena.release(this.#place, Place.size);
  }

  /** `types` is the set of those that were negotiated. */
  start(types: number): void {
    this.#types = types;
  }

  stop(): void {
    this.#source = null;
  }

  /** hot: whether the buffer that was taken last is longer than a frame, and may be segmented. */
  isLarge(queue: DeviceQueue, layout: NetHeaderLayout): boolean {
    return this.#types !== 0 && queue.readableBytes - layout.length > this.#options.maxFrame;
  }

  /**
   * hot: looks at the headers of the buffer that was taken last and decides what becomes of it: `Fate`, or into how many segments
   * it is to be cut. `packet` is empty, and may be used for it.
   */
  stage(queue: DeviceQueue, layout: NetHeaderLayout, packet: number): number {
    const bytes = queue.readableBytes;
    const frame = bytes - layout.length;
    if (frame > MAX_LARGE_FRAME) return this.#refuse(NetCounter.txLength);
    const pool = this.#pool;
    const hasArea = pool.enlarge(packet);
    const at = hasArea ? pool.offset[packet] : this.#place + Place.headroom;
    const head = Math.min(bytes, HEAD);
    if (queue.gather(0, head, at - layout.length) < 0) return Fate.dropped;
    decodeNetHeader(layout, pool.u8, at - layout.length, at, this.#header);
    const count = this.#plan(at, frame, head - layout.length);
    if (count === 0) return Fate.dropped;
    const passes = hasArea && this.#passes();
    if (passes) {
      this.#describe(packet, frame);
      if (this.#passDirect(queue, layout, packet, head)) return Fate.passed;
      if (queue.broken !== null) return Fate.dropped;
    }
    if (queue.gather(head, bytes - head, at - layout.length + head) < 0) return Fate.dropped;
    return passes ? Fate.unfinished : count;
  }

  /** hot: the same for a packet that is no longer than a frame, and is in its place; its header was decoded. */
  short(packet: number): number {
    const { u8, offset, length } = this.#pool;
    const at = offset[packet];
    const frame = length[packet];
    const count = this.#plan(at, frame, frame);
    if (count === 0) return Fate.dropped;
    if (this.#passes()) {
      this.#describe(packet, frame);
      return Fate.unfinished;
    }
    // Room for its segments.
    const to = this.#place + Place.headroom;
    u8.copyWithin(to, at, at + frame);
    return this.#plan(to, frame, frame);
  }

  /**
   * hot: how many segments the packet of `frame` bytes at `at`, whose header was decoded and of which `visible` bytes are there, makes; 0 when
   * it must be dropped.
   */
  #plan(at: number, frame: number, visible: number): number {
    const { flags, gsoType } = this.#header;
    const { segmenter } = this;
    const types = this.#types;
    const isAsked = (flags & NetHeaderFlag.NEEDS_CSUM) !== 0 && isAmong(gsoType, types);
    const outer = (flags & NetHeaderFlag.UDP_TUNNEL_CSUM) === 0 || (types & GsoSet.outerChecksum) !== 0;
    const isGood = isAsked && outer && isAcceptable(flags, gsoType, true);
    const count = isGood ? segmenter.plan(this.#header, at, frame, visible) : 0;
    if (count === 0) return this.#refuse(NetCounter.txHeader);
    if (segmenter.headers + Math.min(segmenter.size, frame) > this.#options.maxFrame) {
      return this.#refuse(NetCounter.txLength);
    }
    return count;
  }

  /** hot: whether the other end takes the packet that was planned as it is. */
  #passes(): boolean {
    const { flags, gsoType } = this.#header;
    if ((flags & NetHeaderFlag.SECURITY) !== 0) return false;
    const outerChecksum = (flags & NetHeaderFlag.UDP_TUNNEL_CSUM) !== 0;
    return takesLarge(this.taken, gsoType, this.segmenter.isIpv6, outerChecksum);
  }

  /** Whether the packet that was planned last is in a tunnel: what is said of its checksum is not said of the outermost one (5.1.9.4.1). */
  get isTunnel(): boolean {
    return (this.#header.gsoType & GSO_TUNNEL) !== 0;
  }

  /** hot: notes in `packet` what it stands for. */
  #describe(packet: number, length: number): void {
    const pool = this.#pool;
    const header = this.#header;
    const outer = (header.flags & NetHeaderFlag.UDP_TUNNEL_CSUM) !== 0 ? PacketFlag.outerChecksum : 0;
    pool.flags[packet] = PacketFlag.needsChecksum | PacketFlag.segmented | outer;
    pool.length[packet] = length;
    pool.checksumStart[packet] = header.csumStart;
    pool.checksumOffset[packet] = header.csumOffset;
    pool.gsoType[packet] = header.gsoType;
    pool.gsoSize[packet] = header.gsoSize;
    pool.outerTransport[packet] = header.outerThOffset;
    pool.innerNetwork[packet] = header.innerNhOffset;
  }

  /** hot: lets the other end copy the rest of a packet, of which `head` bytes were copied, from its buffer; false when it cannot. */
  #passDirect(queue: DeviceQueue, layout: NetHeaderLayout, packet: number, head: number): boolean {
    const { link, memory } = this.#options;
    this.#sendEarlier();
    if (this.#source?.queue !== queue) this.#source = new FrameSource(queue, memory, layout.length);
    this.#source.begin(head - layout.length);
    return link.sendDirect(packet, this.#source);
  }

  /** hot: */
  #refuse(counter: number): number {
    this.#options.counters[counter]++;
    return Fate.dropped;
  }
}
