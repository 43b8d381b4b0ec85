/**
 * The contexts of inline crypto (`inline-crypto.ts`): keys, extended sequence numbers, and the count of IVs, which never goes back.
 */
import { IpsecError } from '../errors.ts';
import type { EngineSource } from './engine-source.ts';
import type { CryptoEngine, Transform } from './engines/engine.ts';
import { transformById } from './engines/transform.ts';

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

/** Words per context, and what they are. */
const RECORD = 8;
export const Word = { kind: 0, context: 1, group: 2, salt: 3, esn: 4, ivLow: 5, ivHigh: 6, icv: 7 } as const;
export const Kind = { encrypt: 1, decrypt: 2, extended: 4, newWindow: 8, exhausted: 16 } as const;

/** What may go down to the engine in one call. */
export interface InlineGroup {
  readonly transform: Transform;
  readonly engine: CryptoEngine;
  readonly encrypt: boolean;
  readonly extended: boolean;
}

export class InlineContexts {
  readonly #engines: EngineSource;
  readonly groups: InlineGroup[] = [];
  /** `RECORD` words per context; a new array when it grows: read it anew for every burst. */
  words = new Int32Array(64 * RECORD);
  /** Packets that were done, by context. */
  packets = new Float64Array(64);
  #contexts = 1;
  readonly #free: number[] = [];

  constructor(engines: EngineSource) {
    this.#engines = engines;
  }

  /**
   * Makes a context and returns its number, 1 or more. IVs begin with 0. Throws IpsecError `TRANSFORM_UNKNOWN`, `TRANSFORM_UNSUPPORTED`.
   */
  create(parameters: InlineCryptoParameters): number {
    const { direction, key, salt, icvLength, extended } = parameters;
    const id = `aes-${key.length * 8}-gcm-${icvLength}`;
    const transform = transformById(id);
    if (transform === undefined || salt.length !== 4) {
      throw new IpsecError('TRANSFORM_UNKNOWN', `no transform ${id} with ${salt.length} bytes of salt`);
    }
    const group = this.#group(transform, direction === 'encrypt', extended !== null);
    const { engine } = this.groups[group];
    const context = engine.createContext(transform, { cipherKey: key, authKey: new Uint8Array(0) }, direction);
    const number = this.#free.pop() ?? this.#contexts++;
    if (number * RECORD >= this.words.length) this.#grow();
    const at = number * RECORD;
    const words = this.words;
    words[at + Word.kind] = Kind[direction];
    words[at + Word.context] = context;
    words[at + Word.group] = group;
    words[at + Word.salt] = salt[0] | (salt[1] << 8) | (salt[2] << 16) | (salt[3] << 24);
    words[at + Word.icv] = icvLength;
    this.packets[number] = 0;
    if (extended !== null) this.#setExtended(at, extended);
    return number;
  }

  /** From the next packet on numbers are extended as `state` says. Throws IpsecError `NO_SUCH_SA`, `ESN_OFF`. */
  setEsn(context: number, state: EsnState): void {
    const at = this.#at(context);
    if ((this.words[at] & Kind.extended) === 0) {
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
    this.words[at + Word.ivLow] = Number(BigInt.asIntN(32, iv));
    this.words[at + Word.ivHigh] = Number(BigInt.asIntN(32, iv >> 32n));
  }

  /** Throws IpsecError `NO_SUCH_SA`. */
  counters(context: number): InlineCryptoCounters {
    const at = this.#at(context);
    const words = this.words;
    const low = BigInt(words[at + Word.ivLow] >>> 0);
    const high = BigInt(words[at + Word.ivHigh] >>> 0);
    const exhausted = (words[at + Word.kind] & Kind.exhausted) !== 0;
    return { packets: BigInt(this.packets[context]), iv: exhausted ? 1n << 64n : (high << 32n) | low };
  }

  /** Ends a context and wipes its key. Throws IpsecError `NO_SUCH_SA`. */
  destroy(context: number): void {
    const at = this.#at(context);
    this.groups[this.words[at + Word.group]].engine.destroyContext(this.words[at + Word.context]);
    this.words.fill(0, at, at + RECORD);
    this.#free.push(context);
  }

  /** Ends all contexts and wipes what is left of them. */
  close(): void {
    for (let one = 1; one < this.#contexts; one++) if (this.words[one * RECORD] !== 0) this.destroy(one);
    this.words.fill(0);
  }

  /** hot: the first word of a context of that kind; 0 for none. */
  record(context: number, kind: number): number {
    const at = context < this.#contexts ? context * RECORD : 0;
    return (this.words[at] & kind) === 0 ? 0 : at;
  }

  #setExtended(at: number, { esn, newWindow }: EsnState): void {
    const words = this.words;
    words[at + Word.esn] = esn;
    const kind = words[at + Word.kind] & ~Kind.newWindow;
    words[at + Word.kind] = kind | Kind.extended | (newWindow ? Kind.newWindow : 0);
  }

  #at(context: number): number {
    const at = Number.isInteger(context) && context > 0 && context < this.#contexts ? context * RECORD : 0;
    if (this.words[at] === 0) throw new IpsecError('NO_SUCH_SA', `there is no context ${context}`);
    return at;
  }

  #group(transform: Transform, encrypt: boolean, extended: boolean): number {
    const known = this.groups.findIndex(
      (one) => one.transform === transform && one.encrypt === encrypt && one.extended === extended,
    );
    if (known >= 0) return known;
    const engine = this.#engines.select(transform);
    return this.groups.push({ transform, engine, encrypt, extended }) - 1;
  }

  #grow(): void {
    const words = new Int32Array(this.words.length * 2);
    words.set(this.words);
    this.words.fill(0);
    this.words = words;
    const packets = new Float64Array(this.packets.length * 2);
    packets.set(this.packets);
    this.packets = packets;
  }
}
