/**
 * The transmit queue (Virtio 1.4, 5.1.9.2): bursts of packet numbers, each packet one buffer with its header in the
 * headroom right in front of it.
 *
 * A packet with `pool.sa[p]` not 0 asks for IPsec: its header carries SECURITY and the SA's resource. When that SA is
 * not on the device the packet is dropped and counted; it is never sent in the clear. Left out: GSO, packets over several
 * buffers.
 */
import type { VirtioError } from '../errors.ts';
import { NO_PACKET, PacketFlag, type PacketPool } from '../packet/pool.ts';
import { ResourceType } from '../virtio/admin-wire.ts';
import type { QueueNotifier } from '../virtio/transport.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';
import { type HeaderMemory, headerMemory, NetHeaderFlag, type NetHeaderLayout, writeTransmitHeader } from './header.ts';
import { NOT_INLINE, type SaTable } from './sa-table.ts';

export interface TxQueueOptions {
  /** Its `iovaLow`/`iovaHigh` are those of the pool, its `headroom` is `layout.length`. */
  readonly queue: Virtqueue;
  readonly notifier: QueueNotifier;
  readonly pool: PacketPool;
  readonly layout: NetHeaderLayout;
  readonly sas: SaTable;
  /** True when CSUM was negotiated. */
  readonly checksum?: boolean;
  /** Bytes of the longest packet, link header included: with MTU negotiated, the MTU + 14. Default: what a slot holds. */
  readonly maxLength?: number;
}

/** Indices into `TxQueue.counters`. */
export const TxCounter = {
  packets: 0,
  bytes: 1,
  /** Dropped: the SA that was asked for is not on the device. */
  droppedSa: 2,
  /** Dropped: empty, too long, outside its slot or without headroom, a chain, or a checksum that the device cannot fill. */
  droppedInvalid: 3,
  /** `burst` took fewer packets than it was given. */
  ringFull: 4,
} as const;

/** `burst` reclaims once this many are out: packets that come back soon are still in the cache. */
const RECLAIM_AT = 64;

export class TxQueue {
  readonly pool: PacketPool;
  /** By `TxCounter`. */
  readonly counters = new Float64Array(5);
  readonly #queue: Virtqueue;
  readonly #notifier: QueueNotifier;
  readonly #layout: NetHeaderLayout;
  readonly #sas: SaTable;
  readonly #checksum: boolean;
  readonly #maxLength: number;
  readonly #memory: HeaderMemory;
  readonly #returned: Uint32Array;
  readonly #written: Uint32Array;

  constructor(options: TxQueueOptions) {
    const { pool, queue, layout } = options;
    this.pool = pool;
    this.#queue = queue;
    this.#notifier = options.notifier;
    this.#layout = layout;
    this.#sas = options.sas;
    this.#checksum = options.checksum ?? false;
    this.#maxLength = Math.min(options.maxLength ?? pool.stride, pool.stride);
    this.#memory = headerMemory(pool.memory);
    this.#returned = new Uint32Array(queue.size);
    this.#written = new Uint32Array(queue.size);
  }

  /** Why the queue is closed, or null. */
  get broken(): VirtioError | null {
    return this.#queue.broken;
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
    if (free < n || queue.size - free >= RECLAIM_AT) this.reclaim();
    const count = Math.min(n, queue.free);
    if (count < n) {
      this.counters[TxCounter.ringFull]++;
      if (count <= 0 || queue.broken !== null) return 0;
    }
    const { pool } = this;
    const { offset, length, sa, flags, next, stride } = pool;
    const memory = this.#memory;
    const layout = this.#layout;
    const headerLength = layout.length;
    const maxLength = this.#maxLength;
    const { resourceId } = this.#sas;
    const { security } = layout;
    let from = 0;
    let bytes = 0;
    let dropped = 0;
    for (let i = 0; i < count; i++) {
      const p = packets[i];
      const size = length[p];
      const handle = sa[p];
      const end = offset[p] + size;
      const at = offset[p] - headerLength;
      const slot = p * stride;
      // False also for a number that is no packet: its offset is undefined.
      const fits = at >= slot && end <= slot + stride && size <= maxLength && size !== 0;
      let drop = 0;
      if (!fits || next[p] !== NO_PACKET) {
        drop = TxCounter.droppedInvalid;
      } else if ((flags[p] & PacketFlag.needsChecksum) !== 0) {
        drop = this.#writeChecksumHeader(p, at);
      } else if (handle === 0) {
        writeTransmitHeader(memory, at, layout, 0, 0, 0, 0, 0);
      } else {
        const resource = handle < resourceId.length ? resourceId[handle] : NOT_INLINE;
        if (resource === NOT_INLINE || security === 0) drop = TxCounter.droppedSa;
        else writeTransmitHeader(memory, at, layout, security, 0, 0, resource, ResourceType.NET_IPSEC_OUTB_SA);
      }
      if (drop === 0) {
        bytes += size;
        continue;
      }
      // What was accepted before it goes to the ring; the dropped packet goes back to the pool.
      queue.postBurst(packets, from, i, offset, length, false);
      from = i + 1;
      dropped++;
      this.counters[drop]++;
      this.#returned[0] = p;
      pool.free(this.#returned, 1);
    }
    queue.postBurst(packets, from, count, offset, length, false);
    if (queue.publish()) this.#notifier.notify();
    const counters = this.counters;
    counters[TxCounter.packets] += count - dropped;
    counters[TxCounter.bytes] += bytes;
    return count;
  }

  /** The header of a packet whose checksum the device is to fill: 0, or the counter of why the packet is dropped. */
  #writeChecksumHeader(p: number, at: number): number {
    const { pool } = this;
    const start = pool.checksumStart[p];
    const where = pool.checksumOffset[p];
    if (!this.#checksum || start + where + 2 > pool.length[p]) return TxCounter.droppedInvalid;
    const handle = pool.sa[p];
    const { resourceId } = this.#sas;
    let flags: number = NetHeaderFlag.NEEDS_CSUM;
    let resource = 0;
    let type = 0;
    if (handle !== 0) {
      resource = handle < resourceId.length ? resourceId[handle] : NOT_INLINE;
      if (resource === NOT_INLINE || this.#layout.security === 0) return TxCounter.droppedSa;
      flags |= this.#layout.security;
      type = ResourceType.NET_IPSEC_OUTB_SA;
    }
    writeTransmitHeader(this.#memory, at, this.#layout, flags, start, where, resource, type);
    return 0;
  }

  /** Returns the packets that the device is done with to the pool, and says how many. */
  reclaim(): number {
    // hot:
    const returned = this.#returned;
    const n = this.#queue.take(returned, this.#written, returned.length);
    if (n !== 0) this.pool.free(returned, n);
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
    this.pool.free(this.#returned, this.#queue.reclaimAll(this.#returned));
  }
}
