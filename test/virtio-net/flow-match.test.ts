import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type MatcherRule, NO_MATCH, RuleMatcher } from '../../src/device/flow-matcher.ts';
import { FlowFilterAction, hasWholeFields, SelectorFlag } from '../../src/virtio-net/flow-filter-wire.ts';
import { compileMatch, type FlowMatch, type NumberMatch } from '../../src/virtio-net/flow-match.ts';
import { runs } from '../depth.ts';

/** An Ethernet frame with an IP packet of TCP, UDP or ESP, of few different values so that matches happen. */
const frames = fc
  .record({
    v6: fc.boolean(),
    protocol: fc.constantFrom(6, 17, 50),
    mac: fc.constantFrom(0x02, 0x03),
    address: fc.constantFrom(1, 2, 129),
    dscp: fc.constantFrom(0, 46),
    ttl: fc.constantFrom(1, 64),
    word: fc.constantFrom(0x1000_0050, 0x1001_0050, 0x0035_1f90),
    flags: fc.constantFrom(0x02, 0x12, 0x10),
  })
  .map((shape) => ({ ...shape, frame: frameOf(shape) }));

function frameOf(shape: {
  v6: boolean;
  protocol: number;
  mac: number;
  address: number;
  dscp: number;
  ttl: number;
  word: number;
  flags: number;
}): Buffer {
  const { v6, protocol, mac, address, dscp, ttl, word, flags } = shape;
  const frame = Buffer.alloc(100);
  frame.set([mac, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
  frame.writeUInt16BE(v6 ? 0x86dd : 0x0800, 12);
  const transport = v6 ? 54 : 34;
  if (v6) {
    frame.writeUInt32BE((0x60000000 | (dscp << 22)) >>> 0, 14);
    frame.writeUInt16BE(frame.length - 54, 18);
    frame.set([protocol, ttl], 20);
    frame.set([0x20, 0x01], 22);
    frame[22 + 16 + 15] = address;
  } else {
    frame.set([0x45, dscp << 2], 14);
    frame.writeUInt16BE(frame.length - 14, 16);
    frame.set([ttl, protocol], 22);
    frame.set([192, 0, 2, 9, 192, 0, 2, address], 26);
  }
  frame.writeUInt32BE(word, transport);
  if (protocol === 6) frame.set([0x50, flags], transport + 12);
  if (protocol === 17) frame.writeUInt16BE(frame.length - transport, transport + 4);
  return frame;
}

const numbers = (bits: number, values: readonly number[]): fc.Arbitrary<NumberMatch> =>
  fc.oneof(
    fc.constantFrom(...values),
    fc.record({ value: fc.constantFrom(...values), mask: fc.constantFrom(0, 2 ** bits - 1, 2 ** bits - 16, 15) }),
  );

const optional = { requiredKeys: [] as [] };
const ports = fc.record(
  { sourcePort: numbers(16, [0x1000, 0x35]), destinationPort: numbers(16, [0x50, 0x1f90]) },
  optional,
);

const matches: fc.Arbitrary<FlowMatch> = fc
  .record({
    v6: fc.boolean(),
    eth: fc.record(
      {
        destination: fc.constantFrom(Uint8Array.of(2, 0, 0, 0, 0, 1), {
          address: new Uint8Array(6),
          mask: Uint8Array.of(1, 0, 0, 0, 0, 0),
        }),
      },
      optional,
    ),
    ip: fc.record(
      {
        last: fc.constantFrom(1, 2, 129),
        length: fc.constantFrom(0, 1, 7, 8),
        dscp: fc.constantFrom(0, 46),
        ttl: numbers(8, [1, 64]),
      },
      optional,
    ),
    transport: fc.oneof(
      fc.record({ tcp: fc.oneof(ports, fc.record({ flags: numbers(8, [0x02, 0x10]) }, optional)) }),
      fc.record({ udp: ports }),
      fc.record({ esp: fc.record({ spi: numbers(32, [0x1000_0050, 0x0035_1f90]) }, optional) }),
      fc.constant({}),
    ),
  })
  .map(({ v6, eth, ip, transport }) => {
    const { last, length = 8, dscp, ttl } = ip;
    const address = v6 ? new Uint8Array(16) : Uint8Array.of(192, 0, 2, 0);
    if (last !== undefined) address[address.length - 1] = last;
    const destination = last === undefined || v6 ? {} : { destination: { address, length: 24 + length } };
    const header = { ...destination, ...(dscp === undefined ? {} : { dscp }), ...(ttl === undefined ? {} : { ttl }) };
    return { eth, ...(v6 ? { ipv6: header } : { ipv4: header }), ...transport };
  });

const holds = (match: NumberMatch | undefined, value: number): boolean => {
  if (match === undefined) return true;
  if (typeof match === 'number') return match === value;
  return Number(BigInt(match.mask) & BigInt(value)) === Number(BigInt(match.mask) & BigInt(match.value));
};

/** What the words of a match mean, read off the shape of the frame. */
function means(
  match: FlowMatch,
  f: {
    v6: boolean;
    protocol: number;
    mac: number;
    address: number;
    dscp: number;
    ttl: number;
    word: number;
    flags: number;
  },
): boolean {
  const { destination } = match.eth ?? {};
  if (destination instanceof Uint8Array ? f.mac !== destination[0] : destination !== undefined && (f.mac & 1) !== 0)
    return false;
  const ip = match.ipv6 ?? match.ipv4;
  if (ip === undefined || (match.ipv6 !== undefined) !== f.v6) return false;
  if (ip.destination !== undefined) {
    const bits = (ip.destination.length ?? 32) - 24;
    if (f.address >>> (8 - bits) !== ip.destination.address[3] >>> (8 - bits)) return false;
  }
  if (!holds(ip.dscp, f.dscp) || !holds(ip.ttl, f.ttl)) return false;
  if (match.tcp !== undefined && f.protocol !== 6) return false;
  if (match.udp !== undefined && f.protocol !== 17) return false;
  if (match.esp !== undefined && f.protocol !== 50) return false;
  const portsOf = match.tcp ?? match.udp;
  if (!holds(portsOf?.sourcePort, f.word >>> 16) || !holds(portsOf?.destinationPort, f.word & 0xffff)) return false;
  return holds(match.tcp?.flags, f.flags) && holds(match.esp?.spi, f.word);
}

describe('a flow filter match', () => {
  it('matches, when the device applies it, the frames that its words describe', () => {
    fc.assert(
      fc.property(matches, fc.array(frames, { minLength: 1, maxLength: 12 }), (match, shapes) => {
        const { selectors, key } = compileMatch(match);
        const rule = { groupId: 0, classifierId: 0, priority: 0, action: FlowFilterAction.drop, queueIndex: 0, key };
        const entry: MatcherRule = { id: 0, rule, groupPriority: 0, selectors };
        const matcher = new RuleMatcher([entry]);
        for (const shape of shapes) {
          const hit = matcher.match(shape.frame, 0, shape.frame.length) !== NO_MATCH;
          expect(hit).toBe(means(match, shape));
        }
      }),
      { numRuns: runs(200) },
    );
  });

  it('says that a mask is partial exactly when one of its fields is', () => {
    fc.assert(
      fc.property(matches, (match) => {
        for (const selector of compileMatch(match).selectors) {
          expect((selector.flags & SelectorFlag.partialMask) === 0).toBe(hasWholeFields(selector));
        }
      }),
    );
    const flagsOf = (match: FlowMatch) => compileMatch(match).selectors.map(({ flags }) => flags);
    const v4 = Uint8Array.of(192, 0, 2, 1);
    expect(flagsOf({ ipv4: { destination: { address: v4 }, dscp: 46 }, udp: { destinationPort: 4500 } })).toEqual([
      0, 0, 0,
    ]);
    expect(flagsOf({ ipv4: { destination: { address: v4, length: 24 } } })).toEqual([0, 1]);
    // DSCP is six of the eight bits of the traffic class (RFC 2474).
    expect(flagsOf({ ipv6: { dscp: 46 } })).toEqual([0, 1]);
    expect(flagsOf({ ipv4: {}, tcp: { flags: { value: 2, mask: 2 } } })).toEqual([0, 0, 0]);
    expect(flagsOf({ ipv4: {}, esp: { spi: { value: 0x1000, mask: 0xfffff000 } } })).toEqual([0, 0, 1]);
  });

  it.each<[string, FlowMatch]>([
    ['an address of a wrong length', { ipv4: { source: { address: new Uint8Array(16) } } }],
    ['a mask of a wrong length', { ipv4: { source: { address: new Uint8Array(4), mask: new Uint8Array(3) } } }],
    ['a mask and a length', { ipv4: { source: { address: new Uint8Array(4), mask: new Uint8Array(4), length: 8 } } }],
    ['a length beyond the address', { ipv4: { source: { address: new Uint8Array(4), length: 33 } } }],
    ['a port out of range', { ipv4: {}, udp: { sourcePort: 65536 } }],
    ['a mask out of range', { ipv4: {}, udp: { sourcePort: { value: 1, mask: 0x10000 } } }],
    ['a DSCP of more than 6 bits', { ipv4: { dscp: 64 } }],
    ['a fraction', { ipv4: { ttl: 1.5 } }],
    ['a transport without IP', { udp: {} }],
    ['two transports', { ipv4: {}, udp: {}, tcp: {} }],
    ['two IP versions', { ipv4: {}, ipv6: {} }],
    ['another EtherType than that of its IP header', { eth: { etherType: 0x86dd }, ipv4: {} }],
    ['another protocol than that of its transport', { ipv4: { protocol: 17 }, tcp: {} }],
  ])('is refused with %s', (_name, match) => {
    expect(() => compileMatch(match)).toThrow(expect.objectContaining({ code: 'FLOW_MATCH' }));
  });
});
