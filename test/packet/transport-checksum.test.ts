import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ChecksumState, transportChecksum } from '../../src/packet/transport-checksum.ts';
import { type LargeOptions, large } from '../device/helpers/large.ts';

/** A frame with a right checksum, at byte `at` of a memory. */
function frame(options: LargeOptions): { bytes: Uint8Array; place: number } {
  const { frame: bytes, header } = large(options);
  const { csumStart = 0, csumOffset = 0 } = header;
  // The field holds the sum of the pseudo header.
  let sum = 0;
  for (let i = csumStart; i < bytes.length; i++) sum += bytes[i] << ((i - csumStart) & 1 ? 0 : 8);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  const place = csumStart + csumOffset;
  const value = ~sum & 0xffff || 0xffff;
  bytes.set([value >>> 8, value], place);
  return { bytes, place };
}

function state(bytes: Uint8Array, at = 64, length = bytes.length): number {
  const u8 = new Uint8Array(Math.ceil((at + bytes.length) / 2) * 2);
  u8.set(bytes, at);
  return transportChecksum({ u8, u16: new Uint16Array(u8.buffer) }, at, length);
}

const options = fc.record({
  version: fc.constantFrom<4 | 6>(4, 6),
  protocol: fc.constantFrom<'tcp' | 'udp'>('tcp', 'udp'),
  payload: fc.integer({ min: 0, max: 3000 }),
  size: fc.constant(0),
  tags: fc.integer({ min: 0, max: 1 }),
  extension: fc.constantFrom(0, 8, 24),
});
const drawn = options.map((one) => ({ ...one, extension: one.version === 6 ? one.extension : 0 }));

describe('the checksum of a frame', () => {
  it('is right, wherever it lies and whatever follows the packet', () => {
    fc.assert(
      fc.property(drawn, fc.integer({ min: 0, max: 3 }), fc.integer({ min: 0, max: 9 }), (one, at, padding) => {
        const { bytes } = frame(one);
        const padded = new Uint8Array(bytes.length + padding).fill(0xee);
        padded.set(bytes);
        expect(state(padded, at)).toBe(ChecksumState.valid);
      }),
    );
  });

  it('is wrong when a byte under it was changed', () => {
    fc.assert(
      fc.property(drawn, fc.nat(), fc.integer({ min: 1, max: 255 }), (one, which, change) => {
        const { bytes, place } = frame(one);
        const start = place - (one.protocol === 'tcp' ? 16 : 6);
        const at = start + (which % (bytes.length - start));
        // The length of UDP, and a checksum that becomes none, are not what a checksum tells.
        const isLength = one.protocol === 'udp' && (at - start === 4 || at - start === 5);
        bytes[at] ^= change;
        const isNone = one.protocol === 'udp' && bytes[place] === 0 && bytes[place + 1] === 0;
        const was = bytes[at] ^ change;
        const same =
          (bytes[at] ^ was) === 0xff && bytes.subarray(at & ~1, (at & ~1) + 2).every((byte) => byte === 0xff);
        if (!isLength && !isNone && !same) expect(state(bytes)).not.toBe(ChecksumState.valid);
      }),
    );
  });

  it.each<{ name: string; spoil(bytes: Uint8Array): Uint8Array }>([
    { name: 'an ARP packet', spoil: (bytes) => bytes.fill(6, 13, 14) },
    { name: 'a fragment', spoil: (bytes) => bytes.fill(0x20, 20, 21) },
    { name: 'another protocol', spoil: (bytes) => bytes.fill(1, 23, 24) },
    { name: 'a header of 16 bytes', spoil: (bytes) => bytes.fill(0x44, 14, 15) },
    { name: 'a total length beyond the frame', spoil: (bytes) => bytes.fill(0xff, 16, 17) },
    { name: 'a total length of less than the header', spoil: (bytes) => bytes.fill(0, 16, 18) },
    { name: 'half a header', spoil: (bytes) => bytes.subarray(0, 30) },
    { name: 'half a transport header', spoil: (bytes) => bytes.subarray(0, 40) },
  ])('is not told of $name', ({ spoil }) => {
    for (const protocol of ['tcp', 'udp'] as const) {
      expect(state(spoil(frame({ version: 4, protocol, payload: 100, size: 0 }).bytes))).toBe(ChecksumState.none);
    }
  });

  it('is none when UDP has none', () => {
    const { bytes, place } = frame({ version: 4, protocol: 'udp', payload: 100, size: 0 });
    bytes.fill(0, place, place + 2);
    expect(state(bytes)).toBe(ChecksumState.none);
  });

  it('is told from any bytes without an access outside of them', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 120 }), (bytes) => {
        expect(Object.values(ChecksumState)).toContain(state(bytes));
      }),
    );
  });
});
