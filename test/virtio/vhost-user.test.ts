import { afterEach, describe, expect, it } from 'vitest';
import { Interrupts } from '../../src/vfio/interrupts.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { initializeDevice, resetDevice } from '../../src/virtio/initialize.ts';
import { NO_VECTOR } from '../../src/virtio/pci-layout.ts';
import { openVhostUser, type VhostUserDevice, type VhostUserOptions } from '../../src/virtio/vhost-user.ts';
import { ProtocolFeature, Request, requestName } from '../../src/virtio/vhost-user-protocol.ts';
import { allocateVirtqueue, type RingFormat } from '../../src/virtqueue/create.ts';
import type { Virtqueue } from '../../src/virtqueue/virtqueue.ts';
import { cleanUp, deadlineFor, type FakeBackEnd, type FakeDevice, type Rule, startBackEnd } from './vhost-user/fake.ts';

const devices: VhostUserDevice[] = [];

afterEach(async () => {
  for (const device of devices.splice(0)) device.close();
  await cleanUp();
});

interface Port {
  readonly device: VhostUserDevice;
  readonly backEnd: FakeBackEnd;
}

async function open(
  device: FakeDevice = {},
  rules: readonly Rule[] = [],
  options: VhostUserOptions = { timeoutMs: deadlineFor(rules) },
): Promise<Port> {
  const backEnd = await startBackEnd({ device, rules });
  const opened = await openVhostUser(backEnd.path, options);
  devices.push(opened);
  return { device: opened, backEnd };
}

interface Started {
  readonly features: FeatureSet;
  readonly queues: readonly Virtqueue[];
}

/** Brings the device up with queues 0 to `count` - 1. */
async function start(
  device: VhostUserDevice,
  count = 2,
  wanted = FeatureSet.of(Feature.RING_PACKED, Feature.EVENT_IDX, Feature.MQ, Feature.CTRL_VQ),
  vector = NO_VECTOR,
): Promise<Started> {
  const queues: Virtqueue[] = [];
  const required = FeatureSet.of(Feature.VERSION_1);
  const setup = (features: FeatureSet): void => {
    const format: RingFormat = features.has(Feature.RING_PACKED) ? 'packed' : 'split';
    for (let index = 0; index < count; index++) queues.push(addQueue(device, index, format, vector));
  };
  return { features: await initializeDevice(device, { required, wanted, setup }), queues };
}

function addQueue(device: VhostUserDevice, index: number, format: RingFormat, vector = NO_VECTOR): Virtqueue {
  const queue = allocateVirtqueue(format, device, { index, size: 8 });
  device.enableQueue(index, { ...areasOf(queue), size: 8, vector });
  return queue;
}

const areasOf = ({ descriptorArea, driverArea, deviceArea }: Virtqueue) => ({
  descriptorArea,
  driverArea,
  deviceArea,
});

/** Names of the requests since `from`, those that come often left out. */
function names(backEnd: FakeBackEnd, from: number): string[] {
  const often: readonly number[] = [Request.SET_STATUS, Request.GET_STATUS, Request.GET_FEATURES];
  return backEnd.messages
    .slice(from)
    .filter(({ request }) => !often.includes(request))
    .map(({ request }) => requestName(request));
}

const RING = ['SET_VRING_NUM', 'SET_VRING_BASE', 'SET_VRING_ADDR', 'SET_VRING_ERR', 'SET_VRING_CALL', 'SET_VRING_KICK'];
const SWITCHED_RING = [...RING, 'SET_VRING_ENABLE'];

