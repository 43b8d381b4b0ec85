/** The configuration of a network device (Virtio 1.4, 5.1.4.1). */
import { Feature, FeatureSet } from '../../virtio/features.ts';
import { NetConfigField } from '../../virtio-net/config.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, hex, must, need, should } from '../check.ts';

const MTU = { min: 68, max: 65535, advised: 1280 } as const;
const MAX_PAIRS = 0x8000;
const SPEED = { max: 0x7fffffff, unknown: 0xffffffff } as const;
const DUPLEX = [0, 1, 0xff];
const NET = '5.1.4.1';

function config(bench: Bench) {
  return bench.target.structures.device;
}

/** Reads a field of the network configuration, `width` bytes. */
export function readConfig(bench: Bench, name: string, at: number, width: 1 | 2 | 4): number {
  const device = config(bench);
  const value = width === 1 ? device.read8(at) : width === 2 ? device.read16(at) : device.read32(at);
  bench.log(`${name} ${value}`);
  return value;
}

export const netConfigChecks: readonly Check[] = [
  must('INI-022', NET, 'With MQ, max_virtqueue_pairs is from 1 to 0x8000', ['mq-zero-pairs'], (bench) => {
    bench.needFeatures(Feature.MQ);
    const pairs = readConfig(bench, 'max_virtqueue_pairs', NetConfigField.maxVirtqueuePairs, 2);
    expect(pairs >= 1 && pairs <= MAX_PAIRS, `max_virtqueue_pairs is ${pairs}`);
  }),
  must('INI-023', NET, 'mtu is from 68 to 65535', ['config-mtu-low'], (bench) => {
    bench.needFeatures(Feature.MTU);
    const mtu = readConfig(bench, 'mtu', NetConfigField.mtu, 2);
    expect(mtu >= MTU.min && mtu <= MTU.max, `mtu is ${mtu}`);
  }),
  should('INI-024', NET, 'mtu is at least 1280', ['config-mtu-low'], (bench) => {
    bench.needFeatures(Feature.MTU);
    const mtu = readConfig(bench, 'mtu', NetConfigField.mtu, 2);
    expect(mtu >= MTU.advised, `mtu is ${mtu}`);
  }),
  must('INI-025', NET, 'mtu does not change', ['config-mtu-changes'], async (bench) => {
    bench.needFeatures(Feature.MTU);
    const before = readConfig(bench, 'mtu', NetConfigField.mtu, 2);
    await bench.up({ features: [Feature.MTU] });
    const after = readConfig(bench, 'mtu', NetConfigField.mtu, 2);
    expect(before === after, `mtu was ${before} and is ${after}`);
  }),
  must('INI-026', NET, 'With RSS or HASH_REPORT, rss_max_key_size is at least 40', ['rss-without-room'], (bench) => {
    need(bench.offered().hasAny(Feature.RSS, Feature.HASH_REPORT), 'the device offers neither RSS nor HASH_REPORT');
    const size = readConfig(bench, 'rss_max_key_size', NetConfigField.rssMaxKeySize, 1);
    expect(size >= 40, `rss_max_key_size is ${size}`);
  }),
  must('INI-027', NET, 'With RSS, rss_max_indirection_table_length is at least 128', ['rss-without-room'], (bench) => {
    bench.needFeatures(Feature.RSS);
    const length = readConfig(
      bench,
      'rss_max_indirection_table_length',
      NetConfigField.rssMaxIndirectionTableLength,
      2,
    );
    expect(length >= 128, `rss_max_indirection_table_length is ${length}`);
  }),
  must(
    'INI-028',
    NET,
    'With SPEED_DUPLEX, speed is at most 0x7fffffff, or 0xffffffff',
    ['config-speed'],
    async (bench) => {
      await bench.up({ features: [Feature.SPEED_DUPLEX] });
      const speed = readConfig(bench, 'speed', NetConfigField.speed, 4);
      expect(speed <= SPEED.max || speed === SPEED.unknown, `speed is ${hex(speed)}`);
    },
  ),
  must('INI-029', NET, 'With SPEED_DUPLEX, duplex is 0, 1 or 0xff', ['config-duplex'], async (bench) => {
    await bench.up({ features: [Feature.SPEED_DUPLEX] });
    const duplex = readConfig(bench, 'duplex', NetConfigField.duplex, 1);
    expect(DUPLEX.includes(duplex), `duplex is ${duplex}`);
  }),
  should(
    'INI-030',
    NET,
    'speed and duplex do not change while the link is up',
    ['config-speed-changes'],
    async (bench) => {
      await bench.up({ features: [Feature.SPEED_DUPLEX, Feature.STATUS] });
      const up = () => (readConfig(bench, 'status', NetConfigField.status, 2) & 1) !== 0;
      need(up(), 'the link is down');
      const values = () =>
        [
          readConfig(bench, 'speed', NetConfigField.speed, 4),
          readConfig(bench, 'duplex', NetConfigField.duplex, 1),
        ].join();
      const before = values();
      await bench.never(() => false, '');
      const after = values();
      need(up(), 'the link went down');
      expect(before === after, `speed and duplex were ${before} and are ${after}`);
    },
  ),
  should('INI-031', NET, 'HASH_REPORT is not offered without CTRL_VQ', ['features-without-ctrl'], (bench) =>
    expectCtrl(bench, Feature.HASH_REPORT),
  ),
  should('INI-032', NET, 'CTRL_RX_EXTRA is not offered without CTRL_VQ', ['features-without-ctrl'], (bench) =>
    expectCtrl(bench, Feature.CTRL_RX_EXTRA),
  ),
];

function expectCtrl(bench: Bench, bit: number): void {
  const offered = bench.offered();
  const name = FeatureSet.of(bit).names()[0];
  bench.log(
    `${name} ${offered.has(bit) ? '' : 'not '}offered, VIRTIO_NET_F_CTRL_VQ ${offered.has(Feature.CTRL_VQ) ? '' : 'not '}offered`,
  );
  expect(!offered.has(bit) || offered.has(Feature.CTRL_VQ), `${name} is offered without VIRTIO_NET_F_CTRL_VQ`);
}
