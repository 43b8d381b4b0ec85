import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { GsoSet } from '../../src/packet/gso.ts';
import { MAX_SEGMENTS, Segmenter } from '../../src/packet/segment.ts';
import { isAmong, NetHeader, NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { inTunnel, type Large, type LargeOptions, large, sum } from '../device/helpers/large.ts';

const ALL = (1 << 1) | (1 << 4) | (1 << 5) | GsoSet.tunnel | GsoSet.ecn | GsoSet.outerChecksum;
const AT = 64;
const TO = 0x12000;

/** The segments of a packet; empty when it is refused. */
function cut(one: Large, types = ALL, change: (bytes: Uint8Array) => void = () => {}): Uint8Array[] {
  const memory = new Uint8Array(0x20000);
  memory.set(one.frame, AT);
  change(memory.subarray(AT));
  const segmenter = new Segmenter({ u8: memory, u16: new Uint16Array(memory.buffer) });
  const header = Object.assign(new NetHeader(), one.header);
  const isAsked = (header.flags & NetHeaderFlag.NEEDS_CSUM) !== 0 && isAmong(header.gsoType, types);
  const count = isAsked ? segmenter.plan(header, AT, one.frame.length) : 0;
  return Array.from({ length: count }, (_, k) => {
    const length = segmenter.cut(k, TO);
    return memory.slice(TO, TO + length);
  });
}

const word = (bytes: Uint8Array, at: number) => bytes[at] * 256 + bytes[at + 1];

/** What a receiver checks of a segment, and its payload. */
function inspect(bytes: Uint8Array, options: LargeOptions) {
  const ip = 14 + 4 * (options.tags ?? 0);
  const own = bytes.subarray(ip);
  const extension = options.extension ?? 0;
  const at = options.version === 4 ? 20 : 40 + extension;
  if (options.version === 4) {
    expect(word(own, 2)).toBe(own.length);
    expect(sum(own.subarray(0, 20))).toBe(0xffff);
  } else {
    expect(word(own, 4)).toBe(own.length - 40);
  }
  const transport = own.subarray(at);
  const addresses = options.version === 4 ? own.subarray(12, 20) : own.subarray(8, 40);
  const number = options.protocol === 'tcp' ? 6 : 17;
  expect(sum(transport, sum([...addresses, 0, number], transport.length))).toBe(0xffff);
  if (options.protocol === 'udp') expect(word(transport, 4)).toBe(transport.length);
  const headers = options.protocol === 'tcp' ? (transport[12] >>> 4) * 4 : 8;
  return {
    id: word(own, 4),
    sequence: word(transport, 4) * 0x10000 + word(transport, 6),
    flags: transport[13],
    payload: transport.slice(headers),
    headers: ip + at + headers,
  };
}

describe('a large packet', () => {
  it('becomes segments that any receiver accepts and that hold its payload', () => {
    const options = fc.record({
      version: fc.constantFrom<4 | 6>(4, 6),
      protocol: fc.constantFrom<'tcp' | 'udp'>('tcp', 'udp'),
      payload: fc.integer({ min: 1, max: 12000 }),
      size: fc.integer({ min: 100, max: 9000 }),
      options: fc.integer({ min: 0, max: 10 }).map((n) => 4 * n),
      tags: fc.integer({ min: 0, max: 2 }),
      id: fc.integer({ min: 0, max: 0xffff }),
      sequence: fc.integer({ min: 0, max: 0xffffffff }),
      flags: fc.integer({ min: 0, max: 0xff }),
      extension: fc.constantFrom(0, 8, 24),
    });
    fc.assert(
      fc.property(options, (drawn) => {
        const one = { ...drawn, extension: drawn.version === 6 ? drawn.extension : 0 };
        const packet = large(one);
        const segments = cut(packet);
        expect(segments).toHaveLength(Math.ceil(one.payload / one.size));
        const seen = segments.map((segment) => inspect(segment, one));
        expect(Buffer.compare(Buffer.concat(seen.map(({ payload }) => payload)), packet.payload)).toBe(0);
        for (const [k, { id, sequence, flags, payload }] of seen.entries()) {
          const last = k === seen.length - 1;
          if (!last) expect(payload.length).toBe(one.size);
          if (one.version === 4) expect(id).toBe((one.id + k) & 0xffff);
          if (one.protocol === 'udp') continue;
          expect(sequence).toBe((one.sequence + k * one.size) % 2 ** 32);
          const cleared = (last ? 0 : 0x09) | (k > 0 ? 0x80 : 0);
          expect(flags).toBe(one.flags & ~cleared);
        }
      }),
      { numRuns: 100 },
    );
  });

  it('in a UDP tunnel becomes whole packets in the same tunnel', () => {
    const options = fc.record({
      version: fc.constantFrom<4 | 6>(4, 6),
      outer: fc.constantFrom<4 | 6>(4, 6),
      checksum: fc.boolean(),
      protocol: fc.constantFrom<'tcp' | 'udp'>('tcp', 'udp'),
      payload: fc.integer({ min: 1, max: 9000 }),
      size: fc.integer({ min: 100, max: 9000 }),
    });
    fc.assert(
      fc.property(options, ({ outer, checksum, ...one }) => {
        const packet = inTunnel(large(one), { outer, checksum });
        const segments = cut(packet);
        expect(segments).toHaveLength(Math.ceil(one.payload / one.size));
        const ipLength = outer === 4 ? 20 : 40;
        const inner = 14 + ipLength + 16;
        const payloads: Uint8Array[] = [];
        for (const [k, segment] of segments.entries()) {
          const ip = segment.subarray(14);
          if (outer === 4) {
            expect(word(ip, 2)).toBe(ip.length);
            expect(word(ip, 4)).toBe((0xfffe + k) & 0xffff);
            expect(sum(ip.subarray(0, 20))).toBe(0xffff);
          } else {
            expect(word(ip, 4)).toBe(ip.length - 40);
          }
          const udp = ip.subarray(ipLength);
          expect(word(udp, 4)).toBe(udp.length);
          const addresses = outer === 4 ? ip.subarray(12, 20) : ip.subarray(8, 40);
          if (checksum) expect(sum(udp, sum([...addresses, 0, 17], udp.length))).toBe(0xffff);
          else expect(word(udp, 6)).toBe(0);
          expect(udp.subarray(8, 16)).toEqual(packet.frame.subarray(inner - 8, inner));
          payloads.push(inspect(segment.subarray(inner), one).payload);
        }
        expect(Buffer.compare(Buffer.concat(payloads), packet.payload)).toBe(0);
      }),
      { numRuns: 100 },
    );
  });

  it('may have its payload elsewhere: its headers are all that is looked at', () => {
    const one: LargeOptions = { version: 6, protocol: 'tcp', payload: 5000, size: 1300, extension: 8 };
    const packet = large(one);
    const whole = cut(packet);
    const memory = new Uint8Array(0x20000);
    const segmenter = new Segmenter({ u8: memory, u16: new Uint16Array(memory.buffer) });
    const headers = packet.header.hdrLen ?? 0;
    memory.set(packet.frame.subarray(0, headers), AT);
    const header = Object.assign(new NetHeader(), packet.header);
    expect(segmenter.plan(header, AT, packet.frame.length, headers - 1)).toBe(0);
    expect(segmenter.plan(header, AT, packet.frame.length, headers)).toBe(whole.length);
    for (const [k, segment] of whole.entries()) {
      memory.set(packet.payload.subarray(k * 1300, k * 1300 + segmenter.payload(k)), TO + headers);
      expect(memory.slice(TO, TO + segmenter.seal(k, TO))).toEqual(segment);
    }
  });

  it('keeps what stands in front of and inside its headers otherwise', () => {
    const one: LargeOptions = { version: 4, protocol: 'tcp', payload: 3000, size: 1448, options: 12, tags: 1 };
    const packet = large(one);
    for (const segment of cut(packet)) {
      const expected = packet.frame.slice(0, 18 + 20 + 32);
      for (const at of [
        18 + 2,
        18 + 3,
        18 + 4,
        18 + 5,
        18 + 10,
        18 + 11,
        38 + 4,
        38 + 5,
        38 + 6,
        38 + 7,
        38 + 13,
        38 + 16,
        38 + 17,
      ]) {
        expected[at] = segment[at];
      }
      expect(segment.slice(0, expected.length)).toEqual(expected);
    }
  });

  it('of 64 KiB is cut', () => {
    const one: LargeOptions = { version: 4, protocol: 'tcp', payload: 65535 - 40, size: 1460 };
    expect(cut(large(one))).toHaveLength(45);
  });
});

describe('a packet that cannot or may not be segmented', () => {
  const tcp4: LargeOptions = { version: 4, protocol: 'tcp', payload: 3000, size: 1000 };
  const tcp6: LargeOptions = { version: 6, protocol: 'tcp', payload: 3000, size: 1000, extension: 8 };
  const change = (one: LargeOptions, header: Partial<NetHeader>) => {
    const packet = large(one);
    return { ...packet, header: { ...packet.header, ...header } };
  };
  const shortened = (one: LargeOptions, length: number) => {
    const packet = large(one);
    return { ...packet, frame: packet.frame.slice(0, length) };
  };

  it.each<{ name: string; packet: Large; types?: number; spoil?: (bytes: Uint8Array) => void }>([
    { name: 'a type that was not negotiated', packet: large(tcp4), types: 1 << 4 },
    { name: 'ECN that was not negotiated', packet: large({ ...tcp4, ecn: true }), types: 1 << 1 },
    { name: 'no checksum to fill', packet: change(tcp4, { flags: 0 }) },
    { name: 'a size of 0', packet: change(tcp4, { gsoSize: 0 }) },
    { name: 'the wrong version', packet: change(tcp4, { gsoType: 4 }) },
    { name: 'the wrong version in its IP header', packet: large(tcp4), spoil: (b) => b.fill(0x65, 14, 15) },
    { name: 'the wrong protocol', packet: change(tcp4, { gsoType: 5 }) },
    { name: 'another csum_start', packet: change(tcp4, { csumStart: 38 }) },
    { name: 'another csum_offset', packet: change(tcp4, { csumOffset: 6 }) },
    { name: 'a fragment offset', packet: large(tcp4), spoil: (b) => b.fill(1, 21, 22) },
    { name: 'more fragments', packet: large(tcp4), spoil: (b) => b.fill(0x20, 20, 21) },
    { name: 'an IPv4 header of 16 bytes', packet: large(tcp4), spoil: (b) => b.fill(0x44, 14, 15) },
    { name: 'a TCP header of 16 bytes', packet: large(tcp4), spoil: (b) => b.fill(0x40, 46, 47) },
    { name: 'a TCP header longer than the packet', packet: shortened(tcp4, 60), spoil: (b) => b.fill(0xf0, 46, 47) },
    { name: 'no payload', packet: shortened(tcp4, 54) },
    { name: 'half a TCP header', packet: shortened(tcp4, 44) },
    { name: 'half an IP header', packet: shortened(tcp4, 30) },
    { name: 'only an Ethernet header', packet: shortened(tcp4, 14) },
    { name: 'a fragment header', packet: large(tcp6), spoil: (b) => b.fill(44, 20, 21) },
    { name: 'an extension header that leads out', packet: large(tcp6), spoil: (b) => b.fill(0xff, 55, 56) },
    { name: 'an EtherType that is not IP', packet: large(tcp4), spoil: (b) => b.fill(0x99, 12, 13) },
    { name: 'too many segments', packet: change({ ...tcp4, payload: MAX_SEGMENTS + 1 }, { gsoSize: 1 }) },
  ])('is refused: $name', ({ packet, types = ALL, spoil = () => {} }) => {
    expect(cut(packet, types, spoil)).toEqual([]);
  });

  it('is told from any bytes without an access outside of them', () => {
    const types = fc.constantFrom(1, 4, 5, 0x21, 0x24, 0x45);
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), types, fc.nat(70), fc.nat(300), (bytes, gsoType, start, at) => {
        const csumOffset = (gsoType & 7) === 5 ? 6 : 16;
        const header = {
          flags: 1,
          gsoType,
          gsoSize: 10,
          csumStart: start,
          csumOffset,
          outerThOffset: 34,
          innerNhOffset: at,
        };
        const segments = cut({ frame: bytes, payload: bytes, header });
        expect(segments.reduce((total, segment) => total + segment.length, 0)).toBeLessThan(200 * 200);
      }),
    );
  });
});
