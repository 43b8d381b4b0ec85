/** Large packets, and checksums that are left open, between two functions of one device. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Device, DeviceOptions } from '../../src/device/index.ts';
import { CaptureWriter } from '../../src/packet/capture-file.ts';
import { LinkType } from '../../src/packet/fields.ts';
import { ChecksumState, transportChecksum } from '../../src/packet/transport-checksum.ts';
import { Feature, FeatureSet, withRequirementsMet } from '../../src/virtio/features.ts';
import { CommonCfgField as F } from '../../src/virtio/pci-layout.ts';
import { type NetHeader, NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { runs } from '../depth.ts';
import { inTunnel, type Large, large } from './helpers/large.ts';
import { NetDriver, udpFrame } from './helpers/net-driver.ts';
import { pause, until } from './helpers/raw-client.ts';
import { startDevice } from './helpers/start.ts';

const { NEEDS_CSUM, DATA_VALID } = NetHeaderFlag;
const {
  VERSION_1,
  CSUM,
  GUEST_CSUM,
  MRG_RXBUF,
  HOST_TSO4,
  HOST_TSO6,
  HOST_USO,
  HOST_ECN,
  GUEST_TSO4,
  GUEST_TSO6,
  GUEST_USO4,
  GUEST_USO6,
  GUEST_ECN,
  HOST_UDP_TUNNEL_GSO,
  HOST_UDP_TUNNEL_GSO_CSUM,
  GUEST_UDP_TUNNEL_GSO,
  GUEST_UDP_TUNNEL_GSO_CSUM,
} = Feature;
const SENDS = FeatureSet.of(
  ...[VERSION_1, CSUM, HOST_TSO4, HOST_TSO6, HOST_USO, HOST_ECN],
  ...[HOST_UDP_TUNNEL_GSO, HOST_UDP_TUNNEL_GSO_CSUM],
);
const TAKES = FeatureSet.of(
  ...[VERSION_1, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, GUEST_ECN],
  ...[GUEST_UDP_TUNNEL_GSO, GUEST_UDP_TUNNEL_GSO_CSUM],
);

let folder = '';
let device: Device;
const drivers: NetDriver[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-unfinished-'));
});

afterEach(async () => {
  for (const driver of drivers.splice(0)) driver.close();
  await pause(20);
  expect(device.internalErrors).toBe(0);
  expect(device.packetsInUse).toBe(0);
  device.close();
  rmSync(folder, { recursive: true, force: true });
});

function start(options: Partial<DeviceOptions> = {}): void {
  const sockets = ['a', 'b'].map((name) => join(folder, name));
  device = startDevice({ sockets, link: 'pair', ipsec: false, ...options });
}

async function open(name: string, features: FeatureSet, bufferSize = 2048, fill = 64): Promise<NetDriver> {
  const net = await NetDriver.open(join(folder, name), { features, bufferSize });
  drivers.push(net);
  if (fill > 0) await net.fill(fill);
  return net;
}

async function both(takes: FeatureSet, bufferSize?: number, fill?: number): Promise<[NetDriver, NetDriver]> {
  start();
  return [await open('a', SENDS), await open('b', takes, bufferSize, fill)];
}

const counter = (name: string, n: number) => Number(device.functions[n].statistics()[name]);
const fields = ({ flags, gsoType, gsoSize, hdrLen, csumStart, csumOffset }: Partial<NetHeader>) => ({
  ...{ flags, gsoType, gsoSize, hdrLen, csumStart, csumOffset },
});

/** Whether the outermost checksum of a frame is right. */
function isChecksummed(frame: Uint8Array): boolean {
  const u8 = new Uint8Array(frame.length + (frame.length & 1));
  u8.set(frame);
  return transportChecksum({ u8, u16: new Uint16Array(u8.buffer) }, 0, frame.length) === ChecksumState.valid;
}

