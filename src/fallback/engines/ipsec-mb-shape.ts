/**
 * What the jobs of one transform in one direction have in common: algorithm numbers, lengths, where in the key slot the
 * pointers point.
 */
import { type MappedMemory, unmapMemory } from '../../sys/memory.ts';
import { type JobRules, jobRules } from './checks.ts';
import type { Transform } from './engine.ts';
import { KeySlot } from './ipsec-mb-keys.ts';
import { ImbCipher, ImbDirection, ImbHash, type ImbLayout, ImbOrder } from './ipsec-mb-layout.ts';
import type { ImbManager } from './ipsec-mb-library.ts';
import { type KeyLines, keyLines } from './ipsec-mb-lines.ts';
import { mapUnbroken } from './native-memory.ts';

export const FAMILY = { aead: 0, gmac: 1, 'cipher-auth': 2, auth: 3 } as const satisfies Record<
  Transform['family'],
  number
>;

export interface Shape extends JobRules {
  readonly transform: Transform;
  readonly encrypting: boolean;
  readonly family: (typeof FAMILY)[Transform['family']];
  readonly keyLength: number;
  readonly ivLength: number;
  readonly cipherMode: number;
  readonly hash: number;
  readonly order: number;
  /** Where in the key slot the pointers of a job point. */
  readonly encryptKeys: number;
  readonly decryptKeys: number;
  readonly auth0: number;
  readonly auth1: number;
  /** What a job reads of the key slot. */
  readonly lines: KeyLines;
  /** What imb_set_session gives such a job; 0 before 1.4. */
  readonly suite0: number;
  readonly suite1: number;
  readonly session: number;
}

export interface Shapes {
  readonly encrypt: Shape;
  readonly decrypt: Shape;
}

const HASH = {
  'hmac-sha1': ImbHash.hmacSha1,
  'hmac-sha256': ImbHash.hmacSha256,
  'hmac-sha384': ImbHash.hmacSha384,
  'hmac-sha512': ImbHash.hmacSha512,
  'aes-xcbc': ImbHash.xcbc,
  'aes-cmac': ImbHash.cmac,
} as const;
const CIPHER = {
  'aes-gcm': ImbCipher.gcm,
  'aes-ccm': ImbCipher.ccm,
  'chacha20-poly1305': ImbCipher.chacha20Poly1305,
  'aes-cbc': ImbCipher.cbc,
  'aes-ctr': ImbCipher.ctr,
  '3des-cbc': ImbCipher.des3,
  null: ImbCipher.null,
} as const;

/** Bytes of an AES-128 key. */
const MODEL_KEY = 16;
/** Bytes of the nonce of GMAC (RFC 4543, 3.1). */
const GMAC_NONCE = 12;

function hashOf({ auth, cipher, cipherKeyLength }: Transform): number {
  if (auth === 'aes-gmac') {
    return cipherKeyLength === 16 ? ImbHash.gmac128 : cipherKeyLength === 24 ? ImbHash.gmac192 : ImbHash.gmac256;
  }
  if (auth !== undefined) return HASH[auth];
  if (cipher === 'aes-ccm') return ImbHash.ccm;
  return cipher === 'aes-gcm' ? ImbHash.gcm : ImbHash.chacha20Poly1305;
}

function ivLengthOf({ family, cipher }: Transform): number {
  if (family === 'aead') return cipher === 'aes-ccm' ? 11 : 12;
  if (cipher === '3des-cbc') return 8;
  return cipher === undefined || cipher === 'null' ? 0 : 16;
}

/** CCM authenticates the plaintext, everything else the ciphertext. */
function orderOf({ cipher }: Transform, encrypting: boolean): number {
  return encrypting === (cipher !== 'aes-ccm') ? ImbOrder.cipherHash : ImbOrder.hashCipher;
}

/** Writes what all jobs of a shape have in common into the job at word `q`. Upper words of lengths are 0 since ever. */
export function writeShape(layout: ImbLayout, words: Uint32Array, q: number, shape: Shape): void {
  // hot:
  const { job, session } = layout;
  words[q + (job.keyLength >> 2)] = shape.keyLength;
  words[q + (job.ivLength >> 2)] = shape.ivLength;
  words[q + (job.tagLength >> 2)] = shape.icvLength;
  words[q + (job.cipherMode >> 2)] = shape.cipherMode;
  words[q + (job.direction >> 2)] = shape.encrypting ? ImbDirection.encrypt : ImbDirection.decrypt;
  words[q + (job.hash >> 2)] = shape.hash;
  words[q + (job.order >> 2)] = shape.order;
  words[q + (job.cipherStart >> 2)] = 0;
  words[q + (job.cipherLength >> 2)] = 0;
  if (shape.family === FAMILY.gmac) {
    words[q + (job.argument2 >> 2)] = GMAC_NONCE;
    words[q + (job.argument2 >> 2) + 1] = 0;
  }
  if (session !== undefined) {
    words[q + (session.suite0 >> 2)] = shape.suite0;
    words[q + (session.suite1 >> 2)] = shape.suite1;
    words[q + (session.id >> 2)] = shape.session;
  }
}

