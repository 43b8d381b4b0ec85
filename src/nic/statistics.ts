/**
 * The counters of a NIC's queues, summed and named.
 */
import { VERDICTS } from '../fallback/verdict.ts';
import { namedCounters } from '../ipsec/sa-state.ts';
import type { PacketPool } from '../packet/pool.ts';
import { RxCounter } from '../virtio-net/rx.ts';
import { TxCounter } from '../virtio-net/tx.ts';
import type { NicRxQueue } from './rx-queue.ts';
import type { NicTxQueue } from './tx-queue.ts';

/** A receive and a transmit queue. */
export interface NicQueue {
  readonly rx: NicRxQueue;
  readonly tx: NicTxQueue;
  /**
   * Resets one of the two, or both, while all other queues run: what the device had of it is lost. Meanwhile bursts give 0; whoever waits
   * goes on waiting. Throws VirtioError `NO_RING_RESET`, `QUEUE_RESET_TIMEOUT`, or why the queue is broken.
   */
  reset(which?: 'rx' | 'tx'): Promise<void>;
}

export interface QueueStatistics {
  readonly rx: {
    readonly packets: number;
    readonly bytes: number;
    /** Dropped because the device wrote something impossible. */
    readonly invalid: number;
    /** Not processed, or failed, in the device's IPsec; delivered unless software dropped them. */
    readonly securityError: number;
    /** Marked as secured by an SA that does not exist; delivered as not secured. */
    readonly unknownSa: number;
    /** Refills that found too few free packets. */
    readonly poolExhausted: number;
    /** Dropped by software IPsec, or by an SA's selector; by reason. */
    readonly dropped: Readonly<Record<string, number>>;
  };
  readonly tx: {
    readonly packets: number;
    readonly bytes: number;
    /** Dropped because they were not packets that can be sent. */
    readonly invalid: number;
    /** Times that a burst was not taken as a whole. */
    readonly ringFull: number;
    /** Times that a device that returned nothing was notified once more, though it had not asked for it. */
    readonly renotified: number;
    /** Dropped because the SA that was asked for does not exist or could not carry them; by reason. */
    readonly dropped: Readonly<Record<string, number>>;
  };
}

export interface NicStatistics extends QueueStatistics {
  /** The packets of the thread that opened the NIC. */
  readonly pool: {
    readonly packets: number;
    /** Neither in a ring nor with the application. */
    readonly free: number;
    /** As many of the free ones are for receive rings only. */
    readonly reserve: number;
    /** Times that `allocate` or `refer` gave less than what was asked for. */
    readonly exhausted: number;
  };
}

export function poolStatistics(pool: PacketPool): NicStatistics['pool'] {
  const { count: packets, available: free, reserve, exhausted } = pool;
  return { packets, free, reserve, exhausted };
}

/** What is counted of a queue pair, whichever thread has it. */
export interface CountedQueue {
  readonly rx: Pick<NicRxQueue, 'counters' | 'dropped'>;
  readonly tx: Pick<NicTxQueue, 'counters' | 'dropped'>;
}

/** Sums over `queues`. */
export function sumStatistics(queues: readonly CountedQueue[]): QueueStatistics {
  const rx = queues.map((queue) => queue.rx.counters);
  const tx = queues.map((queue) => queue.tx.counters);
  const txDropped = droppedBy(queues.map((queue) => queue.tx));
  // A ring refuses what names no SA too, when there are no SAs for which the queue would look.
  const noSa = sum(tx, TxCounter.droppedSa) + (txDropped['no-sa'] ?? 0);
  return {
    rx: {
      packets: sum(rx, RxCounter.packets),
      bytes: sum(rx, RxCounter.bytes),
      invalid: sum(rx, RxCounter.droppedInvalid),
      securityError: sum(rx, RxCounter.securityError),
      unknownSa: sum(rx, RxCounter.unknownSa),
      poolExhausted: sum(rx, RxCounter.poolExhausted),
      dropped: droppedBy(queues.map((queue) => queue.rx)),
    },
    tx: {
      packets: sum(tx, TxCounter.packets),
      bytes: sum(tx, TxCounter.bytes),
      invalid: sum(tx, TxCounter.droppedInvalid),
      ringFull: sum(tx, TxCounter.ringFull),
      renotified: sum(tx, TxCounter.renotified),
      dropped: noSa === 0 ? txDropped : { ...txDropped, 'no-sa': noSa },
    },
  };
}

function sum(counters: readonly Float64Array[], index: number): number {
  return counters.reduce((all, one) => all + one[index], 0);
}

function droppedBy(queues: readonly { readonly dropped: Float64Array }[]): Record<string, number> {
  const all = new Float64Array(VERDICTS);
  for (const { dropped } of queues) {
    dropped.forEach((count, verdict) => {
      all[verdict] += count;
    });
  }
  return namedCounters(all);
}
