import { execFileSync } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { InputError } from '../../src/errors.ts';
import { CaptureReader, CaptureWriter, type CaptureWriterOptions } from '../../src/packet/capture-file.ts';
import { runs } from '../depth.ts';

let folder = '';
let serial = 0;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-capture-'));
});
afterAll(() => {
  rmSync(folder, { recursive: true, force: true });
});

function file(bytes?: Uint8Array): string {
  const path = join(folder, `${serial++}.cap`);
  if (bytes !== undefined) writeFileSync(path, bytes);
  return path;
}

interface Packet {
  bytes: Uint8Array;
  seconds: number;
  nanoseconds: number;
  originalLength: number;
  linkType: number;
}

function readAll(path: string, chunk?: number): Packet[] {
  using reader = new CaptureReader(path, chunk === undefined ? {} : { chunk });
  const packets: Packet[] = [];
  for (const record of reader) {
    packets.push({
      bytes: record.bytes(),
      seconds: record.seconds,
      nanoseconds: record.nanoseconds,
      originalLength: record.originalLength,
      linkType: record.linkType,
    });
  }
  return packets;
}

function writeAll(path: string, packets: Packet[], options: CaptureWriterOptions): void {
  using writer = new CaptureWriter(path, options);
  for (const p of packets) writer.write(p.bytes, 0, p.bytes.length, p.seconds, p.nanoseconds, p.originalLength);
}

function failure(bytes: Uint8Array): InputError {
  const path = file(bytes);
  try {
    readAll(path);
  } catch (error) {
    if (error instanceof InputError) {
      expect(error.message.startsWith(`${path}: `) || error.code === 'CAPTURE_UNREADABLE').toBe(true);
      return error;
    }
    throw error;
  }
  throw new Error('the file was accepted');
}

/** Builds files by hand in either byte order. */
class Builder {
  readonly #parts: Uint8Array[] = [];
  readonly #little: boolean;
  constructor(little: boolean) {
    this.#little = little;
  }
  u16(...values: number[]): this {
    for (const v of values) this.#push([v & 0xff, v >>> 8]);
    return this;
  }
  u32(...values: number[]): this {
    for (const v of values) this.#push([v & 0xff, (v >>> 8) & 0xff, (v >>> 16) & 0xff, v >>> 24]);
    return this;
  }
  raw(...bytes: number[]): this {
    this.#parts.push(Uint8Array.from(bytes));
    return this;
  }
  /** A pcapng block around `body`. */
  block(type: number, body: Builder): this {
    const bytes = body.done();
    return this.u32(type, bytes.length + 12)
      .raw(...bytes)
      .u32(bytes.length + 12);
  }
  done(): Uint8Array {
    return Uint8Array.from(this.#parts.flatMap((part) => Array.from(part)));
  }
  #push(littleEndian: number[]): void {
    this.#parts.push(Uint8Array.from(this.#little ? littleEndian : littleEndian.reverse()));
  }
}

const packetOf = fc.record({
  bytes: fc.uint8Array({ maxLength: 300 }),
  seconds: fc.nat(0xffffffff),
  nanoseconds: fc.nat(999_999_999),
  originalLength: fc.nat(70_000),
  linkType: fc.constant(1),
});

describe('a capture written and read back', () => {
  test.each([
    ['pcap with nanoseconds', { linkType: 1, nanoseconds: true }, 1],
    ['pcap with microseconds', { linkType: 1 }, 1000],
    ['pcapng', { linkType: 1, format: 'pcapng' }, 1],
  ] as const)('is the same packets: %s', (_name, options, unit) => {
    fc.assert(
      fc.property(fc.array(packetOf, { maxLength: 20 }), fc.integer({ min: 16, max: 700 }), (packets, chunk) => {
        const path = file();
        writeAll(path, packets, options);
        const expected = packets.map((p) => ({ ...p, nanoseconds: p.nanoseconds - (p.nanoseconds % unit) }));
        expect(readAll(path, chunk)).toEqual(expected);
      }),
      { numRuns: runs(60) },
    );
  });

  test('may hold packets as large as the format allows', () => {
    for (const format of ['pcap', 'pcapng'] as const) {
      const path = file();
      const bytes = Uint8Array.from({ length: 262_143 }, (_, i) => (i * 7) & 0xff);
      const packet = { bytes, seconds: 1, nanoseconds: 2000, originalLength: bytes.length, linkType: 101 };
      writeAll(path, [packet, packet], { format, linkType: 101 });
      const back = readAll(path);
      expect(back.length).toBe(2);
      for (const p of back) expect(Buffer.compare(p.bytes, bytes)).toBe(0);
    }
  });
});

