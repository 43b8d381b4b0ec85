/**
 * What a flow filter rule matches, in the words of a user, turned into selectors and a key (Virtio 1.4, 5.1.6.5.7, classifier and
 * rule objects).
 *
 * The order of selectors is ETH, then IPV4 or IPV6, then TCP, UDP or ESP. What the standard asks for is filled in: the EtherType
 * when an IP header is matched, the protocol when a transport header is (an IPv6 next header is the last one of the chain).
 */
import { VirtioError } from '../errors.ts';
import { Esp, Ethernet, EtherType, IpProtocol, Ipv4, Ipv6, Ports, Tcp } from '../packet/fields.ts';
import { type FlowSelector, hasWholeFields, SELECTOR_LENGTH, SelectorFlag, SelectorType } from './flow-filter-wire.ts';

const DSCP_BITS = 6;

/** An address and how many of its first bits count; without `length`, all. Or, with `mask`, which bits. */
export interface AddressMatch {
  /** 4, 6 or 16 bytes, network order. */
  readonly address: Uint8Array;
  readonly length?: number;
  /** As long as the address; a one is a bit that counts. Excludes `length`. */
  readonly mask?: Uint8Array;
}

/** A number, or the bits of it that `mask` has. */
export type NumberMatch = number | { readonly value: number; readonly mask: number };

export interface EthernetMatch {
  /** 6 bytes. */
  readonly destination?: Uint8Array | AddressMatch;
  readonly source?: Uint8Array | AddressMatch;
  readonly etherType?: number;
}

export interface IpMatch {
  readonly source?: AddressMatch;
  readonly destination?: AddressMatch;
  /** Protocol, or the last next header. */
  readonly protocol?: number;
  /** The 6-bit value. */
  readonly dscp?: number;
  /** TTL or hop limit. */
  readonly ttl?: NumberMatch;
}

export interface PortMatch {
  readonly sourcePort?: NumberMatch;
  readonly destinationPort?: NumberMatch;
}

export interface TcpMatch extends PortMatch {
  /** Control bits: FIN is 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32. */
  readonly flags?: NumberMatch;
}

export interface EspMatch {
  readonly spi?: NumberMatch;
  readonly sequence?: NumberMatch;
}

/**
 * Fields that are absent match anything. Only one of `ipv4`/`ipv6`, and of `tcp`/`udp`/`esp`, which needs one of them.
 *
 * ```ts
 * { ipv4: { destination: { address, length: 24 } }, udp: { destinationPort: { value: 4096, mask: 0xf000 } } }
 * ```
 */
export interface FlowMatch {
  readonly eth?: EthernetMatch;
  readonly ipv4?: IpMatch;
  readonly ipv6?: IpMatch;
  readonly tcp?: TcpMatch;
  readonly udp?: PortMatch;
  readonly esp?: EspMatch;
}

/** Selectors for a classifier, and the key that goes with them. */
export interface CompiledMatch {
  readonly selectors: readonly FlowSelector[];
  readonly key: Uint8Array;
}

/** One header while it is being filled in. */
class HeaderMatch {
  readonly type: number;
  readonly mask: Uint8Array;
  readonly key: Uint8Array;

  constructor(type: number) {
    this.type = type;
    this.mask = new Uint8Array(SELECTOR_LENGTH[type]);
    this.key = new Uint8Array(SELECTOR_LENGTH[type]);
  }

  address(name: string, at: number, size: number, match: AddressMatch | undefined): void {
    if (match === undefined) return;
    const { address, length = 8 * size, mask = prefixMask(name, size, length) } = match;
    if (match.length !== undefined && match.mask !== undefined)
      throw invalid(`${name}: length and mask exclude each other`);
    if (address.length !== size) throw invalid(`${name} has ${address.length} bytes, not ${size}`);
    if (mask.length !== size) throw invalid(`the mask of ${name} has ${mask.length} bytes, not ${size}`);
    for (let i = 0; i < size; i++) this.#byte(at + i, address[i], mask[i]);
  }

  /** A number of `bits` bits, whose lowest bit is bit `shift` of the `size` bytes at `at`. */
  number(name: string, at: number, size: number, match: NumberMatch | undefined, bits = 8 * size, shift = 0): void {
    if (match === undefined) return;
    const most = 2 ** bits - 1;
    const { value, mask } = typeof match === 'number' ? { value: match, mask: most } : match;
    for (const one of [value, mask]) {
      if (!Number.isInteger(one) || one < 0 || one > most) throw invalid(`${name} is out of range`);
    }
    for (let i = 0; i < size; i++) {
      const scale = 2 ** (8 * (size - 1 - i));
      const byteOf = (number: number) => Math.floor((number * 2 ** shift) / scale) & 0xff;
      this.#byte(at + i, byteOf(value), byteOf(mask));
    }
  }

  get selector(): FlowSelector {
    const { type, mask } = this;
    return { type, flags: hasWholeFields(this) ? 0 : SelectorFlag.partialMask, mask };
  }

  #byte(at: number, value: number, mask: number): void {
    this.mask[at] |= mask;
    this.key[at] |= value & mask;
  }
}

function prefixMask(name: string, size: number, length: number): Uint8Array {
  if (!Number.isInteger(length) || length < 0 || length > size * 8) throw invalid(`${name}: ${length} bits`);
  return Uint8Array.from({ length: size }, (_, i) => 0xff00 >>> Math.max(0, Math.min(8, length - 8 * i)));
}

