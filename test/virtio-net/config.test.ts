import { describe, expect, it } from 'vitest';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { openStandardTransport } from '../../src/virtio/standard.ts';
import { readNetConfig } from '../../src/virtio-net/config.ts';
import { FakeDevice } from '../virtio/fake-device.ts';
import { FakeFunction, Place } from '../virtio/fake-function.ts';

const F = Feature;
/** mac, status, max_virtqueue_pairs, mtu, speed, duplex, rss_max_key_size, indirection length, hash types, tunnel types. */
const CONFIG = Uint8Array.from(
  [
    [2, 0, 0, 0xaa, 0xbb, 0xcc],
    [3, 0],
    [8, 0],
    [0xdc, 0x05],
    [0x10, 0x27, 0, 0],
    [1],
    [40],
    [0x80, 0],
    [0xff, 1, 0, 0],
    [7, 0, 0, 0],
  ].flat(),
);

function read(features: number[], change: (bytes: Uint8Array) => void = () => {}) {
  const device = new FakeDevice();
  device.config = CONFIG.slice();
  change(device.config);
  return readNetConfig(device, FeatureSet.of(...features));
}

describe('the network configuration', () => {
  it('has the fields of the features that are there', () => {
    const features = [
      F.MAC,
      F.STATUS,
      F.GUEST_ANNOUNCE,
      F.MQ,
      F.MTU,
      F.SPEED_DUPLEX,
      F.RSS,
      F.HASH_REPORT,
      F.HASH_TUNNEL,
    ];
    expect(read(features)).toEqual({
      mac: Uint8Array.of(2, 0, 0, 0xaa, 0xbb, 0xcc),
      linkUp: true,
      announce: true,
      maxQueuePairs: 8,
      mtu: 1500,
      speed: 10000,
      duplex: 'full',
      rssMaxKeySize: 40,
      rssMaxIndirectionTableLength: 128,
      supportedHashTypes: 0x1ff,
      supportedTunnelTypes: 7,
    });
  });

  it('without features is a link that is up with one queue pair', () => {
    expect(read([])).toEqual({ linkUp: true, announce: false, maxQueuePairs: 1 });
  });

  it('tells the link state only with STATUS', () => {
    const down = (bytes: Uint8Array) => {
      bytes[6] = 2;
    };
    expect(read([F.STATUS], down)).toMatchObject({ linkUp: false, announce: false });
    expect(read([], down)).toMatchObject({ linkUp: true });
  });

  it.each([
    { speed: [0xff, 0xff, 0xff, 0xff], duplex: 0xff, expected: { speed: null, duplex: null } },
    { speed: [0, 0, 0, 0x80], duplex: 2, expected: { speed: null, duplex: null } },
    { speed: [0xff, 0xff, 0xff, 0x7f], duplex: 0, expected: { speed: 0x7fffffff, duplex: 'half' } },
  ])('reads speed $speed and duplex $duplex as the standard says', ({ speed, duplex, expected }) => {
    const config = read([F.SPEED_DUPLEX], (bytes) => {
      bytes.set(speed, 12);
      bytes[16] = duplex;
    });
    expect(config).toMatchObject(expected);
  });

  it.each([
    { name: 'no queue pairs', features: [F.MQ], at: 8, bytes: [0, 0] },
    { name: 'more than 0x8000 queue pairs', features: [F.MQ], at: 8, bytes: [1, 0x80] },
    { name: 'an MTU of 67', features: [F.MTU], at: 10, bytes: [67, 0] },
  ])('is refused with $name', ({ features, at, bytes }) => {
    expect(() => read(features, (config) => config.set(bytes, at))).toThrow(
      expect.objectContaining({ code: 'NET_CONFIG' }),
    );
  });

  it('is read with the width of each field, the MAC byte by byte', () => {
    const fn = new FakeFunction();
    fn.bar4.set(CONFIG, Place.device);
    const transport = openStandardTransport(fn);
    readNetConfig(transport, FeatureSet.of(F.MAC, F.STATUS, F.MTU, F.SPEED_DUPLEX));
    const at = fn.log.map((entry) => entry.split(' ')).filter(([, offset]) => Number(offset) >= Place.device);
    expect(at.map(([width, offset]) => `${width} ${Number(offset) - Place.device}`)).toEqual([
      'r16 6',
      'r8 16',
      'r32 12',
      'r8 0',
      'r8 1',
      'r8 2',
      'r8 3',
      'r8 4',
      'r8 5',
      'r16 10',
    ]);
  });

  it('that ends before a field that should be there is an error', () => {
    const fn = new FakeFunction();
    fn.capabilities[3].length = 8;
    expect(() => readNetConfig(openStandardTransport(fn), FeatureSet.of(F.MTU))).toThrow(
      expect.objectContaining({ code: 'CONFIG_BOUNDS' }),
    );
  });
});
