/**
 * The modern PCI transport (Virtio 1.4, 4.1): structures in BARs, found through vendor capabilities.
 *
 * Every structure is checked against its BAR once, before anything in it is read; later accesses stay inside by
 * construction. Fields are accessed with their own width. Left out: legacy and transitional interfaces, access through
 * PCI configuration space (VIRTIO_PCI_CAP_PCI_CFG), shared memory.
 */
import { VirtioError } from '../errors.ts';
import {
  PciCommand,
  readIdentity,
  readVirtioCapabilities,
  updateCommand,
  walkCapabilities,
} from '../vfio/config-space.ts';
import type { PciFunction } from '../vfio/function.ts';
import { FEATURE_WORDS, Feature, FeatureSet } from './features.ts';
import { CommonCfgField, CommonCfgLength, NO_VECTOR, VirtioCfgType, VirtioPciId } from './pci-layout.ts';
import {
  findStructure,
  LAST_BAR,
  makeNotifier,
  notifyMultiplier,
  readAdminQueues,
  readUnchanged,
  type Structure,
} from './structures.ts';
import type { ConfigReader, QueueNotifier, QueueSetup, VirtioTransport } from './transport.ts';

/** Bytes of the smallest notification structure (4.1.4.4). */
const NOTIFICATION_BYTES = 2;

/** Virtio device type that the PCI ids tell (4.1.2), or null when they are not virtio's. */
export function virtioDeviceType(identity: ReturnType<typeof readIdentity>): number | null {
  const { vendorId, deviceId, subsystemId } = identity;
  if (vendorId !== VirtioPciId.vendor) return null;
  if (deviceId >= VirtioPciId.modern && deviceId <= VirtioPciId.modernLast) return deviceId - VirtioPciId.modern;
  if (deviceId >= VirtioPciId.transitionalFirst && deviceId <= VirtioPciId.transitionalLast) return subsystemId;
  return null;
}

/**
 * Finds the structures of a virtio PCI function and enables its memory space and bus mastering. Nothing of the device is
 * written yet. Throws `VirtioError` NOT_VIRTIO, STRUCTURE_MISSING or STRUCTURE_BOUNDS, and `VfioError` for a bad capability list.
 */
export function openStandardTransport(fn: PciFunction): VirtioTransport {
  const deviceType = virtioDeviceType(readIdentity(fn.config));
  if (deviceType === null) throw new VirtioError('NOT_VIRTIO', `${fn.address} is not a virtio function`);
  updateCommand(fn.config, PciCommand.memorySpace | PciCommand.busMaster);
  return new StandardTransport(fn, deviceType);
}

class StructureReader implements ConfigReader {
  readonly #structure: Structure;

  constructor(structure: Structure) {
    this.#structure = structure;
  }

  get size(): number {
    return this.#structure.length;
  }

  read8(offset: number): number {
    return this.#structure.bar.read8(this.#at(offset, 1));
  }

  read16(offset: number): number {
    return this.#structure.bar.read16(this.#at(offset, 2));
  }

  read32(offset: number): number {
    return this.#structure.bar.read32(this.#at(offset, 4));
  }

  #at(offset: number, width: number): number {
    if (offset < 0 || offset + width > this.#structure.length) {
      throw new VirtioError(
        'CONFIG_BOUNDS',
        `device configuration has ${this.#structure.length} bytes, no ${width} at ${offset}`,
      );
    }
    return this.#structure.offset + offset;
  }
}

class StandardTransport implements VirtioTransport {
  readonly deviceType: number;
  readonly #fn: PciFunction;
  readonly #common: Structure;
  readonly #notify: Structure;
  readonly #isr: Structure;
  readonly #config: StructureReader | null;
  readonly #notifyMultiplier: number;
  #features = FeatureSet.empty;

  constructor(fn: PciFunction, deviceType: number) {
    this.#fn = fn;
    this.deviceType = deviceType;
    const capabilities = readVirtioCapabilities(fn.config, walkCapabilities(fn.config));
    const { COMMON, NOTIFY, ISR, DEVICE } = VirtioCfgType;
    this.#common = findStructure(fn, capabilities, 'common configuration', COMMON, CommonCfgLength.required, 4);
    this.#notify = findStructure(fn, capabilities, 'notification', NOTIFY, NOTIFICATION_BYTES, 2);
    this.#isr = findStructure(fn, capabilities, 'ISR status', ISR, 1, 1);
    // Optional (4.1.4.6): a device type without configuration has none.
    const hasConfig = capabilities.some((cap) => cap.type === DEVICE && cap.bar <= LAST_BAR);
    this.#config = hasConfig
      ? new StructureReader(findStructure(fn, capabilities, 'device configuration', DEVICE, 1, 4))
      : null;
    this.#notifyMultiplier = notifyMultiplier(fn.address, this.#notify);
  }

  get address(): string {
    return this.#fn.address;
  }

  get interruptVectors(): number {
    return this.#fn.interruptVectors;
  }

  get gone(): boolean {
    return this.#fn.gone;
  }

