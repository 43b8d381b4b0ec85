/**
 * Reading and writing capture files of any size with a bounded buffer.
 *
 * Files are read and written synchronously, a chunk at a time: a slow disk or a full pipe holds the caller back by
 * itself and memory does not grow. Who has to stay awake while an input that may take its time, such as a pipe, says
 * nothing, reads with `waits` and `more`.
 */
import { closeSync, fstatSync, openSync, read, readSync, writeSync } from 'node:fs';
import { promisify } from 'node:util';
import { InputError } from '../errors.ts';
import { type CaptureDecoder, CaptureRecord, MAX_PACKET_LENGTH } from './capture.ts';
import { PcapDecoder, pcapHeader, pcapRecordHeader } from './pcap.ts';
import { PcapngDecoder, pcapngHeader, pcapngPacketHeader, pcapngPacketTrailer } from './pcapng.ts';

const readLater = promisify(read);

export interface CaptureReaderOptions {
  /** Bytes read at a time. Default 256 KiB. */
  readonly chunk?: number;
  /** In what is no ordinary file `next` does not read on, which may take long: `more` does. */
  readonly waits?: boolean;
}

/** Picks the decoder by the first four bytes of the file. */
function decoderFor(bytes: Uint8Array, end: number): CaptureDecoder {
  if (end < 4) throw new InputError('CAPTURE_FORMAT', 'too short to be a pcap or pcapng file');
  const magic = ((bytes[0] << 24) | (bytes[1] << 16) | (bytes[2] << 8) | bytes[3]) >>> 0;
  if (PcapDecoder.recognises(magic)) return new PcapDecoder(magic);
  if (PcapngDecoder.recognises(magic)) return new PcapngDecoder();
  throw new InputError('CAPTURE_FORMAT', 'neither a pcap nor a pcapng file', {
    hint: 'compressed captures must be unpacked first',
  });
}

/** Reads a pcap or pcapng file from start to end. */
export class CaptureReader {
  readonly path: string;
  readonly decoder: CaptureDecoder;
  /** Bytes of the file that have been read from the disk so far. */
  bytesRead = 0;
  /** `next` returned `null` because `more` has to be called. */
  starved = false;
  readonly #record = new CaptureRecord();
  #waits = false;
  /** Seen by `more`. */
  #ended = false;
  #fd = -1;
  #buffer: Uint8Array;
  #start = 0;
  #end = 0;

