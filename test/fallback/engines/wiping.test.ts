/** Where a key is in the memory of this process, by searching all of it. */
import { randomFillSync } from 'node:crypto';
import { closeSync, openSync, readFileSync, readSync } from 'node:fs';
import { describe, expect, it, vi } from 'vitest';
import { CryptoBurst, type CryptoEngine, EngineError, JobStatus } from '../../../src/fallback/engines/engine.ts';
import { IpsecMbEngine } from '../../../src/fallback/engines/ipsec-mb.ts';
import { OpensslEngine } from '../../../src/fallback/engines/openssl.ts';
import { transformById } from '../../../src/fallback/engines/transform.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../../../src/sys/memory.ts';
import { layOut } from './suites/support.ts';

vi.setConfig({ testTimeout: 30_000 });

const CHUNK = 1 << 20;
/** Words of the key that are looked for: AES schedules and ChaCha20 states begin with the key. */
const WORDS = 4;
const MASK = 0x5bd1e995;

/** How often the key whose words are `masked` occurs, at multiples of four bytes, in writable memory except for `chunk`. */
function occurrences(masked: Uint32Array, chunk: MappedMemory): number {
  let found = 0;
  const memory = openSync('/proc/self/mem', 'r');
  const inRange = (begin: number, end: number) => {
    let count = 0;
    // Parts overlap by the length of a key, which may lie across two of them.
    for (let at = begin; at < end; at += CHUNK - 4 * WORDS) {
      count += search(masked, chunk, readPart(memory, chunk, at, Math.min(CHUNK, end - at)));
    }
    return count;
  };
  try {
    for (const line of readFileSync('/proc/self/maps', 'utf8').split('\n')) {
      const match = /^([0-9a-f]+)-([0-9a-f]+) rw/.exec(line);
      if (match === null) continue;
      const [begin, end] = [Number.parseInt(match[1], 16), Number.parseInt(match[2], 16)];
      // What was read last lies in the chunk itself: a mapping that holds it has a part before and one behind.
      found += inRange(begin, Math.min(end, Math.max(begin, chunk.address)));
      found += inRange(Math.max(begin, Math.min(end, chunk.address + chunk.size)), end);
    }
  } finally {
    closeSync(memory);
    chunk.u8.fill(0);
  }
  return found;
}

/** Bytes read; a mapping that has gone meanwhile is empty. */
function readPart(memory: number, chunk: MappedMemory, at: number, length: number): number {
  try {
    return readSync(memory, chunk.u8, 0, length, at);
  } catch {
    return 0;
  }
}

function search(masked: Uint32Array, chunk: MappedMemory, length: number): number {
  const words = chunk.u32;
  let found = 0;
  for (let i = 0; i + WORDS <= length >> 2; i++) {
    if ((words[i] ^ MASK) >>> 0 !== masked[0]) continue;
    let same = 1;
    while (same < WORDS && (words[i + same] ^ MASK) >>> 0 === masked[same]) same++;
    if (same === WORDS) found++;
  }
  return found;
}

const engines: [string, (memory: MappedMemory) => CryptoEngine][] = [
  ['ipsec-mb', (memory) => new IpsecMbEngine(memory)],
  ['openssl', (memory) => new OpensslEngine(memory)],
];
const available = engines.filter(([, create]) => {
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
});
const transforms = ['aes-128-gcm-16', 'aes-256-ccm-16', 'chacha20-poly1305-16', 'aes-128-cbc+hmac-sha256-16'];

describe.each(available)('a key given to %s', (_, create) => {
  it.each(transforms)('is nowhere in memory after its %s context was destroyed, used or not', (id) => {
    const transform = transformById(id);
    if (transform === undefined) throw new Error(id);
    const memory = mapAnonymous(65536);
    const chunk = mapAnonymous(CHUNK);
    const source = mapAnonymous(4096);
    const burst = new CryptoBurst();
    const engine = create(memory);
    try {
      const cipherKey = source.u8.subarray(0, transform.cipherKeyLength);
      const authKey = source.u8.subarray(64, 64 + transform.authKeyLength);
      randomFillSync(source.u8, 0, 128);
      const masked = Uint32Array.from({ length: WORDS }, (__, i) => (source.u32[i] ^ MASK) >>> 0);
      const contexts = (['encrypt', 'decrypt'] as const).map((direction) =>
        engine.createContext(transform, { cipherKey, authKey }, direction),
      );
      source.u8.fill(0);
      expect(occurrences(masked, chunk)).toBeGreaterThan(0);

      burst.count = 32;
      burst.aadLength = transform.family === 'aead' ? 8 : 0;
      for (let i = 0; i < 32; i++) layOut(burst, i, 2048, 24, 256);
      burst.context.fill(contexts[0]);
      engine.encrypt(transform, burst);
      burst.context.fill(contexts[1]);
      engine.decrypt(transform, burst);
      expect(burst.status[31]).toBe(JobStatus.ok);

      for (const context of contexts) engine.destroyContext(context);
      expect(occurrences(masked, chunk)).toBe(0);
    } finally {
      engine.close();
      burst.close();
      for (const one of [memory, chunk, source]) unmapMemory(one);
    }
  });
});
