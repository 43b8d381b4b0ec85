/**
 * Reading untrusted objects field by field: each accessor checks type and range and throws an `IpsecError` whose `path`
 * names the field (`sas[0].tunnel.ttl`). No message repeats the value of a field, because it may be a key in the
 * wrong place.
 */
import { IpsecError } from '../errors.ts';
import { type ParsedPrefix, parseIp, parsePrefix } from '../packet/addresses.ts';
import { SecretBytes } from './secret.ts';

/** Codes of the errors that validation throws. */
export const SaErrorCode = {
  type: 'SA_TYPE',
  unknownField: 'SA_UNKNOWN_FIELD',
  missing: 'SA_MISSING_FIELD',
  value: 'SA_VALUE',
  keyLength: 'SA_KEY_LENGTH',
  weakKey: 'SA_WEAK_KEY',
  combination: 'SA_COMBINATION',
  duplicate: 'SA_DUPLICATE',
  keyReused: 'SA_KEY_REUSED',
} as const;

export type SaErrorCode = (typeof SaErrorCode)[keyof typeof SaErrorCode];

/** The error for the field at `path`. */
export function fieldError(code: SaErrorCode, path: string, what: string, hint?: string): IpsecError {
  return new IpsecError(code, `${path}: ${what}`, { path, ...(hint === undefined ? {} : { hint }) });
}

/** Bytes as a user may write them: hexadecimal text or the bytes themselves. */
export type BytesInput = string | Uint8Array;

/** An integer as a user may write it: also as decimal or 0x text, which carries 64 bits through JSON. */
export type IntegerInput = number | bigint | string;

/** An IP address as text or as 4 or 16 bytes in network order. */
export type AddressInput = string | Uint8Array;

/** An address with a length: text such as `10.0.0.0/8`, or both parts. */
export type PrefixInput = string | ParsedPrefix;

/** One object whose fields are read. Absent and `undefined` are the same. */
export class Fields {
  readonly path: string;
  readonly #values: Map<string, unknown>;

  /** Throws unless `value` is an object that has none but the `known` fields. */
  constructor(value: unknown, path: string, known: readonly string[]) {
    if (typeof value !== 'object' || value === null || Array.isArray(value) || ArrayBuffer.isView(value)) {
      throw fieldError(SaErrorCode.type, path, 'must be an object');
    }
    this.path = path;
    this.#values = new Map(Object.entries(value).filter(([, field]) => field !== undefined));
    for (const name of this.#values.keys()) {
      if (known.includes(name)) continue;
      const shown = /^\w{1,24}$/.test(name) ? `${path}.${name}` : path;
      throw fieldError(SaErrorCode.unknownField, shown, 'is not a known field', `fields here: ${known.join(', ')}`);
    }
  }

  at(name: string): string {
    return `${this.path}.${name}`;
  }

  has(name: string): boolean {
    return this.#values.has(name);
  }

  /** The raw value of a field that must be there. */
  required(name: string): unknown {
    if (!this.has(name)) throw fieldError(SaErrorCode.missing, this.at(name), 'is required');
    return this.#values.get(name);
  }

  raw(name: string): unknown {
    return this.#values.get(name);
  }

  /** One of `choices`; `fallback` when absent, required without one. */
  choice<T extends string>(name: string, choices: readonly T[], fallback?: T): T {
    if (fallback !== undefined && !this.has(name)) return fallback;
    const value = this.required(name);
    const found = choices.find((choice) => choice === value);
    if (found === undefined) throw fieldError(SaErrorCode.value, this.at(name), `must be one of ${choices.join(', ')}`);
    return found;
  }

  boolean(name: string): boolean {
    const value = this.#values.get(name) ?? false;
    if (typeof value !== 'boolean') throw fieldError(SaErrorCode.type, this.at(name), 'must be true or false');
    return value;
  }

  /** An integer from `min` to `max`; `fallback` when absent, required without one. */
  integer(name: string, min: number, max: number, fallback?: number): number {
    return Number(this.bigint(name, BigInt(min), BigInt(max), fallback === undefined ? undefined : BigInt(fallback)));
  }

  /** As `integer`, to 64 bits. */
  bigint(name: string, min: bigint, max: bigint, fallback?: bigint): bigint {
    if (fallback !== undefined && !this.has(name)) return fallback;
    const value = toBigint(this.required(name));
    if (value === null) {
      throw fieldError(SaErrorCode.type, this.at(name), 'must be an integer, or a decimal or 0x string');
    }
    if (value < min || value > max) {
      throw fieldError(SaErrorCode.value, this.at(name), `must be from ${min} to ${max}`);
    }
    return value;
  }

  /** Secret or public bytes, copied; `null` when absent. */
  bytes(name: string): SecretBytes | null {
    const value = this.#values.get(name);
    if (value === undefined) return null;
    if (value instanceof Uint8Array) return SecretBytes.copy(value);
    const digits = typeof value === 'string' ? /^(?:0x)?((?:[0-9a-f]{2})*)$/i.exec(value) : null;
    if (digits === null) {
      throw fieldError(SaErrorCode.type, this.at(name), 'must be bytes: an even number of hexadecimal digits');
    }
    const secret = new SecretBytes(digits[1].length / 2);
    for (let i = 0; i < secret.length; i++) secret[i] = Number.parseInt(digits[1].slice(2 * i, 2 * i + 2), 16);
    return secret;
  }

  /** An address of either family; required. */
  address(name: string): Uint8Array {
    const value = this.required(name);
    if (value instanceof Uint8Array && (value.length === 4 || value.length === 16)) return value.slice();
    const parsed = typeof value === 'string' ? parseIp(value) : null;
    if (parsed === null) throw fieldError(SaErrorCode.value, this.at(name), 'must be an IPv4 or IPv6 address');
    return parsed;
  }

  /** A prefix of either family; `null` when absent. */
  prefix(name: string): ParsedPrefix | null {
    const value = this.#values.get(name);
    if (value === undefined) return null;
    const parsed = typeof value === 'string' ? parsePrefix(value) : prefixOf(value);
    if (parsed === null) {
      throw fieldError(
        SaErrorCode.value,
        this.at(name),
        'must be an address, or an address and a length with no bits set behind the length',
      );
    }
    return parsed;
  }
}

function prefixOf(value: unknown): ParsedPrefix | null {
  if (typeof value !== 'object' || value === null || !('address' in value) || !('length' in value)) return null;
  const { address, length } = value;
  if (!(address instanceof Uint8Array) || (address.length !== 4 && address.length !== 16)) return null;
  if (typeof length !== 'number' || !Number.isInteger(length) || length < 0 || length > address.length * 8) return null;
  for (let bit = length; bit < address.length * 8; bit++) {
    if ((address[bit >>> 3] & (0x80 >>> (bit & 7))) !== 0) return null;
  }
  return { address: address.slice(), length };
}

function toBigint(value: unknown): bigint | null {
  if (typeof value === 'bigint') return value;
  if (typeof value === 'number') return Number.isSafeInteger(value) ? BigInt(value) : null;
  if (typeof value !== 'string' || !/^(?:0|[1-9]\d{0,19}|0x[0-9a-f]{1,16})$/i.test(value)) return null;
  return BigInt(value);
}
