/**
 * Unix stream sockets, synchronous, with descriptors passed alongside the bytes (SCM_RIGHTS, unix(7)).
 *
 * `send` and `receive` move exact byte counts before a deadline; `trySend` and `tryReceive` never wait and serve an event
 * loop together with `Ffi.watch`. Deadlines are points in time of `performance.now()`, in milliseconds; Infinity waits
 * for ever. Received descriptors are close-on-exec, and closed here whenever they cannot be handed over.
 *
 * Left out: datagrams, credentials, abstract addresses.
 */
import { lstatSync, unlinkSync } from 'node:fs';
import { constants as os } from 'node:os';
import { SystemError } from '../errors.ts';
import { ffi, type Watch } from './ffi/ffi.ts';
import * as libc from './libc.ts';
import { type MappedMemory, mapAnonymous } from './memory.ts';

/** Errors of a socket whose other side is gone, or that is closed here. */
export const CLOSED_ERRORS: readonly number[] = [
  os.errno.ECONNRESET,
  os.errno.EPIPE,
  os.errno.EBADF,
  os.errno.ENOTCONN,
];

/** SCM_MAX_FD: the kernel passes no more descriptors than this in one message. */
export const MAX_DESCRIPTORS = 253;

/** Scratch layout: the structures of sendmsg(2) and recvmsg(2) on 64-bit Linux, and the bytes on their way. */
const Scratch = { message: 0, vector: 64, control: 128, data: 4096, size: 4096 + 65536 } as const;
const Message = { vector: 16, vectorCount: 24, control: 32, controlLength: 40, flags: 48 } as const;
const Vector = { base: 0, length: 8 } as const;
/** cmsghdr: length u64, level i32, type i32, then the descriptors, i32 each; the next one starts at a multiple of 8. */
const Control = { length: 0, level: 8, type: 12, data: 16 } as const;
const CONTROL_SIZE = Control.data + 4 * (MAX_DESCRIPTORS + 1);
const CHUNK = Scratch.size - Scratch.data;

let scratch: MappedMemory | null = null;

function prepare(length: number, controlLength: number): MappedMemory {
  scratch ??= mapAnonymous(Scratch.size);
  const { u32, address } = scratch;
  u32.fill(0, 0, Scratch.control / 4);
  pointer(u32, Scratch.message + Message.vector, address + Scratch.vector);
  u32[(Scratch.message + Message.vectorCount) / 4] = 1;
  pointer(u32, Scratch.vector + Vector.base, address + Scratch.data);
  u32[(Scratch.vector + Vector.length) / 4] = length;
  if (controlLength > 0) {
    pointer(u32, Scratch.message + Message.control, address + Scratch.control);
    u32[(Scratch.message + Message.controlLength) / 4] = controlLength;
  }
  return scratch;
}

function pointer(u32: Uint32Array, at: number, value: number): void {
  u32[at / 4] = value;
  u32[at / 4 + 1] = Math.floor(value / 2 ** 32);
}

export class UnixSocket {
  readonly fd: number;
  #open = true;

  /** Owns `fd`, a connected non-blocking Unix stream socket. */
  constructor(fd: number) {
    this.fd = fd;
  }

  /**
   * Connects to a listening socket. Throws SystemError: `ENOENT`, `ECONNREFUSED`, `EACCES`, `ETIMEDOUT` when its
   * backlog stays full.
   */
  static connect(path: string, deadline: number): UnixSocket {
    const fd = libc.unixSocket();
    try {
      while (!libc.connectUnix(fd, path)) {
        if (performance.now() >= deadline) throw libc.systemError('connect', os.errno.ETIMEDOUT);
        pause(5);
      }
      return new UnixSocket(fd);
    } catch (error) {
      libc.close(fd);
      throw error;
    }
  }

  static pair(): [UnixSocket, UnixSocket] {
    const [a, b] = libc.unixSocketPair();
    return [new UnixSocket(a), new UnixSocket(b)];
  }

  /** Sends all of `bytes`; `descriptors` travel with the first of them. They stay open here. */
  send(bytes: Uint8Array, deadline: number, descriptors: readonly number[] = []): void {
    let done = 0;
    while (done < bytes.length) {
      const sent = this.trySend(bytes, done, done === 0 ? descriptors : []);
      if (sent < 0) this.#wait('sendmsg', libc.PollEvent.out, deadline);
      else done += sent;
    }
  }

