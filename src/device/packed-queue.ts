/**
 * The device side of a packed virtqueue (Virtio 1.4, 2.8), beside the split one of `split-queue.ts` and as wary: each descriptor is
 * read once and checked, lists are bounded by the ring, tables of indirect descriptors are copied first, and a buffer id that
 * is in use cannot come again.
 */
import {
  EVENT_FLAG_MASK,
  EventFlag,
  FLAGS_HALF,
  FLAGS_SHIFT,
  isAmongNext,
  OFFSET_MASK,
  RING_FLAGS,
  RingFlag,
  ringPosition,
} from '../virtqueue/packed-layout.ts';
import type { GuestMemory } from './guest-memory.ts';
import { PinnedQueue } from './pinned-queue.ts';
import { Descriptor, DescriptorFlag } from './queue-buffer.ts';
import { type DeviceQueue, NO_BUFFER, type QueueOptions } from './queues.ts';

/** `available` does not count further. */
const COUNT_MAX = 128;
/** Buffer ids have 16 bits, and need not be smaller than the queue. */
const IDS = 0x10000;

/** `struct pvirtq_event_suppress` (2.8.14). */
const EVENT_BYTES = 4;

const NEXT = DescriptorFlag.NEXT << FLAGS_SHIFT;
const WRITE = DescriptorFlag.WRITE << FLAGS_SHIFT;
const INDIRECT = DescriptorFlag.INDIRECT << FLAGS_SHIFT;

export class PackedDeviceQueue extends PinnedQueue implements DeviceQueue {
  /** The next descriptor to take, and the ring flags that it has when it is available, which say the wrap counter. */
  #availAt = 0;
  #availFlags: number = RingFlag.AVAIL;
  /** As far as `available` has looked: from the next one to take, so many descriptors, which end so many buffers. */
  #seenAt = 0;
  #seenFlags: number = RingFlag.AVAIL;
  #seen = 0;
  #buffers = 0;
  /** Descriptors of buffers that were taken and not completed, and by buffer id how many of them; the ids in the order of taking. */
  #out = 0;
  readonly #counts = new Uint16Array(IDS);
  readonly #taken: Uint16Array;
  #takenAt = 0;
  /** Where the next used descriptor goes, and its ring flags. */
  #usedAt = 0;
  #usedFlags: number = RING_FLAGS;
  /** With IN_ORDER: the last completed buffer, whose descriptor is still to be written at `#batchAt`; `NO_BUFFER` for none. */
  #batch: number = NO_BUFFER;
  #batchAt = 0;
  #batchFlags = 0;
  /** Used descriptors since the last `publish`: where the first is, its flags, which are written last, and how far they reach. */
  #headAt = 0;
  #headFlags = 0;
  #fresh = 0;
  #passed = 0;

  /** Null unless notifications alone tell of buffers. */
  readonly #reach: { readonly next: number } | null;

  constructor(memory: GuestMemory, options: QueueOptions) {
    const descriptor = { bytes: options.size * Descriptor.size, write: true };
    super(memory, options, { descriptor, driverBytes: EVENT_BYTES, deviceBytes: EVENT_BYTES });
    this.#taken = new Uint16Array(options.size);
    this.#reach = options.reach ?? null;
  }

