/**
 * PCI configuration space of the function: 4096 bytes, what of them a driver may write, and the capability list (PCI
 * Local Bus 3.0, 6; PCI Express Base 5.0, 7; Virtio 1.4, 4.1.4).
 *
 * Left out: extended capabilities (the extended space reads as zeros: none), power management, INTx, I/O BARs, an
 * expansion ROM.
 */

import { ConfigHeader } from '../vfio/config-space.ts';
import { PCI_CAP_VENDOR, VirtioCapField, VirtioCapLength, VirtioCfgType } from '../virtio/pci-layout.ts';

export const CONFIG_SPACE_SIZE = 4096;

/** Type 0 header (PCI 3.0, 6.1): fields that drivers have no use for, beside the others. */
export const ConfigField = { ...ConfigHeader, cacheLineSize: 0x0c, latencyTimer: 0x0d } as const;

/** First byte that a capability may stand at, and the end of the space that the list may use. */
const CAPABILITIES_START = 0x40;
const CAPABILITIES_END = 0x100;

/** `command` (PCI 3.0, 6.2.2). */
export const Command = {
  memory: 1 << 1,
  busMaster: 1 << 2,
  parity: 1 << 6,
  serr: 1 << 8,
  intxDisable: 1 << 10,
} as const;
const COMMAND_WRITABLE = Command.memory | Command.busMaster | Command.parity | Command.serr | Command.intxDisable;

/** `status` (PCI 3.0, 6.2.3). */
export const Status = { interrupt: 1 << 3, capabilityList: 1 << 4 } as const;

/** Low bits of a memory BAR (PCI 3.0, 6.2.5.1). */
const BarType = { memory32: 0x0, memory64: 0x4 } as const;

/** Capability ids (PCI Code and ID Assignment). */
export const CapabilityKind = { vendor: PCI_CAP_VENDOR, pcie: 0x10, msix: 0x11 } as const;

/**
 * Behind the 16 bytes of a virtio capability: `notify_off_multiplier`, or `pci_cfg_data` (Virtio 1.4, 4.1.4.4 and
 * 4.1.4.9).
 */
const CAP_EXTRA = VirtioCapField.notifyOffMultiplier;

/** MSI-X capability (PCI 3.0, 6.8.2). */
export const MsixCap = { control: 2, table: 4, pba: 8, size: 12 } as const;
export const MsixControl = { functionMask: 1 << 14, enable: 1 << 15 } as const;

/** PCI Express capability (PCIe 5.0, 7.5.3). */
const PcieCap = {
  flags: 2,
  deviceCapabilities: 4,
  deviceControl: 8,
  deviceStatus: 10,
  linkCapabilities: 12,
  linkControl: 16,
  linkStatus: 18,
  deviceCapabilities2: 36,
  deviceControl2: 40,
  size: 60,
} as const;
const PCIE_VERSION_2_ENDPOINT = 0x0002;
/** Max payload 256 bytes, role-based error reporting, function-level reset. */
const DEVICE_CAPABILITIES = 0x1 | (1 << 15) | (1 << 28);
const DeviceControl = { functionLevelReset: 1 << 15, writable: 0x7fff, default: 0x2810 } as const;
/** 2.5 GT/s, one lane. */
const LINK_SPEED_WIDTH = 0x11;

/** A virtio structure in a BAR. */
export interface StructureLocation {
  readonly configType: number;
  readonly bar: number;
  readonly offset: number;
  readonly size: number;
  /** `notify_off_multiplier`, for NOTIFY_CFG. */
  readonly multiplier?: number;
}

export interface PciLayout {
  readonly vendorId: number;
  readonly deviceId: number;
  readonly revision: number;
  /** 24 bits: class, subclass, interface. */
  readonly classCode: number;
  readonly subsystemVendorId: number;
  readonly subsystemId: number;
  /**
   * Bytes of each BAR; a power of two of at least 4096, or 0. 64-bit BARs take two indices, the second of which is 0.
   */
  readonly bars: readonly { readonly size: number; readonly wide: boolean }[];
  readonly structures: readonly StructureLocation[];
  readonly msix: { readonly vectors: number; readonly bar: number; readonly table: number; readonly pba: number };
}

/** What a write to configuration space sets off. */
export interface PciEvents {
  /** Bit 15 of Device Control was written. */
  functionLevelReset(): void;
  /** The MSI-X enable or function mask bit changed. */
  msixControl(): void;
  /** Accesses through VIRTIO_PCI_CAP_PCI_CFG; `width` is 1, 2 or 4, the access aligned. */
  readBar(bar: number, offset: number, width: number): number;
  writeBar(bar: number, offset: number, width: number, value: number): void;
}

