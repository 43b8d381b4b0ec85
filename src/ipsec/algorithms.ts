/**
 * The algorithms of ESP and AH with the lengths that their RFCs allow, and reading the algorithms of an SA.
 */
import { Fields, fieldError, SaErrorCode } from './fields.ts';
import type { Aead, AeadName, Auth, AuthName, Cipher, CipherName, Protocol, SecurityAssociation } from './sa.ts';
import { SecretBytes, wipeKeys } from './secret.ts';

interface Algorithm {
  /** Lengths of the key in bytes. */
  readonly keys: readonly number[];
  /** Bytes of the salt; 0 is none. */
  readonly salt: number;
  /** Bytes of the ICV, the default first; empty for ciphers. */
  readonly icvs: readonly number[];
  /** Bytes of the explicit IV that a packet carries. */
  readonly iv: number;
}

const AES = [16, 24, 32] as const;

/** Bytes; more than any algorithm has. */
const MAX_ICV = 64;

/** RFC 4106; RFC 4309; RFC 7634; RFC 4543. */
const AEADS: Readonly<Record<AeadName, Algorithm>> = {
  'aes-gcm': { keys: AES, salt: 4, icvs: [16, 12, 8], iv: 8 },
  'aes-ccm': { keys: AES, salt: 3, icvs: [16, 12, 8], iv: 8 },
  'chacha20-poly1305': { keys: [32], salt: 4, icvs: [16], iv: 8 },
  'aes-gmac': { keys: AES, salt: 4, icvs: [16], iv: 8 },
};

/** RFC 2410; RFC 3602; RFC 3686; RFC 2451. */
const CIPHERS: Readonly<Record<CipherName, Algorithm>> = {
  null: { keys: [0], salt: 0, icvs: [], iv: 0 },
  'aes-cbc': { keys: AES, salt: 0, icvs: [], iv: 16 },
  'aes-ctr': { keys: AES, salt: 4, icvs: [], iv: 8 },
  '3des-cbc': { keys: [24], salt: 0, icvs: [], iv: 8 },
};

/** RFC 2404; RFC 4868, 2.1.1; RFC 3566; RFC 4494; RFC 4543. The key lengths are the only ones these RFCs allow. */
const AUTHS: Readonly<Record<AuthName, Algorithm>> = {
  null: { keys: [0], salt: 0, icvs: [0], iv: 0 },
  'hmac-sha1': { keys: [20], salt: 0, icvs: [12], iv: 0 },
  'hmac-sha256': { keys: [32], salt: 0, icvs: [16], iv: 0 },
  'hmac-sha384': { keys: [48], salt: 0, icvs: [24], iv: 0 },
  'hmac-sha512': { keys: [64], salt: 0, icvs: [32], iv: 0 },
  'aes-xcbc': { keys: [16], salt: 0, icvs: [12], iv: 0 },
  'aes-cmac': { keys: [16], salt: 0, icvs: [12], iv: 0 },
  'aes-gmac': { keys: AES, salt: 4, icvs: [16], iv: 8 },
};

function keysOf<T extends string>(table: Readonly<Record<T, Algorithm>>): T[] {
  return Object.keys(table).filter((name): name is T => name in table);
}

/** Key, salt and name of one algorithm, checked against its row. */
function algorithm<T extends string>(fields: Fields, table: Readonly<Record<T, Algorithm>>) {
  const name = fields.choice('name', keysOf(table));
  const row = table[name];
  const key = fields.bytes('key') ?? new SecretBytes(0);
  if (!row.keys.includes(key.length)) {
    const allowed = row.keys[0] === 0 ? `${name} takes no key` : `${name} takes a key of ${row.keys.join(', ')} bytes`;
    const { length } = key;
    key.wipe();
    const hint = row.salt > 0 && row.keys.includes(length - row.salt) ? 'the salt is a field of its own' : undefined;
    throw fieldError(SaErrorCode.keyLength, fields.at('key'), `has ${length} bytes; ${allowed}`, hint);
  }
  let salt: SecretBytes | null = null;
  try {
    salt = fields.bytes('salt');
    if ((salt?.length ?? 0) !== row.salt) {
      const allowed = row.salt === 0 ? `${name} takes no salt` : `${name} takes a salt of ${row.salt} bytes`;
      throw fieldError(SaErrorCode.keyLength, fields.at('salt'), `has ${salt?.length ?? 0} bytes; ${allowed}`);
    }
    const icvLength = row.icvs.length === 0 ? 0 : fields.integer('icvLength', 0, MAX_ICV, row.icvs[0]);
    if (row.icvs.length > 0 && !row.icvs.includes(icvLength)) {
      throw fieldError(SaErrorCode.value, fields.at('icvLength'), `${name} has an ICV of ${row.icvs.join(', ')} bytes`);
    }
    return { name, row, key, ...(salt === null || row.salt === 0 ? {} : { salt }), icvLength };
  } catch (error) {
    key.wipe();
    salt?.wipe();
    throw error;
  }
}

