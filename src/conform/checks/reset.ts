/**
 * Reset of the device and of single virtqueues, and what it does to everything else (Virtio 1.4, 2.4.1, 2.6.1,
 * 4.1.4.3.1 …).
 */
import { AdminStatus, CapabilityId, ResourceType as R } from '../../virtio/admin-wire.ts';
import { Feature } from '../../virtio/features.ts';
import { CommonCfgField as F, NO_VECTOR } from '../../virtio/pci-layout.ts';
import { encodeGroup } from '../../virtio-net/flow-filter-wire.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, need, untried } from '../check.ts';
import type { AdminConsole } from '../console.ts';
import { Driver } from '../driver.ts';
import { udpFrame } from '../frames.ts';
import { offeredCapabilities, succeeded, useCapabilities, useCommands } from '../offer.ts';
import { anySa, saBytes } from '../samples.ts';
import { readAccepted } from '../structures.ts';
import { resetQueue } from './queue-reset.ts';

const COMMON = '4.1.4.3.1';
const TRANSMIT = 1;

function frame(bench: Bench): Uint8Array {
  const mac = bench.mac(bench.target);
  return udpFrame({ destination: mac, source: mac });
}

/** Puts a frame into the transmit queue and does not wait. */
function offerFrame(bench: Bench, driver: Driver): void {
  const { at, length } = driver.place(frame(bench));
  driver.ring(TRANSMIT).offer({ at, length });
}

/** With RING_RESET. */
async function resettable(bench: Bench): Promise<Driver> {
  return await bench.up({ features: [Feature.RING_RESET] });
}

/** A function with objects of both kinds, that was then reset. */
async function afterReset(bench: Bench): Promise<AdminConsole> {
  const admin = bench.console(await bench.up({ ipsec: true }));
  const offer = await offeredCapabilities(admin);
  if (offer.flow !== null) succeeded(await admin.create(R.NET_FF_GROUP, 0, encodeGroup({ priority: 1 })));
  if (offer.modes.length > 0) {
    succeeded(await admin.create(R.NET_IPSEC_OUTB_SA, 0, saBytes(admin.revision, anySa(offer, 'outbound'), 0)));
    succeeded(await admin.create(R.NET_IPSEC_INB_SA, 0, saBytes(admin.revision, anySa(offer, 'inbound'), 0)));
  }
  bench.log('reset');
  const driver = await bench.bringUp(bench.target, { features: [Feature.ADMIN_VQ, Feature.IPSEC] });
  const again = bench.console(driver);
  await useCommands(again);
  return again;
}

/** The same, and the capabilities set again. */
async function usedAfterReset(bench: Bench): Promise<AdminConsole> {
  const admin = await afterReset(bench);
  await useCapabilities(admin, await offeredCapabilities(admin));
  return admin;
}

async function expectGone(admin: AdminConsole, type: number): Promise<void> {
  const reply = await admin.query(type, 0);
  expect(reply.status !== AdminStatus.OK, `${reply.name} still finds the object`);
}

