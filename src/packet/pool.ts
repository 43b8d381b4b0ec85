/**
 * Packets are numbers. A pool owns one piece of memory, cut into equal slots, and a few parallel typed arrays
 * indexed by packet number. Nothing here allocates after construction, and none of it throws because it is empty: whoever asks for
 * more than there is gets less, which is counted. A part of the packets can be kept back for receive rings, so that an application
 * that takes all it can get still hears from the network.
 *
 * ```
 *   slot p:  | headroom (>= 128) | packet bytes …             | tailroom |
 *            p * stride          ^ offset[p]   length[p] bytes
 * ```
 */
import type { DmaMemory, MappedMemory } from '../sys/memory.ts';
import { type PacketArena, PacketReferences } from './references.ts';

/** Offsets stay below 2^31, so that the data path computes with 32-bit integers. */
export const MAX_POOL_BYTES = 2 ** 31;

/** `next[p]` of the last packet of a chain. */
export const NO_PACKET = 0xffffffff;

/** Bits of `flags[p]`. On receive the driver sets them; on transmit the application may. */
export const PacketFlag = {
  /** Transmit: `checksumStart`/`checksumOffset` are to be filled by the device. Receive: checksum not yet filled (NEEDS_CSUM). */
  needsChecksum: 1 << 0,
  /** Receive: a checksum was validated (DATA_VALID). */
  checksumValid: 1 << 1,
  /** Receive: IPsec processing was done and succeeded; `sa[p]` names the SA. */
  secured: 1 << 2,
  /** Receive: the device tried IPsec and failed, or did not process the packet; it may still be ESP. */
  securityError: 1 << 3,
  /** Receive: the SA that protected the packet has passed its soft limit. */
  softExpiry: 1 << 4,
  /**
   * Transmit: the device is to cut the packet into segments, as `gsoType` and `gsoSize` say. Receive: the packet stands for
   * several segments. Always together with `needsChecksum`.
   */
  segmented: 1 << 5,
  /** With `segmented` and a tunnel type: the checksum of the outer UDP header is to be filled too, in each segment (UDP_TUNNEL_CSUM). */
  outerChecksum: 1 << 6,
} as const;

export interface PacketPoolOptions {
  /** Bytes per slot; a multiple of 64. Default 2048. */
  readonly stride?: number;
  /** Bytes before the packet in a fresh slot; a multiple of 64, at least 128. Default 128. */
  readonly headroom?: number;
  /** Numbers for bytes of the application's memory, besides the slots: see `refer`. Default 0. */
  readonly references?: number;
}

export class PacketPool {
  /** Number of packets. */
  readonly count: number;
  readonly stride: number;
  readonly headroom: number;
  readonly memory: MappedMemory;
  readonly u8: Uint8Array;
  readonly u16: Uint16Array;
  readonly u32: Uint32Array;
  /** IOVA of byte 0 of the memory; both 0 when the memory is not mapped for a device. */
  readonly iovaLow: number;
  readonly iovaHigh: number;

  /** Byte offset in `memory` of the first byte of the packet. */
  readonly offset: Uint32Array;
  /** Bytes in this slot. */
  readonly length: Uint32Array;
  /** Handle of the SA that is to protect, or has protected, the packet; 0 is in the clear. */
  readonly sa: Uint32Array;
  readonly flags: Uint32Array;
  /** With `needsChecksum`: where the checksummed bytes begin, and where in them the checksum goes; bytes from the packet's start. */
  readonly checksumStart: Uint16Array;
  readonly checksumOffset: Uint16Array;
  /** Next packet of the chain, or `NO_PACKET`. All fields but `offset`, `length` and `next` are those of the first one. */
  readonly next: Uint32Array;
  /** With `segmented`: a `GsoType`, and the bytes of transport payload of each segment (its MSS). */
  readonly gsoType: Uint8Array;
  readonly gsoSize: Uint16Array;
  /** With `segmented` and a tunnel type: bytes from the packet's start to the outer UDP header, and to the inner IP header. */
  readonly outerTransport: Uint16Array;
  readonly innerNetwork: Uint16Array;
  /** Receive, with HASH_REPORT negotiated: a `HashReport`, 0 for none, and the hash that the device calculated. */
  readonly hashReport: Uint16Array;
  readonly hash: Uint32Array;

  /** Pieces of the application's memory in chains; their numbers follow those of the slots. */
  readonly references: PacketReferences;
  /** Packets that `allocate` leaves for receive rings; `allocateForReceive` has them too. */
  reserve = 0;
  /** Times that `allocate` gave less than what was asked for. */
  exhausted = 0;

  readonly #free: Uint32Array;
  /** Packet numbers are tokens that callers give back: a set bit says who holds one, so that none is freed twice. */
  readonly #held: Uint8Array;
  #available: number;

