/**
 * From what a user wrote to a `SecurityAssociation`: every field checked, sizes exact, defaults filled in.
 *
 * Rules come from RFC 4301 to 4303, RFC 8221 (which algorithms, and none without integrity), RFC 3948 (UDP
 * encapsulation) and the RFC of each algorithm. Keys and salts are copied into `SecretBytes`, which do not show in
 * logs; the caller may wipe its own. Throws `IpsecError` with a code of `SaErrorCode` and the `path` of the field;
 * a message never repeats a value.
 *
 * Whether a device or an engine can do the SA is not asked here.
 */
import { createHash } from 'node:crypto';
import { nonceMaterial } from '../fallback/nonce-material.ts';
import { IpProtocol, UdpEsp } from '../packet/fields.ts';
import { readAlgorithms } from './algorithms.ts';
import {
  type AddressInput,
  type BytesInput,
  Fields,
  fieldError,
  type IntegerInput,
  type PrefixInput,
  SaErrorCode,
} from './fields.ts';
import type {
  AeadName,
  AuthName,
  CipherName,
  Direction,
  Lifetime,
  Mode,
  Protocol,
  SaOptions,
  SecurityAssociation,
  Selector,
  Tunnel,
} from './sa.ts';
import { wipeKeys } from './secret.ts';

/** What a user may write; `validateSa` turns it into a `SecurityAssociation`. Also the shape of an entry of an SA file. */
export interface SecurityAssociationInput {
  readonly name?: string;
  readonly direction: Direction;
  /** Default `esp`. */
  readonly protocol?: Protocol;
  readonly mode: Mode;
  readonly spi: IntegerInput;
  readonly aead?: { name: AeadName; key: BytesInput; salt: BytesInput; icvLength?: IntegerInput };
  readonly cipher?: { name: CipherName; key?: BytesInput; salt?: BytesInput };
  readonly auth?: { name: AuthName; key?: BytesInput; salt?: BytesInput; icvLength?: IntegerInput };
  /** Required outbound in tunnel mode; an inbound SA may leave it out and is then found without its destination. */
  readonly tunnel?: {
    source: AddressInput;
    destination: AddressInput;
    /** IPv4. Default 64. */
    ttl?: IntegerInput;
    /** IPv6. Default: `ttl`. */
    hopLimit?: IntegerInput;
    dscp?: IntegerInput;
    df?: boolean;
    flowLabel?: IntegerInput;
  };
  /** Ports default to 4500. */
  readonly udpEncap?: {
    sourcePort?: IntegerInput;
    destinationPort?: IntegerInput;
    /** Inbound transport mode only. */
    originalSource?: AddressInput;
    originalDestination?: AddressInput;
  };
  readonly options?: Partial<SaOptions>;
  /** Packets; 0, or 32 to 65536. Default 64. */
  readonly replayWindow?: IntegerInput;
  /** Absent or 0 is no limit. */
  readonly lifetime?: { [Limit in keyof Lifetime]?: IntegerInput };
  readonly tfcPadding?: IntegerInput;
  readonly initial?: { sequence?: IntegerInput; iv?: BytesInput };
  readonly selector?: {
    source?: PrefixInput;
    destination?: PrefixInput;
    protocol?: IntegerInput;
    sourcePort?: IntegerInput;
    destinationPort?: IntegerInput;
  };
}

const U16 = 0xffff;
const U32 = 0xffffffff;
const U64 = 0xffff_ffff_ffff_ffffn;

/** The smallest window that RFC 4303, 3.4.3 allows, its default, and the largest that is implemented. */
const Window = { min: 32, default: 64, max: 65_536 } as const;

/** Transport protocols whose ports a selector can name. */
const WITH_PORTS: readonly number[] = [
  IpProtocol.tcp,
  IpProtocol.udp,
  IpProtocol.dccp,
  IpProtocol.sctp,
  IpProtocol.udpLite,
];

