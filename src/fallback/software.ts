/**
 * ESP and AH in software, for bursts of packet numbers (RFC 4301 to 4303): the SA database, the way of a burst through
 * it, and the choice of engine.
 *
 * A burst is looked up, sorted into runs of one transform (`burst.ts`), and each run goes through `esp-outbound.ts`,
 * `esp-inbound.ts` or `ah.ts`, with one engine call. Packets of one SA keep their order; nothing is allocated.
 *
 * Rules for callers:
 * - Packets are in one slot, whole IP packets behind a link header of even length (0, 14, 18 …). Link header lengths of 14
 *   and more end in the EtherType, which follows the outermost IP version.
 * - `protect` needs headroom for what is put in front (at most 20 or 40 + 8 + 8 + 16 bytes and, without a tunnel, nothing
 *   more) and tailroom for padding, trailer and ICV; `unprotect` needs 4 + 32 bytes of tailroom for extended sequence numbers
 *   and AH. A packet without it gets `Verdict.noRoom`.
 * - Transport checksums must be filled in before `protect`: nobody can do it afterwards.
 * - Nonces: an SA never repeats one, modified or not. That two SAs, or an SA that comes back after `remove`, do not share
 *   a key is the caller's to see to (`ipsec/nonce-guard.ts`).
 */
import { createHmac, randomBytes } from 'node:crypto';
import { IpsecError } from '../errors.ts';
import type { SecurityAssociation } from '../ipsec/sa.ts';
import { Ethernet, UdpEsp } from '../packet/fields.ts';
import type { PacketPool } from '../packet/pool.ts';
import { authenticate, verify } from './ah.ts';
import { align, DataPath, type Group } from './burst.ts';
import { classify } from './classify.ts';
import { type EngineOption, EngineSource } from './engine-source.ts';
import { type CryptoEngine, type EngineName, MAX_BURST, type Transform } from './engines/engine.ts';
import { keysOf, transformOf } from './engines/transform.ts';
import { decapsulate, decapsulateUniform } from './esp-inbound.ts';
import { encapsulate } from './esp-outbound.ts';
import { lookUp, MIXED } from './esp-outbound-simple.ts';
import { type SaEvent, SaLifetime } from './lifetime.ts';
import { nonceMaterial } from './nonce-material.ts';
import { type Encapsulation, encapsulationOf, largestInner } from './pmtu.ts';
import { readAheadOutbound } from './read-ahead.ts';
import { type Fingerprints, goOn, type KeyHistory, progressOf, type SoftwareProgress } from './sa-progress.ts';
import {
  carrySequence,
  copySelector,
  releaseRecord,
  sequenceOf,
  startBehind,
  wireLimit,
  writeRecord,
} from './sa-record.ts';
import { RECORD, SaKind, SaWord } from './sa-table.ts';
import { SaDatabase } from './sad.ts';
import { VERDICTS, verdictNames } from './verdict.ts';

export type { SaEvent } from './lifetime.ts';

export interface SoftwareIpsecOptions {
  /** Default `auto`. */
  readonly engine?: EngineOption;
  /** Called after the burst in which it happened; must not throw. It may add, modify and remove SAs, not pass packets. */
  readonly onEvent?: (handle: number, event: SaEvent) => void;
}

/** Counters of one SA. Bytes are those of the IP packet without protection (tunnel mode: the inner packet). */
export interface SaCounters {
  readonly packets: bigint;
  readonly bytes: bigint;
  /** Packets dropped on this SA, by the name of the verdict; those that never were are absent. */
  readonly dropped: Readonly<Record<string, number>>;
  /** Outbound: number of the next packet. Inbound: highest number accepted. */
  readonly sequence: bigint;
  /** What does the arithmetic, such as `ipsec-mb`. */
  readonly engine: EngineName;
  /** Such as `aes-128-gcm-16`. */
  readonly transform: string;
  /** A soft limit has been reached. */
  readonly softExpired: boolean;
}

/** What is kept of an SA beside its record: no key. */
interface Entry extends KeyHistory {
  readonly how: Encapsulation;
  readonly wireLimit: number;
  readonly port: number;
  mtu: number;
}

