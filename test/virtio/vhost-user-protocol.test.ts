import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import * as protocol from '../../src/virtio/vhost-user-protocol.ts';

const { Request } = protocol;
const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');
const region = { guestAddress: 0x10000, userAddress: 0x7f00_0000_0000, size: 0x2000, fd: 9, offset: 0x3000 };
/** Guest address, size, user address; the offset follows. */
const REGION = '0000010000000000 0020000000000000 00000000007f0000';

describe('messages of a vhost-user front-end', () => {
  it.each([
    ['GET_FEATURES', protocol.encodeEmpty(Request.GET_FEATURES), '01000000 01000000 00000000'],
    [
      'SET_FEATURES',
      protocol.encodeFeatures(Request.SET_FEATURES, FeatureSet.of(Feature.CSUM, Feature.VERSION_1)),
      '02000000 01000000 08000000 01000000 01000000',
    ],
    [
      'SET_VRING_NUM',
      protocol.encodeRingState(Request.SET_VRING_NUM, 3, 256),
      '08000000 01000000 08000000 03000000 00010000',
    ],
    [
      'SET_VRING_ADDR',
      protocol.encodeRingAddresses(2, { descriptorArea: 0x1000, driverArea: 0x3000, deviceArea: 0x2_0000_2000 }),
      // index, flags, descriptor, used, available, log
      '09000000 01000000 28000000 02000000 00000000 0010000000000000 0020000002000000 0030000000000000 0000000000000000',
    ],
    [
      'SET_VRING_KICK with a descriptor',
      protocol.encodeRingEvent(Request.SET_VRING_KICK, 5, true),
      '0c000000 01000000 08000000 0500000000000000',
    ],
    [
      'SET_VRING_CALL without',
      protocol.encodeRingEvent(Request.SET_VRING_CALL, 5, false),
      '0d000000 01000000 08000000 0501000000000000',
    ],
    [
      'SET_MEM_TABLE',
      protocol.encodeMemoryTable([region, { ...region, offset: 0 }]),
      `05000000 01000000 48000000 02000000 00000000 ${REGION} 0030000000000000 ${REGION} 0000000000000000`,
    ],
    [
      'ADD_MEM_REG',
      protocol.encodeRegion(Request.ADD_MEM_REG, region),
      `25000000 01000000 28000000 0000000000000000 ${REGION} 0030000000000000`,
    ],
    ['GET_CONFIG', protocol.encodeGetConfig(6, 2), '18000000 01000000 0e000000 06000000 02000000 00000000 0000'],
  ])('%s is laid out as the protocol says', (_, bytes, expected) => {
    expect(hex(bytes)).toBe(expected.replaceAll(' ', ''));
  });

  it('carry 64 feature bits and no more', () => {
    const tooMany = FeatureSet.of(Feature.IPSEC);
    expect(() => protocol.encodeFeatures(Request.SET_FEATURES, tooMany)).toThrow(RangeError);
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 0, max: 63 })), (bits) => {
        const set = FeatureSet.of(...bits);
        const bytes = protocol.encodeFeatures(Request.SET_FEATURES, set);
        expect(protocol.decodeFeatures(bytes.subarray(protocol.Header.length)).equals(set)).toBe(true);
      }),
    );
  });

  it('describe at most eight regions in a table', () => {
    expect(() => protocol.encodeMemoryTable(Array(9).fill(region))).toThrow(RangeError);
  });
});

describe('answers of a back-end', () => {
  it('give the bytes of a configuration only when they answer the question', () => {
    const reply = (offset: number, size: number, bytes: readonly number[]): Uint8Array =>
      Uint8Array.of(offset, 0, 0, 0, size, 0, 0, 0, 0, 0, 0, 0, ...bytes);
    expect(protocol.decodeConfig(reply(6, 2, [1, 2]), 6, 2)).toEqual(Uint8Array.of(1, 2));
    expect(protocol.decodeConfig(new Uint8Array(0), 6, 2)).toBeNull();
    expect(protocol.decodeConfig(reply(6, 0, []), 6, 2)).toBeNull();
    for (const wrong of [reply(5, 2, [1, 2]), reply(6, 3, [1, 2]), reply(6, 2, [1]), Uint8Array.of(1)]) {
      expect(() => protocol.decodeConfig(wrong, 6, 2)).toThrow(expect.objectContaining({ code: 'PROTOCOL' }));
    }
  });

  it('give a number up to what makes sense', () => {
    const decode = (...bytes: number[]): number =>
      protocol.decodeNumber(Request.GET_STATUS, Uint8Array.from(bytes), 255);
    expect(decode(255, 0, 0, 0, 0, 0, 0, 0)).toBe(255);
    expect(() => decode(0, 1, 0, 0, 0, 0, 0, 0)).toThrow(expect.objectContaining({ code: 'PROTOCOL' }));
    expect(() => decode(0, 0, 0, 0, 1, 0, 0, 0)).toThrow(expect.objectContaining({ code: 'PROTOCOL' }));
  });

  it('name what is not known by its number', () => {
    expect(protocol.requestName(200)).toBe('request 200');
    expect(protocol.requestName(Request.SET_MEM_TABLE)).toBe('SET_MEM_TABLE');
    expect(protocol.protocolFeatureName(3)).toBe('REPLY_ACK');
    expect(protocol.protocolFeatureName(60)).toBe('bit 60');
  });
});
