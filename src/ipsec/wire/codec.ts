/**
 * IPsec capabilities and SA objects as they travel in administration commands (Virtio 1.4, 5.1.6.5.x "IPsec Operation" and
 * the crypto device's 5.9.7.12 "IPsec Service Operation").
 *
 * One interface for both wire revisions and both directions: the driver and the software device use the same code. A revision is
 * a table of offsets (`virtio-1.4.ts`, `rfc-2025-01.ts`); nobody else knows one. Structures shorter than expected read
 * as if zeros followed, longer ones are cut, as the standard asks of both sides.
 *
 * Not here: what an SA of ours becomes as an object (`../sa-object.ts`), and which objects a device can take (`../capability.ts`).
 */
import { VirtioError } from '../../errors.ts';
import {
  get8,
  get16,
  get32,
  get64,
  getBytes,
  put8,
  put16,
  put32,
  put64,
  putBytes,
} from '../../virtio/little-endian.ts';
import type { WireRevision } from '../../virtio/revision.ts';
import { DEFAULT_TUNNEL_TYPE_BASE, KEY_FIELD_SIZE } from './numbers.ts';

export type { WireRevision };

/** VIRTIO_NET_IPSEC_RESOURCE_CAP: object ids run from 0 to limit - 1. */
export interface SaLimits {
  readonly inbound: number;
  readonly outbound: number;
}

/** One entry of VIRTIO_NET_IPSEC_SA_CAP: what one `IpsecMode` can do. */
export interface ModeCapability {
  /** `IpsecMode`. */
  readonly mode: number;
  /** Packets. */
  readonly maxReplayWindow: number;
  /** Bits of `SaOption`. */
  readonly options: number;
  /** Bit n is cipher n. */
  readonly ciphers: bigint;
  /** Bit n is MAC n. */
  readonly macs: bigint;
  /** Bit n is AEAD n. */
  readonly aeads: number;
  /** Bytes. */
  readonly maxCipherKeyLength: number;
  readonly maxAuthKeyLength: number;
}

/** `struct virtio_crypto_ipsec_tunnel_param`. */
export interface TunnelParameters {
  /** 4 or 16 bytes each, network order, both of one family. */
  readonly source: Uint8Array;
  readonly destination: Uint8Array;
  /** The 6-bit value. */
  readonly dscp: number;
  /** IPv4 only. */
  readonly df: boolean;
  /** TTL or hop limit. */
  readonly ttl: number;
  /** IPv6 only: 20 bits. */
  readonly flowLabel: number;
}

/** The fields of an SA object; numbers as on the wire, keys and salt as byte strings. */
export interface SaObject {
  /** `IpsecMode`. */
  readonly mode: number;
  /** `SaDirection`. */
  readonly direction: number;
  readonly objectId: number;
  readonly spi: number;
  /** 4 bytes, the first ones of the nonce in order. */
  readonly salt: Uint8Array;
  /** Bits of `SaOption`, 64 bits wide here. */
  readonly options: bigint;
  /** Null when the parameters are all zero, which is right for transport mode and for inbound SAs. */
  readonly tunnel: TunnelParameters | null;
  readonly udpSourcePort: number;
  readonly udpDestinationPort: number;
  /** Packets; 0 is no replay check. */
  readonly replayWindow: number;
  /** A cipher number; an AEAD number when `authAlgorithm` is 0. */
  readonly cipherAlgorithm: bigint;
  /** 0 to 32 bytes. */
  readonly cipherKey: Uint8Array;
  readonly authAlgorithm: bigint;
  /** 0 to 32 bytes. */
  readonly authKey: Uint8Array;
  /** 0 is no limit. Absent from the draft: all 0 there. */
  readonly softPackets: bigint;
  readonly softBytes: bigint;
  readonly hardPackets: bigint;
  readonly hardBytes: bigint;
  /** `esn` of the draft; 0 in Virtio 1.4, which has no such field. */
  readonly esn: bigint;
}

/** Encodes and decodes one wire revision. Decoding throws VirtioError `MALFORMED_CAPABILITY` or `MALFORMED_OBJECT`. */
export interface IpsecWire {
  readonly revision: WireRevision;
  /** Bytes of an SA object. */
  readonly saObjectSize: number;
  /** Bits of `SaOption` that the revision defines. */
  readonly options: number;
  /** Whether an SA object can say with which sequence number it starts. */
  readonly hasInitialSequence: boolean;

