/**
 * Segmentation that a driver leaves to the device (Virtio 1.4, 5.1.9.2): one large TCP segment becomes many (TSO over IPv4 and
 * IPv6), one large UDP datagram many datagrams (USO).
 *
 * The packet lies in private memory, where the driver cannot change it any more. Nothing of the header is taken on trust:
 * where the headers are is found in the packet itself, and `csum_start` must say the same. Each segment gets the headers
 * of the packet with its own lengths, IPv4 identification (RFC 791; counted up by one), sequence number, flags (FIN and PSH
 * only in the last, CWR only in the first: RFC 3168, 6.1.2) and checksums, computed over the whole of it.
 *
 * Left out: UFO and UDP tunnels, which are not offered.
 */
import { addBytes, finish, ipv4PseudoSum, ipv6PseudoSum, setIpv4Checksum } from '../packet/checksum.ts';
import {
  Ethernet,
  EtherType,
  IpProtocol,
  Ipv4,
  Ipv4Fragment,
  Ipv6,
  Ipv6Extension,
  Tcp,
  Udp,
  Vlan,
} from '../packet/fields.ts';
import { GsoType, isAmong, type NetHeader, NetHeaderFlag } from '../virtio-net/header.ts';

/** Most segments of one packet: 64 KiB in pieces of 128 bytes. */
export const MAX_SEGMENTS = 512;
/** Longest packet that is segmented: the longest IP packet, an Ethernet header and two VLAN tags. */
export const MAX_LARGE_FRAME = 0xffff + Ethernet.length + 2 * Vlan.length;

const TcpFlag = { FIN: 0x01, PSH: 0x08, CWR: 0x80 } as const;
/** Most IPv6 extension headers that are walked. */
const MAX_EXTENSIONS = 8;

export class Segmenter {
  /** Of the planned packet: bytes of headers, and of payload in each segment but the last. */
  headers = 0;
  size = 0;
  readonly #u8: Uint8Array;
  /** Bytes of the packet. */
  length = 0;
  #at = 0;
  #segments = 0;
  #isUdp = false;
  #isIpv6 = false;
  /** Bytes from the start of the packet to the IP and to the transport header. */
  #ip = 0;
  #transport = 0;

  /** `u8` is the memory that the packets to cut are in, and their segments. */
  constructor(u8: Uint8Array) {
    this.#u8 = u8;
  }

