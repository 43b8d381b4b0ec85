/**
 * Waiting until a descriptor is readable, with the thread asleep in poll(2) instead of in its event loop.
 *
 * What the loop waits for is one descriptor, its epoll set, and a time (`uv_backend_fd`, `uv_backend_timeout`: libuv's way into other loops).
 * So this sleeps on the set and on everything that is waited for here, no longer than the loop itself would, and gives way to the loop as soon as there is
 * something for it: timers, messages and sockets come as they always do. What is saved is the way from the loop back to who waits, through the foreign function
 * interface and another turn of the loop. After a sleep none of that code is in a cache, and each step takes 5 to 10 µs; so there are few steps here, too,
 * between poll(2) and who waits.
 *
 * One for each thread. While somebody waits the event loop is held open.
 */
import { ffi } from './ffi/ffi.ts';
import { PollEvent } from './libc.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from './memory.ts';

/** Somebody who waits; over when `wake` was called, or is not going to be. */
export interface Waiting {
  readonly fd: number;
  /** When to give up, as `performance.now()` says. */
  readonly end: number;
  readonly wake: (readable: boolean) => void;
  over: boolean;
}

/** struct pollfd (poll(2)), in 32-bit words: fd; events in the lower and revents in the upper half. */
const POLLFD_WORDS = 2;
/** Descriptors that there is room for at first: more than that are rare. */
const ROOM = 64;
/** Milliseconds: the longest time of a timer. */
const LONGEST = 2 ** 31 - 1;

class ThreadSleep {
  #waiting: Waiting[] = [];
  /** Holds the loop open; and an event loop without anything to wait for would not say how long to sleep. */
  readonly #hold = setTimeout(nothing, LONGEST).unref();
  readonly #native = bind();
  readonly #loop = ffi().eventLoop();
  readonly #loopFd = this.#native.uv_backend_fd(this.#loop);
  #memory: MappedMemory = mapAnonymous(ROOM * POLLFD_WORDS * 4);
  #running = false;

  add(waiting: Waiting): void {
    this.#waiting.push(waiting);
    if (!this.#running) void this.#run();
  }

  async #run(): Promise<void> {
    this.#running = true;
    this.#hold.ref();
    // Everything that is ready runs first, and the loop sees to what it waits for.
    await turn();
    while (this.#waiting.length > 0) await this.#sleep();
    this.#hold.unref();
    this.#running = false;
  }

  /** One sleep, after which those are woken for whom it is over; resolves when the event loop has had its turn. */
  #sleep(): Promise<unknown> {
    const ms = this.#time();
    const waiting = this.#waiting;
    // Before the sleep, because nothing should be left to do behind it; and after `#time`, which would see that the loop has something to do.
    const next = turn();
    if (waiting.length === 0) return next;
    const count = waiting.length + 1;
    const { address, u32 } = this.#fill(count);
    // When a signal interrupts it nothing is readable: the loop has its turn, and the next sleep follows.
    if (this.#native.poll(address, count, ms) <= 0) return next;
    // The event loop's is the last one.
    for (let i = 0; i < waiting.length; i++) {
      if (u32[POLLFD_WORDS * i + 1] >>> 16 === 0 || waiting[i].over) continue;
      waiting[i].over = true;
      waiting[i].wake(true);
    }
    return next;
  }

  /** Milliseconds to sleep: until the loop has something to do, or somebody gives up, whom this wakes when the time has come. */
  #time(): number {
    this.#native.uv_update_time(this.#loop);
    // The immediate that this runs in counts as something to do until its phase is over, unless another one that is taken back says otherwise.
    clearImmediate(setImmediate(nothing));
    const ofLoop = this.#native.uv_backend_timeout(this.#loop);
    const now = performance.now();
    let left = ofLoop < 0 ? LONGEST : ofLoop;
    for (const waiting of this.#waiting) {
      if (waiting.over) continue;
      // Less than a millisecond would be rounded up, and whoever gives up is late rather than early.
      left = Math.min(left, Math.max(0, Math.ceil(waiting.end - now)));
      if (waiting.end > now) continue;
      waiting.over = true;
      waiting.wake(false);
    }
    if (this.#waiting.some(isOver)) this.#waiting = this.#waiting.filter((waiting) => !waiting.over);
    return left;
  }

  #fill(count: number): MappedMemory {
    if (count * POLLFD_WORDS * 4 > this.#memory.size) {
      unmapMemory(this.#memory);
      this.#memory = mapAnonymous(2 * count * POLLFD_WORDS * 4);
    }
    const { u32 } = this.#memory;
    for (let i = 0; i < count; i++) {
      u32[POLLFD_WORDS * i] = i < count - 1 ? this.#waiting[i].fd : this.#loopFd;
      u32[POLLFD_WORDS * i + 1] = PollEvent.in;
    }
    return this.#memory;
  }
}

const nothing = () => {};
const isOver = ({ over }: Waiting) => over;
const turn = () => new Promise((resolve) => setImmediate(resolve));

function bind() {
  const self = ffi().open(null);
  return {
    poll: self.func('poll', 'i32', ['i64', 'u64', 'i32']),
    uv_backend_fd: self.func('uv_backend_fd', 'i32', ['i64']),
    uv_backend_timeout: self.func('uv_backend_timeout', 'i32', ['i64']),
    uv_update_time: self.func('uv_update_time', 'void', ['i64']),
  };
}

/** That of this thread, once somebody has waited. */
let thread: ThreadSleep | null = null;

/**
 * Calls `wake` once: with true when `fd` is readable, hung up or in error, with false after `ms` milliseconds. Never before this has returned, and not any more once
 * `over` was set. It must not throw, and the descriptor stays open as long.
 */
export function whenReadable(fd: number, ms: number, wake: (readable: boolean) => void): Waiting {
  thread ??= new ThreadSleep();
  const waiting = { fd, end: performance.now() + ms, wake, over: false };
  thread.add(waiting);
  return waiting;
}
