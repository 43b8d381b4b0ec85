/**
 * Frames that are not finished: with a checksum to fill, or standing for several segments. Between two functions of one device they can stay so
 * when the driver that receives them has said that it takes them (GUEST_CSUM, GUEST_TSO4 …; Virtio 1.4, 5.1.9.4); for anybody else the
 * device finishes them.
 */
import { baseType, GsoSet, GsoType, isAmong } from '../packet/gso.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { receivedGsoTypes } from '../virtio-net/header.ts';

/** What a receiver takes: a set of `GsoType`, as `GsoSet` has it, and these. */
export const Unfinished = {
  nothing: 0,
  /** A checksum to fill, in a packet that is one segment: the bit of type NONE. */
  checksum: 1 << GsoType.NONE,
  /** UDP_L4 over one version of IP. */
  usoIpv4: 1 << 9,
  usoIpv6: 1 << 10,
} as const;

/** What a driver takes with these features, of which those that it has switched off are left out. */
export function unfinishedFor(features: FeatureSet): number {
  if (!features.has(Feature.GUEST_CSUM)) return Unfinished.nothing;
  return (
    Unfinished.checksum |
    receivedGsoTypes(features) |
    (features.has(Feature.GUEST_USO4) ? Unfinished.usoIpv4 : 0) |
    (features.has(Feature.GUEST_USO6) ? Unfinished.usoIpv6 : 0)
  );
}

/** hot: whether who takes `taken` takes a packet of this type, not NONE; `outerChecksum`: one with two checksums to fill. */
export function takesLarge(taken: number, gsoType: number, isIpv6: boolean, outerChecksum: boolean): boolean {
  if (!isAmong(gsoType, taken) || (outerChecksum && (taken & GsoSet.outerChecksum) === 0)) return false;
  return baseType(gsoType) !== GsoType.UDP_L4 || (taken & (isIpv6 ? Unfinished.usoIpv6 : Unfinished.usoIpv4)) !== 0;
}
