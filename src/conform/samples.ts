/** Objects that checks create: groups, classifiers, rules, SAs (Virtio 1.4, 5.1.9.6.3 and 5.9.9.9.3). */
import type { SecurityAssociation } from '../ipsec/sa.ts';
import { saToObject } from '../ipsec/sa-object.ts';
import { validateSa } from '../ipsec/validate.ts';
import type { SaObject } from '../ipsec/wire/codec.ts';
import { AeadAlgorithm, CipherAlgorithm, IpsecMode, MacAlgorithm } from '../ipsec/wire/numbers.ts';
import { ipsecWire } from '../ipsec/wire/revisions.ts';
import { Ethernet, EtherType, IpProtocol, Ipv4, Ipv6 } from '../packet/fields.ts';
import { ResourceType } from '../virtio/admin-wire.ts';
import type { WireRevision } from '../virtio/revision.ts';
import {
  encodeClassifier,
  encodeRule,
  type FlowSelector,
  SELECTOR_LENGTH,
  SelectorType,
} from '../virtio-net/flow-filter-wire.ts';
import { need } from './check.ts';
import type { Offer } from './offer.ts';

/** Selectors that match an EtherType and a protocol, and the bytes of a third header from `transport` on. */
export interface Match {
  readonly ipv6?: boolean;
  readonly protocol?: number;
  /** Bytes of the UDP or ESP header to match, and where they stand in it. */
  readonly transport?: { readonly type: 'udp' | 'esp'; readonly at: number; readonly bytes: Uint8Array };
}

export interface Classification {
  readonly selectors: readonly FlowSelector[];
  readonly key: Uint8Array;
}

/** Selectors and key for `match`; not applicable when the device lacks a selector. */
export function classification(offer: Offer, match: Match): Classification {
  const ip = match.ipv6 === true ? SelectorType.ipv6 : SelectorType.ipv4;
  const protocolAt = match.ipv6 === true ? Ipv6.nextHeader : Ipv4.protocol;
  const parts = [part(SelectorType.eth, Ethernet.type, beType(match.ipv6 === true))];
  if (match.protocol !== undefined) parts.push(part(ip, protocolAt, Uint8Array.of(match.protocol)));
  if (match.transport !== undefined) {
    const { type, at, bytes } = match.transport;
    parts.push(part(SelectorType[type], at, bytes));
  }
  for (const { selector } of parts) {
    const offered = offer.selectors.find(({ type }) => type === selector.type);
    const able = offered !== undefined && selector.mask.every((bits, i) => (bits & ~offered.mask[i]) === 0);
    need(able, `the device cannot match what the check needs with selector ${selector.type}`);
  }
  return {
    selectors: parts.map(({ selector }) => selector),
    key: Uint8Array.from(parts.flatMap(({ key }) => [...key])),
  };
}

function beType(ipv6: boolean): Uint8Array {
  const type = ipv6 ? EtherType.ipv6 : EtherType.ipv4;
  return Uint8Array.of(type >>> 8, type);
}

function part(type: number, at: number, bytes: Uint8Array): { selector: FlowSelector; key: Uint8Array } {
  const mask = new Uint8Array(SELECTOR_LENGTH[type]);
  const key = new Uint8Array(SELECTOR_LENGTH[type]);
  mask.fill(0xff, at, at + bytes.length);
  key.set(bytes, at);
  return { selector: { type, flags: 0, mask }, key };
}

/** A classifier that looks at the EtherType, the IPv4 protocol, and the UDP destination port. */
export function portMatch(port: number): Match {
  return {
    protocol: IpProtocol.udp,
    transport: { type: 'udp', at: 2, bytes: Uint8Array.of(port >>> 8, port) },
  };
}

export function classifierBytes(classified: Classification): Uint8Array {
  return encodeClassifier({ selectors: classified.selectors });
}

export function ruleBytes(
  classified: Classification,
  rule: { group: number; classifier: number; priority: number; action: number; queue?: number },
): Uint8Array {
  return encodeRule({
    groupId: rule.group,
    classifierId: rule.classifier,
    priority: rule.priority,
    action: rule.action,
    queueIndex: rule.queue ?? 0,
    key: classified.key,
  });
}

let keys = 0;

/** Bytes that no other key of this process has. */
export function freshKey(length: number): Uint8Array {
  keys++;
  return Uint8Array.from({ length }, (_, i) => (keys >>> (8 * (i % 3))) ^ (i * 29 + 1));
}

/** What SAs of a check differ in, as in an SA file. */
export interface SaWish {
  readonly direction: 'inbound' | 'outbound';
  readonly protocol?: 'esp' | 'ah';
  readonly mode?: 'tunnel' | 'transport';
  readonly spi?: number;
  readonly options?: Readonly<Record<string, boolean>>;
  readonly lifetime?: Readonly<Record<string, string>>;
  readonly replayWindow?: number;
  readonly udpEncap?: { readonly sourcePort: number; readonly destinationPort: number };
  readonly tunnel?: Readonly<Record<string, unknown>>;
}

/** Names and keys of the algorithms of an SA, as in an SA file. */
export type Algorithms = Readonly<Record<string, Readonly<Record<string, unknown>>>>;

