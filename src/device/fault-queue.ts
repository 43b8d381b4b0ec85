/** How the faults of `faults.ts` that concern virtqueues are made: a queue around the queue. */
import type { FaultSet } from './faults.ts';
import type { GuestMemory } from './guest-memory.ts';
import { type DeviceQueue, NO_BUFFER, type QueueAddresses } from './queues.ts';

/** Offsets in the areas of a split virtqueue (Virtio 1.4, 2.7). */
const Descriptor = { size: 16, length: 8, flags: 12 } as const;
const Ring = { entries: 4 } as const;
const UsedEntry = { size: 8, length: 4 } as const;
const Flag = { next: 1, write: 2, indirect: 4 } as const;
/** Milliseconds. */
const LATE = 3;
const GARBAGE = 0x8002;

export interface FaultyQueueOptions {
  readonly faults: FaultSet;
  readonly memory: GuestMemory;
  readonly addresses: QueueAddresses;
  /** Arena offset of a few private bytes, a multiple of 4. */
  readonly scratch: number;
}

export class FaultyQueue implements DeviceQueue {
  readonly #inner: DeviceQueue;
  readonly #options: FaultyQueueOptions;
  readonly #faults: FaultSet;
  #fault: string | null = null;
  #closed = false;
  /** Free-running: buffers taken and completed. */
  #taken = 0;
  #completed = 0;
  /** Completions since the last `publish`. */
  #fresh = 0;
  /** A completion that is held back, for `in-order-lie`. */
  #held: { id: number; written: number } | null = null;

  constructor(inner: DeviceQueue, options: FaultyQueueOptions) {
    this.#inner = inner;
    this.#options = options;
    this.#faults = options.faults;
  }

  get index(): number {
    return this.#inner.index;
  }
  get size(): number {
    return this.#inner.size;
  }
  get broken(): string | null {
    return this.#fault ?? this.#inner.broken;
  }
  get low(): Uint32Array {
    return this.#inner.low;
  }
  get high(): Uint32Array {
    return this.#inner.high;
  }
  get length(): Uint32Array {
    return this.#inner.length;
  }
  get readable(): number {
    return this.#inner.readable;
  }
  get segments(): number {
    return this.#inner.segments;
  }
  get readableBytes(): number {
    return this.#inner.readableBytes;
  }
  get writableBytes(): number {
    return this.#inner.writableBytes;
  }

  available(): number {
    return this.#inner.available();
  }

  take(): number {
    if (this.#fault !== null || (this.#inner.available() > 0 && this.#refuses())) return NO_BUFFER;
    const id = this.#inner.take();
    if (id !== NO_BUFFER) this.#taken++;
    return id;
  }

  putBack(count: number): void {
    this.#taken -= count;
    this.#inner.putBack(count);
  }

  gather(skip: number, max: number, to: number): number {
    const first = this.#faults.has('first-descriptor-only') ? Math.min(max, this.length[0]) : max;
    return this.#inner.gather(skip, first, to);
  }

  scatter(skip: number, bytes: number, from: number): number {
    const first = this.#faults.has('first-descriptor-only') ? Math.min(bytes, this.length[this.readable]) : bytes;
    return this.#inner.scatter(skip, first, from);
  }

  complete(id: number, written: number): void {
    const { low, high } = this.#inner;
    if (this.#faults.has('writes-readable') && this.readable > 0) this.#write(low[0], high[0], 0, 0xffffffff, 4);
    if (this.#faults.has('writes-descriptors')) {
      const { descriptorLow, descriptorHigh } = this.#options.addresses;
      this.#write(descriptorLow, descriptorHigh, id * Descriptor.size + Descriptor.length, 0xffffffff, 4);
    }
    if (!this.#faults.has('in-order-lie')) this.#completeOne(id, written);
    else if (this.#held === null) this.#held = { id, written };
    else {
      this.#completeOne(id, written);
      this.#flush();
    }
  }

  #flush(): void {
    const held = this.#held;
    this.#held = null;
    if (held !== null) this.#completeOne(held.id, held.written);
  }

  #completeOne(id: number, written: number): void {
    const faults = this.#faults;
    this.#fresh++;
    if (faults.has('rx-buffers-apart') && this.index === 0 && this.#fresh > 1) {
      this.#later(() => {
        this.#inner.complete(id, written);
        this.#inner.publish();
      });
      return;
    }
    const shown = faults.has('used-id-bogus') ? id + this.size : id;
    const long = faults.has('used-length-too-long') ? written + 0x100000 : written;
    const more = faults.has('used-length-more') ? Math.min(long + 4, this.writableBytes) : long;
    const length = faults.has('used-length-short') ? Math.min(more, 8) : more;
    const place = this.#completed++ % this.size;
    if (faults.has('used-length-late')) {
      const { deviceLow, deviceHigh } = this.#options.addresses;
      const at = Ring.entries + place * UsedEntry.size + UsedEntry.length;
      this.#later(() => this.#write(deviceLow, deviceHigh, at, length, 4));
    }
    this.#inner.complete(shown, faults.has('used-length-late') ? 0 : length);
    if (faults.has('used-id-twice')) this.#inner.complete(shown, length);
    if (!faults.has('used-index-jump')) return;
    for (let i = 0; i < this.size; i++) this.#inner.complete(id, 0);
  }

