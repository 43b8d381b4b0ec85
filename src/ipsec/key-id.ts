/**
 * Whether two SAs have the same key, without keeping it: a hash, keyed with random bytes of this process, of what a packet has to
 * have been made with to be accepted. That is key and salt of an AEAD, and the authentication key otherwise.
 */
import { createHmac, randomBytes } from 'node:crypto';
import type { SecurityAssociation } from './sa.ts';

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
