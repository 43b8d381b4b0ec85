import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { CommonConfig, type QueueConfig, queueAddresses } from '../../src/device/common-config.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { CommonCfgLength, CommonCfgField as F, DeviceStatus as S } from '../../src/virtio/pci-layout.ts';

const OFFERED = FeatureSet.of(Feature.VERSION_1, Feature.RING_RESET, Feature.ADMIN_VQ, Feature.MAC, Feature.IPSEC);

function make(accepts = true) {
  const log: string[] = [];
  const common = new CommonConfig(
    { offered: OFFERED, queues: 2, adminQueues: 1, vectors: 4, maxQueueSize: () => 256 },
    {
      reset: () => log.push('reset'),
      acceptsFeatures: (features) => {
        log.push(`features ${features.bits().join(',')}`);
        return accepts;
      },
      driverOk: () => log.push('driver ok'),
      queueEnabled: (queue: QueueConfig) => log.push(`enabled ${queue.index}`),
      queueReset: (queue: QueueConfig) => log.push(`queue reset ${queue.index}`),
    },
  );
  const accept = (features: FeatureSet) => {
    for (let word = 0; word < 4; word++) {
      common.write(F.driverFeatureSelect, 4, word);
      common.write(F.driverFeature, 4, features.words[word]);
    }
  };
  const negotiate = (features = OFFERED) => {
    common.write(F.deviceStatus, 1, 1);
    common.write(F.deviceStatus, 1, 3);
    accept(features);
    common.write(F.deviceStatus, 1, 11);
  };
  return { common, log, accept, negotiate };
}

