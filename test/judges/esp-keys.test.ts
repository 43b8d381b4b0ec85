/** The decryption files of `vipsec esp --esp-keys`, judged by tshark: does it decrypt what we wrote, and only with the right key? */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, test } from 'vitest';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { validateSas } from '../../src/ipsec/validate.ts';
import { CaptureReader, CaptureWriter } from '../../src/packet/capture-file.ts';
import { askTshark, type TsharkVerdict } from '../../tools/demo/tshark.ts';
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
const v4 = { tunnel: { source: '192.0.2.1', destination: '192.0.2.2' } };
const v6 = { tunnel: { source: '2001:db8::1', destination: '2001:db8::2' } };
const sha1 = { auth: { name: 'hmac-sha1', key: hex(20) } };
const sha256 = { auth: { name: 'hmac-sha256', key: hex(32) } };
const sha384 = { auth: { name: 'hmac-sha384', key: hex(48) } };
const sha512 = { auth: { name: 'hmac-sha512', key: hex(64) } };
const gcm = (length: number, icvLength: number) => ({
  aead: { name: 'aes-gcm', key: hex(length), salt: hex(4), icvLength },
});

const SAS = validateSas(
  [
    { ...v4, ...gcm(16, 16) },
    { ...v6, ...gcm(32, 12) },
    { ...v4, ...gcm(24, 8), udpEncap: {} },
    { ...v4, cipher: { name: 'aes-cbc', key: hex(16) }, ...sha1 },
    { ...v6, cipher: { name: 'aes-cbc', key: hex(32) }, ...sha256 },
    { ...v4, cipher: { name: 'aes-ctr', key: hex(16), salt: '5a5b5c5d' }, ...sha384 },
    { ...v4, cipher: { name: '3des-cbc', key: hex(24) }, ...sha512 },
    { ...v4, cipher: { name: 'null' }, ...sha256 },
  ].map((fields, i) => ({ direction: 'outbound', mode: 'tunnel', spi: 0x1001 + i, ...fields })),
);

/** The recorded packets as `sa` protects them. */
function wireOf(sa: SecurityAssociation): Uint8Array[] {
  const path = join(folder, `${sa.spi}.pcap`);
  {
    using reader = new CaptureReader(join(data, 'dns-ipv4.pcap'));
    using writer = new CaptureWriter(path, { linkType: 1 });
    using pipeline = new EspPipeline([sa], 'auto');
    while (pipeline.step(reader, () => writer));
    expect(pipeline.report.protected).toBe(20);
  }
  using reader = new CaptureReader(path);
  return Array.from(reader, (record) => record.bytes().slice());
}

/** All in one capture, and one file of keys: tshark finds the SA by its SPI. */
async function verdict(wires: readonly Uint8Array[][], name: string): Promise<TsharkVerdict | null> {
  const path = join(folder, `${name}.pcap`);
  {
    using writer = new CaptureWriter(path, { linkType: 1 });
    for (const bytes of wires.flat()) writer.write(bytes, 0, bytes.length, 0, 0);
  }
  return await askTshark(path, join(folder, 'esp_sa'), join(folder, name));
}

test('tshark decrypts every cipher with the file, finds every ICV right, and of each a changed packet wrong', async () => {
  const wires = SAS.map(wireOf);
  writeEspKeys(join(folder, 'esp_sa'), SAS);
  const n = SAS.length;
  expect(await verdict(wires, 'good')).toEqual({ esp: 20 * n, authentic: 20 * n, wrong: 0, clear: 2 * n });
  for (const [last] of wires.map((wire) => wire.slice(-1))) last[last.length - 30] ^= 1;
  expect(await verdict(wires, 'changed')).toMatchObject({ esp: 20 * n, wrong: n });
});