describe('starting a vhost-user port', () => {
  it.each([
    ['no protocol features', [], ['SET_MEM_TABLE', ...RING, ...RING]],
    ['acknowledgements', [ProtocolFeature.REPLY_ACK], ['SET_MEM_TABLE', ...SWITCHED_RING, ...SWITCHED_RING]],
    [
      'memory slots',
      [ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.STATUS],
      ['ADD_MEM_REG', 'ADD_MEM_REG', ...SWITCHED_RING, ...SWITCHED_RING],
    ],
  ])('tells of memory and rings only at DRIVER_OK, with %s', async (_, protocol, expected) => {
    const { device, backEnd } = await open({ protocol });
    await backEnd.settled();
    const from = backEnd.messages.length;
    const { features } = await start(device);
    await backEnd.settled();
    expect(names(backEnd, from)).toEqual(['SET_FEATURES', ...expected]);
    expect(features.has(Feature.VERSION_1)).toBe(true);
    await resetDevice(device);
    await backEnd.settled();
    expect(names(backEnd, from).slice(expected.length + 1)).toEqual(['GET_VRING_BASE', 'GET_VRING_BASE']);
    expect(backEnd.violations).toEqual([]);
  });

  it('can be done again after a reset', async () => {
    const { device, backEnd } = await open({ protocol: [ProtocolFeature.REPLY_ACK, ProtocolFeature.RESET_DEVICE] });
    for (let i = 0; i < 3; i++) {
      const { queues } = await start(device);
      await resetDevice(device);
      for (const { memory } of queues) device.freeDma(memory);
    }
    await backEnd.settled();
    const count = (request: number): number => backEnd.messages.filter((one) => one.request === request).length;
    expect(count(Request.RESET_DEVICE)).toBe(6);
    expect(count(Request.GET_VRING_BASE)).toBe(6);
    expect(backEnd.violations).toEqual([]);
  });

  it.each([
    Request.SET_FEATURES,
    Request.SET_MEM_TABLE,
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_ERR,
    Request.SET_VRING_CALL,
    Request.SET_VRING_KICK,
    Request.SET_VRING_ENABLE,
  ])('fails when request %i is refused, and can be tried again', async (request) => {
    const { device, backEnd } = await open({}, [{ request, nth: 1, refuse: true }]);
    await expect(start(device)).rejects.toMatchObject({ code: 'DEVICE_REFUSED' });
    expect(device.gone).toBe(false);
    // The fake calls it a violation to stop a ring of which it has accepted nothing.
    await start(device);
    expect(backEnd.violations.filter((what) => !what.includes('GET_VRING_BASE'))).toEqual([]);
  });

  it('ends the session when the back-end stops another ring than it was asked to', async () => {
    const { device } = await open({}, [{ request: Request.GET_VRING_BASE, reply: { payload: Array(8).fill(7) } }]);
    await start(device);
    expect(() => device.writeStatus(0)).toThrow(expect.objectContaining({ code: 'PROTOCOL' }));
    expect(device.gone).toBe(true);
  });

  it('does not wait for ever for a ring to stop, and gives everything back all the same', async () => {
    const { device } = await open({}, [{ request: Request.GET_VRING_BASE, stall: true }]);
    const { queues } = await start(device);
    const began = performance.now();
    device.close();
    expect(performance.now() - began).toBeLessThan(2000);
    expect(queues[0].memory.u8.every((byte) => byte === 0)).toBe(true);
  });

  it('ends the session when the back-end reports an error in a ring', async () => {
    const { device } = await open({}, [{ request: Request.SET_STATUS, nth: 5, error: true }]);
    const gone = new Promise<Error>((resolve) => device.onGone(resolve));
    await start(device);
    device.writeStatus(0x0f);
    expect(await gone).toMatchObject({ code: 'DEVICE_GONE', message: 'the back-end reported an error in a ring' });
  });
});

