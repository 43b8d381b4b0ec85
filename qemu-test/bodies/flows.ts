/**
 * Many flows over all queues of a NIC: datagrams to an echo server that is not ours (a kernel behind a tap) or one that is (`reflect` of the
 * wire). Each must come back once, byte for byte and with its checksum. Which queue it comes by, what its hash is and how the
 * application learns of it are the rows of a matrix.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import {
  Feature,
  type FeatureBit,
  HashReport,
  HashType,
  type IpsecMode,
  type Nic,
  type NicOptions,
  openNic,
  PacketFlag,
} from '../../src/index.ts';
import { RssHash } from '../../src/virtio-net/toeplitz.ts';
import { same } from '../guest/guest.ts';
import { checkAnswer, completeChecksum, datagram, FLOWS, indexOf, isAnswer, type Peer, TOTAL } from './datagrams.ts';
import { poll } from './frames.ts';
import { leaveChecksum, udpFrame } from './packets.ts';
import type { Place } from './place.ts';

/** Datagrams on their way at a time: an echo server has a receive buffer of a few hundred. */
const IN_FLIGHT = 48;
/** Milliseconds between datagrams that are to find their receiver asleep. */
const GAP_MS = 2;
const BURST = 32;
/** Interrupts that a queue must have had that was slept for. */
const FEW = TOTAL / 8;
/** Exchanges after which it must have had them. */
const ATTEMPTS = 3;
const TIMEOUT_MS = 20_000;
/** An application that waits looks this often whether another queue has had the last packet. */
const LOOK_MS = 100;
/** Any 40 bytes will do: the ones of Microsoft's verification suite. */
const RSS_KEY = Buffer.from('6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa', 'hex');
const RSS_TYPES = HashType.IPV4 | HashType.UDPV4;
/** Receive queues by hash; the second one has all packets on the last queue. */
const tables = (pairs: number) => [
  Array.from({ length: 16 }, (_, i) => i % pairs),
  new Array<number>(16).fill(pairs - 1),
];

export type Waiting = 'poll' | 'interrupt' | 'adaptive';

export interface FlowRow {
  readonly ring: 'split' | 'packed';
  readonly pairs: number;
  readonly waiting: Waiting;
}

export const rowName = ({ ring, pairs, waiting }: FlowRow): string =>
  `${ring}, ${pairs === 1 ? 'one queue' : `${pairs} queues`}, ${waiting}`;
export const rssName = (ring: FlowRow['ring']): string => `${ring}, RSS: queue and hash of each packet`;
export const resetName = (ring: FlowRow['ring']): string => `${ring}: a pair is reset, and all flows go on`;

/** The matrix on one function: single and multi-queue, polling and interrupts. */
export function flowRows(ring: FlowRow['ring'], pairs: number): FlowRow[] {
  return [1, pairs].flatMap((n) => (['poll', 'interrupt'] as const).map((waiting) => ({ ring, pairs: n, waiting })));
}

export const flowChecks = (ring: FlowRow['ring'], pairs: number): string[] => [
  ...flowRows(ring, pairs).map(rowName),
  resetName(ring),
  rssName(ring),
];

export interface FlowSetup {
  readonly ring: FlowRow['ring'];
  /** Queue pairs of the device. */
  readonly pairs: number;
  readonly peer: Peer;
  /** Must be negotiated in every row. */
  readonly features: readonly FeatureBit[];
  /** No packet is under an SA; but a function that could makes headers longer. Default `off`. */
  readonly ipsec?: IpsecMode;
}