export const resetChecks: readonly Check[] = [
  must('RST-001', '2.4.1', 'device_status is 0 after a reset', ['reset-stuck'], async (bench) => {
    await bench.up();
    await bench.target.reset(bench.patience);
    bench.log(`wrote 0 to device_status, it reads ${bench.target.status}`);
  }),
  must(
    'RST-002',
    '2.4.1',
    'After a reset the device does not interact with the queues or send notifications',
    ['reset-keeps-queues'],
    async (bench) => {
      const driver = await bench.up({ vectors: true });
      await driver.transmit(frame(bench));
      const ring = driver.ring(TRANSMIT);
      await bench.target.reset(bench.patience);
      offerFrame(bench, driver);
      await bench.never(() => ring.pending > 0, 'the device used a buffer that was made available after the reset');
      bench.log('made a buffer available after the reset; the device left it alone');
    },
  ),
  must(
    'RST-003',
    COMMON,
    'Writing 0 to device_status resets the device, and it reads 0 once that is done',
    ['reset-stuck', 'reset-keeps-features'],
    async (bench) => {
      const driver = await bench.up();
      await bench.target.reset(bench.patience);
      const kept = readAccepted(bench.target.structures.common).and(driver.features);
      bench.log(`driver_feature reads ${kept.names().join(', ') || 'nothing'} after the reset`);
      expect(kept.isEmpty, `driver_feature still has ${kept.names().join(', ')} after the reset`);
      expect(
        await Driver.negotiate(bench.target, bench.patience, driver.features),
        'the device does not take the same features after a reset',
      );
    },
  ),
  must('RST-004', COMMON, 'queue_enable is 0 on reset', ['queue-enable-one'], async (bench) => {
    const driver = await bench.up();
    await bench.target.reset(bench.patience);
    const { common } = bench.target.structures;
    for (const index of driver.rings.keys()) {
      common.write16(F.queueSelect, index);
      const value = common.read16(F.queueEnable);
      bench.log(`queue ${index}: queue_enable ${value}`);
      expect(value === 0, `queue_enable of queue ${index} reads ${value} after a reset`);
    }
  }),
  must('RST-005', COMMON, 'With RING_RESET, queue_reset is 0 on reset', ['queue-reset-one'], async (bench) => {
    await resettable(bench);
    await bench.target.reset(bench.patience);
    expect(
      await Driver.negotiate(bench.target, bench.patience, bench.least.with(Feature.RING_RESET)),
      'FEATURES_OK was refused',
    );
    const { common } = bench.target.structures;
    common.write16(F.queueSelect, 0);
    const value = common.read16(F.queueReset);
    bench.log(`queue_reset ${value}`);
    expect(value === 0, `queue_reset reads ${value} after a reset`);
  }),
  must(
    'RST-006',
    COMMON,
    'With RING_RESET, queue_reset is 0 after the queue is enabled',
    ['queue-reset-one'],
    async (bench) => {
      await resettable(bench);
      const { common } = bench.target.structures;
      common.write16(F.queueSelect, 0);
      const value = common.read16(F.queueReset);
      bench.log(`queue_reset ${value}`);
      expect(value === 0, `queue_reset of an enabled queue reads ${value}`);
    },
  ),
  must(
    'RST-007',
    COMMON,
    'Writing 1 to queue_reset resets the queue; queue_reset and queue_enable are 0 when that is done',
    ['queue-reset-ignored'],
    async (bench) => {
      await resettable(bench);
      await resetQueue(bench, TRANSMIT);
    },
  ),
  must(
    'RST-008',
    '2.6.1.1.1',
    'A queue that was reset is not worked on, and does not notify',
    ['queue-reset-half'],
    async (bench) => {
      const driver = await resettable(bench);
      await driver.transmit(frame(bench));
      const ring = driver.ring(TRANSMIT);
      await resetQueue(bench, TRANSMIT);
      offerFrame(bench, driver);
      // Another queue's notification wakes a device that sleeps.
      driver.fill(0, 1);
      await bench.never(() => ring.pending > 0, 'the device used a buffer of a queue that was reset');
    },
  ),
  must(
    'RST-009',
    '2.6.1.1.1',
    'The state of a queue that was reset is the default one',
    ['queue-reset-for-good'],
    async (bench) => {
      const driver = await resettable(bench);
      for (let i = 0; i < 3; i++) await driver.transmit(frame(bench));
      await resetQueue(bench, TRANSMIT);
      const { common } = bench.target.structures;
      const vector = common.read16(F.queueMsixVector);
      expect(vector === NO_VECTOR, `queue_msix_vector reads ${vector} after the reset of the queue`);
      driver.forget(TRANSMIT);
      driver.addQueue(TRANSMIT);
      // Available and used index start at 0 again.
      await driver.transmit(frame(bench));
      bench.log('enabled the queue again; it starts from index 0');
    },
  ),
  must(
    'RST-010',
    '2.6.1.2.1',
    'A queue that is enabled again has the size that the driver set',
    ['queue-size-sticks'],
    async (bench) => {
      const driver = await resettable(bench);
      await driver.transmit(frame(bench));
      await resetQueue(bench, TRANSMIT);
      driver.forget(TRANSMIT);
      const size = 16;
      driver.addQueue(TRANSMIT, { size });
      // Buffers of one and of two descriptors, so that each round of the ring has other heads.
      for (let i = 0; i < 2 * size + 1; i++) await driver.transmit(frame(bench), { cuts: i % 5 === 0 ? [20] : [] });
      bench.log(`enabled the queue again with ${size} descriptors and used it ${2 * size + 1} times`);
    },
  ),
  must('RST-011', '4.1.5.1.2.1', 'All events are unmapped on reset', ['vector-sticks'], async (bench) => {
    await bench.up({ vectors: true });
    await bench.target.reset(bench.patience);
    const { common } = bench.target.structures;
    const vectors = [common.read16(F.configMsixVector)];
    for (const index of [0, TRANSMIT]) {
      common.write16(F.queueSelect, index);
      vectors.push(common.read16(F.queueMsixVector));
    }
    bench.log(`vectors of configuration, queue 0 and queue 1: ${vectors.join(', ')}`);
    expect(
      vectors.every((vector) => vector === NO_VECTOR),
      `the vectors read ${vectors.join(', ')}, not ${NO_VECTOR}`,
    );
  }),
  must(
    'RST-012',
    '2.12.1.2.4',
    'A reset resets all driver capabilities',
    ['reset-keeps-capabilities'],
    async (bench) => {
      const admin = await afterReset(bench);
      const offer = await offeredCapabilities(admin);
      need(offer.ids.includes(CapabilityId.NET_FF_RESOURCE), 'the device has no flow filter');
      const reply = await admin.create(R.NET_FF_GROUP, 1, encodeGroup({ priority: 9 }));
      expect(reply.status !== AdminStatus.OK, `${reply.name} succeeded, though no capability was set after the reset`);
    },
  ),
  must('RST-013', '2.12.1.3.5', 'A reset destroys all resource objects', ['reset-keeps-objects'], async (bench) => {
    const admin = await usedAfterReset(bench);
    await expectGone(admin, R.NET_FF_GROUP);
  }),
  must('RST-014', '5.1.9.7.4', 'A reset destroys all SAs', ['reset-keeps-objects'], async (bench) => {
    const admin = await usedAfterReset(bench);
    await expectGone(admin, R.NET_IPSEC_OUTB_SA);
    await expectGone(admin, R.NET_IPSEC_INB_SA);
  }),
  untried(
    'RST-022',
    COMMON,
    'MUST',
    'queue_reset reads 1 as long as the reset of the queue is going on',
    'a device may be done before the first read, and nothing else shows when it is',
  ),
];
