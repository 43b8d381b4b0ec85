/**
 * The state of all SAs as the data path sees it: one record of 32 words (two cache lines) per slot in one typed array;
 * replay windows and drop counters beside it. What an ordinary packet needs (ESP tunnel over IPv4) is in the first line, so
 * that an SA hit at random costs one cache miss here; the array begins at a page, a large one at a huge page.
 *
 * Slot 0 is no SA: its record is all zero, and a lookup that finds nothing yields it. Records move when the table grows,
 * so nobody keeps `words` over a call of `allocate`. Words are signed, because that is what the compiler computes with
 * fastest: a number of 32 bits is `word >>> 0`.
 *
 * "Memory order" below means that the word's bytes in memory are the bytes of the packet, in order.
 */
import { HUGE_PAGE_SIZE } from '../sys/libc.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../sys/memory.ts';
import { VERDICTS } from './verdict.ts';

/** Words of a record, and its logarithm. */
export const RECORD = 32;
export const RECORD_SHIFT = 5;

/** What the words of a record are. */
export const SaWord = {
  /** Bits of `SaKind`. */
  kind: 0,
  /** `CryptoEngine.createContext`. */
  context: 1,
  /** Index of the group (transform, engine, sequence width). */
  group: 2,
  /** Memory order. */
  spi: 3,
  /** Outbound: number of the next packet. Inbound: highest number accepted. */
  sequenceLow: 4,
  sequenceHigh: 5,
  /** Outbound, counter modes: explicit IV minus sequence number, 64 bits. Inbound: size and place of the replay window. */
  ivLow: 6,
  ivHigh: 7,
  window: 6,
  windowBase: 7,
  /** Memory order. */
  salt: 8,
  /** Packets and bytes that pass before `lifetime.ts` must look again. */
  packetsLeft: 9,
  bytesLeft: 10,
  /** `Sizes`. */
  sizes: 11,
  /** Outbound, outer IPv4: source. Inbound with `SaKind.destination4`: destination. Memory order. */
  outer4Source: 12,
  destination4: 12,
  /** Outbound: largest packet on the wire, without link header. Inbound: blocks of the replay window minus 1. */
  mtu: 13,
  windowMask: 13,
  /** Outbound, outer IPv4: destination, memory order. Inbound: ICV failures in a row. */
  outer4Destination: 14,
  failures: 14,
  /** Outbound tunnel: `Outer`. Inbound: the handle again. */
  outerFields: 15,
  arrived: 15,
  /** Outbound: outer header (IPv4: 5 words, IPv6: 10). */
  outer: 16,
  /** Inbound: destination and the mask of the bits that count, 4 words each, memory order. */
  destination: 16,
  mask: 20,
  /** Inbound: how many bits count, and the family (4, 6) in bits 8 to 15; 0 is any destination. */
  destinationBits: 24,
  /** Inbound: slot of the next SA with the same SPI, less specific in its destination. */
  nextSameSpi: 25,
  /** Outbound: ports of UDP encapsulation, source first; memory order. Inbound: what `nat.ts` keeps. */
  ports: 26,
  originalSource: 26,
  /** Outbound: bytes of TFC padding. */
  tfc: 27,
  originalDestination: 27,
  /** How much `packetsLeft` and `bytesLeft` were when they were last set. */
  packetsGranted: 28,
  bytesGranted: 29,
  handle: 30,
} as const;

/** Bits of `SaWord.kind`. */
export const SaKind = {
  outbound: 1 << 0,
  inbound: 1 << 1,
  esp: 1 << 2,
  ah: 1 << 3,
  tunnel: 1 << 4,
  /** The outer header of the tunnel is IPv6. */
  outer6: 1 << 5,
  udp: 1 << 6,
  esn: 1 << 7,
  /** The explicit IV counts up with the sequence number (GCM, CCM, ChaCha20, GMAC, CTR); otherwise it is random (CBC) or absent. */
  counterIv: 1 << 8,
  /** The nonce has the 3-byte salt of CCM. */
  ccm: 1 << 9,
  /** CBC: the caller gave the IV of the next packet. */
  givenIv: 1 << 10,
  copyDscp: 1 << 11,
  copyDf: 1 << 12,
  decrementTtl: 1 << 13,
  ecn: 1 << 14,
  df: 1 << 15,
  /** The inner packet is to be compared with the selector. */
  selector: 1 << 16,
  softExpired: 1 << 17,
  /** A hard lifetime is over, or the sequence space is used up. */
  expired: 1 << 18,
  exhausted: 1 << 19,
  /** The loops for the simple case know everything about this SA (`esp-outbound-simple.ts`, `esp-inbound-simple.ts`). */
  simple: 1 << 20,
  /** Inbound: the destination is one IPv4 address. */
  destination4: 1 << 21,
} as const;