describe('the common configuration structure', () => {
  it('shows all four words of the features, and zeros beyond', () => {
    const { common } = make();
    const words = [0, 1, 2, 3, 4, 0xffffffff].map((word) => {
      common.write(F.deviceFeatureSelect, 4, word);
      return common.read(F.deviceFeature, 4);
    });
    expect(words).toEqual([...OFFERED.words, 0, 0]);
  });

  it('goes through the steps of initialisation', () => {
    const { common, log, negotiate } = make();
    negotiate();
    expect(common.read(F.deviceStatus, 1)).toBe(11);
    expect(common.features.equals(OFFERED)).toBe(true);
    common.write(F.deviceStatus, 1, 15);
    expect(common.read(F.deviceStatus, 1)).toBe(15);
    expect(common.isLive).toBe(true);
    expect(log).toEqual([`features ${OFFERED.bits().join(',')}`, 'driver ok']);
  });

  it('does not set FEATURES_OK for a feature that it does not offer', () => {
    const { common, negotiate } = make();
    negotiate(OFFERED.with(Feature.CSUM));
    expect(common.read(F.deviceStatus, 1)).toBe(3);
    expect(common.features.isEmpty).toBe(true);
  });

  it('does not set FEATURES_OK when the device cannot work with the features', () => {
    const { common, negotiate } = make(false);
    negotiate();
    expect(common.read(F.deviceStatus, 1)).toBe(3);
  });

  it('does not become live without FEATURES_OK', () => {
    const { common, log } = make();
    common.write(F.deviceStatus, 1, 7);
    expect(common.read(F.deviceStatus, 1)).toBe(3);
    expect(log).toEqual([]);
    expect(common.violations).toBe(1);
  });

  it('takes no features after FEATURES_OK', () => {
    const { common, accept, negotiate } = make();
    negotiate(FeatureSet.of(Feature.VERSION_1));
    accept(OFFERED);
    common.write(F.driverFeatureSelect, 4, 2);
    expect(common.read(F.driverFeature, 4)).toBe(0);
    expect(common.features.has(Feature.IPSEC)).toBe(false);
  });

  it('lets the driver clear no status bit, and not set DEVICE_NEEDS_RESET', () => {
    const { common, negotiate } = make();
    negotiate();
    common.write(F.deviceStatus, 1, 1);
    expect(common.read(F.deviceStatus, 1)).toBe(11);
    common.write(F.deviceStatus, 1, 11 | S.DEVICE_NEEDS_RESET);
    expect(common.read(F.deviceStatus, 1)).toBe(11);
    common.write(F.deviceStatus, 1, 11 | S.FAILED);
    expect(common.read(F.deviceStatus, 1)).toBe(11 | S.FAILED);
  });

  it('tells a live driver once that it needs a reset, and stops being live', () => {
    const { common, negotiate } = make();
    negotiate();
    common.write(F.deviceStatus, 1, 15);
    expect(common.needsReset()).toBe(true);
    expect(common.needsReset()).toBe(false);
    expect(common.isLive).toBe(false);
    expect(common.read(F.deviceStatus, 1)).toBe(15 | S.DEVICE_NEEDS_RESET);
    common.write(F.deviceStatus, 1, 0);
    expect(common.read(F.deviceStatus, 1)).toBe(0);
  });

  it('is all as it was after a reset', () => {
    const { common, log, negotiate } = make();
    const registers = () => {
      const values: number[] = [];
      for (const [at, width] of [
        [F.deviceFeatureSelect, 4],
        [F.driverFeatureSelect, 4],
        [F.driverFeature, 4],
        [F.configMsixVector, 2],
        [F.deviceStatus, 1],
        [F.queueSelect, 2],
        [F.queueSize, 2],
        [F.queueMsixVector, 2],
        [F.queueEnable, 2],
        [F.queueDesc, 4],
        [F.queueDevice + 4, 4],
      ] as const) {
        values.push(common.read(at, width));
      }
      return values;
    };
    const before = registers();
    negotiate();
    common.write(F.configMsixVector, 2, 1);
    common.write(F.queueSize, 2, 64);
    common.write(F.queueDesc, 4, 0x1000);
    common.write(F.queueMsixVector, 2, 2);
    common.write(F.queueEnable, 2, 1);
    common.write(F.queueSelect, 2, 1);
    common.write(F.deviceStatus, 1, 0);
    expect(registers()).toEqual(before);
    expect(log.at(-1)).toBe('reset');
  });

  it('configures a queue and gives its addresses', () => {
    const { common, log, negotiate } = make();
    negotiate();
    common.write(F.queueSelect, 2, 1);
    expect(common.read(F.queueSize, 2)).toBe(256);
    common.write(F.queueSize, 2, 128);
    for (let i = 0; i < 6; i++) common.write(F.queueDesc + 4 * i, 4, 16 * (i + 1));
    common.write(F.queueEnable, 2, 1);
    expect(log.at(-1)).toBe('enabled 1');
    expect(common.read(F.queueEnable, 2)).toBe(1);
    expect(Object.values(queueAddresses(common.queues[1]))).toEqual([16, 32, 48, 64, 80, 96]);
    // Nothing changes while it is enabled, and it cannot be disabled.
    common.write(F.queueDesc, 4, 0);
    common.write(F.queueSize, 2, 16);
    common.write(F.queueEnable, 2, 0);
    expect([common.read(F.queueDesc, 4), common.read(F.queueSize, 2), common.read(F.queueEnable, 2)]).toEqual([
      16, 128, 1,
    ]);
  });

  it.each([0, 3, 100, 257, 512, 0xffff])('does not take a queue size of %i', (size) => {
    const { common, negotiate } = make();
    negotiate();
    common.write(F.queueSize, 2, size);
    expect(common.read(F.queueSize, 2)).toBe(256);
  });

  it.each([
    ['descriptor', F.queueDesc, 8],
    ['driver', F.queueDriver, 1],
    ['device', F.queueDevice, 2],
  ])('does not enable a queue whose %s area is misaligned', (_, field, address) => {
    const { common, log, negotiate } = make();
    negotiate();
    common.write(field, 4, address);
    common.write(F.queueEnable, 2, 1);
    expect(common.read(F.queueEnable, 2)).toBe(0);
    expect(log.some((entry) => entry.startsWith('enabled'))).toBe(false);
  });

  it('does not enable a queue before FEATURES_OK', () => {
    const { common } = make();
    common.write(F.queueEnable, 2, 1);
    expect(common.read(F.queueEnable, 2)).toBe(0);
  });

  it('resets one queue when RING_RESET was negotiated, and only then', () => {
    const { common, log, negotiate } = make();
    negotiate();
    common.write(F.queueSize, 2, 64);
    common.write(F.queueEnable, 2, 1);
    common.write(F.queueReset, 2, 1);
    expect([common.read(F.queueReset, 2), common.read(F.queueEnable, 2), common.read(F.queueSize, 2)]).toEqual([
      0, 0, 256,
    ]);
    expect(log.at(-1)).toBe('queue reset 0');
    const other = make();
    other.negotiate(FeatureSet.of(Feature.VERSION_1));
    other.common.write(F.queueEnable, 2, 1);
    other.common.write(F.queueReset, 2, 1);
    expect(other.common.read(F.queueEnable, 2)).toBe(1);
  });

  it('shows the administration queue only when ADMIN_VQ was negotiated', () => {
    const { common, negotiate } = make();
    expect([common.read(F.numQueues, 2), common.read(F.adminQueueIndex, 2), common.read(F.adminQueueNum, 2)]).toEqual([
      2, 2, 1,
    ]);
    common.write(F.queueSelect, 2, 2);
    expect(common.read(F.queueSize, 2)).toBe(0);
    negotiate();
    expect(common.read(F.queueSize, 2)).toBe(256);
    common.write(F.queueSelect, 2, 3);
    expect(common.read(F.queueSize, 2)).toBe(0);
  });

  it('maps vectors that exist and returns NO_VECTOR for others', () => {
    const { common } = make();
    for (const field of [F.configMsixVector, F.queueMsixVector]) {
      expect(common.read(field, 2)).toBe(0xffff);
      common.write(field, 2, 3);
      expect(common.read(field, 2)).toBe(3);
      common.write(field, 2, 4);
      expect(common.read(field, 2)).toBe(0xffff);
    }
  });

  it('changes config_generation once for each read that could see a change', () => {
    const { common } = make();
    const before = common.read(F.configGeneration, 1);
    common.configRead();
    expect(common.read(F.configGeneration, 1)).toBe(before);
    for (let i = 0; i < 256; i++) common.configChanged();
    common.configRead();
    expect(common.read(F.configGeneration, 1)).toBe(before + 1);
    common.configRead();
    expect(common.read(F.configGeneration, 1)).toBe(before + 1);
  });

  it.each([
    [F.deviceFeatureSelect, 2],
    [F.deviceFeature, 1],
    [F.deviceStatus, 4],
    [F.queueSize, 4],
    [F.queueSize, 1],
    [F.queueDesc, 2],
    [F.queueDesc + 2, 2],
    [F.numQueues + 1, 1],
  ])('answers an access of the wrong width at %i with ones, and counts it', (at, width) => {
    const { common } = make();
    expect(common.read(at, width)).toBe(2 ** (8 * width) - 1);
    common.write(at, width, 1);
    expect(common.violations).toBe(2);
    expect(common.status).toBe(0);
  });

  it('survives any sequence of accesses, and is never live without FEATURES_OK', () => {
    const access = fc.record({
      write: fc.boolean(),
      at: fc.integer({ min: 0, max: CommonCfgLength.full + 4 }),
      width: fc.constantFrom(1, 2, 4),
      value: fc.oneof(fc.integer({ min: 0, max: 255 }), fc.integer({ min: 0, max: 0xffffffff })),
    });
    fc.assert(
      fc.property(fc.array(access, { maxLength: 60 }), (accesses) => {
        const { common } = make();
        for (const { write, at, width, value } of accesses) {
          if (write) common.write(at, width, value % 2 ** (8 * width));
          else expect(common.read(at, width)).toBeLessThan(2 ** (8 * width));
          if (common.isLive) expect(common.status & S.FEATURES_OK).toBe(S.FEATURES_OK);
          expect(common.features.minus(OFFERED).isEmpty).toBe(true);
          for (const queue of common.queues) expect(Math.log2(queue.size) % 1).toBe(0);
        }
      }),
    );
  });
});