export function makeSa(wish: SaWish, algorithms: Algorithms): SecurityAssociation {
  const mode = wish.mode ?? 'tunnel';
  const tunnel = { source: '192.0.2.1', destination: '192.0.2.2', ttl: 64, ...wish.tunnel };
  return validateSa({
    protocol: 'esp',
    mode,
    spi: 0x1001,
    ...algorithms,
    ...wish,
    ...(mode === 'tunnel' ? { tunnel } : { tunnel: undefined }),
  });
}

/** The object for an SA. */
export function saBytes(
  revision: WireRevision,
  sa: SecurityAssociation,
  id: number,
  change: Partial<SaObject> = {},
): Uint8Array {
  const wire = ipsecWire(revision);
  const out = new Uint8Array(wire.saObjectSize);
  wire.encodeSa({ ...saToObject(sa, id, wire.hasInitialSequence), ...change }, out);
  return out;
}

export function saType(direction: 'inbound' | 'outbound'): number {
  return direction === 'outbound' ? ResourceType.NET_IPSEC_OUTB_SA : ResourceType.NET_IPSEC_INB_SA;
}

/** `AES-GCM` as an SA file names it, and the like: all algorithms that a mode of the device offers, with fresh keys. */
export function algorithmsOf(
  offer: Offer,
  protocol: 'esp' | 'ah',
  mode: 'tunnel' | 'transport',
): { name: string; algorithms: Algorithms }[] {
  const entry = offer.modes.find((one) => one.mode === modeOf(protocol, mode));
  if (entry === undefined) return [];
  const has = (mask: bigint, bit: number) => ((mask >> BigInt(bit)) & 1n) === 1n;
  const hex = (length: number) => Buffer.from(freshKey(length)).toString('hex');
  const out: { name: string; algorithms: Algorithms }[] = [];
  const macs = Object.entries(MacAlgorithm).filter(
    ([name, bit]) => has(entry.macs, bit) && MAC_KEYS[name] <= entry.maxAuthKeyLength,
  );
  const auth = (name: string) => ({ name, key: hex(MAC_KEYS[name]), ...(name === 'aes-gmac' ? { salt: hex(4) } : {}) });
  if (protocol === 'ah') return macs.map(([name]) => ({ name, algorithms: { auth: auth(name) } }));
  for (const [name, bit] of Object.entries(AeadAlgorithm)) {
    const length = name === 'chacha20-poly1305' ? 32 : 16;
    if (!has(BigInt(entry.aeads), bit) || length > entry.maxCipherKeyLength) continue;
    out.push({
      name,
      algorithms: { aead: { name, key: hex(length), salt: hex(name === 'aes-ccm' ? 3 : 4), icvLength: 16 } },
    });
  }
  const plain = macs.filter(([name]) => name !== 'aes-gmac');
  for (const [name, bit] of Object.entries(CipherAlgorithm)) {
    const length = CIPHER_KEYS[name];
    if (!has(entry.ciphers, bit) || length > entry.maxCipherKeyLength || plain.length === 0) continue;
    const cipher = {
      name,
      ...(length === 0 ? {} : { key: hex(length) }),
      ...(name === 'aes-ctr' ? { salt: hex(4) } : {}),
    };
    // Every cipher with the first MAC, the first cipher with every MAC.
    const used = out.some(({ algorithms }) => 'cipher' in algorithms) ? plain.slice(0, 1) : plain;
    for (const [mac] of used) out.push({ name: `${name} with ${mac}`, algorithms: { cipher, auth: auth(mac) } });
  }
  return out;
}

/** Bytes of the keys of MACs and ciphers. */
const MAC_KEYS: Readonly<Record<string, number>> = {
  'hmac-sha1': 20,
  'hmac-sha256': 32,
  'hmac-sha384': 48,
  'hmac-sha512': 64,
  'aes-cmac': 16,
  'aes-gmac': 16,
  'aes-xcbc': 16,
};
const CIPHER_KEYS: Readonly<Record<string, number>> = { null: 0, 'aes-cbc': 16, 'aes-ctr': 16, '3des-cbc': 24 };

export function modeOf(protocol: 'esp' | 'ah', mode: 'tunnel' | 'transport'): number {
  if (protocol === 'esp') return mode === 'tunnel' ? IpsecMode.espTunnel : IpsecMode.espTransport;
  return mode === 'tunnel' ? IpsecMode.ahTunnel : IpsecMode.ahTransport;
}

/** The first SA that the device can do, in a direction: what checks that need any SA use. */
export function anySa(offer: Offer, direction: 'inbound' | 'outbound', spi = 0x1001): SecurityAssociation {
  for (const protocol of ['esp', 'ah'] as const) {
    for (const mode of ['tunnel', 'transport'] as const) {
      const [first] = algorithmsOf(offer, protocol, mode);
      if (first !== undefined) return makeSa({ direction, protocol, mode, spi }, first.algorithms);
    }
  }
  need(false, 'the device offers no mode with an algorithm that this suite knows');
  throw new RangeError('unreachable');
}
