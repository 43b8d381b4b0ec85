/** Each system call of opening a vfio-user function fails once, in a process of its own. */
import { readdirSync, readFileSync } from 'node:fs';
import { constants as os } from 'node:os';
import { expect, it, vi } from 'vitest';
import type { Ffi, Library } from '../../src/sys/ffi/provider.ts';

/** System calls that give something or can run out of it, and how they fail. */
const FAILS: Readonly<Record<string, number>> = {
  mmap: os.errno.ENOMEM,
  memfd_create: os.errno.EMFILE,
  ftruncate: os.errno.ENOSPC,
  fallocate: os.errno.ENOSPC,
  fcntl: os.errno.EINVAL,
  eventfd: os.errno.EMFILE,
  socket: os.errno.EMFILE,
  connect: os.errno.ECONNREFUSED,
  sendmsg: os.errno.ENOBUFS,
  recvmsg: os.errno.ENOMEM,
};

/** Which call is to fail, counted from 0 while `armed`; how many there were. */
const fault = vi.hoisted(() => ({ armed: false, failing: -1, calls: 0, errno: 0, hit: '' }));

vi.mock('../../src/sys/ffi/koffi.ts', async (original) => {
  const { createKoffi } = await original<typeof import('../../src/sys/ffi/koffi.ts')>();
  const failing = (library: Library): Library => ({
    func(name, result, args) {
      const call = library.func(name, result, args);
      const errno = FAILS[name];
      if (errno === undefined) return call;
      return (...values) => {
        fault.errno = 0;
        if (!fault.armed || fault.calls++ !== fault.failing) return call(...values);
        fault.errno = errno;
        fault.hit = name;
        return -1;
      };
    },
  });
  const wrapped = (): Ffi => {
    const ffi = createKoffi();
    return { ...ffi, open: (path) => failing(ffi.open(path)), errno: () => fault.errno || ffi.errno() };
  };
  return { createKoffi: wrapped };
});

Object.assign(process.env, { VIPSEC_FFI: 'koffi' });

const { VipsecError } = await import('../../src/errors.ts');
const { openVfioUser } = await import('../../src/vfio/user.ts');
const { Interrupts } = await import('../../src/vfio/interrupts.ts');
const { startFake } = await import('./fake.ts');

/** Descriptors, and mappings of DMA memory. */
function held(): { descriptors: number; mappings: number } {
  const mappings = readFileSync('/proc/self/maps', 'latin1')
    .split('\n')
    .filter((line) => line.includes('ipsec-dma'));
  return { descriptors: readdirSync('/proc/self/fd').length, mappings: mappings.length };
}

/** Opens a function and has what a driver has of it; then gives it all back. False when a call failed. */
async function openOnce(failing: number): Promise<boolean> {
  const server = await startFake();
  const undo: (() => void)[] = [];
  Object.assign(fault, { armed: true, failing, calls: 0, hit: '' });
  try {
    const fn = openVfioUser(server.path, { timeoutMs: 10_000 });
    undo.push(() => fn.close());
    fn.allocateDma(8192);
    const interrupts = new Interrupts(fn, 2);
    undo.push(() => interrupts.close());
    fn.bar(0).read32(0);
    return true;
  } catch (error) {
    if (!(error instanceof VipsecError)) throw error;
    return false;
  } finally {
    fault.armed = false;
    for (const step of undo.reverse()) step();
    await server.stop();
  }
}

it('leaves no descriptor and no mapping behind, whichever system call of opening a function fails', async () => {
  expect(await openOnce(-1)).toBe(true);
  const { calls } = fault;
  expect(calls).toBeGreaterThan(40);
  const before = held();
  const left: string[] = [];
  const failed = new Set<string>();
  for (let failing = 0; failing < calls; failing++) {
    // A server that is slower or quicker is waited for more or less often: not every number is reached each time.
    await openOnce(failing);
    if (fault.hit !== '') failed.add(fault.hit);
    const now = held();
    if (now.descriptors !== before.descriptors || now.mappings !== before.mappings) {
      left.push(`${fault.hit}, call ${failing}: ${JSON.stringify(now)} instead of ${JSON.stringify(before)}`);
      Object.assign(before, now);
    }
  }
  expect(left).toEqual([]);
  for (const name of Object.keys(FAILS)) expect(failed).toContain(name);
});
