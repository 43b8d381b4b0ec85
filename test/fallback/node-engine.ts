/**
 * A slow, plain engine on `node:crypto`, for tests: what it computes is OpenSSL's word, reached by another way than
 * the engines of the package.
 */
import { createCipheriv, createDecipheriv, createHmac, timingSafeEqual } from 'node:crypto';
import {
  type CryptoBurst,
  type CryptoEngine,
  JobStatus,
  type Transform,
  type TransformKeys,
} from '../../src/fallback/engines/engine.ts';
import type { MappedMemory } from '../../src/sys/memory.ts';

/** Ordinary memory with the shape of mapped memory. */
export function plainMemory(size: number): MappedMemory {
  const buffer = new ArrayBuffer(size);
  return { address: 0, size, u8: new Uint8Array(buffer), u16: new Uint16Array(buffer), u32: new Uint32Array(buffer) };
}

interface Context {
  readonly cipherKey: Buffer;
  readonly authKey: Buffer;
}

function aeadName(transform: Transform): 'aes-128-gcm' {
  const name =
    transform.cipher === 'chacha20-poly1305'
      ? 'chacha20-poly1305'
      : `aes-${transform.cipherKeyLength * 8}-${transform.cipher === 'aes-ccm' ? 'ccm' : 'gcm'}`;
  // The typings list the modes one by one; all of them take the same options.
  return name as 'aes-128-gcm';
}

function plainName(transform: Transform): string {
  if (transform.cipher === '3des-cbc') return 'des-ede3-cbc';
  return `aes-${transform.cipherKeyLength * 8}-${transform.cipher === 'aes-ctr' ? 'ctr' : 'cbc'}`;
}

function xorInto(target: Buffer, other: Uint8Array): void {
  for (let i = 0; i < other.length; i++) target[i] ^= other[i];
}

function encryptBlock(key: Buffer, block: Uint8Array): Buffer {
  const cipher = createCipheriv(`aes-${key.length * 8}-ecb`, key, null).setAutoPadding(false);
  return Buffer.concat([cipher.update(block), cipher.final()]);
}

function double(block: Buffer): Buffer {
  const out = Buffer.alloc(16);
  for (let i = 0; i < 16; i++) out[i] = (block[i] << 1) | (i < 15 ? block[i + 1] >>> 7 : 0);
  if (block[0] & 0x80) out[15] ^= 0x87;
  return out;
}

/** AES-CMAC (RFC 4493) and AES-XCBC-MAC (RFC 3566), both from the block cipher. */
function blockMac(key: Buffer, message: Uint8Array, xcbc: boolean): Buffer {
  const derived = xcbc ? encryptBlock(key, Buffer.alloc(16, 1)) : key;
  const whole = xcbc ? encryptBlock(key, Buffer.alloc(16, 2)) : double(encryptBlock(key, Buffer.alloc(16)));
  const partial = xcbc ? encryptBlock(key, Buffer.alloc(16, 3)) : double(whole);
  // The last block is padded and masked; the rest is CBC with an IV of zero, of which the last block counts.
  const blocks = Math.max(1, Math.ceil(message.length / 16));
  const padded = Buffer.alloc(16 * blocks);
  padded.set(message);
  if (message.length < padded.length) padded[message.length] = 0x80;
  xorInto(padded.subarray(-16), message.length < padded.length ? partial : whole);
  const cipher = createCipheriv(`aes-${derived.length * 8}-cbc`, derived, Buffer.alloc(16)).setAutoPadding(false);
  return Buffer.concat([cipher.update(padded), cipher.final()]).subarray(-16);
}

export class NodeEngine implements CryptoEngine {
  readonly name = 'openssl';
  readonly version = 'node:crypto, for tests';
  readonly #u8: Uint8Array;
  readonly #contexts = new Map<number, Context>();
  #next = 1;
  /** How often each transform was called, for tests of grouping. */
  readonly calls: { id: string; count: number }[] = [];
  /** Makes the next jobs fail, for tests of failures. */
  broken = false;

  constructor(memory: MappedMemory) {
    this.#u8 = memory.u8;
  }

  get contexts(): number {
    return this.#contexts.size;
  }

  supports(): boolean {
    return true;
  }

  createContext(_transform: Transform, keys: TransformKeys): number {
    const context = this.#next++;
    this.#contexts.set(context, { cipherKey: Buffer.from(keys.cipherKey), authKey: Buffer.from(keys.authKey) });
    return context;
  }

