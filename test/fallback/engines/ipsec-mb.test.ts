import { describe, expect, it, vi } from 'vitest';
import { CryptoBurst, EngineError, JobStatus } from '../../../src/fallback/engines/engine.ts';
import { IpsecMbEngine } from '../../../src/fallback/engines/ipsec-mb.ts';
import { LAYOUTS } from '../../../src/fallback/engines/ipsec-mb-layout.ts';
import { high, low, mapUnbroken, untilCarry } from '../../../src/fallback/engines/native-memory.ts';
import { OpensslEngine } from '../../../src/fallback/engines/openssl.ts';
import { ffi } from '../../../src/sys/ffi/ffi.ts';
import { MapFlag, mmap, munmap, Prot } from '../../../src/sys/libc.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../../../src/sys/memory.ts';
import { NodeEngine, plainMemory } from '../node-engine.ts';
import { layOut, Random, randomKeys, randomNonces, TYPICAL, usable } from './suites/support.ts';

vi.setConfig({ testTimeout: 30_000 });

const STRIDE = 2048;
const GIB4 = 2 ** 32;

function installed(): boolean {
  const memory = mapAnonymous(4096);
  try {
    new IpsecMbEngine(memory).close();
    return true;
  } catch (error) {
    if (error instanceof EngineError) return false;
    throw error;
  } finally {
    unmapMemory(memory);
  }
}

/** Memory of 64 slots with a multiple of 4 GiB in the middle, where the kernel has room for it. */
function crossingMemory(): { memory: MappedMemory; unmap: () => void } {
  const size = 64 * STRIDE;
  for (let boundary = 16 * GIB4; boundary < 4096 * GIB4; boundary += GIB4) {
    const wanted = boundary - size / 2;
    const address = mmap(wanted, size, Prot.read | Prot.write, MapFlag.private | MapFlag.anonymous, -1, 0);
    if (address === wanted) {
      const buffer = ffi().view(address, size);
      const views = { u8: new Uint8Array(buffer), u16: new Uint16Array(buffer), u32: new Uint32Array(buffer) };
      return { memory: { address, size, ...views }, unmap: () => munmap(address, size) };
    }
    munmap(address, size);
  }
  throw new Error('no free range around a multiple of 4 GiB');
}

describe('native memory', () => {
  it('splits addresses into the words that they are made of', () => {
    expect([low(0x7fff_dead_b000), high(0x7fff_dead_b000)]).toEqual([0xdeadb000, 0x7fff]);
    expect(untilCarry(0x1_ffff_f000)).toBe(0x1000);
    expect(untilCarry(0x2_0000_0000)).toBe(GIB4);
  });

  it('never crosses a multiple of 4 GiB', () => {
    const all = Array.from({ length: 50 }, () => mapUnbroken(1 << 20));
    for (const memory of all) expect(high(memory.address)).toBe(high(memory.address + memory.size - 1));
    for (const memory of all) unmapMemory(memory);
  });
});

describe('libipsec-mb layouts', () => {
  it('leave room between the fields of a job for what they hold', () => {
    for (const { job, manager } of LAYOUTS) {
      const offsets = Object.entries(job).filter(([name]) => name !== 'size');
      expect(new Set(offsets.map(([, offset]) => offset)).size).toBe(offsets.length);
      for (const [, offset] of offsets) expect(offset % 4 === 0 && offset + 4 <= job.size).toBe(true);
      for (const pointer of [job.source, job.iv, job.tag, job.argument0, job.userData]) expect(pointer % 8).toBe(0);
      expect(manager.jobs % 8).toBe(0);
    }
  });
});

const create = (memory: MappedMemory) => new IpsecMbEngine(memory);
const can = installed() ? TYPICAL.filter((transform) => usable(create).includes(transform)) : [];

