import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { writeU32 } from '../../src/sys/little-endian.ts';
import * as protocol from '../../src/vfio/protocol.ts';

const violation = expect.objectContaining({ name: 'VfioError', code: 'PROTOCOL' });
const u32 = fc.integer({ min: 0, max: 0xffffffff });
const area = fc.record({ offset: fc.maxSafeNat(), size: fc.maxSafeNat(), descriptor: u32, type: u32, flags: u32 });

describe('DEVICE_GET_REGION_IO_FDS', () => {
  it('is laid out as in vfio-user.rst', () => {
    // Written by hand from the tables.
    expect(Buffer.from(protocol.encodeIoFdsRequest(4).slice(16)).toString('hex')).toBe(
      `00000100${'00000000'}04000000${'00000000'}`,
    );
    const areas = [{ offset: 0x3004, size: 2, descriptor: 1, type: 0, flags: 0 }];
    expect(Buffer.from(protocol.encodeIoFds({ index: 0, areas }, 4096)).toString('hex')).toBe(
      `38000000${'00000000'}00000000${'01000000'}0430000000000000${'0200000000000000'}01000000${'00'.repeat(20)}`,
    );
  });

  it('says the same after it was decoded, whatever it says', () => {
    fc.assert(
      fc.property(u32, fc.array(area, { maxLength: 20 }), (index, areas) => {
        expect(protocol.decodeIoFds(protocol.encodeIoFds({ index, areas }, 4096))).toEqual({ index, areas });
      }),
    );
  });

  it('is understood with the longer areas of libvfio-user', () => {
    const payload = new Uint8Array(16 + 2 * 48);
    const words: [number, number][] = [
      [0, payload.length],
      [12, 2],
      [16, 0x3000],
      [16 + 48, 0x3004],
      [16 + 48 + 16, 1],
    ];
    for (const [at, value] of words) writeU32(payload, at, value);
    expect(protocol.decodeIoFds(payload).areas).toEqual([
      { offset: 0x3000, size: 0, descriptor: 0, type: 0, flags: 0 },
      { offset: 0x3004, size: 0, descriptor: 1, type: 0, flags: 0 },
    ]);
  });

  it('has no areas when they did not fit', () => {
    const areas = [{ offset: 0, size: 0, descriptor: 0, type: 0, flags: 0 }];
    const short = protocol.encodeIoFds({ index: 2, areas }, 16);
    expect(short.length).toBe(16);
    expect(protocol.decodeIoFds(short)).toEqual({ index: 2, areas: [] });
  });

  it('is refused, or decoded inside of its bytes, whatever they are', () => {
    const bytes = fc.uint8Array({ maxLength: 200 });
    fc.assert(
      fc.property(bytes, fc.integer({ min: 0, max: 5 }), u32, (payload, count, argsz) => {
        if (payload.length >= 16) {
          writeU32(payload, 12, count);
          writeU32(payload, 0, argsz % 256);
        }
        try {
          expect(protocol.decodeIoFds(payload).areas.length).toBeLessThanOrEqual(count);
        } catch (error) {
          expect(error).toEqual(violation);
        }
      }),
    );
  });

  it('names a descriptor for a write only if it stands for every value of that width', () => {
    const at = (change: Partial<protocol.IoFdArea>) => {
      const found = { offset: 0x3000, size: 0, descriptor: 7, type: 0, flags: 0, ...change };
      return protocol.ioeventfdAt({ index: 0, areas: [found] }, 0x3000, 2)?.descriptor;
    };
    expect(at({})).toBe(7);
    expect(at({ size: 2 })).toBe(7);
    for (const change of [{ size: 4 }, { offset: 0x3002 }, { type: protocol.IoFdType.ioregionfd }, { flags: 1 }]) {
      expect(at(change)).toBeUndefined();
    }
  });
});
