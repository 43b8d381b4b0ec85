/**
 * An eventfd: a 64-bit counter behind a descriptor, readable while it is not zero (eventfd(2)). Interrupts and
 * doorbells travel as eventfds. Whether a descriptor waits is a flag that both sides have in common: a peer that takes it back and
 * fills the counter stops `signal`, one that empties the counter in between stops `drain`, and with it this thread.
 */
import { readlinkSync } from 'node:fs';
import { constants as os } from 'node:os';
import { SystemError } from '../errors.ts';
import { close, eventfd, FcntlCommand, fcntl, OpenFlag, read, write } from './libc.ts';
import { type MappedMemory, mapAnonymous } from './memory.ts';

/**
 * Where the counter is read to (u64 @0) and written from (u64 1 @8). One for all, as no call is interrupted by
 * another.
 */
let scratch: MappedMemory | null = null;
const ONE = 8;

function counter(): MappedMemory {
  if (scratch === null) {
    scratch = mapAnonymous(16);
    scratch.u32[ONE / 4] = 1;
  }
  return scratch;
}

export class EventFd {
  readonly fd: number;
  #open = true;

  /** Owns `fd`, which is a non-blocking eventfd: see `create` and `adopt`. */
  private constructor(fd: number) {
    this.fd = fd;
  }

  static create(): EventFd {
    return new EventFd(eventfd());
  }

  /**
   * Takes over a descriptor that came from another process. Throws SystemError `EINVAL` (the caller keeps the
   * descriptor) when it is not an eventfd; makes it non-blocking, so that a reader which is behind cannot stall `signal`.
   */
  static adopt(fd: number): EventFd {
    if (!readlinkSync(`/proc/self/fd/${fd}`).startsWith('anon_inode:[eventfd')) {
      throw new SystemError('eventfd', os.errno.EINVAL, 'EINVAL', `descriptor ${fd} is not an eventfd`);
    }
    fcntl(fd, FcntlCommand.setStatusFlags, fcntl(fd, FcntlCommand.getStatusFlags) | OpenFlag.nonblock);
    return new EventFd(fd);
  }

  /** Adds one. A counter that is full stays full: its reader is behind, but will wake. Does nothing after `close`. */
  signal(): void {
    if (!this.#open) return;
    try {
      write(this.fd, counter().address + ONE, 8);
    } catch (error) {
      if (!isAgain(error)) throw error;
    }
  }

  /** Reads the counter and sets it to zero; 0 when nothing was signalled, or after `close`. */
  drain(): number {
    if (!this.#open) return 0;
    const { address, u32 } = counter();
    try {
      read(this.fd, address, 8);
    } catch (error) {
      if (isAgain(error)) return 0;
      throw error;
    }
    return u32[1] * 2 ** 32 + u32[0];
  }

  /** Idempotent. */
  close(): void {
    if (!this.#open) return;
    this.#open = false;
    close(this.fd);
  }
}

function isAgain(error: unknown): boolean {
  return error instanceof SystemError && error.errno === os.errno.EAGAIN;
}
