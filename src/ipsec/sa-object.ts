/**
 * A security association as an SA object of virtio, and back (Virtio 1.4, "Resource objects" of the IPsec operation).
 *
 * The driver encodes, the software device decodes; both follow the same readings of what the standard leaves open:
 * - `auth_algo` 0 means that `cipher_algo` is an AEAD number (the object has no AEAD field, and the numbers collide).
 * - `cipher_algo` 0 is NULL (ESP) or nothing (AH). ESP with `auth_algo` AES-GMAC and no cipher is RFC 4543.
 * - The ICV has the length that the algorithm's RFC gives as default.
 * - `salt` holds the first bytes of the nonce: of GCM, GMAC and ChaCha20 four, of CCM three, of CTR its nonce.
 * - `esn` of the draft is the number of the next packet (outbound) or the highest accepted (inbound); 0 is the default.
 *
 * `saToObject` requires what `capability.ts` checks; it throws `NOT_EXPRESSIBLE` where a caller did not ask.
 */
import { IpsecError } from '../errors.ts';
import type { Aead, Auth, Cipher, SecurityAssociation, Tunnel } from './sa.ts';
import type { SaObject, TunnelParameters } from './wire/codec.ts';
import {
  AEAD_ICV_LENGTH,
  AeadAlgorithm,
  CipherAlgorithm,
  IpsecMode,
  MacAlgorithm,
  MacIcvLength,
  nameOf,
  SaDirection,
  SaOption,
} from './wire/numbers.ts';

const NO_KEY = new Uint8Array(0);

/** `IpsecMode` of `sa`. */
export function modeNumber(sa: Pick<SecurityAssociation, 'protocol' | 'mode'>): number {
  if (sa.protocol === 'esp') return sa.mode === 'tunnel' ? IpsecMode.espTunnel : IpsecMode.espTransport;
  return sa.mode === 'tunnel' ? IpsecMode.ahTunnel : IpsecMode.ahTransport;
}

/** Bits of `SaOption` that `sa` uses. */
export function optionBits(sa: SecurityAssociation): number {
  const { softPackets, softBytes, hardPackets, hardBytes } = sa.lifetime;
  return (
    (sa.options.esn ? SaOption.esn : 0) |
    (sa.udpEncap === undefined ? 0 : SaOption.udpEncap) |
    (sa.options.copyDscp ? SaOption.copyDscp : 0) |
    (sa.options.decrementTtl ? SaOption.decrementTtl : 0) |
    (sa.options.copyDf ? SaOption.copyDf : 0) |
    (sa.options.ecn ? SaOption.ecn : 0) |
    ((softPackets | softBytes | hardPackets | hardBytes) === 0n ? 0 : SaOption.lifetime)
  );
}

/** Which numbers, keys and salt stand for the algorithms of an SA. */
export interface AlgorithmFields {
  readonly kind: 'aead' | 'pair';
  readonly cipherAlgorithm: number;
  readonly cipherKey: Uint8Array;
  readonly authAlgorithm: number;
  readonly authKey: Uint8Array;
  readonly salt: Uint8Array | undefined;
  readonly icvLength: number;
  /** The only ICV length that the object stands for. */
  readonly impliedIcvLength: number;
}

