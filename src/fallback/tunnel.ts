/**
 * Outer headers (RFC 4301, 5.1.2) and explicit congestion notification through a tunnel (RFC 6040).
 *
 * | outer field     | out                                                     | in                              |
 * |-----------------|---------------------------------------------------------|---------------------------------|
 * | DSCP            | of the tunnel, or the inner one (`copyDscp`)            | dropped                         |
 * | ECN             | 0, or the inner one (`ecn`: RFC 6040 normal mode)       | merged (`ecn`), else dropped    |
 * | DF              | of the tunnel, or the inner one (IPv4 in IPv4, `copyDf`)| dropped                         |
 * | identification  | counted                                                 |                                 |
 * | TTL, hop limit  | of the tunnel; the inner one 1 less (`decrementTtl`)    | inner 1 less (`decrementTtl`)   |
 * | flow label      | of the tunnel                                           | dropped                         |
 *
 * Headers are written as 16 and 32-bit words: they begin at even offsets, mostly 2 modulo 4 behind an Ethernet header.
 * A word read or written that way has its bytes swapped against the number it stands for; a checksum does not care.
 */
import type { Tunnel } from '../ipsec/sa.ts';
import { updateChecksum } from '../packet/checksum.ts';
import { Ipv4, Ipv6 } from '../packet/fields.ts';
import { Outer, SaWord } from './sa-table.ts';
import { Verdict } from './verdict.ts';

/** DF, as its 16-bit word is in memory. */
const DF = 0x0040;

/**
 * Writes the constant part of the outer header into an SA's record: the template and its sum.
 * `record` is the record's first word, `protocol` what follows the header (ESP, AH or UDP).
 */
export function writeTemplate(words: Int32Array, record: number, tunnel: Tunnel, protocol: number): void {
  const bytes = new Uint8Array(words.buffer, words.byteOffset + 4 * (record + SaWord.outer), Ipv6.length);
  bytes.fill(0);
  let checksum = 0;
  if (tunnel.source.length === 4) {
    bytes[Ipv4.versionIhl] = 0x45;
    bytes[Ipv4.ttl] = tunnel.ttl;
    bytes[Ipv4.protocol] = protocol;
    bytes.set(tunnel.source, Ipv4.source);
    bytes.set(tunnel.destination, Ipv4.destination);
    let sum = 0;
    for (let i = 0; i < Ipv4.minLength; i += 2) sum += bytes[i] | (bytes[i + 1] << 8);
    words[record + SaWord.outer4Source] = words[record + SaWord.outer + 3];
    words[record + SaWord.outer4Destination] = words[record + SaWord.outer + 4];
    checksum = (sum & 0xffff) + (sum >>> 16);
  } else {
    bytes[0] = 0x60;
    bytes[1] = tunnel.flowLabel >>> 16;
    bytes[2] = (tunnel.flowLabel >>> 8) & 0xff;
    bytes[3] = tunnel.flowLabel & 0xff;
    bytes[Ipv6.nextHeader] = protocol;
    bytes[Ipv6.hopLimit] = tunnel.ttl;
    bytes.set(tunnel.source, Ipv6.source);
    bytes.set(tunnel.destination, Ipv6.destination);
  }
  words[record + SaWord.outerFields] =
    (tunnel.ttl << Outer.ttl) |
    (tunnel.dscp << (2 + Outer.tos)) |
    (((checksum & 0xffff) + (checksum >>> 16)) << Outer.sum);
}

/**
 * Writes an outer IPv4 header at the even offset `outer`, from the template in the SA's record. `total` is the length of
 * the whole packet, `tos` DSCP and ECN, `identification` any 16 bits. When the header is not aligned to four bytes, the two
 * bytes before it are there and are written again.
 */
export function writeOuter4(
  u16: Uint16Array,
  u32: Uint32Array,
  outer: number,
  words: Int32Array,
  record: number,
  total: number,
  tos: number,
  identification: number,
  df: boolean,
): void {
  // hot:
  const version = 0x45 | (tos << 8);
  const length = ((total & 0xff) << 8) | (total >> 8);
  const flags = df ? DF : 0;
  let check = ((words[record + SaWord.outerFields] >>> Outer.sum) + (tos << 8) + length + identification + flags) | 0;
  check = (check & 0xffff) + (check >>> 16);
  check = ~(check + (check >>> 16)) & 0xffff;
  const life = words[record + SaWord.outer + 2];
  const source = words[record + SaWord.outer + 3];
  const destination = words[record + SaWord.outer + 4];
  if ((outer & 3) === 0) {
    const o = outer >> 2;
    u32[o] = version | (length << 16);
    u32[o + 1] = identification | (flags << 16);
    u32[o + 2] = life | (check << 16);
    u32[o + 3] = source;
    u32[o + 4] = destination;
  } else {
    const o = outer >> 2;
    u32[o] = u16[(outer >> 1) - 1] | (version << 16);
    u32[o + 1] = length | (identification << 16);
    u32[o + 2] = flags | (life << 16);
    u32[o + 3] = check | (source << 16);
    u32[o + 4] = (source >>> 16) | (destination << 16);
    u16[(outer >> 1) + 9] = destination >>> 16;
  }
}

