/** Control commands that say where packets are received: multiqueue, hashes, receive-side scaling (Virtio 1.4, 5.1.9.5.6 to 5.1.9.5.8, 5.1.9.4.3). */
import { EtherType } from '../../packet/fields.ts';
import { Feature } from '../../virtio/features.ts';
import { NetConfigField } from '../../virtio-net/config.ts';
import {
  ControlClass,
  encodeHashConfig,
  encodeRssConfig,
  HashType,
  MqCommand,
  putLe,
  type RssConfig,
} from '../../virtio-net/control-wire.ts';
import { RssHash } from '../../virtio-net/toeplitz.ts';
import type { Bench, UpOptions } from '../bench.ts';
import { type Check, expect, hex, must, need, should, Untestable, untried } from '../check.ts';
import { arrivalQueue, type Controlled, controlled, delivered } from '../delivery.ts';
import type { Received } from '../driver.ts';
import { ipInIpFrame, otherFrame, udpFrame } from '../frames.ts';
import { resetQueue } from './queue-reset.ts';

const STEERING = '5.1.9.5.6';
const STEERING_DEVICE = '5.1.9.5.6.2';
const RSS = '5.1.9.5.7.3';
const INNER = '5.1.9.4.3.4';
/** Classes and commands of features that the driver of this project does not use (5.1.9.4.3, 5.1.9.5.8). */
const HASH_TUNNEL_SET = [7, 0] as const;
const RSS_CONTEXT_CAP_GET = [9, 0] as const;
/** Bytes of the key that each device must take (5.1.4.1). */
const KEY = Uint8Array.from({ length: 40 }, (_, i) => i * 37 + 11);
const TYPES = HashType.IPV4 | HashType.UDPV4;
/** Ports of flows: as many as it takes until one of two queues is not hit by chance alone. */
const FLOWS = Array.from({ length: 12 }, (_, i) => 5000 + 17 * i);

/** Two queue pairs, not used by the device before it is told to. */
const TWO: UpOptions = { pairs: 2, rx: { count: 24 } };

async function setPairs({ control }: Controlled, pairs: number): Promise<void> {
  const data = Uint8Array.of(pairs, pairs >>> 8);
  await control.done(`VQ_PAIRS_SET ${pairs}`, ControlClass.MQ, MqCommand.VQ_PAIRS_SET, data);
}

/** Two queue pairs with automatic steering, and a peer: what comes back over a loopback is a flow that was transmitted. */
async function steered(bench: Bench, features: readonly number[] = []): Promise<Controlled> {
  if (bench.peer === null)
    throw new Untestable('needs a peer function (--peer): a loopback steers by what it transmits');
  return await controlled(bench, { ...TWO, features: [Feature.MQ, ...features] });
}

/** Sends packets of some flows to the device; the queues in which they arrive. */
async function queuesOf(all: Controlled): Promise<number[]> {
  const queues: number[] = [];
  for (const sourcePort of FLOWS) {
    queues.push((await arrivalQueue(all, udpFrame({ ...all.network.inward, sourcePort }))).queue);
  }
  return queues;
}

/** The hash that the standard asks for. */
function hashOf(frame: Uint8Array, types: number): RssHash {
  const hash = new RssHash();
  hash.configure(types, KEY);
  hash.hash(frame, 0, frame.length);
  return hash;
}

/** Hash types that a check can use. */
function hashTypes(bench: Bench): number {
  const supported = bench.target.structures.device.read32(NetConfigField.supportedHashTypes);
  const types = supported & TYPES;
  need(types !== 0, `the device hashes neither IPv4 nor UDP over IPv4: supported_hash_types is ${hex(supported)}`);
  return types;
}

