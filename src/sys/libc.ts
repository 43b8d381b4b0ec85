/**
 * The system calls that the driver and the software device need, typed. A failing call throws `SystemError` with the
 * name of the errno as its code; a call that a signal interrupted (EINTR) is made again.
 *
 * Addresses are numbers. Strings and structures that a call takes are laid out in a scratch page of this module, so
 * no call here may be made while another one is being prepared: all of them are synchronous, and each thread has its
 * own.
 */
import { constants, fstatSync } from 'node:fs';
import { constants as os } from 'node:os';
import { getSystemErrorMap } from 'node:util';
import { SystemError } from '../errors.ts';
import { ffi } from './ffi/ffi.ts';

/** mmap(2). */
export const Prot = { none: 0, read: 1, write: 2 } as const;
export const MapFlag = {
  shared: 0x01,
  private: 0x02,
  fixed: 0x10,
  anonymous: 0x20,
  noReserve: 0x4000,
  populate: 0x8000,
  hugeTlb: 0x40000,
} as const;
/** madvise(2). */
export const Advice = { hugePage: 14, dontDump: 16 } as const;
/** memfd_create(2). */
export const MemfdFlag = { cloexec: 1, allowSealing: 2, hugeTlb: 4 } as const;
/** fallocate(2). */
export const FallocateMode = { allocate: 0, keepSize: 1, punchHole: 2 } as const;
/** F_ADD_SEALS and its bits, fcntl(2). */
export const Seal = { seal: 1, shrink: 2, grow: 4, write: 8, futureWrite: 16 } as const;
/** preadv2(2). */
const ReadFlag = { noWait: 8 } as const;
/** eventfd(2). */
export const EventfdFlag = { semaphore: 1, nonblock: 0x800, cloexec: 0x80000 } as const;
/** poll(2). */
export const PollEvent = { in: 0x01, out: 0x04, error: 0x08, hangUp: 0x10, invalid: 0x20 } as const;
/** socket(2), on Linux other than MIPS and SPARC. */
export const Socket = {
  unix: 1,
  stream: 1,
  nonblock: 0x800,
  cloexec: 0x80000,
  level: 1,
  rights: 1,
} as const;
/** send(2) and recv(2). */
export const MessageFlag = {
  controlTruncated: 0x08,
  dontWait: 0x40,
  noSignal: 0x4000,
  closeOnExec: 0x40000000,
} as const;
/** getrlimit(2). */
export const ResourceLimit = { openFiles: 7, lockedMemory: 8 } as const;
/** fcntl(2). */
export const FcntlCommand = {
  duplicate: 1030,
  getDescriptorFlags: 1,
  setDescriptorFlags: 2,
  getStatusFlags: 3,
  setStatusFlags: 4,
  addSeals: 1033,
  getSeals: 1034,
} as const;
export const OpenFlag = {
  readOnly: constants.O_RDONLY,
  writeOnly: constants.O_WRONLY,
  readWrite: constants.O_RDWR,
  nonblock: constants.O_NONBLOCK,
  cloexec: 0x80000,
} as const;

export const PAGE_SIZE = 4096;
/** Transparent huge pages (x86-64; arm64 with pages of 4 KiB). */
export const HUGE_PAGE_SIZE = 0x200000;

const c = ffi().open(null);
const native = {
  mmap: c.func('mmap', 'i64', ['i64', 'u64', 'i32', 'i32', 'i32', 'i64']),
  munmap: c.func('munmap', 'i32', ['i64', 'u64']),
  madvise: c.func('madvise', 'i32', ['i64', 'u64', 'i32']),
  memfd_create: c.func('memfd_create', 'i32', ['i64', 'u32']),
  ftruncate: c.func('ftruncate', 'i32', ['i32', 'i64']),
  fallocate: c.func('fallocate', 'i32', ['i32', 'i32', 'i64', 'i64']),
  open: c.func('open', 'i32', ['i64', 'i32', 'u32']),
  close: c.func('close', 'i32', ['i32']),
  read: c.func('read', 'i64', ['i32', 'i64', 'u64']),
  write: c.func('write', 'i64', ['i32', 'i64', 'u64']),
  preadv2: c.func('preadv2', 'i64', ['i32', 'i64', 'i32', 'i64', 'i32']),
  pread: c.func('pread', 'i64', ['i32', 'i64', 'u64', 'i64']),
  pwrite: c.func('pwrite', 'i64', ['i32', 'i64', 'u64', 'i64']),
  ioctl: c.func('ioctl', 'i32', ['i32', 'u64', 'i64']),
  fcntl: c.func('fcntl', 'i32', ['i32', 'i32', 'i64']),
  fchmod: c.func('fchmod', 'i32', ['i32', 'u32']),
  eventfd: c.func('eventfd', 'i32', ['u32', 'i32']),
  poll: c.func('poll', 'i32', ['i64', 'u64', 'i32']),
  getrlimit: c.func('getrlimit', 'i32', ['i32', 'i64']),
  socket: c.func('socket', 'i32', ['i32', 'i32', 'i32']),
  socketpair: c.func('socketpair', 'i32', ['i32', 'i32', 'i32', 'i64']),
  bind: c.func('bind', 'i32', ['i32', 'i64', 'u32']),
  listen: c.func('listen', 'i32', ['i32', 'i32']),
  accept4: c.func('accept4', 'i32', ['i32', 'i64', 'i64', 'i32']),
  connect: c.func('connect', 'i32', ['i32', 'i64', 'u32']),
  sendmsg: c.func('sendmsg', 'i64', ['i32', 'i64', 'i32']),
  recvmsg: c.func('recvmsg', 'i64', ['i32', 'i64', 'i32']),
};
type Call = keyof typeof native;

