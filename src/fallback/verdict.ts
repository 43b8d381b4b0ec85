/**
 * What became of a packet that went through `protect` or `unprotect`.
 *
 * A verdict is a byte in the caller's array, so that a burst costs no object. `ok` and `notIpsec` leave a packet that
 * may go on; with every other verdict the content of the packet is undefined and it must not go anywhere.
 */
export const Verdict = {
  /** Protected, or verified and decapsulated. */
  ok: 0,
  /** Left alone, byte for byte: no SA was asked for (out), or the packet is not IPsec for us (in; also IKE and NAT keep-alives). */
  notIpsec: 1,
  /** The integrity check value is wrong (RFC 4303, 3.4.4). */
  icv: 2,
  /** Seen before, or behind the window (RFC 4303, 3.4.3). */
  replay: 3,
  /** Lengths, padding or versions contradict each other. */
  malformed: 4,
  /** No SA has this handle (out) or this SPI, destination and protocol (in). */
  noSa: 5,
  /** A hard lifetime is over (RFC 4301, 4.4.2.1). */
  expired: 6,
  /** The sequence space is used up (RFC 4303, 3.3.3). */
  sequenceOverflow: 7,
  /** A dummy packet (RFC 4303, 2.6): authentic, nothing to deliver. */
  dummy: 8,
  /** Larger than the SA can carry: see `SoftwareIpsec.largestInner`. */
  tooBig: 9,
  /** The slot has too little headroom or tailroom, or the packet is a chain of slots. */
  noRoom: 10,
  /** A fragment where a whole packet is required (RFC 4303, 3.3.4 and 3.4.1). */
  fragment: 11,
  /** The inner packet is not one that the SA's selector allows (RFC 4301, 5.2, step 4). */
  selector: 12,
  /** TTL or hop limit would become 0. */
  ttl: 13,
  /** Congestion experienced outside, not ECN-capable inside: must be dropped (RFC 6040, 4.2). */
  ecn: 14,
  /** The engine failed. */
  engine: 15,
  /** The SA belongs to a queue of another thread, which alone counts its sequence numbers. */
  foreignSa: 16,
} as const;

export type Verdict = (typeof Verdict)[keyof typeof Verdict];

/** Names of the verdicts, by number, as `vipsec esp --json` prints them. */
export const verdictNames: readonly string[] = [
  'ok',
  'not-ipsec',
  'icv',
  'replay',
  'malformed',
  'no-sa',
  'expired',
  'sequence-overflow',
  'dummy',
  'too-big',
  'no-room',
  'fragment',
  'selector',
  'ttl',
  'ecn',
  'engine',
  'foreign-sa',
];

/** How many verdicts there are: the length of a counter array. */
export const VERDICTS = verdictNames.length;
