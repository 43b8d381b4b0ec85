/**
 * Mapped memory as prebuilt typed-array views.
 *
 * Aligned `Uint8Array`, `Uint16Array` and `Uint32Array` elements are single machine accesses in every compiler
 * tier; `DataView` and `Buffer` accessors are byte-wise and must not touch memory that is shared with a device.
 * All views are little-endian on the machines that Node supports here (x86-64, arm64, riscv64).
 *
 * Unmapping leaves private pages of zeros under the views until the last of them is garbage: whoever still holds one
 * touches nothing that belongs to somebody else. Detaching the ArrayBuffer would do too, but once any buffer of a process has
 * been detached V8 checks for it at every element access, which costs the data path a third of its speed.
 */
import { constants as os } from 'node:os';
import { SystemError } from '../errors.ts';
import { ffi } from './ffi/ffi.ts';
import { Advice, fstat, HUGE_PAGE_SIZE, MapFlag, madvise, mmap, munmap, PAGE_SIZE, Prot } from './libc.ts';
import { noteMapped, noteUnmapped } from './mapping-ledger.ts';

export interface MappedMemory {
  /** Virtual address of byte 0 in this process (below 2^53, so an exact number). */
  readonly address: number;
  /** Bytes. */
  readonly size: number;
  readonly u8: Uint8Array;
  readonly u16: Uint16Array;
  readonly u32: Uint32Array;
}

/** Memory that a device can reach: byte `o` of it is I/O virtual address `iova + o`. */
export interface DmaMemory extends MappedMemory {
  /**
   * IOVA of byte 0 (below 2^53). The range never crosses a multiple of 4 GiB, so the upper 32 bits are the same
   * for every byte: `iovaHigh`; the lower 32 bits of byte `o` are `iovaLow + o`.
   */
  readonly iova: number;
  readonly iovaLow: number;
  readonly iovaHigh: number;
}

/** Memory that `unmapMemory` has yet to unmap. */
const mapped = new WeakSet<MappedMemory>();

export interface AnonymousOptions {
  /** `false` asks for address space that need not fit the machine's memory: only what is touched counts. */
  readonly reserve?: boolean;
  /** Begins at a multiple of 2 MiB, in huge pages where the system grants them: for large tables that are hit at random. */
  readonly hugePages?: boolean;
  /** Left out of core files: keys, and what they are to protect. */
  readonly secret?: boolean;
}

/** Fresh zeroed memory that only this process sees. `size` is rounded up to pages. */
export function mapAnonymous(size: number, options: AnonymousOptions = {}): MappedMemory {
  const bytes = roundToPages(size);
  const flags = MapFlag.private | MapFlag.anonymous | (options.reserve === false ? MapFlag.noReserve : 0);
  const address =
    options.hugePages === true ? mapHuge(bytes, flags) : mmap(0, bytes, Prot.read | Prot.write, flags, -1, 0);
  if (options.secret === true) madvise(address, bytes, Advice.dontDump);
  return wrap(address, bytes);
}

/** Address of `bytes` bytes from a multiple of 2 MiB on: cut out of a range that is larger by as much. */
function mapHuge(bytes: number, flags: number): number {
  const from = mmap(0, bytes + HUGE_PAGE_SIZE, Prot.read | Prot.write, flags, -1, 0);
  const address = Math.ceil(from / HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE;
  if (address > from) munmap(from, address - from);
  munmap(address + bytes, from + HUGE_PAGE_SIZE - address);
  // A kernel without them refuses: ordinary pages do.
  madvise(address, bytes, Advice.hugePage);
  return address;
}

/**
 * Maps `size` bytes of a file, memfd or device from `offset` on, shared with whoever else maps it. `offset` is a
 * multiple of the page size, `size` of 4. Writing through views of memory that was mapped without `write` ends the
 * process, and so does touching a page that the file no longer has: of a regular file, or memfd, the range must lie
 * inside of it now (else `ENXIO`), and only a seal keeps its owner from shrinking it later. `populate` makes the
 * pages present at once; `secret` is as for `mapAnonymous`.
 */
export function mapShared(
  fd: number,
  offset: number,
  size: number,
  options: { write: boolean; populate?: boolean; secret?: boolean },
): MappedMemory {
  if (!Number.isSafeInteger(offset) || offset < 0 || offset % PAGE_SIZE !== 0) {
    throw new RangeError(`offset ${offset} is not a multiple of the page size`);
  }
  if (!Number.isSafeInteger(size) || size <= 0 || size % 4 !== 0) throw new RangeError(`cannot map ${size} bytes`);
  const file = fstat(fd);
  if ((file.mode & S_IFMT) === S_IFREG && offset + size > file.size) {
    throw new SystemError('mmap', os.errno.ENXIO, 'ENXIO', `the file ends at ${file.size}, before ${offset + size}`);
  }
  const prot = options.write ? Prot.read | Prot.write : Prot.read;
  const flags = options.populate === true ? MapFlag.shared | MapFlag.populate : MapFlag.shared;
  const address = mmap(0, size, prot, flags, fd, offset);
  if (options.secret === true) madvise(address, roundToPages(size), Advice.dontDump);
  return wrap(address, size);
}

/**
 * Puts zeros in the place of what a thread had mapped that has ended: what was there is gone. Should the thread still run, it touches
 * nothing of others.
 */
export function abandonMapping(address: number, size: number): void {
  const flags = MapFlag.private | MapFlag.anonymous | MapFlag.fixed | MapFlag.noReserve;
  mmap(address, size, Prot.read | Prot.write, flags, -1, 0);
}

/** Gives an address range back to the system when no view of it is left. */
const ranges = new FinalizationRegistry<{ readonly address: number; readonly size: number }>(({ address, size }) =>
  munmap(address, size),
);

/** Unmaps `memory`: its views read zeros from now on, and what is written to them goes nowhere. Idempotent. */
export function unmapMemory(memory: MappedMemory): void {
  if (!mapped.delete(memory)) return;
  const { address, size } = memory;
  noteUnmapped(address);
  abandonMapping(address, size);
  ranges.register(memory.u8.buffer, { address, size });
}

/** File type bits of a mode (inode(7)). */
const S_IFMT = 0o170000;
const S_IFREG = 0o100000;

/** `size` in whole pages. Throws RangeError when it is not a positive number of bytes. */
export function roundToPages(size: number): number {
  if (!Number.isSafeInteger(size) || size <= 0) throw new RangeError(`${size} is not a size`);
  return Math.ceil(size / PAGE_SIZE) * PAGE_SIZE;
}

function wrap(address: number, size: number): MappedMemory {
  const buffer = ffi().view(address, size);
  const memory: MappedMemory = {
    address,
    size,
    u8: new Uint8Array(buffer),
    u16: new Uint16Array(buffer),
    u32: new Uint32Array(buffer),
  };
  mapped.add(memory);
  noteMapped(address, size);
  return memory;
}
