import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Device, DeviceOptions } from '../../src/device/index.ts';
import { checksum } from '../../src/packet/checksum.ts';
import { PollEvent, poll } from '../../src/sys/libc.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { DeviceStatus, CommonCfgField as F } from '../../src/virtio/pci-layout.ts';
import { NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { GUEST_IOVA, GUEST_SIZE, MiniDriver, type Ring } from './helpers/mini-driver.ts';
import { NetDriver, udpFrame } from './helpers/net-driver.ts';
import { pause, until } from './helpers/raw-client.ts';
import { startDevice } from './helpers/start.ts';

const CONFIG = 7;
let folder = '';
let device: Device;
const drivers: { close(): void }[] = [];

function start(options: Partial<DeviceOptions> = {}): string[] {
  const sockets = options.link === 'pair' ? [join(folder, 'a'), join(folder, 'b')] : [join(folder, 'a')];
  device = startDevice({ sockets, ...options });
  return sockets;
}

async function open(path: string, options: Parameters<typeof NetDriver.open>[1] = {}): Promise<NetDriver> {
  const net = await NetDriver.open(path, options);
  drivers.push(net);
  return net;
}

const counters = (n = 0) => device.functions[n].statistics();
const counter = (name: string, n = 0) => counters(n)[name];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-traffic-'));
});

afterEach(async () => {
  for (const driver of drivers.splice(0)) driver.close();
  await pause(20);
  expect(device.internalErrors).toBe(0);
  expect(device.packetsInUse).toBe(0);
  device.close();
  rmSync(folder, { recursive: true, force: true });
});

