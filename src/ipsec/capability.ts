/**
 * What a device can do inline, and whether it can express a given SA (Virtio 1.4, VIRTIO_NET_IPSEC_SA_CAP).
 *
 * An SA object cannot say everything that an SA is. Whatever it cannot say, the device would do its own way or not at all, so such an
 * SA does not go there: `whyNotInline` names the first obstacle in words for the user.
 */
import type { SecurityAssociation } from './sa.ts';
import { algorithmFields, modeNumber, optionBits } from './sa-object.ts';
import type { IpsecWire, ModeCapability, SaLimits } from './wire/codec.ts';
import {
  AeadAlgorithm,
  CipherAlgorithm,
  IpsecMode,
  KEY_FIELD_SIZE,
  MacAlgorithm,
  nameOf,
  SaOption,
} from './wire/numbers.ts';

/** What driver and device have agreed on. */
export interface InlineCapability {
  readonly wire: IpsecWire;
  readonly limits: SaLimits;
  readonly modes: readonly ModeCapability[];
}

const modeNames: Readonly<Record<keyof typeof IpsecMode, string>> = {
  espTunnel: 'ESP tunnel',
  espTransport: 'ESP transport',
  ahTunnel: 'AH tunnel',
  ahTransport: 'AH transport',
};

const optionNames: Readonly<Record<keyof typeof SaOption, string>> = {
  esn: 'extended sequence numbers',
  udpEncap: 'UDP encapsulation',
  copyDscp: 'DSCP copy',
  decrementTtl: 'TTL decrement',
  copyDf: 'DF copy',
  ecn: 'ECN',
  lifetime: 'SA lifetime',
};

/** The name of an `IpsecMode`, for reports. */
export function modeName(mode: number): string {
  const name = nameOf(IpsecMode, mode);
  return name === undefined ? `mode ${mode}` : modeNames[name];
}

/** The names of the bits of `SaOption` in `options`, for reports. */
export function optionNamesOf(options: number): string[] {
  const names: string[] = [];
  for (let bit = 0; bit < 32; bit++) {
    if (((options >>> bit) & 1) === 0) continue;
    const name = nameOf(SaOption, 1 << bit);
    names.push(name === undefined ? `option bit ${bit}` : optionNames[name]);
  }
  return names;
}

/** The names of the algorithms that a mode offers, for reports; a number that IPsec does not use is left out. */
export function algorithmNames(entry: ModeCapability): { aeads: string[]; ciphers: string[]; macs: string[] } {
  const has = (mask: bigint, bit: number) => ((mask >> BigInt(bit)) & 1n) === 1n;
  const names = (table: Readonly<Record<string, number>>, mask: bigint) =>
    Object.keys(table).filter((name) => has(mask, table[name]));
  return {
    aeads: names(AeadAlgorithm, BigInt(entry.aeads)),
    ciphers: names(CipherAlgorithm, entry.ciphers),
    macs: names(MacAlgorithm, entry.macs),
  };
}

/** All bits of a table of algorithm numbers. */
function maskOf(table: Readonly<Record<string, number>>): bigint {
  return Object.values(table).reduce((mask, number) => mask | (1n << BigInt(number)), 0n);
}

const KNOWN_CIPHERS = maskOf(CipherAlgorithm);
const KNOWN_MACS = maskOf(MacAlgorithm);
const KNOWN_AEADS = Number(maskOf(AeadAlgorithm));

/**
 * What the driver sets in DRIVER_CAP_SET: what the device offers, without modes, options and algorithms that this driver or the
 * revision does not know, and without longer keys than an object holds.
 */
export function driverModes(offered: readonly ModeCapability[], wire: IpsecWire): ModeCapability[] {
  const known = offered.filter((entry) => nameOf(IpsecMode, entry.mode) !== undefined);
  return known.map((entry) => ({
    mode: entry.mode,
    maxReplayWindow: entry.maxReplayWindow,
    options: (entry.options & wire.options) >>> 0,
    ciphers: entry.ciphers & KNOWN_CIPHERS,
    macs: entry.macs & KNOWN_MACS,
    aeads: (entry.aeads & KNOWN_AEADS) >>> 0,
    maxCipherKeyLength: Math.min(entry.maxCipherKeyLength, KEY_FIELD_SIZE),
    maxAuthKeyLength: Math.min(entry.maxAuthKeyLength, KEY_FIELD_SIZE),
  }));
}

