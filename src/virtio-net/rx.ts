/**
 * The receive queue (Virtio 1.4, 5.1.9.3 and 5.1.9.4): keeps the ring filled with empty packets of the pool and hands
 * out bursts of those that arrived.
 *
 * What the device wrote into a header is not trusted: a packet counts as protected by an SA only when its flags
 * say so without an error and its resource is an inbound SA that the driver has created. Left out: MRG_RXBUF and GSO,
 * which are not negotiated; a packet that claims them is dropped and counted.
 */
import type { VirtioError } from '../errors.ts';
import { PacketFlag, type PacketPool } from '../packet/pool.ts';
import { ResourceType } from '../virtio/admin-wire.ts';
import type { QueueNotifier } from '../virtio/transport.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';
import { GsoType, NetHeaderField, NetHeaderFlag, type NetHeaderLayout, readResourceId } from './header.ts';
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
}

/** Indices into `RxQueue.counters`. */
export const RxCounter = {
  packets: 0,
  bytes: 1,
  /** Dropped: no room for a header and a byte, several buffers, a GSO type, or a checksum outside the packet. */
  droppedInvalid: 2,
  /** SECURITY and SECURITY_ERR: not processed, or failed. */
  securityError: 3,
  /** SECURITY with a resource that is no inbound SA of the driver; delivered as not secured. */
  unknownSa: 4,
  softExpiry: 5,
  /** Refills that the pool could not satisfy. */
  poolExhausted: 6,
} as const;

/** Buffers are given to the device in bursts of at least this many. */
const REFILL_BURST = 32;

export class RxQueue {
  readonly pool: PacketPool;
  /** By `RxCounter`. */
  readonly counters = new Float64Array(7);
  readonly #queue: Virtqueue;
  readonly #notifier: QueueNotifier;
  readonly #layout: NetHeaderLayout;
  readonly #sas: SaTable;
  /** Flags that mean anything here, in the wire's numbers. */
  readonly #knownFlags: number;
  readonly #refillAt: number;
  /** By packet, always the same: bytes from the packet's place to the end of the slot. */
  readonly #room: Uint32Array;
  readonly #taken: Uint32Array;
  readonly #written: Uint32Array;
  readonly #dropped: Uint32Array;

  constructor(options: RxQueueOptions) {
    const { pool, queue, layout } = options;
    this.pool = pool;
    this.#queue = queue;
    this.#notifier = options.notifier;
    this.#layout = layout;
    this.#sas = options.sas;
    const checksum = options.guestChecksum === true ? NetHeaderFlag.NEEDS_CSUM | NetHeaderFlag.DATA_VALID : 0;
    this.#knownFlags = checksum | layout.security | layout.securityErr | layout.softExpiryWarn;
    this.#refillAt = Math.max(1, Math.min(REFILL_BURST, queue.size >>> 2));
    this.#room = new Uint32Array(pool.count).fill(pool.stride - pool.headroom);
    this.#taken = new Uint32Array(queue.size);
    this.#written = new Uint32Array(queue.size);
    this.#dropped = new Uint32Array(queue.size);
  }

  /** Why the queue is closed, or null. */
  get broken(): VirtioError | null {
    return this.#queue.broken;
  }