  #read16(field: number): number {
    return this.#common.bar.read16(this.#common.offset + field);
  }

  #write16(field: number, value: number): void {
    this.#common.bar.write16(this.#common.offset + field, value);
  }

  #write32(field: number, value: number): void {
    this.#common.bar.write32(this.#common.offset + field, value);
  }

  /** A 64-bit field is written as two 32-bit halves (4.1.3.1). */
  #write64(field: number, value: number): void {
    this.#write32(field, value % 2 ** 32);
    this.#write32(field + 4, Math.floor(value / 2 ** 32));
  }

  readStatus(): number {
    return this.#common.bar.read8(this.#common.offset + CommonCfgField.deviceStatus);
  }

  writeStatus(status: number): void {
    this.#common.bar.write8(this.#common.offset + CommonCfgField.deviceStatus, status);
  }

  readDeviceFeatures(): FeatureSet {
    const words: number[] = [];
    for (let word = 0; word < FEATURE_WORDS; word++) {
      this.#write32(CommonCfgField.deviceFeatureSelect, word);
      words.push(this.#common.bar.read32(this.#common.offset + CommonCfgField.deviceFeature));
    }
    return FeatureSet.fromWords(words);
  }

  writeDriverFeatures(features: FeatureSet): void {
    this.#features = features;
    for (let word = 0; word < FEATURE_WORDS; word++) {
      this.#write32(CommonCfgField.driverFeatureSelect, word);
      this.#write32(CommonCfgField.driverFeature, features.words[word]);
    }
  }

  queueCount(): number {
    return this.#read16(CommonCfgField.numQueues);
  }

  adminQueues(): { readonly first: number; readonly count: number } {
    return readAdminQueues(this.address, this.#common, this.queueCount());
  }

  maxQueueSize(index: number): number {
    this.#write16(CommonCfgField.queueSelect, index);
    return this.#read16(CommonCfgField.queueSize);
  }

  enableQueue(index: number, setup: QueueSetup): QueueNotifier {
    const max = this.maxQueueSize(index);
    if (setup.size === 0 || setup.size > max) {
      throw new VirtioError(
        'QUEUE_SIZE',
        `${this.address}: queue ${index} takes ${max} descriptors, not ${setup.size}`,
      );
    }
    this.#write16(CommonCfgField.queueSize, setup.size);
    this.#mapVector(CommonCfgField.queueMsixVector, setup.vector, `queue ${index}`);
    this.#write64(CommonCfgField.queueDesc, setup.descriptorArea);
    this.#write64(CommonCfgField.queueDriver, setup.driverArea);
    this.#write64(CommonCfgField.queueDevice, setup.deviceArea);

    const notifier = this.#notifier(index, setup);
    this.#write16(CommonCfgField.queueEnable, 1);
    if (this.#read16(CommonCfgField.queueEnable) !== 1) {
      throw new VirtioError('QUEUE_ENABLE', `${this.address}: the device did not enable queue ${index}`);
    }
    return notifier;
  }

  /** 4.1.4.4, 4.1.5.2; the queue is selected. */
  #notifier(index: number, setup: QueueSetup): QueueNotifier {
    const offset = this.#read16(CommonCfgField.queueNotifyOff) * this.#notifyMultiplier;
    const id = this.#features.has(Feature.NOTIF_CONFIG_DATA)
      ? this.#optional16(CommonCfgField.queueNotifConfigData, 'queue_notif_config_data')
      : index;
    return makeNotifier(this.address, this.#notify, { index, offset, id }, this.#features, setup);
  }

  /** A field that not every device has. */
  #optional16(field: number, name: string): number {
    if (field + 2 > this.#common.length) {
      throw new VirtioError('STRUCTURE_BOUNDS', `${this.address}: the common configuration has no ${name}`);
    }
    return this.#read16(field);
  }

  startQueueReset(index: number): void {
    this.#write16(CommonCfgField.queueSelect, index);
    this.#optional16(CommonCfgField.queueReset, 'queue_reset');
    this.#write16(CommonCfgField.queueReset, 1);
  }

  /** 4.1.4.3.1: both read 0 when the reset is complete. */
  isQueueReset(index: number): boolean {
    this.#write16(CommonCfgField.queueSelect, index);
    return this.#read16(CommonCfgField.queueReset) === 0 && this.#read16(CommonCfgField.queueEnable) === 0;
  }

  setConfigVector(vector: number): void {
    this.#mapVector(CommonCfgField.configMsixVector, vector, 'configuration changes');
  }

  /** 4.1.5.1.2: the device answers NO_VECTOR when it cannot map the event. */
  #mapVector(field: number, vector: number, event: string): void {
    if (vector !== NO_VECTOR && vector >= this.interruptVectors) {
      throw new VirtioError('MSIX_VECTOR', `${this.address}: no vector ${vector} for ${event}`);
    }
    this.#write16(field, vector);
    if (this.#read16(field) !== vector) {
      throw new VirtioError('MSIX_VECTOR', `${this.address}: the device cannot map vector ${vector} to ${event}`);
    }
  }

  readIsr(): number {
    return this.#isr.bar.read8(this.#isr.offset);
  }

  readConfig<T>(read: (config: ConfigReader) => T): T {
    const config = this.#config;
    if (config === null) throw new VirtioError('STRUCTURE_MISSING', `${this.address} has no device configuration`);
    return readUnchanged(
      this.address,
      () => this.#generation(),
      () => read(config),
    );
  }

  #generation(): number {
    return this.#common.bar.read8(this.#common.offset + CommonCfgField.configGeneration);
  }
}
