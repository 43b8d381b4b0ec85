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

/** What is written into each received header; the resource only with `flags`. */
export interface LoopHeader {
  readonly flags: number;
  readonly resourceId: number;
  readonly resourceType: number;
}

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

  /** Moves all that can be moved; returns how many packets. */
  run(): number {
    // hot:
    const tx = this.#tx;
    const rx = this.#rx;
    const fromTx = (Atomics.load(tx.u16, tx.availIdx) - tx.next) & 0xffff;
    const roomRx = (Atomics.load(rx.u16, rx.availIdx) - rx.next) & 0xffff;
    const n = Math.min(fromTx, roomRx);
    const packets = this.#u32;
    const base = this.#iovaLow;
    const { flags, resourceId, resourceType } = this.#header;
    for (let i = 0; i < n; i++) {
      const t = (tx.next + i) & tx.mask;
      const r = (rx.next + i) & rx.mask;
      const txId = tx.u16[tx.availRing + t];
      const rxId = rx.u16[rx.availRing + r];
      const bytes = tx.u32[tx.descriptors + txId * 4 + 2];
      const to = (rx.u32[rx.descriptors + rxId * 4] - base) >>> 2;
      packets[to] = flags;
      packets[to + 2] = 1 << 16;
      if (flags !== 0) {
        packets[to + 6] = resourceId << 16;
        packets[to + 7] = (resourceId >>> 16) | (resourceType << 16);
      }
      const txUsed = tx.usedRing + t * 2;
      tx.u32[txUsed] = txId;
      tx.u32[txUsed + 1] = 0;
      const rxUsed = rx.usedRing + r * 2;
      rx.u32[rxUsed] = rxId;
      rx.u32[rxUsed + 1] = bytes;
    }
    tx.next = (tx.next + n) & 0xffff;
    rx.next = (rx.next + n) & 0xffff;
    Atomics.store(tx.u16, tx.usedIdx, tx.next);
    Atomics.store(rx.u16, rx.usedIdx, rx.next);
    return n;
  }
}
