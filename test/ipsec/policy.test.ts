import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Verdict, verdictNames } from '../../src/fallback/verdict.ts';
import { OutboundPolicy } from '../../src/ipsec/policy.ts';
import type { Selector } from '../../src/ipsec/sa.ts';
import { formatIp, parsePrefix } from '../../src/packet/addresses.ts';
import { PacketPool } from '../../src/packet/pool.ts';

const SIZE = 64 * 2048;
const buffer = new ArrayBuffer(SIZE);
const memory = {
  address: 0,
  size: SIZE,
  u8: new Uint8Array(buffer),
  u16: new Uint16Array(buffer),
  u32: new Uint32Array(buffer),
};

const hex = (text: string): Uint8Array => new Uint8Array(Buffer.from(text.replaceAll(' ', ''), 'hex'));

/** Result for one packet: the handle, or the name of the verdict. */
function lookUp(selectors: Selector[], packet: Uint8Array, linkHeader = 0): number | string {
  const pool = new PacketPool(memory);
  const packets = new Uint32Array(1);
  pool.allocate(packets, 1);
  pool.write(packets[0], packet);
  // What stands behind the packet must not matter.
  memory.u8.fill(0xff, pool.offset[packets[0]] + packet.length, pool.offset[packets[0]] + packet.length + 64);
  const verdicts = new Uint8Array(1).fill(99);
  new OutboundPolicy(selectors.map((selector, i) => ({ selector, handle: i + 1 }))).classify(
    pool,
    packets,
    1,
    linkHeader,
    verdicts,
  );
  if (verdicts[0] === Verdict.ok) return pool.sa[packets[0]];
  expect(pool.sa[packets[0]]).toBe(0);
  return verdictNames[verdicts[0]];
}

const prefix = (text: string): { address: Uint8Array; length: number } => {
  const parsed = parsePrefix(text);
  if (parsed === null) throw new Error(text);
  return parsed;
};

interface Fields {
  source?: string;
  destination?: string;
  protocol?: number;
  ports?: [number, number];
  fragment?: number;
  payload?: Uint8Array;
}

function ipv4(fields: Fields): Uint8Array {
  const { source = '10.0.0.1', destination = '10.1.0.1', protocol = 17, ports = [1000, 2000], fragment = 0 } = fields;
  const payload = fields.payload ?? Uint8Array.of(ports[0] >> 8, ports[0], ports[1] >> 8, ports[1], 0, 8, 0, 0);
  const total = 20 + payload.length;
  const head = [0x45, 0, total >> 8, total, 0, 1, fragment >> 8, fragment, 64, protocol, 0, 0];
  return Uint8Array.from([...head, ...prefix(source).address, ...prefix(destination).address, ...payload]);
}

function ipv6(fields: Fields & { chain?: Uint8Array; next?: number }): Uint8Array {
  const { source = '2001:db8::1', destination = '2001:db8::2', protocol = 17, ports = [1000, 2000] } = fields;
  const transport = fields.payload ?? Uint8Array.of(ports[0] >> 8, ports[0], ports[1] >> 8, ports[1], 0, 8, 0, 0);
  const payload = [...(fields.chain ?? []), ...transport];
  const head = [0x60, 0, 0, 0, payload.length >> 8, payload.length, fields.next ?? protocol, 64];
  return Uint8Array.from([...head, ...prefix(source).address, ...prefix(destination).address, ...payload]);
}

const udp: Selector = { protocol: 17, sourcePort: 1000, destinationPort: 2000 };

