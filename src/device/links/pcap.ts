/**
 * `pcap:IN,OUT`: frames come from one capture file and go to another.
 *
 * IN is played once, as fast as receive buffers come, from when a driver is first ready; OUT holds what was sent,
 * with the time it was sent. Either may be empty. A frame of IN that the pool cannot hold is counted and left out.
 */
import { InputError } from '../../errors.ts';
import { CaptureReader, CaptureWriter } from '../../packet/capture-file.ts';
import { LinkType } from '../../packet/fields.ts';
import type { PacketPool } from '../../packet/pool.ts';
import { Unfinished } from '../unfinished.ts';
import { ANY_ROOM, type FrameSink, LINK_BURST, type Link, type LinkCounters } from './link.ts';

const MS = 1000;
const NS_PER_MS = 1_000_000;

export class PcapLink implements Link {
  readonly counters: LinkCounters = { sent: 0, received: 0, dropped: 0 };
  readonly isOutside = true;
  readonly taken = Unfinished.nothing;
  readonly up = true;
  readonly #pool: PacketPool;
  readonly #maxFrame: number;
  readonly #writer: CaptureWriter | null;
  readonly #batch = new Uint32Array(LINK_BURST);
  #reader: CaptureReader | null;
  #sink: FrameSink | null = null;
  #dirty = false;

  /** Opens both files; an empty path is none. Throws InputError, or the error of the file system. */
  constructor(pool: PacketPool, input: string, output: string, maxFrame: number) {
    this.#pool = pool;
    this.#maxFrame = maxFrame;
    this.#reader = input === '' ? null : new CaptureReader(input);
    try {
      this.#writer = output === '' ? null : new CaptureWriter(output, { linkType: LinkType.ethernet });
    } catch (cause) {
      this.#reader?.close();
      const message = cause instanceof Error ? cause.message : String(cause);
      throw new InputError('LINK_FAILED', `cannot write ${output}: ${message}`, { cause });
    }
  }

  get blocked(): boolean {
    return this.#sink?.ready === true && this.#reader !== null;
  }

  attach(sink: FrameSink): void {
    this.#sink = sink;
  }

  send(packets: Uint32Array, n: number): void {
    const { u8, offset, length } = this.#pool;
    this.counters.sent += n;
    if (this.#writer !== null) {
      const now = Date.now();
      const seconds = Math.floor(now / MS);
      const nanoseconds = (now % MS) * NS_PER_MS;
      for (let i = 0; i < n; i++) {
        const p = packets[i];
        this.#writer.write(u8, offset[p], length[p], seconds, nanoseconds);
      }
      this.#dirty = true;
    }
    this.#pool.free(packets, n);
  }

  /** Nothing is outside. */
  sendDirect(): boolean {
    return false;
  }

  room(): number {
    return ANY_ROOM;
  }

  poll(): number {
    if (this.#reader === null || this.#sink === null || !this.#sink.ready) return 0;
    const want = this.#pool.allocate(this.#batch, Math.min(this.#sink.room(), LINK_BURST));
    let filled = 0;
    while (filled < want) {
      const record = this.#reader.next();
      if (record === null) {
        this.#reader.close();
        this.#reader = null;
        break;
      }
      if (record.linkType !== LinkType.ethernet || record.length > this.#maxFrame) {
        this.counters.dropped++;
        continue;
      }
      this.#pool.write(this.#batch[filled++], record.bytes());
    }
    this.#pool.free(this.#batch.subarray(filled), want - filled);
    this.counters.received += filled;
    if (filled > 0) this.#sink.deliver(this.#batch, filled);
    return filled;
  }

  idle(): boolean {
    if (this.#dirty) this.#writer?.flush();
    this.#dirty = false;
    return false;
  }

  close(): void {
    this.#reader?.close();
    this.#reader = null;
    this.#writer?.close();
    this.#sink = null;
  }
}
