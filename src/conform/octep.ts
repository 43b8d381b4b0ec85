/**
 * Which statements of the standard are not about octeon_ep class functions: what such hardware does in another way by design (`virtio/octep-layout.ts`).
 * What it does against the standard within its own design is checked like any other device's.
 */
import type { PciIdentity } from '../vfio/config-space.ts';
import { octepModel } from '../virtio/octep-layout.ts';

/** Sections, with all below them, and what stands in their place. */
const ELSEWHERE: readonly (readonly [section: string, reason: string])[] = [
  ['4.1.2', 'the function has the PCI ids of its vendor'],
  ['4.1.4.5', 'the ISR byte is written by the driver, and tells of configuration changes only'],
  ['4.1.4.9', 'the structures are in a window that configuration space does not know of'],
  ['4.1.5.1', 'interrupts belong to queues from the start, and are not mapped'],
  ['4.1.5.3', 'interrupts belong to queues from the start, and are not mapped'],
  ['2.8.10', 'the firmware looks at event suppression once, when it is started, and never asks for silence'],
];

/** Why `section` is not about a function with these ids; null when it is. */
export function notAboutOctep(section: string, identity: PciIdentity): string | null {
  if (octepModel(identity) === null) return null;
  const found = ELSEWHERE.find(([prefix]) => section === prefix || section.startsWith(`${prefix}.`));
  return found === undefined ? null : `not of an octeon_ep class function: ${found[1]}`;
}
