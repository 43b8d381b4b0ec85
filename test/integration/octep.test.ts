import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import type { OctepFault } from '../../src/device/index.ts';
import {
  Feature,
  type Nic,
  type NicLink,
  type NicOptions,
  PacketFlag,
  type WaitPolicy,
  WIRE_REVISIONS,
} from '../../src/index.ts';
import { openFunction } from '../../src/nic/device.ts';
import type { PciFunction } from '../../src/vfio/function.ts';
import { FeatureSet } from '../../src/virtio/features.ts';
import { initializeDevice, resetDevice } from '../../src/virtio/initialize.ts';
import { openOctepTransport } from '../../src/virtio/octep.ts';
import { NO_VECTOR } from '../../src/virtio/pci-layout.ts';
import { ringFormat } from '../../src/virtio/ring-format.ts';
import type { QueueNotifier, VirtioTransport } from '../../src/virtio/transport.ts';
import { createVirtqueue, virtqueueBytes } from '../../src/virtqueue/create.ts';
import type { Virtqueue } from '../../src/virtqueue/virtqueue.ts';
import {
  capture,
  cleanUp,
  type DeviceSetup,
  isProtected,
  open,
  openPair,
  receive,
  saPair,
  send,
  settled,
  startDevice,
  until,
} from './support.ts';
import { hire } from './worker-support.ts';

afterEach(cleanUp);

const frames = capture('http-ipv4');
const octep = { personality: 'octep' } as const satisfies DeviceSetup;
/** The firmware as it is published, without IPsec. */
const published = { ...octep, ipsec: false } as const satisfies DeviceSetup;

describe('a NIC on an octeon_ep class function', () => {
  it('is opened as any other, with packed rings and notifications that carry data', async () => {
    const device = await startDevice(octep);
    const nic = await open(device.addresses[0], { queueSize: 64 });
    const { RING_PACKED, NOTIFICATION_DATA, IN_ORDER, ORDER_PLATFORM, IPSEC, EVENT_IDX } = Feature;
    expect(nic.features.hasAll(RING_PACKED, NOTIFICATION_DATA, IN_ORDER, ORDER_PLATFORM, IPSEC)).toBe(true);
    expect(nic.features.has(EVENT_IDX)).toBe(false);
    expect(nic.link).toEqual({ up: true, speed: 40000, duplex: 'full' });
    expect(nic.mtu).toBe(1500);
    const [, received] = await Promise.all([send(nic, frames, null), receive(nic, frames.length)]);
    expect(received.map(({ frame }) => frame)).toEqual(frames);
  });

  it('goes many times around its rings', async () => {
    const device = await startDevice(published);
    const nic = await open(device.addresses[0], { queueSize: 16 });
    const idle = nic.packets.available;
    for (let round = 0; round < 8; round++) {
      const [, received] = await Promise.all([send(nic, frames, null), receive(nic, frames.length)]);
      expect(received.map(({ frame }) => frame)).toEqual(frames);
    }
    nic.queues[0].tx.reclaim();
    expect(Math.abs(nic.packets.available - idle)).toBeLessThanOrEqual(32);
  });

  it('has no more features than published firmware knows, whose third word is a copy', async () => {
    const device = await startDevice(published);
    const nic = await open(device.addresses[0]);
    expect(nic.features.bits().every((bit) => bit < 64)).toBe(true);
    expect(nic.ipsec.inlineObstacle).toBe('the device does not offer VIRTIO_NET_F_IPSEC');
    const sa = await nic.ipsec.addSa(saPair().outbound);
    expect(sa.placement.where).toBe('software');
  });

  it('can be opened again and again, also when an earlier driver has taken the ready mark', async () => {
    const device = await startDevice({ ...published, faults: ['octep-ready-taken'] });
    for (let i = 0; i < 3; i++) {
      const nic = await open(device.addresses[0]);
      const [, received] = await Promise.all([send(nic, frames.slice(0, 4), null), receive(nic, 4)]);
      expect(received).toHaveLength(4);
      await nic.close();
    }
  });

  it('uses several queue pairs', async () => {
    const device = await startDevice({ ...octep, queuePairs: 4 });
    const nic = await open(device.addresses[0], { queuePairs: 3, queueSize: 64 });
    const packets = new Uint32Array(8);
    for (const { tx } of nic.queues) {
      const n = nic.packets.allocate(packets, 4);
      for (let i = 0; i < n; i++) nic.packets.write(packets[i], frames[i]);
      expect(tx.burst(packets, n)).toBe(4);
    }
    let got = 0;
    await until(
      () => {
        for (const { rx } of nic.queues) {
          const n = rx.burst(packets, 8);
          nic.packets.free(packets, n);
          got += n;
        }
        return got === 12;
      },
      () => `${got} packets of 12`,
    );
  });

  it('hands queue pairs to other threads, which notify with where their rings stand', async () => {
    const device = await startDevice({ ...published, queuePairs: 2 });
    const nic = await open(device.addresses[0], { queuePairs: 2, workerQueues: 1 });
    const host = await hire(nic.workerQueues[0]);
    for (const policy of ['poll', 'interrupt'] as const) {
      await host.policy(1, policy);
      await host.send(1, frames);
      expect((await host.receive(1, frames.length)).map(({ frame }) => frame)).toEqual(frames);
    }
    const [, received] = await Promise.all([send(nic, frames, null), receive(nic, frames.length)]);
    expect(received.map(({ frame }) => frame)).toEqual(frames);
  });

  it('refuses options that the hardware cannot have', async () => {
    const device = await startDevice(octep);
    const [address] = device.addresses;
    for (const options of [{ ring: 'split' }, { decline: [Feature.NOTIFICATION_DATA] }] as const) {
      await expect(open(address, options)).rejects.toThrow(expect.objectContaining({ code: 'NIC_OPTION' }));
    }
    await open(address, { ring: 'packed' });
  });
});

