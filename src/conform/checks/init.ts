/** Device status, feature negotiation, configuration space (Virtio 1.4, 2.1, 2.2, 2.5, 4.1.4.3.1, 5.1.4.1, 6.2). */
import { FEATURE_WORDS, Feature, FeatureSet, unmetRequirements, withRequirementsMet } from '../../virtio/features.ts';
import { DeviceStatus, CommonCfgField as F } from '../../virtio/pci-layout.ts';
import { NetConfigField } from '../../virtio-net/config.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, hex, must, need, should, untried } from '../check.ts';
import { Driver } from '../driver.ts';
import { hasExtendedCapability, SINGLE_ROOT_IOV } from '../extended.ts';
import { udpFrame } from '../frames.ts';
import { readAccepted, writeAccepted } from '../structures.ts';
import { readConfig } from './net-config.ts';

const STATUS = '2.1.2';
const FEATURES = '2.2.2';
const RESERVED = '6.2';
const COMMON = '4.1.4.3.1';

/** Bits that older versions of the standard have given a meaning, beside those of this one. */
const OTHER_KNOWN = [6, 24, 27, 30, 42];
/** What devices may insist on by the standard (6.2). */
const INSISTED = FeatureSet.of(Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.ORDER_PLATFORM);

function expectTaken(taken: boolean, features: FeatureSet): void {
  expect(taken, () => `FEATURES_OK was refused for ${features.names().join(', ')}`);
}

/** What a driver may read of the configuration: the fields whose features are offered. */
function fields(offered: FeatureSet): { name: string; at: number; width: 1 | 2 | 4 }[] {
  const out: { name: string; at: number; width: 1 | 2 | 4 }[] = [];
  if (offered.has(Feature.MAC))
    for (let i = 0; i < 6; i++) out.push({ name: `mac[${i}]`, at: NetConfigField.mac + i, width: 1 });
  if (offered.has(Feature.STATUS)) out.push({ name: 'status', at: NetConfigField.status, width: 2 });
  if (offered.hasAny(Feature.MQ, Feature.RSS))
    out.push({ name: 'max_virtqueue_pairs', at: NetConfigField.maxVirtqueuePairs, width: 2 });
  if (offered.has(Feature.MTU)) out.push({ name: 'mtu', at: NetConfigField.mtu, width: 2 });
  if (offered.has(Feature.SPEED_DUPLEX)) {
    out.push(
      { name: 'speed', at: NetConfigField.speed, width: 4 },
      { name: 'duplex', at: NetConfigField.duplex, width: 1 },
    );
  }
  return out;
}

