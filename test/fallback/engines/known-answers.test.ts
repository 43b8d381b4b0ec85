import { describe, expect, it, vi } from 'vitest';
import { CryptoBurst, type CryptoEngine, JobStatus, type Transform } from '../../../src/fallback/engines/engine.ts';
import {
  answerKeys,
  answerOf,
  checkKnownAnswers,
  KnownAnswer,
  layOutJobs,
} from '../../../src/fallback/engines/known-answers.ts';
import { ANSWERS } from '../../../src/fallback/engines/known-answers-table.ts';
import { OpensslEngine } from '../../../src/fallback/engines/openssl.ts';
import { TRANSFORMS, transformById } from '../../../src/fallback/engines/transform.ts';
import type { MappedMemory } from '../../../src/sys/memory.ts';
import { NodeEngine, plainMemory } from '../node-engine.ts';

vi.setConfig({ testTimeout: 30_000 });

describe('known answers', () => {
  it.each(TRANSFORMS.map((transform) => [transform.id, transform] as const))(
    'of %s are what node:crypto computes',
    (id, transform) => {
      const burst = new CryptoBurst();
      try {
        const results = [8, 12].map((aadLength) => {
          const memory = plainMemory(KnownAnswer.size);
          const judge = new NodeEngine(memory);
          layOutJobs(transform, memory.u8, burst, aadLength);
          const contexts = [0, 1] as const;
          const numbers = contexts.map((which) => judge.createContext(transform, answerKeys(transform, which)));
          for (let i = 0; i < burst.count; i++) burst.context[i] = numbers[i & 1];
          judge.encrypt(transform, burst);
          return memory.u8;
        });
        expect(ANSWERS[id]).toBe(answerOf(results));
      } finally {
        burst.close();
      }
    },
  );

  it('exist for exactly the transforms there are', () => {
    expect(Object.keys(ANSWERS).sort()).toEqual(TRANSFORMS.map(({ id }) => id).sort());
  });
});

/** An engine of which one method is spoilt. */
class Spoilt implements CryptoEngine {
  readonly name = 'openssl';
  readonly version = 'spoilt';
  readonly #inner: OpensslEngine;
  readonly #memory: MappedMemory;
  readonly #how: string;

  constructor(memory: MappedMemory, how: string) {
    this.#inner = new OpensslEngine(memory);
    this.#memory = memory;
    this.#how = how;
  }

  supports(transform: Transform): boolean {
    return this.#inner.supports(transform);
  }

  createContext(...args: Parameters<CryptoEngine['createContext']>): number {
    return this.#inner.createContext(...args);
  }

  destroyContext(context: number): void {
    this.#inner.destroyContext(context);
  }

  encrypt(transform: Transform, burst: CryptoBurst): void {
    if (this.#how === 'one key for all') burst.context.fill(burst.context[0]);
    this.#inner.encrypt(transform, burst);
    if (this.#how === 'an ICV bit') this.#memory.u8[burst.icvOffset[3]] ^= 1;
    if (this.#how === 'a byte behind the ICV') this.#memory.u8[burst.icvOffset[5] + transform.icvLength] ^= 0xff;
    if (this.#how === 'a failed job') burst.status[2] = JobStatus.failed;
  }

  decrypt(transform: Transform, burst: CryptoBurst): void {
    this.#inner.decrypt(transform, burst);
    if (this.#how === 'a text byte') this.#memory.u8[burst.cipherOffset[4] + 7] ^= 1;
    if (this.#how === 'no ICV check') burst.status.fill(JobStatus.ok);
    if (this.#how === 'all refused') burst.status.fill(JobStatus.icv);
  }

  close(): void {
    this.#inner.close();
  }
}

describe('the check of known answers', () => {
  const ids = ['aes-128-gcm-16', 'aes-256-gmac-16', 'aes-128-cbc+hmac-sha256-16', 'hmac-sha1-12'];
  const transforms = ids.map((id) => transformById(id)).filter((one) => one !== undefined);

  it('lets an engine that is right pass', () => {
    expect(transforms).toHaveLength(ids.length);
    for (const one of transforms) expect(checkKnownAnswers(one, (memory) => new OpensslEngine(memory))).toBeUndefined();
  });

  it.each([
    ['one key for all', 'it refused its own ICV'],
    ['an ICV bit', 'it refused its own ICV'],
    ['a byte behind the ICV', 'the answer differs'],
    ['a failed job', 'it did not encrypt'],
    ['no ICV check', 'it accepted a changed packet'],
    ['all refused', 'it refused its own ICV'],
  ])('catches %s in every family of transforms', (how, wrong) => {
    for (const one of transforms) expect(checkKnownAnswers(one, (memory) => new Spoilt(memory, how))).toBe(wrong);
  });

  it('catches a wrong byte of text', () => {
    const wrong = checkKnownAnswers(transforms[0], (memory) => new Spoilt(memory, 'a text byte'));
    expect(wrong).toBe('it did not restore the text');
  });

  it('knows no answer for a transform of somebody else', () => {
    const own: Transform = { ...transforms[0], id: 'own' };
    expect(checkKnownAnswers(own, (memory) => new OpensslEngine(memory))).toBe('there is no known answer');
  });
});
