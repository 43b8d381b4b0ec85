/**
 * Memory that has a descriptor, so that other processes and devices can have it too.
 */
import * as libc from './libc.ts';
import { roundToPages } from './memory.ts';

/**
 * A memfd of `size` bytes, rounded up to pages, that can not become smaller any more: whoever maps it never finds its pages gone. Returns
 * its descriptor, which is the caller's to close. Throws SystemError.
 */
export function createMemoryFile(size: number): number {
  const bytes = roundToPages(size);
  const fd = libc.memfdCreate('virtio-ipsec', libc.MemfdFlag.cloexec | libc.MemfdFlag.allowSealing);
  try {
    libc.ftruncate(fd, bytes);
    libc.fcntl(fd, libc.FcntlCommand.addSeals, libc.Seal.shrink);
    return fd;
  } catch (error) {
    libc.close(fd);
    throw error;
  }
}
