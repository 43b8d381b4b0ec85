/** Offloads and control commands between the driver and a software device in a process of its own. */
import { afterEach, describe, expect, it } from 'vitest';
import {
  Feature,
  FeatureSet,
  HashReport,
  HashType,
  type Nic,
  type NicOptions,
  openNic,
  PacketFlag,
} from '../../src/index.ts';
import { large } from '../device/helpers/large.ts';
import { udpFrame } from '../device/helpers/net-driver.ts';
import { cleanUp, startDevice } from './support.ts';

afterEach(cleanUp);

async function open(options: NicOptions = {}, queuePairs = 1): Promise<Nic> {
  const device = await startDevice({ queuePairs });
  return openNic(device.addresses[0], { ipsec: 'off', queuePairs, ...options });
}

/** Sends one packet, over as many slots as it needs. */
async function send(nic: Nic, bytes: Uint8Array, prepare: (p: number) => void = () => {}): Promise<void> {
  const { packets } = nic;
  const room = packets.stride - packets.headroom;
  const slots = new Uint32Array(Math.ceil(bytes.length / room));
  expect(packets.allocate(slots, slots.length)).toBe(slots.length);
  for (const [i, p] of slots.entries()) {
    packets.write(p, bytes.subarray(i * room, (i + 1) * room));
    if (i > 0) packets.next[slots[i - 1]] = p;
  }
  prepare(slots[0]);
  expect(nic.queues[0].tx.burst(slots, 1)).toBe(1);
}

interface Got {
  readonly bytes: Uint8Array;
  readonly slots: number;
  readonly hash: number;
  readonly report: number;
  readonly queue: number;
}

