/**
 * The OpenSSL objects of one engine: fetched algorithms, which live as long as the engine, and initialised contexts, which
 * `openssl.ts` keeps per SA. Raw keys pass through the scratch and are cleansed there at once.
 */
import { type MappedMemory, unmapMemory } from '../../sys/memory.ts';
import { keyBytes } from './checks.ts';
import { EngineError, type Transform } from './engine.ts';
import { mapUnbroken } from './native-memory.ts';
import { Control, type Evp, writeParam, writeText } from './openssl-evp.ts';

/** Byte offsets in the scratch. `sink` takes ciphertext that only the CBC-MAC state is wanted of. */
export const Scratch = {
  outLength: 0,
  zeroIv: 16,
  lastBlock: 32,
  mac: 64,
  tagParam: 128,
  setupParam: 256,
  tagName: 384,
  name: 400,
  value: 448,
  key: 512,
  sink: 4096,
  size: 4096 + 65536,
} as const;
export const SINK_SIZE = Scratch.size - Scratch.sink;

const AES_BLOCK = 16;

const DIGEST = {
  'hmac-sha1': 'SHA1',
  'hmac-sha256': 'SHA256',
  'hmac-sha384': 'SHA384',
  'hmac-sha512': 'SHA512',
} as const;

/** OpenSSL's name of the cipher; undefined when none is needed. */
function cipherName({ family, cipher, cipherKeyLength }: Transform): string | undefined {
  if (family === 'gmac') return `AES-${cipherKeyLength * 8}-GCM`;
  switch (cipher) {
    case undefined:
    case 'null':
      return undefined;
    case 'chacha20-poly1305':
      return 'ChaCha20-Poly1305';
    case '3des-cbc':
      return 'DES-EDE3-CBC';
    default:
      return `AES-${cipherKeyLength * 8}-${cipher.slice(4).toUpperCase()}`;
  }
}

export class OpensslObjects {
  readonly scratch: MappedMemory;
  readonly #evp: Evp;
  readonly #ciphers = new Map<string, number>();
  readonly #macs = new Map<string, number>();

  constructor(evp: Evp) {
    this.#evp = evp;
    this.scratch = mapUnbroken(Scratch.size);
    writeText(this.scratch, Scratch.tagName, 'tag');
  }

  /** Frees the algorithms and the scratch. All contexts are freed before. */
  close(): void {
    for (const cipher of this.#ciphers.values()) if (cipher !== 0) this.#evp.freeCipher(cipher);
    for (const mac of this.#macs.values()) if (mac !== 0) this.#evp.freeMac(mac);
    this.#ciphers.clear();
    this.#macs.clear();
    this.#evp.cleanse(this.scratch.address, Scratch.size);
    unmapMemory(this.scratch);
  }

  supports(transform: Transform): boolean {
    const name = cipherName(transform);
    if (name !== undefined && this.#cipher(name) === 0) return false;
    if (transform.auth === undefined || transform.auth === 'aes-gmac') return true;
    if (transform.auth === 'aes-xcbc') return this.#cipher('AES-128-CBC') !== 0;
    return this.#mac(transform.auth === 'aes-cmac' ? 'CMAC' : 'HMAC') !== 0;
  }

  /** An initialised EVP_CIPHER_CTX that lacks only the nonce; 0 when the transform needs none. */
  cipherContext(transform: Transform, key: Uint8Array, direction: 'encrypt' | 'decrypt'): number {
    const name = cipherName(transform);
    if (name === undefined) return 0;
    const evp = this.#evp;
    const init = direction === 'encrypt' ? evp.encryptInit : evp.decryptInit;
    return this.#withKey(key, (address) =>
      this.#newContext((context) => {
        if (init(context, this.#cipher(name), 0, 0, 0) !== 1) return false;
        if (transform.cipher === 'aes-ccm') {
          if (evp.control(context, Control.setIvLength, 11, 0) !== 1) return false;
          if (evp.control(context, Control.setTag, transform.icvLength, 0) !== 1) return false;
        }
        return init(context, 0, address, 0, 0) === 1 && evp.setPadding(context, 0) === 1;
      }),
    );
  }

  /** An initialised EVP_MAC_CTX, or for XCBC an EVP_CIPHER_CTX with K1; 0 when the transform needs none. */
  macContext(transform: Transform, key: Uint8Array): number {
    const { auth } = transform;
    const { scratch } = this;
    if (auth === undefined || auth === 'aes-gmac') return 0;
    if (auth === 'aes-xcbc') {
      const first = this.derive(key, 1);
      try {
        return this.#withKey(first, (address) => this.#cbcContext(address));
      } finally {
        first.fill(0);
      }
    }
    const evp = this.#evp;
    const algorithm = this.#mac(auth === 'aes-cmac' ? 'CMAC' : 'HMAC');
    const value = auth === 'aes-cmac' ? 'AES-128-CBC' : DIGEST[auth];
    const keyName = writeText(scratch, Scratch.name, auth === 'aes-cmac' ? 'cipher' : 'digest');
    const text = writeText(scratch, Scratch.value, value);
    const params = writeParam(scratch, Scratch.setupParam, keyName, 'text', text, value.length);
    return this.#withKey(key, (address) => {
      const context = evp.newMacContext(algorithm);
      if (context === 0) throw unsupported('out of memory');
      if (evp.macInit(context, address, key.length, params) === 1) return context;
      evp.freeMacContext(context);
      throw unsupported(`${auth} cannot be initialised`);
    });
  }

