/**
 * DMA memory: where it comes from and which I/O virtual addresses it gets.
 *
 * Memory is cut from a memfd that grows as needed, so that a vfio-user server can map it, or is a part of one that the caller
 * brought; each allocation has its own mapping here, and it can be unmapped alone. How an allocation is made known to the device is a callback: a
 * DMA_MAP message, or an ioctl of kernel VFIO.
 */
import { fstatSync } from 'node:fs';
import { SystemError, VfioError } from '../errors.ts';
import * as libc from '../sys/libc.ts';
import { type DmaMemory, type MappedMemory, mapShared, unmapMemory } from '../sys/memory.ts';
import type { IovaRange, SharedDma } from './function.ts';
import { RangeAllocator } from './range-allocator.ts';

/** One allocation never crosses a multiple of this, so that the upper half of its addresses is one number. */
export const IOVA_BOUNDARY = 2 ** 32;
const HUGE_PAGE_SIZE = 2 * 1024 * 1024;
/** MFD_HUGE_2MB: log2 of the page size from bit 26 on (memfd_create(2)). */
const MFD_HUGE_2MB = 21 * 2 ** 26;
/** No file of ours grows beyond this. */
const FILE_END = 2 ** 40;

/** What the device is told about an allocation. */
export interface DmaMapping {
  readonly iova: number;
  readonly size: number;
  /** Virtual address in this process (kernel VFIO). */
  readonly address: number;
  /** File and offset of the memory (vfio-user). */
  readonly fd: number;
  readonly offset: number;
}

/**
 * Makes memory known to the device, or withdraws it. Either may throw; a mapping that was not withdrawn is never
 * reused.
 */
export interface DmaMapper {
  map(mapping: DmaMapping): void;
  unmap(mapping: DmaMapping): void;
}

export interface DmaArenaOptions {
  /**
   * Use 2 MiB pages for allocations of 1 MiB and more, where the system has them; else ordinary pages. Default false.
   */
  readonly hugePages?: boolean;
  /** Smallest page that the device can map: a power of two, at least 4096 (the default). */
  readonly pageSize?: number;
}

/** Where memory comes from: a file of ours, or one that the caller brought. */
interface Backing {
  readonly fd: number;
  /** The mapping at `offset` is gone. */
  free(offset: number, size: number): void;
  close(): void;
}

interface Allocation {
  readonly mapping: DmaMapping;
  readonly memory: MappedMemory;
  readonly file: Backing;
}

export class DmaArena {
  readonly #mapper: DmaMapper;
  readonly #iovas: RangeAllocator;
  readonly #pageSize: number;
  readonly #hugePages: boolean;
  readonly #live = new Map<DmaMemory, Allocation>();
  readonly #files = new Map<number, BackingFile>();
  /** Files of the caller's; each has one mapping. */
  readonly #imported = new Set<ImportedFile>();
  #closed = false;

  constructor(mapper: DmaMapper, iovaRanges: readonly IovaRange[], options: DmaArenaOptions = {}) {
    this.#mapper = mapper;
    this.#iovas = new RangeAllocator(iovaRanges, IOVA_BOUNDARY);
    this.#pageSize = Math.max(options.pageSize ?? libc.PAGE_SIZE, libc.PAGE_SIZE);
    this.#hugePages = options.hugePages ?? false;
  }

  /** Number of allocations that are mapped now. */
  get count(): number {
    return this.#live.size;
  }

  /**
   * Zeroed memory that the device can reach, rounded up to pages. Throws VfioError `IOVA_EXHAUSTED`, SystemError
   * `ENOSPC` or
   * `ENOMEM`, or what the mapper throws; then nothing has changed.
   */
  allocate(size: number): DmaMemory {
    if (this.#closed) throw new VfioError('DMA_CLOSED', 'the function is closed: no more DMA memory');
    if (!Number.isSafeInteger(size) || size <= 0 || size > IOVA_BOUNDARY)
      throw new RangeError(`cannot allocate ${size} bytes`);
    if (this.#hugePages && size >= HUGE_PAGE_SIZE / 2) {
      try {
        return this.#allocate(size, Math.max(this.#pageSize, HUGE_PAGE_SIZE), MFD_HUGE_2MB);
      } catch (error) {
        // No huge pages (left): that is no reason to fail.
        if (!(error instanceof SystemError)) throw error;
      }
    }
    return this.#allocate(size, this.#pageSize, 0);
  }

  #allocate(size: number, pageSize: number, hugeFlag: number): DmaMemory {
    const bytes = Math.ceil(size / pageSize) * pageSize;
    const file = this.#file(hugeFlag);
    const offset = file.allocate(bytes, pageSize);
    try {
      return this.#map(file, offset, bytes, pageSize);
    } catch (error) {
      file.free(offset, bytes);
      throw error;
    }
  }

