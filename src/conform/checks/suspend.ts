/** Suspending a device and resuming it (Virtio 1.4, 3.4.2). */
import { Feature } from '../../virtio/features.ts';
import { DeviceStatus } from '../../virtio/pci-layout.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, need, untried } from '../check.ts';
import { Driver } from '../driver.ts';
import { RUNNING } from '../target.ts';
import { ownFrame, TRANSMIT } from './notified.ts';

const SECTION = '3.4.2';
const { SUSPEND, DRIVER_OK } = DeviceStatus;

/** Asks the device to suspend itself; whether it does. */
async function suspend(bench: Bench): Promise<boolean> {
  bench.target.status = RUNNING | SUSPEND;
  const done = () => (bench.target.status & (SUSPEND | DRIVER_OK)) === SUSPEND;
  await bench.patience.until(() => done() || bench.needsReset());
  bench.log(`set SUSPEND, device_status reads ${bench.target.status}`);
  return done();
}

async function suspended(bench: Bench): Promise<Driver> {
  const driver = await bench.up({ features: [Feature.SUSPEND] });
  await driver.transmit(ownFrame(bench));
  need(await suspend(bench), 'the device does not suspend itself');
  return driver;
}

export const suspendChecks: readonly Check[] = [
  must('RST-015', SECTION, 'SUSPEND is ignored before the device is initialised', ['suspend-fake'], async (bench) => {
    bench.needFeatures(Feature.SUSPEND);
    const features = bench.least.with(Feature.SUSPEND);
    expect(await Driver.negotiate(bench.target, bench.patience, features), 'FEATURES_OK was refused');
    bench.target.status = (RUNNING & ~DRIVER_OK) | SUSPEND;
    const { status } = bench.target;
    bench.log(`set SUSPEND before DRIVER_OK, device_status reads ${status}`);
    expect((status & SUSPEND) === 0, `device_status reads ${status}`);
  }),
  untried(
    'RST-016',
    SECTION,
    'SHOULD',
    'Writes to configuration space are ignored while the device is suspended',
    'a network device has nothing in its configuration that this version of the standard lets a driver write',
  ),
  must('RST-017', SECTION, 'A suspended device does not access its queues', ['suspend-fake'], async (bench) => {
    const driver = await suspended(bench);
    const ring = driver.ring(TRANSMIT);
    const { at, length } = driver.place(ownFrame(bench));
    ring.offer({ at, length });
    await bench.never(() => ring.pending > 0, 'the device used a buffer while it was suspended');
    bench.log('made a buffer available; the device left it alone');
  }),
  untried(
    'RST-018',
    SECTION,
    'MUST',
    'A suspended device does not notify of configuration changes before it resumes',
    'a driver cannot make a network device change its configuration',
  ),
  must(
    'RST-019',
    SECTION,
    'A device that is told to suspend does so, or asks for a reset',
    ['suspend-ignored'],
    async (bench) => {
      await bench.up({ features: [Feature.SUSPEND] });
      const done = await suspend(bench);
      expect(done || bench.needsReset(), `device_status reads ${bench.target.status}`);
    },
  ),
  must(
    'RST-020',
    SECTION,
    'A suspended device that is told to resume does so, or asks for a reset',
    ['suspend-for-good'],
    async (bench) => {
      const driver = await suspended(bench);
      bench.target.status |= DRIVER_OK;
      const done = () => (bench.target.status & (SUSPEND | DRIVER_OK)) === DRIVER_OK;
      await bench.eventually(
        () => done() || bench.needsReset(),
        'device_status shows neither that the device has resumed nor that it needs a reset',
      );
      bench.log(`set DRIVER_OK, device_status reads ${bench.target.status}`);
      if (bench.needsReset()) return;
      await driver.transmit(ownFrame(bench));
      bench.log('a buffer was used after that');
    },
  ),
  untried(
    'RST-021',
    SECTION,
    'SHOULD',
    'All buffers that are being processed are used, and notified of, before the device is suspended',
    'which buffers a device has begun with does not show',
  ),
];