const TCP4 = large({ version: 4, protocol: 'tcp', payload: 60000, size: 1448, options: 12 });
const KINDS: { name: string; packet: Large; needs: number[] }[] = [
  { name: 'TSO over IPv4', packet: TCP4, needs: [GUEST_TSO4] },
  {
    name: 'TSO over IPv6',
    packet: large({ version: 6, protocol: 'tcp', payload: 40000, size: 1428, extension: 8 }),
    needs: [GUEST_TSO6],
  },
  {
    name: 'TSO with ECN',
    packet: large({ version: 4, protocol: 'tcp', payload: 5000, size: 1000, ecn: true, tags: 1 }),
    needs: [GUEST_ECN],
  },
  {
    name: 'USO over IPv4',
    packet: large({ version: 4, protocol: 'udp', payload: 20000, size: 1200 }),
    needs: [GUEST_USO4],
  },
  {
    name: 'USO over IPv6',
    packet: large({ version: 6, protocol: 'udp', payload: 9999, size: 1200 }),
    needs: [GUEST_USO6],
  },
  {
    name: 'a packet that is no longer than a frame',
    packet: large({ version: 4, protocol: 'tcp', payload: 1000, size: 200 }),
    needs: [GUEST_TSO4],
  },
  {
    name: 'TSO in a UDP tunnel',
    packet: inTunnel(large({ version: 6, protocol: 'tcp', payload: 30000, size: 1300 }), { outer: 4 }),
    needs: [GUEST_UDP_TUNNEL_GSO],
  },
  {
    name: 'USO in a UDP tunnel with a checksum',
    packet: inTunnel(large({ version: 4, protocol: 'udp', payload: 9000, size: 1300 }), { outer: 6, checksum: true }),
    needs: [GUEST_UDP_TUNNEL_GSO_CSUM],
  },
];

