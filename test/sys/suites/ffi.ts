import { describe, expect, it, vi } from 'vitest';
import { EventFd } from '../../../src/sys/eventfd.ts';
import { type Ffi, ffi } from '../../../src/sys/ffi/ffi.ts';
import { mapAnonymous, unmapMemory } from '../../../src/sys/memory.ts';
import { UnixSocket } from '../../../src/sys/unix-socket.ts';

const turn = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

export function ffiSuite(name: 'koffi' | 'ffi-rs'): void {
  describe(`ffi provider ${name}`, () => {
    const provider: Ffi = ffi();
    const self = provider.open(null);

    it('is the one that VIPSEC_FFI asks for', () => {
      expect(provider.name).toBe(name);
      expect(ffi()).toBe(provider);
    });

    it('opens the node process itself, with its libc and its libcrypto', () => {
      expect(self.func('getpid', 'i32', [])()).toBe(process.pid);
      const [major] = process.versions.openssl.split('.').map(Number);
      expect(Math.floor(self.func('OpenSSL_version_num', 'u64', [])() / 2 ** 28)).toBe(major);
    });

    it('opens a library by its soname', () => {
      expect(provider.open('libm.so.6').func('abs', 'i32', ['i32'])(-7)).toBe(7);
    });

    it.each([
      ['a library that is not there', () => provider.open('libdoesnotexist.so.9'), 'FFI_LIBRARY_NOT_FOUND'],
      ['a function that is not there', () => self.func('no_such_function', 'i32', []), 'FFI_SYMBOL_NOT_FOUND'],
    ])('refuses %s when it is bound, not when it is called', (_, bind, code) => {
      expect(bind).toThrow(expect.objectContaining({ code }));
    });

    it.each([
      ['i32', -1, -1],
      ['i32', 0x7fffffff, 0x7fffffff],
      ['i64', -1, -1],
      ['i64', 7 * 2 ** 40 + 4096, 7 * 2 ** 40 + 4096],
      ['i64', -(2 ** 52) - 1, -(2 ** 52) - 1],
    ] as const)('passes %s %d in and out unchanged', (type, value, expected) => {
      // labs and abs of a negative number turn it; imaxdiv would need a structure. atoll parses text we lay out
      // ourselves.
      const memory = mapAnonymous(4096);
      memory.u8.set(new TextEncoder().encode(`${value}\0`));
      const parse = self.func(type === 'i32' ? 'atoi' : 'atoll', type, ['i64']);
      expect(parse(memory.address)).toBe(expected);
      unmapMemory(memory);
    });

    it('passes unsigned 32-bit numbers in and out unchanged', () => {
      const htonl = self.func('htonl', 'u32', ['u32']);
      expect(htonl(0xff000080)).toBe(0x800000ff);
      expect(htonl(1)).toBe(0x01000000);
    });

    it('returns a u64 beyond 2^53 as the nearest number, not as a BigInt', () => {
      const memory = mapAnonymous(4096);
      memory.u8.set(new TextEncoder().encode('18446744073709551615\0'));
      const strtoull = self.func('strtoull', 'u64', ['i64', 'i64', 'i32']);
      expect(strtoull(memory.address, 0, 10)).toBe(2 ** 64);
      unmapMemory(memory);
    });

    it('keeps errno of the call that failed', () => {
      const close = self.func('close', 'i32', ['i32']);
      expect(close(-1)).toBe(-1);
      expect(provider.errno()).toBe(9);
      const fchmod = self.func('fchmod', 'i32', ['i32', 'u32']);
      expect(fchmod(-1, 0)).toBe(-1);
      expect(provider.errno()).toBe(9);
      expect(self.func('mmap', 'i64', ['i64', 'u64', 'i32', 'i32', 'i32', 'i64'])(0, 0, 0, 0x22, -1, 0)).toBe(-1);
      expect(provider.errno()).toBe(22);
    });

    it('views native memory without a copy', () => {
      const memory = mapAnonymous(4096);
      const again = new Uint32Array(provider.view(memory.address + 16, 32));
      memory.u32[4] = 0xdecafbad;
      expect(again[0]).toBe(0xdecafbad);
      again[7] = 1;
      expect(memory.u8[44]).toBe(1);
      expect(again.length).toBe(8);
      unmapMemory(memory);
    });

    if (name === 'koffi') {
      it('calls through a function pointer', () => {
        const dlsym = self.func('dlsym', 'i64', ['i64', 'i64']);
        const memory = mapAnonymous(4096);
        memory.u8.set(new TextEncoder().encode('getpid\0'));
        const address = dlsym(0, memory.address);
        expect(provider.callsPointers).toBe(true);
        expect(provider.funcAt(address, 'i32', [])()).toBe(process.pid);
        unmapMemory(memory);
      });
    } else {
      it('says that it cannot call through a function pointer', () => {
        expect(provider.callsPointers).toBe(false);
        expect(() => provider.funcAt(4096, 'i32', [])).toThrow(expect.objectContaining({ code: 'FFI_UNSUPPORTED' }));
      });
    }

    describe('watch', () => {
      it('wakes for each signal of an eventfd, and resolves promises at once', async () => {
        const eventfd = EventFd.create();
        let woken = () => {};
        const watch = provider.watch(eventfd.fd, () => {
          eventfd.drain();
          woken();
        });
        for (let i = 0; i < 20; i++) {
          const wake = new Promise<void>((resolve) => {
            woken = resolve;
          });
          eventfd.signal();
          await wake;
        }
        watch.close();
        eventfd.close();
      });

      it('calls again while nobody drains, and not after it is closed, not even from the same turn', async () => {
        const eventfd = EventFd.create();
        eventfd.signal();
        let calls = 0;
        const watch = provider.watch(eventfd.fd, () => {
          if (++calls === 3) watch.close();
        });
        await vi.waitFor(() => expect(calls).toBe(3));
        await turn(20);
        expect(calls).toBe(3);
        watch.close();
        eventfd.close();
      });

      it('serves several descriptors, one of which closes another', async () => {
        const [a, b] = [EventFd.create(), EventFd.create()];
        const calls: string[] = [];
        const watchB = provider.watch(b.fd, () => {
          calls.push('b');
          b.drain();
        });
        const watchA = provider.watch(a.fd, () => {
          calls.push('a');
          a.drain();
          watchB.close();
        });
        a.signal();
        await vi.waitFor(() => expect(calls).toEqual(['a']));
        b.signal();
        await turn(20);
        expect(calls).toEqual(['a']);
        watchA.close();
        a.close();
        b.close();
      });

      it('does not call a watch that another one closed in the same turn', async () => {
        const eventfds = [EventFd.create(), EventFd.create()];
        let calls = 0;
        const watches = eventfds.map((eventfd) =>
          provider.watch(eventfd.fd, () => {
            calls++;
            for (const watch of watches) watch.close();
          }),
        );
        for (const eventfd of eventfds) eventfd.signal();
        await vi.waitFor(() => expect(calls).toBeGreaterThan(0));
        await turn(20);
        expect(calls).toBe(1);
        for (const eventfd of eventfds) eventfd.close();
      });

      it('lets an error that its callback throws reach the process, as from any other callback', async () => {
        const eventfd = EventFd.create();
        const others = process.listeners('uncaughtException');
        process.removeAllListeners('uncaughtException');
        const caught = new Promise((resolve) => process.once('uncaughtException', resolve));
        const watch = provider.watch(eventfd.fd, () => {
          watch.close();
          throw new Error('from the callback');
        });
        eventfd.signal();
        expect(await caught).toMatchObject({ message: 'from the callback' });
        for (const other of others) process.on('uncaughtException', other);
        eventfd.close();
      });

      it('wakes when the other end of a socket is closed', async () => {
        const [near, far] = UnixSocket.pair();
        const seen = new Promise<number>((resolve) => {
          const watch = provider.watch(near.fd, () => {
            watch.close();
            resolve(near.tryReceive(new Uint8Array(1), 0, 1));
          });
        });
        far.close();
        expect(await seen).toBe(0);
        near.close();
      });

      it('wakes when the other end is closed with data unread, which poll reports as an error', async () => {
        const [near, far] = UnixSocket.pair();
        near.send(new Uint8Array(10), Infinity);
        let calls = 0;
        const done = new Promise<unknown>((resolve) => {
          const watch = provider.watch(near.fd, () => {
            calls++;
            try {
              if (near.tryReceive(new Uint8Array(1), 0, 1) !== 0) return;
            } catch (error) {
              expect(error).toMatchObject({ code: 'ECONNRESET' });
              return;
            }
            watch.close();
            resolve(undefined);
          });
        });
        far.close();
        await done;
        expect(calls).toBe(2);
        near.close();
      });
    });
  });
}
