/** How the faults of `faults.ts` that concern the offered features are made. */
import { Feature, type FeatureSet } from '../virtio/features.ts';
import type { FaultName, FaultSet } from './faults.ts';

/** A bit that the standard gives no meaning. */
const UNDEFINED = 100;

const CHANGES: Partial<Record<FaultName, (offered: FeatureSet) => FeatureSet>> = {
  'no-version-1': (offered) => offered.without(Feature.VERSION_1),
  'feature-orphan': (offered) => offered.with(Feature.CTRL_RX).without(Feature.CTRL_VQ),
  'feature-undefined': (offered) => offered.with(UNDEFINED),
  'in-order-lie': (offered) => offered.with(Feature.IN_ORDER),
  'sr-iov-lie': (offered) => offered.with(Feature.SR_IOV),
  'mq-zero-pairs': (offered) => offered.with(Feature.MQ, Feature.CTRL_VQ),
  'rss-without-room': (offered) => offered.with(Feature.RSS, Feature.CTRL_VQ),
  'features-without-ctrl': (offered) =>
    offered.with(Feature.HASH_REPORT, Feature.CTRL_RX_EXTRA).without(Feature.CTRL_VQ),
  // Packed virtqueues may have any size.
  'queue-size-odd': (offered) => offered.without(Feature.RING_PACKED),
  'no-out-net-header': (offered) => offered.without(Feature.OUT_NET_HEADER),
  'guest-tso-silent': (offered) => offered.with(Feature.GUEST_TSO4),
  'no-notification-data': (offered) => offered.without(Feature.NOTIFICATION_DATA),
  'suspend-ignored': (offered) => offered.with(Feature.SUSPEND),
  'suspend-fake': (offered) => offered.with(Feature.SUSPEND),
  'suspend-for-good': (offered) => offered.with(Feature.SUSPEND),
  'rss-contexts-none': (offered) => offered.with(Feature.RSS_CONTEXT),
  'hash-tunnel-any': (offered) => offered.with(Feature.HASH_TUNNEL),
  'notification-data': (offered) => offered.with(Feature.NOTIFICATION_DATA),
};

/** What is offered with the faults. */
export function withFeatureFaults(offered: FeatureSet, faults: FaultSet): FeatureSet {
  let features = offered;
  for (const name of faults) features = CHANGES[name]?.(features) ?? features;
  return features;
}
