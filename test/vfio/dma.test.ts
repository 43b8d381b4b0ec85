import { readdirSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { VfioError } from '../../src/errors.ts';
import * as libc from '../../src/sys/libc.ts';
import { mapShared, unmapMemory } from '../../src/sys/memory.ts';
import { createMemoryFile } from '../../src/sys/memory-file.ts';
import { DmaArena, type DmaArenaOptions, type DmaMapping } from '../../src/vfio/dma.ts';
import { backing } from '../sys/backing.ts';

const RANGES = [
  { start: 0x10000, last: 0x1ffff },
  { start: 0x1_0000_0000, last: 2 ** 39 - 1 },
];
const openDescriptors = () => readdirSync('/proc/self/fd').length;

/** A device that remembers its mappings and refuses when told to. */
class Device {
  readonly mapped = new Map<number, DmaMapping>();
  refuse = false;
  calls = 0;

  map(mapping: DmaMapping): void {
    this.calls++;
    if (this.refuse) throw new VfioError('DEVICE_REFUSED', 'no');
    this.mapped.set(mapping.iova, mapping);
  }

  unmap(mapping: DmaMapping): void {
    this.calls++;
    if (this.refuse) throw new VfioError('DEVICE_REFUSED', 'no');
    expect(this.mapped.get(mapping.iova)).toEqual(mapping);
    this.mapped.delete(mapping.iova);
  }
}

describe('DmaArena', () => {
  const arenas: DmaArena[] = [];
  afterEach(() => {
    for (const arena of arenas.splice(0)) arena.close(false);
  });
  const open = (device: Device, options: DmaArenaOptions = {}) => {
    const arena = new DmaArena(device, RANGES, options);
    arenas.push(arena);
    return arena;
  };

  it('gives zeroed, page-aligned memory at the lowest free address, and tells the device', () => {
    const device = new Device();
    const memory = open(device).allocate(5000);
    expect(memory).toMatchObject({ size: 8192, iova: 0x10000, iovaLow: 0x10000, iovaHigh: 0 });
    expect(memory.u8.every((byte) => byte === 0)).toBe(true);
    expect(device.mapped.get(0x10000)).toMatchObject({ size: 8192, address: memory.address, offset: 0 });
  });

  it('splits addresses beyond 4 GiB into their halves', () => {
    const memory = open(new Device()).allocate(0x20000);
    expect(memory).toMatchObject({ iova: 0x1_0000_0000, iovaLow: 0, iovaHigh: 1 });
  });

  it('hands the device a file in which it finds the same bytes', () => {
    const device = new Device();
    const arena = open(device);
    arena.allocate(4096);
    const memory = arena.allocate(4096);
    const mapping = device.mapped.get(memory.iova);
    if (mapping === undefined) throw new Error('not mapped');
    const other = mapShared(mapping.fd, mapping.offset, mapping.size, { write: true });
    memory.u32[3] = 0xfeedface;
    expect(other.u32[3]).toBe(0xfeedface);
    other.u32[4] = 1;
    expect(memory.u32[4]).toBe(1);
    expect(libc.fcntl(mapping.fd, libc.FcntlCommand.getSeals) & libc.Seal.shrink).toBe(libc.Seal.shrink);
    unmapMemory(other);
  });

  it('takes freed memory away from its views, reuses its address and its pages, and zeroes them', () => {
    const device = new Device();
    const arena = open(device);
    const first = arena.allocate(4096);
    const { iova } = first;
    const offset = device.mapped.get(iova)?.offset;
    first.u8.fill(0xff);
    arena.free(first);
    expect(first.u8.every((byte) => byte === 0)).toBe(true);
    expect(device.mapped.size).toBe(0);
    const second = arena.allocate(4096);
    expect(second.iova).toBe(iova);
    expect(device.mapped.get(iova)?.offset).toBe(offset);
    expect(second.u8.every((byte) => byte === 0)).toBe(true);
    expect(() => arena.free(first)).toThrow(RangeError);
  });

  it('changes nothing when the device refuses a mapping', () => {
    const device = new Device();
    const arena = open(device);
    arena.allocate(4096);
    device.refuse = true;
    const before = openDescriptors();
    expect(() => arena.allocate(8192)).toThrow(expect.objectContaining({ code: 'DEVICE_REFUSED' }));
    expect(openDescriptors()).toBe(before);
    expect(arena.count).toBe(1);
    device.refuse = false;
    expect(arena.allocate(8192).iova).toBe(0x11000);
    expect(device.mapped.get(0x11000)?.offset).toBe(4096);
  });

  it('never reuses what the device did not let go of', () => {
    const device = new Device();
    const arena = open(device);
    const memory = arena.allocate(4096);
    device.refuse = true;
    expect(() => arena.free(memory)).toThrow(expect.objectContaining({ code: 'DEVICE_REFUSED' }));
    expect(backing(memory.address)).toBe('');
    device.refuse = false;
    const next = arena.allocate(4096);
    expect(next.iova).toBe(0x11000);
    expect(device.mapped.get(next.iova)?.offset).toBe(4096);
  });

  it('throws IOVA_EXHAUSTED when its ranges are full', () => {
    const arena = new DmaArena(new Device(), [{ start: 0x10000, last: 0x12fff }]);
    arenas.push(arena);
    arena.allocate(8192);
    expect(() => arena.allocate(8192)).toThrow(expect.objectContaining({ code: 'IOVA_EXHAUSTED' }));
    expect(arena.allocate(4096).iova).toBe(0x12000);
  });

  it.each([0, -1, 1.5, Number.NaN, 2 ** 32 + 1])('cannot allocate %d bytes', (size) => {
    expect(() => open(new Device()).allocate(size)).toThrow(RangeError);
  });

  it('rounds up to the page size of the device', () => {
    const memory = open(new Device(), { pageSize: 0x10000 }).allocate(1);
    expect(memory).toMatchObject({ size: 0x10000, iova: 0x10000 });
  });

  it('finds the memory that holds a range of addresses, all of it', () => {
    const arena = open(new Device());
    const a = arena.allocate(4096);
    const b = arena.allocate(4096);
    expect(b.iova).toBe(a.iova + 4096);
    expect(arena.find(a.iova, 4096)).toEqual({ memory: a, offset: 0 });
    expect(arena.find(b.iova + 100, 10)).toEqual({ memory: b, offset: 100 });
    expect(arena.find(a.iova + 4000, 97)).toBeNull();
    expect(arena.find(a.iova - 1, 1)).toBeNull();
    expect(arena.find(2 ** 60, 1)).toBeNull();
  });

  it('works with or without huge pages, whichever the system has', () => {
    const device = new Device();
    const arena = open(device, { hugePages: true });
    const large = arena.allocate(3 * 1024 * 1024);
    const small = arena.allocate(4096);
    large.u8[large.size - 1] = 1;
    small.u8[0] = 1;
    expect(large.size % 4096).toBe(0);
    expect(small.size).toBe(4096);
    arena.free(large);
    arena.free(small);
    expect(device.mapped.size).toBe(0);
  });

  it('does not let the other side seal the file against writing', () => {
    const device = new Device();
    const arena = open(device);
    const memory = arena.allocate(4096);
    const { fd } = [...device.mapped.values()][0];
    for (const seal of [libc.Seal.futureWrite, libc.Seal.grow]) {
      expect(() => libc.fcntl(fd, libc.FcntlCommand.addSeals, seal)).toThrow(
        expect.objectContaining({ code: 'EPERM' }),
      );
    }
    arena.free(memory);
    expect(arena.allocate(2 ** 20).size).toBe(2 ** 20);
  });

  it('releases everything when it is closed, telling the device only if it is there', () => {
    const before = openDescriptors();
    const device = new Device();
    const arena = open(device);
    const memories = [arena.allocate(4096), arena.allocate(10000)];
    arena.close(true);
    expect(device.mapped.size).toBe(0);
    expect(memories.map((memory) => backing(memory.address))).toEqual(['', '']);
    expect(openDescriptors()).toBe(before);
    arena.close(true);
    arena.free(memories[0]);
    expect(() => arena.allocate(1)).toThrow(expect.objectContaining({ code: 'DMA_CLOSED' }));

    const gone = new Device();
    const other = open(gone);
    other.allocate(4096);
    other.close(false);
    expect(gone.calls).toBe(1);
  });

  it('releases everything even if the device refuses', () => {
    const device = new Device();
    const arena = open(device);
    const memories = [arena.allocate(4096), arena.allocate(4096)];
    device.refuse = true;
    arena.close(true);
    expect(memories.map((memory) => backing(memory.address))).toEqual(['', '']);
  });

  describe('with a file of the caller', () => {
    const files: number[] = [];
    afterEach(() => {
      for (const fd of files.splice(0)) libc.close(fd);
    });
    const file = (size = 0x10000) => {
      const fd = createMemoryFile(size);
      files.push(fd);
      return fd;
    };
    const refusal = (code: string) => expect.objectContaining({ code });

    it('gives the device that file, by a descriptor that outlives the one it was given', () => {
      const device = new Device();
      const arena = open(device);
      const fd = createMemoryFile(0x10000);
      const memory = arena.import(fd, 0x2000, 0x3000);
      const own = mapShared(fd, 0x2000, 0x3000, { write: true });
      libc.close(fd);
      const mapping = device.mapped.get(memory.iova);
      expect(mapping).toMatchObject({ size: 0x3000, offset: 0x2000, address: memory.address });
      expect(mapping?.fd).not.toBe(fd);
      own.u8[5] = 77;
      expect(memory.u8[5]).toBe(77);
      unmapMemory(own);
      expect(arena.find(memory.iova + 0x2fff, 1)).toEqual({ memory, offset: 0x2fff });
    });

    it('leaves nothing behind when it is given back, and not the file without its content', () => {
      const before = openDescriptors();
      const device = new Device();
      const arena = open(device);
      const fd = file();
      const memory = arena.import(fd, 0, 0x1000);
      memory.u8[0] = 5;
      arena.free(memory);
      expect(device.mapped.size).toBe(0);
      expect(openDescriptors()).toBe(before + 1);
      expect(memory.u8[0]).toBe(0);
      expect(arena.import(fd, 0, 0x1000).u8[0]).toBe(5);
    });

    it('closes its descriptor with everything else', () => {
      const before = openDescriptors();
      const arena = open(new Device());
      arena.import(file(), 0, 0x1000);
      arena.close(true);
      expect(openDescriptors()).toBe(before + 1);
      expect(() => arena.import(files[0], 0, 0x1000)).toThrow(refusal('DMA_CLOSED'));
    });

    it.each<[string, number, number]>([
      ['begins inside of a page', 1, 0x1000],
      ['ends inside of a page', 0, 0x1001],
      ['ends behind the file', 0xf000, 0x2000],
      ['begins behind the file', 0x20000, 0x1000],
      ['begins before the file', -0x1000, 0x1000],
      ['is empty', 0, 0],
      ['is no number', 0, Number.NaN],
      ['is more than 4 GiB', 0, 2 ** 32 + 0x1000],
    ])('refuses a part that %s', (_, offset, size) => {
      const before = openDescriptors();
      const device = new Device();
      expect(() => open(device).import(file(), offset, size)).toThrow(refusal('DMA_RANGE'));
      expect(device.calls).toBe(0);
      expect(openDescriptors()).toBe(before + 1);
    });

    it('refuses a part of which it has some already, until that is given back', () => {
      const arena = open(new Device());
      const fd = file();
      const memory = arena.import(fd, 0x1000, 0x2000);
      for (const offset of [0, 0x1000, 0x2000]) {
        expect(() => arena.import(fd, offset, 0x2000)).toThrow(refusal('DMA_OVERLAP'));
      }
      arena.import(fd, 0x3000, 0x1000);
      arena.import(file(), 0x1000, 0x2000);
      arena.free(memory);
      arena.import(fd, 0x1000, 0x2000);
    });

    it('refuses a file that may shrink, that cannot be written to, or that is none', () => {
      const arena = open(new Device());
      const unsealed = libc.memfdCreate('test', libc.MemfdFlag.allowSealing | libc.MemfdFlag.cloexec);
      files.push(unsealed);
      libc.ftruncate(unsealed, 0x1000);
      expect(() => arena.import(unsealed, 0, 0x1000)).toThrow(refusal('DMA_SEAL'));
      libc.fcntl(unsealed, libc.FcntlCommand.addSeals, libc.Seal.shrink | libc.Seal.futureWrite);
      expect(() => arena.import(unsealed, 0, 0x1000)).toThrow(refusal('DMA_SEAL'));
      expect(() => arena.import(1 << 20, 0, 0x1000)).toThrow(refusal('DMA_SEAL'));
      const plain = libc.open('/dev/null', libc.OpenFlag.readWrite | libc.OpenFlag.cloexec);
      files.push(plain);
      expect(() => arena.import(plain, 0, 0x1000)).toThrow(refusal('DMA_SEAL'));
    });

    it('changes nothing when the device refuses', () => {
      const before = openDescriptors();
      const device = new Device();
      const arena = open(device);
      device.refuse = true;
      const fd = file();
      expect(() => arena.import(fd, 0, 0x1000)).toThrow(refusal('DEVICE_REFUSED'));
      expect(openDescriptors()).toBe(before + 1);
      device.refuse = false;
      expect(arena.import(fd, 0, 0x1000).iova).toBe(0x10000);
    });
  });
});
