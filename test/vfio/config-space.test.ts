import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { VfioError } from '../../src/errors.ts';
import { readU16, readU32, writeU16, writeU32 } from '../../src/sys/little-endian.ts';
import { checkAccess } from '../../src/sys/registers.ts';
import {
  CapabilityId,
  ExtendedCapabilityId,
  initiateFunctionLevelReset,
  PciCommand,
  readBars,
  readIdentity,
  readMsix,
  readPciExpress,
  readVirtioCapabilities,
  updateCommand,
  walkCapabilities,
  walkExtendedCapabilities,
} from '../../src/vfio/config-space.ts';
import type { Region } from '../../src/vfio/function.ts';

/** Configuration space in an array, with the checks that every region makes. */
class Config implements Region {
  readonly index = 7;
  readonly bytes: Uint8Array;
  reads = 0;

  constructor(bytes: Uint8Array) {
    this.bytes = bytes;
  }
  get size(): number {
    return this.bytes.length;
  }
  read8(offset: number): number {
    checkAccess(offset, 1, this.size);
    this.reads++;
    return this.bytes[offset];
  }
  read16(offset: number): number {
    checkAccess(offset, 2, this.size);
    this.reads++;
    return readU16(this.bytes, offset);
  }
  read32(offset: number): number {
    checkAccess(offset, 4, this.size);
    this.reads++;
    return readU32(this.bytes, offset);
  }
  write8(offset: number, value: number): void {
    this.bytes[offset] = value;
  }
  write16(offset: number, value: number): void {
    checkAccess(offset, 2, this.size);
    writeU16(this.bytes, offset, value);
  }
  write32(offset: number, value: number): void {
    checkAccess(offset, 4, this.size);
    writeU32(this.bytes, offset, value);
  }
}

function config(size = 256): Config {
  const space = new Config(new Uint8Array(size));
  space.write16(0, 0x1af4);
  space.write16(2, 0x1041);
  space.write16(6, 0x10);
  return space;
}

/** Puts capabilities as [offset, id, next] and the pointer to the first. */
function withList(...list: [number, number, number][]): Config {
  const space = config();
  space.bytes[0x34] = list[0]?.[0] ?? 0;
  for (const [offset, id, next] of list) space.bytes.set([id, next], offset);
  return space;
}

const code = (expected: string) => expect.objectContaining({ code: expected });

describe('readIdentity', () => {
  it('reads every id at its place', () => {
    const space = config();
    space.bytes.set([0x01, 0x00, 0x80, 0x02], 8);
    space.write16(0x2c, 0x177d);
    space.write16(0x2e, 0x0100);
    expect(readIdentity(space)).toEqual({
      vendorId: 0x1af4,
      deviceId: 0x1041,
      subsystemVendorId: 0x177d,
      subsystemId: 0x0100,
      revisionId: 1,
      classCode: 0x028000,
    });
  });

  it('takes all ones for a function that is gone', () => {
    expect(() => readIdentity(new Config(new Uint8Array(256).fill(0xff)))).toThrow(code('DEVICE_GONE'));
  });
});

describe('updateCommand', () => {
  it('sets and clears bits and leaves the others', () => {
    const space = config();
    space.write16(4, 0x0401);
    updateCommand(space, PciCommand.memorySpace | PciCommand.busMaster, PciCommand.ioSpace);
    expect(space.read16(4)).toBe(0x0406);
  });
});