describe.each(WIRE_REVISIONS)('IPsec on octeon_ep class functions, %s', (wire) => {
  it.each([
    { name: 'in the device, at both ends', a: octep, b: octep, inlineA: true, inlineB: true },
    { name: 'in the device, and in software of the other', a: octep, b: published, inlineA: true, inlineB: false },
    { name: 'to a function of the standard', a: octep, b: {}, inlineA: true, inlineB: true },
  ])('runs $name, both ways', async ({ a, b, inlineA, inlineB }) => {
    const pair = await openPair({ ...a, wire }, { ...b, wire });
    // The firmware looks for DRIVER_OK when it has time, and drops what comes before.
    await Promise.all([settled(pair.a), settled(pair.b)]);
    const sent = frames.filter(isProtected);
    for (const [from, to, inlineFrom, inlineTo] of [
      [pair.a, pair.b, inlineA, inlineB],
      [pair.b, pair.a, inlineB, inlineA],
    ] as const) {
      const { outbound, inbound } = saPair();
      const out = await from.ipsec.addSa(outbound);
      const into = await to.ipsec.addSa(inbound);
      expect([out.placement.where, into.placement.where]).toEqual([
        inlineFrom ? 'inline' : 'software',
        inlineTo ? 'inline' : 'software',
      ]);
      const before = pair.wire.frames.length;
      const [, received] = await Promise.all([send(from, sent, out), receive(to, sent.length)]);
      expect(received.map(({ frame }) => frame)).toEqual(sent);
      expect(received.every(({ sa, flags }) => sa === into.handle && (flags & PacketFlag.secured) !== 0)).toBe(true);
      const passed = pair.wire.frames.slice(before).map(({ frame }) => frame);
      expect(passed).toHaveLength(sent.length);
      expect(passed.every((frame) => frame[14 + 9] === 50 && frame.readUInt32BE(34) === outbound.spi)).toBe(true);
    }
  });
});

