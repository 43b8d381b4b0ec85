/**
 * Key schedules as libipsec-mb wants them, for all transforms, in slots of one size:
 *
 * ```
 *   0    AES-GCM and GMAC: struct gcm_key_data            (all of the slot)
 *   0    AES: encryption schedule    256: decryption schedule
 *   0    ChaCha20-Poly1305: the key
 *   0    3DES: three DES schedules   384: pointers to them
 *   512  HMAC: hash of key ^ ipad    576: hash of key ^ opad
 *   512  XCBC: schedule of K1        704: K2    720: K3
 *   512  CMAC: schedule of K         704: K1    720: K2
 * ```
 */
import { type MappedMemory, unmapMemory } from '../../sys/memory.ts';
import { grown } from './checks.ts';
import type { Transform, TransformKeys } from './engine.ts';
import type { ImbManager } from './ipsec-mb-library.ts';
import { high, low, mapUnbroken } from './native-memory.ts';

/** Byte offsets in a key slot. */
export const KeySlot = {
  cipher: 0,
  decrypt: 256,
  desSchedule: 128,
  desPointers: 384,
  auth: 512,
  outer: 576,
  subkey1: 704,
  subkey2: 720,
  end: 768,
} as const;

/** Bytes of a cache line. */
const LINE = 64;

/** Offsets in the scratch: a raw key or padded block, and an output that nobody wants. */
const Scratch = { key: 0, unwanted: 256, size: 1024 } as const;

/** Block length of the hash under HMAC, bytes (FIPS 180-4). */
const HASH_BLOCK = { 'hmac-sha1': 64, 'hmac-sha256': 64, 'hmac-sha384': 128, 'hmac-sha512': 128 } as const;
/** RFC 2104. */
const IPAD = 0x36;
const OPAD = 0x5c;

/** Longest authentication key that the schedules can be made from. */
export function maxAuthKey(auth: Transform['auth']): number {
  return auth !== undefined && auth in HASH_BLOCK ? HASH_BLOCK[auth as keyof typeof HASH_BLOCK] : 16;
}

/** Makes key schedules; holds nothing of a key between two calls. */
class KeyScheduler {
  readonly #manager: ImbManager;
  readonly #scratch: MappedMemory;

  constructor(manager: ImbManager) {
    this.#manager = manager;
    this.#scratch = mapUnbroken(Scratch.size);
  }

  /** Fills the slot at `offset` of `slab`. */
  write(transform: Transform, keys: TransformKeys, slab: MappedMemory, offset: number): void {
    try {
      this.#cipher(transform, keys.cipherKey, slab, offset);
      if (transform.authKeyLength > 0) this.#auth(transform, keys.authKey, slab, offset);
    } finally {
      this.#scratch.u8.fill(0);
    }
  }

  close(): void {
    this.#scratch.u8.fill(0);
    unmapMemory(this.#scratch);
  }

  #call(offset: number, ...args: number[]): void {
    this.#manager.functionAt(offset, args.length)(...args);
  }

  #cipher(transform: Transform, key: Uint8Array, slab: MappedMemory, offset: number): void {
    const { manager } = this.#manager.layout;
    const at = slab.address + offset;
    const raw = this.#scratch.address + Scratch.key;
    const expansion = { 16: manager.keyExpansion128, 24: manager.keyExpansion192, 32: manager.keyExpansion256 };
    const precompute = { 16: manager.gcmPrecompute128, 24: manager.gcmPrecompute192, 32: manager.gcmPrecompute256 };
    const size = key.length === 16 ? 16 : key.length === 24 ? 24 : 32;
    this.#scratch.u8.set(key, Scratch.key);
    switch (transform.family === 'gmac' ? 'aes-gcm' : transform.cipher) {
      case 'aes-gcm':
        this.#call(precompute[size], raw, at + KeySlot.cipher);
        break;
      case 'aes-ccm':
      case 'aes-cbc':
      case 'aes-ctr':
        this.#call(expansion[size], raw, at + KeySlot.cipher, at + KeySlot.decrypt);
        break;
      case 'chacha20-poly1305':
        slab.u8.set(key, offset + KeySlot.cipher);
        break;
      case '3des-cbc':
        for (let i = 0; i < 3; i++) {
          const schedule = at + KeySlot.cipher + i * KeySlot.desSchedule;
          this.#call(manager.desKeySchedule, schedule, raw + 8 * i);
          const word = (offset + KeySlot.desPointers + 8 * i) >> 2;
          slab.u32[word] = low(schedule);
          slab.u32[word + 1] = high(schedule);
        }
        break;
      default:
        break;
    }
  }

  #auth(transform: Transform, key: Uint8Array, slab: MappedMemory, offset: number): void {
    const { manager } = this.#manager.layout;
    const at = slab.address + offset;
    const raw = this.#scratch.address + Scratch.key;
    const oneBlock = {
      'hmac-sha1': manager.sha1OneBlock,
      'hmac-sha256': manager.sha256OneBlock,
      'hmac-sha384': manager.sha384OneBlock,
      'hmac-sha512': manager.sha512OneBlock,
    };
    const { auth } = transform;
    switch (auth) {
      case 'hmac-sha1':
      case 'hmac-sha256':
      case 'hmac-sha384':
      case 'hmac-sha512':
        this.#pad(key, HASH_BLOCK[auth], IPAD);
        this.#call(oneBlock[auth], raw, at + KeySlot.auth);
        this.#pad(key, HASH_BLOCK[auth], OPAD);
        this.#call(oneBlock[auth], raw, at + KeySlot.outer);
        break;
      case 'aes-xcbc':
        this.#scratch.u8.set(key, Scratch.key);
        this.#call(manager.xcbcKeyExpansion, raw, at + KeySlot.auth, at + KeySlot.subkey1, at + KeySlot.subkey2);
        break;
      case 'aes-cmac':
        this.#scratch.u8.set(key, Scratch.key);
        this.#call(manager.keyExpansion128, raw, at + KeySlot.auth, this.#scratch.address + Scratch.unwanted);
        this.#call(manager.cmacSubkeys128, at + KeySlot.auth, at + KeySlot.subkey1, at + KeySlot.subkey2);
        break;
      default:
        break;
    }
  }

  /** The padded key of RFC 2104 in the scratch. */
  #pad(key: Uint8Array, block: number, pad: number): void {
    const bytes = this.#scratch.u8;
    for (let i = 0; i < block; i++) bytes[Scratch.key + i] = (i < key.length ? key[i] : 0) ^ pad;
  }
}

