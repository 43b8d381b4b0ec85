import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import type { OctepFault } from '../../src/device/personalities/octep-faults.ts';
import { VfioError, VirtioError } from '../../src/errors.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { initializeDevice, resetDevice } from '../../src/virtio/initialize.ts';
import { openOctepTransport } from '../../src/virtio/octep.ts';
import { type BringUpStep, bringUpOctep } from '../../src/virtio/octep-bring-up.ts';
import { octepModel } from '../../src/virtio/octep-layout.ts';
import { CommonCfgField as F, IsrBit, NO_VECTOR } from '../../src/virtio/pci-layout.ts';
import { readNetConfig } from '../../src/virtio-net/config.ts';
import { until } from '../device/helpers/raw-client.ts';
import { COMMON, FakeOctep, type FakeOctepOptions, ISR, notifyAt } from './fake-octep.ts';

const open: FakeOctep[] = [];
afterEach(() => {
  for (const fn of open.splice(0)) fn.close();
});

function make(options: FakeOctepOptions = {}): FakeOctep {
  const fn = new FakeOctep(options);
  open.push(fn);
  return fn;
}

/** Short enough for a test of what never happens, long enough for what does. */
const PATIENCE = { readyTimeout: 300, acknowledgeTimeout: 300 };

function codeOf(error: unknown): string {
  if (error instanceof VirtioError || error instanceof VfioError) return error.code;
  throw error;
}

async function outcome(work: () => unknown): Promise<string> {
  try {
    await work();
  } catch (error) {
    return codeOf(error);
  }
  return 'no error';
}

const setup = (next: number) => ({
  size: 256,
  descriptorArea: 0x1_2345_6000,
  driverArea: 0x7000,
  deviceArea: 0xffff_ffff_8000,
  vector: NO_VECTOR,
  position: { next },
});

describe('PCI ids of octeon_ep class functions', () => {
  it.each([
    [0x177d, 0xb903, { name: 'CN106K', virtual: true }],
    [0x177d, 0xba00, { name: 'CN105K', virtual: false }],
    [0x177d, 0xbd03, { name: 'CN103K', virtual: true }],
    [0x177d, 0xa0f7, null],
    [0x1af4, 0x1041, null],
  ])('%x:%x is %o', (vendorId, deviceId, model) => {
    expect(octepModel({ vendorId, deviceId })).toEqual(model);
  });
});

