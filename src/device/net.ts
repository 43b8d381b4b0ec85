/**
 * The network device behind a virtio function (Virtio 1.4, 5.1): its virtqueues, configuration, and what it does in a
 * turn of the event loop.
 */

import { verdictNames } from '../fallback/verdict.ts';
import type { IpsecWire } from '../ipsec/wire/codec.ts';
import { Feature, FeatureSet, unmetRequirements } from '../virtio/features.ts';
import type { WireRevision } from '../virtio/revision.ts';
import type { HashConfig, RssConfig } from '../virtio-net/control-wire.ts';
import { netHeaderLayout } from '../virtio-net/header.ts';
import { SUPPORTED_HASH_TYPES, TOEPLITZ_KEY_LENGTH } from '../virtio-net/toeplitz.ts';
import { AdminProcessor } from './admin.ts';
import type { Arena } from './arena.ts';
import { CapabilityTable } from './capabilities.ts';
import { Coalescer } from './coalescer.ts';
import { ControlProcessor, type ControlTarget } from './control.ts';
import { makeNetCounters, NetCounter, readNetCounters } from './counters.ts';
import { FlowFilter } from './flow-filter.ts';
import type { FramePool } from './frame-pool.ts';
import type { DeviceModel, VirtioFunction } from './function.ts';
import { DeviceIpsec } from './ipsec.ts';
import type { Link } from './links/link.ts';
import { NetConfig, RSS_TABLE_LENGTH } from './net-config.ts';
import { QueueStatistics, Stat } from './queue-statistics.ts';
import type { DeviceQueue } from './queues.ts';
import { Receiver } from './receive.ts';
import { RssContexts } from './rss-contexts.ts';
import { ReceiveFilter } from './rx-filter.ts';
import { Steering } from './steering.ts';
import { Transmitter } from './transmit.ts';

export interface NetDeviceOptions {
  readonly arena: Arena;
  readonly pool: FramePool;
  readonly queuePairs: number;
  /** 6 bytes. */
  readonly mac: Uint8Array;
  readonly mtu: number;
  /** Bytes of the largest frame that is sent. */
  readonly maxFrame: number;
  readonly offered: FeatureSet;
  readonly required: FeatureSet;
  readonly revision: WireRevision;
  /** Null for a function without IPsec. */
  readonly wire: IpsecWire | null;
  readonly link: Link;
  readonly wake: () => void;
}

/** Mbit/s, as the configuration says. */
const SPEED = 40000;
/** Virtqueues of a pair (5.1.2): receive, then transmit. */
const PAIR = 2;

export class NetDevice implements DeviceModel {
  readonly counters = makeNetCounters();
  readonly #function: VirtioFunction;
  readonly #options: NetDeviceOptions;
  readonly #config: NetConfig;
  readonly #ipsec: DeviceIpsec | null;
  readonly #flowFilter: FlowFilter | null;
  /** Executes administration commands; null without IPsec. */
  readonly admin: AdminProcessor | null;
  readonly #control: ControlProcessor;
  readonly #steering: Steering;
  readonly #filter: ReceiveFilter;
  readonly #rssContexts = new RssContexts((config) => this.#isRssConfig(config));
  readonly #coalescer: Coalescer;
  readonly #statistics: QueueStatistics;
  readonly #receiver: Receiver;
  readonly #transmitter: Transmitter;
  /** By virtqueue index, administration last. */
  readonly #queues: (DeviceQueue | null)[];
  readonly #adminIndex: number;
  #controlIndex = -1;
  #features: FeatureSet | null = null;

