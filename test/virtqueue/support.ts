/**
 * Memory that a device and a driver share, and a split virtqueue's device side written as naively as the standard reads
 * (Virtio 1.4, 2.7), to judge the driver's: it goes through DataView and byte offsets, and checks what a driver must do.
 */
import type { DmaMemory } from '../../src/sys/memory.ts';
import type { QueueSetup } from '../../src/virtio/transport.ts';
import '../equality.ts';

/** Gives out memory at ascending I/O addresses, and finds it again. */
export class TestMemory {
  readonly blocks: DmaMemory[] = [];
  freed = 0;
  #next: number;

  constructor(firstIova = 0x1_0000_0000) {
    this.#next = firstIova;
  }

  allocateDma(size: number): DmaMemory {
    const bytes = new ArrayBuffer(Math.max(Math.ceil(size / 4096), 1) * 4096);
    const iova = this.#next;
    // A gap, so that what runs over the end is seen.
    this.#next += bytes.byteLength + 4096;
    const memory = {
      address: 0x1000,
      size: bytes.byteLength,
      u8: new Uint8Array(bytes),
      u16: new Uint16Array(bytes),
      u32: new Uint32Array(bytes),
      iova,
      iovaLow: iova % 2 ** 32,
      iovaHigh: Math.floor(iova / 2 ** 32),
    };
    this.blocks.push(memory);
    return memory;
  }

  freeDma(memory: DmaMemory): void {
    const index = this.blocks.indexOf(memory);
    if (index < 0) throw new Error('memory freed twice');
    this.blocks.splice(index, 1);
    this.freed++;
  }

  /** The bytes at an I/O address; throws when they are not all inside one block. */
  view(iova: number, length: number): DataView {
    for (const block of this.blocks) {
      if (iova >= block.iova && iova + length <= block.iova + block.size) {
        return new DataView(block.u8.buffer, iova - block.iova, length);
      }
    }
    throw new Error(`I/O address 0x${iova.toString(16)} with ${length} bytes is not mapped`);
  }

  bytes(iova: number, length: number): Uint8Array {
    const view = this.view(iova, length);
    return new Uint8Array(view.buffer, view.byteOffset, length);
  }
}

/** What both naive devices can be told to do. */
export interface NaiveDevice {
  /** Buffers that were made available and not fetched yet. */
  readonly waiting: number;
  /** Takes the next available buffer; undefined when there is none. */
  fetch(): Chain | undefined;
  /** Returns a buffer without showing it; then shows what was returned, and says whether the driver wants an interrupt. */
  writeUsed(id: number, length: number): void;
  publishUsed(): boolean;
  complete(id: number, length: number): boolean;
  /** With IN_ORDER: returns these buffers, the next ones, by naming the last. */
  completeBatch(ids: readonly number[], length: number): boolean;
  suppressNotifications(on: boolean): void;
}

export interface Piece {
  readonly iova: number;
  readonly length: number;
  readonly writable: boolean;
}

export interface Chain {
  readonly head: number;
  readonly pieces: readonly Piece[];
  readonly indirect: boolean;
}

const NEXT = 1;
const WRITE = 2;
const INDIRECT = 4;

export class NaiveSplitDevice implements NaiveDevice {
  readonly memory: TestMemory;
  readonly queue: QueueSetup;
  readonly eventIdx: boolean;
  lastAvail = 0;
  usedIdx = 0;

  constructor(memory: TestMemory, queue: QueueSetup, eventIdx = false) {
    this.memory = memory;
    this.queue = queue;
    this.eventIdx = eventIdx;
  }

  get avail(): DataView {
    return this.memory.view(this.queue.driverArea, 6 + 2 * this.queue.size);
  }

  get used(): DataView {
    return this.memory.view(this.queue.deviceArea, 6 + 8 * this.queue.size);
  }

  get availIdx(): number {
    return this.avail.getUint16(2, true);
  }

  /** Buffers that were made available and not fetched yet. */
  get waiting(): number {
    return (this.availIdx - this.lastAvail) & 0xffff;
  }

