/**
 * What an ESP action is asked to be: the structures of `ibv_flow_action_esp(3)`, checked, in the words of SAs.
 *
 * Names are those of the manual page in this language's spelling (`hard_limit_pkts` is `hardLimitPkts`). Pointers that may be NULL are
 * fields that may be absent. Lengths of structures have no counterpart. Differences:
 * - `iv` may be absent: then the implementation begins where it likes. An SA object cannot say a first IV, so only without one can the
 *   action run on a virtio device.
 * - `salt` and `aesKey` are bytes in the order in which they are used, not words.
 */
import { IpsecError } from '../../errors.ts';
import { IpProtocol } from '../../packet/fields.ts';
import type { AddressInput } from '../fields.ts';
import { SecretBytes } from '../secret.ts';
import type { SecurityAssociationInput } from '../validate.ts';
import { EspFlag, EspKeymat, EspMask, EspReplay, FlowSpecType, Ipv4SpecFlag, IvAlgorithm } from './numbers.ts';

/** `struct ibv_flow_action_esp_attr`. All but `flags` belong to full offload; absent is 0. */
export interface EspAttr {
  readonly spi?: number;
  /** Low half of the first sequence number. Encrypt: of the first packet, 0 standing for 1; decrypt: the highest already accepted. */
  readonly seq?: number;
  /** Bytes. */
  readonly tfcPad?: number;
  /** Bits of `EspFlag`. */
  readonly flags: number;
  /** 0 is none. */
  readonly hardLimitPkts?: bigint;
}

/** `struct ibv_flow_action_esp_keymat_aes_gcm`. */
export interface EspKeymatAesGcm {
  /** Explicit IV of the first packet, full offload and encryption only. */
  readonly iv?: bigint;
  /** One of `IvAlgorithm`. Default: sequential. */
  readonly ivAlgo?: number;
  /** 4 bytes. */
  readonly salt: Uint8Array;
  /** 8, 12 or 16 bytes. */
  readonly icvLen: number;
  /** 16, 24 or 32 bytes. */
  readonly aesKey: Uint8Array;
}

/** One header of the encapsulation chain, outermost first. Absent fields are 0, or what is usual. */
export type EspEncap =
  | { readonly type: typeof FlowSpecType.ipv4; readonly val: { srcIp: AddressInput; dstIp: AddressInput } }
  | { readonly type: typeof FlowSpecType.ipv4Ext; readonly val: EncapIpv4Ext }
  | { readonly type: typeof FlowSpecType.ipv6; readonly val: EncapIpv6 }
  | { readonly type: typeof FlowSpecType.udp; readonly val: { srcPort: number; dstPort: number } };

export interface EncapIpv4Ext {
  readonly srcIp: AddressInput;
  readonly dstIp: AddressInput;
  /** What follows: ESP, or UDP when the chain has it. 0 is left to the implementation. */
  readonly proto?: number;
  readonly tos?: number;
  readonly ttl?: number;
  /** Bits of `Ipv4SpecFlag`. */
  readonly flags?: number;
}

export interface EncapIpv6 {
  readonly srcIp: AddressInput;
  readonly dstIp: AddressInput;
  readonly flowLabel?: number;
  readonly nextHdr?: number;
  readonly trafficClass?: number;
  readonly hopLimit?: number;
}

/** `struct ibv_flow_action_esp`. In a modify, what is absent stays as it is. */
export interface FlowActionEspModify {
  readonly espAttr?: EspAttr;
  /** One of `EspKeymat`. Default: AES-GCM. */
  readonly keymatProto?: number;
  readonly keymat?: EspKeymatAesGcm;
  /** One of `EspReplay`. Default: bitmap when there is a `replay`. */
  readonly replayProto?: number;
  /** Full offload and decryption only: size of the bitmap in packets. */
  readonly replay?: { readonly size: number };
  /** Full offload only. */
  readonly espEncap?: readonly EspEncap[];
  /** Bits of `EspMask`. */
  readonly compMask?: number;
  /** High half of the sequence number; counts with `EspMask.esn` only. */
  readonly esn?: number;
}

/** What `createFlowActionEsp` takes. */
export interface FlowActionEspAttributes extends FlowActionEspModify {
  readonly espAttr: EspAttr;
  readonly keymat: EspKeymatAesGcm;
}

