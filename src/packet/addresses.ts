/**
 * Text forms of addresses: IPv4 (dotted decimal), IPv6 (RFC 4291, 2.2, written as RFC 5952 wants), prefixes and MACs.
 *
 * Parsing is strict: no leading zeros in IPv4, no zone, no surrounding space, nothing after the address. A parser
 * returns `null` for text that is not an address; the caller knows the name of the field and says so.
 * Addresses are bytes in network order.
 */
import { isIPv4, isIPv6 } from 'node:net';

/** An address and the number of its leading bits that count. */
export interface ParsedPrefix {
  readonly address: Uint8Array;
  readonly length: number;
}

/** `192.0.2.1` as 4 bytes. */
export function parseIpv4(text: string): Uint8Array | null {
  if (!isIPv4(text)) return null;
  return Uint8Array.from(text.split('.'), Number);
}

/** `2001:db8::1` as 16 bytes. */
export function parseIpv6(text: string): Uint8Array | null {
  if (!isIPv6(text) || text.includes('%')) return null;
  let groups = text;
  // A dotted-decimal tail stands for the last two groups.
  const lastColon = text.lastIndexOf(':');
  const tail = text.slice(lastColon + 1);
  if (tail.includes('.')) {
    const v4 = parseIpv4(tail);
    if (v4 === null) return null;
    const hex = (i: number): string => ((v4[i] << 8) | v4[i + 1]).toString(16);
    groups = `${text.slice(0, lastColon + 1)}${hex(0)}:${hex(2)}`;
  }
  const [head, rest] = groups.split('::') as [string, string | undefined];
  const before = head === '' ? [] : head.split(':');
  const after = rest === undefined || rest === '' ? [] : rest.split(':');
  const bytes = new Uint8Array(16);
  const put = (group: string, index: number): void => {
    const value = Number.parseInt(group, 16);
    bytes[2 * index] = value >>> 8;
    bytes[2 * index + 1] = value & 0xff;
  };
  before.forEach(put);
  after.forEach((group, i) => {
    put(group, 8 - after.length + i);
  });
  return bytes;
}

/** Either family: 4 or 16 bytes. */
export function parseIp(text: string): Uint8Array | null {
  return parseIpv4(text) ?? parseIpv6(text);
}

/**
 * `10.0.0.0/8`, `2001:db8::/32`; without a length the whole address counts. `null` also when bits behind the length
 * are set: such a text means two different things to two readers.
 */
export function parsePrefix(text: string): ParsedPrefix | null {
  const match = /^([^/]+)(?:\/(0|[1-9]\d{0,2}))?$/.exec(text);
  const address = match === null ? null : parseIp(match[1]);
  if (match === null || address === null) return null;
  const bits = address.length * 8;
  const length = match[2] === undefined ? bits : Number(match[2]);
  if (length > bits) return null;
  for (let bit = length; bit < bits; bit++) {
    if ((address[bit >>> 3] & (0x80 >>> (bit & 7))) !== 0) return null;
  }
  return { address, length };
}

/** `02:00:00:00:00:01` as 6 bytes. */
export function parseMac(text: string): Uint8Array | null {
  if (!/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i.test(text)) return null;
  return Uint8Array.from(text.split(':'), (octet) => Number.parseInt(octet, 16));
}

/** The text of a 4 or 16 byte address. Throws RangeError for another length. */
export function formatIp(address: Uint8Array): string {
  if (address.length === 4) return address.join('.');
  if (address.length !== 16) throw new RangeError(`an IP address has 4 or 16 bytes, not ${address.length}`);
  const groups: number[] = [];
  for (let i = 0; i < 16; i += 2) groups.push((address[i] << 8) | address[i + 1]);
  // RFC 5952, 4.2: the longest run of at least two zero groups, the first of equals, becomes "::".
  let start = -1;
  let run = 1;
  for (let i = 0; i < 8; i++) {
    let end = i;
    while (end < 8 && groups[end] === 0) end++;
    if (end - i > run) {
      start = i;
      run = end - i;
    }
  }
  const text = (part: number[]): string => part.map((group) => group.toString(16)).join(':');
  if (start < 0) return text(groups);
  return `${text(groups.slice(0, start))}::${text(groups.slice(start + run))}`;
}

/** `10.0.0.0/8`. */
export function formatPrefix(prefix: ParsedPrefix): string {
  return `${formatIp(prefix.address)}/${prefix.length}`;
}

/** `02:00:00:00:00:01`. Throws RangeError unless there are 6 bytes. */
export function formatMac(address: Uint8Array): string {
  if (address.length !== 6) throw new RangeError(`a MAC address has 6 bytes, not ${address.length}`);
  return Array.from(address, (byte) => byte.toString(16).padStart(2, '0')).join(':');
}