  /** Encrypts a block of sixteen bytes `byte`: K1 to K3 of XCBC (RFC 3566, 4). The caller wipes the result. */
  derive(key: Uint8Array, byte: number): Uint8Array {
    const { scratch } = this;
    const evp = this.#evp;
    const block = scratch.address + Scratch.lastBlock;
    const context = this.#withKey(key, (address) => this.#cbcContext(address));
    scratch.u8.fill(byte, Scratch.lastBlock, Scratch.lastBlock + AES_BLOCK);
    const iv = scratch.address + Scratch.zeroIv;
    const done =
      evp.encryptInit(context, 0, 0, iv, 0) === 1 &&
      evp.encryptUpdate(context, block, scratch.address + Scratch.outLength, block, AES_BLOCK) === 1;
    const derived = keyBytes(scratch.u8.subarray(Scratch.lastBlock, Scratch.lastBlock + AES_BLOCK));
    scratch.u8.fill(0, Scratch.lastBlock, Scratch.lastBlock + AES_BLOCK);
    evp.freeContext(context);
    if (!done) throw unsupported('AES-128-CBC failed');
    return derived;
  }

  #cbcContext(key: number): number {
    const evp = this.#evp;
    return this.#newContext(
      (context) =>
        evp.encryptInit(context, this.#cipher('AES-128-CBC'), key, 0, 0) === 1 && evp.setPadding(context, 0) === 1,
    );
  }

  #newContext(setUp: (context: number) => boolean): number {
    const context = this.#evp.newContext();
    if (context === 0) throw unsupported('out of memory');
    if (setUp(context)) return context;
    this.#evp.freeContext(context);
    throw unsupported('the cipher cannot be initialised');
  }

  #withKey<T>(key: Uint8Array, use: (address: number) => T): T {
    // Longer HMAC keys than the room before the sink do not occur in IPsec.
    if (key.length > Scratch.sink - Scratch.key) throw unsupported(`keys of ${key.length} bytes`);
    this.scratch.u8.set(key, Scratch.key);
    try {
      return use(this.scratch.address + Scratch.key);
    } finally {
      this.#evp.cleanse(this.scratch.address + Scratch.key, Math.max(key.length, 1));
    }
  }

  #cipher(name: string): number {
    return this.#fetch(this.#ciphers, name, this.#evp.fetchCipher);
  }

  #mac(name: string): number {
    return this.#fetch(this.#macs, name, this.#evp.fetchMac);
  }

  #fetch(known: Map<string, number>, name: string, fetch: Evp['fetchCipher']): number {
    let object = known.get(name);
    if (object === undefined) {
      object = fetch(0, writeText(this.scratch, Scratch.name, name), 0);
      known.set(name, object);
    }
    return object;
  }
}

function unsupported(what: string): EngineError {
  return new EngineError('ENGINE_UNSUPPORTED', `openssl: ${what}`);
}
