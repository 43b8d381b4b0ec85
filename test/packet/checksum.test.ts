import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  addBytes,
  addWords,
  checksum,
  finish,
  ipv4PseudoSum,
  ipv6PseudoSum,
  setIpv4Checksum,
  updateChecksum,
} from '../../src/packet/checksum.ts';

const hex = (text: string): Uint8Array => new Uint8Array(Buffer.from(text.replaceAll(' ', ''), 'hex'));

/** RFC 1071 word by word, end-around carry after each addition. */
function naive(bytes: Uint8Array): number {
  let sum = 0;
  for (let i = 0; i < bytes.length; i += 2) {
    sum += bytes[i] * 256 + (i + 1 < bytes.length ? bytes[i + 1] : 0);
    if (sum > 0xffff) sum -= 0xffff;
  }
  return 0xffff - sum;
}

describe('the Internet checksum', () => {
  test('has the value of the example in RFC 1071, section 3', () => {
    expect(checksum(hex('0001 f203 f4f5 f6f7'), 0, 8)).toBe(0xffff - 0xddf2);
  });

  test('is what a real IPv4 header carries, and 0 over a header that carries it', () => {
    const header = hex('4500 0073 0000 4000 4011 b861 c0a8 0001 c0a8 00c7');
    expect(checksum(header, 0, 20)).toBe(0);
    const blank = header.slice();
    blank[10] = 0xaa;
    setIpv4Checksum(blank, 0, 20);
    expect(blank).toEqual(header);
  });

  test('is the same over words as over bytes, up to the longest packet', () => {
    const memory = new Uint8Array(0x10010);
    const u16 = new Uint16Array(memory.buffer);
    fc.assert(
      fc.property(
        fc.oneof(fc.integer({ min: 0, max: 40 }), fc.constantFrom(0xfffe, 0xffff), fc.integer({ min: 0, max: 0xffff })),
        fc.integer({ min: 0, max: 7 }),
        fc.constantFrom(0, 0xffff, 0x12345),
        fc.constantFrom(-1, 1, 251),
        (length, half, start, step) => {
          const at = 2 * half;
          // -1: all ones, the largest sum there can be.
          for (let i = 0; i < memory.length; i++) memory[i] = step < 0 ? 0xff : i * step + (i >>> 8);
          expect(finish(addWords(u16, memory, at, length, start))).toBe(finish(addBytes(memory, at, length, start)));
        },
      ),
    );
  });

  test('agrees with word-by-word addition at every length and offset', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), fc.nat(7), (bytes, shift) => {
        const padded = new Uint8Array(bytes.length + shift + 3).fill(0x5a);
        padded.set(bytes, shift);
        expect(checksum(padded, shift, bytes.length)).toBe(naive(bytes));
      }),
    );
  });

  test('does not overflow on the longest IP payload', () => {
    const bytes = new Uint8Array(65_535).fill(0xff);
    expect(checksum(bytes, 0, bytes.length)).toBe(naive(bytes));
  });
});

describe('the incremental update', () => {
  test('has the value of the example in RFC 1624, section 4', () => {
    expect(updateChecksum(0xdd2f, 0x5555, 0x3285)).toBe(0x0000);
  });

  test('equals a checksum made anew, for any word of any header', () => {
    const header = fc.uint8Array({ minLength: 20, maxLength: 20 }).filter((h) => h.some((byte) => byte !== 0));
    fc.assert(
      fc.property(header, fc.nat(9), fc.nat(0xffff), (bytes, word, value) => {
        const at = 2 * word;
        const before = (bytes[at] << 8) | bytes[at + 1];
        const old = checksum(bytes, 0, 20);
        bytes[at] = value >>> 8;
        bytes[at + 1] = value & 0xff;
        fc.pre(bytes.some((byte) => byte !== 0));
        expect(updateChecksum(old, before, value)).toBe(checksum(bytes, 0, 20));
      }),
    );
  });
});

describe('pseudo headers', () => {
  // Made by Scapy 2.5: UDP and TCP over IPv4, UDP and ICMPv6 over IPv6, payloads of odd length.
  test.each([
    ['UDP over IPv4', 4, 17, '45000021000100004011f694c0000201c000023514e90035000d22ad68656c6c6f'],
    [
      'TCP over IPv4',
      4,
      6,
      '4500002f000100004006f691c0000201c000023514e90035000000010000000250182000917a000068656c6c6f2121',
    ],
    [
      'UDP over IPv6',
      6,
      17,
      '60000000000d114020010db800000000000000000000000120010db800000000000000000000003514e90035000d4b3c68656c6c6f',
    ],
    [
      'ICMPv6',
      6,
      58,
      '60000000000b3a4020010db800000000000000000000000120010db800000000000000000000003580005f9f00070009616263',
    ],
  ])('make the checksum of another stack come out right: %s', (_name, version, protocol, text) => {
    const packet = hex(text);
    const header = version === 4 ? 20 : 40;
    const length = packet.length - header;
    const pseudo =
      version === 4 ? ipv4PseudoSum(packet, 0, protocol, length) : ipv6PseudoSum(packet, 0, protocol, length);
    expect(finish(addBytes(packet, header, length, pseudo))).toBe(0);
    packet[packet.length - 1] ^= 1;
    expect(finish(addBytes(packet, header, length, pseudo))).not.toBe(0);
  });
});
