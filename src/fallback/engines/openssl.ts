/**
 * The engine that is always there on Node: OpenSSL's EVP interface through FFI.
 *
 * Each context keeps its initialised EVP objects; a packet only sets the nonce (`EVP_*Init_ex2` without cipher and key) or
 * starts the MAC again (`EVP_MAC_init` without key). Calls a packet: AES-GCM and ChaCha20-Poly1305 5 to encrypt and 4 to
 * decrypt, CCM the same, GMAC 4 and 3, a cipher 2, a MAC 3. OpenSSL allocates nothing per packet; V8
 * boxes the addresses that are passed, 80 to 100 bytes of short-lived garbage a packet.
 *
 * AES-XCBC-MAC is not in OpenSSL; it is AES-CBC with a zero IV whose last block is mixed with a derived key (RFC 3566).
 */
import type { MappedMemory } from '../../sys/memory.ts';
import {
  ContextNumbers,
  checkKeys,
  copyIcv,
  differs,
  EngineUsageError,
  fittingRun,
  grown,
  type JobRules,
  jobRules,
  keyBytes,
} from './checks.ts';
import {
  BurstOffset,
  type CryptoBurst,
  type CryptoEngine,
  JobStatus,
  type Transform,
  type TransformKeys,
} from './engine.ts';
import { high, low } from './native-memory.ts';
import { type Evp, evp, paramDataWord, writeParam } from './openssl-evp.ts';
import { OpensslObjects, Scratch, SINK_SIZE } from './openssl-objects.ts';

interface Shape extends JobRules {
  readonly transform: Transform;
  readonly encrypting: boolean;
  readonly ccm: boolean;
  readonly xcbc: boolean;
}

interface Shapes {
  readonly encrypt: Shape;
  readonly decrypt: Shape;
}

/** AES block, bytes. */
const BLOCK = 16;
/** Room for a MAC in the scratch: at least that of SHA-512. */
const MAC_SIZE = 64;
/** Where the tag parameter points. */
const TAG_WORD = paramDataWord(Scratch.tagParam);
/** Words of K2 and K3 of XCBC. */
const SUBKEY_WORDS = 4;

export class OpensslEngine implements CryptoEngine {
  readonly name = 'openssl';
  readonly version: string;
  readonly #evp: Evp;
  readonly #objects: OpensslObjects;
  readonly #memory: MappedMemory;
  readonly #scratch: MappedMemory;
  readonly #shapes = new Map<Transform, Shapes>();
  /** Shapes by their index. */
  readonly #kinds = new Map<number, Shape>();
  #tagLength = 0;
  readonly #contexts = new ContextNumbers();
  /** Addresses of the EVP_CIPHER_CTX and the EVP_MAC_CTX of each context; 0 is none. XCBC has a cipher for its MAC. */
  #ciphers = new Float64Array(64);
  #macs = new Float64Array(64);
  /** XCBC: K2, then K3, of each context. */
  readonly #subkeys: (Uint32Array | undefined)[] = [];
  #lastEncrypt: Shape | undefined;
  #lastDecrypt: Shape | undefined;
  #closed = false;

  /** Throws `EngineError`. */
  constructor(memory: MappedMemory) {
    this.#evp = evp();
    this.version = this.#evp.version;
    this.#memory = memory;
    this.#objects = new OpensslObjects(this.#evp);
    this.#scratch = this.#objects.scratch;
  }

  supports(transform: Transform): boolean {
    return !this.#closed && this.#objects.supports(transform);
  }

