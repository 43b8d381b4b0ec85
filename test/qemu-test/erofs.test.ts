import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ErofsWriter } from '../../qemu-test/image/erofs.ts';

const BLOCK = 4096;

let scratch: string;
beforeAll(() => {
  scratch = mkdtempSync(join(tmpdir(), 'vipsec-erofs-test-'));
});
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

interface Found {
  readonly mode: number;
  readonly links: number;
  readonly content: string;
}

/**
 * Reads a file system as fs/erofs of the kernel does: the superblock, the root's inode, entries block by block. Whether Linux itself takes
 * one is seen in every guest, which boots from it.
 */
function readErofs(bytes: Buffer): Map<string, Found> {
  const superblock = bytes.subarray(1024);
  expect(superblock.readUInt32LE(0)).toBe(0xe0f5e1e2);
  expect(superblock[12]).toBe(12);
  expect(superblock.readUInt32LE(36) * BLOCK).toBe(bytes.length);
  expect(superblock.readUInt32LE(80)).toBe(0);
  const table = superblock.readUInt32LE(40) * BLOCK;
  const found = new Map<string, Found>();
  const visit = (nid: number, path: string, parent: number): void => {
    const inode = bytes.subarray(table + 32 * nid, table + 32 * nid + 32);
    expect(inode.readUInt16LE(0)).toBe(0);
    const [mode, size, start] = [inode.readUInt16LE(4), inode.readUInt32LE(8), inode.readUInt32LE(16) * BLOCK];
    const content = bytes.subarray(start, start + size);
    expect(content.length).toBe(size);
    const isFolder = mode >> 12 === 4;
    found.set(path, { mode, links: inode.readUInt16LE(6), content: isFolder ? '' : content.toString() });
    if (!isFolder) return;
    const names: Buffer[] = [];
    for (let at = 0; at < size; at += BLOCK) {
      const block = content.subarray(at, at + BLOCK);
      const count = block.readUInt16LE(8) / 12;
      for (let i = 0; i < count; i++) {
        const begin = block.readUInt16LE(12 * i + 8);
        const limit = i + 1 < count ? block.readUInt16LE(12 * i + 20) : block.length;
        const zero = block.subarray(begin, limit).indexOf(0);
        const name = block.subarray(begin, zero < 0 ? limit : begin + zero);
        names.push(name);
        const child = block.readUInt32LE(12 * i);
        if (name.toString() === '.') expect(child).toBe(nid);
        else if (name.toString() === '..') expect(child).toBe(parent);
        else {
          visit(child, `${path}/${name}`, nid);
          expect(block[12 * i + 10]).toBe({ 4: 2, 8: 1, 10: 7 }[(found.get(`${path}/${name}`)?.mode ?? 0) >> 12]);
        }
      }
    }
    // The kernel looks a name up by halving.
    expect(names).toEqual([...names].sort(Buffer.compare));
    expect(names.length).toBeGreaterThanOrEqual(2);
  };
  visit(superblock.readUInt16LE(14), '', superblock.readUInt16LE(14));
  expect(Number(superblock.readBigUInt64LE(16))).toBe(found.size);
  return found;
}

async function write(fill: (archive: ErofsWriter) => Promise<void>): Promise<Map<string, Found>> {
  const path = join(scratch, 'base.erofs');
  const archive = await ErofsWriter.create(path);
  await fill(archive);
  await archive.end();
  return readErofs(readFileSync(path));
}

describe('the file system of the base', () => {
  it('holds files, links and folders with their modes', async () => {
    const source = join(scratch, 'source');
    writeFileSync(source, 'copied', { mode: 0o640 });
    const found = await write(async (archive) => {
      await archive.file('etc/empty', '', 0o600);
      await archive.copy('usr/bin/tool', source);
      await archive.link('bin/sh', 'busybox');
      await archive.folder('usr/lib');
    });
    const shown = [...found].map(([path, { mode, links, content }]) => [path, mode.toString(8), links, content]);
    expect(shown.sort()).toEqual([
      ['', '40755', 5, ''],
      ['/bin', '40755', 2, ''],
      ['/bin/sh', '120777', 1, 'busybox'],
      ['/etc', '40755', 2, ''],
      ['/etc/empty', '100600', 1, ''],
      ['/usr', '40755', 4, ''],
      ['/usr/bin', '40755', 2, ''],
      ['/usr/bin/tool', '100640', 1, 'copied'],
      ['/usr/lib', '40755', 2, ''],
    ]);
  });

  it('takes the first of two files with one path', async () => {
    const found = await write(async (archive) => {
      await archive.file('a', 'first');
      await archive.file('a', 'second');
    });
    expect(found.get('/a')?.content).toBe('first');
  });

  it('refuses a file in what is no folder', async () => {
    await expect(
      write(async (archive) => {
        await archive.file('a', '');
        await archive.file('a/b', '');
      }),
    ).rejects.toThrow('a is no folder');
  });

  it('gives back whatever was put in, in folders of one block and of many', async () => {
    const name = fc.string({ minLength: 1, maxLength: 60 }).filter((text) => !/[/\0]|^\.{1,2}$/.test(text));
    const size = fc.oneof(fc.constantFrom(0, 1, BLOCK - 1, BLOCK, BLOCK + 1), fc.nat(3 * BLOCK));
    const files = fc.dictionary(name, size, { maxKeys: 200, noNullPrototype: true });
    await fc.assert(
      fc.asyncProperty(files, async (wanted) => {
        const found = await write(async (archive) => {
          for (const [path, bytes] of Object.entries(wanted)) await archive.file(`folder/${path}`, 'x'.repeat(bytes));
        });
        for (const [path, bytes] of Object.entries(wanted)) {
          expect(found.get(`/folder/${path}`)?.content).toBe('x'.repeat(bytes));
        }
      }),
      { numRuns: 20 },
    );
  });
});
