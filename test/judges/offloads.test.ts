/** tshark reads what the device has put on a link, and checks every checksum and the TCP stream. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startDevice } from '../../src/device/index.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { inTunnel, type Large, type LargeOptions, large, type TunnelOptions } from '../device/helpers/large.ts';
import { NetDriver } from '../device/helpers/net-driver.ts';

const { VERSION_1, CSUM, HOST_TSO4, HOST_TSO6, HOST_USO, HOST_ECN, GUEST_HDRLEN } = Feature;
const FEATURES = FeatureSet.of(
  ...[VERSION_1, CSUM, HOST_TSO4, HOST_TSO6, HOST_USO, HOST_ECN, GUEST_HDRLEN],
  ...[Feature.HOST_UDP_TUNNEL_GSO, Feature.HOST_UDP_TUNNEL_GSO_CSUM],
);
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
/** A checksum of 0, which is none. */
const NOT_CHECKED = '3';

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

  it.each<{ name: string } & LargeOptions & TunnelOptions>([
    { name: 'TSO4 in IPv4', version: 4, outer: 4, protocol: 'tcp', payload: 40000, size: 1398 },
    {
      name: 'TSO6 in IPv4 with a checksum',
      version: 6,
      outer: 4,
      checksum: true,
      protocol: 'tcp',
      payload: 9001,
      size: 1378,
    },
    {
      name: 'TSO4 in IPv6 with a checksum',
      version: 4,
      outer: 6,
      checksum: true,
      protocol: 'tcp',
      payload: 20000,
      size: 1378,
    },
    {
      name: 'USO6 in IPv6 with a checksum',
      version: 6,
      outer: 6,
      checksum: true,
      protocol: 'udp',
      payload: 7000,
      size: 1111,
    },
  ])(
    'a VXLAN tunnel, $name: right checksums inside and outside, and lengths',
    async ({ outer, checksum, ...options }) => {
      const packet = inTunnel(large({ ...options, sequence: 0xfffff000 }), { outer, checksum: checksum ?? false });
      const rows = await throughDevice([packet]);
      expect(rows).toHaveLength(Math.ceil(options.payload / options.size));
      // tshark gives both layers of a field, the outer one first.
      const all = (row: Record<string, string>, field: string) => (row[field] === '' ? [] : row[field].split(','));
      for (const [k, row] of rows.entries()) {
        const bytes = Math.min(options.size, options.payload - k * options.size);
        expect(row['_ws.malformed']).toBe('');
        expect(row['tcp.analysis.flags']).toBe('');
        const ip4s = [outer, options.version].filter((version) => version === 4).length;
        expect(all(row, 'ip.checksum.status')).toEqual(new Array(ip4s).fill(GOOD));
        expect(all(row, 'tcp.checksum.status')).toEqual(options.protocol === 'tcp' ? [GOOD] : []);
        const udps = all(row, 'udp.checksum.status');
        expect(udps[0]).toBe(checksum === true ? GOOD : NOT_CHECKED);
        if (options.protocol === 'udp') expect(udps[1]).toBe(GOOD);
        const inner = options.protocol === 'udp' ? 8 : 20;
        const innerIp = options.version === 4 ? 20 : 40;
        expect(all(row, 'udp.length')[0]).toBe(String(8 + 8 + 14 + innerIp + inner + bytes));
      }
      const field = options.protocol === 'tcp' ? 'tcp.payload' : 'udp.payload';
      expect(rows.map((row) => all(row, field).at(-1)).join('')).toBe(hex(packet.payload));
    },
  );

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
