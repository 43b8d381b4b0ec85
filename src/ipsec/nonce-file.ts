/**
 * What `nonce-guard.ts` remembers on disk: a text file, only appended to, one line per event.
 *
 * ```
 *   vipsec-nonce-guard 1 PEPPER .       the first line; PEPPER keys the fingerprints of this file
 *   claim FINGERPRINT OWNER .           an SA is about to use the nonces
 *   free FINGERPRINT OWNER NEXT .       it is over; IVs from 0 to NEXT - 1 have been used
 * ```
 *
 * A claim is on disk before it is granted, so a crash leaves it standing: its nonces count as used. Several processes may share
 * the file: the claim that comes first in it holds. A line that a crash cut short (no final dot) was never granted and is
 * skipped; anything else that is not one of these lines makes the file invalid, and then nothing is granted.
 */
import { randomBytes } from 'node:crypto';
import {
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  linkSync,
  openSync,
  readSync,
  unlinkSync,
  writeSync,
} from 'node:fs';
import { dirname } from 'node:path';
import { IpsecError, VipsecError } from '../errors.ts';

const HEADER = /^vipsec-nonce-guard 1 ([0-9a-f]{64}) \.$/;
const CLAIM = /^claim ([0-9a-f]{32}) ([0-9a-f]{16}) \.$/;
const FREE = /^free ([0-9a-f]{32}) ([0-9a-f]{16}) (\d{1,20}) \.$/;
/** The start of a line, as far as a crash let it come. */
const TORN = /^(c|cl|cla|clai|f|fr|fre|(claim|free)( [0-9a-f]{0,32}( [0-9a-f]{0,16}( \d{0,20} ?)?)?)?)$/;

interface Entry {
  next: bigint;
  /** Who uses the nonces now. */
  owner: string | null;
}

export class NonceFile {
  readonly pepper: Uint8Array;
  readonly #path: string;
  readonly #fd: number;
  readonly #owner = randomBytes(8).toString('hex');
  readonly #entries = new Map<string, Entry>();
  #position: number;
  #closed = false;

  private constructor(path: string, fd: number, pepper: Uint8Array, position: number) {
    this.#path = path;
    this.#fd = fd;
    this.pepper = pepper;
    this.#position = position;
  }

