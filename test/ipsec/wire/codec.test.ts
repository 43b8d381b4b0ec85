import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { IpsecWire, ModeCapability, SaObject, TunnelParameters } from '../../../src/ipsec/wire/codec.ts';
import { ipsecWire, WIRE_REVISIONS } from '../../../src/ipsec/wire/revisions.ts';

const u8 = fc.integer({ min: 0, max: 0xff });
const u16 = fc.integer({ min: 0, max: 0xffff });
const u32 = fc.integer({ min: 0, max: 0xffffffff });
const u64 = fc.bigInt({ min: 0n, max: 0xffffffffffffffffn });
const bytes = (min: number, max = min) => fc.uint8Array({ minLength: min, maxLength: max });

const tunnelV4: fc.Arbitrary<TunnelParameters> = fc.record({
  source: bytes(4).map((b) => b.with(0, b[0] | 1)),
  destination: bytes(4),
  dscp: fc.integer({ min: 0, max: 63 }),
  df: fc.boolean(),
  ttl: u8,
  flowLabel: fc.constant(0),
});
const tunnelV6: fc.Arbitrary<TunnelParameters> = fc.record({
  source: bytes(16),
  destination: bytes(16),
  dscp: fc.integer({ min: 0, max: 63 }),
  df: fc.constant(false),
  ttl: u8,
  flowLabel: fc.integer({ min: 0, max: 0xfffff }),
});

function saObject(wire: IpsecWire): fc.Arbitrary<SaObject> {
  const life = wire.revision === 'virtio-1.4' ? u64 : fc.constant(0n);
  return fc.record({
    mode: u8,
    direction: u8,
    objectId: u32,
    spi: u32,
    salt: bytes(4),
    options: u64,
    tunnel: fc.oneof(fc.constant(null), tunnelV4, tunnelV6),
    udpSourcePort: u16,
    udpDestinationPort: u16,
    replayWindow: u32,
    cipherAlgorithm: u64,
    cipherKey: bytes(0, 32),
    authAlgorithm: u64,
    authKey: bytes(0, 32),
    softPackets: life,
    softBytes: life,
    hardPackets: life,
    hardBytes: life,
    esn: wire.hasInitialSequence ? u64 : fc.constant(0n),
  });
}

const modeCapability: fc.Arbitrary<ModeCapability> = fc.record({
  mode: u8,
  maxReplayWindow: u32,
  options: u32,
  ciphers: u64,
  macs: u64,
  aeads: u32,
  maxCipherKeyLength: u32,
  maxAuthKeyLength: u32,
});

const GUARD = 0xa5;

/** A valid object with every field different from 0 and from its neighbours, to see where each one lands. */
const sample: SaObject = {
  mode: 1,
  direction: 2,
  objectId: 0x04030201,
  spi: 0x14131211,
  salt: Uint8Array.of(0x21, 0x22, 0x23, 0x24),
  options: 0x38n << 56n,
  tunnel: {
    source: Uint8Array.of(192, 0, 2, 1),
    destination: Uint8Array.of(192, 0, 2, 2),
    dscp: 46,
    df: true,
    ttl: 64,
    flowLabel: 0,
  },
  udpSourcePort: 4500,
  udpDestinationPort: 4501,
  replayWindow: 0x51525354,
  cipherAlgorithm: 3n,
  cipherKey: new Uint8Array(32).fill(0x61),
  authAlgorithm: 4n,
  authKey: new Uint8Array(32).fill(0x71),
  softPackets: 0n,
  softBytes: 0n,
  hardPackets: 0n,
  hardBytes: 0n,
  esn: 0n,
};