/** Attributes, checked and complete: what an action remembers. `key` and `salt` are its own copies. */
export interface EspParameters {
  readonly fullOffload: boolean;
  readonly encrypt: boolean;
  readonly transport: boolean;
  readonly newWindow: boolean;
  readonly spi: number;
  readonly seq: number;
  readonly tfcPad: number;
  readonly hardLimitPkts: bigint;
  readonly key: SecretBytes;
  readonly salt: SecretBytes;
  readonly icvLen: number;
  readonly iv: bigint | null;
  /** Null without extended sequence numbers. */
  readonly esn: number | null;
  readonly replaySize: number;
  readonly encap: readonly EspEncap[];
}

const U32 = 0xffffffff;
const U64 = (1n << 64n) - 1n;
const KNOWN_FLAGS = EspFlag.fullOffload | EspFlag.transport | EspFlag.encrypt | EspFlag.esnNewWindow;

function invalid(path: string, what: string): IpsecError {
  return new IpsecError('FLOW_ACTION_ATTRIBUTE', `${path} ${what}`, { path });
}

function integer(path: string, value: number | undefined, max: number): number {
  if (value === undefined) return 0;
  if (!Number.isInteger(value) || value < 0 || value > max) throw invalid(path, `must be an integer of 0 to ${max}`);
  return value;
}

function long(path: string, value: bigint): bigint {
  if (typeof value !== 'bigint' || value < 0n || value > U64) throw invalid(path, 'must be an integer of 64 bits');
  return value;
}

function oneOf(path: string, value: number | undefined, known: Readonly<Record<string, number>>): void {
  if (value !== undefined && !Object.values(known).includes(value)) throw invalid(path, 'is not a known number');
}

/**
 * `change` put over `before`, or complete in itself when there is none. Throws IpsecError `FLOW_ACTION_ATTRIBUTE` with the path of the field
 * that is wrong, contradicts the mode, or cannot be changed. The caller wipes `key` and `salt` of what it does not keep.
 */
export function readAttributes(change: FlowActionEspModify, before: EspParameters | null): EspParameters {
  const flags = readFlags(change.espAttr, before);
  const extended = readEsn(change, before);
  const fields = {
    ...readAttr(change.espAttr, before),
    ...readReplay(change, before),
    encap: readEncap(change, before),
  };
  const fullOffload = (flags & EspFlag.fullOffload) !== 0;
  const encrypt = (flags & EspFlag.encrypt) !== 0;
  const transport = (flags & EspFlag.transport) !== 0;
  const newWindow = (flags & EspFlag.esnNewWindow) !== 0;
  if (!fullOffload) refuseFullOffload(fields);
  else if (fields.spi === 0) throw invalid('espAttr.spi', 'must not be 0 in full offload (RFC 4303, 2.1)');
  if (newWindow && (fullOffload || extended === null)) {
    throw invalid('espAttr.flags', 'has ESN_NEW_WINDOW, which is for inline crypto with an ESN only');
  }
  if (fields.replaySize !== 0 && encrypt) throw invalid('replay', 'is for decryption only');
  checkChain(fields.encap, fullOffload, transport);
  const keymat = readKeymat(change, before);
  return { fullOffload, encrypt, transport, newWindow, ...fields, ...keymat, esn: extended };
}

function readFlags(attr: EspAttr | undefined, before: EspParameters | null): number {
  if (attr === undefined) {
    if (before === null) throw invalid('espAttr', 'is required');
    return flagsOf(before);
  }
  const flags = integer('espAttr.flags', attr.flags, U32);
  if ((flags & ~KNOWN_FLAGS) !== 0) throw invalid('espAttr.flags', 'has a flag that is not known');
  const fixed = EspFlag.fullOffload | EspFlag.encrypt;
  if (before !== null && ((flags ^ flagsOf(before)) & fixed) !== 0) {
    throw invalid('espAttr.flags', 'cannot change between encryption and decryption, inline crypto and full offload');
  }
  return flags;
}

function flagsOf({ fullOffload, transport, encrypt, newWindow }: EspParameters): number {
  return (
    (fullOffload ? EspFlag.fullOffload : EspFlag.inlineCrypto) |
    (transport ? EspFlag.transport : EspFlag.tunnel) |
    (encrypt ? EspFlag.encrypt : EspFlag.decrypt) |
    (newWindow ? EspFlag.esnNewWindow : 0)
  );
}

