/**
 * The transforms as functions over bytes, from @noble/ciphers and @noble/hashes: AES-CCM (RFC 3610) and AES-XCBC-MAC
 * (RFC 3566), which noble lacks, composed from its CBC and CTR; the others as noble has them.
 */
import { createRequire } from 'node:module';
import type { Transform } from './engine.ts';

/**
 * noble makes its tables while it is loaded, about half of the time that a process of ours needs to start, and most
 * processes never use it. So it is loaded with its first job (`require` of ES modules: Node 20.19).
 */
const require = createRequire(import.meta.url);
const aes = once((): typeof import('@noble/ciphers/aes.js') => require('@noble/ciphers/aes.js'));
const chacha = once((): typeof import('@noble/ciphers/chacha.js') => require('@noble/ciphers/chacha.js'));
const hmac = once((): typeof import('@noble/hashes/hmac.js') => require('@noble/hashes/hmac.js'));
const legacy = once((): typeof import('@noble/hashes/legacy.js') => require('@noble/hashes/legacy.js'));
const sha2 = once((): typeof import('@noble/hashes/sha2.js') => require('@noble/hashes/sha2.js'));

function once<T>(load: () => T): () => T {
  let loaded: T | undefined;
  return () => {
    loaded ??= load();
    return loaded;
  };
}

export type Bytes = Uint8Array;

/** Ciphertext, then the tag (16 bytes; CCM: `icvLength`). */
export type Seal = (key: Bytes, nonce: Bytes, aad: Bytes, plaintext: Bytes, icvLength: number) => Bytes;
/** Decrypts without looking at the tag. */
export type Unseal = (key: Bytes, nonce: Bytes, ciphertext: Bytes) => Bytes;
export type Mac = (key: Bytes, message: Bytes) => Bytes;
export type Encrypt = (key: Bytes, iv: Bytes, text: Bytes) => Bytes;

const BLOCK = 16;
const NO_PADDING = { disablePadding: true } as const;

function joined(...parts: readonly Bytes[]): Bytes {
  const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

/** Followed by zeros up to a whole number of blocks. */
function padded(bytes: Bytes): Bytes {
  const all = new Uint8Array(Math.ceil(bytes.length / BLOCK) * BLOCK);
  all.set(bytes);
  return all;
}

/** CBC-MAC with a zero IV: the last block of the ciphertext. */
function cbcMac(key: Bytes, message: Bytes): Bytes {
  return aes().cbc(key, new Uint8Array(BLOCK), NO_PADDING).encrypt(message).slice(-BLOCK);
}

/** A counter block of CCM (RFC 3610, 2.3) or, with other flags, B_0 (2.2): flags, nonce, `value` in the bytes that are left. */
function ccmBlock(flags: number, nonce: Bytes, value: number): Bytes {
  const block = new Uint8Array(BLOCK);
  block[0] = flags;
  block.set(nonce, 1);
  for (let i = BLOCK - 1, rest = value; i > nonce.length; i--, rest = Math.floor(rest / 256)) block[i] = rest & 0xff;
  return block;
}

const ccmSeal: Seal = (key, nonce, aad, plaintext, icvLength) => {
  const widthMinus1 = BLOCK - 2 - nonce.length;
  const flags = (aad.length > 0 ? 0x40 : 0) | (((icvLength - 2) / 2) << 3) | widthMinus1;
  const aadBlocks = aad.length > 0 ? padded(joined(Uint8Array.of(aad.length >> 8, aad.length & 0xff), aad)) : aad;
  const mac = cbcMac(key, joined(ccmBlock(flags, nonce, plaintext.length), aadBlocks, padded(plaintext)));
  // The key stream of block 0 covers the tag, that of block 1 and on the text.
  const all = aes()
    .ctr(key, ccmBlock(widthMinus1, nonce, 0))
    .encrypt(joined(mac, plaintext));
  return joined(all.subarray(BLOCK), all.subarray(0, icvLength));
};

const ccmUnseal: Unseal = (key, nonce, ciphertext) =>
  aes()
    .ctr(key, ccmBlock(BLOCK - 2 - nonce.length, nonce, 1))
    .encrypt(ciphertext);

const gcmSeal: Seal = (key, nonce, aad, plaintext) => aes().gcm(key, nonce, aad).encrypt(plaintext);
/** The text starts at counter 2 (SP 800-38D, 7.1). */
const gcmUnseal: Unseal = (key, nonce, ciphertext) =>
  aes()
    .ctr(key, joined(nonce, Uint8Array.of(0, 0, 0, 2)))
    .encrypt(ciphertext);

const chachaSeal: Seal = (key, nonce, aad, plaintext) => chacha().chacha20poly1305(key, nonce, aad).encrypt(plaintext);
/** The text starts at block 1 (RFC 8439, 2.8). */
const chachaUnseal: Unseal = (key, nonce, ciphertext) => chacha().chacha20(key, nonce, ciphertext, undefined, 1);

/** RFC 3566, section 4. An empty message counts as one short block. */
const xcbc: Mac = (key, message) => {
  const derive = (byte: number) => cbcMac(key, new Uint8Array(BLOCK).fill(byte));
  const whole = message.length > 0 && message.length % BLOCK === 0;
  const blocks = whole ? message.slice() : padded(joined(message, Uint8Array.of(0x80)));
  const last = derive(whole ? 2 : 3);
  for (let i = 0; i < BLOCK; i++) blocks[blocks.length - BLOCK + i] ^= last[i];
  return cbcMac(derive(1), blocks);
};

export const SEAL: Partial<Record<NonNullable<Transform['cipher']>, { seal: Seal; unseal: Unseal }>> = {
  'aes-gcm': { seal: gcmSeal, unseal: gcmUnseal },
  'aes-ccm': { seal: ccmSeal, unseal: ccmUnseal },
  'chacha20-poly1305': { seal: chachaSeal, unseal: chachaUnseal },
};

export const CIPHER: Partial<Record<NonNullable<Transform['cipher']>, { encrypt: Encrypt; decrypt: Encrypt }>> = {
  'aes-cbc': {
    encrypt: (key, iv, text) => aes().cbc(key, iv, NO_PADDING).encrypt(text),
    decrypt: (key, iv, text) => aes().cbc(key, iv, NO_PADDING).decrypt(text),
  },
  'aes-ctr': {
    encrypt: (key, block, text) => aes().ctr(key, block).encrypt(text),
    decrypt: (key, block, text) => aes().ctr(key, block).decrypt(text),
  },
  null: { encrypt: (_key, _iv, text) => text, decrypt: (_key, _iv, text) => text },
};

export const MAC: Partial<Record<NonNullable<Transform['auth']>, Mac>> = {
  'hmac-sha1': (key, message) => hmac().hmac(legacy().sha1, key, message),
  'hmac-sha256': (key, message) => hmac().hmac(sha2().sha256, key, message),
  'hmac-sha384': (key, message) => hmac().hmac(sha2().sha384, key, message),
  'hmac-sha512': (key, message) => hmac().hmac(sha2().sha512, key, message),
  'aes-xcbc': xcbc,
  'aes-cmac': (key, message) => aes().cmac(message, key),
};

/** GMAC is GCM of no text with the message as AAD (RFC 4543, 3.2). */
export function gmac(key: Bytes, nonce: Bytes, message: Bytes): Bytes {
  return aes().gcm(key, nonce, message).encrypt(new Uint8Array(0));
}
