/**
 * The device side of a split virtqueue (Virtio 1.4, 2.7).
 *
 * The ring belongs to a driver that is not trusted: each field of it is read once, into locals, and checked; chains
 * are bounded by the queue size, whatever their `next` says; tables of indirect descriptors are copied before they
 * are walked. A queue whose driver broke a rule is `broken` and does nothing any more; the function then needs a
 * reset.
 *
 * `DeviceQueue` is what the rest of the device knows, of this and of packed virtqueues (`packed-queue.ts`).
 */
import type { GuestMemory, Pin } from './guest-memory.ts';
import { Descriptor, DescriptorFlag, QueueBuffer } from './queue-buffer.ts';

/** `take` found no buffer. */
export const NO_BUFFER = -1;

/** Virtio 1.4, 2.7.6: flags, idx, ring, used_event; offsets in 16-bit words. */
const Avail = { flags: 0, idx: 1, ring: 2 } as const;
const AvailFlag = { NO_INTERRUPT: 1 } as const;
/** Virtio 1.4, 2.7.8: flags, idx, ring of (id, len), avail_event; offsets in 16-bit words. */
const Used = { flags: 0, idx: 1, ring: 2 } as const;
const UsedFlag = { NO_NOTIFY: 1 } as const;
const USED_ELEMENT = 8;

/** Alignment of the three areas (2.7, 2.8.10.1). */
export const AREA_ALIGNMENT = {
  split: { descriptor: 16, driver: 2, device: 4 },
  packed: { descriptor: 16, driver: 4, device: 4 },
} as const;

/** Where a driver has put a queue, as written to the common configuration structure. */
export interface QueueAddresses {
  readonly descriptorLow: number;
  readonly descriptorHigh: number;
  readonly driverLow: number;
  readonly driverHigh: number;
  readonly deviceLow: number;
  readonly deviceHigh: number;
}

export interface DeviceQueue {
  readonly index: number;
  /** Number of descriptors. */
  readonly size: number;
  /** What the driver did wrong; nothing works after that. */
  readonly broken: string | null;

  /**
   * The pieces of the buffer that was taken last, as IOVA and length: first `readable` device-readable ones, then
   * device-writable ones.
   */
  readonly low: Uint32Array;
  readonly high: Uint32Array;
  readonly length: Uint32Array;
  readonly readable: number;
  readonly segments: number;
  /** Bytes of the readable and of the writable pieces. */
  readonly readableBytes: number;
  readonly writableBytes: number;

  /** hot: number of buffers that the driver has made available and that were not taken; a packed queue may count up to 128 only. */
  available(): number;
  /** hot: takes the next buffer and returns its id, or `NO_BUFFER`. */
  take(): number;
  /** hot: puts back the last `count` buffers taken. None of them may have been completed. */
  putBack(count: number): void;
  /**
   * hot: notes that buffer `id` is used and that `written` bytes were written to it. The driver sees it after
   * `publish`.
   */
  complete(id: number, written: number): void;
  /** hot: shows completed buffers to the driver; true when it wants a notification. */
  publish(): boolean;
  /**
   * hot: copies readable bytes of the buffer taken last, from byte `skip` on, to arena offset `to`; returns how many,
   * or -1 when one is unmapped.
   */
  gather(skip: number, max: number, to: number): number;
  /**
   * hot: copies from arena offset `from` to the writable pieces, from their byte `skip` on; returns how many fitted,
   * or -1.
   */
  scatter(skip: number, bytes: number, from: number): number;
  /** Asks the driver not to notify. */
  suppress(): void;
  /** Asks the driver to notify of buffers to come; true when more than `seen` are there already. */
  arm(seen: number): boolean;
  /** Lets go of the ring. */
  close(): void;
}

export interface QueueOptions {
  readonly index: number;
  /** For a split queue a power of two. */
  readonly size: number;
  readonly addresses: QueueAddresses;
  readonly eventIdx: boolean;
  readonly indirect: boolean;
  /** IN_ORDER: buffers are completed in the order in which they were taken, and several may be shown by the last of them. */
  readonly inOrder?: boolean;
  /** Arena offset of `size * 16` private bytes: indirect tables are copied there. */
  readonly scratch: number;
}

