/**
 * The virtio structures of a PCI function, as registers (Virtio 1.4, 4.1.4).
 *
 * Checks read and write single registers, so nothing here hides one; but no access ever leaves a BAR, whatever the
 * capabilities say.
 */
import {
  type Capability,
  readMsix,
  readVirtioCapabilities,
  type VirtioCapability,
  walkCapabilities,
} from '../vfio/config-space.ts';
import type { PciFunction, Region } from '../vfio/function.ts';
import { FEATURE_WORDS, FeatureSet } from '../virtio/features.ts';
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

  /** Throws VfioError when the capability list is broken. */
  constructor(fn: PciFunction) {
    this.fn = fn;
    this.capabilities = walkCapabilities(fn.config);
    this.virtio = readVirtioCapabilities(fn.config, this.capabilities);
    this.msix = readMsix(fn.config, this.capabilities);
  }

  /** The first capability of a type whose BAR exists (4.1.4: others are to be ignored). */
  capability(type: number): VirtioCapability | undefined {
    return this.virtio.find((cap) => cap.type === type && cap.bar <= LAST_BAR && this.fn.bar(cap.bar).size > 0);
  }

  /** The structure of a type. Throws `Failed` when there is none. */
  window(type: number): Window {
    const cap = this.capability(type);
    const name = NAMES[type] ?? `structure of type ${type}`;
    if (cap === undefined) throw new Failed(`the function has no ${name}`);
    return new Window(name, this.fn.bar(cap.bar), cap.offset, cap.length);
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
