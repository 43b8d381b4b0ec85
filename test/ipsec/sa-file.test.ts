import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { inspect } from 'node:util';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { InputError } from '../../src/errors.ts';
import { loadSaFile } from '../../src/ipsec/sa-file.ts';

const key = 'deadbeef'.repeat(4);
const sa = {
  direction: 'outbound',
  mode: 'transport',
  spi: 256,
  aead: { name: 'aes-gcm', key, salt: '01020304' },
};

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-sa-'));
});
afterAll(() => {
  rmSync(folder, { recursive: true, force: true });
});

function file(content: string | Uint8Array, mode = 0o600): string {
  const path = join(folder, 'sa.json');
  writeFileSync(path, content);
  chmodSync(path, mode);
  return path;
}

function failure(path: string): InputError {
  try {
    loadSaFile(path);
  } catch (error) {
    if (error instanceof InputError) return error;
    throw error;
  }
  throw new Error('the file was accepted');
}

describe('an SA file', () => {
  test('gives its SAs in order', () => {
    const second = { ...sa, spi: 257, aead: { ...sa.aead, salt: '05060708' } };
    const { sas, warnings } = loadSaFile(file(JSON.stringify({ sas: [sa, second] })));
    expect(sas.map(({ spi }) => spi)).toEqual([256, 257]);
    expect(warnings).toEqual([]);
  });

  test.each([0o640, 0o604, 0o666])('that others can access (mode %o) is used with a warning', (mode) => {
    const path = file(JSON.stringify({ sas: [sa] }), mode);
    expect(loadSaFile(path).warnings).toEqual([expect.stringContaining(path)]);
  });

  test('that is wrong names file, field and code', () => {
    const path = file(JSON.stringify({ sas: [{ ...sa, spi: 0 }] }));
    const error = failure(path);
    expect(error.code).toBe('SA_VALUE');
    expect(error.message).toBe(`${path}: sas[0].spi: must be from 1 to 4294967295`);
  });

  test('that is not JSON is refused without quoting it', () => {
    const error = failure(file(`{"sas":[{"aead":{"key":"${key}" oops`));
    expect(error.code).toBe('SA_FILE_JSON');
    expect(inspect(error, { depth: 9 })).not.toContain('deadbeef');
    expect(failure(file(Uint8Array.of(0xff, 0xfe, 0x7b))).code).toBe('SA_FILE_JSON');
    expect(failure(file('')).code).toBe('SA_FILE_JSON');
  });

  test('that is absent, or a folder, is refused', () => {
    expect(failure(join(folder, 'absent')).code).toBe('SA_FILE_UNREADABLE');
    expect(failure(folder).code).toBe('SA_FILE_UNREADABLE');
  });

  test('that never ends is refused', () => {
    expect(failure('/dev/zero').code).toBe('SA_FILE_TOO_LARGE');
  });
});