/** The algorithm fields of `sa`; null when there is no way to write them (NULL authentication). */
export function algorithmFields(sa: SecurityAssociation): AlgorithmFields | null {
  const { aead, cipher, auth } = sa;
  if (aead !== undefined) {
    const { name, key, salt, icvLength } = aead;
    if (name === 'aes-gmac') {
      const authAlgorithm = MacAlgorithm['aes-gmac'];
      const impliedIcvLength = MacIcvLength['aes-gmac'];
      const none = { cipherAlgorithm: CipherAlgorithm.null, cipherKey: NO_KEY };
      return { kind: 'pair', ...none, authAlgorithm, authKey: key, salt, icvLength, impliedIcvLength };
    }
    const cipherAlgorithm = AeadAlgorithm[name];
    const none = { authAlgorithm: 0, authKey: NO_KEY };
    return {
      kind: 'aead',
      cipherAlgorithm,
      cipherKey: key,
      ...none,
      salt,
      icvLength,
      impliedIcvLength: AEAD_ICV_LENGTH,
    };
  }
  if (auth === undefined || auth.name === 'null') return null;
  return {
    kind: 'pair',
    cipherAlgorithm: cipher === undefined ? CipherAlgorithm.null : CipherAlgorithm[cipher.name],
    cipherKey: cipher === undefined ? NO_KEY : cipher.key,
    authAlgorithm: MacAlgorithm[auth.name],
    authKey: auth.key,
    salt: cipher?.salt ?? auth.salt,
    icvLength: auth.icvLength,
    impliedIcvLength: MacIcvLength[auth.name],
  };
}

/**
 * The object for `sa` with id `objectId`. Its keys are the SA's own arrays, not copies. `hasInitialSequence` says whether the
 * revision has `esn`.
 */
export function saToObject(sa: SecurityAssociation, objectId: number, hasInitialSequence: boolean): SaObject {
  const fields = algorithmFields(sa);
  if (fields === null) throw new IpsecError('NOT_EXPRESSIBLE', 'an SA object cannot say NULL authentication');
  const salt = new Uint8Array(4);
  if (fields.salt !== undefined) salt.set(fields.salt);
  const defaultSequence = sa.direction === 'outbound' ? 1n : 0n;
  return {
    mode: modeNumber(sa),
    direction: SaDirection[sa.direction],
    objectId,
    spi: sa.spi,
    salt,
    options: BigInt(optionBits(sa)),
    tunnel: sa.direction === 'outbound' && sa.tunnel !== undefined ? tunnelParameters(sa.tunnel) : null,
    udpSourcePort: sa.udpEncap?.sourcePort ?? 0,
    udpDestinationPort: sa.udpEncap?.destinationPort ?? 0,
    replayWindow: sa.direction === 'inbound' ? sa.replayWindow : 0,
    cipherAlgorithm: BigInt(fields.cipherAlgorithm),
    cipherKey: fields.cipherKey,
    authAlgorithm: BigInt(fields.authAlgorithm),
    authKey: fields.authKey,
    softPackets: sa.lifetime.softPackets,
    softBytes: sa.lifetime.softBytes,
    hardPackets: sa.lifetime.hardPackets,
    hardBytes: sa.lifetime.hardBytes,
    esn: hasInitialSequence && sa.initial.sequence !== defaultSequence ? sa.initial.sequence : 0n,
  };
}

function tunnelParameters(tunnel: Tunnel): TunnelParameters {
  const v6 = tunnel.source.length === 16;
  const { source, destination, dscp, ttl } = tunnel;
  return { source, destination, dscp, ttl, df: !v6 && tunnel.df, flowLabel: v6 ? tunnel.flowLabel : 0 };
}

/** Algorithms of an SA, in the words of `SecurityAssociation`. */
type Algorithms = Pick<SecurityAssociation, 'aead'> | { readonly cipher?: Cipher; readonly auth: Auth };

/**
 * The SA that a device is asked for. Fields are checked one by one: mode, direction, algorithm numbers, a tunnel header where the
 * mode needs one. Throws IpsecError `INVALID_SA_OBJECT`; key lengths that no transform has are found by whoever
 * makes the transform. Keys are the object's arrays.
 */