describe('interrupts of octeon_ep class functions', () => {
  /** Who looks again without an interrupt does so after 100 ms. */
  const SOON = 60;
  /** As many as it may take on a machine that has no time. */
  const ROUNDS = 60;

  /** Has a packet come to each pair while its receive queue is waited for, until each was quick once; the shortest waits in milliseconds. */
  async function shortestWaits(nic: Nic, policy: WaitPolicy): Promise<number[]> {
    const packets = new Uint32Array(1);
    const shortest = nic.queues.map(() => Infinity);
    for (let round = 0; round < ROUNDS && shortest.some((wait) => wait >= SOON); round++) {
      for (const [pair, { rx, tx }] of nic.queues.entries()) {
        rx.policy = policy;
        const start = performance.now();
        const woken = rx.wait(5000);
        expect(nic.packets.allocate(packets, 1)).toBe(1);
        nic.packets.write(packets[0], frames[round % frames.length]);
        // What goes out on a pair comes back on it.
        expect(tx.burst(packets, 1)).toBe(1);
        expect(await woken).toBe(true);
        shortest[pair] = Math.min(shortest[pair], performance.now() - start);
        expect(rx.burst(packets, 1)).toBe(1);
        nic.packets.free(packets, 1);
        tx.reclaim();
      }
    }
    return shortest;
  }

  it.each([
    ['as the standard of the class has it', []],
    ['as the firmware of 2024 has it', ['octep-interrupts-in-turn']],
    ['with one for all', ['octep-one-interrupt']],
  ] as [string, OctepFault[]][])('wake who waits, on every pair: %s', async (_, faults) => {
    const device = await startDevice({ ...published, queuePairs: 4, faults });
    const nic = await open(device.addresses[0], { queuePairs: 4 });
    const waits = await shortestWaits(nic, 'interrupt');
    expect(
      waits.filter((wait) => wait < SOON),
      waits.join(', '),
    ).toHaveLength(4);
  });

  it('are not needed', async () => {
    const device = await startDevice(published);
    const nic = await open(device.addresses[0], { interrupts: false });
    expect(await shortestWaits(nic, 'interrupt')).toHaveLength(1);
  });

  it('tell of link changes', async () => {
    const pair = await openPair(published, published);
    const told: NicLink[] = [];
    pair.a.onLink((link) => told.push(link));
    pair.wire.cut();
    await until(
      () => told.some(({ up }) => !up),
      () => 'nobody told of the link',
    );
    expect(pair.a.link.up).toBe(false);
  });
});

describe('an octeon_ep class function that is not ready', () => {
  it.each([
    ['octep-physical', 'OCTEP_PHYSICAL'],
    ['octep-no-window', 'OCTEP_BAR'],
    ['octep-not-ready', 'OCTEP_NOT_READY'],
    ['octep-no-signature', 'OCTEP_SIGNATURE'],
    ['octep-no-interrupts', 'OCTEP_INTERRUPTS'],
    ['octep-capability-loop', 'OCTEP_CAPABILITIES'],
    ['octep-capability-bounds', 'STRUCTURE_BOUNDS'],
    ['octep-crypto', 'NOT_A_NIC'],
    ['octep-reset-ignored', 'RESET_TIMEOUT'],
    ['octep-split-only', 'FEATURES_MISSING'],
    ['octep-plain-kicks', 'FEATURES_MISSING'],
  ] as [OctepFault, string][])('is refused for %s with %s, and let go of', async (fault, code) => {
    const device = await startDevice({ ...octep, faults: [fault] });
    // What never comes is not waited for long; what comes may take its time.
    const options: NicOptions = {
      ...(fault === 'octep-not-ready' && { connectTimeout: 200 }),
      ...(fault === 'octep-reset-ignored' && { resetTimeout: 300 }),
    };
    for (let i = 0; i < 2; i++) {
      await expect(open(device.addresses[0], options)).rejects.toThrow(expect.objectContaining({ code }));
    }
  });

  it('is waited for', async () => {
    const device = await startDevice({ ...octep, faults: ['octep-ready-late'] });
    const start = performance.now();
    await open(device.addresses[0]);
    expect(performance.now() - start).toBeGreaterThan(400);
  });
});

