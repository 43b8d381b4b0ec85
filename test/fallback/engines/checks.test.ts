import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ContextNumbers, copyIcv, differs } from '../../../src/fallback/engines/checks.ts';
import { plainMemory } from '../node-engine.ts';

const LENGTHS = [8, 12, 16, 24, 32];

describe('the comparison of ICVs', () => {
  it('finds any difference inside, and none outside, at every alignment', () => {
    const a = plainMemory(128);
    const b = plainMemory(128);
    for (const length of LENGTHS) {
      for (let at = 0; at < 16; at++) {
        for (let changed = -4; changed < length + 4; changed++) {
          for (let i = 0; i < 128; i++) a.u8[i] = 3 * i;
          b.u8.fill(0x77);
          b.u8.set(a.u8.subarray(at + 16, at + 16 + length), 8);
          a.u8[at + 16 + changed] ^= 0x40;
          const same = differs(a.u8, a.u16, a.u32, at + 16, b.u8, b.u16, b.u32, 8, length) === 0;
          expect(same).toBe(changed < 0 || changed >= length);
        }
      }
    }
  });

  it('is the same as comparing bytes, and the copy as copying bytes, for any content', () => {
    const content = fc.uint8Array({ minLength: 32, maxLength: 32 });
    fc.assert(
      fc.property(content, content, fc.constantFrom(...LENGTHS), fc.nat(15), (x, y, length, at) => {
        const a = plainMemory(64);
        const b = plainMemory(64);
        a.u8.set(x, at);
        b.u8.set(y, 4);
        const equal = Buffer.compare(x.subarray(0, length), y.subarray(0, length)) === 0;
        expect(differs(a.u8, a.u16, a.u32, at, b.u8, b.u16, b.u32, 4, length) === 0).toBe(equal);
        const expected = a.u8.slice();
        expected.set(y.subarray(0, length), at);
        copyIcv(a.u8, a.u16, a.u32, at, b.u8, b.u16, b.u32, 4, length);
        expect(a.u8).toEqual(expected);
        expect(differs(a.u8, a.u16, a.u32, at, b.u8, b.u16, b.u32, 4, length)).toBe(0);
      }),
    );
  });
});

describe('context numbers', () => {
  it('are never given out twice at a time, and never 0', () => {
    fc.assert(
      fc.property(fc.array(fc.nat(300), { maxLength: 400 }), (actions) => {
        const numbers = new ContextNumbers();
        const taken = new Map<number, number>();
        for (const [i, action] of actions.entries()) {
          if (action < 100 && taken.size > 0) {
            const [context] = [...taken.keys()].slice(action % taken.size);
            numbers.give(context);
            taken.delete(context);
            expect(() => numbers.give(context)).toThrow(RangeError);
          } else {
            const context = numbers.take(1 + (i % 9));
            expect(taken.has(context)).toBe(false);
            expect(context).toBeGreaterThan(0);
            taken.set(context, 1 + (i % 9));
          }
          for (const [context, kind] of taken) expect(numbers.kindOf(context)).toBe(kind);
        }
        expect([...numbers.taken()].sort()).toEqual([...taken.keys()].sort());
        for (let kind = 1; kind <= 9; kind++) {
          const members = numbers.membersOf(kind);
          const found = Array.from({ length: 32 * members.length }, (_, c) => c).filter(
            (c) => ((members[c >>> 5] >>> (c & 31)) & 1) === 1,
          );
          expect(found.map((c) => taken.get(c))).toEqual(found.map(() => kind));
          expect(found.length).toBe([...taken.values()].filter((one) => one === kind).length);
        }
      }),
      { numRuns: 30 },
    );
  });

  it('are in no set but that of their rules when they have been given back, also after the sets have grown', () => {
    const numbers = new ContextNumbers();
    const contexts = Array.from({ length: 1000 }, (_, i) => numbers.take(1 + (i & 1)));
    const count = (kind: number) =>
      numbers.membersOf(kind).reduce((sum, word) => sum + word.toString(2).replaceAll('0', '').length, 0);
    expect([count(1), count(2), count(3)]).toEqual([500, 500, 0]);
    expect(numbers.membersOf(2).length * 32).toBe(numbers.capacity);
    for (const context of contexts) numbers.give(context);
    expect([count(1), count(2)]).toEqual([0, 0]);
    expect(numbers.kindOf(contexts[0])).toBe(0);
    expect(numbers.kindOf(1 << 24)).toBe(0);
  });
});
