/**
 * What the stages of a burst share: the packets that are still alive, sorted into runs of one group, and the crypto jobs
 * of the run that is being worked on.
 *
 * A group is what may go down to an engine in one call: one transform, one engine, one width of sequence number. Packets of
 * different SAs of a group stay together, and inside a group the order of arrival is kept, so it is kept inside an SA.
 */

import type { Protocol, Selector } from '../ipsec/sa.ts';
import type { PacketPool } from '../packet/pool.ts';
import type { MappedMemory } from '../sys/memory.ts';
import {
  CryptoBurst,
  type CryptoEngine,
  JobArrays,
  MAX_BURST,
  type Transform,
  type TransformFamily,
} from './engines/engine.ts';
import type { SaEvent, SaLifetime } from './lifetime.ts';
import { SaTable, SaWord } from './sa-table.ts';

export interface Group {
  readonly transform: Transform;
  readonly engine: CryptoEngine;
  readonly protocol: Protocol;
  readonly family: TransformFamily;
  readonly esn: boolean;
  /** Bytes of AAD of a job: SPI and sequence number (RFC 4106, 5), for AEADs only. */
  readonly aadLength: number;
}

/** What `Burst.state` says about a packet; offsets are in memory. */
export const At = {
  /** First word of its SA record; 0 when it has no SA. */
  record: 0,
  /** Its number. */
  packet: 1,
  /** Offset of the IP header, of the ESP or AH header, of the end of the IP packet. */
  ip: 2,
  header: 3,
  end: 4,
  /** Sequence number. */
  low: 5,
  high: 6,
  /** Offset of the byte that names the protocol behind the IP headers. */
  nextHeaderAt: 7,
} as const;

/**
 * The arrays of whatever burst is being worked on, shared by all `Burst`s of a thread: a burst is done before the next one begins, and nobody is
 * called back before. Because V8 knows an array that is a constant, an access costs a loop two instructions; to one that is in an
 * object it costs up to ten, in every round (docs/decisions.md).
 */
export const Scratch = {
  jobs: new JobArrays(),
  /** By position in the burst: 8 words, see `At`. One array and not eight, because each costs a loop some instructions a round. */
  state: new Int32Array(8 * MAX_BURST),
  /** By job of the current run: position in the burst. */
  position: new Uint16Array(MAX_BURST),
} as const;

export class Burst {
  readonly jobs = new CryptoBurst(Scratch.jobs);
  /** `Scratch`. */
  readonly state = Scratch.state;
  readonly position = Scratch.position;
  /** Positions in the burst, run by run. */
  order = new Uint16Array(MAX_BURST);
  /** By run: its group and where it begins in `order`; `runStart[runs]` is the end of the last one. */
  readonly runGroup = new Uint16Array(MAX_BURST);
  readonly runStart = new Uint16Array(MAX_BURST + 1);

  /** By position: what the ESN gap covers (`esn-gap.ts`). */
  readonly savedA = new Int32Array(MAX_BURST);

  #counts = new Uint16Array(64);
  #other = new Uint16Array(MAX_BURST);

  /** Room for `groups` groups. */
  reserve(groups: number): void {
    if (groups > this.#counts.length) this.#counts = new Uint16Array(groups * 2);
  }

  /** The first `alive` entries of `order` are all of one group. */
  single(words: Int32Array, alive: number): number {
    // hot:
    if (alive === 0) return 0;
    this.runGroup[0] = words[this.state[(this.order[0] << 3) + At.record] + SaWord.group];
    this.runStart[0] = 0;
    this.runStart[1] = alive;
    return 1;
  }

  /** Sorts the first `alive` entries of `order` into runs, in the order in which the groups appear; returns how many runs. */
  sort(words: Int32Array, alive: number): number {
    // hot:
    const order = this.order;
    const other = this.#other;
    const state = this.state;
    const counts = this.#counts;
    const runGroup = this.runGroup;
    const runStart = this.runStart;
    let runs = 0;
    for (let k = 0; k < alive; k++) {
      const group = words[state[(order[k] << 3) + At.record] + SaWord.group];
      if (counts[group] === 0) runGroup[runs++] = group;
      counts[group]++;
    }
    let start = 0;
    for (let run = 0; run < runs; run++) {
      const group = runGroup[run];
      const count = counts[group];
      runStart[run] = start;
      counts[group] = start;
      start += count;
    }
    runStart[runs] = start;
    for (let k = 0; k < alive; k++) {
      const position = order[k];
      other[counts[words[state[(position << 3) + At.record] + SaWord.group]]++] = position;
    }
    for (let run = 0; run < runs; run++) counts[runGroup[run]] = 0;
    this.order = other;
    this.#other = order;
    return runs;
  }
}

/** What everything on the data path works on. */
export class DataPath {
  readonly pool: PacketPool;
  readonly memory: MappedMemory;
  readonly table = new SaTable();
  readonly burst = new Burst();
  readonly groups: Group[] = [];
  /** By slot. */
  readonly lifetimes: (SaLifetime | undefined)[] = [];
  /** By slot: what the inner packet must match, for SAs with `SaKind.selector`. */
  readonly selectors: (Selector | undefined)[] = [];
  /** By slot: the IV that the next packet carries, for SAs with `SaKind.givenIv`. */
  readonly givenIv: (Uint8Array | undefined)[] = [];
  /** Events of the current burst. */
  events: { handle: number; event: SaEvent }[] = [];
  /** Identification of the next outer IPv4 header (RFC 791, 3.1): one counter for all SAs, since several may share two addresses. */
  identification = 0;
  /** The packets of the burst are dummies (RFC 4303, 2.6). */
  dummy = false;
  /** While resynchronising (RFC 4303, A2.3): the position of the packet to try, the high half to try, and the packet as it was. */
  resyncing = false;
  candidate = -1;
  forcedHigh = 0;
  copy = new Uint8Array(0);
  /** Takes what was read for the side effects of reading it, so that the read is not optimised away. */
  touched = 0;
  /** A packet of the run is in UDP. */
  encapsulated = false;
  /** Packets of the burst that have an SA, and the group of all of them (-1: none yet; see `MIXED`). */
  alive = 0;
  group = -1;

  constructor(pool: PacketPool) {
    this.pool = pool;
    this.memory = pool.memory;
  }
}

/** Moves the content of a packet at an odd offset down by a byte, so that headers can be read in 16-bit words. Slots begin at even offsets. */
export function align(pool: PacketPool, p: number): number {
  const at = pool.offset[p] - 1;
  pool.u8.copyWithin(at, at + 1, at + 1 + pool.length[p]);
  pool.offset[p] = at;
  return at;
}
