/**
 * One PCI function, however it is reached: kernel VFIO (`kernel.ts`) or a vfio-user socket (`user.ts`).
 *
 * Everything here is synchronous: a register access is a memory access with kernel VFIO and a message with
 * vfio-user. Every method throws `VfioError` with code `DEVICE_GONE` once the function is lost.
 */
import type { VfioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';

/** Region indices of a VFIO PCI device (linux/vfio.h). BAR n is region n. */
export const PciRegion = { bar0: 0, bar1: 1, bar2: 2, bar3: 3, bar4: 4, bar5: 5, rom: 6, config: 7 } as const;

/**
 * A BAR, or the configuration space. Accesses have exactly the width named and must be naturally aligned and inside
 * the region.
 */
export interface Region {
  readonly index: number;
  /** Bytes; 0 when the region is absent. */
  readonly size: number;
  read8(offset: number): number;
  read16(offset: number): number;
  read32(offset: number): number;
  write8(offset: number, value: number): void;
  write16(offset: number, value: number): void;
  write32(offset: number, value: number): void;
  /**
   * How another thread of this process can write to the register of `width` bytes at `offset` by itself; null, or no such method, when it
   * cannot. The descriptor is a new one and the caller's to close.
   */
  share?(offset: number, width: 2 | 4): SharedRegister | null;
  /**
   * Tells the device that something was written to the register of `width` bytes at `offset`, if there is a quicker way to than writing; else it returns
   * false, and the register has to be written. Only where it does not matter what is written.
   */
  signal?(offset: number, width: 2 | 4): boolean;
}

/**
 * A register without its `Region`. `memory`: in the page at `offset` of the file, which is to be mapped, byte `at`. `eventfd`: the device
 * is told that something was written there, not what.
 */
export type SharedRegister =
  | { readonly kind: 'memory'; readonly fd: number; readonly offset: number; readonly at: number }
  | { readonly kind: 'eventfd'; readonly fd: number };

/** DMA memory as another thread of this process can map it: `size` bytes at `offset` of a file. The descriptor is the function's. */
export interface SharedDma {
  readonly fd: number;
  readonly offset: number;
  readonly size: number;
  readonly iova: number;
}

/** An inclusive range of I/O virtual addresses that the function can be given. */
export interface IovaRange {
  readonly start: number;
  readonly last: number;
}

/**
 * What a driver needs of a device besides its registers, however it is reached: memory that both can use, interrupts, a
 * way to know that it is gone. A PCI function has more; a vhost-user port (`virtio/vhost-user.ts`) has just this.
 */
export interface DeviceFunction {
  /** The device address as the user wrote it: `0000:01:00.0`, `vfio-user:/path`, `vhost-user:/path`. */
  readonly address: string;
  /** Whether the platform translates the addresses that the function uses, so that they are not those of physical memory. */
  readonly behindIommu: boolean;
  /** Allocates zeroed memory and maps it for DMA, both ways. `size` is rounded up to pages. */
  allocateDma(size: number): DmaMemory;
  /**
   * Unmaps and frees memory of `allocateDma`. Views of it that are left read zeros, never foreign memory.
   */
  freeDma(memory: DmaMemory): void;
  /**
   * Maps `size` bytes of a memfd of the caller's for DMA, from `offset` on; to be given back by `freeDma`. Throws VfioError `DMA_RANGE`,
   * `DMA_SEAL`, `DMA_OVERLAP` (see `DmaArena.import`), or when the device takes no more.
   */
  importDma?(fd: number, offset: number, size: number): DmaMemory;
  /** Where memory of `allocateDma` is, for a thread that maps it by itself. */
  shareDma?(memory: DmaMemory): SharedDma;
  /** Number of MSI-X vectors, or what stands for them; 0 without. */
  readonly interruptVectors: number;
  /** Routes vector i to eventfd `eventfds[i]` for all i at once; an empty list disables interrupts. */
  setInterrupts(eventfds: readonly number[]): void;
  /** True once the device process died, the socket broke or the function was unplugged. */
  readonly gone: boolean;
  /**
   * Calls `listener` once with the reason when the function is lost while it is open (at once if it already is). Only
   * on functions that find out by themselves.
   */
  onGone?(listener: (reason: VfioError) => void): void;
  /** Resets the function if it is still there, unmaps all DMA, closes descriptors. Idempotent. */
  close(): void;
}

export interface PciFunction extends DeviceFunction {
  /** PCI configuration space; may be 256 or 4096 bytes. */
  readonly config: Region;
  /** BAR `index` (0 to 5). An absent BAR has size 0. */
  bar(index: number): Region;
  readonly iovaRanges: readonly IovaRange[];
  /** Function-level reset. */
  reset(): void;
}

/**
 * Frees DMA memory of a function that may be lost: then there is nobody to withdraw it from, and the loss is known
 * already.
 */
export function releaseDma(fn: Pick<DeviceFunction, 'freeDma' | 'gone'>, memory: DmaMemory): void {
  try {
    fn.freeDma(memory);
  } catch (error) {
    if (!fn.gone) throw error;
  }
}