describe('a pcap file', () => {
  const cases = [true, false].flatMap((little) =>
    [
      ['micro', 0xa1b2c3d4, 123_456, 123_456_000],
      ['nano', 0xa1b23c4d, 123_456_789, 123_456_789],
    ].map(([name, magic, fraction, nanoseconds]) => ({ little, name, magic, fraction, nanoseconds })),
  );
  test.each(cases)('of $name seconds is read in both byte orders (little-endian: $little)', (c) => {
    const b = new Builder(c.little).u32(Number(c.magic)).u16(2, 4).u32(0, 0, 65_535, 228);
    b.u32(1_700_000_000, Number(c.fraction), 3, 60).raw(1, 2, 3);
    expect(readAll(file(b.done()))).toEqual([
      {
        bytes: Uint8Array.of(1, 2, 3),
        seconds: 1_700_000_000,
        nanoseconds: c.nanoseconds,
        originalLength: 60,
        linkType: 228,
      },
    ]);
  });

  const header = (): Builder => new Builder(true).u32(0xa1b2c3d4).u16(2, 4).u32(0, 0, 65_535, 1);

  test('that ends within a record is refused with the place', () => {
    const whole = header().u32(1, 2, 4, 4).raw(1, 2, 3, 4).done();
    for (let length = 25; length < whole.length; length++) {
      const error = failure(whole.subarray(0, length));
      expect(error.code).toBe('CAPTURE_TRUNCATED');
      expect(error.message).toContain('at byte 24:');
    }
    expect(readAll(file(whole.subarray(0, 24)))).toEqual([]);
  });

  test('with an unbelievable length is refused with the place, and nothing is allocated for it', () => {
    const error = failure(header().u32(1, 2, 0xfffffff0, 4).done());
    expect(error.code).toBe('CAPTURE_MALFORMED');
    expect(error.message).toContain('at byte 32:');
  });

  test('of another version is refused', () => {
    expect(failure(new Builder(true).u32(0xa1b2c3d4).u16(3, 0).u32(0, 0, 0, 1).done()).code).toBe('CAPTURE_MALFORMED');
  });
});

describe('a pcapng file', () => {
  const section = (b: Builder, little: boolean): Builder =>
    b.block(0x0a0d0d0a, new Builder(little).u32(0x1a2b3c4d).u16(1, 0).u32(0xffffffff, 0xffffffff));
  const iface = (b: Builder, little: boolean, linkType: number, options: Builder = new Builder(little)): Builder =>
    b.block(
      1,
      new Builder(little)
        .u16(linkType, 0)
        .u32(0)
        .raw(...options.done()),
    );
  const enhanced = (b: Builder, little: boolean, id: number, high: number, low: number): Builder =>
    b.block(6, new Builder(little).u32(id, high, low, 3, 9).raw(1, 2, 3, 0));

  test.each([true, false])(
    'may have sections of either byte order, each with its own interfaces (little: %s)',
    (little) => {
      const b = new Builder(little);
      section(b, little);
      iface(b, little, 101);
      iface(b, little, 229, new Builder(little).u16(9, 1).raw(9, 0, 0, 0).u32(0));
      enhanced(b, little, 1, 0x17979cfe, 0x3d5a7800 >>> 0);
      const other = new Builder(!little);
      section(other, !little);
      iface(other, !little, 1);
      enhanced(other, !little, 0, 0, 1_000_001);
      const packets = readAll(file(Uint8Array.from([...b.done(), ...other.done()])));
      const ticks = (0x17979cfen << 32n) | 0x3d5a7800n;
      expect(packets).toEqual([
        {
          bytes: Uint8Array.of(1, 2, 3),
          seconds: Number(ticks / 1_000_000_000n),
          nanoseconds: Number(ticks % 1_000_000_000n),
          originalLength: 9,
          linkType: 229,
        },
        { bytes: Uint8Array.of(1, 2, 3), seconds: 1, nanoseconds: 1000, originalLength: 9, linkType: 1 },
      ]);
    },
  );

  test('time stamps of any resolution come out as BigInt arithmetic has them', () => {
    fc.assert(
      fc.property(
        fc.oneof(fc.constantFrom(6, 9), fc.nat(255)),
        fc.nat(0xffffffff),
        fc.nat(0xffffffff),
        fc.integer({ min: -100_000, max: 100_000 }),
        (resolution, high, low, offset) => {
          const perSecond = resolution & 0x80 ? 1n << BigInt(resolution & 0x7f) : 10n ** BigInt(resolution);
          const options = new Builder(true).u16(9, 1).raw(resolution, 0, 0, 0).u16(14, 8);
          options.u32(offset >>> 0, offset < 0 ? 0xffffffff : 0).u32(0);
          const b = new Builder(true);
          section(b, true);
          iface(b, true, 1, options);
          enhanced(b, true, 0, high, low);
          const [packet] = readAll(file(b.done()));
          const ticks = (BigInt(high) << 32n) | BigInt(low);
          expect(packet.seconds).toBe(Number(ticks / perSecond) + offset);
          expect(packet.nanoseconds).toBe(Number(((ticks % perSecond) * 1_000_000_000n) / perSecond));
        },
      ),
      { numRuns: runs(200) },
    );
  });

  test('blocks of unknown type are skipped, simple packets read', () => {
    const b = new Builder(true);
    section(b, true);
    b.block(0x0bad, new Builder(true).raw(9, 9, 9, 9));
    iface(b, true, 1);
    b.block(3, new Builder(true).u32(2).raw(7, 8, 0, 0));
    b.block(0x80000001, new Builder(true));
    expect(readAll(file(b.done()))).toEqual([
      { bytes: Uint8Array.of(7, 8), seconds: 0, nanoseconds: 0, originalLength: 2, linkType: 1 },
    ]);
  });

  test.each<[string, (b: Builder) => void, string]>([
    ['a packet of an interface that is not described', (b) => enhanced(b, true, 5, 0, 0), 'at byte 56:'],
    ['a block shorter than its head', (b) => b.u32(6, 8, 8), 'at byte 52:'],
    ['a block length that is not a multiple of 4', (b) => b.u32(6, 33).raw(...new Array(40).fill(0)), 'at byte 52:'],
    ['a block that is unbelievably long', (b) => b.u32(6, 0x7ffffffc, 0), 'at byte 52:'],
    ['two lengths that differ', (b) => b.u32(0x99, 16, 0, 20), 'at byte 60:'],
    [
      'a packet longer than its block',
      (b) => b.block(6, new Builder(true).u32(0, 0, 0, 5, 5).raw(1, 2, 3, 0)),
      'at byte 68:',
    ],
    [
      'an option that runs off its block',
      (b) => b.block(1, new Builder(true).u16(1, 0).u32(0).u16(2, 8).u32(0)),
      'at byte 64:',
    ],
  ])('with %s is refused with the place', (_name, add, place) => {
    const b = new Builder(true);
    section(b, true);
    iface(b, true, 1);
    add(b);
    const error = failure(b.done());
    expect(error.code).toBe('CAPTURE_MALFORMED');
    expect(error.message).toContain(place);
  });
});

