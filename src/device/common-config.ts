/**
 * The common configuration structure: device status, feature negotiation and the configuration of queues (Virtio 1.4,
 * 2.1, 2.2, 3.1, 4.1.4.3).
 *
 * A register answers to accesses of its own width, at its own offset, and 64-bit ones to two 32-bit halves; any other
 * access reads as ones and writes nothing. What a driver must not write is ignored, so that it reads back what holds:
 * the status bits only ever grow, features do not change after FEATURES_OK, a split queue's size that is not a power of two
 * is not taken, and a queue is not enabled before FEATURES_OK or at misaligned addresses.
 */
import { FEATURE_WORDS, Feature, FeatureSet } from '../virtio/features.ts';
import { CommonCfgField, DeviceStatus, NO_VECTOR } from '../virtio/pci-layout.ts';
import { AREA_ALIGNMENT, type QueueAddresses } from './queues.ts';

/** NOTIF_CONFIG_DATA: what queue 0 is called in notifications; not an index, so that nobody mistakes it for one. */
const NOTIFICATION_ID = 0x4000;

/** What one virtqueue is configured to. */
export interface QueueConfig {
  readonly index: number;
  /** Largest size, shown after a reset; 0: there is no such queue. */
  readonly maxSize: number;
  size: number;
  vector: number;
  enabled: boolean;
  /** Six 32-bit words: descriptor, driver and device area, low half first. */
  readonly words: Uint32Array;
}

export interface CommonConfigOptions {
  readonly offered: FeatureSet;
  /** Virtqueues without the administration ones (`num_queues`). */
  readonly queues: number;
  /** Largest size of queue `index`. */
  maxQueueSize(index: number): number;
  /** Administration virtqueues, which follow the others. */
  readonly adminQueues: number;
  /** MSI-X vectors. */
  readonly vectors: number;
}

/** What the function does when the driver gets somewhere. */
export interface CommonConfigEvents {
  /** 0 was written to `device_status`; the structure itself is already reset. */
  reset(): void;
  /** Whether the device works with these features, which are a subset of what it offers. */
  acceptsFeatures(features: FeatureSet): boolean;
  driverOk(): void;
  queueEnabled(queue: QueueConfig): void;
  /** 1 was written to `queue_reset`. */
  queueReset(queue: QueueConfig): void;
}

export class CommonConfig {
  /** Counts accesses that no driver may make. */
  violations = 0;
  readonly options: CommonConfigOptions;
  readonly queues: readonly QueueConfig[];
  readonly #events: CommonConfigEvents;
  readonly #driverFeatures = new Uint32Array(FEATURE_WORDS);
  #deviceFeatureSelect = 0;
  #driverFeatureSelect = 0;
  #features = FeatureSet.empty;
  #status = 0;
  #queueSelect = 0;
  #configVector = NO_VECTOR;
  #generation = 0;
  #configChanged = false;

  constructor(options: CommonConfigOptions, events: CommonConfigEvents) {
    this.options = options;
    this.#events = events;
    this.queues = Array.from({ length: options.queues + options.adminQueues }, (_, index) => ({
      index,
      maxSize: options.maxQueueSize(index),
      size: options.maxQueueSize(index),
      vector: NO_VECTOR,
      enabled: false,
      words: new Uint32Array(6),
    }));
  }

  /** What was negotiated; empty before FEATURES_OK. */
  get features(): FeatureSet {
    return this.#features;
  }

  get status(): number {
    return this.#status;
  }

