/**
 * The engine for speed: libipsec-mb through its burst interface, two native calls for a burst of up to 128 jobs and a third
 * when algorithms keep jobs back to fill their lanes (CBC, HMAC, XCBC, CMAC, CCM).
 *
 * One burst:
 * 1. `get_next_burst` hands out job slots inside of the manager.
 * 2. Each slot is filled by typed-array stores. What only depends on the transform, the direction, the burst object and the
 *    position in it is the constant part. It stays in the slot: while the library hands out the same slots for the same
 *    transform and burst object, only 10 words a job are written.
 * 3. `submit_burst_nocheck` runs them; `flush_burst` until none is left, so that every burst ends with an empty queue.
 * 4. The status of each slot is read; should one not be complete, the run has failed. To decrypt, the tag that the library computed is compared with the one received.
 *
 * The library's own argument checks cost a quarter of the rate at 64 bytes. They are on for the known answers (`checked`),
 * which each transform passes before it is used; every job is checked against the memory here in any case.
 *
 * Left out: AES-CCM with 192-bit keys, which the library does not have, and HMAC keys longer than a block.
 */
import type { NativeFunction } from '../../sys/ffi/provider.ts';
import { type MappedMemory, unmapMemory } from '../../sys/memory.ts';
import { ContextNumbers, checkKeys, differs, EngineUsageError, fittingRun } from './checks.ts';
import {
  BurstOffset,
  type CryptoBurst,
  type CryptoEngine,
  JobStatus,
  type Transform,
  type TransformKeys,
} from './engine.ts';
import * as keys from './ipsec-mb-keys.ts';
import { IMB_COMPLETED, type ImbLayout, ImbLimit } from './ipsec-mb-layout.ts';
import { acquireManager, type ImbManager, releaseManager } from './ipsec-mb-library.ts';
import { touchKeys } from './ipsec-mb-lines.ts';
import { FAMILY, type ImbShapes, type Shape, shapesOf, writeShape } from './ipsec-mb-shape.ts';
import { high, low, mapUnbroken, untilCarry } from './native-memory.ts';
import { MAX_ICV } from './transform.ts';

// Bound in this module: V8 folds constants of its own module only.
const { FEW_CONTEXTS, KeySlot, REGION_MASK, REGION_SHIFT } = keys;

const TAG_STRIDE = MAX_ICV;
/** Scratch: the list of job pointers, then computed tags. */
const Scratch = { list: 0, tags: 8 * ImbLimit.burst, size: (8 + TAG_STRIDE) * ImbLimit.burst } as const;
/** Bytes of AAD that a burst has room for. */
const MAX_AAD = 16;

export class IpsecMbEngine implements CryptoEngine {
  readonly name = 'ipsec-mb';
  readonly version: string;
  readonly #layout: ImbLayout;
  readonly #memory: MappedMemory;
  readonly #scratch: MappedMemory;
  readonly #keys: keys.KeySlots;
  readonly #shapes: ImbShapes;
  readonly #getNextBurst: NativeFunction;
  readonly #submit: NativeFunction;
  readonly #flushBurst: NativeFunction;
  readonly #manager: number;
  readonly #managerLow: number;
  /** The manager as words: the jobs are inside, from `#jobsBegin` to `#jobsEnd`. */
  readonly #jobs: Uint32Array;
  readonly #jobsBegin: number;
  readonly #jobsEnd: number;
  readonly #jobWords: number;
  readonly #list: Uint32Array;
  /** Where the memory crosses a multiple of 4 GiB, if it does. */
  readonly #place: { readonly carry: number; readonly crosses: boolean };
  readonly #contexts = new ContextNumbers();
  /** For what the constant part of the slots was last written, from which slot (a word index) and job on, for how many. */
  #shape: Shape | undefined;
  #burst: CryptoBurst | undefined;
  #aadLength = 0;
  #first = 0;
  #start = 0;
  #written = 0;
  #lastEncrypt: Shape | undefined;
  #lastDecrypt: Shape | undefined;
  /** Jobs were left in the library, which may still write: nothing more is given to it. */
  #stuck = false;
  #closed = false;

