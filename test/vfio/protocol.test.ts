import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { VfioError } from '../../src/errors.ts';
import * as protocol from '../../src/vfio/protocol.ts';

const violation = expect.objectContaining({ name: 'VfioError', code: 'PROTOCOL' });
const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
/** Payload of a whole message. */
const payload = (message: Uint8Array) => message.slice(16);
const u32 = fc.integer({ min: 0, max: 0xffffffff });
const u53 = fc.maxSafeNat();

describe('headers', () => {
  it('are laid out as in vfio-user.rst', () => {
    const message = protocol.reply(0x1234, protocol.Command.regionRead, new Uint8Array([0xaa]));
    expect(hex(message)).toBe('34120900110000000100000000000000aa');
    expect(hex(protocol.errorReply(1, protocol.Command.dmaMap, 17))).toBe('01000200100000002100000011000000');
    expect(hex(protocol.request(protocol.Command.deviceReset, 0))).toBe('00000d00100000000000000000000000');
  });

  it('name their commands as the protocol does', () => {
    expect(protocol.commandName(protocol.Command.dmaMap)).toBe('DMA_MAP');
    expect(protocol.commandName(protocol.Command.deviceGetRegionInfo)).toBe('DEVICE_GET_REGION_INFO');
    expect(protocol.commandName(99)).toBe('command 99');
  });
});

describe('known messages', () => {
  // Written by hand from the tables of vfio-user.rst.
  it.each([
    [
      'DMA_MAP',
      protocol.encodeDmaMap({ flags: 3, offset: 0x1000, address: 0x12_3456_7000, size: 0x2000 }),
      '20000000' + '03000000' + '0010000000000000' + '0070563412000000' + '0020000000000000',
    ],
    [
      'DMA_UNMAP',
      protocol.encodeDmaUnmap({ flags: 0, address: 0x12_3456_7000, size: 0x2000 }),
      '18000000' + '00000000' + '0070563412000000' + '0020000000000000',
    ],
    ['DEVICE_GET_INFO', protocol.encodeDeviceInfoRequest(), '10000000' + '000000000000000000000000'],
    [
      'DEVICE_GET_REGION_INFO',
      protocol.encodeRegionInfoRequest(7, 32),
      `2000000000000000${'07000000'}${'00'.repeat(20)}`,
    ],
    ['DEVICE_GET_IRQ_INFO', protocol.encodeIrqInfoRequest(2), '10000000' + '00000000' + '02000000' + '00000000'],
    [
      'DEVICE_SET_IRQS',
      protocol.encodeSetIrqs({ flags: 0x24, index: 2, start: 1, count: 3, data: new Uint8Array(0) }),
      '14000000' + '24000000' + '02000000' + '01000000' + '03000000',
    ],
    ['REGION_READ', protocol.encodeRegionRead(4, 0x3000, 2), '0030000000000000' + '04000000' + '02000000'],
    [
      'REGION_WRITE',
      protocol.encodeRegionWrite(0, 0x14, new Uint8Array([0xfe, 0xff])),
      '1400000000000000' + '00000000' + '02000000' + 'feff',
    ],
    ['DMA_READ', protocol.encodeDmaRead(0x1000, 64), '0010000000000000' + '4000000000000000'],
    [
      'DMA_WRITE',
      protocol.encodeDmaWrite(0x1000, new Uint8Array([1, 2])),
      '0010000000000000' + '0200000000000000' + '0102',
    ],
  ])('encodes %s', (name, message, expected) => {
    expect(hex(payload(message))).toBe(expected);
    expect(protocol.commandName(protocol.commandOf(message))).toBe(name);
    expect(message.length).toBe(16 + expected.length / 2);
  });
});

