/**
 * The smallest device that a driver can be measured against: it takes what is in the transmit ring, and returns each packet as
 * received, in order, in the driver's thread or in one of its own. Its rings are those of Virtio 1.4, 2.7 (`LoopDevice`) or 2.8
 * (`PackedLoopDevice`).
 *
 * It does what costs a device cannot avoid: it reads both rings and both descriptors, writes the fields of the
 * received header that say something, and both used entries. It does not copy the payload, unless it is asked to, and checks nothing, because
 * it is the driver that is measured; what it costs itself is the metric `ring.split.loop_device.mpps`.
 */
import type { DmaMemory, MappedMemory } from '../src/sys/memory.ts';

export interface LoopRing {
  readonly size: number;
  readonly descriptorArea: number;
  readonly driverArea: number;
  readonly deviceArea: number;
  readonly memory: DmaMemory;
}

/** What is written into each received header. */
export interface LoopHeader {
  /** 12, or 32 with a resource. */
  readonly length: number;
  readonly flags: number;
  readonly resourceId: number;
  readonly resourceType: number;
}

const FULL_LENGTH = 32;

class Ring {
  readonly u16: Uint16Array;
  readonly u32: Uint32Array;
  readonly mask: number;
  readonly descriptors: number;
  readonly availIdx: number;
  readonly availRing: number;
  readonly usedIdx: number;
  readonly usedRing: number;
  next = 0;

  constructor(ring: LoopRing) {
    const { memory } = ring;
    this.u16 = memory.u16;
    this.u32 = memory.u32;
    this.mask = ring.size - 1;
    this.descriptors = (ring.descriptorArea - memory.iova) >>> 2;
    this.availIdx = ((ring.driverArea - memory.iova) >>> 1) + 1;
    this.availRing = this.availIdx + 1;
    this.usedIdx = ((ring.deviceArea - memory.iova) >>> 1) + 1;
    this.usedRing = ((ring.deviceArea - memory.iova) >>> 2) + 1;
  }
}

export class LoopDevice {
  readonly #tx: Ring;
  readonly #rx: Ring;
  readonly #u32: Uint32Array;
  readonly #f64: Float64Array;
  readonly #iovaLow: number;
  readonly #header: LoopHeader;
  readonly #copied: number;

  /**
   * `packets` is the memory that descriptors point into; its IOVA is `iovaLow`. The first `copied` bytes of each packet, a multiple of 8, are
   * copied, 0 for none.
   */
  constructor(tx: LoopRing, rx: LoopRing, packets: MappedMemory, iovaLow: number, header: LoopHeader, copied = 0) {
    this.#tx = new Ring(tx);
    this.#rx = new Ring(rx);
    this.#f64 = new Float64Array(packets.u8.buffer);
    this.#copied = copied;
    this.#u32 = packets.u32;
    this.#iovaLow = iovaLow;
    this.#header = header;
  }

