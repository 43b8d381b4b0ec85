import { describe, expect, it } from 'vitest';
import { VfioError, VirtioError } from '../../src/errors.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { resetQueue } from '../../src/virtio/initialize.ts';
import { CommonCfgField, NO_VECTOR, VirtioCfgType } from '../../src/virtio/pci-layout.ts';
import { openStandardTransport, virtioDeviceType } from '../../src/virtio/standard.ts';
import { FakeFunction, Place } from './fake-function.ts';

const setup = { size: 8, descriptorArea: 0x1_2345_6000, driverArea: 0x7000, deviceArea: 0xffff_ffff_8000, vector: 2 };

function code(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    if (error instanceof VirtioError || error instanceof VfioError) return error.code;
    throw error;
  }
  return 'no error';
}

describe('PCI ids', () => {
  const identity = { subsystemVendorId: 0, subsystemId: 1, revisionId: 1, classCode: 0 };
  it.each([
    { vendorId: 0x1af4, deviceId: 0x1041, type: 1 },
    { vendorId: 0x1af4, deviceId: 0x1054, type: 20 },
    { vendorId: 0x1af4, deviceId: 0x1000, type: 1 },
    { vendorId: 0x1af4, deviceId: 0x1080, type: null },
    { vendorId: 0x177d, deviceId: 0xb900, type: null },
  ])('$vendorId:$deviceId are device type $type', ({ vendorId, deviceId, type }) => {
    expect(virtioDeviceType({ ...identity, vendorId, deviceId })).toBe(type);
  });
});

describe('opening the standard transport', () => {
  it('finds the structures and enables memory space and bus mastering, and writes nothing to the device', () => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    expect(transport).toMatchObject({ deviceType: 1, interruptVectors: 3, gone: false });
    expect(fn.command & 6).toBe(6);
    expect(fn.log).toEqual([]);
  });

  const bad: { name: string; code: string; spoil(fn: FakeFunction): void }[] = [
    { name: 'another vendor', code: 'NOT_VIRTIO', spoil: (fn) => (fn.vendor = 0x8086) },
    { name: 'a list that loops', code: 'CAPABILITY_LOOP', spoil: (fn) => (fn.loop = true) },
    { name: 'no common configuration', code: 'STRUCTURE_MISSING', spoil: (fn) => fn.capabilities.splice(0, 1) },
    { name: 'no notification structure', code: 'STRUCTURE_MISSING', spoil: (fn) => fn.capabilities.splice(1, 1) },
    { name: 'no ISR', code: 'STRUCTURE_MISSING', spoil: (fn) => fn.capabilities.splice(2, 1) },
    { name: 'a BAR that is not there', code: 'STRUCTURE_MISSING', spoil: (fn) => (fn.capabilities[0].bar = 2) },
    {
      name: 'a structure beyond its BAR',
      code: 'STRUCTURE_BOUNDS',
      spoil: (fn) => (fn.capabilities[0].offset = 0x3fe0),
    },
    {
      name: 'an offset of almost 4 GiB',
      code: 'STRUCTURE_BOUNDS',
      spoil: (fn) => (fn.capabilities[3].offset = 0xfffffff0),
    },
    {
      name: 'a structure that is too short',
      code: 'STRUCTURE_BOUNDS',
      spoil: (fn) => (fn.capabilities[0].length = 52),
    },
    { name: 'an offset that is not aligned', code: 'STRUCTURE_BOUNDS', spoil: (fn) => (fn.capabilities[0].offset = 2) },
    {
      name: 'a notification capability without its multiplier',
      code: 'STRUCTURE_BOUNDS',
      spoil: (fn) => Object.assign(fn.capabilities[1], { capLength: 16 }),
    },
  ];
  it.each(bad)('fails with $code for $name', ({ code: expected, spoil }) => {
    const fn = new FakeFunction();
    spoil(fn);
    expect(code(() => openStandardTransport(fn))).toBe(expected);
  });

  it('ignores structures of unknown types and in reserved BARs, and takes the first of each type', () => {
    const fn = new FakeFunction();
    fn.capabilities.unshift(
      { type: VirtioCfgType.COMMON, bar: 6, offset: 0, length: 64, capLength: 16 },
      { type: 77, bar: 4, offset: 0xfffff000, length: 0xffffffff, capLength: 16 },
    );
    const transport = openStandardTransport(fn);
    fn.bar4[CommonCfgField.deviceStatus] = 0x5a;
    expect(transport.readStatus()).toBe(0x5a);
  });
});

