/**
 * Names and numbers of the IPsec part of a virtio device (Virtio 1.4, 5.1.5, 5.1.6, 5.9.7.12 and the crypto device's tables).
 *
 * They are the same in both wire revisions; layouts are in `virtio-1.4.ts` and `rfc-2025-01.ts`.
 */
import { CapabilityId, ResourceType } from '../../virtio/admin-wire.ts';
import type { AeadName, AuthName, CipherName } from '../sa.ts';

/** Capability ids of the network device (Virtio 1.4, 5.1.5, Device and driver capabilities). */
export const IpsecCapability = { resource: CapabilityId.NET_IPSEC_RESOURCE, sa: CapabilityId.NET_IPSEC_SA } as const;

/** Resource object types of the network device (Virtio 1.4, 5.1.6, Device resource objects). They are also the `resource_type` of the packet header. */
export const SaObjectType = {
  outbound: ResourceType.NET_IPSEC_OUTB_SA,
  inbound: ResourceType.NET_IPSEC_INB_SA,
} as const;

/** `mode` of a mode capability and of an SA object (table "IPsec Modes"). 0 is reserved. */
export const IpsecMode = { espTunnel: 1, espTransport: 2, ahTunnel: 3, ahTransport: 4 } as const;

/** `direction` of an SA object (table "IPsec Direction"). 0 is reserved. */
export const SaDirection = { outbound: 1, inbound: 2 } as const;

/** Bits of `options` (table "IPsec Options"). */
export const SaOption = {
  esn: 1 << 0,
  udpEncap: 1 << 1,
  copyDscp: 1 << 2,
  decrementTtl: 1 << 3,
  copyDf: 1 << 4,
  ecn: 1 << 5,
  lifetime: 1 << 6,
} as const;

/**
 * `type` of the tunnel parameters. The standard names the values IPv4 and IPv6 without numbers. Reading: 1 and 2, because 0 is
 * reserved in all its neighbours; `tunnelTypeBase: 0` is for a device that counts from 0, as rte_security does.
 */
export const DEFAULT_TUNNEL_TYPE_BASE = 1;

/** Cipher numbers, also bit numbers of the capability's `cipher_algo` (crypto device, CIPHER services). 0 is offered as NULL. */
export const CipherAlgorithm: Readonly<Record<CipherName, number>> = {
  null: 0,
  'aes-cbc': 3,
  'aes-ctr': 4,
  '3des-cbc': 8,
};

/** MAC numbers, also bit numbers of the capability's `hmac_algo` (crypto device, MAC services). */
export const MacAlgorithm: Readonly<Record<Exclude<AuthName, 'null'>, number>> = {
  'hmac-sha1': 2,
  'hmac-sha256': 4,
  'hmac-sha384': 5,
  'hmac-sha512': 6,
  'aes-cmac': 26,
  'aes-gmac': 41,
  'aes-xcbc': 53,
};

/** AEAD numbers, also bit numbers of the capability's `aead_algo` (crypto device, AEAD services). GMAC is a MAC here. */
export const AeadAlgorithm: Readonly<Record<Exclude<AeadName, 'aes-gmac'>, number>> = {
  'aes-gcm': 1,
  'aes-ccm': 2,
  'chacha20-poly1305': 3,
};

/**
 * ICV lengths in bytes. An SA object names none, so both sides use the default of the RFC that defines the algorithm for
 * IPsec (RFC 4106, 4309, 7634, 4543; 2404; 4868; 4494; 3566).
 */
export const AEAD_ICV_LENGTH = 16;
export const MacIcvLength: Readonly<Record<Exclude<AuthName, 'null'>, number>> = {
  'hmac-sha1': 12,
  'hmac-sha256': 16,
  'hmac-sha384': 24,
  'hmac-sha512': 32,
  'aes-cmac': 12,
  'aes-gmac': 16,
  'aes-xcbc': 12,
};

/** Bytes that a key field of an SA object holds. */
export const KEY_FIELD_SIZE = 32;

/** Name of `value` in a table of names and numbers; undefined when it is not there. */
export function nameOf<N extends string>(table: Readonly<Record<N, number>>, value: number): N | undefined {
  for (const name in table) if (table[name] === value) return name;
  return undefined;
}
