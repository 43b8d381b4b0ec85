import { expect, it } from 'vitest';
import { VfioError, VirtioError } from '../../src/errors.ts';
import { resolveOptions } from '../../src/nic/options.ts';
import { NicRings } from '../../src/nic/rings.ts';
import type { OpenOptions } from '../../src/nic/wire.ts';
import type { DeviceFunction } from '../../src/vfio/function.ts';
import { AdminQueue } from '../../src/virtio/admin.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import type { VirtioTransport } from '../../src/virtio/transport.ts';
import { createSaTable } from '../../src/virtio-net/sa-table.ts';
import { FakeDevice } from '../virtio/fake-device.ts';

/** A device of which call number `failing`, counted over everything that it is asked, throws. */
function failingDevice(failing: number) {
  const device = new FakeDevice();
  const interrupts = { on: false };
  const state = { armed: true };
  let calls = 0;
  const guarded = <T extends object>(target: T, error: () => Error, spared: readonly string[]): T =>
    new Proxy(target, {
      get(object, name) {
        const value: unknown = Reflect.get(object, name, object);
        if (typeof value !== 'function' || spared.includes(String(name))) return value;
        return (...args: unknown[]) => {
          if (state.armed && calls++ === failing) throw error();
          return Reflect.apply(value, object, args);
        };
      },
    });
  const fn: DeviceFunction = {
    ...{ address: 'failing', behindIommu: false, interruptVectors: 4, gone: false },
    allocateDma: (size) => device.memory.allocateDma(size),
    freeDma: (memory) => device.memory.freeDma(memory),
    setInterrupts: (eventfds) => {
      interrupts.on = eventfds.length > 0;
    },
    close: () => {},
  };
  return {
    ...{ device, interrupts, state },
    fn: guarded(fn, () => new VfioError('DEVICE_REFUSED', 'it failed'), ['freeDma', 'close']),
    transport: guarded<VirtioTransport>(device, () => new VirtioError('QUEUE_ENABLE', 'it failed'), []),
    get calls() {
      return calls;
    },
  };
}

const options: OpenOptions = {
  ...resolveOptions({ ipsec: 'off', queueSize: 16, packets: 128, queuePairs: 2, workerQueues: 1 }),
  wire: 'virtio-1.4',
  unknownRevision: null,
};
const features = FeatureSet.of(Feature.VERSION_1, Feature.CTRL_VQ, Feature.MQ, Feature.ADMIN_VQ);
const config = { maxQueuePairs: 2, linkUp: true, announce: false };

/** Sets up what is set up before DRIVER_OK, as far as it gets, and takes it back. */
function setUp({ fn, transport, state }: ReturnType<typeof failingDevice>): boolean {
  let rings: NicRings | null = null;
  try {
    rings = new NicRings(fn, transport, features, config, createSaTable(1, 0), options);
    new AdminQueue(transport, fn, features, {}).close();
    return true;
  } catch (error) {
    if (error instanceof VfioError || error instanceof VirtioError) return false;
    throw error;
  } finally {
    state.armed = false;
    rings?.close();
  }
}

it('leaves no memory and no interrupt behind, whichever call of the setup fails', () => {
  const whole = failingDevice(-1);
  expect(setUp(whole)).toBe(true);
  expect([whole.device.memory.blocks.length, whole.interrupts.on]).toEqual([0, false]);
  expect(whole.calls).toBeGreaterThan(20);
  const left: string[] = [];
  for (let failing = 0; failing < whole.calls; failing++) {
    const failed = failingDevice(failing);
    const { device, interrupts } = failed;
    setUp(failed);
    if (device.memory.blocks.length > 0 || interrupts.on) left.push(`call ${failing}: ${device.memory.blocks.length}`);
  }
  expect(left).toEqual([]);
});

it.each([3, 24])(
  'leaves no memory behind when the device has queues of %i descriptors, which is no split ring',
  (size) => {
    const odd = failingDevice(-1);
    const { device, fn, transport } = odd;
    device.maxSize = size;
    expect(setUp(odd)).toBe(false);
    expect(() => new AdminQueue(transport, fn, features, {})).toThrow(expect.objectContaining({ code: 'QUEUE_SIZE' }));
    expect(device.memory.blocks).toEqual([]);
  },
);
