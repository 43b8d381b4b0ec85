/**
 * `vipsec unbind`: a PCI function goes from vfio-pci back to the driver that the kernel finds for it.
 */
import type { Command } from 'commander';
import { unbindFunction } from '../../src/vfio/bind.ts';
import { driverCommand } from './bind.ts';

export function command(): Command {
  return driverCommand('unbind', 'hand a function from vfio-pci back to the kernel', unbindFunction);
}
