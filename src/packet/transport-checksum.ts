/**
 * Whether the TCP or UDP checksum of a frame is right (RFC 9293, 3.1; RFC 768; RFC 8200, 8.1): the outermost one.
 *
 * Left out: fragments and what is neither TCP nor UDP, of which nothing is said.
 */
import { addBytes, addWords, finish, ipv4PseudoSum, ipv6PseudoSum } from './checksum.ts';
import { Ethernet, EtherType, IpProtocol, Ipv4, Ipv4Fragment, Ipv6, Ipv6Extension, Tcp, Udp, Vlan } from './fields.ts';

export const ChecksumState = {
  /** There is none, or it cannot be checked. */
  none: 0,
  valid: 1,
  wrong: 2,
} as const;

const MAX_EXTENSIONS = 8;
const FRAGMENT = Ipv4Fragment.offsetMask | Ipv4Fragment.moreFragments;

/** Memory that frames are in; `u8` and `u16` begin at the same byte. */
interface FrameMemory {
  readonly u8: Uint8Array;
  readonly u16: Uint16Array;
}

/** The state of the checksum of the Ethernet frame of `length` bytes at byte `at`. */
export function transportChecksum(memory: FrameMemory, at: number, length: number): number {
  // hot:
  const { u8 } = memory;
  const end = at + length;
  let ip = at + Ethernet.length;
  if (ip + Ipv4.minLength > end) return ChecksumState.none;
  let type = (u8[ip - 2] << 8) | u8[ip - 1];
  if (type === EtherType.vlan) {
    ip += Vlan.length;
    type = (u8[ip - 2] << 8) | u8[ip - 1];
  }
  if (type === EtherType.ipv4 && ip + Ipv4.minLength <= end) return ipv4State(memory, ip, end);
  if (type === EtherType.ipv6 && ip + Ipv6.length <= end) return ipv6State(memory, ip, end);
  return ChecksumState.none;
}

function ipv4State(memory: FrameMemory, ip: number, end: number): number {
  // hot:
  const { u8 } = memory;
  const header = (u8[ip + Ipv4.versionIhl] & 0xf) * 4;
  const total = word(u8, ip + Ipv4.totalLength);
  const isWhole = (word(u8, ip + Ipv4.flagsFragment) & FRAGMENT) === 0;
  if (u8[ip] >>> 4 !== 4 || header < Ipv4.minLength || total < header || ip + total > end || !isWhole) {
    return ChecksumState.none;
  }
  const protocol = u8[ip + Ipv4.protocol];
  const bytes = total - header;
  return state(memory, protocol, ip + header, bytes, ipv4PseudoSum(u8, ip, protocol, bytes));
}

function ipv6State(memory: FrameMemory, ip: number, end: number): number {
  // hot:
  const { u8 } = memory;
  const last = ip + Ipv6.length + word(u8, ip + Ipv6.payloadLength);
  if (u8[ip] >>> 4 !== 6 || last > end) return ChecksumState.none;
  let next = u8[ip + Ipv6.nextHeader];
  let at = ip + Ipv6.length;
  for (let i = 0; i < MAX_EXTENSIONS && at + Ipv6Extension.unit <= last; i++) {
    if (next !== IpProtocol.hopByHop && next !== IpProtocol.destinationOptions) break;
    next = u8[at + Ipv6Extension.nextHeader];
    at += (u8[at + Ipv6Extension.lengthUnits] + 1) * Ipv6Extension.unit;
  }
  return state(memory, next, at, last - at, ipv6PseudoSum(u8, ip, next, last - at));
}

/** `bytes` of `protocol` at `at`, under the sum of their pseudo header. */
function state({ u8, u16 }: FrameMemory, protocol: number, at: number, bytes: number, pseudo: number): number {
  // hot:
  const isUdp = protocol === IpProtocol.udp;
  if (isUdp) {
    if (bytes < Udp.length || word(u8, at + Udp.udpLength) !== bytes) return ChecksumState.none;
    // Over IPv4, 0 is none; over IPv6 it is for tunnels alone (RFC 6935), which are not told apart here.
    if (word(u8, at + Udp.checksum) === 0) return ChecksumState.none;
  } else if (protocol !== IpProtocol.tcp || bytes < Tcp.minLength) {
    return ChecksumState.none;
  }
  const sum = (at & 1) === 0 ? addWords(u16, u8, at, bytes, pseudo) : addBytes(u8, at, bytes, pseudo);
  return finish(sum) === 0 ? ChecksumState.valid : ChecksumState.wrong;
}

/** hot: */
function word(u8: Uint8Array, at: number): number {
  return (u8[at] << 8) | u8[at + 1];
}
