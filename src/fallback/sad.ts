/**
 * The SA database (RFC 4301, 4.4.2): outbound SAs by the caller's handle, inbound SAs by SPI, destination and protocol.
 *
 * Inbound SAs are in a hash table by SPI (open addressing, half full at most). Those that share an SPI hang on one chain,
 * most specific destination first, so the first that fits is the right one (RFC 4301, 4.1, longest match). Everything is
 * typed arrays; adding and deleting while traffic runs changes no array that a burst has in its hands, because bursts and
 * changes take turns.
 */
import { IpsecError } from '../errors.ts';
import { Ipv4, Ipv6 } from '../packet/fields.ts';
import { RECORD, RECORD_SHIFT, SaKind, type SaTable, SaWord } from './sa-table.ts';

/** Handles are 1 to this. */
export const MAX_HANDLE = 0xffffff;

/** Multiplicative hashing (Knuth, 6.4): the golden ratio of 2^32. */
export const GOLDEN = 0x9e3779b1;

export class SaDatabase {
  readonly #table: SaTable;
  /** Slot by handle; 0 is none. */
  slotOf = new Int32Array(256);
  /** Pairs: SPI in memory order, slot of the first of its chain (0: free). */
  hash = new Int32Array(2 * 128);
  /** The pair where the search for an SPI begins is its hash, `Math.imul(spi, GOLDEN)`, shifted right by this. */
  shift = 32 - 7;
  /** Chains in the table. */
  #chains = 0;

  constructor(table: SaTable) {
    this.#table = table;
  }

  /** The slot of a handle that exists. Throws `IpsecError` `NO_SUCH_SA`. */
  slot(handle: number): number {
    const slot = this.slotOf[handle] ?? 0;
    if (slot === 0) throw new IpsecError('NO_SUCH_SA', `there is no SA with handle ${handle}`);
    return slot;
  }

  /** Refuses a handle that is out of range or taken (`BAD_HANDLE`, `HANDLE_IN_USE`). */
  checkFree(handle: number): void {
    if (!Number.isInteger(handle) || handle < 1 || handle > MAX_HANDLE) {
      throw new IpsecError('BAD_HANDLE', `an SA handle is a number from 1 to ${MAX_HANDLE}, not ${handle}`);
    }
    if ((this.slotOf[handle] ?? 0) !== 0) throw new IpsecError('HANDLE_IN_USE', `handle ${handle} has an SA already`);
  }

  setHandle(handle: number, slot: number): void {
    if (handle >= this.slotOf.length) {
      let size = this.slotOf.length;
      while (size <= handle) size *= 2;
      const larger = new Int32Array(size);
      larger.set(this.slotOf);
      this.slotOf = larger;
    }
    this.slotOf[handle] = slot;
  }

