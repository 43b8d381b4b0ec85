import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CHECKS } from '../../src/conform/index.ts';
import { type Device, FAULTS } from '../../src/device/index.ts';
import { PollEvent, poll } from '../../src/sys/libc.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { DeviceStatus, CommonCfgField as F } from '../../src/virtio/pci-layout.ts';
import { MiniDriver } from './helpers/mini-driver.ts';
import { NetDriver, udpFrame } from './helpers/net-driver.ts';
import { pause } from './helpers/raw-client.ts';
import { startDevice } from './helpers/start.ts';

const CONFIG = 7;
const V1 = FeatureSet.of(Feature.VERSION_1);
let folder = '';
let path = '';
let device: Device;
const closers: { close(): void }[] = [];

function start(fault: string): void {
  device = startDevice({ sockets: [path], faults: [fault] });
}

async function bare(): Promise<MiniDriver> {
  const driver = await MiniDriver.open(path);
  closers.push(driver);
  return driver;
}

async function open(options: Parameters<typeof NetDriver.open>[1] = {}): Promise<NetDriver> {
  const net = await NetDriver.open(path, options);
  closers.push(net);
  await net.fill();
  return net;
}

/** Offsets and `cfg_type`s of the capability list, as far as it makes sense. */
async function capabilities(driver: MiniDriver): Promise<{ at: number; type: number; bar: number; end: number }[]> {
  const list = [];
  let at = await driver.client.read(CONFIG, 0x34, 1);
  while (at >= 0x40 && list.length < 20) {
    const offset = await driver.client.read(CONFIG, at + 8, 4);
    const length = await driver.client.read(CONFIG, at + 12, 4);
    const type = await driver.client.read(CONFIG, at + 3, 1);
    list.push({ at, type, bar: await driver.client.read(CONFIG, at + 4, 1), end: offset + length });
    at = await driver.client.read(CONFIG, at + 1, 1);
  }
  list.push({ at, type: -1, bar: -1, end: 0 });
  return list;
}

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-faults-'));
  path = join(folder, 'device.sock');
});

afterEach(() => {
  for (const each of closers.splice(0)) each.close();
  device.close();
  rmSync(folder, { recursive: true, force: true });
});

