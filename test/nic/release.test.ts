import { expect, it } from 'vitest';
import { VfioError } from '../../src/errors.ts';
import { resolveOptions } from '../../src/nic/options.ts';
import { release, takeAll } from '../../src/nic/release.ts';
import { NicRings } from '../../src/nic/rings.ts';
import type { OpenOptions } from '../../src/nic/wire.ts';
import type { DmaMemory } from '../../src/sys/memory.ts';
import type { DeviceFunction } from '../../src/vfio/function.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { createSaTable } from '../../src/virtio-net/sa-table.ts';
import { FakeDevice } from '../virtio/fake-device.ts';

/** A device that refuses, from now on, what `refuses` says. */
function refusing() {
  const device = new FakeDevice();
  const refused = new VfioError('DEVICE_REFUSED', 'the device refused it');
  const state = { refuses: false, closed: false, asked: [] as DmaMemory[] };
  const fn: DeviceFunction = {
    address: device.address,
    behindIommu: false,
    interruptVectors: 4,
    gone: false,
    allocateDma: (size) => device.memory.allocateDma(size),
    freeDma: (memory) => {
      state.asked.push(memory);
      if (state.refuses) throw refused;
    },
    setInterrupts: () => {
      if (state.refuses) throw refused;
    },
    close: () => {
      state.closed = true;
    },
  };
  return { device, fn, state };
}

it('ends a NIC whose device refuses to let go of anything: all is asked for, wiped, and closed', async () => {
  const { device, fn, state } = refusing();
  const options: OpenOptions = {
    ...resolveOptions({ ipsec: 'off', queueSize: 16, packets: 64 }),
    wire: 'virtio-1.4',
    unknownRevision: null,
  };
  const features = FeatureSet.of(Feature.VERSION_1);
  const config = { maxQueuePairs: 1, linkUp: true, announce: false };
  const rings = new NicRings(fn, device, features, config, createSaTable(1, 0), options);
  rings.pool.u8.fill(7);
  state.refuses = true;
  await release(fn, device, rings, { close: () => fn.freeDma(rings.pool.memory as DmaMemory) }, 100);
  expect(state.closed).toBe(true);
  expect(new Set(state.asked)).toEqual(new Set(device.memory.blocks));
  expect(rings.pool.u8.every((byte) => byte === 0)).toBe(true);
  expect(device.log).toContain('status 0');
});

it('takes each step and throws what failed first', () => {
  const taken: number[] = [];
  const step = (n: number, error?: Error) => () => {
    taken.push(n);
    if (error !== undefined) throw error;
  };
  expect(() => takeAll([step(1), step(2, new Error('two')), step(3, new Error('three')), step(4)])).toThrow('two');
  expect(taken).toEqual([1, 2, 3, 4]);
});
