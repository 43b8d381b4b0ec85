/**
 * The receive queue with MRG_RXBUF, where a packet may be spread over several buffers, and with HASH_REPORT (Virtio 1.4,
 * 5.1.9.3.1, 5.1.9.4). Which queue it is, is decided when it is made, so that a queue without these features pays nothing.
 *
 * A packet of several buffers becomes a chain: its first slot, whose `next` leads to the others. `num_buffers` is the
 * device's word: 0 drops the packet, and more than the longest packet can need closes the queue, because nothing tells
 * then where the next packet begins. Buffers that are not there yet are waited for; what has come of their packet is kept.
 */
import { VirtioError } from '../errors.ts';
import { NO_PACKET } from '../packet/pool.ts';
import { NetHeaderField } from './header.ts';
import { RxCounter, RxQueue, type RxQueueOptions } from './rx.ts';

export interface MergingRxQueueOptions extends RxQueueOptions {
  /** True when MRG_RXBUF was negotiated. */
  readonly mergeable: boolean;
}

/** Longest packet that a device may pass: 64 KiB of IP packet, an Ethernet header and two VLAN tags. */
const LONGEST_PACKET = 0x10000 + 22;

/** The receive queue for what was negotiated: with neither feature it is the plain one. */
export function createRxQueue(options: MergingRxQueueOptions): RxQueue {
  return options.mergeable || options.layout.hashReport >= 0 ? new MergingRxQueue(options) : new RxQueue(options);
}

class MergingRxQueue extends RxQueue {
  readonly #mergeable: boolean;
  /** Most buffers of a packet. */
  readonly #maxBuffers: number;
  /** The packet that is not complete: its first and last slot, the buffers to come, bytes so far, and whether it is to be dropped. */
  #head = NO_PACKET;
  #tail = NO_PACKET;
  #missing = 0;
  #bytes = 0;
  #refused = false;
  readonly #one = new Uint32Array(1);

  constructor(options: MergingRxQueueOptions) {
    super(options);
    const { pool, layout, queue, mergeable } = options;
    this.#mergeable = mergeable;
    const room = pool.stride - pool.headroom + layout.length;
    this.#maxBuffers = Math.min(queue.size, Math.ceil((LONGEST_PACKET + layout.length) / room));
  }

  override get hasChains(): boolean {
    return this.#mergeable;
  }

  override burst(out: Uint32Array, max: number): number {
    // hot:
    const queue = this.queue;
    const taken = this.taken;
    const n = queue.take(taken, this.written, Math.min(max, taken.length, out.length)) | 0;
    let received = 0;
    if (n !== 0) {
      received = !this.#mergeable || this.#areWhole(n) ? this.parse(out, n) : this.#merge(out, n);
      if (this.layout.hashReport >= 0) this.#readHashes(out, received);
    }
    if (queue.free >= this.refillAt) this.refill();
    return received;
  }

  /** Whether each of the first `n` buffers holds one packet. */
  #areWhole(n: number): boolean {
    // hot:
    if (this.#missing !== 0) return false;
    const { taken } = this;
    const { u16 } = this.pool;
    const stride = this.pool.stride | 0;
    const at = (this.headerStart + NetHeaderField.numBuffers) | 0;
    let others = 0;
    let i = 0;
    for (; i + 4 <= n; i += 4) {
      others |=
        (u16[(Math.imul(taken[i], stride) + at) >> 1] ^ 1) |
        (u16[(Math.imul(taken[i + 1], stride) + at) >> 1] ^ 1) |
        (u16[(Math.imul(taken[i + 2], stride) + at) >> 1] ^ 1) |
        (u16[(Math.imul(taken[i + 3], stride) + at) >> 1] ^ 1);
    }
    for (; i < n; i++) others |= u16[(Math.imul(taken[i], stride) + at) >> 1] ^ 1;
    return others === 0;
  }

  /** As `parse`, when packets may be spread over buffers. */
  #merge(out: Uint32Array, n: number): number {
    // hot:
    const { taken, written, pool, counters } = this;
    const headerLength = this.layout.length;
    let received = 0;
    let bytes = 0;
    for (let i = 0; i < n; i++) {
      const p = taken[i];
      if (this.#missing === 0) {
        if (!this.#begin(p, written[i] - headerLength)) {
          // Buffers of unknown meaning.
          for (let j = i; j < n; j++) {
            this.#one[0] = taken[j];
            pool.free(this.#one, 1);
          }
          break;
        }
      } else {
        this.#append(p, written[i]);
      }
      if (this.#missing !== 0) continue;
      this.#one[0] = this.#head;
      this.#head = NO_PACKET;
      if (this.#refused) {
        counters[RxCounter.droppedInvalid]++;
        pool.freeChains(this.#one, 1);
      } else {
        out[received++] = this.#one[0];
        bytes += this.#bytes;
      }
    }
    counters[RxCounter.packets] += received;
    counters[RxCounter.bytes] += bytes;
    return received;
  }

  /** hot: the first buffer of a packet, with `size` bytes behind its header; false when the queue had to be closed. */
  #begin(p: number, size: number): boolean {
    const { pool } = this;
    const buffers = pool.u16[(pool.slot(p) + this.headerStart + NetHeaderField.numBuffers) >>> 1];
    // Without a whole header the buffer says nothing of others either.
    const whole = size >= 0;
    if (whole && buffers > this.#maxBuffers) {
      this.queue.fail(
        new VirtioError(
          'NUM_BUFFERS',
          `queue ${this.queue.index}: a packet of ${buffers} buffers, at most ${this.#maxBuffers}`,
        ),
      );
      return false;
    }
    this.#head = p;
    this.#tail = p;
    this.#bytes = size;
    this.#missing = whole && buffers > 1 ? buffers - 1 : 0;
    this.#refused = !whole || buffers === 0 || !this.accept(p, size);
    return true;
  }

  /** hot: a further buffer, of which the device wrote all that it says: it has no header. */
  #append(p: number, size: number): void {
    const { pool } = this;
    pool.offset[p] = pool.slot(p) + this.headerStart;
    pool.length[p] = size;
    pool.next[this.#tail] = p;
    this.#tail = p;
    this.#bytes += size;
    if (size === 0 || this.#bytes > LONGEST_PACKET) this.#refused = true;
    this.#missing--;
  }

  /** hot: `hash_value` and `hash_report` of received packets. */
  #readHashes(out: Uint32Array, n: number): void {
    const { u16, hash, hashReport } = this.pool;
    const { layout } = this;
    const stride = this.pool.stride | 0;
    const value = (this.headerStart + layout.hashValue) | 0;
    const report = (this.headerStart + layout.hashReport) | 0;
    for (let i = 0; i < n; i++) {
      const p = out[i];
      const slot = Math.imul(p, stride);
      hash[p] = u16[(slot + value) >> 1] | (u16[(slot + value + 2) >> 1] << 16);
      hashReport[p] = u16[(slot + report) >> 1];
    }
  }

  override close(): void {
    if (this.#head !== NO_PACKET) {
      this.#one[0] = this.#head;
      this.#head = NO_PACKET;
      this.#missing = 0;
      this.pool.freeChains(this.#one, 1);
    }
    super.close();
  }
}
