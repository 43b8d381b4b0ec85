import { inspect } from 'node:util';
import fc from 'fast-check';
import { describe, expect, test, vi } from 'vitest';
import { IpsecError } from '../../src/errors.ts';
import { parseSaDocument } from '../../src/ipsec/sa-file.ts';
import { SecretBytes } from '../../src/ipsec/secret.ts';
import { validateSa, validateSas } from '../../src/ipsec/validate.ts';
import { runs } from '../depth.ts';

type Json = Record<string, unknown>;

/** `length` different bytes as hexadecimal digits. */
const hex = (length: number, first = 1): string =>
  Array.from({ length }, (_, i) => ((first + i) & 0xff).toString(16).padStart(2, '0')).join('');

const gcm = { name: 'aes-gcm', key: hex(16), salt: hex(4) };
const tunnel = { source: '192.0.2.1', destination: '192.0.2.2' };
const base: Json = { direction: 'outbound', mode: 'tunnel', spi: '0xc0ffee01', aead: gcm, tunnel };
const transport: Json = { direction: 'outbound', mode: 'transport', spi: 256, aead: gcm };
const { aead: _aead, ...plain } = base;
const cbc = { name: 'aes-cbc', key: hex(16) };
const sha256 = { name: 'hmac-sha256', key: hex(32) };

function failure(input: unknown): IpsecError {
  try {
    validateSa(input);
  } catch (error) {
    if (error instanceof IpsecError) return error;
    throw error;
  }
  throw new Error('the SA was accepted');
}