/** Nothing is left to test where the library is not installed; what then happens is tested in select.test.ts. */
function ipsecMbSuite(): void {
  it.each(can.map((transform) => [transform.id, transform] as const))(
    'does %s in memory that crosses a multiple of 4 GiB as node:crypto does',
    (_, transform) => {
      const { memory, unmap } = crossingMemory();
      const burst = new CryptoBurst();
      const engine = new IpsecMbEngine(memory);
      try {
        expect(high(memory.address)).not.toBe(high(memory.address + memory.size - 1));
        const random = new Random(64);
        const reference = plainMemory(memory.size);
        const judge = new NodeEngine(reference);
        const text = random.bytes(memory.size);
        memory.u8.set(text);
        reference.u8.set(text);
        const keys = randomKeys(random, transform);
        burst.count = 63;
        burst.aadLength = transform.family === 'aead' ? 8 : 0;
        randomNonces(random, burst);
        // Half a slot further, so that jobs 31 and its neighbours lie across the boundary in several ways.
        for (let i = 0; i < burst.count; i++) {
          layOut(burst, i, STRIDE, 24, 1504);
          for (const field of ['authOffset', 'cipherOffset', 'icvOffset'] as const) burst[field][i] += STRIDE / 2;
        }
        burst.context.fill(engine.createContext(transform, keys, 'encrypt'));
        engine.encrypt(transform, burst);
        burst.context.fill(judge.createContext(transform, keys));
        judge.encrypt(transform, burst);
        expect(Buffer.compare(memory.u8, reference.u8)).toBe(0);
        burst.context.fill(engine.createContext(transform, keys, 'decrypt'));
        engine.decrypt(transform, burst);
        expect(burst.status.subarray(0, burst.count).every((status) => status === JobStatus.ok)).toBe(true);
      } finally {
        engine.close();
        burst.close();
        unmap();
      }
    },
  );

  it('does with 9000 keys, of all transforms and in bursts of any of them, what node:crypto does', () => {
    const memory = mapAnonymous(64 * STRIDE);
    const reference = plainMemory(memory.size);
    const engine = new IpsecMbEngine(memory);
    const judge = new NodeEngine(reference);
    const burst = new CryptoBurst();
    const random = new Random(9);
    const keys = new Map(can.map((transform) => [transform, [] as { seed: number; context: number }[]]));
    try {
      for (let i = 0; i < 9000; i++) {
        const transform = can[i % can.length];
        const context = engine.createContext(transform, randomKeys(new Random(i), transform), 'encrypt');
        keys.get(transform)?.push({ seed: i, context });
      }
      for (const [transform, all] of keys) {
        const text = random.bytes(memory.size);
        memory.u8.set(text);
        reference.u8.set(text);
        burst.count = 64;
        burst.aadLength = transform.family === 'aead' ? 8 : 0;
        randomNonces(random, burst);
        const judged = new Uint32Array(burst.count);
        for (let i = 0; i < burst.count; i++) {
          layOut(burst, i, STRIDE, 24, 16 * (1 + random.below(90)));
          const { seed, context } = all[random.below(all.length)];
          burst.context[i] = context;
          judged[i] = judge.createContext(transform, randomKeys(new Random(seed), transform));
        }
        engine.encrypt(transform, burst);
        burst.context.set(judged);
        judge.encrypt(transform, burst);
        expect(Buffer.compare(memory.u8, reference.u8), transform.id).toBe(0);
      }
    } finally {
      engine.close();
      burst.close();
      unmapMemory(memory);
    }
  });

  it('shares the job slots of the library with other engines of this thread without mixing them up', () => {
    const memories = [mapAnonymous(64 * STRIDE), mapAnonymous(64 * STRIDE)];
    const bursts = [new CryptoBurst(), new CryptoBurst()];
    const engines = memories.map((memory) => new IpsecMbEngine(memory));
    const references = memories.map(({ size }) => plainMemory(size));
    const judges = references.map((memory) => new NodeEngine(memory));
    const random = new Random(2);
    try {
      for (let round = 0; round < 80; round++) {
        const which = random.below(2);
        const transform = can[random.below(can.length)];
        const [burst, engine, judge] = [bursts[random.below(2)], engines[which], judges[which]];
        const text = random.bytes(memories[which].size);
        memories[which].u8.set(text);
        references[which].u8.set(text);
        const keys = randomKeys(random, transform);
        burst.count = 1 + random.below(64);
        burst.aadLength = transform.family === 'aead' ? 12 : 0;
        randomNonces(random, burst);
        for (let i = 0; i < burst.count; i++) layOut(burst, i, STRIDE, 24, 16 * (1 + random.below(90)));
        burst.context.fill(engine.createContext(transform, keys, 'encrypt'));
        engine.encrypt(transform, burst);
        burst.context.fill(judge.createContext(transform, keys));
        judge.encrypt(transform, burst);
        expect(Buffer.compare(memories[which].u8, references[which].u8)).toBe(0);
      }
    } finally {
      for (const engine of engines) engine.close();
      for (const burst of bursts) burst.close();
      for (const memory of memories) unmapMemory(memory);
    }
  });

  it('opens again after the last engine was closed', () => {
    const memory = mapAnonymous(4096);
    const transform = can[0];
    const burst = new CryptoBurst();
    for (let round = 0; round < 20; round++) {
      const engine = new IpsecMbEngine(memory);
      burst.count = 1;
      burst.aadLength = 8;
      layOut(burst, 0, STRIDE, 24, 64);
      burst.context[0] = engine.createContext(transform, randomKeys(new Random(1), transform), 'encrypt');
      engine.encrypt(transform, burst);
      expect(burst.status[0]).toBe(JobStatus.ok);
      engine.close();
    }
    burst.close();
    unmapMemory(memory);
  });

  it('refuses what the library does not have, which openssl does', () => {
    const memory = mapAnonymous(4096);
    const engine = new IpsecMbEngine(memory);
    const openssl = new OpensslEngine(memory);
    const ccm192 = {
      id: 'aes-192-ccm-8',
      family: 'aead',
      cipher: 'aes-ccm',
      cipherKeyLength: 24,
      authKeyLength: 0,
      icvLength: 8,
    } as const;
    expect([engine.supports(ccm192), openssl.supports(ccm192)]).toEqual([false, true]);
    const keys = { cipherKey: new Uint8Array(24), authKey: new Uint8Array(0) };
    expect(() => engine.createContext(ccm192, keys, 'encrypt')).toThrow('aes-192-ccm-8');
    engine.close();
    openssl.close();
    unmapMemory(memory);
  });
}

if (can.length > 0) describe('the ipsec-mb engine', ipsecMbSuite);
