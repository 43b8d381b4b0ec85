/**
 * What goes through the control virtqueue (Virtio 1.4, 5.1.9.5), for both sides: `struct virtio_net_ctrl` is a class, a command
 * and data from the driver; an `ack` and, for a few commands, a result from the device. All integers are little-endian.
 */
import { Feature, type FeatureBit, FeatureSet } from '../virtio/features.ts';

/** `struct virtio_net_ctrl`; `ack` and the result are a part of their own. */
export const ControlField = { class: 0, command: 1, data: 2 } as const;
export const Ack = { OK: 0, ERR: 1, size: 1 } as const;

/** `class`. */
export const ControlClass = {
  RX: 0,
  MAC: 1,
  VLAN: 2,
  ANNOUNCE: 3,
  MQ: 4,
  GUEST_OFFLOADS: 5,
  NOTF_COAL: 6,
  STATS: 8,
  RSS_CONTEXT: 9,
} as const;

/** 5.1.9.5.1: each has one byte of data, 0 or 1. The first two belong to CTRL_RX, the others to CTRL_RX_EXTRA. */
export const RxCommand = { PROMISC: 0, ALLMULTI: 1, ALLUNI: 2, NOMULTI: 3, NOUNI: 4, NOBCAST: 5 } as const;
/** 5.1.9.5.2. */
export const MacCommand = { TABLE_SET: 0, ADDR_SET: 1 } as const;
/** 5.1.9.5.3: a u16 VLAN id. */
export const VlanCommand = { ADD: 0, DEL: 1 } as const;
/** 5.1.9.5.4. */
export const AnnounceCommand = { ACK: 0 } as const;
/** 5.1.9.5.5. */
export const MqCommand = { VQ_PAIRS_SET: 0, RSS_CONFIG: 1, HASH_CONFIG: 2 } as const;
/** 5.1.9.5.9: a u64 of offloads, see `encodeOffloads`. */
export const OffloadsCommand = { SET: 0 } as const;
/** 5.1.9.5.10. */
export const CoalescingCommand = { TX_SET: 0, RX_SET: 1, VQ_SET: 2, VQ_GET: 3 } as const;
/** 5.1.9.5.8: `rss_ctx_id` and, but for DEL, 6 reserved bytes and the configuration. */
export const RssContextCommand = { CAP_GET: 0, ADD: 1, MOD: 2, DEL: 3 } as const;
export const RssContextField = { id: 0, reserved: 2, config: 8 } as const;
/** 5.1.9.5.11. */
export const StatsCommand = { QUERY: 0, GET: 1 } as const;

/** VLAN ids (IEEE 802.1Q). */
export const VLAN_IDS = 4096;

/** Bits of `hash_types` (5.1.9.4.3.1): `HashReport` r reports the type 1 << (r - 1). */
export const HashType = {
  IPV4: 1 << 0,
  TCPV4: 1 << 1,
  UDPV4: 1 << 2,
  IPV6: 1 << 3,
  TCPV6: 1 << 4,
  UDPV6: 1 << 5,
  IP_EX: 1 << 6,
  TCP_EX: 1 << 7,
  UDP_EX: 1 << 8,
} as const;

/** `struct virtio_net_rss_config` (5.1.9.5.7.1); the queues are numbers of receive queues, 0 is receiveq1. */
export interface RssConfig {
  /** `HashType` bits. */
  readonly hashTypes: number;
  /** Receive queue of packets without a hash. */
  readonly unclassifiedQueue: number;
  /** Receive queue by the low bits of the hash; a power of two of them. */
  readonly indirectionTable: readonly number[];
  /** Transmit queues that the driver may use. */
  readonly maxTransmitQueues: number;
  /** Toeplitz key. */
  readonly key: Uint8Array;
}

/** `struct virtio_net_hash_config` (5.1.9.5.6.1). */
export interface HashConfig {
  readonly hashTypes: number;
  readonly key: Uint8Array;
}

const RssField = { hashTypes: 0, mask: 4, unclassified: 6, table: 8 } as const;
const HashField = { hashTypes: 0, keyLength: 12, key: 13 } as const;

export function encodeRssConfig(config: RssConfig): Uint8Array {
  const { indirectionTable: table, key } = config;
  const behind = RssField.table + 2 * table.length;
  const bytes = new Uint8Array(behind + 3 + key.length);
  putLe(bytes, RssField.hashTypes, 4, config.hashTypes);
  putLe(bytes, RssField.mask, 2, table.length - 1);
  putLe(bytes, RssField.unclassified, 2, config.unclassifiedQueue);
  for (const [i, queue] of table.entries()) putLe(bytes, RssField.table + 2 * i, 2, queue);
  putLe(bytes, behind, 2, config.maxTransmitQueues);
  bytes[behind + 2] = key.length;
  bytes.set(key, behind + 3);
  return bytes;
}

/** Null when it is no such structure: too short, or a table whose length is not a power of two. */
export function decodeRssConfig(bytes: Uint8Array): RssConfig | null {
  if (bytes.length < RssField.table) return null;
  const length = getLe(bytes, RssField.mask, 2) + 1;
  const behind = RssField.table + 2 * length;
  if ((length & (length - 1)) !== 0 || bytes.length < behind + 3) return null;
  const keyLength = bytes[behind + 2];
  if (bytes.length < behind + 3 + keyLength) return null;
  return {
    hashTypes: getLe(bytes, RssField.hashTypes, 4),
    unclassifiedQueue: getLe(bytes, RssField.unclassified, 2),
    indirectionTable: Array.from({ length }, (_, i) => getLe(bytes, RssField.table + 2 * i, 2)),
    maxTransmitQueues: getLe(bytes, behind, 2),
    key: bytes.slice(behind + 3, behind + 3 + keyLength),
  };
}

