import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { inferHigh, NO_WINDOW_SPAN, Resync, statelessHigh } from '../../src/fallback/sequence.ts';
import { runs } from '../depth.ts';
import { type Bench, counting, ipv4, makeBench, makePair, makeSa, pass, protectOne, unprotectOne } from './support.ts';

const U32 = 1n << 32n;
const KEY = new Uint8Array(16).fill(1);
const SALT = new Uint8Array(4).fill(2);

describe('the high half of a sequence number', () => {
  it('is that of the only number from the bottom of the window on that has this low half', () => {
    fc.assert(
      fc.property(
        fc.bigInt(1n << 31n, (1n << 64n) - U32 * 2n),
        fc.constantFrom(1, 32, 64, 1000, 65536, NO_WINDOW_SPAN),
        fc.bigInt(0n, U32 - 1n),
        (top, window, ahead) => {
          const number = top - BigInt(window) + 1n + ahead;
          const high = inferHigh(Number(number % U32), Number(top % U32), Number(top / U32), window);
          expect(BigInt(high >>> 0)).toBe(number / U32);
        },
      ),
      { numRuns: runs(500) },
    );
  });

  it('is 0 for a number that would be before 0', () => {
    expect(inferHigh(0xfffffff0, 10, 0, 64)).toBe(0);
  });

  it.each([
    { esn: 5, overlap: false, low: 0, high: 5 },
    { esn: 5, overlap: false, low: 0x7fffffff, high: 5 },
    { esn: 5, overlap: false, low: 0x80000000, high: 5 },
    { esn: 5, overlap: true, low: 0x80000000, high: 5 },
    { esn: 5, overlap: true, low: 0xffffffff, high: 5 },
    { esn: 5, overlap: true, low: 0x7fffffff, high: 6 },
    { esn: 5, overlap: true, low: 0, high: 6 },
  ])('follows ibv_flow_action_esp: esn $esn, overlap $overlap, low $low gives $high', ({ esn, overlap, low, high }) => {
    expect(statelessHigh(low, esn, overlap)).toBe(high);
  });
});

/** Fields of an SA besides those that say how ESP tunnels. */
type Kind = Parameters<typeof makeSa>[1];

const KINDS: readonly (readonly [string, Kind])[] = [
  ['ESP', {}],
  ['AES-GMAC in ESP', { aead: { name: 'aes-gmac', key: KEY, salt: SALT } }],
  ['AH', { protocol: 'ah', auth: { name: 'hmac-sha256', key: new Uint8Array(32).fill(3) } }],
  [
    'AES-GMAC in AH, transport mode',
    { protocol: 'ah', mode: 'transport', auth: { name: 'aes-gmac', key: KEY, salt: SALT } },
  ],
];

function sendAt(bench: Bench, handle: number, sequence: bigint, kind: Kind = {}): Uint8Array {
  bench.ipsec.add(handle, makeSa('outbound', { options: { esn: true }, initial: { sequence }, ...kind }));
  const { bytes, verdict } = protectOne(bench, ipv4(counting(20)), handle);
  expect(verdict).toBe('ok');
  bench.ipsec.remove(handle);
  return bytes;
}

