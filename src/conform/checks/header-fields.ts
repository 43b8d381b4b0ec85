/** What checks of sent and of received packets share. */
import { Ethernet, Ipv4 } from '../../packet/fields.ts';
import { GsoType } from '../../virtio-net/header.ts';
import type { Bench } from '../bench.ts';
import { need } from '../check.ts';
import type { Driver } from '../driver.ts';
import type { Network } from '../network.ts';

/** Where the UDP header of a test packet is. */
export const UDP = Ethernet.length + Ipv4.minLength;
/** Fields of the longest header, whether they were negotiated or not (5.1.9). */
export const Raw = { outerTh: 20, innerNh: 22, outerNh: 24 } as const;
export const TUNNEL_BITS = GsoType.UDP_TUNNEL_IPV4 | GsoType.UDP_TUNNEL_IPV6;

/** The layout has the fields of OUT_NET_HEADER and UDP tunnels, though the features are not negotiated. */
export async function unusedFields(bench: Bench): Promise<{ driver: Driver; network: Network }> {
  const up = await bench.network({ ipsec: true });
  need(up.driver.layout.length >= Raw.outerNh + 2, 'the header has no such field');
  return up;
}
