/**
 * `pcap:IN,OUT`: frames come from one capture file and go to another.
 *
 * IN is played once, as fast as receive buffers come, from when a driver is first ready; OUT holds what was sent,
 * with the time it was sent. Either may be empty. A frame of IN that the pool cannot hold is counted and left out. Where IN makes no sense, or OUT cannot be
 * written any more, that ends, with a warning, and the device goes on.
 */
import { InputError } from '../../errors.ts';
import type { CaptureRecord } from '../../packet/capture.ts';
import { CaptureReader, CaptureWriter } from '../../packet/capture-file.ts';
import { LinkType } from '../../packet/fields.ts';
import type { PacketPool } from '../../packet/pool.ts';
import { Unfinished } from '../unfinished.ts';
import { ANY_ROOM, type FrameSink, LINK_BURST, type Link, type LinkCounters } from './link.ts';

const MS = 1000;
const NS_PER_MS = 1_000_000;

export interface PcapLinkOptions {
  readonly pool: PacketPool;
  /** Paths; empty for none. */
  readonly input: string;
  readonly output: string;
  /** Bytes of the largest frame. */
  readonly maxFrame: number;
  readonly warn: (text: string) => void;
}

export class PcapLink implements Link {
  readonly counters: LinkCounters = { sent: 0, received: 0, dropped: 0 };
  readonly isOutside = true;
  readonly taken = Unfinished.nothing;
  readonly up = true;
  readonly #pool: PacketPool;
  readonly #maxFrame: number;
  readonly #warn: (text: string) => void;
  #writer: CaptureWriter | null;
  readonly #batch = new Uint32Array(LINK_BURST);
  #reader: CaptureReader | null;
  #sink: FrameSink | null = null;
  #dirty = false;

  /** Opens both files. Throws InputError, or the error of the file system. */
  constructor({ pool, input, output, maxFrame, warn }: PcapLinkOptions) {
    this.#warn = warn;
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
    this.#write((writer) => {
      const now = Date.now();
      const seconds = Math.floor(now / MS);
      const nanoseconds = (now % MS) * NS_PER_MS;
      for (let i = 0; i < n; i++) {
        const p = packets[i];
        writer.write(u8, offset[p], length[p], seconds, nanoseconds);
      }
      this.#dirty = true;
    });
    this.#pool.free(packets, n);
  }

  /** Does something with OUT; when that fails, it was the last time. */
  #write(work: (writer: CaptureWriter) => void): void {
    if (this.#writer === null) return;
    try {
      work(this.#writer);
    } catch (error) {
      this.#warn(`the capture that is written has ended: ${reason(error)}`);
      const writer = this.#writer;
      this.#writer = null;
      try {
        writer.close();
      } catch {
        // What it still held is lost, which has been said.
      }
    }
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
      const record = this.#next(this.#reader);
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

  /** The next frame; null at the end of what can be read. */
  #next(reader: CaptureReader): CaptureRecord | null {
    try {
      return reader.next();
    } catch (error) {
      this.#warn(`the capture that is played has ended: ${reason(error)}`);
      return null;
    }
  }

  idle(): boolean {
    if (this.#dirty) this.#write((writer) => writer.flush());
    this.#dirty = false;
    return false;
  }

  close(): void {
    this.#reader?.close();
    this.#reader = null;
    this.#write((writer) => writer.close());
    this.#writer = null;
    this.#sink = null;
  }
}

function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