const EINTR = os.errno.EINTR;
const ERRNO_NAMES = new Map<number, string>();
for (const [name, value] of Object.entries(os.errno)) if (!ERRNO_NAMES.has(value)) ERRNO_NAMES.set(value, name);

/** Name of an errno value (`EACCES`), or `ERRNO_n` for one that Node does not know. */
export function errnoName(errno: number): string {
  return ERRNO_NAMES.get(errno) ?? `ERRNO_${errno}`;
}

/** Result of `readNow` and `writeNow` when the call failed: the errno, negative. */
function callNow(name: 'read' | 'write', fd: number, address: number, length: number): number {
  // hot:
  for (;;) {
    const result = native[name](fd, address, length);
    if (result >= 0) return result;
    const errno = ffi().errno();
    if (errno !== EINTR) return -errno;
  }
}

/** The error that a failed call of `syscall` throws. */
export function systemError(syscall: string, errno: number, options?: { hint?: string }): SystemError {
  const name = errnoName(errno);
  // Beyond the errnos, this map has error numbers of libuv's own.
  const text = ERRNO_NAMES.has(errno) ? getSystemErrorMap().get(-errno)?.[1] : undefined;
  return new SystemError(syscall, errno, name, text === undefined ? name : `${text} (${name})`, options);
}

/** Calls until the call is not interrupted; returns its result, which is not negative, or throws. */
function call(name: Call, ...args: number[]): number {
  for (;;) {
    const result = native[name](...args);
    if (result >= 0) return result;
    const errno = ffi().errno();
    if (errno !== EINTR) throw systemError(name, errno);
  }
}

/** Like `call`, but an errno in `expected` is a result: its negative value. */
function attempt(expected: readonly number[], name: Call, ...args: number[]): number {
  for (;;) {
    const result = native[name](...args);
    if (result >= 0) return result;
    const errno = ffi().errno();
    if (expected.includes(errno)) return -errno;
    if (errno !== EINTR) throw systemError(name, errno);
  }
}

/** Scratch: strings @0, structures @SCRATCH_STRUCT. Allocated once per thread and never unmapped. */
const SCRATCH_SIZE = 4 * PAGE_SIZE;
const SCRATCH_STRUCT = 2 * PAGE_SIZE;
const scratchAddress = call(
  'mmap',
  0,
  SCRATCH_SIZE,
  Prot.read | Prot.write,
  MapFlag.private | MapFlag.anonymous,
  -1,
  0,
);
const scratchBuffer = ffi().view(scratchAddress, SCRATCH_SIZE);
const scratch8 = new Uint8Array(scratchBuffer);
const scratch32 = new Uint32Array(scratchBuffer);
const encoder = new TextEncoder();

/** Writes `text` with its NUL at the start of the scratch; returns its address. */
function cString(syscall: string, text: string): number {
  const { read, written } = encoder.encodeInto(text, scratch8.subarray(0, SCRATCH_STRUCT - 1));
  if (read < text.length) throw systemError(syscall, os.errno.ENAMETOOLONG);
  if (text.includes('\0')) throw systemError(syscall, os.errno.EINVAL);
  scratch8[written] = 0;
  return scratchAddress;
}

/** An anonymous file in memory; its size is set with `ftruncate`. */
export function memfdCreate(name: string, flags: number = MemfdFlag.cloexec): number {
  return call('memfd_create', cString('memfd_create', name), flags);
}

