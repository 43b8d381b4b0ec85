/**
 * The transmit side of a network function (Virtio 1.4, 5.1.9.2): from transmit queues through IPsec to the link.
 *
 * A buffer is copied once, header and frame together, into a packet of the pool; everything after that looks at the
 * copy, which the driver cannot change. A frame that asked for SECURITY goes out protected or not at all.
 *
 * Left out: segmentation (GSO types other than NONE are not offered, so they are dropped).
 */
import { Verdict } from '../fallback/verdict.ts';
import { addBytes, finish } from '../packet/checksum.ts';
import { Ethernet } from '../packet/fields.ts';
import type { PacketPool } from '../packet/pool.ts';
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
} from '../virtio-net/header.ts';
import { NetCounter } from './counters.ts';
import type { FaultSet } from './faults.ts';
import { isIpFrame } from './frames.ts';
import type { DeviceIpsec } from './ipsec.ts';
import type { Link } from './links/link.ts';
import { type DeviceQueue, NO_BUFFER } from './queues.ts';
import type { Steering } from './steering.ts';

/** Most frames that one poll takes from a queue. */
const BURST = 64;

export interface TransmitterOptions {
  readonly pool: PacketPool;
  readonly ipsec: DeviceIpsec | null;
  readonly link: Link;
  readonly counters: Float64Array;
  readonly steering: Steering;
  /** Bytes of the largest frame. */
  readonly maxFrame: number;
  readonly faults: FaultSet;
}

export class Transmitter {
  /** Set when frames were left in a queue because the link has no room, or the pool no packet. */
  blocked = false;
  readonly #options: TransmitterOptions;
  readonly #pool: PacketPool;
  readonly #counters: Float64Array;
  readonly #header = new NetHeader();
  readonly #fresh = new Uint32Array(BURST);
  readonly #out = new Uint32Array(BURST);
  readonly #dropped = new Uint32Array(BURST);
  readonly #verdicts = new Uint8Array(BURST);
  #layout: NetHeaderLayout | null = null;
  #checksums = false;

  constructor(options: TransmitterOptions) {
    this.#options = options;
    this.#pool = options.pool;
    this.#counters = options.counters;
  }

  start(layout: NetHeaderLayout, features: FeatureSet): void {
    this.#layout = layout;
    this.#checksums = features.has(Feature.CSUM);
    this.blocked = false;
  }

  stop(): void {
    this.#layout = null;
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
    let used = 0;
    let drops = 0;
    let secured = false;
    for (; taken < got; taken++) {
      const id = queue.take();
      if (id === NO_BUFFER) break;
      const packet = this.#fresh[taken];
      const accepted = this.#receive(queue, layout, packet);
      if (queue.broken !== null) break;
      if (!this.#options.faults.has('tx-never-completes')) queue.complete(id, 0);
      if (accepted) {
        this.#out[used++] = packet;
        secured ||= this.#pool.sa[packet] !== 0;
        this.#options.steering.sent(this.#pool.u8, this.#pool.offset[packet], this.#pool.length[packet], pair);
      } else {
        this.#dropped[drops++] = packet;
      }
    }
    for (let i = taken; i < got; i++) this.#fresh[i - taken] = this.#fresh[i];
    this.#pool.free(this.#fresh, got - taken);
    this.#pool.free(this.#dropped, drops);
    if (secured) used = this.#protect(used);
    if (used > 0) this.#send(used);
    return taken;
  }

  /** hot: copies the buffer that was taken last into `packet` and checks it; false when it must be dropped. */
  #receive(queue: DeviceQueue, layout: NetHeaderLayout, packet: number): boolean {
    const pool = this.#pool;
    const frame = queue.readableBytes - layout.length;
    if (frame < Ethernet.length || frame > this.#options.maxFrame) {
      this.#counters[NetCounter.txLength]++;
      return false;
    }
    const at = pool.offset[packet];
    const headerAt = at - layout.length;
    if (queue.gather(0, queue.readableBytes, headerAt) < 0) return false;
    pool.length[packet] = frame;
    // Most headers ask for nothing.
    if (pool.u8[headerAt] === 0 && pool.u8[headerAt + NetHeaderField.gsoType] === GsoType.NONE) return true;
    const header = this.#header;
    decodeNetHeader(layout, pool.u8, headerAt, at, header);
    if (header.gsoType !== GsoType.NONE || !isAcceptable(header.flags, header.gsoType, true)) {
      this.#counters[NetCounter.txHeader]++;
      return false;
    }
    if ((header.flags & NetHeaderFlag.NEEDS_CSUM) !== 0 && !this.#fillChecksum(at, frame)) {
      this.#counters[NetCounter.txHeader]++;
      return false;
    }
    if ((header.flags & NetHeaderFlag.SECURITY) === 0) return true;
    if (!isIpFrame(pool.u8, at)) {
      this.#counters[NetCounter.txIpsec]++;
      return false;
    }
    return this.#tag(packet);
  }

  /** hot: computes the checksum that the driver left to the device (5.1.9.2.2). */
  #fillChecksum(at: number, length: number): boolean {
    const start = this.#header.csumStart;
    const place = start + this.#header.csumOffset;
    if (!this.#checksums || start >= length || place + 2 > length) return false;
    const u8 = this.#pool.u8;
    // A result of zero means "no checksum" to UDP, and 0xffff is the same number.
    const value = finish(addBytes(u8, at + start, length - start, 0)) || 0xffff;
    u8[at + place] = value >>> 8;
    u8[at + place + 1] = value & 0xff;
    return true;
  }

  /** hot: names the SA that the header asks for. */
  #tag(packet: number): boolean {
    const ipsec = this.#options.ipsec;
    const isOutbound = this.#header.resourceType === ResourceType.NET_IPSEC_OUTB_SA;
    const handle = ipsec !== null && isOutbound ? ipsec.outboundHandle(this.#header.resourceId) : 0;
    if (handle === 0) {
      this.#counters[NetCounter.txNoSa]++;
      return false;
    }
    this.#pool.sa[packet] = handle;
    return true;
  }

  /** hot: protects what asked for it; what cannot be protected is dropped. Returns how many are left. */
  #protect(n: number): number {
    const { ipsec } = this.#options;
    if (ipsec === null) return 0;
    const { sa } = this.#pool;
    ipsec.protect(this.#out, n, this.#verdicts);
    let kept = 0;
    let drops = 0;
    for (let i = 0; i < n; i++) {
      const packet = this.#out[i];
      const verdict = this.#verdicts[i];
      if (verdict === Verdict.ok || (verdict === Verdict.notIpsec && sa[packet] === 0)) this.#out[kept++] = packet;
      else this.#dropped[drops++] = packet;
    }
    this.#counters[NetCounter.txIpsec] += drops;
    this.#pool.free(this.#dropped, drops);
    return kept;
  }

  /** hot: */
  #send(n: number): void {
    const { length, sa, flags } = this.#pool;
    let bytes = 0;
    for (let i = 0; i < n; i++) {
      const packet = this.#out[i];
      bytes += length[packet];
      sa[packet] = 0;
      flags[packet] = 0;
    }
    this.#counters[NetCounter.txPackets] += n;
    this.#counters[NetCounter.txBytes] += bytes;
    this.#options.link.send(this.#out, n);
  }
}