describe('an SA that is right', () => {
  test('as in the file format, comes out with every field', () => {
    const sa = validateSa({
      name: 'east',
      direction: 'outbound',
      protocol: 'esp',
      mode: 'tunnel',
      spi: '0xc0ffee01',
      aead: { name: 'aes-gcm', key: hex(16), salt: hex(4, 0xa0), icvLength: 12 },
      tunnel: {
        source: '192.0.2.1',
        destination: '192.0.2.2',
        ttl: 33,
        dscp: 46,
        df: true,
        hopLimit: 44,
        flowLabel: 0,
      },
      udpEncap: { sourcePort: 4500, destinationPort: 4501 },
      options: { esn: true, copyDscp: true, copyDf: true, decrementTtl: true, ecn: true },
      replayWindow: 128,
      lifetime: { softPackets: '1000', hardPackets: '2000', softBytes: '0xffffffffffffffff', hardBytes: '0' },
      tfcPadding: 100,
      initial: { sequence: '0x123456789a', iv: hex(8, 0x50) },
      selector: {
        source: '10.0.0.0/8',
        destination: '10.1.0.0/16',
        protocol: 17,
        sourcePort: 1000,
        destinationPort: 0,
      },
    });
    expect(sa).toEqual({
      name: 'east',
      direction: 'outbound',
      protocol: 'esp',
      mode: 'tunnel',
      spi: 0xc0ffee01,
      aead: {
        name: 'aes-gcm',
        key: SecretBytes.from(Buffer.from(hex(16), 'hex')),
        salt: SecretBytes.of(0xa0, 0xa1, 0xa2, 0xa3),
        icvLength: 12,
      },
      tunnel: {
        source: Uint8Array.of(192, 0, 2, 1),
        destination: Uint8Array.of(192, 0, 2, 2),
        ttl: 33,
        dscp: 46,
        df: true,
        flowLabel: 0,
      },
      udpEncap: { sourcePort: 4500, destinationPort: 4501 },
      options: { esn: true, copyDscp: true, copyDf: true, decrementTtl: true, ecn: true },
      replayWindow: 128,
      lifetime: { softPackets: 1000n, hardPackets: 2000n, softBytes: 2n ** 64n - 1n, hardBytes: 0n },
      tfcPadding: 100,
      initial: { sequence: 0x123456789an, iv: Uint8Array.from(Buffer.from(hex(8, 0x50), 'hex')) },
      selector: {
        source: { address: Uint8Array.of(10, 0, 0, 0), length: 8 },
        destination: { address: Uint8Array.of(10, 1, 0, 0), length: 16 },
        protocol: 17,
        sourcePort: 1000,
        destinationPort: 0,
      },
    });
  });

  test('needs few fields: the rest has the defaults of the file format', () => {
    const sa = validateSa(base);
    expect(sa.protocol).toBe('esp');
    expect(sa.aead?.icvLength).toBe(16);
    expect(sa.options).toEqual({ esn: false, copyDscp: false, copyDf: false, decrementTtl: false, ecn: false });
    expect(sa.replayWindow).toBe(64);
    expect(sa.lifetime).toEqual({ softPackets: 0n, hardPackets: 0n, softBytes: 0n, hardBytes: 0n });
    expect(sa.initial).toEqual({ sequence: 1n });
    expect(sa.selector).toEqual({});
    expect(sa.tunnel).toMatchObject({ ttl: 64, dscp: 0, df: false, flowLabel: 0 });
    expect(validateSa({ ...base, direction: 'inbound' }).initial).toEqual({ sequence: 0n });
  });

  test('takes the hop limit for an IPv6 tunnel, and the TTL when only that is given', () => {
    const v6 = { source: '2001:db8::1', destination: '2001:db8::2' };
    expect(validateSa({ ...base, tunnel: { ...v6, ttl: 9, hopLimit: 8 } }).tunnel?.ttl).toBe(8);
    expect(validateSa({ ...base, tunnel: { ...v6, ttl: 9 } }).tunnel?.ttl).toBe(9);
    expect(validateSa({ ...base, tunnel: { ...tunnel, ttl: 9, hopLimit: 8 } }).tunnel?.ttl).toBe(9);
  });

  test('is accepted again as it came out', () => {
    const once = validateSa({ ...base, selector: { source: '10.0.0.0/8' }, initial: { iv: hex(8) } });
    expect(validateSa(once)).toEqual(once);
    const pair = validateSa({ ...plain, cipher: { name: 'null' }, auth: sha256 });
    expect(validateSa(pair)).toEqual(pair);
  });

  test('may give bytes as bytes, which are copied', () => {
    const key = Uint8Array.from({ length: 16 }, (_, i) => i);
    const sa = validateSa({ ...base, aead: { ...gcm, key, salt: Uint8Array.of(1, 2, 3, 4) } });
    key.fill(0xff);
    expect(sa.aead?.key[5]).toBe(5);
  });

  test.each<[string, Json]>([
    ...[16, 24, 32].flatMap((length): [string, Json][] =>
      [8, 12, 16].flatMap((icvLength): [string, Json][] => [
        [`aes-gcm ${length}/${icvLength}`, { aead: { name: 'aes-gcm', key: hex(length), salt: hex(4), icvLength } }],
        [`aes-ccm ${length}/${icvLength}`, { aead: { name: 'aes-ccm', key: hex(length), salt: hex(3), icvLength } }],
      ]),
    ),
    ['chacha20-poly1305', { aead: { name: 'chacha20-poly1305', key: hex(32), salt: hex(4) } }],
    ['aes-gmac', { aead: { name: 'aes-gmac', key: hex(16), salt: hex(4) } }],
    ['aes-cbc with hmac-sha256', { cipher: cbc, auth: sha256 }],
    [
      'aes-ctr with hmac-sha1',
      { cipher: { ...cbc, name: 'aes-ctr', salt: hex(4) }, auth: { name: 'hmac-sha1', key: hex(20) } },
    ],
    [
      '3des-cbc with hmac-sha384',
      { cipher: { name: '3des-cbc', key: hex(24) }, auth: { name: 'hmac-sha384', key: hex(48) } },
    ],
    ['null with hmac-sha512', { cipher: { name: 'null' }, auth: { name: 'hmac-sha512', key: hex(64), icvLength: 32 } }],
    ['null with aes-xcbc', { cipher: { name: 'null' }, auth: { name: 'aes-xcbc', key: hex(16) } }],
    ['null with aes-cmac', { cipher: { name: 'null' }, auth: { name: 'aes-cmac', key: hex(16) } }],
    ['AH with aes-gmac', { protocol: 'ah', auth: { name: 'aes-gmac', key: hex(32), salt: hex(4) } }],
    ['AH with hmac-sha1', { protocol: 'ah', auth: { name: 'hmac-sha1', key: hex(20), icvLength: 12 } }],
  ])('may use %s', (_name, fields) => {
    expect(validateSa({ ...plain, ...fields })).toMatchObject({ mode: 'tunnel' });
  });

  test('inbound may leave the tunnel out, and have SPI 1 to 255', () => {
    const { tunnel: _tunnel, ...rest } = base;
    expect(validateSa({ ...rest, direction: 'inbound', spi: 1 })).not.toHaveProperty('tunnel');
  });
});

