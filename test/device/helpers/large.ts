/** Large TCP and UDP packets as a driver leaves them to the device, and checks of what became of them. */
import { GsoType, type NetHeader, NetHeaderFlag } from '../../../src/virtio-net/header.ts';

export interface LargeOptions {
  readonly version: 4 | 6;
  readonly protocol: 'tcp' | 'udp';
  readonly payload: number;
  /** Bytes of payload in a segment. */
  readonly size: number;
  /** Bytes of TCP options, a multiple of 4. */
  readonly options?: number;
  readonly tags?: number;
  readonly id?: number;
  readonly sequence?: number;
  /** TCP flags. */
  readonly flags?: number;
  readonly ecn?: boolean;
  /** Destination port; default 5001. */
  readonly port?: number;
  /** IPv6: bytes of hop-by-hop header, a multiple of 8. */
  readonly extension?: number;
}

export interface Large {
  readonly frame: Uint8Array;
  readonly header: Partial<NetHeader>;
  readonly payload: Uint8Array;
}

export function sum(bytes: Iterable<number>, start = 0): number {
  let total = start;
  let high = true;
  for (const byte of bytes) {
    total += high ? byte * 256 : byte;
    high = !high;
  }
  while (total > 0xffff) total = (total % 0x10000) + Math.floor(total / 0x10000);
  return total;
}

const be16 = (value: number) => [(value >>> 8) & 0xff, value & 0xff];

export function large(options: LargeOptions): Large {
  const { version, protocol, size, tags = 0, id = 0x1234, sequence = 0xfffffe00, flags = 0x18 } = options;
  const payload = new Uint8Array(options.payload);
  for (let i = 0; i < payload.length; i++) payload[i] = i * 7 + (i >>> 8);
  const isTcp = protocol === 'tcp';
  const tcpOptions = new Array<number>(options.options ?? 0).fill(1);
  const number = isTcp ? 6 : 17;
  const extension = new Array<number>(options.extension ?? 0).fill(0);
  if (extension.length > 0) extension.splice(0, 4, number, extension.length / 8 - 1, 1, extension.length - 4);
  const transportLength = (isTcp ? 20 + tcpOptions.length : 8) + payload.length;
  const addresses =
    version === 4
      ? [10, 0, 0, 1, 10, 0, 0, 2]
      : [0x20, 1, 0xd, 0xb8, ...new Array(11).fill(0), 1, 0x20, 1, 0xd, 0xb8, ...new Array(11).fill(0), 2];
  const pseudo = sum([...addresses, 0, number], transportLength);
  const ports = [...be16(1000), ...be16(options.port ?? 5001)];
  const transport = isTcp
    ? [
        ...ports,
        ...be16(Math.floor(sequence / 0x10000)),
        ...be16(sequence % 0x10000),
        0,
        0,
        0,
        7,
        ((20 + tcpOptions.length) / 4) << 4,
        flags,
        ...be16(0x2000),
        ...be16(pseudo),
        0,
        0,
        ...tcpOptions,
      ]
    : [...ports, ...be16(transportLength), ...be16(pseudo)];
  const ipLength = extension.length + transportLength;
  const ip =
    version === 4
      ? [0x45, 0, ...be16(20 + ipLength), ...be16(id), 0x40, 0, 64, number, 0, 0, ...addresses]
      : [0x60, 0, 0, 0, ...be16(ipLength), extension.length > 0 ? 0 : number, 64, ...addresses, ...extension];
  const ethernet = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
  for (let i = 0; i < tags; i++) ethernet.push(...(i + 1 < tags ? [0x88, 0xa8] : [0x81, 0]), 0, 5);
  ethernet.push(...(version === 4 ? [8, 0] : [0x86, 0xdd]));
  const headers = [...ethernet, ...ip, ...transport];
  const frame = new Uint8Array(headers.length + payload.length);
  frame.set(headers);
  frame.set(payload, headers.length);
  const tso = version === 4 ? GsoType.TCPV4 : GsoType.TCPV6;
  return {
    frame,
    payload,
    header: {
      flags: NetHeaderFlag.NEEDS_CSUM,
      gsoType: (isTcp ? tso : GsoType.UDP_L4) | (options.ecn === true ? GsoType.ECN : 0),
      gsoSize: size,
      hdrLen: headers.length,
      csumStart: ethernet.length + ip.length,
      csumOffset: isTcp ? 16 : 6,
    },
  };
}

export interface TunnelOptions {
  /** Version of the outer IP header. */
  readonly outer: 4 | 6;
  /** Whether the outer UDP header has a checksum, which is left open too. */
  readonly checksum?: boolean;
}

/** `inner` in a VXLAN tunnel (RFC 7348): Ethernet, IP, UDP and VXLAN in front of it. */
export function inTunnel(inner: Large, { outer, checksum = false }: TunnelOptions): Large {
  const udpLength = 8 + 8 + inner.frame.length;
  const addresses =
    outer === 4 ? [192, 0, 2, 1, 192, 0, 2, 2] : [0xfd, ...new Array(14).fill(0), 1, 0xfd, ...new Array(14).fill(0), 2];
  const ip =
    outer === 4
      ? [0x45, 0, ...be16(20 + udpLength), 0xff, 0xfe, 0, 0, 64, 17, 0, 0, ...addresses]
      : [0x60, 0, 0, 0, ...be16(udpLength), 17, 64, ...addresses];
  const pseudo = sum([...addresses, 0, 17], udpLength);
  const udp = [...be16(40000), ...be16(4789), ...be16(udpLength), ...be16(checksum ? pseudo : 0)];
  const ethernet = [2, 0, 0, 0, 0, 4, 2, 0, 0, 0, 0, 3, ...(outer === 4 ? [8, 0] : [0x86, 0xdd])];
  const headers = [...ethernet, ...ip, ...udp, 8, 0, 0, 0, 0, 0, 7, 0];
  const frame = new Uint8Array(headers.length + inner.frame.length);
  frame.set(headers);
  frame.set(inner.frame, headers.length);
  const { header } = inner;
  const is4 =
    header.gsoType === GsoType.UDP_L4 ? inner.frame[12] === 8 : ((header.gsoType ?? 0) & 0x7f) === GsoType.TCPV4;
  return {
    frame,
    payload: inner.payload,
    header: {
      ...header,
      flags: NetHeaderFlag.NEEDS_CSUM | (checksum ? NetHeaderFlag.UDP_TUNNEL_CSUM : 0),
      gsoType: (header.gsoType ?? 0) | (is4 ? GsoType.UDP_TUNNEL_IPV4 : GsoType.UDP_TUNNEL_IPV6),
      hdrLen: headers.length + (header.hdrLen ?? 0),
      csumStart: headers.length + (header.csumStart ?? 0),
      outerThOffset: ethernet.length + ip.length,
      innerNhOffset: headers.length + 14,
    },
  };
}
