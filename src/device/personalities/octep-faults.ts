/**
 * The ways in which the octep personality can be told to misbehave, besides those of `faults.ts`: what a bring-up meets on hardware that is not
 * ready yet. `vipsec device --personality octep --fault NAME`.
 */

/** Name and effect of each fault. */
export const OCTEP_FAULTS = {
  'octep-physical': 'the PCI ids are those of the physical function',
  'octep-no-window': 'BAR 4 is absent: the driver of the physical function has not given it',
  'octep-not-ready': 'the ready mark never appears, and the window is empty',
  'octep-ready-late': 'ready mark and signature appear after half a second',
  'octep-ready-taken': 'an earlier driver has taken the ready mark',
  'octep-no-signature': 'the window is empty: the firmware is that of a plain NIC',
  'octep-no-interrupts': 'the function has no rings with interrupts',
  'octep-one-interrupt': 'the function has one ring, and so one interrupt for all queues',
  'octep-capability-loop': 'the capability list in the window leads back to its start',
  'octep-capability-kind': 'the list in the window has a capability that is not a vendor one',
  'octep-capability-bar': 'the ISR structure is in BAR 2',
  'octep-capability-bounds': 'the notification structure ends outside of BAR 4',
  'octep-capability-missing': 'there is no ISR structure',
  'octep-vendor': 'the vendor capability is of another vendor',
  'octep-crypto': 'the firmware emulates a crypto device',
  'octep-select-ignored': 'selections are never acknowledged',
  'octep-queue-ignored': 'selections of queues are never acknowledged',
  'octep-reset-ignored': 'a reset is never acknowledged',
  'octep-split-only': 'RING_PACKED is not offered',
  'octep-plain-kicks': 'NOTIFICATION_DATA is not offered',
  'octep-legacy': 'VERSION_1 is not offered',
  'octep-interrupts-in-turn':
    'receive queue n has interrupt n, as with the firmware of 2024, not interrupt 2n, and no other queue has any',
} as const;

export type OctepFault = keyof typeof OCTEP_FAULTS;

export function isOctepFault(name: string): name is OctepFault {
  return Object.hasOwn(OCTEP_FAULTS, name);
}