/** RFC 2451, 2.3: with two equal neighbours 3DES is DES; such keys must be refused. The lowest bit of a byte is parity. */
function refuseWeakTripleDes(key: Uint8Array, path: string): void {
  const equal = (a: number, b: number): boolean => {
    let difference = 0;
    for (let i = 0; i < 8; i++) difference |= (key[a + i] ^ key[b + i]) & 0xfe;
    return difference === 0;
  };
  if (equal(0, 8) || equal(8, 16)) {
    throw fieldError(SaErrorCode.weakKey, path, 'two neighbouring thirds of a 3DES key are equal (RFC 2451, 2.3)');
  }
}

/** What `readAlgorithms` returns: fields of an SA, and how long its explicit IV is. */
export type Algorithms = Pick<SecurityAssociation, 'aead' | 'cipher' | 'auth'> & { readonly ivLength: number };

/** Either an AEAD, or a cipher and an authenticator (ESP), or an authenticator (AH). What was copied of keys is wiped when something is wrong. */
export function readAlgorithms(sa: Fields, protocol: Protocol): Algorithms {
  if (sa.has('aead')) {
    for (const other of ['cipher', 'auth']) {
      if (sa.has(other)) throw fieldError(SaErrorCode.combination, sa.at(other), 'excludes aead');
    }
    if (protocol === 'ah') {
      throw fieldError(SaErrorCode.combination, sa.at('aead'), 'AH takes auth, not aead', 'aes-gmac is an auth there');
    }
    const fields = new Fields(sa.raw('aead'), sa.at('aead'), ['name', 'key', 'salt', 'icvLength']);
    const { name, row, key, salt, icvLength } = algorithm(fields, AEADS);
    const aead: Aead = { name, key, salt: salt ?? new SecretBytes(0), icvLength };
    return { aead, ivLength: row.iv };
  }
  if (!sa.has('auth')) {
    const what = sa.has('cipher') ? 'a cipher without an authenticator is refused (RFC 8221, 4)' : 'is required';
    const code = sa.has('cipher') ? SaErrorCode.combination : SaErrorCode.missing;
    throw fieldError(code, sa.at('auth'), what, protocol === 'esp' ? 'give aead, or cipher and auth' : 'give auth');
  }
  const fields = new Fields(sa.raw('auth'), sa.at('auth'), ['name', 'key', 'salt', 'icvLength']);
  const { row: authRow, ...auth }: { row: Algorithm } & Auth = algorithm(fields, AUTHS);
  let cipher: Cipher | undefined;
  try {
    if (auth.name === 'null') {
      const what = 'packets without integrity are refused (RFC 8221, 4)';
      throw fieldError(SaErrorCode.combination, fields.at('name'), what);
    }
    if (protocol === 'ah') {
      if (sa.has('cipher')) throw fieldError(SaErrorCode.combination, sa.at('cipher'), 'AH does not encrypt');
      return { auth, ivLength: authRow.iv };
    }
    if (auth.name === 'aes-gmac') {
      const hint = 'in ESP, aes-gmac is an aead (RFC 4543)';
      throw fieldError(SaErrorCode.combination, fields.at('name'), 'is for AH only', hint);
    }
    if (!sa.has('cipher')) {
      throw fieldError(SaErrorCode.missing, sa.at('cipher'), 'is required', 'integrity only is the cipher "null"');
    }
    const cipherFields = new Fields(sa.raw('cipher'), sa.at('cipher'), ['name', 'key', 'salt']);
    const { row, icvLength: _none, ...found } = algorithm(cipherFields, CIPHERS);
    cipher = found;
    if (cipher.name === '3des-cbc') refuseWeakTripleDes(cipher.key, cipherFields.at('key'));
    return { cipher, auth, ivLength: row.iv };
  } catch (error) {
    wipeKeys({ auth, ...(cipher && { cipher }) });
    throw error;
  }
}