  encodeSaLimits(limits: SaLimits): Uint8Array;
  decodeSaLimits(bytes: Uint8Array): SaLimits;
  encodeModes(modes: readonly ModeCapability[]): Uint8Array;
  decodeModes(bytes: Uint8Array): ModeCapability[];
  /**
   * Writes `saObjectSize` bytes at the start of `out`. Throws RangeError when a value does not fit its field, before it writes
   * anything. `out` then holds keys: the caller wipes it.
   */
  encodeSa(object: SaObject, out: Uint8Array): void;
  /** The keys of the result are copies. */
  decodeSa(bytes: Uint8Array): SaObject;
}

export interface WireOptions {
  /** Number of the tunnel type IPv4; IPv6 is the next one. */
  readonly tunnelTypeBase?: 0 | 1;
}

/** Offsets and sizes of one revision, in bytes. */
export interface WireLayout {
  readonly revision: WireRevision;
  readonly options: number;
  readonly modeCapability: {
    readonly size: number;
    readonly mode: number;
    readonly maxReplayWindow: number;
    readonly options: number;
    readonly ciphers: number;
    readonly macs: number;
    readonly aeads: number;
    readonly maxCipherKeyLength: number;
    readonly maxAuthKeyLength: number;
  };
  readonly sa: {
    readonly size: number;
    readonly mode: number;
    readonly direction: number;
    readonly objectId: number;
    readonly spi: number;
    readonly salt: number;
    readonly options: number;
    readonly tunnelType: number;
    readonly tunnel: number;
    readonly tunnelSize: number;
    /** Present in the draft only. */
    readonly esn?: number;
    readonly udpSourcePort: number;
    readonly udpDestinationPort: number;
    readonly replayWindow: number;
    readonly cipherAlgorithm: number;
    readonly cipherKey: KeyLayout;
    readonly authAlgorithm: number;
    readonly authKey: KeyLayout;
    /** Present in Virtio 1.4 only. */
    readonly lifetime?: {
      readonly softPackets: number;
      readonly softBytes: number;
      readonly hardPackets: number;
      readonly hardBytes: number;
    };
  };
}

export interface KeyLayout {
  readonly length: number;
  readonly data: number;
}

/** VIRTIO_NET_IPSEC_RESOURCE_CAP, `struct virtio_crypto_ipsec_resource_cap`: the same in both revisions. */
const LimitsLayout = { size: 8, inbound: 0, outbound: 4 } as const;

/** VIRTIO_NET_IPSEC_SA_CAP, `struct virtio_crypto_ipsec_sa_cap_data`: the same in both revisions. */
const ModesLayout = { count: 0, entries: 8, maxCount: 255 } as const;

/** The unions of `struct virtio_crypto_ipsec_tunnel_param`, from the start of the union: the same in both revisions but for padding. */
const TunnelV4 = { source: 0, destination: 4, dscp: 8, df: 9, ttl: 10 } as const;
const TunnelV6 = { source: 0, destination: 16, flowLabel: 32, hopLimit: 36, dscp: 37 } as const;

const U16_MAX = 0xffff;
const U32_MAX = 0xffffffff;
const U64_MAX = 0xffffffffffffffffn;
const DSCP_MAX = 63;
const FLOW_LABEL_MAX = 0xfffff;

/** A codec for `layout`. */
export function makeIpsecWire(layout: WireLayout, options: WireOptions = {}): IpsecWire {
  const tunnelTypeBase = options.tunnelTypeBase ?? DEFAULT_TUNNEL_TYPE_BASE;
  return {
    revision: layout.revision,
    saObjectSize: layout.sa.size,
    options: layout.options,
    hasInitialSequence: layout.sa.esn !== undefined,
    encodeSaLimits,
    decodeSaLimits,
    encodeModes: (modes) => encodeModes(layout.modeCapability, modes),
    decodeModes: (bytes) => decodeModes(layout.modeCapability, bytes),
    encodeSa: (object, out) => encodeSa(layout, tunnelTypeBase, object, out),
    decodeSa: (bytes) => decodeSa(layout, tunnelTypeBase, bytes),
  };
}