  /** hot: how many segments the `length` bytes at `at` become as `header` wants; 0 when they cannot or may not. `types` are those negotiated. */
  plan(header: NetHeader, types: number, at: number, length: number): number {
    this.#at = at;
    this.length = length;
    this.#isUdp = header.gsoType === GsoType.UDP_L4;
    const isAsked = (header.flags & NetHeaderFlag.NEEDS_CSUM) !== 0 && header.gsoSize > 0;
    if (!isAsked || !isAmong(header.gsoType, types)) return 0;
    if (!this.#findIp(header.gsoType) || !this.#findTransport()) return 0;
    const checksum = this.#isUdp ? Udp.checksum : Tcp.checksum;
    if (header.csumStart !== this.#transport || header.csumOffset !== checksum) return 0;
    const minimum = this.#isUdp ? Udp.length : Tcp.minLength;
    if (this.#transport + minimum > length) return 0;
    const own = this.#isUdp ? Udp.length : (this.#u8[at + this.#transport + Tcp.dataOffset] >>> 4) * 4;
    this.headers = this.#transport + own;
    if (own < minimum || this.headers >= length) return 0;
    this.size = header.gsoSize;
    this.#segments = Math.ceil((length - this.headers) / this.size);
    return this.#segments <= MAX_SEGMENTS ? this.#segments : 0;
  }

  /** hot: behind the Ethernet header and VLAN tags; of the version that the type names. */
  #findIp(gsoType: number): boolean {
    let at = Ethernet.type;
    let type = this.#word(at);
    for (let tags = 0; tags < 2 && (type === EtherType.vlan || type === EtherType.serviceVlan); tags++) {
      at += Vlan.length;
      type = this.#word(at);
    }
    this.#ip = at + 2;
    this.#isIpv6 = type === EtherType.ipv6;
    const base = gsoType & ~GsoType.ECN;
    if (base === GsoType.TCPV4 && type !== EtherType.ipv4) return false;
    if (base === GsoType.TCPV6 && type !== EtherType.ipv6) return false;
    if (type !== EtherType.ipv4 && type !== EtherType.ipv6) return false;
    const version = this.#u8[this.#at + this.#ip] >>> 4;
    return (
      version === (this.#isIpv6 ? 6 : 4) && this.#ip + (this.#isIpv6 ? Ipv6.length : Ipv4.minLength) <= this.length
    );
  }

  /** hot: the header of the protocol that the type names, and not in a fragment. */
  #findTransport(): boolean {
    const u8 = this.#u8;
    const ip = this.#at + this.#ip;
    const wanted = this.#isUdp ? IpProtocol.udp : IpProtocol.tcp;
    if (!this.#isIpv6) {
      const length = (u8[ip + Ipv4.versionIhl] & 0xf) * 4;
      const fragment =
        this.#word(this.#ip + Ipv4.flagsFragment) & (Ipv4Fragment.offsetMask | Ipv4Fragment.moreFragments);
      this.#transport = this.#ip + length;
      return length >= Ipv4.minLength && fragment === 0 && u8[ip + Ipv4.protocol] === wanted;
    }
    let next = u8[ip + Ipv6.nextHeader];
    let at = this.#ip + Ipv6.length;
    for (let i = 0; i < MAX_EXTENSIONS && next !== wanted; i++) {
      if (next !== IpProtocol.hopByHop && next !== IpProtocol.routing && next !== IpProtocol.destinationOptions)
        return false;
      if (at + Ipv6Extension.unit > this.length) return false;
      next = u8[this.#at + at + Ipv6Extension.nextHeader];
      at += (u8[this.#at + at + Ipv6Extension.lengthUnits] + 1) * Ipv6Extension.unit;
    }
    this.#transport = at;
    return next === wanted;
  }

  /** hot: a big-endian word of the packet; what lies behind a short one is private memory too. */
  #word(offset: number): number {
    return (this.#u8[this.#at + offset] << 8) | this.#u8[this.#at + offset + 1];
  }

  /** hot: writes segment `k` of the planned packet to `to`; returns its length. */
  cut(k: number, to: number): number {
    const u8 = this.#u8;
    const from = this.#at + this.headers + k * this.size;
    const bytes = Math.min(this.size, this.length - this.headers - k * this.size);
    u8.copyWithin(to, this.#at, this.#at + this.headers);
    u8.copyWithin(to + this.headers, from, from + bytes);
    const length = this.headers + bytes;
    this.#fixIp(k, to, length);
    if (this.#isUdp) this.#fixUdp(to, length);
    else this.#fixTcp(k, to, length);
    return length;
  }

  /** hot: */
  #fixIp(k: number, to: number, length: number): void {
    const u8 = this.#u8;
    const ip = to + this.#ip;
    if (this.#isIpv6) {
      put16(u8, ip + Ipv6.payloadLength, length - this.#ip - Ipv6.length);
      return;
    }
    put16(u8, ip + Ipv4.totalLength, length - this.#ip);
    put16(u8, ip + Ipv4.identification, this.#word(this.#ip + Ipv4.identification) + k);
    setIpv4Checksum(u8, ip, this.#transport - this.#ip);
  }

  /** hot: */
  #fixTcp(k: number, to: number, length: number): void {
    const u8 = this.#u8;
    const tcp = to + this.#transport;
    const high = this.#word(this.#transport + Tcp.sequence);
    const low = this.#word(this.#transport + Tcp.sequence + 2);
    const sequence = (((high << 16) | low) + k * this.size) | 0;
    put16(u8, tcp + Tcp.sequence, sequence >>> 16);
    put16(u8, tcp + Tcp.sequence + 2, sequence);
    if (k + 1 < this.#segments) u8[tcp + Tcp.flags] &= ~(TcpFlag.FIN | TcpFlag.PSH);
    if (k > 0) u8[tcp + Tcp.flags] &= ~TcpFlag.CWR;
    this.#fixChecksum(to, length, tcp + Tcp.checksum, IpProtocol.tcp);
  }

  /** hot: */
  #fixUdp(to: number, length: number): void {
    const udp = to + this.#transport;
    put16(this.#u8, udp + Udp.udpLength, length - this.#transport);
    this.#fixChecksum(to, length, udp + Udp.checksum, IpProtocol.udp);
  }

  /** hot: over the pseudo header, the transport header and the payload. */
  #fixChecksum(to: number, length: number, place: number, protocol: number): void {
    const u8 = this.#u8;
    const own = length - this.#transport;
    const ip = to + this.#ip;
    put16(u8, place, 0);
    const pseudo = this.#isIpv6 ? ipv6PseudoSum(u8, ip, protocol, own) : ipv4PseudoSum(u8, ip, protocol, own);
    // A result of zero means "no checksum" to UDP, and 0xffff is the same number.
    put16(u8, place, finish(addBytes(u8, to + this.#transport, own, pseudo)) || 0xffff);
  }
}

/** hot: the lower 16 bits of `value`, big-endian. */
function put16(u8: Uint8Array, at: number, value: number): void {
  u8[at] = value >>> 8;
  u8[at + 1] = value;
}
