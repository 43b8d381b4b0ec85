/**
 * How the faults of `faults.ts` that concern virtqueues are made: a queue around the queue.
 *
 * No fault depends on time: what comes too late comes with the next buffer that the device takes.
 */
import { PackedFaults, RingMemory } from './fault-packed.ts';
import type { FaultSet } from './faults.ts';
import type { GuestMemory } from './guest-memory.ts';
import { PackedDeviceQueue } from './packed-queue.ts';
import { type DeviceQueue, NO_BUFFER, type QueueAddresses } from './queues.ts';

/** Offsets in the areas of a split virtqueue (Virtio 1.4, 2.7). */
const Descriptor = { size: 16, length: 8, flags: 12 } as const;
const Ring = { entries: 4 } as const;
const UsedEntry = { size: 8, length: 4 } as const;
const Flag = { next: 1, write: 2, indirect: 4 } as const;
const GARBAGE = 0x8002;
/** Faults with which queues are worked on that should not be. */
const UNDEAD = ['reset-keeps-queues', 'queue-reset-half', 'early-start', 'suspend-fake'] as const;

export interface FaultyQueueOptions {
  readonly faults: FaultSet;
  readonly memory: GuestMemory;
  readonly addresses: QueueAddresses;
  /** Arena offset of a few private bytes, a multiple of 4. */
  readonly scratch: number;
}

export class FaultyQueue implements DeviceQueue {
  readonly #inner: DeviceQueue;
  readonly #addresses: QueueAddresses;
  readonly #memory: RingMemory;
  readonly #faults: FaultSet;
  /** Null for a split virtqueue. */
  readonly #packed: PackedFaults | null;
  #fault: string | null = null;
  /** Free-running: buffers taken and completed. */
  #taken = 0;
  #completed = 0;
  /** Completions since the last `publish`. */
  #fresh = 0;
  /** A completion that is held back, for `in-order-lie`. */
  #held: { id: number; written: number } | null = null;
  /** What is done when the next buffer is taken. */
  #late: (() => void)[] = [];

  constructor(inner: DeviceQueue, options: FaultyQueueOptions) {
    const { faults, memory, addresses, scratch } = options;
    this.#inner = inner;
    this.#addresses = addresses;
    this.#memory = new RingMemory(memory, scratch);
    this.#faults = faults;
    const isPacked = inner instanceof PackedDeviceQueue;
    this.#packed = isPacked ? new PackedFaults(this.#memory, addresses, inner.size, faults) : null;
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
    this.#packed?.beforeLook();
    return this.#inner.available();
  }

  take(): number {
    if (this.#fault !== null || this.available() === 0 || this.#refuses()) return NO_BUFFER;
    const late = this.#late;
    this.#late = [];
    for (const action of late) action();
    const flags = this.#packed?.nextFlags ?? 0;
    const id = this.#inner.take();
    if (id === NO_BUFFER) return id;
    this.#taken++;
    this.#packed?.taken(flags, this.#inner.segments);
    return id;
  }

  putBack(count: number): void {
    this.#taken -= count;
    this.#packed?.putBack(count);
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
    if (this.#faults.has('writes-descriptors') && this.#packed === null) {
      const { descriptorLow, descriptorHigh } = this.#addresses;
      this.#write(descriptorLow, descriptorHigh, id * Descriptor.size + Descriptor.length, 0xffffffff, 4);
    }
    // The first buffer of each two is shown after the second: with the third, or never.
    if (!this.#faults.has('in-order-lie') || this.index === 0) this.#completeOne(id, written);
    else if (this.#held === null) this.#held = { id, written };
    else {
      const held = this.#held;
      this.#held = null;
      this.#completeOne(id, written);
      this.#late.push(() => this.#completeOne(held.id, held.written));
    }
  }

  #completeOne(id: number, written: number): void {
    const faults = this.#faults;
    this.#fresh++;
    if (faults.has('rx-buffers-apart') && this.index === 0 && this.#fresh > 1) {
      this.#late.push(() => this.#inner.complete(id, written));
      return;
    }
    const shown = faults.has('used-id-bogus') ? id + this.size : id;
    const long = faults.has('used-length-too-long') ? written + 0x100000 : written;
    const more = faults.has('used-length-more') ? Math.min(long + 4, this.writableBytes) : long;
    const length = faults.has('used-length-short') ? Math.min(more, 8) : more;
    const place = this.#completed++ % this.size;
    this.#packed?.completed();
    if (faults.has('used-length-late') && this.#packed === null) {
      const { deviceLow, deviceHigh } = this.#addresses;
      const at = Ring.entries + place * UsedEntry.size + UsedEntry.length;
      this.#late.push(() => this.#write(deviceLow, deviceHigh, at, length, 4));
    }
    this.#inner.complete(shown, faults.has('used-length-late') ? 0 : length);
    if (faults.has('used-id-twice')) this.#inner.complete(shown, length);
    if (!faults.has('used-index-jump')) return;
    for (let i = 0; i < this.size; i++) this.#inner.complete(id, 0);
  }

  publish(): boolean {
    const fresh = this.#fresh;
    this.#fresh = 0;
    if (fresh > 0) this.#spoilFlags();
    const wanted = this.#inner.publish();
    this.#packed?.published();
    return wanted || (fresh > 0 && this.#faults.has('interrupt-flag-ignored'));
  }

  suppress(): void {
    this.#inner.suppress();
    this.#spoilFlags();
  }

  arm(seen: number): boolean {
    const unasked = this.index === 1 && this.#faults.has('notifications-unasked');
    const ready = unasked ? this.#inner.available() > seen : this.#inner.arm(seen);
    this.#spoilFlags();
    // Nobody would wake the device for a queue that it should not work on.
    return ready || UNDEAD.some((name) => this.#faults.has(name));
  }

  /** Where the device says whether it wants notifications: the fault has the last word. */
  #spoilFlags(): void {
    if (!this.#faults.has('used-flags-garbage')) return;
    const { deviceLow, deviceHigh } = this.#addresses;
    if (this.#packed === null) this.#write(deviceLow, deviceHigh, 0, GARBAGE, 2);
    else this.#packed.spoilEvents();
  }

  close(): void {
    this.#inner.close();
  }

  /** Whether a fault keeps the device from understanding the next buffer; the queue is broken then. */
  #refuses(): boolean {
    const direct = this.#faults.has('indirect-write-refused');
    const chained = this.#faults.has('indirect-after-chain-refused');
    if (!direct && !chained) return false;
    if (this.#packed !== null) {
      const both = Flag.indirect | Flag.write;
      return direct && (this.#packed.nextFlags & both) === both ? this.#break() : false;
    }
    const { driverLow, driverHigh } = this.#addresses;
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
    const { descriptorLow, descriptorHigh } = this.#addresses;
    const at = d * Descriptor.size + Descriptor.flags;
    return (
      this.#read16(descriptorLow, descriptorHigh, at) | (this.#read16(descriptorLow, descriptorHigh, at + 2) << 16)
    );
  }

  #read16(low: number, high: number, at: number): number {
    return this.#memory.read(low + at, high, 2);
  }

  #write(low: number, high: number, at: number, value: number, width: 2 | 4): void {
    this.#memory.write(low + at, high, value, width);
  }
}
