import { mkdirSync, mkdtempSync, readdirSync, rmSync, utimesSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { removeUnused } from '../../qemu-test/fetch/cache.ts';

let cache: string;
beforeEach(() => {
  cache = mkdtempSync(join(tmpdir(), 'vipsec-cache-test-'));
});
afterEach(() => rmSync(cache, { recursive: true, force: true }));

describe('the cache', () => {
  it('keeps of one kind of entry those that were used last, and all others', async () => {
    for (const [i, name] of ['base-1', 'base-2', 'base-3', 'base-4', 'base-5.unfinished', 'kernel'].entries()) {
      mkdirSync(join(cache, name));
      utimesSync(join(cache, name), 1000 + i, 1000 + i);
    }
    await removeUnused(cache, 'base-1', 2);
    expect(readdirSync(cache).sort()).toEqual(['base-1', 'base-4', 'base-5.unfinished', 'kernel']);
  });

  it('keeps what another run may still boot from', async () => {
    for (const name of ['base-1', 'base-2', 'base-3']) mkdirSync(join(cache, name));
    utimesSync(join(cache, 'base-3'), 1000, 1000);
    await removeUnused(cache, 'base-1', 1);
    expect(readdirSync(cache).sort()).toEqual(['base-1', 'base-2']);
  });
});
