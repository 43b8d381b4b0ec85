/**
 * Cuts one packet that stands for several into these (Virtio 1.4, 5.1.9.2): a large TCP segment into many (TSO over IPv4 and IPv6), a large
 * UDP datagram into many (USO), also inside a UDP tunnel (VXLAN, Geneve).
 *
 * Nothing that is said of the packet is taken on trust: where the headers are is found in the packet itself, and what is said must
 * agree. Each segment gets the headers of the packet with its own lengths, IPv4 identification (RFC 791; counted up by one), sequence
 * number, flags (FIN and PSH only in the last, CWR only in the first: RFC 3168, 6.1.2) and checksums, computed over the whole of it; of a
 * tunnel the outer lengths, identification and checksums too. An outer UDP checksum of 0 is none, and stays 0 (RFC 768, RFC 6935).
 *
 * Which of the two tunnel bits is set is not looked at: the standard says both that it names the inner and that it names the outer
 * protocol. Left out: UFO, and tunnels in tunnels.
 */
import { addBytes, addWords, finish, ipv4PseudoSum, ipv6PseudoSum, setIpv4Checksum } from './checksum.ts';
import { Ethernet, EtherType, IpProtocol, Ipv4, Ipv4Fragment, Ipv6, Ipv6Extension, Tcp, Udp, Vlan } from './fields.ts';
import { baseType, GSO_TUNNEL, GsoType } from './gso.ts';

/** Most segments of one packet: 64 KiB in pieces of 128 bytes. */
export const MAX_SEGMENTS = 512;
/** Longest packet that is segmented: the longest IP packet, an Ethernet header and two VLAN tags. */
export const MAX_LARGE_FRAME = 0xffff + Ethernet.length + 2 * Vlan.length;

const TcpFlag = { FIN: 0x01, PSH: 0x08, CWR: 0x80 } as const;
/** Most IPv6 extension headers that are walked. */
const MAX_EXTENSIONS = 8;

/** What is said of a packet: fields of `struct virtio_net_hdr`. */
export interface SegmentationRequest {
  readonly gsoType: number;
  readonly gsoSize: number;
  readonly csumStart: number;
  readonly csumOffset: number;
  /** Of a tunnel: bytes to the outer UDP header, and to the inner IP header. */
  readonly outerThOffset: number;
  readonly innerNhOffset: number;
}

/** Memory that packets and their segments are in; `u8` and `u16` begin at the same byte. */
export interface SegmentMemory {
  readonly u8: Uint8Array;
  readonly u16: Uint16Array;
}

/** An IP header and the transport header that it leads to: bytes from the start of the packet. */
class Headers {
  ip = 0;
  transport = 0;
  isIpv6 = false;
}

export class Segmenter {
  /** Of the planned packet: bytes of headers, and of payload in each segment but the last. */
  headers = 0;
  size = 0;
  /** Bytes of the packet. */
  length = 0;
  /** Whether what is segmented is over IPv6. */
  get isIpv6(): boolean {
    return this.#own.isIpv6;
  }
  readonly #u8: Uint8Array;
  readonly #u16: Uint16Array;
  #at = 0;
  /** Bytes of the packet that can be looked at. */
  #visible = 0;
  #segments = 0;
  #isUdp = false;
  readonly #own = new Headers();
  readonly #outer = new Headers();
  #isTunnel = false;
  #outerChecksum = false;

  constructor({ u8, u16 }: SegmentMemory) {
    this.#u8 = u8;
    this.#u16 = u16;
  }

