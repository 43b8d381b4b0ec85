/**
 * The transport of octeon_ep class functions: virtio structures in a window of BAR 4 that firmware polls (`octep-layout.ts`).
 *
 * What differs from the standard transport (Virtio 1.4, 4.1): a reset is asked for by 0x80; selections are made by writing bit 15 with them and
 * waiting until the firmware takes it away; `device_status` is memory and refuses nothing, so features are read back; a queue that does not exist is never
 * selected, because that would never be acknowledged; the configuration is read byte by byte; interrupts belong to queues from
 * the start, and a flag beside a queue's notification address says that one was for it. Rings are packed, notifications carry data. That DRIVER_OK was
 * seen shows in selections that are acknowledged after it.
 *
 * Left out: the mailbox that carries virtqueue state between hosts (migration), the physical function.
 */
import { VirtioError } from '../errors.ts';
import type { PciFunction, Region } from '../vfio/function.ts';
import { FEATURE_WORDS, Feature, FeatureSet } from './features.ts';
import { bringUpOctep, type OctepOptions, type OctepParts } from './octep-bring-up.ts';
import { AcknowledgeBit, CAUSE_FLAG, OCTEP_REQUIRED } from './octep-layout.ts';
import { AcknowledgedRegisters } from './octep-registers.ts';
import { CommonCfgField, DeviceStatus, NO_VECTOR } from './pci-layout.ts';
import { makeNotifier, notifyMultiplier, readAdminQueues, readUnchanged, type Structure } from './structures.ts';
import type { ConfigReader, InterruptCauses, QueueNotifier, QueueSetup, VirtioTransport } from './transport.ts';

const DEFAULT_ACKNOWLEDGE_TIMEOUT = 10_000;
/** Milliseconds for which a sign is waited for that the firmware has seen DRIVER_OK; without one the driver goes on. */
const START_TIMEOUT = 1000;
/** A look of the firmware that began before DRIVER_OK was written may acknowledge one selection, not two that are made one after the other. */
const LOOKS_AFTER_START = 2;
/** Queues begin at one. */
const PAGE = 0x1000;
/** No queue is selected. */
const NONE = -1;

/**
 * Brings an octeon_ep class function up as far as its structures (`octep-bring-up.ts`). Throws what `bringUpOctep` does.
 */
export async function openOctepTransport(fn: PciFunction, options: OctepOptions = {}): Promise<VirtioTransport> {
  const parts = await bringUpOctep(fn, options);
  return new OctepTransport(fn, parts, options.acknowledgeTimeout ?? DEFAULT_ACKNOWLEDGE_TIMEOUT);
}

/** The device configuration, byte by byte. */
class ByteReader implements ConfigReader {
  readonly #structure: Structure;

  constructor(structure: Structure) {
    this.#structure = structure;
  }

  get size(): number {
    return this.#structure.length;
  }

  read8(offset: number): number {
    const { bar, offset: start, length } = this.#structure;
    if (offset < 0 || offset >= length) {
      throw new VirtioError('CONFIG_BOUNDS', `device configuration has ${length} bytes, none at ${offset}`);
    }
    return bar.read8(start + offset);
  }

  read16(offset: number): number {
    return this.read8(offset) | (this.read8(offset + 1) << 8);
  }

  read32(offset: number): number {
    return (this.read16(offset) | (this.read16(offset + 2) << 16)) >>> 0;
  }
}

/** The flags that say what an interrupt was for. */
class CauseFlags implements InterruptCauses {
  readonly #window: Region;
  /** By queue: where its flag is in the window. */
  readonly #flags: number[] = [];

  constructor(window: Region) {
    this.#window = window;
  }

  set(queue: number, at: number): void {
    this.#flags[queue] = at;
  }