/** Fields of `SaWord.sizes`: shifts of bytes. */
export const Sizes = {
  /** Pad the plain text so that `(length & mask) === 0`. */
  padMask: 0,
  /** Bytes of explicit IV in the packet. */
  iv: 8,
  icv: 16,
  /** AH: bytes of the whole header with IV and ICV, not padded; 0 for ESP. */
  ah: 24,
} as const;

/**
 * Fields of `SaWord.outerFields`: shifts. TTL or hop limit; DSCP of the tunnel << 2, for the outer traffic class; IPv4: sum of
 * the constant 16-bit words of the outer header, as loaded little-endian, folded to 16 bits.
 */
export const Outer = { ttl: 0, tos: 8, sum: 16 } as const;

const INITIAL_SLOTS = 64;

function mapRecords(slots: number): MappedMemory {
  const bytes = 4 * RECORD * slots;
  return mapAnonymous(bytes, { hugePages: bytes >= HUGE_PAGE_SIZE, secret: true });
}

export class SaTable {
  #memory = mapRecords(INITIAL_SLOTS);
  /** `RECORD` words per slot. */
  words = new Int32Array(this.#memory.u8.buffer);
  /** The same memory as 16-bit words, for copies to and from packets. */
  halves = this.#memory.u16;
  /** `VERDICTS` counters per slot. */
  dropped = new Float64Array(INITIAL_SLOTS * VERDICTS);
  /** All replay windows. */
  windows = new Uint32Array(1024);

  #slots = INITIAL_SLOTS;
  #used = 1;
  readonly #freeSlots: number[] = [];
  #windowsUsed = 0;
  /** Freed windows by number of blocks. */
  readonly #freeWindows = new Map<number, number[]>();

  /** Highest slot ever used, plus one. */
  get end(): number {
    return this.#used;
  }

  /** A zeroed slot. */
  allocate(): number {
    const free = this.#freeSlots.pop();
    if (free !== undefined) return free;
    if (this.#used === this.#slots) this.#grow();
    return this.#used++;
  }

  /** Wipes and frees a slot. Its window must have been released. */
  release(slot: number): void {
    this.words.fill(0, slot * RECORD, (slot + 1) * RECORD);
    this.dropped.fill(0, slot * VERDICTS, (slot + 1) * VERDICTS);
    this.#freeSlots.push(slot);
  }

  /** Index in `windows` of `blocks` words. */
  allocateWindow(blocks: number): number {
    const free = this.#freeWindows.get(blocks)?.pop();
    if (free !== undefined) return free;
    while (this.#windowsUsed + blocks > this.windows.length) {
      const larger = new Uint32Array(this.windows.length * 2);
      larger.set(this.windows);
      this.windows = larger;
    }
    const base = this.#windowsUsed;
    this.#windowsUsed += blocks;
    return base;
  }

  releaseWindow(base: number, blocks: number): void {
    const free = this.#freeWindows.get(blocks);
    if (free === undefined) this.#freeWindows.set(blocks, [base]);
    else free.push(base);
  }

  /** Wipes everything (salts are secrets) and gives the memory back: every record reads as no SA. */
  close(): void {
    this.words.fill(0);
    this.windows.fill(0);
    unmapMemory(this.#memory);
  }

  #grow(): void {
    const slots = this.#slots * 2;
    const memory = mapRecords(slots);
    const words = new Int32Array(memory.u8.buffer);
    words.set(this.words);
    this.words.fill(0);
    unmapMemory(this.#memory);
    this.#memory = memory;
    const dropped = new Float64Array(slots * VERDICTS);
    dropped.set(this.dropped);
    this.words = words;
    this.halves = memory.u16;
    this.dropped = dropped;
    this.#slots = slots;
  }
}

/** Counts a drop on the SA of `record` and returns the verdict. */
export function drop(table: SaTable, record: number, verdict: number): number {
  table.dropped[(record >> RECORD_SHIFT) * VERDICTS + verdict]++;
  return verdict;
}