  /** Asks not to be notified: it looks by itself (VIRTQ_USED_F_NO_NOTIFY, 2.7.10). */
  suppressNotifications(): void {
    for (const { u16, usedIdx } of [this.#tx, this.#rx]) u16[usedIdx - 1] = 1;
  }

  /** Moves all that can be moved, an even number; returns how many packets. */
  run(): number {
    // hot:
    const tx = this.#tx;
    const rx = this.#rx;
    const fromTx = (Atomics.load(tx.u16, tx.availIdx) - tx.next) & 0xffff;
    const roomRx = (Atomics.load(rx.u16, rx.availIdx) - rx.next) & 0xffff;
    // Two at a time, below: of an odd number the last one is left for the next time.
    const n = Math.min(fromTx, roomRx) & ~1;
    if (this.#copied !== 0) this.#copy(n);
    const packets = this.#u32;
    const base = this.#iovaLow | 0;
    const { flags, resourceId, resourceType } = this.#header;
    const full = this.#header.length === FULL_LENGTH;
    const { u16: tx16, u32: tx32, mask: txMask, availRing: txAvail, descriptors: txTable, usedRing: txUsed } = tx;
    const { u16: rx16, u32: rx32, mask: rxMask, availRing: rxAvail, descriptors: rxTable, usedRing: rxUsed } = rx;
    const t = tx.next | 0;
    const r = rx.next | 0;
    const resourceLow = resourceId << 16;
    const resourceHigh = (resourceId >>> 16) | (resourceType << 16);
    let i = 0;
    // Two at a time, as the driver does four: what an access to an array costs besides itself is then shared.
    for (; i + 2 <= n; i += 2) {
      const t0 = (t + i) & txMask;
      const t1 = (t + i + 1) & txMask;
      const r0 = (r + i) & rxMask;
      const r1 = (r + i + 1) & rxMask;
      const txId0 = tx16[txAvail + t0];
      const txId1 = tx16[txAvail + t1];
      const rxId0 = rx16[rxAvail + r0];
      const rxId1 = rx16[rxAvail + r1];
      const bytes0 = tx32[txTable + (txId0 << 2) + 2];
      const bytes1 = tx32[txTable + (txId1 << 2) + 2];
      const to0 = ((rx32[rxTable + (rxId0 << 2)] | 0) - base) >> 2;
      const to1 = ((rx32[rxTable + (rxId1 << 2)] | 0) - base) >> 2;
      packets[to0] = flags;
      packets[to0 + 2] = 1 << 16;
      packets[to1] = flags;
      packets[to1 + 2] = 1 << 16;
      if (full) {
        packets[to0 + 6] = resourceLow;
        packets[to0 + 7] = resourceHigh;
        packets[to1 + 6] = resourceLow;
        packets[to1 + 7] = resourceHigh;
      }
      tx32[txUsed + (t0 << 1)] = txId0;
      tx32[txUsed + (t0 << 1) + 1] = 0;
      tx32[txUsed + (t1 << 1)] = txId1;
      tx32[txUsed + (t1 << 1) + 1] = 0;
      rx32[rxUsed + (r0 << 1)] = rxId0;
      rx32[rxUsed + (r0 << 1) + 1] = bytes0;
      rx32[rxUsed + (r1 << 1)] = rxId1;
      rx32[rxUsed + (r1 << 1) + 1] = bytes1;
    }
    tx.next = (tx.next + n) & 0xffff;
    rx.next = (rx.next + n) & 0xffff;
    Atomics.store(tx.u16, tx.usedIdx, tx.next);
    Atomics.store(rx.u16, rx.usedIdx, rx.next);
    return n;
  }

  /** hot: copies what is behind the headers of the next `n` packets, as a device that has memory of its own does. */
  #copy(n: number): void {
    const { u16: tx16, u32: tx32, mask: txMask, availRing: txAvail, descriptors: txTable } = this.#tx;
    const { u16: rx16, u32: rx32, mask: rxMask, availRing: rxAvail, descriptors: rxTable } = this.#rx;
    const f64 = this.#f64;
    const base = (this.#iovaLow - this.#header.length) | 0;
    const words = this.#copied >> 3;
    for (let i = 0; i < n; i++) {
      const txId = tx16[txAvail + ((this.#tx.next + i) & txMask)];
      const rxId = rx16[rxAvail + ((this.#rx.next + i) & rxMask)];
      const from = ((tx32[txTable + (txId << 2)] | 0) - base) >> 3;
      const to = ((rx32[rxTable + (rxId << 2)] | 0) - base) >> 3;
      for (let w = 0; w < words; w++) f64[to + w] = f64[from + w];
    }
  }
}

/** Word of a descriptor with its id and flags (2.8.13), in them AVAIL and USED (2.8.1). */
const LAST = 3;
const AVAIL = 1 << 23;
const USED = 1 << 31;
const RING = AVAIL | USED;

class PackedRing {
  readonly u16: Uint16Array;
  readonly u32: Uint32Array;
  readonly size: number;
  /** Where the next available descriptor is and the next used one goes; the ring flags of an available one there. */
  at = 0;
  flags: number = AVAIL;

  /** The descriptor ring is at the start of its memory. */
  constructor(ring: LoopRing) {
    this.u16 = ring.memory.u16;
    this.u32 = ring.memory.u32;
    this.size = ring.size;
  }

  /** Moves on to position `at` of this round, and makes the descriptor at `head` used: what follows it already is. */
  publish(head: number, at: number): void {
    const used = (this.flags & AVAIL) === 0 ? 0 : 0x8080;
    Atomics.store(this.u16, (head << 3) + 7, used);
    this.at = at;
    if (at !== this.size) return;
    this.at = 0;
    this.flags ^= RING;
  }
}

export class PackedLoopDevice {
  readonly #tx: PackedRing;
  readonly #rx: PackedRing;
  readonly #u32: Uint32Array;
  readonly #iovaLow: number;
  readonly #header: LoopHeader;

  /** As `LoopDevice`. */
  constructor(tx: LoopRing, rx: LoopRing, packets: MappedMemory, iovaLow: number, header: LoopHeader) {
    this.#tx = new PackedRing(tx);
    this.#rx = new PackedRing(rx);
    this.#u32 = packets.u32;
    this.#iovaLow = iovaLow;
    this.#header = header;
  }

  /** Moves all that can be moved, an even number; returns how many packets. */
  run(): number {
    let n = 0;
    // Once for each round of a ring that begins meanwhile.
    for (let moved = this.#runToEnd(); moved !== 0; moved = this.#runToEnd()) n += moved;
    return n;
  }

  /** hot: moves what can be moved before one of the rings begins anew. */
  #runToEnd(): number {
    const tx = this.#tx;
    const rx = this.#rx;
    const t = tx.at | 0;
    const r = rx.at | 0;
    const max = Math.min(tx.size - t, rx.size - r) | 0;
    const packets = this.#u32;
    const base = this.#iovaLow | 0;
    const { flags, resourceId, resourceType } = this.#header;
    const full = this.#header.length === FULL_LENGTH;
    const { u16: tx16, u32: tx32 } = tx;
    const { u32: rx32 } = rx;
    const txFlags = tx.flags | 0;
    const rxFlags = rx.flags | 0;
    // What turns the ring flags of an available descriptor into those of a used one.
    const use = USED | 0;
    const resourceLow = resourceId << 16;
    const resourceHigh = (resourceId >>> 16) | (resourceType << 16);
    const available = tx.flags === AVAIL ? 0x0080 : 0x8000;
    if ((Atomics.load(tx16, (t << 3) + 7) & 0x8080) !== available) return 0;
    let hold = use;
    let i = 0;
    // Two at a time, as in `LoopDevice`.
    for (; i + 2 <= max; i += 2) {
      const tw = (t + i) << 2;
      const rw = (r + i) << 2;
      const txWord0 = tx32[tw + LAST];
      const txWord1 = tx32[tw + 4 + LAST];
      const rxWord0 = rx32[rw + LAST];
      const rxWord1 = rx32[rw + 4 + LAST];
      if ((((txWord0 ^ txFlags) | (txWord1 ^ txFlags) | (rxWord0 ^ rxFlags) | (rxWord1 ^ rxFlags)) & RING) !== 0) break;
      const bytes0 = tx32[tw + 2];
      const bytes1 = tx32[tw + 6];
      const to0 = ((rx32[rw] | 0) - base) >> 2;
      const to1 = ((rx32[rw + 4] | 0) - base) >> 2;
      packets[to0] = flags;
      packets[to0 + 2] = 1 << 16;
      packets[to1] = flags;
      packets[to1 + 2] = 1 << 16;
      if (full) {
        packets[to0 + 6] = resourceLow;
        packets[to0 + 7] = resourceHigh;
        packets[to1 + 6] = resourceLow;
        packets[to1 + 7] = resourceHigh;
      }
      tx32[tw + 2] = 0;
      tx32[tw + LAST] = txWord0 ^ use ^ hold;
      tx32[tw + 6] = 0;
      tx32[tw + 4 + LAST] = txWord1 ^ use;
      rx32[rw + 2] = bytes0;
      rx32[rw + LAST] = rxWord0 ^ use ^ hold;
      rx32[rw + 6] = bytes1;
      rx32[rw + 4 + LAST] = rxWord1 ^ use;
      hold = 0;
    }
    if (i === 0) return 0;
    tx.publish(t, t + i);
    rx.publish(r, r + i);
    return i;
  }
}
