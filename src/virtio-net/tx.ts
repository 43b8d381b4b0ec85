/**
 * The transmit queue (Virtio 1.4, 5.1.9.2): bursts of packet numbers, each packet one buffer with its header in the
 * headroom right in front of it.
 *
 * A packet with `pool.sa[p]` not 0 asks for IPsec: its header carries SECURITY and the SA's resource. When that SA is
 * not on the device the packet is dropped and counted; it is never sent in the clear. A packet with `PacketFlag.segmented`
 * is cut into segments by the device (HOST_TSO4, HOST_TSO6, HOST_USO). A chain of slots is one buffer of several
 * descriptors; its header stands in the first slot, and all headers of the packet must be there. The packet may be inside a UDP tunnel
 * (HOST_UDP_TUNNEL_GSO), and leave the outer checksum to the device too (HOST_UDP_TUNNEL_GSO_CSUM). Left out: UFO.
 */
import type { VirtioError } from '../errors.ts';
import { Ethernet, Tcp, Udp, Vlan } from '../packet/fields.ts';
import { baseType, GSO_TUNNEL, GsoSet, GsoType, isAmong } from '../packet/gso.ts';
import { NO_PACKET, PacketFlag, type PacketPool } from '../packet/pool.ts';
import { ResourceType } from '../virtio/admin-wire.ts';
import type { QueueNotifier } from '../virtio/transport.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';
import {
  type HeaderMemory,
  headerMemory,
  NET_HEADER_MAX,
  NET_HEADER_MIN,
  NetHeaderFlag,
  type NetHeaderLayout,
  networkHeaderOffset,
  writeBasicHeader,
  writePlainHeader,
  writeSecurityHeader,
  writeSegmentation,
  writeTransmitHeader,
  writeTunnel,
} from './header.ts';
import { NOT_INLINE, type SaTable } from './sa-table.ts';
import { TxWatch } from './tx-watch.ts';

export interface TxQueueOptions {
  /** Its `iovaLow`/`iovaHigh` are those of the pool, its `headroom` is `layout.length`. */
  readonly queue: Virtqueue;
  readonly notifier: QueueNotifier;
  readonly pool: PacketPool;
  readonly layout: NetHeaderLayout;
  readonly sas: SaTable;
  /** True when CSUM was negotiated. */
  readonly checksum?: boolean;
  /** The set of types that may be sent: see `sentGsoTypes`. Default none. */
  readonly gsoTypes?: number;
  /** Bytes of the longest packet that is not to be segmented, link header included: with MTU negotiated, the MTU + 14. Default: what a slot holds. */
  readonly maxLength?: number;
  /** By `TxCounter`: where to count, for others to see. Default an array of its own. */
  readonly counters?: Float64Array;
}

/** Indices into `TxQueue.counters`. */
export const TxCounter = {
  packets: 0,
  bytes: 1,
  /** Dropped: the SA that was asked for is not on the device. */
  droppedSa: 2,
  /** Dropped: empty, too long, outside its slots or without headroom, or a checksum or segments that the device cannot make. */
  droppedInvalid: 3,
  /** `burst` took fewer packets than it was given. */
  ringFull: 4,
  /** Notifications that the device had not asked for, because it returned nothing: `tx-watch.ts`. */
  renotified: 5,
} as const;
export const TX_COUNTERS = 6;

/** Most slots of a chain: 64 KiB in slots of 2 KiB, and some. */
export const MAX_CHAIN = 40;
/** Longest packet that is to be segmented: the longest IP packet, an Ethernet header and two VLAN tags. */
const MAX_SEGMENTED = 0xffff + Ethernet.length + 2 * Vlan.length;
/** What `#prepare` found: one buffer of one descriptor, or a chain; else the counter of why the packet is dropped. */
const Prepared = { single: 0, chain: -1 } as const;

/** `burst` reclaims once this many are out: packets that come back soon are still in the cache. Chains hold many slots: they come back at once. */
const RECLAIM_AT = 64;

