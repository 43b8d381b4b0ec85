import { readFileSync } from 'node:fs';
import { describe, expect, it, vi } from 'vitest';
import * as libc from '../../../src/sys/libc.ts';
import { mapAnonymous, mapShared, roundToPages, unmapMemory } from '../../../src/sys/memory.ts';

/** Whether the kernel still has a mapping at `address`. */
function isMapped(address: number): boolean {
  return readFileSync('/proc/self/maps', 'latin1')
    .split('\n')
    .some((line) => {
      const [start, end] = line
        .split(' ')[0]
        .split('-')
        .map((text) => Number.parseInt(text, 16));
      return start <= address && address < end;
    });
}

export function memorySuite(): void {
  describe('mapped memory', () => {
    it('is zeroed, page-aligned, rounded up, and one buffer behind three views', () => {
      const memory = mapAnonymous(5000);
      expect(memory.size).toBe(8192);
      expect(memory.address % libc.PAGE_SIZE).toBe(0);
      expect(memory.u8.every((byte) => byte === 0)).toBe(true);
      memory.u32[1] = 0x11223344;
      expect([...memory.u8.subarray(4, 8)]).toEqual([0x44, 0x33, 0x22, 0x11]);
      expect(memory.u16[3]).toBe(0x1122);
      expect(memory.u16.buffer).toBe(memory.u8.buffer);
      expect(memory.u32.buffer).toBe(memory.u8.buffer);
      unmapMemory(memory);
    });

    it('detaches every view when it is unmapped, also those that others made', () => {
      const memory = mapAnonymous(4096);
      const { address } = memory;
      const other = memory.u8.subarray(100, 200);
      memory.u8[100] = 1;
      expect(isMapped(address)).toBe(true);
      unmapMemory(memory);
      expect(isMapped(address)).toBe(false);
      expect([memory.u8.length, memory.u16.length, memory.u32.length, other.length]).toEqual([0, 0, 0, 0]);
      expect(memory.u8[0]).toBeUndefined();
      expect(other[0]).toBeUndefined();
      memory.u8[0] = 1;
      other[0] = 1;
    });

    it('is unmapped once only: what is mapped at the address later stays', () => {
      const memory = mapAnonymous(4096);
      const { address } = memory;
      unmapMemory(memory);
      const flags = libc.MapFlag.private | libc.MapFlag.anonymous | libc.MapFlag.fixed;
      libc.mmap(address, 4096, libc.Prot.read, flags, -1, 0);
      unmapMemory(memory);
      expect(isMapped(address)).toBe(true);
      libc.munmap(address, 4096);
    });

    it('becomes private zeros at the same address when its views cannot be detached', () => {
      // A byte stream that does not take its buffer, and no `transfer`: as on a runtime that can do neither.
      vi.stubGlobal(
        'ReadableStream',
        class {
          getReader() {
            return { read: async () => {}, cancel: async () => {} };
          }
        },
      );
      const transfer = Object.getOwnPropertyDescriptor(ArrayBuffer.prototype, 'transfer');
      if (transfer !== undefined) Reflect.deleteProperty(ArrayBuffer.prototype, 'transfer');
      const fd = libc.memfdCreate('kept');
      libc.ftruncate(fd, 4096);
      const memory = mapShared(fd, 0, 4096, { write: true });
      const witness = mapShared(fd, 0, 4096, { write: true });
      memory.u32[0] = 1;
      unmapMemory(memory);
      expect(isMapped(memory.address)).toBe(true);
      expect(memory.u32[0]).toBe(0);
      memory.u32[0] = 2;
      expect(witness.u32[0]).toBe(1);
      vi.unstubAllGlobals();
      if (transfer !== undefined) Object.defineProperty(ArrayBuffer.prototype, 'transfer', transfer);
      unmapMemory(witness);
      libc.munmap(memory.address, 4096);
      libc.close(fd);
    });

    it('can be mapped, unmapped and collected many times over', () => {
      for (let i = 0; i < 300; i++) {
        const memory = mapAnonymous(65536);
        memory.u8.fill(i);
        unmapMemory(memory);
      }
      expect(mapAnonymous(1).u8[0]).toBe(0);
    });

    it('is shared between mappings of one file', () => {
      const fd = libc.memfdCreate('shared');
      libc.ftruncate(fd, 16384);
      const whole = mapShared(fd, 0, 16384, { write: true });
      const part = mapShared(fd, 8192, 4096, { write: false, populate: true });
      whole.u32[2048] = 0xabcdef01;
      expect(part.u32[0]).toBe(0xabcdef01);
      libc.close(fd);
      whole.u32[2049] = 5;
      expect(part.u32[1]).toBe(5);
      unmapMemory(part);
      unmapMemory(whole);
    });

    it.each([
      ['an offset that is no multiple of a page', 100, 4096],
      ['a negative offset', -4096, 4096],
      ['an offset that is no integer', Number.NaN, 4096],
      ['no bytes', 0, 0],
      ['a size that is no multiple of 4', 0, 4097],
    ])('refuses %s', (_, offset, size) => {
      const fd = libc.memfdCreate('refused');
      libc.ftruncate(fd, 16384);
      expect(() => mapShared(fd, offset, size, { write: true })).toThrow(RangeError);
      libc.close(fd);
    });

    it('refuses to map what lies beyond the end of the file, where an access would end the process', () => {
      const fd = libc.memfdCreate('short');
      libc.ftruncate(fd, 4096);
      expect(() => mapShared(fd, 0, 8192, { write: true })).toThrow(expect.objectContaining({ code: 'ENXIO' }));
      expect(() => mapShared(fd, 4096, 4096, { write: true })).toThrow(expect.objectContaining({ code: 'ENXIO' }));
      libc.close(fd);
    });

    it.each([0, -1, 1.5, Number.NaN, Infinity])('cannot have %d bytes', (size) => {
      expect(() => roundToPages(size)).toThrow(RangeError);
    });
  });
}