describe('the standard transport', () => {
  it('reads and writes 128 feature bits through the four selected words', () => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    expect(transport.readDeviceFeatures().words).toEqual([0x80000001, 2, 3, 0x40000000]);
    transport.writeDriverFeatures(FeatureSet.fromWords([5, 0x80000000, 7, 8]));
    expect(fn.driverFeatures).toEqual([5, 0x80000000, 7, 8]);
  });

  it('accesses each field with its own width', () => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    transport.writeStatus(1);
    transport.readStatus();
    transport.queueCount();
    transport.maxQueueSize(1);
    transport.readIsr();
    const F = CommonCfgField;
    expect(fn.log).toEqual([
      `w8 ${F.deviceStatus}`,
      `r8 ${F.deviceStatus}`,
      `r16 ${F.numQueues}`,
      `w16 ${F.queueSelect}`,
      `r16 ${F.queueSize}`,
      `r8 ${Place.isr}`,
    ]);
  });

  it('describes a queue, with 64-bit addresses in two halves, before it enables it', () => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    const notifier = transport.enableQueue(1, setup);
    const F = CommonCfgField;
    const queue = fn.queues.get(1);
    expect(queue && Object.fromEntries(queue)).toEqual({
      [F.queueSize]: 8,
      [F.queueMsixVector]: 2,
      [F.queueDesc]: 0x2345_6000,
      [F.queueDesc + 4]: 1,
      [F.queueDriver]: 0x7000,
      [F.queueDriver + 4]: 0,
      [F.queueDevice]: 0xffff_8000,
      [F.queueDevice + 4]: 0xffff,
      [F.queueEnable]: 1,
    });
    const writes = fn.log.filter((entry) => entry.startsWith('w'));
    expect(writes.at(-1)).toBe(`w16 ${F.queueEnable}`);
    expect(fn.notifications).toEqual([]);
    notifier.notify();
    expect(fn.notifications).toEqual([{ offset: 4, value: 1 }]);
    expect(fn.log.at(-1)).toBe(`w16 ${Place.notify + 4}`);
  });

  it.each([
    { features: [], write: 'w16', value: 1 },
    { features: [Feature.NOTIF_CONFIG_DATA], write: 'w16', value: 0x1231 },
    { features: [Feature.NOTIFICATION_DATA], write: 'w32', value: 0x8003_0001 },
    { features: [Feature.NOTIFICATION_DATA, Feature.NOTIF_CONFIG_DATA], write: 'w32', value: 0x8003_1231 },
  ])('notifies with $value in one $write when $features were negotiated', ({ features, write, value }) => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    transport.writeDriverFeatures(FeatureSet.of(Feature.VERSION_1, ...features));
    const position = { next: 0 };
    const notifier = transport.enableQueue(1, { ...setup, position });
    position.next = 0x8003;
    notifier.notify();
    expect(fn.notifications).toEqual([{ offset: 4, value }]);
    expect(fn.log.at(-1)).toBe(`${write} ${Place.notify + 4}`);
  });

  it('needs room and alignment for four bytes of notification data, and to be told the position', () => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    transport.writeDriverFeatures(FeatureSet.of(Feature.NOTIFICATION_DATA));
    expect(() => transport.enableQueue(1, setup)).toThrow(RangeError);
    for (const [multiplier, off, expected] of [
      [2, 1, 'STRUCTURE_BOUNDS'],
      [2, 2, 'no error'],
      [2, 0x7e, 'no error'],
      [2, 0x7f, 'STRUCTURE_BOUNDS'],
    ] as const) {
      const odd = new FakeFunction();
      const at = odd.capabilities.findIndex(({ type }) => type === VirtioCfgType.NOTIFY);
      odd.capabilities[at] = { ...odd.capabilities[at], multiplier };
      odd.notifyOff = () => off;
      const other = openStandardTransport(odd);
      other.writeDriverFeatures(FeatureSet.of(Feature.NOTIFICATION_DATA));
      expect(code(() => other.enableQueue(1, { ...setup, position: { next: 0 } }))).toBe(expected);
    }
  });

  it('resets one queue, which is reset when both queue_reset and queue_enable are 0, and enables it again', async () => {
    const fn = new FakeFunction();
    fn.queueResetReads = 3;
    const transport = openStandardTransport(fn);
    transport.enableQueue(0, setup);
    transport.enableQueue(1, setup);
    await resetQueue(transport, 1, 500);
    expect(fn.queues.get(1)?.has(CommonCfgField.queueEnable) ?? false).toBe(false);
    expect(fn.queues.get(0)?.get(CommonCfgField.queueEnable)).toBe(1);
    expect(fn.log.filter((entry) => entry === `w16 ${CommonCfgField.queueReset}`)).toHaveLength(1);
    transport.enableQueue(1, setup);
    expect(fn.queues.get(1)?.get(CommonCfgField.queueEnable)).toBe(1);
  });

  it('gives up on the reset of a queue that does not end', async () => {
    const fn = new FakeFunction();
    fn.queueResetReads = Number.POSITIVE_INFINITY;
    const transport = openStandardTransport(fn);
    transport.enableQueue(1, setup);
    await expect(resetQueue(transport, 1, 30)).rejects.toThrow(
      expect.objectContaining({ code: 'QUEUE_RESET_TIMEOUT' }),
    );
  });

  it.each([
    { name: 'more descriptors than the device has', index: 0, change: { size: 16 }, code: 'QUEUE_SIZE' },
    { name: 'a queue that is not there', index: 9, change: {}, code: 'QUEUE_SIZE' },
    { name: 'size 0', index: 0, change: { size: 0 }, code: 'QUEUE_SIZE' },
    { name: 'a vector that is not there', index: 0, change: { vector: 3 }, code: 'MSIX_VECTOR' },
  ])('refuses $name', ({ index, change, code: expected }) => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    expect(code(() => transport.enableQueue(index, { ...setup, ...change }))).toBe(expected);
    expect(fn.queues.get(index)?.has(CommonCfgField.queueEnable) ?? false).toBe(false);
  });

  it('notices that the device cannot map a vector, or does not enable a queue', () => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    fn.enables = false;
    expect(code(() => transport.enableQueue(0, setup))).toBe('QUEUE_ENABLE');
    fn.mapsVectors = false;
    expect(code(() => transport.enableQueue(0, setup))).toBe('MSIX_VECTOR');
    transport.setConfigVector(1);
    transport.setConfigVector(NO_VECTOR);
    expect(code(() => transport.setConfigVector(3))).toBe('MSIX_VECTOR');
  });

  it.each([
    [0x3f, 'no error'],
    [0x40, 'STRUCTURE_BOUNDS'],
    [0xffff, 'STRUCTURE_BOUNDS'],
  ])('with queue_notify_off %s gives %s', (off, expected) => {
    const fn = new FakeFunction();
    fn.notifyOff = () => off;
    const transport = openStandardTransport(fn);
    expect(code(() => transport.enableQueue(0, setup))).toBe(expected);
  });

  it.each([
    { adminIndex: 2, adminNum: 1, expected: 'no error' },
    { adminIndex: 1, adminNum: 1, expected: 'ADMIN_QUEUE' },
    { adminIndex: 2, adminNum: 0, expected: 'ADMIN_QUEUE' },
    { adminIndex: 0xffff, adminNum: 2, expected: 'ADMIN_QUEUE' },
  ])('takes $adminNum administration queues from $adminIndex: $expected', ({ adminIndex, adminNum, expected }) => {
    const fn = Object.assign(new FakeFunction(), { adminIndex, adminNum });
    const transport = openStandardTransport(fn);
    expect(code(() => transport.adminQueues())).toBe(expected);
  });

  it('has no administration queue when the structure is too short to name one', () => {
    const fn = new FakeFunction();
    fn.capabilities[0].length = 60;
    expect(code(() => openStandardTransport(fn).adminQueues())).toBe('ADMIN_QUEUE');
  });
});

