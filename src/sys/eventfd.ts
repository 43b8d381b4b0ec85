/**
 * An eventfd: a 64-bit counter behind a descriptor, readable while it is not zero (eventfd(2)). Interrupts and
 * doorbells travel as eventfds. Whether a descriptor waits is a flag that both sides have in common. `drain` does not rely on it (Linux 5.8);
 * `signal` has to: a peer that takes the flag back and fills the counter stops this thread.
 */
import { readlinkSync } from 'node:fs';
import { constants as os } from 'node:os';
import { SystemError } from '../errors.ts';
import { close, eventfd, FcntlCommand, fcntl, OpenFlag, read, readWithoutWaiting, systemError, write } from './libc.ts';
import { type MappedMemory, mapAnonymous } from './memory.ts';

/**
 * Where the counter is read to (u64 @0) and written from (u64 1 @8), and the iovec of the first (address u64, length u64 @16). One for all, as no
 * call is interrupted by another.
 */
let scratch: MappedMemory | null = null;
const ONE = 8;
const VECTOR = 16;
const COUNTER_BYTES = 8;

function counter(): MappedMemory {
  if (scratch === null) {
    scratch = mapAnonymous(32);
    const { u32, address } = scratch;
    u32[ONE / 4] = 1;
    u32[VECTOR / 4] = address;
    u32[VECTOR / 4 + 1] = Math.floor(address / 2 ** 32);
    u32[VECTOR / 4 + 2] = COUNTER_BYTES;
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
      write(this.fd, counter().address + ONE, COUNTER_BYTES);
    } catch (error) {
      if (!isAgain(error)) throw error;
    }
  }

  /** Reads the counter and sets it to zero; 0 when nothing was signalled, or after `close`. */
  drain(): number {
    if (!this.#open) return 0;
    const { address, u32 } = counter();
    const result = readWithoutWaiting(this.fd, address + VECTOR);
    if (result === -os.errno.EAGAIN) return 0;
    if (result < 0) {
      if (result !== -os.errno.EOPNOTSUPP) throw systemError('preadv2', -result);
      return this.#drainOld();
    }
    return u32[1] * 2 ** 32 + u32[0];
  }

  /** For a kernel that knows no other way, and waits if the peer has made it so. */
  #drainOld(): number {
    const { address, u32 } = counter();
    try {
      read(this.fd, address, COUNTER_BYTES);
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
