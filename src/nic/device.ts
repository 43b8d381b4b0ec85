/**
 * From a device address to a device: `0000:01:00.0` (a PCI function through the kernel's VFIO), `vfio-user:/path` (a PCI function in
 * another process) or `vhost-user:/path` (a port of a switch in user space).
 */
import { InputError } from '../errors.ts';
import { readIdentity } from '../vfio/config-space.ts';
import type { DeviceFunction, PciFunction } from '../vfio/function.ts';
import { openKernelVfio } from '../vfio/kernel.ts';
import { openVfioUser } from '../vfio/user.ts';
import { openOctepTransport } from '../virtio/octep.ts';
import { octepModel } from '../virtio/octep-layout.ts';
import { openStandardTransport } from '../virtio/standard.ts';
import type { VirtioTransport } from '../virtio/transport.ts';
import { openVhostUser, type VhostUserDevice, type VhostUserOptions } from '../virtio/vhost-user.ts';

const PCI_ADDRESS = /^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$/i;
const VFIO_USER = 'vfio-user:';
const VHOST_USER = 'vhost-user:';
/** What may follow the path of a vhost-user socket. */
const SERVER_OPTION = /,server(?:=(on|off|1|0))?$/;

const HINT = '0000:01:00.0 (kernel VFIO), vfio-user:/path/to.sock or vhost-user:/path/to.sock[,server=1]';

/** A device, and how its virtio structures are found. An octeon_ep class function has been waited for (`virtio/octep.ts`). */
export interface NicDevice {
  readonly fn: DeviceFunction;
  openTransport(): VirtioTransport;
}

/** Throws InputError `DEVICE_ADDRESS`, and what `openFunction`, `openPort` and `openOctepTransport` throw. */
export async function openDevice(address: string, options: VhostUserOptions = {}): Promise<NicDevice> {
  if (isPortAddress(address)) {
    const port = await openPort(address, options);
    return { fn: port, openTransport: () => port };
  }
  const fn = openFunction(address);
  try {
    if (octepModel(readIdentity(fn.config)) === null) return { fn, openTransport: () => openStandardTransport(fn) };
    const { connectTimeoutMs: readyTimeout } = options;
    const transport = await openOctepTransport(fn, readyTimeout === undefined ? {} : { readyTimeout });
    return { fn, openTransport: () => transport };
  } catch (error) {
    fn.close();
    throw error;
  }
}

/** Whether `address` names a vhost-user port. */
export function isPortAddress(address: string): boolean {
  return address.startsWith(VHOST_USER);
}

/**
 * Opens the port at `vhost-user:/path`; with `,server=1` behind the path it listens there until the switch connects. Throws InputError
 * `DEVICE_ADDRESS`, and what `openVhostUser` throws.
 */
export async function openPort(address: string, options: VhostUserOptions = {}): Promise<VhostUserDevice> {
  const rest = isPortAddress(address) ? address.slice(VHOST_USER.length) : '';
  const asked = SERVER_OPTION.exec(rest);
  const path = asked === null ? rest : rest.slice(0, asked.index);
  if (path === '') throw new InputError('DEVICE_ADDRESS', 'not an address of a vhost-user port', { hint: HINT });
  const server = asked === null ? options.server === true : asked[1] !== 'off' && asked[1] !== '0';
  return openVhostUser(path, { ...options, server });
}

/**
 * Opens the PCI function at a device address: `0000:01:00.0` through the kernel's VFIO, `vfio-user:/path` through a socket. Throws
 * InputError `DEVICE_ADDRESS`, and what `openKernelVfio` and `openVfioUser` throw.
 */
export function openFunction(address: string): PciFunction {
  if (address.startsWith(VFIO_USER) && address.length > VFIO_USER.length) {
    return openVfioUser(address.slice(VFIO_USER.length));
  }
  if (PCI_ADDRESS.test(address)) return openKernelVfio(address.toLowerCase());
  const what = isPortAddress(address) ? 'a vhost-user port is not a PCI function' : 'not an address of a PCI function';
  throw new InputError('DEVICE_ADDRESS', what, { hint: HINT });
}
