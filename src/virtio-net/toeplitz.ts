/**
 * The hash of receive-side scaling (Virtio 1.4, 5.1.9.4.3): Toeplitz over addresses and ports, as Microsoft's "RSS hashing functions"
 * define it, whose test vectors the tests have.
 *
 * The key is turned into a table by byte position and value once, so that a packet costs one look-up per byte. Left out:
 * the home address option and the type 2 routing header of the `_EX` types, which therefore are not offered: a packet
 * with extension headers is hashed as one without, which is what 5.1.9.4.3.4 asks for then.
 */
import {
  Ethernet,
  EtherType,
  IpProtocol,
  Ipv4,
  Ipv4Fragment,
  Ipv6,
  Ipv6Extension,
  Ports,
  Vlan,
} from '../packet/fields.ts';
import { HashType } from './control-wire.ts';
import { HashReport } from './header.ts';

/** Bytes of the longest input: two IPv6 addresses and two ports. */
const INPUT = 36;
/** A key must reach 32 bits beyond the last input bit. */
export const TOEPLITZ_KEY_LENGTH = INPUT + 4;
const MAX_EXTENSIONS = 8;

/** The types that `RssHash` can calculate. */
export const SUPPORTED_HASH_TYPES =
  HashType.IPV4 | HashType.TCPV4 | HashType.UDPV4 | HashType.IPV6 | HashType.TCPV6 | HashType.UDPV6;

export class RssHash {
  /** Of the frame that was hashed last: a `HashReport`, 0 when it has no hash, and the hash. */
  report: number = HashReport.NONE;
  value = 0;
  #types = 0;
  /** By byte of input and its value. */
  readonly #table = new Uint32Array(INPUT * 256);

  /** `types` are `HashType` bits. A key that is too short is continued with zeros. */
  configure(types: number, key: Uint8Array): void {
    this.#types = types;
    const bits = new Uint8Array(TOEPLITZ_KEY_LENGTH);
    bits.set(key.subarray(0, TOEPLITZ_KEY_LENGTH));
    for (let at = 0; at < INPUT; at++) {
      for (let value = 0; value < 256; value++) {
        let hash = 0;
        for (let bit = 0; bit < 8; bit++) if ((value & (0x80 >>> bit)) !== 0) hash ^= window(bits, 8 * at + bit);
        this.#table[at * 256 + value] = hash;
      }
    }
  }

  /** hot: the hash over `length` bytes at `at`, which become the input from its byte `position` on. */
  #over(u8: Uint8Array, at: number, length: number, position: number): number {
    const table = this.#table;
    let hash = 0;
    for (let i = 0; i < length; i++) hash ^= table[((position + i) << 8) | u8[at + i]];
    return hash;
  }

  /** hot: hashes the Ethernet frame of `length` bytes at `at`: sets `report` and `value`. */
  hash(u8: Uint8Array, at: number, length: number): void {
    this.report = HashReport.NONE;
    this.value = 0;
    const end = at + length;
    let ip = at + Ethernet.length;
    if (this.#types === 0 || ip > end) return;
    let type = (u8[ip - 2] << 8) | u8[ip - 1];
    if (type === EtherType.vlan && ip + Vlan.length <= end) {
      ip += Vlan.length;
      type = (u8[ip - 2] << 8) | u8[ip - 1];
    }
    if (type === EtherType.ipv4 && ip + Ipv4.minLength <= end) this.#hashIpv4(u8, ip, end);
    else if (type === EtherType.ipv6 && ip + Ipv6.length <= end) this.#hashIpv6(u8, ip, end);
  }

  /** hot: */
  #hashIpv4(u8: Uint8Array, ip: number, end: number): void {
    const fragment = ((u8[ip + Ipv4.flagsFragment] << 8) | u8[ip + Ipv4.flagsFragment + 1]) & FRAGMENT;
    const transport = ip + (u8[ip + Ipv4.versionIhl] & 0xf) * 4;
    const hasPorts = fragment === 0 && transport + Ports.length <= end;
    this.#finish(u8, ip + Ipv4.source, 8, hasPorts ? u8[ip + Ipv4.protocol] : 0, transport, HashReport.IPV4);
  }

  /** hot: */
  #hashIpv6(u8: Uint8Array, ip: number, end: number): void {
    let next = u8[ip + Ipv6.nextHeader];
    let at = ip + Ipv6.length;
    for (let i = 0; i < MAX_EXTENSIONS && at + Ipv6Extension.unit <= end; i++) {
      if (next !== IpProtocol.hopByHop && next !== IpProtocol.routing && next !== IpProtocol.destinationOptions) break;
      next = u8[at + Ipv6Extension.nextHeader];
      at += (u8[at + Ipv6Extension.lengthUnits] + 1) * Ipv6Extension.unit;
    }
    this.#finish(u8, ip + Ipv6.source, 32, at + Ports.length <= end ? next : 0, at, HashReport.IPV6);
  }

  /** hot: over addresses, and over ports when the type with ports of `protocol` is enabled. `plain` is the report without ports; TCP and UDP follow it. */
  #finish(u8: Uint8Array, addresses: number, length: number, protocol: number, transport: number, plain: number): void {
    let report = plain;
    if (protocol === IpProtocol.tcp && this.#enabled(plain + 1)) report = plain + 1;
    else if (protocol === IpProtocol.udp && this.#enabled(plain + 2)) report = plain + 2;
    else if (!this.#enabled(plain)) return;
    let value = this.#over(u8, addresses, length, 0);
    if (report !== plain) value ^= this.#over(u8, transport, Ports.length, length);
    this.report = report;
    this.value = value >>> 0;
  }

  /** hot: VIRTIO_NET_HASH_TYPE_XXX = 1 << (VIRTIO_NET_HASH_REPORT_XXX - 1). */
  #enabled(report: number): boolean {
    return ((this.#types >>> (report - 1)) & 1) === 1;
  }
}

const FRAGMENT = Ipv4Fragment.offsetMask | Ipv4Fragment.moreFragments;

/** The 32 bits of the key that begin at bit `from`. */
function window(key: Uint8Array, from: number): number {
  const byte = from >>> 3;
  const shift = from & 7;
  const word = (key[byte] << 24) | (key[byte + 1] << 16) | (key[byte + 2] << 8) | key[byte + 3];
  return shift === 0 ? word : (word << shift) | (key[byte + 4] >>> (8 - shift));
}
