import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { ModeCapability } from '../../../src/ipsec/wire/codec.ts';
import { recogniseRevision } from '../../../src/ipsec/wire/recognise.ts';
import { ipsecWire, WIRE_REVISIONS } from '../../../src/ipsec/wire/revisions.ts';

/** Any capability of a device that offers what the standard names. */
const modes = fc
  .uniqueArray(fc.integer({ min: 1, max: 4 }), { minLength: 1 })
  .chain((numbers) =>
    fc.tuple(
      ...numbers.map((mode) =>
        fc.record({
          mode: fc.constant(mode),
          maxReplayWindow: fc.nat(0xffffffff),
          options: fc.nat(0x1f),
          ciphers: fc.constantFrom(0n, 1n, 8n, 0x119n, 1n << 8n),
          macs: fc.constantFrom(0n, 1n << 4n, (1n << 41n) | 4n, 1n << 53n),
          aeads: fc.constantFrom(0, 2, 0xe),
          maxCipherKeyLength: fc.constantFrom(0, 16, 32, 64),
          maxAuthKeyLength: fc.constantFrom(0, 20, 32, 64),
        }),
      ),
    ),
  )
  // A mode without any algorithm is no offer.
  .map((entries): ModeCapability[] => entries.map((one) => ({ ...one, aeads: one.aeads || (one.macs ? 0 : 2) })));

describe.each(WIRE_REVISIONS)('a capability of %s', (revision) => {
  const wire = ipsecWire(revision);

  it('is recognised by its length, padded to 8 or not', () => {
    fc.assert(
      fc.property(modes, fc.boolean(), (entries, padded) => {
        const bytes = wire.encodeModes(entries);
        const shown = new Uint8Array(padded ? Math.ceil(bytes.length / 8) * 8 : bytes.length);
        shown.set(bytes);
        expect(recogniseRevision(shown)).toBe(revision);
      }),
    );
  });

  it('is never taken for the other when the device returns a whole buffer', () => {
    fc.assert(
      fc.property(modes, fc.integer({ min: 400, max: 2040 }), (entries, length) => {
        const shown = new Uint8Array(length);
        shown.set(wire.encodeModes(entries));
        expect([revision, null]).toContain(recogniseRevision(shown));
      }),
    );
  });

  it('is recognised in a whole buffer when the device offers what ours does', () => {
    const common = { maxReplayWindow: 1024, options: 1, aeads: 0xe, maxCipherKeyLength: 32, maxAuthKeyLength: 32 };
    const entries = [1, 2, 3, 4].map((mode) => ({ mode, ciphers: 0x119n, macs: 0x14n, ...common }));
    for (let count = 1; count <= entries.length; count++) {
      const shown = new Uint8Array(2040);
      shown.set(wire.encodeModes(entries.slice(0, count)));
      expect(recogniseRevision(shown)).toBe(revision);
    }
  });
});

describe('a capability that tells nothing', () => {
  it('is recognised as neither, whatever its bytes are', () => {
    expect(recogniseRevision(new Uint8Array(0))).toBeNull();
    expect(recogniseRevision(new Uint8Array(64))).toBeNull();
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 600 }), (bytes) => {
        const before = bytes.slice();
        expect([null, ...WIRE_REVISIONS]).toContain(recogniseRevision(bytes));
        expect(bytes).toEqual(before);
      }),
    );
  });
});
