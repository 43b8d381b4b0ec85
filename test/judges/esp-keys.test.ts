/** The decryption files of `vipsec esp --esp-keys`, judged by tshark: does it decrypt what we wrote, and only with the right key? */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { validateSas } from '../../src/ipsec/validate.ts';
import { CaptureReader, CaptureWriter } from '../../src/packet/capture-file.ts';
import { askTshark } from '../../tools/demo/tshark.ts';
import { writeEspKeys } from '../../tools/esp-keys.ts';
import { EspPipeline } from '../../tools/esp-pipeline.ts';

const data = fileURLToPath(new URL('../data/', import.meta.url));
let folder = '';
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-judge-'));
});
afterEach(() => {
  rmSync(folder, { recursive: true });
});

const hex = (length: number): string => Array.from({ length }, (_, i) => (i + 16).toString(16)).join('');
const base = { direction: 'outbound', mode: 'tunnel', spi: 0x1001 };
const v4 = { tunnel: { source: '192.0.2.1', destination: '192.0.2.2' } };
const v6 = { tunnel: { source: '2001:db8::1', destination: '2001:db8::2' } };
const sha1 = { auth: { name: 'hmac-sha1', key: hex(20) } };
const sha256 = { auth: { name: 'hmac-sha256', key: hex(32) } };
const sha384 = { auth: { name: 'hmac-sha384', key: hex(48) } };
const sha512 = { auth: { name: 'hmac-sha512', key: hex(64) } };
const gcm = (length: number, icvLength: number) => ({
  aead: { name: 'aes-gcm', key: hex(length), salt: hex(4), icvLength },
});

test.each([
  ['AES-128-GCM, ICV 16, in IPv4', { ...v4, ...gcm(16, 16) }],
  ['AES-256-GCM, ICV 12, in IPv6', { ...v6, ...gcm(32, 12) }],
  ['AES-192-GCM, ICV 8, in UDP', { ...v4, ...gcm(24, 8), udpEncap: {} }],
  ['AES-128-CBC and HMAC-SHA-1', { ...v4, cipher: { name: 'aes-cbc', key: hex(16) }, ...sha1 }],
  ['AES-256-CBC and HMAC-SHA-256', { ...v6, cipher: { name: 'aes-cbc', key: hex(32) }, ...sha256 }],
  ['AES-128-CTR and HMAC-SHA-384', { ...v4, cipher: { name: 'aes-ctr', key: hex(16), salt: hex(4) }, ...sha384 }],
  ['3DES and HMAC-SHA-512', { ...v4, cipher: { name: '3des-cbc', key: hex(24) }, ...sha512 }],
  ['NULL and HMAC-SHA-256', { ...v4, cipher: { name: 'null' }, ...sha256 }],
])('tshark decrypts %s with the file, finds every ICV right, and a changed packet wrong', async (_name, fields) => {
  const sas = validateSas([{ ...base, ...fields }]);
  const wire = join(folder, 'wire.pcap');
  let protectedPackets = 0;
  {
    using reader = new CaptureReader(join(data, 'dns-ipv4.pcap'));
    using writer = new CaptureWriter(wire, { linkType: 1 });
    using pipeline = new EspPipeline(sas, 'auto');
    while (pipeline.step(reader, () => writer));
    protectedPackets = pipeline.report.protected;
  }
  expect(protectedPackets).toBe(20);
  writeEspKeys(join(folder, 'esp_sa'), sas);
  const good = await askTshark(wire, join(folder, 'esp_sa'), join(folder, 'good'));
  expect(good).toEqual({ esp: 20, authentic: 20, wrong: 0, clear: 2 });

  const bytes = readFileSync(wire);
  bytes[bytes.length - 30] ^= 1;
  writeFileSync(wire, bytes);
  const changed = await askTshark(wire, join(folder, 'esp_sa'), join(folder, 'changed'));
  expect(changed).toMatchObject({ esp: 20, wrong: 1 });
});
