/**
 * The device side of a split virtqueue (Virtio 1.4, 2.7).
 *
 * The ring belongs to a driver that is not trusted: each field of it is read once, into locals, and checked; chains
 * are bounded by the queue size, whatever their `next` says; tables of indirect descriptors are copied before they
 * are walked. A queue whose driver broke a rule is `broken` and does nothing any more; the function then needs a
 * reset.
 */
import type { GuestMemory } from './guest-memory.ts';
import { PinnedQueue } from './pinned-queue.ts';
import { Descriptor, DescriptorFlag } from './queue-buffer.ts';
import { type DeviceQueue, NO_BUFFER, type QueueOptions } from './queues.ts';

/** Virtio 1.4, 2.7.6: flags, idx, ring, used_event; offsets in 16-bit words. */
const Avail = { flags: 0, idx: 1, ring: 2 } as const;
const AvailFlag = { NO_INTERRUPT: 1 } as const;
/** Virtio 1.4, 2.7.8: flags, idx, ring of (id, len), avail_event; offsets in 16-bit words. */
const Used = { flags: 0, idx: 1, ring: 2 } as const;
const UsedFlag = { NO_NOTIFY: 1 } as const;
const USED_ELEMENT = 8;

export class SplitDeviceQueue extends PinnedQueue implements DeviceQueue {
  readonly #mask: number;
  /**
   * Free-running, 16 bits: next available entry to take, next used entry to write, used index that the driver knows.
   */
  #nextAvail = 0;
  #nextUsed = 0;
  #published = 0;
  /** With IN_ORDER: the last completed buffer, whose entry is still to be written at `#batchAt`; `NO_BUFFER` for none. */
  #batch: number = NO_BUFFER;
  #batchAt = 0;
  /** Available index when it was last read. */
  #availIdx = 0;

  constructor(memory: GuestMemory, options: QueueOptions) {
    const { size } = options;
    const event = options.eventIdx ? 2 : 0;
    super(memory, options, {
      descriptor: { bytes: size * Descriptor.size, write: false },
      driverBytes: 2 * (Avail.ring + size) + event,
      deviceBytes: 2 * Used.ring + size * USED_ELEMENT + event,
    });
    this.#mask = size - 1;
  }

