/**
 * What a driver can tell a network device through its control queue (Virtio 1.4, 5.1.9.5), as methods: receive filters, addresses,
 * VLANs, queues, receive-side scaling, offloads, notification coalescing, statistics.
 *
 * Each method needs a feature, which must have been negotiated. Each rejects with VirtioError `CONTROL_UNSUPPORTED` when it was not,
 * `CONTROL_REFUSED` when the device says no, `CONTROL_TIMEOUT`, `CONTROL_REPLY` for an answer that makes no sense, or why the queue is
 * closed; and with InputError `CONTROL_ARGUMENT`. Left out: hashes of inner headers.
 */
import { InputError, VirtioError } from '../errors.ts';
import { Feature, type FeatureSet, featureName } from '../virtio/features.ts';
import { MAC_LENGTH, type NetConfig } from './config.ts';
import type { ControlQueue } from './control.ts';
import {
  AnnounceCommand,
  COALESCING_LENGTH,
  type Coalescing,
  CoalescingCommand,
  ControlClass,
  decodeCoalescing,
  encodeCoalescing,
  encodeHashConfig,
  encodeMacTables,
  encodeOffloads,
  encodeRssConfig,
  getLe,
  type HashConfig,
  MacCommand,
  MqCommand,
  OffloadsCommand,
  putLe,
  type RssConfig,
  RssContextCommand,
  RssContextField,
  RxCommand,
  StatsCommand,
  SWITCHABLE_OFFLOADS,
  VLAN_IDS,
  VlanCommand,
} from './control-wire.ts';
import {
  type DeviceStatistics,
  decodeReplies,
  queueKind,
  RequestField,
  replyLength,
  STATISTICS_CAPABILITIES_LENGTH,
  statisticsBitmap,
  statisticsOf,
} from './device-statistics.ts';

/** Fields of `struct virtio_net_ctrl_coal_vq` (5.1.9.5.10). */
const QueueCoalescing = { queue: 0, coalescing: 4, length: 12 } as const;
/** Bit 0 of the first byte of a MAC address: a group. */
const GROUP = 1;
const MAX_U16 = 0xffff;
const MAX_U32 = 0xffffffff;

/** `RxCommand` by the names that `NetControl.setReceiveMode` has for them. */
const MODES = {
  promiscuous: RxCommand.PROMISC,
  allMulticast: RxCommand.ALLMULTI,
  allUnicast: RxCommand.ALLUNI,
  noMulticast: RxCommand.NOMULTI,
  noUnicast: RxCommand.NOUNI,
  noBroadcast: RxCommand.NOBCAST,
} as const;

export type ReceiveMode = keyof typeof MODES;

export class NetControl {
  readonly #queue: ControlQueue;
  readonly #features: FeatureSet;
  readonly #config: NetConfig;
  readonly #pairs: number;

  /** `pairs` is the number of queue pairs that the driver has set up. */
  constructor(queue: ControlQueue, features: FeatureSet, config: NetConfig, pairs: number) {
    this.#queue = queue;
    this.#features = features;
    this.#config = config;
    this.#pairs = pairs;
  }

  /**
   * Switches a receive mode (5.1.9.5.1). `promiscuous` and `allMulticast` need CTRL_RX, the others CTRL_RX_EXTRA. All are best effort: unwanted
   * packets may still come.
   */
  async setReceiveMode(mode: ReceiveMode, on: boolean): Promise<void> {
    const command = MODES[mode];
    this.#need(command <= RxCommand.ALLMULTI ? Feature.CTRL_RX : Feature.CTRL_RX_EXTRA);
    await this.#queue.command(ControlClass.RX, command, Uint8Array.of(on ? 1 : 0));
  }

  /** Sets the address of the device (5.1.9.5.2). Needs CTRL_MAC_ADDR. */
  async setMac(mac: Uint8Array): Promise<void> {
    this.#need(Feature.CTRL_MAC_ADDR);
    checkMac(mac, false);
    await this.#queue.command(ControlClass.MAC, MacCommand.ADDR_SET, mac);
  }

  /** Replaces the further addresses that are received (5.1.9.5.2), unicast and multicast ones. Needs CTRL_RX. */
  async setMacTable(unicast: readonly Uint8Array[], multicast: readonly Uint8Array[]): Promise<void> {
    this.#need(Feature.CTRL_RX);
    for (const mac of unicast) checkMac(mac, false);
    for (const mac of multicast) checkMac(mac, true);
    await this.#queue.command(ControlClass.MAC, MacCommand.TABLE_SET, encodeMacTables(unicast, multicast));
  }

  /** Receives, or receives no more, frames with this VLAN tag (5.1.9.5.3). Needs CTRL_VLAN, with which there are none at first. */
  async addVlan(id: number): Promise<void> {
    await this.#vlan(VlanCommand.ADD, id);
  }

  async removeVlan(id: number): Promise<void> {
    await this.#vlan(VlanCommand.DEL, id);
  }

