/**
 * A packed virtqueue's device side written as naively as the standard reads (Virtio 1.4, 2.8), to judge the driver's: it goes
 * through DataView and byte offsets, keeps a wrap counter for each side, and checks what a driver must do.
 */
import type { QueueSetup } from '../../src/virtio/transport.ts';
import type { Chain, NaiveDevice, Piece, TestMemory } from './support.ts';

const NEXT = 1;
const WRITE = 2;
const INDIRECT = 4;
const AVAIL = 1 << 7;
const USED = 1 << 15;

interface Descriptor {
  readonly iova: number;
  readonly length: number;
  readonly id: number;
  readonly flags: number;
}

interface Place {
  at: number;
  wrap: boolean;
}

export class NaivePackedDevice implements NaiveDevice {
  readonly memory: TestMemory;
  readonly queue: QueueSetup;
  readonly eventIdx: boolean;
  /** Whether used descriptors carry WRITE when something was written, as the standard asks. */
  setsWrite = true;
  readonly avail: Place = { at: 0, wrap: true };
  readonly used: Place = { at: 0, wrap: true };
  /** Descriptors of buffers that were fetched and not returned, by id. */
  readonly #counts = new Map<number, number>();
  /** Used descriptors that are not shown yet; the places are those at which they go. */
  readonly #unpublished: { at: number; wrap: boolean; id: number; length: number }[] = [];

  constructor(memory: TestMemory, queue: QueueSetup, eventIdx = false) {
    this.memory = memory;
    this.queue = queue;
    this.eventIdx = eventIdx;
  }

  descriptor(at: number, table = this.queue.descriptorArea): Descriptor {
    const view = this.memory.view(table + 16 * at, 16);
    return {
      iova: view.getUint32(0, true) + view.getUint32(4, true) * 2 ** 32,
      length: view.getUint32(8, true),
      id: view.getUint16(12, true),
      flags: view.getUint16(14, true),
    };
  }

  #isAvailable(place: Place): boolean {
    const { flags } = this.descriptor(place.at);
    return ((flags & AVAIL) !== 0) === place.wrap && ((flags & USED) !== 0) !== place.wrap;
  }

  #advance(place: Place, by: number): void {
    place.at += by;
    if (place.at < this.queue.size) return;
    place.at -= this.queue.size;
    place.wrap = !place.wrap;
  }

  get waiting(): number {
    const place = { ...this.avail };
    let buffers = 0;
    for (let seen = 0; seen < this.queue.size && this.#isAvailable(place); seen++) {
      if ((this.descriptor(place.at).flags & NEXT) === 0) buffers++;
      this.#advance(place, 1);
    }
    return buffers;
  }

  fetch(): Chain | undefined {
    if (!this.#isAvailable(this.avail)) return undefined;
    const pieces: Piece[] = [];
    let count = 0;
    let indirect = false;
    for (;;) {
      if (!this.#isAvailable(this.avail)) throw new Error('a list that goes on in a descriptor that is not available');
      const { iova, length, id, flags } = this.descriptor(this.avail.at);
      this.#advance(this.avail, 1);
      count++;
      if (count > this.queue.size) throw new Error('a list longer than the queue');
      if ((flags & INDIRECT) !== 0) {
        if (count > 1 || (flags & NEXT) !== 0) throw new Error('INDIRECT in a list');
        indirect = true;
        this.#table(iova, length, pieces);
      } else {
        this.#add(pieces, iova, length, flags);
      }
      if ((flags & NEXT) !== 0) continue;
      if (this.#counts.has(id)) throw new Error(`id ${id} is out already`);
      this.#counts.set(id, count);
      return { head: id, pieces, indirect };
    }
  }

  #table(iova: number, length: number, pieces: Piece[]): void {
    if (length === 0 || length % 16 !== 0) throw new Error('an indirect table that is not a multiple of 16');
    for (let i = 0; i < length / 16; i++) {
      const entry = this.descriptor(i, iova);
      if ((entry.flags & ~WRITE) !== 0) throw new Error('another flag than WRITE in an indirect table');
      this.#add(pieces, entry.iova, entry.length, entry.flags);
    }
  }

  #add(pieces: Piece[], iova: number, length: number, flags: number): void {
    const writable = (flags & WRITE) !== 0;
    if (!writable && pieces.some((piece) => piece.writable)) throw new Error('a readable piece after a writable one');
    pieces.push({ iova, length, writable });
  }

  writeUsed(id: number, length: number): void {
    this.#unpublished.push({ ...this.used, id, length });
    this.#advance(this.used, this.#counts.get(id) ?? 1);
    this.#counts.delete(id);
  }

  /** Writes a used descriptor without any sense. */
  writeRaw(at: number, id: number, length: number, flags: number): void {
    const view = this.memory.view(this.queue.descriptorArea + 16 * at, 16);
    view.setUint32(8, length, true);
    view.setUint16(12, id, true);
    view.setUint16(14, flags, true);
  }

  publishUsed(): boolean {
    const shown = this.#unpublished.splice(0);
    if (shown.length === 0) return false;
    // The first one last (2.8.9); what it covers is then complete.
    for (const { at, wrap, id, length } of [...shown].reverse()) {
      const write = this.setsWrite && length > 0 ? WRITE : 0;
      this.writeRaw(at, id & 0xffff, length, (wrap ? AVAIL | USED : 0) | write);
    }
    return this.#wantsInterrupt(shown[0]);
  }

  /** Goes through all descriptors that were passed since `from`. */
  #wantsInterrupt(from: Place): boolean {
    const view = this.memory.view(this.queue.driverArea, 4);
    const flags = view.getUint16(2, true) & 3;
    if (flags === 0) return true;
    if (flags === 1) return false;
    if (flags === 3 || !this.eventIdx) throw new Error(`event flags ${flags}`);
    const event = view.getUint16(0, true);
    const place = { at: from.at, wrap: from.wrap };
    for (; place.at !== this.used.at || place.wrap !== this.used.wrap; this.#advance(place, 1)) {
      if ((event & 0x7fff) === place.at && event >>> 15 === (place.wrap ? 1 : 0)) return true;
    }
    return false;
  }

  complete(id: number, length: number): boolean {
    this.writeUsed(id, length);
    return this.publishUsed();
  }

  completeBatch(ids: readonly number[], length: number): boolean {
    const first = { ...this.used };
    for (const id of ids) {
      this.#advance(this.used, this.#counts.get(id) ?? 1);
      this.#counts.delete(id);
    }
    this.#unpublished.push({ ...first, id: ids[ids.length - 1], length });
    return this.publishUsed();
  }

  suppressNotifications(on: boolean): void {
    this.#setEvent(0, on ? 1 : 0);
  }

  /** Asks for a notification when the driver makes the descriptor at this place available (EVENT_IDX). */
  setAvailEvent(place: Place): void {
    this.#setEvent(place.at | (place.wrap ? 1 << 15 : 0), 2);
  }

  #setEvent(position: number, flags: number): void {
    const view = this.memory.view(this.queue.deviceArea, 4);
    view.setUint16(0, position, true);
    view.setUint16(2, flags, true);
  }

  /** `steps` descriptors after the next one to be fetched. */
  ahead(steps: number): Place {
    const place = { ...this.avail };
    for (let i = 0; i < steps; i++) this.#advance(place, 1);
    return place;
  }
}