describe('features of a vhost-user port', () => {
  it('are those of the back-end that work without messages of their own', async () => {
    const needMessages = [
      Feature.CTRL_GUEST_OFFLOADS,
      Feature.CTRL_RX,
      Feature.CTRL_VLAN,
      Feature.GUEST_ANNOUNCE,
      Feature.MAC,
      Feature.STATUS,
      Feature.MTU,
      Feature.RSS,
      Feature.HASH_REPORT,
      Feature.ACCESS_PLATFORM,
      Feature.NOTIFICATION_DATA,
      Feature.ADMIN_VQ,
      26,
    ];
    const work = [Feature.VERSION_1, Feature.MRG_RXBUF, Feature.RING_PACKED, Feature.IN_ORDER, Feature.HOST_TSO4];
    const { device } = await open({ features: [...needMessages, ...work] });
    expect(device.readDeviceFeatures().names()).toEqual(FeatureSet.of(...work).names());
    expect(device.backEnd.features.hasAll(...needMessages, 30)).toBe(true);
  });

  it('include several queue pairs when the back-end has them, and then a control queue that is ours', async () => {
    const features = [Feature.VERSION_1, Feature.MQ];
    const with3 = await open({ features, protocol: [ProtocolFeature.MQ], queuePairs: 3 });
    expect(with3.device.readDeviceFeatures().hasAll(Feature.MQ, Feature.CTRL_VQ)).toBe(true);
    // Where the control queue is depends on what the driver takes (5.1.2).
    for (const [wanted, count] of [
      [FeatureSet.empty, 2],
      [FeatureSet.of(Feature.CTRL_VQ), 3],
      [FeatureSet.of(Feature.CTRL_VQ, Feature.MQ), 7],
    ] as const) {
      await start(with3.device, 2, wanted);
      expect(with3.device.queueCount()).toBe(count);
      const sizes = [2, 5, 6, 7].map((index) => with3.device.maxQueueSize(index));
      expect(sizes).toEqual(count === 7 ? [32768, 32768, 64, 0] : [count === 3 ? 64 : 0, 0, 0, 0]);
      await resetDevice(with3.device);
    }
    await with3.backEnd.settled();
    // The back-end did not offer CTRL_VQ, so it must not see it.
    expect(with3.backEnd.violations).toEqual([]);
    const with1 = await open({ features, protocol: [ProtocolFeature.MQ], queuePairs: 1 });
    expect(with1.device.readDeviceFeatures().hasAny(Feature.MQ, Feature.CTRL_VQ)).toBe(false);
    expect(with1.device.queueCount()).toBe(2);
    const many = await open({ features, protocol: [ProtocolFeature.MQ], queuePairs: 5000 });
    expect(many.device.backEnd.queuePairs).toBe(128);
  });

  it('do not include an administration queue', async () => {
    const { device } = await open();
    expect(() => device.adminQueues()).toThrow(expect.objectContaining({ code: 'ADMIN_QUEUE' }));
  });
});

describe('memory of a vhost-user port', () => {
  const tables = (backEnd: FakeBackEnd): number[] =>
    backEnd.messages.filter(({ request }) => request === Request.SET_MEM_TABLE).map(({ payload }) => payload[0]);

  it('is one region as long as allocations follow one another, and is told again when it grows', async () => {
    const { device, backEnd } = await open();
    await start(device);
    const first = device.allocateDma(4096);
    const second = device.allocateDma(100_000);
    device.freeDma(first);
    device.freeDma(second);
    await backEnd.settled();
    expect(tables(backEnd)).toEqual([1, 1, 1, 1]);
    expect(backEnd.violations).toEqual([]);
  });

  it('is not told of while no ring runs', async () => {
    const { device, backEnd } = await open();
    device.freeDma(device.allocateDma(4096));
    await start(device);
    await resetDevice(device);
    device.allocateDma(4096);
    await backEnd.settled();
    expect(tables(backEnd)).toEqual([1]);
  });

  it('stays one region when parts of it go', async () => {
    const { device, backEnd } = await open();
    await start(device);
    const blocks = Array.from({ length: 20 }, () => device.allocateDma(4096));
    for (let i = 0; i < 20; i += 2) device.freeDma(blocks[i]);
    await backEnd.settled();
    expect(Math.max(...tables(backEnd))).toBe(1);
    expect(backEnd.violations).toEqual([]);
  });

  it('takes a slot for each allocation when there are slots, and no more than there are', async () => {
    const protocol = [ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.REPLY_ACK];
    const { device, backEnd } = await open({ protocol, memorySlots: 3 });
    await start(device);
    const third = device.allocateDma(4096);
    expect(() => device.allocateDma(4096)).toThrow(expect.objectContaining({ code: 'DMA_EXHAUSTED' }));
    device.freeDma(third);
    device.allocateDma(8192);
    await backEnd.settled();
    expect(names(backEnd, 0).filter((name) => name.endsWith('MEM_REG'))).toEqual([
      'ADD_MEM_REG',
      'ADD_MEM_REG',
      'ADD_MEM_REG',
      'REM_MEM_REG',
      'ADD_MEM_REG',
    ]);
    expect(backEnd.violations).toEqual([]);
  });

  it('that the back-end refuses is not allocated, and what follows is', async () => {
    const { device, backEnd } = await open({}, [{ request: Request.SET_MEM_TABLE, nth: 2, refuse: true }]);
    await start(device);
    expect(() => device.allocateDma(4096)).toThrow(expect.objectContaining({ code: 'DEVICE_REFUSED' }));
    const memory = device.allocateDma(4096);
    expect(memory.u8.every((byte) => byte === 0)).toBe(true);
    expect(backEnd.violations).toEqual([]);
  });
});