function readTunnel(value: unknown, path: string): Tunnel {
  const known = ['source', 'destination', 'ttl', 'hopLimit', 'dscp', 'df', 'flowLabel'];
  const fields = new Fields(value, path, known);
  const source = fields.address('source');
  const destination = fields.address('destination');
  if (source.length !== destination.length) {
    throw fieldError(SaErrorCode.combination, fields.at('destination'), 'must be of the same family as source');
  }
  const ttl = fields.integer('ttl', 1, 255, 64);
  const hopLimit = fields.integer('hopLimit', 1, 255, ttl);
  return {
    source,
    destination,
    ttl: source.length === 16 ? hopLimit : ttl,
    dscp: fields.integer('dscp', 0, 63, 0),
    df: fields.boolean('df'),
    flowLabel: fields.integer('flowLabel', 0, 0xfffff, 0),
  };
}

function readLifetime(value: unknown, path: string): Lifetime {
  const fields = new Fields(value ?? {}, path, ['softPackets', 'hardPackets', 'softBytes', 'hardBytes']);
  const limit = (name: keyof Lifetime): bigint => fields.bigint(name, 0n, U64, 0n);
  const lifetime: Lifetime = {
    softPackets: limit('softPackets'),
    hardPackets: limit('hardPackets'),
    softBytes: limit('softBytes'),
    hardBytes: limit('hardBytes'),
  };
  for (const unit of ['Packets', 'Bytes'] as const) {
    const hard = lifetime[`hard${unit}`];
    if (hard !== 0n && lifetime[`soft${unit}`] > hard) {
      throw fieldError(SaErrorCode.combination, fields.at(`soft${unit}`), `must not be beyond hard${unit}`);
    }
  }
  return lifetime;
}

function readSelector(value: unknown, path: string): Selector {
  const known = ['source', 'destination', 'protocol', 'sourcePort', 'destinationPort'];
  const fields = new Fields(value ?? {}, path, known);
  const source = fields.prefix('source');
  const destination = fields.prefix('destination');
  if (source !== null && destination !== null && source.address.length !== destination.address.length) {
    throw fieldError(SaErrorCode.combination, fields.at('destination'), 'must be of the same family as source');
  }
  const protocol = fields.has('protocol') ? fields.integer('protocol', 0, 255) : undefined;
  const port = (name: string): number | undefined => {
    if (!fields.has(name)) return undefined;
    if (protocol !== undefined && !WITH_PORTS.includes(protocol)) {
      throw fieldError(SaErrorCode.combination, fields.at(name), 'the selector names a protocol without ports');
    }
    return fields.integer(name, 0, U16);
  };
  const sourcePort = port('sourcePort');
  const destinationPort = port('destinationPort');
  return {
    ...(source === null ? {} : { source }),
    ...(destination === null ? {} : { destination }),
    ...(protocol === undefined ? {} : { protocol }),
    ...(sourcePort === undefined ? {} : { sourcePort }),
    ...(destinationPort === undefined ? {} : { destinationPort }),
  };
}

function readOptions(value: unknown, path: string): SaOptions {
  const fields = new Fields(value ?? {}, path, ['esn', 'copyDscp', 'copyDf', 'decrementTtl', 'ecn']);
  return {
    esn: fields.boolean('esn'),
    copyDscp: fields.boolean('copyDscp'),
    copyDf: fields.boolean('copyDf'),
    decrementTtl: fields.boolean('decrementTtl'),
    ecn: fields.boolean('ecn'),
  };
}

