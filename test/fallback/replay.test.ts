import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { carryWindow, isNew, markSeen, startWindow, windowBlocks } from '../../src/fallback/replay.ts';
import { runs } from '../depth.ts';

/** What RFC 4303, 3.4.3 says, with a set of numbers and no arithmetic on bits. */
class NaiveWindow {
  readonly #size: bigint;
  readonly #start: bigint;
  readonly #seen = new Set<bigint>();
  top: bigint;

  constructor(size: number, top: bigint) {
    this.#size = BigInt(size);
    this.#start = top;
    this.top = top;
  }

  accepts(number: bigint): boolean {
    if (number > this.top) return true;
    if (number <= this.#start || this.top - number >= this.#size) return false;
    return !this.#seen.has(number);
  }

  saw(number: bigint): boolean {
    return number <= this.#start || this.#seen.has(number);
  }

  add(number: bigint): void {
    this.#seen.add(number);
    if (number > this.top) this.top = number;
  }
}

/** The window under test, at some place in a larger array. */
class Window {
  readonly #bits: Uint32Array;
  readonly #base: number;
  readonly #mask: number;
  readonly #size: number;
  #low: number;
  #high: number;

  constructor(size: number, top: bigint) {
    const blocks = windowBlocks(size);
    this.#bits = new Uint32Array(blocks + 20).fill(0x5a5a5a5a);
    this.#base = 7;
    this.#mask = blocks - 1;
    this.#size = size;
    this.#low = Number(top & 0xffffffffn);
    this.#high = Number(top >> 32n);
    startWindow(this.#bits, this.#base, this.#mask, this.#low);
  }

  accepts(number: bigint): boolean {
    const low = Number(number & 0xffffffffn);
    const high = Number(number >> 32n);
    return isNew(this.#bits, this.#base, this.#mask, this.#size, this.#low, this.#high, low, high);
  }

  add(number: bigint): void {
    const low = Number(number & 0xffffffffn);
    const high = Number(number >> 32n);
    markSeen(this.#bits, this.#base, this.#mask, this.#low, this.#high, low, high);
    if (high > this.#high || (high === this.#high && low > this.#low)) {
      this.#low = low;
      this.#high = high;
    }
  }

  /** A window of another size that knows what this one knows. */
  resized(size: number): Window {
    const other = new Window(size, (BigInt(this.#high) << 32n) | BigInt(this.#low));
    // `carryWindow` works inside one array.
    const both = new Uint32Array(other.#bits.length + this.#bits.length);
    both.set(other.#bits);
    both.set(this.#bits, other.#bits.length);
    const from = other.#bits.length + this.#base;
    carryWindow(both, from, this.#mask, other.#base, other.#mask, this.#low);
    other.#bits.set(both.subarray(0, other.#bits.length));
    return other;
  }

  get neighbours(): readonly number[] {
    return [...this.#bits.subarray(0, this.#base), ...this.#bits.subarray(this.#base + this.#mask + 1)];
  }
}

const sizes = [32, 33, 63, 64, 65, 127, 128, 1000, 1024, 4096, 65535, 65536];
const starts = [0n, 1n, 31n, 32n, 0xfffffff0n, 0xffffffffn, 0x1_0000_0000n, 0xffff_ffff_0000_0000n];

describe('replay windows', () => {
  it.each(sizes)('a window of %i has blocks for itself and one that is being cleared', (size) => {
    const blocks = windowBlocks(size);
    expect(blocks & (blocks - 1)).toBe(0);
    expect((blocks - 1) * 32).toBeGreaterThanOrEqual(size);
  });

  it.each(sizes)('a window of %i agrees with the naive model wherever it starts and however it moves', (size) => {
    const step = fc.oneof(
      { weight: 6, arbitrary: fc.bigInt(-3n, 5n) },
      { weight: 3, arbitrary: fc.bigInt(BigInt(-size) - 2n, BigInt(size) + 2n) },
      { weight: 1, arbitrary: fc.bigInt(-(1n << 33n), 1n << 33n) },
    );
    fc.assert(
      fc.property(fc.constantFrom(...starts), fc.array(step, { minLength: 1, maxLength: 120 }), (start, steps) => {
        const naive = new NaiveWindow(size, start);
        const window = new Window(size, start);
        for (const offset of steps) {
          const number = naive.top + offset;
          if (number < 0n || number >= 1n << 64n) continue;
          const expected = naive.accepts(number);
          if (window.accepts(number) !== expected) throw new Error(`${number} is ${expected ? 'refused' : 'taken'}`);
          if (!expected) continue;
          naive.add(number);
          window.add(number);
          if (window.accepts(number)) throw new Error(`${number} is taken twice`);
        }
        expect(window.neighbours.every((word) => word === 0x5a5a5a5a)).toBe(true);
      }),
      { numRuns: runs(200) },
    );
  });

  it.each(sizes)('a window of %i takes its oldest number, not the one before, and each once', (size) => {
    const window = new Window(size, 0n);
    const top = BigInt(3 * size);
    window.add(top);
    const oldest = top - BigInt(size) + 1n;
    expect(window.accepts(oldest - 1n)).toBe(false);
    expect(window.accepts(oldest)).toBe(true);
    window.add(oldest);
    expect(window.accepts(oldest)).toBe(false);
    expect(window.accepts(oldest + 1n)).toBe(true);
  });

  it('counts what is at or behind its start as seen', () => {
    const window = new Window(64, 1000n);
    for (let number = 937n; number <= 1000n; number++) expect(window.accepts(number)).toBe(false);
    expect(window.accepts(1001n)).toBe(true);
  });

  it('does not bring old marks back when it jumps by a multiple of its ring', () => {
    const window = new Window(64, 0n);
    const ring = BigInt(windowBlocks(64) * 32);
    for (let number = 1n; number <= 64n; number++) window.add(number);
    window.add(ring + 64n);
    for (let number = ring + 1n; number < ring + 64n; number++) expect(window.accepts(number)).toBe(true);
  });

  it('of another size knows what the old one knew', () => {
    const some = fc.constantFrom(32, 33, 64, 100, 128, 1000);
    const steps = fc.array(fc.integer({ min: -70, max: 40 }), { minLength: 1, maxLength: 80 });
    fc.assert(
      fc.property(some, some, fc.constantFrom(...starts.slice(0, -1)), steps, (before, after, start, offsets) => {
        const naive = new NaiveWindow(before, start);
        const old = new Window(before, start);
        for (const offset of offsets) {
          const number = naive.top + BigInt(offset);
          if (number < 0n || !naive.accepts(number)) continue;
          naive.add(number);
          old.add(number);
        }
        const window = old.resized(after);
        expect(window.neighbours.every((word) => word === 0x5a5a5a5a)).toBe(true);
        const both = BigInt(Math.min(before, after));
        const wrong: bigint[] = [];
        for (let number = naive.top + 3n; number > naive.top - 1100n && number >= 0n; number--) {
          // What is behind either window may be refused, and must be if it was seen.
          const isInBoth = number > naive.top - both;
          if (
            isInBoth ? window.accepts(number) !== naive.accepts(number) : naive.saw(number) && window.accepts(number)
          ) {
            wrong.push(number);
          }
        }
        expect(wrong).toEqual([]);
      }),
      { numRuns: runs(200) },
    );
  });
});