describe('a packet that stands for several', () => {
  it.each(KINDS)('stays one when the other driver takes it: $name', async ({ packet }) => {
    const [left, right] = await both(TAKES.with(MRG_RXBUF));
    await left.sendLarge(packet.frame, packet.header);
    const { header, frame, buffers } = await right.receive();
    expect(Buffer.compare(frame, packet.frame)).toBe(0);
    expect(buffers).toBe(Math.ceil((packet.frame.length + right.layout.length) / 2048));
    expect(fields(header)).toEqual(fields(packet.header));
    expect([header.outerThOffset, header.innerNhOffset]).toEqual([
      packet.header.outerThOffset ?? 0,
      packet.header.innerNhOffset ?? 0,
    ]);
    expect(counter('txUnfinished', 0)).toBe(1);
    expect([counter('txPackets', 0), counter('rxPackets', 1), counter('txSegments', 0)]).toEqual([1, 1, 0]);
  });

  it.each(KINDS)('is cut when the other driver does not take it: $name', async ({ packet, needs }) => {
    const takes = withRequirementsMet(TAKES.with(MRG_RXBUF).without(...needs));
    const [left, right] = await both(takes);
    await left.sendLarge(packet.frame, packet.header);
    const size = packet.header.gsoSize ?? 0;
    const headers = packet.header.hdrLen ?? 0;
    const parts: Uint8Array[] = [];
    for (let done = 0; done < packet.payload.length; done += size) {
      const { header, frame } = await right.receive();
      expect(header).toMatchObject({ gsoType: 0, gsoSize: 0, csumStart: 0, csumOffset: 0 });
      const isTunnel = packet.header.outerThOffset !== undefined;
      expect(header.flags).toBe(isTunnel ? 0 : DATA_VALID);
      if (!isTunnel) expect(isChecksummed(frame)).toBe(true);
      expect(frame.length).toBe(headers + Math.min(size, packet.payload.length - done));
      parts.push(frame.subarray(headers));
    }
    expect(Buffer.concat(parts).equals(packet.payload)).toBe(true);
    expect(counter('txUnfinished', 0)).toBe(0);
  });

  it('waits as one while there are no buffers, and goes before what came later', async () => {
    const [left, right] = await both(TAKES.with(MRG_RXBUF), 2048, 0);
    const later = udpFrame(200);
    await left.sendLarge(TCP4.frame, TCP4.header);
    await left.send(later);
    await left.sendLarge(TCP4.frame, TCP4.header);
    await right.fill(10);
    await pause(20);
    expect(right.rx.usedIndex, 'not a part of it').toBe(0);
    for (let i = 10; i < 64; i++) right.post(i);
    await right.driver.notify(0);
    for (const expected of [TCP4.frame, later, TCP4.frame]) {
      expect(Buffer.compare((await right.receive()).frame, expected)).toBe(0);
    }
  });

  it('keeps its place behind what was sent before it', async () => {
    const [left, right] = await both(TAKES.with(MRG_RXBUF));
    for (let i = 0; i < 5; i++) left.offer(udpFrame(100 + i));
    await left.sendLarge(TCP4.frame, TCP4.header);
    for (let i = 0; i < 5; i++) expect((await right.receive()).frame.length).toBe(100 + i);
    expect(Buffer.compare((await right.receive()).frame, TCP4.frame)).toBe(0);
  });

  it('fits buffers of any lengths, and their number is right', async () => {
    const [left, right] = await both(TAKES.with(MRG_RXBUF), 2048, 0);
    const { driver, rx, layout } = right;
    const area = driver.allocate(64 * 0x4000);
    const lengths = fc.array(fc.integer({ min: layout.length, max: 0x4000 }), { minLength: 1, maxLength: 12 });
    await fc.assert(
      fc.asyncProperty(lengths, fc.integer({ min: 1, max: 20000 }), async (sizes, payload) => {
        const packet = large({ version: 4, protocol: 'tcp', payload, size: 1000 });
        const total = layout.length + packet.frame.length;
        // Enough of them, of lengths that repeat.
        const posted: number[] = [];
        for (let room = 0; room < total; ) {
          if (posted.length === 60) return;
          const size = sizes[posted.length % sizes.length];
          posted.push(size);
          room += size;
        }
        for (const [i, size] of posted.entries()) {
          rx.descriptor(i, area + i * 0x4000, size, 2);
          rx.offer(i);
        }
        await driver.notify(0);
        await left.sendLarge(packet.frame, packet.header);
        const bytes: Uint8Array[] = [];
        for (const [i, size] of posted.entries()) {
          const used = await rx.wait();
          const isLast = i === posted.length - 1;
          expect(used.id).toBe(i);
          expect(isLast ? used.length <= size : used.length === size).toBe(true);
          bytes.push(driver.memory.u8.slice(area + i * 0x4000, area + i * 0x4000 + used.length));
        }
        expect(bytes[0][10] | (bytes[0][11] << 8)).toBe(posted.length);
        expect(Buffer.concat(bytes).subarray(layout.length).equals(packet.frame)).toBe(true);
      }),
      { numRuns: runs(60) },
    );
  });

  it('fits one buffer of many descriptors without MRG_RXBUF', async () => {
    const [left, right] = await both(TAKES, 2048, 0);
    const { driver, rx, layout } = right;
    const area = driver.allocate(33 * 2048);
    for (let i = 0; i < 33; i++) rx.descriptor(i, area + i * 2048, 2048, i < 32 ? 3 : 2, i + 1);
    rx.offer(0);
    await driver.notify(0);
    await left.sendLarge(TCP4.frame, TCP4.header);
    expect((await rx.wait()).length).toBe(layout.length + TCP4.frame.length);
    const from = area + layout.length;
    expect(Buffer.compare(driver.memory.u8.slice(from, from + TCP4.frame.length), TCP4.frame)).toBe(0);
  });

  it('that the whole queue cannot hold is dropped, and does not stop others', async () => {
    const [left, right] = await both(TAKES.with(MRG_RXBUF), 500);
    await left.sendLarge(TCP4.frame, TCP4.header);
    await left.send(udpFrame(300));
    expect((await right.receive()).frame).toEqual(udpFrame(300));
    expect(counter('rxTooLong', 1)).toBe(1);
  });

  it('of which one would be longer than the MTU of the other side is dropped', async () => {
    start({ mtu: 9000, memory: 2 ** 28 });
    const left = await open('a', SENDS);
    const right = await open('b', TAKES.with(MRG_RXBUF, Feature.MTU));
    const send = async (size: number) => {
      const packet = large({ version: 4, protocol: 'tcp', payload: 20000, size });
      await left.sendLarge(packet.frame, packet.header);
    };
    await send(9000 - 40 + 1);
    await send(9000 - 40);
    expect((await right.receive()).header.gsoSize).toBe(8960);
    expect(counter('rxTooLong', 1) + counter('txLength', 0)).toBe(1);
  });

  it('is cut when a queue is longer than there is memory for such packets', async () => {
    const [left, right] = await both(TAKES.with(MRG_RXBUF), 2048, 0);
    const packet = large({ version: 4, protocol: 'tcp', payload: 2000, size: 1000 });
    for (let i = 0; i < 70; i++) await left.sendLarge(packet.frame, packet.header);
    expect(counter('txUnfinished', 0)).toBe(64);
    await right.fill();
    const got = { large: 0, small: 0 };
    for (let i = 0; i < 64 + 12; i++) got[(await right.receive()).header.gsoType === 0 ? 'small' : 'large']++;
    expect(got).toEqual({ large: 64, small: 12 });
  });

  it('is counted by queue as what it was', async () => {
    start();
    const left = await open('a', SENDS.with(Feature.CTRL_VQ, Feature.DEVICE_STATS));
    const right = await open('b', TAKES.with(MRG_RXBUF, Feature.CTRL_VQ, Feature.DEVICE_STATS));
    await left.sendLarge(TCP4.frame, TCP4.header);
    await right.receive();
    const numbers = async (net: NetDriver, queue: number, bits: number[], length: number) => {
      const reply = await net.ctrl(8, 1, [queue, 0, 0, 0, 0, 0, 0, 0, ...bits], length);
      const { result } = reply;
      return Array.from({ length: (length - 8) / 8 }, (_, i) => result[8 + 8 * i] + 256 * result[9 + 8 * i]);
    };
    const bytes = TCP4.frame.length;
    expect(await numbers(left, 1, [0, 0, 4, 0, 0, 0, 0, 0], 56)).toEqual([1, bytes, 0, 0, 1, bytes]);
    expect(await numbers(right, 0, [4, 0, 0, 0, 0, 0, 0, 0], 40)).toEqual([1, bytes, 0, 0]);
    expect(await numbers(right, 0, [2, 0, 0, 0, 0, 0, 0, 0], 40)).toEqual([0, 1, 0, 0]);
  });
});