describe('readBars', () => {
  const sizes = (present: number[]) => (index: number) => (present.includes(index) ? 4096 : 0);

  it('decodes 32-bit, 64-bit, prefetchable and I/O BARs', () => {
    const space = config();
    space.write32(0x10, 0xfebd4000);
    space.write32(0x14, 0x0000c081);
    space.write32(0x18, 0xe000000c);
    space.write32(0x1c, 0x00000012);
    expect(readBars(space, sizes([0, 1, 2]))).toEqual([
      { index: 0, kind: 'memory32', prefetchable: false, address: 0xfebd4000 },
      { index: 1, kind: 'io', prefetchable: false, address: 0xc080 },
      { index: 2, kind: 'memory64', prefetchable: true, address: 0x12_e000_0000 },
    ]);
  });

  it('does not read the upper half of a 64-bit BAR as a BAR, nor absent ones', () => {
    const space = config();
    space.write32(0x10, 0x4);
    space.write32(0x14, 0xffffffff);
    expect(readBars(space, sizes([0, 1])).map((bar) => bar.index)).toEqual([0]);
    expect(readBars(space, sizes([]))).toEqual([]);
  });

  it('refuses a 64-bit BAR that has no upper half', () => {
    const space = config();
    space.write32(0x24, 0x4);
    expect(() => readBars(space, sizes([5]))).toThrow(code('CAPABILITY_BOUNDS'));
  });
});

describe('walkCapabilities', () => {
  it('follows the list in order', () => {
    const space = withList([0x40, 9, 0x60], [0x60, 0x11, 0x48], [0x48, 0x10, 0]);
    expect(walkCapabilities(space)).toEqual([
      { id: 9, offset: 0x40 },
      { id: 0x11, offset: 0x60 },
      { id: 0x10, offset: 0x48 },
    ]);
  });

  it('finds nothing when the status register says that there is no list', () => {
    const space = withList([0x40, 9, 0]);
    space.write16(6, 0);
    expect(walkCapabilities(space)).toEqual([]);
  });

  it('masks the reserved bits of pointers', () => {
    const space = withList([0x40, 9, 0x53], [0x50, 1, 0]);
    space.bytes[0x34] = 0x42;
    expect(walkCapabilities(space).map((capability) => capability.offset)).toEqual([0x40, 0x50]);
  });

  it.each([
    ['leads back to itself', withList([0x40, 9, 0x40]), 'CAPABILITY_LOOP'],
    ['loops over several', withList([0x40, 9, 0x50], [0x50, 9, 0x60], [0x60, 9, 0x50]), 'CAPABILITY_LOOP'],
    ['loops through reserved bits', withList([0x40, 9, 0x41]), 'CAPABILITY_LOOP'],
    ['points into the header', withList([0x40, 9, 0x3c]), 'CAPABILITY_BOUNDS'],
    ['is all ones', new Config(new Uint8Array(256).fill(0xff)), 'CAPABILITY_LOOP'],
  ])('refuses a list that %s', (_, space, expected) => {
    expect(() => walkCapabilities(space)).toThrow(VfioError);
    expect(() => walkCapabilities(space)).toThrow(code(expected));
  });

  it('ends with a list or a typed error on any bytes, after few reads', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 256, maxLength: 256 }), (bytes) => {
        const space = new Config(bytes);
        try {
          const found = walkCapabilities(space);
          readVirtioCapabilities(space, found);
          readMsix(space, found);
          readPciExpress(space, found);
        } catch (error) {
          expect(error).toBeInstanceOf(VfioError);
        }
        expect(space.reads).toBeLessThan(48 * 256);
      }),
    );
  });
});

describe('walkExtendedCapabilities', () => {
  const put = (space: Config, offset: number, id: number, next: number, version = 1) =>
    space.write32(offset, (id | (version << 16) | (next << 20)) >>> 0);

  it('follows the list in order, to the last place there is', () => {
    const space = config(4096);
    put(space, 0x100, ExtendedCapabilityId.singleRootIov, 0xffc);
    put(space, 0xffc, ExtendedCapabilityId.alternativeRoutingId, 0x140, 2);
    put(space, 0x140, ExtendedCapabilityId.serialNumber, 0);
    expect(walkExtendedCapabilities(space)).toEqual([
      { id: 0x10, version: 1, offset: 0x100 },
      { id: 0x0e, version: 2, offset: 0xffc },
      { id: 0x03, version: 1, offset: 0x140 },
    ]);
  });

  it('finds nothing in 256 bytes, in zeros and in ones', () => {
    expect(walkExtendedCapabilities(config())).toEqual([]);
    expect(walkExtendedCapabilities(config(4096))).toEqual([]);
    expect(walkExtendedCapabilities(new Config(new Uint8Array(4096).fill(0xff)))).toEqual([]);
  });

  it.each([
    ['loops', 0x100, 'CAPABILITY_LOOP'],
    ['points into the first 256 bytes', 0x40, 'CAPABILITY_BOUNDS'],
  ])('refuses a list that %s', (_, next, expected) => {
    const space = config(4096);
    put(space, 0x100, 1, next);
    expect(() => walkExtendedCapabilities(space)).toThrow(code(expected));
  });

  it('refuses a pointer beyond a shorter configuration space', () => {
    const space = config(512);
    put(space, 0x100, 1, 0x200);
    expect(() => walkExtendedCapabilities(space)).toThrow(code('CAPABILITY_BOUNDS'));
  });
});

