/**
 * What the device sides of split and packed virtqueues share: the buffer that was taken last, in pieces, and copying from
 * and to it.
 */
import type { GuestMemory } from './guest-memory.ts';

/** Most descriptors of one buffer, whatever the queue size. */
export const MAX_SEGMENTS = 1024;

/** Total length of a buffer (2.7.5.2). */
const BUFFER_MAX = 2 ** 32;

/** Virtio 1.4, 2.7.5 and 2.8.13; the fourth word differs. */
export const Descriptor = { size: 16, words: 4, address: 0, addressHigh: 1, length: 2, last: 3 } as const;
export const DescriptorFlag = { NEXT: 1, WRITE: 2, INDIRECT: 4 } as const;

export class QueueBuffer {
  readonly index: number;
  readonly size: number;
  broken: string | null = null;
  readonly low = new Uint32Array(MAX_SEGMENTS);
  readonly high = new Uint32Array(MAX_SEGMENTS);
  readonly length = new Uint32Array(MAX_SEGMENTS);
  readable = 0;
  segments = 0;
  readableBytes = 0;
  writableBytes = 0;
  protected readonly memory: GuestMemory;
  readonly #limit: number;

  constructor(memory: GuestMemory, index: number, size: number) {
    this.memory = memory;
    this.index = index;
    this.size = size;
    this.#limit = Math.min(size, MAX_SEGMENTS);
  }

  protected fail(reason: string): false {
    this.broken = `queue ${this.index}: ${reason}`;
    return false;
  }

  /** hot: a new buffer begins. */
  protected begin(): void {
    this.readable = 0;
    this.segments = 0;
    this.readableBytes = 0;
    this.writableBytes = 0;
  }

  /** hot: appends a piece to the buffer. */
  protected add(low: number, high: number, length: number, write: boolean): boolean {
    const at = this.segments;
    if (at >= this.#limit) return this.fail('a buffer of more descriptors than the queue has');
    this.low[at] = low;
    this.high[at] = high;
    this.length[at] = length;
    this.segments = at + 1;
    if (write) {
      this.writableBytes += length;
      if (this.writableBytes > BUFFER_MAX) return this.fail('a buffer of more than 2^32 bytes');
      return true;
    }
    if (this.readable !== at) return this.fail('a device-readable descriptor after a device-writable one');
    this.readable = at + 1;
    this.readableBytes += length;
    if (this.readableBytes > BUFFER_MAX) return this.fail('a buffer of more than 2^32 bytes');
    return true;
  }

  /**
   * Copies a table of indirect descriptors to arena offset `scratch`, which has room for as many as the queue has; returns their
   * number, or 0 when the queue is broken.
   */
  protected copyTable(low: number, high: number, bytes: number, scratch: number): number {
    if (bytes === 0 || bytes % Descriptor.size !== 0) this.fail(`an indirect table of ${bytes} bytes`);
    else if (bytes / Descriptor.size > this.#limit)
      this.fail(`an indirect table of ${bytes / Descriptor.size} descriptors`);
    else if (!this.memory.read(low, high, bytes, scratch)) this.fail('an indirect table that is not mapped');
    else return bytes / Descriptor.size;
    return 0;
  }

  gather(skip: number, max: number, to: number): number {
    // hot:
    let left = max;
    let over = skip;
    let done = 0;
    for (let i = 0; i < this.readable && left > 0; i++) {
      const length = this.length[i];
      if (over >= length) {
        over -= length;
        continue;
      }
      const n = Math.min(length - over, left);
      if (!this.#read(i, over, n, to + done)) {
        this.fail('a device-readable descriptor that is not mapped');
        return -1;
      }
      over = 0;
      done += n;
      left -= n;
    }
    return done;
  }

  scatter(skip: number, bytes: number, from: number): number {
    // hot:
    let left = bytes;
    let over = skip;
    let done = 0;
    for (let i = this.readable; i < this.segments && left > 0; i++) {
      const length = this.length[i];
      if (over >= length) {
        over -= length;
        continue;
      }
      const n = Math.min(length - over, left);
      if (!this.#write(i, over, n, from + done)) {
        this.fail('a device-writable descriptor that is not mapped, or not for writing');
        return -1;
      }
      over = 0;
      done += n;
      left -= n;
    }
    return done;
  }

  /** hot: */
  #read(segment: number, over: number, n: number, to: number): boolean {
    const low = this.low[segment] + over;
    const carry = low >= 0x100000000 ? 1 : 0;
    return this.memory.read(low - carry * 0x100000000, this.high[segment] + carry, n, to);
  }

  /** hot: */
  #write(segment: number, over: number, n: number, from: number): boolean {
    const low = this.low[segment] + over;
    const carry = low >= 0x100000000 ? 1 : 0;
    return this.memory.write(low - carry * 0x100000000, this.high[segment] + carry, n, from);
  }
}