  async #vlan(command: number, id: number): Promise<void> {
    this.#need(Feature.CTRL_VLAN);
    check(isBelow(id, VLAN_IDS), `VLAN ${id}`);
    await this.#queue.command(ControlClass.VLAN, command, le(2, id));
  }

  /** Tells the device that the request to announce the addresses was seen (5.1.9.5.4). Needs GUEST_ANNOUNCE. */
  async acknowledgeAnnounce(): Promise<void> {
    this.#need(Feature.GUEST_ANNOUNCE);
    await this.#queue.command(ControlClass.ANNOUNCE, AnnounceCommand.ACK, new Uint8Array(0));
  }

  /** Uses this many queue pairs, with automatic receive steering (5.1.9.5.6). Needs MQ, and no more pairs than were set up. */
  async setQueuePairs(pairs: number): Promise<void> {
    this.#need(Feature.MQ);
    check(pairs > 0 && isBelow(pairs, this.#pairs + 1), `${pairs} queue pairs`);
    await this.#queue.command(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, le(2, pairs));
  }

  /** Distributes packets by their hash (5.1.9.5.7). Needs RSS. */
  async setRss(config: RssConfig): Promise<void> {
    this.#need(Feature.RSS);
    this.#checkRss(config);
    await this.#queue.command(ControlClass.MQ, MqCommand.RSS_CONFIG, encodeRssConfig(config));
  }

  /** How many RSS contexts there can be besides the configuration of `setRss` (5.1.9.5.8). Needs RSS_CONTEXT. */
  async rssContexts(): Promise<number> {
    this.#need(Feature.RSS_CONTEXT);
    const reply = await this.#queue.command(ControlClass.RSS_CONTEXT, RssContextCommand.CAP_GET, new Uint8Array(0), 2);
    if (reply.length < 2) throw new VirtioError('CONTROL_REPLY', 'a short reply to a control command');
    return getLe(reply, 0, 2);
  }

  /** Makes RSS context `id`, from 1 to what `rssContexts` gives. Needs RSS_CONTEXT. While there is one, `setQueuePairs` is refused. */
  async addRssContext(id: number, config: RssConfig): Promise<void> {
    await this.#setRssContext(RssContextCommand.ADD, id, config);
  }

  async modifyRssContext(id: number, config: RssConfig): Promise<void> {
    await this.#setRssContext(RssContextCommand.MOD, id, config);
  }

  async removeRssContext(id: number): Promise<void> {
    this.#need(Feature.RSS_CONTEXT);
    check(id > 0 && isBelow(id, MAX_U16 + 1), `RSS context ${id}`);
    await this.#queue.command(ControlClass.RSS_CONTEXT, RssContextCommand.DEL, le(2, id));
  }

  async #setRssContext(command: number, id: number, config: RssConfig): Promise<void> {
    this.#need(Feature.RSS_CONTEXT);
    check(id > 0 && isBelow(id, MAX_U16 + 1), `RSS context ${id}`);
    this.#checkRss(config);
    const rss = encodeRssConfig(config);
    const data = new Uint8Array(RssContextField.config + rss.length);
    putLe(data, RssContextField.id, 2, id);
    data.set(rss, RssContextField.config);
    await this.#queue.command(ControlClass.RSS_CONTEXT, command, data);
  }

  #checkRss(config: RssConfig): void {
    this.#checkHash(config);
    const { indirectionTable: table, unclassifiedQueue, maxTransmitQueues } = config;
    const isPowerOfTwo = table.length > 0 && (table.length & (table.length - 1)) === 0;
    check(
      isPowerOfTwo && table.length <= (this.#config.rssMaxIndirectionTableLength ?? 0),
      `a table of ${table.length}`,
    );
    for (const queue of [...table, unclassifiedQueue]) check(isBelow(queue, this.#pairs), `receive queue ${queue}`);
    check(isBelow(maxTransmitQueues, this.#pairs + 1), `${maxTransmitQueues} transmit queues`);
  }

  /** Chooses what is hashed for `pool.hash` while packets are steered automatically (5.1.9.5.6.1). Needs HASH_REPORT. */
  async setHash(config: HashConfig): Promise<void> {
    this.#need(Feature.HASH_REPORT);
    this.#checkHash(config);
    await this.#queue.command(ControlClass.MQ, MqCommand.HASH_CONFIG, encodeHashConfig(config));
  }

  #checkHash({ hashTypes, key }: HashConfig): void {
    const { supportedHashTypes = 0, rssMaxKeySize = 0 } = this.#config;
    check(
      isBelow(hashTypes, MAX_U32) && (hashTypes & ~supportedHashTypes) === 0,
      `hash types 0x${hashTypes.toString(16)}`,
    );
    check(key.length <= rssMaxKeySize, `a key of ${key.length} bytes`);
  }

  /** Switches receive offloads (5.1.9.5.9): `wanted`, of those negotiated, are on, all others off. Needs CTRL_GUEST_OFFLOADS. */
  async setGuestOffloads(wanted: FeatureSet): Promise<void> {
    this.#need(Feature.CTRL_GUEST_OFFLOADS);
    const unknown = wanted.minus(SWITCHABLE_OFFLOADS);
    check(unknown.isEmpty, unknown.names().join(', '));
    for (const feature of wanted.bits()) this.#need(feature);
    await this.#queue.command(ControlClass.GUEST_OFFLOADS, OffloadsCommand.SET, encodeOffloads(wanted));
  }

  /** Holds back interrupts of all receive or all transmit queues (5.1.9.5.10). Needs NOTF_COAL. */
  async setCoalescing(which: 'rx' | 'tx', coalescing: Coalescing): Promise<void> {
    this.#need(Feature.NOTF_COAL);
    checkCoalescing(coalescing);
    const command = which === 'rx' ? CoalescingCommand.RX_SET : CoalescingCommand.TX_SET;
    await this.#queue.command(ControlClass.NOTF_COAL, command, encodeCoalescing(coalescing));
  }

  /** The same for one virtqueue: 0 is receiveq1, 1 is transmitq1, and so on. Needs VQ_NOTF_COAL. */
  async setQueueCoalescing(index: number, coalescing: Coalescing): Promise<void> {
    this.#need(Feature.VQ_NOTF_COAL);
    this.#checkDataQueue(index);
    checkCoalescing(coalescing);
    const data = new Uint8Array(QueueCoalescing.length);
    putLe(data, QueueCoalescing.queue, 2, index);
    data.set(encodeCoalescing(coalescing), QueueCoalescing.coalescing);
    await this.#queue.command(ControlClass.NOTF_COAL, CoalescingCommand.VQ_SET, data);
  }

  /** What is set for one virtqueue. Needs VQ_NOTF_COAL. */
  async queueCoalescing(index: number): Promise<Coalescing> {
    this.#need(Feature.VQ_NOTF_COAL);
    this.#checkDataQueue(index);
    const data = le(QueueCoalescing.coalescing, index);
    const reply = await this.#queue.command(ControlClass.NOTF_COAL, CoalescingCommand.VQ_GET, data, COALESCING_LENGTH);
    if (reply.length < COALESCING_LENGTH) throw new VirtioError('CONTROL_REPLY', 'a short reply to a control command');
    return decodeCoalescing(reply);
  }

  /** What the device has counted for virtqueue `index`; the one behind all others is the control queue. Needs DEVICE_STATS. */
  async deviceStatistics(index: number): Promise<DeviceStatistics> {
    this.#need(Feature.DEVICE_STATS);
    const data = 2 * this.#config.maxQueuePairs;
    check(isBelow(index, 2 * this.#pairs) || index === data, `virtqueue ${index}`);
    const { STATS } = ControlClass;
    const offer = await this.#queue.command(
      STATS,
      StatsCommand.QUERY,
      new Uint8Array(0),
      STATISTICS_CAPABILITIES_LENGTH,
    );
    const supported =
      offer.length < STATISTICS_CAPABILITIES_LENGTH ? 0 : getLe(offer, 0, STATISTICS_CAPABILITIES_LENGTH);
    const names = statisticsOf(queueKind(index, data), this.#features).filter(
      (name) => Math.floor(supported / statisticsBitmap([name])) % 2 === 1,
    );
    if (names.length === 0) return {};
    const request = new Uint8Array(RequestField.length);
    putLe(request, RequestField.queue, 2, index);
    putLe(request, RequestField.types, 8, statisticsBitmap(names));
    const reply = await this.#queue.command(STATS, StatsCommand.GET, request, replyLength(names));
    const statistics = decodeReplies(reply, index);
    if (statistics === null) throw new VirtioError('CONTROL_REPLY', 'statistics that make no sense');
    return statistics;
  }

  #checkDataQueue(index: number): void {
    check(isBelow(index, 2 * this.#pairs), `virtqueue ${index}`);
  }

  #need(feature: number): void {
    if (this.#features.has(feature)) return;
    throw new VirtioError('CONTROL_UNSUPPORTED', `${featureName(feature)} was not negotiated`);
  }
}

function check(condition: boolean, what: string): void {
  if (!condition) throw new InputError('CONTROL_ARGUMENT', `${what} cannot be set`);
}

function isBelow(value: number, limit: number): boolean {
  return Number.isInteger(value) && value >= 0 && value < limit;
}

function checkMac(mac: Uint8Array, group: boolean): void {
  check(
    mac.length === MAC_LENGTH && ((mac[0] & GROUP) !== 0) === group,
    `this ${group ? 'multicast' : 'unicast'} address`,
  );
}

function checkCoalescing({ maxPackets, maxMicroseconds }: Coalescing): void {
  check(isBelow(maxPackets, MAX_U32 + 1), `max_packets ${maxPackets}`);
  check(isBelow(maxMicroseconds, MAX_U32 + 1), `max_usecs ${maxMicroseconds}`);
}

/** `value` as `width` bytes. */
function le(width: number, value: number): Uint8Array {
  const bytes = new Uint8Array(width);
  putLe(bytes, 0, width, value);
  return bytes;
}
