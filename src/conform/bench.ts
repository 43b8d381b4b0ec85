/**
 * What a check gets: the device under test, a way to bring it up, and the other side of its link.
 */
import { Feature, FeatureSet } from '../virtio/features.ts';
import { CommonCfgField, DeviceStatus, NO_VECTOR } from '../virtio/pci-layout.ts';
import { NetConfigField } from '../virtio-net/config.ts';
import { expect, Failed, need, Untestable } from './check.ts';
import { AdminConsole } from './console.ts';
import { ControlConsole } from './control-console.ts';
import { Driver } from './driver.ts';
import { hexDump } from './hex-dump.ts';
import { Network } from './network.ts';
import { type Limits, offeredCapabilities, useCapabilities, useCommands } from './offer.ts';
import type { Profile } from './profile.ts';
import type { RingFormat } from './ring.ts';
import type { Target } from './target.ts';
import type { Patience } from './time.ts';

export interface UpOptions {
  /** Feature bits beside the basic ones; the check is not applicable when one is not offered. */
  readonly features?: readonly number[];
  /** Feature bits to take when they are offered. */
  readonly wanted?: readonly number[];
  /** An administration queue. */
  readonly admin?: boolean;
  /** IPSEC, and all commands and capabilities in use; or the limits that the driver sets. */
  readonly ipsec?: boolean | Limits;
  /** A control queue. */
  readonly control?: boolean;
  /** Queue pairs with queues and receive buffers; not applicable when the device has fewer. Default 1. */
  readonly pairs?: number;
  /** Descriptors of the receive and transmit queues. */
  readonly size?: number;
  /** MSI-X: vector 0 for configuration changes, 1 for receiving, 2 for sending. */
  readonly vectors?: boolean;
  readonly rx?: { readonly count?: number; readonly size?: number; readonly split?: number };
  /** Indices of further queues to enable. */
  readonly queues?: readonly number[];
  /** Format of all virtqueues; default: that of the run. */
  readonly ring?: RingFormat;
  /** Leave DRIVER_OK to the check. */
  readonly stopped?: boolean;
}

/** The features that a driver takes in any case, when they are offered: devices may insist (6). */
/** Traces that a report shows: those nearest to what went wrong. */
const TRACES = 4;
const BASIC = [Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.ORDER_PLATFORM];

/** What a report tells of a check. */
interface Step {
  readonly text: string;
  /** What was sent or came, of use only when something is wrong; null for a line. */
  readonly bytes: Uint8Array | null;
}

export class Bench {
  readonly target: Target;
  readonly peer: Target | null;
  readonly patience: Patience;
  readonly profile: Profile;
  readonly steps: Step[] = [];

  constructor(target: Target, peer: Target | null, patience: Patience, profile: Profile) {
    this.target = target;
    this.peer = peer;
    this.patience = patience;
    this.profile = profile;
  }

  /** Notes what was done, for the report. */
  log(line: string): void {
    this.steps.push({ text: line, bytes: null });
  }

  /** Notes bytes that were sent or came, for the report of a check that fails. */
  trace(way: 'sent' | 'came', what: string, bytes: Uint8Array): void {
    const count = bytes.length === 1 ? '1 byte' : `${bytes.length} bytes`;
    // A copy: memory that the device has does not stay as it is.
    this.steps.push({ text: `${way} ${count}: ${what}`, bytes: bytes.slice() });
  }

  /** What was done; with the last bytes that were sent and came when the check has failed. */
  story(failed: boolean): string {
    const traces = failed ? this.steps.filter(({ bytes }) => bytes !== null).slice(-TRACES) : [];
    const told = this.steps.filter((step) => step.bytes === null || traces.includes(step));
    return told.map(({ text, bytes }) => (bytes === null ? text : `${text}\n${hexDump(bytes)}`)).join('\n');
  }

  /** What the device offers. */
  offered(): FeatureSet {
    return this.target.offered();
  }

