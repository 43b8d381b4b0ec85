/**
 * From a device address as the user writes it to an open PCI function.
 */
import { InputError } from '../src/errors.ts';
import type { PciFunction } from '../src/vfio/function.ts';
import { openKernelVfio } from '../src/vfio/kernel.ts';
import { openVfioUser } from '../src/vfio/user.ts';

const PCI_ADDRESS = /^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$/i;

/** `0000:01:00.0` through the kernel, `vfio-user:/path` through a socket. Throws `InputError` for anything else. */
export function openFunction(address: string): PciFunction {
  if (address.startsWith('vfio-user:')) {
    const path = address.slice('vfio-user:'.length);
    if (path !== '') return openVfioUser(path);
  } else if (PCI_ADDRESS.test(address)) {
    return openKernelVfio(address.toLowerCase());
  }
  throw new InputError('DEVICE_ADDRESS', 'not an address of a PCI function', {
    hint: '0000:01:00.0 (kernel VFIO) or vfio-user:/path/to.sock',
  });
}
