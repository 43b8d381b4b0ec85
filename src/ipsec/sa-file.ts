/**
 * SA files: a JSON document `{ "sas": [ … ] }` whose entries are `SecurityAssociationInput`s.
 *
 * A file that others than its owner can read is used, with a warning: refusing it would break the read-only mounts that
 * container platforms give secrets in, whose modes are not the user's to choose.
 *
 * The bytes of the file are wiped when they have been parsed. What the parser makes of them is not: strings of JavaScript cannot be, and stay until
 * their memory is used again. Who cannot accept that gives keys as bytes, to `validateSa` or `Ipsec.addSa`.
 */
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { InputError, IpsecError } from '../errors.ts';
import { Fields, fieldError, SaErrorCode } from './fields.ts';
import type { SecurityAssociation } from './sa.ts';
import { validateSas } from './validate.ts';

/** Bytes; room for some 65536 SAs. */
export const MAX_SA_FILE_LENGTH = 64 * 1024 * 1024;

export interface SaFile {
  readonly sas: readonly SecurityAssociation[];
  /** Sentences for the user, about the file as a whole. */
  readonly warnings: readonly string[];
}

/** Reads and checks the SA file at `path`. Throws `InputError`, with the code of `validate.ts` where a field is to blame. */
export function loadSaFile(path: string): SaFile {
  const warnings: string[] = [];
  const bytes = readBounded(path, warnings);
  let document: unknown;
  try {
    document = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch {
    // The parser's message quotes the text around the error, which may be a key.
    throw new InputError('SA_FILE_JSON', `${path}: not a JSON document`, { hint: `check it with: jq . ${path}` });
  } finally {
    bytes.fill(0);
  }
  try {
    return { sas: parseSaDocument(document), warnings };
  } catch (error) {
    if (!(error instanceof IpsecError)) throw error;
    const hint = error.hint === undefined ? {} : { hint: error.hint };
    throw new InputError(error.code, `${path}: ${error.message}`, { ...hint, cause: error });
  }
}

/** Checks a document that was read already. Throws `IpsecError`. */
export function parseSaDocument(document: unknown): SecurityAssociation[] {
  const fields = new Fields(document, 'file', ['sas']);
  const sas = fields.required('sas');
  if (!Array.isArray(sas)) throw fieldError(SaErrorCode.type, 'sas', 'must be a list');
  return validateSas(sas, 'sas');
}

function readBounded(path: string, warnings: string[]): Uint8Array {
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch (error) {
    throw unreadable(error);
  }
  let buffer = new Uint8Array(0);
  try {
    const { mode, size } = fstatSync(fd);
    if ((mode & 0o077) !== 0 && (mode & 0o170000) === 0o100000) {
      warnings.push(`${path} holds keys and can be accessed by others than its owner (chmod 600)`);
    }
    if (size > MAX_SA_FILE_LENGTH) throw tooLarge(path);
    buffer = new Uint8Array(Math.max(size + 1, 64 * 1024));
    let length = 0;
    for (;;) {
      const read = readSync(fd, buffer, length, buffer.length - length, null);
      if (read === 0) break;
      length += read;
      if (length > MAX_SA_FILE_LENGTH) throw tooLarge(path);
      if (length === buffer.length) {
        const larger = new Uint8Array(2 * buffer.length);
        larger.set(buffer);
        buffer.fill(0);
        buffer = larger;
      }
    }
    return buffer.subarray(0, length);
  } catch (error) {
    buffer.fill(0);
    throw error instanceof InputError ? error : unreadable(error);
  } finally {
    closeSync(fd);
  }
}

function tooLarge(path: string): InputError {
  return new InputError('SA_FILE_TOO_LARGE', `${path}: larger than ${MAX_SA_FILE_LENGTH} bytes`);
}

function unreadable(error: unknown): InputError {
  const what = error instanceof Error ? error.message : 'unknown error';
  return new InputError('SA_FILE_UNREADABLE', `cannot read the SA file: ${what}`, { cause: error });
}
