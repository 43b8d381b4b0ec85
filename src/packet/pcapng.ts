/**
 * The capture format pcapng (draft-ietf-opsawg-pcapng): several sections of either byte order, several interfaces with
 * their own link type, time resolution and offset; enhanced, simple and (obsolete) plain packet blocks.
 *
 * Any other block is skipped. Options other than if_tsresol and if_tsoffset are not looked at.
 */
import {
  type CaptureDecoder,
  type CaptureRecord,
  MAX_BLOCK_LENGTH,
  MAX_PACKET_LENGTH,
  malformed,
  putU16,
  putU32,
} from './capture.ts';

/** Block types (draft-ietf-opsawg-pcapng, 11.1). */
const BlockType = {
  section: 0x0a0d0d0a,
  interface: 1,
  packet: 2,
  simplePacket: 3,
  enhancedPacket: 6,
} as const;

/** Every block (3.1): the total length stands behind the type and again at the end. */
const Block = { type: 0, totalLength: 4, body: 8, overhead: 12 } as const;

/** Section header block (4.1), offsets in the block. */
const Section = { byteOrderMagic: 8, major: 12, minor: 14, sectionLength: 16, minLength: 28 } as const;
const BYTE_ORDER_MAGIC = 0x1a2b3c4d;

/** Interface description block (4.2). */
const Interface = { linkType: 8, snapLength: 12, options: 16, minLength: 20 } as const;

/** Enhanced packet block (4.3). */
const Enhanced = {
  interfaceId: 8,
  timeHigh: 12,
  timeLow: 16,
  capturedLength: 20,
  originalLength: 24,
  data: 28,
  minLength: 32,
} as const;

/** Simple packet block (4.4): always of the first interface, without a time. */
const Simple = { originalLength: 8, data: 12, minLength: 16 } as const;

/** Packet block (obsolete, appendix A): a 16-bit interface and a 16-bit drop count instead of the 32-bit interface. */
const Plain = { interfaceId: 8 } as const;

/** Options (3.5) of the interface block (4.2). */
const Option = { end: 0, timeResolution: 9, timeOffset: 14, headLength: 4 } as const;

/** More interfaces than this in one section are not believed. */
const MAX_INTERFACES = 65_536;

interface CaptureInterface {
  readonly linkType: number;
  /** Bytes; 0 is no limit. */
  readonly snapLength: number;
  /** Units of the time stamp in a second. */
  readonly perSecond: bigint;
  /** Seconds to add to every time stamp. */
  readonly offset: number;
}

export class PcapngDecoder implements CaptureDecoder {
  readonly format = 'pcapng';
  readonly nanoseconds = true;
  needed: number = Block.overhead;
  filled = false;
  linkType: number | null = null;
  #littleEndian = true;
  #position = 0;
  #interfaces: CaptureInterface[] = [];

  static recognises(magic: number): boolean {
    return magic === BlockType.section;
  }

