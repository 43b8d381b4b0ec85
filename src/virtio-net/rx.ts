/**
 * The receive queue (Virtio 1.4, 5.1.9.3 and 5.1.9.4): keeps the ring filled with empty packets of the pool and hands
 * out bursts of those that arrived.
 *
 * What the device wrote into a header is not trusted: a packet counts as protected by an SA only when its flags
 * say so without an error and its resource is an inbound SA that the driver has created. A GSO type is accepted when its
 * feature was negotiated, else the packet is dropped and counted. `num_buffers` is not looked at: without MRG_RXBUF it has to
 * be 1 (5.1.9.4.1), and QEMU 7.2 leaves it 0. `rx-merge.ts` has the queue for MRG_RXBUF and HASH_REPORT. Left out: UFO and RSC,
 * which are not negotiated.
 */
import type { VirtioError } from '../errors.ts';
import { Udp } from '../packet/fields.ts';
import { GSO_TUNNEL, GsoSet, GsoType, isAmong } from '../packet/gso.ts';
import { PacketFlag, type PacketPool } from '../packet/pool.ts';
import { ResourceType } from '../virtio/admin-wire.ts';
import type { QueueNotifier } from '../virtio/transport.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';
import { NetHeaderField, NetHeaderFlag, type NetHeaderLayout } from './header.ts';
import type { SaTable } from './sa-table.ts';

export interface RxQueueOptions {
  /** Its `iovaLow`/`iovaHigh` are those of the pool, its `headroom` is `layout.length`. */
  readonly queue: Virtqueue;
  readonly notifier: QueueNotifier;
  readonly pool: PacketPool;
  readonly layout: NetHeaderLayout;
  readonly sas: SaTable;
  /** True when GUEST_CSUM was negotiated. */
  readonly guestChecksum?: boolean;
  /** The set of types that may come: see `receivedGsoTypes`. Default none. */
  readonly gsoTypes?: number;
  /** By `RxCounter`: where to count, for others to see. Default an array of its own. */
  readonly counters?: Float64Array;
}

/** Indices into `RxQueue.counters`. */
export const RxCounter = {
  packets: 0,
  bytes: 1,
  /** Dropped: no room for a header and a byte, a GSO type, or a checksum outside the packet. */
  droppedInvalid: 2,
  /** SECURITY and SECURITY_ERR: not processed, or failed. */
  securityError: 3,
  /** SECURITY with a resource that is no inbound SA of the driver; delivered as not secured. */
  unknownSa: 4,
  softExpiry: 5,
  /** Refills that the pool could not satisfy. */
  poolExhausted: 6,
} as const;
export const RX_COUNTERS = 7;

/** Buffers are given to the device in bursts of at least this many. */
const REFILL_BURST = 32;

/**
 * Every layout that has a resource ends with it, and the packet behind it begins at a multiple of 4: so the last two words
 * hold the id, across the middle, and the type.
 */
const RESOURCE_WORDS_BYTES = 8;

export class RxQueue {
  readonly pool: PacketPool;
  /** By `RxCounter`. */
  readonly counters: Float64Array;
  protected readonly queue: Virtqueue;
  readonly #notifier: QueueNotifier;
  protected readonly layout: NetHeaderLayout;
  readonly #sas: SaTable;
  /** Flags that mean anything here, in the wire's numbers; and what a packet has that `burst` does not treat at once. */
  readonly #knownFlags: number;
  readonly #unusual: number;
  /** Where the header begins in a slot: even, like all header lengths, so that 16-bit fields are aligned. */
  protected readonly headerStart: number;
  protected readonly refillAt: number;
  readonly #gsoTypes: number;
  readonly #hasOuterChecksum: boolean;
  /** By packet, always the same: bytes from the packet's place to the end of the slot. */
  readonly #room: Uint32Array;
  protected readonly taken: Uint32Array;
  protected readonly written: Uint32Array;
  protected readonly dropped: Uint32Array;

