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

/** More calls of one name than are made. */
const MOST = 200;

/** Which call of `name` is to fail, counted from 0 while `armed`; how many there were of it. */
const fault = vi.hoisted(() => ({ armed: false, name: '', failing: 0, calls: 0, errno: 0 }));

vi.mock('../../src/sys/ffi/koffi.ts', async (original) => {
  const { createKoffi } = await original<typeof import('../../src/sys/ffi/koffi.ts')>();
  const failing = (library: Library): Library => ({
    func(name, result, args) {
      const call = library.func(name, result, args);
      const errno = FAILS[name];
      if (errno === undefined) return call;
      return (...values) => {
        fault.errno = 0;
        if (!fault.armed || name !== fault.name || fault.calls++ !== fault.failing) return call(...values);
        fault.errno = errno;
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

/** Opens a function and has what a driver has of it, while call `failing` of `name` fails; then gives it all back. False when that call was made. */
async function openOnce(name: string, failing: number): Promise<boolean> {
  const server = await startFake();
  const undo: (() => void)[] = [];
  Object.assign(fault, { armed: true, name, failing, calls: 0 });
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
    // What is on its way to the server has descriptors, too, which are this process's.
    if (name !== 'socket' && name !== 'connect') await server.closed();
    await server.stop();
  }
}

it.each(Object.keys(FAILS))(
  'leaves no descriptor and no mapping behind, whichever %s of opening a function fails',
  async (name) => {
    // A thread for servers, and scratch memory.
    await openOnce('', 0);
    const before = held();
    let failing = 0;
    // How often it asks before an answer is there, nobody knows: the last ones may be beyond those that are made.
    for (; failing < MOST && !(await openOnce(name, failing)); failing++) expect(held()).toEqual(before);
    expect(failing).toBeGreaterThan(0);
    expect(failing).toBeLessThan(MOST);
    expect(held()).toEqual(before);
  },
);
