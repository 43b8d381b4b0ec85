/**
 * What Linux says about PCI functions in sysfs (Documentation/ABI/testing/sysfs-bus-pci): ids, driver, IOMMU group, and
 * whether a network function can be driven from user space. Reads only; `bind.ts` changes things.
 */
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { basename, join } from 'node:path';
import { InputError, VfioError } from '../errors.ts';

/** Where sysfs and procfs are mounted; tests put a folder of their own here. */
export interface KernelFiles {
  readonly sys: string;
  readonly proc: string;
}

export const KERNEL_FILES: KernelFiles = { sys: '/sys', proc: '/proc' };

/** PCI class codes: base class in the upper byte, then sub-class (PCI Code and ID Assignment). */
export const PciClass = { network: 0x02, bridge: 0x06, encryption: 0x10, accelerator: 0x12 } as const;

/** PCI ids that carry the virtio network function (Virtio 1.4, 4.1.2; Linux drivers/vdpa/octeon_ep). */
const VIRTIO_VENDOR = 0x1af4;
const VIRTIO_NET = { modern: 0x1041, transitional: 0x1000 } as const;
const OCTEON_VENDOR = 0x177d;
const OCTEON_PHYSICAL: readonly number[] = [0xb900, 0xba00, 0xbd00];
const OCTEON_VIRTUAL: readonly number[] = [0xb903, 0xba03, 0xbd03];
/** The kernel's driver of these functions: what it does to a virtual one when it lets go is told in `bind.ts`. */
export const OCTEON_DRIVER = 'octep_vdpa';

/** Drivers that leave a function alone, so that another one of its group can be used (Documentation/driver-api/vfio.rst). */
const HARMLESS_DRIVERS: readonly string[] = ['vfio-pci', 'pci-stub', 'pcieport'];
export const VFIO_DRIVER = 'vfio-pci';
/** Name of an IOMMU group that is none: the kernel makes one when no-IOMMU mode is on. */
const NO_IOMMU_NAME = 'vfio-noiommu';

/** `octeon` is a virtual function, `octeon-pf` the physical one that carries them. */
export type VirtioKind = 'modern' | 'transitional' | 'octeon' | 'octeon-pf' | 'none';

export interface GroupMember {
  readonly address: string;
  readonly driver: string | null;
  /** False when a kernel driver has it that must let go before the group can be used. */
  readonly harmless: boolean;
}

export interface PciDescription {
  /** `0000:01:00.0`. */
  readonly address: string;
  readonly vendor: number;
  readonly device: number;
  readonly subsystemVendor: number;
  readonly subsystemDevice: number;
  /** 24 bits: base class, sub-class, programming interface. */
  readonly class: number;
  readonly virtio: VirtioKind;
  readonly driver: string | null;
  /** Network interfaces that the kernel has on it. */
  readonly interfaces: readonly string[];
  /** Number of its IOMMU group; null without an IOMMU. */
  readonly group: string | null;
  /** True when the group stands for no IOMMU at all. */
  readonly noIommu: boolean;
  /** Other functions in its group. */
  readonly others: readonly GroupMember[];
  /** What keeps it from being opened here, in the order to deal with it; empty when it is ready. */
  readonly missing: readonly string[];
}

const ADDRESS = /^(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])$/i;

/** The full form of a PCI address: `01:00.0` becomes `0000:01:00.0`. Throws InputError `BAD_ADDRESS`. */
export function normalizeAddress(text: string): string {
  const match = ADDRESS.exec(text);
  if (match === null) {
    throw new InputError('BAD_ADDRESS', `'${text}' is not a PCI address`, { hint: 'write it like 0000:01:00.0' });
  }
  const [, domain = '0000', bus, slot, fn] = match;
  return `${domain}:${bus}:${slot}.${fn}`.toLowerCase();
}

export function devicePath(address: string, files: KernelFiles): string {
  return join(files.sys, 'bus/pci/devices', address);
}

/** Everything about one function. Throws VfioError `NO_SUCH_FUNCTION`. */
export function describeFunction(address: string, files: KernelFiles = KERNEL_FILES): PciDescription {
  const fn = lookUp(address, files);
  if (fn !== undefined) return fn;
  throw new VfioError('NO_SUCH_FUNCTION', `there is no PCI function ${address}`, {
    hint: '`vipsec devices` shows the network functions of this machine',
  });
}

