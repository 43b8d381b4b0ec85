import { inspect } from 'node:util';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type CryptoBurst, type CryptoEngine, JobStatus, MAX_BURST } from '../../../../src/fallback/engines/engine.ts';
import { transformById } from '../../../../src/fallback/engines/transform.ts';
import type { MappedMemory } from '../../../../src/sys/memory.ts';
import { runs } from '../../../depth.ts';
import { NodeEngine, plainMemory } from '../../node-engine.ts';
import {
  AVAILABLE,
  IS_DEFAULT_PROVIDER,
  layOut,
  Random,
  randomKeys,
  randomNonces,
  TYPICAL,
  usable,
  withEngine,
} from './support.ts';

const STRIDE = 256;
const SIZE = 64 * STRIDE;

function transformNamed(id: string) {
  const transform = transformById(id);
  if (transform === undefined) throw new Error(`no transform ${id}`);
  return transform;
}
const GCM = transformNamed('aes-128-gcm-16');
const CBC = transformNamed('aes-128-cbc+hmac-sha256-16');

/** Ways to spoil job `i` of a burst whose transform is `CBC`. */
const SPOILERS: readonly [string, (burst: CryptoBurst, i: number) => void][] = [
  ['a context that does not exist', (burst, i) => (burst.context[i] = 4_000_000_000)],
  ['context 0', (burst, i) => (burst.context[i] = 0)],
  ['an ICV past the end', (burst, i) => (burst.icvOffset[i] = SIZE - 15)],
  ['an ICV far outside', (burst, i) => (burst.icvOffset[i] = 0xffffffff)],
  ['a text past the end', (burst, i) => (burst.cipherOffset[i] = SIZE - 8)],
  ['a text of 4 GiB', (burst, i) => (burst.cipherLength[i] = 0xfffffff0)],
  ['no text', (burst, i) => (burst.cipherLength[i] = 0)],
  ['a text that is no multiple of the block', (burst, i) => (burst.cipherLength[i] -= 1)],
  ['an auth range past the end', (burst, i) => (burst.authLength[i] = SIZE)],
  ['an auth range of 4 GiB', (burst, i) => (burst.authLength[i] = 0xffffffff)],
  ['an empty auth range', (burst, i) => (burst.authLength[i] = 0)],
  ['a text before the auth range', (burst, i) => (burst.authOffset[i] = burst.cipherOffset[i] + 1)],
  ['a text longer than the auth range', (burst, i) => (burst.authLength[i] -= 1)],
];

function fillBurst(burst: CryptoBurst, count: number, context: number): void {
  burst.count = count;
  burst.aadLength = 0;
  for (let i = 0; i < count; i++) {
    layOut(burst, i, STRIDE, 24, 64);
    burst.context[i] = context;
  }
}

