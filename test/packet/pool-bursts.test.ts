import fc from 'fast-check';
import { expect, it } from 'vitest';
import { NO_PACKET, PacketPool } from '../../src/packet/pool.ts';
import { TestMemory } from '../virtqueue/support.ts';

const COUNT = 16;
const pool = () => new PacketPool(new TestMemory().allocateDma(COUNT * 2048));

it('bursts of any size hand out each packet once, fresh, and take it back', () => {
  const step = fc.record({ take: fc.nat(COUNT + 3), give: fc.nat(COUNT) });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 30 }), (steps) => {
      const p = pool();
      const out = new Set<number>();
      const numbers = new Uint32Array(COUNT + 3);
      for (const { take, give } of steps) {
        const n = p.allocate(numbers, take);
        expect(n).toBe(Math.min(take, COUNT - out.size));
        for (const packet of numbers.subarray(0, n)) {
          expect(out.has(packet)).toBe(false);
          out.add(packet);
          const state = [p.offset[packet], p.length[packet], p.sa[packet], p.flags[packet], p.next[packet]];
          expect(state).toEqual([packet * 2048 + 128, 0, 0, 0, NO_PACKET]);
          p.offset[packet] = 1;
          p.length[packet] = 2;
          p.sa[packet] = 3;
          p.flags[packet] = 4;
          p.next[packet] = 5;
        }
        const back = [...out].slice(0, give);
        p.free(Uint32Array.from(back), back.length);
        for (const packet of back) out.delete(packet);
        expect(p.available).toBe(COUNT - out.size);
      }
    }),
  );
});

it('a packet that is named twice, or is not out, stops a burst of frees exactly there', () => {
  for (const wrong of [0, 9, COUNT, 0xffffffff]) {
    for (let at = 1; at < 9; at++) {
      const p = pool();
      const numbers = new Uint32Array(9);
      p.allocate(numbers, 9);
      const list = Uint32Array.from(numbers);
      list[at] = wrong === 0 ? numbers[0] : wrong;
      expect(() => p.free(list, 9)).toThrow(RangeError);
      expect(p.available).toBe(COUNT - 9 + at);
      // What comes after is still out, and can be given back.
      const rest = numbers.subarray(at);
      p.free(rest, rest.length);
      expect(p.available).toBe(COUNT);
    }
  }
});

it('memory of more than 2 GiB is refused', () => {
  const memory = { ...new TestMemory().allocateDma(4096), size: 2 ** 31 + 4096 };
  expect(() => new PacketPool(memory)).toThrow(RangeError);
});
