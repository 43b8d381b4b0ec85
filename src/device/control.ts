/**
 * The control virtqueue of a network device (Virtio 1.4, 5.1.9.5): reads commands, checks them against what was negotiated, and has
 * them done. What is unknown, was not negotiated, or is too short is answered with VIRTIO_NET_ERR and changes nothing.
 *
 * Left out: hashes of inner headers, RSC.
 */
import { Feature, type FeatureSet } from '../virtio/features.ts';
import {
  Ack,
  AnnounceCommand,
  COALESCING_LENGTH,
  CoalescingCommand,
  ControlClass,
  ControlField,
  decodeCoalescing,
  decodeHashConfig,
  decodeMacTables,
  decodeOffloads,
  decodeRssConfig,
  encodeCoalescing,
  getLe,
  type HashConfig,
  MacCommand,
  MqCommand,
  OffloadsCommand,
  putLe,
  type RssConfig,
  RxCommand,
  StatsCommand,
  VLAN_IDS,
  VlanCommand,
} from '../virtio-net/control-wire.ts';
import {
  encodeReply,
  queueKind,
  RequestField,
  STATISTICS_CAPABILITIES_LENGTH,
  STATISTICS_NAMES,
  statisticsBitmap,
  statisticsNames,
  statisticsOf,
} from '../virtio-net/device-statistics.ts';
import type { Arena } from './arena.ts';
import type { Coalescer } from './coalescer.ts';
import { type ControlExecute, withControlFaults } from './fault-control.ts';
import type { FaultSet } from './faults.ts';
import { type QueueStatistics, Stat } from './queue-statistics.ts';
import { type DeviceQueue, NO_BUFFER } from './queues.ts';
import type { RssContexts } from './rss-contexts.ts';
import type { ReceiveFilter } from './rx-filter.ts';

/** Bytes of a command that are read, and of a reply that are written. */
const COMMAND_MAX = 16384;
const REPLY_MAX = 4096;
const COMMANDS_PER_POLL = 16;
const NOTHING = new Uint8Array(0);
const MAC_LENGTH = 6;
const GROUP = 1;

/** What commands change, besides filter and coalescer. Each says whether it could. */
export interface ControlTarget {
  readonly filter: ReceiveFilter;
  readonly coalescer: Coalescer;
  readonly statistics: QueueStatistics;
  readonly rssContexts: RssContexts;
  readonly faults: FaultSet;
  /** Receive and transmit queues. */
  readonly dataQueues: number;
  /** The features that were negotiated. */
  readonly features: FeatureSet;
  isEnabled(queue: number): boolean;
  setPairs(pairs: number): boolean;
  setRss(config: RssConfig): boolean;
  setHash(config: HashConfig): boolean;
  setMac(mac: Uint8Array): void;
  announced(): void;
  /** Receive offloads, all of them negotiated: these are on, all others off (5.1.9.5.9). */
  setOffloads(active: FeatureSet): void;
}

export class ControlProcessor {
  readonly #arena: Arena;
  readonly #target: ControlTarget;
  readonly #scratch: number;
  #result: Uint8Array = NOTHING;
  readonly #run: ControlExecute;