  /**
   * Enters the inbound SA whose record is complete. Throws `IpsecError` `SA_EXISTS` when one with the same SPI,
   * destination and protocol is there.
   */
  insert(slot: number): void {
    const words = this.#table.words;
    const record = slot * RECORD;
    const spi = words[record + SaWord.spi];
    if (this.#chains * 4 >= this.hash.length) this.#rehash(this.hash.length * 2);
    const at = this.#find(spi);
    let previous = 0;
    let next = this.hash[at + 1];
    const specific = specificity(words, record);
    while (next !== 0 && specificity(words, next * RECORD) >= specific) {
      if (sameIdentity(words, record, next * RECORD)) {
        const number = ((spi & 0xff) << 24) | ((spi & 0xff00) << 8) | ((spi >>> 8) & 0xff00) | (spi >>> 24);
        throw new IpsecError(
          'SA_EXISTS',
          `an inbound SA with SPI 0x${(number >>> 0).toString(16)} and this destination exists`,
        );
      }
      previous = next;
      next = words[next * RECORD + SaWord.nextSameSpi];
    }
    words[record + SaWord.nextSameSpi] = next;
    if (previous !== 0) words[previous * RECORD + SaWord.nextSameSpi] = slot;
    else {
      if (this.hash[at + 1] === 0) this.#chains++;
      this.hash[at] = spi;
      this.hash[at + 1] = slot;
    }
  }

  /** Takes the inbound SA out. */
  remove(slot: number): void {
    const words = this.#table.words;
    const record = slot * RECORD;
    const at = this.#find(words[record + SaWord.spi]);
    const follower = words[record + SaWord.nextSameSpi];
    words[record + SaWord.nextSameSpi] = 0;
    let before = this.hash[at + 1];
    if (before === slot) {
      this.hash[at + 1] = follower;
      if (follower === 0) this.#close(at);
      return;
    }
    while (words[before * RECORD + SaWord.nextSameSpi] !== slot) before = words[before * RECORD + SaWord.nextSameSpi];
    words[before * RECORD + SaWord.nextSameSpi] = follower;
  }

  /**
   * The slot of the inbound SA for SPI `spi` (memory order), of protocol `protocolBit` (`SaKind.esp` or `SaKind.ah`),
   * for the IP packet of `version` at `ip`, an even offset; 0 if there is none.
   */
  lookup(spi: number, protocolBit: number, u16: Uint16Array, ip: number, version: number): number {
    // hot:
    const hash = this.hash;
    const mask = hash.length - 1;
    let at = (Math.imul(spi, GOLDEN) >>> this.shift) * 2;
    let slot = hash[at + 1];
    while (slot !== 0 && hash[at] !== spi) {
      at = (at + 2) & mask;
      slot = hash[at + 1];
    }
    const words = this.#table.words;
    while (slot !== 0) {
      const record = slot << RECORD_SHIFT;
      if ((words[record] & protocolBit) !== 0 && destinationFits(words, record, u16, ip, version)) return slot;
      slot = words[record + SaWord.nextSameSpi];
    }
    return 0;
  }

  /** Index of the pair of `spi`, or of the free pair where it would go. */
  #find(spi: number): number {
    const hash = this.hash;
    const mask = hash.length - 1;
    let at = (Math.imul(spi, GOLDEN) >>> this.shift) * 2;
    while (hash[at + 1] !== 0 && hash[at] !== spi) at = (at + 2) & mask;
    return at;
  }

  /** Frees the pair at `hole` and moves up what would no longer be found (Knuth, 6.4, algorithm R). */
  #close(hole: number): void {
    const hash = this.hash;
    const mask = hash.length - 1;
    this.#chains--;
    hash[hole] = 0;
    hash[hole + 1] = 0;
    let free = hole;
    let at = (hole + 2) & mask;
    while (hash[at + 1] !== 0) {
      const home = (Math.imul(hash[at], GOLDEN) >>> this.shift) * 2;
      // It may move when its home is not cyclically between the hole and it.
      if (((at - home) & mask) >= ((at - free) & mask)) {
        hash[free] = hash[at];
        hash[free + 1] = hash[at + 1];
        hash[at] = 0;
        hash[at + 1] = 0;
        free = at;
      }
      at = (at + 2) & mask;
    }
  }

  #rehash(size: number): void {
    const old = this.hash;
    this.hash = new Int32Array(size);
    this.shift = 33 - Math.log2(size);
    for (let i = 0; i < old.length; i += 2) {
      if (old[i + 1] === 0) continue;
      const at = this.#find(old[i]);
      this.hash[at] = old[i];
      this.hash[at + 1] = old[i + 1];
    }
  }
}

/** Exact destinations first, then longer prefixes, then SPI alone. */
function specificity(words: Int32Array, record: number): number {
  const bits = words[record + SaWord.destinationBits];
  return bits >>> 8 === 4 ? (bits & 0xff) + 96 : bits & 0xff;
}

function sameIdentity(words: Int32Array, a: number, b: number): boolean {
  const protocols = SaKind.esp | SaKind.ah;
  if ((words[a] & protocols) !== (words[b] & protocols)) return false;
  for (let w: number = SaWord.destination; w <= SaWord.destinationBits; w++) {
    if (words[a + w] !== words[b + w]) return false;
  }
  return true;
}

/** Whether the destination of the IP packet at `ip`, an even offset, is that of the SA. */
function destinationFits(words: Int32Array, record: number, u16: Uint16Array, ip: number, version: number): boolean {
  // hot:
  const family = words[record + SaWord.destinationBits] >>> 8;
  if (family === 0) return true;
  if (version !== family) return false;
  const at = (ip + (family === 4 ? Ipv4.destination : Ipv6.destination)) >>> 1;
  const count = family === 4 ? 1 : 4;
  for (let w = 0; w < count; w++) {
    const found = u16[at + 2 * w] | (u16[at + 2 * w + 1] << 16);
    const differing = found ^ words[record + SaWord.destination + w];
    if ((differing & words[record + SaWord.mask + w]) !== 0) return false;
  }
  return true;
}
