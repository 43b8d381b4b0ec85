/**
 * What the two capture formats have in common: the record that a decoder fills, the decoder's interface and the
 * limits. `capture-file.ts` reads and writes files with it.
 */
import { InputError } from '../errors.ts';

/** The largest packet that is believed (the largest snapshot length that libpcap accepts). */
export const MAX_PACKET_LENGTH = 262_144;

/** The largest piece (block or record) that a file may contain. */
export const MAX_BLOCK_LENGTH = 16 * 1024 * 1024;

/** One captured packet: `length` bytes at `offset` in `data`. Decoders reuse it: it is valid until the next one. */
export class CaptureRecord {
  data: Uint8Array = new Uint8Array(0);
  offset = 0;
  length = 0;
  /** Bytes on the wire; more than `length` when the capture was cut. */
  originalLength = 0;
  /** Since 1970-01-01 UTC. */
  seconds = 0;
  /** 0 to 999 999 999. */
  nanoseconds = 0;
  linkType = 0;

  /** A copy of the packet's bytes. */
  bytes(): Uint8Array {
    return this.data.slice(this.offset, this.offset + this.length);
  }
}

/** Reads one format, piece by piece. */
export interface CaptureDecoder {
  readonly format: 'pcap' | 'pcapng';
  /** True when time stamps can be finer than a microsecond. */
  readonly nanoseconds: boolean;
  /** Link type of the file (pcap) or of its first interface (pcapng), as soon as it is known. */
  readonly linkType: number | null;
  /** After `decode` returned 0: how many bytes from `start` it wants to see. */
  readonly needed: number;
  /** After `decode` returned more than 0: whether `record` was filled (a block may hold no packet). */
  readonly filled: boolean;
  /**
   * Decodes the piece at `start` of `bytes`, of which the bytes before `end` are there. Returns how many bytes it
   * took, or 0 when it needs more. Throws `InputError` `CAPTURE_MALFORMED` with the position in the file.
   */
  decode(bytes: Uint8Array, start: number, end: number, record: CaptureRecord): number;
}

/** The error for a byte of a capture file that cannot be what it is. */
export function malformed(position: number, what: string): InputError {
  return new InputError('CAPTURE_MALFORMED', `at byte ${position}: ${what}`);
}

/** Stores `value` little-endian. */
export function putU16(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value;
  bytes[at + 1] = value >>> 8;
}

/** Stores `value` little-endian. */
export function putU32(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value;
  bytes[at + 1] = value >>> 8;
  bytes[at + 2] = value >>> 16;
  bytes[at + 3] = value >>> 24;
}