describe('a driver that sends packets for segmentation', () => {
  it.each<{ name: string; change: Partial<NetHeader> }>([
    { name: 'UDP_TUNNEL_CSUM without a tunnel', change: { flags: NEEDS_CSUM | NetHeaderFlag.UDP_TUNNEL_CSUM } },
    { name: 'both tunnel types', change: { gsoType: 0x61 } },
    { name: 'a tunnel where none is', change: { gsoType: 0x21, outerThOffset: 34, innerNhOffset: 50 } },
    { name: 'no checksum to fill', change: { flags: 0 } },
    { name: 'headers elsewhere', change: { csumStart: 38 } },
  ])('gets none through with $name', async ({ change }) => {
    const [left, right] = await both(TAKES.with(MRG_RXBUF));
    await left.sendLarge(TCP4.frame, { ...TCP4.header, ...change });
    await left.send(udpFrame(99));
    expect((await right.receive()).frame).toEqual(udpFrame(99));
    expect(counter('txHeader', 0)).toBe(1);
  });

  it.each<{ name: string; change: Partial<NetHeader> }>([
    { name: 'the outer header elsewhere', change: { outerThOffset: 30 } },
    { name: 'an inner header inside the outer one', change: { innerNhOffset: 40 } },
    { name: 'an inner header outside', change: { innerNhOffset: 60000 } },
    { name: 'another inner version', change: { gsoType: 0x44 } },
  ])('gets no tunnel through with $name', async ({ change }) => {
    const [left, right] = await both(TAKES.with(MRG_RXBUF));
    const inner = large({ version: 4, protocol: 'tcp', payload: 5000, size: 1000 });
    const packet = inTunnel(inner, { outer: 4, checksum: true });
    await left.sendLarge(packet.frame, { ...packet.header, ...change });
    await left.send(udpFrame(99));
    expect((await right.receive()).frame).toEqual(udpFrame(99));
    expect(counter('txHeader', 0)).toBe(1);
  });

  it('with any header gets nothing through that the other driver must not be given', async () => {
    const [left, right] = await both(TAKES.with(MRG_RXBUF));
    const tcp = large({ version: 4, protocol: 'tcp', payload: 5000, size: 1000 });
    const packets = [
      tcp,
      large({ version: 6, protocol: 'udp', payload: 3000, size: 700, extension: 8 }),
      large({ version: 4, protocol: 'tcp', payload: 600, size: 100 }),
      inTunnel(tcp, { outer: 4, checksum: true }),
      inTunnel(large({ version: 6, protocol: 'tcp', payload: 900, size: 300 }), { outer: 6 }),
    ];
    const edge = fc.oneof(
      fc.constantFrom(0, 1, 14, 34, 50, 64, 1448, 0x7fff, 0xffff),
      fc.integer({ min: 0, max: 0xffff }),
    );
    const change = fc.record(
      {
        flags: fc.constantFrom(0, 1, 2, 3, 8, 9, 0xff),
        gsoType: fc.constantFrom(0, 1, 2, 3, 4, 5, 6, 0x21, 0x24, 0x41, 0x44, 0x45, 0x61, 0x81, 0x85, 0xa1, 0xff),
        ...{ gsoSize: edge, hdrLen: edge, csumStart: edge, csumOffset: edge, outerThOffset: edge, innerNhOffset: edge },
      },
      { requiredKeys: [] },
    );
    const spoiled = fc.array(fc.tuple(fc.nat(150), fc.nat(255)), { maxLength: 3 });
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(...packets), change, spoiled, async (packet, fields, bytes) => {
        const frame = packet.frame.slice();
        for (const [at, value] of bytes) frame[at] = value;
        await left.sendLarge(frame, { ...packet.header, ...fields });
        // What came is in front of this one.
        await left.send(udpFrame(77));
        for (;;) {
          const { header, frame: got } = await right.receive();
          if (header.gsoType === 0 && Buffer.compare(got, udpFrame(77)) === 0) break;
          if ((header.flags & NEEDS_CSUM) !== 0) {
            expect(header.csumStart + header.csumOffset + 2).toBeLessThanOrEqual(got.length);
          }
          if (header.gsoType === 0) {
            expect(got.length).toBeLessThanOrEqual(1522);
            continue;
          }
          expect(header.flags & (NEEDS_CSUM | DATA_VALID)).toBe(NEEDS_CSUM);
          expect(header.gsoSize).toBeGreaterThan(0);
          expect([1, 4, 5]).toContain(header.gsoType & 0x1f);
          expect(header.gsoType & 0x60).not.toBe(0x60);
          expect(header.hdrLen).toBeGreaterThanOrEqual(header.csumStart + header.csumOffset + 2);
          expect(header.hdrLen).toBeLessThan(got.length);
          if ((header.gsoType & 0x60) !== 0) {
            expect(header.outerThOffset + 8).toBeLessThanOrEqual(header.innerNhOffset);
            expect(header.innerNhOffset).toBeLessThan(header.csumStart);
          } else {
            expect(header.flags & NetHeaderFlag.UDP_TUNNEL_CSUM).toBe(0);
          }
        }
      }),
      { numRuns: runs(100) },
    );
  });

  it('leaves its outer checksum open only with the feature for it', async () => {
    start();
    const left = await open('a', SENDS.without(HOST_UDP_TUNNEL_GSO_CSUM));
    const right = await open('b', TAKES.with(MRG_RXBUF));
    const inner = large({ version: 4, protocol: 'tcp', payload: 5000, size: 1000 });
    for (const checksum of [true, false]) {
      const packet = inTunnel(inner, { outer: 4, checksum });
      await left.sendLarge(packet.frame, packet.header);
    }
    expect((await right.receive()).header.flags).toBe(NEEDS_CSUM);
    expect(counter('txHeader', 0)).toBe(1);
  });
});