/**
 * Where the slot of context `c` is: `c & REGION_MASK` slots from the start of region 0 if `c` is below `FEW_CONTEXTS`, else of
 * region `1 + (c >>> REGION_SHIFT)`. A region is address space (some 300 MiB, the first one a thousandth of it), and costs memory as it is
 * used: one SA takes a page, not a huge page.
 */
export const FEW_CONTEXTS = 1 << 8;
export const REGION_SHIFT = 18;
export const REGION_MASK = (1 << REGION_SHIFT) - 1;

/**
 * The key slots of the contexts of one engine. Slots never move. A region does not cross a multiple of 4 GiB; all but the first are
 * in huge pages where they can be had.
 */
export class KeySlots {
  /** Bytes of a slot: an odd number of cache lines, so that those of a burst spread over all sets of a cache. */
  readonly slotSize: number;
  /** Address of each region in two words. New arrays when they grow: read them anew for every burst. */
  low = new Uint32Array(2);
  high = new Uint32Array(2);
  /** Takes what was read for the side effects of reading it, so that the read is not optimised away. */
  touched = 0;
  readonly #scheduler: KeyScheduler;
  readonly #regions: MappedMemory[] = [];
  /** Highest context ever written. */
  #last = 0;

  constructor(manager: ImbManager) {
    this.#scheduler = new KeyScheduler(manager);
    this.slotSize = LINE * (Math.ceil(Math.max(manager.layout.gcmKeySize, KeySlot.end) / LINE) | 1);
  }

  /** The words of region 1, where most contexts are once there are many. */
  get many(): Uint32Array | undefined {
    return this.#regions[1]?.u32;
  }

  write(context: number, transform: Transform, keys: TransformKeys): void {
    const region = regionOf(context);
    while (this.#regions.length <= region) this.#addRegion();
    this.#last = Math.max(this.#last, context);
    this.#scheduler.write(transform, keys, this.#regions[region], this.#offsetOf(context));
  }

  wipe(context: number): void {
    const offset = this.#offsetOf(context);
    this.#regions[regionOf(context)].u8.fill(0, offset, offset + this.slotSize);
  }

  close(): void {
    this.#scheduler.close();
    this.#regions.forEach((region, i) => {
      // What was never used must not come into being now.
      const from = i === 1 ? FEW_CONTEXTS : 0;
      const to = this.#last + 1 - (i < 2 ? 0 : (i - 1) << REGION_SHIFT);
      region.u8.fill(0, from * this.slotSize, to * this.slotSize);
      unmapMemory(region);
    });
    this.#regions.length = 0;
  }

  #addRegion(): void {
    const i = this.#regions.length;
    const slots = i === 0 ? FEW_CONTEXTS : 1 << REGION_SHIFT;
    const region = mapUnbroken(slots * this.slotSize, { reserve: false, hugePages: i > 0 });
    this.#regions.push(region);
    if (i >= this.low.length) {
      this.low = grown(this.low, 2 * this.low.length);
      this.high = grown(this.high, 2 * this.high.length);
    }
    this.low[i] = low(region.address);
    this.high[i] = high(region.address);
  }

  #offsetOf(context: number): number {
    return (context & REGION_MASK) * this.slotSize;
  }
}

function regionOf(context: number): number {
  return context < FEW_CONTEXTS ? 0 : 1 + (context >>> REGION_SHIFT);
}
