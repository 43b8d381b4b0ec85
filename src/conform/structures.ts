/**
 * The virtio structures of a PCI function, as registers (Virtio 1.4, 4.1.4).
 *
 * Checks read and write single registers, so nothing here hides one; but no access ever leaves a BAR, whatever the
 * capabilities say.
 */
import { VirtioError } from '../errors.ts';
import {
  type Capability,
  readIdentity,
  readMsix,
  readVirtioCapabilities,
  type VirtioCapability,
  walkCapabilities,
} from '../vfio/config-space.ts';
import type { PciFunction, Region } from '../vfio/function.ts';
import { FEATURE_WORDS, FeatureSet } from '../virtio/features.ts';
import { OctepBar, octepModel } from '../virtio/octep-layout.ts';
import { AcknowledgedRegisters, readWindowCapabilities } from '../virtio/octep-registers.ts';
import { CommonCfgField, VirtioCfgType } from '../virtio/pci-layout.ts';
import { Failed, hex } from './check.ts';

const LAST_BAR = 5;

/** A part of a BAR. */
export class Window {
  readonly name: string;
  readonly length: number;
  readonly #bar: Region;
  readonly #offset: number;

  constructor(name: string, bar: Region, offset: number, length: number) {
    this.name = name;
    this.#bar = bar;
    this.#offset = offset;
    this.length = length;
  }

  read8(at: number): number {
    return this.#bar.read8(this.#at(at, 1));
  }
  read16(at: number): number {
    return this.#bar.read16(this.#at(at, 2));
  }
  read32(at: number): number {
    return this.#bar.read32(this.#at(at, 4));
  }
  write8(at: number, value: number): void {
    this.#bar.write8(this.#at(at, 1), value);
  }
  write16(at: number, value: number): void {
    this.#bar.write16(this.#at(at, 2), value);
  }
  write32(at: number, value: number): void {
    this.#bar.write32(this.#at(at, 4), value);
  }

  #at(at: number, width: number): number {
    const offset = this.#offset + at;
    if (at < 0 || at + width > this.length || offset + width > this.#bar.size || offset % width !== 0) {
      throw new Failed(`the ${this.name} has no ${width} aligned bytes at ${hex(at)}`);
    }
    return offset;
  }
}

/** The common configuration of an octeon_ep class function, for checks that know of no acknowledgements (`virtio/octep.ts`). */
class AcknowledgedWindow extends Window {
  readonly #registers: AcknowledgedRegisters;
  #featureWords = 0;
  #featureWord = 0;

  constructor(name: string, bar: Region, offset: number, length: number, address: string) {
    super(name, bar, offset, length);
    this.#registers = new AcknowledgedRegisters(address, bar, offset, ACKNOWLEDGE_MS);
  }

  override read32(at: number): number {
    // A word that the firmware does not know reads as the one before.
    const isUnknown = at === CommonCfgField.deviceFeature && this.#featureWord >= this.#featureWords;
    return isUnknown ? 0 : super.read32(at);
  }

  override write8(at: number, value: number): void {
    if (at !== CommonCfgField.deviceStatus || value !== 0) {
      super.write8(at, value);
      return;
    }
    this.#registers.startReset();
    this.#acknowledged(() => this.#registers.awaitReset());
  }

  override write16(at: number, value: number): void {
    if (at === CommonCfgField.queueSelect) this.#acknowledged(() => this.#registers.selectQueue(value));
    else super.write16(at, value);
  }

  override write32(at: number, value: number): void {
    if (at !== CommonCfgField.deviceFeatureSelect && at !== CommonCfgField.driverFeatureSelect) {
      super.write32(at, value);
      return;
    }
    this.#acknowledged(() => {
      if (this.#featureWords === 0) this.#featureWords = this.#registers.readFeatureWords().length;
      if (at === CommonCfgField.deviceFeatureSelect) this.#featureWord = value;
      if (value < FEATURE_WORDS) this.#registers.selectFeatures(at, value);
    });
  }

  #acknowledged(select: () => void): void {
    try {
      select();
    } catch (error) {
      throw error instanceof VirtioError ? new Failed(error.message) : error;
    }
  }
}