/** What a driver sees of each fault. Those that end the process are tested where a process can be spared. */
const SEEN: Partial<Record<keyof typeof FAULTS, () => Promise<void>>> = {
  'no-version-1': async () => expect((await (await bare()).offered()).has(Feature.VERSION_1)).toBe(false),
  'features-ok-refused': async () => expect(await (await bare()).negotiate(V1)).toBe(false),
  'reset-stuck': async () => {
    const driver = await bare();
    await driver.setStatus(0);
    expect(await driver.status()).not.toBe(0);
  },
  'needs-reset-at-start': async () => {
    const net = await open();
    expect((await net.driver.status()) & DeviceStatus.DEVICE_NEEDS_RESET).not.toBe(0);
  },
  'capability-loop': async () => expect(await capabilities(await bare())).toHaveLength(21),
  'capability-outside-config': async () => expect((await capabilities(await bare())).at(-1)?.at).toBe(0x10),
  'capability-outside-bar': async () => {
    expect((await capabilities(await bare())).find(({ type }) => type === 1)?.end).toBeGreaterThan(0x4000);
  },
  'capability-bad-bar': async () => {
    expect((await capabilities(await bare())).find(({ type }) => type === 2)?.bar).toBe(5);
  },
  'no-common-config': async () => {
    expect((await capabilities(await bare())).some(({ type }) => type === 1)).toBe(false);
  },
  'queue-size-zero': async () => expect(await (await bare()).read(F.queueSize, 2)).toBe(0),
  'queue-size-odd': async () => expect(await (await bare()).read(F.queueSize, 2)).toBe(255),
  'notify-outside-bar': async () => expect(await (await bare()).read(F.queueNotifyOff, 2)).toBe(0xffff),
  'admin-error': async () => {
    const net = await open({ features: V1.with(Feature.ADMIN_VQ) });
    expect((await net.execute(0, new Uint8Array(0))).status).toBe(0);
    await net.execute(1, Uint8Array.of(0x83, 0x3f));
    expect((await net.execute(7, new Uint8Array(0))).status).toBe(12);
  },
  'admin-silent': async () => {
    const net = await open({ features: V1.with(Feature.ADMIN_VQ) });
    await expect(net.execute(0, new Uint8Array(0))).rejects.toThrow('timed out');
  },
  'admin-list-empty': async () => {
    const net = await open({ features: V1.with(Feature.ADMIN_VQ) });
    expect((await net.execute(0, new Uint8Array(0))).result[0]).toBe(3);
  },
  'admin-short-reply': async () => {
    const net = await open({ features: V1.with(Feature.ADMIN_VQ) });
    expect((await net.execute(0, new Uint8Array(0))).length).toBe(4);
  },
  'query-modify-swapped': async () => {
    const net = await open({ ipsec: true });
    // A MODIFY of the text is a QUERY here: it is refused because there is no object, and so says nothing; the opcode
    // is known.
    expect((await net.execute(0xb, new Uint8Array(16))).status).not.toBe(0);
  },
  'capability-malformed': async () => {
    await expect(open({ ipsec: true })).rejects.toThrow('CAP_SET 2052');
  },
  'used-id-bogus': async () => {
    const net = await open();
    net.offer(udpFrame());
    await net.driver.notify(1);
    expect((await net.tx.wait()).id).toBe(64);
  },
  'used-id-twice': async () => {
    const net = await open();
    net.offer(udpFrame());
    await net.driver.notify(1);
    expect([(await net.tx.wait()).id, (await net.tx.wait()).id]).toEqual([0, 0]);
  },
  'used-length-too-long': async () => {
    const net = await open();
    await net.send(udpFrame());
    expect((await net.rx.wait()).length).toBeGreaterThan(2048);
  },
  'used-index-jump': async () => {
    const net = await open();
    net.offer(udpFrame());
    await net.driver.notify(1);
    await net.tx.wait();
    expect(net.tx.usedIndex).toBeGreaterThan(64);
  },
  'rx-runt': async () => {
    const net = await open();
    await net.send(udpFrame());
    expect((await net.rx.wait()).length).toBe(4);
  },
  'rx-buffers-zero': async () => {
    const net = await open();
    await net.send(udpFrame());
    expect((await net.receive()).header.numBuffers).toBe(0);
  },
  'rx-bad-resource': async () => {
    const net = await open({ ipsec: true });
    await net.send(udpFrame());
    expect((await net.receive()).header.resourceId).toBe(0xfffffff0);
  },
  'rx-security-lie': async () => {
    const net = await open({ ipsec: true });
    await net.send(udpFrame());
    expect((await net.receive()).header.flags).toBe(16);
  },
  'tx-never-completes': async () => {
    const net = await open();
    net.offer(udpFrame());
    await net.driver.notify(1);
    await net.receive();
    expect(net.tx.usedIndex).toBe(0);
  },
  'notifications-unasked': async () => {
    const net = await open();
    await net.send(udpFrame());
    await net.receive();
    // More turns of the event loop than the device stays awake for; it would ask for notifications now, which are 0.
    for (let turn = 0; turn < 1000; turn++) await new Promise((resolve) => setImmediate(resolve));
    expect(Atomics.load(net.tx.memory.u16, net.tx.used >>> 1)).toBe(1);
  },
  'interrupt-storm': async () => {
    const net = await open({ vectors: true });
    await net.driver.notify(1);
    await pause(10);
    expect(poll(net.driver.eventfds[2], PollEvent.in, 0)).not.toBe(0);
  },
  'no-interrupts': async () => {
    const net = await open({ vectors: true });
    await net.send(udpFrame());
    await net.receive();
    expect(poll(net.driver.eventfds[2], PollEvent.in, 0)).toBe(0);
  },
  'config-unstable': async () => {
    const driver = await bare();
    const before = await driver.read(F.configGeneration, 1);
    await driver.read(0x2000, 1);
    expect(await driver.read(F.configGeneration, 1)).not.toBe(before);
  },
  'region-read-error': async () => {
    await expect((await bare()).status()).rejects.toThrow('errno 5');
  },
};

describe('a device with the fault', () => {
  it.each(Object.entries(SEEN))('%s shows it', async (name, see) => {
    start(name);
    await see();
  });

  it('has one in the table for each of those that no conformance check finds', () => {
    const deadly = ['dies-after-start', 'dies-on-traffic'];
    const found = CHECKS.flatMap((check) => ('faults' in check ? check.faults : [])).flatMap((name) => name.split('+'));
    const known = new Set([...Object.keys(SEEN), ...deadly, ...found]);
    expect(Object.keys(FAULTS).filter((name) => !known.has(name))).toEqual([]);
    expect(found.filter((name) => !Object.hasOwn(FAULTS, name))).toEqual([]);
  });

  it('NAME@2 shows it on the second function alone', async () => {
    const second = join(folder, 'second.sock');
    device = startDevice({ sockets: [path, second], faults: ['no-version-1@2'] });
    const a = await MiniDriver.open(path);
    const b = await MiniDriver.open(second);
    closers.push(a, b);
    expect((await a.offered()).has(Feature.VERSION_1)).toBe(true);
    expect((await b.offered()).has(Feature.VERSION_1)).toBe(false);
  });
});
