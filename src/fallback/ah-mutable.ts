/**
 * The fields in front of AH that change on the way (RFC 4302, 3.3.3.1 and appendix A): zeroed for the computation, or
 * set to what they will be at the destination.
 *
 * | field                                             | for the ICV                          |
 * |---------------------------------------------------|--------------------------------------|
 * | IPv4 TOS, flags and fragment offset, TTL, checksum| 0                                    |
 * | IPv4 options but those listed as immutable        | 0, type and length too               |
 * | IPv4 destination with a source route (sent)       | the last address of the route        |
 * | IPv6 traffic class, flow label, hop limit         | 0                                    |
 * | IPv6 option whose type has the change-en-route bit| data 0                               |
 * | IPv6 routing header type 0 or 2 (sent)            | as at the destination                |
 *
 * Left out: other routing headers with segments left (their final form is theirs to define): refused.
 */
import { IpProtocol, Ipv4, Ipv6, Ipv6Extension } from '../packet/fields.ts';

/** IPv4 option types (RFC 791; IANA "Internet Protocol Version 4 Parameters"). */
const Ipv4Option = { end: 0, noOperation: 1, looseRoute: 131, strictRoute: 137 } as const;

/** Options that nobody changes (RFC 4302, A.1): security, extended security, commercial security, router alert, SDB multicast. */
const IMMUTABLE_OPTIONS: ReadonlySet<number> = new Set([130, 133, 134, 148, 149]);

/** IPv6 options (RFC 8200, 4.2). */
const Ipv6Option = { pad1: 0, mayChange: 0x20 } as const;

/** Routing header (RFC 8200, 4.4; RFC 5095; RFC 6275, 6.4). */
const Routing = { type: 2, segmentsLeft: 3, addresses: 8 } as const;

const swap = new Uint8Array(16);

/**
 * Zeroes the mutable fields of the IP header at `ip`, all of it up to `end`, where AH begins. `sending` also looks ahead to
 * the destination. False if options or extension headers are malformed or cannot be predicted.
 */
export function zeroMutable(u8: Uint8Array, ip: number, end: number, sending: boolean): boolean {
  return u8[ip] >>> 4 === 4 ? zeroIpv4(u8, ip, end, sending) : zeroIpv6(u8, ip, end, sending);
}

function zeroIpv4(u8: Uint8Array, ip: number, end: number, sending: boolean): boolean {
  u8[ip + Ipv4.tos] = 0;
  u8[ip + Ipv4.flagsFragment] = 0;
  u8[ip + Ipv4.flagsFragment + 1] = 0;
  u8[ip + Ipv4.ttl] = 0;
  u8[ip + Ipv4.checksum] = 0;
  u8[ip + Ipv4.checksum + 1] = 0;
  let at = ip + Ipv4.minLength;
  while (at < end) {
    const type = u8[at];
    if (type === Ipv4Option.end) break;
    if (type === Ipv4Option.noOperation) {
      at++;
      continue;
    }
    if (at + 2 > end) return false;
    const length = u8[at + 1];
    if (length < 2 || at + length > end) return false;
    if (type === Ipv4Option.looseRoute || type === Ipv4Option.strictRoute) {
      // Type, length, pointer, addresses; the pointer counts from 1 and stands behind the last when the route is used up.
      if (length < 3) return false;
      if (sending && length >= 7 && u8[at + 2] <= length) {
        for (let i = 0; i < 4; i++) u8[ip + Ipv4.destination + i] = u8[at + length - 4 + i];
      }
    }
    if (!IMMUTABLE_OPTIONS.has(type)) u8.fill(0, at, at + length);
    at += length;
  }
  return true;
}

function zeroIpv6(u8: Uint8Array, ip: number, end: number, sending: boolean): boolean {
  u8[ip] = 0x60;
  u8[ip + 1] = 0;
  u8[ip + 2] = 0;
  u8[ip + 3] = 0;
  u8[ip + Ipv6.hopLimit] = 0;
  let protocol = u8[ip + Ipv6.nextHeader];
  let at = ip + Ipv6.length;
  while (at < end) {
    // The walk to AH has checked that whole headers lead to `end`.
    const next = u8[at];
    const length = (protocol === IpProtocol.fragment ? 1 : u8[at + Ipv6Extension.lengthUnits] + 1) * Ipv6Extension.unit;
    if (protocol === IpProtocol.hopByHop || protocol === IpProtocol.destinationOptions) {
      if (!zeroOptions(u8, at + 2, at + length)) return false;
    } else if (protocol === IpProtocol.routing && sending) {
      if (!rearrange(u8, ip, at, length)) return false;
    }
    protocol = next;
    at += length;
  }
  return true;
}

function zeroOptions(u8: Uint8Array, from: number, end: number): boolean {
  let at = from;
  while (at < end) {
    const type = u8[at];
    if (type === Ipv6Option.pad1) {
      at++;
      continue;
    }
    if (at + 2 > end) return false;
    const length = u8[at + 1];
    if (at + 2 + length > end) return false;
    if ((type & Ipv6Option.mayChange) !== 0) u8.fill(0, at + 2, at + 2 + length);
    at += 2 + length;
  }
  return true;
}

/**
 * The routing header of `length` bytes at `at` and the destination as they are at the end of the route: each hop swaps the
 * destination with the next address, so the addresses move by one and the last one becomes the destination.
 */
function rearrange(u8: Uint8Array, ip: number, at: number, length: number): boolean {
  const left = u8[at + Routing.segmentsLeft];
  if (left === 0) return true;
  const type = u8[at + Routing.type];
  const count = (length - Routing.addresses) >>> 4;
  if ((type !== 0 && type !== 2) || left > count) return false;
  const destination = ip + Ipv6.destination;
  for (let i = count - left; i < count; i++) {
    const address = at + Routing.addresses + 16 * i;
    for (let k = 0; k < 16; k++) swap[k] = u8[address + k];
    u8.copyWithin(address, destination, destination + 16);
    u8.set(swap, destination);
  }
  u8[at + Routing.segmentsLeft] = 0;
  return true;
}
