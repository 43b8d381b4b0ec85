/** Control commands that say when to notify, and that ask what was counted (Virtio 1.4, 5.1.9.5.10 and 5.1.9.5.11). */
import { Feature } from '../../virtio/features.ts';
import {
  COALESCING_LENGTH,
  type Coalescing,
  CoalescingCommand,
  ControlClass,
  decodeCoalescing,
  encodeCoalescing,
  getLe,
  putLe,
  StatsCommand,
} from '../../virtio-net/control-wire.ts';
import { RequestField, STATISTICS_CAPABILITIES_LENGTH, StatisticsTypes } from '../../virtio-net/device-statistics.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, hex, must, should, untried } from '../check.ts';
import type { ControlConsole, ControlReply } from '../control-console.ts';
import type { Driver } from '../driver.ts';
import { expectQuiet, notifiedDriver, ownFrame, TRANSMIT } from './notified.ts';
import { resetQueue } from './queue-reset.ts';

const COALESCING = '5.1.9.5.10.6';
const STATISTICS = '5.1.9.5.11.12';
const RECEIVE = 0;
/** A queue that no device has enabled here. */
const NO_QUEUE = 0x7ffe;
const NONE: Coalescing = { maxPackets: 0, maxMicroseconds: 0 };
const SOME: Coalescing = { maxPackets: 3, maxMicroseconds: 40 };
const OTHER: Coalescing = { maxPackets: 5, maxMicroseconds: 70 };
/** Where the parameters are in `struct virtio_net_ctrl_coal_vq`. */
const PARAMETERS = 4;

/** `struct virtio_net_stats_reply_hdr` (5.1.9.5.11.2). */
const ReplyHeader = { type: 0, queue: 2, size: 6, length: 8 } as const;
/** Bytes of the two basic types with their headers. */
const BASIC = ReplyHeader.length + 8 * StatisticsTypes.receiveBasic.fields.length;
/** A type that the standard does not define. */
const UNKNOWN_TYPE = 40;

interface Coalesced {
  readonly driver: Driver;
  readonly control: ControlConsole;
}

async function coalesced(bench: Bench, features: readonly number[] = []): Promise<Coalesced> {
  const driver = await bench.up({ control: true, features: [Feature.VQ_NOTF_COAL, ...features] });
  return { driver, control: bench.control(driver) };
}

function forQueue(index: number, coalescing: Coalescing, reserved = 0): Uint8Array {
  const bytes = new Uint8Array(PARAMETERS + COALESCING_LENGTH);
  putLe(bytes, 0, 2, index);
  putLe(bytes, 2, 2, reserved);
  bytes.set(encodeCoalescing(coalescing), PARAMETERS);
  return bytes;
}

function setQueue(control: ControlConsole, index: number, to: Coalescing, reserved = 0): Promise<ControlReply> {
  const name = `NOTF_COAL_VQ_SET queue ${index} to ${to.maxPackets} packets, ${to.maxMicroseconds} µs`;
  return control.send(name, ControlClass.NOTF_COAL, CoalescingCommand.VQ_SET, forQueue(index, to, reserved));
}

function getQueue(control: ControlConsole, index: number, reserved = 0): Promise<ControlReply> {
  // The parameters of the answer stand where those of the request do: the result begins with them.
  const data = forQueue(index, NONE, reserved).subarray(0, PARAMETERS);
  const name = `NOTF_COAL_VQ_GET queue ${index}`;
  return control.send(name, ControlClass.NOTF_COAL, CoalescingCommand.VQ_GET, data, COALESCING_LENGTH);
}

async function expectParameters(
  control: ControlConsole,
  index: number,
  wanted: Coalescing,
  when: string,
): Promise<void> {
  const { ok, result } = await getQueue(control, index);
  expect(ok && result.length >= COALESCING_LENGTH, `NOTF_COAL_VQ_GET of queue ${index}: no parameters came`);
  const { maxPackets, maxMicroseconds } = decodeCoalescing(result);
  const is = maxPackets === wanted.maxPackets && maxMicroseconds === wanted.maxMicroseconds;
  expect(is, `queue ${index} has ${maxPackets} packets and ${maxMicroseconds} µs ${when}`);
}

/** Resets a queue, and enables it again. */
async function renew(bench: Bench, driver: Driver, index: number): Promise<void> {
  await resetQueue(bench, index);
  driver.forget(index);
  driver.addQueue(index);
  bench.log(`queue ${index} was enabled again`);
}

