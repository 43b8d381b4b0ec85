/**
 * The device-specific configuration of a network device (Virtio 1.4, 5.1.4): all of it read-only for the driver.
 */
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { NET_CONFIG_LENGTH, NetConfigField, NetStatus } from '../virtio-net/config.ts';
import { SUPPORTED_HASH_TYPES, TOEPLITZ_KEY_LENGTH } from '../virtio-net/toeplitz.ts';

export const NET_CONFIG_SIZE = NET_CONFIG_LENGTH;
const FULL_DUPLEX = 1;
/** Entries of the indirection table: the fewest that a device must allow (5.1.4.1). */
export const RSS_TABLE_LENGTH = 128;

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
    if (offered.hasAny(Feature.MQ, Feature.RSS)) this.#put(NetConfigField.maxVirtqueuePairs, 2, options.queuePairs);
    if (offered.has(Feature.MTU)) this.#put(NetConfigField.mtu, 2, options.mtu);
    if (offered.has(Feature.SPEED_DUPLEX)) {
      this.#put(NetConfigField.speed, 4, options.speed);
      this.#put(NetConfigField.duplex, 1, FULL_DUPLEX);
    }
    if (offered.hasAny(Feature.RSS, Feature.HASH_REPORT)) {
      this.#put(NetConfigField.rssMaxKeySize, 1, TOEPLITZ_KEY_LENGTH);
      this.#put(NetConfigField.supportedHashTypes, 4, SUPPORTED_HASH_TYPES);
    }
    if (offered.has(Feature.RSS)) this.#put(NetConfigField.rssMaxIndirectionTableLength, 2, RSS_TABLE_LENGTH);
  }

  get linkUp(): boolean {
    return (this.#bytes[NetConfigField.status] & NetStatus.LINK_UP) !== 0;
  }

  set linkUp(up: boolean) {
    this.#setStatus(NetStatus.LINK_UP, up);
  }

  /** Asks the driver to announce its addresses (5.1.9.5.4). */
  set announce(asked: boolean) {
    this.#setStatus(NetStatus.ANNOUNCE, asked);
  }

  get mac(): Uint8Array {
    return this.#bytes.slice(NetConfigField.mac, NetConfigField.status);
  }

  set mac(mac: Uint8Array) {
    this.#bytes.set(mac, NetConfigField.mac);
  }

  #setStatus(bit: number, on: boolean): void {
    const status = this.#bytes[NetConfigField.status];
    this.#bytes[NetConfigField.status] = on ? status | bit : status & ~bit;
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
