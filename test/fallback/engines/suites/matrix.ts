import { describe, expect, it } from 'vitest';
import {
  CryptoBurst,
  type CryptoEngine,
  JobStatus,
  MAX_BURST,
  type Transform,
} from '../../../../src/fallback/engines/engine.ts';
import { TRANSFORMS } from '../../../../src/fallback/engines/transform.ts';
import type { MappedMemory } from '../../../../src/sys/memory.ts';
import { NodeEngine, plainMemory } from '../../node-engine.ts';
import {
  AVAILABLE,
  blockOf,
  IS_DEFAULT_PROVIDER,
  layOut,
  Random,
  randomKeys,
  randomNonces,
  TYPICAL,
  usable,
  withEngine,
} from './support.ts';

const STRIDE = 512;
const KEYS = 3;

/**
 * Whether the engine does the jobs of a burst side by side, with a way for each rest; the others take one after the other. Its calls
 * are those of the default provider: for another provider fewer say enough.
 */
const inLanes = (engine: CryptoEngine): boolean => IS_DEFAULT_PROVIDER && engine.name === 'ipsec-mb';

/** Up to two bytes from the end of a block of one of the ciphers or authenticators, or every length up to a block and a bit. */
const isNearBlocks = (n: number): boolean =>
  n <= 20 || (n + 1) % 64 < 3 || [40, 47, 48, 49, 119, 239, 240, 300].includes(n);

/** The same keys in the engine and in the judge. */
function contexts(engine: CryptoEngine, judge: NodeEngine, transform: Transform, random: Random) {
  const keys = Array.from({ length: KEYS }, () => randomKeys(random, transform));
  return {
    encrypt: keys.map((one) => engine.createContext(transform, one, 'encrypt')),
    decrypt: keys.map((one) => engine.createContext(transform, one, 'decrypt')),
    judge: keys.map((one) => judge.createContext(transform, one)),
  };
}

function use(burst: CryptoBurst, numbers: readonly number[]): void {
  for (let i = 0; i < burst.count; i++) burst.context[i] = numbers[i % numbers.length];
}

/** Index of the first byte that differs, or -1. */
function firstDifference(a: Uint8Array, b: Uint8Array): number {
  if (Buffer.compare(a, b) === 0) return -1;
  return a.findIndex((byte, i) => byte !== b[i]);
}

function statuses(burst: CryptoBurst): number[] {
  return [...burst.status.subarray(0, burst.count)];
}

/** Encrypts the burst with the engine and with node:crypto, compares all memory, decrypts, changes a bit of each job, decrypts again. */
function roundTrip(
  engine: CryptoEngine,
  memory: MappedMemory,
  burst: CryptoBurst,
  transform: Transform,
  random: Random,
) {
  const reference = plainMemory(memory.size);
  const judge = new NodeEngine(reference);
  const numbers = contexts(engine, judge, transform, random);
  const text = random.bytes(memory.size);
  memory.u8.set(text);
  reference.u8.set(text);

  use(burst, numbers.judge);
  judge.encrypt(transform, burst);
  use(burst, numbers.encrypt);
  engine.encrypt(transform, burst);
  expect(statuses(burst).every((status) => status === JobStatus.ok)).toBe(true);
  expect(firstDifference(memory.u8, reference.u8)).toBe(-1);

  use(burst, numbers.decrypt);
  engine.decrypt(transform, burst);
  expect(statuses(burst).every((status) => status === JobStatus.ok)).toBe(true);
  const wrong: number[] = [];
  for (let i = 0; i < burst.count; i++) {
    const [from, to] = [burst.authOffset[i], burst.icvOffset[i]];
    if (firstDifference(memory.u8.subarray(from, to), text.subarray(from, to)) !== -1) wrong.push(i);
  }
  expect(wrong).toEqual([]);

  memory.u8.set(reference.u8);
  for (let i = 0; i < burst.count; i++) {
    const covered = transform.family === 'aead' ? burst.cipherLength[i] : burst.authLength[i];
    const from = transform.family === 'aead' ? burst.cipherOffset[i] : burst.authOffset[i];
    memory.u8[from + random.below(covered + transform.icvLength)] ^= 1 << random.below(8);
  }
  engine.decrypt(transform, burst);
  expect(statuses(burst).every((status) => status === JobStatus.icv)).toBe(true);

  for (const context of [...numbers.encrypt, ...numbers.decrypt]) engine.destroyContext(context);
}

