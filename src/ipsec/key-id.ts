/**
 * Whether two SAs have the same key, without keeping it: a hash, keyed with random bytes of this process, of what a packet has to
 * have been made with to be accepted. That is key and salt of an AEAD, and the authentication key otherwise.
 */
import { createHmac, type Hmac, randomBytes } from 'node:crypto';
import type { SecurityAssociation } from './sa.ts';

/** What does not make another SA of one: its name, and what it began with. */
const PASSING: ReadonlySet<string> = new Set(['name', 'initial']);

const pepper = randomBytes(32);
const ID_BYTES = 16;
const NOTHING = new Uint8Array(0);

/** Equal for two SAs when packets of the one pass the integrity check of the other. */
export function keyId(sa: SecurityAssociation): string {
  const part = sa.aead ?? sa.auth;
  const hash = createHmac('sha256', pepper);
  if (part !== undefined)
    hash
      .update(part.name)
      .update(part.key)
      .update(part.salt ?? NOTHING);
  return hash.digest().toString('base64url', 0, ID_BYTES);
}

/** Equal for two SAs that differ in nothing but their names and what they begin with, keys and limits included. */
export function saId(sa: SecurityAssociation): string {
  const hash = createHmac('sha256', pepper);
  // The name of an algorithm counts: only the SA's own is left out.
  for (const [field, value] of byName(sa)) if (!PASSING.has(field)) digest(hash, field, value);
  return hash.digest().toString('base64url', 0, ID_BYTES);
}

/** Its fields in an order of their own. Keys are not compared: they would become strings, which nobody could wipe. */
function byName(value: object): [string, unknown][] {
  return Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));
}

/** Keys go into the hash as they are. */
function digest(hash: Hmac, name: string, value: unknown): void {
  if (value === undefined) return;
  if (value instanceof Uint8Array) {
    hash.update(`${name} ${value.length}:`).update(value);
  } else if (typeof value === 'object' && value !== null) {
    hash.update(`${name}{`);
    for (const [field, part] of byName(value)) digest(hash, field, part);
    hash.update('}');
  } else {
    const text = String(value);
    hash.update(`${name} ${text.length}:${text};`);
  }
}
