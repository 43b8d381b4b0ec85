/** The vfio-user client on ffi-rs, in a process of its own. */
Object.assign(process.env, { VIPSEC_FFI: 'ffi-rs' });

const { interruptsSuite } = await import('./suites/interrupts.ts');
const { userSuite } = await import('./suites/user.ts');

userSuite();
interruptsSuite();

export {};