  destroyContext(context: number): void {
    if (!this.#contexts.delete(context)) throw new Error(`context ${context} is not in use`);
  }

  encrypt(transform: Transform, burst: CryptoBurst): void {
    this.#run(transform, burst, true);
  }

  decrypt(transform: Transform, burst: CryptoBurst): void {
    this.#run(transform, burst, false);
  }

  close(): void {
    this.#contexts.clear();
  }

  #run(transform: Transform, burst: CryptoBurst, encrypt: boolean): void {
    this.calls.push({ id: transform.id, count: burst.count });
    for (let j = 0; j < burst.count; j++) {
      const context = this.#contexts.get(burst.context[j]);
      if (context === undefined || this.broken) burst.status[j] = JobStatus.failed;
      else burst.status[j] = this.#job(transform, burst, j, context, encrypt) ? JobStatus.ok : JobStatus.icv;
    }
  }

  #job(transform: Transform, burst: CryptoBurst, j: number, context: Context, encrypt: boolean): boolean {
    const u8 = this.#u8;
    const text = u8.subarray(burst.cipherOffset[j], burst.cipherOffset[j] + burst.cipherLength[j]);
    const signed = u8.subarray(burst.authOffset[j], burst.authOffset[j] + burst.authLength[j]);
    const icv = u8.subarray(burst.icvOffset[j], burst.icvOffset[j] + transform.icvLength);
    const nonce = Buffer.from(burst.iv.buffer, burst.iv.byteOffset + 16 * j, 16);
    const aad = Buffer.from(burst.aad.buffer, burst.aad.byteOffset + 16 * j, burst.aadLength);
    if (transform.family === 'aead' || transform.family === 'gmac') {
      const isGmac = transform.family === 'gmac';
      const name = isGmac ? aeadName({ ...transform, cipher: 'aes-gcm' }) : aeadName(transform);
      const iv = Buffer.from(nonce.subarray(0, transform.cipher === 'aes-ccm' ? 11 : 12));
      const authTagLength = transform.icvLength;
      const data = isGmac ? Buffer.alloc(0) : text;
      const extra = isGmac ? signed : aad;
      if (encrypt) {
        const cipher = createCipheriv(name, context.cipherKey, iv, { authTagLength });
        cipher.setAAD(extra, { plaintextLength: data.length } as never);
        const out = Buffer.concat([cipher.update(data), cipher.final()]);
        if (!isGmac) text.set(out);
        icv.set(cipher.getAuthTag());
        return true;
      }
      const decipher = createDecipheriv(name, context.cipherKey, iv, { authTagLength });
      decipher.setAuthTag(Buffer.from(icv));
      decipher.setAAD(extra, { plaintextLength: data.length } as never);
      try {
        const out = Buffer.concat([decipher.update(data), decipher.final()]);
        if (!isGmac) text.set(out);
        return true;
      } catch {
        text.fill(0xee);
        return false;
      }
    }
    if (encrypt) {
      this.#cipher(transform, context, text, nonce, true);
      icv.set(this.#mac(transform, context, signed).subarray(0, transform.icvLength));
      return true;
    }
    const right = timingSafeEqual(this.#mac(transform, context, signed).subarray(0, transform.icvLength), icv);
    if (right) this.#cipher(transform, context, text, nonce, false);
    return right;
  }

  #cipher(transform: Transform, context: Context, text: Uint8Array, nonce: Buffer, encrypt: boolean): void {
    if (transform.family !== 'cipher-auth' || transform.cipher === 'null') return;
    const make = encrypt ? createCipheriv : createDecipheriv;
    const iv = transform.cipher === '3des-cbc' ? nonce.subarray(0, 8) : nonce;
    const cipher = make(plainName(transform), context.cipherKey, Buffer.from(iv)).setAutoPadding(false);
    text.set(Buffer.concat([cipher.update(text), cipher.final()]));
  }

  #mac(transform: Transform, context: Context, message: Uint8Array): Buffer {
    if (transform.auth === 'aes-xcbc' || transform.auth === 'aes-cmac') {
      return blockMac(context.authKey, message, transform.auth === 'aes-xcbc');
    }
    const hash = (transform.auth ?? '').slice('hmac-'.length);
    return createHmac(hash, context.authKey).update(message).digest();
  }
}