describe('queues of a vhost-user port', () => {
  it('are checked before the back-end hears of them', async () => {
    const { device } = await open();
    const queue = allocateVirtqueue('split', device, { index: 0, size: 8 });
    const setup = { ...areasOf(queue), size: 8, vector: NO_VECTOR };
    const refusal = (index: number, change: Partial<typeof setup>): unknown => {
      try {
        device.enableQueue(index, { ...setup, ...change });
      } catch (error) {
        return error;
      }
      return null;
    };
    expect(refusal(2, {})).toMatchObject({ code: 'QUEUE_SIZE' });
    expect(refusal(0, { size: 0 })).toMatchObject({ code: 'QUEUE_SIZE' });
    expect(refusal(0, { size: 65536 })).toMatchObject({ code: 'QUEUE_SIZE' });
    expect(refusal(0, { vector: 4 })).toMatchObject({ code: 'MSIX_VECTOR' });
    expect(refusal(0, {})).toBeNull();
    expect(refusal(0, {})).toMatchObject({ code: 'QUEUE_ENABLE' });
    expect(() => device.setConfigVector(4)).toThrow(expect.objectContaining({ code: 'MSIX_VECTOR' }));
    device.setConfigVector(3);
    expect(device.readIsr()).toBe(0);
  });

  it('are reset one by one while the others run', async () => {
    const { device, backEnd } = await open({ features: [Feature.VERSION_1, Feature.RING_RESET] });
    await start(device);
    await backEnd.settled();
    const from = backEnd.messages.length;
    device.startQueueReset(1);
    expect(device.isQueueReset(1)).toBe(true);
    expect(device.isQueueReset(0)).toBe(false);
    device.startQueueReset(1);
    addQueue(device, 1, 'split');
    await backEnd.settled();
    expect(names(backEnd, from)).toEqual(['GET_VRING_BASE', 'SET_MEM_TABLE', ...SWITCHED_RING]);
    expect(backEnd.messages.at(-1)?.payload).toEqual(Uint8Array.of(1, 0, 0, 0, 1, 0, 0, 0));
    expect(backEnd.violations).toEqual([]);
  });

  it.each(['split', 'packed'] as const)('interrupt through eventfds, %s', async (format) => {
    const { device, backEnd } = await open({
      features: [Feature.VERSION_1, Feature.RING_PACKED],
      loop: true,
    });
    const interrupts = new Interrupts(device, 2);
    const wanted = format === 'packed' ? FeatureSet.of(Feature.RING_PACKED) : FeatureSet.empty;
    const setup = { queues: [] as Virtqueue[], notify: [() => {}] };
    await initializeDevice(device, {
      required: FeatureSet.of(Feature.VERSION_1),
      wanted,
      setup: () => {
        setup.queues = [0, 1].map((index) => allocateVirtqueue(format, device, { index, size: 8 }));
        setup.notify = setup.queues.map((queue, i) => {
          const notifier = device.enableQueue(i, { ...areasOf(queue), size: 8, vector: i });
          return () => notifier.notify();
        });
      },
    });
    const [rx, tx] = setup.queues;
    const memory = device.allocateDma(4096);
    rx.postChain(1, Uint32Array.of(memory.iovaLow, memory.iovaHigh, 2048), 0, 1);
    tx.postChain(2, Uint32Array.of(memory.iovaLow + 2048, memory.iovaHigh, 100), 1, 0);
    for (const queue of setup.queues) {
      expect(queue.enableInterrupts()).toBe(false);
      expect(queue.publish()).toBe(true);
    }
    for (const notify of setup.notify) notify();
    expect(await interrupts.wait(0, 5000)).toBe(true);
    expect(await interrupts.wait(1, 5000)).toBe(true);
    const written = new Uint32Array(1);
    expect(rx.take(new Uint32Array(1), written, 1)).toBe(1);
    expect(written[0]).toBe(100);
    // Vectors that change are told at once.
    await backEnd.settled();
    const from = backEnd.messages.length;
    interrupts.close();
    await backEnd.settled();
    expect(names(backEnd, from)).toEqual(['SET_VRING_CALL', 'SET_VRING_CALL']);
    expect(backEnd.messages.slice(from).map(({ descriptors }) => descriptors)).toEqual([0, 0]);
    expect(backEnd.violations).toEqual([]);
  });
});