  /** Opens `path` and reads its first chunk. Throws `InputError` (`CAPTURE_UNREADABLE`, `CAPTURE_FORMAT`). */
  constructor(path: string, options: CaptureReaderOptions = {}) {
    this.path = path;
    this.#buffer = new Uint8Array(options.chunk ?? 256 * 1024);
    try {
      this.#fd = openSync(path, 'r');
    } catch (error) {
      throw this.#explain(error);
    }
    try {
      this.#waits = options.waits === true && !fstatSync(this.#fd).isFile();
      while (this.#end < 4 && this.#fill(4));
      this.decoder = decoderFor(this.#buffer, this.#end);
    } catch (error) {
      this.close();
      throw this.#explain(error);
    }
  }

  /**
   * The next packet, or `null` at the end of the file, or when `starved`. Throws `InputError` where the file is malformed or
   * cut short.
   */
  next(): CaptureRecord | null {
    try {
      return this.#next();
    } catch (error) {
      throw this.#explain(error);
    }
  }

  #next(): CaptureRecord | null {
    const decoder = this.decoder;
    const record = this.#record;
    for (;;) {
      const taken = decoder.decode(this.#buffer, this.#start, this.#end, record);
      if (taken > 0) {
        this.#start += taken;
        if (decoder.filled) return record;
      } else if (this.#waits && !this.#ended) {
        this.starved = true;
        return null;
      } else if (this.#ended || !this.#fill(decoder.needed)) {
        if (this.#start === this.#end && this.bytesRead > 0) return null;
        throw new InputError(
          'CAPTURE_TRUNCATED',
          `at byte ${this.bytesRead - (this.#end - this.#start)}: the file ends within a record`,
        );
      }
    }
  }

  /** Reads on, without holding the thread up. Throws `InputError` `CAPTURE_UNREADABLE`. */
  async more(): Promise<void> {
    this.#makeRoom(this.decoder.needed);
    try {
      const { bytesRead } = await readLater(this.#fd, this.#buffer, this.#end, this.#buffer.length - this.#end, null);
      this.#end += bytesRead;
      this.bytesRead += bytesRead;
      this.#ended = bytesRead === 0;
      this.starved = false;
    } catch (error) {
      throw this.#explain(error);
    }
  }

  *[Symbol.iterator](): Generator<CaptureRecord> {
    for (let record = this.next(); record !== null; record = this.next()) yield record;
  }

  close(): void {
    if (this.#fd < 0) return;
    closeSync(this.#fd);
    this.#fd = -1;
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** Says which file an error is about. */
  #explain(error: unknown): unknown {
    if (error instanceof InputError) {
      const hint = error.hint === undefined ? {} : { hint: error.hint };
      return new InputError(error.code, `${this.path}: ${error.message}`, { ...hint, cause: error });
    }
    if (error instanceof Error && 'syscall' in error) {
      return new InputError('CAPTURE_UNREADABLE', `cannot read the capture: ${error.message}`, { cause: error });
    }
    return error;
  }

  /** Makes room for `needed` bytes from the current start. */
  #makeRoom(needed: number): void {
    const have = this.#end - this.#start;
    if (needed > this.#buffer.length) {
      const larger = new Uint8Array(Math.max(needed, 2 * this.#buffer.length));
      larger.set(this.#buffer.subarray(this.#start, this.#end));
      this.#buffer = larger;
    } else if (this.#start > 0) {
      this.#buffer.copyWithin(0, this.#start, this.#end);
    }
    this.#start = 0;
    this.#end = have;
  }

  /** Reads on; makes room for `needed` bytes from the current start. False at the end of the file. */
  #fill(needed: number): boolean {
    this.#makeRoom(needed);
    const count = readSync(this.#fd, this.#buffer, this.#end, this.#buffer.length - this.#end, null);
    this.#end += count;
    this.bytesRead += count;
    return count > 0;
  }
}

export interface CaptureWriterOptions {
  /** Default `pcap`. */
  readonly format?: 'pcap' | 'pcapng';
  readonly linkType: number;
  /** pcap: write the nanosecond variant. pcapng always carries nanoseconds. */
  readonly nanoseconds?: boolean;
  /** Fail when the file is there already, be it a link to nowhere. */
  readonly exclusive?: boolean;
}

/** Writes a pcap or pcapng file, little-endian, through a buffer. */
export class CaptureWriter {
  /** Packets written so far. */
  packets = 0;
  readonly #pcapng: boolean;
  readonly #divisor: number;
  readonly #buffer = new Uint8Array(256 * 1024);
  #fd: number;
  #used = 0;

  /** Creates `path`, or overwrites it. Throws the error of the file system. */
  constructor(path: string, options: CaptureWriterOptions) {
    this.#pcapng = options.format === 'pcapng';
    const fine = options.nanoseconds === true;
    this.#divisor = fine ? 1 : 1000;
    this.#fd = openSync(path, options.exclusive === true ? 'wx' : 'w');
    this.#used = this.#pcapng
      ? pcapngHeader(this.#buffer, options.linkType, MAX_PACKET_LENGTH)
      : pcapHeader(this.#buffer, options.linkType, MAX_PACKET_LENGTH, fine);
  }

  /** Appends the `length` bytes at `offset` of `data`. Finer parts of the time stamp than the file holds are cut off. */
  write(
    data: Uint8Array,
    offset: number,
    length: number,
    seconds: number,
    nanoseconds: number,
    originalLength = length,
  ): void {
    if (length > MAX_PACKET_LENGTH) throw new RangeError(`a packet of ${length} bytes does not fit a capture`);
    const room = length + 64;
    if (this.#used + room > this.#buffer.length) this.flush();
    if (room > this.#buffer.length) {
      this.#writeLarge(data, offset, length, seconds, nanoseconds, originalLength);
      return;
    }
    let at = this.#head(this.#used, length, seconds, nanoseconds, originalLength);
    this.#buffer.set(data.subarray(offset, offset + length), at);
    at += length;
    if (this.#pcapng) at = pcapngPacketTrailer(this.#buffer, at, length);
    this.#used = at;
    this.packets++;
  }

  /** Hands everything to the operating system. What it does not take is lost, and not tried again by `close`. */
  flush(): void {
    const used = this.#used;
    this.#used = 0;
    this.#writeAll(this.#buffer, 0, used);
  }

  /** Flushes and closes. Idempotent. */
  close(): void {
    if (this.#fd < 0) return;
    const fd = this.#fd;
    try {
      this.flush();
    } finally {
      this.#fd = -1;
      closeSync(fd);
    }
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #head(at: number, length: number, seconds: number, nanoseconds: number, originalLength: number): number {
    return this.#pcapng
      ? pcapngPacketHeader(this.#buffer, at, length, originalLength, seconds, nanoseconds)
      : pcapRecordHeader(this.#buffer, at, length, originalLength, seconds, Math.floor(nanoseconds / this.#divisor));
  }

  #writeLarge(
    data: Uint8Array,
    offset: number,
    length: number,
    seconds: number,
    nanoseconds: number,
    originalLength: number,
  ): void {
    this.#used = this.#head(0, length, seconds, nanoseconds, originalLength);
    this.flush();
    this.#writeAll(data, offset, length);
    if (this.#pcapng) this.#used = pcapngPacketTrailer(this.#buffer, 0, length);
    this.packets++;
  }

  #writeAll(data: Uint8Array, offset: number, length: number): void {
    for (let done = 0; done < length; ) done += writeSync(this.#fd, data, offset + done, length - done);
  }
}
