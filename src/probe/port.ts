/**
 * The bring-up report of a vhost-user port: what the back-end offers, what of that the protocol lets a driver use, and what the driver would
 * get. The session is opened and closed; no ring is started and no feature set.
 */
import { VipsecError } from '../errors.ts';
import { formatMac } from '../packet/addresses.ts';
import { Feature, type FeatureSet, featureName } from '../virtio/features.ts';
import type { VhostUserDevice } from '../virtio/vhost-user.ts';
import {
  MAX_TABLE_REGIONS,
  ProtocolFeature,
  protocolFeatureName,
  VhostFeature,
} from '../virtio/vhost-user-protocol.ts';
import { readNetConfig } from '../virtio-net/config.ts';
import type { ProbeReport } from './probe.ts';

/** Bits that vhost-user carries. */
const VHOST_BITS = 64;

export interface PortReport {
  /** Queue pairs that the back-end has. */
  readonly queuePairs: number;
  /** Regions of memory that it takes, as slots or in one table. */
  readonly memoryRegions: number;
  readonly memorySlots: boolean;
  /** Those that have a name or are offered. */
  readonly protocolFeatures: readonly { bit: number; name: string; offered: boolean; used: boolean }[];
  /** Offered features that do not reach the driver, because they would need messages that there are not, or that we do not have. */
  readonly withheld: readonly string[];
  /** Features of the driver's device that are not the back-end's but ours. */
  readonly added: readonly string[];
}

/** Reads from `port`, which stays open. Only the loss of the port throws. */
export async function probePort(port: VhostUserDevice): Promise<ProbeReport> {
  const { features, protocolFeatures, protocol, queuePairs, memorySlots } = port.backEnd;
  const given = port.readDeviceFeatures();
  const report: ProbeReport = {
    device: port.address,
    problems: [],
    features: bitsOf(features, nameOf),
    port: {
      queuePairs,
      memoryRegions: memorySlots > 0 ? memorySlots : MAX_TABLE_REGIONS,
      memorySlots: memorySlots > 0,
      protocolFeatures: bitsOf(protocolFeatures, protocolFeatureName).map((one) => ({
        ...one,
        used: protocol.has(one.bit),
      })),
      withheld: features.minus(given).bits().map(nameOf),
      added: given.minus(features).names(),
    },
  };
  if (!given.has(Feature.VERSION_1)) {
    const message =
      'the back-end offers no VIRTIO_F_VERSION_1: it is a legacy device, which this driver does not drive';
    report.problems.push({ step: 'features', code: 'FEATURES_MISSING', message });
  }
  if (protocol.has(ProtocolFeature.CONFIG)) {
    try {
      const { mac, ...config } = readNetConfig(port, given);
      report.config = { ...(mac !== undefined && { mac: formatMac(mac) }), ...config };
    } catch (error) {
      if (port.gone || !(error instanceof VipsecError)) throw error;
      report.problems.push({ step: 'device configuration', code: error.code, message: error.message });
    }
  }
  return report;
}

function nameOf(bit: number): string {
  if (bit === VhostFeature.LOG_ALL) return 'VHOST_F_LOG_ALL';
  if (bit === VhostFeature.PROTOCOL_FEATURES) return 'VHOST_USER_F_PROTOCOL_FEATURES';
  return featureName(bit);
}

function bitsOf(offered: FeatureSet, name: (bit: number) => string): { bit: number; name: string; offered: boolean }[] {
  return Array.from({ length: VHOST_BITS }, (_, bit) => ({ bit, name: name(bit), offered: offered.has(bit) })).filter(
    (one) => one.offered || one.name !== `bit ${one.bit}`,
  );
}
