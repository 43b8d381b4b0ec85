/**
 * `unix:PATH` and `unix-connect:PATH`: frames over a Unix stream socket, a u32 big-endian length before each, as
 * QEMU's stream netdev has it. One side listens, the other connects and tries again until somebody listens; one peer
 * at a time.
 *
 * The listener is there before any driver and stays when drivers and peers go. Frames are sent from the pool's
 * memory, a burst for each system call. A peer that sends a length that no frame can have is disconnected.
 */
import { constants as os } from 'node:os';
import { SystemError } from '../../errors.ts';
import type { PacketPool } from '../../packet/pool.ts';
import { ffi, type Watch } from '../../sys/ffi/ffi.ts';
import { MessageFlag, recvmsg, sendmsg } from '../../sys/libc.ts';
import { type UnixListener, UnixSocket } from '../../sys/unix-socket.ts';
import type { Arena } from '../arena.ts';
import { Unfinished } from '../unfinished.ts';
import { listen } from '../vfio-user-server.ts';
import { ANY_ROOM, type FrameSink, LINK_BURST, type Link, type LinkCounters } from './link.ts';

/** Bytes of the length before a frame. */
const PREFIX = 4;
/** Longest frame that a sane peer sends: QEMU's largest packet. */
const SANE_LENGTH = 0x20000;
const SHORTEST_FRAME = 14;
/** Frames that wait to be sent; a power of two. */
const PENDING = 1024;
/** Milliseconds between attempts to connect. */
const RETRY_DELAY = 200;

/** Scratch in the arena: msghdr, then iovecs of (base u64, length u64), then received bytes. */
const Scratch = { message: 0, vectors: 64, data: 4096, dataSize: 256 * 1024 } as const;
const SCRATCH_SIZE = Scratch.data + Scratch.dataSize;
/** struct msghdr on 64-bit Linux: vector @16, count @24; all else stays zero. */
const Message = { vector: 16, vectorCount: 24 } as const;
const VECTOR_SIZE = 16;

export interface UnixLinkOptions {
  readonly arena: Arena;
  readonly pool: PacketPool;
  readonly path: string;
  readonly mode: 'listen' | 'connect';
  readonly maxFrame: number;
}

export class UnixLink implements Link {
  readonly counters: LinkCounters = { sent: 0, received: 0, dropped: 0 };
  readonly isOutside = true;
  readonly taken = Unfinished.nothing;
  readonly #options: UnixLinkOptions;
  readonly #pool: PacketPool;
  readonly #arena: Arena;
  readonly #scratch: number;
  readonly #batch = new Uint32Array(LINK_BURST);
  readonly #pending = new Uint32Array(PENDING);
  readonly #single = new Uint32Array(1);
  readonly #listener: UnixListener | null;
  #head = 0;
  #count = 0;
  /** Bytes of the first pending frame, prefix included, that are already sent. */
  #sentOfFirst = 0;
  /** Received bytes that are not yet a frame: at the start of the data area. */
  #have = 0;
  #socket: UnixSocket | null = null;
  #watch: Pick<Watch, 'close'> | null = null;
  #retry: NodeJS.Timeout | null = null;
  /** Whether the socket may have bytes: no watch is on it then. */
  #readable = false;
  #held = false;
  #sink: FrameSink | null = null;
  #changed: () => void = () => {};
  #wake: () => void = () => {};
  #closed = false;

  /** Listens at once, or starts to connect. Throws DeviceError `SOCKET_IN_USE`, SystemError, such as `ENAMETOOLONG`. */
  constructor(options: UnixLinkOptions) {
    this.#options = options;
    this.#pool = options.pool;
    this.#arena = options.arena;
    this.#listener = options.mode === 'listen' ? listen(options.path) : null;
    this.#scratch = options.arena.allocate(SCRATCH_SIZE);
    this.#seek();
  }

  get up(): boolean {
    return this.#socket !== null;
  }

  get blocked(): boolean {
    return this.#count > 0 || this.#held;
  }

  attach(sink: FrameSink, changed: () => void, wake: () => void): void {
    this.#sink = sink;
    this.#changed = changed;
    this.#wake = wake;
  }