  /** `checked`: with the library's own argument checks. Throws `EngineError`. */
  constructor(memory: MappedMemory, options: { readonly checked?: boolean } = {}) {
    const manager: ImbManager = acquireManager();
    this.#layout = manager.layout;
    this.version = `libipsec-mb ${manager.layout.name}`;
    this.#memory = memory;
    this.#scratch = mapUnbroken(Scratch.size);
    this.#keys = new keys.KeySlots(manager);
    this.#shapes = shapesOf(manager);
    this.#getNextBurst = manager.getNextBurst;
    this.#submit = options.checked === true ? manager.submitBurst : manager.submitBurstNoCheck;
    this.#flushBurst = manager.flushBurst;
    this.#manager = manager.memory.address;
    this.#managerLow = manager.memory.address | 0;
    this.#jobs = manager.memory.u32;
    this.#jobWords = manager.layout.job.size >> 2;
    this.#jobsBegin = manager.layout.manager.jobs >> 2;
    this.#jobsEnd = this.#jobsBegin + ImbLimit.jobs * this.#jobWords;
    this.#list = this.#scratch.u32.subarray(Scratch.list >> 2, (Scratch.list >> 2) + 2 * ImbLimit.burst);
    const carry = untilCarry(memory.address);
    this.#place = { carry, crosses: memory.size > carry };
  }

  supports(transform: Transform): boolean {
    if (transform.cipher === 'aes-ccm' && transform.cipherKeyLength === 24) return false;
    return transform.authKeyLength <= keys.maxAuthKey(transform.auth);
  }