describe('readVirtioCapabilities', () => {
  function virtio(at: number, next: number, fields: number[], extra: number[] = []): Config {
    const space = withList([at, CapabilityId.vendor, next]);
    space.bytes[at + 2] = 16 + extra.length;
    space.bytes.set(fields, at + 3);
    space.write32(at + 8, 0x1000);
    space.write32(at + 12, 0x200);
    space.bytes.set(extra, at + 16);
    return space;
  }

  it('returns the fields as they are, and what follows them', () => {
    const space = virtio(0x40, 0, [2, 4, 7], [4, 0, 0, 0]);
    expect(readVirtioCapabilities(space, walkCapabilities(space))).toEqual([
      { at: 0x40, type: 2, bar: 4, id: 7, offset: 0x1000, length: 0x200, extra: new Uint8Array([4, 0, 0, 0]) },
    ]);
  });

  it('passes over capabilities that are not of the vendor, or too short to be virtio’s', () => {
    const space = withList([0x40, CapabilityId.msix, 0x60], [0x60, CapabilityId.vendor, 0]);
    space.bytes[0x62] = 8;
    expect(readVirtioCapabilities(space, walkCapabilities(space))).toEqual([]);
  });

  it('refuses one that leaves configuration space', () => {
    const space = virtio(0xec, 0, [1, 0, 0], []);
    space.bytes[0xee] = 24;
    expect(() => readVirtioCapabilities(space, walkCapabilities(space))).toThrow(code('CAPABILITY_BOUNDS'));
  });
});

describe('MSI-X and PCI Express', () => {
  it('reads the table and pending bits of MSI-X', () => {
    const space = withList([0x40, CapabilityId.msix, 0]);
    space.write16(0x42, 0x8000 | 63);
    space.write32(0x44, 0x2000 | 4);
    space.write32(0x48, 0x3800 | 2);
    expect(readMsix(space, walkCapabilities(space))).toEqual({
      at: 0x40,
      vectors: 64,
      tableBar: 4,
      tableOffset: 0x2000,
      pendingBar: 2,
      pendingOffset: 0x3800,
    });
  });

  it('asks for a function-level reset where there is one', () => {
    const space = withList([0x40, CapabilityId.pciExpress, 0]);
    expect(readPciExpress(space, walkCapabilities(space))).toEqual({ at: 0x40, functionLevelReset: false });
    space.write32(0x44, 0x10000000);
    space.write16(0x48, 0x2810);
    const express = readPciExpress(space, walkCapabilities(space));
    if (express === null) throw new Error('not found');
    expect(express.functionLevelReset).toBe(true);
    initiateFunctionLevelReset(space, express);
    expect(space.read16(0x48)).toBe(0xa810);
  });

  it('finds neither where there is none, and refuses those that leave configuration space', () => {
    expect(readMsix(config(), [])).toBeNull();
    expect(readPciExpress(config(), [])).toBeNull();
    expect(() => readMsix(config(), [{ id: CapabilityId.msix, offset: 0xf8 }])).toThrow(code('CAPABILITY_BOUNDS'));
    expect(() => readPciExpress(config(), [{ id: CapabilityId.pciExpress, offset: 0xfc }])).toThrow(
      code('CAPABILITY_BOUNDS'),
    );
  });
});