/** All rows of the matrix for one ring format. */
export async function flowBody(place: Place, setup: FlowSetup): Promise<void> {
  const { ring, pairs, peer } = setup;
  await using rows = new OpenRows(place, setup);
  for (const row of flowRows(ring, pairs)) {
    const passed = await place.check(rowName(row), async () => {
      const nic = await rows.withPairs(row.pairs);
      for (let attempt = 1; ; attempt++) {
        const before = interruptsOf(place, row.pairs);
        const received = await exchangeFlows(nic, peer, row.waiting);
        const interrupts = interruptsOf(place, row.pairs).map((n, i) => n - before[i]);
        const perQueue = countByQueue(received, row.pairs);
        // Which flow comes by which queue is the device's affair, as long as it uses all of them.
        if (perQueue.some((n) => n === 0)) throw new Error(`packets by queue: ${perQueue.join(', ')}`);
        const isFew = row.waiting === 'interrupt' && interrupts.some((n) => n < FEW);
        if (!isFew) return `${perQueue.join(' + ')} packets, ${interrupts.join(' + ')} interrupts`;
        // On a machine with too little time packets come all at once.
        if (attempt === ATTEMPTS) throw new Error(`interrupts: ${interrupts}`);
      }
    });
    // What is on its way yet is none of the next row's.
    if (!passed) await rows.close();
  }
  await place.check(resetName(ring), async () => {
    const nic = await rows.withPairs(pairs);
    await exchangeFlows(nic, peer, 'poll');
    await nic.queues[pairs - 1].reset();
    const perQueue = countByQueue(await exchangeFlows(nic, peer, 'interrupt'), pairs);
    if (perQueue.some((n) => n === 0)) throw new Error(`packets by queue: ${perQueue.join(', ')}`);
    return `${perQueue.join(' + ')} packets`;
  });
  await rows.close();
  await place.check(rssName(ring), () => rss(place, setup));
}

/** Keeps the NIC of a row for the next one, if that has as many queues: to open one takes a guest longer than a row. */
class OpenRows implements AsyncDisposable {
  readonly #place: Place;
  readonly #setup: FlowSetup;
  #nic: Nic | null = null;

  constructor(place: Place, setup: FlowSetup) {
    this.#place = place;
    this.#setup = setup;
  }

