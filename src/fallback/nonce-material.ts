/**
 * What the key stream of a counter mode is made of, whichever mode it is: AES-GCM (RFC 4106), GMAC (RFC 4543), CTR (RFC 3686) and CCM (RFC 4309)
 * with one key and one nonce share it, so the algorithm's name is no part of it.
 */
import type { SecurityAssociation } from '../ipsec/sa.ts';

/** The flags byte of CCM's counter blocks: L - 1, of a counter of L = 4 bytes (RFC 3610, 2.3). */
const CCM_COUNTER_FLAGS = 3;

/**
 * Key and salt of an SA whose nonces are counted, as bytes that are equal for two SAs whose key streams are; null for one without such nonces (CBC, no
 * cipher). The caller wipes them.
 */
export function nonceMaterial(sa: Pick<SecurityAssociation, 'aead' | 'cipher' | 'auth'>): Uint8Array | null {
  const counted =
    sa.aead ?? (sa.cipher?.name === 'aes-ctr' ? sa.cipher : sa.auth?.name === 'aes-gmac' ? sa.auth : null);
  if (counted === null) return null;
  const { name, key, salt } = counted;
  // The counter blocks of CCM are those of GCM with this byte before the salt (RFC 4309, 4).
  const prefix = name === 'aes-ccm' ? [CCM_COUNTER_FLAGS] : [];
  const material = new Uint8Array(1 + key.length + prefix.length + (salt?.length ?? 0));
  material[0] = key.length;
  material.set(key, 1);
  material.set(prefix, 1 + key.length);
  if (salt !== undefined) material.set(salt, 1 + key.length + prefix.length);
  return material;
}
