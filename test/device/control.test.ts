/** The control queue of the device, in the bytes of the standard (Virtio 1.4, 5.1.9.5). */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Device, DeviceOptions } from '../../src/device/index.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { runs } from '../depth.ts';
import { NetDriver, udpFrame } from './helpers/net-driver.ts';
import { pause, until } from './helpers/raw-client.ts';
import { startDevice } from './helpers/start.ts';

const OK = 0;
const ERR = 1;
const { VERSION_1, CTRL_VQ, CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, CTRL_MAC_ADDR, MAC, STATUS, GUEST_ANNOUNCE } = Feature;
const BASE = FeatureSet.of(VERSION_1, CTRL_VQ);
const OURS = [0x02, 0x11, 0x22, 0x33, 0x44, 0x55];
const BROADCAST = [255, 255, 255, 255, 255, 255];
const GROUP = [1, 0, 0x5e, 0, 0, 1];
const OTHER = [2, 9, 9, 9, 9, 9];

let folder = '';
let device: Device;
const drivers: NetDriver[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-control-'));
});

afterEach(async () => {
  for (const driver of drivers.splice(0)) driver.close();
  await pause(20);
  expect(device.internalErrors).toBe(0);
  expect(device.packetsInUse).toBe(0);
  device.close();
  rmSync(folder, { recursive: true, force: true });
});

async function open(features: FeatureSet, options: Partial<DeviceOptions> = {}, control?: number): Promise<NetDriver> {
  device = startDevice({ sockets: [join(folder, 'a')], macs: ['02:11:22:33:44:55'], ...options });
  const net = await NetDriver.open(join(folder, 'a'), { features, ...(control !== undefined && { control }) });
  drivers.push(net);
  await net.fill();
  return net;
}

const counter = (name: string) => Number(device.functions[0].statistics()[name]);

/** Which of these destinations come back on the loopback. */
async function passing(net: NetDriver, destinations: number[][]): Promise<number[][]> {
  const passed: number[][] = [];
  for (const mac of destinations) {
    const frame = udpFrame();
    frame.set(mac);
    const before = counter('rxPackets');
    await net.send(frame);
    if (counter('rxPackets') > before) passed.push(mac);
  }
  return passed;
}

const ALL = [OURS, OTHER, GROUP, BROADCAST];

