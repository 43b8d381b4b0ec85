import { describe, expect, it } from 'vitest';
import { setIpv4Checksum } from '../../src/packet/checksum.ts';
import {
  ahTransforms,
  type Bench,
  concat,
  counting,
  ethernet,
  hex,
  ipv4,
  ipv6,
  makeBench,
  makePair,
  protectOne,
  toHex,
  unprotectOne,
  V4,
  V6,
} from './support.ts';

const HMAC = { protocol: 'ah', auth: { name: 'hmac-sha256', key: counting(32) } } as const;

function transport(changes: object = {}): Bench {
  const bench = makeBench();
  const [outbound, inbound] = makePair({ ...HMAC, mode: 'transport', replayWindow: 0, ...changes });
  bench.ipsec.add(1, outbound);
  bench.ipsec.add(2, inbound);
  return bench;
}

describe('every AH transform', () => {
  const cases = [...ahTransforms()].flatMap(([id, algorithms]) =>
    [false, true].map((esn) => ({ id, algorithms, esn, bits: esn ? 64 : 32 })),
  );

  it.each(cases)('$id with $bits-bit numbers verifies what it authenticated, in both modes and all families', (one) => {
    const bench = makeBench();
    let handle = 1;
    for (const tunnel of [V4, V6]) {
      for (const packet of [ipv4, ipv6]) {
        for (const mode of ['tunnel', 'transport'] as const) {
          const sequence = one.esn ? 0x7_ffff_fffen : 9n;
          const initial = { sequence };
          const options = { esn: one.esn };
          const where = mode === 'tunnel' ? { tunnel } : {};
          const changes = {
            ...one.algorithms,
            protocol: 'ah',
            mode,
            spi: 0x900 + handle,
            options,
            initial,
            ...where,
          } as const;
          const [outbound, inbound] = makePair(changes, { initial: { sequence: sequence - 1n } });
          bench.ipsec.add(handle, outbound);
          bench.ipsec.add(handle + 1, inbound);
          for (const size of [0, 1, 2, 3, 15, 16, 100, 1400]) {
            const input = ethernet(packet(counting(size)));
            const closed = protectOne(bench, input, handle, 14);
            expect(closed.verdict).toBe('ok');
            const opened = unprotectOne(bench, closed.bytes, 14);
            expect(opened.verdict).toBe('ok');
            expect(opened.sa).toBe(handle + 1);
            expect(toHex(opened.bytes)).toBe(toHex(input));
          }
          handle += 2;
        }
      }
    }
  });

  it.each(cases)('$id with $bits-bit numbers refuses any flipped bit but those that change on the way', (one) => {
    for (const [packet, isMutable] of [
      [
        ipv4(counting(30), { tos: 4, ttl: 9 }),
        (at: number) => at === 1 || at === 6 || at === 7 || at === 8 || at === 10 || at === 11,
      ],
      [ipv6(counting(30)), (at: number) => at < 4 || at === 7],
    ] as const) {
      const bench = transport({ ...one.algorithms, options: { esn: one.esn } });
      const { bytes } = protectOne(bench, packet, 1);
      const isV4 = bytes[0] === 0x45;
      const spi = isV4 ? 24 : 44;
      for (let at = 0; at < bytes.length; at++) {
        // Version and lengths, protocol, SPI and the length of AH say where things are: flipping them breaks more than the ICV.
        const skipped = isV4 ? [0, 2, 3, 9, spi - 3] : [0, 4, 5, 6, spi - 3];
        if (skipped.includes(at) || (at >= spi && at < spi + 4)) continue;
        const broken = bytes.slice();
        // A bit that leaves the fragment offset and "more fragments" alone.
        broken[at] ^= isV4 && at === 6 ? 0x40 : isV4 && at === 7 ? 0 : 1 << (at % 7);
        if (isV4) setIpv4Checksum(broken, 0, 20);
        const { verdict } = unprotectOne(bench, broken);
        expect(`${at}: ${verdict}`).toBe(`${at}: ${isMutable(at) ? 'ok' : 'icv'}`);
      }
    }
  });
});

describe('the AH header', () => {
  it('is a multiple of 4 bytes over IPv4 and of 8 over IPv6', () => {
    const bench = transport();
    const v4 = protectOne(bench, ipv4(counting(4)), 1).bytes;
    expect(v4[21]).toBe((12 + 16) / 4 - 2);
    expect(v4.length).toBe(24 + 28);
    const v6 = protectOne(bench, ipv6(counting(4)), 1).bytes;
    expect(v6[41]).toBe((12 + 16 + 4) / 4 - 2);
    expect(v6.length).toBe(44 + 32);
    expect(toHex(v6.subarray(40 + 28, 40 + 32))).toBe('00000000');
  });

  it.each([0, 3, 4, 7, 8, 63])('with a length field of %i that does not fit is malformed', (length) => {
    const bench = transport();
    const { bytes } = protectOne(bench, ipv4(counting(40)), 1);
    bytes[21] = length;
    expect(unprotectOne(bench, bytes).verdict).toBe('malformed');
  });
});

