import { describe, expect, it } from 'vitest';
import { keysOf, TRANSFORMS, transformById, transformOf } from '../../../src/fallback/engines/transform.ts';
import type { Aead, Auth, Cipher, SecurityAssociation } from '../../../src/ipsec/sa.ts';

function sa(parts: { aead?: Aead; cipher?: Cipher; auth?: Auth; protocol?: 'esp' | 'ah' }): SecurityAssociation {
  return {
    direction: 'outbound',
    protocol: 'esp',
    mode: 'transport',
    spi: 0x1000,
    options: { esn: false, copyDscp: false, copyDf: false, decrementTtl: false, ecn: false },
    replayWindow: 0,
    lifetime: { softPackets: 0n, hardPackets: 0n, softBytes: 0n, hardBytes: 0n },
    tfcPadding: 0,
    initial: { sequence: 1n },
    selector: {},
    ...parts,
  };
}
const bytes = (n: number) => new Uint8Array(n).fill(n);

describe('transforms', () => {
  it('lists each transform once, with an id that is unique', () => {
    // AEAD: 3 keys x 3 ICVs x {GCM, CCM} + ChaCha; GMAC: 3; 6 authenticators alone and with CBC x3, CTR x3, 3DES, NULL
    expect(TRANSFORMS.length).toBe(18 + 1 + 3 + 6 * (1 + 8));
    expect(new Set(TRANSFORMS.map((t) => t.id)).size).toBe(TRANSFORMS.length);
    for (const t of TRANSFORMS) expect(transformById(t.id)).toBe(t);
  });

  it.each<[string, Parameters<typeof sa>[0]]>([
    ['aes-128-gcm-16', { aead: { name: 'aes-gcm', key: bytes(16), salt: bytes(4), icvLength: 16 } }],
    ['aes-192-ccm-8', { aead: { name: 'aes-ccm', key: bytes(24), salt: bytes(3), icvLength: 8 } }],
    ['chacha20-poly1305-16', { aead: { name: 'chacha20-poly1305', key: bytes(32), salt: bytes(4), icvLength: 16 } }],
    ['aes-256-gmac-16', { aead: { name: 'aes-gmac', key: bytes(32), salt: bytes(4), icvLength: 16 } }],
    ['aes-128-gmac-16', { protocol: 'ah', auth: { name: 'aes-gmac', key: bytes(16), salt: bytes(4), icvLength: 16 } }],
    ['hmac-sha1-12', { protocol: 'ah', auth: { name: 'hmac-sha1', key: bytes(20), icvLength: 12 } }],
    [
      'null+hmac-sha1-12',
      {
        cipher: { name: 'null', key: bytes(0) },
        auth: { name: 'hmac-sha1', key: bytes(20), icvLength: 12 },
      },
    ],
    [
      'aes-256-cbc+hmac-sha512-32',
      {
        cipher: { name: 'aes-cbc', key: bytes(32) },
        auth: { name: 'hmac-sha512', key: bytes(64), icvLength: 32 },
      },
    ],
    [
      '3des-cbc+aes-xcbc-12',
      { cipher: { name: '3des-cbc', key: bytes(24) }, auth: { name: 'aes-xcbc', key: bytes(16), icvLength: 12 } },
    ],
  ])('an SA of that kind needs %s, and the same object each time', (id, parts) => {
    const transform = transformOf(sa(parts));
    expect(transform.id).toBe(id);
    expect(transformOf(sa(parts))).toBe(transform);
    const keys = keysOf(sa(parts));
    expect(keys.cipherKey.length).toBe(transform.cipherKeyLength);
    expect(keys.authKey.length).toBe(transform.authKeyLength);
  });

  it.each<[string, Parameters<typeof sa>[0]]>([
    ['an AEAD in AH', { protocol: 'ah', aead: { name: 'aes-gcm', key: bytes(16), salt: bytes(4), icvLength: 16 } }],
    ['an ICV length no RFC defines', { aead: { name: 'aes-gcm', key: bytes(16), salt: bytes(4), icvLength: 4 } }],
    ['a cipher without authenticator', { cipher: { name: 'aes-cbc', key: bytes(16) } }],
    [
      'a cipher with the null authenticator',
      { cipher: { name: 'aes-cbc', key: bytes(16) }, auth: { name: 'null', key: bytes(0), icvLength: 0 } },
    ],
    [
      'an authentication key of a wrong length',
      { protocol: 'ah', auth: { name: 'hmac-sha256', key: bytes(31), icvLength: 16 } },
    ],
    ['an AES key of a wrong length', { aead: { name: 'aes-gcm', key: bytes(17), salt: bytes(4), icvLength: 16 } }],
  ])('refuses %s', (_what, parts) => {
    expect(() => transformOf(sa(parts))).toThrow(expect.objectContaining({ code: 'TRANSFORM_UNKNOWN' }));
  });
});
