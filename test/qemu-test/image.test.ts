import { createWriteStream, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CpioWriter } from '../../qemu-test/image/cpio.ts';
import { moduleInformation } from '../../qemu-test/image/modules.ts';

let scratch: string;
beforeAll(() => {
  scratch = mkdtempSync(join(tmpdir(), 'vipsec-image-test-'));
});
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

interface Entry {
  readonly name: string;
  readonly mode: number;
  readonly inode: number;
  readonly content: string;
}

/** Reads an archive as the kernel does (init/initramfs.c): 13 hexadecimal numbers, everything on 4 bytes. */
function readCpio(bytes: Buffer): Entry[] {
  const entries: Entry[] = [];
  for (let at = 0; at < bytes.length; ) {
    expect(bytes.toString('latin1', at, at + 6)).toBe('070701');
    const field = (n: number) => Number.parseInt(bytes.toString('latin1', at + 6 + 8 * n, at + 14 + 8 * n), 16);
    const [inode, mode, size, nameSize] = [field(0), field(1), field(6), field(11)];
    const name = bytes.toString('utf8', at + 110, at + 110 + nameSize - 1);
    expect(bytes[at + 110 + nameSize - 1]).toBe(0);
    const body = Math.ceil((at + 110 + nameSize) / 4) * 4;
    if (name === 'TRAILER!!!') return entries;
    entries.push({ name, mode, inode, content: bytes.toString('utf8', body, body + size) });
    at = Math.ceil((body + size) / 4) * 4;
  }
  throw new Error('no end');
}

async function write(fill: (archive: CpioWriter) => Promise<void>): Promise<Entry[]> {
  const path = join(scratch, 'archive.cpio');
  const archive = new CpioWriter(createWriteStream(path));
  await fill(archive);
  await archive.end();
  return readCpio(readFileSync(path));
}

describe('the initramfs', () => {
  it('holds files, links and folders with their modes, each inode once', async () => {
    const source = join(scratch, 'source');
    writeFileSync(source, 'copied', { mode: 0o640 });
    const entries = await write(async (archive) => {
      await archive.file('init', '#!/bin/sh\n', 0o755);
      await archive.copy('usr/bin/tool', source);
      await archive.link('bin/sh', 'busybox');
    });
    expect(entries.map(({ name, mode, content }) => [name, mode.toString(8), content])).toEqual([
      ['init', '100755', '#!/bin/sh\n'],
      ['usr', '40755', ''],
      ['usr/bin', '40755', ''],
      ['usr/bin/tool', '100640', 'copied'],
      ['bin', '40755', ''],
      ['bin/sh', '120777', 'busybox'],
    ]);
    expect(new Set(entries.map(({ inode }) => inode)).size).toBe(entries.length);
  });

  it('keeps its alignment for names and contents of every length', async () => {
    const sizes = [0, 1, 2, 3, 4, 5, 4095, 4096];
    const entries = await write(async (archive) => {
      for (const size of sizes) await archive.file('n'.repeat(size % 7 === 0 ? 1 : size % 7) + size, 'x'.repeat(size));
    });
    expect(entries.map(({ content }) => content.length)).toEqual(sizes);
  });

  it('takes the first of two files with one path', async () => {
    const entries = await write(async (archive) => {
      await archive.file('a', 'first');
      await archive.file('a', 'second');
    });
    expect(entries).toMatchObject([{ name: 'a', content: 'first' }]);
  });
});

describe('what a kernel module says about itself', () => {
  const module = (...lines: string[]) => Buffer.from(`\x7fELF\0\0${lines.join('\0')}\0.modinfo\0`);

  it('names its dependencies, and what is to come before it, with underscores', () => {
    const content = module('depends=vfio,vfio-iommu-type1', 'softdep=pre: crypto-gcm aes post: other', 'license=GPL');
    expect(moduleInformation(content)).toMatchObject({
      depends: ['vfio', 'vfio_iommu_type1'],
      before: ['crypto_gcm', 'aes'],
    });
  });

  it('has none when the list is empty', () => {
    expect(moduleInformation(module('depends=', 'alias=pci:v1d2')).depends).toEqual([]);
  });

  it('gives its aliases', () => {
    expect(moduleInformation(module('alias=virtio:d00000001v*', 'alias=net-pf-16')).aliases).toEqual([
      'virtio:d00000001v*',
      'net-pf-16',
    ]);
  });
});