/** A device that hashes, and reports the hash. */
async function hashing(
  bench: Bench,
  features: readonly number[] = [],
): Promise<Controlled & { readonly types: number }> {
  const all = await controlled(bench, { features: [Feature.HASH_REPORT, ...features] });
  const types = hashTypes(bench);
  const data = encodeHashConfig({ hashTypes: types, key: KEY });
  await all.control.done('HASH_CONFIG', ControlClass.MQ, MqCommand.HASH_CONFIG, data);
  return { ...all, types };
}

function expectHash(bench: Bench, { header }: Received, frame: Uint8Array, types: number, what: string): void {
  const { report, value } = hashOf(frame, types);
  bench.log(`${what}: hash_report ${header.hashReport}, hash_value ${hex(header.hashValue, 8)}`);
  expect(header.hashReport === report, `${what}: hash_report is ${header.hashReport}, not ${report}`);
  expect(header.hashValue === value, `${what}: hash_value is ${hex(header.hashValue, 8)}, not ${hex(value, 8)}`);
}

/** A device with two queue pairs and receive-side scaling. */
async function scaled(
  bench: Bench,
  config: Partial<RssConfig> = {},
  features: readonly number[] = [],
): Promise<Controlled & { readonly config: RssConfig }> {
  const all = await controlled(bench, { ...TWO, features: [Feature.RSS, ...features] });
  const full: RssConfig = {
    hashTypes: hashTypes(bench),
    unclassifiedQueue: 0,
    indirectionTable: [0, 1, 1, 0, 1, 0, 0, 1],
    maxTransmitQueues: 2,
    key: KEY,
    ...config,
  };
  const name = `RSS_CONFIG with table ${full.indirectionTable.join(' ')}, unclassified ${full.unclassifiedQueue}`;
  await all.control.done(name, ControlClass.MQ, MqCommand.RSS_CONFIG, encodeRssConfig(full));
  return { ...all, config: full };
}