export function ftruncate(fd: number, size: number): void {
  call('ftruncate', fd, size);
}

/** Allocates pages of a file (so that touching them cannot fail), or punches a hole, whose bytes then read as zero. */
export function fallocate(fd: number, mode: number, offset: number, size: number): void {
  call('fallocate', fd, mode, offset, size);
}

/** Maps memory and returns its address. `offset` is a multiple of the page size, exact up to 2^53. */
export function mmap(address: number, size: number, prot: number, flags: number, fd: number, offset: number): number {
  return call('mmap', address, size, prot, flags, fd, offset);
}

export function munmap(address: number, size: number): void {
  call('munmap', address, size);
}

/** Tells the kernel how a range will be used. Returns false when it does not know the advice. */
export function madvise(address: number, size: number, advice: number): boolean {
  return attempt([os.errno.EINVAL], 'madvise', address, size, advice) === 0;
}

/** Opens a file, close-on-exec. */
export function open(path: string, flags: number): number {
  return call('open', cString('open', path), flags | OpenFlag.cloexec, 0);
}

/** Closes a descriptor. On Linux it is gone even when this fails with EINTR or EIO, so it is never tried twice. */
export function close(fd: number): void {
  if (native.close(fd) < 0) {
    const errno = ffi().errno();
    if (errno !== EINTR) throw systemError('close', errno);
  }
}

/** Reads up to `length` bytes to `address`; returns how many, 0 at the end. */
export function read(fd: number, address: number, length: number): number {
  return call('read', fd, address, length);
}

export function write(fd: number, address: number, length: number): number {
  return call('write', fd, address, length);
}

/** hot: as `read`, but a failure is a result: the errno, negative. For descriptors of which many calls fail, such as with EAGAIN. */
export function readNow(fd: number, address: number, length: number): number {
  return callNow('read', fd, address, length);
}

/** hot: as `write`, but a failure is a result: the errno, negative. */
export function writeNow(fd: number, address: number, length: number): number {
  return callNow('write', fd, address, length);
}

/**
 * hot: reads into the buffer of the iovec at `vector`, and never waits, whatever the flags of the descriptor say (RWF_NOWAIT): the errno, negative, when
 * there is nothing (EAGAIN), or when the kernel cannot do that for this kind of file (EOPNOTSUPP).
 */
export function readWithoutWaiting(fd: number, vector: number): number {
  for (;;) {
    const result = native.preadv2(fd, vector, 1, -1, ReadFlag.noWait);
    if (result >= 0) return result;
    const errno = ffi().errno();
    if (errno !== EINTR) return -errno;
  }
}

export function pread(fd: number, address: number, length: number, offset: number): number {
  return call('pread', fd, address, length, offset);
}

export function pwrite(fd: number, address: number, length: number, offset: number): number {
  return call('pwrite', fd, address, length, offset);
}

/** `argument` is an integer or an address, whatever the request wants. Returns the result, which is not negative. */
export function ioctl(fd: number, request: number, argument: number): number {
  return call('ioctl', fd, request, argument);
}

export function fcntl(fd: number, command: number, argument = 0): number {
  return call('fcntl', fd, command, argument);
}

/** A new eventfd: by default close-on-exec and non-blocking. See `eventfd.ts` for its use. */
export function eventfd(initial = 0, flags: number = EventfdFlag.cloexec | EventfdFlag.nonblock): number {
  return call('eventfd', initial, flags);
}

export interface FileStatus {
  readonly device: bigint;
  readonly inode: bigint;
  /** Bytes. */
  readonly size: number;
  readonly mode: number;
}

/** Device and inode together name the file behind a descriptor: two descriptors of one memfd have the same. */
export function fstat(fd: number): FileStatus {
  try {
    const status = fstatSync(fd, { bigint: true });
    return { device: status.dev, inode: status.ino, size: Number(status.size), mode: Number(status.mode) };
  } catch (error) {
    // Node rejects a negative descriptor by itself, without an errno.
    const errno = error instanceof Error && 'errno' in error ? -Number(error.errno) : os.errno.EBADF;
    throw systemError('fstat', errno);
  }
}

/** Soft and hard limit of a resource; Infinity when there is none. */
export function getrlimit(resource: number): { soft: number; hard: number } {
  call('getrlimit', resource, scratchAddress + SCRATCH_STRUCT);
  const limit = (at: number) => {
    const low = scratch32[at];
    const high = scratch32[at + 1];
    return low === 0xffffffff && high === 0xffffffff ? Infinity : high * 2 ** 32 + low;
  };
  const at = SCRATCH_STRUCT / 4;
  return { soft: limit(at), hard: limit(at + 2) };
}