  /**
   * Makes `size` bytes of a memfd of the caller's known to the device, from `offset` on; both are multiples of the page size of the device.
   * The descriptor is duplicated and stays the caller's. The file must be sealed against shrinking, or it could end this process, and
   * not against writing. Throws VfioError `DMA_RANGE`, `DMA_SEAL`, `DMA_OVERLAP` when some of it is known already; and as `allocate` does.
   */
  import(fd: number, offset: number, size: number): DmaMemory {
    if (this.#closed) throw new VfioError('DMA_CLOSED', 'the function is closed: no more DMA memory');
    const page = this.#pageSize;
    const whole =
      Number.isSafeInteger(offset) && Number.isSafeInteger(size) && offset % page === 0 && size % page === 0;
    if (!whole || offset < 0 || size <= 0 || size > IOVA_BOUNDARY) {
      throw new VfioError(
        'DMA_RANGE',
        `${size} bytes at ${offset}: not from 1 to 2^32 bytes in whole pages of ${page}`,
      );
    }
    const file = new ImportedFile(fd, offset, size);
    try {
      for (const other of this.#imported) {
        if (other.overlaps(file)) throw new VfioError('DMA_OVERLAP', 'a part of this memory is registered already');
      }
      const memory = this.#map(file, offset, size, page);
      this.#imported.add(file);
      file.onClose = () => this.#imported.delete(file);
      return memory;
    } catch (error) {
      file.close();
      throw error;
    }
  }

  /** Gives the device `bytes` at `offset` of `file`; when that fails nothing has changed. */
  #map(file: Backing, offset: number, bytes: number, pageSize: number): DmaMemory {
    const iova = this.#iovas.allocate(bytes, pageSize);
    if (iova < 0) throw new VfioError('IOVA_EXHAUSTED', `no free range of ${bytes} bytes of I/O virtual addresses`);
    let memory: MappedMemory | null = null;
    try {
      memory = mapShared(file.fd, offset, bytes, { write: true, populate: true, secret: true });
      const mapping = { iova, size: bytes, address: memory.address, fd: file.fd, offset };
      this.#mapper.map(mapping);
      const dma = dmaMemory(memory, iova);
      this.#live.set(dma, { mapping, memory, file });
      return dma;
    } catch (error) {
      if (memory !== null) unmapMemory(memory);
      this.#iovas.free(iova, bytes);
      throw error;
    }
  }

