/**
 * PCI configuration space: identity, command, BARs, capabilities.
 *
 * Source: PCI Local Bus 3.0 chapter 6, PCI Express Base 5.0 section 7.5 and 7.6, linux/pci_regs.h; the virtio vendor
 * capability is Virtio 1.4, 4.1.4. The device is not trusted: a list of capabilities that loops or leaves the
 * configuration space throws VfioError `CAPABILITY_LOOP` or `CAPABILITY_BOUNDS`.
 *
 * Left out: bridges, MSI (only MSI-X is used), power management, SR-IOV beyond finding its capability.
 */
import { VfioError } from '../errors.ts';
import type { Region } from './function.ts';

/** Type 0 header, PCI 3.0 section 6.1. */
export const ConfigHeader = {
  vendorId: 0x00,
  deviceId: 0x02,
  command: 0x04,
  status: 0x06,
  revisionId: 0x08,
  classCode: 0x09,
  headerType: 0x0e,
  bar0: 0x10,
  subsystemVendorId: 0x2c,
  subsystemId: 0x2e,
  capabilities: 0x34,
  interruptLine: 0x3c,
  interruptPin: 0x3d,
} as const;

/** PCI 3.0 section 6.2.2. */
export const PciCommand = { ioSpace: 0x1, memorySpace: 0x2, busMaster: 0x4, interruptDisable: 0x400 } as const;
/** PCI 3.0 section 6.2.3. */
export const PciStatus = { capabilityList: 0x10 } as const;

/** Capability ids, PCI Code and ID Assignment 1.11, section 2. */
export const CapabilityId = { powerManagement: 0x01, msi: 0x05, vendor: 0x09, pciExpress: 0x10, msix: 0x11 } as const;
/** Extended capability ids, the same, section 3. */
export const ExtendedCapabilityId = {
  advancedErrorReporting: 0x0001,
  serialNumber: 0x0003,
  vendor: 0x000b,
  accessControlServices: 0x000d,
  alternativeRoutingId: 0x000e,
  addressTranslation: 0x000f,
  singleRootIov: 0x0010,
} as const;

const CAPABILITY_FIRST = 0x40;
const CAPABILITY_END = 0x100;
const EXTENDED_FIRST = 0x100;

/** BAR bits, PCI 3.0 section 6.2.5.1. */
const Bar = {
  io: 0x1,
  typeMask: 0x6,
  type64: 0x4,
  prefetchable: 0x8,
  memoryMask: 0xfffffff0,
  ioMask: 0xfffffffc,
} as const;
const BAR_COUNT = 6;

export interface PciIdentity {
  readonly vendorId: number;
  readonly deviceId: number;
  readonly subsystemVendorId: number;
  readonly subsystemId: number;
  readonly revisionId: number;
  /** 24 bits: class, subclass, programming interface. */
  readonly classCode: number;
}

/** Reads the ids. All ones instead of a vendor mean that nothing answers: `DEVICE_GONE`. */
export function readIdentity(config: Region): PciIdentity {
  const vendorId = config.read16(ConfigHeader.vendorId);
  if (vendorId === 0xffff) throw new VfioError('DEVICE_GONE', 'PCI configuration space reads all ones');
  return {
    vendorId,
    deviceId: config.read16(ConfigHeader.deviceId),
    subsystemVendorId: config.read16(ConfigHeader.subsystemVendorId),
    subsystemId: config.read16(ConfigHeader.subsystemId),
    revisionId: config.read8(ConfigHeader.revisionId),
    classCode: config.read32(ConfigHeader.revisionId) >>> 8,
  };
}

/** Sets and clears bits of the command register (`PciCommand`). */
export function updateCommand(config: Region, set: number, clear = 0): void {
  config.write16(ConfigHeader.command, (config.read16(ConfigHeader.command) & ~clear) | set);
}

export interface BarRegister {
  /** 0 to 5; a 64-bit BAR takes two and is named by the lower one. */
  readonly index: number;
  readonly kind: 'memory32' | 'memory64' | 'io';
  readonly prefetchable: boolean;
  /** Address that the BAR holds now (exact below 2^53); its size is the size of the region. */
  readonly address: number;
}

