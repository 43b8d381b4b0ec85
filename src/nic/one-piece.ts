/**
 * Packets over several slots on their way to or from IPsec in software, which works in place on packets in one slot: they are copied
 * together where a slot has room for all of it. Where it has not they stay as they are, and IPsec drops them with `no-room`.
 *
 * Slots are made for what the link carries, unless the application has chosen others (`packetStride`); so what is left out is what is larger
 * than the link, which is cut before if it can be (`segments.ts`), and what comes over it in buffers that were chosen too small.
 */
import { gatherChain } from '../packet/chains.ts';
import { Ethernet, EtherType, IpProtocol, Ipv4, Ipv6 } from '../packet/fields.ts';
import { NO_PACKET, type PacketPool } from '../packet/pool.ts';
import { LINK_HEADER } from './data-path.ts';

/** The first `n` of `packets` are about to be protected. */
export function gatherToProtect(pool: PacketPool, packets: Uint32Array, n: number): void {
  // hot:
  const { next } = pool;
  for (let i = 0; i < n; i++) if (next[packets[i]] !== NO_PACKET) gatherChain(pool, packets[i]);
}

/** The first `n` of `packets` have arrived, some of them with IPsec. */
export function gatherToOpen(pool: PacketPool, packets: Uint32Array, n: number): void {
  // hot:
  const { next } = pool;
  for (let i = 0; i < n; i++) {
    const p = packets[i];
    if (next[p] !== NO_PACKET && mayBeIpsec(pool, p)) gatherChain(pool, p);
  }
}

/** Whether packet `p` is ESP, AH or UDP, or its first slot does not say: it need not hold all headers. */
function mayBeIpsec({ u8, offset, length }: PacketPool, p: number): boolean {
  const at = offset[p];
  const ip = at + LINK_HEADER;
  if (length[p] < LINK_HEADER + Ipv6.length) return true;
  const type = (u8[at + Ethernet.type] << 8) | u8[at + Ethernet.type + 1];
  if (type === EtherType.ipv4) return isCarrier(u8[ip + Ipv4.protocol]);
  if (type !== EtherType.ipv6) return false;
  const next = u8[ip + Ipv6.nextHeader];
  return next !== IpProtocol.tcp && next !== IpProtocol.icmpv6;
}

function isCarrier(protocol: number): boolean {
  return protocol === IpProtocol.esp || protocol === IpProtocol.ah || protocol === IpProtocol.udp;
}