function lookUp(address: string, files: KernelFiles): PciDescription | undefined {
  const path = devicePath(address, files);
  const vendor = number(join(path, 'vendor'));
  if (vendor === undefined) return undefined;
  const device = number(join(path, 'device')) ?? 0;
  const driver = linkName(join(path, 'driver'));
  const group = linkName(join(path, 'iommu_group'));
  const noIommu = group !== null && text(join(path, 'iommu_group/name')) === NO_IOMMU_NAME;
  const others = group === null ? [] : groupMembers(address, files);
  const virtio = virtioKind(vendor, device);
  return {
    address,
    vendor,
    device,
    subsystemVendor: number(join(path, 'subsystem_vendor')) ?? 0,
    subsystemDevice: number(join(path, 'subsystem_device')) ?? 0,
    class: number(join(path, 'class')) ?? 0,
    virtio,
    driver,
    interfaces: interfacesOf(path),
    group,
    noIommu,
    others,
    missing: missing(virtio, driver, group, noIommu, others),
  };
}

/** The functions that are network functions, or that carry a virtio network function; by address. One that goes meanwhile is left out. */
export function listFunctions(files: KernelFiles = KERNEL_FILES): PciDescription[] {
  return folder(join(files.sys, 'bus/pci/devices'))
    .sort()
    .flatMap((address) => lookUp(address, files) ?? [])
    .filter((fn) => fn.class >>> 16 === PciClass.network || fn.virtio !== 'none');
}

/** Kernel network interfaces of the function at `path`: its own, or those of the virtio device on it. */
function interfacesOf(path: string): string[] {
  const virtio = folder(path).filter((name) => /^virtio\d+$/.test(name));
  return [path, ...virtio.map((name) => join(path, name))].flatMap((home) => folder(join(home, 'net')));
}

function groupMembers(address: string, files: KernelFiles): GroupMember[] {
  const path = devicePath(address, files);
  return folder(join(path, 'iommu_group/devices'))
    .filter((name) => name !== address)
    .sort()
    .map((name) => {
      const driver = linkName(join(devicePath(name, files), 'driver'));
      return { address: name, driver, harmless: driver === null || HARMLESS_DRIVERS.includes(driver) };
    });
}

function missing(
  virtio: VirtioKind,
  driver: string | null,
  group: string | null,
  noIommu: boolean,
  others: readonly GroupMember[],
): string[] {
  if (virtio === 'octeon-pf') return ['it carries virtual functions, which are to be used'];
  const list: string[] = [];
  if (group === null) list.push('no IOMMU');
  if (noIommu) list.push('no IOMMU (the unsafe no-IOMMU mode is on)');
  const held = others.filter((other) => !other.harmless);
  if (held.length > 0) list.push(`its IOMMU group is not viable: ${namesOf(held)}`);
  if (driver !== VFIO_DRIVER) list.push(driver === null ? 'no driver, not vfio-pci' : `driver ${driver}, not vfio-pci`);
  return list;
}

/** `0000:00:1f.0 (ahci), …` for error messages and tables. */
export function namesOf(members: readonly GroupMember[]): string {
  return members.map(({ address, driver }) => `${address} (${driver ?? 'no driver'})`).join(', ');
}

function virtioKind(vendor: number, device: number): VirtioKind {
  if (vendor === VIRTIO_VENDOR && device === VIRTIO_NET.modern) return 'modern';
  if (vendor === VIRTIO_VENDOR && device === VIRTIO_NET.transitional) return 'transitional';
  if (vendor !== OCTEON_VENDOR) return 'none';
  if (OCTEON_PHYSICAL.includes(device)) return 'octeon-pf';
  return OCTEON_VIRTUAL.includes(device) ? 'octeon' : 'none';
}

/** Content of a file without white space around it; undefined when it cannot be read. */
export function text(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return undefined;
  }
}

/** Names in a folder; empty when it is not there. */
export function folder(path: string): string[] {
  try {
    return readdirSync(path);
  } catch {
    return [];
  }
}

/** Last part of what a symbolic link points to; null when there is none. */
export function linkName(path: string): string | null {
  try {
    return basename(readlinkSync(path));
  } catch {
    return null;
  }
}

function number(path: string): number | undefined {
  const value = Number(text(path) ?? 'absent');
  return Number.isSafeInteger(value) ? value : undefined;
}
