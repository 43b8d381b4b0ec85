/**
 * The layout of ESP (RFC 4303, 2) and AH (RFC 4302, 2) packets, transform by transform: how long the explicit IV, the
 * padding and the ICV are. `esp-outbound.ts` and `esp-inbound.ts` do the work.
 *
 * | transform                     | IV bytes | pad to | source                       |
 * |-------------------------------|----------|--------|------------------------------|
 * | GCM, CCM, GMAC, ChaCha20, CTR | 8        | 4      | RFC 4106, 4309, 4543, 7634, 3686 |
 * | AES-CBC                       | 16       | 16     | RFC 3602                     |
 * | 3DES-CBC                      | 8        | 8      | RFC 2451                     |
 * | NULL                          | 0        | 4      | RFC 2410                     |
 */
import type { Protocol } from '../ipsec/sa.ts';
import { Ah, Esp } from '../packet/fields.ts';
import type { Transform } from './engines/engine.ts';

export interface PacketSizes {
  /** Explicit IV in the packet, bytes. */
  readonly iv: number;
  /** Plain text (payload, padding, two trailer bytes) is a multiple of this. */
  readonly alignment: number;
  readonly icv: number;
  /** AH: the whole header over IPv4 and over IPv6, which differ in padding (RFC 4302, 2.2); 0 for ESP. */
  readonly ah4: number;
  readonly ah6: number;
}

export function packetSizes(transform: Transform, protocol: Protocol): PacketSizes {
  const counter = transform.family === 'aead' || transform.family === 'gmac' || transform.cipher === 'aes-ctr' ? 8 : 0;
  const icv = transform.icvLength;
  if (protocol === 'ah') {
    const length = Ah.length + counter + icv;
    return { iv: counter, alignment: 1, icv, ah4: Math.ceil(length / 4) * 4, ah6: Math.ceil(length / 8) * 8 };
  }
  let iv = counter;
  let alignment = 4;
  if (transform.cipher === 'aes-cbc') {
    iv = 16;
    alignment = 16;
  } else if (transform.cipher === '3des-cbc') {
    iv = 8;
    alignment = 8;
  }
  return { iv, alignment, icv, ah4: 0, ah6: 0 };
}

/** Largest payload (what stands before the padding) that fits `room` bytes of ESP packet without IP and UDP header; negative if none does. */
export function largestEspPayload(sizes: PacketSizes, room: number): number {
  const cipher = room - Esp.length - sizes.iv - sizes.icv;
  return cipher - (((cipher % sizes.alignment) + sizes.alignment) % sizes.alignment) - Esp.trailerLength;
}
