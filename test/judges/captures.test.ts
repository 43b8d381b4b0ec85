/** Our capture files, judged by Wireshark's tools: what editcap converts we read the same, what we write they read the same. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { CaptureReader, CaptureWriter } from '../../src/packet/capture-file.ts';

const data = fileURLToPath(new URL('../data/', import.meta.url));
const captures = readdirSync(data).filter((name) => name.endsWith('.pcap'));
let folder = '';
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-captures-'));
});
afterEach(() => {
  rmSync(folder, { recursive: true });
});

function run(program: string, ...args: string[]): string {
  const { status, stdout, stderr, error } = spawnSync(program, args, { encoding: 'utf8', maxBuffer: 1 << 26 });
  if (error !== undefined) throw error;
  if (status !== 0) throw new Error(`${program} ended with ${status}: ${stderr}`);
  return stdout;
}

interface Packet {
  readonly bytes: string;
  readonly time: string;
}

function ours(path: string): Packet[] {
  using reader = new CaptureReader(path);
  return Array.from(reader, (record) => ({
    bytes: Buffer.from(record.bytes()).toString('hex'),
    time: `${record.seconds}.${String(record.nanoseconds).padStart(9, '0')}`,
  }));
}

/** Number, time and bytes of each packet, as tshark prints them. */
function theirs(path: string): Packet[] {
  const all: unknown = JSON.parse(run('tshark', '-n', '-r', path, '-T', 'json', '-x', '-j', 'frame'));
  if (!Array.isArray(all)) throw new Error('no list');
  return all.map(({ _source: { layers } }) => ({
    bytes: String(layers.frame_raw[0]),
    time: String(layers.frame['frame.time_epoch']),
  }));
}

test.each(['pcapng', 'nsecpcap', 'pcap'])('a capture that editcap writes as %s is the same to us', (format) => {
  for (const name of captures) {
    const converted = join(folder, name);
    run('editcap', '-F', format, join(data, name), converted);
    expect(ours(converted)).toEqual(ours(join(data, name)));
  }
});

test('a cut capture keeps the original lengths', () => {
  const cut = join(folder, 'cut');
  run('editcap', '-F', 'pcapng', '-s', '40', join(data, 'http-ipv4.pcap'), cut);
  using reader = new CaptureReader(cut);
  using whole = new CaptureReader(join(data, 'http-ipv4.pcap'));
  for (const record of whole) {
    const other = reader.next();
    expect(other?.length).toBe(Math.min(40, record.length));
    expect(other?.originalLength).toBe(record.length);
  }
});

test.each([
  ['pcap', { linkType: 1, nanoseconds: true }],
  ['pcapng', { linkType: 1, format: 'pcapng' }],
] as const)('what we write as %s tshark reads as it is', (_name, options) => {
  const path = join(folder, 'ours');
  const packets = Array.from({ length: 50 }, (_, i) => ({
    bytes: Uint8Array.from({ length: 14 + 7 * i }, (_byte, k) => (i * 31 + k) & 0xff),
    seconds: 1_700_000_000 + i * 86_400_000,
    nanoseconds: (i * 123_456_789) % 1_000_000_000,
  }));
  {
    using writer = new CaptureWriter(path, options);
    for (const p of packets) writer.write(p.bytes, 0, p.bytes.length, p.seconds % 0xffffffff, p.nanoseconds);
  }
  const expected = packets.map((p) => ({
    bytes: Buffer.from(p.bytes).toString('hex'),
    time: `${p.seconds % 0xffffffff}.${String(p.nanoseconds).padStart(9, '0')}`,
  }));
  expect(theirs(path)).toEqual(expected);
  expect(ours(path)).toEqual(expected);
});