describe('a network function on a loopback', () => {
  it.each([14, 15, 60, 64, 1000, 1513, 1514])('brings a frame of %i bytes back unchanged', async (length) => {
    const [path] = start();
    const net = await open(path);
    await net.fill();
    const frame = udpFrame(Math.max(length, 42)).slice(0, length);
    await net.send(frame);
    const received = await net.receive();
    expect(received.frame).toEqual(frame);
    expect(received.header).toMatchObject({ flags: 0, gsoType: 0, numBuffers: 1 });
  });

  it.each<[string, number[], 'virtio-1.4' | 'rfc-2025-01', number]>([
    ['the basic header', [], 'virtio-1.4', 12],
    ['OUT_NET_HEADER', [Feature.OUT_NET_HEADER], 'virtio-1.4', 32],
    ['IPSEC', [Feature.IPSEC], 'virtio-1.4', 32],
    ['IPSEC of the draft', [Feature.IPSEC], 'rfc-2025-01', 18],
  ])('speaks %s', async (_, bits, wire, length) => {
    const [path] = start({ wire });
    const net = await open(path, { features: FeatureSet.of(Feature.VERSION_1, ...bits), revision: wire });
    expect(net.layout.length).toBe(length);
    await net.fill();
    await net.send(udpFrame());
    expect((await net.receive()).frame).toEqual(udpFrame());
  });

  it('keeps the order of many frames, and loses none', async () => {
    const [path] = start();
    const net = await open(path);
    await net.fill();
    for (let round = 0; round < 40; round++) {
      for (let i = 0; i < 32; i++) net.offer(udpFrame(60 + i, { fill: round }));
      await net.driver.notify(1);
      for (let i = 0; i < 32; i++) {
        const { frame } = await net.receive();
        const sent = udpFrame(60 + i, { fill: round });
        // `expect` looks at each byte by itself.
        if (Buffer.compare(frame, sent) !== 0) expect(frame).toEqual(sent);
        await net.tx.wait();
      }
    }
    expect(counters()).toMatchObject({ txPackets: 1280, rxPackets: 1280, rxNoBuffer: 0 });
  });

  it('collects a frame from descriptors of any size', async () => {
    const [path] = start();
    const net = await open(path);
    await net.fill();
    const at = net.driver.allocate(4096);
    const bytes = new Uint8Array(12 + 200);
    bytes.set(udpFrame(200), 12);
    net.driver.memory.u8.set(bytes, at);
    const cuts = [0, 1, 5, 12, 13, 100, 212];
    for (let i = 0; i + 1 < cuts.length; i++) {
      const last = i + 2 === cuts.length;
      net.tx.descriptor(i, at + cuts[i], cuts[i + 1] - cuts[i], last ? 0 : 1, i + 1);
    }
    net.tx.offer(0);
    await net.driver.notify(1);
    expect((await net.receive()).frame).toEqual(udpFrame(200));
  });

  it('holds frames for which there is no buffer until there is one', async () => {
    const [path] = start();
    const net = await open(path);
    for (let i = 0; i < 10; i++) await net.send(udpFrame(60 + i));
    expect(counters()).toMatchObject({ txPackets: 10, rxPackets: 0 });
    await net.fill(20);
    for (let i = 0; i < 10; i++) expect((await net.receive()).frame.length).toBe(60 + i);
  });

  it('drops frames when the driver takes none, and its transmit queue goes on', async () => {
    const [path] = start();
    const net = await open(path);
    for (let i = 0; i < 30; i++) {
      for (let k = 0; k < 60; k++) net.offer(udpFrame());
      await net.driver.notify(1);
      for (let k = 0; k < 60; k++) await net.tx.wait();
    }
    expect(counter('txPackets')).toBe(1800);
    expect(counter('rxNoBuffer')).toBeGreaterThan(0);
    expect(device.packetsInUse).toBeLessThanOrEqual(1024);
  });

  it.each([
    ['no bytes at all', 0],
    ['less than a header', 11],
    ['a header and nothing else', 12],
    ['a frame of 13 bytes', 25],
    ['a frame that is too long', 12 + 1500 + 23],
  ])('drops a buffer with %s, and returns it', async (_, length) => {
    const [path] = start();
    const net = await open(path);
    await net.fill();
    const at = net.driver.allocate(4096);
    net.tx.descriptor(0, at, length, 0);
    net.tx.offer(0);
    await net.driver.notify(1);
    expect(await net.tx.wait()).toEqual({ id: 0, length: 0 });
    expect(counters()).toMatchObject({ txLength: 1, txPackets: 0 });
    await net.send(udpFrame());
    expect((await net.receive()).frame).toEqual(udpFrame());
  });

  it.each<[string, object]>([
    ['a GSO type that was not offered', { gsoType: 1, flags: 1, gsoSize: 100, csumStart: 34, csumOffset: 6 }],
    ['both UDP tunnel types', { gsoType: 0x61, flags: 1 }],
    ['UDP_TUNNEL_CSUM without a tunnel', { flags: NetHeaderFlag.UDP_TUNNEL_CSUM }],
    ['a checksum without CSUM', { flags: 1, csumStart: 34, csumOffset: 6 }],
  ])('drops a frame with %s', async (_, header) => {
    const [path] = start();
    const net = await open(path);
    await net.fill();
    await net.send(udpFrame(), header);
    expect(counters()).toMatchObject({ txHeader: 1, txPackets: 0 });
  });

  it('fills in the checksum that the driver left to it', async () => {
    const [path] = start();
    const net = await open(path, { features: FeatureSet.of(Feature.VERSION_1, Feature.CSUM) });
    await net.fill();
    const frame = udpFrame(101);
    // The sum of the pseudo header stands in the field, as 5.1.9.2 says.
    let sum = 17 + 67;
    for (let i = 26; i < 34; i += 2) sum += (frame[i] << 8) | frame[i + 1];
    sum = (sum & 0xffff) + (sum >>> 16);
    frame.set([sum >>> 8, sum], 40);
    await net.send(frame, { flags: NetHeaderFlag.NEEDS_CSUM, csumStart: 34, csumOffset: 6 });
    const got = (await net.receive()).frame;
    const pseudo = new Uint8Array(12 + 67);
    pseudo.set(got.subarray(26, 34));
    pseudo.set([0, 17, 0, 67], 8);
    pseudo.set(got.subarray(34), 12);
    expect(checksum(pseudo, 0, pseudo.length)).toBe(0);
    for (const [csumStart, csumOffset] of [
      [101, 0],
      [100, 0],
      [99, 1],
      [65535, 65535],
      [0, 100],
    ]) {
      await net.send(frame, { flags: NetHeaderFlag.NEEDS_CSUM, csumStart, csumOffset });
    }
    expect(counter('txHeader')).toBe(5);
  });

  it('spreads a frame over small buffers with MRG_RXBUF', async () => {
    const [path] = start();
    const net = await open(path, { features: FeatureSet.of(Feature.VERSION_1, Feature.MRG_RXBUF), bufferSize: 100 });
    await net.fill();
    for (const length of [60, 88, 89, 188, 189, 1000, 1514]) {
      await net.send(udpFrame(length));
      const received = await net.receive();
      expect(received.frame).toEqual(udpFrame(length));
      expect(received.buffers).toBe(Math.ceil((length + 12) / 100));
      expect(received.header.numBuffers).toBe(received.buffers);
    }
  });

  it('waits for enough buffers before it begins to spread a frame', async () => {
    const [path] = start();
    const net = await open(path, { features: FeatureSet.of(Feature.VERSION_1, Feature.MRG_RXBUF), bufferSize: 100 });
    await net.fill(5);
    await net.send(udpFrame(1000));
    // It sleeps meanwhile, and wants to be told of more.
    await until('sleep', () => net.rx.memory.u16[net.rx.used >>> 1] === 0);
    const { user } = process.cpuUsage();
    await pause(100);
    expect(process.cpuUsage().user - user).toBeLessThan(50_000);
    expect(net.rx.usedIndex).toBe(0);
    for (let i = 5; i < 20; i++) net.post(i);
    await net.driver.notify(0);
    expect((await net.receive()).frame).toEqual(udpFrame(1000));
  });

  it('drops a frame that does not fit the buffer without MRG_RXBUF, and keeps the buffer', async () => {
    const [path] = start();
    const net = await open(path, { bufferSize: 200 });
    await net.fill(1);
    await net.send(udpFrame(189));
    await net.send(udpFrame(188));
    expect((await net.receive()).frame).toEqual(udpFrame(188));
    expect(counters()).toMatchObject({ rxTooLong: 1, rxPackets: 1 });
  });

  it('passes no frame above the MTU when MTU was negotiated', async () => {
    const [path] = start({ mtu: 1000 });
    const net = await open(path, { features: FeatureSet.of(Feature.VERSION_1, Feature.MTU) });
    await net.fill();
    await net.send(udpFrame(1015));
    await net.send(udpFrame(1014));
    expect((await net.receive()).frame.length).toBe(1014);
    expect(counter('rxTooLong')).toBe(1);
  });

  it('interrupts for used buffers unless told not to', async () => {
    const [path] = start();
    const net = await open(path, { vectors: true });
    await net.fill();
    const readable = (v: number) => poll(net.driver.eventfds[v], PollEvent.in, 0) !== 0;
    net.rx.memory.u16[net.rx.avail >>> 1] = 1;
    await net.send(udpFrame());
    await net.receive();
    expect([readable(0), readable(1), readable(2)]).toEqual([false, false, true]);
    net.rx.memory.u16[net.rx.avail >>> 1] = 0;
    await net.send(udpFrame());
    await net.receive();
    await until('the interrupt', () => readable(1));
  });

  it('asks for no notifications while it works, and for one before it sleeps', async () => {
    const [path] = start();
    const net = await open(path);
    await net.fill();
    const noNotify = () => net.tx.memory.u16[net.tx.used >>> 1];
    await until('sleep', () => noNotify() === 0);
    await net.driver.notify(1);
    expect(noNotify()).toBe(1);
    // Awake, it sees a frame without being told.
    net.offer(udpFrame());
    await net.tx.wait();
    await until('sleep', () => noNotify() === 0);
  });

  it('does no DMA while bus mastering is disabled', async () => {
    const [path] = start();
    const net = await open(path);
    await net.fill();
    await net.driver.client.write(CONFIG, 4, 2, 2);
    net.offer(udpFrame());
    await net.driver.notify(1);
    await pause(20);
    expect(net.tx.usedIndex).toBe(0);
    await net.driver.client.write(CONFIG, 4, 2, 6);
    expect(await net.tx.wait()).toEqual({ id: 0, length: 0 });
  });

  it('uses no buffer before DRIVER_OK', async () => {
    const [path] = start();
    const driver = await MiniDriver.open(path);
    drivers.push(driver);
    await driver.negotiate(FeatureSet.of(Feature.VERSION_1));
    const tx = await driver.queue(1, 16);
    tx.descriptor(0, driver.allocate(4096), 100, 0);
    tx.offer(0);
    await driver.notify(1);
    await pause(20);
    expect(tx.usedIndex).toBe(0);
    await driver.driverOk();
    await tx.wait();
  });
});

