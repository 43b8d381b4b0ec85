/**
 * `struct virtio_net_hdr` for every negotiated layout and both wire revisions (Virtio 1.4, 5.1.9).
 *
 * A layout is made once, when the features are known. The driver's hot functions write and read headers in packet
 * memory through it; the device decodes from its own copy with `decodeNetHeader`. Flags are given and returned in the
 * ratified standard's numbers; only this file knows that the draft has others. Fields are little-endian.
 */
import { VirtioError } from '../errors.ts';
import { Ethernet, EtherType, Vlan } from '../packet/fields.ts';
import { GSO_TUNNEL, GsoSet, GsoType } from '../packet/gso.ts';
import type { MappedMemory } from '../sys/memory.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import type { WireRevision } from '../virtio/revision.ts';

/** `flags` (5.1.9), as `virtio-1.4` numbers them. */
export const NetHeaderFlag = {
  NEEDS_CSUM: 1,
  DATA_VALID: 2,
  RSC_INFO: 4,
  UDP_TUNNEL_CSUM: 8,
  SECURITY: 16,
  SECURITY_ERR: 32,
  SECURITY_SA_SOFT_EXPIRY_WARN: 64,
} as const;

export { GsoType, isAmong } from '../packet/gso.ts';

/** Offsets of the fields that every layout has (5.1.9). */
export const NetHeaderField = {
  flags: 0,
  gsoType: 1,
  hdrLen: 2,
  gsoSize: 4,
  csumStart: 6,
  csumOffset: 8,
  numBuffers: 10,
} as const;

/** Offsets of the fields that depend on features, in `virtio-1.4`; `padding_reserved` is at 18. */
const Extension = {
  hashValue: 12,
  hashReport: 16,
  outerThOffset: 20,
  innerNhOffset: 22,
  outerNhOffset: 24,
  resourceId: 26,
  resourceType: 30,
} as const;

/** Header lengths by what was negotiated (5.1.9.3.1). */
const BASIC_LENGTH = 12;
const HASH_LENGTH = 20;
const TUNNEL_LENGTH = 24;
const FULL_LENGTH = 32;
/** `resource_id` and `resource_type`, which the draft appends to the shorter layouts. */
const RESOURCE_LENGTH = 6;

/** The draft's numbers of the two security flags. */
const DRAFT_SECURITY = 8;
const DRAFT_SECURITY_ERR = 16;

/** Shortest header, and longest of any layout: the headroom that a packet needs for it. */
export const NET_HEADER_MIN = BASIC_LENGTH;
export const NET_HEADER_MAX = FULL_LENGTH;

/** Where the fields of a header are. An offset of -1: the layout has no such field. */
export interface NetHeaderLayout {
  readonly revision: WireRevision;
  /** Bytes in front of every packet. */
  readonly length: number;
  readonly hashValue: number;
  readonly hashReport: number;
  readonly outerThOffset: number;
  readonly innerNhOffset: number;
  readonly outerNhOffset: number;
  readonly resourceId: number;
  readonly resourceType: number;
  /** The wire's number of each security flag; 0 when the layout cannot express it. */
  readonly security: number;
  readonly securityErr: number;
  readonly softExpiryWarn: number;
}

/**
 * The layout that `features` select. Throws `VirtioError` HEADER_LAYOUT for a feature that the draft has no layout for
 * (OUT_NET_HEADER and the UDP tunnel features came later).
 */
