import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { VfioError } from '../../src/errors.ts';
import { readU32, readU64 } from '../../src/sys/little-endian.ts';
import { joined, VhostUserMemory } from '../../src/virtio/vhost-user-memory.ts';
import { Header, Request } from '../../src/virtio/vhost-user-protocol.ts';

const PAGE = 0x1000;

/** A session that remembers what it was told, and refuses when it is asked to. */
class FakeSession {
  readonly told: { request: number; regions: number; sizes: number[]; descriptors: readonly number[] }[] = [];
  refuse = false;

  check(): void {}

  settle(): void {}

  tell(message: Uint8Array, descriptors: readonly number[] = []): void {
    if (this.refuse) throw new VfioError('DEVICE_REFUSED', 'no');
    const request = readU32(message, 0);
    const regions = request === Request.SET_MEM_TABLE ? readU32(message, Header.length) : 1;
    const sizes = Array.from({ length: regions }, (_, i) => readU64(message, Header.length + 8 + 32 * i + 8));
    this.told.push({ request, regions, sizes, descriptors });
  }
}

/** Mappings that cannot be joined: address and offset run in opposite directions. */
const mapping = (i: number) => ({ iova: (16 + i) * PAGE, size: PAGE, address: 0, fd: 5, offset: (100 - i) * PAGE });

describe('memory that a vhost-user back-end is told of', () => {
  it('fills a table of eight regions and no more, and what does not fit leaves nothing behind', () => {
    const session = new FakeSession();
    const memory = new VhostUserMemory(session, 0, false);
    memory.publish();
    for (let i = 0; i < 8; i++) memory.map(mapping(i));
    expect(session.told.map(({ regions }) => regions)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
    expect(() => memory.map(mapping(8))).toThrow(expect.objectContaining({ code: 'DMA_EXHAUSTED' }));
    memory.unmap(mapping(3));
    memory.map(mapping(8));
    expect(session.told.slice(8).map(({ regions }) => regions)).toEqual([7, 8]);
  });

  it('fails before the rings start when it does not fit', () => {
    const memory = new VhostUserMemory(new FakeSession(), 0, false);
    for (let i = 0; i < 9; i++) memory.map(mapping(i));
    expect(() => memory.publish()).toThrow(expect.objectContaining({ code: 'DMA_EXHAUSTED' }));
  });

  it('is told again after it was refused', () => {
    const session = new FakeSession();
    const memory = new VhostUserMemory(session, 0, false);
    memory.publish();
    memory.map(mapping(0));
    session.refuse = true;
    expect(() => memory.map(mapping(1))).toThrow(expect.objectContaining({ code: 'DEVICE_REFUSED' }));
    session.refuse = false;
    memory.map(mapping(1));
    expect(session.told.map(({ regions }) => regions)).toEqual([1, 2]);
  });

  it('is never an empty table, and is not told twice', () => {
    const session = new FakeSession();
    const memory = new VhostUserMemory(session, 0, false);
    memory.publish();
    memory.map(mapping(0));
    memory.publish();
    memory.unmap(mapping(0));
    expect(session.told).toEqual([{ request: Request.SET_MEM_TABLE, regions: 1, sizes: [PAGE], descriptors: [5] }]);
  });

  it('replaces a slot whose memory has changed while no ring ran', () => {
    const session = new FakeSession();
    const memory = new VhostUserMemory(session, 4, false);
    memory.map(mapping(0));
    memory.map(mapping(1));
    memory.publish();
    memory.withdraw();
    memory.unmap(mapping(0));
    memory.map({ ...mapping(0), size: PAGE / 2 });
    memory.publish();
    expect(session.told.map(({ request, sizes }) => [request, ...sizes])).toEqual([
      [Request.ADD_MEM_REG, PAGE],
      [Request.ADD_MEM_REG, PAGE],
      [Request.REM_MEM_REG, PAGE],
      [Request.ADD_MEM_REG, PAGE / 2],
    ]);
    expect(session.told.map(({ descriptors }) => descriptors.length)).toEqual([1, 1, 0, 1]);
  });
});

describe('joining regions', () => {
  it('covers the same bytes of the same files with a region for each place where address and file part ways', () => {
    const piece = fc.record({
      pages: fc.integer({ min: 1, max: 4 }),
      gap: fc.nat({ max: 2 }),
      fileGap: fc.nat({ max: 2 }),
      fd: fc.integer({ min: 3, max: 4 }),
    });
    const pieces = fc.array(piece, { minLength: 1, maxLength: 20 });
    const keys = fc.array(fc.nat(), { minLength: 20, maxLength: 20 });
    fc.assert(
      fc.property(pieces, keys, (list, order) => {
        let guestAddress = 16 * PAGE;
        let offset = 0;
        const regions = list.map(({ pages, gap, fileGap, fd }) => {
          guestAddress += gap * PAGE;
          offset += fileGap * PAGE;
          const made = { guestAddress, userAddress: guestAddress, size: pages * PAGE, fd, offset };
          guestAddress += made.size;
          offset += made.size;
          return made;
        });
        const expected = list.filter(
          ({ gap, fileGap, fd }, i) => i === 0 || gap !== fileGap || fd !== list[i - 1].fd,
        ).length;
        const shuffled = regions.map((one, i) => ({ one, key: order[i] })).sort((a, b) => a.key - b.key);
        const result = joined(shuffled.map(({ one }) => one));
        expect(result).toHaveLength(expected);
        for (const { guestAddress: at, size, fd, offset: start } of regions) {
          const holder = result.find((one) => at >= one.guestAddress && at + size <= one.guestAddress + one.size);
          expect(holder?.fd).toBe(fd);
          expect((holder?.offset ?? 0) + at - (holder?.guestAddress ?? 0)).toBe(start);
        }
        for (const [i, { guestAddress: at }] of result.entries()) {
          const before = result[i - 1];
          if (before !== undefined) expect(before.guestAddress + before.size).toBeLessThanOrEqual(at);
        }
      }),
    );
  });
});