  constructor(options: RxQueueOptions) {
    const { pool, queue, layout } = options;
    this.pool = pool;
    this.counters = options.counters ?? new Float64Array(RX_COUNTERS);
    this.queue = queue;
    this.#notifier = options.notifier;
    this.layout = layout;
    this.#sas = options.sas;
    const checksum = options.guestChecksum === true ? NetHeaderFlag.NEEDS_CSUM | NetHeaderFlag.DATA_VALID : 0;
    this.#gsoTypes = options.gsoTypes ?? 0;
    this.#hasOuterChecksum = (this.#gsoTypes & GsoSet.outerChecksum) !== 0;
    const outer = this.#hasOuterChecksum ? NetHeaderFlag.UDP_TUNNEL_CSUM : 0;
    this.#knownFlags = checksum | outer | layout.security | layout.securityErr | layout.softExpiryWarn;
    // Any `gso_type`, and any flag but SECURITY; DATA_VALID too, because it must reach the packet.
    this.#unusual = 0xff00 | (this.#knownFlags & ~layout.security);
    this.headerStart = pool.headroom - layout.length;
    this.refillAt = Math.max(1, Math.min(REFILL_BURST, queue.size >>> 2));
    this.#room = new Uint32Array(pool.count).fill(pool.stride - pool.headroom);
    this.taken = new Uint32Array(queue.size);
    this.written = new Uint32Array(queue.size);
    this.dropped = new Uint32Array(queue.size);
  }

  /** Whether a packet may be spread over several slots. */
  get hasChains(): boolean {
    return false;
  }

  /** Why the queue is closed, or null. */
  get broken(): VirtioError | null {
    return this.queue.broken;
  }

  /**
   * Takes up to `max` packets that have arrived into `out` and returns how many. They are the caller's: to be freed or
   * sent. Then gives the device new buffers, when enough are missing. `max` is at most `out.length`.
   */
  burst(out: Uint32Array, max: number): number {
    // hot:
    const queue = this.queue;
    const taken = this.taken;
    const n = queue.take(taken, this.written, Math.min(max, taken.length, out.length)) | 0;
    const received = n === 0 ? 0 : this.parse(out, n);
    if (queue.free >= this.refillAt) this.refill();
    return received;
  }

  /** Reads the headers of the first `n` packets of `taken` into the pool; puts those that are accepted into `out`, and returns how many. */
  protected parse(out: Uint32Array, n: number): number {
    // hot:
    const { taken, written } = this;
    const { length, sa, flags, u16, u32 } = this.pool;
    const { handle } = this.#sas;
    // Integers in locals: a property or an imported constant is loaded and converted at each use.
    const stride = this.pool.stride | 0;
    const start = this.headerStart | 0;
    const headerLength = this.layout.length | 0;
    const security = this.layout.security | 0;
    const unusual = this.#unusual | 0;
    const handles = handle.length | 0;
    const inbound = ResourceType.NET_IPSEC_INB_SA << 16;
    const secured = PacketFlag.secured | 0;
    const atResource = (headerLength - RESOURCE_WORDS_BYTES) | 0;
    let received = 0;
    let dropped = 0;
    let bytes = 0;
    let i = 0;
    while (i < n) {
      // Four at a time: what an access to an array costs besides the access itself is then paid once for four.
      if (i + 4 <= n) {
        const p0 = taken[i];
        const p1 = taken[i + 1];
        const p2 = taken[i + 2];
        const p3 = taken[i + 3];
        const size0 = ((written[i] | 0) - headerLength) | 0;
        const size1 = ((written[i + 1] | 0) - headerLength) | 0;
        const size2 = ((written[i + 2] | 0) - headerLength) | 0;
        const size3 = ((written[i + 3] | 0) - headerLength) | 0;
        const at0 = (Math.imul(p0, stride) + start) | 0;
        const at1 = (Math.imul(p1, stride) + start) | 0;
        const at2 = (Math.imul(p2, stride) + start) | 0;
        const at3 = (Math.imul(p3, stride) + start) | 0;
        // `flags` and, in the upper half, `gso_type`.
        const first0 = u16[at0 >> 1];
        const first1 = u16[at1 >> 1];
        const first2 = u16[at2 >> 1];
        const first3 = u16[at3 >> 1];
        const odd = (first0 | first1 | first2 | first3) & unusual;
        if (odd === 0 && ((size0 - 1) | (size1 - 1) | (size2 - 1) | (size3 - 1)) >= 0) {
          let accepted = ((first0 | first1 | first2 | first3) & security) === 0;
          if ((first0 & first1 & first2 & first3 & security) !== 0) {
            const low0 = u32[(at0 + atResource) >> 2] >>> 16;
            const low1 = u32[(at1 + atResource) >> 2] >>> 16;
            const low2 = u32[(at2 + atResource) >> 2] >>> 16;
            const low3 = u32[(at3 + atResource) >> 2] >>> 16;
            const high0 = u32[((at0 + atResource) >> 2) + 1] | 0;
            const high1 = u32[((at1 + atResource) >> 2) + 1] | 0;
            const high2 = u32[((at2 + atResource) >> 2) + 1] | 0;
            const high3 = u32[((at3 + atResource) >> 2) + 1] | 0;
            // An id of more than 16 bits goes the long way, like another type.
            const other = (high0 ^ inbound) | (high1 ^ inbound) | (high2 ^ inbound) | (high3 ^ inbound);
            const sa0 = low0 < handles ? handle[low0] : 0;
            const sa1 = low1 < handles ? handle[low1] : 0;
            const sa2 = low2 < handles ? handle[low2] : 0;
            const sa3 = low3 < handles ? handle[low3] : 0;
            if (other === 0 && sa0 !== 0 && sa1 !== 0 && sa2 !== 0 && sa3 !== 0) {
              sa[p0] = sa0;
              sa[p1] = sa1;
              sa[p2] = sa2;
              sa[p3] = sa3;
              flags[p0] = secured;
              flags[p1] = secured;
              flags[p2] = secured;
              flags[p3] = secured;
              accepted = true;
            }
          }
          if (accepted) {
            length[p0] = size0;
            length[p1] = size1;
            length[p2] = size2;
            length[p3] = size3;
            out[received] = p0;
            out[received + 1] = p1;
            out[received + 2] = p2;
            out[received + 3] = p3;
            received += 4;
            bytes += size0 + size1 + size2 + size3;
            i += 4;
            continue;
          }
        }
      }
      const p = taken[i];
      const size = written[i] - headerLength;
      if (this.accept(p, size)) {
        out[received++] = p;
        bytes += size;
      } else {
        this.dropped[dropped++] = p;
      }
      i++;
    }
    const { counters } = this;
    counters[RxCounter.packets] += received;
    counters[RxCounter.bytes] += bytes;
    if (dropped !== 0) {
      counters[RxCounter.droppedInvalid] += dropped;
      this.pool.free(this.dropped, dropped);
    }
    return received;
  }