export function netHeaderLayout(features: FeatureSet, revision: WireRevision): NetHeaderLayout {
  const ipsec = features.has(Feature.IPSEC);
  const hash = features.has(Feature.HASH_REPORT);
  const tunnel = features.hasAny(Feature.HOST_UDP_TUNNEL_GSO, Feature.GUEST_UDP_TUNNEL_GSO);
  const outer = features.has(Feature.OUT_NET_HEADER);
  const hashFields = { hashValue: hash ? Extension.hashValue : -1, hashReport: hash ? Extension.hashReport : -1 };

  if (revision === 'rfc-2025-01') {
    if (tunnel || outer) {
      throw new VirtioError(
        'HEADER_LAYOUT',
        `wire revision ${revision} has no header for UDP tunnels or OUT_NET_HEADER`,
      );
    }
    const resource = hash ? HASH_LENGTH : BASIC_LENGTH;
    return {
      revision,
      length: resource + (ipsec ? RESOURCE_LENGTH : 0),
      ...hashFields,
      outerThOffset: -1,
      innerNhOffset: -1,
      outerNhOffset: -1,
      resourceId: ipsec ? resource : -1,
      resourceType: ipsec ? resource + 4 : -1,
      security: ipsec ? DRAFT_SECURITY : 0,
      securityErr: ipsec ? DRAFT_SECURITY_ERR : 0,
      softExpiryWarn: 0,
    };
  }

  let length: number = BASIC_LENGTH;
  if (hash) length = HASH_LENGTH;
  if (tunnel) length = TUNNEL_LENGTH;
  if (ipsec || outer) length = FULL_LENGTH;
  return {
    revision,
    length,
    ...hashFields,
    outerThOffset: tunnel ? Extension.outerThOffset : -1,
    innerNhOffset: tunnel ? Extension.innerNhOffset : -1,
    outerNhOffset: outer ? Extension.outerNhOffset : -1,
    resourceId: ipsec ? Extension.resourceId : -1,
    resourceType: ipsec ? Extension.resourceType : -1,
    security: ipsec ? NetHeaderFlag.SECURITY : 0,
    securityErr: ipsec ? NetHeaderFlag.SECURITY_ERR : 0,
    softExpiryWarn: ipsec ? NetHeaderFlag.SECURITY_SA_SOFT_EXPIRY_WARN : 0,
  };
}

/** A decoded header. One object is reused for many packets. Fields that the layout lacks are 0. */
export class NetHeader {
  /** Bits of `NetHeaderFlag`, whatever the wire revision. */
  flags = 0;
  gsoType = 0;
  hdrLen = 0;
  gsoSize = 0;
  csumStart = 0;
  csumOffset = 0;
  numBuffers = 0;
  hashValue = 0;
  hashReport = 0;
  outerThOffset = 0;
  innerNhOffset = 0;
  outerNhOffset = 0;
  resourceId = 0;
  resourceType = 0;
}

/** Flags of the wire for flags of the standard; those that the layout cannot express are left out. */
export function wireFlags(layout: NetHeaderLayout, flags: number): number {
  const { SECURITY, SECURITY_ERR, SECURITY_SA_SOFT_EXPIRY_WARN, UDP_TUNNEL_CSUM } = NetHeaderFlag;
  const plain = layout.revision === 'virtio-1.4' ? flags & (UDP_TUNNEL_CSUM | 7) : flags & 7;
  return (
    plain |
    (flags & SECURITY ? layout.security : 0) |
    (flags & SECURITY_ERR ? layout.securityErr : 0) |
    (flags & SECURITY_SA_SOFT_EXPIRY_WARN ? layout.softExpiryWarn : 0)
  );
}

/** Flags of the standard for flags of the wire; those that mean nothing in the layout are left out. */
export function standardFlags(layout: NetHeaderLayout, wire: number): number {
  const { SECURITY, SECURITY_ERR, SECURITY_SA_SOFT_EXPIRY_WARN, UDP_TUNNEL_CSUM } = NetHeaderFlag;
  const plain = layout.revision === 'virtio-1.4' ? wire & (UDP_TUNNEL_CSUM | 7) : wire & 7;
  return (
    plain |
    (wire & layout.security ? SECURITY : 0) |
    (wire & layout.securityErr ? SECURITY_ERR : 0) |
    (wire & layout.softExpiryWarn ? SECURITY_SA_SOFT_EXPIRY_WARN : 0)
  );
}

/**
 * hot: reads the header at `bytes[at]` into `out`. Returns false, with `out` unchanged, when the header does not end
 * before `end`. Byte accesses only: `bytes` is a private copy, or packet memory that the other side has given up.
 */
