import { describe, expect, it } from 'vitest';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { modeNumber, objectToSa, optionBits, saToObject } from '../../src/ipsec/sa-object.ts';
import type { SaObject } from '../../src/ipsec/wire/codec.ts';
import { IpsecMode, SaOption } from '../../src/ipsec/wire/numbers.ts';
import { inbound, key, outbound } from './support.ts';

const algorithms: [string, Partial<SecurityAssociation>, { cipher: bigint; auth: bigint }][] = [
  ['AES-128-GCM', { aead: { name: 'aes-gcm', key: key(16), salt: key(4), icvLength: 16 } }, { cipher: 1n, auth: 0n }],
  ['AES-256-CCM', { aead: { name: 'aes-ccm', key: key(32), salt: key(3), icvLength: 16 } }, { cipher: 2n, auth: 0n }],
  [
    'ChaCha20-Poly1305',
    { aead: { name: 'chacha20-poly1305', key: key(32), salt: key(4), icvLength: 16 } },
    { cipher: 3n, auth: 0n },
  ],
  [
    'AES-GMAC in ESP',
    { aead: { name: 'aes-gmac', key: key(16), salt: key(4), icvLength: 16 } },
    { cipher: 0n, auth: 41n },
  ],
  [
    'AES-CBC with HMAC-SHA-256',
    { cipher: { name: 'aes-cbc', key: key(24) }, auth: { name: 'hmac-sha256', key: key(32), icvLength: 16 } },
    { cipher: 3n, auth: 4n },
  ],
  [
    'AES-CTR with HMAC-SHA1',
    {
      cipher: { name: 'aes-ctr', key: key(16), salt: key(4) },
      auth: { name: 'hmac-sha1', key: key(20), icvLength: 12 },
    },
    { cipher: 4n, auth: 2n },
  ],
  [
    '3DES-CBC with AES-XCBC',
    { cipher: { name: '3des-cbc', key: key(24) }, auth: { name: 'aes-xcbc', key: key(16), icvLength: 12 } },
    { cipher: 8n, auth: 53n },
  ],
  [
    'NULL with AES-CMAC',
    { cipher: { name: 'null', key: key(0) }, auth: { name: 'aes-cmac', key: key(16), icvLength: 12 } },
    { cipher: 0n, auth: 26n },
  ],
  [
    'AH with HMAC-SHA1',
    { protocol: 'ah', auth: { name: 'hmac-sha1', key: key(20), icvLength: 12 } },
    { cipher: 0n, auth: 2n },
  ],
  [
    'AH with AES-GMAC',
    { protocol: 'ah', auth: { name: 'aes-gmac', key: key(32), salt: key(4), icvLength: 16 } },
    { cipher: 0n, auth: 41n },
  ],
];