export class ConfigSpace {
  readonly bytes = new Uint8Array(CONFIG_SPACE_SIZE);
  readonly layout: PciLayout;
  /** Offset of the MSI-X capability. */
  readonly msixAt: number;
  readonly #writable = new Uint8Array(CONFIG_SPACE_SIZE);
  readonly #initial: Uint8Array;
  readonly #events: PciEvents;
  readonly #pcieAt: number;
  /** Null when the function has no virtio structures that configuration space knows of. */
  readonly #pciCfgAt: number | null;
  #end = CAPABILITIES_START;
  #link: number = ConfigField.capabilities;

  constructor(layout: PciLayout, events: PciEvents) {
    this.layout = layout;
    this.#events = events;
    this.#header();
    for (const structure of layout.structures) this.#structure(structure);
    this.#pciCfgAt = layout.structures.length === 0 ? null : this.#pciAccess();
    this.msixAt = this.#msix();
    this.#pcieAt = this.#pcie();
    this.#initial = this.bytes.slice();
  }

  get command(): number {
    return this.#get(ConfigField.command, 2);
  }

  get msixControl(): number {
    return this.#get(this.msixAt + MsixCap.control, 2);
  }

  set msixControl(value: number) {
    const fixed = this.msixControl & ~(MsixControl.enable | MsixControl.functionMask);
    this.#put(this.msixAt + MsixCap.control, 2, fixed | (value & (MsixControl.enable | MsixControl.functionMask)));
  }

  /** The Interrupt Status bit (Virtio 1.4, 4.1.4.5). */
  set interruptStatus(on: boolean) {
    const status = this.#get(ConfigField.status, 2) & ~Status.interrupt;
    this.#put(ConfigField.status, 2, on ? status | Status.interrupt : status);
  }

  /** Everything as it was made: conventional reset or FLR. */
  reset(): void {
    this.bytes.set(this.#initial);
  }

  /** Overwrites bytes that are fixed for a driver: faults only. Survives a reset. */
  patch(at: number, width: number, value: number): void {
    this.#put(at, width, value);
    for (let i = 0; i < width; i++) this.#initial[at + i] = this.bytes[at + i];
  }

  /** `length` bytes at `at`, which must be inside. */
  read(at: number, length: number): Uint8Array {
    if (this.#pciCfgAt !== null && isInWindow(this.#pciCfgAt, at, length)) this.#readWindow(this.#pciCfgAt);
    return this.bytes.slice(at, at + length);
  }

  /** Writes bytes at `at`, which must be inside; what is not writable stays. */
  write(at: number, data: Uint8Array): void {
    const msixBefore = this.msixControl;
    let reset = false;
    for (const [i, value] of data.entries()) {
      const byte = at + i;
      if (byte === this.#pcieAt + PcieCap.deviceControl + 1)
        reset = (value & (DeviceControl.functionLevelReset >>> 8)) !== 0;
      const mask = this.#writable[byte];
      this.bytes[byte] = (this.bytes[byte] & ~mask) | (value & mask);
    }
    if (reset) {
      this.#events.functionLevelReset();
      return;
    }
    if (this.msixControl !== msixBefore) this.#events.msixControl();
    if (this.#pciCfgAt !== null && isInWindow(this.#pciCfgAt, at, data.length)) this.#writeWindow(this.#pciCfgAt);
  }

  /** The access that VIRTIO_PCI_CAP_PCI_CFG describes (Virtio 1.4, 4.1.4.9), or null when it is not a proper one. */
  #window(capability: number): { bar: number; offset: number; width: number } | null {
    const bar = this.bytes[capability + VirtioCapField.bar];
    const offset = this.#get(capability + VirtioCapField.offset, 4);
    const width = this.#get(capability + VirtioCapField.structureLength, 4);
    if (width !== 1 && width !== 2 && width !== 4) return null;
    const inside = this.layout.structures.some(
      (structure) =>
        structure.bar === bar && offset >= structure.offset && offset + width <= structure.offset + structure.size,
    );
    return inside && offset % width === 0 ? { bar, offset, width } : null;
  }

  #readWindow(capability: number): void {
    const access = this.#window(capability);
    if (access === null) return;
    const value = this.#events.readBar(access.bar, access.offset, access.width);
    this.#put(capability + CAP_EXTRA, access.width, value);
  }

  #writeWindow(capability: number): void {
    const access = this.#window(capability);
    if (access === null) return;
    const value = this.#get(capability + CAP_EXTRA, access.width);
    this.#events.writeBar(access.bar, access.offset, access.width, value);
  }

  #header(): void {
    const layout = this.layout;
    this.#put(ConfigField.vendorId, 2, layout.vendorId);
    this.#put(ConfigField.deviceId, 2, layout.deviceId);
    this.#put(ConfigField.status, 2, Status.capabilityList);
    this.#put(ConfigField.revisionId, 1, layout.revision);
    this.#put(ConfigField.classCode, 3, layout.classCode);
    this.#put(ConfigField.subsystemVendorId, 2, layout.subsystemVendorId);
    this.#put(ConfigField.subsystemId, 2, layout.subsystemId);
    this.#allow(ConfigField.command, 2, COMMAND_WRITABLE);
    this.#allow(ConfigField.cacheLineSize, 1, 0xff);
    this.#allow(ConfigField.latencyTimer, 1, 0xff);
    this.#allow(ConfigField.interruptLine, 1, 0xff);
    for (const [i, { size, wide }] of layout.bars.entries()) {
      if (size === 0) continue;
      const at = ConfigField.bar0 + 4 * i;
      this.#put(at, 4, wide ? BarType.memory64 : BarType.memory32);
      // Address bits below the size read as zero: that is how the size is found out.
      this.#allow(at, 4, -size & 0xfffffff0);
      if (wide) this.#allow(at + 4, 4, -1);
    }
  }

