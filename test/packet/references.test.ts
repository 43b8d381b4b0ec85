import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { NO_PACKET, PacketPool } from '../../src/packet/pool.ts';
import { MAX_ARENAS, type PacketArena } from '../../src/packet/references.ts';
import { TestMemory } from '../virtqueue/support.ts';

const memory = new TestMemory();
const PACKETS = 8;

function poolWith(references: number): PacketPool {
  return new PacketPool(memory.allocateDma(PACKETS * 2048), { references });
}

function open(pool: PacketPool, size = 8192): PacketArena {
  return pool.references.open(memory.allocateDma(size));
}

function collect(arena: PacketArena, room = 16): number[] {
  const out = new Uint32Array(room);
  return [...out.subarray(0, arena.reclaim(out))];
}

/** A packet of the pool with pieces of an arena behind it. */
function chain(pool: PacketPool, arena: PacketArena, pieces: readonly (readonly [number, number])[]): number {
  const head = new Uint32Array(1);
  expect(pool.allocate(head, 1)).toBe(1);
  pool.write(head[0], Uint8Array.of(1, 2));
  let last = head[0];
  for (const [offset, length] of pieces) {
    const p = pool.refer(arena, offset, length);
    expect(p).not.toBe(NO_PACKET);
    pool.next[last] = p;
    last = p;
  }
  return head[0];
}