/** A queue that is enabled again has the parameters for all of its kind. */
function keepsNone(id: Check['id'], title: string, index: number, command: 'TX_SET' | 'RX_SET'): Check {
  return must(id, COALESCING, title, ['coal-kept'], async (bench) => {
    const { driver, control } = await coalesced(bench, [Feature.NOTF_COAL, Feature.RING_RESET]);
    const before = await setQueue(control, index, SOME);
    expect(before.ok, `${before.name}: expected OK, came ERR`);
    await renew(bench, driver, index);
    await expectParameters(control, index, NONE, `after it was enabled again, though no ${command} was sent`);
    const name = `NOTF_COAL_${command} ${OTHER.maxPackets} packets, ${OTHER.maxMicroseconds} µs`;
    await control.done(name, ControlClass.NOTF_COAL, CoalescingCommand[command], encodeCoalescing(OTHER));
    const after = await setQueue(control, index, SOME);
    expect(after.ok, `${after.name}: expected OK, came ERR`);
    await renew(bench, driver, index);
    await expectParameters(control, index, OTHER, `after it was enabled again, though ${command} had set others`);
  });
}

interface Wanted {
  readonly queue: number;
  /** Bits of `types_bitmap`. */
  readonly types: readonly number[];
}

/** Asks for statistics with room for `room` bytes of replies. */
function request(control: ControlConsole, wanted: readonly Wanted[], room: number): Promise<ControlReply> {
  const data = new Uint8Array(wanted.length * RequestField.length);
  for (const [i, { queue, types }] of wanted.entries()) {
    putLe(data, i * RequestField.length + RequestField.queue, 2, queue);
    const bitmap = types.reduce((bits, type) => bits + 2 ** type, 0);
    putLe(data, i * RequestField.length + RequestField.types, 8, bitmap);
  }
  const name = `STATS_GET ${wanted.map(({ queue, types }) => `queue ${queue} types ${types.join('+')}`).join(', ')}`;
  return control.send(name, ControlClass.STATS, StatsCommand.GET, data, room);
}

async function counting(bench: Bench): Promise<Coalesced> {
  const driver = await bench.up({ control: true, features: [Feature.DEVICE_STATS] });
  return { driver, control: bench.control(driver) };
}

const RX_BASIC: Wanted = { queue: RECEIVE, types: [StatisticsTypes.receiveBasic.bit] };
const TX_BASIC: Wanted = { queue: TRANSMIT, types: [StatisticsTypes.transmitBasic.bit] };

/** A request that is wrong in one way fails. */
function refuses(id: Check['id'], title: string, wanted: readonly Wanted[]): Check {
  return must(id, STATISTICS, title, ['stats-lenient'], async (bench) => {
    const { control } = await counting(bench);
    const { name, ok } = await request(control, wanted, 512);
    expect(!ok, `${name}: expected ERR, came OK`);
  });
}

