/**
 * A nonce is never used twice: AES-GCM and the other counter modes lose their secrecy and their authenticity with one repeated nonce
 * (RFC 4106, section 1; RFC 8221, section 3).
 *
 * An SA object cannot carry a start sequence and does not say how the device makes its IVs. So an outbound SA that ran
 * inline has used every nonce of its key and salt, and is not created again: after a reset, a crash, or a move to software, the way
 * out is a new key. In software the nonces are counted, and a key may come back with a start beyond the last one
 * used. What is remembered is a keyed hash of key and salt, for as long as the process lives and, when a path is given, on disk.
 *
 * Left out: inbound SAs (the peer makes their nonces), and transforms with random IVs.
 */
import { createHmac, randomBytes } from 'node:crypto';
import { IpsecError } from '../errors.ts';
import { nonceMaterial } from '../fallback/nonce-material.ts';
import { NonceFile } from './nonce-file.ts';
import type { Where } from './placement.ts';
import type { SecurityAssociation } from './sa.ts';

/** IVs of counter modes are 8 bytes: one more than the last. */
const IV_END = 1n << 64n;
const SEQUENCE_END = 1n << 32n;

/** IVs from 0 to `next - 1` have been used, or may have been; `live` while an SA goes on using them. */
interface Used {
  next: bigint;
  live: boolean;
}

/** What one process remembers. Hashes are keyed with random bytes that exist nowhere else. */
export class NonceMemory {
  readonly #pepper = randomBytes(32);
  readonly #used = new Map<string, Used>();

  fingerprint(material: Uint8Array): string {
    return fingerprint(this.#pepper, material);
  }

  get(id: string): Used | undefined {
    return this.#used.get(id);
  }

  set(id: string, used: Used | undefined): void {
    if (used === undefined) this.#used.delete(id);
    else this.#used.set(id, used);
  }
}

/** Shared by all guards of the process. */
const processMemory = new NonceMemory();

/** An SA's right to its nonces. Either `release` or `cancel` is called, once; until then the nonces count as in use. */
export interface NonceClaim {
  /** Whether `sa` has the key and salt of this claim, or no nonces to guard, as the claim's own SA. */
  covers(sa: SecurityAssociation): boolean;
  /**
   * Asks whether the SA may go on as `sa`, with the same key and salt, where it is: with more sequence numbers it has more IVs, which go over the
   * end and come back to those of earlier SAs. Throws IpsecError `NONCE_REUSE`; changes nothing.
   */
  checkModify(sa: SecurityAssociation): void;
  /**
   * The SA is over. `nextSequence` is the number that its next packet would have had; without it every nonce counts as used.
   */
  release(nextSequence?: bigint): void;
  /** Surely no packet was sent with the SA where it is: nothing has been used since it came there. */
  cancel(): void;
  /**
   * Asks whether the SA may go on as `sa`, with the same key and salt, in another place. `nextSequence` is the number that its next packet
   * would have had where it is, null when surely no packet was sent with it. Throws IpsecError `NONCE_REUSE`; changes nothing.
   */
  checkMove(sa: SecurityAssociation, where: MoveTarget, nextSequence: bigint | null): void;
  /** The SA goes on as `checkMove` has allowed, with the same `nextSequence`. */
  move(sa: SecurityAssociation, where: MoveTarget, nextSequence: bigint | null): void;
}

/** Where an SA goes on: `inline-sequence` is a device that is known to use the sequence number as explicit IV. */
export type MoveTarget = Where | 'inline-sequence';

const nothingToGuard: NonceClaim = {
  covers: (sa) => !hasCountedNonces(sa),
  checkModify: () => {},
  release: () => {},
  cancel: () => {},
  checkMove: () => {},
  move: () => {},
};

/** A keyed hash of key material, 128 bits in hexadecimal. */
export function fingerprint(pepper: Uint8Array, material: Uint8Array): string {
  // Not a slice of a longer string, which would be kept with it.
  return createHmac('sha256', pepper).update(material).digest().toString('hex', 0, 16);
}

/** What the nonces of an outbound SA are counted under; null when they are not its to count. The caller wipes it. */
function materialOf(sa: SecurityAssociation): Uint8Array | null {
  return sa.direction === 'outbound' ? nonceMaterial(sa) : null;
}

function hasCountedNonces(sa: SecurityAssociation): boolean {
  const material = materialOf(sa);
  material?.fill(0);
  return material !== null;
}

/** The first explicit IV of an SA, and how many it could use until its sequence numbers run out. */
function plannedIvs(sa: SecurityAssociation, where: MoveTarget): { first: bigint; room: bigint } {
  let first = sa.initial.sequence;
  if (where !== 'inline-sequence' && sa.initial.iv !== undefined) {
    first = 0n;
    for (const byte of sa.initial.iv) first = (first << 8n) | BigInt(byte);
  }
  return { first, room: (sa.options.esn ? IV_END : SEQUENCE_END) - sa.initial.sequence };
}

export class NonceGuard {
  readonly #memory: NonceMemory;
  readonly #file: NonceFile | null;

  /** With `path`, also what earlier processes used is refused. Throws IpsecError `NONCE_FILE_INVALID` or `NONCE_FILE_FAILED`. */
  constructor(options: { readonly path?: string; readonly memory?: NonceMemory } = {}) {
    this.#memory = options.memory ?? processMemory;
    this.#file = options.path === undefined ? null : NonceFile.open(options.path);
  }

