/** Packed virtqueues (Virtio 1.4, 2.8). */
import { Feature } from '../../virtio/features.ts';
import { EVENT_FLAG_MASK, EventFlag } from '../../virtqueue/packed-layout.ts';
import type { Bench, UpOptions } from '../bench.ts';
import { type Check, expect, must, should, untried } from '../check.ts';
import type { Driver } from '../driver.ts';
import { isEqual, udpFrame } from '../frames.ts';
import { DESCRIPTOR, DescriptorFlag, type RingFormat } from '../ring.ts';
import { PackedRing } from '../ring-packed.ts';
import { expectAnyCuts, expectAnySplit, expectUsedTogether } from './framing.ts';
import { expectNotified, expectQuiet, type Notified, notifiedDriver, ownFrame, TRANSMIT } from './notified.ts';

const DEVICE = '2.8.12';
const TABLE = '2.8.15';
const LISTS = '2.8.18';
const SUPPRESSION = '2.8.10';
const RECEIVE = 0;
/** Every check here has packed virtqueues, whatever the others have. */
const PACKED: { readonly ring: RingFormat } = { ring: 'packed' };

function packedRing(driver: Driver, index = TRANSMIT): PackedRing {
  const ring = driver.ring(index);
  if (!(ring instanceof PackedRing)) throw new RangeError('the driver was brought up with split virtqueues');
  return ring;
}

/** A running function with packed virtqueues. */
async function up(bench: Bench, options: UpOptions = {}): Promise<{ driver: Driver; ring: PackedRing }> {
  const driver = await bench.up({ ...options, ...PACKED });
  return { driver, ring: packedRing(driver) };
}

/** The same, with vectors. */
async function interruptible(bench: Bench, eventIdx: boolean): Promise<Notified & { readonly ring: PackedRing }> {
  const features = eventIdx ? [Feature.EVENT_IDX] : [];
  const notified = await notifiedDriver(bench, { ...PACKED, features });
  return { ...notified, ring: packedRing(notified.driver) };
}

/** Sends `count` frames in lists of one to four descriptors, one after the other. */
async function sendLists(bench: Bench, driver: Driver, count: number): Promise<void> {
  const cuts = [[], [20], [12, 40], [5, 30, 70]];
  for (let i = 0; i < count; i++) await driver.transmit(ownFrame(bench), { cuts: cuts[i % cuts.length] });
}