describe('receive filters', () => {
  it('let everything in when they were not negotiated', async () => {
    const net = await open(BASE);
    expect(await passing(net, ALL)).toEqual(ALL);
    expect((await net.ctrl(0, 0, [0])).ack).toBe(ERR);
  });

  it('let in only our own address and broadcast at first, then what the modes say', async () => {
    const net = await open(BASE.with(CTRL_RX, CTRL_RX_EXTRA));
    const set = async (command: number, on: number) => expect((await net.ctrl(0, command, [on])).ack).toBe(OK);
    expect(await passing(net, ALL)).toEqual([OURS, BROADCAST]);
    await set(1, 1);
    expect(await passing(net, ALL)).toEqual([OURS, GROUP, BROADCAST]);
    await set(3, 1);
    expect(await passing(net, ALL)).toEqual([OURS, BROADCAST]);
    await set(2, 1);
    expect(await passing(net, ALL)).toEqual([OURS, OTHER, BROADCAST]);
    await set(4, 1);
    expect(await passing(net, ALL)).toEqual([BROADCAST]);
    await set(5, 1);
    expect(await passing(net, ALL)).toEqual([]);
    await set(0, 1);
    expect(await passing(net, ALL)).toEqual(ALL);
    for (const [command, data] of [
      [0, [2]],
      [0, []],
      [6, [1]],
    ] as const) {
      expect((await net.ctrl(0, command, data)).ack).toBe(ERR);
    }
  });

  it('have tables of addresses', async () => {
    const net = await open(BASE.with(CTRL_RX));
    expect((await net.ctrl(1, 0, [1, 0, 0, 0, ...OTHER, 1, 0, 0, 0, ...GROUP])).ack).toBe(OK);
    expect(await passing(net, ALL)).toEqual(ALL);
    expect((await net.ctrl(1, 0, [0, 0, 0, 0, 0, 0, 0, 0])).ack).toBe(OK);
    expect(await passing(net, ALL)).toEqual([OURS, BROADCAST]);
    const many = Array.from({ length: 65 }, (_, i) => [2, 0, 0, 0, 1, i]).flat();
    expect((await net.ctrl(1, 0, [65, 0, 0, 0, ...many, 0, 0, 0, 0])).ack).toBe(OK);
    expect(await passing(net, ALL), 'too many count as all').toEqual([OURS, OTHER, BROADCAST]);
    for (const data of [
      [],
      [1, 0, 0, 0],
      [2, 0, 0, 0, ...OTHER, 0, 0, 0, 0],
      [255, 255, 255, 255, ...OTHER, 0, 0, 0, 0],
      [1, 0, 0, 0, ...GROUP, 0, 0, 0, 0],
      [0, 0, 0, 0, 1, 0, 0, 0, ...OTHER],
    ]) {
      expect((await net.ctrl(1, 0, data)).ack).toBe(ERR);
    }
  });

  it('know the address that the driver sets, and the configuration shows it until the reset', async () => {
    const net = await open(BASE.with(CTRL_RX, CTRL_MAC_ADDR, MAC));
    expect((await net.ctrl(1, 1, OTHER)).ack).toBe(OK);
    expect(await passing(net, ALL)).toEqual([OTHER, BROADCAST]);
    expect(await net.driver.read(0x2001, 1)).toBe(9);
    expect((await net.ctrl(1, 1, GROUP)).ack).toBe(ERR);
    await net.driver.setStatus(0);
    expect(await net.driver.read(0x2001, 1)).toBe(0x11);
  });

  it('of VLANs let in untagged frames and tags that were added', async () => {
    const net = await open(BASE.with(CTRL_VLAN));
    const tagged = (id: number) => {
      const frame = udpFrame();
      return Uint8Array.from([...frame.subarray(0, 12), 0x81, 0, 0xe0 | (id >>> 8), id & 255, ...frame.subarray(12)]);
    };
    const passes = async (frame: Uint8Array) => {
      const before = counter('rxPackets');
      await net.send(frame);
      return counter('rxPackets') > before;
    };
    expect(await passes(udpFrame())).toBe(true);
    expect(await passes(tagged(0x123))).toBe(false);
    expect((await net.ctrl(2, 0, [0x23, 0x01])).ack).toBe(OK);
    expect(await passes(tagged(0x123))).toBe(true);
    expect(await passes(tagged(0x124))).toBe(false);
    expect((await net.ctrl(2, 1, [0x23, 0x01])).ack).toBe(OK);
    expect(await passes(tagged(0x123))).toBe(false);
    expect((await net.ctrl(2, 0, [0x00, 0x10])).ack).toBe(ERR);
    expect(counter('rxNotForUs')).toBe(3);
  });
});

