/**
 * The octep personality: a function as Marvell's octeon_ep class hardware shows it, with the quirks of its firmware.
 *
 * Virtual function of a CN106K: BAR 0 has a few registers, BAR 4 is the window (`octep-window.ts`), and configuration space knows nothing
 * of virtio. With IPsec it is what the firmware of Virtio 1.4 would be: the published one has 64 features and no administration queue, which is what
 * `--no-ipsec` gives. Sources are named in `octep-layout.ts`. The MSI-X table's BAR is not documented; it is BAR 2 here.
 */
import { Feature, type FeatureSet } from '../../virtio/features.ts';
import { OCTEP_REQUIRED, OctepBar, OctepId } from '../../virtio/octep-layout.ts';
import type { PciLayout } from '../pci.ts';
import type { OctepFault } from './octep-faults.ts';
import { MsixBar, type PersonalityOptions } from './standard.ts';

const PAGE = 0x1000;
/** The registers of one ring: more of them follow on hardware, and none here. */
const REGISTERS_SIZE = 0x20000;
/** Network controller, other. */
const NETWORK_CONTROLLER = 0x028000;
const MODEL = OctepId.models[0];

/** The firmware takes rings of up to this, and shows it for every queue. */
export const OCTEP_QUEUE_SIZE = 4096;
/** A queue with this index, or a higher one, is never acknowledged. */
export const OCTEP_MAX_QUEUES = 129;
export const OCTEP_INTERRUPTS = 8;

/** Receive and transmit queues in turn, the control queue, and the administration queue. */
export function octepQueueCount({ queuePairs, ipsec }: Pick<PersonalityOptions, 'queuePairs' | 'ipsec'>): number {
  return 2 * queuePairs + 1 + (ipsec ? 1 : 0);
}

/** A page for the structures, and one for the notifications of each queue. */
export function octepWindowSize(options: Pick<PersonalityOptions, 'queuePairs' | 'ipsec'>): number {
  let size = PAGE;
  while (size < PAGE * (1 + octepQueueCount(options))) size *= 2;
  return size;
}

export function octepLayout(
  options: Pick<PersonalityOptions, 'queuePairs' | 'ipsec'>,
  faults: ReadonlySet<OctepFault>,
): PciLayout {
  const bars = Array.from({ length: 6 }, () => ({ size: 0, wide: false }));
  bars[OctepBar.registers] = { size: REGISTERS_SIZE, wide: true };
  bars[MsixBar.index] = { size: MsixBar.size, wide: true };
  if (!faults.has('octep-no-window')) bars[OctepBar.window] = { size: octepWindowSize(options), wide: true };
  const deviceId = faults.has('octep-physical') ? MODEL.physical : MODEL.virtual;
  return {
    vendorId: OctepId.vendor,
    deviceId,
    revision: 0,
    classCode: NETWORK_CONTROLLER,
    subsystemVendorId: OctepId.vendor,
    subsystemId: deviceId,
    bars,
    structures: [],
    msix: { vectors: OCTEP_INTERRUPTS, bar: MsixBar.index, table: MsixBar.table, pba: MsixBar.pba },
  };
}

/**
 * What the firmware offers: neither event indices, indirect descriptors nor queue resets. Bit 27, which it offers for drivers of before
 * virtio 1.0, is left out.
 */
export function octepFeatures(options: PersonalityOptions, faults: ReadonlySet<OctepFault>): FeatureSet {
  const F = Feature;
  let offered = OCTEP_REQUIRED.with(
    F.IN_ORDER,
    F.ORDER_PLATFORM,
    F.ACCESS_PLATFORM,
    F.CTRL_VQ,
    F.MQ,
    F.CTRL_RX,
    F.CTRL_VLAN,
    F.CTRL_MAC_ADDR,
    F.STATUS,
    F.MAC,
    F.MTU,
    F.MRG_RXBUF,
    F.SPEED_DUPLEX,
    F.CSUM,
    F.GUEST_CSUM,
    F.HOST_TSO4,
    F.HOST_TSO6,
    F.GUEST_HDRLEN,
    F.RSS,
    F.HASH_REPORT,
  );
  if (options.ipsec) {
    offered = offered.with(F.ADMIN_VQ, F.IPSEC);
    if (options.wire === 'virtio-1.4') offered = offered.with(F.OUT_NET_HEADER);
  }
  if (faults.has('octep-legacy')) offered = offered.without(F.VERSION_1);
  if (faults.has('octep-split-only')) offered = offered.without(F.RING_PACKED);
  if (faults.has('octep-plain-kicks')) offered = offered.without(F.NOTIFICATION_DATA);
  return offered;
}