  createContext(transform: Transform, keys: TransformKeys, direction: 'encrypt' | 'decrypt'): number {
    if (this.#closed) throw new EngineUsageError('the engine is closed');
    if (!this.supports(transform)) throw new EngineUsageError(`${this.version} has no ${transform.id}`);
    checkKeys(transform, keys);
    let cipher = 0;
    let mac = 0;
    let subkeys: Uint32Array | undefined;
    try {
      cipher = this.#objects.cipherContext(transform, keys.cipherKey, direction);
      if (transform.auth === 'aes-xcbc') subkeys = this.#xcbcSubkeys(keys.authKey);
      mac = this.#objects.macContext(transform, keys.authKey);
    } catch (error) {
      if (cipher !== 0) this.#evp.freeContext(cipher);
      subkeys?.fill(0);
      throw error;
    }
    const context = this.#contexts.take(this.#shapesOf(transform)[direction].index);
    if (this.#contexts.capacity > this.#ciphers.length) {
      this.#ciphers = grown(this.#ciphers, this.#contexts.capacity);
      this.#macs = grown(this.#macs, this.#contexts.capacity);
    }
    this.#ciphers[context] = cipher;
    this.#macs[context] = mac;
    this.#subkeys[context] = subkeys;
    return context;
  }

  destroyContext(context: number): void {
    const kind = this.#contexts.kindOf(context);
    this.#contexts.give(context);
    const cipher = this.#ciphers[context];
    const mac = this.#macs[context];
    const xcbc = this.#kinds.get(kind)?.xcbc === true;
    // Freeing cleanses the keys inside.
    if (cipher !== 0) this.#evp.freeContext(cipher);
    if (mac !== 0 && xcbc) this.#evp.freeContext(mac);
    else if (mac !== 0) this.#evp.freeMacContext(mac);
    this.#subkeys[context]?.fill(0);
    this.#subkeys[context] = undefined;
    this.#ciphers[context] = 0;
    this.#macs[context] = 0;
  }

  encrypt(transform: Transform, burst: CryptoBurst): void {
    // hot:
    let shape = this.#lastEncrypt;
    if (shape === undefined || shape.transform !== transform) {
      shape = this.#shapesOf(transform).encrypt;
      this.#lastEncrypt = shape;
    }
    this.#run(shape, burst);
  }

  decrypt(transform: Transform, burst: CryptoBurst): void {
    // hot:
    let shape = this.#lastDecrypt;
    if (shape === undefined || shape.transform !== transform) {
      shape = this.#shapesOf(transform).decrypt;
      this.#lastDecrypt = shape;
    }
    this.#run(shape, burst);
  }

  close(): void {
    if (this.#closed) return;
    for (const context of [...this.#contexts.taken()]) this.destroyContext(context);
    this.#closed = true;
    this.#objects.close();
  }

  #xcbcSubkeys(key: Uint8Array): Uint32Array {
    const bytes = keyBytes(new Uint8Array(8 * SUBKEY_WORDS));
    for (const byte of [2, 3]) {
      const derived = this.#objects.derive(key, byte);
      bytes.set(derived, (byte - 2) * BLOCK);
      derived.fill(0);
    }
    return new Uint32Array(bytes.buffer);
  }

  #shapesOf(transform: Transform): Shapes {
    let shapes = this.#shapes.get(transform);
    if (shapes === undefined) {
      const first = 2 * this.#shapes.size + 1;
      const make = (encrypting: boolean, index: number): Shape => {
        const shape = {
          ...jobRules(transform, index),
          transform,
          encrypting,
          ccm: transform.cipher === 'aes-ccm',
          xcbc: transform.auth === 'aes-xcbc',
        };
        this.#kinds.set(index, shape);
        return shape;
      };
      shapes = { encrypt: make(true, first), decrypt: make(false, first + 1) };
      this.#shapes.set(transform, shapes);
    }
    return shapes;
  }

  #run(shape: Shape, burst: CryptoBurst): void {
    // hot:
    const { count, status, aadLength } = burst;
    const usable = aadLength <= BLOCK && !this.#closed;
    if (usable) this.#prepareTag(shape);
    let start = 0;
    while (start < count) {
      const end = usable
        ? fittingRun(burst, start, count, shape, this.#contexts.membersOf(shape.index), this.#memory.size)
        : start;
      if (end > start) this.#jobs(shape, burst, start, end);
      if (end < count) status[end] = JobStatus.failed;
      start = end + 1;
    }
  }

  #jobs(shape: Shape, burst: CryptoBurst, start: number, end: number): void {
    // hot:
    const { status } = burst;
    const { transform, encrypting } = shape;
    if (transform.family === 'aead') {
      if (encrypting) for (let i = start; i < end; i++) status[i] = this.#seal(shape, burst, i);
      else for (let i = start; i < end; i++) status[i] = this.#open(shape, burst, i);
    } else if (transform.family === 'gmac') {
      if (encrypting) for (let i = start; i < end; i++) status[i] = this.#gmac(burst, i);
      else for (let i = start; i < end; i++) status[i] = this.#checkGmac(burst, i);
    } else if (encrypting) {
      for (let i = start; i < end; i++) status[i] = this.#encryptThenMac(shape, burst, i);
    } else {
      for (let i = start; i < end; i++) status[i] = this.#checkThenDecrypt(shape, burst, i);
    }
  }

  /** The OSSL_PARAM through which tags are read and given: their length is that of the transform. */
  #prepareTag(shape: Shape): void {
    // hot:
    if (shape.icvLength === this.#tagLength) return;
    this.#tagLength = shape.icvLength;
    writeParam(this.#scratch, Scratch.tagParam, this.#scratch.address + Scratch.tagName, 'bytes', 0, shape.icvLength);
  }

  /** Points the tag parameter at the ICV of job `i`; returns its address. */
  #tagAt(burst: CryptoBurst, i: number): number {
    // hot:
    const address = this.#memory.address + burst.icvOffset[i];
    const words = this.#scratch.u32;
    words[TAG_WORD] = low(address);
    words[TAG_WORD + 1] = high(address);
    return this.#scratch.address + Scratch.tagParam;
  }

  #seal(shape: Shape, burst: CryptoBurst, i: number): number {
    // hot:
    const { encryptInit, encryptUpdate, encryptFinal, getParams } = this.#evp;
    const context = this.#ciphers[burst.context[i]];
    const native = burst.memory.address;
    const outLength = this.#scratch.address;
    const text = this.#memory.address + burst.cipherOffset[i];
    const length = burst.cipherLength[i];
    if (encryptInit(context, 0, 0, native + BurstOffset.iv + 16 * i, 0) !== 1) return JobStatus.failed;
    if (shape.ccm && encryptUpdate(context, 0, outLength, 0, length) !== 1) return JobStatus.failed;
    if (
      burst.aadLength > 0 &&
      encryptUpdate(context, 0, outLength, native + BurstOffset.aad + 16 * i, burst.aadLength) !== 1
    ) {
      return JobStatus.failed;
    }
    if ((length > 0 || shape.ccm) && encryptUpdate(context, text, outLength, text, length) !== 1)
      return JobStatus.failed;
    if (!shape.ccm && encryptFinal(context, text, outLength) !== 1) return JobStatus.failed;
    return getParams(context, this.#tagAt(burst, i)) === 1 ? JobStatus.ok : JobStatus.failed;
  }

  /** The tag is compared inside of OpenSSL, in constant time: at the end, with CCM before the text is given out. */
  #open(shape: Shape, burst: CryptoBurst, i: number): number {
    // hot:
    const { decryptInit, decryptUpdate, decryptFinal } = this.#evp;
    const context = this.#ciphers[burst.context[i]];
    const native = burst.memory.address;
    const outLength = this.#scratch.address;
    const text = this.#memory.address + burst.cipherOffset[i];
    const length = burst.cipherLength[i];
    const tag = this.#tagAt(burst, i);
    if (decryptInit(context, 0, 0, native + BurstOffset.iv + 16 * i, tag) !== 1) return JobStatus.failed;
    if (shape.ccm && decryptUpdate(context, 0, outLength, 0, length) !== 1) return JobStatus.failed;
    if (
      burst.aadLength > 0 &&
      decryptUpdate(context, 0, outLength, native + BurstOffset.aad + 16 * i, burst.aadLength) !== 1
    ) {
      return JobStatus.failed;
    }
    if (shape.ccm) return decryptUpdate(context, text, outLength, text, length) === 1 ? JobStatus.ok : JobStatus.icv;
    if (length > 0 && decryptUpdate(context, text, outLength, text, length) !== 1) return JobStatus.failed;
    return decryptFinal(context, text, outLength) === 1 ? JobStatus.ok : JobStatus.icv;
  }