  /**
   * Asks for the nonces that `sa` will use in its place, before the SA is made. Throws IpsecError `NONCE_REUSE` when one of them was used or
   * may be used; then nothing has changed.
   */
  claim(sa: SecurityAssociation, where: Where): NonceClaim {
    const material = materialOf(sa);
    if (material === null) return nothingToGuard;
    try {
      return this.#claim(sa, where, material);
    } finally {
      material.fill(0);
    }
  }

  #claim(sa: SecurityAssociation, where: Where, material: Uint8Array): NonceClaim {
    const memory = this.#memory;
    const file = this.#file;
    const id = memory.fingerprint(material);
    const before = memory.get(id);
    if (before !== undefined) refuseOverlap(sa, where, before.next, before.live);
    const fileId = file === null ? '' : fingerprint(file.pepper, material);
    const fileBefore = file?.claim(fileId, (used) => refuseOverlap(sa, where, used.next, used.live)) ?? 0n;
    memory.set(id, { next: before?.next ?? fileBefore, live: true });
    return new Claim({ memory, file, id, fileId, before, fileBefore }, offsetOf(sa, where));
  }

  close(): void {
    this.#file?.close();
  }
}

/** What a claim needs for its end; nothing of the SA, which has keys. */
interface ClaimState {
  readonly memory: NonceMemory;
  readonly file: NonceFile | null;
  readonly id: string;
  readonly fileId: string;
  readonly before: Used | undefined;
  readonly fileBefore: bigint;
}

/** What the explicit IV is ahead of the sequence number; null when nobody counts. */
function offsetOf(sa: SecurityAssociation, where: MoveTarget): bigint | null {
  return where === 'software' ? plannedIvs(sa, where).first - sa.initial.sequence : null;
}

class Claim implements NonceClaim {
  readonly #memory: NonceMemory;
  readonly #file: NonceFile | null;
  readonly #id: string;
  readonly #fileId: string;
  readonly #before: Used | undefined;
  readonly #fileBefore: bigint;
  #offset: bigint | null;
  /** Explicit IVs below this were used in the places where the SA was before. */
  #carried = 0n;
  #open = true;

  constructor(state: ClaimState, offset: bigint | null) {
    this.#memory = state.memory;
    this.#file = state.file;
    this.#id = state.id;
    this.#fileId = state.fileId;
    this.#before = state.before;
    this.#fileBefore = state.fileBefore;
    this.#offset = offset;
  }

  covers(sa: SecurityAssociation): boolean {
    const material = materialOf(sa);
    const same = material !== null && this.#memory.fingerprint(material) === this.#id;
    material?.fill(0);
    return same;
  }

  release(nextSequence?: bigint): void {
    if (!this.#open) return;
    this.#open = false;
    const next = this.#usedUntil(nextSequence);
    this.#memory.set(this.#id, { next, live: false });
    this.#file?.free(this.#fileId, next);
  }

  checkModify({ options }: SecurityAssociation): void {
    const end = (options.esn ? IV_END : SEQUENCE_END) + (this.#offset ?? 0n);
    if (end > IV_END && this.#earlier !== 0n) throw reused();
  }

  checkMove(sa: SecurityAssociation, where: MoveTarget, nextSequence: bigint | null): void {
    refuseOverlap(sa, where, nextSequence === null ? this.#earlier : this.#usedUntil(nextSequence), false);
  }

  /** Explicit IVs below this were used before the SA came to where it is. */
  get #earlier(): bigint {
    return later(later(this.#before?.next ?? 0n, this.#fileBefore), this.#carried);
  }

  move(sa: SecurityAssociation, where: MoveTarget, nextSequence: bigint | null): void {
    if (nextSequence !== null) this.#carried = this.#usedUntil(nextSequence);
    this.#offset = offsetOf(sa, where);
  }

  #usedUntil(nextSequence: bigint | undefined): bigint {
    const end = this.#offset !== null && nextSequence !== undefined ? nextSequence + this.#offset : IV_END;
    return later(end > IV_END ? IV_END : end, this.#carried);
  }

  cancel(): void {
    if (!this.#open) return;
    this.#open = false;
    if (this.#carried !== 0n) {
      this.#memory.set(this.#id, { next: this.#carried, live: false });
      this.#file?.free(this.#fileId, this.#carried);
      return;
    }
    this.#memory.set(this.#id, this.#before);
    this.#file?.free(this.#fileId, this.#fileBefore);
  }
}

function later(a: bigint, b: bigint): bigint {
  return a > b ? a : b;
}

const HINT = { hint: 'Give the SA a new key.' } as const;

function reused(): IpsecError {
  return new IpsecError(
    'NONCE_REUSE',
    'an outbound SA with this key and salt has sent packets with these nonces',
    HINT,
  );
}

function refuseOverlap(sa: SecurityAssociation, where: MoveTarget, next: bigint, live: boolean): void {
  if (live) throw new IpsecError('NONCE_REUSE', 'another outbound SA uses the same key and salt', HINT);
  if (next === 0n) return;
  if (where === 'inline') {
    const what = 'an outbound SA with this key and salt has sent packets: the device would repeat its nonces';
    throw new IpsecError('NONCE_REUSE', what, HINT);
  }
  const { first, room } = plannedIvs(sa, where);
  if (first < next || first + room > IV_END) throw reused();
}
