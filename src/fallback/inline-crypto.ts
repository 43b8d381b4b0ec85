/**
 * Inline crypto: the arithmetic of ESP with AES-GCM (RFC 4106), and none of its state. It is the mode INLINE_CRYPTO of the manual page
 * `ibv_flow_action_esp(3)`, for bursts of packet numbers.
 *
 * ```
 *   before encrypt | link | IP | ESP header | IV field | payload |
 *   after          | link | IP | ESP header | IV       | payload | padding | length | next | ICV |     payload to next encrypted
 * ```
 *
 * The caller supplies IP header, ESP header and an IV field; the engine puts the IV in, encrypts, and adds padding, trailer and ICV. The
 * other way it authenticates and decrypts in place: ESP header and IV stay, the trailer goes, its next header is reported. Lengths and
 * checksum of the IP header follow. The caller numbers packets, keeps the replay window, counts lifetimes, and finds out which
 * context a packet needs.
 *
 * Sequence numbers of 64 bits: what a packet does not carry is derived statelessly from what the owner says every 2^31 packets
 * (`statelessHigh`). IVs are counted here, one number up per packet, and never come from the packet: a caller that repeats a
 * sequence number repeats no nonce. When all 2^64 are used the context is over.
 *
 * Left out: UDP encapsulation, other algorithms, fragments.
 */
import { IpsecError } from '../errors.ts';
import { addBytes, finish } from '../packet/checksum.ts';
import { Esp, EtherType, IpProtocol, Ipv4, Ipv6 } from '../packet/fields.ts';
import { NO_PACKET, PacketFlag, type PacketPool } from '../packet/pool.ts';
import { align } from './burst.ts';
import { type EngineOption, EngineSource } from './engine-source.ts';
import { CryptoBurst, type CryptoEngine, JobStatus, MAX_BURST, type Transform } from './engines/engine.ts';
import { transformById } from './engines/transform.ts';
import { Chain, insertionPoint, walkIpv6 } from './extension-headers.ts';
import { setAad, setNonce, swapBytes } from './jobs.ts';
import { MaxPacket } from './pmtu.ts';
import { statelessHigh } from './sequence.ts';
import { rewriteHeader } from './transport.ts';
import { Verdict } from './verdict.ts';

/** Bytes of the IV field (RFC 4106, 3.1), and what the plain text is padded to (RFC 4303, 2.4). */
const IV_LENGTH = 8;
const PAD_MASK = 3;

/** Extended sequence numbers as their owner has told them. */
export interface EsnState {
  /** The high half. */
  readonly esn: number;
  /** Numbers have passed the middle of their 2^32: those in the lower half belong to the next. */
  readonly newWindow: boolean;
}

export interface InlineCryptoParameters {
  readonly direction: 'encrypt' | 'decrypt';
  /** 16, 24 or 32 bytes; copied by the engine. */
  readonly key: Uint8Array;
  /** 4 bytes, the first of the nonce. */
  readonly salt: Uint8Array;
  /** 8, 12 or 16 bytes. */
  readonly icvLength: number;
  /** Null when numbers have 32 bits. */
  readonly extended: EsnState | null;
}

export interface InlineCryptoCounters {
  readonly packets: bigint;
  /** Encrypt: the IV of the next packet. */
  readonly iv: bigint;
}

export interface InlineCryptoOptions {
  /** Default `auto`. */
  readonly engine?: EngineOption;
}

/** Words per context, and what they are. */
const RECORD = 8;
const Word = { kind: 0, context: 1, group: 2, salt: 3, esn: 4, ivLow: 5, ivHigh: 6, icv: 7 } as const;
const Kind = { encrypt: 1, decrypt: 2, extended: 4, newWindow: 8, exhausted: 16 } as const;

/** What may go down to the engine in one call. */
interface Group {
  readonly transform: Transform;
  readonly engine: CryptoEngine;
  readonly encrypt: boolean;
  readonly extended: boolean;
}

