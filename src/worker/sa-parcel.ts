/**
 * An SA on its way to another thread. A message is copied, and nobody wipes the copies; so keys, salts and IVs go as views of shared memory,
 * which whoever takes them out wipes, and the sender once more when the answer is there or will never come.
 */
import type { SecurityAssociation } from '../ipsec/sa.ts';
import { SecretBytes } from '../ipsec/secret.ts';

/** `sa` with its secrets in shared memory, or with zeros in their place: enough for a data path that leaves the arithmetic to the device. */
export function packSa(sa: SecurityAssociation, withKeys: boolean): SecurityAssociation {
  return withSecrets(sa, (bytes) => {
    if (!withKeys) return new Uint8Array(bytes.length);
    const shared = new Uint8Array(new SharedArrayBuffer(bytes.length));
    shared.set(bytes);
    return shared;
  });
}

/** `sa` with its secrets in private memory; those of `sa` are wiped. */
export function unpackSa(sa: SecurityAssociation): SecurityAssociation {
  const own = withSecrets(
    sa,
    (bytes) => SecretBytes.copy(bytes),
    (iv) => Uint8Array.from(iv),
  );
  wipeParcel(sa);
  return own;
}

/** Zeroes the secrets of `sa`, and its IV, which is to be as unknown as a key until it is used. */
export function wipeParcel(sa: SecurityAssociation): void {
  withSecrets(sa, (bytes) => bytes.fill(0));
}

/** A copy of `sa` in which each key and salt has become what `of` makes of it, and the IV what `ofIv` does. */
function withSecrets(
  sa: SecurityAssociation,
  of: (bytes: Uint8Array) => Uint8Array,
  ofIv: (bytes: Uint8Array) => Uint8Array = of,
): SecurityAssociation {
  const part = <T extends { readonly key: Uint8Array; readonly salt?: Uint8Array }>(one: T): T => ({
    ...one,
    key: of(one.key),
    ...(one.salt === undefined ? {} : { salt: of(one.salt) }),
  });
  const { iv } = sa.initial;
  return {
    ...sa,
    ...(sa.aead === undefined ? {} : { aead: part(sa.aead) }),
    ...(sa.cipher === undefined ? {} : { cipher: part(sa.cipher) }),
    ...(sa.auth === undefined ? {} : { auth: part(sa.auth) }),
    ...(iv === undefined ? {} : { initial: { ...sa.initial, iv: ofIv(iv) } }),
  };
}