describe('device configuration', () => {
  it('is read again while the device changes it', () => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    let changes = 3;
    fn.onConfigRead = () => {
      if (changes-- <= 0) return;
      fn.bar4[CommonCfgField.configGeneration]++;
      fn.bar4[Place.device]++;
      fn.bar4[Place.device + 4]++;
    };
    const [a, b] = transport.readConfig((config) => [config.read8(0), config.read8(4)]);
    expect([a, b]).toEqual([3, 3]);
  });

  it('that never stops changing is given up', () => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    fn.onConfigRead = () => fn.bar4[CommonCfgField.configGeneration]++;
    expect(code(() => transport.readConfig((config) => config.read16(6)))).toBe('CONFIG_UNSTABLE');
  });

  it('is not read beyond its end', () => {
    const fn = new FakeFunction();
    const transport = openStandardTransport(fn);
    expect(transport.readConfig((config) => config.size)).toBe(28);
    expect(code(() => transport.readConfig((config) => config.read32(28)))).toBe('CONFIG_BOUNDS');
    expect(code(() => transport.readConfig((config) => config.read8(-1)))).toBe('CONFIG_BOUNDS');
  });

  it('of a device type without one is an error only when it is read', () => {
    const fn = new FakeFunction();
    fn.capabilities.splice(3, 1);
    expect(code(() => openStandardTransport(fn).readConfig(() => 0))).toBe('STRUCTURE_MISSING');
  });
});
