import { readdirSync, readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { type CryptoEngine, JobStatus, type Transform } from '../../../../src/fallback/engines/engine.ts';
import { AVAILABLE, withEngine } from './support.ts';

interface Case {
  readonly name: string;
  readonly key: string;
  readonly iv?: string;
  readonly aad?: string;
  readonly plaintext?: string;
  readonly ciphertext?: string;
  readonly tag?: string;
  readonly message?: string;
  readonly mac?: string;
}

interface VectorFile {
  readonly source: string;
  readonly cipher?: NonNullable<Transform['cipher']>;
  readonly auth?: NonNullable<Transform['auth']>;
  readonly cases: readonly Case[];
}

const folder = new URL('../../../vectors/', import.meta.url);
/** Files of algorithms; those of whole packets have another form. */
const files: readonly [string, VectorFile][] = readdirSync(folder)
  .map((file): [string, VectorFile] => [file, JSON.parse(readFileSync(new URL(file, folder), 'utf8'))])
  .filter(([, content]) => content.source !== undefined && (content.cipher ?? content.auth) !== undefined);

const hex = (text = '') => Uint8Array.from(Buffer.from(text, 'hex'));
const toHex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');

/** The transform that a case exercises: the vectors have key lengths that IPsec has not. */
function transformOf(file: VectorFile, one: Case): Transform {
  const keyLength = hex(one.key).length;
  const icv = (full: number) => Math.min(full, hex(one.mac).length);
  if (file.auth === 'aes-gmac') {
    return {
      id: 'gmac',
      family: 'gmac',
      auth: 'aes-gmac',
      cipherKeyLength: keyLength,
      authKeyLength: 0,
      icvLength: 16,
    };
  }
  if (file.auth !== undefined) {
    const full = { 'hmac-sha1': 20, 'hmac-sha256': 32, 'hmac-sha384': 48, 'hmac-sha512': 64 } as const;
    const used = { 'hmac-sha1': 12, 'hmac-sha256': 16, 'hmac-sha384': 24, 'hmac-sha512': 32 } as const;
    const auth = file.auth;
    const icvLength = auth in full ? icv(used[auth as keyof typeof used]) : 12;
    return {
      id: `${auth}-${keyLength}`,
      family: 'auth',
      auth,
      cipherKeyLength: 0,
      authKeyLength: keyLength,
      icvLength,
    };
  }
  const cipher = file.cipher ?? 'null';
  if (one.tag !== undefined) {
    return { id: cipher, family: 'aead', cipher, cipherKeyLength: keyLength, authKeyLength: 0, icvLength: 16 };
  }
  const auth = 'hmac-sha1';
  return {
    id: cipher,
    family: 'cipher-auth',
    cipher,
    auth,
    cipherKeyLength: keyLength,
    authKeyLength: 20,
    icvLength: 12,
  };
}

interface Result {
  readonly encrypted: string;
  readonly icv: string;
  readonly decrypted: string;
  readonly status: number;
}

/** Runs one case alone; undefined when the engine leaves that transform out. */
function runCase(create: (typeof AVAILABLE)[number], file: VectorFile, one: Case): Result | undefined {
  const transform = transformOf(file, one);
  let result: Result | undefined;
  withEngine(create, 8192, (engine: CryptoEngine, memory, burst) => {
    if (!engine.supports(transform)) return;
    const text = hex(one.plaintext);
    const message = file.auth === undefined ? text : hex(one.message);
    const keys =
      file.auth !== undefined && file.auth !== 'aes-gmac'
        ? { cipherKey: hex(), authKey: hex(one.key) }
        : { cipherKey: hex(one.key), authKey: new Uint8Array(transform.authKeyLength) };
    memory.u8.set(message, 64);
    burst.count = 1;
    burst.authOffset[0] = 64;
    burst.cipherOffset[0] = 64;
    burst.authLength[0] = message.length;
    burst.cipherLength[0] = text.length;
    burst.icvOffset[0] = 64 + message.length;
    burst.memory.u8.set(hex(one.iv), 0);
    burst.aadLength = hex(one.aad).length;
    burst.memory.u8.set(hex(one.aad), 16 * burst.context.length);
    burst.context[0] = engine.createContext(transform, keys, 'encrypt');
    engine.encrypt(transform, burst);
    expect(burst.status[0]).toBe(JobStatus.ok);
    const encrypted = toHex(memory.u8.slice(64, 64 + text.length));
    const icv = toHex(memory.u8.slice(64 + message.length, 64 + message.length + transform.icvLength));
    burst.context[0] = engine.createContext(transform, keys, 'decrypt');
    engine.decrypt(transform, burst);
    result = { encrypted, icv, decrypted: toHex(memory.u8.slice(64, 64 + text.length)), status: burst.status[0] };
  });
  return result;
}

export function vectorsSuite(): void {
  for (const create of AVAILABLE) {
    withEngine(create, 4096, (engine) => {
      describe(`${engine.version} and the published vectors`, () => {
        it.each(files)('gives the values of %s', (_, file) => {
          let done = 0;
          for (const one of file.cases) {
            const result = runCase(create, file, one);
            if (result === undefined) continue;
            done++;
            expect(result.status, one.name).toBe(JobStatus.ok);
            expect(result.encrypted, one.name).toBe(one.ciphertext ?? '');
            expect(result.decrypted, one.name).toBe(one.plaintext ?? '');
            const mac = one.tag ?? one.mac;
            if (mac !== undefined) expect(mac.startsWith(result.icv), `${one.name}: ${result.icv}`).toBe(true);
          }
          // noble has no 3DES; everything else is done, but for HMAC keys longer than a block with ipsec-mb.
          const left = engine.name === 'noble' && file.cipher === '3des-cbc' ? file.cases.length : 0;
          const longKeys = engine.name === 'ipsec-mb' ? longKeyCases(file) : 0;
          expect(done).toBe(file.cases.length - left - longKeys);
        });
      });
    });
  }
}

function longKeyCases(file: VectorFile): number {
  if (file.auth?.startsWith('hmac-') !== true) return 0;
  const block = file.auth === 'hmac-sha384' || file.auth === 'hmac-sha512' ? 128 : 64;
  return file.cases.filter((one) => hex(one.key).length > block).length;
}
