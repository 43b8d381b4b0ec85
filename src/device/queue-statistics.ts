/** What the device counts for each virtqueue (Virtio 1.4, 5.1.9.5.11): rows of numbers, in the order of the standard's structures. */
import type { StatisticsName } from '../virtio-net/device-statistics.ts';

/** Places in a row. Receive and transmit queues share the first six; what follows means another thing in each. */
export const Stat = {
  notifications: 0,
  packets: 1,
  bytes: 2,
  interrupts: 3,
  drops: 4,
  /** Receive: no descriptors. Transmit: malformed. */
  special: 5,
  rxChecksumValid: 6,
  rxNeedsChecksum: 7,
  rxChecksumNone: 8,
  rxChecksumBad: 9,
  txChecksumNone: 6,
  txNeedsChecksum: 7,
  txGsoPackets: 10,
  txGsoBytes: 11,
  txGsoSegments: 12,
  txGsoSegmentBytes: 13,
  rxGsoPackets: 10,
  rxGsoBytes: 11,
  /** Passed on without having been segmented. */
  txGsoWholePackets: 14,
  txGsoWholeBytes: 15,
  /** Control queue. */
  commands: 14,
  succeeded: 15,
} as const;

const ROW = 16;

/** Where the fields of a type begin in a row. */
const FIRST: Readonly<Record<StatisticsName, number>> = {
  receiveBasic: Stat.notifications,
  receiveChecksum: Stat.rxChecksumValid,
  receiveSegmentation: Stat.rxGsoPackets,
  transmitBasic: Stat.notifications,
  transmitChecksum: Stat.txChecksumNone,
  transmitSegmentation: Stat.txGsoPackets,
  control: Stat.commands,
};

export class QueueStatistics {
  readonly #rows: Float64Array;

  constructor(queues: number) {
    this.#rows = new Float64Array(queues * ROW);
  }

  clear(): void {
    this.#rows.fill(0);
  }

  /** hot: */
  add(queue: number, stat: number, n: number): void {
    this.#rows[queue * ROW + stat] += n;
  }

  /** The fields of type `name`. */
  read(queue: number, name: StatisticsName): Float64Array {
    const from = queue * ROW + FIRST[name];
    return this.#rows.slice(from, (queue + 1) * ROW);
  }
}
