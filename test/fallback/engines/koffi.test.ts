/** The engines on koffi. Each test file is a process of its own, so the provider is chosen before anything is loaded. */
Object.assign(process.env, { VIPSEC_FFI: 'koffi' });

const { matrixSuite } = await import('./suites/matrix.ts');
const { robustnessSuite } = await import('./suites/robustness.ts');
const { vectorsSuite } = await import('./suites/vectors.ts');

vectorsSuite();
matrixSuite();
robustnessSuite();

export {};