function readAttr(attr: EspAttr | undefined, before: EspParameters | null) {
  if (attr === undefined) {
    const { spi = 0, seq = 0, tfcPad = 0, hardLimitPkts = 0n } = before ?? {};
    return { spi, seq, tfcPad, hardLimitPkts };
  }
  return {
    spi: integer('espAttr.spi', attr.spi, U32),
    seq: integer('espAttr.seq', attr.seq, U32),
    tfcPad: integer('espAttr.tfcPad', attr.tfcPad, U32),
    hardLimitPkts: long('espAttr.hardLimitPkts', attr.hardLimitPkts ?? 0n),
  };
}

function readEsn({ compMask, esn }: FlowActionEspModify, before: EspParameters | null): number | null {
  const mask = integer('compMask', compMask, U32);
  if ((mask & ~EspMask.esn) !== 0) throw invalid('compMask', 'has a bit that is not known');
  if ((mask & EspMask.esn) === 0) return before?.esn ?? null;
  if (before !== null && before.esn === null) throw invalid('compMask', 'has ESN, which the action was made without');
  return integer('esn', esn, U32);
}

function readReplay({ replay, replayProto }: FlowActionEspModify, before: EspParameters | null) {
  oneOf('replayProto', replayProto, EspReplay);
  if (replayProto === EspReplay.none) {
    if (replay !== undefined) throw invalid('replay', 'contradicts replayProto');
    return { replaySize: 0 };
  }
  if (replay === undefined) {
    if (replayProto === EspReplay.bitmap) throw invalid('replay', 'is required by replayProto');
    return { replaySize: before?.replaySize ?? 0 };
  }
  const replaySize = integer('replay.size', replay.size, U32);
  if (replaySize === 0) throw invalid('replay.size', 'must not be 0');
  return { replaySize };
}

function readEncap({ espEncap }: FlowActionEspModify, before: EspParameters | null): readonly EspEncap[] {
  return espEncap === undefined ? (before?.encap ?? []) : structuredClone([...espEncap]);
}

function readKeymat(change: FlowActionEspModify, before: EspParameters | null) {
  const { keymat } = change;
  oneOf('keymatProto', change.keymatProto, EspKeymat);
  if (keymat === undefined) {
    if (before === null) throw invalid('keymat', 'is required');
    const { key, salt, icvLen, iv } = before;
    return { key: SecretBytes.copy(key), salt: SecretBytes.copy(salt), icvLen, iv };
  }
  oneOf('keymat.ivAlgo', keymat.ivAlgo, IvAlgorithm);
  if (![16, 24, 32].includes(keymat.aesKey.length)) throw invalid('keymat.aesKey', 'must have 16, 24 or 32 bytes');
  if (keymat.salt.length !== 4) throw invalid('keymat.salt', 'must have 4 bytes');
  if (![8, 12, 16].includes(keymat.icvLen)) throw invalid('keymat.icvLen', 'must be 8, 12 or 16');
  return {
    iv: keymat.iv === undefined ? null : long('keymat.iv', keymat.iv),
    icvLen: keymat.icvLen,
    key: SecretBytes.copy(keymat.aesKey),
    salt: SecretBytes.copy(keymat.salt),
  };
}

type OffloadFields = Pick<EspParameters, 'spi' | 'seq' | 'tfcPad' | 'hardLimitPkts' | 'replaySize' | 'encap'>;

/** The manual page: "only in full offload mode". */
function refuseFullOffload(fields: OffloadFields): void {
  const { spi, seq, tfcPad, hardLimitPkts, replaySize, encap } = fields;
  const given: [string, boolean][] = [
    ['espAttr.spi', spi !== 0],
    ['espAttr.seq', seq !== 0],
    ['espAttr.tfcPad', tfcPad !== 0],
    ['espAttr.hardLimitPkts', hardLimitPkts !== 0n],
    ['replay', replaySize !== 0],
    ['espEncap', encap.length !== 0],
  ];
  for (const [path, is] of given) if (is) throw invalid(path, 'is for full offload only');
}

