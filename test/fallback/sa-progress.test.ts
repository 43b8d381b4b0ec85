import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import {
  ahTransforms,
  type Bench,
  counting,
  espTransforms,
  expectSame,
  ipv4,
  makeBench,
  makePair,
  makeSa,
  pass,
  V6,
} from './support.ts';

const code = (name: string) => expect.objectContaining({ code: name });
const PACKET = ipv4(counting(64));
const ESN = { options: { esn: true } } as const;

/** One SA, number 1, that goes from place to place; the last one is where it stays. */
class Wanderer {
  readonly places: readonly Bench[];
  at = 0;
  readonly #sa: SecurityAssociation;

  constructor(sa: SecurityAssociation, places = 3) {
    this.#sa = sa;
    this.places = Array.from({ length: places }, () => makeBench(2048, 64));
    this.here.ipsec.add(1, sa);
  }

  get here(): Bench {
    return this.places[this.at];
  }

  /** As a message carries it. */
  move(to: number): void {
    if (to === this.at) return;
    const progress = structuredClone(this.here.ipsec.take(1));
    this.at = to;
    // What it began with is not looked at.
    this.here.ipsec.add(1, { ...this.#sa, initial: { sequence: 7n } }, progress);
  }

  get events(): string[] {
    return this.places.flatMap(({ events }) => events.map(([, event]) => event)).sort();
  }
}

const TRANSFORMS: [string, Partial<SecurityAssociation>][] = [
  ['aes-128-gcm-16', { ...espTransforms().get('aes-128-gcm-16'), ...ESN }],
  ['chacha20-poly1305-16', { ...espTransforms().get('chacha20-poly1305-16') }],
  ['aes-128-ctr+hmac-sha256-16', { ...espTransforms().get('aes-128-ctr+hmac-sha256-16'), ...ESN }],
  ['AH aes-128-gmac-16', { protocol: 'ah', ...ahTransforms().get('aes-128-gmac-16') }],
].map(([name, changes]) => [String(name), changes as Partial<SecurityAssociation>]);

/** Packets to be sent, and moves between them. */
const steps = fc.array(
  fc.oneof(
    { weight: 3, arbitrary: fc.record({ send: fc.integer({ min: 1, max: 20 }) }) },
    fc.record({ move: fc.integer({ min: 0, max: 2 }) }),
  ),
  { minLength: 1, maxLength: 20 },
);

describe.each(TRANSFORMS)('an SA that goes from place to place while it sends, %s', (_, changes) => {
  it('sends byte for byte what it would have sent where it was', () => {
    fc.assert(
      fc.property(steps, fc.bigInt({ min: 1n, max: 0xffffffffn - 400n }), (all, sequence) => {
        const lifetime = { softPackets: 30n, hardPackets: 150n, softBytes: 0n, hardBytes: 0n };
        const iv = counting(8, 0x70);
        // Over IPv6, whose header has no identification, which counts all packets of a place.
        const sa = makeSa('outbound', { ...changes, tunnel: V6, lifetime, initial: { sequence, iv } });
        const [moved, stays] = [new Wanderer(sa), new Wanderer(sa, 1)];
        for (const step of all) {
          if ('move' in step) {
            moved.move(step.move);
            continue;
          }
          const inputs = Array.from({ length: step.send }, () => PACKET);
          expectSame(pass(moved.here, inputs, 1), pass(stays.here, inputs, 1));
        }
        expect(moved.here.ipsec.counters(1)).toEqual(stays.here.ipsec.counters(1));
        expect(moved.events).toEqual(stays.events);
        for (const { ipsec } of [...moved.places, ...stays.places]) ipsec.close();
      }),
      { numRuns: 30 },
    );
  });
});

describe('an SA that goes from place to place while it receives', () => {
  const cases = fc.record({
    window: fc.constantFrom(0, 32, 64, 1024),
    /** How far ahead the packet that comes next is, or how far behind, and where the SA is then. */
    arrivals: fc.array(fc.tuple(fc.integer({ min: -80, max: 60 }), fc.integer({ min: 0, max: 2 })), { maxLength: 120 }),
    high: fc.boolean(),
  });

  it('takes and refuses what it would have taken and refused where it was: no packet twice', () => {
    fc.assert(
      fc.property(cases, ({ window, arrivals, high }) => {
        const first = high ? 0xffff_ff80n : 1n;
        const [outbound, inbound] = makePair({ ...ESN, initial: { sequence: first } }, { replayWindow: window });
        const sender = makeBench(2048, 64);
        sender.ipsec.add(1, outbound);
        const wire: Uint8Array[] = [];
        const nth = (n: number) => {
          while (wire.length <= n) wire.push(...pass(sender, [PACKET], 1).map(({ bytes }) => bytes));
          return wire[n];
        };
        const start = { ...inbound, initial: { sequence: first - 1n } };
        const [moved, stays] = [new Wanderer(start), new Wanderer(start, 1)];
        const accepted = new Set<number>();
        let at = 0;
        for (const [step, place] of arrivals) {
          moved.move(place);
          at = Math.max(0, at + step);
          const [here] = pass(moved.here, [nth(at)], null);
          expectSame([here], pass(stays.here, [nth(at)], null));
          if (here.verdict !== 'ok') continue;
          if (window !== 0) expect(accepted.has(at)).toBe(false);
          accepted.add(at);
        }
        expect(moved.here.ipsec.counters(1)).toEqual(stays.here.ipsec.counters(1));
        for (const { ipsec } of [sender, ...moved.places, ...stays.places]) ipsec.close();
      }),
      { numRuns: 60 },
    );
  });
});

describe('an SA that has gone on elsewhere', () => {
  it('is not there any more, and its number is free', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.take(1);
    expect(pass(bench, [PACKET], 1)[0].verdict).toBe('no-sa');
    expect(() => bench.ipsec.take(1)).toThrow(code('NO_SUCH_SA'));
    bench.ipsec.add(1, makeSa('outbound', { spi: 0x2000 }));
  });

  it('goes on as itself only: not with another key, window or direction', () => {
    const [outbound, inbound] = makePair({}, { replayWindow: 64 });
    const bench = makeBench();
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const [out, back] = [bench.ipsec.take(1), bench.ipsec.take(2)];
    const other = { aead: { name: 'aes-gcm', key: counting(16, 99), salt: counting(4), icvLength: 16 } } as const;
    for (const [sa, progress] of [
      [makeSa('outbound', other), out],
      [makeSa('inbound', { ...other, replayWindow: 64 }), back],
      [makeSa('inbound', { replayWindow: 32 }), back],
      [makeSa('inbound', { replayWindow: 0 }), back],
      [inbound, out],
      [outbound, back],
    ] as const) {
      expect(() => bench.ipsec.add(3, sa, progress)).toThrow(code('SA_MOVE'));
    }
    // Nothing of them is left, and what was taken is still good.
    bench.ipsec.add(1, outbound, out);
    bench.ipsec.add(2, inbound, back);
    expect(pass(bench, [PACKET], 1)[0].verdict).toBe('ok');
  });

  it('remembers the keys that it has had', () => {
    const key = (n: number) =>
      ({ aead: { name: 'aes-gcm', key: counting(16, n), salt: counting(4), icvLength: 16 } }) as const;
    const [here, there] = [makeBench(), makeBench()];
    here.ipsec.add(1, makeSa('outbound', key(1)));
    here.ipsec.modify(1, makeSa('outbound', key(2)));
    there.ipsec.add(1, makeSa('outbound', key(2)), structuredClone(here.ipsec.take(1)));
    expect(() => there.ipsec.modify(1, makeSa('outbound', key(1)))).toThrow(code('NONCE_REUSE'));
    there.ipsec.modify(1, makeSa('outbound', key(3)));
    here.ipsec.add(1, makeSa('outbound', key(3)), structuredClone(there.ipsec.take(1)));
    for (const n of [1, 2]) {
      expect(() => here.ipsec.modify(1, makeSa('outbound', key(n)))).toThrow(code('NONCE_REUSE'));
    }
  });

  it('does not accept again what came with a key that it comes back to', () => {
    const key = (n: number) =>
      ({ aead: { name: 'aes-gcm', key: counting(16, n), salt: counting(4), icvLength: 16 } }) as const;
    const sender = makeBench();
    sender.ipsec.add(1, makeSa('outbound', key(1)));
    const [old] = pass(sender, [PACKET], 1);
    const [here, there] = [makeBench(), makeBench()];
    const inbound = (n: number) => makeSa('inbound', { ...key(n), replayWindow: 64 });
    here.ipsec.add(1, inbound(1));
    expect(pass(here, [old.bytes], null)[0].verdict).toBe('ok');
    here.ipsec.modify(1, inbound(2));
    there.ipsec.add(1, inbound(2), structuredClone(here.ipsec.take(1)));
    there.ipsec.modify(1, inbound(1));
    expect(pass(there, [old.bytes], null)[0].verdict).toBe('replay');
  });
});
