/**
 * Memory of the application in packets: arenas, and references to their bytes.
 *
 * A reference is a packet number without a slot. It stands behind a packet of the pool in its chain, so that the headers lie in a
 * slot, where the driver can put its own in front of them, and the payload stays where the application has it. When the device is
 * done with the packet, the bytes are in the arena's list of those that may be used again, and `PacketArena.reclaim` gives them out: a
 * reference that was not collected counts as in use, so that attaching ends instead of losing track.
 *
 * A reference remembers its own IOVA and length, in arrays of this file: what a caller writes into the pool's cannot lead the device
 * anywhere else. Left out: receiving into arenas.
 */
import { VirtioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';

const State = { free: 0, attached: 1, returned: 2 } as const;

/** Most arenas at one time. */
export const MAX_ARENAS = 256;

export class PacketReferences {
  /** Number of the first; they follow the slots of the pool. */
  readonly first: number;
  readonly count: number;
  // By number less `first`.
  readonly iovaLow: Uint32Array;
  readonly iovaHigh: Uint32Array;
  readonly length: Uint32Array;
  /** Where in its arena the bytes begin. */
  readonly #start: Uint32Array;
  readonly #arena: Uint16Array;
  readonly #state: Uint8Array;
  readonly #free: Uint32Array;
  readonly #arenas: (PacketArena | null)[] = [];
  #available: number;

  constructor(first: number, count: number) {
    this.first = first;
    this.count = count;
    this.iovaLow = new Uint32Array(count);
    this.iovaHigh = new Uint32Array(count);
    this.length = new Uint32Array(count);
    this.#start = new Uint32Array(count);
    this.#arena = new Uint16Array(count);
    this.#state = new Uint8Array(count);
    this.#free = Uint32Array.from({ length: count }, (_, i) => count - 1 - i);
    this.#available = count;
  }

  /** References that can still be attached. */
  get available(): number {
    return this.#available;
  }

  /** Adds an arena. Throws VirtioError `ARENA_LIMIT`. */
  open(memory: DmaMemory): PacketArena {
    const unused = this.#arenas.indexOf(null);
    const id = unused < 0 ? this.#arenas.length : unused;
    if (id >= MAX_ARENAS) throw new VirtioError('ARENA_LIMIT', `more than ${MAX_ARENAS} arenas`);
    const arena = new PacketArena(this, id, memory);
    this.#arenas[id] = arena;
    return arena;
  }

  /** Forgets an arena and the references that were not collected. Throws VirtioError `ARENA_BUSY` while packets have some of it. */
  close(arena: PacketArena): void {
    if (!this.knows(arena)) return;
    if (arena.inFlight !== 0) {
      throw new VirtioError('ARENA_BUSY', `${arena.inFlight} pieces of the arena are in packets`);
    }
    this.#arenas[arena.id] = null;
    this.reclaim(arena, null);
  }

  /** Whether `arena` is open, and one of these. */
  knows(arena: PacketArena): boolean {
    return this.#arenas[arena.id] === arena;
  }

  /** Takes a reference to `length` bytes from `offset` on, which are inside of `arena`; -1 when there is none left. */
  take(arena: PacketArena, offset: number, length: number): number {
    // hot:
    if (this.#available === 0) return -1;
    const r = this.#free[--this.#available];
    this.iovaLow[r] = arena.memory.iovaLow + offset;
    this.iovaHigh[r] = arena.memory.iovaHigh;
    this.length[r] = length;
    this.#start[r] = offset;
    this.#arena[r] = arena.id;
    this.#state[r] = State.attached;
    arena.inFlight++;
    return this.first + r;
  }

  /** Whether `p` is a reference that was attached and has not come back. */
  has(p: number): boolean {
    return this.#state[p - this.first] === State.attached;
  }

  /** The packet that `p` was in is no more; false when it was in none. */
  release(p: number): boolean {
    // hot:
    const r = p - this.first;
    const arena = this.#state[r] === State.attached ? this.#arenas[this.#arena[r]] : null;
    if (arena === null || arena === undefined) return false;
    this.#state[r] = State.returned;
    arena.inFlight--;
    arena.returned.push(r);
    return true;
  }

  /** Puts the starts of what has come back to `arena` into `out`, and says how many. Without `out`, all of it is dropped. */
  reclaim(arena: PacketArena, out: Uint32Array | null): number {
    // hot:
    const max = out === null ? this.count : out.length;
    let n = 0;
    while (n < max) {
      const r = arena.returned.shift();
      if (r < 0) break;
      if (out !== null) out[n] = this.#start[r];
      this.#state[r] = State.free;
      this.#free[this.#available++] = r;
      n++;
    }
    return n;
  }

  /** Copies `bytes` of the attached reference `p`, from its byte `skip` on, to `out[at…]`. */
  copy(p: number, skip: number, bytes: number, out: Uint8Array, at: number): void {
    // hot:
    const r = p - this.first;
    const arena = this.#state[r] === State.attached ? this.#arenas[this.#arena[r]] : null;
    if (arena === null || arena === undefined || skip + bytes > this.length[r]) {
      throw new RangeError(`packet ${p} has no ${bytes} bytes at ${skip}`);
    }
    const from = this.#start[r] + skip;
    // A view for each piece: it costs 60 ns, a loop over the bytes of a segment twenty times as much.
    out.set(arena.memory.u8.subarray(from, from + bytes), at);
  }

  /** A copy of the bytes of `p`; empty when it is no reference. */
  read(p: number): Uint8Array {
    const r = p - this.first;
    const arena = this.has(p) ? this.#arenas[this.#arena[r]] : null;
    const start = this.#start[r];
    return arena?.memory.u8.slice(start, start + this.length[r]) ?? new Uint8Array(0);
  }
}

/** A queue of numbers, of which there are never more than it has room for. */
class Fifo {
  readonly #items: Uint32Array;
  #first = 0;
  #count = 0;

  constructor(room: number) {
    this.#items = new Uint32Array(room);
  }

  push(item: number): void {
    this.#items[(this.#first + this.#count++) % this.#items.length] = item;
  }

  /** -1 when there is none. */
  shift(): number {
    if (this.#count === 0) return -1;
    const item = this.#items[this.#first];
    this.#first = (this.#first + 1) % this.#items.length;
    this.#count--;
    return item;
  }
}

/** Memory of the application that the device can read: made by `Nic.registerMemory`. */
export class PacketArena {
  readonly memory: DmaMemory;
  readonly id: number;
  /** Pieces that are in packets; they must stay as they are. */
  inFlight = 0;
  /** References that have come back and were not collected. Not for callers. */
  readonly returned: Fifo;
  readonly #references: PacketReferences;

  /** Not to be called: use `Nic.registerMemory`. */
  constructor(references: PacketReferences, id: number, memory: DmaMemory) {
    this.#references = references;
    this.id = id;
    this.memory = memory;
    this.returned = new Fifo(Math.max(references.count, 1));
  }

  /**
   * Bytes that the device is done with: puts into `out` where each piece began that was attached, in the order in which they came back, and
   * says how many. To be called again when `out` was full.
   */
  reclaim(out: Uint32Array): number {
    return this.#references.reclaim(this, out);
  }
}
