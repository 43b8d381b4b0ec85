/** tshark reads what the device has put on a link, and checks every checksum and the TCP stream. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { inTunnel, type Large, type LargeOptions, large, type TunnelOptions } from '../device/helpers/large.ts';
import { NetDriver } from '../device/helpers/net-driver.ts';
import { startDevice } from '../device/helpers/start.ts';

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
  'tcp.dstport',
  'udp.dstport',
  'frame.len',
  '_ws.malformed',
] as const;
const GOOD = '1';
/** A checksum of 0, which is none. */
const NOT_CHECKED = '3';

type Row = Readonly<Record<string, string>>;

/** Sends packets through a device whose link writes a capture, and lets tshark read that. */
async function throughDevice(packets: readonly Large[], folder: string): Promise<Row[]> {
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

type LargeCase = LargeOptions & { readonly name: string };

/** What is sent goes through one device, and tshark is started once: by its port each packet is found again. */
const FIRST_PORT = 60_001;
const sent: Large[] = [];
const rows = new Map<number, Row[]>();

/** Adds a packet for each of `cases`, with a destination port of its own. */
function each<T extends LargeCase>(cases: readonly T[], make: (options: T & { port: number }) => Large) {
  return cases.map((options) => {
    const port = FIRST_PORT + sent.length;
    const packet = make({ ...options, port });
    sent.push(packet);
    return { ...options, packet, port };
  });
}

/** tshark gives the ports of both layers, the outer one first. */
function portOf(row: Row): number {
  return Number((row['tcp.dstport'] || row['udp.dstport']).split(',').at(-1));
}

function rowsOf(port: number): Row[] {
  return rows.get(port) ?? [];
}

beforeAll(async () => {
  const folder = mkdtempSync(join(tmpdir(), 'vipsec-offloads-'));
  try {
    for (const row of await throughDevice(sent, folder)) rows.set(portOf(row), [...rowsOf(portOf(row)), row]);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');

const STREAMS = each<LargeCase>(
  [
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
  ],
  (options) => large({ ...options, sequence: 0xfffff000 }),
);

const DATAGRAMS = each<LargeCase>(
  [
    { name: 'USO over IPv4', version: 4, protocol: 'udp', payload: 30000, size: 1472 },
    { name: 'USO over IPv6', version: 6, protocol: 'udp', payload: 9999, size: 1451 },
  ],
  large,
);

const TUNNELS = each<LargeCase & TunnelOptions>(
  [
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
  ],
  ({ outer, checksum = false, ...options }) =>
    inTunnel(large({ ...options, sequence: 0xfffff000 }), { outer, checksum }),
);

const ALONE = each<LargeCase>(
  ([4, 6] as const).flatMap((version) =>
    (['tcp', 'udp'] as const).map((protocol) => ({ name: 'alone', version, protocol, payload: 501, size: 0 })),
  ),
  (options) => {
    const packet = large(options);
    return { ...packet, header: { ...packet.header, flags: NetHeaderFlag.NEEDS_CSUM, gsoType: 0, gsoSize: 0 } };
  },
);

describe('what the device segments, in the eyes of tshark', () => {
  it.each(STREAMS)('$name: right checksums, and a stream without gaps', ({ packet, port, ...options }) => {
    const rows = rowsOf(port);
    expect(rows).toHaveLength(Math.ceil(options.payload / options.size));
    for (const row of rows) {
      expect(row['tcp.checksum.status']).toBe(GOOD);
      if (options.version === 4) expect(row['ip.checksum.status']).toBe(GOOD);
      expect(row['_ws.malformed']).toBe('');
      expect(row['tcp.analysis.flags'], 'no gap, overlap or retransmission').toBe('');
    }
    expect(rows.map((row) => row['tcp.payload']).join('')).toBe(hex(packet.payload));
  });

  it.each(DATAGRAMS)('$name: right checksums and lengths', ({ packet, port, ...options }) => {
    const rows = rowsOf(port);
    expect(rows).toHaveLength(Math.ceil(options.payload / options.size));
    for (const [k, row] of rows.entries()) {
      expect(row['udp.checksum.status']).toBe(GOOD);
      const bytes = Math.min(options.size, options.payload - k * options.size);
      expect(row['udp.length']).toBe(String(bytes + 8));
    }
    expect(rows.map((row) => row['udp.payload']).join('')).toBe(hex(packet.payload));
  });

  it.each(TUNNELS)(
    'a VXLAN tunnel, $name: right checksums inside and outside, and lengths',
    ({ packet, port, outer, checksum, ...options }) => {
      const rows = rowsOf(port);
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

  it.each(ALONE)('a checksum alone, of $protocol in IPv$version: right', ({ port }) => {
    const rows = rowsOf(port);
    expect(rows).toHaveLength(1);
    expect(rows[0]['tcp.checksum.status'] || rows[0]['udp.checksum.status']).toBe(GOOD);
  });

  it('nothing else', () => {
    expect([...rows.keys()]).toEqual(sent.map((_, i) => FIRST_PORT + i));
  });
});