  /**
   * Withdraws memory from the device, unmaps and releases it; after `close` that is done already. Throws
   * RangeError for memory that is not ours or was freed. When the device does not confirm, it is unmapped all
   * the same, the error is passed on, and addresses and pages are never used again.
   */
  free(memory: DmaMemory): void {
    if (this.#closed) return;
    const allocation = this.#live.get(memory);
    if (allocation === undefined) throw new RangeError('this memory is not allocated here');
    this.#live.delete(memory);
    try {
      this.#mapper.unmap(allocation.mapping);
    } finally {
      unmapMemory(allocation.memory);
    }
    const { iova, size, offset } = allocation.mapping;
    this.#iovas.free(iova, size);
    allocation.file.free(offset, size);
  }

  /** Where `memory` is in its file. Throws RangeError for memory that is not ours or was freed. */
  share(memory: DmaMemory): SharedDma {
    const allocation = this.#live.get(memory);
    if (allocation === undefined) throw new RangeError('this memory is not allocated here');
    const { fd, offset, size, iova } = allocation.mapping;
    return { fd, offset, size, iova };
  }

  /**
   * The memory that holds all of `count` bytes from `iova` on, and where in it they start; null when no allocation
   * does.
   */
  find(iova: number, count: number): { memory: DmaMemory; offset: number } | null {
    for (const memory of this.#live.keys()) {
      const offset = iova - memory.iova;
      if (offset >= 0 && offset + count <= memory.size) return { memory, offset };
    }
    return null;
  }

  /**
   * Releases everything, telling the device only if `tellDevice`. Errors of the mapper do not keep the rest from
   * being released. Idempotent.
   */
  close(tellDevice: boolean): void {
    this.#closed = true;
    for (const { mapping, memory } of this.#live.values()) {
      try {
        if (tellDevice) this.#mapper.unmap(mapping);
      } catch {
        // The device is on its way out: what matters is that our own memory goes.
      }
      unmapMemory(memory);
    }
    this.#live.clear();
    for (const file of [...this.#files.values(), ...this.#imported]) file.close();
    this.#files.clear();
  }

  #file(hugeFlag: number): BackingFile {
    let file = this.#files.get(hugeFlag);
    if (file === undefined) {
      file = new BackingFile(hugeFlag);
      this.#files.set(hugeFlag, file);
    }
    return file;
  }
}

/**
 * A memfd whose pages are given out, and returned zeroed. Sealed against shrinking, so that the other side can map it
 * without fear; and against further seals, with which that side could keep us from mapping and returning pages.
 */
class BackingFile implements Backing {
  readonly fd: number;
  readonly #ranges = new RangeAllocator([{ start: 0, last: FILE_END - 1 }], FILE_END);
  #size = 0;

  constructor(hugeFlag: number) {
    const huge = hugeFlag === 0 ? 0 : libc.MemfdFlag.hugeTlb | hugeFlag;
    this.fd = libc.memfdCreate('virtio-ipsec-dma', libc.MemfdFlag.cloexec | libc.MemfdFlag.allowSealing | huge);
    try {
      libc.fcntl(this.fd, libc.FcntlCommand.addSeals, libc.Seal.shrink | libc.Seal.seal);
    } catch (error) {
      libc.close(this.fd);
      throw error;
    }
  }

  /** Offset of `size` bytes whose pages exist, so that touching them cannot fail. */
  allocate(size: number, alignment: number): number {
    const offset = this.#ranges.allocate(size, alignment);
    if (offset < 0) throw new VfioError('DMA_EXHAUSTED', `no room for ${size} bytes of DMA memory`);
    try {
      if (offset + size > this.#size) {
        libc.ftruncate(this.fd, offset + size);
        this.#size = offset + size;
      }
      libc.fallocate(this.fd, libc.FallocateMode.allocate, offset, size);
      return offset;
    } catch (error) {
      this.#ranges.free(offset, size);
      throw error;
    }
  }

  free(offset: number, size: number): void {
    libc.fallocate(this.fd, libc.FallocateMode.punchHole | libc.FallocateMode.keepSize, offset, size);
    this.#ranges.free(offset, size);
  }

  close(): void {
    libc.close(this.fd);
  }
}

/** A part of a memfd that the caller brought, by a descriptor of our own. */
class ImportedFile implements Backing {
  readonly fd: number;
  onClose: () => void = () => {};
  readonly #device: number;
  readonly #inode: number;
  readonly #start: number;
  readonly #end: number;

  constructor(fd: number, offset: number, size: number) {
    checkSeals(fd);
    const { dev, ino, size: end } = fstatSync(fd);
    if (offset + size > end) throw new VfioError('DMA_RANGE', `the file ends at ${end}, before ${offset + size}`);
    this.#device = dev;
    this.#inode = ino;
    this.#start = offset;
    this.#end = offset + size;
    this.fd = libc.fcntl(fd, libc.FcntlCommand.duplicate);
  }

  overlaps(other: ImportedFile): boolean {
    const sameFile = this.#device === other.#device && this.#inode === other.#inode;
    return sameFile && this.#start < other.#end && other.#start < this.#end;
  }

  free(): void {
    this.close();
  }

  close(): void {
    libc.close(this.fd);
    this.onClose();
  }
}

/** Throws VfioError `DMA_SEAL` unless `fd` is a memfd that keeps its size, and can be written to. */
function checkSeals(fd: number): void {
  let seals = 0;
  try {
    seals = libc.fcntl(fd, libc.FcntlCommand.getSeals);
  } catch (cause) {
    throw new VfioError('DMA_SEAL', 'this is not a memfd that can be sealed', { cause });
  }
  if ((seals & libc.Seal.shrink) === 0) throw new VfioError('DMA_SEAL', 'the memfd is not sealed against shrinking');
  if ((seals & (libc.Seal.write | libc.Seal.futureWrite)) !== 0) {
    throw new VfioError('DMA_SEAL', 'the memfd is sealed against writing');
  }
}

function dmaMemory(memory: MappedMemory, iova: number): DmaMemory {
  return {
    address: memory.address,
    size: memory.size,
    u8: memory.u8,
    u16: memory.u16,
    u32: memory.u32,
    iova,
    iovaLow: iova % IOVA_BOUNDARY,
    iovaHigh: Math.floor(iova / IOVA_BOUNDARY),
  };
}