describe('other control commands', () => {
  it('are refused when they are unknown, too short or not negotiated, and change nothing', async () => {
    const net = await open(BASE);
    for (const [classNumber, command, data] of [
      [0, 0, [1]],
      [1, 1, OURS],
      [2, 0, [1, 0]],
      [3, 0, []],
      [4, 0, [1, 0]],
      [4, 1, new Array<number>(60).fill(0)],
      [4, 2, new Array<number>(60).fill(0)],
      [5, 0, new Array<number>(8).fill(0)],
      [6, 0, new Array<number>(8).fill(0)],
      [6, 2, new Array<number>(12).fill(0)],
      [8, 0, []],
      [9, 0, []],
      [255, 255, []],
    ] as const) {
      expect(await net.ctrl(classNumber, command, data, 16), `${classNumber}/${command}`).toMatchObject({
        ack: ERR,
        length: 1,
      });
    }
  });

  it('acknowledge an announcement, which clears the bit', async () => {
    const net = await open(BASE.with(STATUS, GUEST_ANNOUNCE));
    device.functions[0].announce();
    expect(await net.driver.read(0x2006, 2)).toBe(3);
    expect((await net.ctrl(3, 0, [])).ack).toBe(OK);
    expect(await net.driver.read(0x2006, 2)).toBe(1);
  });

  it('switch only offloads that were negotiated', async () => {
    const net = await open(BASE.with(Feature.CTRL_GUEST_OFFLOADS, Feature.GUEST_CSUM));
    for (const [bits, ack] of [
      [0, OK],
      [2, OK],
      [1 << 7, ERR],
      [2 | (1 << 7), ERR],
    ]) {
      expect((await net.ctrl(5, 0, [bits, 0, 0, 0, 0, 0, 0, 0])).ack).toBe(ack);
    }
  });

  it('set and get coalescing of a queue, which ends with the queue', async () => {
    const net = await open(BASE.with(Feature.NOTF_COAL, Feature.VQ_NOTF_COAL));
    const get = async (index: number) => [...(await net.ctrl(6, 3, [index, 0, 0, 0], 8)).result];
    expect((await net.ctrl(6, 1, [15, 0, 0, 0, 10, 0, 0, 0])).ack).toBe(OK);
    expect(await get(0)).toEqual([15, 0, 0, 0, 10, 0, 0, 0]);
    expect(await get(1)).toEqual([0, 0, 0, 0, 0, 0, 0, 0]);
    expect((await net.ctrl(6, 2, [1, 0, 9, 9, 8, 0, 0, 0, 1, 2, 0, 0])).ack).toBe(OK);
    expect(await get(1)).toEqual([8, 0, 0, 0, 1, 2, 0, 0]);
    expect((await net.ctrl(6, 3, [2, 0, 0, 0], 8)).ack).toBe(ERR);
    expect((await net.ctrl(6, 2, [5, 0, 0, 0, 8, 0, 0, 0, 1, 2, 0, 0])).ack).toBe(ERR);
  });

  it('tell statistics by queue and type', async () => {
    const net = await open(BASE.with(Feature.DEVICE_STATS, Feature.CSUM));
    for (let i = 0; i < 3; i++) await net.send(udpFrame(100));
    const query = await net.ctrl(8, 0, [], 8);
    expect([...query.result]).toEqual([0x07, 0, 0x07, 0, 1, 0, 0, 0]);
    const ask = (queue: number, bits: number[]) => net.ctrl(8, 1, [queue, 0, 0, 0, 0, 0, 0, 0, ...bits], 200);
    const rx = await ask(0, [1, 0, 0, 0, 0, 0, 0, 0]);
    expect(rx.ack).toBe(OK);
    expect([...rx.result.subarray(0, 8)]).toEqual([0, 0, 0, 0, 0, 0, 56, 0]);
    const u64 = (bytes: Uint8Array, i: number) => bytes[8 + 8 * i] + 256 * bytes[9 + 8 * i];
    expect([u64(rx.result, 1), u64(rx.result, 2)]).toEqual([3, 300]);
    const tx = await ask(1, [0, 0, 3, 0, 0, 0, 0, 0]);
    expect(tx.result).toHaveLength(56 + 24);
    expect([u64(tx.result, 0), u64(tx.result, 1), u64(tx.result, 2)]).toEqual([3, 3, 300]);
    expect(u64(tx.result.subarray(56), 0), 'none needed a checksum').toBe(3);
    const control = await ask(2, [0, 0, 0, 0, 1, 0, 0, 0]);
    expect([u64(control.result, 0), u64(control.result, 1)]).toEqual([4, 4]);
    expect((await ask(0, [0, 0, 1, 0, 0, 0, 0, 0])).ack, 'a transmit type').toBe(ERR);
    expect((await ask(0, [2, 0, 0, 0, 0, 0, 0, 0])).ack, 'GUEST_CSUM was not negotiated').toBe(ERR);
    expect((await ask(0, [0, 0, 0, 0, 2, 0, 0, 0])).ack, 'an unknown type').toBe(ERR);
    expect((await ask(3, [0, 0, 0, 0, 0, 0, 0, 0])).ack, 'no such queue').toBe(ERR);
  });
});

/** `struct virtio_net_rss_config`, of which a test wants something else. */
function rssConfig(
  change: {
    types?: number;
    mask?: number;
    unclassified?: number;
    table?: number[];
    transmit?: number;
    key?: number[];
  } = {},
): number[] {
  const { types = 1, table = [0, 0], unclassified = 0, transmit = 1, key = new Array<number>(40).fill(0x6d) } = change;
  const le16 = (value: number) => [value & 0xff, value >>> 8];
  const entries = table.flatMap(le16);
  const mask = change.mask ?? table.length - 1;
  return [
    types & 0xff,
    (types >>> 8) & 0xff,
    0,
    0,
    ...le16(mask),
    ...le16(unclassified),
    ...entries,
    ...le16(transmit),
    key.length,
    ...key,
  ];
}

