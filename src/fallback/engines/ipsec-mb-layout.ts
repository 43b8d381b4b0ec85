/**
 * Where libipsec-mb keeps what we touch: byte offsets in `IMB_MGR` and `IMB_JOB` of `intel-ipsec-mb.h`, one table per
 * library version, on x86-64 (the only machine the library exists for).
 *
 * The layout is not promised from one version to the next. A version that is not in `LAYOUTS` is not used, and each
 * transform must give the known answers, with the library's own argument checks on, before it is used.
 *
 * How a table is made: compile a program that prints `offsetof` of each member against the header of that version.
 */

/** Byte offsets in IMB_MGR. Pointers are functions of the implementation chosen for this processor. */
export interface ManagerLayout {
  readonly errno: number;
  readonly keyExpansion128: number;
  readonly keyExpansion192: number;
  readonly keyExpansion256: number;
  readonly cmacSubkeys128: number;
  readonly xcbcKeyExpansion: number;
  readonly desKeySchedule: number;
  readonly sha1OneBlock: number;
  readonly sha256OneBlock: number;
  readonly sha384OneBlock: number;
  readonly sha512OneBlock: number;
  readonly gcmPrecompute128: number;
  readonly gcmPrecompute192: number;
  readonly gcmPrecompute256: number;
  readonly getNextBurst: number;
  readonly submitBurst: number;
  readonly submitBurstNoCheck: number;
  readonly flushBurst: number;
  /** First of `IMB_MAX_JOBS` job slots. */
  readonly jobs: number;
}

/** Byte offsets in IMB_JOB. `argument0` to `argument2` are the three words of the union of hash arguments. */
export interface JobLayout {
  readonly size: number;
  readonly encryptKeys: number;
  readonly decryptKeys: number;
  readonly keyLength: number;
  readonly source: number;
  readonly destination: number;
  readonly cipherStart: number;
  readonly cipherLength: number;
  readonly hashStart: number;
  readonly hashLength: number;
  readonly iv: number;
  readonly ivLength: number;
  readonly tag: number;
  readonly tagLength: number;
  readonly argument0: number;
  readonly argument1: number;
  readonly argument2: number;
  readonly status: number;
  readonly cipherMode: number;
  readonly direction: number;
  readonly hash: number;
  readonly order: number;
  readonly userData: number;
  readonly sglState: number;
}

export interface ImbLayout {
  /** As `imb_get_version` returns it: 0x10300 is 1.3.0. */
  readonly version: number;
  readonly name: string;
  readonly manager: ManagerLayout;
  readonly job: JobLayout;
  /** `suite_id[2]` and `session_id`, which imb_set_session fills; absent before 1.4. */
  readonly session?: { readonly suite0: number; readonly suite1: number; readonly id: number };
  /** sizeof(struct gcm_key_data). */
  readonly gcmKeySize: number;
}

const JOB: Omit<JobLayout, 'size'> = {
  encryptKeys: 0,
  decryptKeys: 8,
  keyLength: 16,
  source: 24,
  destination: 32,
  cipherStart: 40,
  cipherLength: 48,
  hashStart: 56,
  hashLength: 64,
  iv: 72,
  ivLength: 80,
  tag: 88,
  tagLength: 96,
  argument0: 104,
  argument1: 112,
  argument2: 120,
  status: 128,
  cipherMode: 132,
  direction: 136,
  hash: 140,
  order: 144,
  userData: 152,
  sglState: 184,
};

const MANAGER: Omit<ManagerLayout, 'jobs'> = {
  errno: 60,
  keyExpansion128: 112,
  keyExpansion192: 120,
  keyExpansion256: 128,
  cmacSubkeys128: 136,
  xcbcKeyExpansion: 144,
  desKeySchedule: 152,
  sha1OneBlock: 160,
  sha256OneBlock: 176,
  sha384OneBlock: 184,
  sha512OneBlock: 192,
  gcmPrecompute128: 448,
  gcmPrecompute192: 456,
  gcmPrecompute256: 464,
  getNextBurst: 952,
  submitBurst: 960,
  submitBurstNoCheck: 968,
  flushBurst: 976,
};

/** Debian 12 ships 1.3.0 (`libIPSec_MB.so.1`), Debian 13 ships 2.0.0 (`libIPSec_MB.so.2`). */
export const LAYOUTS: readonly ImbLayout[] = [
  {
    version: 0x10300,
    name: '1.3.0',
    manager: { ...MANAGER, jobs: 1024 },
    job: { ...JOB, size: 200 },
    gcmKeySize: 1008,
  },
  {
    version: 0x20000,
    name: '2.0.0',
    manager: { ...MANAGER, jobs: 1112 },
    job: { ...JOB, size: 216 },
    session: { suite0: 200, suite1: 204, id: 208 },
    gcmKeySize: 1264,
  },
];

/** IMB_MAX_BURST_SIZE and IMB_MAX_JOBS of both versions. */
export const ImbLimit = { burst: 128, jobs: 256 } as const;
/** IMB_CIPHER_MODE. */
export const ImbCipher = { cbc: 1, ctr: 2, null: 3, gcm: 5, ccm: 9, des3: 10, chacha20Poly1305: 19 } as const;
/** IMB_HASH_ALG. The three GMAC values are those of a key of 16, 24 and 32 bytes. */
export const ImbHash = {
  hmacSha1: 1,
  hmacSha256: 3,
  hmacSha384: 4,
  hmacSha512: 5,
  xcbc: 6,
  gcm: 9,
  ccm: 11,
  cmac: 12,
  gmac128: 24,
  gmac192: 25,
  gmac256: 26,
  chacha20Poly1305: 29,
} as const;
/** IMB_CIPHER_DIRECTION. */
export const ImbDirection = { encrypt: 1, decrypt: 2 } as const;
/** IMB_CHAIN_ORDER. */
export const ImbOrder = { cipherHash: 1, hashCipher: 2 } as const;
/** IMB_STATUS: both halves done. */
export const IMB_COMPLETED = 3;