  /** Takes the next available buffer; undefined when there is none. */
  fetch(): Chain | undefined {
    if (this.waiting === 0) return undefined;
    if (this.waiting > this.queue.size) throw new Error('more buffers are available than the queue holds');
    const head = this.avail.getUint16(4 + 2 * (this.lastAvail % this.queue.size), true);
    this.lastAvail = (this.lastAvail + 1) & 0xffff;
    return this.#chain(head);
  }

  #chain(head: number): Chain {
    const pieces: Piece[] = [];
    const first = this.#descriptor(this.queue.descriptorArea, this.queue.size, head);
    const indirect = (first.flags & INDIRECT) !== 0;
    if (indirect && (first.flags & NEXT) !== 0) throw new Error('INDIRECT and NEXT in one descriptor');
    const table = indirect ? first.iova : this.queue.descriptorArea;
    const entries = indirect ? first.length / 16 : this.queue.size;
    if (!Number.isInteger(entries)) throw new Error('an indirect table that is not a multiple of 16');
    for (let id = indirect ? 0 : head; ; ) {
      const { flags, next, iova, length } = this.#descriptor(table, entries, id);
      if (indirect && (flags & INDIRECT) !== 0) throw new Error('an indirect descriptor inside a table');
      const writable = (flags & WRITE) !== 0;
      if (!writable && pieces.some((piece) => piece.writable)) throw new Error('a readable piece after a writable one');
      pieces.push({ iova, length, writable });
      if (pieces.length > this.queue.size) throw new Error('a chain longer than the queue');
      if ((flags & NEXT) === 0) return { head, pieces, indirect };
      id = next;
    }
  }

  #descriptor(table: number, entries: number, id: number) {
    if (id >= entries) throw new Error(`descriptor ${id} of ${entries}`);
    const view = this.memory.view(table + 16 * id, 16);
    return {
      iova: view.getUint32(0, true) + view.getUint32(4, true) * 2 ** 32,
      length: view.getUint32(8, true),
      flags: view.getUint16(12, true),
      next: view.getUint16(14, true),
    };
  }

  /** Puts an entry into the used ring without publishing it. */
  writeUsed(id: number, length: number): void {
    const at = 4 + 8 * (this.usedIdx % this.queue.size);
    this.used.setUint32(at, id, true);
    this.used.setUint32(at + 4, length, true);
    this.usedIdx = (this.usedIdx + 1) & 0xffff;
  }

  /** Publishes the used entries; true when the driver wants an interrupt for one of them. */
  publishUsed(): boolean {
    const old = this.used.getUint16(2, true);
    this.used.setUint16(2, this.usedIdx, true);
    if (!this.eventIdx) return (this.avail.getUint16(0, true) & 1) === 0;
    const event = this.avail.getUint16(4 + 2 * this.queue.size, true);
    for (let idx = old; idx !== this.usedIdx; idx = (idx + 1) & 0xffff) if (idx === event) return true;
    return false;
  }

  complete(id: number, length: number): boolean {
    this.writeUsed(id, length);
    return this.publishUsed();
  }

  completeBatch(ids: readonly number[], length: number): boolean {
    const first = this.usedIdx;
    this.writeUsed(ids[ids.length - 1], length);
    this.usedIdx = (first + ids.length) & 0xffff;
    return this.publishUsed();
  }

  /** Asks for a notification when the driver writes available entry `idx` (EVENT_IDX). */
  setAvailEvent(idx: number): void {
    this.used.setUint16(4 + 8 * this.queue.size, idx & 0xffff, true);
  }

  suppressNotifications(on: boolean): void {
    this.used.setUint16(0, on ? 1 : 0, true);
  }
}

/** What `enableQueue` would be told of a queue. */
export function setupOf(queue: {
  size: number;
  descriptorArea: number;
  driverArea: number;
  deviceArea: number;
}): QueueSetup {
  const { size, descriptorArea, driverArea, deviceArea } = queue;
  return { size, descriptorArea, driverArea, deviceArea, vector: 0xffff };
}
