/**
 * Feature bits (Virtio 1.4, sections 2.2, 5.1.3 and 6) and sets of them.
 *
 * Features are 128 bits wide: four 32-bit words, selected one after the other. Bits 0 to 23 and 50 to 127 belong to the
 * device type (here: network), 24 to 49 to the queues and the transport. Legacy-only bits are left out.
 */

export const Feature = {
  // Network device (5.1.3).
  CSUM: 0,
  GUEST_CSUM: 1,
  CTRL_GUEST_OFFLOADS: 2,
  MTU: 3,
  MAC: 5,
  GUEST_TSO4: 7,
  GUEST_TSO6: 8,
  GUEST_ECN: 9,
  GUEST_UFO: 10,
  HOST_TSO4: 11,
  HOST_TSO6: 12,
  HOST_ECN: 13,
  HOST_UFO: 14,
  MRG_RXBUF: 15,
  STATUS: 16,
  CTRL_VQ: 17,
  CTRL_RX: 18,
  CTRL_VLAN: 19,
  CTRL_RX_EXTRA: 20,
  GUEST_ANNOUNCE: 21,
  MQ: 22,
  CTRL_MAC_ADDR: 23,
  DEVICE_STATS: 50,
  HASH_TUNNEL: 51,
  VQ_NOTF_COAL: 52,
  NOTF_COAL: 53,
  GUEST_USO4: 54,
  GUEST_USO6: 55,
  HOST_USO: 56,
  HASH_REPORT: 57,
  GUEST_HDRLEN: 59,
  RSS: 60,
  RSC_EXT: 61,
  STANDBY: 62,
  SPEED_DUPLEX: 63,
  RSS_CONTEXT: 64,
  GUEST_UDP_TUNNEL_GSO: 65,
  GUEST_UDP_TUNNEL_GSO_CSUM: 66,
  HOST_UDP_TUNNEL_GSO: 67,
  HOST_UDP_TUNNEL_GSO_CSUM: 68,
  OUT_NET_HEADER: 69,
  IPSEC: 70,
  // Every device (6).
  INDIRECT_DESC: 28,
  EVENT_IDX: 29,
  VERSION_1: 32,
  ACCESS_PLATFORM: 33,
  RING_PACKED: 34,
  IN_ORDER: 35,
  ORDER_PLATFORM: 36,
  SR_IOV: 37,
  NOTIFICATION_DATA: 38,
  NOTIF_CONFIG_DATA: 39,
  RING_RESET: 40,
  ADMIN_VQ: 41,
  SUSPEND: 43,
} as const;

export type FeatureBit = (typeof Feature)[keyof typeof Feature];

/** Number of feature bits that can be negotiated, and of the 32-bit words that hold them (2.2). */
export const FEATURE_BITS = 128;
export const FEATURE_WORDS = 4;

/** Bits 24 to 49 are not specific to the device type (2.2). */
const GENERIC_FIRST = 24;
const GENERIC_LAST = 49;

const shortNames = new Map<number, string>(Object.entries(Feature).map(([name, bit]) => [bit, name]));

/** The standard's name of a feature bit, `VIRTIO_F_VERSION_1` or `VIRTIO_NET_F_MAC`; `bit 45` for one that it does not define. */
export function featureName(bit: number): string {
  const name = shortNames.get(bit);
  if (name === undefined) return `bit ${bit}`;
  return bit >= GENERIC_FIRST && bit <= GENERIC_LAST ? `VIRTIO_F_${name}` : `VIRTIO_NET_F_${name}`;
}

/** An immutable set of feature bits. */
export class FeatureSet {
  static readonly empty = new FeatureSet(0, 0, 0, 0);

  /** Bits 0 to 31, 32 to 63, 64 to 95 and 96 to 127, as unsigned numbers. */
  readonly words: readonly [number, number, number, number];

  private constructor(w0: number, w1: number, w2: number, w3: number) {
    this.words = [w0 >>> 0, w1 >>> 0, w2 >>> 0, w3 >>> 0];
  }

  static of(...bits: readonly number[]): FeatureSet {
    return FeatureSet.empty.with(...bits);
  }

  /** The set that a device or a driver shows in its four words; absent words are 0. */
  static fromWords(words: ArrayLike<number>): FeatureSet {
    return new FeatureSet(words[0] ?? 0, words[1] ?? 0, words[2] ?? 0, words[3] ?? 0);
  }

  has(bit: number): boolean {
    return (
      Number.isInteger(bit) && bit >= 0 && bit < FEATURE_BITS && ((this.words[bit >>> 5] >>> (bit & 31)) & 1) === 1
    );
  }

  /** True when every one of `bits` is in the set. */
  hasAll(...bits: readonly number[]): boolean {
    return bits.every((bit) => this.has(bit));
  }

