/**
 * What a NIC does for packets besides IPsec, as options and as features (Virtio 1.4, 5.1.3): what costs the data path nothing is taken
 * whenever it is offered; what changes which packets come, or how, only when the application asks for it.
 */
import { Feature, FeatureSet } from '../virtio/features.ts';
import type { WireRevision } from '../virtio/revision.ts';

export interface NicOffloads {
  /**
   * Takes packets over several buffers (MRG_RXBUF), as chains of slots, so that slots need not hold the longest packet. Default: as
   * `largeReceive`.
   */
  readonly mergeBuffers?: boolean;
  /** Takes packets that stand for several segments (GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6): `PacketFlag.segmented`. Default false. */
  readonly largeReceive?: boolean;
  /**
   * Has the device segment packets inside UDP tunnels (HOST_UDP_TUNNEL_GSO and _CSUM), and with `largeReceive` takes such
   * (GUEST_UDP_TUNNEL_GSO and _CSUM). Makes headers longer, 24 bytes instead of 12, where IPsec has not already. Default false.
   */
  readonly udpTunnels?: boolean;
  /** Has the device hash what it receives (HASH_REPORT): `packets.hash`, once `control.setRss` or `setHash` has chosen what. Default false. */
  readonly hashReport?: boolean;
  /** Distributes packets by their hash once `control.setRss` was called (RSS). Default false. */
  readonly rss?: boolean;
  /** Receives only what is for the NIC, by MAC address (CTRL_RX): `control.setReceiveMode`, `setMacTable`. Default false: everything. */
  readonly macFilter?: boolean;
  /** Receives only frames of the VLANs of `control.addVlan`, and untagged ones (CTRL_VLAN). Default false: everything. */
  readonly vlanFilter?: boolean;
}

const F = Feature;
/** Nothing changes until they are used. */
const ALWAYS = FeatureSet.of(
  F.HOST_TSO4,
  F.HOST_TSO6,
  F.HOST_USO,
  F.HOST_ECN,
  F.GUEST_HDRLEN,
  F.CTRL_VQ,
  F.CTRL_MAC_ADDR,
  F.CTRL_GUEST_OFFLOADS,
  F.GUEST_ANNOUNCE,
  F.NOTF_COAL,
  F.VQ_NOTF_COAL,
  F.DEVICE_STATS,
);

/** What to take of the device when it is offered. The header of the draft has no place for UDP tunnels. */
export function offloadFeatures(offloads: NicOffloads, wire: WireRevision | 'auto'): FeatureSet {
  const { largeReceive = false, mergeBuffers = largeReceive } = offloads;
  let wanted = ALWAYS;
  if (mergeBuffers) wanted = wanted.with(F.MRG_RXBUF);
  if (largeReceive) wanted = wanted.with(F.GUEST_TSO4, F.GUEST_TSO6, F.GUEST_USO4, F.GUEST_USO6, F.GUEST_ECN);
  if (offloads.udpTunnels === true && wire !== 'rfc-2025-01') {
    wanted = wanted.with(F.HOST_UDP_TUNNEL_GSO, F.HOST_UDP_TUNNEL_GSO_CSUM);
    if (largeReceive) wanted = wanted.with(F.GUEST_UDP_TUNNEL_GSO, F.GUEST_UDP_TUNNEL_GSO_CSUM);
  }
  if (offloads.hashReport === true) wanted = wanted.with(F.HASH_REPORT);
  if (offloads.rss === true) wanted = wanted.with(F.RSS, F.RSS_CONTEXT);
  if (offloads.macFilter === true) wanted = wanted.with(F.CTRL_RX, F.CTRL_RX_EXTRA);
  if (offloads.vlanFilter === true) wanted = wanted.with(F.CTRL_VLAN);
  return wanted;
}
