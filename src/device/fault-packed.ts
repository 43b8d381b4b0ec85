/** How the faults of `faults.ts` that concern the memory of packed virtqueues are made (Virtio 1.4, 2.8). */
import { RING_FLAGS, RingFlag } from '../virtqueue/packed-layout.ts';
import type { FaultSet } from './faults.ts';
import type { GuestMemory } from './guest-memory.ts';
import type { QueueAddresses } from './queues.ts';

/** Offsets in a descriptor, and in an event suppression structure. */
const Descriptor = { size: 16, address: 0, length: 8, flags: 14 } as const;
const Event = { flags: 2 } as const;
const Flag = { next: 1, write: 2, indirect: 4 } as const;
/** Reserved as event flags. */
const RESERVED_EVENT = 3;
const GARBAGE = 0x5a5a5a5a;

/** Reads and writes a driver's memory, whatever stands there. */
export class RingMemory {
  readonly #memory: GuestMemory;
  readonly #scratch: number;

  /** `scratch`: arena offset of a few private bytes, a multiple of 4. */
  constructor(memory: GuestMemory, scratch: number) {
    this.#memory = memory;
    this.#scratch = scratch;
  }

  read(low: number, high: number, width: 2 | 4): number {
    const { u8 } = this.#memory.arena;
    const at = this.#scratch;
    u8.fill(0, at, at + 4);
    if (!this.#memory.read(low, high, width, at)) return 0;
    return (u8[at] | (u8[at + 1] << 8) | (u8[at + 2] << 16) | (u8[at + 3] << 24)) >>> 0;
  }

  write(low: number, high: number, value: number, width: 2 | 4): void {
    this.#memory.arena.u32[this.#scratch >>> 2] = value;
    this.#memory.write(low, high, width, this.#scratch);
  }
}

/** Follows where in the ring the device takes and uses descriptors, from outside of its queue. */
export class PackedFaults {
  readonly #memory: RingMemory;
  readonly #addresses: QueueAddresses;
  readonly #size: number;
  readonly #faults: FaultSet;
  /** Next descriptor to take, its ring flags when it is available, and how many the buffer taken last had. */
  #takeAt = 0;
  #takeFlags: number = RingFlag.AVAIL;
  /** Next used descriptor, the first that `published` has not seen, and rounds of the ring. */
  #usedAt = 0;
  #round = 0;
  /** Descriptors of the buffers that were taken and not used, in order. */
  readonly #counts: number[] = [];
  /** Places and rounds of used descriptors since `published`. */
  #fresh: { readonly at: number; readonly round: number }[] = [];
  /** A used descriptor to change when the next buffer is taken. */
  #last = -1;

  constructor(memory: RingMemory, addresses: QueueAddresses, size: number, faults: FaultSet) {
    this.#memory = memory;
    this.#addresses = addresses;
    this.#size = size;
    this.#faults = faults;
  }

  #readFlags(d: number): number {
    const { descriptorLow, descriptorHigh } = this.#addresses;
    return this.#memory.read(descriptorLow + d * Descriptor.size + Descriptor.flags, descriptorHigh, 2);
  }

  #writeFlags(d: number, flags: number): void {
    const { descriptorLow, descriptorHigh } = this.#addresses;
    this.#memory.write(descriptorLow + d * Descriptor.size + Descriptor.flags, descriptorHigh, flags, 2);
  }

  /** Before the device looks for buffers: what was never made available becomes so. */
  beforeLook(): void {
    if (!this.#faults.has('packed-takes-unavailable') || this.#readFlags(this.#takeAt) !== 0) return;
    const { descriptorLow, descriptorHigh } = this.#addresses;
    const at = descriptorLow + this.#takeAt * Descriptor.size + Descriptor.length;
    if (this.#memory.read(at, descriptorHigh, 4) !== 0) this.#writeFlags(this.#takeAt, this.#takeFlags);
  }

  /** Flags of the next descriptor to take. */
  get nextFlags(): number {
    return this.#readFlags(this.#takeAt);
  }

  /** A buffer was taken, of `segments` pieces, the first descriptor of which had `flags`. */
  taken(flags: number, segments: number): void {
    const count = (flags & Flag.indirect) === 0 ? segments : 1;
    this.#counts.push(count);
    this.#advance(count);
    if (this.#last < 0) return;
    const { descriptorLow, descriptorHigh } = this.#addresses;
    this.#memory.write(descriptorLow + this.#last * Descriptor.size + Descriptor.address, descriptorHigh, GARBAGE, 4);
    this.#last = -1;
  }

  #advance(count: number): void {
    this.#takeAt += count;
    if (this.#takeAt < this.#size) return;
    this.#takeAt -= this.#size;
    this.#takeFlags ^= RING_FLAGS;
  }

  /** The last `count` buffers were put back. */
  putBack(count: number): void {
    for (const descriptors of this.#counts.splice(this.#counts.length - count)) {
      this.#takeAt -= descriptors;
      if (this.#takeAt >= 0) continue;
      this.#takeAt += this.#size;
      this.#takeFlags ^= RING_FLAGS;
    }
  }

  /** The buffer that was taken first is used. */
  completed(): void {
    this.#fresh.push({ at: this.#usedAt, round: this.#round });
    this.#usedAt += this.#counts.shift() ?? 1;
    if (this.#usedAt < this.#size) return;
    this.#usedAt -= this.#size;
    this.#round++;
  }

  /** The driver can see what was completed. */
  published(): void {
    const fresh = this.#fresh;
    this.#fresh = [];
    for (const { at, round } of fresh) {
      if (this.#faults.has('packed-wrap-stuck') && round % 2 === 1)
        this.#writeFlags(at, this.#readFlags(at) ^ RING_FLAGS);
      if (this.#faults.has('packed-write-flag-missing')) this.#writeFlags(at, this.#readFlags(at) & ~Flag.write);
      if (this.#faults.has('writes-descriptors')) this.#last = at;
    }
  }

  /** After the device has written its event suppression structure. */
  spoilEvents(): void {
    const { deviceLow, deviceHigh } = this.#addresses;
    this.#memory.write(deviceLow + Event.flags, deviceHigh, RESERVED_EVENT, 2);
  }
}
