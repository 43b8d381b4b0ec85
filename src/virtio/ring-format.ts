/**
 * What the negotiated features say about virtqueues (Virtio 1.4, 6).
 */
import type { RingFormat } from '../virtqueue/create.ts';
import { Feature, type FeatureSet } from './features.ts';

/** RING_PACKED (6): all queues of a device have one format. */
export function ringFormat(features: FeatureSet): RingFormat {
  return features.has(Feature.RING_PACKED) ? 'packed' : 'split';
}

/** Options of every queue. */
export function ringOptions(features: FeatureSet): { readonly eventIdx: boolean; readonly inOrder: boolean } {
  return { eventIdx: features.has(Feature.EVENT_IDX), inOrder: features.has(Feature.IN_ORDER) };
}
