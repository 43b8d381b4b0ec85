/**
 * `crypto.ENGINE.ALG.SIZE.mpps`: what the arithmetic alone costs, the reference for `esp.*`. Bursts of 32 go through
 * `CryptoEngine.encrypt`; the only other work is to set the offset and the nonce of each job, without which nobody could
 * encrypt a packet. SIZE is the inner packet of ESP in tunnel mode: the text is longer by the ESP trailer and its padding.
 *
 * `crypto.DIRECTION.keys64k.SIZE.ratio`: 65536 keys hit at random over one key, with `ipsec-mb` and AES-128-GCM. Nothing but key
 * schedules is hit at random: what the SAs of `esp.….sas64k` cost beside them does not count.
 *
 * `crypto.node.ALG.SIZE.mpps`: the same with one `node:crypto` cipher object for each packet.
 */
import { createCipheriv, createHmac } from 'node:crypto';
import type { CryptoEngine, EngineName, Transform } from '../../src/fallback/engines/engine.ts';
import { CryptoBurst, JobStatus } from '../../src/fallback/engines/engine.ts';
import { Engines } from '../../src/fallback/engines/select.ts';
import { transformById } from '../../src/fallback/engines/transform.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import { type Benchmark, type BenchSuite, rate, ratio, type Workload } from '../harness.ts';

/** Packets in a burst, and in the memory that bursts go around in. */
export const BURST = 32;
export const PACKETS = 512;
export const STRIDE = 2112;
/** Keys of `crypto.….keys64k`, hit at random. */
const MANY_KEYS = 65536;
/** Bytes before the text in a slot: as ESP in tunnel mode over Ethernet and IPv4 has them. */
const TEXT_AT = 192;
/** ESP trailer: pad length and next header (RFC 4303, 2.4 and 2.6). */
const TRAILER = 2;
/** SPI and sequence number. */
const ESP_HEADER = 8;

export const ALGORITHMS = {
  'aes-128-gcm': { id: 'aes-128-gcm-16', align: 4, iv: 8 },
  'aes-256-gcm': { id: 'aes-256-gcm-16', align: 4, iv: 8 },
  'chacha20-poly1305': { id: 'chacha20-poly1305-16', align: 4, iv: 8 },
  'aes-128-cbc-hmac-sha256': { id: 'aes-128-cbc+hmac-sha256-16', align: 16, iv: 16 },
} as const;
export type Algorithm = keyof typeof ALGORITHMS;
export const SIZES = [64, 1400] as const;
export const ENGINES: readonly EngineName[] = ['ipsec-mb', 'openssl', 'noble'];

function textLength(algorithm: Algorithm, size: number): number {
  const { align } = ALGORITHMS[algorithm];
  return Math.ceil((size + TRAILER) / align) * align;
}

function transformOf(algorithm: Algorithm): Transform {
  const transform = transformById(ALGORITHMS[algorithm].id);
  if (transform === undefined) throw new Error(`no transform ${ALGORITHMS[algorithm].id}`);
  return transform;
}

function keysOf(transform: Transform): { cipherKey: Uint8Array; authKey: Uint8Array } {
  return {
    cipherKey: new Uint8Array(transform.cipherKeyLength).fill(0x5a),
    authKey: new Uint8Array(transform.authKeyLength).fill(0xa5),
  };
}

function engineOf(
  name: EngineName,
  memory: MappedMemory,
  transform: Transform,
): { engine: CryptoEngine; all: Engines } {
  const all = new Engines(memory, name);
  try {
    return { engine: all.select(transform).engine, all };
  } catch (error) {
    all.close();
    throw error;
  }
}

/** Bursts that take the contexts in no order. */
function shuffled(contexts: Uint32Array): Uint32Array[] {
  let random = 1;
  return Array.from({ length: Math.max(1, Math.floor(contexts.length / BURST)) }, () =>
    Uint32Array.from({ length: BURST }, () => {
      random = (Math.imul(random, 1664525) + 1013904223) >>> 0;
      return contexts[(random >>> 8) % contexts.length];
    }),
  );
}

export interface EngineWorkload extends Workload {
  /** Decrypting with one key: puts right ciphertext back for `PACKETS` packets. Without it ICVs are wrong, which is cheaper where they are looked at first. */
  prepare(): void;
}

