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
  type VirtioCapability,
  walkCapabilities,
} from '../vfio/config-space.ts';
import type { PciFunction, Region } from '../vfio/function.ts';
import { FEATURE_WORDS, Feature, FeatureSet } from './features.ts';
import { CommonCfgField, CommonCfgLength, NO_VECTOR, VirtioCfgType, VirtioPciId } from './pci-layout.ts';
import type { ConfigReader, QueueNotifier, QueueSetup, VirtioTransport } from './transport.ts';

/** BARs are 0 to 5; a capability that names another is to be ignored (4.1.4). */
const LAST_BAR = 5;
/** Attempts to read a configuration that does not change meanwhile. */
const CONFIG_ATTEMPTS = 64;
/** Bytes of a notification (4.1.4.4), and with NOTIFICATION_DATA. */
const NOTIFICATION_BYTES = 2;
const NOTIFICATION_DATA_BYTES = 4;

/** A structure inside a BAR. */
interface Structure {
  readonly bar: Region;
  readonly offset: number;
  readonly length: number;
  readonly extra: Uint8Array;
}

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

/** The first structure of a type, checked against its BAR. */
function findStructure(
  fn: PciFunction,
  capabilities: readonly VirtioCapability[],
  name: string,
  type: number,
  minLength: number,
  alignment: number,
): Structure {
  const found = capabilities.find((cap) => cap.type === type && cap.bar <= LAST_BAR && fn.bar(cap.bar).size > 0);
  if (found === undefined) {
    throw new VirtioError('STRUCTURE_MISSING', `${fn.address} has no ${name} structure`, {
      hint: 'A function without the structures of virtio 1.0 and later is a legacy device, which this driver does not drive.',
    });
  }
  const bar = fn.bar(found.bar);
  const where = `${name} structure at ${found.offset} of BAR ${found.bar}`;
  if (found.length < minLength || found.offset + found.length > bar.size || found.offset % alignment !== 0) {
    const text = `${fn.address}: ${where} with ${found.length} bytes: needs ${minLength}, aligned to ${alignment}`;
    throw new VirtioError('STRUCTURE_BOUNDS', `${text}, inside the BAR's ${bar.size}`);
  }
  return { bar, offset: found.offset, length: found.length, extra: found.extra };
}

class StandardNotifier implements QueueNotifier {
  readonly #bar: Region;
  readonly #offset: number;
  readonly #id: number;

  /** `id` is the queue's index, or what the device wants instead (NOTIF_CONFIG_DATA). */
  constructor(bar: Region, offset: number, id: number) {
    this.#bar = bar;
    this.#offset = offset;
    this.#id = id;
  }

  notify(): void {
    // hot:
    this.#bar.write16(this.#offset, this.#id);
  }
}

/** NOTIFICATION_DATA (4.1.5.2): 32 bits, which also say where the queue stands. */
class DataNotifier implements QueueNotifier {
  readonly #bar: Region;
  readonly #offset: number;
  readonly #id: number;
  readonly #position: { readonly next: number };

  constructor(bar: Region, offset: number, id: number, position: { readonly next: number }) {
    this.#bar = bar;
    this.#offset = offset;
    this.#id = id;
    this.#position = position;
  }

  notify(): void {
    // hot:
    this.#bar.write32(this.#offset, (this.#id | (this.#position.next << 16)) >>> 0);
  }
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
    const { extra } = this.#notify;
    if (extra.length < 4) {
      throw new VirtioError('STRUCTURE_BOUNDS', `${fn.address}: the notification capability has no multiplier`);
    }
    this.#notifyMultiplier = (extra[0] | (extra[1] << 8) | (extra[2] << 16) | (extra[3] << 24)) >>> 0;
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
    if (this.#common.length < CommonCfgLength.full) {
      throw new VirtioError(
        'ADMIN_QUEUE',
        `${this.address}: the common configuration has no administration queue fields`,
      );
    }
    const first = this.#read16(CommonCfgField.adminQueueIndex);
    const count = this.#read16(CommonCfgField.adminQueueNum);
    if (count === 0) throw new VirtioError('ADMIN_QUEUE', `${this.address}: the device has no administration queue`);
    // 4.1.4.3.1: beyond the other queues, and within 16 bits.
    if (first < this.queueCount() || first + count > 0x10000) {
      throw new VirtioError('ADMIN_QUEUE', `${this.address}: ${count} administration queues from index ${first} on`);
    }
    return { first, count };
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
    const { bar, offset: start, length } = this.#notify;
    const withData = this.#features.has(Feature.NOTIFICATION_DATA);
    const bytes = withData ? NOTIFICATION_DATA_BYTES : NOTIFICATION_BYTES;
    const offset = this.#read16(CommonCfgField.queueNotifyOff) * this.#notifyMultiplier;
    if (offset + bytes > length || (start + offset) % bytes !== 0) {
      throw new VirtioError(
        'STRUCTURE_BOUNDS',
        `${this.address}: queue ${index} is notified at ${offset} of a structure of ${length} bytes at ${start}`,
      );
    }
    const id = this.#features.has(Feature.NOTIF_CONFIG_DATA)
      ? this.#optional16(CommonCfgField.queueNotifConfigData, 'queue_notif_config_data')
      : index;
    if (!withData) return new StandardNotifier(bar, start + offset, id);
    if (setup.position === undefined) throw new RangeError(`queue ${index}: NOTIFICATION_DATA needs its position`);
    return new DataNotifier(bar, start + offset, id, setup.position);
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
    for (let attempt = 0; attempt < CONFIG_ATTEMPTS; attempt++) {
      const before = this.#generation();
      const value = read(config);
      if (this.#generation() === before) return value;
    }
    throw new VirtioError('CONFIG_UNSTABLE', `${this.address}: the device configuration never stops changing`);
  }

  #generation(): number {
    return this.#common.bar.read8(this.#common.offset + CommonCfgField.configGeneration);
  }
}
