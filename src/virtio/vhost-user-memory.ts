/**
 * Which memory a vhost-user back-end may reach (QEMU's docs/interop/vhost-user.rst, "Memory access").
 *
 * The memory is a DMA arena's. Each allocation has an IOVA; the same number is its guest address and its user address: both are
 * names that only have to agree within the session, and so ring addresses need no translation and our pointers stay
 * with us. The back-end is told when rings start, and of every change while they run: with CONFIGURE_MEM_SLOTS each
 * allocation is a slot of its own, otherwise all of them make up a table of at most eight regions, joined where they can be: the arena cuts
 * addresses and file alike, so that one is usual.
 */
import { VfioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';
import { DmaArena, type DmaMapper, type DmaMapping } from '../vfio/dma.ts';
import type { IovaRange, SharedDma } from '../vfio/function.ts';
import {
  encodeMemoryTable,
  encodeRegion,
  MAX_TABLE_REGIONS,
  type MemoryRegion,
  Request,
} from './vhost-user-protocol.ts';
import type { VhostUserSession } from './vhost-user-session.ts';

/** Nothing limits these addresses but that 0 should never be a valid one. */
export const IOVA_RANGES: readonly IovaRange[] = [{ start: 0x1_0000, last: 2 ** 46 - 1 }];

/** What is used of the session. */
type Session = Pick<VhostUserSession, 'tell' | 'settle' | 'check'>;

export class VhostUserMemory implements DmaMapper {
  readonly #session: Session;
  readonly #arena: DmaArena;
  /** Slots that the back-end has; 0 when it takes a table. */
  readonly #slots: number;
  readonly #mappings = new Map<number, DmaMapping>();
  /** What the back-end knows, by guest address. */
  #told = new Map<number, MemoryRegion>();
  #published = false;

  constructor(session: Session, slots: number, hugePages: boolean) {
    this.#session = session;
    this.#slots = slots;
    this.#arena = new DmaArena(this, IOVA_RANGES, { hugePages });
  }

  /** Throws VfioError `DMA_EXHAUSTED` when the back-end takes no more regions, `DEVICE_REFUSED`; and as the arena does. */
  allocate(size: number): DmaMemory {
    this.#session.check();
    return this.#arena.allocate(size);
  }

  /** As `allocate`, for a part of a file of the caller's: a region of its own. */
  import(fd: number, offset: number, size: number): DmaMemory {
    this.#session.check();
    return this.#arena.import(fd, offset, size);
  }

  free(memory: DmaMemory): void {
    this.#arena.free(memory);
  }

  share(memory: DmaMemory): SharedDma {
    return this.#arena.share(memory);
  }

  /** The memory that holds all of `count` bytes from `iova` on, and where in it they start; null when none does. */
  find(iova: number, count: number): { memory: DmaMemory; offset: number } | null {
    return this.#arena.find(iova, count);
  }

  /** Tells the back-end of all memory, and of changes from now on. */
  publish(): void {
    this.#published = true;
    this.#tell();
  }

  /** No ring runs any more: what changes from now on is told when the next one starts. */
  withdraw(): void {
    this.#published = false;
  }

  map(mapping: DmaMapping): void {
    this.#mappings.set(mapping.iova, mapping);
    try {
      if (this.#published) this.#tell();
    } catch (error) {
      this.#mappings.delete(mapping.iova);
      throw error;
    }
  }

  unmap(mapping: DmaMapping): void {
    this.#mappings.delete(mapping.iova);
    if (this.#published) this.#tell();
  }

  /** Releases everything. The rings have stopped, or the back-end is gone. */
  close(): void {
    this.#arena.close(false);
    this.#mappings.clear();
  }

  #tell(): void {
    if (this.#slots > 0) this.#tellSlots();
    else this.#tellTable();
  }

  #tellSlots(): void {
    const regions = [...this.#mappings.values()].map(asRegion);
    if (regions.length > this.#slots) {
      throw new VfioError('DMA_EXHAUSTED', `the back-end takes ${this.#slots} memory regions, no more`);
    }
    const wanted = new Map(regions.map((region) => [region.guestAddress, region]));
    for (const region of this.#told.values()) {
      if (sameRegion(wanted.get(region.guestAddress), region)) continue;
      this.#session.tell(encodeRegion(Request.REM_MEM_REG, region));
      this.#told.delete(region.guestAddress);
    }
    for (const region of regions) {
      if (this.#told.has(region.guestAddress)) continue;
      this.#session.tell(encodeRegion(Request.ADD_MEM_REG, region), [region.fd]);
      this.#told.set(region.guestAddress, region);
    }
    this.#session.settle();
  }

  #tellTable(): void {
    const regions = joined([...this.#mappings.values()].map(asRegion));
    if (regions.length > MAX_TABLE_REGIONS) {
      throw new VfioError('DMA_EXHAUSTED', `the back-end takes ${MAX_TABLE_REGIONS} memory regions, no more`);
    }
    const same =
      regions.length === this.#told.size &&
      regions.every((region) => sameRegion(this.#told.get(region.guestAddress), region));
    // A table without regions is no table: what was told last stays until there is something else to tell.
    if (same || regions.length === 0) return;
    this.#session.tell(
      encodeMemoryTable(regions),
      regions.map((region) => region.fd),
    );
    this.#session.settle();
    this.#told = new Map(regions.map((region) => [region.guestAddress, region]));
  }
}

function asRegion({ iova, size, fd, offset }: DmaMapping): MemoryRegion {
  return { guestAddress: iova, userAddress: iova, size, fd, offset };
}

function sameRegion(a: MemoryRegion | undefined, b: MemoryRegion): boolean {
  return (
    a !== undefined && a.guestAddress === b.guestAddress && a.size === b.size && a.fd === b.fd && a.offset === b.offset
  );
}

/**
 * Regions by address, those joined that lie in one file as they lie in the address space, with what is between them: pages that nobody
 * has, of a file to which the back-end has the descriptor anyway.
 */
export function joined(regions: readonly MemoryRegion[]): MemoryRegion[] {
  const all: MemoryRegion[] = [];
  for (const region of [...regions].sort((a, b) => a.guestAddress - b.guestAddress)) {
    const last = all.at(-1);
    const distance = region.guestAddress - (last?.guestAddress ?? 0);
    if (last !== undefined && last.fd === region.fd && last.offset + distance === region.offset) {
      all[all.length - 1] = { ...last, size: distance + region.size };
    } else all.push(region);
  }
  return all;
}