  take(queue: number): boolean {
    const at = this.#flags[queue];
    if (at === undefined || this.#window.read8(at) === 0) return false;
    this.#window.write8(at, 0);
    return true;
  }
}

class OctepTransport implements VirtioTransport {
  readonly deviceType: number;
  readonly interruptVectors: number;
  readonly requiredFeatures: FeatureSet = OCTEP_REQUIRED;
  readonly causes: InterruptCauses;
  readonly #causes: CauseFlags;
  readonly #fn: PciFunction;
  readonly #parts: OctepParts;
  readonly #config: ByteReader;
  readonly #registers: AcknowledgedRegisters;
  /** The same for selections that nothing hangs on. */
  readonly #hints: AcknowledgedRegisters;
  readonly #notifyMultiplier: number;
  #featureWords = FEATURE_WORDS;
  #features = FeatureSet.empty;
  #selected = NONE;

  constructor(fn: PciFunction, parts: OctepParts, timeout: number) {
    this.#fn = fn;
    this.#parts = parts;
    const { window, common } = parts;
    this.#registers = new AcknowledgedRegisters(fn.address, window, common.offset, timeout);
    this.#hints = new AcknowledgedRegisters(fn.address, window, common.offset, Math.min(timeout, START_TIMEOUT));
    this.deviceType = parts.deviceType;
    this.interruptVectors = Math.min(parts.interrupts, fn.interruptVectors);
    this.#config = new ByteReader(parts.config);
    this.#notifyMultiplier = notifyMultiplier(fn.address, parts.notify);
    this.#causes = new CauseFlags(parts.window);
    this.causes = this.#causes;
  }

  get address(): string {
    return this.#fn.address;
  }

  get gone(): boolean {
    return this.#fn.gone;
  }

  #at(field: number): number {
    return this.#parts.common.offset + field;
  }