describe('the way to the structures of an octeon_ep class function', () => {
  it('is told step by step, and takes the ready mark', async () => {
    const fn = make();
    const steps: BringUpStep[] = [];
    const parts = await bringUpOctep(fn, { onStep: (step) => steps.push(step) });
    expect(steps.map(({ step }) => step.replace(/ \(.*/, ''))).toEqual([
      'PCI ids',
      'registers',
      'virtio window',
      'ready mark',
      'firmware signature',
      'interrupts',
      'capability list',
      'common configuration structure',
      'notification structure',
      'ISR status structure',
      'device configuration structure',
      'virtio device type',
    ]);
    expect(steps.every(({ ok }) => ok)).toBe(true);
    expect(steps[3]).toMatchObject({ expected: '0xbabababa', read: '0xbabababa' });
    expect(fn.bar(0).read32(0x10210)).toBe(0);
    expect(parts).toMatchObject({ deviceType: 1, interrupts: 8, common: { offset: COMMON, length: 64 } });
    expect(fn.space.command & 6).toBe(6);
    // Nothing of the device itself was written.
    expect(fn.accesses).toEqual([]);
  });

  it('can be gone again by a driver that finds the mark taken', async () => {
    const fn = make();
    await bringUpOctep(fn);
    const steps: BringUpStep[] = [];
    await bringUpOctep(fn, { onStep: (step) => steps.push(step) });
    expect(steps[3]).toMatchObject({ ok: true, read: expect.stringMatching(/taken by an earlier driver/) });
  });

  it('waits for firmware that comes up late', async () => {
    const fn = make({ faults: ['octep-ready-late'] });
    await expect(bringUpOctep(fn)).resolves.toMatchObject({ interrupts: 8 });
  });

  const failures: { fault: OctepFault; code: string; step: string; read: RegExp; hint: RegExp }[] = [
    { fault: 'octep-physical', code: 'OCTEP_PHYSICAL', step: 'PCI ids', read: /b900, a physical/, hint: /octep_vdpa/ },
    { fault: 'octep-no-window', code: 'OCTEP_BAR', step: 'virtio window', read: /absent/, hint: /sriov_numvfs/ },
    {
      fault: 'octep-not-ready',
      code: 'OCTEP_NOT_READY',
      step: 'ready mark',
      read: /0x0 for 300 ms/,
      hint: /leaves the mark/,
    },
    {
      fault: 'octep-no-signature',
      code: 'OCTEP_SIGNATURE',
      step: 'firmware signature',
      read: /^0x0 0x0$/,
      hint: /plain NIC/,
    },
    { fault: 'octep-no-interrupts', code: 'OCTEP_INTERRUPTS', step: 'interrupts', read: /^0$/, hint: /rings/ },
    { fault: 'octep-capability-loop', code: 'OCTEP_CAPABILITIES', step: 'capability list', read: /back/, hint: /list/ },
    {
      fault: 'octep-capability-kind',
      code: 'OCTEP_CAPABILITIES',
      step: 'capability list',
      read: /0x8 at/,
      hint: /list/,
    },
    { fault: 'octep-capability-bar', code: 'OCTEP_CAPABILITIES', step: 'capability list', read: /BAR 2/, hint: /list/ },
    {
      fault: 'octep-capability-bounds',
      code: 'STRUCTURE_BOUNDS',
      step: 'notification structure',
      read: /2147483648 bytes/,
      hint: /list/,
    },
    {
      fault: 'octep-capability-missing',
      code: 'STRUCTURE_MISSING',
      step: 'ISR status structure',
      read: /has no ISR/,
      hint: /list/,
    },
    { fault: 'octep-vendor', code: 'OCTEP_VENDOR_DATA', step: 'virtio device type', read: /0001/, hint: /list/ },
    { fault: 'octep-crypto', code: 'NOT_A_NIC', step: 'virtio device type', read: /^20, of/, hint: /another kind/ },
  ];
  it.each(failures)('ends at "$step" with $code for $fault', async ({ fault, code, step, read, hint }) => {
    const fn = make({ faults: [fault] });
    const steps: BringUpStep[] = [];
    expect(await outcome(() => bringUpOctep(fn, { ...PATIENCE, onStep: (one) => steps.push(one) }))).toBe(code);
    expect(steps.slice(0, -1).every(({ ok }) => ok)).toBe(true);
    const last = steps.at(-1);
    expect(last).toMatchObject({ ok: false, read: expect.stringMatching(read), hint: expect.stringMatching(hint) });
    expect(last?.step.startsWith(step)).toBe(true);
  });

  it('is refused to other functions', async () => {
    const fn = make();
    fn.space.patch(2, 2, 0xa0f7);
    expect(await outcome(() => bringUpOctep(fn))).toBe('NOT_VIRTIO');
  });

  it('is refused to a function that claims more interrupts than it has', async () => {
    const fn = make();
    fn.interruptVectors = 4;
    expect(await outcome(() => bringUpOctep(fn))).toBe('OCTEP_INTERRUPTS');
  });
});

describe('the transport of octeon_ep class functions', () => {
  it('waits for every selection, and finds the features', async () => {
    for (const ipsec of [false, true]) {
      const fn = make({ ipsec });
      const transport = await openOctepTransport(fn);
      await resetDevice(transport);
      expect(transport.readDeviceFeatures().equals(fn.offered)).toBe(true);
      expect(fn.accesses).toContain(`w32 0x90 0x8001`);
    }
  });

  it('does not take the second word of old firmware for the third: its bit 38 would be bit 70, IPsec', async () => {
    const fn = make({ ipsec: false });
    const transport = await openOctepTransport(fn);
    const features = transport.readDeviceFeatures();
    expect(features.has(Feature.NOTIFICATION_DATA)).toBe(true);
    expect(features.has(Feature.IPSEC)).toBe(false);
    expect(features.bits().every((bit) => bit < 64)).toBe(true);
  });

  it('asks for a reset by 0x80 and sees when it is done', async () => {
    const fn = make();
    const transport = await openOctepTransport(fn);
    transport.writeStatus(3);
    await until('the status', () => fn.common.status === 3);
    await resetDevice(transport);
    expect(fn.accesses).toContain('w8 0xa4 0x80');
    expect(fn.log).toContain('reset');
  });

  it('reads back what the firmware keeps of the accepted features, because FEATURES_OK says nothing', async () => {
    const fn = make({ ipsec: true });
    const transport = await openOctepTransport(fn);
    transport.readDeviceFeatures();
    transport.writeDriverFeatures(fn.offered);
    const bar = fn.bar(4);
    const [at, wrong] = [COMMON + F.driverFeature, 0x12345678];
    const original = fn.window.read.bind(fn.window);
    fn.window.read = (index, offset, width) => (index === 4 && offset === at ? wrong : original(index, offset, width));
    expect(bar.read32(at)).toBe(wrong);
    expect(await outcome(() => transport.writeDriverFeatures(fn.offered))).toBe('FEATURES_REJECTED');
  });

  it('enables queues, and notifies with where they stand', async () => {
    const fn = make();
    const transport = await openOctepTransport(fn);
    const features = await initializeDevice(transport, {
      required: FeatureSet.empty,
      wanted: FeatureSet.of(Feature.MAC),
      setup: () => {
        const notifier = transport.enableQueue(3, setup(0x8010));
        fn.accesses.length = 0;
        notifier.notify();
        expect(fn.accesses).toEqual([`w32 0x${notifyAt(3).toString(16)} 0x80100003`]);
      },
    });
    expect(features.bits()).toEqual([5, 32, 34, 38]);
    await until('the start', () => fn.log.includes('started'));
    expect(fn.enabled.map(({ index, size }) => [index, size])).toEqual([[3, 256]]);
    expect([...fn.enabled[0].words]).toEqual([0x23456000, 1, 0x7000, 0, 0xffff8000, 0xffff]);
    expect(fn.window.reach(3).next).toBe(0x8010);
    expect(fn.common.violations).toBe(0);
  });

  it('is started when the driver has been: no frame arrives before the firmware has seen DRIVER_OK', async () => {
    const fn = make();
    const transport = await openOctepTransport(fn);
    const before = fn.log.length;
    await initializeDevice(transport, {
      required: FeatureSet.empty,
      wanted: FeatureSet.empty,
      setup: () => {
        transport.enableQueue(3, setup(0x8000));
      },
    });
    expect(fn.log.slice(before)).toContain('started');
    expect(transport.maxQueueSize(3)).toBe(256);
  });

  it('goes on when the firmware acknowledges no selection any more once it was started', async () => {
    const fn = make();
    const transport = await openOctepTransport(fn, { acknowledgeTimeout: 20 });
    const original = fn.window.read.bind(fn.window);
    const features = initializeDevice(transport, {
      required: FeatureSet.empty,
      wanted: FeatureSet.empty,
      setup: () => {
        const at = COMMON + F.queueSelect;
        fn.window.read = (bar, offset, width) => original(bar, offset, width) | (offset === at ? 0x8000 : 0);
      },
    });
    expect((await features).has(Feature.VERSION_1)).toBe(true);
    expect(await outcome(() => transport.maxQueueSize(0))).toBe('ACKNOWLEDGE_TIMEOUT');
  });

  it('never selects a queue that does not exist: it would wait for ever', async () => {
    const fn = make({ queuePairs: 1 });
    const transport = await openOctepTransport(fn, PATIENCE);
    fn.accesses.length = 0;
    expect([3, 128, 0x8000, 0xffff].map((index) => transport.maxQueueSize(index))).toEqual([0, 0, 0, 0]);
    expect(fn.accesses).toEqual([]);
    expect(transport.maxQueueSize(2)).toBe(4096);
    expect(await outcome(() => transport.enableQueue(3, setup(0x8000)))).toBe('QUEUE_SIZE');
  });

  it('reaches the administration queue when that was negotiated', async () => {
    const fn = make({ ipsec: true, queuePairs: 1 });
    const transport = await openOctepTransport(fn, PATIENCE);
    expect(transport.maxQueueSize(3)).toBe(0);
    transport.readDeviceFeatures();
    transport.writeDriverFeatures(fn.offered);
    expect(transport.adminQueues()).toEqual({ first: 3, count: 1 });
    transport.writeStatus(0x0b);
    expect(transport.maxQueueSize(3)).toBe(4096);
  });

  it.each([
    ['octep-legacy', 'VIRTIO_F_VERSION_1'],
    ['octep-split-only', 'VIRTIO_F_RING_PACKED'],
    ['octep-plain-kicks', 'VIRTIO_F_NOTIFICATION_DATA'],
  ] as const)('is of no use without %s', async (fault, name) => {
    const fn = make({ faults: [fault] });
    const transport = await openOctepTransport(fn);
    const bringUp = initializeDevice(transport, {
      required: FeatureSet.empty,
      wanted: FeatureSet.empty,
      setup: () => {},
    });
    await expect(bringUp).rejects.toThrow(expect.objectContaining({ code: 'FEATURES_MISSING' }));
    await expect(bringUp).rejects.toThrow(name);
  });

  it.each([
    ['octep-select-ignored', (t) => t.readDeviceFeatures()],
    ['octep-queue-ignored', (t) => t.maxQueueSize(0)],
  ] as [OctepFault, (t: Awaited<ReturnType<typeof openOctepTransport>>) => unknown][])(
    'gives up on %s after its time',
    async (fault, work) => {
      const transport = await openOctepTransport(make({ faults: [fault] }), PATIENCE);
      const begin = performance.now();
      expect(await outcome(() => work(transport))).toBe('ACKNOWLEDGE_TIMEOUT');
      expect(performance.now() - begin).toBeGreaterThanOrEqual(PATIENCE.acknowledgeTimeout);
    },
  );

  it('gives up on a reset that is never acknowledged', async () => {
    const transport = await openOctepTransport(make({ faults: ['octep-reset-ignored'] }));
    expect(await outcome(() => resetDevice(transport, 100))).toBe('RESET_TIMEOUT');
  });

  it('reads the configuration byte by byte, and not beyond its end', async () => {
    const fn = make();
    const transport = await openOctepTransport(fn);
    expect(transport.readConfig((config) => [config.read16(1), config.read32(3), config.size])).toEqual([
      0x0201, 0x06050403, 64,
    ]);
    expect(await outcome(() => transport.readConfig((config) => config.read16(63)))).toBe('CONFIG_BOUNDS');
    expect([...(readNetConfig(transport, FeatureSet.of(Feature.MAC)).mac ?? [])]).toEqual([0, 1, 2, 3, 4, 5]);
  });

  it('takes the cause of an interrupt once, and the ISR status', async () => {
    const fn = make();
    const transport = await openOctepTransport(fn);
    transport.enableQueue(2, setup(0x8000));
    const bar = fn.bar(4);
    expect(transport.causes?.take(2)).toBe(false);
    bar.write8(notifyAt(2) + 4, 1);
    expect([transport.causes?.take(0), transport.causes?.take(2), transport.causes?.take(2)]).toEqual([
      false,
      true,
      false,
    ]);
    bar.write8(ISR, IsrBit.CONFIG);
    expect([transport.readIsr(), transport.readIsr()]).toEqual([IsrBit.CONFIG, 0]);
  });

  it('wants rings at the start of a page', async () => {
    const transport = await openOctepTransport(make());
    expect(() => transport.enableQueue(0, { ...setup(0x8000), descriptorArea: 0x1040 })).toThrow(RangeError);
  });

  it('survives any content of the window', async () => {
    const WINDOW = 0x4000;
    const capability = fc.record({
      kind: fc.constantFrom(9, 9, 9, 5),
      next: fc.constantFrom(0, 0x45, 0x59, 0x69, 0x79, 0x35, 0xff),
      length: fc.constantFrom(16, 20, 20, 255, 3),
      type: fc.constantFrom(1, 2, 3, 4, 9, 77),
      bar: fc.constantFrom(4, 4, 4, 0, 9),
      offset: fc.constantFrom(0x90, 0xd0, 0x100, 0x1000, 0x1001, 0x3fff, 0xffffffff),
      size: fc.constantFrom(64, 4, 0x3000, 1, 0, 0xffffffff),
    });
    const contents = fc.tuple(
      fc.uint8Array({ minLength: WINDOW, maxLength: WINDOW }),
      fc.array(capability, { minLength: 5, maxLength: 5 }),
      fc.integer({ min: 0, max: 15 }),
    );
    await fc.assert(
      fc.asyncProperty(contents, async ([memory, list, interrupts]) => {
        const fn = make();
        const view = new DataView(memory.buffer, memory.byteOffset);
        view.setUint32(0, 0xfeedfeed, true);
        view.setUint32(4, 0x3355ffaa, true);
        memory[0x34] = 0x35;
        for (const [i, at] of [0x35, 0x45, 0x59, 0x69, 0x79].entries()) {
          const { kind, next, length, type, bar, offset, size } = list[i];
          memory.set([kind, next, length, type, bar], at);
          view.setUint32(at + 8, offset, true);
          view.setUint32(at + 12, size, true);
        }
        fn.window.read = (bar, at, width) => {
          if (bar === 0) return at === 0x10004 ? interrupts << 16 : 0;
          let value = 0;
          for (let i = width - 1; i >= 0; i--) value = value * 256 + (memory[at + i] ?? 0);
          return value;
        };
        fn.window.write = () => {};
        try {
          const transport = await openOctepTransport(fn, { readyTimeout: 0, acknowledgeTimeout: 0 });
          const steps: (() => unknown)[] = [
            () => transport.readDeviceFeatures(),
            () => transport.writeDriverFeatures(fn.offered),
            () => transport.queueCount(),
            () => transport.adminQueues(),
            () => transport.maxQueueSize(0),
            () => transport.enableQueue(1, setup(0x8000)),
            () => transport.readConfig((config) => config.read32(20)),
            () => transport.causes?.take(1),
            () => transport.readIsr(),
          ];
          for (const step of steps) await outcome(step);
        } catch (error) {
          codeOf(error);
        }
      }),
      { numRuns: 60 },
    );
  });

  it('has configuration changes on vector 0 and nowhere else', async () => {
    const transport = await openOctepTransport(make());
    transport.setConfigVector(0);
    transport.setConfigVector(NO_VECTOR);
    expect(await outcome(() => transport.setConfigVector(1))).toBe('MSIX_VECTOR');
    expect(transport.interruptVectors).toBe(8);
  });
});