  /** What a driver accepts that wants nothing: what devices may insist on, and this one does. */
  get least(): FeatureSet {
    const basic = this.offered().and(FeatureSet.of(...BASIC));
    return basic.with(...this.#formatFeatures(this.profile.ring));
  }

  /** Throws `NotApplicable` unless all of `bits` are offered. */
  needFeatures(...bits: readonly number[]): void {
    const missing = FeatureSet.of(...bits).minus(this.offered());
    need(missing.isEmpty, `the device does not offer ${missing.names().join(', ')}`);
  }

  /** Brings the device to DRIVER_OK, with a receive and a transmit queue and what `options` ask for. */
  async up(options: UpOptions = {}): Promise<Driver> {
    const driver = await this.bringUp(this.target, options);
    if (options.ipsec !== undefined && options.ipsec !== false && options.stopped !== true) {
      await this.useAll(driver, options.ipsec === true ? {} : options.ipsec);
    }
    return driver;
  }

  /** Steps 1 to 8 of 3.1.1. */
  async bringUp(target: Target, options: UpOptions): Promise<Driver> {
    const offered = target.offered();
    const required = [...(options.features ?? []), ...this.#formatFeatures(options.ring ?? this.profile.ring)];
    const withIpsec = options.ipsec !== undefined && options.ipsec !== false;
    if (withIpsec) required.push(Feature.IPSEC, Feature.ADMIN_VQ);
    if (options.admin === true) required.push(Feature.ADMIN_VQ);
    if (options.control === true) required.push(Feature.CTRL_VQ);
    const missing = FeatureSet.of(...required).minus(offered);
    need(missing.isEmpty, `the device does not offer ${missing.names().join(', ')}`);
    const features = FeatureSet.of(...BASIC, ...(options.wanted ?? []))
      .and(offered)
      .with(...required);
    if ((options.pairs ?? 1) > 1) this.#needPairs(target, offered, options.pairs ?? 1);
    expect(
      await Driver.negotiate(target, this.patience, features),
      () => `the device did not set FEATURES_OK for ${features.names().join(', ')}`,
    );
    const driver = new Driver(target, this.patience, features, this.profile.revision);
    driver.trace = (way, what, bytes) => this.trace(way, what, bytes);
    const vectors = options.vectors === true;
    if (vectors) {
      need(target.fn.interruptVectors >= 3, 'the device has fewer than three MSI-X vectors');
      target.enableVectors(3);
      target.structures.common.write16(CommonCfgField.configMsixVector, 0);
    }
    const size = options.size ?? 64;
    driver.addQueue(0, { size, vector: vectors ? 1 : NO_VECTOR });
    driver.addQueue(1, { size, vector: vectors ? 2 : NO_VECTOR });
    for (let index = 2; index < 2 * (options.pairs ?? 1); index++) driver.addQueue(index, { size });
    for (const index of options.queues ?? []) driver.addQueue(index, { size });
    if (options.control === true) this.#addControl(driver);
    if (features.has(Feature.ADMIN_VQ)) this.addAdmin(driver);
    if (options.stopped === true) return driver;
    driver.start();
    const { rx, pairs = 1 } = options;
    if (rx !== undefined) {
      for (let pair = 0; pair < pairs; pair++) driver.fill(2 * pair, rx.count, rx.size, rx.split);
    }
    return driver;
  }

  /** What to negotiate for virtqueues of a format. Throws `NotApplicable` for one that the device refuses. */
  #formatFeatures(format: RingFormat): readonly number[] {
    const { insists } = this.profile;
    const refuses = format === 'split' && insists.has(Feature.RING_PACKED);
    need(!refuses, 'the device takes packed virtqueues only');
    return [...insists.bits(), ...(format === 'packed' ? [Feature.RING_PACKED] : [])];
  }

  #needPairs(target: Target, offered: FeatureSet, pairs: number): void {
    const has = offered.hasAny(Feature.MQ, Feature.RSS)
      ? target.structures.device.read16(NetConfigField.maxVirtqueuePairs)
      : 1;
    need(has >= pairs, `the device has ${has} queue pair${has === 1 ? '' : 's'}, the check needs ${pairs}`);
  }

