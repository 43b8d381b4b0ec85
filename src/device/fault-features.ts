/** How the faults of `faults.ts` that concern the offered features are made. */
import { Feature, type FeatureSet } from '../virtio/features.ts';
import type { FaultName, FaultSet } from './faults.ts';

const CHANGES: Partial<Record<FaultName, (offered: FeatureSet) => FeatureSet>> = {
  'no-version-1': (offered) => offered.without(Feature.VERSION_1),
  'notification-data': (offered) => offered.with(Feature.NOTIFICATION_DATA),
};

/** What is offered with the faults. */
export function withFeatureFaults(offered: FeatureSet, faults: FaultSet): FeatureSet {
  let features = offered;
  for (const name of faults) features = CHANGES[name]?.(features) ?? features;
  return features;
}
