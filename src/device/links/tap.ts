/**
 * `tap:NAME`: frames go to the kernel and come from it, through a TAP interface of the network namespace of this process
 * (Documentation/networking/tuntap.rst).
 *
 * A frame is a system call, from or to the pool's memory. The kernel takes a frame or drops it, so nothing waits here; what it does not take
 * (the interface is down, it has no memory) is counted. Frames of the kernel wait in the interface's queue while the driver has no buffers.
 * The link is up as long as the interface exists, whether or not that is up. Left out: offloads (IFF_VNET_HDR), several queues, and
 * whatever `ip` is for: the interface gets no address here and is not brought up.
 */
import { constants as os } from 'node:os';
import { SystemError } from '../../errors.ts';
import type { PacketPool } from '../../packet/pool.ts';
import { ffi, type Watch } from '../../sys/ffi/ffi.ts';
import { close, readNow, writeNow } from '../../sys/libc.ts';
import { INTERFACE_GONE, openTun } from '../../sys/tun.ts';
import { DeviceError } from '../errors.ts';
import { Unfinished } from '../unfinished.ts';
import { ANY_ROOM, type FrameSink, LINK_BURST, type Link, type LinkCounters } from './link.ts';

const SHORTEST_FRAME = 14;

export interface TapLinkOptions {
  readonly pool: PacketPool;
  /** Of the interface. */
  readonly name: string;
  /** Bytes of the largest frame. */
  readonly maxFrame: number;
  readonly warn: (text: string) => void;
}

export class TapLink implements Link {
  readonly counters: LinkCounters = { sent: 0, received: 0, dropped: 0 };
  readonly isOutside = true;
  readonly taken = Unfinished.nothing;
  readonly #pool: PacketPool;
  readonly #name: string;
  readonly #maxFrame: number;
  readonly #warn: (text: string) => void;
  readonly #batch = new Uint32Array(LINK_BURST);
  /** -1 when there is none any more. */
  #fd: number;
  #watch: Watch | null = null;
  /** Whether there may be frames: no watch is on the descriptor then. */
  #readable = false;
  #held = false;
  #sink: FrameSink | null = null;
  #changed: () => void = () => {};
  #wake: () => void = () => {};

  /** Attaches to the interface. Throws DeviceError `LINK_FAILED` with a hint. */
  constructor({ pool, name, maxFrame, warn }: TapLinkOptions) {
    this.#pool = pool;
    this.#name = name;
    this.#maxFrame = maxFrame;
    this.#warn = warn;
    try {
      this.#fd = openTun(name, { kind: 'tap' });
    } catch (cause) {
      if (!(cause instanceof SystemError)) throw cause;
      const { hint, message } = cause;
      const options = hint === undefined ? { cause } : { cause, hint };
      throw new DeviceError('LINK_FAILED', `cannot attach to the TAP interface ${name}: ${message}`, options);
    }
    this.#listen();
  }

  get up(): boolean {
    return this.#fd >= 0;
  }

  get blocked(): boolean {
    return this.#held;
  }

  attach(sink: FrameSink, changed: () => void, wake: () => void): void {
    this.#sink = sink;
    this.#changed = changed;
    this.#wake = wake;
  }

  #listen(): void {
    this.#readable = false;
    this.#watch = ffi().watch(this.#fd, () => {
      this.#watch?.close();
      this.#watch = null;
      this.#readable = true;
      this.#wake();
    });
  }

  /** Nothing is outside. */
  sendDirect(): boolean {
    return false;
  }

  send(packets: Uint32Array, n: number): void {
    // hot:
    const { memory, offset, length } = this.#pool;
    for (let i = 0; i < n; i++) {
      const p = packets[i];
      const done = this.#fd < 0 ? -INTERFACE_GONE : writeNow(this.#fd, memory.address + offset[p], length[p]);
      if (done >= 0) {
        this.counters.sent++;
      } else {
        this.counters.dropped++;
        if (done === -INTERFACE_GONE) this.#lose();
      }
    }
    this.#pool.free(packets, n);
  }

  room(): number {
    return ANY_ROOM;
  }

  poll(): number {
    // hot:
    if (!this.#readable) return 0;
    const sink = this.#sink;
    const pool = this.#pool;
    const batch = this.#batch;
    const want = sink === null || sink.room() < LINK_BURST ? 0 : pool.allocate(batch, LINK_BURST);
    this.#held = want === 0;
    const filled = this.#read(want);
    if (filled < want) pool.free(batch.subarray(filled, want), want - filled);
    if (filled > 0 && sink !== null) {
      this.counters.received += filled;
      sink.deliver(batch, filled);
    }
    // Where nothing was fit for delivery, there may still be more: no watch would tell.
    return this.#readable ? want : filled;
  }

  /** hot: reads frames into the first `want` packets of the batch; returns how many it filled. */
  #read(want: number): number {
    const { memory, offset, length } = this.#pool;
    const most = this.#maxFrame;
    let filled = 0;
    for (let i = 0; i < want; i++) {
      const p = this.#batch[filled];
      // One byte more shows a frame that is too long, which the kernel would cut.
      const size = readNow(this.#fd, memory.address + offset[p], most + 1);
      if (size === -os.errno.EAGAIN) {
        this.#listen();
        break;
      }
      if (size <= 0) {
        this.#lose();
        break;
      }
      if (size < SHORTEST_FRAME || size > most) {
        this.counters.dropped++;
        continue;
      }
      length[p] = size;
      filled++;
    }
    return filled;
  }

  /** The interface was deleted. */
  #lose(): void {
    if (this.#fd < 0) return;
    this.#release();
    this.#warn(`the TAP interface ${this.#name} is gone; what is sent is dropped from now on`);
    this.#changed();
  }

  #release(): void {
    this.#watch?.close();
    this.#watch = null;
    this.#readable = false;
    this.#held = false;
    if (this.#fd >= 0) close(this.#fd);
    this.#fd = -1;
  }

  idle(): boolean {
    return false;
  }

  close(): void {
    this.#release();
    this.#sink = null;
  }
}
