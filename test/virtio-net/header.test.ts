import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { WIRE_REVISIONS } from '../../src/virtio/revision.ts';
import {
  decodeNetHeader,
  encodeNetHeader,
  GsoType,
  headerMemory,
  isAcceptable,
  NetHeader,
  NetHeaderFlag,
  type NetHeaderLayout,
  netHeaderLayout,
  standardFlags,
  wireFlags,
  writeTransmitHeader,
} from '../../src/virtio-net/header.ts';
import { TestMemory } from '../virtqueue/support.ts';

const F = Feature;
const layouts: { name: string; layout: NetHeaderLayout; length: number }[] = [
  { name: 'nothing', features: [], length: 12, draft: 12 },
  { name: 'HASH_REPORT', features: [F.HASH_REPORT], length: 20, draft: 20 },
  { name: 'HOST_UDP_TUNNEL_GSO', features: [F.HOST_UDP_TUNNEL_GSO], length: 24, draft: 0 },
  { name: 'GUEST_UDP_TUNNEL_GSO', features: [F.GUEST_UDP_TUNNEL_GSO, F.HASH_REPORT], length: 24, draft: 0 },
  { name: 'OUT_NET_HEADER', features: [F.OUT_NET_HEADER], length: 32, draft: 0 },
  { name: 'IPSEC', features: [F.IPSEC], length: 32, draft: 18 },
  { name: 'IPSEC and HASH_REPORT', features: [F.IPSEC, F.HASH_REPORT], length: 32, draft: 26 },
  {
    name: 'everything',
    features: [F.IPSEC, F.HASH_REPORT, F.OUT_NET_HEADER, F.HOST_UDP_TUNNEL_GSO],
    length: 32,
    draft: 0,
  },
].flatMap(({ name, features, length, draft }) => {
  const set = FeatureSet.of(...features);
  const standard = { name: `virtio-1.4 with ${name}`, layout: netHeaderLayout(set, 'virtio-1.4'), length };
  if (draft === 0) {
    expect(() => netHeaderLayout(set, 'rfc-2025-01')).toThrow(expect.objectContaining({ code: 'HEADER_LAYOUT' }));
    return [standard];
  }
  const layout = netHeaderLayout(set, 'rfc-2025-01');
  return [standard, { name: `rfc-2025-01 with ${name}`, layout, length: draft }];
});

const u16 = fc.nat(0xffff);
const u32 = fc.nat(0xffffffff);
const header = fc
  .record({
    flags: fc.nat(0x7f),
    gsoType: fc.nat(0xff),
    hdrLen: u16,
    gsoSize: u16,
    csumStart: u16,
    csumOffset: u16,
    numBuffers: u16,
    hashValue: u32,
    hashReport: u16,
    outerThOffset: u16,
    innerNhOffset: u16,
    outerNhOffset: u16,
    resourceId: u32,
    resourceType: u16,
  })
  .map((fields) => Object.assign(new NetHeader(), fields));

describe.each(layouts)('the header of $name', ({ layout, length }) => {
  it(`is ${length} bytes long`, () => {
    expect(layout.length).toBe(length);
  });

  it('is read back as it was written, and nothing around it is touched', () => {
    fc.assert(
      fc.property(header, fc.nat(9), (fields, at) => {
        const bytes = new Uint8Array(60).fill(0xcc);
        encodeNetHeader(layout, fields, bytes, at);
        expect(bytes.subarray(0, at).every((byte) => byte === 0xcc)).toBe(true);
        expect(bytes.subarray(at + length).every((byte) => byte === 0xcc)).toBe(true);
        const out = new NetHeader();
        expect(decodeNetHeader(layout, bytes, at, 60, out)).toBe(true);
        const expected = Object.assign(new NetHeader(), fields);
        expected.flags = standardFlags(layout, wireFlags(layout, fields.flags));
        if (layout.hashValue < 0) Object.assign(expected, { hashValue: 0, hashReport: 0 });
        if (layout.outerThOffset < 0) Object.assign(expected, { outerThOffset: 0, innerNhOffset: 0 });
        if (layout.outerNhOffset < 0) expected.outerNhOffset = 0;
        if (layout.resourceId < 0) Object.assign(expected, { resourceId: 0, resourceType: 0 });
        expect(out).toEqual(expected);
      }),
    );
  });

  it('that is cut is refused, and what was decoded before stays', () => {
    const out = Object.assign(new NetHeader(), { flags: 99 });
    for (let end = 0; end < length; end++) {
      expect(decodeNetHeader(layout, new Uint8Array(64), 0, end, out)).toBe(false);
      expect(decodeNetHeader(layout, new Uint8Array(end), 0, length, out)).toBe(false);
    }
    expect(out.flags).toBe(99);
    expect(() => encodeNetHeader(layout, new NetHeader(), new Uint8Array(length - 1), 0)).toThrow(RangeError);
  });

  it('is written by the driver the same at every alignment', () => {
    const memory = new TestMemory().allocateDma(4096);
    fc.assert(
      fc.property(
        fc.nat(15),
        u16,
        u16,
        u32,
        u16,
        fc.boolean(),
        (shift, csumStart, csumOffset, resourceId, type, plain) => {
          const has = layout.resourceId >= 0;
          const flags = plain ? 0 : layout.security | NetHeaderFlag.NEEDS_CSUM;
          memory.u8.fill(0xcc);
          const at = 128 + shift;
          const start = plain ? 0 : csumStart;
          const where = plain ? 0 : csumOffset;
          const id = plain || !has ? 0 : resourceId;
          const kind = plain || !has ? 0 : type;
          writeTransmitHeader(headerMemory(memory), at, layout, flags, start, where, id, kind);
          const expected = new Uint8Array(length);
          const fields = { csumStart: start, csumOffset: where, resourceId: id, resourceType: kind };
          const decoded = Object.assign(new NetHeader(), { ...fields, flags: standardFlags(layout, flags) });
          encodeNetHeader(layout, decoded, expected, 0);
          expect([...memory.u8.subarray(at, at + length)]).toEqual([...expected]);
          expect(memory.u8[at - 1]).toBe(0xcc);
          expect(memory.u8[at + length]).toBe(0xcc);
        },
      ),
    );
  });
});

