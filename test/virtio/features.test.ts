import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  FEATURE_BITS,
  Feature,
  FeatureSet,
  featureName,
  unmetRequirements,
  withRequirementsMet,
} from '../../src/virtio/features.ts';

const bits = fc.uniqueArray(fc.nat(FEATURE_BITS - 1));

describe('feature bits', () => {
  it('have the numbers of Virtio 1.4', () => {
    // From the standard's text, not from our table.
    const expected = {
      CSUM: 0,
      MAC: 5,
      STATUS: 16,
      CTRL_VQ: 17,
      MQ: 22,
      INDIRECT_DESC: 28,
      EVENT_IDX: 29,
      VERSION_1: 32,
    };
    const more = { ACCESS_PLATFORM: 33, ADMIN_VQ: 41, SUSPEND: 43, HASH_REPORT: 57, SPEED_DUPLEX: 63, RSS_CONTEXT: 64 };
    expect(Feature).toMatchObject({ ...expected, ...more, OUT_NET_HEADER: 69, IPSEC: 70 });
    expect(new Set(Object.values(Feature)).size).toBe(Object.keys(Feature).length);
  });

  it.each([
    [32, 'VIRTIO_F_VERSION_1'],
    [28, 'VIRTIO_F_INDIRECT_DESC'],
    [5, 'VIRTIO_NET_F_MAC'],
    [70, 'VIRTIO_NET_F_IPSEC'],
    [127, 'bit 127'],
    [42, 'bit 42'],
  ])('%s is named %s', (bit, name) => {
    expect(featureName(bit)).toBe(name);
  });
});

describe('a feature set', () => {
  it('holds exactly the bits that it was made of, over all 128', () => {
    fc.assert(
      fc.property(bits, (list) => {
        const set = FeatureSet.of(...list);
        expect(set.bits()).toEqual([...list].sort((a, b) => a - b));
        for (let bit = 0; bit < FEATURE_BITS; bit++) expect(set.has(bit)).toBe(list.includes(bit));
        expect(FeatureSet.fromWords(set.words).equals(set)).toBe(true);
      }),
    );
  });

  it('is unchanged by its operations, which are those of sets', () => {
    fc.assert(
      fc.property(bits, bits, (a, b) => {
        const x = FeatureSet.of(...a);
        const y = FeatureSet.of(...b);
        const before = [...x.words];
        expect(x.and(y).bits()).toEqual(x.bits().filter((bit) => b.includes(bit)));
        expect(x.minus(y).bits()).toEqual(x.bits().filter((bit) => !b.includes(bit)));
        expect(x.or(y).equals(FeatureSet.of(...a, ...b))).toBe(true);
        expect(x.without(...b).equals(x.minus(y))).toBe(true);
        expect(x.words).toEqual(before);
      }),
    );
  });

  it('has words that are unsigned, bit 31 of each included', () => {
    expect(FeatureSet.of(31, 63, 127).words).toEqual([0x80000000, 0x80000000, 0, 0x80000000]);
    expect(FeatureSet.fromWords([-1, 0]).words).toEqual([0xffffffff, 0, 0, 0]);
  });

  it.each([-1, 128, 1.5])('refuses bit %s', (bit) => {
    expect(() => FeatureSet.of(bit)).toThrow(RangeError);
    expect(FeatureSet.of(1).has(bit)).toBe(false);
  });
});

describe('requirements between features', () => {
  it('of one that is missing take away all that rest on it', () => {
    const { CSUM, HOST_TSO4, HOST_TSO6, HOST_USO, HOST_UDP_TUNNEL_GSO, HOST_UDP_TUNNEL_GSO_CSUM } = Feature;
    const all = FeatureSet.of(CSUM, HOST_TSO4, HOST_TSO6, HOST_USO, HOST_UDP_TUNNEL_GSO, HOST_UDP_TUNNEL_GSO_CSUM);
    expect(withRequirementsMet(all).equals(all)).toBe(true);
    expect(withRequirementsMet(all.without(HOST_USO)).bits()).toEqual([CSUM, HOST_TSO4, HOST_TSO6]);
    expect(withRequirementsMet(all.without(CSUM)).isEmpty).toBe(true);
  });

  it.each([
    [Feature.MQ, Feature.CTRL_VQ],
    [Feature.RSS, Feature.CTRL_VQ],
    [Feature.GUEST_TSO4, Feature.GUEST_CSUM],
    [Feature.RSC_EXT, Feature.HOST_TSO6],
  ])('bit %s needs bit %s', (bit, needed) => {
    expect(unmetRequirements(FeatureSet.of(bit)).bits()).toEqual([bit]);
    expect(unmetRequirements(FeatureSet.of(bit, needed)).bits()).not.toContain(bit);
  });

  it('leave a subset in which all are met, for any set', () => {
    fc.assert(
      fc.property(bits, (list) => {
        const set = FeatureSet.of(...list);
        const kept = withRequirementsMet(set);
        expect(kept.minus(set).isEmpty).toBe(true);
        expect(unmetRequirements(kept).isEmpty).toBe(true);
      }),
    );
  });
});