/** What comes until `n` packets are there, or nothing more does. */
async function receive(nic: Nic, n: number): Promise<Got[]> {
  const out = new Uint32Array(64);
  const all: Got[] = [];
  const { packets } = nic;
  for (let left = 200; left > 0 && all.length < n; left--) {
    for (const [queue, { rx }] of nic.queues.entries()) {
      const count = rx.burst(out, out.length);
      for (const p of out.subarray(0, count)) {
        let slots = 0;
        for (let q = p; q < packets.count; q = packets.next[q]) slots++;
        all.push({ bytes: packets.readChain(p), slots, hash: packets.hash[p], report: packets.hashReport[p], queue });
      }
      packets.freeChains(out, count);
    }
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
  return all;
}

describe('segmentation', () => {
  it('in the device makes of one large packet over many slots all its segments', async () => {
    await using nic = await open();
    const packet = large({ version: 4, protocol: 'tcp', payload: 30000, size: 1448, options: 12 });
    await send(nic, packet.frame, (p) => {
      nic.packets.flags[p] = PacketFlag.needsChecksum | PacketFlag.segmented;
      nic.packets.checksumStart[p] = packet.header.csumStart ?? 0;
      nic.packets.checksumOffset[p] = packet.header.csumOffset ?? 0;
      nic.packets.gsoType[p] = packet.header.gsoType ?? 0;
      nic.packets.gsoSize[p] = 1448;
    });
    const got = await receive(nic, 21);
    expect(got).toHaveLength(21);
    const payload = got.flatMap(({ bytes }) => [...bytes.subarray(66)]);
    expect(payload).toEqual([...packet.payload]);
    const statistics = await nic.control?.deviceStatistics(1);
    expect(statistics?.transmitSegmentation).toMatchObject({ packets: 1, bytes: packet.frame.length, segments: 21 });
  });
});

describe('buffers that are merged', () => {
  it('bring packets that are longer than a slot, and lose none', async () => {
    await using nic = await open({ packetStride: 512, offloads: { mergeBuffers: true } });
    for (let round = 0; round < 20; round++) {
      for (const length of [60, 384, 385, 1000, 1514]) await send(nic, udpFrame(length));
      const got = await receive(nic, 5);
      expect(got.map(({ bytes }) => bytes.length)).toEqual([60, 384, 385, 1000, 1514]);
      expect(got.map(({ slots }) => slots)).toEqual([1, 1, 2, 3, 4]);
      expect(got[4].bytes).toEqual(udpFrame(1514));
    }
    expect(nic.statistics().rx.invalid).toBe(0);
  });
});

describe('control commands', () => {
  it('filter by address', async () => {
    await using nic = await open({ offloads: { macFilter: true } });
    const frame = (mac: ArrayLike<number>) => {
      const bytes = udpFrame();
      bytes.set(mac);
      return bytes;
    };
    const other = [2, 9, 9, 9, 9, 9];
    const count = async () => {
      await send(nic, frame(other));
      await send(nic, frame(nic.mac));
      return (await receive(nic, 2)).length;
    };
    expect(await count()).toBe(1);
    await nic.control?.setMacTable([Uint8Array.from(other)], []);
    expect(await count()).toBe(2);
    await nic.control?.setMacTable([], []);
    expect(await count()).toBe(1);
    await nic.control?.setReceiveMode('promiscuous', true);
    expect(await count()).toBe(2);
  });

  it('steer by hash, which is reported', async () => {
    await using nic = await open({ offloads: { rss: true, hashReport: true } }, 2);
    const key = Uint8Array.from({ length: 40 }, (_, i) => i * 37 + 11);
    const hashTypes = HashType.UDPV4 | HashType.IPV4;
    const indirectionTable = Array.from({ length: 128 }, (_, i) => (i % 4 === 0 ? 1 : 0));
    await nic.control?.setRss({ hashTypes, unclassifiedQueue: 1, indirectionTable, maxTransmitQueues: 2, key });
    for (let i = 0; i < 40; i++) await send(nic, udpFrame(100, { source: 2000 + i }));
    const arp = udpFrame();
    arp.set([8, 6], 12);
    await send(nic, arp);
    const got = await receive(nic, 41);
    expect(got).toHaveLength(41);
    for (const { hash, report, queue } of got) {
      expect(queue).toBe(report === HashReport.NONE ? 1 : indirectionTable[hash & 127]);
    }
    expect(got.filter(({ report }) => report === HashReport.UDPV4)).toHaveLength(40);
    expect(new Set(got.map(({ queue }) => queue)).size).toBe(2);
  });

  it('keep RSS contexts', async () => {
    await using nic = await open({ offloads: { rss: true } }, 2);
    const { control } = nic;
    if (control === null) throw new Error('no control queue');
    const config = { hashTypes: HashType.IPV4, unclassifiedQueue: 0, indirectionTable: [0, 1], maxTransmitQueues: 2 };
    const rss = { ...config, key: new Uint8Array(40).fill(3) };
    const code = (of: Promise<unknown>) =>
      of.then(
        () => 'done',
        (error) => error.code,
      );
    const limit = await control.rssContexts();
    expect(limit).toBeGreaterThan(0);
    expect(await code(control.addRssContext(1, rss))).toBe('done');
    expect(await code(control.addRssContext(1, rss))).toBe('CONTROL_REFUSED');
    expect(await code(control.modifyRssContext(1, { ...rss, indirectionTable: [1, 0] }))).toBe('done');
    expect(await code(control.modifyRssContext(limit + 1, rss))).toBe('CONTROL_REFUSED');
    expect(await code(control.addRssContext(0, rss))).toBe('CONTROL_ARGUMENT');
    expect(await code(control.addRssContext(2, { ...rss, indirectionTable: [0, 2] }))).toBe('CONTROL_ARGUMENT');
    expect(await code(control.removeRssContext(1))).toBe('done');
    expect(await code(control.removeRssContext(1))).toBe('CONTROL_REFUSED');
    expect(await code(control.removeRssContext(65536))).toBe('CONTROL_ARGUMENT');
  });

  it('set what can be set, and are refused with a reason when they cannot', async () => {
    await using nic = await open({ offloads: { vlanFilter: true } });
    const { control } = nic;
    if (control === null) throw new Error('no control queue');
    await control.setMac(Uint8Array.of(2, 1, 2, 3, 4, 5));
    await control.addVlan(5);
    await control.removeVlan(5);
    await control.acknowledgeAnnounce();
    await control.setGuestOffloads(FeatureSet.of(Feature.GUEST_CSUM));
    await control.setGuestOffloads(FeatureSet.empty);
    await control.setCoalescing('rx', { maxPackets: 16, maxMicroseconds: 50 });
    expect(await control.queueCoalescing(0)).toEqual({ maxPackets: 16, maxMicroseconds: 50 });
    await control.setQueueCoalescing(1, { maxPackets: 3, maxMicroseconds: 0xffffffff });
    expect(await control.queueCoalescing(1)).toEqual({ maxPackets: 3, maxMicroseconds: 0xffffffff });
    expect((await control.deviceStatistics(2)).control).toMatchObject({ commands: 12, succeeded: 12 });
    const code = (of: Promise<unknown>) =>
      of.then(
        () => 'done',
        (error) => error.code,
      );
    expect(await code(control.setReceiveMode('promiscuous', true))).toBe('CONTROL_UNSUPPORTED');
    expect(await code(control.setQueuePairs(1))).toBe('CONTROL_UNSUPPORTED');
    expect(
      await code(
        control.setRss({
          hashTypes: 0,
          unclassifiedQueue: 0,
          indirectionTable: [0],
          maxTransmitQueues: 1,
          key: new Uint8Array(0),
        }),
      ),
    ).toBe('CONTROL_UNSUPPORTED');
    expect(await code(control.setMac(Uint8Array.of(1, 1, 2, 3, 4, 5)))).toBe('CONTROL_ARGUMENT');
    expect(await code(control.addVlan(4096))).toBe('CONTROL_ARGUMENT');
    expect(await code(control.setGuestOffloads(FeatureSet.of(Feature.CSUM)))).toBe('CONTROL_ARGUMENT');
    expect(await code(control.queueCoalescing(2))).toBe('CONTROL_ARGUMENT');
    expect(await code(control.deviceStatistics(3))).toBe('CONTROL_ARGUMENT');
  });

  it('coalesced or not, traffic goes on', async () => {
    await using nic = await open();
    await nic.control?.setCoalescing('tx', { maxPackets: 1000, maxMicroseconds: 1000000 });
    await nic.control?.setCoalescing('rx', { maxPackets: 1000, maxMicroseconds: 1000000 });
    for (let i = 0; i < 10; i++) await send(nic, udpFrame(60 + i));
    expect(await receive(nic, 10)).toHaveLength(10);
  });
});
