/**
 * The network device's configuration (Virtio 1.4, 5.1.4): read with the width of each field, the MAC byte by byte, and
 * only fields whose feature is negotiated (or, for a report, offered).
 */
import { VirtioError } from '../errors.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import type { VirtioTransport } from '../virtio/transport.ts';

/** `struct virtio_net_config` (5.1.4). */
export const NetConfigField = {
  mac: 0,
  status: 6,
  maxVirtqueuePairs: 8,
  mtu: 10,
  speed: 12,
  duplex: 16,
  rssMaxKeySize: 17,
  rssMaxIndirectionTableLength: 18,
  supportedHashTypes: 20,
  supportedTunnelTypes: 24,
} as const;

/** Bytes of all of it. */
export const NET_CONFIG_LENGTH = 28;
export const MAC_LENGTH = 6;

/** Bits of `status` (5.1.4). */
export const NetStatus = { LINK_UP: 1, ANNOUNCE: 2 } as const;

/** `duplex` (5.1.4); anything else is unknown. */
const Duplex = { HALF: 0, FULL: 1 } as const;
const MAX_SPEED = 0x7fffffff;

/** What the standard allows (5.1.4.1). */
const MAX_QUEUE_PAIRS = 0x8000;
const MIN_MTU = 68;

/** An absent field: its feature is not there. */
export interface NetConfig {
  /** Six bytes. */
  readonly mac?: Uint8Array;
  /** Without STATUS the link counts as up. */
  readonly linkUp: boolean;
  readonly announce: boolean;
  /** 1 without MQ and RSS. */
  readonly maxQueuePairs: number;
  /** Largest IP packet, bytes. */
  readonly mtu?: number;
  /** Mbit/s; null when the device does not know. */
  readonly speed?: number | null;
  readonly duplex?: 'half' | 'full' | null;
  readonly rssMaxKeySize?: number;
  readonly rssMaxIndirectionTableLength?: number;
  readonly supportedHashTypes?: number;
  readonly supportedTunnelTypes?: number;
}

/**
 * Reads the configuration that `features` tell of, all of it from one generation. Throws `VirtioError` NET_CONFIG for a value
 * that the standard forbids, CONFIG_BOUNDS when a field is not there, CONFIG_UNSTABLE.
 */
export function readNetConfig(transport: VirtioTransport, features: FeatureSet): NetConfig {
  const multiqueue = features.hasAny(Feature.MQ, Feature.RSS);
  const hash = features.hasAny(Feature.RSS, Feature.HASH_REPORT);
  const config = transport.readConfig((reader): NetConfig => {
    const status = features.has(Feature.STATUS) ? reader.read16(NetConfigField.status) : NetStatus.LINK_UP;
    const duplex = features.has(Feature.SPEED_DUPLEX) ? reader.read8(NetConfigField.duplex) : 0;
    const speed = features.has(Feature.SPEED_DUPLEX) ? reader.read32(NetConfigField.speed) : 0;
    return {
      ...(features.has(Feature.MAC) && {
        mac: Uint8Array.from({ length: MAC_LENGTH }, (_, i) => reader.read8(NetConfigField.mac + i)),
      }),
      linkUp: (status & NetStatus.LINK_UP) !== 0,
      announce: (status & NetStatus.ANNOUNCE) !== 0 && features.has(Feature.GUEST_ANNOUNCE),
      maxQueuePairs: multiqueue ? reader.read16(NetConfigField.maxVirtqueuePairs) : 1,
      ...(features.has(Feature.MTU) && { mtu: reader.read16(NetConfigField.mtu) }),
      ...(features.has(Feature.SPEED_DUPLEX) && {
        speed: speed <= MAX_SPEED ? speed : null,
        duplex: duplex === Duplex.FULL ? 'full' : duplex === Duplex.HALF ? 'half' : null,
      }),
      ...(hash && {
        rssMaxKeySize: reader.read8(NetConfigField.rssMaxKeySize),
        supportedHashTypes: reader.read32(NetConfigField.supportedHashTypes),
      }),
      ...(features.has(Feature.RSS) && {
        rssMaxIndirectionTableLength: reader.read16(NetConfigField.rssMaxIndirectionTableLength),
      }),
      ...(features.has(Feature.HASH_TUNNEL) && {
        supportedTunnelTypes: reader.read32(NetConfigField.supportedTunnelTypes),
      }),
    };
  });
  if (config.maxQueuePairs < 1 || config.maxQueuePairs > MAX_QUEUE_PAIRS) {
    throw new VirtioError('NET_CONFIG', `${transport.address}: max_virtqueue_pairs is ${config.maxQueuePairs}`);
  }
  if (config.mtu !== undefined && config.mtu < MIN_MTU) {
    throw new VirtioError('NET_CONFIG', `${transport.address}: mtu is ${config.mtu}, less than ${MIN_MTU}`);
  }
  return config;
}