export const controlCountingChecks: readonly Check[] = [
  must('CTL-038', COALESCING, 'reserved is ignored', ['coal-reserved-checked'], async (bench) => {
    const { control } = await coalesced(bench);
    for (const reserved of [0, 1, 0xffff]) {
      const { name, ok } = await setQueue(control, TRANSMIT, SOME, reserved);
      expect(ok, `${name} with reserved ${hex(reserved)}: expected OK, came ERR`);
      expect(
        (await getQueue(control, TRANSMIT, reserved)).ok,
        `VQ_GET with reserved ${hex(reserved)}: expected OK, came ERR`,
      );
    }
    bench.log('reserved was 0, 1 and 0xffff');
  }),
  untried(
    'CTL-039',
    COALESCING,
    'SHOULD',
    'TX_SET and RX_SET fail when the device cannot change the parameters',
    'no parameters are known that a device cannot have',
  ),
  untried(
    'CTL-040',
    COALESCING,
    'MUST',
    'VQ_SET fails when the device cannot change the parameters',
    'no parameters are known that a device cannot have',
  ),
  must(
    'CTL-041',
    COALESCING,
    'VQ_SET and VQ_GET fail for what is no enabled receive or transmit queue',
    ['coal-any-queue'],
    async (bench) => {
      const { control } = await coalesced(bench);
      for (const reply of [await setQueue(control, NO_QUEUE, SOME), await getQueue(control, NO_QUEUE)]) {
        expect(!reply.ok, `${reply.name}: expected ERR, came OK`);
      }
    },
  ),
  keepsNone('CTL-042', 'A transmit queue that is enabled again has the parameters of TX_SET, or 0', TRANSMIT, 'TX_SET'),
  keepsNone('CTL-043', 'A receive queue that is enabled again has the parameters of RX_SET, or 0', RECEIVE, 'RX_SET'),
  should(
    'CTL-044',
    COALESCING,
    'Suppressed notifications are not sent, even if the conditions are met',
    ['interrupt-flag-ignored'],
    async (bench) => {
      const notified = await notifiedDriver(bench, { control: true, features: [Feature.NOTF_COAL] });
      const parameters = encodeCoalescing({ maxPackets: 1, maxMicroseconds: 1 });
      const control = bench.control(notified.driver);
      const name = 'NOTF_COAL_TX_SET 1 packet, 1 µs';
      await control.done(name, ControlClass.NOTF_COAL, CoalescingCommand.TX_SET, parameters);
      notified.driver.ring(TRANSMIT).suppressInterrupts();
      await expectQuiet(bench, notified, 'that the driver has suppressed');
    },
  ),
  must('CTL-045', COALESCING, 'A reset sets all parameters to 0', ['coal-kept'], async (bench) => {
    const first = await coalesced(bench);
    for (const index of [RECEIVE, TRANSMIT]) {
      const { name, ok } = await setQueue(first.control, index, SOME);
      expect(ok, `${name}: expected OK, came ERR`);
    }
    bench.log('reset');
    const { control } = await coalesced(bench);
    for (const index of [RECEIVE, TRANSMIT]) await expectParameters(control, index, NONE, 'after a reset');
  }),
  must(
    'CTL-046',
    STATISTICS,
    'STATS_QUERY is answered with struct virtio_net_stats_capabilities',
    ['ctrl-refused'],
    async (bench) => {
      const { control } = await counting(bench);
      const room = STATISTICS_CAPABILITIES_LENGTH;
      const result = await control.done('STATS_QUERY', ControlClass.STATS, StatsCommand.QUERY, new Uint8Array(0), room);
      expect(result.length === room, `the result has ${result.length} bytes, not ${room}`);
      const types = getLe(result, 0, 8);
      bench.log(`supported_stats_types 0x${types.toString(16)}`);
      expect(types !== 0, 'supported_stats_types is 0');
    },
  ),
  refuses('CTL-047', 'STATS_GET fails for a vq_index that is out of range', [{ ...RX_BASIC, queue: NO_QUEUE }]),
  refuses('CTL-048', 'STATS_GET fails for types that are not known', [{ queue: RECEIVE, types: [UNKNOWN_TYPE] }]),
  refuses('CTL-049', 'STATS_GET fails for types that the queue does not have', [{ ...TX_BASIC, queue: RECEIVE }]),
  refuses(
    'CTL-050',
    'STATS_GET fails for types whose feature was not negotiated',
    // GUEST_CSUM is none of the features that this driver takes.
    [{ queue: RECEIVE, types: [StatisticsTypes.receiveChecksum.bit] }],
  ),
  refuses('CTL-051', 'STATS_GET fails as a whole for one error', [
    RX_BASIC,
    TX_BASIC,
    { ...RX_BASIC, queue: NO_QUEUE },
  ]),
  must(
    'CTL-052',
    STATISTICS,
    'size, type and vq_index of each reply are set',
    ['stats-header-wrong'],
    async (bench) => {
      const { driver, control } = await counting(bench);
      await driver.transmit(ownFrame(bench));
      const { ok, result } = await request(control, [RX_BASIC, TX_BASIC], 2 * BASIC);
      expect(ok, 'STATS_GET: expected OK, came ERR');
      let at = 0;
      for (const { queue, types } of [RX_BASIC, TX_BASIC]) {
        expect(at + ReplyHeader.length <= result.length, `there is no header at byte ${at} of ${result.length}`);
        const type = result[at + ReplyHeader.type];
        const index = getLe(result, at + ReplyHeader.queue, 2);
        const size = getLe(result, at + ReplyHeader.size, 2);
        bench.log(`reply: type ${type}, vq_index ${index}, size ${size}`);
        expect(type === types[0] && index === queue, `the reply is of type ${type} and queue ${index}`);
        expect(size === BASIC, `size is ${size}, the structure of the type has ${BASIC}`);
        at += size;
      }
    },
  ),
  must(
    'CTL-053',
    STATISTICS,
    'Of a buffer that is too large or too small only the valid bytes are filled',
    ['stats-fills-all'],
    async (bench) => {
      const { control } = await counting(bench);
      for (const room of [1024, 2 * BASIC, BASIC + 3]) {
        const { ok, result } = await request(control, [RX_BASIC, TX_BASIC], room);
        expect(ok, 'STATS_GET: expected OK, came ERR');
        bench.log(`${result.length} bytes of ${room}`);
        expect(result.length <= 2 * BASIC, `${result.length} bytes were filled, ${2 * BASIC} are valid`);
      }
    },
  ),
  untried(
    'CTL-054',
    STATISTICS,
    'MUST',
    'Counters wrap around to zero',
    'a driver cannot make a 64-bit counter overflow in reasonable time',
  ),
];
