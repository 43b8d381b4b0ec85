/**
 * The system layer on koffi. Each test file is a process of its own, so the provider is chosen before anything is
 * loaded.
 */
Object.assign(process.env, { VIPSEC_FFI: 'koffi' });

const { ffiSuite } = await import('./suites/ffi.ts');
const { libcSuite } = await import('./suites/libc.ts');
const { memorySuite } = await import('./suites/memory.ts');
const { readableSuite } = await import('./suites/readable.ts');
const { unixSocketSuite } = await import('./suites/unix-socket.ts');

ffiSuite('koffi');
libcSuite();
memorySuite();
readableSuite();
unixSocketSuite();

export {};