describe('a driver that breaks the rules', () => {
  it.each<[string, (net: NetDriver) => void]>([
    [
      'points a descriptor at memory that is not mapped',
      (net) => {
        net.tx.descriptor(0, GUEST_SIZE, 100, 0);
        net.tx.offer(0);
      },
    ],
    [
      'points a descriptor at the end of memory',
      (net) => {
        net.tx.descriptor(0, GUEST_SIZE - 50, 100, 0);
        net.tx.offer(0);
      },
    ],
    [
      'points a descriptor at address 2^64 - 1',
      (net) => {
        net.tx.descriptor(0, 0, 100, 0, 0, 0);
        net.tx.memory.u32.fill(0xffffffff, net.tx.descriptors >>> 2, (net.tx.descriptors >>> 2) + 2);
        net.tx.offer(0);
      },
    ],
    [
      'makes a chain that loops',
      (net) => {
        net.tx.descriptor(0, 0, 100, 1, 0);
        net.tx.offer(0);
      },
    ],
    ['offers a head that does not exist', (net) => net.tx.offer(64)],
    [
      'lets the available index jump',
      (net) => {
        net.tx.nextAvail = 1000;
        net.tx.offer(0);
      },
    ],
    [
      'uses an indirect table without having negotiated it',
      (net) => {
        net.tx.descriptor(0, 0, 16, 4);
        net.tx.offer(0);
      },
    ],
  ])('gets DEVICE_NEEDS_RESET and an interrupt when it %s, and works again after a reset', async (_, misbehave) => {
    const [path] = start();
    const net = await open(path, { vectors: true });
    await net.fill();
    misbehave(net);
    await net.driver.notify(1);
    await until('the configuration interrupt', () => poll(net.driver.eventfds[0], PollEvent.in, 0) !== 0);
    expect((await net.driver.status()) & DeviceStatus.DEVICE_NEEDS_RESET).toBe(DeviceStatus.DEVICE_NEEDS_RESET);
    expect(counter('failure')).toMatch(/queue 1/);
    await net.driver.setStatus(0);
    expect(await net.driver.status()).toBe(0);
    net.close();
    drivers.length = 0;
    const next = await open(path);
    await next.fill();
    await next.send(udpFrame());
    expect((await next.receive()).frame).toEqual(udpFrame());
  });

  it('that unmaps a ring while it is in use gets DEVICE_NEEDS_RESET', async () => {
    const [path] = start();
    const net = await open(path);
    await net.fill();
    await net.driver.client.dmaUnmap(GUEST_IOVA, GUEST_SIZE);
    await net.driver.notify(1);
    await until('failure', () => counter('failure') !== null);
    expect((await net.driver.status()) & DeviceStatus.DEVICE_NEEDS_RESET).toBe(DeviceStatus.DEVICE_NEEDS_RESET);
  });

  it('that asks for what was not offered does not get FEATURES_OK', async () => {
    const [path] = start({ ipsec: false });
    const driver = await MiniDriver.open(path);
    drivers.push(driver);
    const V = Feature.VERSION_1;
    expect(await driver.negotiate(FeatureSet.of(V, Feature.IPSEC))).toBe(false);
    expect(await driver.negotiate(FeatureSet.of(V, Feature.SR_IOV))).toBe(false);
    expect(await driver.negotiate(FeatureSet.of(Feature.MAC))).toBe(false);
    expect(await driver.negotiate(FeatureSet.of(V, Feature.MAC))).toBe(true);
  });

  it('that leaves in the middle of traffic leaves nothing behind', async () => {
    const [path] = start();
    const net = await open(path);
    for (let i = 0; i < 50; i++) net.offer(udpFrame());
    await net.driver.notify(1);
    await net.tx.wait();
    net.close();
    drivers.length = 0;
    await until('its frames to be freed', () => device.packetsInUse === 0);
    const next = await open(path);
    await next.fill();
    await next.send(udpFrame(77));
    expect((await next.receive()).frame).toEqual(udpFrame(77));
  });
});

