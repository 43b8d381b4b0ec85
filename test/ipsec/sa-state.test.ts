import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Verdict } from '../../src/fallback/verdict.ts';
import { SaPlace, SaState, sharedCounts } from '../../src/ipsec/sa-state.ts';
import { outbound } from './support.ts';

const NONE = { softPackets: 0n, hardPackets: 0n, softBytes: 0n, hardBytes: 0n };
const BYTES = 100;

function state(shared = false): { state: SaState; told: string[] } {
  const told: string[] = [];
  const counts = shared ? sharedCounts(4) : undefined;
  return { state: new SaState(4, (_, event, ...args) => told.push([event, ...args].join(' ')), counts), told };
}

/** Counts a packet as the transmit queue does; says whether it may go. */
function pass(of: SaState): number {
  of.count(1, 1, BYTES);
  return of.packetsUntilAlert(1) <= 0 || of.bytesUntilAlert(1) <= 0 ? of.check(1, BYTES) : Verdict.ok;
}

describe('an outbound SA of the device', () => {
  it.each([
    ['packets', { ...NONE, hardPackets: 3n }],
    ['bytes', { ...NONE, hardBytes: 300n }],
  ])('ends with its next packet when the limit of %s is lowered below what it has carried', (limit, lower) => {
    const { state: one, told } = state();
    const sa = outbound({ lifetime: { ...NONE, hardPackets: 100n } });
    one.add(1, sa, SaPlace.inlineOutbound, 1400, null);
    for (let i = 0; i < 5; i++) expect(pass(one)).toBe(Verdict.ok);
    one.replace(1, { ...sa, lifetime: lower }, SaPlace.inlineOutbound, 1400, null, false);
    expect([pass(one), pass(one)]).toEqual([Verdict.expired, Verdict.expired]);
    expect(told).toEqual([`hard-expiry ${limit}`]);
    expect(one.packets[1]).toBe(5);
  });

  it('passes as much, and is told of as often, when it goes from thread to thread', () => {
    const limit = fc.integer({ min: 0, max: 40 }).map(BigInt);
    const lifetimes = fc.record({ softPackets: limit, hardPackets: limit, softBytes: limit, hardBytes: limit });
    const steps = fc.array(fc.integer({ min: 0, max: 2 }), { maxLength: 60 });
    fc.assert(
      fc.property(lifetimes, steps, fc.boolean(), (few, all, last) => {
        const lifetime = { ...few, softBytes: few.softBytes * 90n, hardBytes: few.hardBytes * 110n };
        const sa = outbound({ lifetime, initial: { sequence: last ? 0xffffffffn - 20n : 1n } });
        const places = [state(), state(true), state(true)];
        const still = state();
        for (const { state: one } of [places[0], still]) one.add(1, sa, SaPlace.inlineOutbound, 1400, null);
        let at = 0;
        for (const to of all) {
          if (to !== at) {
            const progress = structuredClone(places[at].state.progress(1));
            places[at].state.remove(1);
            places[to].state.add(1, sa, SaPlace.inlineOutbound, 1400, null, progress);
            at = to;
          }
          const here = places[at].state;
          const verdict = pass(still.state);
          expect(pass(here)).toBe(verdict);
          for (const one of [here, still.state]) if (verdict !== Verdict.ok) one.drop(1, verdict);
          expect([here.packets[1], here.bytes[1], here.softExpired(1)]).toEqual([
            still.state.packets[1],
            still.state.bytes[1],
            still.state.softExpired(1),
          ]);
          expect(here.dropped(1)).toEqual(still.state.dropped(1));
        }
        expect(places.flatMap(({ told }) => told).sort()).toEqual([...still.told].sort());
      }),
    );
  });
});