export function decodeNetHeader(
  layout: NetHeaderLayout,
  bytes: Uint8Array,
  at: number,
  end: number,
  out: NetHeader,
): boolean {
  if (end > bytes.length || at + layout.length > end) return false;
  out.flags = standardFlags(layout, bytes[at]);
  out.gsoType = bytes[at + NetHeaderField.gsoType];
  out.hdrLen = get16(bytes, at + NetHeaderField.hdrLen);
  out.gsoSize = get16(bytes, at + NetHeaderField.gsoSize);
  out.csumStart = get16(bytes, at + NetHeaderField.csumStart);
  out.csumOffset = get16(bytes, at + NetHeaderField.csumOffset);
  out.numBuffers = get16(bytes, at + NetHeaderField.numBuffers);
  out.hashValue = layout.hashValue < 0 ? 0 : get32(bytes, at + layout.hashValue);
  out.hashReport = layout.hashReport < 0 ? 0 : get16(bytes, at + layout.hashReport);
  out.outerThOffset = layout.outerThOffset < 0 ? 0 : get16(bytes, at + layout.outerThOffset);
  out.innerNhOffset = layout.innerNhOffset < 0 ? 0 : get16(bytes, at + layout.innerNhOffset);
  out.outerNhOffset = layout.outerNhOffset < 0 ? 0 : get16(bytes, at + layout.outerNhOffset);
  out.resourceId = layout.resourceId < 0 ? 0 : get32(bytes, at + layout.resourceId);
  out.resourceType = layout.resourceType < 0 ? 0 : get16(bytes, at + layout.resourceType);
  return true;
}

/** hot: writes all of `layout.length` bytes of a header to `bytes[at]`. Throws RangeError when they do not fit. */
export function encodeNetHeader(layout: NetHeaderLayout, header: NetHeader, bytes: Uint8Array, at: number): void {
  if (at < 0 || at + layout.length > bytes.length)
    throw new RangeError(`no room for a header of ${layout.length} bytes`);
  for (let i = BASIC_LENGTH; i < layout.length; i++) bytes[at + i] = 0;
  bytes[at] = wireFlags(layout, header.flags);
  bytes[at + NetHeaderField.gsoType] = header.gsoType;
  put16(bytes, at + NetHeaderField.hdrLen, header.hdrLen);
  put16(bytes, at + NetHeaderField.gsoSize, header.gsoSize);
  put16(bytes, at + NetHeaderField.csumStart, header.csumStart);
  put16(bytes, at + NetHeaderField.csumOffset, header.csumOffset);
  put16(bytes, at + NetHeaderField.numBuffers, header.numBuffers);
  if (layout.hashValue >= 0) put32(bytes, at + layout.hashValue, header.hashValue);
  if (layout.hashReport >= 0) put16(bytes, at + layout.hashReport, header.hashReport);
  if (layout.outerThOffset >= 0) put16(bytes, at + layout.outerThOffset, header.outerThOffset);
  if (layout.innerNhOffset >= 0) put16(bytes, at + layout.innerNhOffset, header.innerNhOffset);
  if (layout.outerNhOffset >= 0) put16(bytes, at + layout.outerNhOffset, header.outerNhOffset);
  if (layout.resourceId >= 0) put32(bytes, at + layout.resourceId, header.resourceId);
  if (layout.resourceType >= 0) put16(bytes, at + layout.resourceType, header.resourceType);
}

/** The set of GSO types that may be sent (`HOST_…`) or may come (`GUEST_…`) with `features`: see `GsoSet`. */
export function sentGsoTypes(features: FeatureSet): number {
  const { HOST_TSO4, HOST_TSO6, HOST_USO, HOST_ECN, HOST_UDP_TUNNEL_GSO, HOST_UDP_TUNNEL_GSO_CSUM } = Feature;
  return gsoTypes(features, {
    tso4: HOST_TSO4,
    tso6: HOST_TSO6,
    uso: [HOST_USO],
    ecn: HOST_ECN,
    tunnel: HOST_UDP_TUNNEL_GSO,
    outerChecksum: HOST_UDP_TUNNEL_GSO_CSUM,
  });
}