export class TxQueue {
  readonly pool: PacketPool;
  /** By `TxCounter`. */
  readonly counters: Float64Array;
  readonly #queue: Virtqueue;
  readonly #notifier: QueueNotifier;
  readonly #watch: TxWatch;
  readonly #layout: NetHeaderLayout;
  readonly #sas: SaTable;
  readonly #checksum: boolean;
  readonly #gsoTypes: number;
  readonly #maxLength: number;
  readonly #maxChain: number;
  readonly #memory: HeaderMemory;
  readonly #returned: Uint32Array;
  readonly #written: Uint32Array;
  /** The chain that was prepared last: IOVA low, high and length of each piece. */
  readonly #pieces = new Uint32Array(3 * MAX_CHAIN);
  #pieceCount = 0;
  #chainBytes = 0;
  /** Set with the first chain: what comes back from then on may be one. */
  #hasChains = false;

  constructor(options: TxQueueOptions) {
    const { pool, queue, layout } = options;
    this.pool = pool;
    this.counters = options.counters ?? new Float64Array(TX_COUNTERS);
    this.#queue = queue;
    this.#notifier = options.notifier;
    const renotify = () => {
      this.counters[TxCounter.renotified]++;
      this.#notifier.notify();
    };
    this.#watch = new TxWatch(queue, () => this.reclaim(), renotify);
    this.#layout = layout;
    this.#sas = options.sas;
    this.#checksum = options.checksum ?? false;
    this.#gsoTypes = options.gsoTypes ?? 0;
    this.#maxLength = options.maxLength ?? pool.stride;
    this.#maxChain = Math.min(MAX_CHAIN, queue.size);
    this.#memory = headerMemory(pool.memory);
    this.#returned = new Uint32Array(queue.size);
    this.#written = new Uint32Array(queue.size);
  }

  /** Why the queue is closed, or null. */
  get broken(): VirtioError | null {
    return this.#queue.broken;
  }

  /** Packets that the ring has room for when it is empty. */
  get size(): number {
    return this.#queue.size;
  }

  /** Packets that `burst` would take now without waiting for the device. */
  get room(): number {
    return this.#queue.free;
  }

