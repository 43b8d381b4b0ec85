/** Extended PCI capabilities that checks ask about (PCI Express 5.0, 7.6 and 9.3.3). */
import { ExtendedCapabilityId, walkExtendedCapabilities } from '../vfio/config-space.ts';
import type { Region } from '../vfio/function.ts';

export const SINGLE_ROOT_IOV = ExtendedCapabilityId.singleRootIov;
/** SR-IOV Control, and its VF Enable bit. */
const Control = { offset: 8, vfEnable: 1 } as const;

export function hasExtendedCapability(config: Region, id: number): boolean {
  return walkExtendedCapabilities(config).some((capability) => capability.id === id);
}

/** Whether virtual functions are enabled. */
export function hasVirtualFunctions(config: Region): boolean {
  const found = walkExtendedCapabilities(config).find(({ id }) => id === SINGLE_ROOT_IOV);
  return found !== undefined && (config.read16(found.offset + Control.offset) & Control.vfEnable) !== 0;
}
