/**
 * Statistics that the device counts for each virtqueue (Virtio 1.4, 5.1.9.5.11; DEVICE_STATS): their types, the fields of each, and the
 * replies that hold them, for both sides.
 */
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { getLe, putLe } from './control-wire.ts';

type QueueKind = 'receive' | 'transmit' | 'control';

interface StatisticsType {
  /** Bit in `types_bitmap`, and `type` of the reply. */
  readonly bit: number;
  readonly queue: QueueKind;
  /** One of them must have been negotiated; none: nothing is needed. */
  readonly needs: readonly number[];
  /** In the order of the structure, a u64 each. */
  readonly fields: readonly string[];
}

const { GUEST_CSUM, CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, HOST_USO } = Feature;

/** `VIRTIO_NET_STATS_TYPE_…`. Left out: the speed types, because nothing here limits the rate. */
export const StatisticsTypes = {
  receiveBasic: {
    bit: 0,
    queue: 'receive',
    needs: [],
    fields: ['notifications', 'packets', 'bytes', 'interrupts', 'drops', 'dropOverruns'],
  },
  receiveChecksum: { bit: 1, queue: 'receive', needs: [GUEST_CSUM], fields: ['valid', 'needs', 'none', 'bad'] },
  receiveSegmentation: {
    bit: 2,
    queue: 'receive',
    needs: [GUEST_TSO4, GUEST_TSO6],
    fields: ['packets', 'bytes', 'packetsCoalesced', 'bytesCoalesced'],
  },
  transmitBasic: {
    bit: 16,
    queue: 'transmit',
    needs: [],
    fields: ['notifications', 'packets', 'bytes', 'interrupts', 'drops', 'dropMalformed'],
  },
  transmitChecksum: { bit: 17, queue: 'transmit', needs: [CSUM], fields: ['none', 'needs'] },
  transmitSegmentation: {
    bit: 18,
    queue: 'transmit',
    needs: [HOST_TSO4, HOST_TSO6, HOST_USO],
    fields: ['packets', 'bytes', 'segments', 'segmentsBytes', 'packetsNotSegmented', 'bytesNotSegmented'],
  },
  control: { bit: 32, queue: 'control', needs: [], fields: ['commands', 'succeeded'] },
} as const satisfies Record<string, StatisticsType>;

export type StatisticsName = keyof typeof StatisticsTypes;
export const STATISTICS_NAMES = Object.keys(StatisticsTypes) as readonly StatisticsName[];

/** By type, then by field. */
export type DeviceStatistics = { readonly [N in StatisticsName]?: Readonly<Record<string, number>> };

/** `struct virtio_net_stats_reply_hdr`. */
const ReplyField = { type: 0, queue: 2, size: 6, length: 8 } as const;
/** One `stats[]` of `struct virtio_net_ctrl_queue_stats`. */
export const RequestField = { queue: 0, types: 8, length: 16 } as const;
/** `struct virtio_net_stats_capabilities`. */
export const STATISTICS_CAPABILITIES_LENGTH = 8;

/** The kind of virtqueue `index` of a device with `dataQueues` receive and transmit queues. */
export function queueKind(index: number, dataQueues: number): QueueKind {
  if (index >= dataQueues) return 'control';
  return index % 2 === 0 ? 'receive' : 'transmit';
}

/** Names of the types that a queue of this kind has with `features`. */
export function statisticsOf(kind: QueueKind, features: FeatureSet): StatisticsName[] {
  return STATISTICS_NAMES.filter((name) => {
    const { queue, needs } = StatisticsTypes[name];
    return queue === kind && (needs.length === 0 || features.hasAny(...needs));
  });
}

/** The bitmap of types as a number; bit 32 is beyond what `|` can do. */
export function statisticsBitmap(names: readonly StatisticsName[]): number {
  return names.reduce((bits, name) => bits + 2 ** StatisticsTypes[name].bit, 0);
}

/** The types of a bitmap; null when it has a bit that is none. */
export function statisticsNames(bitmap: number): StatisticsName[] | null {
  const names = STATISTICS_NAMES.filter((name) => Math.floor(bitmap / 2 ** StatisticsTypes[name].bit) % 2 === 1);
  return statisticsBitmap(names) === bitmap ? names : null;
}

/** Bytes of a reply of these types. */
export function replyLength(names: readonly StatisticsName[]): number {
  return names.reduce((bytes, name) => bytes + ReplyField.length + 8 * StatisticsTypes[name].fields.length, 0);
}

/** One reply; `values` in the order of the type's fields. */
export function encodeReply(name: StatisticsName, queue: number, values: ArrayLike<number>): Uint8Array {
  const bytes = new Uint8Array(replyLength([name]));
  const { bit, fields } = StatisticsTypes[name];
  bytes[ReplyField.type] = bit;
  putLe(bytes, ReplyField.queue, 2, queue);
  putLe(bytes, ReplyField.size, 2, bytes.length);
  for (let i = 0; i < fields.length; i++) putLe(bytes, ReplyField.length + 8 * i, 8, values[i]);
  return bytes;
}

/**
 * The replies for one queue, of which later ones may be cut off; null when they make no sense: a size that leads nowhere, or another queue. A
 * type that nobody knows is skipped; a structure that is shorter or longer than known is taken as far as it is.
 */
export function decodeReplies(bytes: Uint8Array, queue: number): DeviceStatistics | null {
  const all: { [N in StatisticsName]?: Record<string, number> } = {};
  for (let at = 0; at + ReplyField.length <= bytes.length; ) {
    const size = getLe(bytes, at + ReplyField.size, 2);
    if (size < ReplyField.length || getLe(bytes, at + ReplyField.queue, 2) !== queue) return null;
    if (at + size > bytes.length) break;
    const name = STATISTICS_NAMES.find((one) => StatisticsTypes[one].bit === bytes[at + ReplyField.type]);
    if (name !== undefined) {
      const values: Record<string, number> = {};
      for (const [i, field] of StatisticsTypes[name].fields.entries()) {
        const from = ReplyField.length + 8 * i;
        if (from + 8 <= size) values[field] = getLe(bytes, at + from, 8);
      }
      all[name] = values;
    }
    at += size;
  }
  return all;
}
