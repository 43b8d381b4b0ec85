/**
 * Little-endian fields of a structure in ordinary memory: capabilities and resource objects before they are copied to, or
 * after they were copied from, a command buffer. Structures of virtio have no implicit padding, so fields may be unaligned.
 *
 * Reading past the end gives zeros: that is how the standard treats fields that a shorter buffer leaves out (Virtio 1.4,
 * 2.12.1). Writing past the end throws RangeError. Not for shared memory, and not for the data path.
 */
import { checkRoom, writeU16 as put16, writeU32 as put32 } from '../sys/little-endian.ts';

export { put16, put32 };

/** A byte, or 0 past the end. */
export function get8(bytes: Uint8Array, at: number): number {
  return at < bytes.length ? bytes[at] : 0;
}

export function get16(bytes: Uint8Array, at: number): number {
  return get8(bytes, at) | (get8(bytes, at + 1) << 8);
}

export function get32(bytes: Uint8Array, at: number): number {
  return (get16(bytes, at) | (get16(bytes, at + 2) << 16)) >>> 0;
}

export function get64(bytes: Uint8Array, at: number): bigint {
  return BigInt(get32(bytes, at)) | (BigInt(get32(bytes, at + 4)) << 32n);
}

/** A copy of `length` bytes, zeros where `bytes` has ended. */
export function getBytes(bytes: Uint8Array, at: number, length: number): Uint8Array {
  const copy = new Uint8Array(length);
  if (at < bytes.length) copy.set(bytes.subarray(at, at + length));
  return copy;
}

export function put8(bytes: Uint8Array, at: number, value: number): void {
  checkRoom(bytes, at, 1);
  bytes[at] = value;
}

export function put64(bytes: Uint8Array, at: number, value: bigint): void {
  checkRoom(bytes, at, 8);
  put32(bytes, at, Number(value & 0xffffffffn));
  put32(bytes, at + 4, Number((value >> 32n) & 0xffffffffn));
}

export function putBytes(bytes: Uint8Array, at: number, value: Uint8Array): void {
  checkRoom(bytes, at, value.length);
  bytes.set(value, at);
}