/** Turns a match into selectors and key. Throws VirtioError `FLOW_MATCH` when it is not one that the standard has. */
export function compileMatch(match: FlowMatch): CompiledMatch {
  const headers: HeaderMatch[] = [];
  const { ipv4, ipv6 } = match;
  const ip = ipv4 ?? ipv6;
  if (ipv4 !== undefined && ipv6 !== undefined) throw invalid('ipv4 and ipv6 exclude each other');
  const transports = [match.tcp, match.udp, match.esp].filter((one) => one !== undefined);
  if (transports.length > 1) throw invalid('tcp, udp and esp exclude each other');
  if (transports.length > 0 && ip === undefined) throw invalid('tcp, udp and esp need ipv4 or ipv6');

  const needed = match.tcp ? IpProtocol.tcp : match.udp ? IpProtocol.udp : match.esp ? IpProtocol.esp : undefined;
  if (needed !== undefined && ip?.protocol !== undefined && ip.protocol !== needed) {
    throw invalid(`protocol ${ip.protocol} contradicts the transport header`);
  }
  headers.push(ethernet(match.eth ?? {}, ipv4 ? EtherType.ipv4 : ipv6 ? EtherType.ipv6 : undefined));
  if (ip !== undefined) headers.push(ipHeader(ip, ipv6 !== undefined, needed));
  if (match.tcp !== undefined) headers.push(tcpHeader(match.tcp));
  if (match.udp !== undefined) headers.push(ports(SelectorType.udp, match.udp));
  if (match.esp !== undefined) headers.push(espHeader(match.esp));
  const selectors = headers.map(({ selector }) => selector);
  return { selectors, key: Uint8Array.from(headers.flatMap((header) => [...header.key])) };
}

function ethernet(match: EthernetMatch, etherType: number | undefined): HeaderMatch {
  if (etherType !== undefined && match.etherType !== undefined && match.etherType !== etherType) {
    throw invalid(`EtherType ${match.etherType} contradicts the IP header`);
  }
  const header = new HeaderMatch(SelectorType.eth);
  header.address('destination', Ethernet.destination, 6, macMatch(match.destination));
  header.address('source', Ethernet.source, 6, macMatch(match.source));
  header.number('etherType', Ethernet.type, 2, etherType ?? match.etherType);
  return header;
}

function macMatch(match: Uint8Array | AddressMatch | undefined): AddressMatch | undefined {
  return match instanceof Uint8Array ? { address: match } : match;
}

function ipHeader(match: IpMatch, v6: boolean, needed: number | undefined): HeaderMatch {
  const header = new HeaderMatch(v6 ? SelectorType.ipv6 : SelectorType.ipv4);
  const size = v6 ? 16 : 4;
  const at = v6 ? Ipv6 : Ipv4;
  header.number('protocol', v6 ? Ipv6.nextHeader : Ipv4.protocol, 1, needed ?? match.protocol);
  header.address('source', at.source, size, match.source);
  header.address('destination', at.destination, size, match.destination);
  header.number('ttl', v6 ? Ipv6.hopLimit : Ipv4.ttl, 1, match.ttl);
  // IPv4: the upper six bits of the second byte (RFC 791); IPv6: bits 4 to 9 of the first two (RFC 8200, RFC 2474).
  if (v6) header.number('dscp', 0, 2, match.dscp, DSCP_BITS, 6);
  else header.number('dscp', Ipv4.tos, 1, match.dscp, DSCP_BITS, 2);
  return header;
}

function tcpHeader(match: TcpMatch): HeaderMatch {
  const header = ports(SelectorType.tcp, match);
  header.number('flags', Tcp.flags, 1, match.flags);
  return header;
}

function espHeader(match: EspMatch): HeaderMatch {
  const header = new HeaderMatch(SelectorType.esp);
  header.number('spi', Esp.spi, 4, match.spi);
  header.number('sequence', Esp.sequence, 4, match.sequence);
  return header;
}

function ports(type: number, match: PortMatch): HeaderMatch {
  const header = new HeaderMatch(type);
  header.number('sourcePort', Ports.source, 2, match.sourcePort);
  header.number('destinationPort', Ports.destination, 2, match.destinationPort);
  return header;
}

/** Why a device whose selector capability is `offered` cannot match `selectors`, or null. */
export function whyNotMatch(selectors: readonly FlowSelector[], offered: readonly FlowSelector[]): string | null {
  for (const { type, flags, mask } of selectors) {
    const entry = offered.find((one) => one.type === type);
    if (entry === undefined) return `the device's flow filter has no ${selectorName(type)} selector`;
    if (mask.some((byte, i) => (byte & ~entry.mask[i]) !== 0)) {
      return `the device's flow filter does not match these fields of the ${selectorName(type)} header`;
    }
    if ((flags & SelectorFlag.partialMask) !== 0 && (entry.flags & SelectorFlag.partialMask) === 0) {
      return `the device's flow filter does not match parts of fields of the ${selectorName(type)} header`;
    }
  }
  return null;
}

/** The standard's name of a selector type, for messages and reports. */
export function selectorName(type: number): string {
  const name = Object.entries(SelectorType).find(([, number]) => number === type)?.[0];
  return name === undefined ? `type ${type}` : name.toUpperCase();
}

function invalid(what: string): VirtioError {
  return new VirtioError('FLOW_MATCH', `flow filter match: ${what}`);
}
