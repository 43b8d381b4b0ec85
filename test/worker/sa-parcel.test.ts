import { describe, expect, it } from 'vitest';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { validateSa } from '../../src/ipsec/validate.ts';
import { packSa, unpackSa, wipeParcel } from '../../src/worker/sa-parcel.ts';

const hex = (text: string, times: number) => text.repeat(times);
const common = {
  direction: 'outbound',
  mode: 'tunnel',
  spi: 0x1000,
  tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
} as const;

function association(kind: 'aead' | 'pair'): SecurityAssociation {
  if (kind === 'aead') {
    const iv = '0102030405060708';
    return validateSa({
      ...common,
      aead: { name: 'aes-gcm', key: hex('a1', 16), salt: hex('b2', 4) },
      initial: { iv },
    });
  }
  const cipher = { name: 'aes-ctr', key: hex('a1', 32), salt: hex('b2', 4) } as const;
  return validateSa({ ...common, cipher, auth: { name: 'hmac-sha256', key: hex('c3', 32) } });
}

const secrets = ({ aead, cipher, auth, initial }: SecurityAssociation) =>
  [aead?.key, aead?.salt, cipher?.key, cipher?.salt, auth?.key, auth?.salt, initial.iv].filter(
    (one) => one !== undefined,
  );

describe.each(['aead', 'pair'] as const)('an SA on its way to another thread: %s', (kind) => {
  it('arrives as it was, and leaves nothing on the way', () => {
    const sa = association(kind);
    const packed = packSa(sa, true);
    expect(secrets(packed).length).toBeGreaterThanOrEqual(3);
    for (const secret of secrets(packed)) expect(secret.buffer).toBeInstanceOf(SharedArrayBuffer);
    // A message is copied, but shared memory is not.
    const received = structuredClone(packed);
    const own = unpackSa(received);
    expect(own).toEqual(sa);
    for (const secret of secrets(own)) expect(secret.buffer).toBeInstanceOf(ArrayBuffer);
    for (const secret of [...secrets(packed), ...secrets(received)])
      expect(secret.every((byte) => byte === 0)).toBe(true);
    expect(secrets(sa).every((secret) => secret.some((byte) => byte !== 0))).toBe(true);
  });

  it('can be wiped by who has sent it, and takes no key along where none is needed', () => {
    const sa = association(kind);
    const packed = packSa(sa, true);
    const received = structuredClone(packed);
    wipeParcel(packed);
    for (const one of [received, packSa(sa, false)]) {
      expect(secrets(one).map(({ length }) => length)).toEqual(secrets(sa).map(({ length }) => length));
      for (const secret of secrets(one)) expect(secret.every((byte) => byte === 0)).toBe(true);
    }
  });
});
