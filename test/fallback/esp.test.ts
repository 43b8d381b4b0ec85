import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { SecurityAssociationInput } from '../../src/ipsec/validate.ts';
import { runs } from '../depth.ts';
import {
  concat,
  counting,
  espTransforms,
  ethernet,
  hex,
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

function vectors<T>(file: string): T {
  return JSON.parse(readFileSync(new URL(`../vectors/${file}`, import.meta.url), 'utf8'));
}

const families = {
  'IPv4 in IPv4': { tunnel: V4, packet: ipv4 },
  'IPv6 in IPv4': { tunnel: V4, packet: ipv6 },
  'IPv4 in IPv6': { tunnel: V6, packet: ipv4 },
  'IPv6 in IPv6': { tunnel: V6, packet: ipv6 },
} as const;

describe('every ESP transform', () => {
  const cases = [...espTransforms()].flatMap(([id, algorithms]) =>
    [false, true].map((esn) => ({ id, algorithms, esn, bits: esn ? 64 : 32 })),
  );

  it.each(cases)('$id with $bits-bit numbers opens what it closed, in both modes and all families', (one) => {
    const bench = makeBench();
    let handle = 1;
    const sequence = one.esn ? 0x1_0000_0005n : 5n;
    const wrong: string[] = [];
    for (const { tunnel, packet } of Object.values(families)) {
      for (const mode of ['tunnel', 'transport'] as const) {
        const changes = {
          ...one.algorithms,
          mode,
          spi: 0x1000 + handle,
          options: { esn: one.esn },
          initial: { sequence },
          ...(mode === 'tunnel' ? { tunnel } : {}),
        };
        const [outbound, inbound] = makePair(changes, { initial: { sequence: sequence - 1n } });
        bench.ipsec.add(handle, outbound);
        bench.ipsec.add(handle + 1, inbound);
        for (const size of [0, 1, 2, 3, 15, 16, 17, 100, 1400]) {
          const input = ethernet(packet(counting(size)));
          const closed = protectOne(bench, input, handle, 14);
          const opened = unprotectOne(bench, closed.bytes, 14);
          const got = [closed.verdict, opened.verdict, opened.sa, toHex(opened.bytes)].join();
          if (got !== ['ok', 'ok', handle + 1, toHex(input)].join()) wrong.push(`${mode}, ${size} bytes: ${got}`);
          if (toHex(closed.bytes) === toHex(input)) wrong.push(`${mode}, ${size} bytes: not closed`);
        }
        handle += 2;
      }
    }
    // One comparison of all: there are 11000 packets.
    expect(wrong).toEqual([]);
    bench.ipsec.close();
    expect(bench.engine.contexts).toBe(0);
  });

  it.each(cases)('$id with $bits-bit numbers refuses a packet in which any bit was flipped', (one) => {
    const bench = makeBench();
    const changes = { ...one.algorithms, options: { esn: one.esn }, replayWindow: 0 };
    const [outbound, inbound] = makePair(changes);
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { bytes } = protectOne(bench, ipv4(counting(9)), 1);
    expect(unprotectOne(bench, bytes).verdict).toBe('ok');
    // From the sequence number on: a flipped SPI is another SA, a flipped outer header another packet.
    const verdicts = new Set<string>();
    for (let bit = 8 * 24; bit < 8 * bytes.length; bit += 5) {
      const broken = bytes.slice();
      broken[bit >>> 3] ^= 1 << (bit & 7);
      verdicts.add(unprotectOne(bench, broken).verdict);
    }
    expect([...verdicts]).toEqual(['icv']);
    expect(unprotectOne(bench, bytes).verdict).toBe('ok');
  });
});

describe('published packets', () => {
  interface Packet {
    readonly name: string;
    readonly source: string;
    readonly plain: string;
    readonly wire: string;
    readonly sa: SecurityAssociationInput;
    readonly outbound: boolean;
    readonly linkHeader: number;
  }
  const packets = vectors<{ vectors: Packet[] }>('esp-ah-packets.json').vectors;

  it.each(packets)('$source: $name is opened', ({ sa, plain, wire, linkHeader }) => {
    const bench = makeBench();
    const { initial, ...rest } = sa;
    bench.ipsec.add(1, makeSa('inbound', rest));
    const opened = unprotectOne(bench, hex(wire), linkHeader);
    expect(opened.verdict).toBe('ok');
    expect(toHex(opened.bytes)).toBe(plain);
    expect(unprotectOne(bench, hex(wire), linkHeader).verdict).toBe('replay');
  });

  it.each(packets.filter(({ outbound }) => outbound))('$source: $name is made, byte for byte', (one) => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('outbound', one.sa));
    const closed = protectOne(bench, hex(one.plain), 1, one.linkHeader);
    expect(closed.verdict).toBe('ok');
    expect(toHex(closed.bytes)).toBe(one.wire);
  });

  interface GcmCase {
    readonly key: string;
    readonly salt: string;
    readonly iv: string;
    readonly spi: number;
    readonly sequence: string;
    readonly esn: boolean;
    readonly plain: string;
    readonly cipher: string;
    readonly tag: string;
  }
  const gcm = vectors<{ cases: GcmCase[] }>('mcgrew-gcm-esp.json').cases;

  it.each(gcm)('draft-mcgrew-gcm-test-01: SPI $spi, number $sequence, both ways', (one) => {
    const bench = makeBench();
    const plain = hex(one.plain);
    const nextHeader = plain[plain.length - 1];
    const payload = plain.subarray(0, plain.length - 2 - plain[plain.length - 2]);
    const packet = ipv4(payload, { protocol: nextHeader });
    const changes = {
      mode: 'transport',
      spi: one.spi,
      aead: { name: 'aes-gcm', key: one.key, salt: one.salt },
      options: { esn: one.esn },
    } as const;
    bench.ipsec.add(1, makeSa('outbound', { ...changes, initial: { sequence: one.sequence, iv: one.iv } }));
    bench.ipsec.add(2, makeSa('inbound', { ...changes, initial: { sequence: BigInt(one.sequence) - 1n } }));
    const closed = protectOne(bench, packet, 1);
    expect(closed.verdict).toBe('ok');
    expect(toHex(closed.bytes.subarray(28))).toBe(one.iv + one.cipher + one.tag);
    const opened = unprotectOne(bench, closed.bytes);
    expect(opened.verdict).toBe('ok');
    expect(toHex(opened.bytes)).toBe(toHex(packet));
  });

  interface CbcCase {
    readonly name: string;
    readonly mode: 'tunnel' | 'transport';
    readonly key: string;
    readonly spi: number;
    readonly sequence: number;
    readonly iv: string;
    readonly plain: string;
    readonly wire: string;
  }
  const cbc = vectors<{ cases: CbcCase[] }>('rfc3602-esp.json').cases;

  it.each(cbc)('RFC 3602, $name: the cipher text is that of the RFC (which has no ICV)', (one) => {
    const bench = makeBench();
    const changes = {
      mode: one.mode,
      spi: one.spi,
      cipher: { name: 'aes-cbc', key: one.key },
      auth: { name: 'hmac-sha1', key: counting(20) },
      initial: { sequence: one.sequence, iv: one.iv },
      ...(one.mode === 'tunnel' ? { tunnel: V4 } : {}),
    } as const;
    bench.ipsec.add(1, makeSa('outbound', changes));
    const closed = protectOne(bench, hex(one.plain), 1);
    expect(closed.verdict).toBe('ok');
    expect(toHex(closed.bytes.subarray(20, closed.bytes.length - 12))).toBe(one.wire.slice(40));
  });
});

