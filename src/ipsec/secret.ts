/**
 * Bytes that must not show: a `Uint8Array` that `util.inspect`, `console.log`, JSON and string conversion print as its
 * length only. Everything that computes with bytes takes it as what it is.
 *
 * This keeps keys out of logs and error reports by accident; it is no protection against code that wants to read them.
 */
import { inspect } from 'node:util';
import type { SecurityAssociation } from './sa.ts';

export class SecretBytes extends Uint8Array {
  /** A copy of `bytes`; the caller may wipe its own. */
  static copy(bytes: Uint8Array): SecretBytes {
    const secret = new SecretBytes(bytes.length);
    secret.set(bytes);
    return secret;
  }

  /** Overwrites the bytes with zeros. */
  wipe(): void {
    this.fill(0);
  }

  override toString(): string {
    return `[${this.length} secret bytes]`;
  }

  override toLocaleString(): string {
    return this.toString();
  }

  override join(): string {
    return this.toString();
  }

  toJSON(): string {
    return this.toString();
  }

  [inspect.custom](): string {
    return this.toString();
  }
}

/** Zeroes keys and salts of an SA, or of what has become of one so far. */
export function wipeKeys(sa: Pick<SecurityAssociation, 'aead' | 'cipher' | 'auth'>): void {
  for (const part of [sa.aead, sa.cipher, sa.auth]) {
    part?.key.fill(0);
    part?.salt?.fill(0);
  }
}
