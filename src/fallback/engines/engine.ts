/**
 * The interface between ESP/AH and whoever does the arithmetic: `ipsec-mb`, `openssl`, `noble`.
 *
 * An engine works in place on one piece of memory (a packet pool's), takes a burst of jobs as parallel typed arrays
 * and makes as few native calls for it as it can. It knows nothing of packets, headers, sequence numbers or padding:
 * the caller lays the bytes out and says where they are.
 *
 * Job layout by family of transform:
 *
 * | family        | cipher range          | auth range                              | nonce (`iv`)             | `aad`           |
 * |---------------|-----------------------|-----------------------------------------|--------------------------|-----------------|
 * | `aead`        | encrypted in place    | unused                                  | 12 bytes (CCM: 11)       | `aadLength` B   |
 * | `gmac`        | unused                | authenticated, in clear                 | 12 bytes                 | unused          |
 * | `cipher-auth` | encrypted in place    | authenticated, contains the ciphertext  | 16 bytes (3DES 8; CTR: the whole first counter block; NULL none) | unused |
 * | `auth`        | unused                | authenticated                           | none                     | unused          |
 *
 * Encrypt: cipher first, then the ICV is written at `icvOffset`. Decrypt: the ICV over the received bytes is compared in
 * constant time with the `icvLength` bytes at `icvOffset`; when it differs, `status` is `JobStatus.icv` and the content of
 * the cipher range is undefined (the caller drops the packet).
 * Extended sequence numbers, mutable fields and the like are the caller's: it places bytes so that the ranges are contiguous.
 *
 * A job that does not fit (a range outside of the memory, a context of another transform or direction, a cipher range that
 * is not inside of the auth range, a length that is 0 or no multiple of the block where the cipher wants one, an empty auth
 * range) is not done: its `status` is `JobStatus.failed` and its bytes are as they were.
 */
import { VipsecError } from '../../errors.ts';
import { type MappedMemory, unmapMemory } from '../../sys/memory.ts';
import { mapUnbroken } from './native-memory.ts';

/**
 * An engine, or one transform in it, cannot be used: `ENGINE_LIBRARY_MISSING`, `ENGINE_VERSION_UNKNOWN`, `ENGINE_UNSUPPORTED`,
 * `ENGINE_NEEDS_POINTERS`, `ENGINE_KNOWN_ANSWER`, `TRANSFORM_UNSUPPORTED`.
 */
export class EngineError extends VipsecError {}

export type EngineName = 'ipsec-mb' | 'openssl' | 'noble';

export type TransformFamily = 'aead' | 'gmac' | 'cipher-auth' | 'auth';

/** What arithmetic an SA needs: two SAs with the same transform (the same object, see `transform.ts`) may share a burst. */
export interface Transform {
  /** Such as `aes-128-gcm-16`, `aes-256-cbc+hmac-sha256-16`, `null+hmac-sha1-12`, `aes-128-gmac-16`, `hmac-sha1-12` (AH). */
  readonly id: string;
  readonly family: TransformFamily;
  /** `gmac` family: absent. */
  readonly cipher?: 'aes-gcm' | 'aes-ccm' | 'chacha20-poly1305' | 'aes-cbc' | 'aes-ctr' | '3des-cbc' | 'null';
  readonly auth?: 'hmac-sha1' | 'hmac-sha256' | 'hmac-sha384' | 'hmac-sha512' | 'aes-xcbc' | 'aes-cmac' | 'aes-gmac';
  /** Bytes of the cipher (or AEAD, GMAC) key; 0 without one. */
  readonly cipherKeyLength: number;
  /** Bytes of the authentication key; 0 without one. */
  readonly authKeyLength: number;
  readonly icvLength: number;
}

/** Copied by the engine at once; the caller wipes its own. */
export interface TransformKeys {
  readonly cipherKey: Uint8Array;
  readonly authKey: Uint8Array;
}

export const JobStatus = { ok: 0, icv: 1, failed: 2 } as const;

/** Largest number of jobs in one burst. */
export const MAX_BURST = 256;

/** Where the nonces and the AAD of a burst begin in its native memory. */
export const BurstOffset = { iv: 0, aad: 16 * MAX_BURST } as const;

/** The arrays of a `CryptoBurst`, by job. */
export class JobArrays {
  /** Result of `CryptoEngine.createContext`. */
  readonly context = new Uint32Array(MAX_BURST);
  readonly cipherOffset = new Uint32Array(MAX_BURST);
  readonly cipherLength = new Uint32Array(MAX_BURST);
  readonly authOffset = new Uint32Array(MAX_BURST);
  readonly authLength = new Uint32Array(MAX_BURST);
  readonly icvOffset = new Uint32Array(MAX_BURST);
  /** Out: `JobStatus`. */
  readonly status = new Uint8Array(MAX_BURST);
}

/**
 * A burst of jobs of one transform and one direction; contexts (keys) may differ. Offsets are bytes from the start of the
 * engine's memory. Any engine takes any burst. Nonces and AAD lie in native memory, so that a library reads them where they
 * are: `close` gives that memory back.
 */
export class CryptoBurst {
  /** Jobs 0 to count - 1 are valid. */
  count = 0;
  /** Bytes of `aad` used, the same for the whole burst: 0, 8 or 12. */
  aadLength = 0;
  readonly context: Uint32Array;
  readonly cipherOffset: Uint32Array;
  readonly cipherLength: Uint32Array;
  readonly authOffset: Uint32Array;
  readonly authLength: Uint32Array;
  readonly icvOffset: Uint32Array;
  /** Four words a job: up to 16 nonce bytes in memory order (word = little-endian load of four bytes). */
  readonly iv: Uint32Array;
  /** Four words a job: up to 16 bytes of AAD in memory order. */
  readonly aad: Uint32Array;
  readonly status: Uint8Array;
  /** Holds `iv` and `aad` at `BurstOffset`; does not cross a multiple of 4 GiB. */
  readonly memory: MappedMemory;

  constructor(arrays = new JobArrays()) {
    this.context = arrays.context;
    this.cipherOffset = arrays.cipherOffset;
    this.cipherLength = arrays.cipherLength;
    this.authOffset = arrays.authOffset;
    this.authLength = arrays.authLength;
    this.icvOffset = arrays.icvOffset;
    this.status = arrays.status;
    this.memory = mapUnbroken(2 * 16 * MAX_BURST);
    const words = this.memory.u32;
    this.iv = words.subarray(BurstOffset.iv >> 2, (BurstOffset.iv >> 2) + 4 * MAX_BURST);
    this.aad = words.subarray(BurstOffset.aad >> 2, (BurstOffset.aad >> 2) + 4 * MAX_BURST);
  }

  /** Gives the native memory back; the burst is of no use afterwards. */
  close(): void {
    unmapMemory(this.memory);
  }
}

export interface CryptoEngine {
  readonly name: EngineName;
  /** Library and version as found, such as `libipsec-mb 1.3.0`. */
  readonly version: string;
  supports(transform: Transform): boolean;
  /** Prepares a key for one direction; returns a small positive integer for `CryptoBurst.context`. */
  createContext(transform: Transform, keys: TransformKeys, direction: 'encrypt' | 'decrypt'): number;
  /** Wipes and frees. */
  destroyContext(context: number): void;
  /** hot: allocates nothing, throws nothing; failures are in `burst.status`. All jobs are of `transform`. */
  encrypt(transform: Transform, burst: CryptoBurst): void;
  decrypt(transform: Transform, burst: CryptoBurst): void;
  /** Wipes all keys and frees the library's memory. */
  close(): void;
}
