/** Frames that checks send, and what they look for in frames that come. */
import { addBytes, checksum, finish, ipv4PseudoSum, ipv6PseudoSum, setIpv4Checksum } from '../packet/checksum.ts';
import { Ethernet, EtherType, IpProtocol, Ipv4, Ipv6, Udp } from '../packet/fields.ts';

/** Addresses of networks for benchmarks and documentation (RFC 2544, RFC 3849): nobody has them. */
export const Address = {
  source4: Uint8Array.of(198, 18, 0, 1),
  destination4: Uint8Array.of(198, 18, 0, 2),
  source6: Uint8Array.of(0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
  destination6: Uint8Array.of(0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2),
  /** Ends of tunnels. */
  tunnel4: [Uint8Array.of(192, 0, 2, 1), Uint8Array.of(192, 0, 2, 2)],
} as const;

export interface FrameOptions {
  /** 6 bytes. */
  readonly destination: Uint8Array;
  readonly source: Uint8Array;
  readonly ipv6?: boolean;
  readonly sourcePort?: number;
  readonly destinationPort?: number;
  /** Bytes of the whole frame; default 128. */
  readonly length?: number;
  /** Second byte of an IPv4 header: DSCP and ECN. */
  readonly tos?: number;
  readonly df?: boolean;
  readonly ttl?: number;
  /** `partial`: the pseudo header only; `wrong`: a wrong one. Default `full`. */
  readonly checksum?: 'full' | 'partial' | 'wrong';
}

let serial = 0;

/** An Ethernet frame with a UDP packet; each has another payload. */
export function udpFrame(options: FrameOptions): Uint8Array {
  const ipv6 = options.ipv6 === true;
  const length = options.length ?? 128;
  const ip = Ethernet.length;
  const ipLength = ipv6 ? Ipv6.length : Ipv4.minLength;
  const udp = ip + ipLength;
  const frame = new Uint8Array(length);
  frame.set(options.destination, Ethernet.destination);
  frame.set(options.source, Ethernet.source);
  put16(frame, Ethernet.type, ipv6 ? EtherType.ipv6 : EtherType.ipv4);
  if (ipv6) {
    frame[ip] = 0x60;
    put16(frame, ip + Ipv6.payloadLength, length - udp);
    frame[ip + Ipv6.nextHeader] = IpProtocol.udp;
    frame[ip + Ipv6.hopLimit] = options.ttl ?? 64;
    frame.set(Address.source6, ip + Ipv6.source);
    frame.set(Address.destination6, ip + Ipv6.destination);
  } else {
    frame[ip] = 0x45;
    frame[ip + Ipv4.tos] = options.tos ?? 0;
    put16(frame, ip + Ipv4.totalLength, length - ip);
    put16(frame, ip + Ipv4.flagsFragment, options.df === true ? 0x4000 : 0);
    frame[ip + Ipv4.ttl] = options.ttl ?? 64;
    frame[ip + Ipv4.protocol] = IpProtocol.udp;
    frame.set(Address.source4, ip + Ipv4.source);
    frame.set(Address.destination4, ip + Ipv4.destination);
    setIpv4Checksum(frame, ip, ipLength);
  }
  put16(frame, udp + Udp.sourcePort, options.sourcePort ?? 4001);
  put16(frame, udp + Udp.destinationPort, options.destinationPort ?? 4002);
  put16(frame, udp + Udp.udpLength, length - udp);
  serial++;
  for (let i = udp + Udp.length; i < length; i++) frame[i] = serial + i * 7;
  put16(frame, udp + Udp.length, serial);
  put16(frame, udp + Udp.checksum, udpChecksum(frame, ip, ipv6, udp, options.checksum ?? 'full'));
  return frame;
}

/** A frame that is not IP. */
export function otherFrame({ destination, source }: FrameOptions, type: number): Uint8Array {
  const frame = new Uint8Array(64);
  frame.set(destination, Ethernet.destination);
  frame.set(source, Ethernet.source);
  put16(frame, Ethernet.type, type);
  serial++;
  put16(frame, Ethernet.length, serial);
  return frame;
}

/** A UDP packet in an IPv4 tunnel over IPv4 (RFC 2003). */
export function ipInIpFrame(options: FrameOptions): Uint8Array {
  const inner = udpFrame(options);
  const ip = Ethernet.length;
  const frame = new Uint8Array(inner.length + Ipv4.minLength);
  // The outer header is the inner one, between the ends of the tunnel.
  frame.set(inner.subarray(0, ip + Ipv4.minLength));
  frame.set(inner.subarray(ip), ip + Ipv4.minLength);
  put16(frame, ip + Ipv4.totalLength, frame.length - ip);
  frame[ip + Ipv4.protocol] = IpProtocol.ipv4;
  frame.set(Address.tunnel4[0], ip + Ipv4.source);
  frame.set(Address.tunnel4[1], ip + Ipv4.destination);
  setIpv4Checksum(frame, ip, Ipv4.minLength);
  return frame;
}

function udpChecksum(
  frame: Uint8Array,
  ip: number,
  ipv6: boolean,
  udp: number,
  kind: 'full' | 'partial' | 'wrong',
): number {
  const length = frame.length - udp;
  const pseudo = (ipv6 ? ipv6PseudoSum : ipv4PseudoSum)(frame, ip, IpProtocol.udp, length);
  // `finish` gives the complement; the driver leaves the plain sum for the device to add to (5.1.9.2).
  if (kind === 'partial') return ~finish(pseudo) & 0xffff;
  const full = finish(addBytes(frame, udp, length, pseudo)) || 0xffff;
  return kind === 'full' ? full : full ^ 0x0f0f;
}

/** Whether the UDP checksum of an IPv4 frame holds. */
export function hasRightChecksum(frame: Uint8Array): boolean {
  const ip = Ethernet.length;
  const udp = ip + (frame[ip] & 0xf) * 4;
  const length = get16(frame, udp + Udp.udpLength);
  const sum = addBytes(frame, udp, length, ipv4PseudoSum(frame, ip, IpProtocol.udp, length));
  return finish(sum) === 0;
}

/** The ones' complement checksum from `start` to the end, as 5.1.9.4.1 has the driver fill it in. */
export function checksumFrom(frame: Uint8Array, start: number): number {
  return checksum(frame, start, frame.length - start);
}

export function isEqual(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}

/** IP protocol of an IPv4 or IPv6 frame; -1 for another. */
export function protocolOf(frame: Uint8Array): number {
  const type = get16(frame, Ethernet.type);
  if (type === EtherType.ipv4) return frame[Ethernet.length + Ipv4.protocol];
  return type === EtherType.ipv6 ? frame[Ethernet.length + Ipv6.nextHeader] : -1;
}

export function get16(bytes: Uint8Array, at: number): number {
  return (bytes[at] << 8) | bytes[at + 1];
}

export function put16(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value >>> 8;
  bytes[at + 1] = value;
}

/** The first bytes, for a report. */
export function excerpt(bytes: Uint8Array, length = 48): string {
  const text = Buffer.from(bytes.subarray(0, length)).toString('hex');
  return bytes.length > length ? `${text}… (${bytes.length} bytes)` : text;
}
