/** What the device asks about a frame in its own memory. */
import { Ethernet, EtherType } from '../packet/fields.ts';

/** hot: the EtherType of the frame at `at`, which has at least 14 bytes. */
export function etherTypeOf(u8: Uint8Array, at: number): number {
  return (u8[at + Ethernet.type] << 8) | u8[at + Ethernet.type + 1];
}

/** hot: whether IPsec has anything to do with it. */
export function isIpFrame(u8: Uint8Array, at: number): boolean {
  const type = etherTypeOf(u8, at);
  return type === EtherType.ipv4 || type === EtherType.ipv6;
}
