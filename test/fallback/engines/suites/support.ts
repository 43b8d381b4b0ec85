/** What the tests of the engines share: the engines of this machine, reproducible bytes, bursts. */
import {
  CryptoBurst,
  type CryptoEngine,
  EngineError,
  type Transform,
} from '../../../../src/fallback/engines/engine.ts';
import { IpsecMbEngine } from '../../../../src/fallback/engines/ipsec-mb.ts';
import { checkKnownAnswers } from '../../../../src/fallback/engines/known-answers.ts';
import { NobleEngine } from '../../../../src/fallback/engines/noble.ts';
import { OpensslEngine } from '../../../../src/fallback/engines/openssl.ts';
import { TRANSFORMS } from '../../../../src/fallback/engines/transform.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../../../../src/sys/memory.ts';

/** Numbers that are the same in each run: xorshift32. */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed | 1;
  }

  next(): number {
    this.#state ^= this.#state << 13;
    this.#state ^= this.#state >>> 17;
    this.#state ^= this.#state << 5;
    return this.#state >>> 0;
  }

  below(limit: number): number {
    return this.next() % limit;
  }

  bytes(length: number): Uint8Array {
    const words = new Uint32Array(Math.ceil(length / 4));
    for (let i = 0; i < words.length; i++) words[i] = this.next();
    return new Uint8Array(words.buffer, 0, length);
  }
}

type Create = (memory: MappedMemory) => CryptoEngine;
const NATIVE: readonly Create[] = [(memory) => new IpsecMbEngine(memory), (memory) => new OpensslEngine(memory)];
/** noble calls nothing native: once is enough. */
const { VIPSEC_FFI: provider } = process.env;
const ENGINES: readonly Create[] = provider === 'ffi-rs' ? NATIVE : [...NATIVE, (memory) => new NobleEngine(memory)];

function creatable(create: Create): boolean {
  const memory = mapAnonymous(4096);
  try {
    create(memory).close();
    return true;
  } catch (error) {
    if (error instanceof EngineError) return false;
    throw error;
  } finally {
    unmapMemory(memory);
  }
}

/** The engines that this machine and this FFI provider have. */
export const AVAILABLE: readonly Create[] = ENGINES.filter(creatable);

/**
 * The transforms that would be used with that engine: it has them and gives the known answers. Of libipsec-mb 2.0.0 that
 * leaves 3DES out on processors with AVX-512, where it mixes up the lanes of a burst.
 */
export function usable(create: Create): readonly Transform[] {
  const transforms = found.get(create) ?? findUsable(create);
  found.set(create, transforms);
  return transforms;
}

/** What `usable` has found: the known answers of all transforms take a second. */
const found = new Map<Create, readonly Transform[]>();

function findUsable(create: Create): readonly Transform[] {
  const memory = mapAnonymous(4096);
  const engine = create(memory);
  const can = TRANSFORMS.filter((transform) => engine.supports(transform));
  engine.close();
  unmapMemory(memory);
  return can.filter((transform) => checkKnownAnswers(transform, create) === undefined);
}

/** Calls `use` with the engine on fresh memory and a burst, and frees everything. */
export function withEngine(
  create: Create,
  size: number,
  use: (engine: CryptoEngine, memory: MappedMemory, burst: CryptoBurst) => void,
): void {
  const memory = mapAnonymous(size);
  const burst = new CryptoBurst();
  try {
    const engine = create(memory);
    try {
      use(engine, memory, burst);
    } finally {
      engine.close();
    }
  } finally {
    burst.close();
    unmapMemory(memory);
  }
}

/** Bytes of the blocks that the text must be made of. */
export function blockOf(transform: Transform): number {
  return transform.cipher === 'aes-cbc' ? 16 : transform.cipher === '3des-cbc' ? 8 : 1;
}

/** Whether the calls of the engines are those that are used by default; for the others fewer sizes say enough. */
export const IS_DEFAULT_PROVIDER: boolean = provider !== 'ffi-rs';

/** One of each way through the engines. */
export const TYPICAL: readonly Transform[] = TRANSFORMS.filter(({ id }) =>
  [
    'aes-128-gcm-16',
    'aes-256-ccm-8',
    'chacha20-poly1305-16',
    'aes-256-gmac-16',
    'aes-128-cbc+hmac-sha256-16',
    'aes-256-ctr+hmac-sha512-32',
    '3des-cbc+hmac-sha1-12',
    'null+aes-cmac-12',
    'aes-xcbc-12',
    'hmac-sha384-24',
  ].includes(id),
);

export function randomKeys(random: Random, transform: Transform): { cipherKey: Uint8Array; authKey: Uint8Array } {
  return { cipherKey: random.bytes(transform.cipherKeyLength), authKey: random.bytes(transform.authKeyLength) };
}

/** Lays job `i` out in its slot of `stride` bytes: `before` authenticated bytes, the text, the ICV; at any alignment. */
export function layOut(burst: CryptoBurst, i: number, stride: number, before: number, length: number): void {
  const at = stride * i + 16 + (i % 8);
  burst.authOffset[i] = at;
  burst.authLength[i] = before + length;
  burst.cipherOffset[i] = at + before;
  burst.cipherLength[i] = length;
  burst.icvOffset[i] = at + before + length;
}

export function randomNonces(random: Random, burst: CryptoBurst): void {
  for (let i = 0; i < burst.iv.length; i++) burst.iv[i] = random.next();
  for (let i = 0; i < burst.aad.length; i++) burst.aad[i] = random.next();
}