  constructor(arena: Arena, target: ControlTarget) {
    this.#arena = arena;
    this.#target = target;
    this.#scratch = arena.allocate(COMMAND_MAX);
    const execute: ControlExecute = (command) => ({ ok: this.#execute(command), result: this.#result });
    this.#run = withControlFaults(execute, target.faults);
  }

  close(): void {
    this.#arena.release(this.#scratch, COMMAND_MAX);
  }

  /** Works on what the queue holds; returns how many commands that was. The caller publishes. */
  poll(queue: DeviceQueue): number {
    let done = 0;
    while (done < COMMANDS_PER_POLL) {
      const id = queue.take();
      if (id === NO_BUFFER) break;
      done++;
      const read = queue.gather(0, COMMAND_MAX, this.#scratch);
      if (read < 0) break;
      const command = this.#arena.u8.slice(this.#scratch, this.#scratch + read);
      this.#result = NOTHING;
      const { statistics } = this.#target;
      statistics.add(queue.index, Stat.commands, 1);
      // The statistics of the control queue count the current command as done (5.1.9.5.11).
      statistics.add(queue.index, Stat.succeeded, 1);
      const answer = queue.readableBytes <= COMMAND_MAX ? this.#run(command) : { ok: false, result: NOTHING };
      const { ok } = answer;
      if (!ok) statistics.add(queue.index, Stat.succeeded, -1);
      const result = ok ? answer.result.subarray(0, REPLY_MAX - Ack.size) : NOTHING;
      this.#arena.u8[this.#scratch] = ok ? Ack.OK : Ack.ERR;
      this.#arena.u8.set(result, this.#scratch + Ack.size);
      const written = queue.scatter(0, Ack.size + result.length, this.#scratch);
      if (written < 0) break;
      queue.complete(id, written);
    }
    return done;
  }

  #execute(bytes: Uint8Array): boolean {
    if (bytes.length < ControlField.data || !this.#has(Feature.CTRL_VQ)) return false;
    const command = bytes[ControlField.command];
    const data = bytes.subarray(ControlField.data);
    switch (bytes[ControlField.class]) {
      case ControlClass.RX:
        return this.#receiveMode(command, data);
      case ControlClass.MAC:
        return this.#mac(command, data);
      case ControlClass.VLAN:
        return this.#vlan(command, data);
      case ControlClass.ANNOUNCE:
        if (command !== AnnounceCommand.ACK || !this.#has(Feature.GUEST_ANNOUNCE)) return false;
        this.#target.announced();
        return true;
      case ControlClass.MQ:
        return this.#queues(command, data);
      case ControlClass.GUEST_OFFLOADS:
        return command === OffloadsCommand.SET && this.#has(Feature.CTRL_GUEST_OFFLOADS) && this.#offloads(data);
      case ControlClass.NOTF_COAL:
        return this.#coalescing(command, data);
      case ControlClass.RSS_CONTEXT:
        return this.#has(Feature.RSS_CONTEXT) && this.#rssContext(command, data);
      case ControlClass.STATS:
        return this.#has(Feature.DEVICE_STATS) && this.#statistics(command, data);
      default:
        return false;
    }
  }

  #has(feature: number): boolean {
    return this.#target.features.has(feature);
  }

  #receiveMode(command: number, data: Uint8Array): boolean {
    const needs = command <= RxCommand.ALLMULTI ? Feature.CTRL_RX : Feature.CTRL_RX_EXTRA;
    if (command > RxCommand.NOBCAST || !this.#has(needs) || data.length < 1 || data[0] > 1) return false;
    this.#target.filter.setMode(command, data[0] === 1);
    return true;
  }

  #mac(command: number, data: Uint8Array): boolean {
    if (command === MacCommand.ADDR_SET) {
      const allowed = this.#has(Feature.CTRL_MAC_ADDR) && data.length >= MAC_LENGTH && (data[0] & GROUP) === 0;
      if (allowed) this.#target.setMac(data.slice(0, MAC_LENGTH));
      return allowed;
    }
    if (command !== MacCommand.TABLE_SET || !this.#has(Feature.CTRL_RX)) return false;
    const tables = decodeMacTables(data);
    if (tables === null || tables.unicast.some((mac) => (mac[0] & GROUP) !== 0)) return false;
    if (tables.multicast.some((mac) => (mac[0] & GROUP) === 0)) return false;
    this.#target.filter.setTables(tables);
    return true;
  }

  #vlan(command: number, data: Uint8Array): boolean {
    const isKnown = command === VlanCommand.ADD || command === VlanCommand.DEL;
    if (!isKnown || !this.#has(Feature.CTRL_VLAN) || data.length < 2) return false;
    const id = getLe(data, 0, 2);
    if (id >= VLAN_IDS) return false;
    this.#target.filter.setVlan(id, command === VlanCommand.ADD);
    return true;
  }

  #queues(command: number, data: Uint8Array): boolean {
    if (command === MqCommand.VQ_PAIRS_SET) {
      // "MUST NOT" while there is an RSS context (5.1.9.5.8).
      if (this.#target.rssContexts.count > 0) return false;
      return this.#has(Feature.MQ) && data.length >= 2 && this.#target.setPairs(getLe(data, 0, 2));
    }
    if (command === MqCommand.RSS_CONFIG) {
      const config = this.#has(Feature.RSS) ? decodeRssConfig(data) : null;
      return config !== null && this.#target.setRss(config);
    }
    const config = command === MqCommand.HASH_CONFIG && this.#has(Feature.HASH_REPORT) ? decodeHashConfig(data) : null;
    return config !== null && this.#target.setHash(config);
  }

  #rssContext(command: number, data: Uint8Array): boolean {
    const result = this.#target.rssContexts.execute(command, data);
    this.#result = result ?? NOTHING;
    return result !== null;
  }

  #offloads(data: Uint8Array): boolean {
    const active = decodeOffloads(data);
    if (active === null || !active.minus(this.#target.features).isEmpty) return false;
    this.#target.setOffloads(active);
    return true;
  }

  #coalescing(command: number, data: Uint8Array): boolean {
    const { coalescer, dataQueues } = this.#target;
    if (command === CoalescingCommand.TX_SET || command === CoalescingCommand.RX_SET) {
      if (!this.#has(Feature.NOTF_COAL) || data.length < COALESCING_LENGTH) return false;
      coalescer.setAll(command === CoalescingCommand.RX_SET ? 0 : 1, decodeCoalescing(data));
      return true;
    }
    const isKnown = command === CoalescingCommand.VQ_SET || command === CoalescingCommand.VQ_GET;
    if (!isKnown || !this.#has(Feature.VQ_NOTF_COAL) || data.length < 4) return false;
    const index = getLe(data, 0, 2);
    if (index >= dataQueues || !this.#target.isEnabled(index)) return false;
    if (command === CoalescingCommand.VQ_GET) {
      this.#result = encodeCoalescing(coalescer.get(index));
      return true;
    }
    if (data.length < 4 + COALESCING_LENGTH) return false;
    coalescer.set(index, decodeCoalescing(data, 4));
    return true;
  }

  #statistics(command: number, data: Uint8Array): boolean {
    const { dataQueues, features, statistics } = this.#target;
    if (command === StatsCommand.QUERY) {
      this.#result = new Uint8Array(STATISTICS_CAPABILITIES_LENGTH);
      putLe(this.#result, 0, STATISTICS_CAPABILITIES_LENGTH, statisticsBitmap(STATISTICS_NAMES));
      return true;
    }
    if (command !== StatsCommand.GET || data.length === 0 || data.length % RequestField.length !== 0) return false;
    const replies: Uint8Array[] = [];
    for (let at = 0; at < data.length; at += RequestField.length) {
      const index = getLe(data, at + RequestField.queue, 2);
      const names = statisticsNames(getLe(data, at + RequestField.types, 8));
      if (index > dataQueues || names === null) return false;
      const allowed = statisticsOf(queueKind(index, dataQueues), features);
      if (names.some((name) => !allowed.includes(name))) return false;
      for (const name of names) replies.push(encodeReply(name, index, statistics.read(index, name)));
    }
    this.#result = Uint8Array.from(replies.flatMap((reply) => [...reply]));
    return true;
  }
}