  /** Waits for a peer, or tries to reach one. */
  #seek(): void {
    if (this.#closed) return;
    if (this.#listener === null) {
      this.#connect();
      return;
    }
    this.#watch = this.#listener.watch((socket) => this.#open(socket));
  }

  #connect(): void {
    try {
      this.#open(UnixSocket.connect(this.#options.path, 0));
    } catch (error) {
      // A path that is too long does not become shorter.
      if (!(error instanceof SystemError) || error.errno === os.errno.ENAMETOOLONG) throw error;
      this.#retry = setTimeout(() => this.#connect(), RETRY_DELAY);
    }
  }

  #open(socket: UnixSocket): void {
    this.#watch?.close();
    this.#watch = null;
    this.#socket = socket;
    this.#have = 0;
    this.#listenToPeer();
    this.#changed();
    this.#wake();
  }

  #listenToPeer(): void {
    if (this.#socket === null) return;
    this.#readable = false;
    this.#watch = ffi().watch(this.#socket.fd, () => {
      this.#watch?.close();
      this.#watch = null;
      this.#readable = true;
      this.#wake();
    });
  }

  /** The peer has left, or makes no sense. */
  #disconnect(): void {
    this.#watch?.close();
    this.#watch = null;
    this.#socket?.close();
    this.#socket = null;
    this.#readable = false;
    this.#held = false;
    this.counters.dropped += this.#count;
    this.#forget(this.#count);
    this.#sentOfFirst = 0;
    this.#changed();
    this.#seek();
  }

  send(packets: Uint32Array, n: number): void {
    // hot:
    const { u8, offset, length } = this.#pool;
    for (let i = 0; i < n; i++) {
      const p = packets[i];
      if (this.#socket === null || this.#count === PENDING) {
        this.counters.dropped++;
        this.#single[0] = p;
        this.#pool.free(this.#single, 1);
        continue;
      }
      const at = offset[p] - PREFIX;
      const size = length[p];
      u8[at] = size >>> 24;
      u8[at + 1] = size >>> 16;
      u8[at + 2] = size >>> 8;
      u8[at + 3] = size;
      this.#pending[(this.#head + this.#count) & (PENDING - 1)] = p;
      this.#count++;
    }
    this.#flush();
  }

  /** Nothing is outside. */
  sendDirect(): boolean {
    return false;
  }

  room(): number {
    // hot:
    return this.#socket === null ? ANY_ROOM : PENDING - this.#count;
  }

  poll(): number {
    // hot:
    if (this.#socket === null) return 0;
    const sent = this.#count > 0 ? this.#flush() : 0;
    return sent + (this.#readable ? this.#receive() : 0);
  }

  idle(): boolean {
    return false;
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    if (this.#retry !== null) clearTimeout(this.#retry);
    this.#watch?.close();
    this.#watch = null;
    this.#socket?.close();
    this.#socket = null;
    this.#listener?.close();
    this.#forget(this.#count);
    this.#arena.release(this.#scratch, SCRATCH_SIZE);
    this.#sink = null;
  }

  /** hot: hands pending frames to the socket; returns how many are sent in full. */
  #flush(): number {
    let done = 0;
    while (this.#socket !== null && this.#count > 0) {
      const vectors = this.#describePending();
      const sent = this.#transfer(true, vectors);
      if (sent < 0) break;
      done += this.#account(sent);
    }
    return done;
  }

  /** hot: fills the iovecs with pending frames; returns how many. */
  #describePending(): number {
    const n = Math.min(this.#count, LINK_BURST);
    for (let i = 0; i < n; i++) {
      const p = this.#pending[(this.#head + i) & (PENDING - 1)];
      const skip = i === 0 ? this.#sentOfFirst : 0;
      this.#vector(i, this.#pool.offset[p] - PREFIX + skip, this.#pool.length[p] + PREFIX - skip);
    }
    return n;
  }

  /** hot: `offset` is one in the arena. */
  #vector(index: number, offset: number, length: number): void {
    const { u32, address } = this.#arena;
    const at = (this.#scratch + Scratch.vectors + index * VECTOR_SIZE) >>> 2;
    const base = address + offset;
    u32[at] = base;
    u32[at + 1] = Math.floor(base / 2 ** 32);
    u32[at + 2] = length;
    u32[at + 3] = 0;
  }

  /** hot: sendmsg or recvmsg; returns the bytes, -1 when it would block or the peer is gone. */
  #transfer(out: boolean, vectors: number): number {
    const socket = this.#socket;
    if (socket === null) return -1;
    const { u32, address } = this.#arena;
    const message = address + this.#scratch + Scratch.message;
    const at = (this.#scratch + Scratch.message) >>> 2;
    const table = address + this.#scratch + Scratch.vectors;
    u32[at + Message.vector / 4] = table;
    u32[at + Message.vector / 4 + 1] = Math.floor(table / 2 ** 32);
    u32[at + Message.vectorCount / 4] = vectors;
    const flags = MessageFlag.dontWait | MessageFlag.noSignal;
    try {
      return out ? sendmsg(socket.fd, message, flags) : recvmsg(socket.fd, message, flags);
    } catch {
      this.#disconnect();
      return -1;
    }
  }

  /** hot: notes that `bytes` were sent; returns how many frames that completes. */
  #account(bytes: number): number {
    let left = bytes + this.#sentOfFirst;
    let done = 0;
    while (done < this.#count) {
      const size = this.#pool.length[this.#pending[(this.#head + done) & (PENDING - 1)]] + PREFIX;
      if (left < size) break;
      left -= size;
      done++;
    }
    this.#sentOfFirst = left;
    this.counters.sent += done;
    this.#forget(done);
    return done;
  }

  /** hot: frees the first `n` pending frames. */
  #forget(n: number): void {
    for (let i = 0; i < n; i++) {
      this.#single[0] = this.#pending[this.#head];
      this.#pool.free(this.#single, 1);
      this.#head = (this.#head + 1) & (PENDING - 1);
    }
    this.#count -= n;
  }

  /** hot: reads what has come and delivers the frames in it; returns how many. */
  #receive(): number {
    const sink = this.#sink;
    this.#held = sink !== null && sink.room() < LINK_BURST;
    if (this.#held) return 0;
    const start = this.#scratch + Scratch.data;
    this.#vector(0, start + this.#have, Scratch.dataSize - this.#have);
    const got = this.#transfer(false, 1);
    if (got === 0) {
      this.#disconnect();
      return 0;
    }
    if (got < 0) {
      this.#listenToPeer();
      return 0;
    }
    const end = start + this.#have + got;
    const next = this.#deliverFrames(start, end);
    if (next < 0) {
      this.#disconnect();
      return 0;
    }
    this.#have = end - next;
    this.#arena.u8.copyWithin(start, next, end);
    return 1;
  }

  /**
   * hot: delivers the whole frames between two offsets; returns where the first incomplete one begins, or -1 for
   * nonsense.
   */
  #deliverFrames(start: number, end: number): number {
    const { u8 } = this.#arena;
    const pool = this.#pool;
    let at = start;
    let filled = 0;
    while (at + PREFIX <= end) {
      const size = ((u8[at] << 24) | (u8[at + 1] << 16) | (u8[at + 2] << 8) | u8[at + 3]) >>> 0;
      if (size > SANE_LENGTH) return -1;
      if (at + PREFIX + size > end) break;
      const fits = size >= SHORTEST_FRAME && size <= this.#options.maxFrame;
      if (fits && pool.allocate(this.#single, 1) === 1) {
        const p = this.#single[0];
        const to = pool.offset[p];
        u8.copyWithin(to, at + PREFIX, at + PREFIX + size);
        pool.length[p] = size;
        this.#batch[filled++] = p;
      } else {
        this.counters.dropped++;
      }
      at += PREFIX + size;
      if (filled === LINK_BURST) filled = this.#hand(filled);
    }
    this.#hand(filled);
    return at;
  }

  /** hot: */
  #hand(n: number): 0 {
    if (n === 0) return 0;
    this.counters.received += n;
    if (this.#sink === null) this.#pool.free(this.#batch, n);
    else this.#sink.deliver(this.#batch, n);
    return 0;
  }
}