function encodeSaLimits(limits: SaLimits): Uint8Array {
  checkNumber('inbound limit', limits.inbound, U32_MAX);
  checkNumber('outbound limit', limits.outbound, U32_MAX);
  const out = new Uint8Array(LimitsLayout.size);
  put32(out, LimitsLayout.inbound, limits.inbound);
  put32(out, LimitsLayout.outbound, limits.outbound);
  return out;
}

function decodeSaLimits(bytes: Uint8Array): SaLimits {
  return { inbound: get32(bytes, LimitsLayout.inbound), outbound: get32(bytes, LimitsLayout.outbound) };
}

function encodeModes(at: WireLayout['modeCapability'], modes: readonly ModeCapability[]): Uint8Array {
  if (modes.length > ModesLayout.maxCount) throw new RangeError(`${modes.length} modes`);
  const out = new Uint8Array(ModesLayout.entries + modes.length * at.size);
  put8(out, ModesLayout.count, modes.length);
  let base: number = ModesLayout.entries;
  for (const entry of modes) {
    put8(out, base + at.mode, checkNumber('mode', entry.mode, 0xff));
    put32(out, base + at.maxReplayWindow, checkNumber('replay window', entry.maxReplayWindow, U32_MAX));
    put32(out, base + at.options, checkNumber('options', entry.options, U32_MAX));
    put64(out, base + at.ciphers, checkBig('ciphers', entry.ciphers));
    put64(out, base + at.macs, checkBig('MACs', entry.macs));
    put32(out, base + at.aeads, checkNumber('AEADs', entry.aeads, U32_MAX));
    put32(out, base + at.maxCipherKeyLength, checkNumber('cipher key length', entry.maxCipherKeyLength, U32_MAX));
    put32(out, base + at.maxAuthKeyLength, checkNumber('auth key length', entry.maxAuthKeyLength, U32_MAX));
    base += at.size;
  }
  return out;
}

function decodeModes(at: WireLayout['modeCapability'], bytes: Uint8Array): ModeCapability[] {
  const count = get8(bytes, ModesLayout.count);
  if (ModesLayout.entries + count * at.size > bytes.length && count > 0) {
    throw new VirtioError(
      'MALFORMED_CAPABILITY',
      `the IPsec SA capability names ${count} modes in ${bytes.length} bytes, which do not hold them`,
    );
  }
  const modes: ModeCapability[] = [];
  const seen = new Set<number>();
  for (let base: number = ModesLayout.entries; modes.length < count; base += at.size) {
    const mode = get8(bytes, base + at.mode);
    if (seen.has(mode)) {
      throw new VirtioError('MALFORMED_CAPABILITY', `the IPsec SA capability describes mode ${mode} twice`);
    }
    seen.add(mode);
    modes.push({
      mode,
      maxReplayWindow: get32(bytes, base + at.maxReplayWindow),
      options: get32(bytes, base + at.options),
      ciphers: get64(bytes, base + at.ciphers),
      macs: get64(bytes, base + at.macs),
      aeads: get32(bytes, base + at.aeads),
      maxCipherKeyLength: get32(bytes, base + at.maxCipherKeyLength),
      maxAuthKeyLength: get32(bytes, base + at.maxAuthKeyLength),
    });
  }
  return modes;
}

function encodeSa(layout: WireLayout, tunnelTypeBase: number, object: SaObject, out: Uint8Array): void {
  const at = layout.sa;
  checkSa(layout, object, out);
  out.fill(0, 0, at.size);
  put8(out, at.mode, object.mode);
  put8(out, at.direction, object.direction);
  put32(out, at.objectId, object.objectId);
  put32(out, at.spi, object.spi);
  putBytes(out, at.salt, object.salt);
  put64(out, at.options, object.options);
  if (object.tunnel !== null) encodeTunnel(at, tunnelTypeBase, object.tunnel, out);
  if (at.esn !== undefined) put64(out, at.esn, object.esn);
  put16(out, at.udpSourcePort, object.udpSourcePort);
  put16(out, at.udpDestinationPort, object.udpDestinationPort);
  put32(out, at.replayWindow, object.replayWindow);
  put64(out, at.cipherAlgorithm, object.cipherAlgorithm);
  put16(out, at.cipherKey.length, object.cipherKey.length);
  putBytes(out, at.cipherKey.data, object.cipherKey);
  put64(out, at.authAlgorithm, object.authAlgorithm);
  put16(out, at.authKey.length, object.authKey.length);
  putBytes(out, at.authKey.data, object.authKey);
  if (at.lifetime !== undefined) {
    put64(out, at.lifetime.softPackets, object.softPackets);
    put64(out, at.lifetime.softBytes, object.softBytes);
    put64(out, at.lifetime.hardPackets, object.hardPackets);
    put64(out, at.lifetime.hardBytes, object.hardBytes);
  }
}

