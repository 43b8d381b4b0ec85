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
import { CryptoBurst, JobStatus, MAX_BURST } from './engines/engine.ts';
import { Chain, insertionPoint, walkIpv6 } from './extension-headers.ts';
import {
  type EsnState,
  InlineContexts,
  type InlineCryptoCounters,
  type InlineCryptoParameters,
  Kind,
  Word,
} from './inline-contexts.ts';
import { setAad, setNonce, swapBytes } from './jobs.ts';
import { MaxPacket } from './pmtu.ts';
import { statelessHigh } from './sequence.ts';
import { rewriteHeader } from './transport.ts';
import { Verdict } from './verdict.ts';

export type { EsnState, InlineCryptoCounters, InlineCryptoParameters } from './inline-contexts.ts';

/** Bytes of the IV field (RFC 4106, 3.1), and what the plain text is padded to (RFC 4303, 2.4). */
const IV_LENGTH = 8;
const PAD_MASK = 3;

export interface InlineCryptoOptions {
  /** Default `auto`. */
  readonly engine?: EngineOption;
}

export class InlineCrypto {
  readonly #pool: PacketPool;
  readonly #engines: EngineSource;
  readonly #jobs = new CryptoBurst();
  readonly #contexts: InlineContexts;
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
    this.#contexts = new InlineContexts(this.#engines);
  }

  /**
   * Makes a context and returns its number, 1 or more. IVs begin with 0. Throws IpsecError `TRANSFORM_UNKNOWN`, `TRANSFORM_UNSUPPORTED`,
   * `CLOSED`. That no other context or SA encrypts with the key and salt is the caller's to see to (`ipsec/nonce-guard.ts`).
   */
  create(parameters: InlineCryptoParameters): number {
    if (this.#closed) throw new IpsecError('CLOSED', 'this InlineCrypto is closed');
    return this.#contexts.create(parameters);
  }

  /** From the next packet on numbers are extended as `state` says. Throws IpsecError `NO_SUCH_SA`, `ESN_OFF`. */
  setEsn(context: number, state: EsnState): void {
    this.#contexts.setEsn(context, state);
  }

  /** The IVs before `iv` count as used: another has had them. Never goes back. Throws IpsecError `NO_SUCH_SA`, `NONCE_REUSE`. */
  skipIvs(context: number, iv: bigint): void {
    this.#contexts.skipIvs(context, iv);
  }

  /** Throws IpsecError `NO_SUCH_SA`. */
  counters(context: number): InlineCryptoCounters {
    return this.#contexts.counters(context);
  }

  /** Ends a context and wipes its key. Throws IpsecError `NO_SUCH_SA`. */
  destroy(context: number): void {
    this.#contexts.destroy(context);
  }

  /** Wipes all keys. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#contexts.close();
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
    this.#run(Kind.encrypt, packets, contexts, nextHeaders, n, linkHeader, verdicts);
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
    this.#run(Kind.decrypt, packets, contexts, nextHeaders, n, linkHeader, verdicts);
  }

  /** Takes the packets in runs of one group: prepares a job for each, then does all of them in one call. */
  #run(
    kind: number,
    packets: Uint32Array,
    contexts: Uint32Array,
    nextHeaders: Uint8Array,
    n: number,
    linkHeader: number,
    verdicts: Uint8Array,
  ): void {
    // hot:
    this.#check(packets, contexts, nextHeaders, n, linkHeader, verdicts);
    const { words } = this.#contexts;
    let group = -1;
    let jobs = 0;
    for (let i = 0; i < n; i++) {
      const at = this.#contexts.record(contexts[i], kind);
      if (at === 0) {
        verdicts[i] = Verdict.noSa;
        continue;
      }
      const own = words[at + Word.group];
      if (jobs !== 0 && (own !== group || jobs === MAX_BURST)) {
        this.#finish(packets, group, jobs, nextHeaders, verdicts);
        jobs = 0;
      }
      group = own;
      const verdict =
        kind === Kind.encrypt
          ? this.#prepareEncrypt(packets[i], at, jobs, nextHeaders[i], linkHeader)
          : this.#prepareDecrypt(packets[i], at, jobs, linkHeader);
      verdicts[i] = verdict;
      if (verdict !== Verdict.ok) continue;
      this.#owner[jobs] = contexts[i];
      this.#position[jobs++] = i;
    }
    if (jobs !== 0) this.#finish(packets, group, jobs, nextHeaders, verdicts);
  }

  #prepareEncrypt(p: number, at: number, job: number, nextHeader: number, linkHeader: number): number {
    // hot:
    const pool = this.#pool;
    const { words } = this.#contexts;
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

  #prepareDecrypt(p: number, at: number, job: number, linkHeader: number): number {
    // hot:
    const pool = this.#pool;
    const verdict = this.#locate(p, linkHeader, job, true);
    if (verdict !== Verdict.ok) return verdict;
    const body = (this.#esp[job] + Esp.length + IV_LENGTH) | 0;
    const icv = (pool.offset[p] + pool.length[p] - this.#contexts.words[at + Word.icv]) | 0;
    const plain = (icv - body) | 0;
    if (plain < Esp.trailerLength || (plain & PAD_MASK) !== 0) return Verdict.malformed;
    const iv = (body - IV_LENGTH) >> 1;
    const { u16 } = pool;
    const first = u16[iv] | (u16[iv + 1] << 16);
    const second = u16[iv + 2] | (u16[iv + 3] << 16);
    this.#job(at, job, first, second, body, plain);
    return Verdict.ok;
  }

  /** Does the jobs of a run; what failed has no content any more. */
  #finish(packets: Uint32Array, group: number, count: number, nextHeaders: Uint8Array, verdicts: Uint8Array): void {
    // hot:
    const jobs = this.#jobs;
    const counted = this.#contexts.packets;
    const { transform, engine, encrypt, extended } = this.#contexts.groups[group];
    jobs.count = count;
    jobs.aadLength = extended ? 12 : 8;
    if (encrypt) engine.encrypt(transform, jobs);
    else engine.decrypt(transform, jobs);
    for (let j = 0; j < count; j++) {
      const i = this.#position[j];
      const p = packets[i];
      const status = jobs.status[j];
      if (status !== JobStatus.ok) {
        // It may still be plain text, or not be authentic: nothing of it must be left.
        this.#pool.length[p] = 0;
        verdicts[i] = status === JobStatus.icv ? Verdict.icv : Verdict.engine;
      } else if (encrypt || this.#open(p, i, j, nextHeaders)) counted[this.#owner[j]]++;
      else verdicts[i] = Verdict.malformed;
    }
  }

  /** Takes the trailer off the decrypted packet `p` of job `j`; false when its padding is none. */
  #open(p: number, i: number, j: number, nextHeaders: Uint8Array): boolean {
    // hot:
    const pool = this.#pool;
    const { u8 } = pool;
    const body = this.#jobs.cipherOffset[j];
    const trailer = body + this.#jobs.cipherLength[j] - Esp.trailerLength;
    const padLength = u8[trailer];
    const end = trailer - padLength;
    if (end < body) return false;
    for (let pad = padLength; pad > 0; pad--) if (u8[end + pad - 1] !== pad) return false;
    nextHeaders[i] = u8[trailer + 1];
    pool.length[p] = end - pool.offset[p];
    rewriteLength(u8, this.#ip[j], end - this.#ip[j]);
    return true;
  }

  /** What encryption and decryption have in common: nonce, AAD, ranges. */
  #job(at: number, job: number, first: number, second: number, body: number, plain: number): void {
    // hot:
    const { words } = this.#contexts;
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
