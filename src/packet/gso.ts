/**
 * How a packet stands for several (`gso_type` of Virtio 1.4, 5.1.9), and sets of such types.
 */

/** `gso_type`: one of the first five, with a tunnel bit when that packet is inside a UDP tunnel, and ECN for TCP. */
export const GsoType = {
  NONE: 0,
  TCPV4: 1,
  UDP: 3,
  TCPV6: 4,
  UDP_L4: 5,
  UDP_TUNNEL_IPV4: 0x20,
  UDP_TUNNEL_IPV6: 0x40,
  ECN: 0x80,
} as const;

/** The bits of `gso_type` that say that there is a UDP tunnel. */
export const GSO_TUNNEL: number = GsoType.UDP_TUNNEL_IPV4 | GsoType.UDP_TUNNEL_IPV6;

/** A set of types: bit t for type t, and these. */
export const GsoSet = {
  /** Types inside a UDP tunnel. */
  tunnel: 1 << 6,
  ecn: 1 << 7,
  /** The checksum of the outer UDP header may be left open too. */
  outerChecksum: 1 << 8,
} as const;

/** hot: the type without the bits that go with it. */
export function baseType(gsoType: number): number {
  return gsoType & ~(GsoType.ECN | GSO_TUNNEL);
}

/** hot: whether `gsoType`, not NONE, is among `types`. */
export function isAmong(gsoType: number, types: number): boolean {
  const base = baseType(gsoType);
  if (base > GsoType.UDP_L4 || ((types >>> base) & 1) === 0) return false;
  const tunnel = gsoType & GSO_TUNNEL;
  // Never both (5.1.9.2.2), and never with the deprecated UFO.
  if (tunnel !== 0 && ((types & GsoSet.tunnel) === 0 || tunnel === GSO_TUNNEL || base === GsoType.UDP)) return false;
  // ECN belongs to TCP (5.1.9.2).
  return (gsoType & GsoType.ECN) === 0 || ((types & GsoSet.ecn) !== 0 && base !== GsoType.UDP_L4);
}
