import { describe, expect, it } from 'vitest';
import {
  algorithmNames,
  driverModes,
  type InlineCapability,
  modeName,
  optionNamesOf,
  whyNotInline,
} from '../../src/ipsec/capability.ts';
import { place } from '../../src/ipsec/placement.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import type { ModeCapability } from '../../src/ipsec/wire/codec.ts';
import { SaOption } from '../../src/ipsec/wire/numbers.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { inbound, key, outbound } from './support.ts';

const everything: ModeCapability = {
  mode: 1,
  maxReplayWindow: 1024,
  options: 0x7f,
  ciphers: (1n << 0n) | (1n << 3n) | (1n << 4n) | (1n << 8n),
  macs: (1n << 2n) | (1n << 4n) | (1n << 5n) | (1n << 6n) | (1n << 26n) | (1n << 41n) | (1n << 53n),
  aeads: 0b1110,
  maxCipherKeyLength: 32,
  maxAuthKeyLength: 32,
};

function capability(change: Partial<InlineCapability> = {}, entry: Partial<ModeCapability> = {}): InlineCapability {
  const modes = [1, 2, 3, 4].map((mode) => ({ ...everything, ...entry, mode }));
  return { wire: ipsecWire('virtio-1.4'), limits: { inbound: 8, outbound: 8 }, modes, ...change };
}

const gcm = (icvLength: number) => ({ name: 'aes-gcm', key: key(16), salt: key(4), icvLength }) as const;
const hmac = (name: 'hmac-sha1' | 'hmac-sha256' | 'hmac-sha384' | 'hmac-sha512', length: number, icvLength: number) =>
  ({ name, key: key(length), icvLength }) as const;
const cbc = { name: 'aes-cbc', key: key(16) } as const;
const draft = capability({ wire: ipsecWire('rfc-2025-01') });
const esn = { esn: true, copyDscp: false, copyDf: false, decrementTtl: false, ecn: false };
const life = { softPackets: 1n, hardPackets: 0n, softBytes: 0n, hardBytes: 0n };

describe('a device that offers everything', () => {
  it.each<[string, Partial<SecurityAssociation>]>([
    ['AES-GCM', {}],
    ['AES-CBC with HMAC-SHA1', { cipher: cbc, auth: hmac('hmac-sha1', 20, 12) }],
    ['AES-CBC with HMAC-SHA-256', { cipher: cbc, auth: hmac('hmac-sha256', 32, 16) }],
    ['AH', { protocol: 'ah', auth: hmac('hmac-sha1', 20, 12) }],
    ['transport mode', { mode: 'transport' }],
    ['a lifetime', { lifetime: life }],
    ['UDP encapsulation', { udpEncap: { sourcePort: 4500, destinationPort: 4500 } }],
  ])('takes %s', (_what, change) => {
    expect(whyNotInline(outbound(change), capability())).toBeNull();
    expect(whyNotInline(inbound(change), capability())).toBeNull();
  });

  it.each<[string, Partial<SecurityAssociation>]>([
    ['hmac-sha512 key does not fit the SA object', { cipher: cbc, auth: hmac('hmac-sha512', 64, 32) }],
    ['hmac-sha384 key does not fit the SA object', { protocol: 'ah', auth: hmac('hmac-sha384', 48, 24) }],
    ['ICV length 8 is not expressible', { aead: gcm(8) }],
    ['ICV length 12 is not expressible', { aead: gcm(12) }],
    ['an initial sequence number is not expressible', { initial: { sequence: 7n } }],
    ['an initial IV is not expressible', { initial: { sequence: 1n, iv: key(8) } }],
    ['TFC padding is not expressible', { tfcPadding: 64 }],
    ['NULL authentication is not expressible', { cipher: cbc, auth: { name: 'null', key: key(0), icvLength: 0 } }],
  ])('is told nothing of what the object cannot say: %s', (reason, change) => {
    expect(whyNotInline(outbound(change), capability())).toBe(reason);
  });
});

describe('an inbound SA in UDP that knows the addresses before NAT', () => {
  it('is told nothing of what the object cannot say', () => {
    const udpEncap = { sourcePort: 4500, destinationPort: 4500 };
    const change = { mode: 'transport' } as const;
    const known = { ...udpEncap, originalSource: Uint8Array.of(10, 0, 0, 1) };
    expect(whyNotInline(inbound({ ...change, udpEncap: known }), capability())).toBe(
      'addresses before NAT are not expressible',
    );
    expect(whyNotInline(inbound({ ...change, udpEncap }), capability())).toBeNull();
  });
});