  /** Appends room for a capability to the list and returns where. */
  #append(kind: number, size: number): number {
    const at = this.#end;
    if (at + size > CAPABILITIES_END) throw new RangeError('the capabilities do not fit');
    this.#end = Math.ceil((at + size) / 4) * 4;
    this.bytes[this.#link] = at;
    this.bytes[at] = kind;
    this.#link = at + VirtioCapField.next;
    return at;
  }

  #structure(structure: StructureLocation): number {
    const extra = structure.multiplier === undefined ? 0 : 4;
    const size = VirtioCapLength.plain + extra;
    const at = this.#append(CapabilityKind.vendor, size);
    this.#put(at + VirtioCapField.length, 1, size);
    this.#put(at + VirtioCapField.cfgType, 1, structure.configType);
    this.#put(at + VirtioCapField.bar, 1, structure.bar);
    this.#put(at + VirtioCapField.offset, 4, structure.offset);
    this.#put(at + VirtioCapField.structureLength, 4, structure.size);
    if (structure.multiplier !== undefined) this.#put(at + CAP_EXTRA, 4, structure.multiplier);
    return at;
  }

  #pciAccess(): number {
    const at = this.#structure({ configType: VirtioCfgType.PCI, bar: 0, offset: 0, size: 0, multiplier: 0 });
    this.#allow(at + VirtioCapField.bar, 1, 0xff);
    for (const field of [VirtioCapField.offset, VirtioCapField.structureLength, CAP_EXTRA])
      this.#allow(at + field, 4, -1);
    return at;
  }

  #msix(): number {
    const { vectors, bar, table, pba } = this.layout.msix;
    const at = this.#append(CapabilityKind.msix, MsixCap.size);
    this.#put(at + MsixCap.control, 2, vectors - 1);
    this.#put(at + MsixCap.table, 4, table | bar);
    this.#put(at + MsixCap.pba, 4, pba | bar);
    this.#allow(at + MsixCap.control, 2, MsixControl.enable | MsixControl.functionMask);
    return at;
  }

  #pcie(): number {
    const at = this.#append(CapabilityKind.pcie, PcieCap.size);
    this.#put(at + PcieCap.flags, 2, PCIE_VERSION_2_ENDPOINT);
    this.#put(at + PcieCap.deviceCapabilities, 4, DEVICE_CAPABILITIES);
    this.#put(at + PcieCap.deviceControl, 2, DeviceControl.default);
    this.#put(at + PcieCap.linkCapabilities, 4, LINK_SPEED_WIDTH);
    this.#put(at + PcieCap.linkStatus, 2, LINK_SPEED_WIDTH);
    this.#allow(at + PcieCap.deviceControl, 2, DeviceControl.writable);
    this.#allow(at + PcieCap.linkControl, 2, 0xffff);
    this.#allow(at + PcieCap.deviceControl2, 2, 0xffff);
    return at;
  }

  #get(at: number, width: number): number {
    let value = 0;
    for (let i = width - 1; i >= 0; i--) value = value * 256 + this.bytes[at + i];
    return value;
  }

  #put(at: number, width: number, value: number): void {
    for (let i = 0; i < width; i++) this.bytes[at + i] = value >>> (8 * i);
  }

  #allow(at: number, width: number, mask: number): void {
    for (let i = 0; i < width; i++) this.#writable[at + i] |= mask >>> (8 * i);
  }
}

/** Whether `length` bytes at `at` touch `pci_cfg_data` of the capability (Virtio 1.4, 4.1.4.9). */
function isInWindow(capability: number, at: number, length: number): boolean {
  const window = capability + CAP_EXTRA;
  return at < window + 4 && at + length > window;
}