  available(): number {
    // hot:
    if (this.broken !== null || !this.located()) return 0;
    this.#availIdx = Atomics.load(this.u16, (this.driverAt >>> 1) + Avail.idx);
    const count = (this.#availIdx - this.#nextAvail) & 0xffff;
    if (count > this.size) {
      this.fail('the available index is ahead by more than the queue size');
      return 0;
    }
    return count;
  }

  take(): number {
    // hot:
    if (this.#nextAvail === this.#availIdx && this.available() === 0) return NO_BUFFER;
    if (this.broken !== null || !this.located()) return NO_BUFFER;
    const head = this.u16[(this.driverAt >>> 1) + Avail.ring + (this.#nextAvail & this.#mask)];
    this.begin();
    if (!this.#walk(head)) return NO_BUFFER;
    this.#nextAvail = (this.#nextAvail + 1) & 0xffff;
    return head;
  }

  /** hot: follows the chain from descriptor `head`. */
  #walk(head: number): boolean {
    const u32 = this.u32;
    let next = head;
    for (let steps = 0; steps < this.size; steps++) {
      if (next >= this.size) return this.fail('a descriptor index beyond the table');
      const d = (this.descriptorAt >>> 2) + next * Descriptor.words;
      const low = u32[d + Descriptor.address];
      const high = u32[d + Descriptor.addressHigh];
      const length = u32[d + Descriptor.length];
      const flagsNext = u32[d + Descriptor.last];
      if ((flagsNext & DescriptorFlag.INDIRECT) !== 0) {
        if ((flagsNext & DescriptorFlag.NEXT) !== 0) return this.fail('a descriptor with both INDIRECT and NEXT');
        return this.#walkTable(low, high, length);
      }
      if (!this.add(low, high, length, (flagsNext & DescriptorFlag.WRITE) !== 0)) return false;
      if ((flagsNext & DescriptorFlag.NEXT) === 0) return true;
      next = flagsNext >>> 16;
    }
    return this.fail('a descriptor chain that is longer than the queue');
  }

  /** hot: follows the chain in a table of indirect descriptors (2.7.5.3). */
  #walkTable(tableLow: number, tableHigh: number, bytes: number): boolean {
    if (!this.indirect) return this.fail('INDIRECT without having negotiated it');
    const count = this.copyTable(tableLow, tableHigh, bytes, this.scratch);
    if (count === 0) return false;
    const u32 = this.u32;
    const table = this.scratch >>> 2;
    let next = 0;
    for (let steps = 0; steps < count; steps++) {
      if (next >= count) return this.fail('an indirect descriptor index beyond the table');
      const d = table + next * Descriptor.words;
      const flagsNext = u32[d + Descriptor.last];
      if ((flagsNext & DescriptorFlag.INDIRECT) !== 0) return this.fail('INDIRECT inside an indirect table');
      const write = (flagsNext & DescriptorFlag.WRITE) !== 0;
      const length = u32[d + Descriptor.length];
      if (!this.add(u32[d + Descriptor.address], u32[d + Descriptor.addressHigh], length, write)) return false;
      if ((flagsNext & DescriptorFlag.NEXT) === 0) return true;
      next = flagsNext >>> 16;
    }
    return this.fail('an indirect chain that loops');
  }

  putBack(count: number): void {
    // hot:
    this.#nextAvail = (this.#nextAvail - count) & 0xffff;
  }

  complete(id: number, written: number): void {
    // hot:
    // What was taken in this turn of the event loop was taken from where the ring still is.
    if (this.broken !== null) return;
    if (this.#batch === NO_BUFFER) this.#batchAt = this.#nextUsed;
    this.#nextUsed = (this.#nextUsed + 1) & 0xffff;
    // 2.7.9: a buffer that was only read can be skipped, because the next one of the batch says that it was used.
    if (this.inOrder && this.writableBytes === 0) this.#batch = id;
    else this.#writeEntry(id, written);
  }

  /** hot: writes the entry of the buffers that were completed since the last one. */
  #writeEntry(id: number, written: number): void {
    const at = ((this.deviceAt >>> 1) + Used.ring + (this.#batchAt & this.#mask) * (USED_ELEMENT / 2)) >>> 1;
    this.u32[at] = id;
    this.u32[at + 1] = written;
    this.#batch = NO_BUFFER;
  }

  publish(): boolean {
    // hot:
    const before = this.#published;
    const now = this.#nextUsed;
    if (before === now || this.broken !== null || !this.located()) return false;
    if (this.#batch !== NO_BUFFER) this.#writeEntry(this.#batch, 0);
    // One store that no other side can see in halves; as an atomic one it also keeps the order: entries, index, then
    // the read below.
    Atomics.store(this.u16, (this.deviceAt >>> 1) + Used.idx, now);
    this.#published = now;
    if (this.eventIdx) {
      const event = this.u16[(this.driverAt >>> 1) + Avail.ring + this.size];
      return ((now - event - 1) & 0xffff) < ((now - before) & 0xffff);
    }
    return (this.u16[(this.driverAt >>> 1) + Avail.flags] & AvailFlag.NO_INTERRUPT) === 0;
  }

  suppress(): void {
    // hot:
    // With EVENT_IDX the event index is simply left behind (2.7.10).
    if (this.eventIdx || this.broken !== null || !this.located()) return;
    this.u16[(this.deviceAt >>> 1) + Used.flags] = UsedFlag.NO_NOTIFY;
  }

  arm(seen: number): boolean {
    this.available();
    if (this.broken !== null || !this.found) return false;
    // The event is the first buffer that we have not seen, which is not the first that we have not taken.
    if (this.eventIdx) Atomics.store(this.u16, this.#eventAt(), this.#availIdx);
    else Atomics.store(this.u16, (this.deviceAt >>> 1) + Used.flags, 0);
    return this.available() > seen;
  }

  /** Where `avail_event` is. */
  #eventAt(): number {
    return (this.deviceAt >>> 1) + Used.ring + this.size * (USED_ELEMENT / 2);
  }
}
