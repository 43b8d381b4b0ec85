/** What the tests of ESP and AH share: SAs of every transform, packets, and a pool with an engine. */
import { expect } from 'vitest';

import { type SaEvent, SoftwareIpsec } from '../../src/fallback/software.ts';
import { verdictNames } from '../../src/fallback/verdict.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { type SecurityAssociationInput, validateSa } from '../../src/ipsec/validate.ts';
import { setIpv4Checksum } from '../../src/packet/checksum.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { NodeEngine, plainMemory } from './node-engine.ts';
import '../equality.ts';

export function hex(text: string): Uint8Array {
  return Uint8Array.from(Buffer.from(text.replaceAll(/\s/g, ''), 'hex'));
}

export function toHex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}

/** `length` bytes that start with `first` and count up. */
export function counting(length: number, first = 1): Uint8Array {
  const bytes = new Uint8Array(length);
  for (let i = 0; i < length; i++) bytes[i] = first + 7 * i;
  return bytes;
}

export const V4 = { source: '192.0.2.1', destination: '192.0.2.2' } as const;
export const V6 = { source: '2001:db8::1', destination: '2001:db8::2' } as const;

type Algorithms = Pick<SecurityAssociationInput, 'aead' | 'cipher' | 'auth'>;

/** Every ESP transform, by its id. */
export function espTransforms(): Map<string, Algorithms> {
  const all = new Map<string, Algorithms>();
  for (const size of [16, 24, 32]) {
    for (const icvLength of [8, 12, 16]) {
      const key = counting(size, icvLength);
      all.set(`aes-${size * 8}-gcm-${icvLength}`, { aead: { name: 'aes-gcm', key, salt: counting(4), icvLength } });
      all.set(`aes-${size * 8}-ccm-${icvLength}`, { aead: { name: 'aes-ccm', key, salt: counting(3), icvLength } });
    }
    all.set(`aes-${size * 8}-gmac-16`, {
      aead: { name: 'aes-gmac', key: counting(size, 3), salt: counting(4), icvLength: 16 },
    });
  }
  all.set('chacha20-poly1305-16', {
    aead: { name: 'chacha20-poly1305', key: counting(32), salt: counting(4), icvLength: 16 },
  });
  const ciphers: [string, NonNullable<Algorithms['cipher']>][] = [['null', { name: 'null' }]];
  for (const size of [16, 24, 32]) {
    ciphers.push([`aes-${size * 8}-cbc`, { name: 'aes-cbc', key: counting(size, 5) }]);
    ciphers.push([`aes-${size * 8}-ctr`, { name: 'aes-ctr', key: counting(size, 9), salt: counting(4) }]);
  }
  ciphers.push(['3des-cbc', { name: '3des-cbc', key: counting(24, 11) }]);
  for (const [cipherId, cipher] of ciphers) {
    for (const [authId, auth] of authenticators()) all.set(`${cipherId}+${authId}`, { cipher, auth });
  }
  return all;
}

function authenticators(): [string, NonNullable<Algorithms['auth']>][] {
  return [
    ['hmac-sha1-12', { name: 'hmac-sha1', key: counting(20, 13) }],
    ['hmac-sha256-16', { name: 'hmac-sha256', key: counting(32, 13) }],
    ['hmac-sha384-24', { name: 'hmac-sha384', key: counting(48, 13) }],
    ['hmac-sha512-32', { name: 'hmac-sha512', key: counting(64, 13) }],
    ['aes-xcbc-12', { name: 'aes-xcbc', key: counting(16, 13) }],
    ['aes-cmac-12', { name: 'aes-cmac', key: counting(16, 13) }],
  ];
}

/** Every AH transform, by its id. */
export function ahTransforms(): Map<string, Algorithms> {
  const all = new Map<string, Algorithms>(authenticators().map(([id, auth]) => [id, { auth }]));
  for (const size of [16, 24, 32]) {
    all.set(`aes-${size * 8}-gmac-16`, { auth: { name: 'aes-gmac', key: counting(size, 17), salt: counting(4) } });
  }
  return all;
}

export const GCM: Algorithms = { aead: { name: 'aes-gcm', key: counting(16), salt: counting(4), icvLength: 16 } };

type Changes = Partial<SecurityAssociationInput>;

/** An SA as `validate.ts` makes it: AES-128-GCM in an IPv4 tunnel unless told otherwise. */
export function makeSa(direction: 'outbound' | 'inbound', changes: Changes = {}): SecurityAssociation {
  const algorithms = (changes.aead ?? changes.cipher ?? changes.auth) ? {} : GCM;
  const mode = changes.mode ?? 'tunnel';
  const tunnel = mode === 'tunnel' ? { tunnel: V4 } : {};
  return validateSa({ direction, mode, spi: 0x1001, ...algorithms, ...tunnel, ...changes });
}

/** Both ends of one SA. */
export function makePair(
  changes: Changes = {},
  inboundChanges: Changes = {},
): [SecurityAssociation, SecurityAssociation] {
  const { initial, ...rest } = changes;
  return [makeSa('outbound', changes), makeSa('inbound', { ...rest, ...inboundChanges })];
}

export interface Bench {
  readonly pool: PacketPool;
  readonly engine: NodeEngine;
  readonly ipsec: SoftwareIpsec;
  readonly events: [number, SaEvent][];
}