/** Decodes the BARs that are there, which the sizes of their regions tell. */
export function readBars(config: Region, sizeOf: (index: number) => number): BarRegister[] {
  const bars: BarRegister[] = [];
  for (let index = 0; index < BAR_COUNT; index++) {
    if (sizeOf(index) === 0) continue;
    const low = config.read32(ConfigHeader.bar0 + 4 * index);
    if ((low & Bar.io) !== 0) {
      bars.push({ index, kind: 'io', prefetchable: false, address: (low & Bar.ioMask) >>> 0 });
      continue;
    }
    const prefetchable = (low & Bar.prefetchable) !== 0;
    const address = (low & Bar.memoryMask) >>> 0;
    if ((low & Bar.typeMask) !== Bar.type64) {
      bars.push({ index, kind: 'memory32', prefetchable, address });
      continue;
    }
    if (index + 1 === BAR_COUNT) throw new VfioError('CAPABILITY_BOUNDS', 'BAR 5 claims to be 64 bits wide');
    const high = config.read32(ConfigHeader.bar0 + 4 * (index + 1));
    bars.push({ index, kind: 'memory64', prefetchable, address: high * 2 ** 32 + address });
    index++;
  }
  return bars;
}

export interface Capability {
  readonly id: number;
  /** Where it starts in configuration space. */
  readonly offset: number;
}

/**
 * The capabilities in list order (PCI 3.0 section 6.7). The two lowest bits of a pointer are reserved and masked, as
 * the standard asks.
 */
export function walkCapabilities(config: Region): Capability[] {
  const found: Capability[] = [];
  if ((config.read16(ConfigHeader.status) & PciStatus.capabilityList) === 0) return found;
  const seen = new Set<number>();
  let offset = config.read8(ConfigHeader.capabilities) & ~3;
  while (offset !== 0) {
    if (offset < CAPABILITY_FIRST) {
      throw new VfioError('CAPABILITY_BOUNDS', `PCI capability pointer ${hex(offset)} points into the header`);
    }
    if (seen.has(offset)) throw new VfioError('CAPABILITY_LOOP', `PCI capability ${hex(offset)} leads back to itself`);
    seen.add(offset);
    found.push({ id: config.read8(offset), offset });
    offset = config.read8(offset + 1) & ~3;
  }
  return found;
}

export interface ExtendedCapability extends Capability {
  readonly version: number;
}

/** The extended capabilities (PCI Express 5.0 section 7.6.1); none when configuration space has 256 bytes. */
export function walkExtendedCapabilities(config: Region): ExtendedCapability[] {
  const found: ExtendedCapability[] = [];
  if (config.size < EXTENDED_FIRST + 4) return found;
  const seen = new Set<number>();
  let offset = EXTENDED_FIRST;
  while (offset !== 0) {
    if (offset < EXTENDED_FIRST || offset + 4 > config.size) {
      throw new VfioError('CAPABILITY_BOUNDS', `extended PCI capability pointer ${hex(offset)} is out of range`);
    }
    if (seen.has(offset)) {
      throw new VfioError('CAPABILITY_LOOP', `extended PCI capability ${hex(offset)} leads back to itself`);
    }
    seen.add(offset);
    const header = config.read32(offset);
    // An empty list is a first header of zeros, or of ones where nothing answers.
    if (header === 0 || header === 0xffffffff) return found;
    found.push({ id: header & 0xffff, version: (header >>> 16) & 0xf, offset });
    offset = (header >>> 20) & ~3;
  }
  return found;
}

/** struct virtio_pci_cap, Virtio 1.4, 4.1.4. */
export const VirtioCap = { length: 2, type: 3, bar: 4, id: 5, offset: 8, size: 12, extra: 16 } as const;

/**
 * A vendor capability of a virtio function, not yet judged: whether `bar`, `offset` and `length` make sense is for
 * the caller.
 */
export interface VirtioCapability {
  /** Where the capability starts in configuration space. */
  readonly at: number;
  /** cfg_type. */
  readonly type: number;
  readonly bar: number;
  readonly id: number;
  /** Bytes from the start of the BAR. */
  readonly offset: number;
  readonly length: number;
  /**
   * What follows the fixed 16 bytes: the notify multiplier, the upper halves of a 64-bit offset and length, vendor
   * data.
   */
  readonly extra: Uint8Array;
}

