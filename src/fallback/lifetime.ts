/**
 * Lifetimes of an SA (RFC 4301, 4.4.2.1): packets and bytes, soft and hard, and the end of its sequence space.
 *
 * The data path knows two numbers only: how many packets and how many bytes may pass before it has to ask here. A grant
 * ends where the next thing happens (a soft limit, a hard limit, few sequence numbers left) and after 2^31 - 1 at the
 * latest, so 64-bit arithmetic is done once per grant. What was used of a grant is also the counter.
 *
 * Bytes are those of the IP packet without protection: the inner packet in tunnel mode, the packet as it was in transport
 * mode. A hard limit N lets N pass; a packet that would take the bytes over it is refused, and from then on the SA is dead.
 * A soft limit is reported with the packet that reaches it.
 */
import type { Lifetime } from '../ipsec/sa.ts';
import { RECORD, SaKind, type SaTable, SaWord } from './sa-table.ts';
import { SEQUENCE_LOW } from './sequence.ts';
import { Verdict } from './verdict.ts';

/** What the user is told about an SA, each once. */
export type SaEvent =
  | 'soft-packets'
  | 'soft-bytes'
  | 'hard-packets'
  | 'hard-bytes'
  | 'sequence-low'
  | 'sequence-overflow';

const MAX_GRANT = 0x7fffffffn;

/** What of a lifetime has been used, and told. */
export interface LifetimeProgress {
  readonly packets: bigint;
  readonly bytes: bigint;
  /** Of these, with keys before the one that it has. */
  readonly packetsBefore: bigint;
  readonly bytesBefore: bigint;
  readonly told: readonly SaEvent[];
}

/** The part of an SA's lifetime that the data path does not see. */
export class SaLifetime {
  readonly #limits: Lifetime;
  /** Whether the sequence space counts (outbound), and whether it has 64 bits. */
  readonly #outbound: boolean;
  readonly #esn: boolean;
  /** What had passed when the current grant was made. */
  #packets: bigint;
  #bytes: bigint;
  /** What had passed when the key was last changed: limits are those of a key. */
  #packetsBefore: bigint;
  #bytesBefore: bigint;
  readonly #told: Set<SaEvent>;

  /** With `progress` the same lifetime goes on. */
  constructor(limits: Lifetime, outbound: boolean, esn: boolean, progress: LifetimeProgress | null = null) {
    this.#packets = progress?.packets ?? 0n;
    this.#bytes = progress?.bytes ?? 0n;
    this.#packetsBefore = progress?.packetsBefore ?? 0n;
    this.#bytesBefore = progress?.bytesBefore ?? 0n;
    this.#told = new Set(progress?.told);
    this.#limits = limits;
    this.#outbound = outbound;
    this.#esn = esn;
  }

  /** Packets that have passed; `words` holds the SA's record at `record`. */
  packets(words: Int32Array, record: number): bigint {
    return this.#packets + BigInt(words[record + SaWord.packetsGranted] - words[record + SaWord.packetsLeft]);
  }

  bytes(words: Int32Array, record: number): bigint {
    return this.#bytes + BigInt(words[record + SaWord.bytesGranted] - words[record + SaWord.bytesLeft]);
  }

  /** `words` holds the SA's record at `record`. */
  progress(words: Int32Array, record: number): LifetimeProgress {
    return {
      packets: this.packets(words, record),
      bytes: this.bytes(words, record),
      packetsBefore: this.#packetsBefore,
      bytesBefore: this.#bytesBefore,
      told: [...this.#told],
    };
  }

  /** Ends the current grant. */
  #settle(words: Int32Array, record: number): void {
    this.#packets = this.packets(words, record);
    this.#bytes = this.bytes(words, record);
    words[record + SaWord.packetsGranted] = 0;
    words[record + SaWord.packetsLeft] = 0;
    words[record + SaWord.bytesGranted] = 0;
    words[record + SaWord.bytesLeft] = 0;
  }

