/**
 * How a NIC is opened: options, their defaults, and what they mean for feature negotiation.
 */
import { InputError } from '../errors.ts';
import type { EngineName } from '../fallback/engines/engine.ts';
import type { DeviceFunction } from '../vfio/function.ts';
import { Feature, type FeatureBit, FeatureSet } from '../virtio/features.ts';
import { GENERIC_FEATURES } from '../virtio/initialize.ts';
import { WIRE_REVISIONS, type WireRevision } from '../virtio/revision.ts';
import type { RingFormat } from '../virtqueue/create.ts';
import { type NicOffloads, offloadFeatures } from './offloads.ts';

/**
 * Where SAs may run. `auto`: in the device if it can, else in software. `inline`: the device must be able to, and `addSa` refuses what it
 * cannot express. `software`: the device is not asked. `off`: no IPsec.
 */
export type IpsecMode = 'auto' | 'inline' | 'software' | 'off';

export interface NicOptions {
  /** Receive and transmit queue pairs, 1 (default) to what the device has. */
  readonly queuePairs?: number;
  /** How many of them, the last ones, are for worker threads: `nic.workerQueues`. Default 0. */
  readonly workerQueues?: number;
  /** Descriptors of each ring, a power of two; at most what the device takes. Default 256. */
  readonly queueSize?: number;
  /** Format of the rings: `auto` (default) is packed when the device offers it; `packed` requires it. */
  readonly ring?: 'auto' | RingFormat;
  /** Packets in all pools; each queue pair has its share of them. Default: four times the descriptors of all rings. */
  readonly packets?: number;
  /** Bytes per packet slot, a multiple of 64; headroom included. Default: what the MTU needs, at least 2048. */
  readonly packetStride?: number;
  /**
   * A part of a memfd of the application in which the packets lie, as many as fit, so that what arrives is there without a copy. It must be
   * as `Nic.registerMemory` wants it, and is wiped when the NIC is closed. Not with `packets`, nor with `workerQueues`.
   */
  readonly packetMemory?: { readonly fd: number; readonly offset: number; readonly size: number };
  /** Default `auto`. */
  readonly ipsec?: IpsecMode;
  /** What does the arithmetic of software SAs. Default `auto`. */
  readonly engine?: 'auto' | EngineName;
  /**
   * Revision of headers and SA objects; `auto` asks the device, which takes one more reset (`nic/wire.ts`). Default `virtio-1.4`.
   */
  readonly wire?: WireRevision | 'auto';
  /** Number of the tunnel type IPv4 in SA objects; the standard names none. Default 1. */
  readonly tunnelTypeBase?: 0 | 1;
  /** Bytes of the longest IP packet on the link, when the device does not say. Default 1500. */
  readonly mtu?: number;
  /** Address of the NIC, six bytes, when the device does not say, as a vhost-user port. Default: random, locally administered. */
  readonly mac?: Uint8Array;
  /** Segmentation, receive steering and filters. Default: what costs nothing and changes nothing. */
  readonly offloads?: NicOffloads;
  /** Features that are not taken though the device offers them (`Feature.IN_ORDER`): to get around a device, or to compare. Default none. */
  readonly decline?: readonly FeatureBit[];
  /** Whether the device may interrupt: when somebody waits for packets, and when its configuration changes. Default true. */
  readonly interrupts?: boolean;
  /** Most SAs of each direction. Default 65536. */
  readonly maxSas?: number;
  /** File that remembers used nonces beyond the life of the process (`ipsec/nonce-guard.ts`). */
  readonly nonceFile?: string;
  /** Milliseconds for a reset, and for an administration command. Default 5000 each. */
  readonly resetTimeout?: number;
  readonly commandTimeout?: number;
  /**
   * Milliseconds for a vhost-user port to accept or make the connection, and for an octeon_ep class function to be ready. Default 5000, or
   * 30000 with `,server=1`.
   */
  readonly connectTimeout?: number;
}

/** What has no default, or one that depends on the device. */
type Optional = 'packets' | 'packetStride' | 'packetMemory' | 'nonceFile' | 'mac' | 'connectTimeout';

export type ResolvedOptions = Required<Omit<NicOptions, Optional>> & Pick<NicOptions, Optional>;

const MAX_QUEUE_SIZE = 32768;
const RING_FORMATS: readonly string[] = ['auto', 'split', 'packed'] satisfies NicOptions['ring'][];
const MAX_SAS = 1 << 20;
const MTU = { min: 68, max: 65535 } as const;

