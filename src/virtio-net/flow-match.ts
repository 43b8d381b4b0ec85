/**
 * What a flow filter rule matches, in the words of a user, turned into selectors and a key (Virtio 1.4, 5.1.6.5.7, classifier and
 * rule objects).
 *
 * The order of selectors is ETH, then IPV4 or IPV6, then TCP, UDP or ESP. What the standard asks for is filled in: the EtherType
 * when an IP header is matched, the protocol when a transport header is (an IPv6 next header is the last one of the chain).
 */
import { VirtioError } from '../errors.ts';
import { Esp, Ethernet, EtherType, IpProtocol, Ipv4, Ipv6, Ports } from '../packet/fields.ts';
import { type FlowSelector, SELECTOR_LENGTH, SelectorFlag, SelectorType } from './flow-filter-wire.ts';

/** An address and how many of its first bits count; without `length`, all. */
export interface AddressMatch {
  /** 4 or 16 bytes, network order. */
  readonly address: Uint8Array;
  readonly length?: number;
}

export interface EthernetMatch {
  /** 6 bytes. */
  readonly destination?: Uint8Array;
  readonly source?: Uint8Array;
  readonly etherType?: number;
}

export interface IpMatch {
  readonly source?: AddressMatch;
  readonly destination?: AddressMatch;
  /** Protocol, or the last next header. */
  readonly protocol?: number;
}

export interface PortMatch {
  readonly sourcePort?: number;
  readonly destinationPort?: number;
}

/** Fields that are absent match anything. Only one of `ipv4`/`ipv6`, and of `tcp`/`udp`/`esp`, which needs one of them. */
export interface FlowMatch {
  readonly eth?: EthernetMatch;
  readonly ipv4?: IpMatch;
  readonly ipv6?: IpMatch;
  readonly tcp?: PortMatch;
  readonly udp?: PortMatch;
  readonly esp?: { readonly spi?: number };
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
  partial = false;

  constructor(type: number) {
    this.type = type;
    this.mask = new Uint8Array(SELECTOR_LENGTH[type]);
    this.key = new Uint8Array(SELECTOR_LENGTH[type]);
  }

  bytes(name: string, at: number, size: number, value: Uint8Array | undefined, bits = size * 8): void {
    if (value === undefined) return;
    if (value.length !== size) throw invalid(`${name} has ${value.length} bytes, not ${size}`);
    if (!Number.isInteger(bits) || bits < 0 || bits > size * 8) throw invalid(`${name}: ${bits} bits`);
    for (let i = 0; i < size; i++) {
      const left = Math.max(0, Math.min(8, bits - 8 * i));
      this.mask[at + i] = (0xff00 >>> left) & 0xff;
      this.key[at + i] = value[i] & this.mask[at + i];
    }
    if (bits > 0 && bits < size * 8) this.partial = true;
  }

  number(name: string, at: number, size: 1 | 2 | 4, value: number | undefined): void {
    if (value === undefined) return;
    if (!Number.isInteger(value) || value < 0 || value >= 2 ** (8 * size)) throw invalid(`${name} is out of range`);
    const bytes = Uint8Array.from({ length: size }, (_, i) => value >>> (8 * (size - 1 - i)));
    this.bytes(name, at, size, bytes);
  }
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
  if (match.tcp !== undefined) headers.push(ports(SelectorType.tcp, match.tcp));
  if (match.udp !== undefined) headers.push(ports(SelectorType.udp, match.udp));
  if (match.esp !== undefined) {
    const esp = new HeaderMatch(SelectorType.esp);
    esp.number('spi', Esp.spi, 4, match.esp.spi);
    headers.push(esp);
  }
  const selectors = headers.map(({ type, mask, partial }) => ({
    type,
    flags: partial ? SelectorFlag.partialMask : 0,
    mask,
  }));
  return { selectors, key: Uint8Array.from(headers.flatMap((header) => [...header.key])) };
}

function ethernet(match: EthernetMatch, etherType: number | undefined): HeaderMatch {
  if (etherType !== undefined && match.etherType !== undefined && match.etherType !== etherType) {
    throw invalid(`EtherType ${match.etherType} contradicts the IP header`);
  }
  const header = new HeaderMatch(SelectorType.eth);
  header.bytes('destination', Ethernet.destination, 6, match.destination);
  header.bytes('source', Ethernet.source, 6, match.source);
  header.number('etherType', Ethernet.type, 2, etherType ?? match.etherType);
  return header;
}

function ipHeader(match: IpMatch, v6: boolean, needed: number | undefined): HeaderMatch {
  const header = new HeaderMatch(v6 ? SelectorType.ipv6 : SelectorType.ipv4);
  const size = v6 ? 16 : 4;
  const at = v6 ? Ipv6 : Ipv4;
  header.number('protocol', v6 ? Ipv6.nextHeader : Ipv4.protocol, 1, needed ?? match.protocol);
  header.bytes('source', at.source, size, match.source?.address, match.source?.length);
  header.bytes('destination', at.destination, size, match.destination?.address, match.destination?.length);
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