describe('an SA object', () => {
  it.each(algorithms)(
    'says %s with the numbers of the crypto device and gives the same SA back',
    (_name, change, numbers) => {
      for (const mode of ['tunnel', 'transport'] as const) {
        const sa = outbound({ mode, ...change });
        const object = saToObject(sa, 7, false);
        expect(object.cipherAlgorithm).toBe(numbers.cipher);
        expect(object.authAlgorithm).toBe(numbers.auth);
        expect(objectToSa(object)).toEqual(sa);
      }
    },
  );

  it('carries every option, the lifetime and the UDP ports', () => {
    const sa = outbound({
      options: { esn: true, copyDscp: true, copyDf: true, decrementTtl: true, ecn: true },
      udpEncap: { sourcePort: 4500, destinationPort: 4501 },
      lifetime: { softPackets: 1n, hardPackets: 2n, softBytes: 3n, hardBytes: 4n },
    });
    const object = saToObject(sa, 0, false);
    expect(object.options).toBe(0x7fn);
    expect(objectToSa(object)).toEqual(sa);
    expect(optionBits(outbound())).toBe(0);
    expect(optionBits(outbound({ lifetime: { ...sa.lifetime } }))).toBe(SaOption.lifetime);
  });

  it('leaves the tunnel parameters and the replay window to the direction that they belong to', () => {
    const object = saToObject(inbound(), 3, false);
    expect(object.tunnel).toBeNull();
    expect(object.replayWindow).toBe(64);
    expect(saToObject(outbound({ replayWindow: 32 }), 3, false).replayWindow).toBe(0);
    const { tunnel: _, ...withoutTunnel } = inbound();
    expect(objectToSa(object)).toEqual(withoutTunnel);
  });

  it('says a first sequence number only where the revision has a field, and only when it is not the default', () => {
    const sa = outbound({ initial: { sequence: 5n } });
    expect(saToObject(sa, 0, true).esn).toBe(5n);
    expect(saToObject(sa, 0, false).esn).toBe(0n);
    expect(saToObject(outbound(), 0, true).esn).toBe(0n);
    expect(objectToSa(saToObject(sa, 0, true)).initial.sequence).toBe(5n);
  });

  it('counts modes by protocol and encapsulation', () => {
    expect(modeNumber({ protocol: 'esp', mode: 'tunnel' })).toBe(IpsecMode.espTunnel);
    expect(modeNumber({ protocol: 'esp', mode: 'transport' })).toBe(IpsecMode.espTransport);
    expect(modeNumber({ protocol: 'ah', mode: 'tunnel' })).toBe(IpsecMode.ahTunnel);
    expect(modeNumber({ protocol: 'ah', mode: 'transport' })).toBe(IpsecMode.ahTransport);
  });

  it('cannot say NULL authentication', () => {
    const sa = outbound({
      cipher: { name: 'aes-cbc', key: key(16) },
      auth: { name: 'null', key: key(0), icvLength: 0 },
    });
    expect(() => saToObject(sa, 0, false)).toThrow(expect.objectContaining({ code: 'NOT_EXPRESSIBLE' }));
  });

  const good = saToObject(outbound(), 1, false);
  const pair = { cipherAlgorithm: 3n, authAlgorithm: 4n };
  it.each<[string, Partial<SaObject>, string]>([
    ['a direction that is reserved', { direction: 0 }, 'direction'],
    ['a direction that is not defined', { direction: 3 }, 'direction'],
    ['a mode that is reserved', { mode: 0 }, 'mode'],
    ['a mode that is not defined', { mode: 5 }, 'mode'],
    ['SPI 0', { spi: 0 }, 'spi'],
    ['an option that is not defined', { options: 1n << 7n }, 'options'],
    ['an option beyond 32 bits', { options: 1n << 40n }, 'options'],
    ['a tunnel without parameters', { tunnel: null }, 'param'],
    ['no algorithm at all', { cipherAlgorithm: 0n, authAlgorithm: 0n }, 'cipher_algo'],
    ['an AEAD that is not defined', { cipherAlgorithm: 4n }, 'cipher_algo'],
    ['a cipher that IPsec does not use', { ...pair, cipherAlgorithm: 2n }, 'cipher_algo'],
    ['an algorithm number of 64 bits', { ...pair, cipherAlgorithm: 1n << 63n }, 'cipher_algo'],
    ['a MAC that IPsec does not use', { ...pair, authAlgorithm: 1n }, 'auth_algo'],
    ['AH with a cipher', { ...pair, mode: IpsecMode.ahTunnel }, 'cipher_algo'],
    ['AH with an AEAD', { mode: IpsecMode.ahTunnel }, 'cipher_algo'],
    ['GMAC with a cipher', { ...pair, authAlgorithm: 41n }, 'cipher_algo'],
    ['AH inside UDP', { mode: IpsecMode.ahTransport, options: 2n, cipherAlgorithm: 0n, authAlgorithm: 2n }, 'options'],
  ])('is refused with %s', (_what, change, path) => {
    const refuse = () => objectToSa({ ...good, ...change });
    expect(refuse).toThrow(expect.objectContaining({ code: 'INVALID_SA_OBJECT', path }));
  });
});
