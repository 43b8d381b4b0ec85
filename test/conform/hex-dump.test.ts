import { describe, expect, it } from 'vitest';
import { hexDump } from '../../src/conform/hex-dump.ts';

describe('the hex dump of a report', () => {
  it('has rows of 16 bytes with their offsets', () => {
    const bytes = Uint8Array.from({ length: 18 }, (_, i) => i);
    expect(hexDump(bytes)).toBe('  0000  00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f\n  0010  10 11');
  });

  it('ends after 128 bytes, and says how many there are besides', () => {
    const rows = hexDump(new Uint8Array(130)).split('\n');
    expect(rows).toHaveLength(9);
    expect(rows[8]).toBe('  …     2 more');
  });

  it('says so when there is nothing', () => {
    expect(hexDump(new Uint8Array(0))).toBe('  (nothing)');
  });
});
