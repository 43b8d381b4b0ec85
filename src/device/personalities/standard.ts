/**
 * The standard personality: a modern virtio-net PCI function as Virtio 1.4 describes it (4.1, 5.1).
 *
 * BAR 0 (64-bit) holds the virtio structures, a page each; BAR 2 (64-bit) the MSI-X table and pending bits. Nothing
 * is mappable: a write to the notification page is a message, which wakes the device.
 */
import { Feature, FeatureSet } from '../../virtio/features.ts';
import { CommonCfgLength, DeviceType, VirtioCfgType, VirtioPciId } from '../../virtio/pci-layout.ts';
import type { WireRevision } from '../../virtio/revision.ts';
import { NET_CONFIG_SIZE } from '../net-config.ts';
import type { PciLayout } from '../pci.ts';

const PAGE = 0x1000;

/** BAR 0. */
export const VirtioBar = {
  index: 0,
  size: 4 * PAGE,
  common: 0,
  isr: PAGE,
  device: 2 * PAGE,
  notify: 3 * PAGE,
  notifyMultiplier: 4,
} as const;

/** BAR 2. */
export const MsixBar = { index: 2, size: 2 * PAGE, table: 0, pba: PAGE } as const;

/** Vectors that fit the table's page. */
export const MAX_VECTORS = 128;
/** Queue pairs for which there are vectors and notification addresses. */
export const MAX_QUEUE_PAIRS = 62;

/** Non-transitional: revision and subsystem id as 4.1.2.1 asks. Class: Ethernet controller. */
const REVISION = 1;
const ETHERNET_CONTROLLER = 0x020000;
const SUBSYSTEM_ID = 0x0040;

export const QueueSize = { net: 1024, control: 64, admin: 128 } as const;

/** Formats of virtqueues that a function takes. */
export const DEVICE_RINGS = ['both', 'split', 'packed'] as const;
export type DeviceRings = (typeof DEVICE_RINGS)[number];

export interface PersonalityOptions {
  readonly queuePairs: number;
  readonly ipsec: boolean;
  readonly wire: WireRevision;
  readonly rings: DeviceRings;
}

/** One vector for configuration changes, one for each virtqueue. */
export function vectorCount(queuePairs: number): number {
  return 1 + 2 * queuePairs + 2;
}

export function pciLayout(options: Pick<PersonalityOptions, 'queuePairs'>): PciLayout {
  const bar = VirtioBar.index;
  return {
    vendorId: VirtioPciId.vendor,
    deviceId: VirtioPciId.modern + DeviceType.NET,
    revision: REVISION,
    classCode: ETHERNET_CONTROLLER,
    subsystemVendorId: VirtioPciId.vendor,
    subsystemId: SUBSYSTEM_ID,
    bars: [
      { size: VirtioBar.size, wide: true },
      { size: 0, wide: false },
      { size: MsixBar.size, wide: true },
      { size: 0, wide: false },
      { size: 0, wide: false },
      { size: 0, wide: false },
    ],
    structures: [
      { configType: VirtioCfgType.COMMON, bar, offset: VirtioBar.common, size: CommonCfgLength.full },
      {
        configType: VirtioCfgType.NOTIFY,
        bar,
        offset: VirtioBar.notify,
        size: PAGE,
        multiplier: VirtioBar.notifyMultiplier,
      },
      { configType: VirtioCfgType.ISR, bar, offset: VirtioBar.isr, size: 4 },
      { configType: VirtioCfgType.DEVICE, bar, offset: VirtioBar.device, size: NET_CONFIG_SIZE },
    ],
    msix: {
      vectors: vectorCount(options.queuePairs),
      bar: MsixBar.index,
      table: MsixBar.table,
      pba: MsixBar.pba,
    },
  };
}

/** What a driver must accept: a function that takes packed virtqueues only is of no use to one that has split ones. */
export function requiredFeatures(options: Pick<PersonalityOptions, 'rings'>): FeatureSet {
  return options.rings === 'packed'
    ? FeatureSet.of(Feature.VERSION_1, Feature.RING_PACKED)
    : FeatureSet.of(Feature.VERSION_1);
}

/** What the function offers. OUT_NET_HEADER and UDP tunnels have no place in the header of the draft. */
export function offeredFeatures(options: PersonalityOptions): FeatureSet {
  const F = Feature;
  let offered = FeatureSet.of(
    F.VERSION_1,
    F.ACCESS_PLATFORM,
    F.INDIRECT_DESC,
    F.EVENT_IDX,
    F.RING_RESET,
    F.IN_ORDER,
    F.ORDER_PLATFORM,
    F.NOTIFICATION_DATA,
    F.NOTIF_CONFIG_DATA,
    F.CSUM,
    F.GUEST_CSUM,
    F.MTU,
    F.MAC,
    F.STATUS,
    F.HOST_TSO4,
    F.HOST_TSO6,
    F.HOST_USO,
    F.HOST_ECN,
    F.GUEST_TSO4,
    F.GUEST_TSO6,
    F.GUEST_ECN,
    F.GUEST_USO4,
    F.GUEST_USO6,
    F.GUEST_HDRLEN,
    F.MRG_RXBUF,
    F.SPEED_DUPLEX,
  );
  if (options.rings !== 'split') offered = offered.with(F.RING_PACKED);
  offered = offered.with(
    F.CTRL_VQ,
    F.CTRL_RX,
    F.CTRL_RX_EXTRA,
    F.CTRL_VLAN,
    F.CTRL_MAC_ADDR,
    F.CTRL_GUEST_OFFLOADS,
    F.GUEST_ANNOUNCE,
    F.NOTF_COAL,
    F.VQ_NOTF_COAL,
    F.DEVICE_STATS,
    F.HASH_REPORT,
    F.RSS,
    F.RSS_CONTEXT,
  );
  if (options.wire === 'virtio-1.4') {
    offered = offered.with(
      F.HOST_UDP_TUNNEL_GSO,
      F.HOST_UDP_TUNNEL_GSO_CSUM,
      F.GUEST_UDP_TUNNEL_GSO,
      F.GUEST_UDP_TUNNEL_GSO_CSUM,
    );
  }
  if (options.queuePairs > 1) offered = offered.with(F.MQ);
  if (!options.ipsec) return offered;
  offered = offered.with(F.ADMIN_VQ, F.IPSEC);
  return options.wire === 'virtio-1.4' ? offered.with(F.OUT_NET_HEADER) : offered;
}