/** Fills in defaults. Throws InputError `NIC_OPTION`. */
export function resolveOptions(options: NicOptions): ResolvedOptions {
  const resolved: ResolvedOptions = {
    queuePairs: 1,
    workerQueues: 0,
    queueSize: 256,
    ring: 'auto',
    ipsec: 'auto',
    engine: 'auto',
    wire: 'virtio-1.4',
    tunnelTypeBase: 1,
    mtu: 1500,
    offloads: {},
    decline: [],
    interrupts: true,
    maxSas: 65536,
    resetTimeout: 5000,
    commandTimeout: 5000,
    ...options,
  };
  integer('queuePairs', resolved.queuePairs, 1, 0x8000);
  integer('workerQueues', resolved.workerQueues, 0, resolved.queuePairs);
  integer('queueSize', resolved.queueSize, 2, MAX_QUEUE_SIZE);
  if ((resolved.queueSize & (resolved.queueSize - 1)) !== 0) throw invalid('queueSize', 'a power of two');
  if (!RING_FORMATS.includes(resolved.ring)) throw invalid('ring', RING_FORMATS.join(', '));
  integer('mtu', resolved.mtu, MTU.min, MTU.max);
  if (resolved.wire !== 'auto' && !WIRE_REVISIONS.includes(resolved.wire)) {
    throw invalid('wire', `auto, ${WIRE_REVISIONS.join(' or ')}`);
  }
  integer('maxSas', resolved.maxSas, 1, MAX_SAS);
  if (resolved.packets !== undefined) integer('packets', resolved.packets, 2 * resolved.queueSize, 1 << 24);
  if (resolved.packetMemory !== undefined && (resolved.packets !== undefined || resolved.workerQueues > 0)) {
    throw invalid('packetMemory', 'without packets and workerQueues');
  }
  if (resolved.connectTimeout !== undefined) integer('connectTimeout', resolved.connectTimeout, 1, 0x7fffffff);
  // Bit 0 of the first byte marks a group address, which nobody can have.
  if (resolved.mac !== undefined && (resolved.mac.length !== 6 || (resolved.mac[0] & 1) !== 0)) {
    throw invalid('mac', 'the six bytes of a unicast address');
  }
  if (resolved.packetStride !== undefined) {
    integer('packetStride', resolved.packetStride, 256, 1 << 17);
    if (resolved.packetStride % 64 !== 0) throw invalid('packetStride', 'a multiple of 64');
  }
  return resolved;
}

function integer(name: string, value: number, min: number, max: number): void {
  if (!Number.isInteger(value) || value < min || value > max) throw invalid(name, `from ${min} to ${max}`);
}

function invalid(name: string, what: string): InputError {
  return new InputError('NIC_OPTION', `${name} must be ${what}`);
}

/**
 * What the way to the device requires of it: behind an IOMMU only a device that says so by ACCESS_PLATFORM can be given the addresses that
 * we have (Virtio 1.4, 6.1). One that does not say so would take them for physical ones, and write over memory of others.
 */
export function platformFeatures(fn: Pick<DeviceFunction, 'behindIommu'>): FeatureSet {
  return fn.behindIommu ? FeatureSet.of(Feature.ACCESS_PLATFORM) : FeatureSet.empty;
}

/** What is taken of any device: rings of the format that is wanted. */
export function genericFeatures(options: Pick<ResolvedOptions, 'ring'>): FeatureSet {
  return options.ring === 'split' ? GENERIC_FEATURES.without(Feature.RING_PACKED) : GENERIC_FEATURES;
}

/**
 * What a driver with these options requires of the device, and what it takes when it is offered. `device`: what the device does not work
 * without. Throws InputError `NIC_OPTION` when the options cannot be together.
 */
export function featuresFor(
  options: ResolvedOptions,
  fn: Pick<DeviceFunction, 'behindIommu'>,
  device: FeatureSet = FeatureSet.empty,
): { required: FeatureSet; wanted: FeatureSet } {
  const inline = FeatureSet.of(Feature.IPSEC, Feature.ADMIN_VQ);
  const multiqueue = options.queuePairs > 1 ? FeatureSet.of(Feature.MQ, Feature.CTRL_VQ) : FeatureSet.empty;
  const platform = platformFeatures(fn);
  let useful = genericFeatures(options)
    .with(Feature.MAC, Feature.STATUS, Feature.MTU, Feature.SPEED_DUPLEX, Feature.CSUM, Feature.GUEST_CSUM)
    .or(offloadFeatures(options.offloads, options.wire));
  const inlineWanted = options.ipsec === 'auto' || options.ipsec === 'inline';
  // Only with IPsec, which makes the header longer anyway; the draft has no place for it.
  if (inlineWanted && options.wire !== 'rfc-2025-01') useful = useful.with(Feature.OUT_NET_HEADER);
  const required = multiqueue
    .or(platform)
    .or(options.ipsec === 'inline' ? inline : FeatureSet.empty)
    .or(options.ring === 'packed' ? FeatureSet.of(Feature.RING_PACKED) : FeatureSet.empty);
  if (options.ring === 'split' && device.has(Feature.RING_PACKED)) {
    throw new InputError('NIC_OPTION', 'ring is split, and this device has packed virtqueues only');
  }
  const needed = required.or(device).with(Feature.VERSION_1);
  const contradiction = needed.and(FeatureSet.of(...options.decline));
  if (!contradiction.isEmpty) {
    throw new InputError('NIC_OPTION', `decline has ${contradiction.names().join(', ')}, without which it cannot be`);
  }
  const wanted = options.ipsec === 'auto' ? useful.or(inline) : useful;
  return { required, wanted: wanted.without(...options.decline) };
}