  publish(): boolean {
    this.#flush();
    const fresh = this.#fresh;
    this.#fresh = 0;
    const { deviceLow, deviceHigh } = this.#options.addresses;
    if (fresh > 0 && this.#faults.has('used-flags-garbage')) this.#write(deviceLow, deviceHigh, 0, GARBAGE, 2);
    const wanted = this.#inner.publish();
    return wanted || (fresh > 0 && this.#faults.has('interrupt-flag-ignored'));
  }

  suppress(): void {
    this.#inner.suppress();
  }

  arm(seen: number): boolean {
    return this.#inner.arm(seen);
  }

  close(): void {
    this.#closed = true;
    this.#inner.close();
  }

  #later(action: () => void): void {
    setTimeout(() => {
      if (!this.#closed) action();
    }, LATE);
  }

  /** Whether a fault keeps the device from understanding the next buffer; the queue is broken then. */
  #refuses(): boolean {
    const direct = this.#faults.has('indirect-write-refused');
    const chained = this.#faults.has('indirect-after-chain-refused');
    if (!direct && !chained) return false;
    const { driverLow, driverHigh } = this.#options.addresses;
    const head = this.#read16(driverLow, driverHigh, Ring.entries + 2 * (this.#taken % this.size));
    const first = this.#descriptorFlags(head);
    if (direct && (first & (Flag.indirect | Flag.write)) === (Flag.indirect | Flag.write)) return this.#break();
    const second = (first & Flag.next) === 0 ? 0 : this.#descriptorFlags(first >>> 16);
    return chained && (second & Flag.indirect) !== 0 ? this.#break() : false;
  }

  #break(): true {
    this.#fault = `queue ${this.index}: a fault does not understand the buffer`;
    return true;
  }

  /** Flags of a descriptor, and its `next` in the upper half. */
  #descriptorFlags(d: number): number {
    const { descriptorLow, descriptorHigh } = this.#options.addresses;
    const at = d * Descriptor.size + Descriptor.flags;
    return (
      this.#read16(descriptorLow, descriptorHigh, at) | (this.#read16(descriptorLow, descriptorHigh, at + 2) << 16)
    );
  }

  #read16(low: number, high: number, at: number): number {
    const { memory, scratch } = this.#options;
    const { u8 } = memory.arena;
    return memory.read(low + at, high, 2, scratch) ? u8[scratch] | (u8[scratch + 1] << 8) : 0;
  }

  #write(low: number, high: number, at: number, value: number, width: number): void {
    const { memory, scratch } = this.#options;
    memory.arena.u32[scratch >>> 2] = value;
    memory.write(low + at, high, width, scratch);
  }
}