describe('receive-side scaling', () => {
  const open2 = async (features: FeatureSet) => {
    device = startDevice({ sockets: [join(folder, 'a')], macs: ['02:11:22:33:44:55'], queuePairs: 2 });
    const net = await NetDriver.open(join(folder, 'a'), { features, control: 4 });
    drivers.push(net);
    await net.fill();
    return net;
  };
  const STEERED = BASE.with(Feature.RSS, Feature.MQ, Feature.RSS_CONTEXT);
  const BAD: { name: string; config: number[] }[] = [
    { name: 'nothing', config: [] },
    { name: 'half a structure', config: rssConfig().slice(0, 7) },
    { name: 'a table that is cut', config: rssConfig({ mask: 127 }).slice(0, 100) },
    { name: 'a table whose length is not a power of two', config: rssConfig({ table: [0, 0, 0] }) },
    { name: 'a longer table than there may be', config: rssConfig({ table: new Array<number>(256).fill(0) }) },
    { name: 'the longest table that can be said', config: rssConfig({ mask: 0xffff }) },
    { name: 'a queue that there is not, in the table', config: rssConfig({ table: [0, 2] }) },
    { name: 'a queue that is not enabled, in the table', config: rssConfig({ table: [0, 1] }) },
    { name: 'a queue that there is not, for packets without a hash', config: rssConfig({ unclassified: 0xffff }) },
    { name: 'no transmit queue', config: rssConfig({ transmit: 0 }) },
    { name: 'more transmit queues than there are', config: rssConfig({ transmit: 3 }) },
    { name: 'a hash that is not supported', config: rssConfig({ types: 1 << 6 }) },
    { name: 'a key that is cut', config: rssConfig().slice(0, -1) },
    { name: 'a longer key than there may be', config: rssConfig({ key: new Array<number>(41).fill(1) }) },
  ];

  it.each(BAD)('is refused with $name, as the default and as a context', async ({ config }) => {
    const net = await open2(STEERED);
    expect((await net.ctrl(4, 1, config)).ack).toBe(ERR);
    expect((await net.ctrl(9, 1, [1, 0, 0, 0, 0, 0, 0, 0, ...config])).ack).toBe(ERR);
    expect((await net.ctrl(4, 1, rssConfig())).ack).toBe(OK);
    await net.send(udpFrame());
    expect((await net.receive()).frame).toEqual(udpFrame());
  });

  it('has contexts, which are made, changed and removed by id', async () => {
    const net = await open2(STEERED);
    const context = (command: number, id: number, config: number[] = rssConfig()) =>
      net.ctrl(9, command, command === 3 ? [id, 0] : [id, 0, 9, 9, 9, 9, 9, 9, ...config]);
    expect([...(await net.ctrl(9, 0, [], 2)).result]).toEqual([8, 0]);
    for (const [command, id, ack] of [
      [1, 0, ERR],
      [1, 9, ERR],
      [2, 1, ERR],
      [3, 1, ERR],
      [1, 1, OK],
      [1, 1, ERR],
      [2, 1, OK],
      [1, 8, OK],
      [3, 1, OK],
      [3, 1, ERR],
      [4, 1, ERR],
      [255, 8, ERR],
    ]) {
      expect((await context(command, id)).ack, `${command} ${id}`).toBe(ack);
    }
    for (const length of [0, 1]) expect((await net.ctrl(9, 3, [8, 0].slice(0, length))).ack).toBe(ERR);
    // 5.1.9.5.8: not while there is a context.
    expect((await net.ctrl(4, 0, [1, 0])).ack).toBe(ERR);
    expect((await context(3, 8)).ack).toBe(OK);
    expect((await net.ctrl(4, 0, [1, 0])).ack).toBe(OK);
  });

  it('forgets its contexts with a reset', async () => {
    const net = await open2(STEERED);
    const add = [1, 0, 0, 0, 0, 0, 0, 0, ...rssConfig()];
    expect((await net.ctrl(9, 1, add)).ack).toBe(OK);
    expect((await net.ctrl(9, 1, add)).ack).toBe(ERR);
    net.close();
    drivers.length = 0;
    await until('the session is over', () => device.packetsInUse === 0);
    const next = await NetDriver.open(join(folder, 'a'), { features: STEERED, control: 4 });
    drivers.push(next);
    expect((await next.ctrl(9, 1, add)).ack).toBe(OK);
  });

  it('has no contexts without the feature', async () => {
    const net = await open2(STEERED.without(Feature.RSS_CONTEXT));
    for (const command of [0, 1, 2, 3]) {
      expect((await net.ctrl(9, command, [1, 0, 0, 0, 0, 0, 0, 0, ...rssConfig()], 2)).ack).toBe(ERR);
    }
  });
});