function readInitial(sa: Fields, direction: Direction, esn: boolean, ivLength: number): SecurityAssociation['initial'] {
  const fields = new Fields(sa.raw('initial') ?? {}, sa.at('initial'), ['sequence', 'iv']);
  const least = direction === 'outbound' ? 1n : 0n;
  const sequence = fields.bigint('sequence', least, esn ? U64 : BigInt(U32), least);
  const iv = fields.bytes('iv');
  if (iv === null) return { sequence };
  if (iv.length !== ivLength) {
    const allowed = ivLength === 0 ? 'this SA carries no IV' : `this SA carries ${ivLength}`;
    throw fieldError(SaErrorCode.value, fields.at('iv'), `has ${iv.length} bytes; ${allowed}`);
  }
  return { sequence, iv: new Uint8Array(iv) };
}

function readUdpEncap(
  sa: Fields,
  protocol: Protocol,
  mode: Mode,
  direction: Direction,
): SecurityAssociation['udpEncap'] {
  if (!sa.has('udpEncap')) return undefined;
  if (protocol === 'ah') {
    throw fieldError(SaErrorCode.combination, sa.at('udpEncap'), 'AH cannot be carried in UDP (RFC 3948, 1)');
  }
  const known = ['sourcePort', 'destinationPort', 'originalSource', 'originalDestination'];
  const fields = new Fields(sa.raw('udpEncap'), sa.at('udpEncap'), known);
  const original = (name: string): Uint8Array | undefined => {
    if (!fields.has(name)) return undefined;
    if (mode === 'transport' && direction === 'inbound') return fields.address(name);
    throw fieldError(SaErrorCode.combination, fields.at(name), 'belongs to inbound transport mode (RFC 3948, 3.1.2)');
  };
  const originalSource = original('originalSource');
  const originalDestination = original('originalDestination');
  if (originalSource && originalDestination && originalSource.length !== originalDestination.length) {
    const what = 'must be of the same family as originalSource';
    throw fieldError(SaErrorCode.combination, fields.at('originalDestination'), what);
  }
  return {
    ...(originalSource && { originalSource }),
    ...(originalDestination && { originalDestination }),
    sourcePort: fields.integer('sourcePort', 1, U16, UdpEsp.port),
    destinationPort: fields.integer('destinationPort', 1, U16, UdpEsp.port),
  };
}

const SA_FIELDS = [
  'name',
  'direction',
  'protocol',
  'mode',
  'spi',
  'aead',
  'cipher',
  'auth',
  'tunnel',
  'udpEncap',
  'options',
  'replayWindow',
  'lifetime',
  'tfcPadding',
  'initial',
  'selector',
] as const;

/**
 * Checks one SA. `input` is a `SecurityAssociationInput` or anything else a caller may have read from somewhere; a
 * `SecurityAssociation` is accepted too. `path` is the name that errors give it.
 */
export function validateSa(input: unknown, path = 'sa'): SecurityAssociation {
  const sa = new Fields(input, path, SA_FIELDS);
  const name = sa.raw('name');
  if (name !== undefined && (typeof name !== 'string' || name.length > 64)) {
    throw fieldError(SaErrorCode.value, sa.at('name'), 'must be text of at most 64 characters');
  }
  const direction = sa.choice<Direction>('direction', ['outbound', 'inbound']);
  const protocol = sa.choice<Protocol>('protocol', ['esp', 'ah'], 'esp');
  const mode = sa.choice<Mode>('mode', ['tunnel', 'transport']);
  const spi = sa.integer('spi', 1, U32);
  const { ivLength, ...algorithms } = readAlgorithms(sa, protocol);
  try {
    const rest = readRest(sa, direction, protocol, mode, ivLength);
    return { ...(name === undefined ? {} : { name }), direction, protocol, mode, spi, ...algorithms, ...rest };
  } catch (error) {
    wipeKeys(algorithms);
    throw error;
  }
}

type Rest = Omit<SecurityAssociation, 'name' | 'direction' | 'protocol' | 'mode' | 'spi' | 'aead' | 'cipher' | 'auth'>;

