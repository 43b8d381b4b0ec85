import { describe, expect, it, vi } from 'vitest';
import { createFfi, ffiNameFrom } from '../../../src/sys/ffi/ffi.ts';

describe('the choice of a provider', () => {
  it.each([
    [undefined, 'koffi'],
    ['', 'koffi'],
    ['koffi', 'koffi'],
    ['ffi-rs', 'ffi-rs'],
  ])('VIPSEC_FFI=%s means %s', (value, name) => {
    expect(ffiNameFrom(value)).toBe(name);
  });

  it('refuses a provider that does not exist', () => {
    expect(() => ffiNameFrom('ffi-napi')).toThrow(
      expect.objectContaining({ code: 'FFI_PROVIDER_UNKNOWN', hint: expect.stringContaining('koffi') }),
    );
  });

  it('works with both providers side by side in one process', () => {
    const [koffi, ffiRs] = [createFfi('koffi'), createFfi('ffi-rs')];
    expect(koffi.open(null).func('getpid', 'i32', [])()).toBe(process.pid);
    expect(ffiRs.open(null).func('getpid', 'i32', [])()).toBe(process.pid);
  });

  it('keeps one errno per provider, so that one does not hide the error of the other', () => {
    const [koffi, ffiRs] = [createFfi('koffi'), createFfi('ffi-rs')];
    ffiRs.open(null).func('close', 'i32', ['i32'])(-1);
    koffi.open(null).func('munmap', 'i32', ['i64', 'u64'])(1, 4096);
    expect(ffiRs.errno()).toBe(9);
    expect(koffi.errno()).toBe(22);
  });

  it('refuses ffi-rs outside of the main thread, where its table of symbols is not safe', async () => {
    vi.resetModules();
    vi.doMock('node:worker_threads', () => ({ isMainThread: false }));
    const fresh = await import('../../../src/sys/ffi/ffi.ts');
    expect(() => fresh.createFfi('ffi-rs')).toThrow(expect.objectContaining({ code: 'FFI_MAIN_THREAD_ONLY' }));
    expect(fresh.createFfi('koffi').open(null).func('getpid', 'i32', [])()).toBe(process.pid);
    vi.doUnmock('node:worker_threads');
  });
});
