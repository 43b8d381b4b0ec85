import { mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { SystemError } from '../../../src/errors.ts';
import { EventFd } from '../../../src/sys/eventfd.ts';
import * as libc from '../../../src/sys/libc.ts';
import { mapAnonymous, mapShared, unmapMemory } from '../../../src/sys/memory.ts';

export function libcSuite(): void {
  describe('libc', () => {
    let directory: string;
    beforeAll(() => {
      directory = mkdtempSync(join(tmpdir(), 'libc-'));
    });
    afterAll(() => rmSync(directory, { recursive: true }));

    it.each([
      ['ENOENT', 'open', () => libc.open('/does/not/exist', libc.OpenFlag.readOnly)],
      ['EISDIR', 'open', () => libc.open('/', libc.OpenFlag.readWrite)],
      ['EBADF', 'close', () => libc.close(-1)],
      ['EBADF', 'fstat', () => libc.fstat(-1)],
      ['EBADF', 'ftruncate', () => libc.ftruncate(-1, 0)],
      ['EINVAL', 'mmap', () => libc.mmap(0, 0, 0, libc.MapFlag.private | libc.MapFlag.anonymous, -1, 0)],
      ['EINVAL', 'munmap', () => libc.munmap(1, 4096)],
      ['EBADF', 'ioctl', () => libc.ioctl(-1, 0x5401, 0)],
      ['EBADF', 'sendmsg', () => libc.sendmsg(-1, 0, 0)],
      ['EBADF', 'recvmsg', () => libc.recvmsg(-1, 0, 0)],
      ['EINVAL', 'memfd_create', () => libc.memfdCreate('x', 0x40000000)],
      ['ENAMETOOLONG', 'open', () => libc.open('x'.repeat(20000), 0)],
      ['EINVAL', 'open', () => libc.open('a\0b', 0)],
      ['EINVAL', 'getrlimit', () => libc.getrlimit(9999)],
    ])('throws SystemError %s of %s', (code, syscall, call) => {
      let thrown: unknown;
      try {
        call();
      } catch (error) {
        thrown = error;
      }
      expect(thrown).toBeInstanceOf(SystemError);
      expect(thrown).toMatchObject({ code, syscall, name: 'SystemError' });
      expect((thrown as SystemError).errno).toBe(constants.errno[code as keyof typeof constants.errno]);
    });

    it('names an errno that Node does not know by its number', () => {
      expect(libc.errnoName(4095)).toBe('ERRNO_4095');
      expect(libc.systemError('x', 4095).message).toBe('x: ERRNO_4095');
    });

    it('reads and writes files at offsets', () => {
      const path = join(directory, 'päth');
      writeFileSync(path, 'hello world');
      const fd = libc.open(path, libc.OpenFlag.readWrite);
      const memory = mapAnonymous(4096);
      expect(libc.read(fd, memory.address, 5)).toBe(5);
      expect(new TextDecoder().decode(memory.u8.subarray(0, 5))).toBe('hello');
      expect(libc.pread(fd, memory.address, 100, 6)).toBe(5);
      expect(new TextDecoder().decode(memory.u8.subarray(0, 5))).toBe('world');
      expect(libc.pwrite(fd, memory.address, 5, 0)).toBe(5);
      expect(libc.pread(fd, memory.address, 11, 0)).toBe(11);
      expect(new TextDecoder().decode(memory.u8.subarray(0, 11))).toBe('world world');
      expect(libc.fstat(fd).size).toBe(11);
      expect(libc.fstat(fd).inode).toBe(statSync(path, { bigint: true }).ino);
      expect(libc.fcntl(fd, libc.FcntlCommand.getDescriptorFlags)).toBe(1);
      libc.close(fd);
      unmapMemory(memory);
    });

    it('passes file offsets beyond 32 bits exactly', () => {
      const fd = libc.memfdCreate('far');
      const far = 7 * 2 ** 40;
      libc.ftruncate(fd, far + 4096);
      expect(libc.fstat(fd).size).toBe(far + 4096);
      const mapped = mapShared(fd, far, 4096, { write: true });
      mapped.u32[0] = 77;
      const memory = mapAnonymous(4096);
      expect(libc.pread(fd, memory.address, 4, far)).toBe(4);
      expect(memory.u32[0]).toBe(77);
      expect(libc.pread(fd, memory.address, 4, 0)).toBe(4);
      expect(memory.u32[0]).toBe(0);
      libc.fallocate(fd, libc.FallocateMode.punchHole | libc.FallocateMode.keepSize, far, 4096);
      expect(mapped.u32[0]).toBe(0);
      unmapMemory(mapped);
      unmapMemory(memory);
      libc.close(fd);
    });

    it('keeps a sealed memfd from shrinking', () => {
      const fd = libc.memfdCreate('sealed', libc.MemfdFlag.cloexec | libc.MemfdFlag.allowSealing);
      libc.ftruncate(fd, 8192);
      libc.fcntl(fd, libc.FcntlCommand.addSeals, libc.Seal.shrink);
      expect(() => libc.ftruncate(fd, 4096)).toThrow(expect.objectContaining({ code: 'EPERM' }));
      expect(libc.fcntl(fd, libc.FcntlCommand.getSeals)).toBe(libc.Seal.shrink);
      libc.close(fd);
    });

    it('polls with a deadline that it keeps', () => {
      const eventfd = EventFd.create();
      const start = performance.now();
      expect(libc.poll(eventfd.fd, libc.PollEvent.in, 30)).toBe(0);
      expect(performance.now() - start).toBeGreaterThanOrEqual(29);
      expect(libc.poll(eventfd.fd, libc.PollEvent.out, 1000)).toBe(libc.PollEvent.out);
      eventfd.signal();
      expect(libc.poll(eventfd.fd, libc.PollEvent.in, -1)).toBe(libc.PollEvent.in);
      expect(libc.poll(eventfd.fd, libc.PollEvent.in, 0)).toBe(libc.PollEvent.in);
      eventfd.close();
    });

    it('tells the limit of open files', () => {
      const { soft, hard } = libc.getrlimit(libc.ResourceLimit.openFiles);
      expect(soft).toBeGreaterThan(0);
      expect(hard).toBeGreaterThanOrEqual(soft);
    });
  });

  describe('EventFd', () => {
    it('adds up signals until they are drained', () => {
      const eventfd = EventFd.create();
      expect(eventfd.drain()).toBe(0);
      for (let i = 0; i < 5; i++) eventfd.signal();
      expect(eventfd.drain()).toBe(5);
      expect(eventfd.drain()).toBe(0);
      eventfd.close();
    });

    it('takes over an eventfd and makes it non-blocking, so that a full counter does not block', () => {
      const fd = libc.eventfd(0, 0);
      const eventfd = EventFd.adopt(fd);
      expect(libc.fcntl(fd, libc.FcntlCommand.getStatusFlags) & libc.OpenFlag.nonblock).toBe(libc.OpenFlag.nonblock);
      const memory = mapAnonymous(8);
      memory.u32.set([0xfffffffe, 0xffffffff]);
      libc.write(fd, memory.address, 8);
      eventfd.signal();
      expect(eventfd.drain()).toBe(2 ** 64);
      eventfd.close();
      unmapMemory(memory);
    });

    it('finds nothing, and does not wait for it, when the peer has made the descriptor one that waits', () => {
      const eventfd = EventFd.create();
      const { getStatusFlags, setStatusFlags } = libc.FcntlCommand;
      libc.fcntl(eventfd.fd, setStatusFlags, libc.fcntl(eventfd.fd, getStatusFlags) & ~libc.OpenFlag.nonblock);
      expect(eventfd.drain()).toBe(0);
      eventfd.signal();
      expect(eventfd.drain()).toBe(1);
      eventfd.close();
    });

    it('refuses a descriptor that is not an eventfd and leaves it open', () => {
      const fd = libc.memfdCreate('no eventfd');
      expect(() => EventFd.adopt(fd)).toThrow(expect.objectContaining({ code: 'EINVAL' }));
      expect(libc.fstat(fd).size).toBe(0);
      libc.close(fd);
    });

    it('does nothing once it is closed', () => {
      const eventfd = EventFd.create();
      eventfd.close();
      eventfd.close();
      eventfd.signal();
      expect(eventfd.drain()).toBe(0);
    });
  });
}