describe('offloads that are switched off', () => {
  const offloads = (net: NetDriver, bytes: number[]) => net.ctrl(5, 0, bytes);
  const CONTROLLED = TAKES.with(MRG_RXBUF, Feature.CTRL_VQ, Feature.CTRL_GUEST_OFFLOADS);
  const ALL = [0x82, 0x03, 0, 0, 0, 0xc0, 0xc0, 0];

  it('are off until they are switched on again', async () => {
    const [left, right] = await both(CONTROLLED);
    const packet = large({ version: 4, protocol: 'tcp', payload: 3000, size: 1000 });
    const count = async () => {
      await left.sendLarge(packet.frame, packet.header);
      let frames = 1;
      for (let bytes = (await right.receive()).frame.length - 54; bytes < 3000; frames++) {
        bytes += (await right.receive()).frame.length - 54;
      }
      return frames;
    };
    expect(await count()).toBe(1);
    // GUEST_CSUM alone.
    expect((await offloads(right, [2, 0, 0, 0, 0, 0, 0, 0])).ack).toBe(0);
    expect(await count()).toBe(3);
    expect((await offloads(right, ALL)).ack).toBe(0);
    expect(await count()).toBe(1);
  });

  it('are known bit by bit, all 64 of them', async () => {
    const [, right] = await both(withRequirementsMet(CONTROLLED.without(GUEST_USO6)));
    const without = ALL.with(5, 0).with(6, 0x40);
    expect((await offloads(right, without)).ack).toBe(0);
    const wrong = [
      ALL,
      ALL.with(5, 0),
      without.with(7, 1),
      without.with(0, 0x83),
      without.with(3, 1),
      without.slice(0, 7),
    ];
    for (const bytes of wrong) {
      expect((await offloads(right, bytes)).ack, String(bytes)).toBe(1);
    }
  });

  it('do not reach the driver with what waits already: checksums are filled, large packets dropped', async () => {
    const [left, right] = await both(CONTROLLED, 2048, 0);
    const partial = large({ version: 4, protocol: 'udp', payload: 501, size: 0 });
    const { csumStart = 0, csumOffset = 0 } = partial.header;
    await left.send(partial.frame, { flags: NEEDS_CSUM, csumStart, csumOffset });
    await left.sendLarge(TCP4.frame, TCP4.header);
    await left.send(udpFrame(120));
    await until('all are there', () => counter('txPackets', 0) === 3);
    expect((await offloads(right, new Array(8).fill(0))).ack).toBe(0);
    await right.fill();
    const first = await right.receive();
    expect(first.header.flags).toBe(0);
    expect(isChecksummed(first.frame)).toBe(true);
    expect((await right.receive()).frame).toEqual(udpFrame(120));
    expect(counter('rxTooLong', 1)).toBe(1);
  });
});

