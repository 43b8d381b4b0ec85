/**
 * The classic capture format, pcap (draft-ietf-opsawg-pcap): both byte orders, micro- and nanosecond time stamps.
 *
 * Not read: the modified formats of other programs (magic a1b2cd34), which no current tool writes.
 */
import { type CaptureDecoder, type CaptureRecord, MAX_PACKET_LENGTH, malformed, putU16, putU32 } from './capture.ts';

/** File header (draft-ietf-opsawg-pcap, 4). */
const Header = { magic: 0, major: 4, minor: 6, snapLength: 16, linkType: 20, length: 24 } as const;

/** Packet record (5). */
const Record = { seconds: 0, fraction: 4, capturedLength: 8, originalLength: 12, length: 16 } as const;

/** The first four bytes, read big-endian. */
const Magic = {
  microseconds: 0xa1b2c3d4,
  microsecondsSwapped: 0xd4c3b2a1,
  nanoseconds: 0xa1b23c4d,
  nanosecondsSwapped: 0x4d3cb2a1,
} as const;

const VERSION_MAJOR = 2;
const VERSION_MINOR = 4;

export class PcapDecoder implements CaptureDecoder {
  readonly format = 'pcap';
  readonly nanoseconds: boolean;
  needed: number = Header.length;
  filled = false;
  readonly #littleEndian: boolean;
  #position = 0;
  linkType: number | null = null;

  static recognises(magic: number): boolean {
    return Object.values(Magic).some((known) => known === magic);
  }

  /** `magic`: the first four bytes of the file, read big-endian. */
  constructor(magic: number) {
    this.#littleEndian = magic === Magic.microsecondsSwapped || magic === Magic.nanosecondsSwapped;
    this.nanoseconds = magic === Magic.nanoseconds || magic === Magic.nanosecondsSwapped;
  }

  decode(bytes: Uint8Array, start: number, end: number, record: CaptureRecord): number {
    this.filled = false;
    if (this.linkType === null) return this.#decodeHeader(bytes, start, end);
    if (end - start < Record.length) {
      this.needed = Record.length;
      return 0;
    }
    const length = this.#u32(bytes, start + Record.capturedLength);
    if (length > MAX_PACKET_LENGTH) {
      throw malformed(
        this.#position + Record.capturedLength,
        `a packet of ${length} bytes (the limit is ${MAX_PACKET_LENGTH})`,
      );
    }
    const total = Record.length + length;
    if (end - start < total) {
      this.needed = total;
      return 0;
    }
    const fraction = this.#u32(bytes, start + Record.fraction);
    const perSecond = this.nanoseconds ? 1_000_000_000 : 1_000_000;
    record.data = bytes;
    record.offset = start + Record.length;
    record.length = length;
    record.originalLength = this.#u32(bytes, start + Record.originalLength);
    record.seconds = this.#u32(bytes, start + Record.seconds) + Math.floor(fraction / perSecond);
    record.nanoseconds = (fraction % perSecond) * (this.nanoseconds ? 1 : 1000);
    record.linkType = this.linkType;
    this.filled = true;
    this.#position += total;
    return total;
  }

  #decodeHeader(bytes: Uint8Array, start: number, end: number): number {
    if (end - start < Header.length) return 0;
    const major = this.#u16(bytes, start + Header.major);
    if (major !== VERSION_MAJOR) throw malformed(Header.major, `pcap version ${major}, not ${VERSION_MAJOR}`);
    // The upper half holds the length of frame check sequences, which IP's own length field makes irrelevant.
    this.linkType = this.#u32(bytes, start + Header.linkType) & 0xffff;
    this.#position = Header.length;
    return Header.length;
  }

  #u16(b: Uint8Array, at: number): number {
    return this.#littleEndian ? b[at] | (b[at + 1] << 8) : (b[at] << 8) | b[at + 1];
  }

  #u32(b: Uint8Array, at: number): number {
    return this.#littleEndian
      ? (b[at] | (b[at + 1] << 8) | (b[at + 2] << 16) | (b[at + 3] << 24)) >>> 0
      : ((b[at] << 24) | (b[at + 1] << 16) | (b[at + 2] << 8) | b[at + 3]) >>> 0;
  }
}

/** Writes a file header at the start of `bytes`; returns its length. */
export function pcapHeader(bytes: Uint8Array, linkType: number, snapLength: number, nanoseconds: boolean): number {
  bytes.fill(0, 0, Header.length);
  putU32(bytes, Header.magic, nanoseconds ? Magic.nanoseconds : Magic.microseconds);
  putU16(bytes, Header.major, VERSION_MAJOR);
  putU16(bytes, Header.minor, VERSION_MINOR);
  putU32(bytes, Header.snapLength, snapLength);
  putU32(bytes, Header.linkType, linkType);
  return Header.length;
}

/** Writes the head of a record at `at`; returns where the packet's bytes go. `fraction` is in the file's unit. */
export function pcapRecordHeader(
  bytes: Uint8Array,
  at: number,
  length: number,
  originalLength: number,
  seconds: number,
  fraction: number,
): number {
  putU32(bytes, at + Record.seconds, seconds);
  putU32(bytes, at + Record.fraction, fraction);
  putU32(bytes, at + Record.capturedLength, length);
  putU32(bytes, at + Record.originalLength, originalLength);
  return at + Record.length;
}