  async withPairs(pairs: number): Promise<Nic> {
    if (this.#nic?.queues.length === pairs && this.#nic.broken === null) return this.#nic;
    await this.close();
    this.#nic = await openRow(this.#place, this.#setup, pairs, {});
    return this.#nic;
  }

  async close(): Promise<void> {
    await this.#nic?.close();
    this.#nic = null;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** With receive-side scaling each packet comes by the queue that the table has for its hash, and the device's hash is ours. */
async function rss(place: Place, setup: FlowSetup): Promise<string> {
  await using nic = await openRow(place, setup, setup.pairs, { rss: true, hashReport: true });
  if (!nic.features.hasAll(Feature.RSS, Feature.HASH_REPORT)) throw new Error('RSS is not negotiated');
  const hash = new RssHash();
  hash.configure(RSS_TYPES, RSS_KEY);
  const counts: string[] = [];
  for (const indirectionTable of tables(setup.pairs)) {
    const config = { hashTypes: RSS_TYPES, key: RSS_KEY, unclassifiedQueue: 0, maxTransmitQueues: setup.pairs };
    await nic.control?.setRss({ ...config, indirectionTable });
    const received = await exchangeFlows(nic, setup.peer, 'interrupt');
    for (const { frame, queue, report, value } of received) {
      hash.hash(frame, 0, frame.length);
      same('hash and its type', [value, report], [hash.value, HashReport.UDPV4]);
      same('queue', queue, indirectionTable[hash.value & (indirectionTable.length - 1)]);
    }
    counts.push(countByQueue(received, setup.pairs).join(' + '));
  }
  return `${counts.join(', then ')} packets`;
}

/** Opens the NIC with every offload there is. */
async function openRow(place: Place, setup: FlowSetup, queuePairs: number, more: NicOptions['offloads']): Promise<Nic> {
  const offloads = { largeReceive: true, macFilter: true, vlanFilter: true, ...more };
  const nic = await openNic(place.address, { queuePairs, ring: setup.ring, ipsec: setup.ipsec ?? 'off', offloads });
  const features = [...setup.features, ...(queuePairs > 1 ? [Feature.MQ] : [])];
  const ring = nic.features.has(Feature.RING_PACKED) ? 'packed' : 'split';
  if (ring === setup.ring && nic.features.hasAll(...features)) return nic;
  const negotiated = nic.features.names().join(' ');
  await nic.close();
  throw new Error(`negotiated ${negotiated}`);
}

interface Received {
  readonly frame: Uint8Array;
  readonly queue: number;
  readonly report: number;
  readonly value: number;
}

/** Sends all datagrams, each by the queue of its flow, and receives all answers; throws when one differs, or does not come. */
export async function exchangeFlows(nic: Nic, peer: Peer, waiting: Waiting): Promise<Received[]> {
  const sender = new Sender(nic, peer);
  const received: Received[] = [];
  const missing = new Set(Array.from({ length: TOTAL }, (_, i) => i));
  const step = (queue: number) => {
    if (nic.broken !== null) throw nic.broken;
    for (const got of takeBurst(nic, queue)) {
      const index = indexOf(got.frame);
      if (!missing.delete(index)) throw new Error(`datagram ${index} came twice, or was never sent`);
      checkAnswer(got.frame, datagram(nic, peer, index));
      received.push(got);
    }
    return missing.size === 0;
  };
  const queues = nic.queues.keys();
  if (waiting === 'poll') {
    const all = [...queues];
    const round = () => {
      sender.send(received.length + IN_FLIGHT);
      return all.filter(step).length > 0;
    };
    await poll(round, TIMEOUT_MS, 'the echo of all datagrams');
    return received;
  }
  const deadline = performance.now() + TIMEOUT_MS;
  const wait = async (queue: number) => {
    const { rx } = nic.queues[queue];
    rx.policy = waiting;
    while (!step(queue)) {
      await rx.wait(LOOK_MS);
      if (performance.now() > deadline) throw new Error(`${missing.size} of ${TOTAL} datagrams did not come back`);
    }
  };
  const feed = async () => {
    for (let sent = 1; missing.size > 0 && performance.now() < deadline; sent++) {
      sender.send(sent);
      await sleep(GAP_MS);
    }
  };
  await Promise.all([feed(), ...[...queues].map(wait)]);
  return received;
}

class Sender {
  readonly #nic: Nic;
  readonly #peer: Peer;
  readonly #one = new Uint32Array(1);
  #sent = 0;

  constructor(nic: Nic, peer: Peer) {
    this.#nic = nic;
    this.#peer = peer;
  }

  /** Sends until `limit` datagrams, or all, have been sent, or a ring is full. */
  send(limit: number): void {
    const { packets, queues } = this.#nic;
    for (const { tx } of queues) tx.reclaim();
    while (this.#sent < Math.min(limit, TOTAL) && packets.allocate(this.#one, 1) === 1) {
      const [p] = this.#one;
      const index = this.#sent;
      const frame = udpFrame(datagram(this.#nic, this.#peer, index));
      // Every other one leaves its checksum to the device.
      const left = index % 2 === 0 && this.#nic.features.has(Feature.CSUM) ? leaveChecksum(frame) : null;
      packets.write(p, frame);
      if (left !== null) {
        packets.flags[p] = PacketFlag.needsChecksum;
        packets.checksumStart[p] = left.start;
        packets.checksumOffset[p] = left.offset;
      }
      if (queues[(index % FLOWS) % queues.length].tx.burst(this.#one, 1) === 0) {
        packets.free(this.#one, 1);
        return;
      }
      this.#sent++;
    }
  }
}

function takeBurst(nic: Nic, queue: number): Received[] {
  const { packets } = nic;
  const burst = new Uint32Array(BURST);
  const n = nic.queues[queue].rx.burst(burst, BURST);
  const taken: Received[] = [];
  for (let i = 0; i < n; i++) {
    const p = burst[i];
    const frame = packets.readChain(p);
    if (!isAnswer(frame)) continue;
    completeChecksum(packets, p, frame);
    taken.push({ frame, queue, report: packets.hashReport[p], value: packets.hash[p] });
  }
  packets.freeChains(burst, n);
  return taken;
}

function countByQueue(received: readonly Received[], pairs: number): number[] {
  return Array.from({ length: pairs }, (_, queue) => received.filter((got) => got.queue === queue).length);
}

function interruptsOf(place: Place, pairs: number): number[] {
  // Where nobody counts, it cannot be said.
  return Array.from({ length: pairs }, (_, pair) => place.interrupts?.(pair) ?? Number.NaN);
}
