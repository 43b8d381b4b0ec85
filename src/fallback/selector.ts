/**
 * Does a packet fit the selector of an SA (RFC 4301, 4.4.1.1)? Outbound this finds the SA for a packet; inbound it is
 * the check that a packet came out of an SA that may carry it (RFC 4301, 5.2, step 4): the same selector, seen from
 * the packet, so `source` is the packet's source in both directions.
 *
 * Ports that a packet does not show (fragments but the first, protocols without ports, a header that is cut off)
 * match a selector without ports only (RFC 4301, 4.4.1.1, OPAQUE).
 */
import type { Prefix, Selector } from '../ipsec/sa.ts';
import { IpProtocol, Ipv4, Ipv4Fragment, Ipv6, Ports } from '../packet/fields.ts';
import { Chain, walkIpv6 } from './extension-headers.ts';
import { Verdict } from './verdict.ts';

const chain = new Uint32Array(Chain.length);

function inPrefix(u8: Uint8Array, at: number, length: number, prefix: Prefix): boolean {
  const { address, length: bits } = prefix;
  if (address.length !== length) return false;
  const whole = bits >>> 3;
  for (let i = 0; i < whole; i++) if (u8[at + i] !== address[i]) return false;
  const rest = bits & 7;
  return rest === 0 || ((u8[at + whole] ^ address[whole]) & (0xff00 >>> rest)) === 0;
}

/** Whether a selector restricts anything. */
export function isRestrictive(selector: Selector): boolean {
  const { source, destination, protocol, sourcePort, destinationPort } = selector;
  return [source, destination, protocol, sourcePort, destinationPort].some((field) => field !== undefined);
}

/**
 * Whether the IP packet at `ip`, which ends at `end`, fits. A packet that is not IP, or whose headers run over `end`,
 * fits nothing.
 */
export function selectorMatches(selector: Selector, u8: Uint8Array, ip: number, end: number): boolean {
  if (ip + Ipv4.minLength > end) return false;
  const version = u8[ip] >>> 4;
  let protocol: number;
  let transport: number;
  let portsVisible = true;
  if (version === 4) {
    protocol = u8[ip + Ipv4.protocol];
    const headerLength = (u8[ip] & 15) * 4;
    if (headerLength < Ipv4.minLength) return false;
    transport = ip + headerLength;
    const fragment = (u8[ip + Ipv4.flagsFragment] << 8) | u8[ip + Ipv4.flagsFragment + 1];
    portsVisible = (fragment & Ipv4Fragment.offsetMask) === 0;
    if (selector.source !== undefined && !inPrefix(u8, ip + Ipv4.source, 4, selector.source)) return false;
    if (selector.destination !== undefined && !inPrefix(u8, ip + Ipv4.destination, 4, selector.destination))
      return false;
  } else if (version === 6 && ip + Ipv6.length <= end) {
    if (selector.source !== undefined && !inPrefix(u8, ip + Ipv6.source, 16, selector.source)) return false;
    if (selector.destination !== undefined && !inPrefix(u8, ip + Ipv6.destination, 16, selector.destination))
      return false;
    if (walkIpv6(u8, ip, end, false, chain) !== Verdict.ok) return false;
    protocol = chain[Chain.protocol];
    transport = chain[Chain.offset];
    portsVisible = chain[Chain.fragment] !== 2;
  } else return false;
  if (selector.protocol !== undefined && selector.protocol !== protocol) return false;
  if (selector.sourcePort === undefined && selector.destinationPort === undefined) return true;
  if (!portsVisible || !hasPorts(protocol) || transport + Ports.length > end) return false;
  const source = (u8[transport + Ports.source] << 8) | u8[transport + Ports.source + 1];
  const destination = (u8[transport + Ports.destination] << 8) | u8[transport + Ports.destination + 1];
  return (
    (selector.sourcePort === undefined || selector.sourcePort === source) &&
    (selector.destinationPort === undefined || selector.destinationPort === destination)
  );
}

/** Whether a header of `protocol` begins with two ports. */
export function hasPorts(protocol: number): boolean {
  // hot:
  return (
    protocol === IpProtocol.tcp ||
    protocol === IpProtocol.udp ||
    protocol === IpProtocol.sctp ||
    protocol === IpProtocol.dccp ||
    protocol === IpProtocol.udpLite
  );
}
