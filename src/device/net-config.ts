/**
 * The device-specific configuration of a network device (Virtio 1.4, 5.1.4): all of it read-only for the driver.
 *
 * Left out: the hash and RSS fields, which read as zeros.
 */
import { Feature, type FeatureSet } from '../virtio/features.ts';

/** `struct virtio_net_config`. */
export const NetConfigField = {
  mac: 0,
  status: 6,
  maxVirtqueuePairs: 8,
  mtu: 10,
  speed: 12,
  duplex: 16,
} as const;
export const NET_CONFIG_SIZE = 28;

/** `status`. */
export const NetStatus = { LINK_UP: 1, ANNOUNCE: 2 } as const;
const FULL_DUPLEX = 1;

export interface NetConfigOptions {
  /** 6 bytes. */
  readonly mac: Uint8Array;
  readonly queuePairs: number;
  readonly mtu: number;
  /** Mbit/s. */
  readonly speed: number;
}

export class NetConfig {
  readonly #bytes = new Uint8Array(NET_CONFIG_SIZE);

  /** Fields of features that are not offered do not exist: they stay zero. */
  constructor(options: NetConfigOptions, offered: FeatureSet) {
    if (offered.has(Feature.MAC)) this.#bytes.set(options.mac, NetConfigField.mac);
    if (offered.has(Feature.MQ)) this.#put(NetConfigField.maxVirtqueuePairs, 2, options.queuePairs);
    if (offered.has(Feature.MTU)) this.#put(NetConfigField.mtu, 2, options.mtu);
    if (offered.has(Feature.SPEED_DUPLEX)) {
      this.#put(NetConfigField.speed, 4, options.speed);
      this.#put(NetConfigField.duplex, 1, FULL_DUPLEX);
    }
  }

  get linkUp(): boolean {
    return (this.#bytes[NetConfigField.status] & NetStatus.LINK_UP) !== 0;
  }

  set linkUp(up: boolean) {
    this.#bytes[NetConfigField.status] = up ? NetStatus.LINK_UP : 0;
  }

  /** `width` is 1, 2 or 4; what is beyond the structure reads as zero. */
  read(offset: number, width: number): number {
    let value = 0;
    for (let i = width - 1; i >= 0; i--) value = value * 256 + (this.#bytes[offset + i] ?? 0);
    return value;
  }

  #put(at: number, width: number, value: number): void {
    for (let i = 0; i < width; i++) this.#bytes[at + i] = value >>> (8 * i);
  }
}