/** What is beside the algorithms. */
function readRest(sa: Fields, direction: Direction, protocol: Protocol, mode: Mode, ivLength: number): Rest {
  if (mode === 'transport' && sa.has('tunnel')) {
    throw fieldError(SaErrorCode.combination, sa.at('tunnel'), 'belongs to tunnel mode');
  }
  if (mode === 'tunnel' && direction === 'outbound') sa.required('tunnel');
  const tunnel = sa.has('tunnel') ? readTunnel(sa.raw('tunnel'), sa.at('tunnel')) : undefined;
  const udpEncap = readUdpEncap(sa, protocol, mode, direction);
  const options = readOptions(sa.raw('options'), sa.at('options'));
  const replayWindow = sa.integer('replayWindow', 0, Window.max, Window.default);
  if (replayWindow !== 0 && replayWindow < Window.min) {
    const what = `must be 0 (no replay check) or ${Window.min} to ${Window.max} (RFC 4303, 3.4.3)`;
    throw fieldError(SaErrorCode.value, sa.at('replayWindow'), what);
  }
  const tfcPadding = sa.integer('tfcPadding', 0, U16, 0);
  if (tfcPadding > 0 && (protocol === 'ah' || mode === 'transport')) {
    throw fieldError(SaErrorCode.combination, sa.at('tfcPadding'), 'belongs to ESP in tunnel mode (RFC 4303, 2.7)');
  }
  return {
    ...(tunnel === undefined ? {} : { tunnel }),
    ...(udpEncap === undefined ? {} : { udpEncap }),
    options,
    replayWindow,
    lifetime: readLifetime(sa.raw('lifetime'), sa.at('lifetime')),
    tfcPadding,
    initial: readInitial(sa, direction, options.esn, ivLength),
    selector: readSelector(sa.raw('selector'), sa.at('selector')),
  };
}

/** Which inbound packets find the SA: two with the same text could not be told apart. */
function inboundIdentity(sa: SecurityAssociation): string {
  const destination = sa.tunnel?.destination ?? sa.selector.destination?.address;
  return `${sa.protocol} ${sa.spi} ${destination === undefined ? '' : Buffer.from(destination).toString('hex')}`;
}

/** Fingerprint of key and salt of an SA whose nonces are counted; `null` when a repeated key repeats no nonce. */
function nonceIdentity(sa: SecurityAssociation): string | null {
  const material = nonceMaterial(sa);
  if (material === null) return null;
  const identity = createHash('sha256').update(material).digest('hex');
  material.fill(0);
  return identity;
}

/**
 * Checks the SAs of one file or call, and that they can live together: no two inbound ones that a packet cannot tell
 * apart, no two outbound ones that would count nonces up under the same key and salt.
 */
export function validateSas(inputs: readonly unknown[], path = 'sas'): SecurityAssociation[] {
  const sas: SecurityAssociation[] = [];
  try {
    for (const [i, input] of inputs.entries()) sas.push(validateSa(input, `${path}[${i}]`));
    checkTogether(sas, path);
    return sas;
  } catch (error) {
    for (const sa of sas) wipeKeys(sa);
    throw error;
  }
}

function checkTogether(sas: readonly SecurityAssociation[], path: string): void {
  const inbound = new Map<string, number>();
  const nonces = new Map<string, number>();
  sas.forEach((sa, i) => {
    if (sa.direction === 'inbound') {
      const identity = inboundIdentity(sa);
      const other = inbound.get(identity);
      if (other !== undefined) {
        const what = `${path}[${other}] has the same SPI, protocol and destination`;
        throw fieldError(SaErrorCode.duplicate, `${path}[${i}].spi`, what);
      }
      inbound.set(identity, i);
      return;
    }
    const identity = nonceIdentity(sa);
    if (identity === null) return;
    const other = nonces.get(identity);
    if (other !== undefined) {
      const what = `${path}[${other}] sends with the same key and salt: nonces would repeat`;
      throw fieldError(SaErrorCode.keyReused, `${path}[${i}]`, what, 'give each outbound SA a key of its own');
    }
    nonces.set(identity, i);
  });
}
