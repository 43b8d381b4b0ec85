/**
 * Known answers: what each transform must make of one fixed burst, as the first half of the SHA-256 of the whole memory
 * afterwards, so that a byte written where none belongs shows too. The answers come from `node:crypto` (and from noble where
 * that lacks the algorithm, AES-XCBC-MAC); the test of this file computes them anew.
 *
 * The burst has two keys, texts of several lengths at all alignments, and for AEADs the AAD of ESP with and without extended
 * sequence numbers. Afterwards the engine must restore the text and refuse a changed ICV, a changed text and, where there is
 * one, a changed nonce.
 */
import { createHash } from 'node:crypto';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../../sys/memory.ts';
import { CryptoBurst, type CryptoEngine, JobStatus, type Transform, type TransformKeys } from './engine.ts';
import { ANSWERS } from './known-answers-table.ts';

export const KnownAnswer = { stride: 2048, textLengths: [16, 32, 80, 256, 1408, 64], size: 6 * 2048 } as const;
const JOBS = KnownAnswer.textLengths.length;
/** Where the bytes of a job begin in its slot, and its text after them. */
const AUTH_AT = 64;
const TEXT_AFTER = 24;

function fill(bytes: Uint8Array, seed: number): void {
  for (let i = 0; i < bytes.length; i++) bytes[i] = (seed + 167 * i + (i >> 8)) & 0xff;
}

/** The keys of context 0 or 1. */
export function answerKeys(transform: Transform, which: 0 | 1): TransformKeys {
  const cipherKey = new Uint8Array(transform.cipherKeyLength);
  const authKey = new Uint8Array(transform.authKeyLength);
  fill(cipherKey, 0x11 + which);
  fill(authKey, 0x83 + which);
  return { cipherKey, authKey };
}

/** Fills `bytes` (`KnownAnswer.size`) with the text and `burst` with the jobs; contexts are the caller's. */
export function layOutJobs(transform: Transform, bytes: Uint8Array, burst: CryptoBurst, aadLength: number): void {
  const blocks = transform.cipher === 'aes-cbc' || transform.cipher === '3des-cbc';
  fill(bytes, 0x2f);
  burst.count = JOBS;
  burst.aadLength = transform.family === 'aead' ? aadLength : 0;
  for (let i = 0; i < JOBS; i++) {
    const length = KnownAnswer.textLengths[i] + (blocks ? 0 : 4 * (i % 4));
    const at = KnownAnswer.stride * i + AUTH_AT + i;
    burst.authOffset[i] = at;
    burst.authLength[i] = TEXT_AFTER + length;
    burst.cipherOffset[i] = at + TEXT_AFTER;
    burst.cipherLength[i] = length;
    burst.icvOffset[i] = at + TEXT_AFTER + length;
    for (let word = 0; word < 4; word++) {
      burst.iv[4 * i + word] = 0x01020304 * (word + 1) + i;
      burst.aad[4 * i + word] = 0x10203040 * (word + 1) + i;
    }
  }
}

export function answerOf(memories: readonly Uint8Array[]): string {
  const hash = createHash('sha256');
  for (const bytes of memories) hash.update(bytes);
  return hash.digest('hex').slice(0, 32);
}

/** Whether a job of that transform depends on `burst.iv`. */
function hasNonce(transform: Transform): boolean {
  return transform.family === 'aead' || transform.family === 'gmac';
}

/** Runs the known answers; `create` makes the engine for the memory. Returns what is wrong, or undefined. */
export function checkKnownAnswers(
  transform: Transform,
  create: (memory: MappedMemory) => CryptoEngine,
): string | undefined {
  const expected = ANSWERS[transform.id];
  if (expected === undefined) return 'there is no known answer';
  const memory = mapAnonymous(KnownAnswer.size);
  const burst = new CryptoBurst();
  try {
    const engine = create(memory);
    try {
      return run(transform, engine, memory, burst, expected);
    } finally {
      engine.close();
    }
  } finally {
    burst.close();
    unmapMemory(memory);
  }
}

function run(
  transform: Transform,
  engine: CryptoEngine,
  memory: MappedMemory,
  burst: CryptoBurst,
  expected: string,
): string | undefined {
  const contexts = (direction: 'encrypt' | 'decrypt') =>
    ([0, 1] as const).map((which) => engine.createContext(transform, answerKeys(transform, which), direction));
  const [encrypt, decrypt] = [contexts('encrypt'), contexts('decrypt')];
  const bytes = memory.u8.subarray(0, KnownAnswer.size);
  const use = (numbers: readonly number[]) => {
    for (let i = 0; i < JOBS; i++) burst.context[i] = numbers[i & 1];
  };
  const statuses = () => [...burst.status.subarray(0, JOBS)];
  const results: Uint8Array[] = [];
  for (const aadLength of [8, 12]) {
    layOutJobs(transform, bytes, burst, aadLength);
    const text = bytes.slice();
    use(encrypt);
    engine.encrypt(transform, burst);
    if (statuses().some((status) => status !== JobStatus.ok)) return 'it did not encrypt';
    results.push(bytes.slice());
    use(decrypt);
    engine.decrypt(transform, burst);
    if (statuses().some((status) => status !== JobStatus.ok)) return 'it refused its own ICV';
    for (let i = 0; i < JOBS; i++) {
      const [from, to] = [burst.authOffset[i], burst.icvOffset[i]];
      if (Buffer.compare(bytes.subarray(from, to), text.subarray(from, to)) !== 0) return 'it did not restore the text';
    }
  }
  if (answerOf(results) !== expected) return 'the answer differs';
  // Each of three jobs with one bit changed, and nothing else.
  const changed = [0, 1, ...(hasNonce(transform) ? [2] : [])];
  bytes.set(results[1]);
  bytes[burst.icvOffset[0] + transform.icvLength - 1] ^= 0x01;
  bytes[burst.cipherOffset[1]] ^= 0x80;
  if (hasNonce(transform)) burst.iv[4 * 2 + 1] ^= 0x100;
  engine.decrypt(transform, burst);
  const wanted = statuses().map((_, i) => (changed.includes(i) ? JobStatus.icv : JobStatus.ok));
  return statuses().every((status, i) => status === wanted[i]) ? undefined : 'it accepted a changed packet';
}
