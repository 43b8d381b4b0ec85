/** A large packet under an SA: tshark decrypts the segments, checks every ICV and checksum, and finds the stream without gaps. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { CaptureReader } from '../../src/packet/capture-file.ts';
import { ResourceType } from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { espKeysLine } from '../../tools/esp-keys.ts';
import { type Large, large } from '../device/helpers/large.ts';
import { NetDriver } from '../device/helpers/net-driver.ts';
import { encodeSa, saObject } from '../device/helpers/sa.ts';
import { startDevice } from '../device/helpers/start.ts';
import { key, outbound } from '../ipsec/support.ts';
import { txSetup } from '../nic/support.ts';
import { askTshark, type Row } from './tshark.ts';

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

interface Case {
  readonly name: string;
  readonly packet: Large;
  /** Bytes of payload in a segment. */
  readonly size: number;
}

/** A port for each packet: each is a stream of its own to tshark, which is started once. */
let port = 60_001;

function cases(): Case[] {
  const [first, second, third] = [port++, port++, port++];
  const tcp4 = { version: 4, protocol: 'tcp', payload: 65535 - 52, size: 1360, options: 12, port: first } as const;
  const tcp6 = { version: 6, protocol: 'tcp', payload: 40000, size: 1340, port: second } as const;
  const udp4 = { version: 4, protocol: 'udp', payload: 30000, size: 1111, port: third } as const;
  return [
    { name: '64 KiB of TCP over IPv4', size: tcp4.size, packet: large({ ...tcp4, sequence: 0xffff8000 }) },
    { name: 'TCP over IPv6', size: tcp6.size, packet: large(tcp6) },
    { name: 'UDP over IPv4', size: udp4.size, packet: large(udp4) },
  ];
}

const SOFTWARE = cases();
const DEVICE = cases();
/** More than fits the link with what ESP adds. */
const TOO_LONG = large({ version: 4, protocol: 'tcp', payload: 30000, size: 1448, options: 12, port: port++ });

/** ESP packets of each packet, and what tshark says of them. */
const wires = new Map<Large, Uint8Array[]>();
const verdicts = new Map<Large, Row[]>();
/** What fits the link of the packet that was too long. */
let shorter = 0;

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-segments-'));
  for (const { packet } of SOFTWARE) wires.set(packet, (await inSoftware(packet)).wire);
  const { wire, longest } = await inSoftware(TOO_LONG);
  wires.set(TOO_LONG, wire);
  shorter = longest - 52;
  for (const [i, { packet }] of DEVICE.entries()) wires.set(packet, await inDevice(packet, String(i)));
  const line = espKeysLine(outbound());
  if (line === null) throw new Error('tshark knows no such SA');
  const rows = askTshark([...wires.values()].flat(), [line], FIELDS, CHECKS);
  for (const [packet, { length }] of wires) verdicts.set(packet, rows.splice(0, length));
  expect(rows).toEqual([]);
});

afterAll(() => {
  rmSync(folder, { recursive: true, force: true });
});

async function inSoftware(packet: Large): Promise<{ wire: Uint8Array[]; longest: number }> {
  const { manager, ring, tx, make, close } = txSetup();
  try {
    const sa = await manager.addSa(outbound());
    expect(tx.burst(Uint32Array.of(make(packet, sa.handle)), 1)).toBe(1);
    return { wire: ring.sent.map(({ bytes }) => bytes.slice(14)), longest: manager.state.longest[sa.handle] };
  } finally {
    close();
  }
}

async function inDevice(packet: Large, name: string): Promise<Uint8Array[]> {
  const capture = join(folder, `${name}.pcap`);
  const device = startDevice({ sockets: [join(folder, name)], link: `pcap:,${capture}` });
  let driver: NetDriver | null = null;
  try {
    const { VERSION_1, CSUM, HOST_TSO4, HOST_TSO6, HOST_USO } = Feature;
    const features = FeatureSet.of(VERSION_1, CSUM, HOST_TSO4, HOST_TSO6, HOST_USO);
    driver = await NetDriver.open(join(folder, name), { features, ipsec: true });
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
  using reader = new CaptureReader(capture);
  return Array.from(reader, (record) => record.bytes().slice(14));
}

/** What tshark must have found in the ESP packets of `packet`, of an SA as `outbound()`. */
function judge(packet: Large, size: number): void {
  const rows = verdicts.get(packet) ?? [];
  const isTcp = rows[0]['tcp.payload'] !== '';
  expect(rows).toHaveLength(Math.ceil(packet.payload.length / size));
  for (const [k, row] of rows.entries()) {
    expect(row['_ws.malformed']).toBe('');
    expect(row['esp.icv_good']).toMatch(GOOD);
    expect(Number(row['esp.sequence'])).toBe(1 + k);
    expect(row['ip.checksum.status'].split(',').every((status) => status === '1')).toBe(true);
    expect(row[isTcp ? 'tcp.checksum.status' : 'udp.checksum.status']).toBe('1');
    expect(row['tcp.analysis.flags'], 'no gap, overlap or retransmission').toBe('');
    expect(Number(row['ip.len'].split(',')[0]), 'what the link carries').toBeLessThanOrEqual(1500);
  }
  const payload = rows.map((row) => row[isTcp ? 'tcp.payload' : 'udp.payload']).join('');
  expect(payload).toBe(Buffer.from(packet.payload).toString('hex'));
}

describe('an SA in software', () => {
  it.each(SOFTWARE)('protects each segment: $name', ({ packet, size }) => judge(packet, size));

  it('makes segments shorter when what was asked for does not fit the link any more', () => {
    expect(shorter).toBeLessThan(1448);
    judge(TOO_LONG, shorter);
  });
});

describe('an SA of the device', () => {
  it.each(DEVICE)('protects each segment of what a driver left to it: $name', ({ packet, size }) =>
    judge(packet, size),
  );
});