describe('an SA that is wrong is refused with code and path', () => {
  test.each<[string, unknown, string, string]>([
    ['not an object', 'sa', 'SA_TYPE', 'sa'],
    ['a list', [], 'SA_TYPE', 'sa'],
    ['an unknown field', { ...base, sip: 1 }, 'SA_UNKNOWN_FIELD', 'sa.sip'],
    ['an unknown field within', { ...base, aead: { ...gcm, iv: '' } }, 'SA_UNKNOWN_FIELD', 'sa.aead.iv'],
    ['no direction', { ...base, direction: undefined }, 'SA_MISSING_FIELD', 'sa.direction'],
    ['another direction', { ...base, direction: 'both' }, 'SA_VALUE', 'sa.direction'],
    ['another mode', { ...base, mode: 'beet' }, 'SA_VALUE', 'sa.mode'],
    ['another protocol', { ...base, protocol: 'wg' }, 'SA_VALUE', 'sa.protocol'],
    ['SPI 0', { ...base, spi: 0 }, 'SA_VALUE', 'sa.spi'],
    ['an SPI of 33 bits', { ...base, spi: '0x100000000' }, 'SA_VALUE', 'sa.spi'],
    ['a negative SPI', { ...base, spi: -1 }, 'SA_VALUE', 'sa.spi'],
    ['half an SPI', { ...base, spi: 1.5 }, 'SA_TYPE', 'sa.spi'],
    ['an SPI with a leading zero', { ...base, spi: '010' }, 'SA_TYPE', 'sa.spi'],
    ['no SPI', { ...base, spi: undefined }, 'SA_MISSING_FIELD', 'sa.spi'],
    ['no algorithm', plain, 'SA_MISSING_FIELD', 'sa.auth'],
    ['aead and auth', { ...base, auth: sha256 }, 'SA_COMBINATION', 'sa.auth'],
    ['aead and cipher', { ...base, cipher: cbc }, 'SA_COMBINATION', 'sa.cipher'],
    ['a cipher alone', { ...plain, cipher: cbc }, 'SA_COMBINATION', 'sa.auth'],
    [
      'null with null',
      { ...plain, cipher: { name: 'null' }, auth: { name: 'null' } },
      'SA_COMBINATION',
      'sa.auth.name',
    ],
    ['a cipher with null', { ...plain, cipher: cbc, auth: { name: 'null' } }, 'SA_COMBINATION', 'sa.auth.name'],
    ['auth alone in ESP', { ...plain, auth: sha256 }, 'SA_MISSING_FIELD', 'sa.cipher'],
    ['AH with aead', { ...base, protocol: 'ah' }, 'SA_COMBINATION', 'sa.aead'],
    ['AH with a cipher', { ...plain, protocol: 'ah', cipher: cbc, auth: sha256 }, 'SA_COMBINATION', 'sa.cipher'],
    ['AH with null', { ...plain, protocol: 'ah', auth: { name: 'null' } }, 'SA_COMBINATION', 'sa.auth.name'],
    [
      'gmac as auth in ESP',
      { ...plain, cipher: cbc, auth: { name: 'aes-gmac', key: hex(16), salt: hex(4) } },
      'SA_COMBINATION',
      'sa.auth.name',
    ],
    ['a key of 15 bytes', { ...base, aead: { ...gcm, key: hex(15) } }, 'SA_KEY_LENGTH', 'sa.aead.key'],
    ['no key', { ...base, aead: { ...gcm, key: undefined } }, 'SA_KEY_LENGTH', 'sa.aead.key'],
    ['an odd number of digits', { ...base, aead: { ...gcm, key: `${hex(16)}0` } }, 'SA_TYPE', 'sa.aead.key'],
    ['a key that is not hexadecimal', { ...base, aead: { ...gcm, key: 'zz'.repeat(16) } }, 'SA_TYPE', 'sa.aead.key'],
    ['a key that is a number', { ...base, aead: { ...gcm, key: 5 } }, 'SA_TYPE', 'sa.aead.key'],
    [
      'a key for null',
      { ...plain, cipher: { name: 'null', key: '00' }, auth: sha256 },
      'SA_KEY_LENGTH',
      'sa.cipher.key',
    ],
    ['a salt of 3 bytes for GCM', { ...base, aead: { ...gcm, salt: hex(3) } }, 'SA_KEY_LENGTH', 'sa.aead.salt'],
    ['no salt', { ...base, aead: { ...gcm, salt: undefined } }, 'SA_KEY_LENGTH', 'sa.aead.salt'],
    ['a salt of 4 bytes for CCM', { ...base, aead: { ...gcm, name: 'aes-ccm' } }, 'SA_KEY_LENGTH', 'sa.aead.salt'],
    ['a salt for CBC', { ...plain, cipher: { ...cbc, salt: hex(4) }, auth: sha256 }, 'SA_KEY_LENGTH', 'sa.cipher.salt'],
    [
      'no salt for CTR',
      { ...plain, cipher: { ...cbc, name: 'aes-ctr' }, auth: sha256 },
      'SA_KEY_LENGTH',
      'sa.cipher.salt',
    ],
    [
      'an HMAC key of another length',
      { ...plain, cipher: cbc, auth: { ...sha256, key: hex(20) } },
      'SA_KEY_LENGTH',
      'sa.auth.key',
    ],
    ['an ICV of 10 bytes', { ...base, aead: { ...gcm, icvLength: 10 } }, 'SA_VALUE', 'sa.aead.icvLength'],
    [
      'an HMAC ICV no RFC has',
      { ...plain, cipher: cbc, auth: { ...sha256, icvLength: 12 } },
      'SA_VALUE',
      'sa.auth.icvLength',
    ],
    ['an unknown AEAD', { ...base, aead: { ...gcm, name: 'aes-ocb' } }, 'SA_VALUE', 'sa.aead.name'],
    [
      'an unknown cipher',
      { ...plain, cipher: { name: 'des-cbc', key: hex(8) }, auth: sha256 },
      'SA_VALUE',
      'sa.cipher.name',
    ],
    ['a name from Object.prototype', { ...base, aead: { ...gcm, name: 'toString' } }, 'SA_VALUE', 'sa.aead.name'],
    [
      '3DES with equal first keys',
      { ...plain, cipher: { name: '3des-cbc', key: hex(8) + hex(8) + hex(8, 99) }, auth: sha256 },
      'SA_WEAK_KEY',
      'sa.cipher.key',
    ],
    [
      '3DES with last keys equal but for parity',
      { ...plain, cipher: { name: '3des-cbc', key: `${hex(8, 99)}${'10'.repeat(8)}${'11'.repeat(8)}` }, auth: sha256 },
      'SA_WEAK_KEY',
      'sa.cipher.key',
    ],
    ['tunnel mode without tunnel', { ...transport, mode: 'tunnel' }, 'SA_MISSING_FIELD', 'sa.tunnel'],
    ['transport mode with tunnel', { ...base, mode: 'transport' }, 'SA_COMBINATION', 'sa.tunnel'],
    ['two families', { ...base, tunnel: { ...tunnel, source: '::1' } }, 'SA_COMBINATION', 'sa.tunnel.destination'],
    ['a bad address', { ...base, tunnel: { ...tunnel, source: '1.2.3' } }, 'SA_VALUE', 'sa.tunnel.source'],
    ['a TTL of 0', { ...base, tunnel: { ...tunnel, ttl: 0 } }, 'SA_VALUE', 'sa.tunnel.ttl'],
    ['a DSCP of 64', { ...base, tunnel: { ...tunnel, dscp: 64 } }, 'SA_VALUE', 'sa.tunnel.dscp'],
    ['DF as a number', { ...base, tunnel: { ...tunnel, df: 1 } }, 'SA_TYPE', 'sa.tunnel.df'],
    [
      'a flow label of 21 bits',
      { ...base, tunnel: { ...tunnel, flowLabel: 0x100000 } },
      'SA_VALUE',
      'sa.tunnel.flowLabel',
    ],
    ['AH in UDP', { ...plain, protocol: 'ah', auth: sha256, udpEncap: {} }, 'SA_COMBINATION', 'sa.udpEncap'],
    ['port 0', { ...base, udpEncap: { sourcePort: 0 } }, 'SA_VALUE', 'sa.udpEncap.sourcePort'],
    ['an option that is no boolean', { ...base, options: { esn: 'yes' } }, 'SA_TYPE', 'sa.options.esn'],
    ['an unknown option', { ...base, options: { frag: true } }, 'SA_UNKNOWN_FIELD', 'sa.options.frag'],
    ['a window of 31', { ...base, replayWindow: 31 }, 'SA_VALUE', 'sa.replayWindow'],
    ['a window of 65537', { ...base, replayWindow: 65_537 }, 'SA_VALUE', 'sa.replayWindow'],
    [
      'soft beyond hard',
      { ...base, lifetime: { softBytes: '11', hardBytes: '10' } },
      'SA_COMBINATION',
      'sa.lifetime.softBytes',
    ],
    [
      'a limit of 65 bits',
      { ...base, lifetime: { hardBytes: '18446744073709551616' } },
      'SA_VALUE',
      'sa.lifetime.hardBytes',
    ],
    ['TFC in transport mode', { ...transport, tfcPadding: 1 }, 'SA_COMBINATION', 'sa.tfcPadding'],
    ['sequence 0 outbound', { ...base, initial: { sequence: 0 } }, 'SA_VALUE', 'sa.initial.sequence'],
    ['sequence 2^32 without ESN', { ...base, initial: { sequence: '4294967296' } }, 'SA_VALUE', 'sa.initial.sequence'],
    [
      'an unsafe number',
      { ...base, options: { esn: true }, initial: { sequence: 2 ** 60 } },
      'SA_TYPE',
      'sa.initial.sequence',
    ],
    ['an IV of 12 bytes', { ...base, initial: { iv: hex(12) } }, 'SA_VALUE', 'sa.initial.iv'],
    [
      'an IV for HMAC',
      { ...plain, cipher: { name: 'null' }, auth: sha256, initial: { iv: hex(8) } },
      'SA_VALUE',
      'sa.initial.iv',
    ],
    ['a prefix with host bits', { ...base, selector: { source: '10.0.0.1/8' } }, 'SA_VALUE', 'sa.selector.source'],
    [
      'a selector of two families',
      { ...base, selector: { source: '10.0.0.0/8', destination: '::/0' } },
      'SA_COMBINATION',
      'sa.selector.destination',
    ],
    [
      'ports of ICMP',
      { ...base, selector: { protocol: 1, sourcePort: 7 } },
      'SA_COMBINATION',
      'sa.selector.sourcePort',
    ],
    ['port 65536', { ...base, selector: { destinationPort: 65_536 } }, 'SA_VALUE', 'sa.selector.destinationPort'],
    ['a name that is too long', { ...base, name: 'x'.repeat(65) }, 'SA_VALUE', 'sa.name'],
  ])('%s', (_name, input, code, path) => {
    const error = failure(input);
    expect({ code: error.code, path: error.path }).toEqual({ code, path });
    expect(error.message.startsWith(`${path}: `)).toBe(true);
  });

  test('a key that has its salt appended is told where the salt goes', () => {
    expect(failure({ ...base, aead: { ...gcm, key: hex(20) } }).hint).toContain('salt');
  });

  test('anything at all gives an IpsecError or an SA, never another error', () => {
    const value = fc.oneof(fc.anything(), fc.constant(undefined));
    const names = [
      'direction',
      'mode',
      'spi',
      'aead',
      'cipher',
      'auth',
      'tunnel',
      'options',
      'lifetime',
      'initial',
      'selector',
    ];
    fc.assert(
      fc.property(fc.constantFrom(...names), value, (name, field) => {
        try {
          validateSa({ ...base, [name]: field });
        } catch (error) {
          expect(error).toBeInstanceOf(IpsecError);
        }
      }),
      { numRuns: runs(300) },
    );
  });
});

