/** A large packet under an SA: tshark decrypts the segments, checks every ICV and checksum, and finds the stream without gaps. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startDevice } from '../../src/device/index.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { CaptureReader } from '../../src/packet/capture-file.ts';
import { ResourceType } from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { espKeysLine } from '../../tools/esp-keys.ts';
import { type Large, large } from '../device/helpers/large.ts';
import { NetDriver } from '../device/helpers/net-driver.ts';
import { encodeSa, saObject } from '../device/helpers/sa.ts';
import { key, outbound } from '../ipsec/support.ts';
import { type TxSetup, txSetup } from '../nic/support.ts';
import { askTshark } from './tshark.ts';

const FIELDS = [
  'esp.sequence',
  'esp.icv_good',
  'ip.len',
  'ip.checksum.status',
  'tcp.checksum.status',
  'tcp.analysis.flags',
  'tcp.payload',
  'udp.checksum.status',
  'udp.payload',
  '_ws.malformed',
] as const;
const CHECKS = ['ip.check_checksum', 'tcp.check_checksum', 'udp.check_checksum'].map((name) => `${name}:TRUE`);
const GOOD = /^(1|True)$/;

let folder = '';
let setup: TxSetup;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-segments-'));
  setup = txSetup();
});

afterEach(() => {
  setup.close();
  rmSync(folder, { recursive: true, force: true });
});

/** What tshark must find in the ESP packets `wire`, of an SA as `outbound()`: those of `packet`, from sequence number `first` on. */
function judge(wire: readonly Uint8Array[], packet: Large, size: number, first = 1): void {
  const line = espKeysLine(outbound());
  if (line === null) throw new Error('tshark knows no such SA');
  const rows = askTshark(wire, [line], FIELDS, CHECKS);
  const isTcp = rows[0]['tcp.payload'] !== '';
  expect(rows).toHaveLength(Math.ceil(packet.payload.length / size));
  for (const [k, row] of rows.entries()) {
    expect(row['_ws.malformed']).toBe('');
    expect(row['esp.icv_good']).toMatch(GOOD);
    expect(Number(row['esp.sequence'])).toBe(first + k);
    expect(row['ip.checksum.status'].split(',').every((status) => status === '1')).toBe(true);
    expect(row[isTcp ? 'tcp.checksum.status' : 'udp.checksum.status']).toBe('1');
    expect(row['tcp.analysis.flags'], 'no gap, overlap or retransmission').toBe('');
    expect(Number(row['ip.len'].split(',')[0]), 'what the link carries').toBeLessThanOrEqual(1500);
  }
  const payload = rows.map((row) => row[isTcp ? 'tcp.payload' : 'udp.payload']).join('');
  expect(payload).toBe(Buffer.from(packet.payload).toString('hex'));
}

const KINDS = [
  {
    name: '64 KiB of TCP over IPv4',
    size: 1360,
    packet: large({ version: 4, protocol: 'tcp', payload: 65535 - 52, size: 1360, options: 12, sequence: 0xffff8000 }),
  },
  { name: 'TCP over IPv6', size: 1340, packet: large({ version: 6, protocol: 'tcp', payload: 40000, size: 1340 }) },
  {
    name: 'UDP over IPv4',
    size: 1111,
    packet: large({ version: 4, protocol: 'udp', payload: 30000, size: 1111, port: 60001 }),
  },
];

describe('an SA in software', () => {
  it.each(KINDS)('protects each segment: $name', async ({ packet, size }) => {
    const { manager, ring, tx, make } = setup;
    const sa = await manager.addSa(outbound());
    expect(tx.burst(Uint32Array.of(make(packet, sa.handle)), 1)).toBe(1);
    judge(
      ring.sent.map(({ bytes }) => bytes.slice(14)),
      packet,
      size,
    );
  });

  it('makes segments shorter when what was asked for does not fit the link any more', async () => {
    const { manager, ring, tx, make } = setup;
    const sa = await manager.addSa(outbound());
    const packet = large({ version: 4, protocol: 'tcp', payload: 30000, size: 1448, options: 12 });
    expect(tx.burst(Uint32Array.of(make(packet, sa.handle)), 1)).toBe(1);
    const inFirst = manager.state.longest[sa.handle] - 52;
    judge(
      ring.sent.map(({ bytes }) => bytes.slice(14)),
      packet,
      inFirst,
    );
  });
});

describe('an SA of the device', () => {
  it.each(KINDS)('protects each segment of what a driver left to it: $name', async ({ packet, size }) => {
    const capture = join(folder, 'out.pcap');
    const device = startDevice({ sockets: [join(folder, 'nic')], link: `pcap:,${capture}` });
    let driver: NetDriver | null = null;
    try {
      const { VERSION_1, CSUM, HOST_TSO4, HOST_TSO6, HOST_USO } = Feature;
      const features = FeatureSet.of(VERSION_1, CSUM, HOST_TSO4, HOST_TSO6, HOST_USO);
      driver = await NetDriver.open(join(folder, 'nic'), { features, ipsec: true });
      const fields = { objectId: 3, spi: 0x1000, salt: key(4, 0x50), cipherKey: key(16) };
      const object = encodeSa(ipsecWire('virtio-1.4'), saObject(fields));
      await driver.create(ResourceType.NET_IPSEC_OUTB_SA, 3, object);
      const security = { resourceId: 3, resourceType: ResourceType.NET_IPSEC_OUTB_SA };
      await driver.sendLarge(packet.frame, {
        ...packet.header,
        ...security,
        flags: NetHeaderFlag.NEEDS_CSUM | NetHeaderFlag.SECURITY,
      });
    } finally {
      driver?.close();
      device.close();
    }
    const wire: Uint8Array[] = [];
    const reader = new CaptureReader(capture);
    for (let record = reader.next(); record !== null; record = reader.next()) wire.push(record.bytes().slice(14));
    reader.close();
    judge(wire, packet, size);
  });
});
