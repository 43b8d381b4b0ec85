/**
 * What all engines do alike around the arithmetic: refuse jobs that do not fit, compare ICVs in constant time, give out
 * context numbers. A native library follows whatever address it is given, so no job reaches one unchecked.
 */
import type { CryptoBurst, Transform, TransformKeys } from './engine.ts';

/** `createContext` was called with something that the engine cannot do; a caller's mistake. */
export class EngineUsageError extends RangeError {}

/** One direction of a transform in one engine. */
export interface JobRules {
  /** Number of this pair in its engine, at least 1. */
  readonly index: number;
  readonly usesCipher: boolean;
  readonly usesAuth: boolean;
  /** The cipher range must be a multiple of this many bytes (a power of two) … */
  readonly block: number;
  /** … and at least this many. */
  readonly minCipher: number;
  readonly icvLength: number;
}

export function jobRules(transform: Transform, index: number): JobRules {
  const { family, cipher, icvLength } = transform;
  const block = cipher === 'aes-cbc' ? 16 : cipher === '3des-cbc' ? 8 : 1;
  return {
    index,
    usesCipher: family === 'aead' || family === 'cipher-auth',
    usesAuth: family !== 'aead',
    block,
    minCipher: family === 'cipher-auth' && cipher !== 'null' ? block : 0,
    icvLength,
  };
}

/**
 * Index of the first job from `start` on that does not fit, `end` when all do. `members` are the contexts of these rules,
 * `size` the bytes of the memory.
 */
export function fittingRun(
  burst: CryptoBurst,
  start: number,
  end: number,
  rules: JobRules,
  members: Uint32Array,
  size: number,
): number {
  // hot:
  const { usesCipher, usesAuth, block, minCipher, icvLength } = rules;
  const { context, cipherOffset, cipherLength, authOffset, authLength, icvOffset } = burst;
  const lastIcv = size - icvLength;
  for (let i = start; i < end; i++) {
    const c = context[i];
    if (((members[c >>> 5] >>> (c & 31)) & 1) === 0 || icvOffset[i] > lastIcv) return i;
    if (usesCipher) {
      const length = cipherLength[i];
      if (length < minCipher || (length & (block - 1)) !== 0 || cipherOffset[i] + length > size) return i;
    }
    if (usesAuth) {
      const from = authOffset[i];
      const to = from + authLength[i];
      if (to === from || to > size) return i;
      if (usesCipher && (cipherOffset[i] < from || cipherOffset[i] + cipherLength[i] > to)) return i;
    }
  }
  return end;
}

/**
 * Compares `length` bytes (a multiple of 4) at `at` of one memory with those at `bt` (a multiple of 4) of another, in a time
 * that depends on `length` and the alignment of `at` only. Returns 0 when they are equal.
 */
export function differs(
  a8: Uint8Array,
  a16: Uint16Array,
  a32: Uint32Array,
  at: number,
  b8: Uint8Array,
  b16: Uint16Array,
  b32: Uint32Array,
  bt: number,
  length: number,
): number {
  // hot:
  let difference = 0;
  if ((at & 3) === 0) {
    const a = at >>> 2;
    const b = bt >>> 2;
    for (let i = 0; i < length >> 2; i++) difference |= a32[a + i] ^ b32[b + i];
  } else if ((at & 1) === 0) {
    const a = at >>> 1;
    const b = bt >>> 1;
    for (let i = 0; i < length >> 1; i++) difference |= a16[a + i] ^ b16[b + i];
  } else {
    for (let i = 0; i < length; i++) difference |= a8[at + i] ^ b8[bt + i];
  }
  return difference;
}

/** Copies `length` bytes (a multiple of 4) from `bt` (a multiple of 4) of one memory to `at` of another. */
export function copyIcv(
  a8: Uint8Array,
  a16: Uint16Array,
  a32: Uint32Array,
  at: number,
  b8: Uint8Array,
  b16: Uint16Array,
  b32: Uint32Array,
  bt: number,
  length: number,
): void {
  // hot:
  if ((at & 3) === 0) {
    for (let i = 0; i < length >> 2; i++) a32[(at >>> 2) + i] = b32[(bt >>> 2) + i];
  } else if ((at & 1) === 0) {
    for (let i = 0; i < length >> 1; i++) a16[(at >>> 1) + i] = b16[(bt >>> 1) + i];
  } else {
    for (let i = 0; i < length; i++) a8[at + i] = b8[bt + i];
  }
}

/** Throws when the keys are not those of the transform. The message names lengths only. */
export function checkKeys(transform: Transform, keys: TransformKeys): void {
  const { id, cipherKeyLength, authKeyLength } = transform;
  if (keys.cipherKey.length !== cipherKeyLength || keys.authKey.length !== authKeyLength) {
    throw new EngineUsageError(
      `${id} takes keys of ${cipherKeyLength} and ${authKeyLength} bytes, not ${keys.cipherKey.length} and ${keys.authKey.length}`,
    );
  }
}

/**
 * A place for key bytes: outside of V8's heap, which small typed arrays live in, and which leaves copies behind when the
 * collector moves them. The caller wipes it.
 */
export function keyBytes(content: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(new ArrayBuffer(content.length));
  bytes.set(content);
  return bytes;
}

/** Gives out context numbers 1, 2, 3 … and remembers the rules index of each; freed numbers are given out again. */
export class ContextNumbers {
  /** Rules index of each context; 0 is free. */
  #kinds = new Uint16Array(64);
  /** By rules index. */
  readonly #members: Uint32Array[] = [];
  readonly #free: number[] = [];
  #next = 1;

  get capacity(): number {
    return this.#kinds.length;
  }

  take(kind: number): number {
    const context = this.#free.pop() ?? this.#next++;
    if (context >= this.#kinds.length) this.#grow();
    this.#kinds[context] = kind;
    this.membersOf(kind)[context >>> 5] |= 1 << (context & 31);
    return context;
  }

  give(context: number): void {
    if (!this.isTaken(context)) throw new EngineUsageError(`context ${context} does not exist`);
    this.membersOf(this.#kinds[context])[context >>> 5] &= ~(1 << (context & 31));
    this.#kinds[context] = 0;
    this.#free.push(context);
  }

  isTaken(context: number): boolean {
    return Number.isInteger(context) && context > 0 && context < this.#next && this.#kinds[context] !== 0;
  }

  /** Rules index of a context, 0 if it is free. */
  kindOf(context: number): number {
    return this.#kinds[context] ?? 0;
  }

  /**
   * The contexts with a rules index, a bit each, from bit 0 of word 0 on. A bit and not the index itself, because the jobs of many SAs
   * hit it at random, and so it stays in the cache. A new array when there are more contexts: read it anew for every burst.
   */
  membersOf(kind: number): Uint32Array {
    // hot:
    const members = this.#members[kind];
    if (members !== undefined) return members;
    for (let i = this.#members.length; i <= kind; i++) this.#members.push(new Uint32Array(this.capacity >>> 5));
    return this.#members[kind];
  }

  *taken(): Generator<number> {
    for (let context = 1; context < this.#next; context++) if (this.#kinds[context] !== 0) yield context;
  }

  #grow(): void {
    this.#kinds = grown(this.#kinds, 2 * this.capacity);
    for (const [kind, members] of this.#members.entries()) this.#members[kind] = grown(members, this.capacity >>> 5);
  }
}

/** A copy of `array` with room for `length` elements. */
export function grown<T extends Uint16Array | Uint32Array | Float64Array>(array: T, length: number): T {
  const larger = new (array.constructor as new (length: number) => T)(length);
  larger.set(array);
  return larger;
}