  /** Enables the control queue, which stands behind the others (5.1.2). */
  #addControl(driver: Driver): void {
    const { features, target } = driver;
    const many = features.hasAny(Feature.MQ, Feature.RSS);
    const pairs = many ? target.structures.device.read16(NetConfigField.maxVirtqueuePairs) : 1;
    const ring = driver.addQueue(2 * pairs, { size: 16 });
    driver.control = new ControlConsole(target, ring, {
      patience: this.patience,
      log: (line) => this.log(line),
      trace: (way, what, bytes) => this.trace(way, what, bytes),
      kick: () => driver.kick(ring),
    });
  }

  /** The control queue of a driver that has one. */
  control(driver: Driver): ControlConsole {
    if (driver.control === null) throw new RangeError('the driver was brought up without a control queue');
    return driver.control;
  }

  /** Enables the first administration queue. */
  addAdmin(driver: Driver): AdminConsole {
    const { common } = driver.target.structures;
    const index = common.read16(CommonCfgField.adminQueueIndex);
    expect(common.read16(CommonCfgField.adminQueueNum) > 0, 'admin_queue_num is 0 with VIRTIO_F_ADMIN_VQ negotiated');
    const ring = driver.addQueue(index, { size: 64 });
    const console = new AdminConsole(driver.target, ring, {
      patience: this.patience,
      revision: this.profile.revision,
      log: (line) => this.log(line),
      trace: (way, what, bytes) => this.trace(way, what, bytes),
      kick: () => driver.kick(ring),
    });
    console.queryOpcode = this.profile.queryOpcode;
    console.modifyOpcode = this.profile.modifyOpcode;
    driver.admin = console;
    return console;
  }

  /** The administration queue of a driver that has one. */
  console(driver: Driver): AdminConsole {
    if (driver.admin === null) throw new RangeError('the driver was brought up without an administration queue');
    return driver.admin;
  }

  /** LIST_USE of all commands, and all capabilities set as the device has them, or to `limits`. */
  async useAll(driver: Driver, limits: Limits = {}): Promise<void> {
    const admin = this.console(driver);
    await admin.quietly(async () => {
      await useCommands(admin);
      await useCapabilities(admin, await offeredCapabilities(admin), limits);
    });
    this.log('all commands and capabilities in use');
  }

  /** Brings the device up with receive buffers, and its link's other side. Throws `Untestable` when there is none. */
  async network(options: UpOptions = {}): Promise<{ driver: Driver; network: Network }> {
    const rx = options.rx ?? {};
    if (this.peer === null && !(await this.profile.loopsBack())) {
      throw new Untestable('needs a peer function (--peer) or a link that leads back');
    }
    const driver = await this.up({ ...options, rx });
    if (this.peer === null) {
      const mac = this.mac(this.target);
      return { driver, network: new Network(driver, driver, this.patience, [mac, mac]) };
    }
    // A peer that filters would hide what the device sends.
    const other = await this.bringUp(this.peer, { rx: {} });
    return { driver, network: new Network(driver, other, this.patience, [this.mac(this.target), this.mac(this.peer)]) };
  }

  /** The address of a function; a locally administered one when it has none (5.1.4). */
  mac(target: Target): Uint8Array {
    if (!target.offered().has(Feature.MAC)) return Uint8Array.of(2, 0, 0, 0, 0, target === this.peer ? 2 : 1);
    const { device } = target.structures;
    return Uint8Array.from({ length: 6 }, (_, i) => device.read8(NetConfigField.mac + i));
  }

  /** Waits for `condition`; throws `Failed` with `otherwise` when it does not come. */
  async eventually(condition: () => boolean, otherwise: string): Promise<void> {
    if (!(await this.patience.until(condition))) throw new Failed(otherwise);
  }

  /** Throws `Failed` when `condition` comes to hold while nothing should happen. */
  async never(condition: () => boolean, otherwise: string): Promise<void> {
    // Each answer shows that the device has had a turn, however slow its machine is.
    if (!(await this.patience.quietly(condition, () => this.target.status))) throw new Failed(otherwise);
  }

  /** Whether the device asks for a reset. */
  needsReset(): boolean {
    return (this.target.status & DeviceStatus.DEVICE_NEEDS_RESET) !== 0;
  }
}