describe('VERSION', () => {
  const text = (json: string, terminator = '\0') => new TextEncoder().encode(`\0\0\0\0${json}${terminator}`);

  it('carries its capabilities as JSON with a NUL', () => {
    const capabilities = { maxMessageDescriptors: 8, maxDataTransfer: 65536, maxDmaMaps: 100, pageSizes: 4096 };
    const encoded = protocol.encodeVersion({ major: 0, minor: 0, capabilities });
    expect(JSON.parse(new TextDecoder().decode(encoded.slice(4, -1)))).toEqual({
      capabilities: { max_msg_fds: 8, max_data_xfer_size: 65536, max_dma_maps: 100, pgsizes: 4096 },
    });
    expect(encoded.at(-1)).toBe(0);
    expect(protocol.decodeVersion(encoded)).toEqual({ major: 0, minor: 0, capabilities });
  });

  it.each([
    ['no data at all', new Uint8Array(4)],
    ['an empty object', text('{}')],
    ['empty capabilities', text('{"capabilities":{}}')],
    ['unknown capabilities', text('{"capabilities":{"twin_socket":{"supported":true}},"more":1}')],
  ])('takes the defaults from %s', (_, bytes) => {
    expect(protocol.decodeVersion(bytes).capabilities).toEqual(protocol.DEFAULT_CAPABILITIES);
  });

  it.each([
    ['too short', new Uint8Array(3)],
    ['not JSON', text('{')],
    ['not an object', text('[]')],
    ['null', text('null')],
    ['without its NUL', text('{}', '')],
    ['with two NULs', text('{}', '\0\0')],
    ['with something after the NUL', text('{}', '\0x')],
    ['not UTF-8', new Uint8Array([0, 0, 0, 0, 0xff, 0xfe, 0])],
    ['capabilities that are a list', text('{"capabilities":[]}')],
    ['capabilities that are null', text('{"capabilities":null}')],
    ['a count that is a string', text('{"capabilities":{"max_msg_fds":"8"}}')],
    ['a count that is negative', text('{"capabilities":{"max_msg_fds":-1}}')],
    ['a count that is a fraction', text('{"capabilities":{"max_dma_maps":1.5}}')],
    ['a transfer size that holds no register', text('{"capabilities":{"max_data_xfer_size":4}}')],
    ['a page size of zero', text('{"capabilities":{"pgsizes":0}}')],
    ['a number beyond 2^53', text('{"capabilities":{"pgsizes":1e300}}')],
  ])('is a violation when it is %s', (_, bytes) => {
    expect(() => protocol.decodeVersion(bytes)).toThrow(violation);
  });
});

describe('round trips', () => {
  it('keep every field', () => {
    fc.assert(
      fc.property(
        u32,
        fc.nat(2 ** 50),
        fc.nat(2 ** 50),
        fc.integer({ min: 1, max: 2 ** 50 }),
        (flags, offset, address, size) => {
          const map = { flags, offset, address, size };
          expect(protocol.decodeDmaMap(payload(protocol.encodeDmaMap(map)))).toEqual(map);
          const unmap = { flags, address, size };
          expect(protocol.decodeDmaUnmap(payload(protocol.encodeDmaUnmap(unmap)))).toEqual(unmap);
        },
      ),
    );
    fc.assert(
      fc.property(u32, u32, u32, (a, b, c) => {
        const info = { flags: a, regions: b, irqs: c };
        expect(protocol.decodeDeviceInfo(protocol.encodeDeviceInfo(info))).toEqual(info);
        const irq = { flags: a, index: b, count: c };
        expect(protocol.decodeIrqInfo(protocol.encodeIrqInfo(irq))).toEqual(irq);
      }),
    );
    fc.assert(
      fc.property(u32, u53, fc.uint8Array(), (region, offset, data) => {
        const write = payload(protocol.encodeRegionWrite(region, offset, data));
        expect(protocol.decodeRegionAccess(write, true)).toEqual({ region, offset, count: data.length, data });
        const read = protocol.encodeRegionReply(region, offset, data.length, data);
        expect(protocol.decodeRegionAccess(read, true)).toEqual({ region, offset, count: data.length, data });
        const dma = payload(protocol.encodeDmaWrite(offset, data));
        expect(protocol.decodeDmaAccess(dma, true)).toEqual({ address: offset, count: data.length, data });
        const reply = protocol.encodeDmaReply(offset, data.length);
        expect(protocol.decodeDmaAccess(reply, false)).toMatchObject({ address: offset, count: data.length });
      }),
    );
    const bools = { flags: 0x22, index: 2, start: 0, count: 3, data: new Uint8Array([1, 0, 1]) };
    expect(protocol.decodeSetIrqs(payload(protocol.encodeSetIrqs(bools)))).toEqual(bools);
  });
});