describe('configuration of a vhost-user port', () => {
  const protocol = [ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIG, ProtocolFeature.MQ];

  it('is read from the back-end, but for the number of queue pairs', async () => {
    const config = Array.from({ length: 28 }, (_, i) => i);
    const { device } = await open({ features: [Feature.MQ], protocol, config, queuePairs: 5 });
    const read = device.readConfig((reader) => [reader.read8(3), reader.read16(8), reader.read32(12), reader.size]);
    expect(read).toEqual([3, 5, 0x0f0e0d0c, 28]);
  });

  it('ends where that of the back-end ends', async () => {
    const { device } = await open({ protocol, config: [1, 2, 3, 4, 5, 6] });
    expect(device.readConfig((reader) => reader.read8(5))).toBe(6);
    for (const at of [6, 27, 28]) {
      expect(() => device.readConfig((reader) => reader.read8(at))).toThrow(
        expect.objectContaining({ code: 'CONFIG_BOUNDS' }),
      );
    }
    expect(device.gone).toBe(false);
  });

  it('is empty but for the queue pairs when the back-end has none', async () => {
    const { device, backEnd } = await open();
    expect(device.readConfig((reader) => reader.read16(8))).toBe(1);
    expect(() => device.readConfig((reader) => reader.read8(0))).toThrow(
      expect.objectContaining({ code: 'CONFIG_BOUNDS' }),
    );
    await backEnd.settled();
    expect(backEnd.violations).toEqual([]);
  });

  it('is read again until it is the same twice, and not for ever', async () => {
    const { device } = await open({ protocol, config: [7] }, [
      { request: Request.GET_CONFIG, nth: 1, reply: { payload: [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9] } },
    ]);
    expect(device.readConfig((reader) => reader.read8(0))).toBe(7);
    let count = 0;
    const changing = (): number => count++;
    const restless = { size: 1, bytes: () => Uint8Array.of(changing() & 0xff) };
    const { readStable } = await import('../../src/virtio/vhost-user-config.ts');
    expect(() => readStable(restless, (reader) => reader.read8(0), 'it')).toThrow(
      expect.objectContaining({ code: 'CONFIG_UNSTABLE' }),
    );
  });

  it('of another place than was asked for ends the session', async () => {
    const { device } = await open({ protocol, config: [7, 8] }, [
      { request: Request.GET_CONFIG, reply: { payload: [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9] } },
    ]);
    expect(() => device.readConfig((reader) => reader.read8(0))).toThrow(expect.objectContaining({ code: 'PROTOCOL' }));
    expect(device.gone).toBe(true);
  });
});