  /**
   * Opens or creates (mode 0600) the file at `path`. Throws IpsecError `NONCE_FILE_INVALID` when it is something else, or
   * `NONCE_FILE_FAILED` when it cannot be read or written.
   */
  static open(path: string): NonceFile {
    return typed(path, () => NonceFile.#open(path));
  }

  static #open(path: string): NonceFile {
    const fd = openOrCreate(path);
    try {
      if (!fstatSync(fd).isFile()) throw invalid(path, 'it is not a regular file');
      const head = Buffer.alloc(128);
      const length = readSync(fd, head, 0, head.length, 0);
      const end = head.subarray(0, length).indexOf('\n');
      const match = HEADER.exec(head.toString('latin1', 0, Math.max(end, 0)));
      if (match === null) throw invalid(path, 'its first line is not the one of a nonce file');
      const file = new NonceFile(path, fd, Buffer.from(match[1], 'hex'), end + 1);
      file.#readOn();
      return file;
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  /**
   * Claims a fingerprint durably and returns up to where its IVs had been used. `refuse` is asked first, with what the file knows,
   * and throws to stop it. Errors are those of `open`.
   */
  claim(id: string, refuse: (used: { next: bigint; live: boolean }) => void): bigint {
    return typed(this.#path, () => this.#claim(id, refuse));
  }

  #claim(id: string, refuse: (used: { next: bigint; live: boolean }) => void): bigint {
    this.#readOn();
    const check = () => {
      const entry = this.#entries.get(id);
      if (entry !== undefined) refuse({ next: entry.next, live: entry.owner !== null });
    };
    check();
    this.#append(`claim ${id} ${this.#owner} .`);
    this.#readOn();
    const entry = this.#entries.get(id);
    if (entry?.owner !== this.#owner) {
      check();
      throw invalid(this.#path, 'a claim was written and is not there');
    }
    return entry.next;
  }

  /** Ends this owner's claim: IVs below `next` have been used. When that cannot be written, the claim stands, which is safe. */
  free(id: string, next: bigint): void {
    if (this.#closed) return;
    try {
      this.#append(`free ${id} ${this.#owner} ${next} .`);
      this.#readOn();
    } catch {
      // A disk that is full must not keep an SA from being removed.
    }
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    closeSync(this.#fd);
  }

  /** Each write starts a line of its own, whatever a crash left before it. */
  #append(line: string): void {
    const bytes = Buffer.from(`\n${line}\n`, 'latin1');
    const written = writeSync(this.#fd, bytes);
    if (written !== bytes.length) throw invalid(this.#path, 'a line could not be written as a whole');
    fsyncSync(this.#fd);
  }

  /** Takes in the complete lines behind `#position`. */
  #readOn(): void {
    const size = fstatSync(this.#fd).size;
    if (size < this.#position) throw invalid(this.#path, 'it became shorter');
    const bytes = Buffer.alloc(size - this.#position);
    let length = 0;
    while (length < bytes.length) {
      const read = readSync(this.#fd, bytes, length, bytes.length - length, this.#position + length);
      if (read === 0) break;
      length += read;
    }
    const end = bytes.subarray(0, length).lastIndexOf('\n') + 1;
    for (const line of bytes.toString('latin1', 0, end).split('\n')) this.#take(line);
    this.#position += end;
  }

  #take(line: string): void {
    if (line === '' || TORN.test(line)) return;
    const claim = CLAIM.exec(line);
    if (claim !== null) {
      const entry = this.#entries.get(claim[1]);
      if (entry === undefined) this.#entries.set(claim[1], { next: 0n, owner: claim[2] });
      else if (entry.owner === null) entry.owner = claim[2];
      return;
    }
    const free = FREE.exec(line);
    if (free === null) throw invalid(this.#path, 'it has a line that is neither a claim nor its end');
    const entry = this.#entries.get(free[1]);
    if (entry === undefined || entry.owner !== free[2]) return;
    entry.owner = null;
    entry.next = BigInt(free[3]);
  }
}

/** The file appears with its first line or not at all, so that two processes that start together agree on the pepper. */
function openOrCreate(path: string): number {
  const flags = constants.O_RDWR | constants.O_APPEND | constants.O_NOFOLLOW;
  try {
    return openSync(path, flags);
  } catch (error) {
    if (!(error instanceof Error && 'code' in error && error.code === 'ENOENT')) throw error;
  }
  const temporary = `${path}.${randomBytes(6).toString('hex')}`;
  const fd = openSync(temporary, flags | constants.O_CREAT | constants.O_EXCL, 0o600);
  try {
    writeSync(fd, `vipsec-nonce-guard 1 ${randomBytes(32).toString('hex')} .\n`);
    fsyncSync(fd);
    linkSync(temporary, path);
  } catch (error) {
    if (!(error instanceof Error && 'code' in error && error.code === 'EEXIST')) throw error;
  } finally {
    closeSync(fd);
    unlinkSync(temporary);
  }
  syncFolder(dirname(path));
  return openSync(path, flags);
}

/** A name is on disk when its folder is: without it, all that the file says later could be gone after a loss of power. */
function syncFolder(path: string): void {
  const fd = openSync(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

/** Runs `work`; what the file system throws becomes a typed error. */
function typed<T>(path: string, work: () => T): T {
  try {
    return work();
  } catch (error) {
    if (error instanceof VipsecError) throw error;
    const code = error instanceof Error && 'code' in error ? String(error.code) : 'unknown error';
    throw new IpsecError('NONCE_FILE_FAILED', `${path} cannot be used to guard nonces: ${code}`, { cause: error });
  }
}

function invalid(path: string, why: string): IpsecError {
  const hint = 'Without it, keys that were used before cannot be told: remove it only together with all old keys.';
  return new IpsecError('NONCE_FILE_INVALID', `${path} cannot be used to guard nonces: ${why}`, { hint });
}
