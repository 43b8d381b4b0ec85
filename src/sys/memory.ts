/**
 * Mapped memory as prebuilt typed-array views.
 *
 * Aligned `Uint8Array`, `Uint16Array` and `Uint32Array` elements are single machine accesses in every compiler
 * tier; `DataView` and `Buffer` accessors are byte-wise and must not touch memory that is shared with a device.
 * All views are little-endian on the machines that Node supports here (x86-64, arm64, riscv64).
 */
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
