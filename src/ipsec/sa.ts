/**
 * What a security association is, in the words of rte_security and RFC 4301 to 4303.
 *
 * The type is what `validate.ts` returns: every field is checked, sizes are exact, defaults are filled in.
 * All numbers are host numbers; keys, salts and IVs are byte strings in wire order; IPv4 addresses are 4 bytes and
 * IPv6 addresses 16 bytes in network order.
 */
export type Direction = 'outbound' | 'inbound';
export type Protocol = 'esp' | 'ah';
export type Mode = 'tunnel' | 'transport';

export type AeadName = 'aes-gcm' | 'aes-ccm' | 'chacha20-poly1305' | 'aes-gmac';
export type CipherName = 'null' | 'aes-cbc' | 'aes-ctr' | '3des-cbc';
export type AuthName =
  | 'null'
  | 'hmac-sha1'
  | 'hmac-sha256'
  | 'hmac-sha384'
  | 'hmac-sha512'
  | 'aes-xcbc'
  | 'aes-cmac'
  | 'aes-gmac';

export interface Aead {
  readonly name: AeadName;
  /** 16, 24 or 32 bytes (ChaCha20-Poly1305: 32). */
  readonly key: Uint8Array;
  /** First bytes of the nonce: 4, or 3 for CCM. */
  readonly salt: Uint8Array;
  /** Bytes: 8, 12 or 16 (16 only for ChaCha20-Poly1305 and GMAC). */
  readonly icvLength: number;
}

export interface Cipher {
  readonly name: CipherName;
  readonly key: Uint8Array;
  /** AES-CTR only: the 4-byte nonce of RFC 3686. */
  readonly salt?: Uint8Array;
}

export interface Auth {
  readonly name: AuthName;
  readonly key: Uint8Array;
  /** AES-GMAC for AH only: the 4-byte salt of RFC 4543. */
  readonly salt?: Uint8Array;
  readonly icvLength: number;
}

export interface Tunnel {
  /** 4 or 16 bytes, network order; both of one family. */
  readonly source: Uint8Array;
  readonly destination: Uint8Array;
  /** Outer TTL or hop limit, 1 to 255. */
  readonly ttl: number;
  /** 6 bits; used when `options.copyDscp` is false. */
  readonly dscp: number;
  /** Outer IPv4 DF bit unless copied. */
  readonly df: boolean;
  /** Outer IPv6 flow label, 20 bits. */
  readonly flowLabel: number;
}

/** UDP encapsulation (RFC 3948). */
export interface UdpEncap {
  readonly sourcePort: number;
  readonly destinationPort: number;
  /**
   * Inbound transport mode: the addresses that the peer's packets had before a NAT changed them (NAT-OA, RFC 3947, 5.2); one
   * that is absent was not changed. With either, TCP and UDP checksums are corrected by the difference; with
   * neither they are computed anew (RFC 3948, 3.1.2).
   */
  readonly originalSource?: Uint8Array;
  readonly originalDestination?: Uint8Array;
}

export interface SaOptions {
  readonly esn: boolean;
  readonly copyDscp: boolean;
  readonly copyDf: boolean;
  readonly decrementTtl: boolean;
  readonly ecn: boolean;
}

/** 0 means no limit. */
export interface Lifetime {
  readonly softPackets: bigint;
  readonly hardPackets: bigint;
  readonly softBytes: bigint;
  readonly hardBytes: bigint;
}

/** Which packets an outbound SA protects; an absent field matches all. Addresses are network-order bytes. */
export interface Selector {
  readonly source?: Prefix;
  readonly destination?: Prefix;
  readonly protocol?: number;
  readonly sourcePort?: number;
  readonly destinationPort?: number;
}

export interface Prefix {
  readonly address: Uint8Array;
  readonly length: number;
}

export interface SecurityAssociation {
  readonly name?: string;
  readonly direction: Direction;
  readonly protocol: Protocol;
  readonly mode: Mode;
  /** 1 to 2^32 - 1. */
  readonly spi: number;
  /** Either `aead`, or `cipher` and `auth` (ESP), or `auth` alone (AH). */
  readonly aead?: Aead;
  readonly cipher?: Cipher;
  readonly auth?: Auth;
  /** Only in tunnel mode, and there always outbound. Inbound: used to find the SA by destination when it is there. */
  readonly tunnel?: Tunnel;
  readonly udpEncap?: UdpEncap;
  readonly options: SaOptions;
  /** Packets; 0 is no replay check. */
  readonly replayWindow: number;
  readonly lifetime: Lifetime;
  /** Bytes of TFC padding added to each outbound tunnel packet (RFC 4303, 2.7); 0 is none. */
  readonly tfcPadding: number;
  readonly initial: {
    /** Outbound: number of the next packet to send (at least 1). Inbound: highest number already accepted (default 0). */
    readonly sequence: bigint;
    /** Explicit IV that the first packet carries. Absent: derived (counter modes: the sequence number; CBC: random). */
    readonly iv?: Uint8Array;
  };
  readonly selector: Selector;
}
