/**
 * Descriptors that are ready (epoll(7), x86-64), for a program that looks for itself instead of leaving it to its event loop: a turn of that costs
 * an emulated machine as much as the work of many packets.
 */
import { ffi } from '../../src/sys/ffi/ffi.ts';
import { close, systemError } from '../../src/sys/libc.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import { whenReadable } from '../../src/sys/readable.ts';

/** epoll_ctl(2). */
export const Ready = { in: 0x001, out: 0x004, error: 0x008, hangUp: 0x010 } as const;
const CLOEXEC = 0x80000;
const Operation = { add: 1, remove: 2, modify: 3 } as const;
/** struct epoll_event, packed on x86-64: events u32 @0, data u64 @4, of which the first half is the descriptor here. */
const EVENT_WORDS = 3;
const EVENTS = 64;

export class Epoll {
  readonly #fd: number;
  readonly #memory = mapAnonymous((EVENTS + 1) * EVENT_WORDS * 4);
  readonly #handlers = new Map<number, (events: number) => void>();
  readonly #native = bind();
  #asleep: Promise<void> | undefined;

  constructor() {
    this.#fd = must('epoll_create1', this.#native.epoll_create1(CLOEXEC));
  }

  /** Calls `handler` in `dispatch` when one of `events` (`Ready`) holds for `fd`, or an error or hang-up. */
  watch(fd: number, events: number, handler: (events: number) => void): void {
    this.#control(Operation.add, fd, events);
    this.#handlers.set(fd, handler);
  }

  change(fd: number, events: number): void {
    this.#control(Operation.modify, fd, events);
  }

  /** To be called before `fd` is closed. */
  forget(fd: number): void {
    if (this.#handlers.delete(fd)) this.#control(Operation.remove, fd, 0);
  }

  /** Calls the handlers of what is ready now; false when nothing is. */
  dispatch(): boolean {
    const { address, u32 } = this.#memory;
    const count = must('epoll_wait', this.#native.epoll_wait(this.#fd, address, EVENTS, 0));
    // A handler may end the watch of a descriptor whose event is behind its own.
    for (let i = 0; i < count; i++) this.#handlers.get(u32[i * EVENT_WORDS + 1])?.(u32[i * EVENT_WORDS]);
    return count > 0;
  }

  /** Resolved when something is ready, or after `ms` milliseconds of whoever began to sleep. */
  sleep(ms: number): Promise<void> {
    this.#asleep ??= new Promise((resolve) => {
      whenReadable(this.#fd, ms, () => {
        this.#asleep = undefined;
        resolve();
      });
    });
    return this.#asleep;
  }

  /** When nobody sleeps any more. The descriptors themselves stay open. */
  async close(): Promise<void> {
    await this.#asleep;
    close(this.#fd);
    unmapMemory(this.#memory);
  }

  #control(operation: number, fd: number, events: number): void {
    const { address, u32 } = this.#memory;
    const at = EVENTS * EVENT_WORDS;
    u32[at] = events;
    u32[at + 1] = fd;
    must('epoll_ctl', this.#native.epoll_ctl(this.#fd, operation, fd, address + 4 * at));
  }
}

function must(call: string, result: number): number {
  if (result < 0) throw systemError(call, ffi().errno());
  return result;
}

function bind() {
  const c = ffi().open(null);
  return {
    epoll_create1: c.func('epoll_create1', 'i32', ['i32']),
    epoll_ctl: c.func('epoll_ctl', 'i32', ['i32', 'i32', 'i32', 'i64']),
    epoll_wait: c.func('epoll_wait', 'i32', ['i32', 'i64', 'i32', 'i32']),
  };
}
