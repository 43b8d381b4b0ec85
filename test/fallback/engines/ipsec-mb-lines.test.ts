import { describe, expect, it } from 'vitest';
import { KeySlot } from '../../../src/fallback/engines/ipsec-mb-keys.ts';
import { type KeyLines, keyLines } from '../../../src/fallback/engines/ipsec-mb-lines.ts';
import { TRANSFORMS, transformById } from '../../../src/fallback/engines/transform.ts';

/** What AVX-512 code of libipsec-mb 1.3 fills of `gcm_key_data`, and what SSE code does. */
const LARGE = 1008;
const SMALL = 496;

/** The cache lines that a text of so many bytes reads, in order. */
function linesOf(runs: KeyLines, length: number): number[] {
  const lines: number[] = [];
  for (const { word, tail, lines: count, from } of runs) {
    if (from > length) break;
    const head = count === 5 ? 3 : count;
    for (let i = 0; i < head; i++) lines.push(word / 16 + i);
    if (count === 5) lines.push(tail / 16, tail / 16 + 1);
  }
  return lines;
}

function ofId(id: string, encrypting: boolean, gcmEnd = LARGE): KeyLines {
  const transform = transformById(id);
  if (transform === undefined) throw new Error(`no transform ${id}`);
  return keyLines(transform, encrypting, gcmEnd);
}

describe('the cache lines of a key slot that are read ahead', () => {
  it('are the round keys and the lowest powers of the hash key for a short text with AES-GCM', () => {
    expect(linesOf(ofId('aes-128-gcm-16', true), 68)).toEqual([0, 1, 2, 14, 15]);
    expect(linesOf(ofId('aes-256-gcm-16', false), 68)).toEqual([0, 1, 2, 3, 14, 15]);
    expect(linesOf(ofId('aes-128-gmac-16', true), 0)).toEqual([0, 1, 2, 14, 15]);
  });

  it('are all of the slot, each once, for a long text', () => {
    const all = Array.from({ length: Math.ceil(LARGE / 64) }, (_, i) => i);
    for (const id of ['aes-128-gcm-16', 'aes-192-gcm-16', 'aes-256-gcm-16']) {
      expect(
        linesOf(ofId(id, true), 9000).sort((a, b) => a - b),
        id,
      ).toEqual(all);
    }
  });

  it('grow with the text, a line for each 64 bytes that it has more', () => {
    const count = (length: number) => linesOf(ofId('aes-128-gcm-16', true), length).length;
    expect([95, 96, 351, 352, 607, 608].map(count)).toEqual([5, 9, 9, 13, 13, 16]);
  });

  it('are the few that there are where the library keeps few powers', () => {
    expect(linesOf(ofId('aes-128-gcm-16', true, SMALL), 9000)).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
  });

  it('are the schedule of the direction and both hashes for AES-CBC with HMAC', () => {
    expect(linesOf(ofId('aes-128-cbc+hmac-sha256-16', true), 64)).toEqual([0, 1, 2, 8, 9]);
    expect(linesOf(ofId('aes-128-cbc+hmac-sha256-16', false), 64)).toEqual([4, 5, 6, 8, 9]);
  });

  it('exist for every transform, and never lie outside of the slot', () => {
    for (const transform of TRANSFORMS) {
      for (const encrypting of [true, false]) {
        const lines = linesOf(keyLines(transform, encrypting, LARGE), 9000);
        expect(lines.length, transform.id).toBeGreaterThan(0);
        const end = transform.cipher === 'aes-gcm' || transform.auth === 'aes-gmac' ? 1024 : KeySlot.end;
        expect(Math.max(...lines) * 64, transform.id).toBeLessThan(end);
      }
    }
  });
});