/** Why the device cannot take `sa`, or null when it can express all of it. Never names key material. */
export function whyNotInline(sa: SecurityAssociation, capability: InlineCapability): string | null {
  const limit = sa.direction === 'outbound' ? capability.limits.outbound : capability.limits.inbound;
  if (limit === 0) return `the device takes no ${sa.direction} SAs`;
  const mode = modeNumber(sa);
  const entry = capability.modes.find((one) => one.mode === mode);
  if (entry === undefined) return `the device does not offer ${modeName(mode)}`;
  const missing = (optionBits(sa) & ~(entry.options & capability.wire.options)) >>> 0;
  if (missing !== 0) return `the device does not offer ${optionNamesOf(missing).join(' and ')} in ${modeName(mode)}`;
  return whyNotObject(sa, capability.wire) ?? whyNotAlgorithms(sa, entry) ?? whyNotWindow(sa, entry);
}

/** What no device of the revision can be told. */
function whyNotObject(sa: SecurityAssociation, wire: IpsecWire): string | null {
  if (sa.udpEncap?.originalSource ?? sa.udpEncap?.originalDestination)
    return 'addresses before NAT are not expressible';
  if (sa.tfcPadding > 0) return 'TFC padding is not expressible';
  if (sa.direction === 'outbound' && sa.initial.iv !== undefined) return 'an initial IV is not expressible';
  const usual = sa.direction === 'outbound' ? 1n : 0n;
  if (sa.initial.sequence !== usual) {
    if (!wire.hasInitialSequence) return 'an initial sequence number is not expressible';
    if (!sa.options.esn) return 'an initial sequence number is expressible with extended sequence numbers only';
  }
  const fields = algorithmFields(sa);
  if (fields === null) return 'NULL authentication is not expressible';
  const { icvLength, impliedIcvLength } = fields;
  if (icvLength !== impliedIcvLength) return `ICV length ${icvLength} is not expressible`;
  if (fields.cipherKey.length > KEY_FIELD_SIZE)
    return `${sa.cipher?.name ?? sa.aead?.name} key does not fit the SA object`;
  if (fields.authKey.length > KEY_FIELD_SIZE) return `${sa.auth?.name ?? sa.aead?.name} key does not fit the SA object`;
  return null;
}

function whyNotAlgorithms(sa: SecurityAssociation, entry: ModeCapability): string | null {
  const fields = algorithmFields(sa);
  if (fields === null) return 'NULL authentication is not expressible';
  const where = modeName(entry.mode);
  const has = (mask: bigint, bit: number) => ((mask >> BigInt(bit)) & 1n) === 1n;
  if (fields.kind === 'aead') {
    if (!has(BigInt(entry.aeads), fields.cipherAlgorithm))
      return `the device does not offer ${sa.aead?.name} in ${where}`;
  } else {
    if (sa.protocol === 'esp' && !has(entry.ciphers, fields.cipherAlgorithm)) {
      return `the device does not offer ${sa.cipher?.name ?? 'null'} in ${where}`;
    }
    if (!has(entry.macs, fields.authAlgorithm)) {
      return `the device does not offer ${sa.auth?.name ?? sa.aead?.name} in ${where}`;
    }
  }
  if (fields.cipherKey.length > entry.maxCipherKeyLength) {
    return `the device takes cipher keys of up to ${entry.maxCipherKeyLength} bytes in ${where}`;
  }
  if (fields.authKey.length > entry.maxAuthKeyLength) {
    return `the device takes authentication keys of up to ${entry.maxAuthKeyLength} bytes in ${where}`;
  }
  return null;
}

function whyNotWindow(sa: SecurityAssociation, entry: ModeCapability): string | null {
  if (sa.direction === 'outbound' || sa.replayWindow <= entry.maxReplayWindow) return null;
  return `the device has replay windows of up to ${entry.maxReplayWindow} packets in ${modeName(entry.mode)}`;
}