  /** True when at least one of `bits` is in the set. */
  hasAny(...bits: readonly number[]): boolean {
    return bits.some((bit) => this.has(bit));
  }

  with(...bits: readonly number[]): FeatureSet {
    const words = [...this.words];
    for (const bit of bits) {
      if (!Number.isInteger(bit) || bit < 0 || bit >= FEATURE_BITS) throw new RangeError(`feature bit ${bit}`);
      words[bit >>> 5] |= 1 << (bit & 31);
    }
    return FeatureSet.fromWords(words);
  }

  without(...bits: readonly number[]): FeatureSet {
    return this.minus(FeatureSet.of(...bits));
  }

  and(other: FeatureSet): FeatureSet {
    return FeatureSet.fromWords(this.words.map((word, i) => word & other.words[i]));
  }

  or(other: FeatureSet): FeatureSet {
    return FeatureSet.fromWords(this.words.map((word, i) => word | other.words[i]));
  }

  minus(other: FeatureSet): FeatureSet {
    return FeatureSet.fromWords(this.words.map((word, i) => word & ~other.words[i]));
  }

  equals(other: FeatureSet): boolean {
    return this.words.every((word, i) => word === other.words[i]);
  }

  get isEmpty(): boolean {
    return this.words.every((word) => word === 0);
  }

  /** The bits in the set, ascending. */
  bits(): number[] {
    const out: number[] = [];
    for (let bit = 0; bit < FEATURE_BITS; bit++) if (this.has(bit)) out.push(bit);
    return out;
  }

  /** The standard's names of the bits in the set, in the order of the bits. */
  names(): string[] {
    return this.bits().map(featureName);
  }

  toJSON(): string[] {
    return this.names();
  }
}

const F = Feature;
const CTRL = [[F.CTRL_VQ]] as const;
const GUEST_CSUM = [[F.GUEST_CSUM]] as const;
const CSUM = [[F.CSUM]] as const;
const HOST_TSO = [[F.HOST_TSO4, F.HOST_TSO6]] as const;

/** What a feature needs (5.1.3.1): each inner list is a choice of which one must be there. */
const REQUIRES: readonly (readonly [bit: number, needs: readonly (readonly number[])[]])[] = [
  [F.GUEST_TSO4, GUEST_CSUM],
  [F.GUEST_TSO6, GUEST_CSUM],
  [F.GUEST_ECN, [[F.GUEST_TSO4, F.GUEST_TSO6]]],
  [F.GUEST_UFO, GUEST_CSUM],
  [F.GUEST_USO4, GUEST_CSUM],
  [F.GUEST_USO6, GUEST_CSUM],
  [F.GUEST_UDP_TUNNEL_GSO, [[F.GUEST_TSO4], [F.GUEST_TSO6], [F.GUEST_USO4], [F.GUEST_USO6]]],
  [F.GUEST_UDP_TUNNEL_GSO_CSUM, [[F.GUEST_UDP_TUNNEL_GSO]]],
  [F.HOST_TSO4, CSUM],
  [F.HOST_TSO6, CSUM],
  [F.HOST_ECN, HOST_TSO],
  [F.HOST_UFO, CSUM],
  [F.HOST_USO, CSUM],
  [F.HOST_UDP_TUNNEL_GSO, [[F.HOST_TSO4], [F.HOST_TSO6], [F.HOST_USO]]],
  [F.HOST_UDP_TUNNEL_GSO_CSUM, [[F.HOST_UDP_TUNNEL_GSO]]],
  [F.CTRL_RX, CTRL],
  [F.CTRL_VLAN, CTRL],
  [F.GUEST_ANNOUNCE, CTRL],
  [F.MQ, CTRL],
  [F.CTRL_MAC_ADDR, CTRL],
  [F.NOTF_COAL, CTRL],
  [F.RSC_EXT, HOST_TSO],
  [F.RSS, CTRL],
  [F.VQ_NOTF_COAL, CTRL],
  [F.HASH_TUNNEL, [[F.CTRL_VQ], [F.RSS, F.HASH_REPORT]]],
  [F.RSS_CONTEXT, [[F.CTRL_VQ], [F.RSS]]],
];

/** The bits of `set` whose requirements (5.1.3.1) `set` does not meet. */
export function unmetRequirements(set: FeatureSet): FeatureSet {
  const unmet = REQUIRES.filter(([bit, needs]) => set.has(bit) && !needs.every((choice) => set.hasAny(...choice)));
  return FeatureSet.of(...unmet.map(([bit]) => bit));
}

/** The largest subset of `set` in which every requirement is met. */
export function withRequirementsMet(set: FeatureSet): FeatureSet {
  let kept = set;
  for (;;) {
    const unmet = unmetRequirements(kept);
    if (unmet.isEmpty) return kept;
    kept = kept.minus(unmet);
  }
}