describe('several SAs', () => {
  const other = { ...gcm, key: hex(16, 0x80) };
  const inbound = { ...base, direction: 'inbound' };

  test('may share an SPI when their destinations differ', () => {
    const east = { ...inbound, tunnel };
    const west = { ...inbound, aead: other, tunnel: { ...tunnel, destination: '192.0.2.3' } };
    expect(validateSas([east, west])).toHaveLength(2);
    expect(() => validateSas([east, { ...east, aead: other }])).toThrowError(
      expect.objectContaining({ code: 'SA_DUPLICATE', path: 'sas[1].spi' }),
    );
  });

  test('may not count nonces up under one key and salt', () => {
    expect(() => validateSas([base, { ...base, spi: 7 }])).toThrowError(
      expect.objectContaining({ code: 'SA_KEY_REUSED', path: 'sas[1]' }),
    );
    const gmac = { ...base, spi: 7, aead: { ...gcm, name: 'aes-gmac' } };
    expect(() => validateSas([base, gmac])).toThrowError(expect.objectContaining({ code: 'SA_KEY_REUSED' }));
    const ctr = { ...plain, spi: 7, cipher: { name: 'aes-ctr', key: gcm.key, salt: gcm.salt }, auth: sha256 };
    expect(() => validateSas([base, ctr])).toThrowError(expect.objectContaining({ code: 'SA_KEY_REUSED' }));
    const ccm = { ...base, spi: 7, aead: { ...gcm, name: 'aes-ccm', salt: '070809' } };
    const asGcm = { ...base, aead: { ...gcm, salt: '03070809' } };
    expect(() => validateSas([asGcm, ccm])).toThrowError(expect.objectContaining({ code: 'SA_KEY_REUSED' }));
    expect(
      validateSas([base, { ...base, spi: 7, aead: { ...gcm, salt: hex(4, 9) } }, { ...inbound, spi: 7 }]),
    ).toHaveLength(3);
    const pair = { ...plain, cipher: cbc, auth: sha256 };
    expect(validateSas([pair, { ...pair, spi: 7 }])).toHaveLength(2);
  });

  test('in a document are named by their place', () => {
    expect(() => parseSaDocument({ sas: [base, { ...base, spi: 0 }] })).toThrowError(
      expect.objectContaining({ path: 'sas[1].spi' }),
    );
    expect(() => parseSaDocument({ sas: {} })).toThrowError(expect.objectContaining({ path: 'sas' }));
    expect(() => parseSaDocument({})).toThrowError(expect.objectContaining({ code: 'SA_MISSING_FIELD' }));
    expect(() => parseSaDocument([])).toThrowError(expect.objectContaining({ code: 'SA_TYPE' }));
  });
});