/** Firmware looks every 100 µs or so. */
const ACKNOWLEDGE_MS = 500;

const NAMES: Readonly<Record<number, string>> = {
  [VirtioCfgType.COMMON]: 'common configuration structure',
  [VirtioCfgType.NOTIFY]: 'notification structure',
  [VirtioCfgType.ISR]: 'ISR status structure',
  [VirtioCfgType.DEVICE]: 'device-specific configuration',
};

export class Structures {
  readonly fn: PciFunction;
  readonly capabilities: readonly Capability[];
  readonly virtio: readonly VirtioCapability[];
  readonly msix: ReturnType<typeof readMsix>;
  /** An octeon_ep class function, whose structures are in a window that configuration space does not tell of. */
  readonly isOctep: boolean;

  /** Throws VfioError when the capability list is broken, VirtioError for one in a window. */
  constructor(fn: PciFunction) {
    this.fn = fn;
    this.isOctep = octepModel(readIdentity(fn.config)) !== null;
    this.capabilities = walkCapabilities(fn.config);
    this.virtio = this.isOctep
      ? readWindowCapabilities(fn.address, fn.bar(OctepBar.window))
      : readVirtioCapabilities(fn.config, this.capabilities);
    this.msix = readMsix(fn.config, this.capabilities);
  }

  #acknowledged: Window | null = null;

  /** The first capability of a type whose BAR exists (4.1.4: others are to be ignored). */
  capability(type: number): VirtioCapability | undefined {
    return this.virtio.find((cap) => cap.type === type && cap.bar <= LAST_BAR && this.fn.bar(cap.bar).size > 0);
  }

  /** The structure of a type. Throws `Failed` when there is none. */
  window(type: number): Window {
    const cap = this.capability(type);
    const name = NAMES[type] ?? `structure of type ${type}`;
    if (cap === undefined) throw new Failed(`the function has no ${name}`);
    const bar = this.fn.bar(cap.bar);
    if (!this.isOctep || type !== VirtioCfgType.COMMON) return new Window(name, bar, cap.offset, cap.length);
    this.#acknowledged ??= new AcknowledgedWindow(name, bar, cap.offset, cap.length, this.fn.address);
    return this.#acknowledged;
  }

  get common(): Window {
    return this.window(VirtioCfgType.COMMON);
  }

  get device(): Window {
    return this.window(VirtioCfgType.DEVICE);
  }

  get isr(): Window {
    return this.window(VirtioCfgType.ISR);
  }

  get notifyMultiplier(): number {
    const extra = this.capability(VirtioCfgType.NOTIFY)?.extra;
    if (extra === undefined || extra.length < 4) throw new Failed('the notification capability has no multiplier');
    return (extra[0] | (extra[1] << 8) | (extra[2] << 16) | (extra[3] << 24)) >>> 0;
  }
}

/** What the device offers (4.1.4.3). */
export function readOffered(common: Window): FeatureSet {
  const words: number[] = [];
  for (let word = 0; word < FEATURE_WORDS; word++) {
    common.write32(CommonCfgField.deviceFeatureSelect, word);
    words.push(common.read32(CommonCfgField.deviceFeature));
  }
  return FeatureSet.fromWords(words);
}

export function writeAccepted(common: Window, features: FeatureSet): void {
  for (let word = 0; word < FEATURE_WORDS; word++) {
    common.write32(CommonCfgField.driverFeatureSelect, word);
    common.write32(CommonCfgField.driverFeature, features.words[word]);
  }
}

/** What the driver has written. */
export function readAccepted(common: Window): FeatureSet {
  const words: number[] = [];
  for (let word = 0; word < FEATURE_WORDS; word++) {
    common.write32(CommonCfgField.driverFeatureSelect, word);
    words.push(common.read32(CommonCfgField.driverFeature));
  }
  return FeatureSet.fromWords(words);
}