describe.each(WIRE_REVISIONS)('the IPsec codec of %s', (revision) => {
  const wire = ipsecWire(revision);

  it('gives back every SA object that it has encoded', () => {
    fc.assert(
      fc.property(saObject(wire), (object) => {
        const out = new Uint8Array(wire.saObjectSize);
        wire.encodeSa(object, out);
        expect(wire.decodeSa(out)).toEqual(object);
      }),
    );
  });

  it('gives back every SA object with tunnel types counted from 0, but for one that is all zero', () => {
    const from0 = ipsecWire(revision, { tunnelTypeBase: 0 });
    fc.assert(
      fc.property(saObject(from0), (object) => {
        const out = new Uint8Array(from0.saObjectSize);
        from0.encodeSa(object, out);
        expect(from0.decodeSa(out)).toEqual(object);
      }),
    );
  });

  it('writes an SA object into its own bytes and no other', () => {
    fc.assert(
      fc.property(saObject(wire), (object) => {
        const out = new Uint8Array(wire.saObjectSize + 32).fill(GUARD);
        wire.encodeSa(object, out);
        expect(out.subarray(wire.saObjectSize)).toEqual(new Uint8Array(32).fill(GUARD));
      }),
    );
  });

  it('leaves nothing of what the buffer held before', () => {
    const clean = new Uint8Array(wire.saObjectSize);
    const dirty = new Uint8Array(wire.saObjectSize).fill(GUARD);
    const object = { ...sample, tunnel: null, cipherKey: new Uint8Array(0), authKey: new Uint8Array(0) };
    wire.encodeSa(object, clean);
    wire.encodeSa(object, dirty);
    expect(dirty).toEqual(clean);
  });

  it('reads an SA object that ends early as if zeros followed', () => {
    fc.assert(
      fc.property(saObject(wire), fc.nat(wire.saObjectSize), (object, length) => {
        const out = new Uint8Array(wire.saObjectSize);
        wire.encodeSa(object, out);
        const padded = new Uint8Array(wire.saObjectSize);
        padded.set(out.subarray(0, length));
        expect(outcome(() => wire.decodeSa(out.subarray(0, length)))).toEqual(outcome(() => wire.decodeSa(padded)));
      }),
    );
  });

  it('decodes any bytes to an object or to a typed error', () => {
    fc.assert(
      fc.property(bytes(0, 240), (any) => {
        expect(['object', 'MALFORMED_OBJECT']).toContain(outcome(() => wire.decodeSa(any)).kind);
        expect(['object', 'MALFORMED_CAPABILITY']).toContain(outcome(() => wire.decodeModes(any)).kind);
        expect(outcome(() => wire.decodeSaLimits(any)).kind).toBe('object');
      }),
    );
  });

  it('refuses a key length that the field cannot hold', () => {
    const out = new Uint8Array(wire.saObjectSize);
    wire.encodeSa(sample, out);
    const at = revision === 'virtio-1.4' ? 84 : 90;
    out[at] = 33;
    expect(() => wire.decodeSa(out)).toThrow(expect.objectContaining({ code: 'MALFORMED_OBJECT' }));
  });

  it('refuses a tunnel type that has no meaning', () => {
    const out = new Uint8Array(wire.saObjectSize);
    wire.encodeSa(sample, out);
    out[24] = 3;
    expect(() => wire.decodeSa(out)).toThrow(expect.objectContaining({ code: 'MALFORMED_OBJECT' }));
  });

  it('throws before it writes anything when a value does not fit', () => {
    const wrong: Partial<SaObject>[] = [
      { cipherKey: new Uint8Array(33) },
      { authKey: new Uint8Array(64) },
      { salt: new Uint8Array(3) },
      { udpSourcePort: 65536 },
      { spi: 2 ** 32 },
      { options: 1n << 64n },
      { mode: 256 },
      { tunnel: { ...sample.tunnel!, destination: new Uint8Array(16) } },
      { tunnel: { ...sample.tunnel!, source: new Uint8Array(5) } },
      { tunnel: { ...sample.tunnel!, dscp: 64 } },
    ];
    for (const part of wrong) {
      const out = new Uint8Array(wire.saObjectSize).fill(GUARD);
      expect(() => wire.encodeSa({ ...sample, ...part }, out)).toThrow(RangeError);
      expect(out).toEqual(new Uint8Array(wire.saObjectSize).fill(GUARD));
    }
    expect(() => wire.encodeSa(sample, new Uint8Array(wire.saObjectSize - 1))).toThrow(RangeError);
  });

  it('gives back the mode capabilities and limits that it has encoded', () => {
    const modes = fc.uniqueArray(modeCapability, { selector: (entry) => entry.mode, maxLength: 8 });
    fc.assert(
      fc.property(modes, u32, u32, (list, inbound, outbound) => {
        expect(wire.decodeModes(wire.encodeModes(list))).toEqual(list);
        expect(wire.decodeSaLimits(wire.encodeSaLimits({ inbound, outbound }))).toEqual({ inbound, outbound });
      }),
    );
  });

  it('refuses a capability that names more modes than its bytes hold, or one mode twice', () => {
    const encoded = wire.encodeModes([{ ...noMode, mode: 1 }]);
    encoded[0] = 2;
    expect(() => wire.decodeModes(encoded)).toThrow(expect.objectContaining({ code: 'MALFORMED_CAPABILITY' }));
    const twice = wire.encodeModes([noMode, noMode]);
    expect(() => wire.decodeModes(twice)).toThrow(expect.objectContaining({ code: 'MALFORMED_CAPABILITY' }));
  });
});