describe('the outbound policy', () => {
  test.each<[string, Selector, Uint8Array, number | string]>([
    ['an empty selector matches IPv4', {}, ipv4({}), 1],
    ['an empty selector matches IPv6', {}, ipv6({}), 1],
    ['a source prefix', { source: prefix('10.0.0.0/8') }, ipv4({}), 1],
    ['another source prefix', { source: prefix('11.0.0.0/8') }, ipv4({}), 'not-ipsec'],
    ['a /0 matches its family', { source: prefix('0.0.0.0/0') }, ipv4({}), 1],
    ['a /0 does not match the other family', { source: prefix('0.0.0.0/0') }, ipv6({}), 'not-ipsec'],
    ['a destination host', { destination: prefix('10.1.0.1/32') }, ipv4({}), 1],
    ['a destination host that differs in one bit', { destination: prefix('10.1.0.0/32') }, ipv4({}), 'not-ipsec'],
    ['an IPv6 prefix', { destination: prefix('2001:db8::/127') }, ipv6({ destination: '2001:db8::1' }), 1],
    ['an IPv6 prefix, one bit off', { destination: prefix('2001:db8::/127') }, ipv6({}), 'not-ipsec'],
    ['a protocol', { protocol: 17 }, ipv4({}), 1],
    ['another protocol', { protocol: 6 }, ipv4({}), 'not-ipsec'],
    ['ports', udp, ipv4({}), 1],
    ['another port', udp, ipv4({ ports: [1000, 2001] }), 'not-ipsec'],
    ['ports without a protocol, TCP', { destinationPort: 2000 }, ipv4({ protocol: 6 }), 1],
    ['ports never match ICMP', { destinationPort: 2000 }, ipv4({ protocol: 1 }), 'not-ipsec'],
    ['a later fragment, by address', { source: prefix('10.0.0.0/8') }, ipv4({ fragment: 100 }), 1],
    ['a later fragment when ports matter', udp, ipv4({ fragment: 100 }), 'fragment'],
    ['a later fragment of another protocol', udp, ipv4({ fragment: 100, protocol: 6 }), 'not-ipsec'],
    ['a first fragment shows its ports', udp, ipv4({ fragment: 0x2000 }), 1],
    ['a first fragment too short for ports', udp, ipv4({ fragment: 0x2000, payload: hex('03e8') }), 'fragment'],
    ['a packet too short for ports', udp, ipv4({ payload: hex('03e8') }), 'malformed'],
    ['ports behind IPv6 extension headers', udp, ipv6({ next: 0, chain: hex('3c00010400000000 1100010400000000') }), 1],
    ['an IPv6 chain that runs off the end', udp, ipv6({ next: 0, chain: hex('11ff010400000000') }), 'malformed'],
    ['a later IPv6 fragment when ports matter', udp, ipv6({ next: 44, chain: hex('1100000800000001') }), 'fragment'],
    ['a first IPv6 fragment', udp, ipv6({ next: 44, chain: hex('1100000100000001') }), 1],
    [
      'an IPv6 fragment whose protocol is hidden',
      { protocol: 17 },
      ipv6({ next: 44, chain: hex('3c00000100000001 1100010400000000') }),
      'fragment',
    ],
    ['an IPv4 length beyond the packet', {}, ipv4({}).subarray(0, 27), 'malformed'],
    ['a header length of 16', {}, Uint8Array.from([0x44, ...ipv4({}).subarray(1)]), 'malformed'],
    ['version 5', {}, Uint8Array.from([0x55, ...ipv4({}).subarray(1)]), 'malformed'],
    ['nothing at all', {}, new Uint8Array(0), 'malformed'],
  ])('%s', (_name, selector, packet, expected) => {
    expect(lookUp([selector], packet)).toBe(expected);
    const frame = Uint8Array.from([
      ...new Uint8Array(12),
      ...(packet[0] >>> 4 === 6 ? [0x86, 0xdd] : [8, 0]),
      ...packet,
    ]);
    expect(lookUp([selector], frame, 14)).toBe(expected);
  });

  test('takes the first entry that matches', () => {
    const any: Selector = {};
    const tcp: Selector = { protocol: 6 };
    expect(lookUp([tcp, udp, any], ipv4({}))).toBe(2);
    expect(lookUp([tcp, udp, any], ipv4({ protocol: 1 }))).toBe(3);
    // An entry before the one that needs ports settles it for a fragment too.
    expect(lookUp([any, udp], ipv4({ fragment: 100 }))).toBe(1);
    expect(lookUp([udp, any], ipv4({ fragment: 100 }))).toBe('fragment');
  });

  test('leaves frames alone that are not IP, and everything when it is empty', () => {
    const arp = Uint8Array.from([...new Uint8Array(12), 8, 6, 0, 1, 8, 0]);
    expect(lookUp([{}], arp, 14)).toBe('not-ipsec');
    expect(lookUp([{}], arp.subarray(0, 9), 14)).toBe('not-ipsec');
    expect(lookUp([], ipv4({}))).toBe('not-ipsec');
    expect(lookUp([], hex('00'))).toBe('not-ipsec');
  });

  test('does not believe an EtherType that the version contradicts', () => {
    const frame = Uint8Array.from([...new Uint8Array(12), 0x86, 0xdd, ...ipv4({})]);
    expect(lookUp([{}], frame, 14)).toBe('malformed');
  });

  test('matches prefixes as comparing text of bits does', () => {
    const bits = (bytes: Uint8Array): string => Array.from(bytes, (b) => b.toString(2).padStart(8, '0')).join('');
    const address = (length: number) => fc.uint8Array({ minLength: length, maxLength: length });
    fc.assert(
      fc.property(fc.constantFrom(4, 16), fc.context(), fc.gen(), (length, _context, gen) => {
        const source = gen(address, length);
        const other = source.slice();
        other[gen(fc.nat, length - 1)] ^= gen(fc.nat, 255);
        const size = gen(fc.nat, length * 8);
        const packet = (length === 4 ? ipv4 : ipv6)({ source: formatIp(source) });
        const expected = bits(source).slice(0, size) === bits(other).slice(0, size) ? 1 : 'not-ipsec';
        expect(lookUp([{ source: { address: other, length: size } }], packet)).toBe(expected);
      }),
    );
  });

  test('gives some verdict to any bytes and never reads behind them', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 80 }), fc.constantFrom(0x40, 0x45, 0x46, 0x60), (bytes, first) => {
        if (bytes.length > 0) bytes[0] = first;
        const result = lookUp([udp, { source: prefix('10.0.0.0/8') }], bytes);
        expect([1, 2, 'not-ipsec', 'fragment', 'malformed']).toContain(result);
        if (bytes.length < 20) expect(result).toBe('malformed');
      }),
    );
  });
});
