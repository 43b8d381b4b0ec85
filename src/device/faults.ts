/**
 * The ways in which the device can be told to misbehave: `vipsec device --fault NAME`.
 *
 * A test that cannot fail proves nothing: each check of a driver, and each check of the conformance suite, has a
 * fault here that trips it. The table says what each does; the places that do it ask `faults.has('name')`.
 */
import { InputError } from '../errors.ts';

/** Name and effect of each fault. */
export const FAULTS = {
  'no-version-1': 'VIRTIO_F_VERSION_1 is not offered',
  'features-ok-refused': 'FEATURES_OK is never set',
  'reset-stuck': 'device_status does not return to 0 after a reset',
  'needs-reset-at-start': 'DEVICE_NEEDS_RESET is set as soon as DRIVER_OK is',
  'capability-loop': 'the PCI capability list leads back to its start',
  'capability-outside-config': 'the PCI capability list leads into the header',
  'capability-outside-bar': 'the common configuration structure ends outside of its BAR',
  'capability-bad-bar': 'the notification structure is in a BAR that does not exist',
  'no-common-config': 'there is no common configuration structure',
  'queue-size-zero': 'queue_size reads 0 for every queue',
  'queue-size-odd': 'queue_size reads 255, which is not a power of two',
  'notify-outside-bar': 'queue_notify_off points outside of the notification structure',
  'admin-error': 'every administration command but LIST_QUERY and LIST_USE fails with ENOMEM',
  'admin-silent': 'no administration command is ever answered',
  'admin-list-empty': 'LIST_QUERY offers no command but itself and LIST_USE',
  'admin-short-reply': 'every reply to an administration command is cut to 4 bytes',
  'query-modify-swapped': 'RESOURCE_OBJ_QUERY and MODIFY have the opcodes of the table, not those of the text',
  'capability-malformed': 'the IPsec SA capability names more modes than it holds',
  'used-id-bogus': 'used buffers have an id that no driver gave out',
  'used-id-twice': 'each buffer is returned twice',
  'used-length-too-long': 'used lengths are longer than the buffer',
  'used-index-jump': 'the used index jumps ahead by more than the queue size',
  'rx-runt': 'received packets are shorter than the header',
  'rx-buffers-zero': 'num_buffers is 0 in received packets',
  'rx-bad-resource': 'received packets name an SA that does not exist',
  'rx-security-lie': 'packets that arrived in the clear are marked as secured',
  'tx-never-completes': 'transmitted buffers are never returned',
  'interrupt-storm': 'an interrupt is sent for every poll',
  'no-interrupts': 'no interrupt is ever sent',
  'config-unstable': 'config_generation changes with every read',
  'region-read-error': 'every BAR access is answered with an error',
  'dies-after-start': 'the process of the device ends 50 ms after DRIVER_OK',
  'dies-on-traffic': 'the process of the device ends at the 100th transmitted packet',
} as const;

export type FaultName = keyof typeof FAULTS;

/** The faults that a function has. */
export type FaultSet = ReadonlySet<FaultName>;

export const NO_FAULTS: FaultSet = new Set();

/** The set for names as a user gives them. Throws InputError `DEVICE_OPTION` for an unknown one. */
export function faultSet(names: readonly string[]): FaultSet {
  const set = new Set<FaultName>();
  for (const name of names) {
    if (!isFault(name)) {
      throw new InputError('DEVICE_OPTION', `there is no fault ${name}`, {
        hint: `the faults are ${Object.keys(FAULTS).join(', ')}`,
      });
    }
    set.add(name);
  }
  return set;
}

function isFault(name: string): name is FaultName {
  return Object.hasOwn(FAULTS, name);
}
