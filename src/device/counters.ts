/** What a network function counts. No log line is ever written for a packet. */

export const NetCounter = {
  txPackets: 0,
  txBytes: 1,
  /** Too short for header and Ethernet, or longer than the largest frame. */
  txLength: 2,
  /** A header that the negotiated features do not allow. */
  txHeader: 3,
  /** SECURITY with a resource that is no outbound SA: dropped, never sent in the clear. */
  txNoSa: 4,
  /** Refused by IPsec: see the verdicts. */
  txIpsec: 5,
  rxPackets: 6,
  rxBytes: 7,
  /** The driver was not ready. */
  rxNotReady: 8,
  /** No receive buffers, and the backlog is full. */
  rxNoBuffer: 9,
  /** Longer than the MTU or than the receive buffer. */
  rxTooLong: 10,
  /** Dropped by a flow filter rule. */
  rxFiltered: 11,
  /** Refused by IPsec: see the verdicts. */
  rxIpsec: 12,
  /** Directed by a rule to a queue that is not enabled. */
  rxNoQueue: 13,
  /** No room in the slot for the header. */
  rxNoRoom: 14,
  /** Packets that were cut into segments, and the segments. */
  txSegmented: 15,
  txSegments: 16,
  /** Not for the driver: by address or VLAN. */
  rxNotForUs: 17,
  /** Packets that stand for several and were passed on as such. */
  txUnfinished: 18,
} as const;

/** Counters by `NetCounter`. */
export function makeNetCounters(): Float64Array {
  return new Float64Array(Object.keys(NetCounter).length);
}

/** The counters by name. */
export function readNetCounters(counters: Float64Array): Record<string, number> {
  return Object.fromEntries(Object.entries(NetCounter).map(([name, index]) => [name, counters[index]]));
}