export function encodeHashConfig(config: HashConfig): Uint8Array {
  const bytes = new Uint8Array(HashField.key + config.key.length);
  putLe(bytes, HashField.hashTypes, 4, config.hashTypes);
  bytes[HashField.keyLength] = config.key.length;
  bytes.set(config.key, HashField.key);
  return bytes;
}

export function decodeHashConfig(bytes: Uint8Array): HashConfig | null {
  if (bytes.length < HashField.key || bytes.length < HashField.key + bytes[HashField.keyLength]) return null;
  const key = bytes.slice(HashField.key, HashField.key + bytes[HashField.keyLength]);
  return { hashTypes: getLe(bytes, HashField.hashTypes, 4), key };
}

/** Two tables of `struct virtio_net_ctrl_mac` (5.1.9.5.2). */
export function encodeMacTables(unicast: readonly Uint8Array[], multicast: readonly Uint8Array[]): Uint8Array {
  const parts = [unicast, multicast].map((macs) => {
    const bytes = new Uint8Array(4 + 6 * macs.length);
    putLe(bytes, 0, 4, macs.length);
    for (const [i, mac] of macs.entries()) bytes.set(mac, 4 + 6 * i);
    return bytes;
  });
  const bytes = new Uint8Array(parts[0].length + parts[1].length);
  bytes.set(parts[0]);
  bytes.set(parts[1], parts[0].length);
  return bytes;
}

export interface MacTables {
  readonly unicast: readonly Uint8Array[];
  readonly multicast: readonly Uint8Array[];
}

export function decodeMacTables(bytes: Uint8Array): MacTables | null {
  const tables: Uint8Array[][] = [];
  let at = 0;
  for (let table = 0; table < 2; table++) {
    if (bytes.length < at + 4) return null;
    const entries = getLe(bytes, at, 4);
    at += 4;
    if (entries > (bytes.length - at) / 6) return null;
    tables.push(Array.from({ length: entries }, (_, i) => bytes.slice(at + 6 * i, at + 6 * i + 6)));
    at += 6 * entries;
  }
  return { unicast: tables[0], multicast: tables[1] };
}

/** `struct virtio_net_ctrl_coal` (5.1.9.5.10); either 0: a notification after every packet. */
export interface Coalescing {
  readonly maxPackets: number;
  readonly maxMicroseconds: number;
}

export const COALESCING_LENGTH = 8;

export function encodeCoalescing(coalescing: Coalescing): Uint8Array {
  const bytes = new Uint8Array(COALESCING_LENGTH);
  putLe(bytes, 0, 4, coalescing.maxPackets);
  putLe(bytes, 4, 4, coalescing.maxMicroseconds);
  return bytes;
}

/** `at` is where the structure begins, all of it inside `bytes`. */
export function decodeCoalescing(bytes: Uint8Array, at = 0): Coalescing {
  return { maxPackets: getLe(bytes, at, 4), maxMicroseconds: getLe(bytes, at + 4, 4) };
}

/** Receive offloads that can be switched while the device runs, and their bits in the command, of which two are not those of the features (5.1.9.5.9). */
const OFFLOADS: readonly (readonly [feature: FeatureBit, bit: number])[] = [
  [Feature.GUEST_CSUM, 1],
  [Feature.GUEST_TSO4, 7],
  [Feature.GUEST_TSO6, 8],
  [Feature.GUEST_ECN, 9],
  [Feature.GUEST_UFO, 10],
  [Feature.GUEST_UDP_TUNNEL_GSO, 46],
  [Feature.GUEST_UDP_TUNNEL_GSO_CSUM, 47],
  [Feature.GUEST_USO4, 54],
  [Feature.GUEST_USO6, 55],
];
export const SWITCHABLE_OFFLOADS: FeatureSet = FeatureSet.of(...OFFLOADS.map(([feature]) => feature));
const OFFLOADS_LENGTH = 8;

/** The `offloads` that are those among `active`; byte by byte, because a number does not hold 64 bits. */
export function encodeOffloads(active: FeatureSet): Uint8Array {
  const bytes = new Uint8Array(OFFLOADS_LENGTH);
  for (const [feature, bit] of OFFLOADS) if (active.has(feature)) bytes[bit >>> 3] |= 1 << (bit & 7);
  return bytes;
}

/** Null when they are too short, or have a bit that is none. */
export function decodeOffloads(bytes: Uint8Array): FeatureSet | null {
  if (bytes.length < OFFLOADS_LENGTH) return null;
  const on = OFFLOADS.filter(([, bit]) => (bytes[bit >>> 3] & (1 << (bit & 7))) !== 0);
  const active = FeatureSet.of(...on.map(([feature]) => feature));
  return encodeOffloads(active).every((byte, i) => byte === bytes[i]) ? active : null;
}

/** The `width` low bytes of `value`, an exact integer, at `at`. */
export function putLe(bytes: Uint8Array, at: number, width: number, value: number): void {
  let left = value;
  for (let i = 0; i < width; i++) {
    bytes[at + i] = left % 256;
    left = Math.floor(left / 256);
  }
}

/** The `width` bytes at `at`; exact up to 2^53. */
export function getLe(bytes: Uint8Array, at: number, width: number): number {
  let value = 0;
  for (let i = width - 1; i >= 0; i--) value = value * 256 + bytes[at + i];
  return value;
}
