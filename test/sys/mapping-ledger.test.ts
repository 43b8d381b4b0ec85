import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { dropLedger, keepLedger, MappingLedger } from '../../src/sys/mapping-ledger.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';

const addresses = (ledger: MappingLedger) => ledger.entries.map(({ address }) => address);

describe('a ledger of mappings', () => {
  it('has what the thread has mapped and not unmapped, while it is kept', () => {
    const before = mapAnonymous(4096);
    const ledger = new MappingLedger();
    keepLedger(ledger);
    const [a, b] = [mapAnonymous(4096), mapAnonymous(100_000)];
    expect(new MappingLedger(ledger.buffer).entries).toEqual([
      { address: a.address, size: 4096 },
      { address: b.address, size: b.size },
    ]);
    unmapMemory(a);
    unmapMemory(before);
    expect(addresses(ledger)).toEqual([b.address]);
    dropLedger(ledger);
    expect(addresses(ledger)).toEqual([]);
    const later = mapAnonymous(4096);
    expect(addresses(ledger)).toEqual([]);
    for (const memory of [b, later]) unmapMemory(memory);
  });

  it('hands what is left over to the next one of the same thread, so that each mapping is in one', () => {
    const [first, second] = [new MappingLedger(), new MappingLedger()];
    keepLedger(first);
    keepLedger(second);
    const [a, b] = [mapAnonymous(4096), mapAnonymous(4096)];
    expect([addresses(first).length, addresses(second).length]).toEqual([2, 0]);
    unmapMemory(a);
    dropLedger(first);
    expect([addresses(first), addresses(second)]).toEqual([[], [b.address]]);
    unmapMemory(b);
    expect(addresses(second)).toEqual([]);
    dropLedger(second);
    dropLedger(second);
  });

  it('holds as many as fit and forgets none of those, in any order', () => {
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.boolean(), fc.integer({ min: 1, max: 20 }))), (steps) => {
        const ledger = new MappingLedger();
        const model = new Map<number, number>();
        for (const [add, n] of steps) {
          const address = n * 4096;
          if (add && !model.has(address)) {
            ledger.add(address, n);
            model.set(address, n);
          } else if (!add) {
            ledger.remove(address);
            model.delete(address);
          }
        }
        expect(new Map(ledger.entries.map(({ address, size }) => [address, size]))).toEqual(model);
      }),
    );
    const full = new MappingLedger();
    for (let i = 1; i <= 1000; i++) full.add(i * 4096, 4096);
    expect(full.entries).toHaveLength(512);
  });
});