  constructor(memory: MappedMemory | DmaMemory, options: PacketPoolOptions = {}) {
    const stride = options.stride ?? 2048;
    const headroom = options.headroom ?? 128;
    if (stride % 64 !== 0 || headroom % 64 !== 0 || headroom < 128 || stride <= headroom) {
      throw new RangeError(`stride ${stride} and headroom ${headroom}: multiples of 64, 128 <= headroom < stride`);
    }
    if (memory.size > MAX_POOL_BYTES) throw new RangeError(`memory of ${memory.size} bytes: at most ${MAX_POOL_BYTES}`);
    const count = Math.floor(memory.size / stride);
    if (count < 1) throw new RangeError(`memory of ${memory.size} bytes holds no slot of ${stride}`);
    this.count = count;
    this.stride = stride;
    this.headroom = headroom;
    this.memory = memory;
    this.u8 = memory.u8;
    this.u16 = memory.u16;
    this.u32 = memory.u32;
    this.iovaLow = 'iovaLow' in memory ? memory.iovaLow : 0;
    this.iovaHigh = 'iovaHigh' in memory ? memory.iovaHigh : 0;
    this.offset = new Uint32Array(count);
    this.length = new Uint32Array(count);
    this.sa = new Uint32Array(count);
    this.flags = new Uint32Array(count);
    this.checksumStart = new Uint16Array(count);
    this.checksumOffset = new Uint16Array(count);
    this.references = new PacketReferences(count, options.references ?? 0);
    this.next = new Uint32Array(count + this.references.count).fill(NO_PACKET);
    this.gsoType = new Uint8Array(count);
    this.gsoSize = new Uint16Array(count);
    this.outerTransport = new Uint16Array(count);
    this.innerNetwork = new Uint16Array(count);
    this.hashReport = new Uint16Array(count);
    this.hash = new Uint32Array(count);
    this.#held = new Uint8Array(count);
    this.#free = new Uint32Array(count);
    for (let i = 0; i < count; i++) this.#free[i] = count - 1 - i;
    this.#available = count;
  }

  /** Packets that are free, those for receive rings included. */
  get available(): number {
    return this.#available;
  }

  /**
   * Sets the `reserve` when receive rings hold up to `filled` packets: as many again, so that they can be filled once more whatever the
   * application holds; but not more than half of what is left beside them.
   */
  keepForReceive(filled: number): void {
    this.reserve = Math.max(0, Math.min(filled, (this.count - filled) >>> 1));
  }

  /** Byte offset of slot `packet`. */
  slot(packet: number): number {
    return packet * this.stride;
  }

