/**
 * The portable engine: @noble/ciphers and @noble/hashes, plain JavaScript on any machine, and the reference that the native
 * engines are compared with. 50 to 500 times slower than they are; it allocates per packet, and its AES is not free of
 * cache-timing effects.
 *
 * noble makes key schedules in JavaScript memory for each packet; it clears them, but the collector may have copied them.
 *
 * An ICV is checked by computing it again over what was decrypted, which is how one way serves every ICV length.
 * Left out: 3DES, which noble does not have.
 */
import type { MappedMemory } from '../../sys/memory.ts';
import {
  ContextNumbers,
  checkKeys,
  differs,
  EngineUsageError,
  fittingRun,
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
import { type Bytes, CIPHER, gmac, MAC, SEAL } from './noble-modes.ts';
import { MAX_ICV } from './transform.ts';

interface Shapes {
  readonly encrypt: JobRules;
  readonly decrypt: JobRules;
}

interface Keys {
  readonly cipherKey: Bytes;
  readonly authKey: Bytes;
}

function ivLengthOf({ family, cipher }: Transform): number {
  if (family === 'aead') return cipher === 'aes-ccm' ? 11 : 12;
  if (family === 'gmac') return 12;
  return cipher === '3des-cbc' ? 8 : 16;
}

export class NobleEngine implements CryptoEngine {
  readonly name = 'noble';
  readonly version = '@noble/ciphers and @noble/hashes';
  readonly #memory: MappedMemory;
  readonly #shapes = new Map<Transform, Shapes>();
  readonly #contexts = new ContextNumbers();
  readonly #keys = new Map<number, Keys>();
  /** The ICV of a job, for the comparison. */
  readonly #icv8 = new Uint8Array(MAX_ICV);
  readonly #icv16 = new Uint16Array(this.#icv8.buffer);
  readonly #icv32 = new Uint32Array(this.#icv8.buffer);
  #closed = false;

  constructor(memory: MappedMemory) {
    this.#memory = memory;
  }

  supports(transform: Transform): boolean {
    return transform.cipher !== '3des-cbc';
  }

  createContext(transform: Transform, keys: TransformKeys, direction: 'encrypt' | 'decrypt'): number {
    if (this.#closed) throw new EngineUsageError('the engine is closed');
    if (!this.supports(transform)) throw new EngineUsageError(`noble has no ${transform.id}`);
    checkKeys(transform, keys);
    const context = this.#contexts.take(this.#shapesOf(transform)[direction].index);
    this.#keys.set(context, { cipherKey: keyBytes(keys.cipherKey), authKey: keyBytes(keys.authKey) });
    return context;
  }

  destroyContext(context: number): void {
    this.#contexts.give(context);
    const keys = this.#keys.get(context);
    keys?.cipherKey.fill(0);
    keys?.authKey.fill(0);
    this.#keys.delete(context);
  }

  encrypt(transform: Transform, burst: CryptoBurst): void {
    this.#run(transform, burst, true);
  }

  decrypt(transform: Transform, burst: CryptoBurst): void {
    this.#run(transform, burst, false);
  }

  close(): void {
    this.#closed = true;
    for (const context of [...this.#contexts.taken()]) this.destroyContext(context);
  }

  #shapesOf(transform: Transform): Shapes {
    let shapes = this.#shapes.get(transform);
    if (shapes === undefined) {
      const first = 2 * this.#shapes.size + 1;
      shapes = { encrypt: jobRules(transform, first), decrypt: jobRules(transform, first + 1) };
      this.#shapes.set(transform, shapes);
    }
    return shapes;
  }

  #run(transform: Transform, burst: CryptoBurst, encrypting: boolean): void {
    const shapes = this.#shapesOf(transform);
    const rules = encrypting ? shapes.encrypt : shapes.decrypt;
    for (let i = 0; i < burst.count; i++) {
      const fits =
        burst.aadLength <= 16 &&
        fittingRun(burst, i, i + 1, rules, this.#contexts.membersOf(rules.index), this.#memory.size) > i;
      const keys = this.#keys.get(burst.context[i]);
      burst.status[i] =
        fits && keys !== undefined ? this.#job(transform, keys, burst, i, encrypting) : JobStatus.failed;
    }
  }

  /** One job; returns its status. */
  #job(transform: Transform, keys: Keys, burst: CryptoBurst, i: number, encrypting: boolean): number {
    const bytes = this.#memory.u8;
    const at = burst.cipherOffset[i];
    const text = bytes.slice(at, at + burst.cipherLength[i]);
    const iv = burst.memory.u8.slice(BurstOffset.iv + 16 * i, BurstOffset.iv + 16 * i + ivLengthOf(transform));
    const aad = burst.memory.u8.slice(BurstOffset.aad + 16 * i, BurstOffset.aad + 16 * i + burst.aadLength);
    const message = () => bytes.slice(burst.authOffset[i], burst.authOffset[i] + burst.authLength[i]);
    const { family, icvLength } = transform;
    let icv: Bytes;
    if (family === 'aead') {
      const mode = SEAL[transform.cipher ?? 'null'];
      if (mode === undefined) return JobStatus.failed;
      const plaintext = encrypting ? text : mode.unseal(keys.cipherKey, iv, text);
      const sealed = mode.seal(keys.cipherKey, iv, aad, plaintext, icvLength);
      bytes.set(encrypting ? sealed.subarray(0, text.length) : plaintext, at);
      icv = sealed.subarray(text.length, text.length + icvLength);
    } else if (family === 'gmac') {
      icv = gmac(keys.cipherKey, iv, message());
    } else {
      const mode = CIPHER[transform.cipher ?? 'null'];
      const mac = MAC[transform.auth ?? 'aes-gmac'];
      if (mode === undefined || mac === undefined) return JobStatus.failed;
      const ciphers = family === 'cipher-auth';
      if (ciphers && encrypting) bytes.set(mode.encrypt(keys.cipherKey, iv, text), at);
      icv = mac(keys.authKey, message());
      if (ciphers && !encrypting) bytes.set(mode.decrypt(keys.cipherKey, iv, text), at);
    }
    const icvAt = burst.icvOffset[i];
    if (encrypting) {
      bytes.set(icv.subarray(0, icvLength), icvAt);
      return JobStatus.ok;
    }
    this.#icv8.set(icv.subarray(0, icvLength));
    const { u8, u16, u32 } = this.#memory;
    const wrong = differs(u8, u16, u32, icvAt, this.#icv8, this.#icv16, this.#icv32, 0, icvLength);
    return wrong === 0 ? JobStatus.ok : JobStatus.icv;
  }
}