export const packedQueueChecks: readonly Check[] = [
  untried(
    'PKD-001',
    DEVICE,
    'MUST',
    'The device starts to process descriptors in the order in which they appear in the ring',
    'when the processing of a descriptor starts does not show; what it ends in may come in any order',
  ),
  must(
    'PKD-002',
    DEVICE,
    'Used descriptors are written in order, one behind the other, round after round',
    ['packed-wrap-stuck'],
    async (bench) => {
      const { driver, ring } = await up(bench, { size: 16 });
      const count = 5 * ring.size;
      await sendLists(bench, driver, count);
      bench.log(`${count} lists in a ring of ${ring.size} descriptors: each used where it was expected`);
    },
  ),
  must('PKD-003', TABLE, 'The device does not write to device-readable buffers', ['writes-readable'], async (bench) => {
    const { driver } = await up(bench);
    const { before, after } = await driver.transmit(ownFrame(bench));
    expect(isEqual(before, after), 'a transmit buffer has changed');
    bench.log(`a transmit buffer of ${before.length} bytes is as it was`);
  }),
  untried('PKD-004', TABLE, 'SHOULD', 'The device does not read device-writable buffers', 'reading leaves no trace'),
  must(
    'PKD-005',
    TABLE,
    'A descriptor is not used before its AVAIL bit has changed',
    ['packed-takes-unavailable'],
    async (bench) => {
      const { driver, ring } = await up(bench);
      const { at, length } = driver.place(ownFrame(bench));
      const first = ring.next;
      const id = ring.chain({ at, length });
      const flags = ring.write(id);
      driver.notify(TRANSMIT);
      await bench.never(() => ring.pending > 0, 'the device used a descriptor that was not made available');
      bench.log('wrote a descriptor without its flags, and notified; the device left it alone');
      ring.show(first, flags);
      driver.kick(ring);
      const used = await ring.wait(bench.patience);
      expect(used.id === id, `buffer ${used.id} came back instead of ${id}`);
      bench.log('wrote the flags; the device used it');
    },
  ),
  must(
    'PKD-006',
    TABLE,
    'A descriptor does not change after it was marked used',
    ['writes-descriptors'],
    async (bench) => {
      const { driver, ring } = await up(bench);
      await driver.transmit(ownFrame(bench));
      const descriptor = () => ring.table().subarray(0, DESCRIPTOR);
      const before = descriptor();
      await driver.transmit(ownFrame(bench));
      await bench.never(() => !isEqual(before, descriptor()), 'a used descriptor has changed');
      bench.log('a used descriptor stayed as it was while the next one was used');
    },
  ),
  must(
    'PKD-007',
    LISTS,
    'The descriptors of a list are used in the order in which they were made available',
    ['first-descriptor-only'],
    (bench) => expectAnyCuts(bench, PACKED),
  ),
  must(
    'PKD-008',
    LISTS,
    'The descriptors of an administration command are used in order',
    ['first-descriptor-only'],
    (bench) => expectAnySplit(bench, PACKED),
  ),
  must(
    'PKD-009',
    '2.8.6',
    'A list has one used descriptor, with the id that stands in the last descriptor of the list',
    ['used-id-bogus', 'used-id-twice'],
    async (bench) => {
      const { driver, ring } = await up(bench);
      await sendLists(bench, driver, 12);
      expect(ring.pending === 0, 'there are more used descriptors than buffers');
      bench.log('12 lists of one to four descriptors: one used descriptor each, with the right id');
    },
  ),
  must(
    'PKD-010',
    '2.8.7',
    'WRITE is ignored in a descriptor that refers to an indirect table, and all of the table is used',
    ['indirect-write-refused', 'first-descriptor-only'],
    async (bench) => {
      const { driver, network } = await bench.network({ ...PACKED, features: [Feature.INDIRECT_DESC] });
      const ring = driver.ring(TRANSMIT);
      const sent = udpFrame(network.outward);
      const { at, length } = driver.place(sent);
      const table = bench.target.allocate(2 * DESCRIPTOR);
      ring.describeIndirect(table, 0, { at, length: 30 }, 1);
      ring.describeIndirect(table, 1, { at: at + 30, length: length - 30 }, null);
      ring.offer({ at: table, length: 2 * DESCRIPTOR, indirect: true, write: true });
      driver.kick(ring);
      await ring.wait(bench.patience);
      const came = await network.departure('the frame');
      expect(isEqual(came, sent), 'the frame was sent with other bytes');
      bench.log('a table of two descriptors, its own descriptor with WRITE: sent as it was');
    },
  ),
  must('PKD-011', SUPPRESSION, 'The device notifies while event flags are ENABLE', ['no-interrupts'], async (bench) => {
    const notified = await interruptible(bench, false);
    for (let i = 0; i < 3; i++) await expectNotified(bench, notified, 'with ENABLE');
  }),
  should(
    'PKD-012',
    SUPPRESSION,
    'The device does not notify while event flags are DISABLE',
    ['interrupt-flag-ignored'],
    async (bench) => {
      const notified = await interruptible(bench, false);
      notified.ring.wantInterrupts(EventFlag.DISABLE);
      await expectQuiet(bench, notified, 'with DISABLE');
    },
  ),
  must(
    'PKD-013',
    SUPPRESSION,
    'With EVENT_IDX and DESC, the device notifies when it uses the descriptor that is named',
    ['no-interrupts'],
    async (bench) => {
      const notified = await interruptible(bench, true);
      const { ring } = notified;
      for (let i = 0; i < 3; i++) {
        ring.wantInterrupts(EventFlag.DESC, ring.usedPosition);
        await expectNotified(bench, notified, `for descriptor ${i} with event offset ${i}`);
      }
    },
  ),
  should(
    'PKD-014',
    SUPPRESSION,
    'With EVENT_IDX and DESC, the device does not notify of other descriptors',
    ['interrupt-flag-ignored'],
    async (bench) => {
      const notified = await interruptible(bench, true);
      const { ring } = notified;
      ring.wantInterrupts(EventFlag.DESC, ring.usedPosition + 3);
      for (let i = 0; i < 3; i++) await expectQuiet(bench, notified, `for descriptor ${i} with event offset 3`);
      await expectNotified(bench, notified, 'for descriptor 3 with event offset 3');
    },
  ),
  must(
    'PKD-015',
    SUPPRESSION,
    'Event flags of the device are ENABLE, DISABLE, or, with EVENT_IDX, DESC',
    ['used-flags-garbage'],
    async (bench) => {
      for (const eventIdx of [false, true]) {
        const { driver, ring } = await up(bench, eventIdx ? { wanted: [Feature.EVENT_IDX] } : {});
        const known: readonly number[] = [
          EventFlag.ENABLE,
          EventFlag.DISABLE,
          ...(ring.eventIdx ? [EventFlag.DESC] : []),
        ];
        for (let i = 0; i < 8; i++) {
          await driver.transmit(ownFrame(bench));
          const flags = ring.deviceEventFlags & EVENT_FLAG_MASK;
          expect(known.includes(flags), `event flags of the device are ${flags}`);
        }
        bench.log(`${ring.eventIdx ? 'with' : 'without'} EVENT_IDX: event flags were ${known.join(', ')} throughout`);
      }
    },
  ),
  must('PKD-016', '2.8.10.1', 'The size of a queue need not be a power of 2', ['queue-size-sticks'], async (bench) => {
    const { driver, ring } = await up(bench, { size: 23 });
    await sendLists(bench, driver, 3 * ring.size);
    bench.log(`a queue of ${ring.size} descriptors, used ${3 * ring.size} times`);
  }),
  must(
    'PKD-017',
    '2.8.4',
    'The length of a used descriptor is what was written, from the first device-writable descriptor on',
    ['used-length-more', 'used-length-short'],
    async (bench) => {
      const { driver, network } = await bench.network({ ...PACKED, rx: { count: 4, split: 2 } });
      const sent = udpFrame(network.inward);
      await network.inject(sent);
      const received = await network.arrival('the frame');
      const length = driver.layout.length + sent.length;
      bench.log(`length ${received.lengths.join(' + ')} for ${length} bytes`);
      expect(received.bytes.length === length, `the length is ${received.bytes.length}, not ${length}`);
      expect(isEqual(received.frame, sent), 'what was received has other bytes');
    },
  ),
  should(
    'PKD-018',
    '2.8.3',
    'WRITE is set in the used descriptor of a buffer into which something was written',
    ['packed-write-flag-missing'],
    async (bench) => {
      const { driver, network } = await bench.network({ ...PACKED, rx: { count: 8 } });
      const ring = packedRing(driver, RECEIVE);
      for (let i = 0; i < 4; i++) {
        await network.inject(udpFrame(network.inward));
        await bench.eventually(() => ring.pending > 0, 'the frame did not arrive');
        const flags = ring.usedDescriptorFlags;
        bench.log(`flags of the used descriptor: 0x${flags.toString(16)}`);
        expect((flags & DescriptorFlag.WRITE) !== 0, 'WRITE is not set: drivers may ignore the length (2.8.4)');
        await network.arrival('the frame');
      }
    },
  ),
  must(
    'PKD-019',
    '2.8.9',
    'The first buffer of a request of several is marked used after the others',
    ['rx-buffers-apart'],
    (bench) => expectUsedTogether(bench, PACKED),
  ),
  must('PKD-020', '2.8.16', 'Notifications without new buffers do no harm', ['notifications-fatal'], async (bench) => {
    const { driver } = await up(bench);
    for (let i = 0; i < 64; i++) driver.notify(i % 2);
    await driver.transmit(ownFrame(bench));
    expect(!bench.needsReset(), 'the device asks for a reset');
    bench.log('64 notifications without buffers, then one with: used');
  }),
];