  /**
   * Receives exactly `length` bytes to `target[start]`, and appends descriptors that come with them, `limit` in all
   * at most.
   */
  receive(
    target: Uint8Array,
    start: number,
    length: number,
    deadline: number,
    descriptors: number[] = [],
    limit = 0,
  ): void {
    let done = 0;
    while (done < length) {
      const received = this.tryReceive(target, start + done, length - done, descriptors, limit);
      if (received > 0) done += received;
      else if (received < 0) this.#wait('recvmsg', libc.PollEvent.in, deadline);
      else {
        throw new SystemError('recvmsg', os.errno.ECONNRESET, 'ECONNRESET', 'the other side closed the socket');
      }
    }
  }

  /** Sends some of `bytes` from `start` on; returns how many, or -1 when none can be sent now. */
  trySend(bytes: Uint8Array, start: number, descriptors: readonly number[] = []): number {
    this.#check('sendmsg');
    if (descriptors.length > MAX_DESCRIPTORS) throw libc.systemError('sendmsg', os.errno.EINVAL);
    const length = Math.min(bytes.length - start, CHUNK);
    if (length <= 0) throw new RangeError('nothing to send');
    const used = descriptors.length === 0 ? 0 : Control.data + 4 * descriptors.length;
    const memory = prepare(length, Math.ceil(used / 8) * 8);
    if (used > 0) {
      const at = Scratch.control / 4;
      memory.u32[at + Control.length / 4] = used;
      memory.u32[at + Control.length / 4 + 1] = 0;
      memory.u32[at + Control.level / 4] = libc.Socket.level;
      memory.u32[at + Control.type / 4] = libc.Socket.rights;
      for (let i = 0; i < descriptors.length; i++) memory.u32[at + Control.data / 4 + i] = descriptors[i];
    }
    memory.u8.set(bytes.subarray(start, start + length), Scratch.data);
    return libc.sendmsg(this.fd, memory.address + Scratch.message, libc.MessageFlag.noSignal);
  }

  /**
   * Receives up to `length` bytes to `target[start]`; returns how many, 0 at the end of the stream, -1 when there are
   * none now. Descriptors that came are appended to `descriptors`. When that makes more than `limit`, or some were
   * lost on the way, those that came now are closed and SystemError `EMSGSIZE` is thrown.
   */
  tryReceive(target: Uint8Array, start: number, length: number, descriptors: number[] = [], limit = 0): number {
    this.#check('recvmsg');
    if (start < 0 || length <= 0 || start + length > target.length) throw new RangeError('no room to receive into');
    const memory = prepare(Math.min(length, CHUNK), CONTROL_SIZE);
    const count = libc.recvmsg(this.fd, memory.address + Scratch.message, libc.MessageFlag.closeOnExec);
    if (count < 0) return -1;
    const passed = receivedDescriptors(memory.u32);
    const lost = (memory.u32[(Scratch.message + Message.flags) / 4] & libc.MessageFlag.controlTruncated) !== 0;
    if (lost || descriptors.length + passed.length > limit) {
      for (const fd of passed) libc.close(fd);
      throw new SystemError(
        'recvmsg',
        os.errno.EMSGSIZE,
        'EMSGSIZE',
        `more than ${limit} descriptors came, or some were lost`,
      );
    }
    descriptors.push(...passed);
    target.set(memory.u8.subarray(Scratch.data, Scratch.data + count), start);
    return count;
  }

  /** Waits until something can be received, or the other side is gone. Throws `ETIMEDOUT`. */
  waitReadable(deadline: number): void {
    this.#check('poll');
    this.#wait('recvmsg', libc.PollEvent.in, deadline);
  }

  /** Idempotent. */
  close(): void {
    if (!this.#open) return;
    this.#open = false;
    libc.close(this.fd);
  }

  #check(syscall: string): void {
    if (!this.#open) throw libc.systemError(syscall, os.errno.EBADF);
  }

  #wait(syscall: string, events: number, deadline: number): void {
    const left = deadline - performance.now();
    if (left <= 0 || libc.poll(this.fd, events, left === Infinity ? -1 : left) === 0) {
      throw libc.systemError(syscall, os.errno.ETIMEDOUT);
    }
  }
}