describe('keys of an SA that is wrong', () => {
  const bytes = (length: number) => Uint8Array.from({ length }, (_, i) => i + 1);
  const aead = { name: 'aes-gcm', key: bytes(16), salt: bytes(4) };
  const auth = { name: 'hmac-sha256', key: bytes(32) };

  test.each<[string, Json[]]>([
    ['a salt of another length', [{ ...base, aead: { ...aead, salt: bytes(3) } }]],
    ['an ICV of another length', [{ ...base, aead: { ...aead, icvLength: 7 } }]],
    ['no cipher', [{ ...plain, auth }]],
    ['a cipher that is not known', [{ ...plain, auth, cipher: { name: 'rot13', key: bytes(16) } }]],
    ['a weak cipher key', [{ ...plain, auth, cipher: { name: '3des-cbc', key: new Uint8Array(24).fill(2) } }]],
    ['an IV of another length', [{ ...base, aead, initial: { iv: '010203' } }]],
    [
      'another SA that is wrong',
      [
        { ...base, aead },
        { ...base, spi: 0 },
      ],
    ],
    [
      'the same nonces as another',
      [
        { ...base, aead },
        { ...base, aead, spi: 7 },
      ],
    ],
  ])('are wiped: %s', (_name, inputs) => {
    const copies: SecretBytes[] = [];
    const copy = vi.spyOn(SecretBytes, 'copy').mockImplementation((of) => {
      const secret = new SecretBytes(of.length);
      secret.set(of);
      copies.push(secret);
      return secret;
    });
    expect(() => validateSas(inputs)).toThrowError(IpsecError);
    copy.mockRestore();
    expect(copies.length).toBeGreaterThan(0);
    for (const secret of copies) expect([...secret].every((byte) => byte === 0)).toBe(true);
  });
});