  decode(bytes: Uint8Array, start: number, end: number, record: CaptureRecord): number {
    this.filled = false;
    if (end - start < Block.overhead) {
      this.needed = Block.overhead;
      return 0;
    }
    // The type of a section header reads the same in both byte orders; what follows sets the order.
    const type = this.#u32(bytes, start);
    if (type === BlockType.section) this.#setByteOrder(bytes, start);
    else if (this.#position === 0) throw malformed(0, 'the file does not begin with a section header');
    const total = this.#u32(bytes, start + Block.totalLength);
    if (total < Block.overhead || total % 4 !== 0 || total > MAX_BLOCK_LENGTH) {
      throw malformed(this.#position + Block.totalLength, `a block of ${total} bytes`);
    }
    if (end - start < total) {
      this.needed = total;
      return 0;
    }
    const again = this.#u32(bytes, start + total - 4);
    if (again !== total) {
      throw malformed(this.#position + total - 4, `the block's length is repeated as ${again}, not ${total}`);
    }
    this.#decodeBlock(type, bytes, start, total, record);
    this.#position += total;
    return total;
  }

  #decodeBlock(type: number, bytes: Uint8Array, start: number, total: number, record: CaptureRecord): void {
    switch (type) {
      case BlockType.section: {
        this.#require(total, Section.minLength, 'section header');
        const major = this.#u16(bytes, start + Section.major);
        if (major !== 1) throw malformed(this.#position + Section.major, `pcapng version ${major}, not 1`);
        this.#interfaces = [];
        return;
      }
      case BlockType.interface:
        this.#require(total, Interface.minLength, 'interface block');
        if (this.#interfaces.length >= MAX_INTERFACES) throw malformed(this.#position, 'too many interfaces');
        this.#interfaces.push(this.#decodeInterface(bytes, start, total));
        this.linkType ??= this.#interfaces[0].linkType;
        return;
      case BlockType.enhancedPacket:
      case BlockType.packet: {
        this.#require(total, Enhanced.minLength, 'packet block');
        const id =
          type === BlockType.packet
            ? this.#u16(bytes, start + Plain.interfaceId)
            : this.#u32(bytes, start + Enhanced.interfaceId);
        const from = this.#interface(id, Enhanced.interfaceId);
        const length = this.#u32(bytes, start + Enhanced.capturedLength);
        this.#fill(record, bytes, start, total, Enhanced.data, length, Enhanced.capturedLength);
        record.originalLength = this.#u32(bytes, start + Enhanced.originalLength);
        record.linkType = from.linkType;
        setTime(record, from, this.#u32(bytes, start + Enhanced.timeHigh), this.#u32(bytes, start + Enhanced.timeLow));
        return;
      }
      case BlockType.simplePacket: {
        this.#require(total, Simple.minLength, 'simple packet block');
        const from = this.#interface(0, Block.type);
        const original = this.#u32(bytes, start + Simple.originalLength);
        const room = total - Simple.minLength;
        const limit = from.snapLength === 0 ? original : Math.min(original, from.snapLength);
        this.#fill(record, bytes, start, total, Simple.data, Math.min(limit, room), Simple.originalLength);
        record.originalLength = original;
        record.linkType = from.linkType;
        record.seconds = 0;
        record.nanoseconds = 0;
        return;
      }
      default: // Skipped, as the draft asks of unknown blocks.
    }
  }

  #fill(
    record: CaptureRecord,
    bytes: Uint8Array,
    start: number,
    total: number,
    dataAt: number,
    length: number,
    lengthAt: number,
  ): void {
    if (length > MAX_PACKET_LENGTH || dataAt + length > total - 4) {
      throw malformed(this.#position + lengthAt, `a packet of ${length} bytes in a block of ${total}`);
    }
    record.data = bytes;
    record.offset = start + dataAt;
    record.length = length;
    this.filled = true;
  }

  #decodeInterface(bytes: Uint8Array, start: number, total: number): CaptureInterface {
    let perSecond = 1_000_000n;
    let offset = 0;
    const end = total - 4;
    for (let at: number = Interface.options; at + Option.headLength <= end; ) {
      const code = this.#u16(bytes, start + at);
      const length = this.#u16(bytes, start + at + 2);
      if (code === Option.end) break;
      const value = at + Option.headLength;
      if (value + length > end) throw malformed(this.#position + at, `an option of ${length} bytes runs off its block`);
      if (code === Option.timeResolution && length === 1) {
        const exponent = bytes[start + value];
        perSecond = exponent & 0x80 ? 1n << BigInt(exponent & 0x7f) : 10n ** BigInt(exponent);
      } else if (code === Option.timeOffset && length === 8) {
        offset = this.#i64(bytes, start + value);
      }
      at = value + ((length + 3) & ~3);
    }
    return {
      linkType: this.#u16(bytes, start + Interface.linkType),
      snapLength: this.#u32(bytes, start + Interface.snapLength),
      perSecond,
      offset,
    };
  }

  #interface(id: number, at: number): CaptureInterface {
    const found = this.#interfaces[id];
    if (found === undefined)
      throw malformed(this.#position + at, `a packet of interface ${id}, which is not described`);
    return found;
  }

  #require(total: number, least: number, what: string): void {
    if (total < least) throw malformed(this.#position + Block.totalLength, `a ${what} of ${total} bytes`);
  }

  #setByteOrder(bytes: Uint8Array, start: number): void {
    this.#littleEndian = true;
    if (this.#u32(bytes, start + Section.byteOrderMagic) === BYTE_ORDER_MAGIC) return;
    this.#littleEndian = false;
    if (this.#u32(bytes, start + Section.byteOrderMagic) === BYTE_ORDER_MAGIC) return;
    throw malformed(this.#position + Section.byteOrderMagic, 'the byte-order magic is wrong');
  }

  #u16(b: Uint8Array, at: number): number {
    return this.#littleEndian ? b[at] | (b[at + 1] << 8) : (b[at] << 8) | b[at + 1];
  }

  #u32(b: Uint8Array, at: number): number {
    return this.#littleEndian
      ? (b[at] | (b[at + 1] << 8) | (b[at + 2] << 16) | (b[at + 3] << 24)) >>> 0
      : ((b[at] << 24) | (b[at + 1] << 16) | (b[at + 2] << 8) | b[at + 3]) >>> 0;
  }

  /** A signed 64-bit number of seconds; precision beyond 2^53 is of no use here. */
  #i64(b: Uint8Array, at: number): number {
    const first = this.#u32(b, at);
    const second = this.#u32(b, at + 4);
    const high = this.#littleEndian ? second : first;
    return (high | 0) * 0x1_0000_0000 + (this.#littleEndian ? first : second);
  }
}

const MICROSECONDS = 1_000_000n;
const NANOSECONDS = 1_000_000_000n;

/** Splits a 64-bit time stamp of `from`'s unit into seconds and nanoseconds. */
function setTime(record: CaptureRecord, from: CaptureInterface, high: number, low: number): void {
  let seconds: number;
  if (from.perSecond === MICROSECONDS && high < 0x20_0000) {
    const ticks = high * 0x1_0000_0000 + low;
    seconds = Math.floor(ticks / 1_000_000);
    record.nanoseconds = (ticks - seconds * 1_000_000) * 1000;
  } else if (from.perSecond === NANOSECONDS && high < 1_000_000_000) {
    // Long division by 10^9, 16 bits at a time: every step is exact in a double.
    const upper = high * 0x1_0000 + (low >>> 16);
    const quotient = Math.floor(upper / 1_000_000_000);
    const rest = (upper - quotient * 1_000_000_000) * 0x1_0000 + (low & 0xffff);
    const part = Math.floor(rest / 1_000_000_000);
    seconds = quotient * 0x1_0000 + part;
    record.nanoseconds = rest - part * 1_000_000_000;
  } else {
    const ticks = (BigInt(high) << 32n) | BigInt(low);
    seconds = Number(ticks / from.perSecond);
    record.nanoseconds = Number(((ticks % from.perSecond) * NANOSECONDS) / from.perSecond);
  }
  record.seconds = seconds + from.offset;
}

/** Writes a section header and one interface (nanoseconds) at the start of `bytes`; returns their length. */
export function pcapngHeader(bytes: Uint8Array, linkType: number, snapLength: number): number {
  const interfaceLength = Interface.minLength + 12;
  bytes.fill(0, 0, Section.minLength + interfaceLength);
  putU32(bytes, Block.type, BlockType.section);
  putU32(bytes, Block.totalLength, Section.minLength);
  putU32(bytes, Section.byteOrderMagic, BYTE_ORDER_MAGIC);
  putU16(bytes, Section.major, 1);
  // Section length -1: not stated.
  bytes.fill(0xff, Section.sectionLength, Section.sectionLength + 8);
  putU32(bytes, Section.minLength - 4, Section.minLength);

  const at = Section.minLength;
  putU32(bytes, at, BlockType.interface);
  putU32(bytes, at + Block.totalLength, interfaceLength);
  putU16(bytes, at + Interface.linkType, linkType);
  putU32(bytes, at + Interface.snapLength, snapLength);
  putU16(bytes, at + Interface.options, Option.timeResolution);
  putU16(bytes, at + Interface.options + 2, 1);
  bytes[at + Interface.options + Option.headLength] = 9;
  // The next eight bytes stay zero: padding of the option, then opt_endofopt.
  putU32(bytes, at + interfaceLength - 4, interfaceLength);
  return at + interfaceLength;
}

function packetBlockLength(length: number): number {
  return Enhanced.minLength + ((length + 3) & ~3);
}

/** Writes the head of an enhanced packet block at `at`; returns where the packet's bytes go. */
export function pcapngPacketHeader(
  bytes: Uint8Array,
  at: number,
  length: number,
  originalLength: number,
  seconds: number,
  nanoseconds: number,
): number {
  // seconds * 10^9 + nanoseconds as two 32-bit halves, exact: multiply 16-bit pieces of the factor.
  const low = (seconds % 0x1_0000) * 1_000_000_000 + nanoseconds;
  const upper = Math.floor(seconds / 0x1_0000) * 1_000_000_000 + Math.floor(low / 0x1_0000);
  putU32(bytes, at + Block.type, BlockType.enhancedPacket);
  putU32(bytes, at + Block.totalLength, packetBlockLength(length));
  putU32(bytes, at + Enhanced.interfaceId, 0);
  putU32(bytes, at + Enhanced.timeHigh, Math.floor(upper / 0x1_0000));
  putU32(bytes, at + Enhanced.timeLow, (upper % 0x1_0000) * 0x1_0000 + (low % 0x1_0000));
  putU32(bytes, at + Enhanced.capturedLength, length);
  putU32(bytes, at + Enhanced.originalLength, originalLength);
  return at + Enhanced.data;
}

/** Writes padding and the second length behind the packet's `length` bytes, which end at `at`; returns the end of the block. */
export function pcapngPacketTrailer(bytes: Uint8Array, at: number, length: number): number {
  const padding = -length & 3;
  bytes.fill(0, at, at + padding);
  putU32(bytes, at + padding, packetBlockLength(length));
  return at + padding + 4;
}