export const controlSteeringChecks: readonly Check[] = [
  should(
    'CTL-023',
    STEERING,
    'A flow is received in the queue of the pair on which it was transmitted last',
    ['mq-flow-forgotten'],
    async (bench) => {
      const all = await steered(bench);
      await setPairs(all, 2);
      const { driver, network } = all;
      for (const [i, port] of FLOWS.entries()) {
        const pair = i % 2;
        const ports = { sourcePort: port, destinationPort: 7 };
        await driver.transmit(udpFrame({ ...network.outward, ...ports }), { queue: 2 * pair + 1 });
        await network.departure('a packet');
        // The other side answers.
        const { queue } = await arrivalQueue(all, udpFrame({ ...network.inward, ...ports }));
        expect(queue === 2 * pair, `a flow transmitted on transmitq${pair + 1} was received in queue ${queue}`);
      }
      bench.log(`${FLOWS.length} flows were received in the pair on which they had been transmitted`);
    },
  ),
  must(
    'CTL-024',
    STEERING_DEVICE,
    'After reset, packets are received in receiveq1 only',
    ['mq-early'],
    async (bench) => {
      const queues = await queuesOf(await steered(bench));
      bench.log(`packets of ${queues.length} flows were received in queues ${queues.join(' ')}`);
      expect(
        queues.every((queue) => queue === 0),
        `before any command, packets were received in queues ${queues.join(' ')}`,
      );
    },
  ),
  must(
    'CTL-025',
    STEERING_DEVICE,
    'Once VQ_PAIRS_SET is used, packets are received in the first virtqueue_pairs queues only',
    ['mq-never-fewer'],
    async (bench) => {
      const all = await steered(bench);
      await setPairs(all, 2);
      const before = await queuesOf(all);
      bench.log(`with two pairs, packets were received in queues ${before.join(' ')}`);
      await setPairs(all, 1);
      const after = await queuesOf(all);
      bench.log(`with one pair, packets were received in queues ${after.join(' ')}`);
      expect(
        after.every((queue) => queue === 0),
        `with one pair, packets were received in queues ${after.join(' ')}`,
      );
    },
  ),
  should(
    'CTL-026',
    STEERING_DEVICE,
    'A packet whose receive queue is reset is received in another',
    ['mq-reset-queue-drops'],
    async (bench) => {
      const all = await steered(bench, [Feature.RING_RESET]);
      await setPairs(all, 2);
      const last = FLOWS.length - 1;
      const flows = FLOWS.map((sourcePort) => udpFrame({ ...all.network.inward, sourcePort }));
      await resetQueue(bench, 2);
      all.driver.forget(2);
      const came = await delivered(all, flows.slice(0, last), flows[last]);
      expect(!came.includes(false), 'packets of some flows did not arrive');
      bench.log(`packets of all ${flows.length} flows arrived in the queue that is left`);
    },
  ),
  must(
    'CTL-027',
    STEERING_DEVICE,
    'While all receive queues are reset, packets are dropped',
    ['queue-reset-half'],
    async (bench) => {
      const all = await controlled(bench, { features: [Feature.RING_RESET] });
      const ring = all.driver.ring(0);
      await resetQueue(bench, 0);
      await all.network.inject(udpFrame(all.network.inward));
      await bench.never(() => ring.pending > 0, 'a packet was put into a buffer of a queue that was reset');
      all.driver.forget(0);
      all.driver.addQueue(0);
      all.driver.fill(0);
      const again = all.driver.ring(0);
      await bench.never(() => again.pending > 0, 'a packet that came while the queue was reset was received later');
      bench.log('a packet that came while the queue was reset was not received, then or later');
    },
  ),
  must('CTL-028', '5.1.9.5.6.4', 'With HASH_REPORT, HASH_CONFIG is supported', ['ctrl-refused'], async (bench) => {
    await hashing(bench);
  }),
  must('CTL-029', '5.1.9.4.4', 'hash_report and hash_value are those of the packet', ['hash-wrong'], async (bench) => {
    const all = await hashing(bench);
    for (const sourcePort of FLOWS.slice(0, 3)) {
      const frame = udpFrame({ ...all.network.inward, sourcePort });
      expectHash(bench, await arrivalQueue(all, frame), frame, all.types, `UDP port ${sourcePort}`);
    }
    const other = otherFrame(all.network.inward, EtherType.arp);
    expectHash(bench, await arrivalQueue(all, other), other, all.types, 'a packet that is not IP');
  }),
  must(
    'CTL-030',
    RSS,
    'With RSS, a packet is received in the queue that its hash leads to in the indirection table',
    ['rss-table-zero'],
    async (bench) => {
      const all = await scaled(bench);
      const { hashTypes: types, indirectionTable: table } = all.config;
      for (const sourcePort of FLOWS) {
        const frame = udpFrame({ ...all.network.inward, sourcePort });
        const entry = hashOf(frame, types).value & (table.length - 1);
        const { queue } = await arrivalQueue(all, frame);
        bench.log(`UDP port ${sourcePort}: entry ${entry}, received in queue ${queue}`);
        expect(
          queue === 2 * table[entry],
          `entry ${entry} names receiveq${table[entry] + 1}, the packet came in queue ${queue}`,
        );
      }
    },
  ),
  must(
    'CTL-031',
    RSS,
    'With RSS, a packet without a hash is received in unclassified_queue',
    ['rss-unclassified-ignored'],
    async (bench) => {
      for (const unclassifiedQueue of [1, 0]) {
        const all = await scaled(bench, { unclassifiedQueue });
        const { queue } = await arrivalQueue(all, otherFrame(all.network.inward, EtherType.arp));
        bench.log(`unclassified_queue ${unclassifiedQueue}: received in queue ${queue}`);
        expect(queue === 2 * unclassifiedQueue, `the packet was received in queue ${queue}`);
      }
    },
  ),
  must(
    'CTL-032',
    RSS,
    'With RSS, a packet whose receive queue is reset is dropped',
    ['flow-reset-queue-steers'],
    async (bench) => {
      const all = await scaled(bench, { unclassifiedQueue: 0, indirectionTable: [1, 1] }, [Feature.RING_RESET]);
      await resetQueue(bench, 2);
      all.driver.forget(2);
      const { inward } = all.network;
      const [came] = await delivered(all, [udpFrame(inward)], otherFrame(inward, EtherType.arp));
      expect(!came, 'the packet was received in another queue');
      bench.log('a packet whose entry names the queue was not received');
    },
  ),
  must(
    'CTL-033',
    '5.1.9.5.8.3',
    'With RSS_CONTEXT, max_rss_contexts is at least 1',
    ['rss-contexts-none'],
    async (bench) => {
      const features = [Feature.RSS_CONTEXT, Feature.RSS];
      const control = bench.control(await bench.up({ control: true, features }));
      const result = await control.done('RSS_CTX_CTRL_CAP_GET', ...RSS_CONTEXT_CAP_GET, new Uint8Array(0), 2);
      expect(result.length === 2, `the result has ${result.length} bytes, not 2`);
      const contexts = result[0] | (result[1] << 8);
      bench.log(`max_rss_contexts ${contexts}`);
      expect(contexts >= 1, `max_rss_contexts is ${contexts}`);
    },
  ),
  untried(
    'CTL-034',
    '5.1.9.5.8.3',
    'MUST',
    'A reset clears all RSS contexts',
    'no command tells which contexts there are, and what a device answers to MOD of one that is not there is not said',
  ),
  must(
    'CTL-035',
    INNER,
    'With HASH_TUNNEL, a packet that is in no enabled tunnel has the hash of its outer header',
    ['hash-tunnel-any+hash-wrong'],
    async (bench) => {
      const all = await hashing(bench, [Feature.HASH_TUNNEL]);
      const supported = bench.target.structures.device.read32(NetConfigField.supportedTunnelTypes);
      await setTunnels(all, supported);
      const frame = udpFrame(all.network.inward);
      expectHash(bench, await arrivalQueue(all, frame), frame, all.types, 'a packet in no tunnel');
    },
  ),
  should(
    'CTL-036',
    INNER,
    'HASH_TUNNEL_SET with a tunnel type that is not supported fails',
    ['hash-tunnel-any'],
    async (bench) => {
      const all = await hashing(bench, [Feature.HASH_TUNNEL]);
      const supported = bench.target.structures.device.read32(NetConfigField.supportedTunnelTypes);
      const strange = (~supported & -~supported) >>> 0;
      need(strange !== 0, 'the device supports all 32 tunnel types');
      const { ok } = await all.control.send(`HASH_TUNNEL_SET ${hex(strange)}`, ...HASH_TUNNEL_SET, le32(strange));
      expect(!ok, `tunnel type ${hex(strange)} is not in supported_tunnel_types ${hex(supported)}, and was accepted`);
    },
  ),
  must(
    'CTL-037',
    INNER,
    'With enabled_tunnel_types 0, packets in tunnels have the hash of their outer headers',
    ['hash-tunnel-any+hash-wrong'],
    async (bench) => {
      const all = await hashing(bench, [Feature.HASH_TUNNEL]);
      const supported = bench.target.structures.device.read32(NetConfigField.supportedTunnelTypes);
      if (supported !== 0) await setTunnels(all, supported);
      await setTunnels(all, 0);
      const frame = ipInIpFrame(all.network.inward);
      expectHash(bench, await arrivalQueue(all, frame), frame, all.types, 'a packet in an IP tunnel');
    },
  ),
];

function le32(value: number): Uint8Array {
  const bytes = new Uint8Array(4);
  putLe(bytes, 0, 4, value);
  return bytes;
}

async function setTunnels({ control }: Controlled, types: number): Promise<void> {
  await control.done(`HASH_TUNNEL_SET ${hex(types)}`, ...HASH_TUNNEL_SET, le32(types));
}