describe('DEVICE_GET_REGION_INFO', () => {
  const areas = [
    { offset: 0x1000, size: 0x1000 },
    { offset: 0x4000, size: 0x3000 },
  ];
  const region = { index: 2, flags: 7, size: 0x8000, offset: 2 ** 40, areas };

  it('keeps every field, with and without areas', () => {
    expect(protocol.decodeRegionInfo(protocol.encodeRegionInfo(region, 4096))).toEqual(region);
    const plain = { ...region, areas: null };
    expect(protocol.decodeRegionInfo(protocol.encodeRegionInfo(plain, 4096))).toEqual(plain);
    const none = { ...region, areas: [] };
    expect(protocol.decodeRegionInfo(protocol.encodeRegionInfo(none, 4096))).toEqual(none);
  });

  it('says how much room it needs and where the capabilities will be when there is too little', () => {
    const short = protocol.encodeRegionInfo(region, 32);
    expect(short.length).toBe(32);
    expect(new Uint32Array(short.buffer).slice(0, 4)).toEqual(new Uint32Array([80, 7 | 8, 2, 32]));
    expect(protocol.decodeRegionInfo(short)).toEqual({ needs: 80 });
    expect(protocol.encodeRegionInfo(region, 80).length).toBe(80);
  });

  /** The encoded region with fields of its capabilities changed: [offset, u32]. */
  function broken(...changes: [number, number][]): Uint8Array {
    const bytes = protocol.encodeRegionInfo(region, 4096);
    for (const [at, value] of changes) new DataView(bytes.buffer).setUint32(at, value, true);
    return bytes;
  }

  it.each([
    ['a capability that leads back to itself', broken([36, 32]), 'CAPABILITY_LOOP'],
    ['two that lead to each other', broken([32, 0x10005], [36, 64], [64, 0x10005], [68, 32]), 'CAPABILITY_LOOP'],
    ['a list that starts in the fixed part', broken([12, 16]), 'CAPABILITY_BOUNDS'],
    ['a list that starts behind the end', broken([12, 0xfffffff0]), 'CAPABILITY_BOUNDS'],
    ['a header that is cut off', broken([12, 76]), 'CAPABILITY_BOUNDS'],
    ['a next beyond the end', broken([36, 80]), 'CAPABILITY_BOUNDS'],
    ['more areas than bytes', broken([40, 3]), 'CAPABILITY_BOUNDS'],
    ['four billion areas', broken([40, 0xffffffff]), 'CAPABILITY_BOUNDS'],
    ['an area outside of the region', broken([56, 0x8000]), 'CAPABILITY_BOUNDS'],
    ['an area that wraps around', broken([48, 0xfffff000], [52, 0xffffffff]), 'CAPABILITY_BOUNDS'],
    ['a size beyond 2^53', broken([20, 0xffffffff]), 'PROTOCOL'],
    ['an offset beyond 2^53', broken([28, 0x200000]), 'PROTOCOL'],
  ])('refuses %s', (_, bytes, code) => {
    expect(() => protocol.decodeRegionInfo(bytes)).toThrow(expect.objectContaining({ name: 'VfioError', code }));
  });

  it('passes over capabilities that it does not know', () => {
    // The first one becomes unknown and leads on to a sparse mmap without areas in its second half.
    const bytes = broken([32, 0x10005], [36, 48], [48, 0x10001], [52, 0], [56, 0]);
    expect(protocol.decodeRegionInfo(bytes)).toMatchObject({ areas: [] });
  });

  it('ends with a region or a typed error on any bytes', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), fc.boolean(), (bytes, likely) => {
        if (likely && bytes.length >= 32)
          bytes.set([...[bytes.length, 0, 0, 0], ...[15, 0, 0, 0], 0, 0, 0, 0, 32, 0, 0, 0]);
        try {
          protocol.decodeRegionInfo(bytes);
        } catch (error) {
          expect(error).toBeInstanceOf(VfioError);
        }
      }),
    );
  });
});

