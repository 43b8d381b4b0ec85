/**
 * From a security association to the arithmetic it needs: every transform of RFC 8221 (and the older ones that peers
 * still use) as one interned object, so that `===` says whether two SAs may share a burst.
 *
 * | ESP, AEAD             | RFC                | ESP, cipher        | RFC        | authenticator (ESP and AH) | RFC        |
 * |-----------------------|--------------------|--------------------|------------|----------------------------|------------|
 * | AES-GCM, ICV 8/12/16  | 4106               | AES-CBC            | 3602       | HMAC-SHA1-96               | 2404       |
 * | AES-CCM, ICV 8/12/16  | 4309               | AES-CTR            | 3686       | HMAC-SHA-256-128 …         | 4868       |
 * | ChaCha20-Poly1305     | 7634               | 3DES-CBC           | 2451       | AES-XCBC-MAC-96            | 3566       |
 * | AES-GMAC              | 4543 (ESP and AH)  | NULL               | 2410       | AES-CMAC-96                | 4494       |
 *
 * Left out: everything that RFC 8221 calls MUST NOT (DES, MD5), Camellia, and truncations that no RFC defines.
 */
import { IpsecError } from '../../errors.ts';
import type { SecurityAssociation } from '../../ipsec/sa.ts';
import type { Transform, TransformKeys } from './engine.ts';

type Cipher = NonNullable<Transform['cipher']>;
type Authenticator = NonNullable<Transform['auth']>;

/** AES key lengths in bytes. */
const AES_KEYS = [16, 24, 32] as const;
/** ICV lengths of GCM (RFC 4106, 6) and CCM (RFC 4309, 6) in bytes. */
const AEAD_ICVS = [8, 12, 16] as const;
/** Longest ICV of any transform, bytes. */
export const MAX_ICV = 32;

/** Key and ICV length of each authenticator in bytes (RFC 2404, 4868 section 2.1.1, 3566, 4494). */
const AUTHENTICATORS: readonly { auth: Authenticator; key: number; icv: number }[] = [
  { auth: 'hmac-sha1', key: 20, icv: 12 },
  { auth: 'hmac-sha256', key: 32, icv: 16 },
  { auth: 'hmac-sha384', key: 48, icv: 24 },
  { auth: 'hmac-sha512', key: 64, icv: 32 },
  { auth: 'aes-xcbc', key: 16, icv: 12 },
  { auth: 'aes-cmac', key: 16, icv: 12 },
];

const CIPHERS: readonly { cipher: Cipher; keys: readonly number[] }[] = [
  { cipher: 'aes-cbc', keys: AES_KEYS },
  { cipher: 'aes-ctr', keys: AES_KEYS },
  { cipher: '3des-cbc', keys: [24] },
  { cipher: 'null', keys: [0] },
];

const NO_KEY = new Uint8Array(0);

/** `aes-gcm` with a 16-byte key is `aes-128-gcm`; other names stay. */
function sized(name: string, keyLength: number): string {
  return name.startsWith('aes-') ? `aes-${keyLength * 8}-${name.slice(4)}` : name;
}

function aeadId(name: Cipher | 'aes-gmac', keyLength: number, icvLength: number): string {
  return `${sized(name, keyLength)}-${icvLength}`;
}

function pairId(cipher: Cipher, keyLength: number, auth: Authenticator, icvLength: number): string {
  return `${sized(cipher, keyLength)}+${auth}-${icvLength}`;
}

function build(): Transform[] {
  const all: Transform[] = [];
  for (const cipherKeyLength of AES_KEYS) {
    for (const icvLength of AEAD_ICVS) {
      for (const cipher of ['aes-gcm', 'aes-ccm'] as const) {
        const id = aeadId(cipher, cipherKeyLength, icvLength);
        all.push({ id, family: 'aead', cipher, cipherKeyLength, authKeyLength: 0, icvLength });
      }
    }
    const id = aeadId('aes-gmac', cipherKeyLength, 16);
    all.push({ id, family: 'gmac', auth: 'aes-gmac', cipherKeyLength, authKeyLength: 0, icvLength: 16 });
  }
  const chacha = 'chacha20-poly1305';
  const id = aeadId(chacha, 32, 16);
  all.push({ id, family: 'aead', cipher: chacha, cipherKeyLength: 32, authKeyLength: 0, icvLength: 16 });
  for (const { auth, key: authKeyLength, icv: icvLength } of AUTHENTICATORS) {
    all.push({ id: `${auth}-${icvLength}`, family: 'auth', auth, cipherKeyLength: 0, authKeyLength, icvLength });
    for (const { cipher, keys } of CIPHERS) {
      for (const cipherKeyLength of keys) {
        const id = pairId(cipher, cipherKeyLength, auth, icvLength);
        all.push({ id, family: 'cipher-auth', cipher, auth, cipherKeyLength, authKeyLength, icvLength });
      }
    }
  }
  for (const transform of all) Object.freeze(transform);
  return all;
}

/** Every transform there is, each object once. */
export const TRANSFORMS: readonly Transform[] = build();

const byId: ReadonlyMap<string, Transform> = new Map(TRANSFORMS.map((transform) => [transform.id, transform]));

/** The transform with that `id`, or undefined. */
export function transformById(id: string): Transform | undefined {
  return byId.get(id);
}

function idOf(sa: SecurityAssociation): string | undefined {
  const { aead, cipher, auth } = sa;
  if (aead !== undefined) return sa.protocol === 'esp' ? aeadId(aead.name, aead.key.length, aead.icvLength) : undefined;
  if (auth === undefined || auth.name === 'null') return undefined;
  if (sa.protocol === 'ah') {
    if (auth.name === 'aes-gmac') return aeadId('aes-gmac', auth.key.length, auth.icvLength);
    return `${auth.name}-${auth.icvLength}`;
  }
  if (cipher === undefined || auth.name === 'aes-gmac') return undefined;
  return pairId(cipher.name, cipher.key.length, auth.name, auth.icvLength);
}

/**
 * The transform of a validated SA: the same object for the same arithmetic.
 * Throws `IpsecError` `TRANSFORM_UNKNOWN` when the SA's algorithms and lengths are not one of `TRANSFORMS`.
 */
export function transformOf(sa: SecurityAssociation): Transform {
  const id = idOf(sa);
  const transform = id === undefined ? undefined : byId.get(id);
  const authKeyLength = sa.aead === undefined && transform?.family !== 'gmac' ? (sa.auth?.key.length ?? 0) : 0;
  if (transform === undefined || transform.authKeyLength !== authKeyLength) {
    throw new IpsecError('TRANSFORM_UNKNOWN', `no transform ${id ?? 'for these algorithms'} with these key lengths`);
  }
  return transform;
}

/** The keys of a validated SA as an engine takes them: references, not copies. Salts are the caller's, part of the nonce. */
export function keysOf(sa: SecurityAssociation): TransformKeys {
  if (sa.aead !== undefined) return { cipherKey: sa.aead.key, authKey: NO_KEY };
  if (sa.auth?.name === 'aes-gmac') return { cipherKey: sa.auth.key, authKey: NO_KEY };
  return { cipherKey: sa.cipher?.key ?? NO_KEY, authKey: sa.auth?.key ?? NO_KEY };
}