/**
 * Waits until one of `events` (`PollEvent`) holds for `fd`, or for an error or hang-up, or for `timeoutMs` (-1: for
 * ever). Returns what holds, 0 after the time.
 */
export function poll(fd: number, events: number, timeoutMs: number): number {
  const until = timeoutMs < 0 ? Infinity : performance.now() + timeoutMs;
  const at = SCRATCH_STRUCT / 4;
  for (;;) {
    // struct pollfd: fd i32 @0, events i16 @4, revents i16 @6; poll(2) overwrites revents.
    scratch32[at] = fd;
    scratch32[at + 1] = events;
    // A fraction of a millisecond rounds up: waking early would make the caller spin.
    const wait = until === Infinity ? -1 : Math.min(Math.max(0, Math.ceil(until - performance.now())), 0x7fffffff);
    const count = attempt([EINTR], 'poll', scratchAddress + SCRATCH_STRUCT, 1, wait);
    if (count > 0) return scratch32[at + 1] >>> 16;
    if (count === 0) return 0;
  }
}

/** Bytes of sockaddr_un (unix(7)): family u16 @0, path @2 with its NUL. */
const SOCKADDR_UN_SIZE = 110;

function unixAddress(syscall: string, path: string): number {
  const at = SCRATCH_STRUCT;
  scratch8.fill(0, at, at + SOCKADDR_UN_SIZE);
  scratch8[at] = Socket.unix;
  const { read: done } = encoder.encodeInto(path, scratch8.subarray(at + 2, at + SOCKADDR_UN_SIZE - 1));
  if (done < path.length) throw pathTooLong(syscall, path);
  if (path === '' || path.includes('\0')) throw systemError(syscall, os.errno.EINVAL);
  return scratchAddress + at;
}

function pathTooLong(syscall: string, path: string): SystemError {
  const limit = SOCKADDR_UN_SIZE - 3;
  const detail = `the path of the socket has ${Buffer.byteLength(path)} bytes, ${limit} are the most (ENAMETOOLONG)`;
  return new SystemError(syscall, os.errno.ENAMETOOLONG, 'ENAMETOOLONG', detail, {
    hint: 'put the socket into a directory with a shorter name, such as one in /run or /tmp',
  });
}

/** A Unix stream socket, close-on-exec. */
export function unixSocket(flags: number = Socket.nonblock): number {
  return call('socket', Socket.unix, Socket.stream | Socket.cloexec | flags, 0);
}

/** Two connected Unix stream sockets, close-on-exec. */
export function unixSocketPair(flags: number = Socket.nonblock): [number, number] {
  call('socketpair', Socket.unix, Socket.stream | Socket.cloexec | flags, 0, scratchAddress + SCRATCH_STRUCT);
  const at = SCRATCH_STRUCT / 4;
  return [scratch32[at], scratch32[at + 1]];
}

/** Binds to `path`, which comes into being with `mode` from its first instant (fchmod before bind sets it). */
export function bindUnix(fd: number, path: string, mode: number): void {
  call('fchmod', fd, mode);
  call('bind', fd, unixAddress('bind', path), SOCKADDR_UN_SIZE);
}

export function listen(fd: number, backlog: number): void {
  call('listen', fd, backlog);
}

/** Accepts a connection, non-blocking and close-on-exec; -1 when none is waiting on a non-blocking socket. */
export function accept(fd: number): number {
  const flags = Socket.nonblock | Socket.cloexec;
  // A connection that was aborted before it could be accepted is as good as none.
  const result = attempt([os.errno.EAGAIN, os.errno.ECONNABORTED], 'accept4', fd, 0, 0, flags);
  return result < 0 ? -1 : result;
}

/** Connects; false when the backlog of the listener is full (EAGAIN on a non-blocking socket): try again. */
export function connectUnix(fd: number, path: string): boolean {
  return attempt([os.errno.EAGAIN], 'connect', fd, unixAddress('connect', path), SOCKADDR_UN_SIZE) >= 0;
}

/** `message` is the address of a msghdr. Returns the bytes sent, or -1 when the call would block. */
export function sendmsg(fd: number, message: number, flags: number): number {
  return Math.max(-1, attempt([os.errno.EAGAIN], 'sendmsg', fd, message, flags));
}

/**
 * `message` is the address of a msghdr. Returns the bytes received (0 at the end of the stream), or -1 when the call
 * would block.
 */
export function recvmsg(fd: number, message: number, flags: number): number {
  return Math.max(-1, attempt([os.errno.EAGAIN], 'recvmsg', fd, message, flags));
}
