/** A packed virtqueue in guest memory, driven by hand (Virtio 1.4, 2.8): it can also do everything that a driver must not. */
import type { MappedMemory } from '../../../src/sys/memory.ts';
import { GUEST_IOVA } from './mini-driver.ts';

export const AVAIL = 1 << 7;
export const USED = 1 << 15;
const NEXT = 1;

interface Place {
  at: number;
  wrap: boolean;
}

export class PackedRing {
  readonly memory: MappedMemory;
  readonly size: number;
  readonly descriptors: number;
  /** Event suppression structures. */
  readonly driver: number;
  readonly device: number;
  readonly avail: Place = { at: 0, wrap: true };
  readonly used: Place = { at: 0, wrap: true };
  /** Descriptors of what is out, by id. */
  readonly counts = new Map<number, number>();

  constructor(memory: MappedMemory, base: number, size: number) {
    this.memory = memory;
    this.size = size;
    this.descriptors = base;
    this.driver = base + 16 * size;
    this.device = this.driver + 64;
  }

  get end(): number {
    return this.device + 4;
  }

  advance(place: Place, by = 1): void {
    place.at += by;
    if (place.at < this.size) return;
    place.at -= this.size;
    place.wrap = !place.wrap;
  }

  /** Writes descriptor `at`, with the ring flags of an available one in round `wrap`. */
  write(at: number, wrap: boolean, offset: number, length: number, flags: number, id: number): void {
    const { u32 } = this.memory;
    const word = (this.descriptors + 16 * at) >>> 2;
    const address = GUEST_IOVA + offset;
    u32[word] = address;
    u32[word + 1] = Math.floor(address / 2 ** 32);
    u32[word + 2] = length;
    u32[word + 3] = (id | ((flags | (wrap ? AVAIL : USED)) << 16)) >>> 0;
  }

  /** Makes a list of pieces available: offset, length, flags without NEXT; the first descriptor last. */
  offer(id: number, pieces: readonly (readonly [number, number, number])[]): void {
    const places = pieces.map(() => {
      const place = { ...this.avail };
      this.advance(this.avail);
      return place;
    });
    for (let i = pieces.length - 1; i >= 0; i--) {
      const [offset, length, flags] = pieces[i];
      const next = i + 1 < pieces.length ? NEXT : 0;
      this.write(places[i].at, places[i].wrap, offset, length, flags | next, id);
    }
    this.counts.set(id, pieces.length);
  }

  flags(at: number): number {
    return this.memory.u16[(this.descriptors + 16 * at + 14) >>> 1];
  }

  /** The next used descriptor; null when there is none. */
  take(): { id: number; length: number; write: boolean } | null {
    const flags = this.flags(this.used.at);
    if (((flags & AVAIL) !== 0) !== this.used.wrap || ((flags & USED) !== 0) !== this.used.wrap) return null;
    const word = (this.descriptors + 16 * this.used.at) >>> 2;
    const id = this.memory.u32[word + 3] & 0xffff;
    this.advance(this.used, this.counts.get(id) ?? 1);
    this.counts.delete(id);
    return { id, length: this.memory.u32[word + 2], write: (flags & 2) !== 0 };
  }

  /** Says for which used descriptors the device shall interrupt: flags, and a place for DESC. */
  driverEvent(flags: number, place: Place = { at: 0, wrap: false }): void {
    this.memory.u32[this.driver >>> 2] = (flags << 16) | place.at | (place.wrap ? 1 << 15 : 0);
  }

  get deviceEvent(): { flags: number; at: number; wrap: boolean } {
    const word = this.memory.u32[this.device >>> 2];
    return { flags: word >>> 16, at: word & 0x7fff, wrap: (word & 0x8000) !== 0 };
  }
}
