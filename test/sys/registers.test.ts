import { describe, expect, it } from 'vitest';
import { close, ftruncate, memfdCreate } from '../../src/sys/libc.ts';
import { mapAnonymous, mapShared, unmapMemory } from '../../src/sys/memory.ts';
import { checkAccess, Registers } from '../../src/sys/registers.ts';

describe('Registers', () => {
  const memory = mapAnonymous(4096);
  const registers = new Registers(memory, 64, 32);

  it('reads and writes each width, little-endian, at its place', () => {
    registers.write32(0, 0x89abcdef);
    expect(memory.u32[16]).toBe(0x89abcdef);
    expect(registers.read32(0)).toBe(0x89abcdef);
    expect(registers.read16(2)).toBe(0x89ab);
    expect(registers.read8(3)).toBe(0x89);
    registers.write16(2, 0x1234);
    registers.write8(0, 0x56);
    expect(registers.read32(0)).toBe(0x1234cd56);
    registers.write32(28, 0xffffffff);
    expect(memory.u32[23]).toBe(0xffffffff);
    expect(memory.u32[24]).toBe(0);
  });

  it('changes nothing but the bytes of the access', () => {
    memory.u8.fill(0xee);
    registers.write8(5, 1);
    registers.write16(8, 2);
    registers.write32(12, 3);
    const changed = [...memory.u8.keys()].filter((i) => memory.u8[i] !== 0xee);
    expect(changed).toEqual([69, 72, 73, 76, 77, 78, 79]);
  });

  const bad = [
    [-1, 1],
    [32, 1],
    [1, 2],
    [31, 2],
    [32, 2],
    [2, 4],
    [1, 4],
    [30, 4],
    [32, 4],
    [0.5, 1],
    [Number.NaN, 1],
    [2 ** 32, 1],
    [Infinity, 4],
    [-4, 4],
  ] as const;
  it.each(bad)('throws RangeError for an access at %d of %d bytes, and leaves memory alone', (offset, width) => {
    const read = { 1: 'read8', 2: 'read16', 4: 'read32' } as const;
    const write = { 1: 'write8', 2: 'write16', 4: 'write32' } as const;
    memory.u8.fill(0);
    expect(() => registers[read[width]](offset)).toThrow(RangeError);
    expect(() => registers[write[width]](offset, 0xff)).toThrow(RangeError);
    expect(() => checkAccess(offset, width, 32)).toThrow(RangeError);
    expect(memory.u8.every((byte) => byte === 0)).toBe(true);
  });

  it.each([
    [-4, 4],
    [2, 4],
    [0, 4100],
    [4096, 4],
    [0, Number.NaN],
    [0.5, 4],
  ])('cannot be made at %d with %d bytes of 4096', (start, size) => {
    expect(() => new Registers(memory, start, size)).toThrow(RangeError);
  });

  it('touches nothing of the device after the memory was unmapped', () => {
    const fd = memfdCreate('registers');
    ftruncate(fd, 4096);
    const device = mapShared(fd, 0, 4096, { write: true });
    const gone = mapShared(fd, 0, 4096, { write: true });
    const late = new Registers(gone);
    device.u32[0] = 5;
    unmapMemory(gone);
    late.write32(0, 1);
    expect(device.u32[0]).toBe(5);
    unmapMemory(device);
    close(fd);
  });
});
