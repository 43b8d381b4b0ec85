/**
 * MSI-X: the vector table and the pending bits in their BAR, and the eventfds that stand for the messages (PCI 3.0,
 * 6.8.2).
 *
 * Addresses and data of the table are kept for whoever reads them back, but the message that goes out is the eventfd
 * that the client has set for the vector. As with VFIO in the kernel, setting one also unmasks the vector: a client
 * that virtualises the table itself (QEMU) never writes to this one.
 */
import { EventFd } from '../sys/eventfd.ts';

/** A table entry: address u64, data u32, vector control u32. */
export const MsixEntry = { size: 16, control: 12 } as const;
const VECTOR_MASKED = 1;

export class Msix {
  readonly vectors: number;
  /** MSI-X enable and function mask of the capability. */
  enabled = false;
  functionMasked = false;
  readonly #table: Uint32Array;
  readonly #pending: Uint8Array;
  readonly #eventfds: (EventFd | null)[];

  constructor(vectors: number) {
    this.vectors = vectors;
    this.#table = new Uint32Array((vectors * MsixEntry.size) / 4);
    this.#pending = new Uint8Array(Math.ceil(vectors / 64) * 8);
    this.#eventfds = new Array<EventFd | null>(vectors).fill(null);
    this.reset();
  }

  get tableSize(): number {
    return this.#table.length * 4;
  }

  get pendingSize(): number {
    return this.#pending.length;
  }

  /** Masks all vectors and forgets what is pending, as a reset does. Eventfds stay: they belong to the client. */
  reset(): void {
    this.enabled = false;
    this.functionMasked = false;
    this.#table.fill(0);
    this.#pending.fill(0);
    for (let v = 0; v < this.vectors; v++) {
      this.#table[v * 4 + 3] = this.#eventfds[v] === null ? VECTOR_MASKED : 0;
    }
    if (this.#eventfds.some((eventfd) => eventfd !== null)) this.enabled = true;
  }

  /** The 32-bit word at byte `offset` of the table. */
  readTable(offset: number): number {
    return this.#table[offset >>> 2];
  }

  writeTable(offset: number, value: number): void {
    this.#table[offset >>> 2] = value;
    if (offset % MsixEntry.size === MsixEntry.control) this.#flush(Math.floor(offset / MsixEntry.size));
  }

  /** The byte at `offset` of the pending bit array. */
  readPending(offset: number): number {
    return this.#pending[offset];
  }

  /**
   * Connects a vector to an eventfd, whose descriptor is this object's from now on; null disconnects. Throws
   * SystemError when it is no eventfd.
   */
  connect(vector: number, fd: number | null): void {
    const next = fd === null ? null : EventFd.adopt(fd);
    this.#eventfds[vector]?.close();
    this.#eventfds[vector] = next;
    if (next === null) return;
    this.setMask(vector, false);
  }

  isConnected(vector: number): boolean {
    return this.#eventfds[vector] !== null;
  }

  disconnectAll(): void {
    for (let v = 0; v < this.vectors; v++) this.connect(v, null);
    this.enabled = false;
  }

  setMask(vector: number, masked: boolean): void {
    const at = vector * 4 + 3;
    this.#table[at] = masked ? this.#table[at] | VECTOR_MASKED : this.#table[at] & ~VECTOR_MASKED;
    this.#flush(vector);
  }

  /** Sets the bits of the capability's control word. */
  setControl(enabled: boolean, functionMasked: boolean): void {
    this.enabled = enabled;
    this.functionMasked = functionMasked;
    for (let v = 0; v < this.vectors; v++) this.#flush(v);
  }

  /**
   * Sends the message of `vector`, or notes it as pending while it is masked. Nothing happens for a vector that does
   * not exist.
   */
  fire(vector: number): void {
    if (vector >= this.vectors || !this.enabled) return;
    if (this.#isMasked(vector)) this.#pending[vector >>> 3] |= 1 << (vector & 7);
    else this.#eventfds[vector]?.signal();
  }

  #isMasked(vector: number): boolean {
    return this.functionMasked || (this.#table[vector * 4 + 3] & VECTOR_MASKED) !== 0;
  }

  #flush(vector: number): void {
    const bit = 1 << (vector & 7);
    if ((this.#pending[vector >>> 3] & bit) === 0 || !this.enabled || this.#isMasked(vector)) return;
    this.#pending[vector >>> 3] &= ~bit;
    this.#eventfds[vector]?.signal();
  }
}