export class SplitDeviceQueue extends QueueBuffer implements DeviceQueue {
  readonly #addresses: QueueAddresses;
  readonly #eventIdx: boolean;
  readonly #indirect: boolean;
  readonly #scratch: number;
  readonly #u16: Uint16Array;
  readonly #u32: Uint32Array;
  readonly #mask: number;
  readonly #inOrder: boolean;
  #pins: readonly Pin[] = [];
  /** Word indices: of the descriptor table in 32-bit words, of the rings in 16-bit words. */
  #descriptors = 0;
  #avail = 0;
  #used = 0;
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
    super(memory, options.index, options.size);
    this.#addresses = options.addresses;
    this.#eventIdx = options.eventIdx;
    this.#indirect = options.indirect;
    this.#scratch = options.scratch;
    this.#u16 = memory.arena.u16;
    this.#u32 = memory.arena.u32;
    this.#mask = options.size - 1;
    this.#inOrder = options.inOrder ?? false;
  }

  /**
   * Finds the ring in guest memory again if the driver has unmapped a part of it since. False when it is not all
   * there.
   */
  #located(): boolean {
    // hot:
    const pins = this.#pins;
    if (pins.length === 3 && pins[0].valid && pins[1].valid && pins[2].valid) return true;
    return this.#locate();
  }

  #locate(): boolean {
    if (this.broken !== null) return false;
    this.close();
    const { descriptorLow, descriptorHigh, driverLow, driverHigh, deviceLow, deviceHigh } = this.#addresses;
    const event = this.#eventIdx ? 2 : 0;
    const areas = [
      [descriptorLow, descriptorHigh, this.size * Descriptor.size, false],
      [driverLow, driverHigh, 2 * (Avail.ring + this.size) + event, false],
      [deviceLow, deviceHigh, 2 * Used.ring + this.size * USED_ELEMENT + event, true],
    ] as const;
    const pins: Pin[] = [];
    for (const [low, high, size, write] of areas) {
      const pin = this.memory.pin(low, high, size, write);
      if (pin === null) break;
      pins.push(pin);
    }
    this.#pins = pins;
    if (pins.length < areas.length) {
      this.close();
      return this.fail('a part of the ring is not mapped');
    }
    this.#descriptors = pins[0].offset >>> 2;
    this.#avail = pins[1].offset >>> 1;
    this.#used = pins[2].offset >>> 1;
    return true;
  }

  available(): number {
    // hot:
    if (this.broken !== null || !this.#located()) return 0;
    this.#availIdx = Atomics.load(this.#u16, this.#avail + Avail.idx);
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
    if (this.broken !== null || !this.#located()) return NO_BUFFER;
    const head = this.#u16[this.#avail + Avail.ring + (this.#nextAvail & this.#mask)];
    this.begin();
    if (!this.#walk(head)) return NO_BUFFER;
    this.#nextAvail = (this.#nextAvail + 1) & 0xffff;
    return head;
  }

  /** hot: follows the chain from descriptor `head`. */
  #walk(head: number): boolean {
    const u32 = this.#u32;
    let next = head;
    for (let steps = 0; steps < this.size; steps++) {
      if (next >= this.size) return this.fail('a descriptor index beyond the table');
      const d = this.#descriptors + next * Descriptor.words;
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
    if (!this.#indirect) return this.fail('INDIRECT without having negotiated it');
    const count = this.copyTable(tableLow, tableHigh, bytes, this.#scratch);
    if (count === 0) return false;
    const u32 = this.#u32;
    const table = this.#scratch >>> 2;
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
    if (this.#inOrder && this.writableBytes === 0) this.#batch = id;
    else this.#writeEntry(id, written);
  }

  /** hot: writes the entry of the buffers that were completed since the last one. */
  #writeEntry(id: number, written: number): void {
    const at = (this.#used + Used.ring + (this.#batchAt & this.#mask) * (USED_ELEMENT / 2)) >>> 1;
    this.#u32[at] = id;
    this.#u32[at + 1] = written;
    this.#batch = NO_BUFFER;
  }

  publish(): boolean {
    // hot:
    const before = this.#published;
    const now = this.#nextUsed;
    if (before === now || this.broken !== null || !this.#located()) return false;
    if (this.#batch !== NO_BUFFER) this.#writeEntry(this.#batch, 0);
    // One store that no other side can see in halves; as an atomic one it also keeps the order: entries, index, then
    // the read below.
    Atomics.store(this.#u16, this.#used + Used.idx, now);
    this.#published = now;
    if (this.#eventIdx) {
      const event = this.#u16[this.#avail + Avail.ring + this.size];
      return ((now - event - 1) & 0xffff) < ((now - before) & 0xffff);
    }
    return (this.#u16[this.#avail + Avail.flags] & AvailFlag.NO_INTERRUPT) === 0;
  }

  suppress(): void {
    // hot:
    // With EVENT_IDX the event index is simply left behind (2.7.10).
    if (this.#eventIdx || this.broken !== null || !this.#located()) return;
    this.#u16[this.#used + Used.flags] = UsedFlag.NO_NOTIFY;
  }

  arm(seen: number): boolean {
    this.available();
    if (this.broken !== null || this.#pins.length === 0) return false;
    // The event is the first buffer that we have not seen, which is not the first that we have not taken.
    if (this.#eventIdx) Atomics.store(this.#u16, this.#eventAt(), this.#availIdx);
    else Atomics.store(this.#u16, this.#used + Used.flags, 0);
    return this.available() > seen;
  }

  /** Where `avail_event` is. */
  #eventAt(): number {
    return this.#used + Used.ring + this.size * (USED_ELEMENT / 2);
  }

  close(): void {
    for (const pin of this.#pins) this.memory.unpin(pin);
    this.#pins = [];
  }
}