  createContext(transform: Transform, keys: TransformKeys, direction: 'encrypt' | 'decrypt'): number {
    if (this.#closed) throw new EngineUsageError('the engine is closed');
    if (!this.supports(transform)) throw new EngineUsageError(`${this.version} has no ${transform.id}`);
    checkKeys(transform, keys);
    const context = this.#contexts.take(this.#shapes.of(transform)[direction].index);
    try {
      this.#keys.write(context, transform, keys);
    } catch (error) {
      this.#contexts.give(context);
      throw error;
    }
    return context;
  }

  destroyContext(context: number): void {
    this.#contexts.give(context);
    this.#keys.wipe(context);
  }

  encrypt(transform: Transform, burst: CryptoBurst): void {
    // hot:
    let shape = this.#lastEncrypt;
    if (shape === undefined || shape.transform !== transform) {
      shape = this.#shapes.of(transform).encrypt;
      this.#lastEncrypt = shape;
    }
    this.#run(shape, burst);
  }

  decrypt(transform: Transform, burst: CryptoBurst): void {
    // hot:
    let shape = this.#lastDecrypt;
    if (shape === undefined || shape.transform !== transform) {
      shape = this.#shapes.of(transform).decrypt;
      this.#lastDecrypt = shape;
    }
    this.#run(shape, burst);
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const context of [...this.#contexts.taken()]) this.#contexts.give(context);
    this.#keys.close();
    this.#scratch.u8.fill(0);
    unmapMemory(this.#scratch);
    releaseManager();
  }

  /** Does all jobs of the burst that fit, in runs of as many as the library takes at once. */
  #run(shape: Shape, burst: CryptoBurst): void {
    // hot:
    const { count, status, aadLength } = burst;
    if (shape !== this.#shape || burst !== this.#burst || aadLength !== this.#aadLength) {
      this.#shape = shape;
      this.#burst = burst;
      this.#aadLength = aadLength;
      this.#written = 0;
    }
    const usable = aadLength <= MAX_AAD && !this.#closed && !this.#stuck;
    let start = 0;
    while (start < count) {
      const n = Math.min(count - start, ImbLimit.burst);
      const done = usable ? this.#submitRun(shape, burst, start, n) : 0;
      if (done < n) status[start + done] = JobStatus.failed;
      start += done < n ? done + 1 : n;
    }
  }

  /** Does the jobs from `start` on up to the first that does not fit, at most `n`; returns how many. */
  #submitRun(shape: Shape, burst: CryptoBurst, start: number, n: number): number {
    // hot:
    const manager = this.#manager;
    const list = this.#scratch.address;
    if (this.#getNextBurst(manager, n, list) !== n) return this.#giveUp(burst, start, 0);
    const first = (this.#list[0] - this.#managerLow) >>> 2;
    if (this.#shapes.writer !== this || first !== this.#first || start !== this.#start) {
      this.#shapes.writer = this;
      this.#first = first;
      this.#start = start;
      this.#written = 0;
    }
    if (this.#written < n && !this.#writeConstants(shape, burst, n)) return this.#giveUp(burst, start, 0);
    touchKeys(this.#keys, this.#contexts, shape, burst, start, n);
    const fitting = shape.family === FAMILY.aead ? this.#fillAead(shape, burst, n) : this.#fillAuth(shape, burst, n);
    if (fitting === 0) return 0;
    let done = this.#submit(manager, fitting, list);
    while (done < fitting) {
      const more = this.#flushBurst(manager, fitting - done, list);
      if (more === 0) return this.#giveUp(burst, start, fitting);
      done += more;
    }
    this.#collect(shape, burst, fitting);
    return fitting;
  }

  /** The library did not answer as it must. What it holds of jobs it may still write: it gets nothing more. */
  #giveUp(burst: CryptoBurst, start: number, n: number): number {
    this.#stuck = true;
    burst.status.fill(JobStatus.failed, start, start + n);
    return n;
  }

  /**
   * Writes the constant part of the slots that do not have it yet, and checks that the slots are where the library says:
   * one behind the other from the first on, going round at the end. Returns false when they are not.
   */
  #writeConstants(shape: Shape, burst: CryptoBurst, n: number): boolean {
    // hot:
    const list = this.#list;
    let q = this.#first;
    for (let k = 0; k < n; k++) {
      if ((list[2 * k] - this.#managerLow) >>> 2 !== q) return false;
      if (k >= this.#written) this.#writeConstant(q, k, shape, burst);
      q = q + this.#jobWords === this.#jobsEnd ? this.#jobsBegin : q + this.#jobWords;
    }
    this.#written = n;
    return true;
  }

  #writeConstant(q: number, k: number, shape: Shape, burst: CryptoBurst): void {
    // hot:
    const words = this.#jobs;
    const { job } = this.#layout;
    const i = this.#start + k;
    const iv = burst.memory.address + BurstOffset.iv + 16 * i;
    const top = high(this.#memory.address);
    writeShape(this.#layout, words, q, shape);
    words[q + (job.source >> 2) + 1] = top;
    words[q + (job.destination >> 2) + 1] = top;
    words[q + (job.iv >> 2)] = low(iv);
    words[q + (job.iv >> 2) + 1] = high(iv);
    if (shape.encrypting) {
      words[q + (job.tag >> 2) + 1] = top;
    } else {
      const tag = this.#scratch.address + Scratch.tags + TAG_STRIDE * k;
      words[q + (job.tag >> 2)] = low(tag);
      words[q + (job.tag >> 2) + 1] = high(tag);
    }
    if (shape.family === FAMILY.aead) {
      const aad = burst.memory.address + BurstOffset.aad + 16 * i;
      words[q + (job.argument0 >> 2)] = low(aad);
      words[q + (job.argument0 >> 2) + 1] = high(aad);
      words[q + (job.argument1 >> 2)] = burst.aadLength;
      words[q + (job.argument1 >> 2) + 1] = 0;
    } else if (shape.family === FAMILY.gmac) {
      words[q + (job.argument1 >> 2)] = low(iv);
      words[q + (job.argument1 >> 2) + 1] = high(iv);
    }
  }

  /** Fills the slots of the run; returns how many jobs fit before the first that does not. */
  #fillAead(shape: Shape, burst: CryptoBurst, n: number): number {
    // hot:
    const words = this.#jobs;
    const { job } = this.#layout;
    const ENC = job.encryptKeys >> 2;
    const DEC = job.decryptKeys >> 2;
    const SRC = job.source >> 2;
    const DST = job.destination >> 2;
    const CLEN = job.cipherLength >> 2;
    const HLEN = job.hashLength >> 2;
    const TAG = job.tag >> 2;
    const STATUS = job.status >> 2;
    const { context, cipherOffset, cipherLength, icvOffset } = burst;
    const { index, encrypting } = shape;
    const members = this.#contexts.membersOf(index);
    const { low: regionLow, high: regionHigh, slotSize } = this.#keys;
    const address = this.#memory.address | 0;
    const { size } = this.#memory;
    const lastIcv = size - shape.icvLength;
    const { carry, crosses } = this.#place;
    const step = this.#jobWords;
    const begin = this.#jobsBegin;
    const end = this.#jobsEnd;
    const start = this.#start;
    let q = this.#first;
    for (let k = 0; k < n; k++) {
      const c = context[start + k];
      const from = cipherOffset[start + k];
      const length = cipherLength[start + k];
      const icv = icvOffset[start + k];
      if (((members[c >>> 5] >>> (c & 31)) & 1) === 0 || from + length > size || icv > lastIcv) return k;
      const region = c < FEW_CONTEXTS ? 0 : 1 + (c >>> REGION_SHIFT);
      const key = (regionLow[region] + Math.imul(c & REGION_MASK, slotSize)) | 0;
      const keyTop = regionHigh[region];
      words[q + ENC] = key;
      words[q + ENC + 1] = keyTop;
      words[q + SRC] = (address + from) | 0;
      words[q + DST] = (address + from) | 0;
      words[q + CLEN] = length;
      words[q + HLEN] = length;
      words[q + STATUS] = 0;
      if (encrypting) {
        words[q + TAG] = (address + icv) | 0;
      } else {
        // Which of the two GCM reads to decrypt depends on the version.
        words[q + DEC] = key;
        words[q + DEC + 1] = keyTop;
      }
      if (crosses) {
        const top = high(this.#memory.address);
        words[q + SRC + 1] = from < carry ? top : top + 1;
        words[q + DST + 1] = from < carry ? top : top + 1;
        if (encrypting) words[q + TAG + 1] = icv < carry ? top : top + 1;
      }
      q = q + step === end ? begin : q + step;
    }
    return n;
  }

  /** The same for all families with an auth range: the job's source is its start, the cipher range lies inside. */
  #fillAuth(shape: Shape, burst: CryptoBurst, n: number): number {
    // hot:
    const words = this.#jobs;
    const { job } = this.#layout;
    const ENC = job.encryptKeys >> 2;
    const DEC = job.decryptKeys >> 2;
    const SRC = job.source >> 2;
    const DST = job.destination >> 2;
    const CSTART = job.cipherStart >> 2;
    const CLEN = job.cipherLength >> 2;
    const HLEN = job.hashLength >> 2;
    const TAG = job.tag >> 2;
    const ARG0 = job.argument0 >> 2;
    const ARG1 = job.argument1 >> 2;
    const ARG2 = job.argument2 >> 2;
    const STATUS = job.status >> 2;
    const { context, cipherOffset, cipherLength, authOffset, authLength, icvOffset } = burst;
    const { encrypting, encryptKeys, decryptKeys, auth0, auth1 } = shape;
    const gmac = shape.family === FAMILY.gmac;
    const ciphers = shape.family === FAMILY['cipher-auth'];
    const start = this.#start;
    const fitting =
      fittingRun(burst, start, start + n, shape, this.#contexts.membersOf(shape.index), this.#memory.size) - start;
    const address = this.#memory.address | 0;
    const { carry, crosses } = this.#place;
    const { low: regionLow, high: regionHigh, slotSize } = this.#keys;
    let q = this.#first;
    for (let k = 0; k < fitting; k++) {
      const i = start + k;
      const c = context[i];
      const region = c < FEW_CONTEXTS ? 0 : 1 + (c >>> REGION_SHIFT);
      const key = (regionLow[region] + Math.imul(c & REGION_MASK, slotSize)) | 0;
      const keyTop = regionHigh[region];
      const auth = authOffset[i];
      const cipher = cipherOffset[i];
      words[q + SRC] = (address + auth) | 0;
      words[q + HLEN] = authLength[i];
      words[q + ARG0] = key + auth0;
      words[q + ARG0 + 1] = keyTop;
      if (!gmac) {
        words[q + ARG1] = key + auth1;
        words[q + ARG1 + 1] = keyTop;
        words[q + ARG2] = key + KeySlot.subkey2;
        words[q + ARG2 + 1] = keyTop;
      }
      if (ciphers) {
        words[q + ENC] = key + encryptKeys;
        words[q + ENC + 1] = keyTop;
        words[q + DEC] = key + decryptKeys;
        words[q + DEC + 1] = keyTop;
        words[q + DST] = (address + cipher) | 0;
        words[q + CSTART] = cipher - auth;
        words[q + CLEN] = cipherLength[i];
      }
      words[q + STATUS] = 0;
      if (encrypting) words[q + TAG] = (address + icvOffset[i]) | 0;
      if (crosses) {
        const top = high(this.#memory.address);
        words[q + SRC + 1] = auth < carry ? top : top + 1;
        words[q + DST + 1] = cipher < carry ? top : top + 1;
        if (encrypting) words[q + TAG + 1] = icvOffset[i] < carry ? top : top + 1;
      }
      q = q + this.#jobWords === this.#jobsEnd ? this.#jobsBegin : q + this.#jobWords;
    }
    return fitting;
  }

  #collect(shape: Shape, burst: CryptoBurst, n: number): void {
    // hot:
    const words = this.#jobs;
    const STATUS = this.#layout.job.status >> 2;
    const step = this.#jobWords;
    const start = this.#start;
    const { status, icvOffset } = burst;
    let q = this.#first;
    let completed: number = IMB_COMPLETED;
    for (let k = 0; k < n; k++) {
      completed &= words[q + STATUS];
      q = q + step === this.#jobsEnd ? this.#jobsBegin : q + step;
    }
    if (completed !== IMB_COMPLETED) {
      status.fill(JobStatus.failed, start, start + n);
    } else if (shape.encrypting) {
      status.fill(JobStatus.ok, start, start + n);
    } else {
      const { u8, u16, u32 } = this.#memory;
      const tags = this.#scratch;
      const { icvLength } = shape;
      for (let k = 0; k < n; k++) {
        const tag = Scratch.tags + TAG_STRIDE * k;
        const wrong = differs(u8, u16, u32, icvOffset[start + k], tags.u8, tags.u16, tags.u32, tag, icvLength);
        status[start + k] = wrong === 0 ? JobStatus.ok : JobStatus.icv;
      }
    }
  }
}