describe('the bytes of a header', () => {
  it('of virtio-1.4 with everything are where the standard has them', () => {
    const layout = netHeaderLayout(
      FeatureSet.of(F.IPSEC, F.HASH_REPORT, F.OUT_NET_HEADER, F.HOST_UDP_TUNNEL_GSO),
      'virtio-1.4',
    );
    const bytes = new Uint8Array(32);
    const fields = {
      flags: 0x71,
      gsoType: 4,
      hdrLen: 0x0302,
      gsoSize: 0x0504,
      csumStart: 0x0706,
      csumOffset: 0x0908,
      numBuffers: 0x0b0a,
      hashValue: 0x0f0e0d0c,
      hashReport: 0x1110,
      outerThOffset: 0x1514,
      innerNhOffset: 0x1716,
      outerNhOffset: 0x1918,
      resourceId: 0x1d1c1b1a,
      resourceType: 0x1f1e,
    };
    encodeNetHeader(layout, Object.assign(new NetHeader(), fields), bytes, 0);
    const expected = Array.from({ length: 32 }, (_, i) => i);
    expected.splice(0, 2, 0x71, 4);
    expected.splice(18, 2, 0, 0); // padding_reserved
    expect([...bytes]).toEqual(expected);
  });

  it('of the draft have the resource behind the rest, and the security flags lower', () => {
    const flags = NetHeaderFlag.SECURITY | NetHeaderFlag.SECURITY_ERR | NetHeaderFlag.SECURITY_SA_SOFT_EXPIRY_WARN;
    const fields = Object.assign(new NetHeader(), { flags, resourceId: 0x04030201, resourceType: 0x0605 });
    const bytes = new Uint8Array(26);
    encodeNetHeader(netHeaderLayout(FeatureSet.of(F.IPSEC), 'rfc-2025-01'), fields, bytes, 0);
    expect([...bytes.subarray(0, 18)]).toEqual([24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]);
    encodeNetHeader(netHeaderLayout(FeatureSet.of(F.IPSEC, F.HASH_REPORT), 'rfc-2025-01'), fields, bytes, 0);
    expect([...bytes.subarray(20)]).toEqual([1, 2, 3, 4, 5, 6]);
  });

  it.each(WIRE_REVISIONS)('of %s without IPSEC carry no security flags', (revision) => {
    const layout = netHeaderLayout(FeatureSet.of(F.HASH_REPORT), revision);
    expect(wireFlags(layout, 0x70)).toBe(0);
    expect(standardFlags(layout, 0x70) & 0x70).toBe(0);
  });
});

describe('what may be accepted', () => {
  const { NEEDS_CSUM, DATA_VALID, UDP_TUNNEL_CSUM } = NetHeaderFlag;
  const { NONE, TCPV4, UDP_TUNNEL_IPV4, UDP_TUNNEL_IPV6 } = GsoType;
  it.each([
    { flags: 0, gso: NONE, receive: true, transmit: true },
    { flags: NEEDS_CSUM, gso: TCPV4, receive: true, transmit: true },
    { flags: NEEDS_CSUM, gso: TCPV4 | UDP_TUNNEL_IPV4, receive: true, transmit: true },
    { flags: NEEDS_CSUM, gso: TCPV4 | UDP_TUNNEL_IPV4 | UDP_TUNNEL_IPV6, receive: false, transmit: false },
    { flags: 0, gso: TCPV4 | UDP_TUNNEL_IPV4, receive: false, transmit: false },
    { flags: NEEDS_CSUM | DATA_VALID, gso: TCPV4 | UDP_TUNNEL_IPV6, receive: false, transmit: false },
    { flags: NEEDS_CSUM, gso: UDP_TUNNEL_IPV6, receive: false, transmit: false },
    { flags: UDP_TUNNEL_CSUM, gso: NONE, receive: true, transmit: false },
    { flags: UDP_TUNNEL_CSUM | NEEDS_CSUM, gso: NONE, receive: false, transmit: false },
  ])('flags $flags with gso_type $gso: received $receive, sent $transmit', ({ flags, gso, receive, transmit }) => {
    expect(isAcceptable(flags, gso, false)).toBe(receive);
    expect(isAcceptable(flags, gso, true)).toBe(transmit);
  });
});
