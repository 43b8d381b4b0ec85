/** The engines on ffi-rs. Each test file is a process of its own, so the provider is chosen before anything is loaded. */
import { vi } from 'vitest';

Object.assign(process.env, { VIPSEC_FFI: 'ffi-rs' });

const { matrixSuite } = await import('./suites/matrix.ts');
const { robustnessSuite } = await import('./suites/robustness.ts');
const { vectorsSuite } = await import('./suites/vectors.ts');

// Some of these take a second each, and longer on a machine that is busy.
vi.setConfig({ testTimeout: 30_000 });

vectorsSuite();
matrixSuite();
robustnessSuite();
