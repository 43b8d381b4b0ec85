import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { NO_PACKET, PacketPool } from '../../src/packet/pool.ts';

function memoryOf(size: number) {
  const buffer = new ArrayBuffer(size);
  const views = { u8: new Uint8Array(buffer), u16: new Uint16Array(buffer), u32: new Uint32Array(buffer) };
  return { address: 4096, size, ...views };
}

describe('a packet pool', () => {
  test('hands out each slot once, empty and in the clear, whatever was in it before', () => {
    const pool = new PacketPool(memoryOf(8 * 2048));
    const out = new Uint32Array(16);
    expect(pool.allocate(out, 16)).toBe(8);
    expect(new Set(out.subarray(0, 8)).size).toBe(8);
    expect(pool.allocate(out.subarray(8), 1)).toBe(0);
    for (let i = 0; i < 8; i++) {
      const p = out[i];
      pool.write(p, Uint8Array.of(1, 2, 3));
      pool.sa[p] = 7;
      pool.flags[p] = 1;
      pool.next[p] = 0;
    }
    pool.free(out, 8);
    expect(pool.allocate(out, 8)).toBe(8);
    for (const p of out.subarray(0, 8)) {
      expect([pool.length[p], pool.sa[p], pool.flags[p], pool.next[p]]).toEqual([0, 0, 0, NO_PACKET]);
      expect(pool.offset[p]).toBe(pool.slot(p) + pool.headroom);
    }
  });

  test('agrees with a set of numbers, for any order of taking and giving back', () => {
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.boolean(), fc.nat(12)), { maxLength: 60 }), (steps) => {
        const pool = new PacketPool(memoryOf(10 * 256), { stride: 256 });
        const held: number[] = [];
        const burst = new Uint32Array(12);
        for (const [take, n] of steps) {
          if (take) {
            const got = pool.allocate(burst, n);
            expect(got).toBe(Math.min(n, 10 - held.length));
            for (const p of burst.subarray(0, got)) {
              expect(held).not.toContain(p);
              held.push(p);
            }
          } else {
            const back = held.splice(0, n);
            burst.set(back);
            pool.free(burst, back.length);
          }
          expect(pool.available).toBe(10 - held.length);
        }
      }),
    );
  });

  test('refuses a packet that is not out, and frees none twice', () => {
    const pool = new PacketPool(memoryOf(4 * 2048));
    const out = new Uint32Array(4);
    pool.allocate(out, 1);
    expect(() => pool.free(Uint32Array.of(99), 1)).toThrow(RangeError);
    pool.free(out, 1);
    expect(() => pool.free(out, 1)).toThrow(RangeError);
    expect(pool.available).toBe(4);
  });

  test('writes at the default headroom, reads what was written, and refuses what does not fit', () => {
    const pool = new PacketPool(memoryOf(2 * 256), { stride: 256 });
    const out = new Uint32Array(1);
    pool.allocate(out, 1);
    const bytes = Uint8Array.from({ length: 128 }, (_, i) => i);
    pool.offset[out[0]] += 60;
    pool.write(out[0], bytes);
    expect(pool.read(out[0])).toEqual(bytes);
    expect(pool.offset[out[0]]).toBe(pool.slot(out[0]) + 128);
    expect(() => pool.write(out[0], new Uint8Array(129))).toThrow(RangeError);
  });

  test.each([
    [{ stride: 100 }],
    [{ headroom: 64 }],
    [{ headroom: 130 }],
    [{ stride: 128, headroom: 128 }],
    [{ stride: 4096 }],
  ])('refuses sizes that cannot be: %o', (options) => {
    expect(() => new PacketPool(memoryOf(2048), options)).toThrow(RangeError);
  });
});
