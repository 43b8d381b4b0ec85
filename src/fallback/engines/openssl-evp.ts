/**
 * The part of OpenSSL's EVP interface (3.0 and later) that the `openssl` engine calls, bound to the copy of libcrypto that is
 * inside of Node. Objects are addresses; a function that fails returns 0 or less, or the address 0.
 */
import { ffi } from '../../sys/ffi/ffi.ts';
import { FfiError, type NativeFunction } from '../../sys/ffi/provider.ts';
import type { MappedMemory } from '../../sys/memory.ts';
import { EngineError } from './engine.ts';
import { high, low } from './native-memory.ts';

/** OPENSSL_VERSION_NUMBER of 3.0.0. */
const OLDEST = 0x3000_0000;
/** OSSL_PARAM (core.h): key @0, data_type u32 @8, data @16, data_size @24, return_size @32. An empty one ends a list. */
const Param = { key: 0, type: 8, data: 16, dataSize: 24, returnSize: 32, size: 40 } as const;
/** OSSL_PARAM_UTF8_STRING and OSSL_PARAM_OCTET_STRING. */
const ParamType = { text: 4, bytes: 5 } as const;
/** EVP_CIPHER_CTX_ctrl commands (evp.h). */
export const Control = { setIvLength: 0x09, setTag: 0x11 } as const;

export interface Evp {
  readonly version: string;
  /** (libctx, name, properties) */
  readonly fetchCipher: NativeFunction;
  readonly freeCipher: NativeFunction;
  readonly newContext: NativeFunction;
  readonly freeContext: NativeFunction;
  /** (ctx, cipher, key, iv, params) */
  readonly encryptInit: NativeFunction;
  /** (ctx, out, &outLength, in, inLength) */
  readonly encryptUpdate: NativeFunction;
  /** (ctx, out, &outLength) */
  readonly encryptFinal: NativeFunction;
  readonly decryptInit: NativeFunction;
  readonly decryptUpdate: NativeFunction;
  readonly decryptFinal: NativeFunction;
  /** (ctx, params) */
  readonly getParams: NativeFunction;
  /** (ctx, on) */
  readonly setPadding: NativeFunction;
  /** (ctx, command, number, pointer) */
  readonly control: NativeFunction;
  readonly fetchMac: NativeFunction;
  readonly freeMac: NativeFunction;
  /** (mac) */
  readonly newMacContext: NativeFunction;
  readonly freeMacContext: NativeFunction;
  /** (ctx, key, keyLength, params) */
  readonly macInit: NativeFunction;
  /** (ctx, data, length) */
  readonly macUpdate: NativeFunction;
  /** (ctx, out, &outLength, outSize) */
  readonly macFinal: NativeFunction;
  /** (address, length) */
  readonly cleanse: NativeFunction;
}

let bound: Evp | undefined;

/** Throws `EngineError` when Node has no OpenSSL, or an older one. */
export function evp(): Evp {
  bound ??= bind();
  return bound;
}

function bind(): Evp {
  try {
    const library = ffi().open(null);
    const version = library.func('OpenSSL_version_num', 'u64', [])();
    const text = `${Math.floor(version / 2 ** 28)}.${(version >>> 20) & 0xff}.${(version >>> 4) & 0xff}`;
    if (version < OLDEST) throw new EngineError('ENGINE_VERSION_UNKNOWN', `openssl: ${text} is older than 3.0`);
    const P = 'i64';
    const f = library.func;
    return {
      version: `OpenSSL ${text}`,
      fetchCipher: f('EVP_CIPHER_fetch', P, [P, P, P]),
      freeCipher: f('EVP_CIPHER_free', 'void', [P]),
      newContext: f('EVP_CIPHER_CTX_new', P, []),
      freeContext: f('EVP_CIPHER_CTX_free', 'void', [P]),
      encryptInit: f('EVP_EncryptInit_ex2', 'i32', [P, P, P, P, P]),
      encryptUpdate: f('EVP_EncryptUpdate', 'i32', [P, P, P, P, 'i32']),
      encryptFinal: f('EVP_EncryptFinal_ex', 'i32', [P, P, P]),
      decryptInit: f('EVP_DecryptInit_ex2', 'i32', [P, P, P, P, P]),
      decryptUpdate: f('EVP_DecryptUpdate', 'i32', [P, P, P, P, 'i32']),
      decryptFinal: f('EVP_DecryptFinal_ex', 'i32', [P, P, P]),
      getParams: f('EVP_CIPHER_CTX_get_params', 'i32', [P, P]),
      setPadding: f('EVP_CIPHER_CTX_set_padding', 'i32', [P, 'i32']),
      control: f('EVP_CIPHER_CTX_ctrl', 'i32', [P, 'i32', 'i32', P]),
      fetchMac: f('EVP_MAC_fetch', P, [P, P, P]),
      freeMac: f('EVP_MAC_free', 'void', [P]),
      newMacContext: f('EVP_MAC_CTX_new', P, [P]),
      freeMacContext: f('EVP_MAC_CTX_free', 'void', [P]),
      macInit: f('EVP_MAC_init', 'i32', [P, P, 'u64', P]),
      macUpdate: f('EVP_MAC_update', 'i32', [P, P, 'u64']),
      macFinal: f('EVP_MAC_final', 'i32', [P, P, P, 'u64']),
      cleanse: f('OPENSSL_cleanse', 'void', [P, 'u64']),
    };
  } catch (cause) {
    if (!(cause instanceof FfiError)) throw cause;
    throw new EngineError(
      'ENGINE_LIBRARY_MISSING',
      'openssl: this Node does not offer the EVP interface of OpenSSL 3',
      {
        cause,
      },
    );
  }
}

/** Lays NUL-terminated text out at `offset`; returns its address. */
export function writeText(memory: MappedMemory, offset: number, text: string): number {
  for (let i = 0; i < text.length; i++) memory.u8[offset + i] = text.charCodeAt(i);
  memory.u8[offset + text.length] = 0;
  return memory.address + offset;
}

function writePointer(memory: MappedMemory, offset: number, address: number): void {
  memory.u32[offset >> 2] = low(address);
  memory.u32[(offset >> 2) + 1] = high(address);
}

/** Lays out a list of one OSSL_PARAM at `offset` (80 bytes): `length` bytes at `data`, text or not. Returns its address. */
export function writeParam(
  memory: MappedMemory,
  offset: number,
  key: number,
  kind: keyof typeof ParamType,
  data: number,
  length: number,
): number {
  memory.u8.fill(0, offset, offset + 2 * Param.size);
  writePointer(memory, offset + Param.key, key);
  memory.u32[(offset + Param.type) >> 2] = ParamType[kind];
  writePointer(memory, offset + Param.data, data);
  writePointer(memory, offset + Param.dataSize, length);
  return memory.address + offset;
}

/** Word index of the data pointer of the OSSL_PARAM at `offset`. */
export function paramDataWord(offset: number): number {
  return (offset + Param.data) >> 2;
}
