/**
 * The matrix that the judges go through: every transform, in every mode, family and with every option that applies.
 *
 * SAs are written as in an SA file, so that the judge gets the very text that our side validates.
 */

import type { Transform } from '../../src/fallback/engines/engine.ts';
import { TRANSFORMS } from '../../src/fallback/engines/transform.ts';
import { CaptureReader } from '../../src/packet/capture-file.ts';

/** An SA as in an SA file, without a direction. */
export interface SaText {
  readonly protocol: 'esp' | 'ah';
  readonly mode: 'tunnel' | 'transport';
  readonly spi: string;
  readonly aead?: { name: string; key: string; salt: string; icvLength: number };
  readonly cipher?: { name: string; key?: string; salt?: string };
  readonly auth?: { name: string; key: string; salt?: string; icvLength: number };
  readonly tunnel?: { source: string; destination: string; ttl?: number; hopLimit?: number };
  readonly udpEncap?: {
    sourcePort: number;
    destinationPort: number;
    originalSource?: string;
    originalDestination?: string;
  };
  readonly options: { esn?: boolean };
  readonly replayWindow: number;
  readonly initial: { sequence: string };
}

export interface Case {
  readonly name: string;
  readonly sa: SaText;
  /** Family of the packets that go in: 4 or 6. */
  readonly inner: 4 | 6;
}

/** Different bytes for every use, the same ones in every run. */
function keyBytes(length: number, seed: number): string {
  return Array.from({ length }, (_, i) => ((i * 37 + seed * 101 + 11) & 0xff).toString(16).padStart(2, '0')).join('');
}

const saltLength = (transform: Transform) => (transform.cipher === 'aes-ccm' ? 3 : 4);

/** The algorithm fields of an SA file for `transform`; `null` where the protocol has no such SA. */
function algorithms(transform: Transform, protocol: 'esp' | 'ah'): Pick<SaText, 'aead' | 'cipher' | 'auth'> | null {
  const { family, cipher, auth, icvLength } = transform;
  const key = keyBytes(transform.cipherKeyLength, 1);
  const salt = keyBytes(saltLength(transform), 2);
  if (protocol === 'ah') {
    if (family === 'gmac') return { auth: { name: 'aes-gmac', key, salt, icvLength } };
    if (family !== 'auth') return null;
    return { auth: { name: String(auth), key: keyBytes(transform.authKeyLength, 3), icvLength } };
  }
  if (family === 'auth') return null;
  if (family !== 'cipher-auth')
    return { aead: { name: family === 'gmac' ? 'aes-gmac' : String(cipher), key, salt, icvLength } };
  const cipherField =
    cipher === 'null' ? { name: 'null' } : { name: String(cipher), key, ...(cipher === 'aes-ctr' ? { salt } : {}) };
  return { cipher: cipherField, auth: { name: String(auth), key: keyBytes(transform.authKeyLength, 3), icvLength } };
}

const TUNNELS = {
  4: { source: '192.0.2.1', destination: '192.0.2.2', ttl: 64 },
  6: { source: '2001:db8::1', destination: '2001:db8::2', hopLimit: 64 },
} as const;

const FAMILIES = [4, 6] as const;
const SEQUENCE = { plain: '7', extended: String((5n << 32n) + 9n) } as const;

function* casesOf(transform: Transform, protocol: 'esp' | 'ah'): Generator<Case> {
  const fields = algorithms(transform, protocol);
  if (fields === null) return;
  for (const esn of [false, true]) {
    for (const udp of protocol === 'esp' ? [false, true] : [false]) {
      const common = {
        protocol,
        spi: '0xc0ffee01',
        ...fields,
        ...(udp ? { udpEncap: { sourcePort: 4500, destinationPort: 4500 } } : {}),
        options: esn ? { esn } : {},
        replayWindow: 64,
        initial: { sequence: esn ? SEQUENCE.extended : SEQUENCE.plain },
      };
      const label = `${protocol} ${transform.id}${esn ? ' esn' : ''}${udp ? ' udp' : ''}`;
      for (const inner of FAMILIES) {
        for (const outer of FAMILIES) {
          const sa: SaText = { ...common, mode: 'tunnel', tunnel: TUNNELS[outer] };
          yield { name: `${label} tunnel ${inner} in ${outer}`, sa, inner };
        }
        yield { name: `${label} transport ${inner}`, sa: { ...common, mode: 'transport' }, inner };
      }
    }
  }
}

/** Every case, in a fixed order. */
export const CASES: readonly Case[] = TRANSFORMS.flatMap((transform) => [
  ...casesOf(transform, 'esp'),
  ...casesOf(transform, 'ah'),
]);

/** Unfragmented IP packets of `family` from the recorded captures: the smallest, the largest and some in between. */
export function realPackets(family: 4 | 6, count: number): Uint8Array[] {
  const bySize = new Map<number, Uint8Array>();
  for (const name of ['ping', 'dns', 'http', 'bulk']) {
    using reader = new CaptureReader(new URL(`../data/${name}-ipv${family}.pcap`, import.meta.url).pathname);
    for (const record of reader) {
      const frame = record.bytes();
      const type = (frame[12] << 8) | frame[13];
      if (type === (family === 4 ? 0x0800 : 0x86dd)) bySize.set(frame.length, frame.subarray(14));
    }
  }
  const sorted = [...bySize.entries()].sort(([a], [b]) => a - b).map(([, packet]) => packet);
  const picked = Array.from({ length: count }, (_, i) => sorted[Math.floor((i * (sorted.length - 1)) / (count - 1))]);
  return picked.map(withoutLinkPadding);
}

/** The IP packet alone: short frames are padded to 60 bytes on the wire. */
function withoutLinkPadding(packet: Uint8Array): Uint8Array {
  const version = packet[0] >> 4;
  const length = version === 4 ? (packet[2] << 8) | packet[3] : 40 + ((packet[4] << 8) | packet[5]);
  return packet.slice(0, length);
}