describe('a checksum that is left open', () => {
  const packet = large({ version: 6, protocol: 'tcp', payload: 501, size: 0 });
  const { csumStart = 0, csumOffset = 0 } = packet.header;
  const asked = { flags: NEEDS_CSUM, csumStart, csumOffset };

  it('stays open for a driver with GUEST_CSUM', async () => {
    const [left, right] = await both(FeatureSet.of(VERSION_1, GUEST_CSUM));
    await left.send(packet.frame, asked);
    const { header, frame } = await right.receive();
    expect(header).toMatchObject({ flags: NEEDS_CSUM, gsoType: 0, gsoSize: 0, csumStart, csumOffset });
    expect(frame).toEqual(packet.frame);
  });

  it('is filled for one without', async () => {
    const [left, right] = await both(FeatureSet.of(VERSION_1));
    await left.send(packet.frame, asked);
    const { header, frame } = await right.receive();
    expect(header).toMatchObject({ flags: 0, csumStart: 0, csumOffset: 0 });
    expect(isChecksummed(frame)).toBe(true);
  });
});

describe('frames from outside', () => {
  it('have their checksums verified for a driver with GUEST_CSUM', async () => {
    const capture = join(folder, 'in.pcap');
    const good = large({ version: 4, protocol: 'tcp', payload: 1001, size: 2000 });
    const frames = [good.frame.slice(), good.frame.slice(), udpFrame(100)];
    // `large` leaves the sum of the pseudo header where the checksum goes.
    let sum = 0;
    for (let i = 34; i < frames[0].length; i++) sum += frames[0][i] << ((i - 34) & 1 ? 0 : 8);
    while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
    frames[0].set([(~sum >>> 8) & 0xff, ~sum & 0xff], 50);
    const writer = new CaptureWriter(capture, { linkType: LinkType.ethernet });
    for (const frame of frames) writer.write(frame, 0, frame.length, 0, 0);
    writer.close();
    device = startDevice({ sockets: [join(folder, 'a')], link: `pcap:${capture},`, ipsec: false });
    const net = await open('a', FeatureSet.of(VERSION_1, GUEST_CSUM, Feature.CTRL_VQ, Feature.DEVICE_STATS));
    const flags: number[] = [];
    for (let i = 0; i < 3; i++) flags.push((await net.receive()).header.flags);
    // Right; wrong; UDP without a checksum.
    expect(flags).toEqual([DATA_VALID, 0, 0]);
    const { result } = await net.ctrl(8, 1, [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0], 40);
    expect([8, 16, 24, 32].map((at) => result[at])).toEqual([1, 0, 2, 1]);
  });
});

describe('a receive queue that is reset', () => {
  it('holds no part of a packet, whenever that happens', async () => {
    start();
    const left = await open('a', SENDS);
    const right = await open('b', TAKES.with(MRG_RXBUF, Feature.RING_RESET), 2048, 0);
    const { driver } = right;
    for (const buffers of [1, 20, 64]) {
      await right.fill(buffers);
      await left.sendLarge(TCP4.frame, TCP4.header);
      await driver.write(F.queueSelect, 2, 0);
      await driver.write(F.queueReset, 2, 1);
      // All of it, or nothing.
      const used = right.rx.usedIndex;
      expect(used).toBe(buffers < 30 ? 0 : Math.ceil((TCP4.frame.length + right.layout.length) / 2048));
      right.rx = await driver.queue(0, 64);
      await right.fill();
      await left.send(udpFrame(60 + buffers));
      expect((await right.receive()).frame).toEqual(udpFrame(60 + buffers));
      await driver.write(F.queueSelect, 2, 0);
      await driver.write(F.queueReset, 2, 1);
      right.rx = await driver.queue(0, 64);
    }
  });
});