  /**
   * Sends the first packets of `packets[0..n)` and returns how many were taken; the others stay the caller's. Taken
   * packets belong to the queue, also those that it dropped, and return to the pool by `reclaim`, which this
   * calls when the ring is full. A packet must not be given twice.
   */
  burst(packets: Uint32Array, n: number): number {
    // hot:
    const queue = this.#queue;
    const { free } = queue;
    if (free < n || queue.size - free >= RECLAIM_AT || this.#hasChains) this.reclaim();
    let count = Math.min(n, queue.free);
    if (count < n) this.counters[TxCounter.ringFull]++;
    if (count <= 0 || queue.broken !== null) return 0;
    const { pool } = this;
    const { offset, length, sa, flags, next } = pool;
    const { f64, u32 } = this.#memory;
    const layout = this.#layout;
    const { resourceId } = this.#sas;
    // Integers in locals: a property or an imported constant is loaded and converted at each use.
    const stride = pool.stride | 0;
    const headerLength = layout.length | 0;
    const end = (stride - headerLength) | 0;
    const handles = resourceId.length | 0;
    const basic = headerLength === NET_HEADER_MIN;
    // The layouts that whole words are written of, and what their places are multiples of.
    const slow = basic || headerLength === NET_HEADER_MAX ? 0 : 1;
    const misaligned = basic ? 3 : 7;
    const outer = layout.outerNhOffset >= 0;
    const maxLength = this.#maxLength | 0;
    const security = layout.security | 0;
    const offloads = PacketFlag.needsChecksum | PacketFlag.segmented | 0;
    const noPacket = NO_PACKET | 0;
    const notInline = NOT_INLINE | 0;
    const type = ResourceType.NET_IPSEC_OUTB_SA | 0;
    let from = 0;
    let bytes = 0;
    let dropped = 0;
    let i = 0;
    while (i < count) {
      // Four at a time: what an access to an array costs besides the access itself is then paid once for four.
      if (i + 4 <= count) {
        const p0 = packets[i];
        const p1 = packets[i + 1];
        const p2 = packets[i + 2];
        const p3 = packets[i + 3];
        const size0 = length[p0] | 0;
        const size1 = length[p1] | 0;
        const size2 = length[p2] | 0;
        const size3 = length[p3] | 0;
        const at0 = ((offset[p0] | 0) - headerLength) | 0;
        const at1 = ((offset[p1] | 0) - headerLength) | 0;
        const at2 = ((offset[p2] | 0) - headerLength) | 0;
        const at3 = ((offset[p3] | 0) - headerLength) | 0;
        const before0 = (at0 - Math.imul(p0, stride)) | 0;
        const before1 = (at1 - Math.imul(p1, stride)) | 0;
        const before2 = (at2 - Math.imul(p2, stride)) | 0;
        const before3 = (at3 - Math.imul(p3, stride)) | 0;
        // Negative as soon as one of them is outside its slot, empty or too long.
        const outside =
          before0 |
          (end - before0 - size0) |
          (size0 - 1) |
          (maxLength - size0) |
          before1 |
          (end - before1 - size1) |
          (size1 - 1) |
          (maxLength - size1) |
          before2 |
          (end - before2 - size2) |
          (size2 - 1) |
          (maxLength - size2) |
          before3 |
          (end - before3 - size3) |
          (size3 - 1) |
          (maxLength - size3);
        // Not 0 as soon as one of them is a chain, wants something computed, or has its header in an unusual place.
        const unusual =
          slow |
          ((at0 | at1 | at2 | at3) & misaligned) |
          ((flags[p0] | flags[p1] | flags[p2] | flags[p3]) & offloads) |
          ((next[p0] & next[p1] & next[p2] & next[p3]) ^ noPacket);
        const handle0 = sa[p0] | 0;
        const handle1 = sa[p1] | 0;
        const handle2 = sa[p2] | 0;
        const handle3 = sa[p3] | 0;
        if (outside >= 0 && unusual === 0) {
          if ((handle0 | handle1 | handle2 | handle3) === 0) {
            if (basic) {
              writeBasicHeader(u32, at0);
              writeBasicHeader(u32, at1);
              writeBasicHeader(u32, at2);
              writeBasicHeader(u32, at3);
            } else {
              writePlainHeader(f64, at0);
              writePlainHeader(f64, at1);
              writePlainHeader(f64, at2);
              writePlainHeader(f64, at3);
              if (outer) this.#markNetworkHeaders(p0, p1, p2, p3);
            }
            bytes += size0 + size1 + size2 + size3;
            i += 4;
            continue;
          }
          // SA 0 is not in the table, so four packets of which some are in the clear go the long way.
          const id0 = handle0 >>> 0 < handles ? resourceId[handle0] | 0 : notInline;
          const id1 = handle1 >>> 0 < handles ? resourceId[handle1] | 0 : notInline;
          const id2 = handle2 >>> 0 < handles ? resourceId[handle2] | 0 : notInline;
          const id3 = handle3 >>> 0 < handles ? resourceId[handle3] | 0 : notInline;
          if (security !== 0 && id0 !== notInline && id1 !== notInline && id2 !== notInline && id3 !== notInline) {
            writeSecurityHeader(u32, f64, at0, security, id0, type);
            writeSecurityHeader(u32, f64, at1, security, id1, type);
            writeSecurityHeader(u32, f64, at2, security, id2, type);
            writeSecurityHeader(u32, f64, at3, security, id3, type);
            if (outer) this.#markNetworkHeaders(p0, p1, p2, p3);
            bytes += size0 + size1 + size2 + size3;
            i += 4;
            continue;
          }
        }
      }
      const p = packets[i];
      const prepared = this.#prepare(p);
      if (prepared === Prepared.single) {
        bytes += length[p];
      } else {
        // What was accepted before it goes to the ring first.
        queue.postBurst(packets, from, i, offset, length, false);
        from = i + 1;
        if (prepared === Prepared.chain) {
          if (!this.#postChain(p)) {
            this.counters[TxCounter.ringFull]++;
            count = i;
            from = i;
            break;
          }
          this.#hasChains = true;
          bytes += this.#chainBytes;
          count = Math.min(count, from + queue.free);
        } else {
          dropped++;
          this.counters[prepared]++;
          this.#drop(p);
        }
      }
      i++;
    }
    queue.postBurst(packets, from, count, offset, length, false);
    if (queue.publish()) this.#notifier.notify();
    if (!this.#watch.armed) this.#watch.arm();
    const counters = this.counters;
    counters[TxCounter.packets] += count - dropped;
    counters[TxCounter.bytes] += bytes;
    return count;
  }

  /** hot: posts the chain that was prepared last, when need be in the place of what the device is done with; false when there is no room. */
  #postChain(head: number): boolean {
    const queue = this.#queue;
    if (queue.postChain(head, this.#pieces, this.#pieceCount, 0)) return true;
    return this.reclaim() > 0 && queue.postChain(head, this.#pieces, this.#pieceCount, 0);
  }

  /** Back to the pool with it, and with what follows it: a chain that does not end is cut. */
  #drop(p: number): void {
    const { next } = this.pool;
    let last = p;
    for (let left = this.#maxChain; next[last] < next.length && left > 0; left--) last = next[last];
    next[last] = NO_PACKET;
    this.#returned[0] = p;
    this.pool.freeChains(this.#returned, 1);
  }

  /** Checks one packet and writes its header; gives one of `Prepared`, or a counter. `burst` does the same for four usual ones. */
  #prepare(p: number): number {
    const { pool } = this;
    const layout = this.#layout;
    const at = pool.offset[p] - layout.length;
    const size = pool.length[p];
    const slot = pool.slot(p);
    // Also false for a number that is no packet: its offset and length are undefined.
    const inside = at >= slot && at + layout.length + size <= slot + pool.stride;
    if (!inside || size === 0) return TxCounter.droppedInvalid;
    const isChain = pool.next[p] !== NO_PACKET;
    const total = isChain ? this.#describe(p) : size;
    const isSegmented = (pool.flags[p] & PacketFlag.segmented) !== 0;
    if (total === 0 || total > (isSegmented ? MAX_SEGMENTED : this.#maxLength)) return TxCounter.droppedInvalid;

    let flags = 0;
    let csumStart = 0;
    let csumOffset = 0;
    if ((pool.flags[p] & PacketFlag.needsChecksum) !== 0) {
      csumStart = pool.checksumStart[p];
      csumOffset = pool.checksumOffset[p];
      if (!this.#checksum || csumStart + csumOffset + 2 > size) return TxCounter.droppedInvalid;
      flags = NetHeaderFlag.NEEDS_CSUM;
    }
    const headers = isSegmented ? this.#headersOf(p, flags, size) : 0;
    if (isSegmented && (headers === 0 || headers >= total)) return TxCounter.droppedInvalid;
    const isTunnel = isSegmented && (pool.gsoType[p] & GSO_TUNNEL) !== 0;
    if ((pool.flags[p] & PacketFlag.outerChecksum) !== 0) {
      if (!isTunnel || (this.#gsoTypes & GsoSet.outerChecksum) === 0) return TxCounter.droppedInvalid;
      flags |= NetHeaderFlag.UDP_TUNNEL_CSUM;
    }
    let resource = 0;
    let type = 0;
    const handle = pool.sa[p];
    if (handle !== 0) {
      const { resourceId } = this.#sas;
      resource = handle < resourceId.length ? resourceId[handle] : NOT_INLINE;
      if (resource === NOT_INLINE || layout.security === 0) return TxCounter.droppedSa;
      flags |= layout.security;
      type = ResourceType.NET_IPSEC_OUTB_SA;
    }
    writeTransmitHeader(this.#memory, at, layout, flags, csumStart, csumOffset, resource, type);
    if (isSegmented) writeSegmentation(this.#memory.u8, at, pool.gsoType[p], headers, pool.gsoSize[p]);
    if (isTunnel) writeTunnel(this.#memory.u8, at, layout, pool.outerTransport[p], pool.innerNetwork[p]);
    if (layout.outerNhOffset >= 0) this.#markNetworkHeader(p);
    return isChain ? Prepared.chain : Prepared.single;
  }

  /** Lists the pieces of a chain whose first slot is good; returns its length, or 0 when it is none that can be sent. */
  #describe(head: number): number {
    const { pool } = this;
    const { references } = pool;
    const pieces = this.#pieces;
    const header = this.#layout.length;
    let total = 0;
    let count = 0;
    for (let p = head; p !== NO_PACKET; p = pool.next[p]) {
      if (count === this.#maxChain) return 0;
      if (p >= pool.count) {
        if (!references.has(p)) return 0;
        pieces[3 * count] = references.iovaLow[p - pool.count];
        pieces[3 * count + 1] = references.iovaHigh[p - pool.count];
        pieces[3 * count + 2] = references.length[p - pool.count];
      } else {
        const at = pool.offset[p];
        const size = pool.length[p];
        const slot = pool.slot(p);
        if (at < slot || size === 0 || at + size > slot + pool.stride) return 0;
        const front = count === 0 ? header : 0;
        pieces[3 * count] = pool.iovaLow + at - front;
        pieces[3 * count + 1] = pool.iovaHigh;
        pieces[3 * count + 2] = size + front;
      }
      total += pieces[3 * count + 2];
      count++;
    }
    total -= header;
    this.#pieceCount = count;
    this.#chainBytes = total;
    return total;
  }

  /**
   * Bytes of all headers of a packet that is to be segmented: what is repeated in front of each segment (GUEST_HDRLEN asks for
   * exactly this). 0 when they do not lie in the first `size` bytes, or the device cannot segment it.
   */
  #headersOf(p: number, flags: number, size: number): number {
    const { pool } = this;
    const type = pool.gsoType[p];
    if (flags === 0 || pool.gsoSize[p] === 0 || !isAmong(type, this.#gsoTypes)) return 0;
    const start = pool.checksumStart[p];
    const inner = pool.innerNetwork[p];
    if ((type & GSO_TUNNEL) !== 0 && (inner < pool.outerTransport[p] + Udp.length || inner >= start)) return 0;
    const isUdp = baseType(type) === GsoType.UDP_L4;
    if (start + (isUdp ? Udp.length : Tcp.minLength) > size) return 0;
    const transport = isUdp ? Udp.length : (pool.u8[pool.offset[p] + start + Tcp.dataOffset] >>> 4) * 4;
    if (!isUdp && transport < Tcp.minLength) return 0;
    return start + transport <= size ? start + transport : 0;
  }

  /** hot: says in four headers where the IP header is, which are in their usual places (OUT_NET_HEADER, 5.1.9.2.1). */
  #markNetworkHeaders(p0: number, p1: number, p2: number, p3: number): void {
    this.#markNetworkHeader(p0);
    this.#markNetworkHeader(p1);
    this.#markNetworkHeader(p2);
    this.#markNetworkHeader(p3);
  }

  /** hot: no more than a byte of the offset is needed, and the header is zero there. A frame too short for an IP header has none. */
  #markNetworkHeader(p: number): void {
    const { pool } = this;
    const layout = this.#layout;
    const at = pool.offset[p];
    const offset = networkHeaderOffset(pool.u8, at);
    if (offset < pool.length[p]) pool.u8[at - layout.length + layout.outerNhOffset] = offset;
  }

  /** Returns the packets that the device is done with to the pool, and says how many. */
  reclaim(): number {
    // hot:
    const returned = this.#returned;
    const n = this.#queue.take(returned, this.#written, returned.length);
    if (n === 0) {
      this.#watch.inVain();
      return 0;
    }
    this.#watch.moved = true;
    if (this.#hasChains) this.pool.freeChains(returned, n);
    else this.pool.free(returned, n);
    return n;
  }

  /** Asks for an interrupt when the device is done with a packet; true when one is done already. */
  enableInterrupts(): boolean {
    return this.#queue.enableInterrupts();
  }

  disableInterrupts(): void {
    this.#queue.disableInterrupts();
  }

  /** Returns all packets to the pool, also those that the device had. Only after the device was reset or is gone. */
  close(): void {
    this.pool.freeChains(this.#returned, this.#queue.reclaimAll(this.#returned));
  }
}