  available(): number {
    // hot:
    if (this.broken !== null || !this.located()) return 0;
    const u32 = this.u32;
    const { size } = this;
    let at = this.#seenAt;
    let flags = this.#seenFlags;
    let seen = this.#seen;
    let buffers = this.#buffers;
    // What was taken and not completed can look available in the next round: it is not.
    const most = this.#reach === null ? size - this.#out : this.#reachable(this.#reach);
    while (seen < most && buffers < COUNT_MAX) {
      const word = u32[(this.descriptorAt >>> 2) + at * Descriptor.words + Descriptor.last];
      if (((word >>> FLAGS_SHIFT) & RING_FLAGS) !== flags) break;
      if ((word & NEXT) === 0) buffers++;
      seen++;
      at++;
      if (at < size) continue;
      at = 0;
      flags ^= RING_FLAGS;
    }
    this.#seenAt = at;
    this.#seenFlags = flags;
    this.#seen = seen;
    this.#buffers = buffers;
    if (buffers === 0 && seen !== 0 && seen === size - this.#out) this.fail('a list of descriptors without an end');
    return buffers;
  }

  /** hot: how many descriptors from the next one to take there are before the place that the driver has notified of. */
  #reachable(reach: { readonly next: number }): number {
    const place = ringPosition(this.#availAt, this.#availFlags);
    const { size } = this;
    const distance = (reach.next & OFFSET_MASK) - (place & OFFSET_MASK);
    const sameTurn = ((reach.next ^ place) & ~OFFSET_MASK) === 0;
    // A place that is behind, or outside of the ring, is none.
    const ahead = sameTurn ? distance : distance + size;
    return ahead < 0 || ahead > size ? 0 : Math.min(ahead, size - this.#out);
  }

  /** Whether the driver wants interrupts, as it says at this moment. */
  wantsInterrupts(): boolean {
    if (this.broken !== null || !this.located()) return false;
    return ((this.u32[this.driverAt >>> 2] >>> FLAGS_SHIFT) & EVENT_FLAG_MASK) !== EventFlag.DISABLE;
  }

  take(): number {
    // hot:
    if (this.#buffers === 0 && this.available() === 0) return NO_BUFFER;
    if (this.broken !== null || !this.located()) return NO_BUFFER;
    const u32 = this.u32;
    this.begin();
    let at = this.#availAt;
    let flags = this.#availFlags;
    let count = 0;
    let word = NEXT;
    while ((word & NEXT) !== 0) {
      if (count === this.#seen) return this.#refuse('a list of descriptors that has become longer');
      const d = (this.descriptorAt >>> 2) + at * Descriptor.words;
      word = u32[d + Descriptor.last];
      const other = ((word >>> FLAGS_SHIFT) & RING_FLAGS) ^ flags;
      if (other !== 0) return this.#refuse('a descriptor that is not available any more');
      // Adds 0, so that no processor reads these before the flags.
      const low = u32[d + other + Descriptor.address];
      const high = u32[d + other + Descriptor.addressHigh];
      const length = u32[d + other + Descriptor.length];
      count++;
      at++;
      if (at === this.size) {
        at = 0;
        flags ^= RING_FLAGS;
      }
      if ((word & INDIRECT) === 0) {
        if (!this.add(low, high, length, (word & WRITE) !== 0)) return NO_BUFFER;
      } else {
        if ((word & NEXT) !== 0 || count > 1) return this.#refuse('an indirect descriptor in a list');
        if (!this.#addTable(low, high, length)) return NO_BUFFER;
      }
    }
    const id = word & 0xffff;
    if (this.#counts[id] !== 0) return this.#refuse(`buffer id ${id} twice`);
    this.#counts[id] = count;
    this.#taken[this.#takenAt] = id;
    this.#takenAt = this.#takenAt + 1 === this.size ? 0 : this.#takenAt + 1;
    this.#out += count;
    this.#seen -= count;
    this.#buffers--;
    this.#availAt = at;
    this.#availFlags = flags;
    return id;
  }

  #refuse(reason: string): number {
    this.fail(reason);
    return NO_BUFFER;
  }

  /** hot: adds the pieces of a table of indirect descriptors, which are all of it, and of whose flags only WRITE counts (2.8.7). */
  #addTable(tableLow: number, tableHigh: number, bytes: number): boolean {
    if (!this.indirect) return this.fail('INDIRECT without having negotiated it');
    const count = this.copyTable(tableLow, tableHigh, bytes, this.scratch);
    if (count === 0) return false;
    const u32 = this.u32;
    for (let i = 0; i < count; i++) {
      const d = (this.scratch >>> 2) + i * Descriptor.words;
      const write = (u32[d + Descriptor.last] & WRITE) !== 0;
      const length = u32[d + Descriptor.length];
      if (!this.add(u32[d + Descriptor.address], u32[d + Descriptor.addressHigh], length, write)) return false;
    }
    return true;
  }

  putBack(count: number): void {
    // hot:
    for (let i = 0; i < count; i++) {
      this.#takenAt = (this.#takenAt === 0 ? this.size : this.#takenAt) - 1;
      const id = this.#taken[this.#takenAt];
      const descriptors = this.#counts[id];
      this.#counts[id] = 0;
      this.#out -= descriptors;
      this.#seen += descriptors;
      this.#buffers++;
      this.#availAt -= descriptors;
      if (this.#availAt >= 0) continue;
      this.#availAt += this.size;
      this.#availFlags ^= RING_FLAGS;
    }
  }

  complete(id: number, written: number): void {
    // hot:
    if (this.broken !== null) return;
    const shown = id & 0xffff;
    // An id that is not out is a lie that the device was told to tell.
    const descriptors = this.#counts[shown] || 1;
    this.#counts[shown] = 0;
    this.#out = Math.max(this.#out - descriptors, 0);
    if (this.#batch === NO_BUFFER) {
      this.#batchAt = this.#usedAt;
      this.#batchFlags = this.#usedFlags;
    }
    this.#passed += descriptors;
    this.#usedAt += descriptors;
    if (this.#usedAt >= this.size) {
      this.#usedAt -= this.size;
      this.#usedFlags ^= RING_FLAGS;
    }
    // 2.8.8: a buffer that was only read can be skipped, because the next one of the batch says that it was used.
    if (this.inOrder && this.writableBytes === 0) this.#batch = shown;
    else this.#writeUsed(shown, written);
  }

  /** hot: writes the descriptor of the buffers that were completed since the last one. */
  #writeUsed(id: number, written: number): void {
    this.#batch = NO_BUFFER;
    const d = (this.descriptorAt >>> 2) + this.#batchAt * Descriptor.words;
    const flags = written === 0 ? this.#batchFlags : this.#batchFlags | DescriptorFlag.WRITE;
    this.u32[d + Descriptor.length] = written;
    if (this.#fresh++ === 0) {
      // Its flags stay those of an available descriptor until `publish`.
      this.#headAt = this.#batchAt;
      this.#headFlags = flags;
      this.u16[(d + Descriptor.last) << 1] = id;
    } else {
      this.u32[d + Descriptor.last] = id | (flags << FLAGS_SHIFT);
    }
  }

  publish(): boolean {
    // hot:
    if (this.broken !== null || !this.located()) return false;
    if (this.#batch !== NO_BUFFER) this.#writeUsed(this.#batch, 0);
    if (this.#fresh === 0) return false;
    const head = (this.descriptorAt >>> 2) + this.#headAt * Descriptor.words;
    // Also keeps the order: descriptors, these flags, then the read below.
    Atomics.store(this.u16, (head << 1) + FLAGS_HALF, this.#headFlags);
    const passed = this.#passed;
    this.#fresh = 0;
    this.#passed = 0;
    // Who looks at no wishes of the driver leaves them to the window.
    if (this.#reach !== null) return true;
    const event = this.u32[this.driverAt >>> 2];
    const flags = (event >>> FLAGS_SHIFT) & EVENT_FLAG_MASK;
    if (flags !== EventFlag.DESC || !this.eventIdx) return flags !== EventFlag.DISABLE;
    return isAmongNext(event & 0xffff, ringPosition(this.#headAt, this.#headFlags), passed, this.size);
  }

  suppress(): void {
    // hot:
    if (this.#reach !== null || this.broken !== null || !this.located()) return;
    this.u32[this.deviceAt >>> 2] = EventFlag.DISABLE << FLAGS_SHIFT;
  }

  arm(seen: number): boolean {
    this.available();
    if (this.broken !== null || !this.found) return false;
    if (this.#reach !== null) return this.available() > seen;
    // The first descriptor that we have not seen, which is not the first that we have not taken.
    const event = this.eventIdx
      ? (EventFlag.DESC << FLAGS_SHIFT) | ringPosition(this.#seenAt, this.#seenFlags)
      : EventFlag.ENABLE << FLAGS_SHIFT;
    Atomics.store(this.u32, this.deviceAt >>> 2, event);
    return this.available() > seen;
  }
}