  /**
   * Reads the header of one packet of `size` bytes without it; false when the packet is to be dropped. `burst` does the
   * same for four usual ones. Offset, SA, flags and chain of the packet are still as `pool.allocate` set them.
   */
  protected accept(p: number, size: number): boolean {
    const { pool } = this;
    const { u16 } = pool;
    const layout = this.layout;
    const at = pool.slot(p) + this.headerStart;
    const first = u16[at >>> 1];
    if (size <= 0) return false;
    const wire = first & this.#knownFlags;
    const gsoType = first >>> 8;
    if (gsoType !== GsoType.NONE && !this.#acceptGso(p, at, wire, gsoType)) return false;

    let flags = gsoType === GsoType.NONE ? 0 : PacketFlag.segmented;
    if (this.#hasOuterChecksum && (wire & NetHeaderFlag.UDP_TUNNEL_CSUM) !== 0) {
      if ((gsoType & GSO_TUNNEL) !== 0) flags |= PacketFlag.outerChecksum;
      // 5.1.9.4.2.
      else if ((wire & NetHeaderFlag.NEEDS_CSUM) !== 0) return false;
    }
    if ((wire & layout.securityErr) !== 0) {
      flags |= PacketFlag.securityError;
      this.counters[RxCounter.securityError]++;
    } else if ((wire & layout.security) !== 0) {
      const id = (u16[(at + layout.resourceId) >>> 1] | (u16[(at + layout.resourceId + 2) >>> 1] << 16)) >>> 0;
      const inbound = u16[(at + layout.resourceType) >>> 1] === ResourceType.NET_IPSEC_INB_SA;
      const { handle } = this.#sas;
      const sa = inbound && id < handle.length ? handle[id] : 0;
      if (sa === 0) {
        flags |= PacketFlag.securityError;
        this.counters[RxCounter.unknownSa]++;
      } else {
        pool.sa[p] = sa;
        flags |= PacketFlag.secured;
        if ((wire & layout.softExpiryWarn) !== 0) {
          flags |= PacketFlag.softExpiry;
          this.counters[RxCounter.softExpiry]++;
        }
      }
    }
    if ((wire & NetHeaderFlag.DATA_VALID) !== 0) flags |= PacketFlag.checksumValid;
    if ((wire & NetHeaderFlag.NEEDS_CSUM) !== 0) {
      const csumStart = u16[(at + NetHeaderField.csumStart) >>> 1];
      const csumOffset = u16[(at + NetHeaderField.csumOffset) >>> 1];
      if (csumStart + csumOffset + 2 > size) return false;
      pool.checksumStart[p] = csumStart;
      pool.checksumOffset[p] = csumOffset;
      flags |= PacketFlag.needsChecksum;
    }
    pool.flags[p] = flags;
    pool.length[p] = size;
    return true;
  }

  /** A packet that stands for several segments: a type that was negotiated, a size, and a checksum to fill (5.1.9.4.1). */
  #acceptGso(p: number, at: number, wire: number, gsoType: number): boolean {
    const { pool } = this;
    const size = pool.u16[(at + NetHeaderField.gsoSize) >>> 1];
    if (!isAmong(gsoType, this.#gsoTypes) || size === 0 || (wire & NetHeaderFlag.NEEDS_CSUM) === 0) return false;
    if ((gsoType & GSO_TUNNEL) !== 0 && !this.#acceptTunnel(p, at, wire)) return false;
    pool.gsoType[p] = gsoType;
    pool.gsoSize[p] = size;
    return true;
  }

  /** A packet inside a UDP tunnel (5.1.9.4.2): its headers follow each other, and nothing is said of a checksum that was validated. */
  #acceptTunnel(p: number, at: number, wire: number): boolean {
    const { pool, layout } = this;
    const outer = pool.u16[(at + layout.outerThOffset) >>> 1];
    const inner = pool.u16[(at + layout.innerNhOffset) >>> 1];
    const start = pool.u16[(at + NetHeaderField.csumStart) >>> 1];
    if ((wire & NetHeaderFlag.DATA_VALID) !== 0 || inner < outer + Udp.length || inner >= start) return false;
    pool.outerTransport[p] = outer;
    pool.innerNetwork[p] = inner;
    return true;
  }

  /**
   * Gives the device as many empty packets as the ring and the pool have room for; returns how many. To be called once
   * before DRIVER_OK with `notify` false, because nothing may be notified yet; `start` makes up for it.
   */
  refill(notify = true): number {
    // hot:
    const queue = this.queue;
    const want = queue.free;
    if (want === 0 || queue.broken !== null) return 0;
    const packets = this.taken;
    const n = this.pool.allocateForReceive(packets, want);
    if (n < want) this.counters[RxCounter.poolExhausted]++;
    if (n === 0) return 0;
    queue.postBurst(packets, 0, n, this.pool.offset, this.#room, true);
    if (queue.publish() && notify) this.#notifier.notify();
    return n;
  }

  /**
   * Where the device says that the IP header of a packet begins, in bytes from the packet's start; 0 when it does not say. To be
   * asked before anything in front of the packet is changed. OUT_NET_HEADER (5.1.9.4.2).
   */
  networkHeader(p: number): number {
    const { pool } = this;
    const { outerNhOffset, length } = this.layout;
    const at = pool.offset[p];
    // A packet that software IPsec has opened begins elsewhere: what was said does not hold for it.
    if (outerNhOffset < 0 || at !== pool.slot(p) + pool.headroom) return 0;
    const field = at - length + outerNhOffset;
    const said = pool.u8[field] | (pool.u8[field + 1] << 8);
    return said < pool.length[p] ? said : 0;
  }

  /** Tells the device of the buffers that it was given before DRIVER_OK. */
  start(): void {
    if (this.queue.broken === null) this.#notifier.notify();
  }

  /**
   * Asks for an interrupt at the next packet; true when one is there already. Gives the device what the pool has got back: a ring that
   * ran empty while the application held all packets would never interrupt.
   */
  enableInterrupts(): boolean {
    if (this.queue.free >= this.refillAt) this.refill();
    return this.queue.enableInterrupts();
  }

  disableInterrupts(): void {
    this.queue.disableInterrupts();
  }

  /** Returns all packets to the pool. Only after the device was reset or is gone. */
  close(): void {
    this.pool.free(this.taken, this.queue.reclaimAll(this.taken));
  }
}