/** Writes an outer IPv6 header; `payload` is the length of what follows it, `tos` the traffic class. */
export function writeOuter6(
  u16: Uint16Array,
  o: number,
  template: Uint16Array,
  t: number,
  payload: number,
  tos: number,
): void {
  // hot:
  u16[o] = template[t] | (tos >>> 4) | ((tos & 15) << 12);
  u16[o + 1] = template[t + 1];
  u16[o + 2] = ((payload & 0xff) << 8) | (payload >>> 8);
  for (let k = 3; k < 20; k++) u16[o + k] = template[t + k];
}

/** DSCP and ECN of the IP header at `ip`. */
export function trafficClass(u8: Uint8Array, ip: number): number {
  // hot:
  const first = u8[ip];
  return first >>> 4 === 4 ? u8[ip + Ipv4.tos] : ((first & 15) << 4) | (u8[ip + 1] >>> 4);
}

/** Replaces DSCP and ECN of the IP header at `ip`, with the checksum of IPv4. */
export function setTrafficClass(u8: Uint8Array, ip: number, value: number): void {
  // hot:
  if (u8[ip] >>> 4 === 4) {
    const old = u8[ip + Ipv4.tos];
    u8[ip + Ipv4.tos] = value;
    // The changed byte is the low one of its word.
    const check = updateChecksum((u8[ip + Ipv4.checksum] << 8) | u8[ip + Ipv4.checksum + 1], old, value);
    u8[ip + Ipv4.checksum] = check >>> 8;
    u8[ip + Ipv4.checksum + 1] = check & 0xff;
  } else {
    u8[ip] = (u8[ip] & 0xf0) | (value >>> 4);
    u8[ip + 1] = (u8[ip + 1] & 0x0f) | ((value & 15) << 4);
  }
}

/** Lowers TTL or hop limit of the IP header at `ip` by one. `Verdict.ttl` when it would become 0: the packet must not go on. */
export function decrementTtl(u8: Uint8Array, ip: number): number {
  // hot:
  if (u8[ip] >>> 4 === 6) {
    const limit = u8[ip + Ipv6.hopLimit];
    if (limit <= 1) return Verdict.ttl;
    u8[ip + Ipv6.hopLimit] = limit - 1;
    return Verdict.ok;
  }
  const ttl = u8[ip + Ipv4.ttl];
  if (ttl <= 1) return Verdict.ttl;
  u8[ip + Ipv4.ttl] = ttl - 1;
  // The word that holds the TTL shrinks by 0x0100, so the checksum grows by as much, with end-around carry.
  let check = ((u8[ip + Ipv4.checksum] << 8) | u8[ip + Ipv4.checksum + 1]) + 0x0100;
  check += check >= 0xffff ? 1 : 0;
  u8[ip + Ipv4.checksum] = (check >>> 8) & 0xff;
  u8[ip + Ipv4.checksum + 1] = check & 0xff;
  return Verdict.ok;
}

/** ECN codepoints (RFC 3168, 5). */
const Ecn = { notEct: 0, ect1: 1, ect0: 2, ce: 3 } as const;

/** The result that says that the packet must be dropped. */
export const ECN_DROP = 4;

/** ECN after decapsulation, by inner << 2 | outer (RFC 6040, figure 4). */
export const ecnAfter = new Uint8Array([
  // inner Not-ECT: outer Not-ECT, ECT(1), ECT(0), CE
  Ecn.notEct,
  Ecn.notEct,
  Ecn.notEct,
  ECN_DROP,
  // inner ECT(1)
  Ecn.ect1,
  Ecn.ect1,
  Ecn.ect1,
  Ecn.ce,
  // inner ECT(0)
  Ecn.ect0,
  Ecn.ect1,
  Ecn.ect0,
  Ecn.ce,
  // inner CE
  Ecn.ce,
  Ecn.ce,
  Ecn.ce,
  Ecn.ce,
]);