/** One burst of bare arithmetic. */
export function engineWorkload(
  name: EngineName,
  algorithm: Algorithm,
  size: number,
  direction: 'encrypt' | 'decrypt' = 'encrypt',
  keys = 1,
): EngineWorkload {
  const memory = mapAnonymous(PACKETS * STRIDE);
  const transform = transformOf(algorithm);
  const { engine, all } = engineOf(name, memory, transform);
  const contexts = Uint32Array.from({ length: keys }, () =>
    engine.createContext(transform, keysOf(transform), direction),
  );
  const burst = new CryptoBurst();
  const length = textLength(algorithm, size);
  const before = ESP_HEADER + ALGORITHMS[algorithm].iv;
  burst.count = BURST;
  burst.aadLength = transform.family === 'aead' ? ESP_HEADER : 0;
  burst.context.fill(contexts[0]);
  burst.cipherLength.fill(length);
  burst.authLength.fill(before + length);
  for (let i = 0; i < BURST; i++) burst.aad[4 * i] = 0x0010_0000;
  const { cipherOffset, authOffset, icvOffset, iv, aad } = burst;
  let sequence = 0;
  let prepared = false;
  const order = shuffled(contexts);
  let next = 0;
  const setJobs = () => {
    for (let i = 0; i < BURST; i++) {
      const slot = sequence & (PACKETS - 1);
      const at = slot * STRIDE + TEXT_AT;
      // What was encrypted once is decrypted with the nonce that it had.
      const number = prepared ? slot : sequence;
      cipherOffset[i] = at;
      authOffset[i] = at - before;
      icvOffset[i] = at + length;
      aad[4 * i + 1] = number;
      iv[4 * i + 2] = number;
      sequence = (sequence + 1) | 0;
    }
  };
  const run = () => {
    if (keys > 1) {
      burst.context.set(order[next]);
      next = (next + 1) % order.length;
    }
    setJobs();
    if (direction === 'encrypt') engine.encrypt(transform, burst);
    else engine.decrypt(transform, burst);
    const { status } = burst;
    if (status[0] === JobStatus.failed || (prepared && status[0] !== JobStatus.ok)) throw new Error(`${name} failed`);
  };
  let ciphertext: Uint8Array | null = null;
  const prepare = () => {
    if (direction === 'encrypt') return;
    prepared = true;
    sequence = 0;
    if (ciphertext === null) {
      memory.u8.fill(0);
      burst.context.fill(engine.createContext(transform, keysOf(transform), 'encrypt'));
      for (let done = 0; done < PACKETS; done += BURST) {
        setJobs();
        engine.encrypt(transform, burst);
      }
      burst.context.fill(contexts[0]);
      ciphertext = memory.u8.slice();
      sequence = 0;
    }
    memory.u8.set(ciphertext);
  };
  const close = () => {
    burst.close();
    all.close();
    unmapMemory(memory);
  };
  return { operations: BURST * 1e-6, run, prepare, close };
}

export function nodeWorkload(algorithm: Algorithm, size: number): Workload {
  const transform = transformOf(algorithm);
  const { cipherKey, authKey } = keysOf(transform);
  const text = Buffer.alloc(textLength(algorithm, size));
  const header = Buffer.alloc(ESP_HEADER);
  const nonce = Buffer.alloc(12);
  const iv = Buffer.alloc(16);
  const aead = (name: 'aes-128-gcm' | 'aes-256-gcm' | 'chacha20-poly1305') => () => {
    nonce.writeUInt32LE((nonce.readUInt32LE(8) + 1) >>> 0, 8);
    // The cast only picks one of the overloads, which are one function.
    const cipher = createCipheriv(name as 'aes-128-gcm', cipherKey, nonce, { authTagLength: 16 });
    cipher.setAAD(header);
    cipher.update(text);
    cipher.final();
    cipher.getAuthTag();
  };
  const pair = () => {
    iv.writeUInt32LE((iv.readUInt32LE(8) + 1) >>> 0, 8);
    const cipher = createCipheriv('aes-128-cbc', cipherKey, iv);
    cipher.setAutoPadding(false);
    const sealed = cipher.update(text);
    cipher.final();
    createHmac('sha256', authKey).update(header).update(iv).update(sealed).digest();
  };
  const packet = algorithm === 'aes-128-cbc-hmac-sha256' ? pair : aead(algorithm);
  const run = () => {
    for (let i = 0; i < BURST; i++) packet();
  };
  return { operations: BURST * 1e-6, run };
}

/** Whether the engine can be had here; a benchmark that is listed is measured. */
export function available(name: EngineName): boolean {
  const memory = mapAnonymous(4096);
  const all = new Engines(memory, 'auto');
  try {
    return all.reports().some((one) => one.name === name && one.refusal === undefined);
  } finally {
    all.close();
    unmapMemory(memory);
  }
}

function* benchmarks(): Iterable<Benchmark> {
  const algorithms = Object.keys(ALGORITHMS) as Algorithm[];
  for (const name of ENGINES) {
    if (!available(name)) continue;
    for (const algorithm of algorithms) {
      for (const size of SIZES) {
        yield rate(`crypto.${name}.${algorithm}.${size}B.mpps`, 'Mpps', () => engineWorkload(name, algorithm, size));
      }
    }
  }
  for (const direction of ['encrypt', 'decrypt'] as const) {
    for (const size of SIZES) {
      const many = () => engineWorkload('ipsec-mb', 'aes-128-gcm', size, direction, MANY_KEYS);
      const one = () => engineWorkload('ipsec-mb', 'aes-128-gcm', size, direction);
      if (available('ipsec-mb')) yield ratio(`crypto.${direction}.keys64k.${size}B.ratio`, many, one);
    }
  }
  for (const algorithm of algorithms) {
    for (const size of SIZES) {
      yield rate(`crypto.node.${algorithm}.${size}B.mpps`, 'Mpps', () => nodeWorkload(algorithm, size));
    }
  }
}

export const suite: BenchSuite = { name: 'crypto', benchmarks };
