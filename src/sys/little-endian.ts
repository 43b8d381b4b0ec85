/**
 * Little-endian integers in private byte arrays: messages and copies, never shared memory or registers (these
 * accesses are byte by byte). Access past the end throws RangeError. A u64 is a number: exact up to 2^53, else the
 * nearest double.
 */

export function readU16(bytes: Uint8Array, at: number): number {
  checkRoom(bytes, at, 2);
  return bytes[at] | (bytes[at + 1] << 8);
}

export function readU32(bytes: Uint8Array, at: number): number {
  checkRoom(bytes, at, 4);
  return (bytes[at] | (bytes[at + 1] << 8) | (bytes[at + 2] << 16) | (bytes[at + 3] << 24)) >>> 0;
}

export function readU64(bytes: Uint8Array, at: number): number {
  return readU32(bytes, at + 4) * 2 ** 32 + readU32(bytes, at);
}

export function writeU16(bytes: Uint8Array, at: number, value: number): void {
  checkRoom(bytes, at, 2);
  bytes[at] = value;
  bytes[at + 1] = value >>> 8;
}

export function writeU32(bytes: Uint8Array, at: number, value: number): void {
  checkRoom(bytes, at, 4);
  bytes[at] = value;
  bytes[at + 1] = value >>> 8;
  bytes[at + 2] = value >>> 16;
  bytes[at + 3] = value >>> 24;
}

/** `value` is an integer from 0 to 2^53. */
export function writeU64(bytes: Uint8Array, at: number, value: number): void {
  checkRoom(bytes, at, 8);
  writeU32(bytes, at, value % 2 ** 32);
  writeU32(bytes, at + 4, Math.floor(value / 2 ** 32));
}

/** Throws RangeError unless `width` bytes from `at` on are there. */
export function checkRoom(bytes: Uint8Array, at: number, width: number): void {
  if (!(at >= 0 && at + width <= bytes.length)) throw new RangeError(`${width} bytes at ${at} of ${bytes.length}`);
}