describe('what changes on the way', () => {
  /** Bytes of an option as its type, length and data. */
  const option = (type: number, data: string): Uint8Array =>
    concat(Uint8Array.of(type, 2 + data.length / 2), hex(data));
  const routerAlert = option(148, '0000');
  const recordRoute = concat(option(7, '04000000 00'.replace(' ', '')), hex('00'));

  it('in IPv4 options: mutable ones may change, immutable ones may not', () => {
    const bench = transport();
    const input = ipv4(counting(20), { options: concat(routerAlert, recordRoute) });
    const { bytes, verdict } = protectOne(bench, input, 1);
    expect(verdict).toBe('ok');
    expect(toHex(bytes.subarray(20, 32))).toBe(toHex(input.subarray(20, 32)));
    const routed = bytes.slice();
    routed[26] = 8;
    routed[29] = 77;
    setIpv4Checksum(routed, 0, 32);
    expect(unprotectOne(bench, routed).verdict).toBe('ok');
    const altered = bytes.slice();
    altered[23] = 1;
    setIpv4Checksum(altered, 0, 32);
    expect(unprotectOne(bench, altered).verdict).toBe('icv');
  });

  it('in IPv4 source routes: the destination is authenticated as it will be at the end', () => {
    const bench = transport();
    const first = hex('0a000001');
    const last = hex('0a000009');
    const route = concat(option(131, `04${toHex(last)}`), hex('00'));
    const { bytes } = protectOne(bench, ipv4(counting(20), { destination: first, options: route }), 1);
    expect(toHex(bytes.subarray(16, 20))).toBe(toHex(first));
    // The router at `first` swaps itself against the next address and moves the pointer.
    const arrived = bytes.slice();
    arrived.set(last, 16);
    arrived[22] = 8;
    arrived.set(first, 23);
    setIpv4Checksum(arrived, 0, 28);
    expect(unprotectOne(bench, arrived).verdict).toBe('ok');
    arrived.set(first, 16);
    setIpv4Checksum(arrived, 0, 28);
    expect(unprotectOne(bench, arrived).verdict).toBe('icv');
  });

  it.each([
    ['an option of length 0', hex('94000000')],
    ['an option of length 1', hex('94010000')],
    ['an option that runs over the header', hex('94050000')],
    ['an option without a length', hex('01010194')],
    ['a source route of two bytes', hex('83020000')],
  ])('%s is malformed both ways', (_, options) => {
    const bench = transport();
    expect(protectOne(bench, ipv4(counting(20), { options }), 1).verdict).toBe('malformed');
    const ah = concat(hex('11050000 00001001 00000001'), new Uint8Array(16), counting(20));
    expect(unprotectOne(bench, ipv4(ah, { protocol: 51, options })).verdict).toBe('malformed');
  });

  it('in IPv6 options: those that say so may change, others may not', () => {
    const bench = transport();
    // Hop-by-hop: an option that may change (0x3e, 4 bytes of data), PadN; its bit 0x20 says so.
    const hopByHop = concat(hex('3c 00 3e04 00000000'), hex('11 00 1e04 01020304'), counting(20));
    const { bytes, verdict } = protectOne(bench, ipv6(hopByHop, { nextHeader: 0 }), 1);
    expect(verdict).toBe('ok');
    expect(bytes[48]).toBe(51);
    const changed = bytes.slice();
    changed[45] = 9;
    expect(unprotectOne(bench, changed).verdict).toBe('ok');
    const altered = bytes.slice();
    altered[53] = 9;
    expect(unprotectOne(bench, altered).verdict).toBe('icv');
  });

  it.each([0, 2])('in IPv6 routing headers of type %i: all is authenticated as it will be at the end', (type) => {
    const bench = transport();
    const hops = type === 0 ? [counting(16, 1), counting(16, 2)] : [counting(16, 1)];
    const left = hops.length;
    const final = hops[left - 1];
    const start = counting(16, 3);
    const routing = concat(Uint8Array.of(17, 2 * left, type, left, 0, 0, 0, 0), ...hops);
    const input = ipv6(concat(routing, counting(20)), { nextHeader: 43, destination: start });
    const { bytes, verdict } = protectOne(bench, input, 1);
    expect(verdict).toBe('ok');
    expect(toHex(bytes.subarray(24, 40))).toBe(toHex(start));
    expect(bytes[43]).toBe(left);
    const arrived = bytes.slice();
    arrived.set(final, 24);
    arrived[43] = 0;
    arrived.set(concat(start, ...hops.slice(0, -1)), 48);
    const opened = unprotectOne(bench, arrived);
    expect(opened.verdict).toBe('ok');
    arrived.set(start, 24);
    expect(unprotectOne(bench, arrived).verdict).toBe('icv');
  });

  it('in routing headers of other types with a way to go cannot be foreseen: refused', () => {
    const bench = transport();
    const routing = (left: number): Uint8Array => concat(Uint8Array.of(17, 2, 4, left, 0, 0, 0, 0), counting(16));
    expect(protectOne(bench, ipv6(concat(routing(1), counting(20)), { nextHeader: 43 }), 1).verdict).toBe('malformed');
    const done = protectOne(bench, ipv6(concat(routing(0), counting(20)), { nextHeader: 43 }), 1);
    expect(done.verdict).toBe('ok');
    expect(unprotectOne(bench, done.bytes).verdict).toBe('ok');
  });
});

it('AH restores every byte in front of it that it zeroed for the computation', () => {
  const bench = transport();
  const input = ipv4(counting(20), { tos: 0xb9, flags: 0x4000, ttl: 17, options: hex('07070400 00000000') });
  const { bytes } = protectOne(bench, input, 1);
  const opened = unprotectOne(bench, bytes);
  expect(toHex(opened.bytes)).toBe(toHex(input));
  expect([bytes[1], bytes[6], bytes[8]]).toEqual([0xb9, 0x40, 17]);
});

it('AH refuses headers in front of it that are longer than the copy it keeps', () => {
  const bench = transport();
  const long = concat(Uint8Array.of(17, 63, 0, 0), new Uint8Array(508), counting(20));
  expect(protectOne(bench, ipv6(long, { nextHeader: 0 }), 1).verdict).toBe('malformed');
});