describe('commands that make no sense', () => {
  it.each<{ name: string; features: number[]; classNumber: number; command: number; data: number[] }>([
    {
      name: 'coalescing that is cut',
      features: [Feature.NOTF_COAL],
      classNumber: 6,
      command: 0,
      data: [1, 0, 0, 0, 1, 0, 0],
    },
    {
      name: 'coalescing of a queue that is cut',
      features: [Feature.VQ_NOTF_COAL],
      classNumber: 6,
      command: 2,
      data: [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0],
    },
    {
      name: 'coalescing of the control queue',
      features: [Feature.VQ_NOTF_COAL],
      classNumber: 6,
      command: 2,
      data: [2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
    },
    { name: 'half the number of a queue', features: [Feature.VQ_NOTF_COAL], classNumber: 6, command: 3, data: [0] },
    {
      name: 'no command of coalescing',
      features: [Feature.NOTF_COAL, Feature.VQ_NOTF_COAL],
      classNumber: 6,
      command: 4,
      data: new Array<number>(12).fill(0),
    },
    { name: 'a request for no statistics', features: [Feature.DEVICE_STATS], classNumber: 8, command: 1, data: [] },
    {
      name: 'half a request for statistics',
      features: [Feature.DEVICE_STATS],
      classNumber: 8,
      command: 1,
      data: [0, 0, 0, 0, 0, 0, 0, 0, 1],
    },
    {
      name: 'one request and a half',
      features: [Feature.DEVICE_STATS],
      classNumber: 8,
      command: 1,
      data: new Array<number>(24).fill(0),
    },
    {
      name: 'no command of statistics',
      features: [Feature.DEVICE_STATS],
      classNumber: 8,
      command: 2,
      data: new Array<number>(16).fill(0),
    },
  ])('are refused: $name', async ({ features, classNumber, command, data }) => {
    const net = await open(BASE.with(...features));
    expect(await net.ctrl(classNumber, command, data, 64)).toMatchObject({ ack: ERR, length: 1 });
  });

  it('of any kind are answered, and the device goes on', async () => {
    const { NOTF_COAL, VQ_NOTF_COAL, DEVICE_STATS, GUEST_CSUM, CTRL_GUEST_OFFLOADS, HASH_REPORT } = Feature;
    const features = BASE.with(CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, CTRL_MAC_ADDR, MAC, STATUS, GUEST_ANNOUNCE).with(
      ...[NOTF_COAL, VQ_NOTF_COAL, DEVICE_STATS, GUEST_CSUM, CTRL_GUEST_OFFLOADS, HASH_REPORT],
    );
    const net = await open(features.with(Feature.RSS, Feature.RSS_CONTEXT), {}, 2);
    const byte = fc.oneof(fc.constantFrom(0, 1, 2, 0x7f, 0xff), fc.integer({ min: 0, max: 255 }));
    const command = fc.tuple(
      fc.integer({ min: 0, max: 10 }),
      fc.integer({ min: 0, max: 6 }),
      fc.array(byte, { maxLength: 300 }),
      fc.integer({ min: 0, max: 300 }),
    );
    await fc.assert(
      fc.asyncProperty(command, async ([classNumber, number, data, room]) => {
        const { ack, length } = await net.ctrl(classNumber, number, data, room);
        expect([OK, ERR]).toContain(ack);
        expect(length).toBeLessThanOrEqual(1 + room);
        if (ack === ERR) expect(length).toBe(1);
      }),
      { numRuns: runs(150) },
    );
    expect(await net.driver.status()).toBe(15);
  });
});