const noMode: ModeCapability = {
  mode: 1,
  maxReplayWindow: 0,
  options: 0,
  ciphers: 0n,
  macs: 0n,
  aeads: 0,
  maxCipherKeyLength: 0,
  maxAuthKeyLength: 0,
};

function outcome(decode: () => unknown): { kind: string; value?: unknown } {
  try {
    return { kind: 'object', value: decode() };
  } catch (error) {
    return { kind: error instanceof Error && 'code' in error ? String(error.code) : 'untyped' };
  }
}

/** Hexadecimal of `length` bytes at `at`. */
const hex = (from: Uint8Array, at: number, length: number) =>
  Buffer.from(from.subarray(at, at + length)).toString('hex');

describe('layouts', () => {
  it('places each field of a virtio-1.4 SA object where the standard has it', () => {
    const wire = ipsecWire('virtio-1.4');
    const out = new Uint8Array(196);
    const lifetime = { softPackets: 1n, softBytes: 2n, hardPackets: 3n, hardBytes: 4n };
    wire.encodeSa({ ...sample, ...lifetime }, out);
    expect(wire.saObjectSize).toBe(196);
    expect(hex(out, 0, 16)).toBe('01020000010203041112131421222324');
    expect(hex(out, 16, 8)).toBe('0000000000000038');
    expect(hex(out, 24, 16)).toBe('01000000c0000201c00002022e014000');
    expect(hex(out, 40, 28)).toBe('00'.repeat(28));
    expect(hex(out, 68, 8)).toBe('9411951154535251');
    expect(hex(out, 76, 12)).toBe('030000000000000020000000');
    expect(hex(out, 88, 32)).toBe('61'.repeat(32));
    expect(hex(out, 120, 12)).toBe('040000000000000020000000');
    expect(hex(out, 132, 32)).toBe('71'.repeat(32));
    expect(hex(out, 164, 32)).toBe('0100000000000000020000000000000003000000000000000400000000000000');
  });

  it('places each field of a draft SA object where the draft has it', () => {
    const wire = ipsecWire('rfc-2025-01');
    const out = new Uint8Array(166);
    wire.encodeSa({ ...sample, esn: 0x0102030405060708n }, out);
    expect(wire.saObjectSize).toBe(166);
    expect(hex(out, 0, 16)).toBe('01020000010203041112131421222324');
    expect(hex(out, 24, 15)).toBe('01000000c0000201c00002022e0140');
    expect(hex(out, 66, 8)).toBe('0807060504030201');
    expect(hex(out, 74, 8)).toBe('9411951154535251');
    expect(hex(out, 82, 10)).toBe('03000000000000002000');
    expect(hex(out, 92, 32)).toBe('61'.repeat(32));
    expect(hex(out, 124, 10)).toBe('04000000000000002000');
    expect(hex(out, 134, 32)).toBe('71'.repeat(32));
  });

  it('places the IPv6 tunnel header where the union has it', () => {
    const out = new Uint8Array(196);
    const source = new Uint8Array(16).fill(0xaa);
    const destination = new Uint8Array(16).fill(0xbb);
    const tunnel = { source, destination, dscp: 10, df: false, ttl: 63, flowLabel: 0x12345 };
    ipsecWire('virtio-1.4').encodeSa({ ...sample, tunnel }, out);
    expect(hex(out, 24, 44)).toBe(`02000000${'aa'.repeat(16)}${'bb'.repeat(16)}452301003f0a0000`);
    ipsecWire('virtio-1.4', { tunnelTypeBase: 0 }).encodeSa({ ...sample, tunnel }, out);
    expect(out[24]).toBe(1);
  });

  it('places each field of a mode capability where its revision has it', () => {
    const entry: ModeCapability = {
      mode: 2,
      maxReplayWindow: 64,
      options: 0x7f,
      ciphers: 0x0807060504030201n,
      macs: 0x1817161514131211n,
      aeads: 0x0e,
      maxCipherKeyLength: 32,
      maxAuthKeyLength: 20,
    };
    const standard = ipsecWire('virtio-1.4').encodeModes([entry]);
    expect(Buffer.from(standard).toString('hex')).toBe(
      '0100000000000000' + '02000000400000007f00000000000000010203040506070811121314151617180e0000002000000014000000',
    );
    const draft = ipsecWire('rfc-2025-01').encodeModes([entry]);
    expect(Buffer.from(draft).toString('hex')).toBe(
      '0100000000000000' + '02000000400000007f000000010203040506070811121314151617180e0000002000000014000000',
    );
  });
});