export class InlineCrypto {
  readonly #pool: PacketPool;
  readonly #engines: EngineSource;
  readonly #jobs = new CryptoBurst();
  readonly #groups: Group[] = [];
  #words = new Int32Array(64 * RECORD);
  #packets = new Float64Array(64);
  #contexts = 1;
  readonly #free: number[] = [];
  readonly #chain = new Uint32Array(Chain.length);
  /** By job: position in the burst, where the packet's IP header and its ESP header are, and its context. */
  readonly #position = new Uint16Array(MAX_BURST);
  readonly #ip = new Int32Array(MAX_BURST);
  readonly #esp = new Int32Array(MAX_BURST);
  readonly #owner = new Int32Array(MAX_BURST);
  #closed = false;

  constructor(pool: PacketPool, options: InlineCryptoOptions = {}) {
    this.#pool = pool;
    this.#engines = new EngineSource(pool.memory, options.engine ?? 'auto');
  }

  /**
   * Makes a context and returns its number, 1 or more. IVs begin with 0. Throws IpsecError `TRANSFORM_UNKNOWN`, `TRANSFORM_UNSUPPORTED`,
   * `CLOSED`. That no other context or SA encrypts with the key and salt is the caller's to see to (`ipsec/nonce-guard.ts`).
   */
  create(parameters: InlineCryptoParameters): number {
    if (this.#closed) throw new IpsecError('CLOSED', 'this InlineCrypto is closed');
    const { direction, key, salt, icvLength, extended } = parameters;
    const id = `aes-${key.length * 8}-gcm-${icvLength}`;
    const transform = transformById(id);
    if (transform === undefined || salt.length !== 4) {
      throw new IpsecError('TRANSFORM_UNKNOWN', `no transform ${id} with ${salt.length} bytes of salt`);
    }
    const group = this.#group(transform, direction === 'encrypt', extended !== null);
    const { engine } = this.#groups[group];
    const context = engine.createContext(transform, { cipherKey: key, authKey: new Uint8Array(0) }, direction);
    const number = this.#free.pop() ?? this.#contexts++;
    if (number * RECORD >= this.#words.length) this.#grow();
    const at = number * RECORD;
    const words = this.#words;
    words[at + Word.kind] = Kind[direction];
    words[at + Word.context] = context;
    words[at + Word.group] = group;
    words[at + Word.salt] = salt[0] | (salt[1] << 8) | (salt[2] << 16) | (salt[3] << 24);
    words[at + Word.icv] = icvLength;
    this.#packets[number] = 0;
    if (extended !== null) this.#setExtended(at, extended);
    return number;
  }

  /** From the next packet on numbers are extended as `state` says. Throws IpsecError `NO_SUCH_SA`, `ESN_OFF`. */
  setEsn(context: number, state: EsnState): void {
    const at = this.#at(context);
    if ((this.#words[at] & Kind.extended) === 0) {
      throw new IpsecError('ESN_OFF', 'the context has sequence numbers of 32 bits');
    }
    this.#setExtended(at, state);
  }

  /** The IVs before `iv` count as used: another has had them. Never goes back. Throws IpsecError `NO_SUCH_SA`, `NONCE_REUSE`. */
  skipIvs(context: number, iv: bigint): void {
    const at = this.#at(context);
    if (iv < this.counters(context).iv || iv >= 1n << 64n) {
      throw new IpsecError('NONCE_REUSE', 'the context has used IVs beyond that one');
    }
    this.#words[at + Word.ivLow] = Number(BigInt.asIntN(32, iv));
    this.#words[at + Word.ivHigh] = Number(BigInt.asIntN(32, iv >> 32n));
  }

  /** Throws IpsecError `NO_SUCH_SA`. */
  counters(context: number): InlineCryptoCounters {
    const at = this.#at(context);
    const words = this.#words;
    const low = BigInt(words[at + Word.ivLow] >>> 0);
    const high = BigInt(words[at + Word.ivHigh] >>> 0);
    const exhausted = (words[at + Word.kind] & Kind.exhausted) !== 0;
    return { packets: BigInt(this.#packets[context]), iv: exhausted ? 1n << 64n : (high << 32n) | low };
  }

  /** Ends a context and wipes its key. Throws IpsecError `NO_SUCH_SA`. */
  destroy(context: number): void {
    const at = this.#at(context);
    this.#groups[this.#words[at + Word.group]].engine.destroyContext(this.#words[at + Word.context]);
    this.#words.fill(0, at, at + RECORD);
    this.#free.push(context);
  }

  /** Wipes all keys. Idempotent. */
  close(): void {
    if (this.#closed) return;
    for (let one = 1; one < this.#contexts; one++) if (this.#words[one * RECORD] !== 0) this.destroy(one);
    this.#closed = true;
    this.#words.fill(0);
    this.#jobs.close();
    this.#engines.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /**
   * Encrypts `n` packets in place. Packet i has the context `contexts[i]`; its trailer names `nextHeaders[i]`. `linkHeader`: bytes of link
   * header, even. Verdicts: `ok`; `notIpsec`, left alone: no ESP packet; `noSa`: no such context to encrypt; `malformed`, `fragment`, `tooBig`,
   * `noRoom` (no tailroom), `sequenceOverflow` (no IV is left): the packet is as it was; `engine`: it has no content any more.
   */
  encrypt(
    packets: Uint32Array,
    contexts: Uint32Array,
    nextHeaders: Uint8Array,
    n: number,
    linkHeader: number,
    verdicts: Uint8Array,
  ): void {
    // hot:
    this.#check(packets, contexts, nextHeaders, n, linkHeader, verdicts);
    let group = -1;
    let jobs = 0;
    for (let i = 0; i < n; i++) {
      const at = this.#record(contexts[i], Kind.encrypt);
      if (at === 0) {
        verdicts[i] = Verdict.noSa;
        continue;
      }
      const own = this.#words[at + Word.group];
      if (jobs !== 0 && (own !== group || jobs === MAX_BURST)) {
        this.#finishEncrypt(packets, group, jobs, verdicts);
        jobs = 0;
      }
      group = own;
      const verdict = this.#prepareEncrypt(packets[i], at, jobs, nextHeaders[i], linkHeader);
      verdicts[i] = verdict;
      if (verdict !== Verdict.ok) continue;
      this.#owner[jobs] = contexts[i];
      this.#position[jobs++] = i;
    }
    if (jobs !== 0) this.#finishEncrypt(packets, group, jobs, verdicts);
  }

  /**
   * Authenticates and decrypts `n` packets in place. Packet i has the context `contexts[i]`; `nextHeaders[i]` becomes what its trailer
   * named. Verdicts as those of `encrypt`, and `icv`: not authentic, without content any more.
   */
  decrypt(
    packets: Uint32Array,
    contexts: Uint32Array,
    nextHeaders: Uint8Array,
    n: number,
    linkHeader: number,
    verdicts: Uint8Array,
  ): void {
    // hot:
    this.#check(packets, contexts, nextHeaders, n, linkHeader, verdicts);
    let group = -1;
    let jobs = 0;
    for (let i = 0; i < n; i++) {
      const at = this.#record(contexts[i], Kind.decrypt);
      if (at === 0) {
        verdicts[i] = Verdict.noSa;
        continue;
      }
      const own = this.#words[at + Word.group];
      if (jobs !== 0 && (own !== group || jobs === MAX_BURST)) {
        this.#finishDecrypt(packets, group, jobs, nextHeaders, verdicts);
        jobs = 0;
      }
      group = own;
      const verdict = this.#prepareDecrypt(packets[i], at, jobs, linkHeader);
      verdicts[i] = verdict;
      if (verdict !== Verdict.ok) continue;
      this.#owner[jobs] = contexts[i];
      this.#position[jobs++] = i;
    }
    if (jobs !== 0) this.#finishDecrypt(packets, group, jobs, nextHeaders, verdicts);
  }

  #prepareEncrypt(p: number, at: number, job: number, nextHeader: number, linkHeader: number): number {
    // hot:
    const pool = this.#pool;
    const words = this.#words;
    const verdict = this.#locate(p, linkHeader, job, false);
    if (verdict !== Verdict.ok) return verdict;
    const { u8 } = pool;
    const body = (this.#esp[job] + Esp.length + IV_LENGTH) | 0;
    const end = (pool.offset[p] + pool.length[p]) | 0;
    const payload = (end - body) | 0;
    if (payload < 0) return Verdict.malformed;
    const padLength = -(payload + Esp.trailerLength) & PAD_MASK;
    const icv = (end + padLength + Esp.trailerLength) | 0;
    const newEnd = (icv + words[at + Word.icv]) | 0;
    const ip = this.#ip[job];
    if (newEnd - ip > (u8[ip] >>> 4 === 6 ? MaxPacket.ipv6 : MaxPacket.ipv4)) return Verdict.tooBig;
    if (newEnd > (p + 1) * pool.stride) return Verdict.noRoom;
    if ((words[at + Word.kind] & Kind.exhausted) !== 0) return Verdict.sequenceOverflow;

    // The IV, a number that this context has not had.
    const low = words[at + Word.ivLow];
    const high = words[at + Word.ivHigh];
    words[at + Word.ivLow] = low + 1;
    if (low === -1) {
      words[at + Word.ivHigh] = high + 1;
      if (high === -1) words[at + Word.kind] |= Kind.exhausted;
    }
    const first = swapBytes(high);
    const second = swapBytes(low);
    const iv = (body - IV_LENGTH) >> 1;
    pool.u16[iv] = first;
    pool.u16[iv + 1] = first >>> 16;
    pool.u16[iv + 2] = second;
    pool.u16[iv + 3] = second >>> 16;

    for (let pad = 1; pad <= padLength; pad++) u8[end + pad - 1] = pad;
    u8[icv - 2] = padLength;
    u8[icv - 1] = nextHeader;
    this.#job(at, job, first, second, body, icv - body);
    pool.length[p] = newEnd - pool.offset[p];
    pool.flags[p] &= ~PacketFlag.needsChecksum;
    rewriteLength(u8, ip, newEnd - ip);
    return Verdict.ok;
  }

  #finishEncrypt(packets: Uint32Array, group: number, count: number, verdicts: Uint8Array): void {
    // hot:
    const jobs = this.#jobs;
    const { transform, engine, extended } = this.#groups[group];
    jobs.count = count;
    jobs.aadLength = extended ? 12 : 8;
    engine.encrypt(transform, jobs);
    for (let j = 0; j < count; j++) {
      const i = this.#position[j];
      if (jobs.status[j] === JobStatus.ok) {
        this.#packets[this.#owner[j]]++;
        continue;
      }
      // It may still be plain text: nothing of it must be left to send.
      this.#pool.length[packets[i]] = 0;
      verdicts[i] = Verdict.engine;
    }
  }

  #prepareDecrypt(p: number, at: number, job: number, linkHeader: number): number {
    // hot:
    const pool = this.#pool;
    const verdict = this.#locate(p, linkHeader, job, true);
    if (verdict !== Verdict.ok) return verdict;
    const body = (this.#esp[job] + Esp.length + IV_LENGTH) | 0;
    const icv = (pool.offset[p] + pool.length[p] - this.#words[at + Word.icv]) | 0;
    const plain = (icv - body) | 0;
    if (plain < Esp.trailerLength || (plain & PAD_MASK) !== 0) return Verdict.malformed;
    const iv = (body - IV_LENGTH) >> 1;
    const { u16 } = pool;
    const first = u16[iv] | (u16[iv + 1] << 16);
    const second = u16[iv + 2] | (u16[iv + 3] << 16);
    this.#job(at, job, first, second, body, plain);
    return Verdict.ok;
  }

  #finishDecrypt(
    packets: Uint32Array,
    group: number,
    count: number,
    nextHeaders: Uint8Array,
    verdicts: Uint8Array,
  ): void {
    // hot:
    const jobs = this.#jobs;
    const pool = this.#pool;
    const { u8 } = pool;
    const { transform, engine, extended } = this.#groups[group];
    jobs.count = count;
    jobs.aadLength = extended ? 12 : 8;
    engine.decrypt(transform, jobs);
    for (let j = 0; j < count; j++) {
      const i = this.#position[j];
      const p = packets[i];
      const status = jobs.status[j];
      if (status !== JobStatus.ok) {
        pool.length[p] = 0;
        verdicts[i] = status === JobStatus.icv ? Verdict.icv : Verdict.engine;
        continue;
      }
      const body = jobs.cipherOffset[j];
      const trailer = body + jobs.cipherLength[j] - Esp.trailerLength;
      const padLength = u8[trailer];
      const end = trailer - padLength;
      let pad = end < body ? 0 : padLength;
      while (pad > 0 && u8[end + pad - 1] === pad) pad--;
      if (end < body || pad !== 0) {
        verdicts[i] = Verdict.malformed;
        continue;
      }
      nextHeaders[i] = u8[trailer + 1];
      pool.length[p] = end - pool.offset[p];
      rewriteLength(u8, this.#ip[j], end - this.#ip[j]);
      this.#packets[this.#owner[j]]++;
    }
  }

  /** What encryption and decryption have in common: nonce, AAD, ranges. */
  #job(at: number, job: number, first: number, second: number, body: number, plain: number): void {
    // hot:
    const words = this.#words;
    const jobs = this.#jobs;
    const { u16 } = this.#pool;
    const e = this.#esp[job] >> 1;
    const spi = u16[e] | (u16[e + 1] << 16);
    const sequence = u16[e + 2] | (u16[e + 3] << 16);
    const kind = words[at + Word.kind];
    const extended = (kind & Kind.extended) !== 0;
    const high = extended
      ? statelessHigh(swapBytes(sequence) >>> 0, words[at + Word.esn] >>> 0, (kind & Kind.newWindow) !== 0)
      : 0;
    setNonce(jobs, job, 0, words[at + Word.salt], first, second);
    setAad(jobs, job, spi, sequence, high, extended);
    jobs.context[job] = words[at + Word.context];
    jobs.cipherOffset[job] = body;
    jobs.cipherLength[job] = plain;
    jobs.icvOffset[job] = body + plain;
  }

  /** Finds the ESP header of packet `p` for `job`, and cuts off what the link has padded. */
  #locate(p: number, linkHeader: number, job: number, received: boolean): number {
    // hot:
    const pool = this.#pool;
    const { u8 } = pool;
    if (pool.next[p] !== NO_PACKET) return Verdict.noRoom;
    const start = (pool.offset[p] & 1) === 0 ? pool.offset[p] : align(pool, p);
    const ip = (start + linkHeader) | 0;
    const available = (pool.length[p] - linkHeader) | 0;
    if (available < Ipv4.minLength) return Verdict.notIpsec;
    const version = u8[ip] >>> 4;
    if (linkHeader >= LINK_WITH_TYPE) {
      const type = (u8[ip - 2] << 8) | u8[ip - 1];
      if (type !== (version === 4 ? EtherType.ipv4 : EtherType.ipv6)) return Verdict.notIpsec;
    }
    const chain = this.#chain;
    let total = 0;
    if (version === 4) {
      const headerLength = (u8[ip] & 15) << 2;
      total = (u8[ip + Ipv4.totalLength] << 8) | u8[ip + Ipv4.totalLength + 1];
      if (u8[ip + Ipv4.protocol] !== IpProtocol.esp) return Verdict.notIpsec;
      if (headerLength < Ipv4.minLength || total < headerLength || total > available) return Verdict.malformed;
      if (received && finish(addBytes(u8, ip, headerLength, 0)) !== 0) return Verdict.malformed;
      if (insertionPoint(u8, ip, ip + total, chain) !== Verdict.ok) return Verdict.fragment;
    } else {
      if (version !== 6 || available < Ipv6.length) return Verdict.notIpsec;
      total = Ipv6.length + ((u8[ip + Ipv6.payloadLength] << 8) | u8[ip + Ipv6.payloadLength + 1]);
      if (total > available || walkIpv6(u8, ip, ip + total, false, chain) !== Verdict.ok) return Verdict.malformed;
      if (chain[Chain.protocol] !== IpProtocol.esp) return Verdict.notIpsec;
      if (chain[Chain.fragment] !== 0) return Verdict.fragment;
    }
    const esp = chain[Chain.offset] | 0;
    if (esp + Esp.length + IV_LENGTH > ip + total) return Verdict.malformed;
    pool.length[p] = linkHeader + total;
    this.#ip[job] = ip;
    this.#esp[job] = esp;
    return Verdict.ok;
  }

  /** hot: the first word of a context of that kind; 0 for none. */
  #record(context: number, kind: number): number {
    const at = context < this.#contexts ? context * RECORD : 0;
    return (this.#words[at] & kind) === 0 ? 0 : at;
  }

  #check(
    packets: Uint32Array,
    contexts: Uint32Array,
    nextHeaders: Uint8Array,
    n: number,
    linkHeader: number,
    verdicts: Uint8Array,
  ): void {
    // hot:
    if (this.#closed) throw new IpsecError('CLOSED', 'this InlineCrypto is closed');
    const room = Math.min(packets.length, contexts.length, nextHeaders.length, verdicts.length, MAX_POSITIONS);
    if (n < 0 || n > room) throw new RangeError(`a burst of ${n} does not fit`);
    if ((linkHeader & 1) !== 0 || linkHeader < 0 || linkHeader > 64) {
      throw new RangeError(`a link header of ${linkHeader} bytes: an even number from 0 to 64 is needed`);
    }
  }

  #setExtended(at: number, { esn, newWindow }: EsnState): void {
    const words = this.#words;
    words[at + Word.esn] = esn;
    const kind = words[at + Word.kind] & ~Kind.newWindow;
    words[at + Word.kind] = kind | Kind.extended | (newWindow ? Kind.newWindow : 0);
  }

  #at(context: number): number {
    const at = Number.isInteger(context) && context > 0 && context < this.#contexts ? context * RECORD : 0;
    if (this.#words[at] === 0) throw new IpsecError('NO_SUCH_SA', `there is no context ${context}`);
    return at;
  }

  #group(transform: Transform, encrypt: boolean, extended: boolean): number {
    const known = this.#groups.findIndex(
      (one) => one.transform === transform && one.encrypt === encrypt && one.extended === extended,
    );
    if (known >= 0) return known;
    const engine = this.#engines.select(transform);
    return this.#groups.push({ transform, engine, encrypt, extended }) - 1;
  }

  #grow(): void {
    const words = new Int32Array(this.#words.length * 2);
    words.set(this.#words);
    this.#words.fill(0);
    this.#words = words;
    const packets = new Float64Array(this.#packets.length * 2);
    packets.set(this.#packets);
    this.#packets = packets;
  }
}

/** Length of the shortest link header that ends in an EtherType. */
const LINK_WITH_TYPE = 14;

/** Positions in a burst are 16-bit numbers. */
const MAX_POSITIONS = 65536;

/** Makes the IP header at `ip` say that the packet has `total` bytes; the protocol stays. */
function rewriteLength(u8: Uint8Array, ip: number, total: number): void {
  // hot:
  const v6 = u8[ip] >>> 4 === 6;
  const nextHeaderAt = ip + (v6 ? Ipv6.nextHeader : Ipv4.protocol);
  rewriteHeader(u8, ip, total, nextHeaderAt, (u8[ip] & 15) << 2, u8[nextHeaderAt]);
}
