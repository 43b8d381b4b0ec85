/**
 * Which receive queue a frame comes in on. Automatic receive steering (Virtio 1.4, 5.1.9.5.6): the one whose transmit queue the
 * flow last went out on; frames of other flows on a queue that their hash picks. Receive-side scaling (5.1.9.5.7): the entry of
 * the indirection table that the Toeplitz hash picks. The last command of the driver decides which of the two.
 *
 * A flow is a pair of addresses and a pair of ports, whichever direction. The table has no collision handling: two
 * flows that share an entry share a queue, which the standard allows.
 */
import { Ethernet, EtherType, IpProtocol, Ipv4, Ipv4Fragment, Ipv6 } from '../packet/fields.ts';
import type { PacketPool } from '../packet/pool.ts';
import type { HashConfig, RssConfig } from '../virtio-net/control-wire.ts';
import { RssHash } from '../virtio-net/toeplitz.ts';
import type { FaultSet } from './faults.ts';

const ENTRIES = 4096;
const NONE = 0xff;
const PRIME = 0x01000193;

export class Steering {
  /** Queue pair by flow hash. */
  readonly #pairs = new Uint8Array(ENTRIES).fill(NONE);
  #inUse = 1;
  readonly #hash = new RssHash();
  /** Whether frames are hashed; and by what they are steered, null for automatically. */
  #hashes = false;
  #rss: RssConfig | null = null;
  /** By queue pair: whether its receive queue is enabled and not reset. */
  readonly #usable: Uint8Array;
  /** Faults, looked up once. */
  readonly #early: boolean;
  readonly #forgets: boolean;
  readonly #dropsAtReset: boolean;
  readonly #steersAtReset: boolean;
  readonly #hashFault: number;

  constructor(queuePairs: number, faults: FaultSet) {
    this.#usable = new Uint8Array(queuePairs);
    this.#early = faults.has('mq-early');
    this.#forgets = faults.has('mq-flow-forgotten');
    this.#dropsAtReset = faults.has('mq-reset-queue-drops');
    this.#steersAtReset = faults.has('flow-reset-queue-steers');
    this.#hashFault = faults.has('hash-wrong') ? 1 : 0;
    this.clear();
  }

  /** As after a reset. */
  clear(): void {
    this.pairs = this.#early ? this.#usable.length : 1;
    this.#hashes = false;
  }

  /** Receive-side scaling from now on; the numbers in `config` are checked. */
  setRss(config: RssConfig): void {
    this.#inUse = Math.max(config.maxTransmitQueues, ...config.indirectionTable.map((pair) => pair + 1));
    this.#inUse = Math.max(this.#inUse, config.unclassifiedQueue + 1);
    this.#rss = config;
    this.setHash(config);
  }

  setHash({ hashTypes, key }: HashConfig): void {
    this.#hash.configure(hashTypes, key);
    this.#hashes = true;
  }

  /** The receive queue of `pair` can be used from now on, or cannot. */
  setUsable(pair: number, usable: boolean): void {
    this.#usable[pair] = usable ? 1 : 0;
  }

  /** Queue pairs in use: 1 after a reset (5.1.9.5.6). */
  get pairs(): number {
    return this.#inUse;
  }

  set pairs(count: number) {
    this.#inUse = count;
    this.#rss = null;
    this.#pairs.fill(NONE);
  }

  /** hot: a frame of this flow went out on transmit queue `pair`. */
  sent(u8: Uint8Array, at: number, length: number, pair: number): void {
    if (this.#inUse > 1 && !this.#forgets) this.#pairs[flowHash(u8, at, length) & (ENTRIES - 1)] = pair;
  }

  /** Whether `pick` needs the hash of each frame. */
  get isByHash(): boolean {
    return this.#rss !== null;
  }

  /** hot: the receive queue for a frame; when steering is by hash, that of the frame for which `calculate` was called last. */
  pick(pool: PacketPool, packet: number): number {
    const rss = this.#rss;
    if (rss !== null) {
      const table = rss.indirectionTable;
      const queue = this.#hash.report === 0 ? rss.unclassifiedQueue : table[this.#hash.value & (table.length - 1)];
      return this.#steersAtReset ? this.#instead(queue) : queue;
    }
    if (this.#inUse === 1) return 0;
    const hash = flowHash(pool.u8, pool.offset[packet], pool.length[packet]);
    const pair = this.#pairs[hash & (ENTRIES - 1)];
    const queue = pair < this.#inUse ? pair : hash % this.#inUse;
    return this.#dropsAtReset ? queue : this.#instead(queue);
  }

  /** hot: `pair`, or another one in use when its queue is reset (5.1.9.5.6.2). */
  #instead(pair: number): number {
    if (this.#usable[pair] !== 0) return pair;
    for (let other = 0; other < this.#inUse; other++) if (this.#usable[other] !== 0) return other;
    return pair;
  }

  /** hot: the hash of a frame, into the pool; none before the driver has said what to hash. */
  calculate(pool: PacketPool, packet: number): void {
    if (this.#hashes) this.#hash.hash(pool.u8, pool.offset[packet], pool.length[packet]);
    pool.hash[packet] = this.#hashes ? this.#hash.value ^ this.#hashFault : 0;
    pool.hashReport[packet] = this.#hashes ? this.#hash.report : 0;
  }
}

/** hot: the same for both directions of a flow. */
function flowHash(u8: Uint8Array, at: number, length: number): number {
  const end = at + length;
  const ip = at + Ethernet.length;
  if (ip > end) return 0;
  const type = (u8[at + Ethernet.type] << 8) | u8[at + Ethernet.type + 1];
  let sum = 0;
  let transport = 0;
  let protocol = 0;
  if (type === EtherType.ipv4 && ip + Ipv4.minLength <= end) {
    sum = mix(u8, ip + Ipv4.source, 4) + mix(u8, ip + Ipv4.destination, 4);
    protocol = u8[ip + Ipv4.protocol];
    const fragment = ((u8[ip + Ipv4.flagsFragment] << 8) | u8[ip + Ipv4.flagsFragment + 1]) & 0x3fff;
    transport = (fragment & (Ipv4Fragment.offsetMask | Ipv4Fragment.moreFragments)) === 0 ? ip + (u8[ip] & 0xf) * 4 : 0;
  } else if (type === EtherType.ipv6 && ip + Ipv6.length <= end) {
    sum = mix(u8, ip + Ipv6.source, 16) + mix(u8, ip + Ipv6.destination, 16);
    protocol = u8[ip + Ipv6.nextHeader];
    transport = ip + Ipv6.length;
  } else {
    sum = mix(u8, at + Ethernet.destination, 6) + mix(u8, at + Ethernet.source, 6);
  }
  const hasPorts = protocol === IpProtocol.tcp || protocol === IpProtocol.udp;
  if (hasPorts && transport > 0 && transport + 4 <= end) sum += mix(u8, transport, 2) + mix(u8, transport + 2, 2);
  const hash = Math.imul((sum ^ protocol) | 0, PRIME);
  return (hash ^ (hash >>> 15)) >>> 0;
}

/** hot: */
function mix(u8: Uint8Array, at: number, length: number): number {
  let hash = 0x811c9dc5;
  for (let i = at; i < at + length; i++) hash = Math.imul(hash ^ u8[i], PRIME);
  return hash >>> 0;
}