/**
 * The vendor capabilities among `capabilities`, in list order. Those too short to be a virtio_pci_cap are passed
 * over.
 */
export function readVirtioCapabilities(config: Region, capabilities: readonly Capability[]): VirtioCapability[] {
  const found: VirtioCapability[] = [];
  for (const { id, offset: at } of capabilities) {
    if (id !== CapabilityId.vendor) continue;
    const length = config.read8(at + VirtioCap.length);
    if (at + length > CAPABILITY_END) {
      throw new VfioError(
        'CAPABILITY_BOUNDS',
        `vendor capability ${hex(at)} of ${length} bytes leaves configuration space`,
      );
    }
    if (length < VirtioCap.extra) continue;
    const extra = new Uint8Array(length - VirtioCap.extra);
    for (let i = 0; i < extra.length; i++) extra[i] = config.read8(at + VirtioCap.extra + i);
    found.push({
      at,
      type: config.read8(at + VirtioCap.type),
      bar: config.read8(at + VirtioCap.bar),
      id: config.read8(at + VirtioCap.id),
      offset: config.read32(at + VirtioCap.offset),
      length: config.read32(at + VirtioCap.size),
      extra,
    });
  }
  return found;
}

/** PCI 3.0 section 6.8.2. */
export const Msix = {
  control: 2,
  table: 4,
  pendingBits: 8,
  length: 12,
  sizeMask: 0x7ff,
  barMask: 0x7,
  enable: 0x8000,
} as const;

export interface MsixCapability {
  readonly at: number;
  /** Number of vectors, 1 to 2048. */
  readonly vectors: number;
  readonly tableBar: number;
  readonly tableOffset: number;
  readonly pendingBar: number;
  readonly pendingOffset: number;
}

/** The MSI-X capability, or null. */
export function readMsix(config: Region, capabilities: readonly Capability[]): MsixCapability | null {
  const at = find(capabilities, CapabilityId.msix, Msix.length);
  if (at === null) return null;
  const table = config.read32(at + Msix.table);
  const pending = config.read32(at + Msix.pendingBits);
  return {
    at,
    vectors: (config.read16(at + Msix.control) & Msix.sizeMask) + 1,
    tableBar: table & Msix.barMask,
    tableOffset: (table & ~Msix.barMask) >>> 0,
    pendingBar: pending & Msix.barMask,
    pendingOffset: (pending & ~Msix.barMask) >>> 0,
  };
}

/** PCI Express 5.0 section 7.5.3. */
export const PciExpress = {
  deviceCapabilities: 4,
  deviceControl: 8,
  length: 12,
  functionLevelReset: 0x10000000,
  initiateReset: 0x8000,
} as const;

export interface PciExpressCapability {
  readonly at: number;
  /** Whether a function-level reset can be asked for. */
  readonly functionLevelReset: boolean;
}

/** The PCI Express capability, or null. */
export function readPciExpress(config: Region, capabilities: readonly Capability[]): PciExpressCapability | null {
  const at = find(capabilities, CapabilityId.pciExpress, PciExpress.length);
  if (at === null) return null;
  const bits = config.read32(at + PciExpress.deviceCapabilities);
  return { at, functionLevelReset: (bits & PciExpress.functionLevelReset) !== 0 };
}

/**
 * Asks for a function-level reset (PCI Express 5.0 section 6.6.2); the function is then to be left alone for 100 ms.
 */
export function initiateFunctionLevelReset(config: Region, express: PciExpressCapability): void {
  const at = express.at + PciExpress.deviceControl;
  config.write16(at, config.read16(at) | PciExpress.initiateReset);
}

function find(capabilities: readonly Capability[], id: number, length: number): number | null {
  const capability = capabilities.find((candidate) => candidate.id === id);
  if (capability === undefined) return null;
  if (capability.offset + length > CAPABILITY_END) {
    throw new VfioError('CAPABILITY_BOUNDS', `PCI capability ${hex(capability.offset)} leaves configuration space`);
  }
  return capability.offset;
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