describe('a queue that is reset alone', () => {
  it('is not touched any more, and works again with another size', async () => {
    const [path] = start();
    const net = await open(path, { features: FeatureSet.of(Feature.VERSION_1, Feature.RING_RESET) });
    await net.fill();
    await net.driver.write(F.queueSelect, 2, 1);
    await net.driver.write(F.queueReset, 2, 1);
    expect(await net.driver.read(F.queueEnable, 2)).toBe(0);
    net.offer(udpFrame());
    await net.driver.notify(1);
    await pause(20);
    expect(net.tx.usedIndex).toBe(0);
    net.tx = await net.driver.queue(1, 32);
    await net.send(udpFrame(99));
    expect((await net.receive()).frame).toEqual(udpFrame(99));
  });
});

describe('two functions on a pair', () => {
  it('pass frames to each other', async () => {
    const [a, b] = start({ link: 'pair', ipsec: [true, false] });
    const left = await open(a);
    const right = await open(b);
    await left.fill();
    await right.fill();
    await left.send(udpFrame(200));
    await right.send(udpFrame(300));
    expect((await right.receive()).frame).toEqual(udpFrame(200));
    expect((await left.receive()).frame).toEqual(udpFrame(300));
    expect(device.functions.map(({ ipsec }) => ipsec)).toEqual([true, false]);
  });

  it('drop frames for a function that nobody drives', async () => {
    const [a] = start({ link: 'pair' });
    const left = await open(a);
    for (let i = 0; i < 10; i++) await left.send(udpFrame());
    expect(counter('rxNotReady', 1)).toBe(10);
  });
});