describe('sequence numbers on the wire', () => {
  it('count up from the initial one and cross 2^32 with extended numbers', () => {
    const bench = makeBench();
    const [outbound, inbound] = makePair(
      { options: { esn: true }, initial: { sequence: 0xfffffffen } },
      { initial: { sequence: 0xfffffffdn } },
    );
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const lows: number[] = [];
    for (let i = 0; i < 5; i++) {
      const { bytes } = protectOne(bench, ipv4(counting(10)), 1);
      lows.push(new DataView(bytes.buffer).getUint32(24));
      expect(unprotectOne(bench, bytes).verdict).toBe('ok');
    }
    expect(lows).toEqual([0xfffffffe, 0xffffffff, 0, 1, 2]);
    expect(bench.ipsec.counters(2).sequence).toBe(0x1_0000_0002n);
  });

  it.each([
    { esn: false, last: 0xffffffffn },
    { esn: true, last: (1n << 64n) - 1n },
  ])('end at their last value, $last, and never wrap', ({ esn, last }) => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound', { options: { esn }, initial: { sequence: last - 1n } }));
    const verdicts = Array.from({ length: 4 }, () => protectOne(bench, ipv4(counting(10)), 1).verdict);
    expect(verdicts).toEqual(['ok', 'ok', 'sequence-overflow', 'sequence-overflow']);
    expect(bench.events).toEqual([
      [1, 'sequence-low'],
      [1, 'sequence-overflow'],
    ]);
    // What comes next is beyond all that were used: who keeps it may tell nonces from it.
    expect(bench.ipsec.counters(1)).toMatchObject({
      packets: 2n,
      sequence: last + 1n,
      dropped: { 'sequence-overflow': 2 },
    });
  });

  it('are told to be running out once an eighth of 2^32 is left', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound', { initial: { sequence: (1n << 32n) - 0x20000002n } }));
    protectOne(bench, ipv4(counting(10)), 1);
    protectOne(bench, ipv4(counting(10)), 1);
    expect(bench.events).toEqual([]);
    protectOne(bench, ipv4(counting(10)), 1);
    protectOne(bench, ipv4(counting(10)), 1);
    expect(bench.events).toEqual([[1, 'sequence-low']]);
  });

  it('are accepted ahead of the window by any distance below 2^32 and not behind it', () => {
    const bench = makeBench();
    const base = 0x5_0000_1000n;
    bench.ipsec.add(9, makeSa('inbound', { options: { esn: true }, initial: { sequence: base } }));
    const at = (sequence: bigint): string => unprotectOne(bench, sendAt(bench, 1, sequence)).verdict;
    expect(at(base + 1n)).toBe('ok');
    expect(at(base + 0xfffff000n)).toBe('ok');
    expect(at(base + 0xfffff000n - 63n)).toBe('ok');
    expect(at(base + 0xfffff000n)).toBe('replay');
    // Behind the window: read as one of the next 2^32, so the ICV is wrong.
    expect(at(base + 0xfffff000n - 64n)).toBe('icv');
    expect(at(base)).toBe('icv');
  });

  it('with no replay window are accepted twice and read as the nearest number', () => {
    const bench = makeBench();
    const base = 0x5_0000_1000n;
    bench.ipsec.add(9, makeSa('inbound', { options: { esn: true }, replayWindow: 0, initial: { sequence: base } }));
    const old = sendAt(bench, 1, base - 0x2000n);
    expect(unprotectOne(bench, old).verdict).toBe('ok');
    expect(unprotectOne(bench, old).verdict).toBe('ok');
    expect(unprotectOne(bench, sendAt(bench, 1, base + 0x70000000n)).verdict).toBe('ok');
  });

  it.each(KINDS)(
    'resynchronise after more than 2^32 lost packets of %s, with bounded work and only by authentic ones',
    (_, kind) => {
      const bench = makeBench();
      bench.ipsec.add(9, makeSa('inbound', { options: { esn: true }, ...kind }));
      expect(unprotectOne(bench, sendAt(bench, 1, 7n, kind)).verdict).toBe('ok');
      const far = 3n * U32 + 100n;
      for (let i = 0; i < Resync.failures; i++) {
        expect(unprotectOne(bench, sendAt(bench, 1, far + BigInt(i), kind)).verdict).toBe('icv');
      }
      expect(bench.ipsec.counters(9).sequence).toBe(7n);
      const garbage = sendAt(bench, 1, far, kind);
      garbage[garbage.length - 1] ^= 1;
      bench.engine.calls.length = 0;
      expect(unprotectOne(bench, garbage).verdict).toBe('icv');
      expect(bench.engine.calls.length).toBe(1 + Resync.candidates);
      expect(bench.ipsec.counters(9).sequence).toBe(7n);
      // The failed attempt starts the count again.
      for (let i = 0; i < Resync.failures; i++) {
        expect(unprotectOne(bench, sendAt(bench, 1, far + BigInt(i), kind)).verdict).toBe('icv');
      }
      expect(unprotectOne(bench, sendAt(bench, 1, far + 1000n, kind)).verdict).toBe('ok');
      expect(unprotectOne(bench, sendAt(bench, 1, far + 1001n, kind)).verdict).toBe('ok');
      expect(unprotectOne(bench, sendAt(bench, 1, far + 1000n, kind)).verdict).toBe('replay');
      expect(bench.ipsec.counters(9).sequence).toBe(far + 1001n);
    },
  );

  it('are refused twice in one burst too', () => {
    const bench = makeBench();
    const [outbound, inbound] = makePair();
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { bytes } = protectOne(bench, ipv4(counting(10)), 1);
    const verdicts = passAll(bench, [bytes, bytes, bytes]);
    expect(verdicts).toEqual(['ok', 'replay', 'replay']);
  });

  it('move the window only after the ICV: a forged number far ahead locks nobody out', () => {
    const bench = makeBench();
    const [outbound, inbound] = makePair();
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { bytes } = protectOne(bench, ipv4(counting(10)), 1);
    const forged = bytes.slice();
    forged[24] = 0xff;
    expect(unprotectOne(bench, forged).verdict).toBe('icv');
    expect(unprotectOne(bench, bytes).verdict).toBe('ok');
    expect(bench.ipsec.counters(2)).toMatchObject({ packets: 1n, sequence: 1n, dropped: { icv: 1 } });
  });
});

function passAll(bench: Bench, inputs: Uint8Array[]): string[] {
  return pass(bench, inputs, null).map(({ verdict }) => verdict);
}