describe('a file that is no capture', () => {
  test.each([
    ['empty', new Uint8Array(0)],
    ['three bytes', Uint8Array.of(0xd4, 0xc3, 0xb2)],
    ['text', new TextEncoder().encode('hello, world')],
    ['gzip', Uint8Array.of(0x1f, 0x8b, 8, 0, 0, 0)],
  ])('is refused: %s', (_name, bytes) => {
    expect(failure(bytes).code).toBe('CAPTURE_FORMAT');
  });

  test('is refused when it cannot be opened, or is a folder', () => {
    expect(() => readAll(join(folder, 'absent'))).toThrowError(expect.objectContaining({ code: 'CAPTURE_UNREADABLE' }));
    expect(() => readAll(folder)).toThrowError(expect.objectContaining({ code: 'CAPTURE_UNREADABLE' }));
  });

  test('random bytes behind a good header never do worse than a typed error', () => {
    const path = file();
    for (const format of ['pcap', 'pcapng'] as const) {
      writeAll(path, [], { format, linkType: 1 });
      const header = readFileSync(path);
      fc.assert(
        fc.property(fc.uint8Array({ maxLength: 200 }), (noise) => {
          const noisy = file(Uint8Array.from([...header, ...noise]));
          try {
            readAll(noisy);
          } catch (error) {
            expect(error).toBeInstanceOf(InputError);
          }
        }),
      );
    }
  });
});

test('a pipe that says nothing holds nobody up: the reader is starved until there is more, and then ends', async () => {
  const path = file();
  execFileSync('mkfifo', [path]);
  const whole = file();
  writeAll(
    whole,
    [1, 2].map((n) => ({
      bytes: new Uint8Array(100).fill(n),
      seconds: n,
      nanoseconds: 0,
      originalLength: 100,
      linkType: 1,
    })),
    { linkType: 1 },
  );
  const bytes = readFileSync(whole);
  // Of both directions, since one for writing waits for a reader.
  const writer = openSync(path, 'r+');
  writeSync(writer, bytes, 0, 50);
  using reader = new CaptureReader(path, { waits: true });
  expect([reader.next(), reader.starved]).toEqual([null, true]);
  writeSync(writer, bytes, 50, 150);
  await reader.more();
  expect([reader.next()?.seconds, reader.starved]).toEqual([1, false]);
  expect([reader.next(), reader.starved]).toEqual([null, true]);
  const more = reader.more();
  writeSync(writer, bytes, 200);
  closeSync(writer);
  await more;
  expect(reader.next()?.seconds).toBe(2);
  expect([reader.next(), reader.starved]).toEqual([null, true]);
  await reader.more();
  expect([reader.next(), reader.starved]).toEqual([null, false]);
});

test('what could not be written is not written again when the file is closed', () => {
  const writer = new CaptureWriter('/dev/full', { linkType: 1 });
  expect(() => writer.write(new Uint8Array(262_144), 0, 262_144, 0, 0)).toThrow(
    expect.objectContaining({ code: 'ENOSPC' }),
  );
  expect(() => writer.close()).not.toThrow();
});