export function matrixSuite(): void {
  for (const create of AVAILABLE) {
    withEngine(create, 4096, (engine) => {
      const name = engine.version;
      const done = usable(create);

      describe(`${name} against node:crypto`, () => {
        it('can do nearly all transforms', () => {
          const left = TRANSFORMS.filter((transform) => !done.includes(transform)).map(({ id }) => id);
          expect(left.filter((id) => !id.startsWith('3des') && !id.startsWith('aes-192-ccm'))).toEqual([]);
        });

        it.each(done.map((transform) => [transform.id, transform] as const))(
          '%s agrees in both directions at lengths of 0 to 300 and refuses every changed packet',
          (_, transform) => {
            const block = blockOf(transform);
            const shortest = transform.family === 'cipher-auth' && transform.cipher !== 'null' ? 1 : 0;
            const all = Array.from({ length: 301 }, (__, n) => n).filter((n) => n % block === 0 && n >= shortest);
            const lengths = inLanes(engine) || block > 1 ? all : all.filter(isNearBlocks);
            withEngine(create, MAX_BURST * STRIDE, (own, memory, burst) => {
              const random = new Random(transform.id.length * 7919 + transform.icvLength);
              for (let done = 0; done < lengths.length; done += MAX_BURST) {
                const part = lengths.slice(done, done + MAX_BURST);
                burst.count = part.length;
                burst.aadLength = transform.family === 'aead' ? [8, 12][done === 0 ? 0 : 1] : 0;
                randomNonces(random, burst);
                for (const [i, length] of part.entries()) layOut(burst, i, STRIDE, 24, length);
                roundTrip(own, memory, burst, transform, random);
              }
            });
          },
        );

        it.each(TYPICAL.filter((one) => done.includes(one)).map((transform) => [transform.id, transform] as const))(
          '%s agrees for bursts of every size up to the largest, with keys mixed',
          (_, transform) => {
            withEngine(create, MAX_BURST * STRIDE, (own, memory, burst) => {
              const random = new Random(4711);
              const sizes = inLanes(own)
                ? [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 255, 256]
                : [1, 2, 17, MAX_BURST];
              for (const size of sizes) {
                burst.count = size;
                burst.aadLength = transform.family === 'aead' ? 8 : 0;
                randomNonces(random, burst);
                for (let i = 0; i < size; i++) layOut(burst, i, STRIDE, 24, 16 * (1 + random.below(16)));
                roundTrip(own, memory, burst, transform, random);
              }
            });
          },
        );

        it('agrees on texts of 1400 to 9000 bytes', () => {
          for (const transform of TYPICAL) {
            if (!done.includes(transform)) continue;
            withEngine(create, 8 * 16384, (own, memory, burst) => {
              const random = new Random(99);
              burst.count = 8;
              burst.aadLength = transform.family === 'aead' ? 12 : 0;
              randomNonces(random, burst);
              const lengths = [1408, 1424, 1456, 1504, 4096, 8000, 8960, 9008];
              for (const [i, length] of lengths.entries()) layOut(burst, i, 16384, 24, length);
              roundTrip(own, memory, burst, transform, random);
            });
          }
        });

        it('refuses a changed nonce and changed AAD', () => {
          for (const transform of done) {
            if (transform.family !== 'aead' && transform.family !== 'gmac') continue;
            withEngine(create, 8192, (own, memory, burst) => {
              const random = new Random(5);
              const keys = randomKeys(random, transform);
              burst.count = 3;
              burst.aadLength = transform.family === 'aead' ? 12 : 0;
              randomNonces(random, burst);
              for (let i = 0; i < 3; i++) layOut(burst, i, STRIDE, 24, 64);
              memory.u8.set(random.bytes(4096));
              use(burst, [own.createContext(transform, keys, 'encrypt')]);
              own.encrypt(transform, burst);
              use(burst, [own.createContext(transform, keys, 'decrypt')]);
              burst.iv[4] ^= 0x8000;
              if (transform.family === 'aead') burst.aad[8 + 2] ^= 1;
              own.decrypt(transform, burst);
              const last = transform.family === 'aead' ? JobStatus.icv : JobStatus.ok;
              expect(statuses(burst)).toEqual([JobStatus.ok, JobStatus.icv, last]);
            });
          }
        });

        it('goes on with many contexts of many transforms side by side, created and destroyed in between', () => {
          withEngine(create, 64 * STRIDE, (own, memory, burst) => {
            const random = new Random(31337);
            const alive: number[] = [];
            for (let round = 0; round < (IS_DEFAULT_PROVIDER ? 60 : 20); round++) {
              const transform = done[random.below(done.length)];
              burst.count = 1 + random.below(64);
              burst.aadLength = transform.family === 'aead' ? [8, 12][random.below(2)] : 0;
              randomNonces(random, burst);
              for (let i = 0; i < burst.count; i++) layOut(burst, i, STRIDE, 24, 16 * (1 + random.below(8)));
              roundTrip(own, memory, burst, transform, random);
              for (let i = 0; i < 5; i++) {
                const other = done[random.below(done.length)];
                alive.push(own.createContext(other, randomKeys(random, other), 'decrypt'));
              }
              own.destroyContext(alive.splice(random.below(alive.length), 1)[0]);
            }
            expect(new Set(alive).size).toBe(alive.length);
          });
        });

        it('goes from one burst object or AAD length to another between two calls of the same kind', () => {
          for (const transform of TYPICAL) {
            if (!done.includes(transform)) continue;
            withEngine(create, 64 * STRIDE, (own, memory, first) => {
              const second = new CryptoBurst();
              try {
                const random = new Random(77);
                const reference = plainMemory(memory.size);
                const judge = new NodeEngine(reference);
                const numbers = contexts(own, judge, transform, random);
                const turns = [first, second, second, first, first, second, first];
                for (const [turn, burst] of turns.entries()) {
                  const text = random.bytes(memory.size);
                  memory.u8.set(text);
                  reference.u8.set(text);
                  burst.count = 40 - 3 * turn;
                  burst.aadLength = transform.family === 'aead' ? [8, 8, 12, 12, 8, 8, 12][turn] : 0;
                  randomNonces(random, burst);
                  for (let i = 0; i < burst.count; i++) layOut(burst, i, STRIDE, 24, 16 * (1 + random.below(12)));
                  use(burst, numbers.encrypt);
                  own.encrypt(transform, burst);
                  use(burst, numbers.judge);
                  judge.encrypt(transform, burst);
                  expect(firstDifference(memory.u8, reference.u8)).toBe(-1);
                }
              } finally {
                second.close();
              }
            });
          }
        });
      });
    });
  }
}