  /** Takes up to `n` packets, empty and in the clear, into `out`; returns how many there were, beside the `reserve`. */
  allocate(out: Uint32Array, n: number): number {
    // hot:
    const room = (this.#available - this.reserve) | 0;
    if (n <= room) return this.allocateForReceive(out, n);
    this.exhausted++;
    return room <= 0 ? 0 : this.allocateForReceive(out, room);
  }

  /** As `allocate`, for a receive ring: without leaving a reserve. */
  allocateForReceive(out: Uint32Array, n: number): number {
    // hot:
    const free = this.#free;
    const held = this.#held;
    const { offset, length, sa, flags, next } = this;
    // Integers in locals: a property or an imported constant is loaded and converted at each use.
    const stride = this.stride | 0;
    const headroom = this.headroom | 0;
    const none = NO_PACKET | 0;
    let top = this.#available | 0;
    const take = Math.min(n, top) | 0;
    let i = 0;
    // Four at a time: what an access to an array costs besides the access itself is then paid once for four.
    for (; i + 4 <= take; i += 4) {
      top = (top - 4) | 0;
      const a = free[top + 3];
      const b = free[top + 2];
      const c = free[top + 1];
      const d = free[top];
      held[a] = 1;
      held[b] = 1;
      held[c] = 1;
      held[d] = 1;
      offset[a] = Math.imul(a, stride) + headroom;
      offset[b] = Math.imul(b, stride) + headroom;
      offset[c] = Math.imul(c, stride) + headroom;
      offset[d] = Math.imul(d, stride) + headroom;
      length[a] = 0;
      length[b] = 0;
      length[c] = 0;
      length[d] = 0;
      sa[a] = 0;
      sa[b] = 0;
      sa[c] = 0;
      sa[d] = 0;
      flags[a] = 0;
      flags[b] = 0;
      flags[c] = 0;
      flags[d] = 0;
      next[a] = none;
      next[b] = none;
      next[c] = none;
      next[d] = none;
      out[i] = a;
      out[i + 1] = b;
      out[i + 2] = c;
      out[i + 3] = d;
    }
    for (; i < take; i++) {
      const p = free[--top];
      held[p] = 1;
      offset[p] = Math.imul(p, stride) + headroom;
      length[p] = 0;
      sa[p] = 0;
      flags[p] = 0;
      next[p] = none;
      out[i] = p;
    }
    this.#available = top;
    return take;
  }

  /** Gives `n` packets back. Throws RangeError on a number that is not out, before anything is changed for it. */
  free(packets: Uint32Array, n: number): void {
    // hot:
    const free = this.#free;
    const held = this.#held;
    let top = this.#available | 0;
    let i = 0;
    for (; i + 4 <= n; i += 4) {
      const a = packets[i];
      const b = packets[i + 1];
      const c = packets[i + 2];
      const d = packets[i + 3];
      // Cleared one after the other, so that a packet that is named twice is seen.
      const heldA = held[a];
      held[a] = 0;
      const heldB = held[b];
      held[b] = 0;
      const heldC = held[c];
      held[c] = 0;
      const heldD = held[d];
      held[d] = 0;
      if ((heldA & heldB & heldC & heldD) !== 1) {
        held[d] = heldD;
        held[c] = heldC;
        held[b] = heldB;
        held[a] = heldA;
        break;
      }
      free[top] = a;
      free[top + 1] = b;
      free[top + 2] = c;
      free[top + 3] = d;
      top = (top + 4) | 0;
    }
    // The rest, and what is wrong, one by one.
    for (; i < n; i++) {
      const p = packets[i];
      if (held[p] !== 1) {
        this.#available = top;
        throw new RangeError(`packet ${p} is not in use`);
      }
      held[p] = 0;
      free[top++] = p;
    }
    this.#available = top;
  }

  /**
   * Gives `n` packets back, each with all that follow it in its chain. Throws RangeError as `free` does, which a chain that
   * leads back to itself comes to as well.
   */
  freeChains(packets: Uint32Array, n: number): void {
    // hot:
    const { next, references } = this;
    const free = this.#free;
    const held = this.#held;
    let top = this.#available | 0;
    for (let i = 0; i < n; i++) {
      let p = packets[i];
      do {
        const isSlot = held[p] === 1;
        if (isSlot) {
          held[p] = 0;
          free[top++] = p;
        } else if (!references.release(p)) {
          this.#available = top;
          throw new RangeError(`packet ${p} is not in use`);
        }
        p = next[p];
      } while (p !== NO_PACKET);
    }
    this.#available = top;
  }

  /** Bytes of `packet` and all that follow it in its chain. */
  chainLength(packet: number): number {
    // hot:
    const { length, next, references, count } = this;
    let bytes = 0;
    let left = next.length;
    for (let p = packet; p !== NO_PACKET && left > 0; p = next[p]) {
      bytes += p < count ? length[p] : references.length[p - count];
      left--;
    }
    return bytes;
  }

  /** Copies `bytes` into `packet` as its whole content, at the default headroom. */
  write(packet: number, bytes: Uint8Array): void {
    if (bytes.length > this.stride - this.headroom) throw new RangeError(`${bytes.length} bytes do not fit a slot`);
    const at = this.slot(packet) + this.headroom;
    this.u8.set(bytes, at);
    this.offset[packet] = at;
    this.length[packet] = bytes.length;
  }

  /** A copy of the bytes of `packet`, of this slot only. */
  read(packet: number): Uint8Array {
    const at = this.offset[packet];
    return this.u8.slice(at, at + this.length[packet]);
  }

  /** A copy of the bytes of `packet` and all that follow it in its chain. */
  readChain(packet: number): Uint8Array {
    const bytes = new Uint8Array(this.chainLength(packet));
    let at = 0;
    for (let p = packet; at < bytes.length; p = this.next[p]) {
      const piece = p < this.count ? this.read(p) : this.references.read(p);
      bytes.set(piece, at);
      at += piece.length;
    }
    return bytes;
  }

  /**
   * Refers to `length` bytes of `arena` from `offset` on. Returns a packet number to stand in a chain behind a packet of the pool
   * (`next[p]`), for transmit only; `NO_PACKET` when all references are in use or wait to be collected by `arena.reclaim`. The bytes must
   * stay as they are until they come back. Throws RangeError when they are not in the arena.
   */
  refer(arena: PacketArena, offset: number, length: number): number {
    // hot:
    const inside = offset >>> 0 === offset && length >>> 0 === length && offset + length <= arena.memory.size;
    if (!inside || length === 0 || !this.references.knows(arena)) {
      throw new RangeError(`${length} bytes at ${offset} are not in an arena of this pool`);
    }
    const p = this.references.take(arena, offset, length);
    if (p < 0) {
      this.exhausted++;
      return NO_PACKET;
    }
    this.next[p] = NO_PACKET;
    return p;
  }
}