  #gmac(burst: CryptoBurst, i: number): number {
    // hot:
    const { encryptInit, encryptUpdate, encryptFinal, getParams } = this.#evp;
    const context = this.#ciphers[burst.context[i]];
    const outLength = this.#scratch.address;
    const message = this.#memory.address + burst.authOffset[i];
    const iv = burst.memory.address + BurstOffset.iv + 16 * i;
    const done =
      encryptInit(context, 0, 0, iv, 0) === 1 &&
      encryptUpdate(context, 0, outLength, message, burst.authLength[i]) === 1 &&
      encryptFinal(context, message, outLength) === 1 &&
      getParams(context, this.#tagAt(burst, i)) === 1;
    return done ? JobStatus.ok : JobStatus.failed;
  }

  #checkGmac(burst: CryptoBurst, i: number): number {
    // hot:
    const { decryptInit, decryptUpdate, decryptFinal } = this.#evp;
    const context = this.#ciphers[burst.context[i]];
    const outLength = this.#scratch.address;
    const message = this.#memory.address + burst.authOffset[i];
    const iv = burst.memory.address + BurstOffset.iv + 16 * i;
    if (decryptInit(context, 0, 0, iv, this.#tagAt(burst, i)) !== 1) return JobStatus.failed;
    if (decryptUpdate(context, 0, outLength, message, burst.authLength[i]) !== 1) return JobStatus.failed;
    return decryptFinal(context, message, outLength) === 1 ? JobStatus.ok : JobStatus.icv;
  }

  #encryptThenMac(shape: Shape, burst: CryptoBurst, i: number): number {
    // hot:
    const { encryptInit, encryptUpdate } = this.#evp;
    const context = this.#ciphers[burst.context[i]];
    if (context !== 0 && shape.usesCipher) {
      const text = this.#memory.address + burst.cipherOffset[i];
      const iv = burst.memory.address + BurstOffset.iv + 16 * i;
      if (encryptInit(context, 0, 0, iv, 0) !== 1) return JobStatus.failed;
      if (encryptUpdate(context, text, this.#scratch.address, text, burst.cipherLength[i]) !== 1)
        return JobStatus.failed;
    }
    if (!this.#mac(shape, burst, i)) return JobStatus.failed;
    const { u8, u16, u32 } = this.#memory;
    const { scratch } = this.#objects;
    copyIcv(u8, u16, u32, burst.icvOffset[i], scratch.u8, scratch.u16, scratch.u32, Scratch.mac, shape.icvLength);
    return JobStatus.ok;
  }

  #checkThenDecrypt(shape: Shape, burst: CryptoBurst, i: number): number {
    // hot:
    const { decryptInit, decryptUpdate } = this.#evp;
    if (!this.#mac(shape, burst, i)) return JobStatus.failed;
    const { u8, u16, u32 } = this.#memory;
    const { scratch } = this.#objects;
    const icv = burst.icvOffset[i];
    if (differs(u8, u16, u32, icv, scratch.u8, scratch.u16, scratch.u32, Scratch.mac, shape.icvLength) !== 0) {
      return JobStatus.icv;
    }
    const context = this.#ciphers[burst.context[i]];
    if (context === 0 || !shape.usesCipher) return JobStatus.ok;
    const text = this.#memory.address + burst.cipherOffset[i];
    const iv = burst.memory.address + BurstOffset.iv + 16 * i;
    if (decryptInit(context, 0, 0, iv, 0) !== 1) return JobStatus.failed;
    const done = decryptUpdate(context, text, this.#scratch.address, text, burst.cipherLength[i]) === 1;
    return done ? JobStatus.ok : JobStatus.failed;
  }

  /** Computes the MAC over the auth range of job `i` into the scratch. */
  #mac(shape: Shape, burst: CryptoBurst, i: number): boolean {
    // hot:
    const context = this.#macs[burst.context[i]];
    if (shape.xcbc)
      return this.#xcbc(context, this.#subkeys[burst.context[i]], burst.authOffset[i], burst.authLength[i]);
    const { macInit, macUpdate, macFinal } = this.#evp;
    const scratch = this.#scratch.address;
    return (
      macInit(context, 0, 0, 0) === 1 &&
      macUpdate(context, this.#memory.address + burst.authOffset[i], burst.authLength[i]) === 1 &&
      macFinal(context, scratch + Scratch.mac, scratch + Scratch.outLength, MAC_SIZE) === 1
    );
  }

  /** RFC 3566, section 4: CBC with K1; the last block is mixed with K2 when it is whole, else padded and mixed with K3. */
  #xcbc(context: number, subkeys: Uint32Array | undefined, offset: number, length: number): boolean {
    // hot:
    if (subkeys === undefined) return false;
    const { encryptInit, encryptUpdate } = this.#evp;
    const scratch = this.#scratch.address;
    if (encryptInit(context, 0, 0, scratch + Scratch.zeroIv, 0) !== 1) return false;
    const whole = (length & (BLOCK - 1)) === 0;
    const before = length - (whole ? BLOCK : length & (BLOCK - 1));
    const sink = scratch + Scratch.sink;
    for (let at = 0; at < before; at += SINK_SIZE) {
      const part = Math.min(before - at, SINK_SIZE);
      const data = this.#memory.address + offset + at;
      if (encryptUpdate(context, sink, scratch + Scratch.outLength, data, part) !== 1) return false;
    }
    const bytes = this.#memory.u8;
    const last = this.#scratch.u8;
    for (let k = 0; k < BLOCK; k++) last[Scratch.lastBlock + k] = before + k < length ? bytes[offset + before + k] : 0;
    if (!whole) last[Scratch.lastBlock + length - before] = 0x80;
    const words = this.#scratch.u32;
    const subkey = whole ? 0 : SUBKEY_WORDS;
    for (let k = 0; k < SUBKEY_WORDS; k++) words[(Scratch.lastBlock >> 2) + k] ^= subkeys[subkey + k];
    const block = scratch + Scratch.lastBlock;
    return encryptUpdate(context, scratch + Scratch.mac, scratch + Scratch.outLength, block, BLOCK) === 1;
  }
}
