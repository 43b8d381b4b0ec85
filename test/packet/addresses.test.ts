import { isIPv6 } from 'node:net';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  formatIp,
  formatMac,
  formatPrefix,
  parseIp,
  parseIpv4,
  parseIpv6,
  parseMac,
  parsePrefix,
} from '../../src/packet/addresses.ts';

describe('IP addresses', () => {
  test('come back from text as the same bytes, both families', () => {
    const address = fc.oneof(
      fc.uint8Array({ minLength: 4, maxLength: 4 }),
      fc.uint8Array({ minLength: 16, maxLength: 16 }),
      // Runs of zeros, so that "::" is met in every place.
      fc.array(fc.constantFrom(0, 0, 0, 1, 0xffff), { minLength: 8, maxLength: 8 }).map((groups) => {
        const bytes = new Uint8Array(16);
        groups.forEach((group, i) => {
          bytes[2 * i] = group >>> 8;
          bytes[2 * i + 1] = group & 0xff;
        });
        return bytes;
      }),
    );
    fc.assert(
      fc.property(address, (bytes) => {
        const text = formatIp(bytes);
        expect(parseIp(text)).toEqual(bytes);
        if (bytes.length === 16) expect(isIPv6(text)).toBe(true);
      }),
    );
  });

  test.each([
    ['2001:db8:0:0:1:0:0:1', '2001:db8::1:0:0:1'],
    ['2001:DB8:0:1:1:1:1:1', '2001:db8:0:1:1:1:1:1'],
    ['::', '::'],
    ['1::', '1::'],
    ['::1', '::1'],
    ['::ffff:192.0.2.1', '::ffff:c000:201'],
    ['64:ff9b::192.0.2.33', '64:ff9b::c000:221'],
    ['1:2:3:4:5:6:7:8', '1:2:3:4:5:6:7:8'],
    ['0:0:0:1:0:0:0:0', '0:0:0:1::'],
  ])('%s is written as RFC 5952 wants: %s', (text, canonical) => {
    const bytes = parseIpv6(text);
    expect(bytes).not.toBeNull();
    expect(formatIp(bytes ?? new Uint8Array())).toBe(canonical);
  });

  test.each(['', ' 1.2.3.4', '1.2.3', '01.2.3.4', '1.2.3.256', '1.2.3.4 ', '0x1.2.3.4', '1', '1.2.3.4/32'])(
    '"%s" is not an IPv4 address',
    (text) => {
      expect(parseIpv4(text)).toBeNull();
    },
  );

  test.each(['', ':', '1::2::3', '1:2:3:4:5:6:7', 'fe80::1%eth0', '::g', '1:2:3:4:5:6:7:8:9', '::1.2.3', '12345::'])(
    '"%s" is not an IPv6 address',
    (text) => {
      expect(parseIpv6(text)).toBeNull();
    },
  );
});

describe('prefixes', () => {
  test.each(['0.0.0.0/0', '10.0.0.0/8', '192.0.2.1/32', '::/0', '2001:db8::/32', '2001:db8::1/128', 'fe80::/10'])(
    '%s comes back as it is',
    (text) => {
      const prefix = parsePrefix(text);
      expect(prefix).not.toBeNull();
      if (prefix !== null) expect(formatPrefix(prefix)).toBe(text);
    },
  );

  test('without a length is the whole address', () => {
    expect(parsePrefix('192.0.2.1')?.length).toBe(32);
    expect(parsePrefix('::1')?.length).toBe(128);
  });

  test.each([
    '10.0.0.1/8',
    '10.0.0.0/33',
    '::/129',
    '10.0.0.0/',
    '10.0.0.0/08',
    '10.0.0.0/-1',
    '/8',
    '10.0.0.0/8/8',
    '::1/64',
  ])('%s is refused', (text) => {
    expect(parsePrefix(text)).toBeNull();
  });
});

describe('MAC addresses', () => {
  test('come back from text as the same bytes', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 6, maxLength: 6 }), (bytes) => {
        expect(parseMac(formatMac(bytes))).toEqual(bytes);
      }),
    );
  });

  test.each(['', '02:00:00:00:00', '02:00:00:00:00:00:00', '02-00-00-00-00-00', '2:0:0:0:0:0', '02:00:00:00:00:0g'])(
    '"%s" is refused',
    (text) => {
      expect(parseMac(text)).toBeNull();
    },
  );
});
