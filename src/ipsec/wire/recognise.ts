/**
 * Which wire revision a device speaks, by what it offers.
 *
 * The revisions share the feature bit and the capability ids, and nothing names them. What differs before the first object is the entry of
 * VIRTIO_NET_IPSEC_SA_CAP: 44 bytes in Virtio 1.4, 40 in the draft. So the length of the capability tells. A device may return more than
 * that, such as a whole buffer; then what stands in the entries tells: modes, options and algorithms that exist, zeros
 * where the revision has reserved bytes.
 */
import { get8, get32, get64 } from '../../virtio/little-endian.ts';
import type { WireRevision } from '../../virtio/revision.ts';
import type { WireLayout } from './codec.ts';
import { IpsecMode, KEY_FIELD_SIZE } from './numbers.ts';
import { rfc202501Layout } from './rfc-2025-01.ts';
import { virtio14Layout } from './virtio-1.4.ts';

/** `struct virtio_crypto_ipsec_sa_cap_data`: count u8, reserved[7], entries. */
const Head = { count: 0, length: 8 } as const;
/** Replies end at a multiple of it (Virtio 1.4, 2.12.1). */
const ALIGNMENT = 8;
/** `reserved[3]` behind the mode, in both revisions, and `reserved1` of Virtio 1.4. */
const RESERVED = { from: 1, to: 4 } as const;
const RESERVED1 = { from: 12, to: 16 } as const;

/**
 * The revision of a device whose VIRTIO_NET_IPSEC_SA_CAP is `capability`; null when it does not tell: it has no modes, or makes sense
 * in neither revision.
 */
export function recogniseRevision(capability: Uint8Array): WireRevision | null {
  const count = get8(capability, Head.count);
  if (count === 0) return null;
  const layouts = [virtio14Layout, rfc202501Layout];
  // No capability of one revision is as long as one of the other with as many modes, whether or not it is padded.
  const exact = layouts.find((layout) => isExact(capability, Head.length + count * layout.modeCapability.size));
  if (exact !== undefined) return exact.revision;
  const [first, ...others] = layouts.filter((layout) => makesSense(capability, count, layout));
  return first === undefined || others.length > 0 ? null : first.revision;
}

function isExact(capability: Uint8Array, length: number): boolean {
  return capability.length === length || capability.length === Math.ceil(length / ALIGNMENT) * ALIGNMENT;
}

function makesSense(capability: Uint8Array, count: number, layout: WireLayout): boolean {
  const at = layout.modeCapability;
  if (capability.length < Head.length + count * at.size) return false;
  const reserved = layout.revision === 'virtio-1.4' ? [RESERVED, RESERVED1] : [RESERVED];
  for (let i = 0; i < count; i++) {
    const entry = capability.subarray(Head.length + i * at.size, Head.length + (i + 1) * at.size);
    if (!isEntry(entry, at, layout.options)) return false;
    if (!reserved.every(({ from, to }) => entry.subarray(from, to).every((byte) => byte === 0))) return false;
  }
  return true;
}

function isEntry(entry: Uint8Array, at: WireLayout['modeCapability'], options: number): boolean {
  return (
    KNOWN_MODES.includes(get8(entry, at.mode)) &&
    (get32(entry, at.options) & ~options) === 0 &&
    get64(entry, at.ciphers) >> CIPHER_END === 0n &&
    get64(entry, at.macs) >> MAC_END === 0n &&
    get32(entry, at.aeads) >>> AEAD_END === 0 &&
    get32(entry, at.maxCipherKeyLength) <= LONGEST_KEY &&
    get32(entry, at.maxAuthKeyLength) <= LONGEST_KEY
  );
}

const KNOWN_MODES: readonly number[] = Object.values(IpsecMode);
/** One more than the last number in the crypto device's tables of ciphers, MACs and AEADs (5.9.5). */
const CIPHER_END = 14n;
const MAC_END = 54n;
const AEAD_END = 4;
/** An object holds 32 bytes; a device may say that it could do more. */
const LONGEST_KEY = 32 * KEY_FIELD_SIZE;
