import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { readU16, readU32, readU64, writeU16, writeU32, writeU64 } from '../../src/sys/little-endian.ts';

const codecs = [
  { name: 'u16', width: 2, read: readU16, write: writeU16, max: 0xffff },
  { name: 'u32', width: 4, read: readU32, write: writeU32, max: 0xffffffff },
  { name: 'u64', width: 8, read: readU64, write: writeU64, max: Number.MAX_SAFE_INTEGER },
];

describe.each(codecs)('little-endian $name', ({ width, read, write, max }) => {
  it('agrees with DataView at any offset, aligned or not, and touches nothing else', () => {
    fc.assert(
      fc.property(fc.integer({ min: 0, max }), fc.integer({ min: 0, max: 16 - width }), (value, at) => {
        const bytes = new Uint8Array(16).fill(0xaa);
        write(bytes, at, value);
        const judge = new Uint8Array(16).fill(0xaa);
        const view = new DataView(judge.buffer);
        if (width === 8) view.setBigUint64(at, BigInt(value), true);
        else if (width === 4) view.setUint32(at, value, true);
        else view.setUint16(at, value, true);
        expect(bytes).toEqual(judge);
        expect(read(bytes, at)).toBe(value);
      }),
    );
  });

  it.each([-1, 17 - width, Number.NaN, 2 ** 32])('throws RangeError at %d of 16 bytes', (at) => {
    expect(() => read(new Uint8Array(16), at)).toThrow(RangeError);
    expect(() => write(new Uint8Array(16), at, 1)).toThrow(RangeError);
  });
});

it('reads a u64 beyond 2^53 as the nearest number', () => {
  expect(readU64(new Uint8Array(8).fill(0xff), 0)).toBe(2 ** 64);
});
