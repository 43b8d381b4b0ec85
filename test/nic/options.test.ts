import { describe, expect, it } from 'vitest';
import { featuresFor, resolveOptions } from '../../src/nic/options.ts';
import { Feature } from '../../src/virtio/features.ts';
import { negotiateFeatures } from '../../src/virtio/initialize.ts';

const socket = { behindIommu: false };
const kernel = { behindIommu: true };

describe('what a NIC asks of the device', () => {
  it('includes ACCESS_PLATFORM behind an IOMMU, and says what is missing without it', () => {
    const { required, wanted } = featuresFor(resolveOptions({}), kernel);
    expect(required.has(Feature.ACCESS_PLATFORM)).toBe(true);
    const offered = wanted.without(Feature.ACCESS_PLATFORM);
    expect(() => negotiateFeatures(offered, required, wanted)).toThrow(
      expect.objectContaining({ code: 'FEATURES_MISSING', hint: expect.stringMatching(/iommu_platform=on/) }),
    );
    const user = featuresFor(resolveOptions({}), socket);
    expect(negotiateFeatures(offered, user.required, user.wanted).has(Feature.ACCESS_PLATFORM)).toBe(false);
    expect(user.wanted.has(Feature.ACCESS_PLATFORM)).toBe(true);
  });

  it('is IPsec as far as it is wanted', () => {
    for (const [ipsec, required, wanted] of [
      ['auto', false, true],
      ['inline', true, false],
      ['software', false, false],
      ['off', false, false],
    ] as const) {
      const features = featuresFor(resolveOptions({ ipsec }), socket);
      expect(features.required.hasAll(Feature.IPSEC, Feature.ADMIN_VQ)).toBe(required);
      expect(features.wanted.hasAll(Feature.IPSEC, Feature.ADMIN_VQ)).toBe(wanted);
      expect(features.wanted.has(Feature.OUT_NET_HEADER)).toBe(required || wanted);
    }
  });

  it('leaves OUT_NET_HEADER alone in the draft, whose header has no place for it', () => {
    const { wanted } = featuresFor(resolveOptions({ wire: 'rfc-2025-01' }), socket);
    expect(wanted.has(Feature.OUT_NET_HEADER)).toBe(false);
    expect(wanted.has(Feature.IPSEC)).toBe(true);
  });

  it('leaves out what is to be declined, unless nothing works without', () => {
    const decline = [Feature.IN_ORDER, Feature.EVENT_IDX];
    const { wanted } = featuresFor(resolveOptions({ decline }), socket);
    expect(wanted.hasAny(...decline)).toBe(false);
    expect(featuresFor(resolveOptions({}), socket).wanted.hasAll(...decline)).toBe(true);
    for (const [options, fn] of [
      [{ decline: [Feature.VERSION_1] }, socket],
      [{ decline: [Feature.ACCESS_PLATFORM] }, kernel],
      [{ decline: [Feature.RING_PACKED], ring: 'packed' }, socket],
      [{ decline: [Feature.MQ], queuePairs: 2 }, socket],
      [{ decline: [Feature.IPSEC], ipsec: 'inline' }, socket],
    ] as const) {
      expect(() => featuresFor(resolveOptions(options), fn)).toThrow(expect.objectContaining({ code: 'NIC_OPTION' }));
    }
  });

  it('has packets either in memory of the application, or so many, and not for other threads then', () => {
    const packetMemory = { fd: 3, offset: 0, size: 1 << 20 };
    expect(resolveOptions({ packetMemory }).packetMemory).toBe(packetMemory);
    for (const others of [{ packets: 1024 }, { workerQueues: 1 }]) {
      expect(() => resolveOptions({ packetMemory, ...others })).toThrow(
        expect.objectContaining({ code: 'NIC_OPTION' }),
      );
    }
  });

  it('has a unicast address and a deadline that is one', () => {
    for (const mac of [new Uint8Array(5), Uint8Array.of(1, 0, 0, 0, 0, 0)]) {
      expect(() => resolveOptions({ mac })).toThrow(expect.objectContaining({ code: 'NIC_OPTION' }));
    }
    expect(resolveOptions({ mac: Uint8Array.of(2, 0, 0, 0, 0, 1) }).mac).toHaveLength(6);
    for (const connectTimeout of [0, -1, Number.NaN, Number.POSITIVE_INFINITY]) {
      expect(() => resolveOptions({ connectTimeout })).toThrow(expect.objectContaining({ code: 'NIC_OPTION' }));
    }
  });

  it('is refused when the wire revision is none', () => {
    expect(() => resolveOptions({ wire: 'virtio-1.3' as 'auto' })).toThrow(
      expect.objectContaining({ code: 'NIC_OPTION' }),
    );
  });
});