  constructor(fn: VirtioFunction, options: NetDeviceOptions) {
    const { arena, pool, queuePairs, wire, link } = options;
    const { faults } = fn;
    this.#function = fn;
    this.#options = options;
    this.#config = new NetConfig({ ...options, speed: SPEED }, options.offered);
    this.#adminIndex = fn.common.adminQueueIndex;
    this.#queues = new Array<DeviceQueue | null>(fn.common.queues.length).fill(null);
    this.#ipsec = wire === null ? null : new DeviceIpsec(pool, wire);
    this.#flowFilter = wire === null ? null : new FlowFilter(faults);
    this.#steering = new Steering(queuePairs, faults);
    this.#filter = new ReceiveFilter(faults);
    this.#coalescer = new Coalescer(PAIR * queuePairs, (index) => this.#interrupt(index), faults);
    this.#statistics = new QueueStatistics(this.#queues.length);
    this.#control = new ControlProcessor(arena, this.#controlTarget());
    const { counters } = this;
    const statistics = this.#statistics;
    const shared = { pool, ipsec: this.#ipsec, counters, steering: this.#steering, statistics, faults };
    this.#receiver = new Receiver(
      {
        ...shared,
        memory: fn.memory,
        isOutside: link.isOutside,
        flowFilter: this.#flowFilter,
        receiveFilter: this.#filter,
        mtu: options.mtu,
        isLive: () => fn.isLive,
        wake: options.wake,
      },
      queuePairs,
    );
    this.#transmitter = new Transmitter({ ...shared, memory: fn.memory, arena, link, maxFrame: options.maxFrame });
    this.admin =
      wire === null || this.#ipsec === null || this.#flowFilter === null
        ? null
        : new AdminProcessor({
            arena,
            revision: options.revision,
            capabilities: new CapabilityTable(wire, faults),
            flowFilter: this.#flowFilter,
            ipsec: this.#ipsec,
            faults,
            isReceiveQueue: (index) => index % PAIR === 0 && index < PAIR * queuePairs,
            fail: (reason) => fn.fail(reason),
          });
    link.attach(this.#receiver, () => this.#linkChanged(), options.wake);
    this.#config.linkUp = link.up;
  }

  /** Set while frames wait for room in the link: the event loop must look again soon. */
  get blocked(): boolean {
    return this.#transmitter.blocked;
  }

  /** Counters for the user. */
  statistics(): Record<string, unknown> {
    const verdicts = (counts: Float64Array) =>
      Object.fromEntries(verdictNames.map((name, i) => [name, counts[i]]).filter(([, count]) => count !== 0));
    return {
      ...readNetCounters(this.counters),
      violations: this.#function.common.violations,
      failure: this.#function.failure,
      ...(this.#ipsec === null
        ? {}
        : { protect: verdicts(this.#ipsec.protectedBy), unprotect: verdicts(this.#ipsec.unprotectedBy) }),
    };
  }

  acceptsFeatures(features: FeatureSet): boolean {
    return this.#options.required.minus(features).isEmpty && unmetRequirements(features).isEmpty;
  }

  start(features: FeatureSet): void {
    this.#features = features;
    const layout = netHeaderLayout(features, this.#options.revision);
    this.#receiver.start(layout, features);
    this.#transmitter.start(layout, features);
    this.#filter.start(features, this.#config.mac);
    const hasControl = features.has(Feature.CTRL_VQ);
    // "N=1 if neither VIRTIO_NET_F_MQ nor VIRTIO_NET_F_RSS are negotiated" (5.1.2).
    this.#controlIndex = hasControl
      ? PAIR * (features.hasAny(Feature.MQ, Feature.RSS) ? this.#options.queuePairs : 1)
      : -1;
    for (let pair = 0; pair < this.#options.queuePairs; pair++) {
      const index = PAIR * pair;
      this.#receiver.attach(pair, index === this.#controlIndex ? null : this.#queues[index]);
    }
    // The event loop is about to look anyway.
    this.suppress();
    if (this.#function.faults.has('announce-sticks')) this.announce();
    if (this.#function.faults.has('dies-after-start')) setTimeout(() => process.kill(process.pid, 'SIGKILL'), 50);
  }

  stop(): void {
    this.#features = null;
    this.#controlIndex = -1;
    this.#receiver.stop();
    this.#transmitter.stop();
    this.#steering.clear();
    this.#rssContexts.clear();
    this.#coalescer.clear();
    this.#statistics.clear();
    this.#config.mac = this.#options.mac;
    this.#config.announce = false;
    this.admin?.clear();
  }

  close(): void {
    this.stop();
    this.admin?.close();
    this.#control.close();
    this.#transmitter.close();
    this.#ipsec?.close();
    this.#options.link.close();
  }

  /** A notification of the driver for queue `index`. */
  notified(index: number): void {
    if (index < this.#queues.length) this.#statistics.add(index, Stat.notifications, 1);
  }

  /** Asks the driver to announce its addresses, when it can (5.1.9.5.4). */
  announce(): void {
    if (this.#features?.has(Feature.GUEST_ANNOUNCE) !== true) return;
    this.#config.announce = true;
    this.#function.configChanged();
  }

  attachQueue(queue: DeviceQueue): void {
    this.#coalescer.forget(queue.index);
    this.#queues[queue.index]?.close();
    this.#queues[queue.index] = queue;
    if (this.#isReceive(queue.index)) this.#steering.setUsable(queue.index / PAIR, true);
    if (this.#features !== null && this.#isReceive(queue.index)) this.#receiver.attach(queue.index / PAIR, queue);
  }

  detachQueue(index: number): void {
    this.#coalescer.forget(index);
    this.#queues[index]?.close();
    this.#queues[index] = null;
    if (!this.#isReceive(index)) return;
    this.#steering.setUsable(index / PAIR, false);
    this.#receiver.attach(index / PAIR, null);
  }

  readConfig(offset: number, width: number): number {
    return this.#config.read(offset, width);
  }

  /** hot: does what there is to do; returns how many buffers and frames that was. */
  poll(): number {
    if (this.#features === null || !this.#function.isLive) return 0;
    this.#transmitter.blocked = false;
    let work = this.#pollCommands();
    for (let pair = 0; pair < this.#steering.pairs; pair++) {
      const tx = this.#queues[PAIR * pair + 1];
      if (tx !== null && tx.index !== this.#controlIndex) work += this.#finish(tx, this.#transmitter.poll(tx, pair));
    }
    for (let pair = 0; pair < this.#options.queuePairs; pair++) {
      const rx = this.#queues[PAIR * pair];
      if (rx !== null && rx.index !== this.#controlIndex) work += this.#finish(rx, this.#receiver.poll(pair));
    }
    this.#coalescer.expire(false);
    const { faults } = this.#function;
    if (faults.size > 0) this.#misbehave();
    return work;
  }

  /** hot: administration and control commands. */
  #pollCommands(): number {
    let work = 0;
    if (this.admin !== null) {
      for (let index = this.#adminIndex; index < this.#queues.length; index++) {
        const queue = this.#queues[index];
        if (queue !== null) work += this.#finish(queue, this.admin.poll(queue));
      }
    }
    const control = this.#controlIndex < 0 ? null : this.#queues[this.#controlIndex];
    if (control !== null) work += this.#finish(control, this.#control.poll(control));
    return work;
  }

  /** hot: shows what was done to a queue, notifies, and fails the function when the queue is broken. */
  #finish(queue: DeviceQueue, work: number): number {
    const wanted = queue.publish();
    if (queue.index < PAIR * this.#options.queuePairs && queue.index !== this.#controlIndex) {
      if (work > 0 || wanted) this.#coalescer.used(queue.index, work, wanted);
    } else if (wanted) {
      this.#interrupt(queue.index);
    }
    if (queue.broken !== null) this.#function.fail(queue.broken);
    return work;
  }

  /** hot: a used buffer notification. */
  #interrupt(index: number): void {
    this.#statistics.add(index, Stat.interrupts, 1);
    this.#function.interruptQueue(index);
  }

  /** Asks the driver not to notify: we look anyway. */
  suppress(): void {
    for (const queue of this.#queues) queue?.suppress();
  }

  /** Asks the driver to notify of what we would not see while asleep; true when there is something already. */
  arm(): boolean {
    if (this.#features === null || !this.#function.isLive) return false;
    let ready = false;
    this.#coalescer.expire(true);
    for (const [index, queue] of this.#queues.entries()) {
      if (queue === null) continue;
      if (this.#isReceive(index)) {
        // New receive buffers matter only when frames wait for them, and those that are too few for a frame do not
        // count.
        const pair = index / PAIR;
        if (this.#receiver.waiting(pair) > 0 && queue.arm(this.#receiver.tooFew(pair))) ready = true;
      } else if (this.#isServed(index) && queue.arm(0) && !this.blocked) {
        ready = true;
      }
    }
    return ready;
  }

  /** False for transmit queues that the driver said it would not use: what it puts there waits until they are, and keeps nobody awake. */
  #isServed(index: number): boolean {
    return (
      index >= PAIR * this.#options.queuePairs || index === this.#controlIndex || index < PAIR * this.#steering.pairs
    );
  }

  #isReceive(index: number): boolean {
    return index < PAIR * this.#options.queuePairs && index % PAIR === 0 && index !== this.#controlIndex;
  }

  /** What control commands change. */
  #controlTarget(): ControlTarget {
    const device = this;
    return {
      filter: this.#filter,
      coalescer: this.#coalescer,
      statistics: this.#statistics,
      faults: this.#function.faults,
      get features() {
        return device.#features ?? FeatureSet.empty;
      },
      // The control queue stands behind them.
      get dataQueues() {
        return device.#controlIndex;
      },
      isEnabled: (queue) => this.#queues[queue] !== null,
      setPairs: (pairs) => {
        if (pairs < 1 || pairs > this.#options.queuePairs) return false;
        this.#steering.pairs = pairs;
        return true;
      },
      rssContexts: this.#rssContexts,
      setRss: (config) => {
        if (!this.#isRssConfig(config)) return false;
        this.#steering.setRss(config);
        return true;
      },
      setHash: (config) => {
        if (isHashConfig(config)) this.#steering.setHash(config);
        return isHashConfig(config);
      },
      setMac: (mac) => {
        this.#filter.mac = mac;
        if (this.#features?.has(Feature.MAC) === true) this.#config.mac = mac;
      },
      announced: () => {
        this.#config.announce = false;
      },
      setOffloads: (active) => this.#receiver.setOffloads(active),
    };
  }

  /** Whether receive-side scaling can be configured so. */
  #isRssConfig(config: RssConfig): boolean {
    const isPair = (pair: number) => pair < this.#options.queuePairs && this.#queues[PAIR * pair] !== null;
    const { indirectionTable, unclassifiedQueue, maxTransmitQueues } = config;
    if (!isHashConfig(config) || indirectionTable.length > RSS_TABLE_LENGTH) return false;
    if (!isPair(unclassifiedQueue) || !indirectionTable.every(isPair)) return false;
    return maxTransmitQueues >= 1 && maxTransmitQueues <= this.#options.queuePairs;
  }

  #linkChanged(): void {
    this.#config.linkUp = this.#options.link.up;
    this.#function.configChanged();
  }

  #misbehave(): void {
    const { faults } = this.#function;
    if (faults.has('interrupt-storm'))
      for (const queue of this.#queues) if (queue !== null) this.#function.interruptQueue(queue.index);
    if (faults.has('dies-on-traffic') && this.counters[NetCounter.txPackets] >= 100)
      process.kill(process.pid, 'SIGKILL');
  }
}

function isHashConfig({ hashTypes, key }: HashConfig): boolean {
  return (hashTypes & ~SUPPORTED_HASH_TYPES) === 0 && key.length <= TOEPLITZ_KEY_LENGTH;
}
