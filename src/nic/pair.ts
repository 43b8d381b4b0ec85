/**
 * What follows from the negotiated features for the two queues of a pair: the same for whichever thread drives them.
 */
import { Ethernet } from '../packet/fields.ts';
import type { PacketPool } from '../packet/pool.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import type { WireRevision } from '../virtio/revision.ts';
import { ringOptions } from '../virtio/ring-format.ts';
import type { QueueNotifier } from '../virtio/transport.ts';
import { type NetHeaderLayout, netHeaderLayout, receivedGsoTypes, sentGsoTypes } from '../virtio-net/header.ts';
import type { RxQueue } from '../virtio-net/rx.ts';
import { createRxQueue } from '../virtio-net/rx-merge.ts';
import type { SaTable } from '../virtio-net/sa-table.ts';
import { MAX_CHAIN, TxQueue } from '../virtio-net/tx.ts';
import type { Virtqueue, VirtqueueOptions } from '../virtqueue/virtqueue.ts';

/** What the queues of all pairs have in common. */
export interface PairSettings {
  readonly features: FeatureSet;
  readonly wire: WireRevision;
  /** Bytes of the longest IP packet. */
  readonly mtu: number;
}

/** A ring, and how the device is told of what is in it. */
export interface DrivenRing {
  readonly queue: Virtqueue;
  readonly notifier: QueueNotifier;
  /** Where its queue counts; default its own array. */
  readonly counters?: Float64Array;
}

export function layoutOf({ features, wire }: PairSettings): NetHeaderLayout {
  return netHeaderLayout(features, wire);
}

/** Options of virtqueue `index`, of `size` descriptors, whose buffers lie in the memory that begins at an IOVA. Receive queues are even. */
export function virtqueueOptions(
  settings: PairSettings,
  index: number,
  size: number,
  pool: { readonly iovaLow: number; readonly iovaHigh: number },
): VirtqueueOptions {
  const { features } = settings;
  return {
    index,
    size,
    ...ringOptions(features),
    iovaLow: pool.iovaLow,
    iovaHigh: pool.iovaHigh,
    headroom: layoutOf(settings).length,
    // Only what is sent is ever a chain.
    indirectEntries: features.has(Feature.INDIRECT_DESC) && index % 2 === 1 ? MAX_CHAIN : 0,
  };
}

/** The queues over the two rings of a pair. */
export function makeQueues(
  settings: PairSettings,
  pool: PacketPool,
  sas: SaTable,
  rx: DrivenRing,
  tx: DrivenRing,
): { readonly rx: RxQueue; readonly tx: TxQueue } {
  const { features, mtu } = settings;
  const common = { pool, layout: layoutOf(settings), sas };
  const receiving = {
    guestChecksum: features.has(Feature.GUEST_CSUM),
    mergeable: features.has(Feature.MRG_RXBUF),
    gsoTypes: receivedGsoTypes(features),
  };
  const transmitting = {
    checksum: features.has(Feature.CSUM),
    gsoTypes: sentGsoTypes(features),
    maxLength: mtu + Ethernet.length,
  };
  return {
    rx: createRxQueue({ ...common, ...receiving, ...rx }),
    tx: new TxQueue({ ...common, ...transmitting, ...tx }),
  };
}