  /** For an SA that is modified: new limits, the same count. With a new key, `rekeyed`, the limits begin anew. */
  successor(limits: Lifetime, esn: boolean, rekeyed: boolean, words: Int32Array, record: number): SaLifetime {
    const next = new SaLifetime(limits, this.#outbound, esn);
    next.#packets = this.packets(words, record);
    next.#bytes = this.bytes(words, record);
    next.#packetsBefore = rekeyed ? next.#packets : this.#packetsBefore;
    next.#bytesBefore = rekeyed ? next.#bytes : this.#bytesBefore;
    return next;
  }

  /**
   * The grant does not cover a packet of `length` bytes: makes a new one that does and returns `Verdict.ok`, or says why
   * not. `tell` is called for what is to be reported.
   */
  renew(table: SaTable, slot: number, length: number, tell: (event: SaEvent) => void): Verdict {
    const words = table.words;
    const record = slot * RECORD;
    this.#settle(words, record);
    const { softPackets, hardPackets, softBytes, hardBytes } = this.#limits;
    const once = (event: SaEvent): void => {
      if (this.#told.has(event)) return;
      this.#told.add(event);
      tell(event);
    };
    const packetsBefore = this.#packets - this.#packetsBefore;
    const bytesBefore = this.#bytes - this.#bytesBefore;
    const bytesAfter = bytesBefore + BigInt(length);
    const hard =
      hardPackets !== 0n && packetsBefore >= hardPackets
        ? 'hard-packets'
        : hardBytes !== 0n && bytesAfter > hardBytes
          ? 'hard-bytes'
          : undefined;
    if (hard !== undefined) {
      words[record + SaWord.kind] |= SaKind.expired;
      once(hard);
      return Verdict.expired;
    }
    let packets = MAX_GRANT;
    let bytes = MAX_GRANT;
    const atMostPackets = (n: bigint): void => {
      if (n < packets) packets = n;
    };
    const atMostBytes = (n: bigint): void => {
      if (n < bytes) bytes = n;
    };
    if (this.#outbound) {
      const left = this.#sequenceLeft(words, record);
      if (left === 0n) {
        words[record + SaWord.kind] |= SaKind.exhausted;
        once('sequence-overflow');
        return Verdict.sequenceOverflow;
      }
      if (left <= SEQUENCE_LOW) once('sequence-low');
      else atMostPackets(left - SEQUENCE_LOW);
      atMostPackets(left);
    }
    if (hardPackets !== 0n) atMostPackets(hardPackets - packetsBefore);
    if (hardBytes !== 0n) atMostBytes(hardBytes - bytesBefore);
    if (softPackets !== 0n) {
      if (packetsBefore + 1n >= softPackets) {
        words[record + SaWord.kind] |= SaKind.softExpired;
        once('soft-packets');
      } else atMostPackets(softPackets - 1n - packetsBefore);
    }
    if (softBytes !== 0n) {
      if (bytesAfter >= softBytes) {
        words[record + SaWord.kind] |= SaKind.softExpired;
        once('soft-bytes');
      } else atMostBytes(softBytes - 1n - bytesBefore);
    }
    words[record + SaWord.packetsGranted] = Number(packets);
    words[record + SaWord.packetsLeft] = Number(packets);
    words[record + SaWord.bytesGranted] = Number(bytes);
    words[record + SaWord.bytesLeft] = Number(bytes);
    return Verdict.ok;
  }

  /** Sequence numbers that can still be sent; the record holds the next one, and the number after the last one is 0. */
  #sequenceLeft(words: Int32Array, record: number): bigint {
    const low = BigInt(words[record + SaWord.sequenceLow] >>> 0);
    const high = BigInt(words[record + SaWord.sequenceHigh] >>> 0);
    const space = this.#esn ? 1n << 64n : 1n << 32n;
    const next = (high << 32n) | low;
    // The counter starts at 1 at least: 0 (or 2^32 without ESN) is what comes after the last number.
    return next === 0n || next >= space ? 0n : space - next;
  }
}