describe('a reference to memory of the application', () => {
  it('has a number that no slot has, and reads as a part of its chain', () => {
    const pool = poolWith(4);
    const arena = open(pool);
    arena.memory.u8.set([9, 8, 7, 6], 4000);
    const head = chain(pool, arena, [
      [4000, 3],
      [4003, 1],
    ]);
    expect(pool.next[head]).toBeGreaterThanOrEqual(PACKETS);
    expect(pool.chainLength(head)).toBe(6);
    expect([...pool.readChain(head)]).toEqual([1, 2, 9, 8, 7, 6]);
    expect(arena.inFlight).toBe(2);
  });

  it('gives its bytes back when the chain is freed, once each, in that order', () => {
    const pool = poolWith(4);
    const arena = open(pool);
    const first = chain(pool, arena, [
      [100, 3],
      [200, 1],
    ]);
    const second = chain(pool, arena, [[300, 5]]);
    expect(collect(arena)).toEqual([]);
    pool.freeChains(Uint32Array.of(second, first), 2);
    expect(arena.inFlight).toBe(0);
    expect(pool.available).toBe(PACKETS);
    expect(collect(arena, 2)).toEqual([300, 100]);
    expect(collect(arena)).toEqual([200]);
    expect(collect(arena)).toEqual([]);
    expect(pool.references.available).toBe(4);
  });

  it('is refused, counted and not thrown when all are in use or wait to be collected', () => {
    const pool = poolWith(2);
    const arena = open(pool);
    const head = chain(pool, arena, [
      [0, 1],
      [1, 1],
    ]);
    expect(pool.refer(arena, 2, 1)).toBe(NO_PACKET);
    pool.freeChains(Uint32Array.of(head), 1);
    expect(pool.refer(arena, 2, 1)).toBe(NO_PACKET);
    expect(pool.exhausted).toBe(2);
    collect(arena);
    expect(pool.refer(arena, 2, 1)).not.toBe(NO_PACKET);
  });

  it.each<[string, number, number]>([
    ['begin behind the end', 8192, 1],
    ['end behind the end', 8191, 2],
    ['are none', 0, 0],
    ['begin before the start', -1, 2],
    ['begin between two bytes', 0.5, 1],
    ['are too many to say', 0, 2 ** 32 + 1],
    ['are no number', Number.NaN, 1],
  ])('throws RangeError for bytes that %s', (_, offset, length) => {
    const pool = poolWith(2);
    expect(() => pool.refer(open(pool), offset, length)).toThrow(RangeError);
    expect(pool.references.available).toBe(2);
  });

  it('is not made of the arena of another pool, or of one that was closed', () => {
    const pool = poolWith(2);
    const arena = open(pool);
    expect(() => poolWith(2).refer(arena, 0, 1)).toThrow(RangeError);
    pool.references.close(arena);
    expect(() => pool.refer(arena, 0, 1)).toThrow(RangeError);
  });

  it('is neither freed as a slot, nor twice', () => {
    const pool = poolWith(2);
    const arena = open(pool);
    const p = pool.refer(arena, 0, 1);
    expect(() => pool.free(Uint32Array.of(p), 1)).toThrow(RangeError);
    pool.freeChains(Uint32Array.of(p), 1);
    expect(() => pool.freeChains(Uint32Array.of(p), 1)).toThrow(RangeError);
    expect(collect(arena)).toEqual([0]);
  });

  it('keeps its arena open while it is in a packet', () => {
    const pool = poolWith(2);
    const arena = open(pool);
    const head = chain(pool, arena, [[0, 1]]);
    expect(() => pool.references.close(arena)).toThrow(expect.objectContaining({ code: 'ARENA_BUSY' }));
    pool.freeChains(Uint32Array.of(head), 1);
    // What was not collected is forgotten.
    pool.references.close(arena);
    pool.references.close(arena);
    expect(pool.references.available).toBe(2);
  });

  it('comes from one of so many arenas', () => {
    const pool = poolWith(2);
    const arenas = Array.from({ length: MAX_ARENAS }, () => open(pool, 1));
    expect(() => open(pool, 1)).toThrow(expect.objectContaining({ code: 'ARENA_LIMIT' }));
    pool.references.close(arenas[7]);
    expect(open(pool, 1).id).toBe(7);
  });

  it('is never lost, for any order of referring, freeing and collecting', () => {
    fc.assert(
      fc.property(fc.array(fc.nat(2), { maxLength: 80 }), (steps) => {
        const pool = poolWith(5);
        const arena = open(pool);
        const held: number[] = [];
        const out = new Uint32Array(2);
        const expected: number[] = [];
        let made = 0;
        for (const step of steps) {
          if (step === 0) {
            const p = pool.refer(arena, made, 1);
            expect(p === NO_PACKET).toBe(held.length / 2 + expected.length === 5);
            if (p !== NO_PACKET) {
              expect(held).not.toContain(p);
              held.push(p, made++);
            }
          } else if (step === 1 && held.length > 0) {
            const [p, offset] = held.splice(0, 2);
            pool.freeChains(Uint32Array.of(p), 1);
            expected.push(offset);
          } else if (step === 2) {
            const n = arena.reclaim(out);
            expect([...out.subarray(0, n)]).toEqual(expected.splice(0, 2));
          }
          expect(arena.inFlight * 2).toBe(held.length);
          if (held.length / 2 + expected.length > 5) throw new Error('more than there are');
        }
      }),
    );
  });
});

describe('the packets that are kept back for receive rings', () => {
  it('are not allocated by the application, but by rings', () => {
    const pool = poolWith(0);
    const out = new Uint32Array(PACKETS);
    pool.reserve = 3;
    expect(pool.allocate(out, PACKETS)).toBe(5);
    expect(pool.allocate(out, 1)).toBe(0);
    expect(pool.exhausted).toBe(2);
    expect(pool.available).toBe(3);
    expect(pool.allocateForReceive(out, PACKETS)).toBe(3);
    expect(pool.available).toBe(0);
  });

  it('are the first that are filled up again', () => {
    const pool = poolWith(0);
    const out = new Uint32Array(PACKETS);
    pool.reserve = 3;
    pool.allocateForReceive(out, PACKETS);
    pool.free(out, 3);
    expect(pool.allocate(new Uint32Array(1), 1)).toBe(0);
    pool.free(out.subarray(3), 1);
    expect(pool.allocate(new Uint32Array(1), 1)).toBe(1);
  });
});