describe('a driver that is careless with an octeon_ep class function', () => {
  /** The transport without what it insists on. */
  function careless(transport: VirtioTransport): VirtioTransport {
    return {
      address: transport.address,
      deviceType: transport.deviceType,
      interruptVectors: 0,
      gone: false,
      readStatus: () => transport.readStatus(),
      writeStatus: (status) => transport.writeStatus(status),
      readDeviceFeatures: () => transport.readDeviceFeatures(),
      writeDriverFeatures: (features) => transport.writeDriverFeatures(features),
      queueCount: () => transport.queueCount(),
      adminQueues: () => transport.adminQueues(),
      maxQueueSize: (index) => transport.maxQueueSize(index),
      enableQueue: (index, setup) => transport.enableQueue(index, setup),
      startQueueReset: (index) => transport.startQueueReset(index),
      isQueueReset: (index) => transport.isQueueReset(index),
      setConfigVector: (vector) => transport.setConfigVector(vector),
      readIsr: () => transport.readIsr(),
      readConfig: (read) => transport.readConfig(read),
    };
  }

  interface Ring {
    readonly queue: Virtqueue;
    readonly notifier: QueueNotifier;
  }

  /** Brings the function up with these features only, and gives its first transmit queue one frame; whether the device takes it. */
  async function transmits(fn: PciFunction, features: FeatureSet, patience: number, kick = true): Promise<boolean> {
    const transport = careless(await openOctepTransport(fn));
    const rings: Ring[] = [];
    const buffer = fn.allocateDma(4096);
    const taken = await initializeDevice(transport, {
      required: features,
      wanted: FeatureSet.empty,
      setup: (negotiated) => {
        for (const index of [0, 1]) {
          const format = ringFormat(negotiated);
          const options = { index, size: 16, iovaLow: buffer.iovaLow, iovaHigh: buffer.iovaHigh };
          const queue = createVirtqueue(format, fn.allocateDma(virtqueueBytes(format, options)), options);
          const { size, descriptorArea, driverArea, deviceArea } = queue;
          const setup = { size, descriptorArea, driverArea, deviceArea, vector: NO_VECTOR, position: queue };
          rings.push({ queue, notifier: transport.enableQueue(index, setup) });
        }
      },
    });
    // FEATURES_OK held, whatever the device thinks of them.
    expect(taken.equals(features.with(Feature.VERSION_1))).toBe(true);
    const [, { queue, notifier }] = rings;
    expect(queue.postBurst(Uint32Array.of(0), 0, 1, Uint32Array.of(0), Uint32Array.of(12 + 60), false)).toBe(1);
    queue.publish();
    if (kick) notifier.notify();
    const tokens = new Uint32Array(1);
    const deadline = performance.now() + patience;
    let used = 0;
    while (used === 0 && performance.now() < deadline) {
      await sleep(1);
      used = queue.take(tokens, new Uint32Array(1), 1);
    }
    await resetDevice(transport);
    return used === 1;
  }

  const right = FeatureSet.of(Feature.RING_PACKED, Feature.NOTIFICATION_DATA);
  const LONG = 20_000;
  /** The device answers within a few milliseconds when it does. */
  const WHILE = 400;

  it.each([
    ['split rings', right.without(Feature.RING_PACKED), true],
    ['notifications without data', right.without(Feature.NOTIFICATION_DATA), true],
    ['no notification', right, false],
  ])('gets nowhere with %s', async (_, features, kick) => {
    const device = await startDevice(published);
    const fn = openFunction(device.addresses[0]);
    try {
      expect(await transmits(fn, right, LONG)).toBe(true);
      expect(await transmits(fn, features, WHILE, kick)).toBe(false);
      expect(await transmits(fn, right, LONG)).toBe(true);
    } finally {
      fn.close();
    }
  });
});
