/** What an FFI provider is: the interface that `ffi.ts` describes, without the choice between providers. */
import { VipsecError } from '../../errors.ts';

/** Types of arguments and results. A pointer is `i64`. */
export type CType = 'void' | 'i32' | 'u32' | 'i64' | 'u64';

/**
 * A native function. A 64-bit result beyond 2^53 is rounded to the nearest double. A `void` result is 0 or undefined
 * and means nothing.
 */
export type NativeFunction = (...args: number[]) => number;

export interface Library {
  /**
   * Binds symbol `name`. Throws `FFI_SYMBOL_NOT_FOUND`. Bind once and keep the function: binding is slow, calling is
   * not.
   */
  func(name: string, result: CType, args: readonly CType[]): NativeFunction;
}

/** Watches a descriptor from the event loop. Holds the loop open until closed, or while `unref` is in force. */
export interface Watch {
  /** Stops watching; the callback is not called again. Close the watch before the descriptor. Idempotent. */
  close(): void;
  ref(): void;
  unref(): void;
}

export type FfiName = 'koffi' | 'ffi-rs';

export interface Ffi {
  readonly name: FfiName;
  /** Whether `funcAt` works. */
  readonly callsPointers: boolean;
  /**
   * Opens a shared library by soname or path; `null` is the node process itself with its libc, libcrypto and libuv.
   * Throws `FFI_LIBRARY_NOT_FOUND`.
   */
  open(library: string | null): Library;
  /** Binds the function at `address`. Throws `FFI_UNSUPPORTED` with ffi-rs. */
  funcAt(address: number, result: CType, args: readonly CType[]): NativeFunction;
  /**
   * The `length` bytes at `address` as an ArrayBuffer, not copied and not owned: whoever mapped the memory must keep it
   * mapped, with something, until the buffer is garbage (see `memory.ts`).
   */
  view(address: number, length: number): ArrayBuffer;
  /** `errno` as the last call through this provider in this thread left it; only meaningful when that call failed. */
  errno(): number;
  /**
   * Calls `onReadable` from the event loop while `fd` is readable, hung up or in error (level-triggered). koffi asks
   * the event loop's own epoll. ffi-rs has no way to do so and asks poll(2) once a millisecond.
   */
  watch(fd: number, onReadable: () => void): Watch;
  /** Address of the `uv_loop_t` of this thread's event loop. */
  eventLoop(): number;
}

/**
 * An error of a provider: `FFI_UNAVAILABLE`, `FFI_LIBRARY_NOT_FOUND`, `FFI_SYMBOL_NOT_FOUND`, `FFI_UNSUPPORTED`,
 * `FFI_MAIN_THREAD_ONLY`.
 */
export class FfiError extends VipsecError {}
