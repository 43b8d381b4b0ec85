/**
 * The smallest device that a driver can be measured against: it lives in the same thread, takes what is in the transmit
 * ring, and returns each packet as received, in order. Its rings are those of Virtio 1.4, 2.7.
 *
 * It does what costs a device cannot avoid: it reads both rings and both descriptors, writes the fields of the
 * received header that say something, and both used entries. It does not copy the payload and checks nothing, because it
 * is the driver that is measured; what it costs itself is the metric `ring.split.loop_device.mpps`.
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
  readonly #iovaLow: number;
  readonly #header: LoopHeader;

  /** `packets` is the memory that descriptors point into; its IOVA is `iovaLow`. */
  constructor(tx: LoopRing, rx: LoopRing, packets: MappedMemory, iovaLow: number, header: LoopHeader) {
    this.#tx = new Ring(tx);
    this.#rx = new Ring(rx);
    this.#u32 = packets.u32;
    this.#iovaLow = iovaLow;
    this.#header = header;
  }

  /** Moves all that can be moved, an even number; returns how many packets. */
  run(): number {
    // hot:
    const tx = this.#tx;
    const rx = this.#rx;
    const fromTx = (Atomics.load(tx.u16, tx.availIdx) - tx.next) & 0xffff;
    const roomRx = (Atomics.load(rx.u16, rx.availIdx) - rx.next) & 0xffff;
    const n = Math.min(fromTx, roomRx) | 0;
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
    if (i !== n) throw new Error('the loop device moves packets in pairs');
    tx.next = (tx.next + n) & 0xffff;
    rx.next = (rx.next + n) & 0xffff;
    Atomics.store(tx.u16, tx.usedIdx, tx.next);
    Atomics.store(rx.u16, rx.usedIdx, rx.next);
    return n;
  }
}