/** The descriptors in the control messages that recvmsg(2) has just written. */
function receivedDescriptors(u32: Uint32Array): number[] {
  const descriptors: number[] = [];
  const end = Math.min(u32[(Scratch.message + Message.controlLength) / 4], CONTROL_SIZE);
  for (let at = 0; at + Control.data <= end; ) {
    const field = (Scratch.control + at) / 4;
    const length = u32[field + Control.length / 4];
    if (length < Control.data || at + length > end) break;
    if (u32[field + Control.level / 4] === libc.Socket.level && u32[field + Control.type / 4] === libc.Socket.rights) {
      for (let i = Control.data; i + 4 <= length; i += 4) descriptors.push(u32[field + i / 4]);
    }
    at += Math.ceil(length / 8) * 8;
  }
  return descriptors;
}

/** Milliseconds until a connection is asked for again that the system could not give. */
const RETRY_MS = 100;

/** A listening socket that exists from its first instant with `mode` and is removed when closed. */
export class UnixListener {
  readonly fd: number;
  readonly path: string;
  readonly #inode: bigint;
  #open = true;

  private constructor(fd: number, path: string) {
    this.fd = fd;
    this.path = path;
    this.#inode = lstatSync(path, { bigint: true }).ino;
  }

  /** Listens on `path`. A socket that a dead process left there is replaced; anything else there is `EADDRINUSE`. */
  static listen(path: string, options: { mode?: number; backlog?: number } = {}): UnixListener {
    const fd = libc.unixSocket();
    try {
      try {
        libc.bindUnix(fd, path, options.mode ?? 0o600);
      } catch (error) {
        if (!isErrno(error, os.errno.EADDRINUSE) || !isStale(path)) throw error;
        unlinkSync(path);
        libc.bindUnix(fd, path, options.mode ?? 0o600);
      }
      libc.listen(fd, options.backlog ?? 16);
      return new UnixListener(fd, path);
    } catch (error) {
      libc.close(fd);
      throw error;
    }
  }

  /** The next connection, or null when none is waiting; with a deadline, null when none came in time. */
  accept(deadline = 0): UnixSocket | null {
    if (!this.#open) throw libc.systemError('accept4', os.errno.EBADF);
    for (;;) {
      const fd = libc.accept(this.fd);
      if (fd >= 0) return new UnixSocket(fd);
      const left = deadline - performance.now();
      if (left <= 0) return null;
      libc.poll(this.fd, libc.PollEvent.in, left === Infinity ? -1 : left);
    }
  }

  /**
   * Calls `take` with each connection, from the event loop, until the watch is closed. One that the system cannot give now, for want of a
   * descriptor as a rule (accept(2)), waits in the backlog and is asked for again, as others may give theirs back.
   */
  watch(take: (socket: UnixSocket) => void): Pick<Watch, 'close'> {
    let watch: Watch | null = null;
    let timer: NodeJS.Timeout | null = null;
    const begin = () => {
      watch = ffi().watch(this.fd, look);
    };
    const look = () => {
      let socket: UnixSocket | null;
      try {
        socket = this.accept();
      } catch (error) {
        if (!(error instanceof SystemError)) throw error;
        // The descriptor stays readable: a watch would look without end.
        watch?.close();
        timer = setTimeout(begin, RETRY_MS);
        return;
      }
      if (socket !== null) take(socket);
    };
    begin();
    return {
      close: () => {
        watch?.close();
        if (timer !== null) clearTimeout(timer);
      },
    };
  }

  /** Stops listening and removes the path if it is still this socket. Idempotent. */
  close(): void {
    if (!this.#open) return;
    this.#open = false;
    libc.close(this.fd);
    const now = lstatSync(this.path, { bigint: true, throwIfNoEntry: false });
    if (now?.ino === this.#inode) unlinkSync(this.path);
  }
}

/** Whether `path` is a socket on which nobody listens. */
function isStale(path: string): boolean {
  if (lstatSync(path, { throwIfNoEntry: false })?.isSocket() !== true) return false;
  try {
    UnixSocket.connect(path, 0).close();
    return false;
  } catch (error) {
    return isErrno(error, os.errno.ECONNREFUSED);
  }
}

function isErrno(error: unknown, errno: number): boolean {
  return error instanceof SystemError && error.errno === errno;
}

/** Sleeps, blocking the thread: poll(2) of no descriptor. */
function pause(ms: number): void {
  libc.poll(-1, 0, ms);
}