export class SoftwareIpsec {
  readonly #path: DataPath;
  readonly #sad: SaDatabase;
  readonly #engines: EngineSource;
  readonly #onEvent: ((handle: number, event: SaEvent) => void) | undefined;
  readonly #groupIndex = new Map<string, number>();
  /** By slot. */
  readonly #entries: (Entry | undefined)[] = [];
  /** By UDP port: whether ESP may come to it, and how many SAs want it. */
  readonly #espPorts = new Uint8Array(65536);
  readonly #portUsers = new Map<number, number>();
  /** Makes fingerprints useless outside of this object, and of those to which its SAs go on. */
  readonly #secret = randomBytes(32);
  #closed = false;

  constructor(pool: PacketPool, options: SoftwareIpsecOptions = {}) {
    this.#path = new DataPath(pool);
    this.#sad = new SaDatabase(this.#path.table);
    this.#onEvent = options.onEvent;
    this.#engines = new EngineSource(pool.memory, options.engine ?? 'auto');
    this.#espPorts[UdpEsp.port] = 1;
  }

  /**
   * Adds an SA under a handle of the caller's choice, 1 to 2^24 - 1. Throws `IpsecError`: `BAD_HANDLE`, `HANDLE_IN_USE`, `SA_EXISTS`
   * (inbound, same SPI, destination and protocol), `TRANSFORM_UNKNOWN`, `TRANSFORM_UNSUPPORTED`. With `progress` the SA goes on from where
   * another object's `take` ended it, and `sa.initial` is not looked at; `SA_MOVE` if it is not the same SA.
   */
  add(handle: number, sa: SecurityAssociation, progress: SoftwareProgress | null = null): void {
    this.#checkOpen();
    this.#sad.checkFree(handle);
    const slot = this.#build(handle, sa);
    const secret = progress?.secret ?? this.#secret;
    const keys = this.#fingerprints(sa, secret);
    try {
      if (progress !== null) goOn(this.#path, slot, progress, keys);
      if (sa.direction === 'inbound') this.#sad.insert(slot);
    } catch (error) {
      this.#discard(slot);
      throw error;
    }
    const outbound = sa.direction === 'outbound';
    this.#path.lifetimes[slot] = new SaLifetime(sa.lifetime, outbound, sa.options.esn, progress?.lifetime);
    const { sentWith = new Set([keys.nonces]), acceptedWith = new Map<string, bigint>() } = progress ?? {};
    this.#finishAdd(slot, handle, sa, { secret, keys, sentWith, acceptedWith });
  }

  /**
   * Ends the SA here, wipes its key, and says how far it has come, so that it can go on elsewhere: see `add`. Its numbers are used once only if
   * it goes on once. Throws `IpsecError` `NO_SUCH_SA`.
   */
  take(handle: number): SoftwareProgress {
    const slot = this.#slot(handle);
    const progress = progressOf(this.#path, slot, this.#entry(slot));
    this.remove(handle);
    return progress;
  }

  /**
   * Gives the SA new parameters between two bursts. If anything about them is refused, the old ones stay in force. With
   * the same keys, sequence number, IV and window go on and `sa.initial` is not looked at; with new ones they start as
   * `sa.initial` says, and the lifetime starts anew. Of a cipher and an authenticator, outbound numbers start anew when both keys
   * are new; a window starts anew when the key of the authenticator is new, since otherwise old packets would pass again, and
   * for one that the SA has had before it starts at the highest number accepted then. Counters go on. Throws like `add`, and `IpsecError`
   * `NO_SUCH_SA`, `SA_DIRECTION` (the direction cannot change) and `NONCE_REUSE` (a key that this SA has sent with before).
   */
  modify(handle: number, sa: SecurityAssociation): void {
    const { table, lifetimes } = this.#path;
    const old = this.#slot(handle);
    const oldRecord = old * RECORD;
    const entry = this.#entry(old);
    const outbound = (table.words[oldRecord + SaWord.kind] & SaKind.outbound) !== 0;
    if (outbound !== (sa.direction === 'outbound')) {
      throw new IpsecError('SA_DIRECTION', 'the direction of an SA cannot be changed', { path: 'direction' });
    }
    const { secret } = entry;
    const keys = this.#fingerprints(sa, secret);
    const newNonces = keys.nonces !== entry.keys.nonces;
    const rekeyed = keys.icv !== entry.keys.icv && (newNonces || !outbound);
    if (newNonces && outbound && entry.sentWith.has(keys.nonces)) {
      throw new IpsecError('NONCE_REUSE', 'this SA has sent with that key before: its nonces would repeat', {
        hint: 'use a new key',
      });
    }
    const slot = this.#build(handle, sa);
    if (!outbound) {
      this.#sad.remove(old);
      try {
        this.#sad.insert(slot);
      } catch (error) {
        this.#sad.insert(old);
        this.#discard(slot);
        throw error;
      }
    }
    const { sentWith, acceptedWith } = entry;
    sentWith.add(keys.nonces);
    if (!outbound) acceptedWith.set(entry.keys.icv, sequenceOf(table, old));
    if (!rekeyed) carrySequence(table, old, slot, !newNonces);
    else if (!outbound) startBehind(table, slot, acceptedWith.get(keys.icv) ?? 0n);
    const before = lifetimes[old];
    lifetimes[slot] =
      before?.successor(sa.lifetime, sa.options.esn, rekeyed, table.words, oldRecord) ??
      new SaLifetime(sa.lifetime, outbound, sa.options.esn);
    const counters = table.dropped.subarray(old * VERDICTS, (old + 1) * VERDICTS);
    table.dropped.set(counters, slot * VERDICTS);
    const { mtu } = entry;
    this.#forget(old);
    this.#finishAdd(slot, handle, sa, { secret, keys, sentWith, acceptedWith });
    if (outbound && mtu !== 0) this.setMtu(handle, mtu);
  }

  /** Removes the SA and wipes its key. Throws `IpsecError` `NO_SUCH_SA`. */
  remove(handle: number): void {
    const slot = this.#slot(handle);
    if ((this.#path.table.words[slot * RECORD] & SaKind.inbound) !== 0) this.#sad.remove(slot);
    this.#forget(slot);
    this.#sad.setHandle(handle, 0);
  }

  /** Throws `IpsecError` `NO_SUCH_SA`. */
  counters(handle: number): SaCounters {
    const slot = this.#slot(handle);
    const { table, lifetimes, groups } = this.#path;
    const { words } = table;
    const record = slot * RECORD;
    const lifetime = lifetimes[slot];
    const group = groups[words[record + SaWord.group]];
    const dropped: Record<string, number> = {};
    for (let verdict = 0; verdict < VERDICTS; verdict++) {
      const count = table.dropped[slot * VERDICTS + verdict];
      if (count !== 0) dropped[verdictNames[verdict]] = count;
    }
    return {
      packets: lifetime?.packets(words, record) ?? 0n,
      bytes: lifetime?.bytes(words, record) ?? 0n,
      dropped,
      sequence: sequenceOf(table, slot),
      engine: group.engine.name,
      transform: group.transform.id,
      softExpired: (words[record + SaWord.kind] & SaKind.softExpired) !== 0,
    };
  }

  /**
   * Largest packet, in bytes, that the SA can carry over a link of `mtu` bytes (RFC 4301, 8.2); 0 if none. In transport mode
   * `headerLength` is the length of the packet's own headers in front of ESP or AH.
   */
  largestInner(handle: number, mtu: number, headerLength?: number): number {
    return largestInner(this.#entry(this.#slot(handle)).how, mtu, headerLength);
  }

  /** From now on packets of the outbound SA that would be longer than `mtu` on the wire get `Verdict.tooBig`; 0 lifts that. */
  setMtu(handle: number, mtu: number): void {
    const slot = this.#slot(handle);
    const { words } = this.#path.table;
    if ((words[slot * RECORD] & SaKind.outbound) === 0) {
      throw new IpsecError('SA_DIRECTION', 'only an outbound SA has an MTU');
    }
    const entry = this.#entry(slot);
    entry.mtu = mtu;
    words[slot * RECORD + SaWord.mtu] = mtu === 0 ? entry.wireLimit : Math.min(mtu, entry.wireLimit);
  }

  /**
   * Protects `n` packets in place. The SA of packet p is `pool.sa[p]`; a packet with 0 is left alone (`Verdict.notIpsec`).
   * `pool.offset` and `pool.length` follow. `linkHeader`: bytes of link header, even.
   */
  protect(packets: Uint32Array, n: number, linkHeader: number, verdicts: Uint8Array): void {
    // hot:
    this.#checkBurst(packets, n, linkHeader, verdicts);
    for (let base = 0; base < n; base += MAX_BURST) {
      const count = Math.min(n - base, MAX_BURST);
      this.#protectSome(packets, base, count, linkHeader, verdicts);
    }
    if (this.#path.events.length !== 0) this.#tell();
  }

  /**
   * Like `protect`, but what is sent are dummy packets (RFC 4303, 2.6), which the peer throws away. In tunnel mode the content is
   * whatever the packets hold behind the link header; in transport mode it is a packet whose payload means nothing.
   */
  protectDummies(packets: Uint32Array, n: number, linkHeader: number, verdicts: Uint8Array): void {
    this.#path.dummy = true;
    try {
      this.protect(packets, n, linkHeader, verdicts);
    } finally {
      this.#path.dummy = false;
    }
  }

  /**
   * Verifies and decapsulates in place those of `n` packets that are IPsec; sets `pool.sa[p]` and `PacketFlag.secured`, and
   * `PacketFlag.softExpiry` when the SA has passed a soft limit. Others are left alone (`Verdict.notIpsec`).
   */
  unprotect(packets: Uint32Array, n: number, linkHeader: number, verdicts: Uint8Array): void {
    // hot:
    this.#checkBurst(packets, n, linkHeader, verdicts);
    for (let base = 0; base < n; base += MAX_BURST) {
      const count = Math.min(n - base, MAX_BURST);
      this.#unprotectSome(packets, base, count, linkHeader, verdicts);
    }
    if (this.#path.events.length !== 0) this.#tell();
  }

  /** Wipes all keys. Later calls throw `IpsecError` `CLOSED`. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    for (let slot = 1; slot < this.#entries.length; slot++) if (this.#entries[slot] !== undefined) this.#forget(slot);
    this.#path.table.close();
    this.#path.burst.jobs.close();
    this.#secret.fill(0);
    this.#engines.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #protectSome(packets: Uint32Array, base: number, n: number, linkHeader: number, verdicts: Uint8Array): void {
    // hot:
    const path = this.#path;
    const { burst } = path;
    path.alive = 0;
    path.group = -1;
    readAheadOutbound(path, this.#sad.slotOf, packets, base, n);
    for (let i = 0; i < n; ) {
      i = lookUp(path, this.#sad.slotOf, packets, base, i, n, verdicts);
      if (i < n) align(path.pool, packets[base + i]);
    }
    const words = path.table.words;
    const runs = path.group === MIXED ? burst.sort(words, path.alive) : burst.single(words, path.alive);
    for (let run = 0; run < runs; run++) {
      const of = path.groups[burst.runGroup[run]];
      const from = burst.runStart[run];
      const to = burst.runStart[run + 1];
      if (of.protocol === 'esp') encapsulate(path, of, packets, base, from, to, linkHeader, verdicts);
      else authenticate(path, of, packets, base, from, to, linkHeader, verdicts);
    }
  }

  #unprotectSome(packets: Uint32Array, base: number, n: number, linkHeader: number, verdicts: Uint8Array): void {
    // hot:
    const path = this.#path;
    const { burst } = path;
    const isSimpleLink = linkHeader === 0 || linkHeader === Ethernet.length;
    const start = isSimpleLink
      ? decapsulateUniform(path, this.#sad, this.#espPorts, packets, base, n, linkHeader, verdicts)
      : 0;
    if (start === n) return;
    classify(path, this.#sad, this.#espPorts, packets, base, start, n, linkHeader, verdicts);
    const words = path.table.words;
    const runs = path.group === MIXED ? burst.sort(words, path.alive) : burst.single(words, path.alive);
    for (let run = 0; run < runs; run++) {
      const of = path.groups[burst.runGroup[run]];
      const from = burst.runStart[run];
      const to = burst.runStart[run + 1];
      if (of.protocol === 'esp') decapsulate(path, of, packets, base, from, to, linkHeader, verdicts);
      else verify(path, of, packets, base, from, to, linkHeader, verdicts);
    }
  }

  #tell(): void {
    const { events } = this.#path;
    this.#path.events = [];
    for (const { handle, event } of events) this.#onEvent?.(handle, event);
  }

  #checkBurst(packets: Uint32Array, n: number, linkHeader: number, verdicts: Uint8Array): void {
    // hot:
    if (this.#closed) this.#checkOpen();
    if (n > packets.length || n > verdicts.length || n < 0) throw new RangeError(`a burst of ${n} does not fit`);
    if ((linkHeader & 1) !== 0 || linkHeader < 0 || linkHeader > 64) {
      throw new RangeError(`a link header of ${linkHeader} bytes: an even number from 0 to 64 is needed`);
    }
  }

  #checkOpen(): void {
    if (this.#closed) throw new IpsecError('CLOSED', 'this SoftwareIpsec is closed');
  }

  /** Throws `CLOSED` or `NO_SUCH_SA`. */
  #slot(handle: number): number {
    this.#checkOpen();
    return this.#sad.slot(handle);
  }

  #entry(slot: number): Entry {
    const entry = this.#entries[slot];
    if (entry === undefined) throw new IpsecError('NO_SUCH_SA', `slot ${slot} has no SA`);
    return entry;
  }

  /** A slot with a complete record and a context, not yet reachable by any packet. */
  #build(handle: number, sa: SecurityAssociation): number {
    const { table } = this.#path;
    const transform = transformOf(sa);
    const engine = this.#engines.select(transform);
    const group = this.#group(transform, engine, sa);
    const context = engine.createContext(transform, keysOf(sa), sa.direction === 'outbound' ? 'encrypt' : 'decrypt');
    const slot = table.allocate();
    writeRecord(table, slot, handle, sa, transform);
    table.words[slot * RECORD + SaWord.group] = group;
    table.words[slot * RECORD + SaWord.context] = context;
    return slot;
  }

  /** Undoes `#build`. */
  #discard(slot: number): void {
    const { table, groups } = this.#path;
    const record = slot * RECORD;
    groups[table.words[record + SaWord.group]].engine.destroyContext(table.words[record + SaWord.context]);
    releaseRecord(table, slot);
  }

  /** The switch-over: from here on packets meet the SA in `slot`. */
  #finishAdd(slot: number, handle: number, sa: SecurityAssociation, history: KeyHistory): void {
    const path = this.#path;
    const inbound = sa.direction === 'inbound';
    const port = inbound && sa.udpEncap !== undefined ? sa.udpEncap.destinationPort : 0;
    this.#entries[slot] = {
      how: encapsulationOf(sa),
      wireLimit: wireLimit(sa),
      ...history,
      port,
      mtu: 0,
    };
    path.selectors[slot] = inbound ? copySelector(sa.selector) : undefined;
    path.givenIv[slot] = inbound ? undefined : sa.initial.iv?.slice();
    if (port !== 0) {
      this.#portUsers.set(port, (this.#portUsers.get(port) ?? 0) + 1);
      this.#espPorts[port] = 1;
    }
    this.#sad.setHandle(handle, slot);
  }

  /** Frees a slot that no packet can reach any more. */
  #forget(slot: number): void {
    const path = this.#path;
    const port = this.#entries[slot]?.port ?? 0;
    if (port !== 0) {
      const users = (this.#portUsers.get(port) ?? 1) - 1;
      this.#portUsers.set(port, users);
      if (users === 0 && port !== UdpEsp.port) this.#espPorts[port] = 0;
    }
    this.#entries[slot] = undefined;
    path.lifetimes[slot] = undefined;
    path.selectors[slot] = undefined;
    path.givenIv[slot] = undefined;
    this.#discard(slot);
  }

  #group(transform: Transform, engine: CryptoEngine, sa: SecurityAssociation): number {
    const { esn } = sa.options;
    const name = `${transform.id} ${engine.name} ${sa.protocol} ${esn}`;
    const known = this.#groupIndex.get(name);
    if (known !== undefined) return known;
    const { family } = transform;
    const aadLength = family !== 'aead' ? 0 : esn ? 12 : 8;
    const group: Group = { transform, engine, protocol: sa.protocol, family, esn, aadLength };
    const index = this.#path.groups.push(group) - 1;
    this.#path.burst.reserve(index + 1);
    this.#groupIndex.set(name, index);
    return index;
  }

  #fingerprints(sa: SecurityAssociation, secret: Uint8Array): Fingerprints {
    const { cipherKey, authKey } = keysOf(sa);
    const fingerprint = (bytes: Uint8Array, name = '') =>
      createHmac('sha256', secret).update(name).update(bytes).digest('base64');
    const material = nonceMaterial(sa);
    const nonces = fingerprint(material ?? (cipherKey.length === 0 ? authKey : cipherKey));
    material?.fill(0);
    return { nonces, icv: sa.cipher === undefined ? nonces : fingerprint(authKey, sa.auth?.name) };
  }
}