  #read16(field: number): number {
    return this.#parts.window.read16(this.#at(field));
  }

  #write16(field: number, value: number): void {
    this.#parts.window.write16(this.#at(field), value);
  }

  #write64(field: number, value: number): void {
    this.#parts.window.write32(this.#at(field), value % 2 ** 32);
    this.#parts.window.write32(this.#at(field + 4), Math.floor(value / 2 ** 32));
  }

  /** After a reset was asked for, not 0 until the firmware has carried it out. */
  readStatus(): number {
    return this.#parts.window.read8(this.#at(CommonCfgField.deviceStatus));
  }

  writeStatus(status: number): void {
    if (status !== 0) {
      this.#parts.window.write8(this.#at(CommonCfgField.deviceStatus), status);
      if ((status & (DeviceStatus.DRIVER_OK | DeviceStatus.FAILED)) === DeviceStatus.DRIVER_OK) this.#awaitStart();
      return;
    }
    this.#selected = NONE;
    this.#registers.startReset();
  }

  /**
   * DRIVER_OK is a bit in memory, and frames that arrive before the firmware has looked at it are lost. Nothing says that it has; but it acknowledges a
   * selection only when it looks.
   */
  #awaitStart(): void {
    if (this.queueCount() === 0) return;
    this.#selected = NONE;
    try {
      for (let look = 0; look < LOOKS_AFTER_START; look++) this.#hints.selectQueue(0);
      this.#selected = 0;
    } catch (error) {
      if (!(error instanceof VirtioError && error.code === 'ACKNOWLEDGE_TIMEOUT')) throw error;
    }
  }

  readDeviceFeatures(): FeatureSet {
    const words = this.#registers.readFeatureWords();
    this.#featureWords = words.length;
    return FeatureSet.fromWords(Array.from({ length: FEATURE_WORDS }, (_, i) => words[i] ?? 0));
  }

  /** Throws `VirtioError` FEATURES_REJECTED when the firmware has not taken what was written. */
  writeDriverFeatures(features: FeatureSet): void {
    const { window } = this.#parts;
    const { driverFeatureSelect, driverFeature } = CommonCfgField;
    this.#features = features;
    for (let word = 0; word < this.#featureWords; word++) {
      this.#registers.selectFeatures(driverFeatureSelect, word);
      window.write32(this.#at(driverFeature), features.words[word]);
    }
    for (let word = 0; word < this.#featureWords; word++) {
      this.#registers.selectFeatures(driverFeatureSelect, word);
      const kept = window.read32(this.#at(driverFeature));
      if (kept === features.words[word]) continue;
      const text = `feature word ${word} reads ${hex(kept)}, not the ${hex(features.words[word])} that was written`;
      throw new VirtioError('FEATURES_REJECTED', `${this.address}: ${text}`);
    }
  }

  queueCount(): number {
    return this.#read16(CommonCfgField.numQueues);
  }

  adminQueues(): { readonly first: number; readonly count: number } {
    return readAdminQueues(this.address, this.#parts.common, this.queueCount());
  }

  #exists(index: number): boolean {
    if (index < this.queueCount()) return true;
    if (!this.#features.has(Feature.ADMIN_VQ)) return false;
    const { first, count } = this.adminQueues();
    return index >= first && index < first + count;
  }

  #selectQueue(index: number): void {
    if (this.#selected === index) return;
    this.#selected = NONE;
    this.#registers.selectQueue(index);
    this.#selected = index;
  }

  maxQueueSize(index: number): number {
    if (index >= AcknowledgeBit.select || !this.#exists(index)) return 0;
    this.#selectQueue(index);
    return this.#read16(CommonCfgField.queueSize);
  }

  enableQueue(index: number, setup: QueueSetup): QueueNotifier {
    const max = this.maxQueueSize(index);
    if (setup.size === 0 || setup.size > max) {
      const text = `queue ${index} takes ${max} descriptors, not ${setup.size}`;
      throw new VirtioError('QUEUE_SIZE', `${this.address}: ${text}`);
    }
    if (setup.descriptorArea % PAGE !== 0) {
      throw new RangeError(`${this.address}: the ring of queue ${index} is not at the start of a page`);
    }
    const { notify } = this.#parts;
    const offset = this.#read16(CommonCfgField.queueNotifyOff) * this.#notifyMultiplier;
    const id = this.#features.has(Feature.NOTIF_CONFIG_DATA)
      ? this.#read16(CommonCfgField.queueNotifConfigData)
      : index;
    // The cause flag behind the notification register is inside the structure, too.
    if (offset + CAUSE_FLAG + 4 > notify.length) {
      const text = `queue ${index} is notified at ${offset} of a structure of ${notify.length} bytes`;
      throw new VirtioError('STRUCTURE_BOUNDS', `${this.address}: ${text}`);
    }
    const notifier = makeNotifier(this.address, notify, { index, offset, id }, this.#features, setup);
    this.#causes.set(index, notify.offset + offset + CAUSE_FLAG);

    this.#write16(CommonCfgField.queueSize, setup.size);
    this.#write64(CommonCfgField.queueDesc, setup.descriptorArea);
    this.#write64(CommonCfgField.queueDriver, setup.driverArea);
    this.#write64(CommonCfgField.queueDevice, setup.deviceArea);
    this.#write16(CommonCfgField.queueEnable, 1);
    return notifier;
  }

  startQueueReset(index: number): void {
    this.#selectQueue(index);
    this.#write16(CommonCfgField.queueReset, 1);
  }

  isQueueReset(index: number): boolean {
    this.#selectQueue(index);
    return this.#read16(CommonCfgField.queueReset) === 0 && this.#read16(CommonCfgField.queueEnable) === 0;
  }

  /** Configuration changes come on vector 0, whatever is written. */
  setConfigVector(vector: number): void {
    if (vector === 0 || vector === NO_VECTOR) return;
    throw new VirtioError('MSIX_VECTOR', `${this.address}: configuration changes come on vector 0, not ${vector}`);
  }

  /** Not cleared by the read, but by writing 0. */
  readIsr(): number {
    const { window, isr } = this.#parts;
    const status = window.read8(isr.offset);
    if (status !== 0) window.write8(isr.offset, 0);
    return status;
  }

  readConfig<T>(read: (config: ConfigReader) => T): T {
    const { window } = this.#parts;
    return readUnchanged(
      this.address,
      () => window.read8(this.#at(CommonCfgField.configGeneration)),
      () => read(this.#config),
    );
  }
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