export function robustnessSuite(): void {
  for (const create of AVAILABLE) {
    withEngine(create, 4096, (probe) => {
      describe(`${probe.version} and bad calls`, () => {
        const can = usable(create);

        it.each(SPOILERS)('fails a job with %s, leaves its bytes alone and does the others', (_, spoil) => {
          withEngine(create, SIZE, (engine, memory, burst) => {
            const keys = randomKeys(new Random(3), CBC);
            for (const direction of ['encrypt', 'decrypt'] as const) {
              const context = engine.createContext(CBC, keys, direction);
              for (const bad of [0, 1, 17, 31]) {
                fillBurst(burst, 32, context);
                randomNonces(new Random(9), burst);
                const before = new Random(bad + 1).bytes(SIZE);
                memory.u8.set(before);
                spoil(burst, bad);
                engine[direction](CBC, burst);
                const statuses = Array<number>(32).fill(direction === 'encrypt' ? JobStatus.ok : JobStatus.icv);
                statuses[bad] = JobStatus.failed;
                expect([...burst.status.subarray(0, 32)]).toEqual(statuses);
                const slot = [STRIDE * bad, STRIDE * (bad + 1)] as const;
                expect(Buffer.compare(memory.u8.subarray(...slot), before.subarray(...slot))).toBe(0);
              }
            }
          });
        });

        it('refuses contexts of another transform or direction', () => {
          withEngine(create, SIZE, (engine, _memory, burst) => {
            const random = new Random(1);
            const contexts = [
              engine.createContext(GCM, randomKeys(random, GCM), 'encrypt'),
              engine.createContext(GCM, randomKeys(random, GCM), 'decrypt'),
              engine.createContext(CBC, randomKeys(random, CBC), 'encrypt'),
            ];
            fillBurst(burst, 3, 0);
            burst.aadLength = 8;
            burst.context.set(contexts);
            engine.encrypt(GCM, burst);
            expect([...burst.status.subarray(0, 3)]).toEqual([JobStatus.ok, JobStatus.failed, JobStatus.failed]);
            engine.destroyContext(contexts[0]);
            engine.encrypt(GCM, burst);
            expect([...burst.status.subarray(0, 3)]).toEqual([JobStatus.failed, JobStatus.failed, JobStatus.failed]);
          });
        });

        it('fails the whole burst when the AAD is longer than its room', () => {
          withEngine(create, SIZE, (engine, _memory, burst) => {
            fillBurst(burst, 4, engine.createContext(GCM, randomKeys(new Random(1), GCM), 'encrypt'));
            burst.aadLength = 17;
            engine.encrypt(GCM, burst);
            expect([...burst.status.subarray(0, 4)]).toEqual(Array(4).fill(JobStatus.failed));
          });
        });

        it('does nothing for a burst of no jobs', () => {
          withEngine(create, SIZE, (engine, memory, burst) => {
            fillBurst(burst, 0, 1);
            engine.encrypt(GCM, burst);
            engine.decrypt(CBC, burst);
            expect(memory.u8.every((byte) => byte === 0)).toBe(true);
          });
        });

        it('does the good jobs of any mixture of good and bad ones as node:crypto does', () => {
          const spoilt = fc.array(fc.option(fc.nat(SPOILERS.length - 1), { freq: 3 }), { minLength: 1, maxLength: 64 });
          withEngine(create, SIZE, (engine, memory, burst) => {
            const keys = randomKeys(new Random(12), CBC);
            const context = engine.createContext(CBC, keys, 'encrypt');
            const reference = plainMemory(SIZE);
            const judge = new NodeEngine(reference);
            const judgeContext = judge.createContext(CBC, keys);
            fc.assert(
              fc.property(spoilt, fc.nat(), (jobs, seed) => {
                const text = new Random(seed).bytes(SIZE);
                memory.u8.set(text);
                reference.u8.set(text);
                randomNonces(new Random(seed + 1), burst);
                const iv = burst.iv.slice();
                fillBurst(burst, jobs.length, context);
                for (const [i, spoiler] of jobs.entries()) if (spoiler !== null) SPOILERS[spoiler][1](burst, i);
                engine.encrypt(CBC, burst);
                const got = [...burst.status.subarray(0, jobs.length)];
                expect(got).toEqual(jobs.map((spoiler) => (spoiler === null ? JobStatus.ok : JobStatus.failed)));
                // The judge does the good ones one by one.
                for (const [i, spoiler] of jobs.entries()) {
                  if (spoiler !== null) continue;
                  burst.count = 1;
                  layOut(burst, i, STRIDE, 24, 64);
                  for (const field of [
                    'authOffset',
                    'authLength',
                    'cipherOffset',
                    'cipherLength',
                    'icvOffset',
                  ] as const) {
                    burst[field][0] = burst[field][i];
                  }
                  burst.iv.set(iv.subarray(4 * i, 4 * i + 4));
                  burst.context[0] = judgeContext;
                  judge.encrypt(CBC, burst);
                }
                expect(Buffer.compare(memory.u8, reference.u8)).toBe(0);
              }),
              { numRuns: runs(40) },
            );
          });
        });

        it('refuses keys of a wrong length without telling them', () => {
          withEngine(create, 4096, (engine) => {
            const key = Uint8Array.from({ length: 15 }, () => 0xab);
            expect(() => engine.createContext(GCM, { cipherKey: key, authKey: new Uint8Array(0) }, 'encrypt')).toThrow(
              /^aes-128-gcm-16 takes keys of 16 and 0 bytes, not 15 and 0$/,
            );
            expect(() => engine.createContext(CBC, { cipherKey: key, authKey: key }, 'encrypt')).toThrow(RangeError);
          });
        });

        it('copies keys and shows them to nobody', () => {
          withEngine(create, SIZE, (engine, memory, burst) => {
            const keys = { cipherKey: new Uint8Array(16).fill(0xc5), authKey: new Uint8Array(32).fill(0xd7) };
            const context = engine.createContext(CBC, keys, 'encrypt');
            const run = () => {
              memory.u8.fill(0);
              fillBurst(burst, 1, context);
              burst.iv.fill(0);
              engine.encrypt(CBC, burst);
              return memory.u8.slice();
            };
            const first = run();
            keys.cipherKey.fill(0);
            keys.authKey.fill(0);
            expect(Buffer.compare(run(), first)).toBe(0);
            const shown =
              inspect(engine, { depth: 20, showHidden: true, maxArrayLength: null }) + JSON.stringify(engine);
            for (const text of ['197, 197', '215, 215', 'c5c5', 'd7d7', '3318072773', '3621246935']) {
              expect(shown).not.toContain(text);
            }
          });
        });

        it('fails everything after close, and closes twice', () => {
          withEngine(create, SIZE, (engine, memory, burst) => {
            const context = engine.createContext(CBC, randomKeys(new Random(2), CBC), 'encrypt');
            fillBurst(burst, 4, context);
            engine.close();
            engine.encrypt(CBC, burst);
            expect([...burst.status.subarray(0, 4)]).toEqual(Array(4).fill(JobStatus.failed));
            expect(memory.u8.every((byte) => byte === 0)).toBe(true);
            expect(() => engine.createContext(CBC, randomKeys(new Random(2), CBC), 'encrypt')).toThrow('closed');
            engine.close();
          });
        });

        it('refuses to destroy a context twice', () => {
          withEngine(create, SIZE, (engine) => {
            const context = engine.createContext(GCM, randomKeys(new Random(2), GCM), 'encrypt');
            engine.destroyContext(context);
            for (const bad of [context, 0, -1, 77777, 1.5]) {
              expect(() => engine.destroyContext(bad)).toThrow(RangeError);
            }
          });
        });

        it('holds many contexts at once and gives each its own key', () => {
          withEngine(create, SIZE, (engine, memory, burst) => {
            const reference = plainMemory(SIZE);
            const judge = new NodeEngine(reference);
            const random = new Random(8);
            for (const transform of TYPICAL) {
              if (!can.includes(transform)) continue;
              const keys = Array.from({ length: IS_DEFAULT_PROVIDER ? 300 : 70 }, () => randomKeys(random, transform));
              const contexts = keys.map((one) => engine.createContext(transform, one, 'encrypt'));
              fillMixed(engine, judge, memory, reference, burst, transform, keys, contexts, random);
            }
          });
        });
      });
    });
  }
}

function fillMixed(
  engine: CryptoEngine,
  judge: NodeEngine,
  memory: MappedMemory,
  reference: MappedMemory,
  burst: CryptoBurst,
  transform: typeof GCM,
  keys: readonly { cipherKey: Uint8Array; authKey: Uint8Array }[],
  contexts: readonly number[],
  random: Random,
): void {
  const text = random.bytes(SIZE);
  memory.u8.set(text);
  reference.u8.set(text);
  burst.count = Math.min(64, MAX_BURST);
  burst.aadLength = transform.family === 'aead' ? 8 : 0;
  randomNonces(random, burst);
  const chosen = Array.from({ length: burst.count }, () => random.below(contexts.length));
  for (let i = 0; i < burst.count; i++) {
    layOut(burst, i, STRIDE, 24, 48);
    burst.context[i] = contexts[chosen[i]];
  }
  engine.encrypt(transform, burst);
  for (let i = 0; i < burst.count; i++) burst.context[i] = judge.createContext(transform, keys[chosen[i]]);
  judge.encrypt(transform, burst);
  expect(Buffer.compare(memory.u8, reference.u8)).toBe(0);
}