export const initChecks: readonly Check[] = [
  must(
    'INI-001',
    STATUS,
    'The device consumes no buffers and does not notify before DRIVER_OK',
    ['early-start'],
    async (bench) => {
      const features = bench.least;
      expectTaken(await Driver.negotiate(bench.target, bench.patience, features), features);
      const driver = new Driver(bench.target, bench.patience, features, bench.profile.revision);
      const mac = bench.mac(bench.target);
      const { at, length } = driver.place(udpFrame({ destination: mac, source: mac }));
      driver.addQueue(0);
      const ring = driver.addQueue(1, { before: (empty) => empty.offer({ at, length }) });
      await bench.never(() => ring.pending > 0, 'the device used a buffer before DRIVER_OK');
      bench.log('made a buffer available before DRIVER_OK; the device left it alone');
      driver.start();
      driver.notify(1);
      await ring.wait(bench.patience);
      bench.log('set DRIVER_OK; the device used it');
    },
  ),
  untried(
    'INI-002',
    STATUS,
    'SHOULD',
    'The device sets DEVICE_NEEDS_RESET when it enters an error state',
    'no behaviour of a driver leads to an error state that the standard defines',
  ),
  untried(
    'INI-003',
    STATUS,
    'MUST',
    'After it has set DEVICE_NEEDS_RESET with DRIVER_OK set, the device sends a configuration change notification',
    'no behaviour of a driver leads to an error state that the standard defines',
  ),
  must('INI-004', FEATURES, 'No feature is offered without those that it requires', ['feature-orphan'], (bench) => {
    const unmet = unmetRequirements(bench.offered());
    bench.log(`offered: ${bench.offered().names().join(', ')}`);
    expect(unmet.isEmpty, () => `${unmet.names().join(', ')} require features that are not offered`);
  }),
  should(
    'INI-005',
    FEATURES,
    'Any valid subset of the offered features is accepted',
    ['features-ok-refused'],
    async (bench) => {
      const offered = bench.offered();
      const least = offered.and(INSISTED);
      const subsets = [least, withRequirementsMet(offered)];
      for (const bit of offered.bits()) {
        const one = least.with(bit);
        if (unmetRequirements(one).isEmpty) subsets.push(one);
      }
      for (const subset of subsets) expectTaken(await Driver.negotiate(bench.target, bench.patience, subset), subset);
      bench.log(`${subsets.length} subsets of ${offered.bits().length} features accepted`);
    },
  ),
  must(
    'INI-006',
    FEATURES,
    'FEATURES_OK is not set for features that the device does not accept',
    ['features-ok-always'],
    async (bench) => {
      const offered = bench.offered();
      const [bit] = FeatureSet.of(...Object.values(Feature))
        .minus(offered)
        .bits();
      need(bit !== undefined, 'the device offers every feature that there is');
      const features = bench.least.with(bit);
      const { common } = bench.target.structures;
      bench.target.status = DeviceStatus.ACKNOWLEDGE;
      bench.target.status = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER;
      writeAccepted(common, features);
      const before = bench.target.status;
      bench.target.status = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK;
      const after = bench.target.status;
      const ignored = !readAccepted(common).has(bit);
      bench.log(`wrote ${features.names().join(', ')}; device_status ${before} before and ${after} after FEATURES_OK`);
      expect((before & DeviceStatus.FEATURES_OK) === 0, 'FEATURES_OK reads as set before the driver has set it');
      expect(
        (after & DeviceStatus.FEATURES_OK) === 0 || ignored,
        `FEATURES_OK is set for ${FeatureSet.of(bit).names()[0]}, which is not offered`,
      );
    },
  ),
  must(
    'INI-007',
    FEATURES,
    'No feature is offered that the standard does not describe',
    ['feature-undefined'],
    (bench) => {
      const known = FeatureSet.of(...Object.values(Feature), ...OTHER_KNOWN);
      const unknown = bench.offered().minus(known);
      expect(unknown.isEmpty, () => `offered: ${unknown.names().join(', ')}`);
    },
  ),
  should(
    'INI-008',
    FEATURES,
    'Features that were negotiated once can be negotiated again after a reset',
    ['features-once'],
    async (bench) => {
      const features = withRequirementsMet(bench.offered());
      for (let time = 0; time < 3; time++)
        expectTaken(await Driver.negotiate(bench.target, bench.patience, features), features);
    },
  ),
  must(
    'INI-009',
    '2.5.2',
    'The device-specific configuration can be read before FEATURES_OK',
    ['config-late'],
    async (bench) => {
      const offered = bench.offered();
      const all = fields(offered);
      need(all.length > 0, 'the device offers no feature with a configuration field');
      const before = all.map(({ name, at, width }) => readConfig(bench, name, at, width));
      const features = withRequirementsMet(offered);
      expectTaken(await Driver.negotiate(bench.target, bench.patience, features), features);
      const after = all.map(({ name, at, width }) => readConfig(bench, name, at, width));
      // The link may come and go meanwhile.
      const different = all.filter(({ name }, i) => name !== 'status' && before[i] !== after[i]);
      expect(
        different.length === 0,
        () => `${different.map(({ name }) => name).join(', ')} read differently before and after FEATURES_OK`,
      );
    },
  ),
  must('INI-010', RESERVED, 'VIRTIO_F_VERSION_1 is offered', ['no-version-1'], (bench) => {
    expect(bench.offered().has(Feature.VERSION_1), 'VIRTIO_F_VERSION_1 is not offered');
  }),
  untried(
    'INI-011',
    RESERVED,
    'SHOULD',
    'VIRTIO_F_ACCESS_PLATFORM is offered if the device reaches memory through translated addresses',
    'how the device reaches memory does not show',
  ),
  must(
    'INI-012',
    RESERVED,
    'With IN_ORDER, buffers are used in the order in which they were made available',
    ['in-order-lie'],
    async (bench) => {
      const driver = await bench.up({ features: [Feature.IN_ORDER] });
      const mac = bench.mac(bench.target);
      const ring = driver.ring(1);
      const heads = Array.from({ length: 8 }, () => {
        const { at, length } = driver.place(udpFrame({ destination: mac, source: mac }));
        return ring.chain({ at, length });
      });
      for (const head of heads) ring.available(head);
      driver.kick(ring);
      // One used entry may stand for several buffers: the last one of a batch. The ring fails when others are used before it.
      for (let done = 0; done < heads.length; ) {
        const { id } = await ring.wait(bench.patience);
        done = heads.indexOf(id) + 1;
        bench.log(`buffers up to ${done - 1} used`);
      }
    },
  ),
  must('INI-013', RESERVED, 'VIRTIO_F_SR_IOV is not offered without an SR-IOV capability', ['sr-iov-lie'], (bench) => {
    const has = hasExtendedCapability(bench.target.fn.config, SINGLE_ROOT_IOV);
    need(!has, 'the function has an SR-IOV capability');
    expect(!bench.offered().has(Feature.SR_IOV), 'VIRTIO_F_SR_IOV is offered without an SR-IOV capability');
  }),
  should('INI-014', RESERVED, 'VIRTIO_F_SR_IOV is offered with an SR-IOV capability', ['sr-iov-silent'], (bench) => {
    need(hasExtendedCapability(bench.target.fn.config, SINGLE_ROOT_IOV), 'the function has no SR-IOV capability');
    expect(bench.offered().has(Feature.SR_IOV), 'VIRTIO_F_SR_IOV is not offered');
  }),
  must(
    'INI-015',
    COMMON,
    'device_feature shows the offered features for any device_feature_select',
    ['feature-wraps'],
    (bench) => {
      const { common } = bench.target.structures;
      for (const select of [FEATURE_WORDS, FEATURE_WORDS + 1, 32, 0x80000000]) {
        common.write32(F.deviceFeatureSelect, select);
        const value = common.read32(F.deviceFeature);
        bench.log(`device_feature_select ${hex(select)}: device_feature ${hex(value)}`);
        expect(
          value === 0,
          `device_feature reads ${hex(value)} with device_feature_select ${hex(select)}: there are no such features`,
        );
      }
    },
  ),
  must(
    'INI-016',
    COMMON,
    'driver_feature shows the valid features that the driver has written',
    ['driver-feature-zero'],
    (bench) => {
      const { common } = bench.target.structures;
      bench.target.status = DeviceStatus.ACKNOWLEDGE;
      bench.target.status = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER;
      const features = bench.offered();
      writeAccepted(common, features);
      const missing = features.minus(readAccepted(common));
      bench.log(`wrote ${features.names().join(', ')}`);
      expect(missing.isEmpty, () => `driver_feature does not show ${missing.names().join(', ')}`);
    },
  ),
  untried(
    'INI-017',
    COMMON,
    'MUST',
    'config_generation changes when the configuration has changed',
    'a driver cannot make a network device change its configuration',
  ),
  must('INI-018', COMMON, 'queue_size is 0 for a queue that does not exist', ['queue-size-any'], (bench) => {
    const { common } = bench.target.structures;
    for (const index of [0xffff, 0xfff0]) {
      common.write16(F.queueSelect, index);
      const size = common.read16(F.queueSize);
      bench.log(`queue ${index}: queue_size ${size}`);
      expect(size === 0, `queue_size of queue ${index} reads ${size}`);
    }
  }),
  must('INI-019', COMMON, 'Without RING_PACKED, queue_size is 0 or a power of 2', ['queue-size-odd'], async (bench) => {
    need(!bench.profile.insists.has(Feature.RING_PACKED), 'the device takes packed virtqueues only');
    const features = bench.offered().and(INSISTED);
    expectTaken(await Driver.negotiate(bench.target, bench.patience, features), features);
    const { common } = bench.target.structures;
    const count = common.read16(F.numQueues);
    for (let index = 0; index < count; index++) {
      common.write16(F.queueSelect, index);
      const size = common.read16(F.queueSize);
      bench.log(`queue ${index}: queue_size ${size}`);
      expect((size & (size - 1)) === 0, `queue_size of queue ${index} reads ${size}`);
    }
  }),
  must(
    'INI-020',
    COMMON,
    'With ADMIN_VQ, admin_queue_index is not below num_queues',
    ['admin-index-zero'],
    async (bench) => {
      const { first, queues } = await adminQueues(bench);
      expect(first >= queues, `admin_queue_index is ${first}, num_queues ${queues}`);
    },
  ),
  must(
    'INI-021',
    COMMON,
    'With ADMIN_VQ, the indices of administration queues fit 16 bits',
    ['admin-num-high'],
    async (bench) => {
      const { first, count } = await adminQueues(bench);
      expect(count <= 0x10000 - first, `admin_queue_num is ${count}, admin_queue_index ${first}`);
    },
  ),
  should(
    'INI-033',
    '5.1.3',
    'A device that offers IPSEC offers OUT_NET_HEADER as well',
    ['no-out-net-header'],
    (bench) => {
      need(bench.profile.revision === 'virtio-1.4', 'the draft has no OUT_NET_HEADER');
      bench.needFeatures(Feature.IPSEC);
      expect(bench.offered().has(Feature.OUT_NET_HEADER), 'VIRTIO_NET_F_OUT_NET_HEADER is not offered');
    },
  ),
  untried(
    'INI-034',
    RESERVED,
    'SHOULD',
    'An add-in card offers ACCESS_PLATFORM and ORDER_PLATFORM',
    'whether a function is on an add-in card does not show',
  ),
];

async function adminQueues(bench: Bench): Promise<{ first: number; count: number; queues: number }> {
  bench.needFeatures(Feature.ADMIN_VQ);
  const features = bench.least.with(Feature.ADMIN_VQ);
  expectTaken(await Driver.negotiate(bench.target, bench.patience, features), features);
  const { common } = bench.target.structures;
  const first = common.read16(F.adminQueueIndex);
  const count = common.read16(F.adminQueueNum);
  const queues = common.read16(F.numQueues);
  bench.log(`admin_queue_index ${first}, admin_queue_num ${count}, num_queues ${queues}`);
  return { first, count, queues };
}
