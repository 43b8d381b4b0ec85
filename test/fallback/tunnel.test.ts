import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { decrementTtl, setTrafficClass, trafficClass } from '../../src/fallback/tunnel.ts';
import { checksum } from '../../src/packet/checksum.ts';
import {
  counting,
  ethernet,
  ipv4,
  ipv6,
  makeBench,
  makePair,
  makeSa,
  protectOne,
  toHex,
  unprotectOne,
  V4,
  V6,
} from './support.ts';

const CE = 3;

/** Fields of the header of an IP packet. */
function header(packet: Uint8Array) {
  if (packet[0] >>> 4 === 6) {
    return {
      dscp: trafficClass(packet, 0) >>> 2,
      ecn: trafficClass(packet, 0) & 3,
      ttl: packet[7],
      df: false,
      protocol: packet[6],
      flowLabel: ((packet[1] & 15) << 16) | (packet[2] << 8) | packet[3],
      length: 40 + ((packet[4] << 8) | packet[5]),
      addresses: toHex(packet.subarray(8, 40)),
    };
  }
  expect(checksum(packet, 0, 20)).toBe(0);
  return {
    dscp: packet[1] >>> 2,
    ecn: packet[1] & 3,
    ttl: packet[8],
    df: (packet[6] & 0x40) !== 0,
    protocol: packet[9],
    flowLabel: 0,
    length: (packet[2] << 8) | packet[3],
    addresses: toHex(packet.subarray(12, 20)),
  };
}

describe('the outer header', () => {
  const inner4 = ipv4(counting(40), { tos: (10 << 2) | 1, flags: 0x4000, ttl: 7 });
  const inner6 = ipv6(counting(40), { trafficClass: (20 << 2) | 2, hopLimit: 9, flowLabel: 0xfffff });
  const tunnel4 = { ...V4, ttl: 33, dscp: 46 };
  const tunnel6 = { ...V6, hopLimit: 44, dscp: 12, flowLabel: 0xabcde };
  const v4Addresses = 'c0000201c0000202';
  const v6Addresses = '20010db800000000000000000000000120010db8000000000000000000000002';

  const cases = [
    { name: 'IPv4 in IPv4, nothing copied', inner: inner4, tunnel: tunnel4, options: {}, dscp: 46, ecn: 0, df: false },
    {
      name: 'IPv4 in IPv4, DF set',
      inner: inner4,
      tunnel: { ...tunnel4, df: true },
      options: {},
      dscp: 46,
      ecn: 0,
      df: true,
    },
    {
      name: 'IPv4 in IPv4, all copied',
      inner: inner4,
      tunnel: tunnel4,
      options: { copyDscp: true, copyDf: true, ecn: true },
      dscp: 10,
      ecn: 1,
      df: true,
    },
    {
      name: 'IPv4 without DF in IPv4 with DF copied',
      inner: ipv4(counting(40)),
      tunnel: { ...tunnel4, df: true },
      options: { copyDf: true },
      dscp: 46,
      ecn: 0,
      df: false,
    },
    {
      name: 'IPv6 in IPv4, DF of the tunnel although it is to be copied',
      inner: inner6,
      tunnel: { ...tunnel4, df: true },
      options: { copyDf: true, copyDscp: true, ecn: true },
      dscp: 20,
      ecn: 2,
      df: true,
    },
    { name: 'IPv4 in IPv6, nothing copied', inner: inner4, tunnel: tunnel6, options: {}, dscp: 12, ecn: 0, df: false },
    {
      name: 'IPv6 in IPv6, all copied',
      inner: inner6,
      tunnel: tunnel6,
      options: { copyDscp: true, ecn: true, copyDf: true },
      dscp: 20,
      ecn: 2,
      df: false,
    },
  ];

  // An SA with `decrementTtl` takes the way of everything unusual, one without that of the simple case: both must agree.
  for (const decrement of [false, true]) {
    for (const auth of [false, true]) {
      const protocol = auth ? 'ah' : 'esp';
      it.each(cases)(`${protocol}, TTL ${decrement ? 'lowered' : 'kept'}: $name`, (one) => {
        const bench = makeBench();
        const algorithms = auth ? ({ protocol: 'ah', auth: { name: 'hmac-sha1', key: counting(20) } } as const) : {};
        const options = { ...one.options, decrementTtl: decrement };
        const [outbound, inbound] = makePair({ ...algorithms, tunnel: one.tunnel, options }, { options: {} });
        bench.ipsec.add(1, outbound);
        bench.ipsec.add(2, inbound);
        const closed = protectOne(bench, ethernet(one.inner), 1, 14);
        expect(closed.verdict).toBe('ok');
        const frame = closed.bytes;
        const isV6 = 'hopLimit' in one.tunnel;
        expect(toHex(frame.subarray(0, 14))).toBe(`020000000002020000000001${isV6 ? '86dd' : '0800'}`);
        const outer = header(frame.slice(14));
        expect(outer).toEqual({
          dscp: one.dscp,
          ecn: one.ecn,
          df: one.df,
          ttl: isV6 ? 44 : 33,
          protocol: auth ? 51 : 50,
          flowLabel: isV6 ? 0xabcde : 0,
          length: frame.length - 14,
          addresses: isV6 ? v6Addresses : v4Addresses,
        });
        const opened = unprotectOne(bench, frame, 14);
        expect(opened.verdict).toBe('ok');
        const before = header(one.inner);
        expect(header(opened.bytes.slice(14))).toEqual({ ...before, ttl: before.ttl - (decrement ? 1 : 0) });
      });
    }
  }

  it('counts the identification, since a header without DF may be fragmented', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound'));
    bench.ipsec.add(2, makeSa('outbound', { spi: 7, options: { decrementTtl: true } }));
    const ids = [1, 2, 1, 1].map((handle) => toHex(protectOne(bench, ipv4(counting(4)), handle).bytes.subarray(4, 6)));
    expect(new Set(ids).size).toBe(4);
  });
});

