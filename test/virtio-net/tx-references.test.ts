import { describe, expect, it } from 'vitest';
import { TxCounter } from '../../src/virtio-net/tx.ts';
import { content, queues } from './queue-support.ts';

const REFERENCES = 4;

/** Queues, an arena with known content, and a packet with two pieces of it behind its headers. */
function setUp(options: Parameters<typeof queues>[0] = {}) {
  const q = queues({ maxLength: 6000, references: REFERENCES, ...options });
  const arena = q.pool.references.open(q.memory.allocateDma(8192));
  arena.memory.u8.set(content(8192, 7));
  const head = q.make([content(54)])[0];
  const pieces = [q.pool.refer(arena, 100, 1000), q.pool.refer(arena, 5000, 3)];
  q.pool.next[head] = pieces[0];
  q.pool.next[pieces[0]] = pieces[1];
  const collect = () => {
    const out = new Uint32Array(8);
    return [...out.subarray(0, arena.reclaim(out))];
  };
  const send = (...packets: number[]) => q.tx.burst(Uint32Array.from(packets), packets.length);
  return { q, arena, head, pieces, collect, send };
}

describe('a packet with memory of the application behind its headers', () => {
  it.each([
    { name: 'a descriptor for each piece', indirectEntries: 0, taken: 3 },
    { name: 'an indirect table', indirectEntries: 8, taken: 1 },
  ])('reaches the device where it is, by $name', ({ indirectEntries, taken }) => {
    const { q, arena, head, collect, send } = setUp({ indirectEntries });
    const before = q.tx.room;
    expect(send(head)).toBe(1);
    expect(before - q.tx.room).toBe(taken);
    const { u8 } = arena.memory;
    const [{ bytes, pieces }] = q.sent();
    expect([...bytes]).toEqual([...content(54), ...u8.subarray(100, 1100), ...u8.subarray(5000, 5003)]);
    expect(pieces).toEqual([54 + q.layout.length, 1000, 3]);
    expect(q.tx.counters[TxCounter.bytes]).toBe(1057);
    expect(collect()).toEqual([]);
    q.tx.reclaim();
    expect(collect()).toEqual([100, 5000]);
    expect(q.pool.available).toBe(64);
  });

  it('gives its pieces back when it is dropped, and when the queue is closed', () => {
    const { q, head, collect, send } = setUp({ maxLength: 1056 });
    expect(send(head)).toBe(1);
    expect(q.tx.counters[TxCounter.droppedInvalid]).toBe(1);
    expect(collect()).toEqual([100, 5000]);
    const other = setUp();
    other.send(other.head);
    other.q.tx.close();
    expect(other.collect()).toEqual([100, 5000]);
    expect(other.q.pool.available).toBe(64);
  });

  it('cannot be without a packet of the pool in front', () => {
    const { q, arena, send } = setUp();
    const alone = q.pool.refer(arena, 0, 60);
    // Four of them, which is what the usual way looks at together.
    expect(send(alone)).toBe(1);
    expect(q.sent()).toEqual([]);
    expect(q.tx.counters[TxCounter.droppedInvalid]).toBe(1);
  });

  it('goes where the reference leads, whatever is written about it in the pool', () => {
    const { q, arena, head, pieces, send } = setUp();
    q.pool.offset[pieces[0]] = 0;
    q.pool.length[pieces[0]] = 60000;
    send(head);
    expect([...q.sent()[0].bytes.subarray(54, 1054)]).toEqual([...arena.memory.u8.subarray(100, 1100)]);
  });

  it('is refused, and nothing of it sent, when a piece has come back already', () => {
    const { q, head, pieces, collect, send } = setUp();
    q.pool.freeChains(Uint32Array.of(pieces[0]), 1);
    expect(() => send(head)).toThrow(RangeError);
    expect(q.sent()).toEqual([]);
    expect(collect()).toEqual([100, 5000]);
  });
});
