/**
 * The device's packets: those of `PacketPool`, of which some can be longer than a slot. What a driver hands over to be segmented (Virtio
 * 1.4, 5.1.9.2) is up to 64 KiB long; it goes into an *area*, one of a few pieces of memory beside the slots, and the packet's
 * offset says so. The area comes back with the packet, whoever frees it.
 *
 * Slots and areas are in one piece of memory, so that nobody else need know of areas.
 */
import { PacketPool, type PacketPoolOptions } from '../packet/pool.ts';
import { MAX_LARGE_FRAME } from '../packet/segment.ts';
import { PAGE_SIZE } from '../sys/libc.ts';
import type { MappedMemory } from '../sys/memory.ts';

/** Areas that there are: as many large packets are on their way at once. When there is none, a packet is segmented where it is. */
const AREAS = 64;
/** Bytes of an area in front of the packet: more than the longest header. */
const HEADROOM = 64;
/** Bytes of an area. */
export const AREA_SIZE: number = Math.ceil((HEADROOM + MAX_LARGE_FRAME) / PAGE_SIZE) * PAGE_SIZE;
/** Bytes of all of them. */
export const AREAS_SIZE: number = AREAS * AREA_SIZE;

export class FramePool extends PacketPool {
  /** By packet: the number of its area, counted from 1; 0 when it is in its slot. */
  readonly #area: Uint8Array;
  readonly #freeAreas = new Uint8Array(AREAS);
  #available = AREAS;
  readonly #first: number;

  /** `areas` is the byte of the memory where `AREAS_SIZE` bytes for large packets begin. */
  constructor(memory: MappedMemory, areas: number, options: PacketPoolOptions) {
    super(memory, options);
    this.#first = areas;
    this.#area = new Uint8Array(this.count);
    for (let i = 0; i < AREAS; i++) this.#freeAreas[i] = AREAS - i;
  }

  /** hot: moves the place of `packet`, which holds nothing yet, to an area of its own; false when there is none. */
  enlarge(packet: number): boolean {
    if (this.#available === 0) return false;
    const area = this.#freeAreas[--this.#available];
    this.#area[packet] = area;
    this.offset[packet] = this.#first + (area - 1) * AREA_SIZE + HEADROOM;
    return true;
  }

  /** hot: whether `packet` has an area. */
  isLarge(packet: number): boolean {
    return this.#area[packet] !== 0;
  }

  override free(packets: Uint32Array, n: number): void {
    // hot:
    if (this.#available !== AREAS) this.#detach(packets, n);
    super.free(packets, n);
  }

  /** hot: */
  #detach(packets: Uint32Array, n: number): void {
    const areas = this.#area;
    for (let i = 0; i < n; i++) {
      const area = areas[packets[i]];
      if (area === 0) continue;
      areas[packets[i]] = 0;
      this.#freeAreas[this.#available++] = area;
    }
  }
}
