import { appendFileSync, mkdtempSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { inbound, key, outbound } from './support.ts';

const reuse = expect.objectContaining({ code: 'NONCE_REUSE' });
const invalid = expect.objectContaining({ code: 'NONCE_FILE_INVALID' });

const failed = expect.objectContaining({ code: 'NONCE_FILE_FAILED' });

const starting = (sequence: bigint, change: Partial<SecurityAssociation> = {}) =>
  outbound({ initial: { sequence }, ...change });

describe('the nonce guard', () => {
  let guard: NonceGuard;
  beforeEach(() => {
    guard = new NonceGuard({ memory: new NonceMemory() });
  });

  it('refuses a second SA with the key and salt of a live one, wherever either runs', () => {
    for (const first of ['inline', 'software'] as const) {
      for (const second of ['inline', 'software'] as const) {
        const fresh = new NonceGuard({ memory: new NonceMemory() });
        fresh.claim(outbound(), first);
        expect(() => fresh.claim(starting(1000n), second)).toThrow(reuse);
      }
    }
  });

  it('refuses to create an SA again that ran inline, even beyond the numbers it is known to have used', () => {
    guard.claim(outbound(), 'inline').release(5n);
    expect(() => guard.claim(outbound(), 'inline')).toThrow(reuse);
    expect(() => guard.claim(starting(1n << 31n), 'software')).toThrow(reuse);
  });

  it('refuses to move an SA that has sent in software into the device', () => {
    guard.claim(outbound(), 'software').release(2n);
    expect(() => guard.claim(outbound(), 'inline')).toThrow(reuse);
  });

  it('lets a software SA come back behind the last nonce and not before it', () => {
    guard.claim(outbound(), 'software').release(100n);
    expect(() => guard.claim(starting(99n), 'software')).toThrow(reuse);
    guard.claim(starting(100n), 'software').release(200n);
    expect(() => guard.claim(starting(100n), 'software')).toThrow(reuse);
    expect(() => guard.claim(starting(200n), 'software')).not.toThrow();
  });

  it('knows that counter blocks of CCM are those of GCM with another salt', () => {
    const name = (what: 'aes-ccm' | 'aes-gcm', salt: Uint8Array) =>
      outbound({ aead: { name: what, key: key(16), salt, icvLength: 16 } });
    guard.claim(name('aes-ccm', Uint8Array.of(7, 8, 9)), 'software').release(5n);
    expect(() => guard.claim(name('aes-gcm', Uint8Array.of(3, 7, 8, 9)), 'software')).toThrow(reuse);
    expect(() => guard.claim(name('aes-gcm', Uint8Array.of(4, 7, 8, 9)), 'software')).not.toThrow();
  });

  it('does not take an initial IV for the IVs of a device that uses sequence numbers', () => {
    guard.claim(outbound(), 'software').release(100n);
    const iv = Uint8Array.of(0, 0, 0, 0, 0, 0, 1, 0);
    const again = outbound({ initial: { sequence: 1n, iv } });
    const claim = guard.claim(again, 'software');
    expect(() => claim.checkMove(again, 'inline-sequence', null)).toThrow(reuse);
    expect(() => claim.checkMove(again, 'software', null)).not.toThrow();
  });

  it('counts explicit IVs where an SA starts with one, and refuses a range that would wrap into used ones', () => {
    const iv = (last: number) => Uint8Array.of(0, 0, 0, 0, 0, 0, 1, last);
    const from = (bytes: Uint8Array, sequence = 1n) => outbound({ initial: { sequence, iv: bytes } });
    guard.claim(from(iv(0)), 'software').release(11n);
    expect(() => guard.claim(from(iv(9)), 'software')).toThrow(reuse);
    expect(() => guard.claim(starting(11n), 'software')).toThrow(reuse);
    expect(() => guard.claim(from(new Uint8Array(8).fill(0xff)), 'software')).toThrow(reuse);
    expect(() => guard.claim(from(iv(10)), 'software')).not.toThrow();
  });

  it('takes all nonces for used when nobody knows how many were', () => {
    guard.claim(outbound(), 'software').release();
    expect(() => guard.claim(starting(0xffffffffn), 'software')).toThrow(reuse);
  });

  it('forgets a claim that came to nothing', () => {
    guard.claim(outbound(), 'inline').cancel();
    const again = guard.claim(outbound(), 'software');
    again.release(10n);
    again.cancel();
    expect(() => guard.claim(outbound(), 'software')).toThrow(reuse);
  });

  it('lets an SA move that has sent nothing, and to nowhere with what it has sent', () => {
    const claim = guard.claim(outbound(), 'software');
    expect(() => claim.checkMove(outbound(), 'inline', 2n)).toThrow(reuse);
    claim.checkMove(outbound(), 'inline', null);
    claim.move(outbound(), 'inline', null);
    expect(() => claim.checkMove(starting(1n << 31n), 'software', 1n << 64n)).toThrow(reuse);
    claim.checkMove(outbound(), 'software', null);
    claim.move(outbound(), 'software', null);
    claim.release(7n);
    expect(() => guard.claim(starting(6n), 'software')).toThrow(reuse);
    guard.claim(starting(7n), 'software').cancel();
  });

  it('takes every nonce for used when an SA ends in the device that it moved to', () => {
    const claim = guard.claim(outbound(), 'software');
    claim.move(outbound(), 'inline', null);
    claim.release(7n);
    expect(() => guard.claim(starting(0xffffffffn), 'software')).toThrow(reuse);
  });

  it('remembers what was sent in software when the SA leaves the device without a packet', () => {
    const claim = guard.claim(outbound(), 'software');
    claim.checkMove(starting(100n), 'inline-sequence', 7n);
    claim.move(starting(100n), 'inline-sequence', 7n);
    claim.cancel();
    expect(() => guard.claim(outbound(), 'inline')).toThrow(reuse);
    expect(() => guard.claim(starting(6n), 'software')).toThrow(reuse);
    guard.claim(starting(7n), 'software').cancel();
  });

  it('remembers at a move what an SA before had used', () => {
    guard.claim(outbound(), 'software').release(10n);
    const claim = guard.claim(starting(10n), 'software');
    expect(() => claim.checkMove(outbound(), 'inline', null)).toThrow(reuse);
    expect(() => claim.checkMove(starting(9n), 'inline-sequence', null)).toThrow(reuse);
    claim.checkMove(starting(10n), 'inline-sequence', null);
  });

  it('sees one key behind GCM, GMAC and CTR', () => {
    const salt = key(4, 0x50);
    guard.claim(outbound(), 'inline');
    const ctr = { name: 'aes-ctr', key: key(16), salt } as const;
    const auth = { name: 'hmac-sha1', key: key(20), icvLength: 12 } as const;
    expect(() => guard.claim(outbound({ cipher: ctr, auth }), 'software')).toThrow(reuse);
    const gmac = { name: 'aes-gmac', key: key(16), salt, icvLength: 16 } as const;
    expect(() => guard.claim(outbound({ aead: gmac }), 'software')).toThrow(reuse);
    expect(() => guard.claim(outbound({ protocol: 'ah', auth: gmac }), 'software')).toThrow(reuse);
  });

  it('has nothing against another salt, inbound SAs and random IVs', () => {
    const other = { name: 'aes-gcm', key: key(16), salt: key(4, 0x51), icvLength: 16 } as const;
    const cbc = {
      cipher: { name: 'aes-cbc', key: key(16) } as const,
      auth: { name: 'hmac-sha1', key: key(20), icvLength: 12 } as const,
    };
    for (const sa of [outbound(), outbound({ aead: other }), inbound(), inbound(), outbound(cbc), outbound(cbc)]) {
      expect(() => guard.claim(sa, 'inline')).not.toThrow();
    }
  });

  it('is shared by the whole process unless a test says otherwise', () => {
    const aead = {
      name: 'aes-gcm',
      key: crypto.getRandomValues(new Uint8Array(16)),
      salt: key(4),
      icvLength: 16,
    } as const;
    new NonceGuard().claim(outbound({ aead }), 'inline');
    expect(() => new NonceGuard().claim(outbound({ aead }), 'inline')).toThrow(reuse);
  });
});

describe('the nonce guard with a file', () => {
  let directory: string;
  let path: string;
  const process = () => new NonceGuard({ path, memory: new NonceMemory() });
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'nonce-guard-'));
    path = join(directory, 'nonces');
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  it('refuses after a crash what was in use before it', () => {
    process().claim(outbound(), 'software');
    expect(() => process().claim(starting(1000n), 'software')).toThrow(reuse);
  });

  it('remembers what an earlier process used up to', () => {
    process().claim(outbound(), 'software').release(50n);
    expect(() => process().claim(starting(49n), 'software')).toThrow(reuse);
    expect(() => process().claim(outbound(), 'inline')).toThrow(reuse);
    expect(() => process().claim(starting(50n), 'software')).not.toThrow();
  });

  it('gives a key to one of two processes that ask at the same time', () => {
    const [one, other] = [process(), process()];
    one.claim(outbound(), 'inline');
    expect(() => other.claim(outbound(), 'inline')).toThrow(reuse);
  });

  it('forgets a claim that came to nothing, and keeps what was before it', () => {
    process().claim(outbound(), 'inline').cancel();
    process().claim(outbound(), 'software').release(7n);
    process().claim(starting(7n), 'software').cancel();
    expect(() => process().claim(starting(6n), 'software')).toThrow(reuse);
    expect(() => process().claim(starting(7n), 'software')).not.toThrow();
  });

  it('skips a line that a crash cut short', () => {
    const guard = process();
    const line = `claim ${'a'.repeat(32)} ${'b'.repeat(16)} .`;
    for (let cut = 0; cut < line.length; cut++) appendFileSync(path, `\n${line.slice(0, cut)}`);
    guard.claim(outbound(), 'software').release(9n);
    expect(() => process().claim(starting(8n), 'software')).toThrow(reuse);
    expect(() => process().claim(starting(9n), 'software')).not.toThrow();
  });

  it('grants nothing with a file that is not its own', () => {
    writeFileSync(path, 'something else\n');
    expect(() => process()).toThrow(invalid);
    rmSync(path);
    const guard = process();
    appendFileSync(path, 'nonsense\n');
    expect(() => process()).toThrow(invalid);
    expect(() => guard.claim(outbound(), 'inline')).toThrow(invalid);
    rmSync(path);
    symlinkSync(join(directory, 'elsewhere'), path);
    expect(() => process()).toThrow(failed);
  });

  it('writes no key, and lets nobody else read the file', () => {
    process().claim(outbound(), 'software').release(2n);
    const text = readFileSync(path, 'latin1');
    expect(text).not.toContain(Buffer.from(key(16)).toString('hex'));
    expect(statSync(path).mode & 0o777).toBe(0o600);
  });
});
