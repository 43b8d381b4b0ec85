import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { PacketFlag } from '../../src/packet/pool.ts';
import { counting, ipv4, makeBench, makePair, makeSa, pass, protectOne, unprotectOne } from './support.ts';

/** An IPv4 packet of 100 bytes. */
const PACKET = ipv4(counting(80));
const packets = (n: number): Uint8Array[] => Array.from({ length: n }, () => PACKET);

describe('a hard limit of packets', () => {
  it.each([1, 2, 31, 32, 33])('of %i lets as many out, and in, and no more', (limit) => {
    const bench = makeBench();
    const [outbound, inbound] = makePair({ lifetime: { hardPackets: limit } });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    bench.ipsec.add(3, makeSa('outbound'));
    const out = pass(bench, packets(40), 1).map(({ verdict }) => verdict);
    expect(out.filter((verdict) => verdict === 'ok').length).toBe(limit);
    expect(out.slice(limit).every((verdict) => verdict === 'expired')).toBe(true);
    const more = pass(bench, packets(40), 3).map(({ bytes }) => bytes);
    const into = pass(bench, more, null).map(({ verdict }) => verdict);
    expect(into.slice(0, limit).every((verdict) => verdict === 'ok')).toBe(true);
    expect(into.slice(limit).every((verdict) => verdict === 'expired')).toBe(true);
    expect(bench.events).toEqual([
      [1, 'hard-packets'],
      [2, 'hard-packets'],
    ]);
    for (const handle of [1, 2]) {
      expect(bench.ipsec.counters(handle)).toMatchObject({
        packets: BigInt(limit),
        bytes: BigInt(100 * limit),
        dropped: { expired: 40 - limit },
      });
    }
    expect(bench.ipsec.counters(1).sequence).toBe(BigInt(limit + 1));
  });
});

describe('a hard limit of bytes', () => {
  it.each([
    { limit: 99, fit: 0 },
    { limit: 100, fit: 1 },
    { limit: 199, fit: 1 },
    { limit: 200, fit: 2 },
    { limit: 250, fit: 2 },
  ])('of $limit lets $fit packets of 100 bytes through; then the SA is dead for smaller ones too', ({ limit, fit }) => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound', { lifetime: { hardBytes: limit } }));
    const verdicts = pass(bench, packets(4), 1).map(({ verdict }) => verdict);
    expect(verdicts.filter((verdict) => verdict === 'ok').length).toBe(fit);
    expect(protectOne(bench, ipv4(counting(0)), 1).verdict).toBe('expired');
    expect(bench.events).toEqual([[1, 'hard-bytes']]);
    expect(bench.ipsec.counters(1).bytes).toBe(BigInt(100 * fit));
  });
});

describe('a soft limit', () => {
  it.each([
    { lifetime: { softPackets: 5 }, event: 'soft-packets' },
    { lifetime: { softBytes: 500 }, event: 'soft-bytes' },
    { lifetime: { softBytes: 401 }, event: 'soft-bytes' },
  ])('$lifetime is told once, with the packet that reaches it, and stops nothing', ({ lifetime, event }) => {
    const bench = makeBench();
    const [outbound, inbound] = makePair({ lifetime });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    for (let i = 1; i <= 8; i++) {
      const { bytes, verdict } = protectOne(bench, PACKET, 1);
      expect(verdict).toBe('ok');
      const opened = unprotectOne(bench, bytes);
      expect(opened.verdict).toBe('ok');
      expect((opened.flags & PacketFlag.softExpiry) !== 0).toBe(i >= 5);
      expect(bench.events).toEqual(
        i < 5
          ? []
          : [
              [1, event],
              [2, event],
            ],
      );
      expect(bench.ipsec.counters(1).softExpired).toBe(i >= 5);
    }
  });

  it('of packets and of bytes are told each, and the hard one after them', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound', { lifetime: { softPackets: 2, softBytes: 350, hardPackets: 5 } }));
    pass(bench, packets(6), 1);
    expect(bench.events).toEqual([
      [1, 'soft-packets'],
      [1, 'soft-bytes'],
      [1, 'hard-packets'],
    ]);
  });
});

describe('limits of any size', () => {
  it('let exactly as much through as they say, whatever comes first', () => {
    const limit = fc.oneof(fc.constant(0), fc.integer({ min: 1, max: 60 }));
    const sizes = fc.array(fc.integer({ min: 0, max: 200 }), { minLength: 1, maxLength: 60 });
    fc.assert(
      fc.property(limit, limit, sizes, (hardPackets, hardKilobytes, payloads) => {
        const bench = makeBench();
        const hardBytes = hardKilobytes * 64;
        // A soft limit beyond the hard one is refused.
        const softPackets = hardPackets === 0 || hardPackets >= 3 ? 3 : 0;
        const softBytes = hardBytes === 0 || hardBytes >= 1000 ? 1000 : 0;
        bench.ipsec.add(1, makeSa('outbound', { lifetime: { hardPackets, hardBytes, softPackets, softBytes } }));
        let sent = 0;
        let bytes = 0;
        let isDead = false;
        for (const payload of payloads) {
          const size = 20 + payload;
          isDead ||= (hardPackets !== 0 && sent >= hardPackets) || (hardBytes !== 0 && bytes + size > hardBytes);
          const { verdict } = protectOne(bench, ipv4(counting(payload)), 1);
          expect(verdict).toBe(isDead ? 'expired' : 'ok');
          if (isDead) continue;
          sent++;
          bytes += size;
        }
        expect(bench.ipsec.counters(1)).toMatchObject({ packets: BigInt(sent), bytes: BigInt(bytes) });
        const count = (event: string): number => bench.events.filter(([, name]) => name === event).length;
        expect(count('soft-packets')).toBe(softPackets !== 0 && sent >= 3 ? 1 : 0);
        expect(count('soft-bytes')).toBe(softBytes !== 0 && bytes >= 1000 ? 1 : 0);
        expect(count('hard-packets') + count('hard-bytes')).toBe(isDead ? 1 : 0);
      }),
      { numRuns: 150 },
    );
  });

  it('beyond 2^32 are no limit for a test', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound', { lifetime: { hardPackets: 1n << 40n, hardBytes: 1n << 50n } }));
    expect(pass(bench, packets(5), 1).every(({ verdict }) => verdict === 'ok')).toBe(true);
    expect(bench.ipsec.counters(1)).toMatchObject({ packets: 5n, bytes: 500n });
  });
});

describe('what does not count', () => {
  it('is a packet that was not sent, or not accepted', () => {
    const bench = makeBench();
    const [outbound, inbound] = makePair({ lifetime: { hardPackets: 2 } });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const broken = PACKET.slice();
    broken[3] = 200;
    expect(protectOne(bench, broken, 1).verdict).toBe('malformed');
    const { bytes } = protectOne(bench, PACKET, 1);
    const forged = bytes.slice();
    forged[40] ^= 1;
    expect(unprotectOne(bench, forged).verdict).toBe('icv');
    expect(unprotectOne(bench, bytes).verdict).toBe('ok');
    expect(unprotectOne(bench, bytes).verdict).toBe('replay');
    expect(unprotectOne(bench, protectOne(bench, PACKET, 1).bytes).verdict).toBe('ok');
    expect(bench.events).toEqual([]);
  });
});
