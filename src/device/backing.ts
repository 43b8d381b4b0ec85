/**
 * The files behind guest memory, each mapped once.
 *
 * A vfio-user client passes a new descriptor with every DMA_MAP, hundreds of them for one memory backend: descriptors
 * of the same file (device and inode) share one mapping. A file is mapped in chunks of up to 256 MiB, so that a guest
 * may be larger than the arena as long as it does not map all of itself at once. Chunks that nothing refers to stay
 * for a while, because a virtual IOMMU maps and unmaps the same memory all the time. What a client maps for reading only shares the
 * chunks that are written to: whether an address may be written to, its window says (`guest-memory.ts`).
 *
 * A client that makes its file shorter after it was mapped ends this process with SIGBUS, as it does with every
 * vfio-user and vhost-user server; only the size at the time of the mapping is checked.
 */
import { constants } from 'node:fs';
import { constants as os } from 'node:os';
import { SystemError } from '../errors.ts';
import { close, FcntlCommand, fcntl, fstat, PAGE_SIZE, Seal } from '../sys/libc.ts';
import type { Arena } from './arena.ts';

/** Largest chunk, and the alignment of chunks in their file and, so that huge pages fit, in the arena. */
const CHUNK_SIZE = 256 * 2 ** 20;
const HUGE_PAGE = 2 * 2 ** 20;
/** Unreferenced chunks that are kept. */
const IDLE_CHUNKS = 16;
/** O_ACCMODE of open(2): the two bits that say how a descriptor may be used. */
const ACCESS_MODE = 3;
const WRITE_SEALS = Seal.write | Seal.futureWrite;

/** A mapped piece of a file. */
export interface Chunk {
  readonly backing: Backing;
  /** Where in the file it begins, and where in the arena. */
  readonly fileOffset: number;
  readonly offset: number;
  readonly size: number;
  /** Windows in it. */
  references: number;
}

/** A file that a client has passed. */
export interface Backing {
  readonly key: string;
  readonly fd: number;
  readonly writable: boolean;
  /** By `fileOffset`. */
  readonly chunks: Map<number, Chunk>;
  /** A piece of it is being mapped: it stays open, whatever is let go meanwhile. */
  busy: boolean;
}

export class BackingFiles {
  readonly #arena: Arena;
  readonly #files = new Map<string, Backing>();
  /** Unreferenced chunks, the oldest first. */
  readonly #idle: Chunk[] = [];

  constructor(arena: Arena) {
    this.#arena = arena;
  }

  /**
   * The backing of the file that `fd` names, which is this object's from now on, whatever happens. `writable`: it is to be written to.
   * Null when the file does not hold `end` bytes. Throws SystemError.
   */
  open(fd: number, writable: boolean, end: number): Backing | null {
    let keep = false;
    try {
      const { device, inode, size } = fstat(fd);
      if (size < end) return null;
      const isWritable = canWrite(fd);
      // What others may do with the same file is no permission.
      if (writable && !isWritable) throw new SystemError('mmap', os.errno.EACCES, 'EACCES', 'the file is for reading');
      const key = `${device}:${inode}:${isWritable ? 'w' : 'r'}`;
      const known = this.#files.get(key);
      if (known !== undefined) return known;
      keep = true;
      const backing: Backing = { key, fd, writable: isWritable, chunks: new Map(), busy: false };
      this.#files.set(key, backing);
      return backing;
    } finally {
      if (!keep) close(fd);
    }
  }

  /**
   * The chunk that holds byte `at` of a file of at least `end` bytes, referenced once more. Throws `SystemError` or
   * `ARENA_FULL`.
   */
  reference(backing: Backing, at: number, end: number): Chunk {
    const fileOffset = at - (at % CHUNK_SIZE);
    const needed = Math.min(end - fileOffset, CHUNK_SIZE);
    const known = backing.chunks.get(fileOffset);
    if (known !== undefined && known.size >= needed) {
      if (known.references === 0) this.#idle.splice(this.#idle.indexOf(known), 1);
      known.references++;
      return known;
    }
    const size = Math.min(this.#sizeOf(backing) - fileOffset, CHUNK_SIZE);
    backing.busy = true;
    try {
      const chunk = this.#map(backing, fileOffset, Math.max(size, needed));
      // A shorter chunk that is still in use lives on with its windows; one that is not may have made room already.
      const shorter = backing.chunks.get(fileOffset);
      if (shorter !== undefined && shorter.references === 0) this.#drop(shorter);
      backing.chunks.set(fileOffset, chunk);
      return chunk;
    } finally {
      backing.busy = false;
    }
  }

  addReference(chunk: Chunk): void {
    chunk.references++;
  }

  dereference(chunk: Chunk): void {
    chunk.references--;
    if (chunk.references > 0) return;
    if (chunk.backing.chunks.get(chunk.fileOffset) !== chunk) {
      this.#unmap(chunk);
      return;
    }
    this.#idle.push(chunk);
    if (this.#idle.length > IDLE_CHUNKS) this.#drop(this.#idle[0]);
  }

  /** Forgets `backing` when nothing of it is mapped: the last step of a failed or finished mapping. */
  settle(backing: Backing): void {
    if (backing.busy || backing.chunks.size > 0 || this.#files.get(backing.key) !== backing) return;
    this.#files.delete(backing.key);
    close(backing.fd);
  }

  /** Unmaps and closes all unreferenced chunks and their files. */
  clear(): void {
    while (this.#idle.length > 0) this.#drop(this.#idle[0]);
    for (const backing of [...this.#files.values()]) this.settle(backing);
  }

  /** Number of open files: for tests and statistics. */
  get size(): number {
    return this.#files.size;
  }

  #sizeOf(backing: Backing): number {
    return Math.floor(fstat(backing.fd).size / PAGE_SIZE) * PAGE_SIZE;
  }

  #map(backing: Backing, fileOffset: number, size: number): Chunk {
    const align = size >= HUGE_PAGE ? HUGE_PAGE : PAGE_SIZE;
    const offset = this.#allocate(size, align);
    try {
      this.#arena.mapFile(offset, size, backing.fd, fileOffset, backing.writable);
    } catch (error) {
      this.#arena.release(offset, size);
      throw error;
    }
    return { backing, fileOffset, offset, size, references: 1 };
  }

  /** Address space, taken from idle chunks when there is no other. */
  #allocate(size: number, align: number): number {
    for (;;) {
      try {
        return this.#arena.allocate(size, align);
      } catch (error) {
        if (this.#idle.length === 0) throw error;
        this.#drop(this.#idle[0]);
      }
    }
  }

  /** Unmaps an idle chunk, and closes its file with its last chunk. */
  #drop(chunk: Chunk): void {
    this.#idle.splice(this.#idle.indexOf(chunk), 1);
    chunk.backing.chunks.delete(chunk.fileOffset);
    this.#unmap(chunk);
    this.settle(chunk.backing);
  }

  #unmap(chunk: Chunk): void {
    this.#arena.release(chunk.offset, chunk.size);
  }
}

/** Whether a file can be mapped for writing with this descriptor. */
function canWrite(fd: number): boolean {
  if ((fcntl(fd, FcntlCommand.getStatusFlags) & ACCESS_MODE) !== constants.O_RDWR) return false;
  try {
    return (fcntl(fd, FcntlCommand.getSeals) & WRITE_SEALS) === 0;
  } catch (error) {
    // Only files in memory can be sealed.
    if (error instanceof SystemError) return true;
    throw error;
  }
}
