/** Split virtqueues (Virtio 1.4, 2.7). */
import { Feature } from '../../virtio/features.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, should, untried } from '../check.ts';
import type { Driver } from '../driver.ts';
import { isEqual, udpFrame } from '../frames.ts';
import { SplitRing } from '../ring-split.ts';
import { expectAnyCuts, expectAnySplit } from './framing.ts';
import { expectNotified, expectQuiet, type Notified, notifiedDriver, ownFrame, TRANSMIT } from './notified.ts';

const SUPPRESSION = '2.7.7.2';
const USED = '2.7.8.1';
const AVAILABLE = '2.7.10.2';

/** A running function with split virtqueues and vectors. */
async function interruptible(bench: Bench, eventIdx: boolean): Promise<Notified & { readonly ring: SplitRing }> {
  const features = eventIdx ? [Feature.EVENT_IDX] : [];
  const notified = await notifiedDriver(bench, { ring: 'split', features });
  return { ...notified, ring: splitRing(notified.driver) };
}

function splitRing(driver: Driver): SplitRing {
  const ring = driver.ring(TRANSMIT);
  if (!(ring instanceof SplitRing)) throw new RangeError('the driver was brought up with packed virtqueues');
  return ring;
}

export const queueChecks: readonly Check[] = [
  must('QUE-001', '2.7.4.1', 'The arrangement of descriptors does not matter', ['first-descriptor-only'], (bench) =>
    expectAnyCuts(bench, { ring: 'split' }),
  ),
  must(
    'QUE-002',
    '2.7.4.1',
    'The arrangement of descriptors of an administration command does not matter',
    ['first-descriptor-only'],
    (bench) => expectAnySplit(bench, { ring: 'split' }),
  ),
  must(
    'QUE-003',
    '2.7.5.1',
    'The device does not write to device-readable buffers',
    ['writes-readable'],
    async (bench) => {
      const driver = await bench.up({ ring: 'split' });
      const { before, after } = await driver.transmit(ownFrame(bench));
      expect(isEqual(before, after), 'a transmit buffer has changed');
      bench.log(`a transmit buffer of ${before.length} bytes is as it was`);
    },
  ),
  untried(
    'QUE-004',
    '2.7.5.1',
    'SHOULD',
    'The device does not read device-writable buffers',
    'reading leaves no trace',
  ),
  must(
    'QUE-005',
    '2.7.5.1',
    'The device does not write to the descriptor table',
    ['writes-descriptors'],
    async (bench) => {
      const driver = await bench.up({ ring: 'split' });
      const ring = driver.ring(TRANSMIT);
      const { at, length } = driver.place(ownFrame(bench));
      ring.offer({ at, length: 20 }, { at: at + 20, length: length - 20 });
      const before = ring.table();
      driver.kick(ring);
      await ring.wait(bench.patience);
      expect(isEqual(before, ring.table()), 'the descriptor table has changed');
      bench.log('the descriptor table is as it was');
    },
  ),
  must(
    'QUE-006',
    '2.7.5.3.2',
    'The WRITE flag of a descriptor that refers to an indirect table is ignored',
    ['indirect-write-refused'],
    async (bench) => {
      const driver = await bench.up({ ring: 'split', features: [Feature.INDIRECT_DESC] });
      const ring = driver.ring(TRANSMIT);
      const { at, length } = driver.place(ownFrame(bench));
      const table = bench.target.allocate(32);
      ring.describeIndirect(table, 0, { at, length: 20 }, 1);
      ring.describeIndirect(table, 1, { at: at + 20, length: length - 20 }, null);
      const head = ring.offer({ at: table, length: 32, indirect: true, write: true });
      driver.kick(ring);
      const { id } = await ring.wait(bench.patience);
      expect(id === head, `buffer ${id} came back instead of ${head}`);
      expect(!bench.needsReset(), 'the device asks for a reset');
      bench.log('a table of two descriptors, with the WRITE flag set: used');
    },
  ),
  must(
    'QUE-007',
    '2.7.5.3.2',
    'Normal descriptors may be followed by one that refers to an indirect table',
    ['indirect-after-chain-refused'],
    async (bench) => {
      const { driver, network } = await bench.network({ ring: 'split', features: [Feature.INDIRECT_DESC] });
      const ring = driver.ring(TRANSMIT);
      const sent = udpFrame(network.outward);
      const { at, length } = driver.place(sent);
      const table = bench.target.allocate(32);
      ring.describeIndirect(table, 0, { at: at + 10, length: 20 }, 1);
      ring.describeIndirect(table, 1, { at: at + 30, length: length - 30 }, null);
      ring.offer({ at, length: 10 }, { at: table, length: 32, indirect: true });
      driver.kick(ring);
      await ring.wait(bench.patience);
      const came = await network.departure('the frame');
      expect(isEqual(came, sent), 'the frame was sent with other bytes');
      bench.log('one descriptor and a table of two: sent as it was');
    },
  ),
  must('QUE-008', SUPPRESSION, 'Without EVENT_IDX, used_event is ignored', ['event-idx-swapped'], async (bench) => {
    const notified = await interruptible(bench, false);
    notified.ring.usedEvent = 0x4000;
    await expectNotified(bench, notified, 'with flags 0 and used_event 0x4000');
  }),
  should(
    'QUE-009',
    SUPPRESSION,
    'Without EVENT_IDX, the device does not notify while flags is 1',
    ['interrupt-flag-ignored'],
    async (bench) => {
      const notified = await interruptible(bench, false);
      notified.ring.interruptFlags = 1;
      await expectQuiet(bench, notified, 'with flags 1');
    },
  ),
  must(
    'QUE-010',
    SUPPRESSION,
    'Without EVENT_IDX, the device notifies while flags is 0',
    ['no-interrupts'],
    async (bench) => {
      const notified = await interruptible(bench, false);
      for (let i = 0; i < 3; i++) await expectNotified(bench, notified, 'with flags 0');
    },
  ),
  must(
    'QUE-011',
    SUPPRESSION,
    'With EVENT_IDX, the lower bit of flags is ignored',
    ['event-idx-swapped'],
    async (bench) => {
      const notified = await interruptible(bench, true);
      notified.ring.interruptFlags = 1;
      notified.ring.usedEvent = 0;
      await expectNotified(bench, notified, 'with flags 1 and used_event 0');
    },
  ),
  must(
    'QUE-012',
    SUPPRESSION,
    'With EVENT_IDX, the device notifies when it uses the entry that used_event names',
    ['no-interrupts'],
    async (bench) => {
      const notified = await interruptible(bench, true);
      for (let i = 0; i < 3; i++) {
        notified.ring.usedEvent = i;
        await expectNotified(bench, notified, `for entry ${i} with used_event ${i}`);
      }
    },
  ),
  should(
    'QUE-013',
    SUPPRESSION,
    'With EVENT_IDX, the device does not notify of other entries',
    ['interrupt-flag-ignored'],
    async (bench) => {
      const notified = await interruptible(bench, true);
      notified.ring.usedEvent = 3;
      for (let i = 0; i < 3; i++) await expectQuiet(bench, notified, `for entry ${i} with used_event 3`);
      await expectNotified(bench, notified, 'for entry 3 with used_event 3');
    },
  ),
  must('QUE-014', USED, 'len is set before the used index is updated', ['used-length-late'], async (bench) => {
    const admin = bench.console(await bench.up({ ring: 'split', admin: true }));
    for (let i = 0; i < 16; i++) {
      const { length } = await admin.listQuery();
      expect(length >= 8, `len was ${length} when the used index was updated`);
    }
  }),
  must(
    'QUE-015',
    USED,
    'At least len bytes are written, from the first device-writable buffer on',
    ['used-length-more'],
    async (bench) => {
      const { driver, network } = await bench.network({ ring: 'split', rx: { count: 4, split: 2 } });
      const sent = udpFrame(network.inward);
      await network.inject(sent);
      const received = await network.arrival('the frame');
      const length = driver.layout.length + sent.length;
      bench.log(`len ${received.lengths.join(' + ')} for ${length} bytes`);
      expect(
        received.bytes.length <= length,
        `len is ${received.bytes.length}, but only ${length} bytes can have been written`,
      );
      expect(
        isEqual(received.frame, sent.subarray(0, received.frame.length)),
        'the first len bytes are not what was received',
      );
    },
  ),
  must(
    'QUE-016',
    AVAILABLE,
    'Without EVENT_IDX, flags of the used ring is 0 or 1',
    ['used-flags-garbage'],
    async (bench) => {
      const driver = await bench.up({ ring: 'split' });
      for (let i = 0; i < 8; i++) {
        await driver.transmit(ownFrame(bench));
        const flags = splitRing(driver).usedFlags;
        expect(flags <= 1, `flags of the used ring is ${flags}`);
      }
      bench.log('flags of the used ring was 0 or 1 throughout');
    },
  ),
  must('QUE-017', AVAILABLE, 'With EVENT_IDX, flags of the used ring is 0', ['used-flags-garbage'], async (bench) => {
    const driver = await bench.up({ ring: 'split', features: [Feature.EVENT_IDX] });
    for (let i = 0; i < 8; i++) {
      await driver.transmit(ownFrame(bench));
      const flags = splitRing(driver).usedFlags;
      expect(flags === 0, `flags of the used ring is ${flags}`);
    }
    bench.log('flags of the used ring was 0 throughout');
  }),
  must('QUE-018', AVAILABLE, 'Notifications without new buffers do no harm', ['notifications-fatal'], async (bench) => {
    const driver = await bench.up({ ring: 'split' });
    for (let i = 0; i < 64; i++) driver.notify(i % 2);
    await driver.transmit(ownFrame(bench));
    expect(!bench.needsReset(), 'the device asks for a reset');
    bench.log('64 notifications without buffers, then one with: used');
  }),
];