describe('violations', () => {
  const set = (fields: Partial<protocol.SetIrqsMessage>) =>
    payload(protocol.encodeSetIrqs({ flags: 0x24, index: 2, start: 0, count: 1, data: new Uint8Array(0), ...fields }));
  const map = (at: number, value: number) => {
    const bytes = payload(protocol.encodeDmaMap({ flags: 3, offset: 0, address: 0x1000, size: 0x1000 }));
    new DataView(bytes.buffer).setUint32(at, value, true);
    return bytes;
  };
  it.each([
    ['DMA_MAP that is too short', () => protocol.decodeDmaMap(new Uint8Array(31))],
    ['DMA_MAP of no bytes', () => protocol.decodeDmaMap(map(24, 0))],
    ['DMA_MAP at an address beyond 2^53', () => protocol.decodeDmaMap(map(20, 0x200000))],
    ['DMA_MAP of a size beyond 2^53', () => protocol.decodeDmaMap(map(28, 0x200000))],
    ['DMA_MAP of an offset beyond 2^53', () => protocol.decodeDmaMap(map(12, 0xffffffff))],
    ['DMA_MAP that ends beyond 2^53', () => protocol.decodeDmaMap(map(20, 0x1fffff).fill(0xff, 16, 20))],
    ['DMA_UNMAP that is too short', () => protocol.decodeDmaUnmap(new Uint8Array(23))],
    ['DEVICE_GET_INFO that is too short', () => protocol.decodeDeviceInfo(new Uint8Array(15))],
    ['DEVICE_GET_INFO that is too long', () => protocol.decodeDeviceInfo(new Uint8Array(17))],
    ['DEVICE_GET_REGION_INFO that is too short', () => protocol.decodeRegionInfo(new Uint8Array(31))],
    ['an info request that is too short', () => protocol.decodeInfoRequest('X', new Uint8Array(11))],
    ['DEVICE_GET_IRQ_INFO that is too long', () => protocol.decodeIrqInfo(new Uint8Array(20))],
    ['DEVICE_SET_IRQS that is too short', () => protocol.decodeSetIrqs(new Uint8Array(19))],
    ['DEVICE_SET_IRQS without action', () => protocol.decodeSetIrqs(set({ flags: 0x04 }))],
    ['DEVICE_SET_IRQS without data type', () => protocol.decodeSetIrqs(set({ flags: 0x20 }))],
    ['DEVICE_SET_IRQS with two data types', () => protocol.decodeSetIrqs(set({ flags: 0x25 }))],
    ['DEVICE_SET_IRQS with two actions', () => protocol.decodeSetIrqs(set({ flags: 0x2c }))],
    ['DEVICE_SET_IRQS with an unknown flag', () => protocol.decodeSetIrqs(set({ flags: 0x64 }))],
    ['DEVICE_SET_IRQS with fewer bytes than interrupts', () => protocol.decodeSetIrqs(set({ flags: 0x22, count: 5 }))],
    ['REGION_READ that is too short', () => protocol.decodeRegionAccess(new Uint8Array(15), false)],
    [
      'REGION_READ with data',
      () => protocol.decodeRegionAccess(protocol.encodeRegionReply(0, 0, 1, new Uint8Array(1)), false),
    ],
    [
      'REGION_WRITE with too little data',
      () => protocol.decodeRegionAccess(protocol.encodeRegionReply(0, 0, 2, new Uint8Array(1)), true),
    ],
    [
      'REGION_WRITE with too much data',
      () => protocol.decodeRegionAccess(protocol.encodeRegionReply(0, 0, 1, new Uint8Array(2)), true),
    ],
    ['DMA_WRITE of 2^64 bytes', () => protocol.decodeDmaAccess(new Uint8Array(24).fill(0xff), true)],
    ['DMA_READ with data', () => protocol.decodeDmaAccess(new Uint8Array(17), false)],
    [
      'the wrong range unmapped',
      () => protocol.checkUnmapped(payload(protocol.encodeDmaUnmap({ flags: 0, address: 1, size: 2 })), 1, 3),
    ],
  ])('%s', (_, decode) => {
    expect(decode).toThrow(violation);
  });

  it('does not stumble over an unmapping of all of a 64-bit space', () => {
    const bytes = new Uint8Array(24).fill(0xff, 16);
    expect(protocol.decodeDmaUnmap(bytes)).toEqual({ flags: 0, address: 0, size: 2 ** 64 });
  });

  it('takes longer requests, as of a newer client', () => {
    expect(protocol.decodeInfoRequest('X', new Uint8Array(100))).toEqual({ argsz: 0, index: 0 });
  });
});