/** TUNNEL needs an IP header, and may have UDP behind it; TRANSPORT may have UDP alone. */
function checkChain(encap: readonly EspEncap[], fullOffload: boolean, transport: boolean): void {
  if (!fullOffload) return;
  const ips = encap.filter(({ type }) => type !== FlowSpecType.udp).length;
  const at = encap.findIndex(({ type }) => type === FlowSpecType.udp);
  for (const [i, { type }] of encap.entries()) oneOf(`espEncap[${i}].type`, type, ENCAP_TYPES);
  if (transport && ips !== 0) throw invalid('espEncap', 'has an IP header, which transport mode does not add');
  if (!transport && ips === 0) throw invalid('espEncap', 'needs an IP header in tunnel mode');
  if (ips > 1 || encap.length > ips + 1 || (at >= 0 && at !== encap.length - 1)) {
    throw invalid('espEncap', 'can be one IP header and one UDP header behind it');
  }
}

const ENCAP_TYPES = {
  ipv4: FlowSpecType.ipv4,
  ipv4Ext: FlowSpecType.ipv4Ext,
  ipv6: FlowSpecType.ipv6,
  udp: FlowSpecType.udp,
} as const;

/** An action in full offload as an SA. Throws IpsecError `FLOW_ACTION_ATTRIBUTE`; what else is wrong, `validateSa` finds. */
export function toSa(parameters: EspParameters): SecurityAssociationInput {
  const { encrypt, transport, spi, tfcPad, hardLimitPkts, key, salt, icvLen, iv, esn, replaySize } = parameters;
  const udp = udpOf(parameters);
  const seq = encrypt && parameters.seq === 0 && (esn ?? 0) === 0 ? 1 : parameters.seq;
  return {
    direction: encrypt ? 'outbound' : 'inbound',
    mode: transport ? 'transport' : 'tunnel',
    spi,
    aead: { name: 'aes-gcm', key, salt, icvLength: icvLen },
    ...tunnelOf(parameters, udp !== undefined),
    ...(udp === undefined ? {} : { udpEncap: udp }),
    options: { esn: esn !== null },
    replayWindow: replaySize,
    lifetime: { hardPackets: hardLimitPkts },
    tfcPadding: tfcPad,
    initial: {
      sequence: (BigInt(esn ?? 0) << 32n) | BigInt(seq),
      ...(iv === null || !encrypt ? {} : { iv: ivBytes(iv) }),
    },
  };
}

function ivBytes(iv: bigint): Uint8Array {
  return Uint8Array.from({ length: 8 }, (_, i) => Number((iv >> BigInt(56 - 8 * i)) & 0xffn));
}

function udpOf({ encap }: EspParameters): SecurityAssociationInput['udpEncap'] {
  const header = encap.find((one) => one.type === FlowSpecType.udp);
  return header === undefined ? undefined : { sourcePort: header.val.srcPort, destinationPort: header.val.dstPort };
}

function tunnelOf({ encap }: EspParameters, udp: boolean): Pick<SecurityAssociationInput, 'tunnel'> {
  const header = encap.find((one) => one.type !== FlowSpecType.udp);
  if (header === undefined) return {};
  const { srcIp: source, dstIp: destination } = header.val;
  if (header.type === FlowSpecType.ipv4) return { tunnel: { source, destination } };
  if (header.type === FlowSpecType.ipv6) {
    const { flowLabel = 0, nextHdr, trafficClass, hopLimit } = header.val;
    checkProtocol('espEncap.nextHdr', nextHdr, udp);
    const dscp = dscpOf('espEncap.trafficClass', trafficClass);
    return { tunnel: { source, destination, dscp, flowLabel, ...(hopLimit ? { hopLimit } : {}) } };
  }
  const { proto, tos, ttl, flags = 0 } = header.val;
  checkProtocol('espEncap.proto', proto, udp);
  if ((flags & ~Ipv4SpecFlag.dontFragment) !== 0) throw invalid('espEncap.flags', 'can only be DONT_FRAG');
  const df = flags !== 0;
  return { tunnel: { source, destination, dscp: dscpOf('espEncap.tos', tos), df, ...(ttl ? { ttl } : {}) } };
}

function checkProtocol(path: string, protocol: number | undefined, udp: boolean): void {
  const right = udp ? IpProtocol.udp : IpProtocol.esp;
  if (protocol !== undefined && protocol !== 0 && protocol !== right)
    throw invalid(path, `must be ${right} here, or 0`);
}

/** The upper six bits; the ECN field is not the tunnel's to set. */
function dscpOf(path: string, value: number | undefined): number {
  const octet = integer(path, value, 255);
  if ((octet & 3) !== 0) throw invalid(path, 'has ECN bits, which an action cannot set');
  return octet >>> 2;
}