describe('keys do not show', () => {
  const key = 'deadbeef'.repeat(4);
  const digits = /222, ?173|de, ?ad|deadbeef|3q2\+7/i;

  test('when an SA is inspected, printed or turned into JSON', () => {
    const sa = validateSa({ ...base, aead: { ...gcm, key, salt: 'deadbeef' } });
    const shown = [
      inspect(sa, { depth: 9, showHidden: true }),
      JSON.stringify(sa, (_name, value) => (typeof value === 'bigint' ? String(value) : value)),
      `${sa.aead?.key}`,
      String(sa.aead?.key.join()),
      String(sa.aead?.key.subarray(2).toLocaleString()),
      inspect(sa.aead?.key.slice(1)),
    ];
    for (const text of shown) {
      expect(text).not.toMatch(digits);
      expect(text).toContain('secret bytes');
    }
    expect(sa.aead?.key[0]).toBe(0xde);
  });

  test.each<[string, Json]>([
    ['the key is one byte too long', { ...base, aead: { ...gcm, key: `${key}de` } }],
    ['the key is half a byte too long', { ...base, aead: { ...gcm, key: `${key}d` } }],
    ['the key stands where a name should', { ...base, aead: { ...gcm, name: key } }],
    ['the key stands where a number should', { ...base, spi: `0x${key}` }],
    ['the key is used as a field name', { ...base, [key]: 1 }],
    ['the key stands where an address should', { ...base, tunnel: { ...tunnel, source: key } }],
    ['the key stands where a prefix should', { ...base, selector: { source: key } }],
  ])('in an error: %s', (_name, input) => {
    const error = failure(input);
    expect(`${inspect(error, { depth: 9 })} ${error.hint} ${error.path}`).not.toMatch(/deadbeef/);
  });
});
