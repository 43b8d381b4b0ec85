import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { RangeAllocator } from '../../src/vfio/range-allocator.ts';
import { runs } from '../depth.ts';

/** The same job by trying every number: slow and hard to get wrong. */
class Naive {
  readonly #free: boolean[];
  readonly #boundary: number;

  constructor(ranges: readonly { start: number; last: number }[], space: number, boundary: number) {
    this.#free = Array.from({ length: space }, (_, n) => ranges.some(({ start, last }) => start <= n && n <= last));
    this.#boundary = boundary;
  }

  allocate(size: number, alignment: number): number {
    for (let start = 0; start + size <= this.#free.length; start += alignment) {
      const crosses = Math.floor(start / this.#boundary) !== Math.floor((start + size - 1) / this.#boundary);
      if (crosses || !this.#free.slice(start, start + size).every(Boolean)) continue;
      this.#free.fill(false, start, start + size);
      return start;
    }
    return -1;
  }

  free(start: number, size: number): void {
    this.#free.fill(true, start, start + size);
  }
}

const SPACE = 256;
const BOUNDARY = 64;

describe('RangeAllocator', () => {
  it('does exactly what trying every number does, whatever is taken and given back', () => {
    const range = fc
      .tuple(fc.integer({ min: 0, max: SPACE - 1 }), fc.integer({ min: 0, max: 120 }))
      .map(([start, length]) => ({ start, last: Math.min(start + length, SPACE - 1) }));
    const step = fc.oneof(
      fc.record({ size: fc.integer({ min: 1, max: 70 }), alignment: fc.constantFrom(1, 2, 8, 16) }),
      fc.record({ giveBack: fc.nat() }),
    );
    fc.assert(
      fc.property(
        fc.array(range, { minLength: 1, maxLength: 5 }),
        fc.array(step, { maxLength: 60 }),
        (ranges, steps) => {
          const allocator = new RangeAllocator(ranges, BOUNDARY);
          const naive = new Naive(ranges, SPACE, BOUNDARY);
          const taken: { start: number; size: number }[] = [];
          for (const action of steps) {
            if ('size' in action) {
              const start = allocator.allocate(action.size, action.alignment);
              expect(start).toBe(naive.allocate(action.size, action.alignment));
              if (start >= 0) taken.push({ start, size: action.size });
            } else if (taken.length > 0) {
              const [{ start, size }] = taken.splice(action.giveBack % taken.length, 1);
              allocator.free(start, size);
              naive.free(start, size);
            }
          }
          // Given everything back, the allocator is as good as new.
          for (const { start, size } of taken) {
            allocator.free(start, size);
            naive.free(start, size);
          }
          for (let size = BOUNDARY; size > 0; size--) expect(allocator.allocate(size, 1)).toBe(naive.allocate(size, 1));
        },
      ),
      { numRuns: runs(100) },
    );
  });

  it('works at the top of a 39-bit space and never crosses 4 GiB', () => {
    const GiB = 2 ** 30;
    const allocator = new RangeAllocator([{ start: 2 ** 39 - 5 * GiB, last: 2 ** 39 - 1 }], 4 * GiB);
    // The 1 GiB below the boundary is too small for 2, and stays there for something smaller.
    expect(allocator.allocate(2 * GiB, 4096)).toBe(2 ** 39 - 4 * GiB);
    expect(allocator.allocate(GiB, 4096)).toBe(2 ** 39 - 5 * GiB);
    expect(allocator.allocate(2 * GiB, 4096)).toBe(2 ** 39 - 2 * GiB);
    expect(allocator.allocate(4096, 4096)).toBe(-1);
  });

  it('gives out a whole 4 GiB, but no more in one piece', () => {
    const allocator = new RangeAllocator([{ start: 0, last: 2 ** 40 }], 2 ** 32);
    expect(allocator.allocate(2 ** 32, 4096)).toBe(0);
    expect(allocator.allocate(2 ** 32 + 4096, 4096)).toBe(-1);
  });

  it.each([0, -4096, 1.5, Number.NaN, Infinity])('has nothing of size %d', (size) => {
    expect(new RangeAllocator([{ start: 0, last: 1e6 }], 2 ** 32).allocate(size, 1)).toBe(-1);
  });

  it('takes back only what it gave, once', () => {
    const allocator = new RangeAllocator([{ start: 0, last: 99 }], 2 ** 32);
    const start = allocator.allocate(10, 1);
    expect(() => allocator.free(start, 9)).toThrow(RangeError);
    expect(() => allocator.free(start + 1, 10)).toThrow(RangeError);
    allocator.free(start, 10);
    expect(() => allocator.free(start, 10)).toThrow(RangeError);
  });

  it.each([
    [{ start: 5, last: 4 }],
    [{ start: -1, last: 4 }],
    [{ start: 0.5, last: 4 }],
    [{ start: 0, last: 2 ** 53 }],
    [{ start: Number.NaN, last: 1 }],
  ])('cannot be made of %o', (range) => {
    expect(() => new RangeAllocator([range], 2 ** 32)).toThrow(RangeError);
  });
});
