/** tshark reads what the device has put on a link, and checks every checksum and the TCP stream. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startDevice } from '../../src/device/index.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { type Large, type LargeOptions, large } from '../device/helpers/large.ts';
import { NetDriver } from '../device/helpers/net-driver.ts';

const { VERSION_1, CSUM, HOST_TSO4, HOST_TSO6, HOST_USO, HOST_ECN, GUEST_HDRLEN } = Feature;
const FEATURES = FeatureSet.of(VERSION_1, CSUM, HOST_TSO4, HOST_TSO6, HOST_USO, HOST_ECN, GUEST_HDRLEN);
const FIELDS = [
  'ip.checksum.status',
  'tcp.checksum.status',
  'udp.checksum.status',
  'ip.id',
  'ip.len',
  'ipv6.plen',
  'tcp.seq_raw',
  'tcp.flags',
  'tcp.analysis.flags',
  'tcp.payload',
  'udp.length',
  'udp.payload',
  'frame.len',
  '_ws.malformed',
] as const;
const GOOD = '1';

let folder = '';

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-offloads-'));
});

afterEach(() => {
  rmSync(folder, { recursive: true, force: true });
});

/** Sends packets through a device whose link writes a capture, and lets tshark read that. */
async function throughDevice(packets: readonly Large[]): Promise<Record<string, string>[]> {
  const capture = join(folder, 'out.pcap');
  const device = startDevice({ sockets: [join(folder, 'nic')], link: `pcap:,${capture}`, ipsec: false });
  let driver: NetDriver | null = null;
  try {
    driver = await NetDriver.open(join(folder, 'nic'), { features: FEATURES });
    for (const { frame, header } of packets) await driver.sendLarge(frame, header);
    expect(device.functions[0].statistics()).toMatchObject({ txHeader: 0, txLength: 0 });
  } finally {
    driver?.close();
    device.close();
  }
  const checks = ['ip.check_checksum', 'tcp.check_checksum', 'udp.check_checksum'].flatMap((o) => ['-o', `${o}:TRUE`]);
  const columns = FIELDS.flatMap((field) => ['-e', field]);
  const run = spawnSync('tshark', ['-n', '-r', capture, ...checks, '-T', 'fields', ...columns, '-E', 'separator=|'], {
    encoding: 'utf8',
    maxBuffer: 1 << 28,
    timeout: 110_000,
    env: { ...process.env, HOME: folder },
  });
  if (run.error !== undefined) throw run.error;
  if (run.status !== 0) throw new Error(`tshark ended with ${run.status}: ${run.stderr.slice(-2000)}`);
  const lines = run.stdout.split('\n').slice(0, -1);
  return lines.map((line) => {
    const values = line.split('|');
    return Object.fromEntries(FIELDS.map((field, i) => [field, values[i] ?? '']));
  });
}

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');

describe('what the device segments, in the eyes of tshark', () => {
  it.each<{ name: string } & LargeOptions>([
    { name: 'TSO over IPv4', version: 4, protocol: 'tcp', payload: 60000, size: 1448, options: 12 },
    { name: 'TSO over IPv4 in a VLAN', version: 4, protocol: 'tcp', payload: 10000, size: 1000, tags: 1 },
    { name: 'TSO over IPv6', version: 6, protocol: 'tcp', payload: 40000, size: 1428, options: 12 },
    {
      name: 'TSO over IPv6 with an extension header',
      version: 6,
      protocol: 'tcp',
      payload: 9001,
      size: 1200,
      extension: 8,
    },
    { name: 'TSO that needs no more than one segment', version: 4, protocol: 'tcp', payload: 700, size: 1448 },
    { name: 'an odd segment size', version: 4, protocol: 'tcp', payload: 9999, size: 777 },
  ])('$name: right checksums, and a stream without gaps', async (options) => {
    const packet = large({ ...options, sequence: 0xfffff000 });
    const rows = await throughDevice([packet]);
    expect(rows).toHaveLength(Math.ceil(options.payload / options.size));
    for (const row of rows) {
      expect(row['tcp.checksum.status']).toBe(GOOD);
      if (options.version === 4) expect(row['ip.checksum.status']).toBe(GOOD);
      expect(row['_ws.malformed']).toBe('');
      expect(row['tcp.analysis.flags'], 'no gap, overlap or retransmission').toBe('');
    }
    expect(rows.map((row) => row['tcp.payload']).join('')).toBe(hex(packet.payload));
  });

  it.each<{ name: string } & LargeOptions>([
    { name: 'USO over IPv4', version: 4, protocol: 'udp', payload: 30000, size: 1472 },
    { name: 'USO over IPv6', version: 6, protocol: 'udp', payload: 9999, size: 1451 },
  ])('$name: right checksums and lengths', async (options) => {
    const packet = large(options);
    const rows = await throughDevice([packet]);
    expect(rows).toHaveLength(Math.ceil(options.payload / options.size));
    for (const [k, row] of rows.entries()) {
      expect(row['udp.checksum.status']).toBe(GOOD);
      const bytes = Math.min(options.size, options.payload - k * options.size);
      expect(row['udp.length']).toBe(String(bytes + 8));
    }
    expect(rows.map((row) => row['udp.payload']).join('')).toBe(hex(packet.payload));
  });

  it('a checksum alone, of each protocol: right', async () => {
    const packets = ([4, 6] as const).flatMap((version) =>
      (['tcp', 'udp'] as const).map((protocol) => {
        const packet = large({ version, protocol, payload: 501, size: 0 });
        return { ...packet, header: { ...packet.header, flags: NetHeaderFlag.NEEDS_CSUM, gsoType: 0, gsoSize: 0 } };
      }),
    );
    const rows = await throughDevice(packets);
    expect(rows).toHaveLength(4);
    expect(rows.map((row) => row['tcp.checksum.status'] || row['udp.checksum.status'])).toEqual([
      GOOD,
      GOOD,
      GOOD,
      GOOD,
    ]);
  });
});
