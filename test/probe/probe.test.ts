import { describe, expect, it } from 'vitest';
import { describeCapability } from '../../src/probe/probe.ts';
import { CapabilityId } from '../../src/virtio/admin-wire.ts';

describe('a capability in a bring-up report', () => {
  it('is shown as known but not used when it is of device parts', () => {
    expect(describeCapability(CapabilityId.DEV_PARTS, Uint8Array.of(4, 2, 0, 0, 0, 0, 0, 0))).toEqual({
      id: 0,
      name: 'DEV_PARTS',
      bytes: 8,
      used: false,
      deviceParts: { get: 4, set: 2 },
    });
  });

  it('is used when it is one of flow filter and IPsec', () => {
    for (const name of [
      'NET_FF_RESOURCE',
      'NET_FF_SELECTOR',
      'NET_FF_ACTION',
      'NET_IPSEC_RESOURCE',
      'NET_IPSEC_SA',
    ] as const) {
      expect(describeCapability(CapabilityId[name], new Uint8Array(8))).toMatchObject({ name, bytes: 8, used: true });
    }
  });

  it('is shown by number when nobody knows it', () => {
    expect(describeCapability(0x8ff, new Uint8Array(3))).toEqual({ id: 0x8ff, name: '0x8ff', bytes: 3, used: false });
  });
});