  /**
   * Takes up to `max` packets that have arrived into `out` and returns how many. They are the caller's: to be freed or
   * sent. Then gives the device new buffers, when enough are missing. `max` is at most `out.length`.
   */
  burst(out: Uint32Array, max: number): number {
    // hot:
    const queue = this.#queue;
    const taken = this.#taken;
    const written = this.#written;
    const n = queue.take(taken, written, Math.min(max, taken.length, out.length));
    let received = 0;
    if (n !== 0) {
      const { pool } = this;
      const { offset, length, u16 } = pool;
      const headerLength = this.#layout.length;
      const known = this.#knownFlags;
      let dropped = 0;
      let bytes = 0;
      for (let i = 0; i < n; i++) {
        const p = taken[i];
        const size = written[i] - headerLength;
        // Offset, SA, flags and chain of a packet are still as `pool.allocate` set them.
        const at = offset[p] - headerLength;
        // Headroom and header lengths are even, so 16-bit fields are aligned; `gso_type` is the upper half of the first.
        const first = u16[at >>> 1];
        const flags = first & known;
        if (size <= 0 || first >>> 8 !== GsoType.NONE || u16[(at + NetHeaderField.numBuffers) >>> 1] !== 1) {
          this.#dropped[dropped++] = p;
          continue;
        }
        length[p] = size;
        if (flags !== 0 && !this.#applyFlags(p, at, flags, size)) {
          this.#dropped[dropped++] = p;
          continue;
        }
        out[received++] = p;
        bytes += size;
      }
      const counters = this.counters;
      counters[RxCounter.packets] += received;
      counters[RxCounter.bytes] += bytes;
      if (dropped !== 0) {
        counters[RxCounter.droppedInvalid] += dropped;
        pool.free(this.#dropped, dropped);
      }
    }
    if (queue.free >= this.#refillAt) this.refill();
    return received;
  }

  /** hot: turns header flags into the packet's; false when the packet is to be dropped. */
  #applyFlags(p: number, at: number, flags: number, size: number): boolean {
    const layout = this.#layout;
    const { pool } = this;
    let result = 0;
    if ((flags & layout.security) !== 0 && (flags & layout.securityErr) === 0) {
      const id = readResourceId(pool.u16, pool.u8, at + layout.resourceId);
      const inbound = pool.u16[(at + layout.resourceType) >>> 1] === ResourceType.NET_IPSEC_INB_SA;
      const { handle } = this.#sas;
      const sa = inbound && id < handle.length ? handle[id] : 0;
      if (sa !== 0) {
        pool.sa[p] = sa;
        result = PacketFlag.secured;
        if ((flags & layout.softExpiryWarn) !== 0) {
          result |= PacketFlag.softExpiry;
          this.counters[RxCounter.softExpiry]++;
        }
      } else {
        result = PacketFlag.securityError;
        this.counters[RxCounter.unknownSa]++;
      }
    } else if ((flags & layout.securityErr) !== 0) {
      result = PacketFlag.securityError;
      this.counters[RxCounter.securityError]++;
    }
    if ((flags & NetHeaderFlag.DATA_VALID) !== 0) result |= PacketFlag.checksumValid;
    if ((flags & NetHeaderFlag.NEEDS_CSUM) !== 0) {
      const start = pool.u16[(at + NetHeaderField.csumStart) >>> 1];
      const where = pool.u16[(at + NetHeaderField.csumOffset) >>> 1];
      if (start + where + 2 > size) return false;
      pool.checksumStart[p] = start;
      pool.checksumOffset[p] = where;
      result |= PacketFlag.needsChecksum;
    }
    pool.flags[p] = result;
    return true;
  }

  /**
   * Gives the device as many empty packets as the ring and the pool have room for; returns how many. To be called once
   * before DRIVER_OK with `notify` false, because nothing may be notified yet; `start` makes up for it.
   */
  refill(notify = true): number {
    // hot:
    const queue = this.#queue;
    const want = queue.free;
    if (want === 0 || queue.broken !== null) return 0;
    const packets = this.#taken;
    const n = this.pool.allocate(packets, want);
    if (n < want) this.counters[RxCounter.poolExhausted]++;
    if (n === 0) return 0;
    queue.postBurst(packets, 0, n, this.pool.offset, this.#room, true);
    if (queue.publish() && notify) this.#notifier.notify();
    return n;
  }

  /** Tells the device of the buffers that it was given before DRIVER_OK. */
  start(): void {
    if (this.#queue.broken === null) this.#notifier.notify();
  }

  /** Asks for an interrupt at the next packet; true when one is there already. */
  enableInterrupts(): boolean {
    return this.#queue.enableInterrupts();
  }

  disableInterrupts(): void {
    this.#queue.disableInterrupts();
  }

  /** Returns all packets to the pool. Only after the device was reset or is gone. */
  close(): void {
    this.pool.free(this.#taken, this.#queue.reclaimAll(this.#taken));
  }
}