export function receivedGsoTypes(features: FeatureSet): number {
  const { GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, GUEST_ECN } = Feature;
  return gsoTypes(features, {
    tso4: GUEST_TSO4,
    tso6: GUEST_TSO6,
    uso: [GUEST_USO4, GUEST_USO6],
    ecn: GUEST_ECN,
    tunnel: Feature.GUEST_UDP_TUNNEL_GSO,
    outerChecksum: Feature.GUEST_UDP_TUNNEL_GSO_CSUM,
  });
}

interface GsoFeatures {
  readonly tso4: number;
  readonly tso6: number;
  readonly uso: readonly number[];
  readonly ecn: number;
  readonly tunnel: number;
  readonly outerChecksum: number;
}

function gsoTypes(features: FeatureSet, of: GsoFeatures): number {
  return (
    (features.has(of.tso4) ? 1 << GsoType.TCPV4 : 0) |
    (features.has(of.tso6) ? 1 << GsoType.TCPV6 : 0) |
    (features.hasAny(...of.uso) ? 1 << GsoType.UDP_L4 : 0) |
    (features.has(of.ecn) ? GsoSet.ecn : 0) |
    (features.has(of.tunnel) ? GsoSet.tunnel : 0) |
    (features.has(of.outerChecksum) ? GsoSet.outerChecksum : 0)
  );
}

/** `hash_report` (5.1.9.4.4): which fields the hash was calculated over. */
export const HashReport = {
  NONE: 0,
  IPV4: 1,
  TCPV4: 2,
  UDPV4: 3,
  IPV6: 4,
  TCPV6: 5,
  UDPV6: 6,
  IPV6_EX: 7,
  TCPV6_EX: 8,
  UDPV6_EX: 9,
} as const;

/** Packet memory as a transmit queue writes headers: `f64` zeroes two words at once. */
export interface HeaderMemory {
  readonly u8: Uint8Array;
  readonly u32: Uint32Array;
  readonly f64: Float64Array;
}

export function headerMemory(memory: MappedMemory): HeaderMemory {
  const { u8, u32 } = memory;
  return { u8, u32, f64: new Float64Array(u8.buffer, u8.byteOffset, u8.byteLength >>> 3) };
}

/**
 * hot: the driver's transmit header at byte `at` of packet memory: everything zero but the flags, the checksum fields
 * and, when the layout has one, the resource. `flags` are the wire's. Words for the shortest header in its usual place,
 * bytes for the others and for packets that were shifted.
 */
export function writeTransmitHeader(
  memory: HeaderMemory,
  at: number,
  layout: NetHeaderLayout,
  flags: number,
  csumStart: number,
  csumOffset: number,
  resourceId: number,
  resourceType: number,
): void {
  const { u8, u32 } = memory;
  const { length } = layout;
  if (((at & 3) | (length ^ BASIC_LENGTH)) === 0) {
    u32[at >>> 2] = flags;
    u32[(at >>> 2) + 1] = csumStart << 16;
    u32[(at >>> 2) + 2] = csumOffset;
    return;
  }
  for (let i = 0; i < length; i++) u8[at + i] = 0;
  u8[at] = flags;
  put16(u8, at + NetHeaderField.csumStart, csumStart);
  put16(u8, at + NetHeaderField.csumOffset, csumOffset);
  if (layout.resourceId >= 0) {
    put32(u8, at + layout.resourceId, resourceId);
    put16(u8, at + layout.resourceType, resourceType);
  }
}

/**
 * hot: `outer_nh_offset` for the Ethernet frame at byte `at`: where its IP header begins, behind a VLAN tag too; 0 when it has none. Bytes
 * that are there: the frame, or what follows it in its slot.
 */
export function networkHeaderOffset(u8: Uint8Array, at: number): number {
  const type = (u8[at + Ethernet.type] << 8) | u8[at + Ethernet.type + 1];
  if (type === EtherType.ipv4 || type === EtherType.ipv6) return Ethernet.length;
  if (type !== EtherType.vlan) return 0;
  const innerAt = at + Ethernet.type + Vlan.length;
  const inner = (u8[innerAt] << 8) | u8[innerAt + 1];
  return inner === EtherType.ipv4 || inner === EtherType.ipv6 ? Ethernet.length + Vlan.length : 0;
}