describe('TTL', () => {
  it.each([
    { packet: ipv4(counting(4), { ttl: 1 }) },
    { packet: ipv4(counting(4), { ttl: 0 }) },
    { packet: ipv6(counting(4), { hopLimit: 1 }) },
  ])('that would become 0 drops the packet before encapsulation', ({ packet }) => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound', { options: { decrementTtl: true } }));
    expect(protectOne(bench, packet, 1).verdict).toBe('ttl');
    expect(bench.ipsec.counters(1)).toMatchObject({ packets: 0n, sequence: 1n, dropped: { ttl: 1 } });
  });

  it('is lowered after decapsulation too, and the packet dropped when it would become 0', () => {
    const bench = makeBench();
    const [outbound, inbound] = makePair({}, { options: { decrementTtl: true } });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const two = unprotectOne(bench, protectOne(bench, ipv4(counting(4), { ttl: 2 }), 1).bytes);
    expect(two.verdict).toBe('ok');
    expect(header(two.bytes).ttl).toBe(1);
    expect(unprotectOne(bench, protectOne(bench, ipv4(counting(4), { ttl: 1 }), 1).bytes).verdict).toBe('ttl');
  });

  it('lowered keeps the checksum right, whatever it was', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 2, max: 255 }),
        fc.uint8Array({ minLength: 4, maxLength: 4 }),
        fc.nat(65535),
        (ttl, source, id) => {
          const packet = ipv4(new Uint8Array(0), { ttl, source, id });
          expect(decrementTtl(packet, 0)).toBe(0);
          expect(packet[8]).toBe(ttl - 1);
          expect(checksum(packet, 0, 20)).toBe(0);
        },
      ),
    );
  });
});

describe('explicit congestion notification', () => {
  // RFC 6040, figure 4, by inner then outer codepoint: Not-ECT 0, ECT(1) 1, ECT(0) 2, CE 3; null is drop.
  const figure4: (number | null)[][] = [
    [0, 0, 0, null],
    [1, 1, 1, CE],
    [2, 1, 2, CE],
    [CE, CE, CE, CE],
  ];
  const table = figure4.flatMap((row, inner) => row.map((after, outer) => ({ inner, outer, after })));

  for (const [family, packet] of [
    ['IPv4', ipv4],
    ['IPv6', ipv6],
  ] as const) {
    it.each(table)(`${family}: inner $inner, outer $outer gives $after`, ({ inner, outer, after }) => {
      const bench = makeBench();
      const [outbound, inbound] = makePair({}, { options: { ecn: true } });
      bench.ipsec.add(1, outbound);
      bench.ipsec.add(2, inbound);
      const tos = (11 << 2) | inner;
      const { bytes } = protectOne(bench, packet(counting(8), { tos, trafficClass: tos }), 1);
      setTrafficClass(bytes, 0, (bytes[1] & 0xfc) | outer);
      const opened = unprotectOne(bench, bytes);
      expect(opened.verdict).toBe(after === null ? 'ecn' : 'ok');
      if (after !== null) expect(header(opened.bytes)).toMatchObject({ dscp: 11, ecn: after });
    });
  }

  it('is left alone when the SA does not ask for it', () => {
    const bench = makeBench();
    const [outbound, inbound] = makePair();
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { bytes } = protectOne(bench, ipv4(counting(8), { tos: 2 }), 1);
    expect(header(bytes).ecn).toBe(0);
    setTrafficClass(bytes, 0, CE);
    expect(header(unprotectOne(bench, bytes).bytes).ecn).toBe(2);
  });

  it('set in a header keeps the checksum right, whatever it was', () => {
    fc.assert(
      fc.property(fc.nat(255), fc.nat(255), fc.uint8Array({ minLength: 4, maxLength: 4 }), (before, after, source) => {
        const packet = ipv4(new Uint8Array(0), { tos: before, source });
        setTrafficClass(packet, 0, after);
        expect(packet[1]).toBe(after);
        expect(checksum(packet, 0, 20)).toBe(0);
      }),
    );
  });
});