describe('several queue pairs', () => {
  /** Its rings: two pairs, and the control queue. */
  async function openTwoPairs() {
    const [path] = start({ queuePairs: 2 });
    const driver = await MiniDriver.open(path);
    drivers.push(driver);
    expect(await driver.negotiate(FeatureSet.of(Feature.VERSION_1, Feature.CTRL_VQ, Feature.MQ))).toBe(true);
    const rings: Ring[] = [];
    for (let index = 0; index < 5; index++) rings.push(await driver.queue(index, 16));
    await driver.driverOk();
    return { driver, rings };
  }

  it('are used after the control command, and a flow comes back where it went out', async () => {
    const { driver, rings } = await openTwoPairs();
    const data = driver.allocate(64 * 4096);
    for (const rx of [0, 2]) {
      for (let i = 0; i < 8; i++) {
        rings[rx].descriptor(i, data + (rx * 8 + i) * 4096, 2048, 2);
        rings[rx].offer(i);
      }
    }
    const control = async (bytes: number[]) => {
      const at = data + 40 * 4096;
      driver.memory.u8.set(bytes, at);
      driver.memory.u8[at + 100] = 0xee;
      rings[4].descriptor(0, at, bytes.length, 1, 1);
      rings[4].descriptor(1, at + 100, 1, 2);
      rings[4].offer(0);
      await driver.notify(4);
      await rings[4].wait();
      return driver.memory.u8[at + 100];
    };
    expect(await control([4, 0, 3, 0])).toBe(1);
    expect(await control([4, 0, 0, 0])).toBe(1);
    expect(await control([0, 0, 1])).toBe(1);
    expect(await control([4])).toBe(1);
    expect(await control([4, 0, 2, 0])).toBe(0);
    for (const [port, pair] of [
      [1, 1],
      [2, 0],
      [3, 1],
      [4, 1],
    ]) {
      const at = data + 50 * 4096;
      driver.memory.u8.fill(0, at, at + 12);
      driver.memory.u8.set(udpFrame(100, { source: port }), at + 12);
      const tx = rings[2 * pair + 1];
      tx.descriptor(0, at, 112, 0);
      tx.offer(0);
      await driver.notify(2 * pair + 1);
      await tx.wait();
      expect((await rings[2 * pair].wait()).length).toBe(112);
    }
  });

  it('that are not used yet keep what is put there, and do not keep the device awake', async () => {
    const { driver, rings } = await openTwoPairs();
    const data = driver.allocate(4 * 4096);
    driver.memory.u8.set(udpFrame(), data + 12);
    rings[3].descriptor(0, data, 112, 0);
    rings[3].offer(0);
    await driver.notify(3);
    const noNotify = () => rings[1].memory.u16[rings[1].used >>> 1];
    await until('sleep', () => noNotify() === 0);
    expect(rings[3].usedIndex).toBe(0);
    driver.memory.u8.set([4, 0, 2, 0], data + 4096);
    rings[4].descriptor(0, data + 4096, 4, 1, 1);
    rings[4].descriptor(1, data + 8192, 1, 2);
    rings[4].offer(0);
    await driver.notify(4);
    await rings[4].wait();
    await rings[3].wait();
  });
});

describe('the device configuration', () => {
  it('shows MAC, link status, MTU and speed', async () => {
    const [path] = start({ macs: ['02:11:22:33:44:55'], mtu: 1400 });
    const driver = await MiniDriver.open(path);
    drivers.push(driver);
    const mac: number[] = [];
    for (let i = 0; i < 6; i++) mac.push(await driver.read(0x2000 + i, 1));
    expect(mac).toEqual([2, 0x11, 0x22, 0x33, 0x44, 0x55]);
    expect(await driver.read(0x2006, 2)).toBe(1);
    expect(await driver.read(0x200a, 2)).toBe(1400);
    expect(await driver.read(0x200c, 4)).toBe(40000);
  });
});