/** hot: adds to a header at byte `at` where the outer UDP header and the inner IP header of the packet behind it are (5.1.9.2). */
export function writeTunnel(u8: Uint8Array, at: number, layout: NetHeaderLayout, outer: number, inner: number): void {
  put16(u8, at + layout.outerThOffset, outer);
  put16(u8, at + layout.innerNhOffset, inner);
}

/** hot: adds to a header at byte `at` how the packet behind it is to be segmented: `hdrLen` bytes of headers, `gsoSize` of payload. */
export function writeSegmentation(u8: Uint8Array, at: number, gsoType: number, hdrLen: number, gsoSize: number): void {
  u8[at + NetHeaderField.gsoType] = gsoType;
  put16(u8, at + NetHeaderField.hdrLen, hdrLen);
  put16(u8, at + NetHeaderField.gsoSize, gsoSize);
}

/** hot: the shortest header at a multiple of 4 of a packet that wants nothing. */
export function writeBasicHeader(u32: Uint32Array, at: number): void {
  const w = at >> 2;
  // As it often is already: a cache line that is not written to stays with the device, which does not wait for it then.
  if ((u32[w] | u32[w + 1] | u32[w + 2]) === 0) return;
  u32[w] = 0;
  u32[w + 1] = 0;
  u32[w + 2] = 0;
}

/** hot: the full header at a multiple of 8 of a packet that wants nothing. */
export function writePlainHeader(f64: Float64Array, at: number): void {
  f64[at >> 3] = 0;
  f64[(at >> 3) + 1] = 0;
  f64[(at >> 3) + 2] = 0;
  f64[(at >> 3) + 3] = 0;
}

/**
 * hot: as `writeTransmitHeader`, for an outbound SA and the full layout of `virtio-1.4` at a multiple of 8: three double
 * words of zeros, of which the first then gets the flags, and two words with the resource, whose id crosses them.
 */
export function writeSecurityHeader(
  u32: Uint32Array,
  f64: Float64Array,
  at: number,
  flags: number,
  resourceId: number,
  resourceType: number,
): void {
  f64[at >> 3] = 0;
  f64[(at >> 3) + 1] = 0;
  f64[(at >> 3) + 2] = 0;
  u32[at >> 2] = flags;
  u32[(at >> 2) + 6] = resourceId << 16;
  u32[(at >> 2) + 7] = (resourceId >>> 16) | (resourceType << 16);
}

/**
 * hot: whether a header's flags and GSO type may be accepted at all (5.1.9.2.2 for the device, 5.1.9.4.2 for the
 * driver): not both UDP tunnel types, and a tunnel type only with an inner type and a checksum to fill. `flags` are the
 * standard's. `transmit` is the device's stricter rule for UDP_TUNNEL_CSUM.
 */
export function isAcceptable(flags: number, gsoType: number, transmit: boolean): boolean {
  const tunnel = gsoType & GSO_TUNNEL;
  if (tunnel === GSO_TUNNEL) return false;
  const needs = flags & NetHeaderFlag.NEEDS_CSUM;
  if (tunnel !== 0)
    return needs !== 0 && (flags & NetHeaderFlag.DATA_VALID) === 0 && (gsoType & ~GSO_TUNNEL) !== GsoType.NONE;
  return (flags & NetHeaderFlag.UDP_TUNNEL_CSUM) === 0 || (!transmit && needs === 0);
}

function get16(bytes: Uint8Array, at: number): number {
  return bytes[at] | (bytes[at + 1] << 8);
}

function get32(bytes: Uint8Array, at: number): number {
  return (bytes[at] | (bytes[at + 1] << 8) | (bytes[at + 2] << 16) | (bytes[at + 3] << 24)) >>> 0;
}

function put16(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value;
  bytes[at + 1] = value >>> 8;
}

function put32(bytes: Uint8Array, at: number, value: number): void {
  put16(bytes, at, value);
  put16(bytes, at + 2, value >>> 16);
}