  /**
   * hot: how many segments the packet of `length` bytes at byte `at` becomes as `request` wants; 0 when it cannot be segmented. All of its
   * headers lie in its first `visible` bytes.
   */
  plan(request: SegmentationRequest, at: number, length: number, visible = length): number {
    this.#at = at;
    this.length = length;
    this.#visible = visible;
    const own = this.#own;
    const { gsoType, gsoSize } = request;
    this.#isUdp = baseType(gsoType) === GsoType.UDP_L4;
    this.#isTunnel = (gsoType & GSO_TUNNEL) !== 0;
    const protocol = this.#isUdp ? IpProtocol.udp : IpProtocol.tcp;
    if (gsoSize === 0 || (this.#isTunnel ? !this.#findTunnel(request) : !this.#findIp(own))) return 0;
    if (!this.#hasVersion(own, gsoType) || !this.#findTransport(own, protocol)) return 0;
    const checksum = this.#isUdp ? Udp.checksum : Tcp.checksum;
    if (request.csumStart !== own.transport || request.csumOffset !== checksum) return 0;
    const minimum = this.#isUdp ? Udp.length : Tcp.minLength;
    if (own.transport + minimum > visible) return 0;
    const bytes = this.#isUdp ? Udp.length : (this.#u8[at + own.transport + Tcp.dataOffset] >>> 4) * 4;
    this.headers = own.transport + bytes;
    if (bytes < minimum || this.headers > visible || this.headers >= length) return 0;
    this.size = gsoSize;
    this.#segments = Math.ceil((length - this.headers) / gsoSize);
    return this.#segments <= MAX_SEGMENTS ? this.#segments : 0;
  }

  /** hot: the IP header behind the Ethernet header and VLAN tags. */
  #findIp(headers: Headers): boolean {
    let at = Ethernet.type;
    let type = this.#word(at);
    for (let tags = 0; tags < 2 && (type === EtherType.vlan || type === EtherType.serviceVlan); tags++) {
      at += Vlan.length;
      type = this.#word(at);
    }
    headers.ip = at + 2;
    if (type !== EtherType.ipv4 && type !== EtherType.ipv6) return false;
    return this.#checkIp(headers) && headers.isIpv6 === (type === EtherType.ipv6);
  }

  /** hot: the outer headers, up to the UDP header that `request` names, and the inner IP header that it names. */
  #findTunnel(request: SegmentationRequest): boolean {
    const outer = this.#outer;
    const own = this.#own;
    if (!this.#findIp(outer) || !this.#findTransport(outer, IpProtocol.udp)) return false;
    if (request.outerThOffset !== outer.transport) return false;
    own.ip = request.innerNhOffset;
    if (own.ip < outer.transport + Udp.length || !this.#checkIp(own)) return false;
    this.#outerChecksum = this.#word(outer.transport + Udp.checksum) !== 0;
    return true;
  }

  /** hot: whether there is an IP header at `headers.ip`, and of which version. */
  #checkIp(headers: Headers): boolean {
    const version = this.#u8[this.#at + headers.ip] >>> 4;
    headers.isIpv6 = version === 6;
    if (version !== 4 && version !== 6) return false;
    return headers.ip + (headers.isIpv6 ? Ipv6.length : Ipv4.minLength) <= this.#visible;
  }

  /** hot: whether the version is the one that the type names. */
  #hasVersion(headers: Headers, gsoType: number): boolean {
    const base = baseType(gsoType);
    return base === GsoType.UDP_L4 || headers.isIpv6 === (base === GsoType.TCPV6);
  }

  /** hot: the header of protocol `wanted` behind `headers.ip`, not in a fragment. */
  #findTransport(headers: Headers, wanted: number): boolean {
    const u8 = this.#u8;
    const ip = this.#at + headers.ip;
    if (!headers.isIpv6) {
      const length = (u8[ip + Ipv4.versionIhl] & 0xf) * 4;
      const fragment =
        this.#word(headers.ip + Ipv4.flagsFragment) & (Ipv4Fragment.offsetMask | Ipv4Fragment.moreFragments);
      headers.transport = headers.ip + length;
      if (length < Ipv4.minLength || fragment !== 0 || u8[ip + Ipv4.protocol] !== wanted) return false;
      return headers.transport + Udp.length <= this.#visible;
    }
    let next = u8[ip + Ipv6.nextHeader];
    let at = headers.ip + Ipv6.length;
    for (let i = 0; i < MAX_EXTENSIONS && next !== wanted; i++) {
      if (next !== IpProtocol.hopByHop && next !== IpProtocol.routing && next !== IpProtocol.destinationOptions)
        return false;
      if (at + Ipv6Extension.unit > this.#visible) return false;
      next = u8[this.#at + at + Ipv6Extension.nextHeader];
      at += (u8[this.#at + at + Ipv6Extension.lengthUnits] + 1) * Ipv6Extension.unit;
    }
    headers.transport = at;
    return next === wanted && at + Udp.length <= this.#visible;
  }

  /** hot: a big-endian word of the packet; what lies behind a short one is private memory too. */
  #word(offset: number): number {
    return (this.#u8[this.#at + offset] << 8) | this.#u8[this.#at + offset + 1];
  }

  /** hot: bytes of payload in segment `k`. */
  payload(k: number): number {
    return Math.min(this.size, this.length - this.headers - k * this.size);
  }

  /** hot: writes segment `k` of the planned packet, which lies in one piece, to `to`; returns its length. */
  cut(k: number, to: number): number {
    const from = this.#at + this.headers + k * this.size;
    this.#u8.copyWithin(to + this.headers, from, from + this.payload(k));
    return this.seal(k, to);
  }

  /** hot: writes the headers of segment `k` to `to`, in front of its payload that is there already; returns its length. */
  seal(k: number, to: number): number {
    const u8 = this.#u8;
    const own = this.#own;
    u8.copyWithin(to, this.#at, this.#at + this.headers);
    const length = this.headers + this.payload(k);
    this.#fixIp(own, k, to, length);
    if (this.#isUdp) this.#fixUdp(own, to, length, true);
    else this.#fixTcp(k, to, length);
    if (this.#isTunnel) {
      this.#fixIp(this.#outer, k, to, length);
      this.#fixUdp(this.#outer, to, length, this.#outerChecksum);
    }
    return length;
  }

  /** hot: */
  #fixIp(headers: Headers, k: number, to: number, length: number): void {
    const u8 = this.#u8;
    const ip = to + headers.ip;
    if (headers.isIpv6) {
      put16(u8, ip + Ipv6.payloadLength, length - headers.ip - Ipv6.length);
      return;
    }
    put16(u8, ip + Ipv4.totalLength, length - headers.ip);
    put16(u8, ip + Ipv4.identification, this.#word(headers.ip + Ipv4.identification) + k);
    setIpv4Checksum(u8, ip, (u8[ip + Ipv4.versionIhl] & 0xf) * 4);
  }

  /** hot: */
  #fixTcp(k: number, to: number, length: number): void {
    const u8 = this.#u8;
    const own = this.#own;
    const tcp = to + own.transport;
    const high = this.#word(own.transport + Tcp.sequence);
    const low = this.#word(own.transport + Tcp.sequence + 2);
    const sequence = (((high << 16) | low) + k * this.size) | 0;
    put16(u8, tcp + Tcp.sequence, sequence >>> 16);
    put16(u8, tcp + Tcp.sequence + 2, sequence);
    if (k + 1 < this.#segments) u8[tcp + Tcp.flags] &= ~(TcpFlag.FIN | TcpFlag.PSH);
    if (k > 0) u8[tcp + Tcp.flags] &= ~TcpFlag.CWR;
    this.#fixChecksum(own, to, length, tcp + Tcp.checksum, IpProtocol.tcp);
  }

  /** hot: */
  #fixUdp(headers: Headers, to: number, length: number, checksummed: boolean): void {
    const udp = to + headers.transport;
    put16(this.#u8, udp + Udp.udpLength, length - headers.transport);
    if (checksummed) this.#fixChecksum(headers, to, length, udp + Udp.checksum, IpProtocol.udp);
  }

  /** hot: over the pseudo header, the transport header and the payload. */
  #fixChecksum(headers: Headers, to: number, length: number, place: number, protocol: number): void {
    const u8 = this.#u8;
    const bytes = length - headers.transport;
    const ip = to + headers.ip;
    const at = to + headers.transport;
    put16(u8, place, 0);
    const pseudo = headers.isIpv6 ? ipv6PseudoSum(u8, ip, protocol, bytes) : ipv4PseudoSum(u8, ip, protocol, bytes);
    const sum = (at & 1) === 0 ? addWords(this.#u16, u8, at, bytes, pseudo) : addBytes(u8, at, bytes, pseudo);
    // A result of zero means "no checksum" to UDP, and 0xffff is the same number.
    put16(u8, place, finish(sum) || 0xffff);
  }
}

/** hot: the lower 16 bits of `value`, big-endian. */
function put16(u8: Uint8Array, at: number, value: number): void {
  u8[at] = value >>> 8;
  u8[at + 1] = value;
}
