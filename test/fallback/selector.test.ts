import { describe, expect, it } from 'vitest';
import { isRestrictive, selectorMatches } from '../../src/fallback/selector.ts';
import type { SecurityAssociationInput } from '../../src/ipsec/validate.ts';
import { concat, counting, hex, ipv4, ipv6, makeBench, makePair, makeSa, protectOne, unprotectOne } from './support.ts';

type SelectorInput = NonNullable<SecurityAssociationInput['selector']>;

const ports = concat(hex('03e8 07d0'), counting(20));
const udp4 = ipv4(ports);
const udp6 = ipv6(ports);

function matches(selector: SelectorInput, packet: Uint8Array, end = packet.length): boolean {
  return selectorMatches(makeSa('outbound', { selector }).selector, packet, 0, end);
}

describe('a selector', () => {
  it.each<[SelectorInput, Uint8Array, boolean]>([
    [{}, udp4, true],
    [{}, udp6, true],
    [{ source: '10.0.0.0/8' }, udp4, true],
    [{ source: '10.0.0.0/31' }, udp4, true],
    [{ source: '10.0.0.0/32' }, udp4, false],
    [{ source: '10.0.0.1' }, udp4, true],
    [{ source: '0.0.0.0/0' }, udp4, true],
    [{ source: '0.0.0.0/0' }, udp6, false],
    [{ source: '11.0.0.0/8' }, udp4, false],
    [{ destination: '10.2.0.0/15' }, udp4, false],
    [{ destination: '10.0.0.0/15' }, udp4, true],
    [{ source: '2001:db8:a::/48' }, udp6, true],
    [{ source: '2001:db8:b::/48' }, udp6, false],
    [{ source: '2001:db8:a::/48' }, udp4, false],
    [{ destination: '2001:db8:b::1', protocol: 17 }, udp6, true],
    [{ protocol: 17 }, udp4, true],
    [{ protocol: 6 }, udp4, false],
    [{ protocol: 17, sourcePort: 1000, destinationPort: 2000 }, udp4, true],
    [{ protocol: 17, sourcePort: 1000, destinationPort: 2000 }, udp6, true],
    [{ protocol: 17, sourcePort: 1001 }, udp4, false],
    [{ protocol: 17, destinationPort: 2001 }, udp6, false],
  ])('%j', (selector, packet, expected) => {
    expect(matches(selector, packet)).toBe(expected);
  });

  const withPort: SelectorInput = { protocol: 17, sourcePort: 1000 };

  it('with ports finds them behind options and extension headers', () => {
    expect(matches(withPort, ipv4(ports, { options: hex('94040000') }))).toBe(true);
    expect(matches(withPort, ipv6(concat(hex('1100 0000 0000 0000'), ports), { nextHeader: 60 }))).toBe(true);
  });

  it('with ports does not match what shows none', () => {
    expect(matches(withPort, ipv4(ports, { flags: 0x2000 }))).toBe(true);
    expect(matches(withPort, ipv4(ports, { flags: 0x0001 }))).toBe(false);
    expect(matches(withPort, ipv6(concat(hex('1100 0001 00000001'), ports), { nextHeader: 44 }))).toBe(true);
    expect(matches(withPort, ipv6(concat(hex('1100 0008 00000001'), ports), { nextHeader: 44 }))).toBe(false);
    expect(matches(withPort, udp4, 23)).toBe(false);
    expect(matches({ protocol: 17 }, ipv4(ports, { flags: 0x0001 }))).toBe(true);
  });

  it('does not take the IP header for ports when that says that it is shorter than it can be', () => {
    const short = Uint8Array.from(udp4);
    short[0] = 0x40;
    const [sourcePort, destinationPort] = [(short[0] << 8) | short[1], (short[2] << 8) | short[3]];
    expect(matches({ protocol: 17, sourcePort, destinationPort }, short)).toBe(false);
  });

  it('does not match what is no IP packet', () => {
    expect(matches({}, udp4, 19)).toBe(false);
    expect(matches({}, udp6, 39)).toBe(false);
    expect(
      matches(
        {},
        Uint8Array.from(udp4, (byte, i) => (i === 0 ? 0x55 : byte)),
      ),
    ).toBe(false);
  });

  it('restricts when it says anything', () => {
    expect(isRestrictive({})).toBe(false);
    expect(isRestrictive({ protocol: 0 })).toBe(true);
  });
});

describe('the selector of an inbound SA (RFC 4301, 5.2)', () => {
  for (const mode of ['tunnel', 'transport'] as const) {
    it(`in ${mode} mode lets only packets through that it allows`, () => {
      const bench = makeBench();
      const selector = { source: '10.0.0.0/24', protocol: 17, destinationPort: 2000 };
      const [outbound, inbound] = makePair({ mode }, { selector });
      bench.ipsec.add(1, outbound);
      bench.ipsec.add(2, inbound);
      expect(unprotectOne(bench, protectOne(bench, udp4, 1).bytes).verdict).toBe('ok');
      const others = [
        ipv4(ports, { source: hex('0a000101') }),
        ipv4(ports, { protocol: 6 }),
        ipv4(concat(hex('03e8 07d1'), counting(20))),
        ipv4(ports, { flags: 0x0001 }),
      ];
      for (const other of mode === 'tunnel' ? others : others.slice(0, 3)) {
        expect(unprotectOne(bench, protectOne(bench, other, 1).bytes).verdict).toBe('selector');
      }
      expect(bench.ipsec.counters(2).dropped).toEqual({ selector: mode === 'tunnel' ? 4 : 3 });
    });
  }
});