function encodeTunnel(at: WireLayout['sa'], typeBase: number, tunnel: TunnelParameters, out: Uint8Array): void {
  if (tunnel.source.length === 4) {
    put8(out, at.tunnelType, typeBase);
    putBytes(out, at.tunnel + TunnelV4.source, tunnel.source);
    putBytes(out, at.tunnel + TunnelV4.destination, tunnel.destination);
    put8(out, at.tunnel + TunnelV4.dscp, tunnel.dscp);
    put8(out, at.tunnel + TunnelV4.df, tunnel.df ? 1 : 0);
    put8(out, at.tunnel + TunnelV4.ttl, tunnel.ttl);
  } else {
    put8(out, at.tunnelType, typeBase + 1);
    putBytes(out, at.tunnel + TunnelV6.source, tunnel.source);
    putBytes(out, at.tunnel + TunnelV6.destination, tunnel.destination);
    put32(out, at.tunnel + TunnelV6.flowLabel, tunnel.flowLabel);
    put8(out, at.tunnel + TunnelV6.hopLimit, tunnel.ttl);
    put8(out, at.tunnel + TunnelV6.dscp, tunnel.dscp);
  }
}

/** Every value fits its field, and the revision has a field for it. The message never holds a value that could be a key. */
function checkSa(layout: WireLayout, object: SaObject, out: Uint8Array): void {
  if (out.length < layout.sa.size)
    throw new RangeError(`an SA object needs ${layout.sa.size} bytes, not ${out.length}`);
  checkNumber('mode', object.mode, 0xff);
  checkNumber('direction', object.direction, 0xff);
  checkNumber('obj_id', object.objectId, U32_MAX);
  checkNumber('spi', object.spi, U32_MAX);
  checkLength('salt', object.salt, 4, 4);
  checkBig('options', object.options);
  checkNumber('udp_sport', object.udpSourcePort, U16_MAX);
  checkNumber('udp_dport', object.udpDestinationPort, U16_MAX);
  checkNumber('replay_win_sz', object.replayWindow, U32_MAX);
  checkBig('cipher_algo', object.cipherAlgorithm);
  checkBig('auth_algo', object.authAlgorithm);
  checkLength('cipher_key', object.cipherKey, 0, KEY_FIELD_SIZE);
  checkLength('auth_key', object.authKey, 0, KEY_FIELD_SIZE);
  const lifetime = [object.softPackets, object.softBytes, object.hardPackets, object.hardBytes];
  for (const limit of lifetime) checkBig('lifetime', limit);
  if (layout.sa.lifetime === undefined && lifetime.some((limit) => limit !== 0n)) {
    throw new RangeError(`${layout.revision} has no lifetime`);
  }
  checkBig('esn', object.esn);
  if (layout.sa.esn === undefined && object.esn !== 0n) throw new RangeError(`${layout.revision} has no esn`);
  const tunnel = object.tunnel;
  if (tunnel === null) return;
  if (tunnel.source.length !== 4) checkLength('tunnel source', tunnel.source, 16, 16);
  checkLength('tunnel destination', tunnel.destination, tunnel.source.length, tunnel.source.length);
  checkNumber('tunnel dscp', tunnel.dscp, DSCP_MAX);
  checkNumber('tunnel ttl', tunnel.ttl, 0xff);
  checkNumber('tunnel flabel', tunnel.flowLabel, tunnel.source.length === 16 ? FLOW_LABEL_MAX : 0);
  if (tunnel.df && tunnel.source.length === 16) throw new RangeError('IPv6 has no DF bit');
}