  get isLive(): boolean {
    return (this.#status & (DeviceStatus.DRIVER_OK | DeviceStatus.DEVICE_NEEDS_RESET)) === DeviceStatus.DRIVER_OK;
  }

  get configVector(): number {
    return this.#configVector;
  }

  get adminQueueIndex(): number {
    return this.options.queues;
  }

  /** Back to the state after a reset, without telling anybody. */
  clear(): void {
    this.#deviceFeatureSelect = 0;
    this.#driverFeatureSelect = 0;
    this.#driverFeatures.fill(0);
    this.#features = FeatureSet.empty;
    this.#status = 0;
    this.#queueSelect = 0;
    this.#configVector = NO_VECTOR;
    for (const queue of this.queues) clearQueue(queue);
  }

  /** What names queue `index` in a notification: with NOTIF_CONFIG_DATA not its index (4.1.5.2). */
  notificationId(index: number): number {
    return this.#features.has(Feature.NOTIF_CONFIG_DATA) ? NOTIFICATION_ID + index : index;
  }

  /** Counts a notification at the address of queue `index` that is not what was negotiated (4.1.5.2.1). */
  checkNotification(index: number, width: number, value: number): void {
    const expected = this.#features.has(Feature.NOTIFICATION_DATA) ? 4 : 2;
    if (width !== expected || (value & 0xffff) !== this.notificationId(index)) this.violations++;
  }

  /** Sets DEVICE_NEEDS_RESET; true when it was not set and the driver must be told. */
  needsReset(): boolean {
    if ((this.#status & DeviceStatus.DEVICE_NEEDS_RESET) !== 0) return false;
    const live = this.isLive;
    this.#status |= DeviceStatus.DEVICE_NEEDS_RESET;
    return live;
  }

  /** The device-specific configuration has changed: `config_generation` will differ after the next read of it. */
  configChanged(): void {
    this.#configChanged = true;
  }

  /** The driver reads the device-specific configuration (4.1.4.3.1). */
  configRead(): void {
    if (!this.#configChanged) return;
    this.#configChanged = false;
    this.#generation = (this.#generation + 1) & 0xff;
  }

  /** Reads the register at `offset`; `width` is 1, 2 or 4. */
  read(offset: number, width: number): number {
    const F = CommonCfgField;
    if (REGISTER_WIDTH[offset] !== width) return this.#wrong(width);
    const queue = this.#selected();
    switch (offset) {
      case F.deviceFeatureSelect:
        return this.#deviceFeatureSelect;
      case F.deviceFeature:
        return this.options.offered.words[this.#deviceFeatureSelect] ?? 0;
      case F.driverFeatureSelect:
        return this.#driverFeatureSelect;
      case F.driverFeature:
        return this.#driverFeatures[this.#driverFeatureSelect] ?? 0;
      case F.configMsixVector:
        return this.#configVector;
      case F.numQueues:
        return this.options.queues;
      case F.deviceStatus:
        return this.#status;
      case F.configGeneration:
        return this.#generation;
      case F.queueSelect:
        return this.#queueSelect;
      case F.queueSize:
        return queue?.size ?? 0;
      case F.queueMsixVector:
        return queue?.vector ?? NO_VECTOR;
      case F.queueEnable:
        return queue?.enabled === true ? 1 : 0;
      case F.queueNotifyOff:
        return queue?.index ?? 0;
      case F.queueNotifConfigData:
        return queue === undefined ? 0 : this.notificationId(queue.index);
      case F.queueReset:
        // A queue is reset before the write of 1 returns (4.1.4.3.1).
        return 0;
      case F.adminQueueIndex:
        return this.adminQueueIndex;
      case F.adminQueueNum:
        return this.options.adminQueues;
      default:
        return queue?.words[(offset - F.queueDesc) >>> 2] ?? 0;
    }
  }

  /** Writes the register at `offset`; `width` is 1, 2 or 4. */
  write(offset: number, width: number, value: number): void {
    const F = CommonCfgField;
    if (REGISTER_WIDTH[offset] !== width) {
      this.#wrong(width);
      return;
    }
    switch (offset) {
      case F.deviceFeatureSelect:
        this.#deviceFeatureSelect = value;
        return;
      case F.driverFeatureSelect:
        this.#driverFeatureSelect = value;
        return;
      case F.driverFeature:
        if ((this.#status & DeviceStatus.FEATURES_OK) !== 0) this.violations++;
        else if (this.#driverFeatureSelect < FEATURE_WORDS) this.#driverFeatures[this.#driverFeatureSelect] = value;
        else if (value !== 0) this.violations++;
        return;
      case F.configMsixVector:
        this.#configVector = this.#vector(value);
        return;
      case F.deviceStatus:
        this.#writeStatus(value);
        return;
      case F.queueSelect:
        this.#queueSelect = value;
        return;
      case F.numQueues:
      case F.deviceFeature:
      case F.configGeneration:
      case F.queueNotifyOff:
      case F.queueNotifConfigData:
      case F.adminQueueIndex:
      case F.adminQueueNum:
        this.violations++;
        return;
      default:
        this.#writeQueue(offset, value);
    }
  }

  #wrong(width: number): number {
    this.violations++;
    return width === 1 ? 0xff : width === 2 ? 0xffff : 0xffffffff;
  }

  #vector(value: number): number {
    return value < this.options.vectors ? value : NO_VECTOR;
  }

  /**
   * The selected queue; undefined when there is none, or when it is an administration queue and those were not
   * negotiated.
   */
  #selected(): QueueConfig | undefined {
    const queue = this.queues[this.#queueSelect];
    if (queue === undefined || queue.maxSize === 0) return undefined;
    if (queue.index >= this.adminQueueIndex && !this.#features.has(Feature.ADMIN_VQ)) return undefined;
    return queue;
  }

  #writeStatus(value: number): void {
    const S = DeviceStatus;
    if (value === 0) {
      this.clear();
      this.#events.reset();
      return;
    }
    const set = value & ~this.#status & ~S.DEVICE_NEEDS_RESET & ~S.SUSPEND;
    if ((this.#status & ~S.DEVICE_NEEDS_RESET & ~value) !== 0) this.violations++;
    this.#status |= set & (S.ACKNOWLEDGE | S.DRIVER | S.FAILED);
    if ((set & S.FEATURES_OK) !== 0 && this.#featuresOk()) this.#status |= S.FEATURES_OK;
    if ((set & S.DRIVER_OK) === 0) return;
    if ((this.#status & S.FEATURES_OK) === 0 || (this.#status & (S.FAILED | S.DEVICE_NEEDS_RESET)) !== 0) {
      this.violations++;
      return;
    }
    this.#status |= S.DRIVER_OK;
    this.#events.driverOk();
  }

  #featuresOk(): boolean {
    const wanted = FeatureSet.fromWords(this.#driverFeatures);
    if (!wanted.minus(this.options.offered).isEmpty || !this.#events.acceptsFeatures(wanted)) return false;
    this.#features = wanted;
    return true;
  }

  #writeQueue(offset: number, value: number): void {
    const F = CommonCfgField;
    const queue = this.#selected();
    if (queue === undefined) {
      this.violations++;
      return;
    }
    if (offset === F.queueMsixVector) {
      queue.vector = this.#vector(value);
      return;
    }
    if (offset === F.queueReset) {
      if (value !== 1 || !this.#features.has(Feature.RING_RESET)) this.violations++;
      else this.#resetQueue(queue);
      return;
    }
    if (queue.enabled) {
      // Nothing else of a queue changes while it is enabled; writing 0 to queue_enable is not allowed at all.
      if (offset !== F.queueEnable || value !== 1) this.violations++;
      return;
    }
    if (offset === F.queueSize) {
      const packed = this.#features.has(Feature.RING_PACKED);
      const isSize = packed || (value & (value - 1)) === 0;
      if (value === 0 || value > queue.maxSize || !isSize) this.violations++;
      else queue.size = value;
      return;
    }
    if (offset === F.queueEnable) {
      this.#enable(queue, value);
      return;
    }
    queue.words[(offset - F.queueDesc) >>> 2] = value;
  }

  #enable(queue: QueueConfig, value: number): void {
    const alignment = AREA_ALIGNMENT[this.#features.has(Feature.RING_PACKED) ? 'packed' : 'split'];
    const aligned =
      queue.words[0] % alignment.descriptor === 0 &&
      queue.words[2] % alignment.driver === 0 &&
      queue.words[4] % alignment.device === 0;
    if (value !== 1 || !aligned || (this.#status & DeviceStatus.FEATURES_OK) === 0) {
      this.violations++;
      return;
    }
    queue.enabled = true;
    this.#events.queueEnabled(queue);
  }

  #resetQueue(queue: QueueConfig): void {
    clearQueue(queue);
    this.#events.queueReset(queue);
  }
}

/** The addresses of a configured queue. */
export function queueAddresses(queue: QueueConfig): QueueAddresses {
  const [descriptorLow, descriptorHigh, driverLow, driverHigh, deviceLow, deviceHigh] = queue.words;
  return { descriptorLow, descriptorHigh, driverLow, driverHigh, deviceLow, deviceHigh };
}

function clearQueue(queue: QueueConfig): void {
  queue.size = queue.maxSize;
  queue.vector = NO_VECTOR;
  queue.enabled = false;
  queue.words.fill(0);
}

/** Width of the register at each offset; absent where none begins. */
const REGISTER_WIDTH: Readonly<Record<number, number>> = (() => {
  const F = CommonCfgField;
  const widths: Record<number, number> = {};
  for (const at of [F.deviceFeatureSelect, F.deviceFeature, F.driverFeatureSelect, F.driverFeature]) widths[at] = 4;
  for (let at: number = F.queueDesc; at < F.queueNotifConfigData; at += 4) widths[at] = 4;
  for (const at of [F.configMsixVector, F.numQueues, F.queueSelect, F.queueSize, F.queueMsixVector]) widths[at] = 2;
  for (const at of [F.queueEnable, F.queueNotifyOff, F.queueNotifConfigData, F.queueReset]) widths[at] = 2;
  for (const at of [F.adminQueueIndex, F.adminQueueNum]) widths[at] = 2;
  for (const at of [F.deviceStatus, F.configGeneration]) widths[at] = 1;
  return widths;
})();