describe('any packet', () => {
  const algorithms = [...espTransforms().values()];

  it('that goes out comes back equal, whatever its size, alignment, transform and mode', () => {
    fc.assert(
      fc.property(
        fc.nat(algorithms.length - 1),
        fc.boolean(),
        fc.boolean(),
        fc.boolean(),
        fc.uint8Array({ maxLength: 600 }),
        fc.constantFrom(0, 14, 18),
        fc.nat(40),
        (index, esn, isTunnel, isV6, payload, linkHeader, tfcPadding) => {
          const bench = makeBench();
          const mode = isTunnel
            ? ({ mode: 'tunnel', tunnel: V4, tfcPadding } as const)
            : ({ mode: 'transport' } as const);
          const [outbound, inbound] = makePair({ ...algorithms[index], ...mode, options: { esn } });
          bench.ipsec.add(1, outbound);
          bench.ipsec.add(2, inbound);
          const packet = isV6 ? ipv6(payload) : ipv4(payload);
          const link = concat(counting(linkHeader === 0 ? 0 : linkHeader - 2), hex(isV6 ? '86dd' : '0800'));
          const input = linkHeader === 0 ? packet : concat(link, packet);
          const closed = protectOne(bench, input, 1, linkHeader);
          expect(closed.verdict).toBe('ok');
          const opened = unprotectOne(bench, closed.bytes, linkHeader);
          expect(opened.verdict).toBe('ok');
          expect(toHex(opened.bytes)).toBe(toHex(input));
        },
      ),
      { numRuns: runs(200) },
    );
  });
});