describe('a device that offers less', () => {
  it.each<[string, InlineCapability, SecurityAssociation]>([
    ['the device takes no outbound SAs', capability({ limits: { inbound: 8, outbound: 0 } }), outbound()],
    ['the device takes no inbound SAs', capability({ limits: { inbound: 0, outbound: 8 } }), inbound()],
    ['the device does not offer ESP tunnel', capability({ modes: [{ ...everything, mode: 2 }] }), outbound()],
    ['the device does not offer aes-gcm in ESP tunnel', capability({}, { aeads: 0b1100 }), outbound()],
    [
      'the device does not offer aes-cbc in ESP tunnel',
      capability({}, { ciphers: 1n }),
      outbound({ cipher: cbc, auth: hmac('hmac-sha1', 20, 12) }),
    ],
    [
      'the device does not offer hmac-sha1 in AH tunnel',
      capability({}, { macs: 16n }),
      outbound({ protocol: 'ah', auth: hmac('hmac-sha1', 20, 12) }),
    ],
    [
      'the device takes cipher keys of up to 16 bytes in ESP tunnel',
      capability({}, { maxCipherKeyLength: 16 }),
      outbound({ aead: { name: 'aes-gcm', key: key(32), salt: key(4), icvLength: 16 } }),
    ],
    [
      'the device takes authentication keys of up to 20 bytes in ESP tunnel',
      capability({}, { maxAuthKeyLength: 20 }),
      outbound({ cipher: cbc, auth: hmac('hmac-sha256', 32, 16) }),
    ],
    [
      'the device has replay windows of up to 32 packets in ESP tunnel',
      capability({}, { maxReplayWindow: 32 }),
      inbound(),
    ],
    [
      'the device does not offer extended sequence numbers and SA lifetime in ESP tunnel',
      capability({}, { options: 0 }),
      outbound({ options: esn, lifetime: life }),
    ],
    ['the device does not offer SA lifetime in ESP tunnel', draft, outbound({ lifetime: life })],
    [
      'an initial sequence number is expressible with extended sequence numbers only',
      draft,
      outbound({ initial: { sequence: 7n } }),
    ],
  ])('says why: %s', (reason, offered, sa) => {
    expect(whyNotInline(sa, offered)).toBe(reason);
  });

  it('takes a start sequence in the draft when sequence numbers are extended', () => {
    expect(whyNotInline(outbound({ initial: { sequence: 7n }, options: esn }), draft)).toBeNull();
  });

  it('does not ask for the replay window of an outbound SA', () => {
    expect(whyNotInline(outbound({ replayWindow: 64 }), capability({}, { maxReplayWindow: 0 }))).toBeNull();
  });
});

describe('what the driver sets', () => {
  it('is part of what the device offers and only what the driver knows', () => {
    const offered = { ...everything, options: 0xffffffff, ciphers: ~0n & 0xffffffffffffffffn, aeads: 0xffffffff };
    const modes = driverModes(
      [
        { ...offered, maxCipherKeyLength: 64 },
        { ...offered, mode: 9 },
      ],
      ipsecWire('virtio-1.4'),
    );
    expect(modes).toEqual([{ ...everything, macs: everything.macs }]);
    const [entry] = driverModes([offered], ipsecWire('rfc-2025-01'));
    expect(entry.options).toBe(0x1f);
  });
});

describe('names for reports', () => {
  it('come from the tables of the standard', () => {
    expect(modeName(4)).toBe('AH transport');
    expect(modeName(77)).toBe('mode 77');
    expect(optionNamesOf(SaOption.esn | SaOption.ecn | (1 << 20))).toEqual([
      'extended sequence numbers',
      'ECN',
      'option bit 20',
    ]);
    expect(algorithmNames({ ...everything, ciphers: 0b1001n, macs: 1n << 4n, aeads: 2 })).toEqual({
      aeads: ['aes-gcm'],
      ciphers: ['null', 'aes-cbc'],
      macs: ['hmac-sha256'],
    });
  });
});

describe('placement', () => {
  const sa = outbound();
  it('prefers the device and says why not when it is not possible', () => {
    expect(place({ sa, inlineObstacle: null, softwareObstacle: null }).where).toBe('inline');
    expect(place({ sa, inlineObstacle: 'ICV length 8 is not expressible', softwareObstacle: null })).toEqual({
      where: 'software',
      because: 'ICV length 8 is not expressible',
    });
  });

  it('goes where it is required, or nowhere', () => {
    expect(place({ sa, require: 'software', inlineObstacle: null, softwareObstacle: null }).where).toBe('software');
    expect(() => place({ sa, require: 'inline', inlineObstacle: 'no', softwareObstacle: null })).toThrow(
      expect.objectContaining({ code: 'NOT_OFFLOADABLE' }),
    );
    expect(() => place({ sa, require: 'software', inlineObstacle: null, softwareObstacle: 'no' })).toThrow(
      expect.objectContaining({ code: 'SOFTWARE_NOT_AVAILABLE' }),
    );
    expect(() => place({ sa, inlineObstacle: 'a', softwareObstacle: 'b' })).toThrow(
      expect.objectContaining({ code: 'NO_PLACE_FOR_SA' }),
    );
  });
});
