/**
 * Calls into native libraries: one small interface, two providers.
 *
 * `koffi` is the default (0.05 to 0.3 µs a call); `ffi-rs` is the other (3 to 9 µs a call, main thread only, no calls
 * through function pointers). Every argument and result is a number, pointers included: an address in this process is
 * below 2^53 and so exact. Nothing else crosses the border; strings and structures are laid out in mapped memory by
 * the caller.
 *
 * Left out on purpose: callbacks from native code, floating point, structures by value.
 */
import { InputError } from '../../errors.ts';
import { createFfiRs } from './ffi-rs.ts';
import { createKoffi } from './koffi.ts';
import type { Ffi, FfiName } from './provider.ts';

export type { CType, Ffi, FfiName, Library, NativeFunction, Watch } from './provider.ts';
export { FfiError } from './provider.ts';

/** Makes a provider by name. */
export function createFfi(name: FfiName): Ffi {
  return name === 'koffi' ? createKoffi() : createFfiRs();
}

/** The provider that `VIPSEC_FFI` asks for. Throws `FFI_PROVIDER_UNKNOWN`. */
export function ffiNameFrom(value: string | undefined): FfiName {
  if (value === undefined || value === '' || value === 'koffi') return 'koffi';
  if (value === 'ffi-rs') return 'ffi-rs';
  throw new InputError('FFI_PROVIDER_UNKNOWN', `VIPSEC_FFI=${value} is not a provider`, {
    hint: 'use koffi (the default) or ffi-rs',
  });
}

let chosen: Ffi | null = null;

/** The provider of this thread, chosen once by the environment variable `VIPSEC_FFI`. */
export function ffi(): Ffi {
  const { VIPSEC_FFI } = process.env;
  chosen ??= createFfi(ffiNameFrom(VIPSEC_FFI));
  return chosen;
}