/** A pool of 64 packets and a `SoftwareIpsec` on the test engine. */
export function makeBench(stride = 4096, packets = 64): Bench {
  const memory = plainMemory(stride * packets);
  const pool = new PacketPool(memory, { stride });
  const engine = new NodeEngine(memory);
  const events: [number, SaEvent][] = [];
  const ipsec = new SoftwareIpsec(pool, { engine: [engine], onEvent: (handle, event) => events.push([handle, event]) });
  return { pool, engine, ipsec, events };
}

/** The verdict's name and the packet afterwards. */
export interface Outcome {
  readonly verdict: string;
  readonly bytes: Uint8Array;
  readonly sa: number;
  readonly flags: number;
}

/** Sends packets through `protect` (with a handle) or `unprotect` as one burst. */
export function pass(bench: Bench, inputs: readonly Uint8Array[], handle: number | null, linkHeader = 0): Outcome[] {
  const { pool, ipsec } = bench;
  const packets = new Uint32Array(inputs.length);
  const verdicts = new Uint8Array(inputs.length).fill(0xff);
  if (pool.allocate(packets, inputs.length) !== inputs.length) throw new Error('the pool is empty');
  try {
    inputs.forEach((bytes, i) => {
      pool.write(packets[i], bytes);
      if (handle !== null) pool.sa[packets[i]] = handle;
    });
    if (handle === null) ipsec.unprotect(packets, inputs.length, linkHeader, verdicts);
    else ipsec.protect(packets, inputs.length, linkHeader, verdicts);
    return inputs.map((_, i) => ({
      verdict: verdictNames[verdicts[i]],
      bytes: pool.read(packets[i]),
      sa: pool.sa[packets[i]],
      flags: pool.flags[packets[i]],
    }));
  } finally {
    pool.free(packets, inputs.length);
  }
}

/** Fails unless both are the same. `expect` would look at each byte by itself. */
export function expectSame(outcomes: readonly Outcome[], others: readonly Outcome[]): void {
  const same = outcomes.every((one, i) => {
    const { verdict, bytes, sa, flags } = others[i];
    return one.verdict === verdict && one.sa === sa && one.flags === flags && Buffer.compare(one.bytes, bytes) === 0;
  });
  if (!same || outcomes.length !== others.length) expect(outcomes).toEqual(others);
}

export function protectOne(bench: Bench, input: Uint8Array, handle: number, linkHeader = 0): Outcome {
  return pass(bench, [input], handle, linkHeader)[0];
}

export function unprotectOne(bench: Bench, input: Uint8Array, linkHeader = 0): Outcome {
  return pass(bench, [input], null, linkHeader)[0];
}

export interface Ipv4Fields {
  readonly tos?: number;
  readonly id?: number;
  readonly flags?: number;
  readonly ttl?: number;
  readonly protocol?: number;
  readonly source?: Uint8Array;
  readonly destination?: Uint8Array;
  readonly options?: Uint8Array;
}

/** An IPv4 packet with a right checksum. */
export function ipv4(payload: Uint8Array, fields: Ipv4Fields = {}): Uint8Array {
  const options = fields.options ?? new Uint8Array(0);
  const headerLength = 20 + options.length;
  const packet = new Uint8Array(headerLength + payload.length);
  packet[0] = 0x40 | (headerLength / 4);
  packet[1] = fields.tos ?? 0;
  packet[2] = packet.length >>> 8;
  packet[3] = packet.length;
  packet[4] = (fields.id ?? 0x1234) >>> 8;
  packet[5] = fields.id ?? 0x34;
  packet[6] = (fields.flags ?? 0) >>> 8;
  packet[7] = fields.flags ?? 0;
  packet[8] = fields.ttl ?? 64;
  packet[9] = fields.protocol ?? 17;
  packet.set(fields.source ?? [10, 0, 0, 1], 12);
  packet.set(fields.destination ?? [10, 1, 0, 1], 16);
  packet.set(options, 20);
  setIpv4Checksum(packet, 0, headerLength);
  packet.set(payload, headerLength);
  return packet;
}

export interface Ipv6Fields {
  readonly trafficClass?: number;
  readonly flowLabel?: number;
  readonly hopLimit?: number;
  /** The next header after the IPv6 header; `payload` then begins with it. */
  readonly nextHeader?: number;
  readonly source?: Uint8Array;
  readonly destination?: Uint8Array;
}

export function ipv6(payload: Uint8Array, fields: Ipv6Fields = {}): Uint8Array {
  const packet = new Uint8Array(40 + payload.length);
  const trafficClass = fields.trafficClass ?? 0;
  const flowLabel = fields.flowLabel ?? 0;
  packet[0] = 0x60 | (trafficClass >>> 4);
  packet[1] = ((trafficClass & 15) << 4) | (flowLabel >>> 16);
  packet[2] = flowLabel >>> 8;
  packet[3] = flowLabel;
  packet[4] = payload.length >>> 8;
  packet[5] = payload.length;
  packet[6] = fields.nextHeader ?? 17;
  packet[7] = fields.hopLimit ?? 64;
  packet.set(fields.source ?? hex('20010db8000a00000000000000000001'), 8);
  packet.set(fields.destination ?? hex('20010db8000b00000000000000000001'), 24);
  packet.set(payload, 40);
  return packet;
}

export function concat(...parts: readonly Uint8Array[]): Uint8Array {
  return Uint8Array.from(Buffer.concat(parts));
}

/** An Ethernet header for `packet`, by its version. */
export function ethernet(packet: Uint8Array): Uint8Array {
  const type = packet[0] >>> 4 === 6 ? hex('86dd') : hex('0800');
  return concat(hex('020000000002 020000000001'), type, packet);
}