export function objectToSa(object: SaObject): SecurityAssociation {
  const outbound = object.direction === SaDirection.outbound;
  if (!outbound && object.direction !== SaDirection.inbound)
    throw invalid(`direction ${object.direction}`, 'direction');
  if (nameOf(IpsecMode, object.mode) === undefined) throw invalid(`mode ${object.mode}`, 'mode');
  const esp = object.mode === IpsecMode.espTunnel || object.mode === IpsecMode.espTransport;
  const tunnelMode = object.mode === IpsecMode.espTunnel || object.mode === IpsecMode.ahTunnel;
  if (outbound && tunnelMode && object.tunnel === null) throw invalid('a tunnel without parameters', 'param');
  if (object.spi === 0) throw invalid('SPI 0', 'spi');
  const known = Object.values(SaOption).reduce((all, bit) => all | bit, 0);
  if ((object.options & ~BigInt(known)) !== 0n) throw invalid('an option that is not defined', 'options');
  const options = Number(object.options);
  const udpEncap = (options & SaOption.udpEncap) !== 0;
  if (udpEncap && !esp) throw invalid('UDP encapsulation of AH', 'options');
  const limited = (options & SaOption.lifetime) !== 0;
  const sequence = object.esn !== 0n ? object.esn : outbound ? 1n : 0n;
  const ports = { sourcePort: object.udpSourcePort, destinationPort: object.udpDestinationPort };
  return {
    direction: outbound ? 'outbound' : 'inbound',
    protocol: esp ? 'esp' : 'ah',
    mode: tunnelMode ? 'tunnel' : 'transport',
    spi: object.spi,
    ...algorithms(object, esp),
    ...(tunnelMode && object.tunnel !== null ? { tunnel: object.tunnel } : {}),
    ...(udpEncap ? { udpEncap: ports } : {}),
    options: {
      esn: (options & SaOption.esn) !== 0,
      copyDscp: (options & SaOption.copyDscp) !== 0,
      copyDf: (options & SaOption.copyDf) !== 0,
      decrementTtl: (options & SaOption.decrementTtl) !== 0,
      ecn: (options & SaOption.ecn) !== 0,
    },
    replayWindow: outbound ? 0 : object.replayWindow,
    lifetime: {
      softPackets: limited ? object.softPackets : 0n,
      hardPackets: limited ? object.hardPackets : 0n,
      softBytes: limited ? object.softBytes : 0n,
      hardBytes: limited ? object.hardBytes : 0n,
    },
    tfcPadding: 0,
    initial: { sequence },
    selector: {},
  };
}

function algorithms(object: SaObject, esp: boolean): Algorithms {
  const cipherNumber = small(object.cipherAlgorithm);
  const authNumber = small(object.authAlgorithm);
  if (authNumber === 0) {
    const name = nameOf(AeadAlgorithm, cipherNumber);
    if (!esp || name === undefined) throw invalid(`AEAD ${cipherNumber}`, 'cipher_algo');
    const salt = object.salt.subarray(0, name === 'aes-ccm' ? 3 : 4);
    const aead: Aead = { name, key: object.cipherKey, salt, icvLength: AEAD_ICV_LENGTH };
    return { aead };
  }
  const authName = nameOf(MacAlgorithm, authNumber);
  if (authName === undefined) throw invalid(`MAC ${authNumber}`, 'auth_algo');
  const cipherName = nameOf(CipherAlgorithm, cipherNumber);
  if (cipherName === undefined) throw invalid(`cipher ${cipherNumber}`, 'cipher_algo');
  const icvLength = MacIcvLength[authName];
  if (authName === 'aes-gmac') {
    if (cipherName !== 'null') throw invalid('AES-GMAC together with a cipher', 'cipher_algo');
    const gmac = { name: authName, key: object.authKey, salt: object.salt, icvLength };
    return esp ? { aead: gmac } : { auth: gmac };
  }
  const auth: Auth = { name: authName, key: object.authKey, icvLength };
  if (!esp) {
    if (cipherName !== 'null') throw invalid('AH with a cipher', 'cipher_algo');
    return { auth };
  }
  const cipher: Cipher = {
    name: cipherName,
    key: object.cipherKey,
    ...(cipherName === 'aes-ctr' ? { salt: object.salt } : {}),
  };
  return { cipher, auth };
}

/** A number of the algorithm tables; -1 for what is beyond all of them. */
function small(value: bigint): number {
  return value < 64n ? Number(value) : -1;
}

function invalid(what: string, path: string): IpsecError {
  return new IpsecError('INVALID_SA_OBJECT', `the SA object has ${what}`, { path });
}
