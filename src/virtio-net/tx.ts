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
import { NetHeaderFlag, type NetHeaderLayout, writeTransmitHeader } from './header.ts';
import { NOT_INLINE, type SaTable } from './sa-table.ts';

export interface TxQueueOptions {
  /** Its `iovaLow`/`iovaHigh` are those of the pool. */
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
  /** By packet: where its buffer begins, header included, and its length. */
  readonly #bufferOffset: Uint32Array;
  readonly #bufferLength: Uint32Array;
  readonly #accepted: Uint32Array;
  readonly #dropped: Uint32Array;
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
    this.#bufferOffset = new Uint32Array(pool.count);
    this.#bufferLength = new Uint32Array(pool.count);
    this.#accepted = new Uint32Array(queue.size);
    this.#dropped = new Uint32Array(queue.size);
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
    if (queue.free < n) this.reclaim();
    const count = Math.min(n, queue.free);
    if (count === 0 || queue.broken !== null) {
      if (n > 0) this.counters[TxCounter.ringFull]++;
      return 0;
    }
    const { pool } = this;
    const { offset, length, sa, flags, next, stride, memory } = pool;
    const bufferOffset = this.#bufferOffset;
    const bufferLength = this.#bufferLength;
    const accepted = this.#accepted;
    const { resourceId } = this.#sas;
    const headerLength = this.#layout.length;
    const resourceAt = this.#layout.resourceId;
    const security = this.#layout.security;
    const maxLength = this.#maxLength;
    let posted = 0;
    let dropped = 0;
    let bytes = 0;
    for (let i = 0; i < count; i++) {
      const p = packets[i];
      const at = offset[p] - headerLength;
      const size = length[p];
      const slot = p * stride;
      // False also for a number that is no packet: its offset is undefined.
      const fits = at >= slot && at + headerLength + size <= slot + stride && size > 0 && size <= maxLength;
      if (!fits || next[p] !== NO_PACKET) {
        this.#dropped[dropped++] = p;
        this.counters[TxCounter.droppedInvalid]++;
        continue;
      }
      let wire = 0;
      let resource = 0;
      let type = 0;
      const handle = sa[p];
      if (handle !== 0) {
        resource = handle < resourceId.length ? resourceId[handle] : NOT_INLINE;
        if (resource === NOT_INLINE || security === 0) {
          this.#dropped[dropped++] = p;
          this.counters[TxCounter.droppedSa]++;
          continue;
        }
        wire = security;
        type = ResourceType.NET_IPSEC_OUTB_SA;
      }
      let csumStart = 0;
      let csumOffset = 0;
      if ((flags[p] & PacketFlag.needsChecksum) !== 0) {
        csumStart = pool.checksumStart[p];
        csumOffset = pool.checksumOffset[p];
        if (!this.#checksum || csumStart + csumOffset + 2 > size) {
          this.#dropped[dropped++] = p;
          this.counters[TxCounter.droppedInvalid]++;
          continue;
        }
        wire |= NetHeaderFlag.NEEDS_CSUM;
      }
      writeTransmitHeader(memory, at, headerLength, resourceAt, wire, csumStart, csumOffset, resource, type);
      bufferOffset[p] = at;
      bufferLength[p] = headerLength + size;
      accepted[posted++] = p;
      bytes += size;
    }
    queue.postBurst(accepted, 0, posted, bufferOffset, bufferLength, false);
    if (queue.publish()) this.#notifier.notify();
    if (dropped !== 0) pool.free(this.#dropped, dropped);
    const counters = this.counters;
    counters[TxCounter.packets] += posted;
    counters[TxCounter.bytes] += bytes;
    if (count < n) counters[TxCounter.ringFull]++;
    return count;
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
