/** A fake administration queue whose device has all five capabilities and offers everything in them. */
import type { SaLimits } from '../../src/ipsec/wire/codec.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import type { WireRevision } from '../../src/virtio/revision.ts';
import {
  encodeActionCapability,
  encodeFlowFilterLimits,
  encodeSelectorCapability,
  SELECTOR_LENGTH,
} from '../../src/virtio-net/flow-filter-wire.ts';
import { FakeAdmin } from '../virtio-net/fake-admin.ts';

export function ipsecDevice(
  limits: SaLimits = { inbound: 8, outbound: 8 },
  revision: WireRevision = 'virtio-1.4',
): FakeAdmin {
  const wire = ipsecWire(revision);
  const admin = new FakeAdmin();
  const most = {
    groups: 4,
    classifiers: 16,
    rules: 16,
    rulesPerGroup: 16,
    lastRulePriority: 8,
    selectorsPerClassifier: 3,
  };
  const selectors = [1, 2, 3, 4, 5, 6].map((type) => ({
    type,
    flags: 1,
    mask: new Uint8Array(SELECTOR_LENGTH[type]).fill(0xff),
  }));
  const modes = [1, 2, 3, 4].map((mode) => ({
    mode,
    maxReplayWindow: 4096,
    options: wire.options,
    ciphers: 0x119n,
    macs: (1n << 2n) | (1n << 4n) | (1n << 26n) | (1n << 41n) | (1n << 53n),
    aeads: 0xe,
    maxCipherKeyLength: 32,
    maxAuthKeyLength: 32,
  }));
  admin.capabilities.set(0x800, encodeFlowFilterLimits(most));
  admin.capabilities.set(0x801, encodeSelectorCapability(selectors));
  admin.capabilities.set(0x802, encodeActionCapability([1, 2, 3, 4]));
  admin.capabilities.set(0x803, wire.encodeSaLimits(limits));
  admin.capabilities.set(0x804, wire.encodeModes(modes));
  return admin;
}