/** The shapes that one manager has met. Their numbers stand in its job slots, so they are the manager's, not an engine's. */
export class ImbShapes {
  readonly #manager: ImbManager;
  readonly #shapes = new Map<Transform, Shapes>();
  /** The engine that last wrote into the job slots. */
  writer: object | undefined;
  #gcmSize = 0;

  constructor(manager: ImbManager) {
    this.#manager = manager;
  }

  of(transform: Transform): Shapes {
    let shapes = this.#shapes.get(transform);
    if (shapes === undefined) {
      const first = 2 * this.#shapes.size + 1;
      shapes = { encrypt: this.#make(transform, true, first), decrypt: this.#make(transform, false, first + 1) };
      this.#shapes.set(transform, shapes);
    }
    return shapes;
  }

  #make(transform: Transform, encrypting: boolean, index: number): Shape {
    const triple = transform.cipher === '3des-cbc';
    const separate = transform.cipher === 'aes-cbc';
    const shape: Shape = {
      ...jobRules(transform, index),
      transform,
      encrypting,
      family: FAMILY[transform.family],
      keyLength: transform.family === 'gmac' ? 0 : transform.cipherKeyLength,
      ivLength: ivLengthOf(transform),
      cipherMode: CIPHER[transform.cipher ?? 'null'],
      hash: hashOf(transform),
      order: orderOf(transform, encrypting),
      encryptKeys: triple ? KeySlot.desPointers : KeySlot.cipher,
      decryptKeys: triple ? KeySlot.desPointers : separate ? KeySlot.decrypt : KeySlot.cipher,
      auth0: transform.family === 'gmac' ? KeySlot.cipher : KeySlot.auth,
      auth1: transform.auth === 'aes-xcbc' || transform.auth === 'aes-cmac' ? KeySlot.subkey1 : KeySlot.outer,
      lines: keyLines(transform, encrypting, this.#gcmEnd()),
      suite0: 0,
      suite1: 0,
      session: 0,
    };
    return this.#manager.setSession === undefined ? shape : { ...shape, ...this.#session(shape) };
  }

  /** How much of `gcm_key_data` the implementation for this processor fills: taken once, from a key of zeros. */
  #gcmEnd(): number {
    if (this.#gcmSize !== 0) return this.#gcmSize;
    const { layout, functionAt } = this.#manager;
    const model: MappedMemory = mapUnbroken(layout.gcmKeySize + MODEL_KEY);
    try {
      functionAt(layout.manager.gcmPrecompute128, 2)(model.address + layout.gcmKeySize, model.address);
      let end = layout.gcmKeySize;
      while (end > 1 && model.u8[end - 1] === 0) end--;
      this.#gcmSize = end;
      return end;
    } finally {
      unmapMemory(model);
    }
  }

  /** Since 1.4 the library looks its handlers up by numbers that it derives from a filled job: taken once, from a model job. */
  #session(shape: Shape): Pick<Shape, 'suite0' | 'suite1' | 'session'> {
    const { layout, memory, setSession } = this.#manager;
    const model: MappedMemory = mapUnbroken(layout.job.size);
    try {
      writeShape(layout, model.u32, 0, shape);
      setSession?.(memory.address, model.address);
      const word = (offset: number | undefined) => (offset === undefined ? 0 : model.u32[offset >> 2]);
      const { session } = layout;
      return { suite0: word(session?.suite0), suite1: word(session?.suite1), session: word(session?.id) };
    } finally {
      unmapMemory(model);
    }
  }
}

const shapesOfManager = new WeakMap<ImbManager, ImbShapes>();

export function shapesOf(manager: ImbManager): ImbShapes {
  let shapes = shapesOfManager.get(manager);
  if (shapes === undefined) {
    shapes = new ImbShapes(manager);
    shapesOfManager.set(manager, shapes);
  }
  return shapes;
}