function decodeSa(layout: WireLayout, tunnelTypeBase: number, bytes: Uint8Array): SaObject {
  const at = layout.sa;
  return {
    mode: get8(bytes, at.mode),
    direction: get8(bytes, at.direction),
    objectId: get32(bytes, at.objectId),
    spi: get32(bytes, at.spi),
    salt: getBytes(bytes, at.salt, 4),
    options: get64(bytes, at.options),
    tunnel: decodeTunnel(at, tunnelTypeBase, bytes),
    udpSourcePort: get16(bytes, at.udpSourcePort),
    udpDestinationPort: get16(bytes, at.udpDestinationPort),
    replayWindow: get32(bytes, at.replayWindow),
    cipherAlgorithm: get64(bytes, at.cipherAlgorithm),
    cipherKey: decodeKey('cipher_key', at.cipherKey, bytes),
    authAlgorithm: get64(bytes, at.authAlgorithm),
    authKey: decodeKey('auth_key', at.authKey, bytes),
    softPackets: at.lifetime === undefined ? 0n : get64(bytes, at.lifetime.softPackets),
    softBytes: at.lifetime === undefined ? 0n : get64(bytes, at.lifetime.softBytes),
    hardPackets: at.lifetime === undefined ? 0n : get64(bytes, at.lifetime.hardPackets),
    hardBytes: at.lifetime === undefined ? 0n : get64(bytes, at.lifetime.hardBytes),
    esn: at.esn === undefined ? 0n : get64(bytes, at.esn),
  };
}

function decodeKey(name: string, at: KeyLayout, bytes: Uint8Array): Uint8Array {
  const length = get16(bytes, at.length);
  if (length > KEY_FIELD_SIZE) {
    throw new VirtioError('MALFORMED_OBJECT', `${name} of ${length} bytes: the field holds ${KEY_FIELD_SIZE}`);
  }
  return getBytes(bytes, at.data, length);
}

/** All zero is null, whatever the numbers of the types are: a driver need not set the parameters of an inbound SA. */
function decodeTunnel(at: WireLayout['sa'], typeBase: number, bytes: Uint8Array): TunnelParameters | null {
  let any = get8(bytes, at.tunnelType);
  for (let i = 0; i < at.tunnelSize; i++) any |= get8(bytes, at.tunnel + i);
  if (any === 0) return null;
  const type = get8(bytes, at.tunnelType);
  if (type === typeBase) {
    return {
      source: getBytes(bytes, at.tunnel + TunnelV4.source, 4),
      destination: getBytes(bytes, at.tunnel + TunnelV4.destination, 4),
      dscp: checkDscp(get8(bytes, at.tunnel + TunnelV4.dscp)),
      df: get8(bytes, at.tunnel + TunnelV4.df) !== 0,
      ttl: get8(bytes, at.tunnel + TunnelV4.ttl),
      flowLabel: 0,
    };
  }
  if (type !== typeBase + 1) throw new VirtioError('MALFORMED_OBJECT', `tunnel type ${type} is not defined`);
  const flowLabel = get32(bytes, at.tunnel + TunnelV6.flowLabel);
  if (flowLabel > FLOW_LABEL_MAX)
    throw new VirtioError('MALFORMED_OBJECT', `flow label ${flowLabel} has more than 20 bits`);
  return {
    source: getBytes(bytes, at.tunnel + TunnelV6.source, 16),
    destination: getBytes(bytes, at.tunnel + TunnelV6.destination, 16),
    dscp: checkDscp(get8(bytes, at.tunnel + TunnelV6.dscp)),
    df: false,
    ttl: get8(bytes, at.tunnel + TunnelV6.hopLimit),
    flowLabel,
  };
}

function checkDscp(dscp: number): number {
  if (dscp > DSCP_MAX) throw new VirtioError('MALFORMED_OBJECT', `DSCP ${dscp} has more than 6 bits`);
  return dscp;
}

function checkNumber(name: string, value: number, max: number): number {
  if (!Number.isInteger(value) || value < 0 || value > max) throw new RangeError(`${name} is not in 0 to ${max}`);
  return value;
}

function checkBig(name: string, value: bigint): bigint {
  if (value < 0n || value > U64_MAX) throw new RangeError(`${name} does not fit 64 bits`);
  return value;
}

function checkLength(name: string, value: Uint8Array, min: number, max: number): void {
  if (value.length < min || value.length > max) {
    throw new RangeError(`${name} of ${value.length} bytes, not ${min === max ? min : `${min} to ${max}`}`);
  }
}
