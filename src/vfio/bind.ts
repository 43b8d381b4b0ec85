/**
 * Hands a PCI function from its kernel driver to vfio-pci and back, by sysfs: `driver_override`, `unbind`,
 * `drivers_probe` (Documentation/ABI/testing/sysfs-bus-pci). Needs root.
 */
import { execFileSync } from 'node:child_process';
import { readlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { VfioError } from '../errors.ts';
import { neededInterface } from './routes.ts';
import {
  describeFunction,
  devicePath,
  folder,
  KERNEL_FILES,
  type KernelFiles,
  namesOf,
  normalizeAddress,
  OCTEON_DRIVER,
  PciClass,
  type PciDescription,
  VFIO_DRIVER,
} from './sysfs.ts';

export interface BindOptions {
  readonly files?: KernelFiles;
  /** Writes a sysfs file. */
  readonly write?: (path: string, text: string) => void;
  /** Loads a kernel module; may fail. */
  readonly loadModule?: (name: string) => void;
  /** `SSH_CONNECTION` of the session. */
  readonly sshConnection?: string | undefined;
  /** Bind without an IOMMU, where the function can read and write all memory of the machine. */
  readonly unsafeNoIommu?: boolean;
}

export interface BindResult {
  readonly address: string;
  /** The driver before; null when there was none. */
  readonly from: string | null;
  readonly to: string | null;
}

const BINDABLE: readonly number[] = [PciClass.network, PciClass.encryption, PciClass.accelerator];
const CLEAR = '\n';

/**
 * Gives function `address` to vfio-pci; does nothing when it is there already. Throws InputError `BAD_ADDRESS`, VfioError:
 * `NO_SUCH_FUNCTION`, `NOT_A_NETWORK_FUNCTION`, `PHYSICAL_FUNCTION`, `OCTEON_DRIVER`, `NO_IOMMU`, `GROUP_NOT_VIABLE`, `CARRIES_ROUTE`, `NO_VFIO_DRIVER`,
 * `NOT_PERMITTED`, `BIND_FAILED`. When it fails the function goes back to the driver it had.
 */
export function bindFunction(address: string, options: BindOptions = {}): BindResult {
  const { files = KERNEL_FILES } = options;
  const fn = describeFunction(normalizeAddress(address), files);
  checkBindable(fn, options);
  if (fn.driver === VFIO_DRIVER) return { address: fn.address, from: fn.driver, to: fn.driver };
  loadVfio(files, options.loadModule ?? modprobe);
  const write = options.write ?? writeFileSync;
  const path = devicePath(fn.address, files);
  try {
    write(join(path, 'driver_override'), VFIO_DRIVER);
    if (fn.driver !== null) write(join(path, 'driver/unbind'), fn.address);
    write(join(files.sys, 'bus/pci/drivers_probe'), fn.address);
  } catch (error) {
    giveBack(fn, files, write);
    throw refused(error, fn.address, 'bound to vfio-pci');
  }
  const { driver } = describeFunction(fn.address, files);
  if (driver === VFIO_DRIVER) return { address: fn.address, from: fn.driver, to: driver };
  giveBack(fn, files, write);
  throw new VfioError('BIND_FAILED', `vfio-pci did not take ${fn.address}; it has ${driver ?? 'no driver'} now`, {
    hint: 'the kernel log (dmesg) says why',
  });
}

/**
 * Takes function `address` from vfio-pci and lets the kernel find its own driver. Throws VfioError: `NOT_BOUND` when another
 * driver has it, `BUSY` when a process has it open (the kernel would wait for that process), `NOT_PERMITTED`, `BIND_FAILED`.
 */
export function unbindFunction(address: string, options: BindOptions = {}): BindResult {
  const { files = KERNEL_FILES } = options;
  const fn = describeFunction(normalizeAddress(address), files);
  if (fn.driver !== VFIO_DRIVER) {
    throw new VfioError('NOT_BOUND', `${fn.address} is not bound to vfio-pci but to ${fn.driver ?? 'no driver'}`);
  }
  const user = fn.group === null ? undefined : groupUser(fn, files);
  if (user !== undefined) {
    throw new VfioError('BUSY', `process ${user} has the IOMMU group of ${fn.address} open`, { hint: 'end it first' });
  }
  const write = options.write ?? writeFileSync;
  const path = devicePath(fn.address, files);
  try {
    write(join(path, 'driver_override'), CLEAR);
    write(join(path, 'driver/unbind'), fn.address);
    write(join(files.sys, 'bus/pci/drivers_probe'), fn.address);
  } catch (error) {
    throw refused(error, fn.address, 'taken from vfio-pci');
  }
  return { address: fn.address, from: VFIO_DRIVER, to: describeFunction(fn.address, files).driver };
}

function checkBindable(fn: PciDescription, options: BindOptions): void {
  const { files = KERNEL_FILES, unsafeNoIommu = false } = options;
  if (!BINDABLE.includes(fn.class >>> 16)) {
    const what = fn.class.toString(16).padStart(6, '0');
    throw new VfioError('NOT_A_NETWORK_FUNCTION', `${fn.address} is not a network function (its class is ${what})`);
  }
  if (fn.virtio === 'octeon-pf') throw physicalFunction(fn.address);
  if (fn.virtio === 'octeon' && fn.driver === OCTEON_DRIVER) throw losesWindow(fn.address);
  if ((fn.group === null || fn.noIommu) && !unsafeNoIommu) throw noIommu(fn.address);
  const held = fn.others.filter((other) => !other.harmless);
  if (held.length > 0) throw groupNotViable(fn, held);
  const { SSH_CONNECTION } = process.env;
  const needed = neededInterface(fn.interfaces, files, options.sshConnection ?? SSH_CONNECTION);
  if (needed !== undefined) {
    throw new VfioError('CARRIES_ROUTE', `${fn.address} is ${needed.interface}, which carries ${needed.because}`, {
      hint: 'move the route to another interface first, or this machine may be cut off',
    });
  }
}

function physicalFunction(address: string): VfioError {
  return new VfioError('PHYSICAL_FUNCTION', `${address} carries virtual functions, which end when its driver lets go`, {
    hint: 'bind one of its virtual functions; docs/bring-up.md tells how to create them',
  });
}

/** octep_vdpa gives a virtual function its BAR 4, and takes it back when it is unbound from that function. */
function losesWindow(address: string): VfioError {
  return new VfioError('OCTEON_DRIVER', `${OCTEON_DRIVER} takes BAR 4 away from ${address} when it lets go of it`, {
    hint: 'create the virtual functions again with sriov_drivers_autoprobe 0, so that octep_vdpa never has them',
  });
}

/** The function has no IOMMU between it and memory. */
export function noIommu(address: string): VfioError {
  return new VfioError('NO_IOMMU', `there is no IOMMU in front of ${address}: it could write to any memory`, {
    hint: 'turn the IOMMU on (VT-d or AMD-Vi in the firmware; intel_iommu=on on the kernel command line)',
  });
}

/** Functions of one group are not isolated from one another: all of them belong to the user process, or none. */
export function groupNotViable(fn: PciDescription, held: PciDescription['others']): VfioError {
  const message = `IOMMU group ${fn.group} of ${fn.address} is not viable: it also holds ${namesOf(held)}`;
  return new VfioError('GROUP_NOT_VIABLE', message, {
    hint: 'take those from their drivers too, or put the card in a slot that the IOMMU isolates',
  });
}

function loadVfio(files: KernelFiles, load: (name: string) => void): void {
  const registered = () => folder(join(files.sys, 'bus/pci/drivers')).includes(VFIO_DRIVER);
  if (registered()) return;
  load(VFIO_DRIVER);
  if (registered()) return;
  throw new VfioError('NO_VFIO_DRIVER', 'the kernel has no vfio-pci driver', { hint: 'as root: modprobe vfio-pci' });
}

function modprobe(name: string): void {
  try {
    execFileSync('modprobe', [name], { stdio: 'ignore', timeout: 10_000 });
  } catch {
    // Whether it worked is seen by the driver being there.
  }
}

/** Undoes what a failed bind did, as far as it goes. */
function giveBack(fn: PciDescription, files: KernelFiles, write: (path: string, text: string) => void): void {
  try {
    write(join(devicePath(fn.address, files), 'driver_override'), CLEAR);
    if (fn.driver !== null) write(join(files.sys, 'bus/pci/drivers_probe'), fn.address);
  } catch {
    // The error that led here is the one to report.
  }
}

function refused(error: unknown, address: string, what: string): VfioError {
  const code = error instanceof Error && 'code' in error ? error.code : undefined;
  if (code === 'EACCES' || code === 'EPERM' || code === 'EROFS') {
    return new VfioError('NOT_PERMITTED', `not allowed to change drivers: ${address} cannot be ${what}`, {
      hint: 'run this as root, with a writable /sys',
      cause: error,
    });
  }
  const reason = error instanceof Error ? error.message : String(error);
  return new VfioError('BIND_FAILED', `${address} cannot be ${what}: ${reason}`, { cause: error });
}

/** A process that has the function's group open. Only what this user may see of other processes is seen. */
function groupUser(fn: PciDescription, files: KernelFiles): string | undefined {
  const node = `/dev/vfio/${fn.noIommu ? 'noiommu-' : ''}${fn.group}`;
  for (const pid of folder(files.proc).filter((name) => /^\d+$/.test(name))) {
    const descriptors = join(files.proc, pid, 'fd');
    for (const fd of folder(descriptors)) {
      try {
        if (readlinkSync(join(descriptors, fd)) === node) return pid;
      } catch {
        // Closed meanwhile.
      }
    }
  }
  return undefined;
}
