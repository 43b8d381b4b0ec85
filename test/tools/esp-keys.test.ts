import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { validateSa } from '../../src/ipsec/validate.ts';
import { espKeys, espKeysLine, writeEspKeys } from '../../tools/esp-keys.ts';

const key = '000102030405060708090a0b0c0d0e0f';
const gcm = { name: 'aes-gcm', key, salt: 'a0a1a2a3' };
const tunnel = { source: '192.0.2.1', destination: '192.0.2.2' };
const base = { direction: 'outbound', mode: 'tunnel', spi: 0x1000, tunnel };
const sha1 = { name: 'hmac-sha1', key: 'bb'.repeat(20) };

describe('a line for Wireshark', () => {
  // The columns and names are those of Wireshark 4.0's table esp_sa.
  test.each([
    [
      { ...base, aead: { ...gcm, icvLength: 12 } },
      `"IPv4","192.0.2.1","192.0.2.2","0x00001000","AES-GCM with 12 octet ICV [RFC4106]","0x${key}a0a1a2a3","NULL",""`,
    ],
    [
      {
        ...base,
        tunnel: { source: '2001:db8::1', destination: '2001:db8::2' },
        cipher: { name: 'aes-cbc', key },
        auth: sha1,
      },
      `"IPv6","2001:db8::1","2001:db8::2","0x00001000","AES-CBC [RFC3602]","0x${key}","HMAC-SHA-1-96 [RFC2404]","0x${'bb'.repeat(20)}"`,
    ],
    [
      {
        ...base,
        mode: 'transport',
        tunnel: undefined,
        selector: { destination: '10.0.0.2', source: '10.0.0.0/8' },
        cipher: { name: 'aes-ctr', key, salt: 'a0a1a2a3' },
        auth: { name: 'aes-cmac', key },
      },
      `"IPv4","*","10.0.0.2","0x00001000","AES-CTR [RFC3686]","0x${key}a0a1a2a3","ANY 96 bit authentication [no checking]",""`,
    ],
    [
      { ...base, cipher: { name: 'null' }, auth: { name: 'hmac-sha256', key: 'cc'.repeat(32) } },
      `"IPv4","192.0.2.1","192.0.2.2","0x00001000","NULL","","HMAC-SHA-256-128 [RFC4868]","0x${'cc'.repeat(32)}"`,
    ],
  ])('has addresses, SPI, algorithms and keys (%#)', (sa, line) => {
    expect(espKeysLine(validateSa(sa))).toBe(line);
  });

  test('is not there for what Wireshark cannot decrypt', () => {
    const ccm = { ...base, aead: { ...gcm, name: 'aes-ccm', salt: 'a0a1a2' } };
    const ah = { ...base, protocol: 'ah', auth: sha1 };
    expect(espKeys([validateSa(ccm), validateSa({ ...ah, spi: 7 })])).toEqual({
      lines: [],
      skipped: ['0x1000', '0x7'],
    });
  });

  test('is given for both families when the SA has no address', () => {
    const sa = validateSa({ ...base, mode: 'transport', tunnel: undefined, aead: gcm });
    expect(espKeys([sa]).lines.map((line) => line.slice(0, 14))).toEqual(['"IPv4","*","*"', '"IPv6","*","*"']);
  });
});

test('a decryption file is readable by its owner only, even when it was there before', () => {
  const folder = mkdtempSync(join(tmpdir(), 'vipsec-keys-'));
  try {
    const path = join(folder, 'esp_sa');
    writeFileSync(path, 'old', { mode: 0o666 });
    expect(writeEspKeys(path, [validateSa({ ...base, aead: gcm })])).toEqual([]);
    expect(statSync(path).mode & 0o777).toBe(0o600);
    expect(readFileSync(path, 'utf8')).toMatch(/^"IPv4",.*\n$/);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
