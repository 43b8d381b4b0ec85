import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  get8,
  get16,
  get32,
  get64,
  getBytes,
  put8,
  put16,
  put32,
  put64,
  putBytes,
} from '../../src/virtio/little-endian.ts';

describe('little-endian fields', () => {
  it('read what was written, at any alignment, and touch nothing else', () => {
    fc.assert(
      fc.property(fc.nat(7), fc.bigInt({ min: 0n, max: 0xffffffffffffffffn }), (at, value) => {
        const bytes = new Uint8Array(24).fill(0xee);
        put64(bytes, at, value);
        expect(get64(bytes, at)).toBe(value);
        expect(get32(bytes, at)).toBe(Number(value & 0xffffffffn));
        expect(get16(bytes, at)).toBe(Number(value & 0xffffn));
        expect(get8(bytes, at)).toBe(Number(value & 0xffn));
        expect(bytes.subarray(at + 8)).toEqual(new Uint8Array(16 - at).fill(0xee));
        expect(bytes.subarray(0, at)).toEqual(new Uint8Array(at).fill(0xee));
      }),
    );
  });

  it('read zeros past the end', () => {
    const bytes = Uint8Array.of(1, 2, 3);
    expect(get32(bytes, 0)).toBe(0x030201);
    expect(get16(bytes, 2)).toBe(3);
    expect(get64(bytes, 9)).toBe(0n);
    expect(getBytes(bytes, 1, 4)).toEqual(Uint8Array.of(2, 3, 0, 0));
  });

  it('refuse to be written past the end', () => {
    const bytes = new Uint8Array(3);
    expect(() => put8(bytes, 3, 1)).toThrow(RangeError);
    expect(() => put16(bytes, 2, 1)).toThrow(RangeError);
    expect(() => put32(bytes, 0, 1)).toThrow(RangeError);
    expect(() => put64(bytes, 0, 1n)).toThrow(RangeError);
    expect(() => putBytes(bytes, 1, new Uint8Array(3))).toThrow(RangeError);
    expect(bytes).toEqual(new Uint8Array(3));
  });
});
