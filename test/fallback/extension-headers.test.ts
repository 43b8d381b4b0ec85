import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Chain, insertionPoint, MAX_HEADERS, walkIpv6 } from '../../src/fallback/extension-headers.ts';
import { Verdict } from '../../src/fallback/verdict.ts';
import { runs } from '../depth.ts';
import { concat, counting, hex, ipv4, ipv6, makeBench, makePair, protectOne, toHex, unprotectOne } from './support.ts';

/** An extension header of 8 bytes that leads to `next`. */
const extension = (next: number, type = 0): Uint8Array => Uint8Array.of(next, 0, type, 0, 0, 0, 0, 0);
const [HOP, UDP, ROUTING, FRAGMENT, DESTINATION, ESP] = [0, 17, 43, 44, 60, 50];

/** A chain of extension headers in front of 20 bytes of UDP. */
function chainOf(...protocols: number[]): Uint8Array {
  const parts = protocols.map((_, i) => extension(protocols[i + 1] ?? UDP));
  return ipv6(concat(...parts, counting(20)), { nextHeader: protocols[0] ?? UDP });
}

const out = new Uint32Array(Chain.length);

describe('where ESP and AH go (RFC 4303, 3.1.1)', () => {
  it.each([
    { chain: [], behind: 0, named: UDP },
    { chain: [HOP], behind: 1, named: UDP },
    { chain: [DESTINATION], behind: 1, named: UDP },
    { chain: [HOP, DESTINATION], behind: 2, named: UDP },
    { chain: [HOP, ROUTING], behind: 2, named: UDP },
    { chain: [HOP, DESTINATION, ROUTING], behind: 3, named: UDP },
    { chain: [HOP, DESTINATION, ROUTING, DESTINATION], behind: 3, named: DESTINATION },
    { chain: [ROUTING, DESTINATION], behind: 1, named: DESTINATION },
    { chain: [ROUTING, FRAGMENT], behind: 2, named: UDP },
    { chain: [FRAGMENT, DESTINATION], behind: 2, named: UDP },
  ])('of the chain $chain behind $behind headers', ({ chain, behind, named }) => {
    const packet = chainOf(...chain);
    expect(insertionPoint(packet, 0, packet.length, out)).toBe(Verdict.ok);
    expect(out[Chain.offset]).toBe(40 + 8 * behind);
    expect(out[Chain.protocol]).toBe(named);
    expect(packet[out[Chain.nextHeaderAt]]).toBe(named);
    const bench = makeBench();
    const [outbound, inbound] = makePair({ mode: 'transport' });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { bytes } = protectOne(bench, packet, 1);
    expect(toHex(bytes.subarray(40 + 8 * behind, 44 + 8 * behind))).toBe('00001001');
    expect(toHex(unprotectOne(bench, bytes).bytes)).toBe(toHex(packet));
  });

  it('is nowhere in a fragment', () => {
    const bench = makeBench();
    const [outbound] = makePair({ mode: 'transport' });
    bench.ipsec.add(1, outbound);
    for (const word of ['0001', '0008', 'fff8']) {
      const packet = ipv6(concat(hex(`1100${word}00000001`), counting(20)), { nextHeader: FRAGMENT });
      expect(protectOne(bench, packet, 1).verdict).toBe('fragment');
    }
    expect(protectOne(bench, ipv4(counting(20), { flags: 0x2000 }), 1).verdict).toBe('fragment');
    expect(protectOne(bench, ipv4(counting(20), { flags: 0x0001 }), 1).verdict).toBe('fragment');
    expect(protectOne(bench, ipv4(counting(20), { flags: 0x4000 }), 1).verdict).toBe('ok');
  });

  it('is behind the options of IPv4', () => {
    const packet = ipv4(counting(20), { options: hex('94040000') });
    expect(insertionPoint(packet, 0, packet.length, out)).toBe(Verdict.ok);
    expect(out[Chain.offset]).toBe(24);
  });
});

describe('chains from anybody', () => {
  it('that run off the end are malformed', () => {
    const packet = chainOf(HOP, DESTINATION, ROUTING);
    for (let length = 40; length < 64; length++)
      expect(walkIpv6(packet, 0, length, false, out)).toBe(Verdict.malformed);
    const long = ipv6(concat(Uint8Array.of(UDP, 200, 0, 0), new Uint8Array(60)), { nextHeader: DESTINATION });
    expect(walkIpv6(long, 0, long.length, false, out)).toBe(Verdict.malformed);
  });

  it('with hop-by-hop options anywhere but in front are malformed', () => {
    const packet = chainOf(DESTINATION, HOP);
    expect(walkIpv6(packet, 0, packet.length, false, out)).toBe(Verdict.malformed);
  });

  it('that are longer than anybody needs are malformed', () => {
    const packet = chainOf(...Array.from({ length: MAX_HEADERS }, () => DESTINATION));
    expect(walkIpv6(packet, 0, packet.length, false, out)).toBe(Verdict.malformed);
    const fits = chainOf(...Array.from({ length: MAX_HEADERS - 1 }, () => DESTINATION));
    expect(walkIpv6(fits, 0, fits.length, false, out)).toBe(Verdict.ok);
  });

  it('of random bytes end inside the packet', () => {
    const next = fc.constantFrom(HOP, ROUTING, FRAGMENT, DESTINATION, ESP, UDP);
    fc.assert(
      fc.property(next, fc.uint8Array({ maxLength: 200 }), fc.boolean(), (first, bytes, insert) => {
        const packet = ipv6(bytes, { nextHeader: first });
        const verdict = walkIpv6(packet, 0, packet.length, insert, out);
        if (verdict !== Verdict.ok || out[Chain.fragment] !== 0) return;
        expect(out[Chain.offset]).toBeLessThanOrEqual(packet.length);
        expect(out[Chain.nextHeaderAt]).toBeLessThan(packet.length);
        expect(packet[out[Chain.nextHeaderAt]]).toBe(out[Chain.protocol]);
      }),
      { numRuns: runs(1000) },
    );
  });

  it('in front of ESP are dropped by reason, not thrown over', () => {
    const bench = makeBench();
    const [, inbound] = makePair({ mode: 'transport' });
    bench.ipsec.add(2, inbound);
    const broken = ipv6(concat(Uint8Array.of(ESP, 30, 0, 0, 0, 0, 0, 0), counting(40)), { nextHeader: HOP });
    expect(unprotectOne(bench, broken).verdict).toBe('malformed');
  });
});
