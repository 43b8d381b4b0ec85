import { readFileSync } from 'node:fs';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { describe, expect, it, vi } from 'vitest';
import * as libc from '../../../src/sys/libc.ts';
import { type MappedMemory, mapAnonymous, mapShared, roundToPages, unmapMemory } from '../../../src/sys/memory.ts';
import { backing } from '../backing.ts';

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

    it('in huge pages begins at a multiple of their size, and is as long as was asked', () => {
      const size = 3 * libc.HUGE_PAGE_SIZE + libc.PAGE_SIZE;
      const memory = mapAnonymous(size, { reserve: false, hugePages: true });
      expect(memory.address % libc.HUGE_PAGE_SIZE).toBe(0);
      expect(memory.size).toBe(size);
      memory.u8[size - 1] = 7;
      expect([memory.u8[0], memory.u8[size - 1]]).toEqual([0, 7]);
      expect(backing(memory.address + size - 1)).toBe('');
      expect(libc.madvise(memory.address, size, 12345)).toBe(false);
      unmapMemory(memory);
      expect(memory.u8[size - 1]).toBe(0);
    });

    it('is left out of core files when it is secret, and only then', () => {
      const file = libc.memfdCreate('secret');
      libc.ftruncate(file, libc.PAGE_SIZE);
      const memories = [false, true].flatMap((secret) => [
        mapAnonymous(libc.PAGE_SIZE, { secret }),
        mapShared(file, 0, libc.PAGE_SIZE, { write: true, secret }),
      ]);
      // proc(5): "dd" is "don't dump".
      const smaps = readFileSync('/proc/self/smaps', 'latin1').split(/^(?=[0-9a-f]+-[0-9a-f]+ )/m);
      const isLeftOut = ({ address }: MappedMemory) => {
        const found = smaps.find((one) => {
          const [from, to] = one
            .split(' ', 1)[0]
            .split('-')
            .map((text) => Number.parseInt(text, 16));
          return from <= address && address < to;
        });
        return /^VmFlags:.* dd\b/m.test(found ?? '');
      };
      expect(memories.map(isLeftOut)).toEqual([false, false, true, true]);
      for (const memory of memories) unmapMemory(memory);
      libc.close(file);
    });

    it('leaves zeros of its own under every view when it is unmapped, also those that others made', () => {
      const fd = libc.memfdCreate('kept');
      libc.ftruncate(fd, 4096);
      const memory = mapShared(fd, 0, 4096, { write: true });
      const witness = mapShared(fd, 0, 4096, { write: true });
      const other = memory.u8.subarray(100, 200);
      memory.u8[100] = 1;
      unmapMemory(memory);
      expect(backing(memory.address)).toBe('');
      expect([memory.u8[100], other[0]]).toEqual([0, 0]);
      other[0] = 2;
      expect(witness.u8[100]).toBe(1);
      unmapMemory(witness);
      libc.close(fd);
    });

    it('is unmapped once only: what its views show later stays', () => {
      const memory = mapAnonymous(4096);
      unmapMemory(memory);
      memory.u8[0] = 7;
      unmapMemory(memory);
      expect(memory.u8[0]).toBe(7);
    });

    it('gives its addresses back when the last view is garbage', async () => {
      setFlagsFromString('--expose-gc');
      const collect: unknown = runInNewContext('gc');
      if (typeof collect !== 'function') throw new Error('no garbage collector to call');
      const size = 1 << 20;
      const addresses = Array.from({ length: 8 }, () => {
        const memory = mapAnonymous(size);
        unmapMemory(memory);
        return memory.address;
      });
      await vi.waitFor(() => {
        collect();
        expect(addresses.filter((address) => backing(address) !== null).length).toBeLessThan(addresses.length);
      });
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
