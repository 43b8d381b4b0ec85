import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ObjectIds } from '../../src/virtio/object-ids.ts';

describe('object ids', () => {
  it('are used again as late as possible, and the one that was free for longest first', () => {
    const ids = new ObjectIds(3);
    expect([ids.take(), ids.take()]).toEqual([
      { id: 0, reused: false },
      { id: 1, reused: false },
    ]);
    ids.give(1);
    ids.give(0);
    expect([ids.take(), ids.take(), ids.take(), ids.take()]).toEqual([
      { id: 2, reused: false },
      { id: 1, reused: true },
      { id: 0, reused: true },
      null,
    ]);
  });

  it('are never in two hands and never beyond the limit, whatever is taken and given', () => {
    fc.assert(
      fc.property(fc.integer({ min: 0, max: 40 }), fc.array(fc.nat(60), { maxLength: 5000 }), (limit, steps) => {
        const ids = new ObjectIds(limit);
        const held = new Set<number>();
        for (const step of steps) {
          if (step % 3 !== 0) {
            const taken = ids.take();
            expect(taken === null).toBe(held.size === limit);
            if (taken === null) continue;
            expect(taken.id).toBeLessThan(limit);
            expect(held.has(taken.id)).toBe(false);
            held.add(taken.id);
          } else {
            expect(ids.give(step)).toBe(held.delete(step));
          }
          expect(ids.used).toBe(held.size);
        }
      }),
      { numRuns: 30 },
    );
  });
});
