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
  'capability-short': 'cap_len of the notification capability leaves out the multiplier',
  'no-notify': 'there is no notification structure',
  'no-isr': 'there is no ISR status structure',
  'no-pci-cfg': 'there is no PCI configuration access capability',
  'common-misaligned': 'the common configuration structure is not aligned',
  'device-misaligned': 'the device-specific configuration is not aligned',
  'notify-misaligned': 'the notification structure is not aligned',
  'notify-multiplier': 'notify_off_multiplier is 3',
  'notify-short': 'the notification structure has 1 byte',
  'notification-data': 'NOTIFICATION_DATA is offered with a notification structure that does not suit it',
  'shared-memory': 'there are two shared memory regions with one id that leave their BAR',
  'vendor-data': 'there is vendor data of odd length whose vendor is virtio',
  'pci-vendor': 'the PCI vendor id is not that of virtio',
  'pci-device-id': 'the PCI device id is that of no network device',
  'pci-revision': 'the PCI revision id is 0',
  'pci-subsystem': 'the PCI subsystem id is 1',
  'pci-cfg-read': 'pci_cfg_data reads as 0',
  'pci-cfg-write': 'writes to pci_cfg_data are ignored',
  'address-halves': 'a write to the lower half of a queue address clears the upper one',
  'queue-size-zero': 'queue_size reads 0 for every queue',
  'queue-size-odd': 'queue_size reads 255, which is not a power of two',
  'notify-outside-bar': 'queue_notify_off points outside of the notification structure',
  'admin-error': 'every administration command but LIST_QUERY and LIST_USE fails with ENOMEM',
  'admin-silent': 'no administration command is ever answered',
  'admin-list-empty': 'LIST_QUERY offers no command but itself and LIST_USE',
  'admin-short-reply': 'every reply to an administration command is cut to 4 bytes',
  'query-modify-swapped': 'RESOURCE_OBJ_QUERY and MODIFY have the opcodes of the table, not those of the text',
  'adm-group-unchecked': 'commands for any group are executed as if for the function itself',
  'adm-opcode-unchecked': 'commands that do not exist succeed',
  'adm-member-unchecked': 'group_member_id is not looked at',
  'adm-opcode-first': 'an invalid opcode is found before an invalid group type',
  'adm-member-first': 'an invalid group member is found before an invalid opcode',
  'adm-invalid-as-enomem': 'commands fail with ENOMEM where it should be EINVAL',
  'adm-ok-as-ebusy': 'commands that succeed say EBUSY',
  'adm-failure-as-ok': 'commands that fail say OK',
  'adm-list-use-sticks': 'a refused LIST_USE changes the list',
  'adm-error-state': 'DEVICE_NEEDS_RESET is set when a command fails with EINVAL',
  'adm-create-first': 'a refused CREATE changes the object that is there',
  'adm-all-in-use': 'all commands are legal whatever LIST_USE said',
  'adm-list-use-ignored': 'LIST_USE succeeds and changes nothing',
  'adm-list-shrinks': 'LIST_QUERY names only what LIST_USE did',
  'adm-list-use-once': 'a list can be used only once',
  'adm-short-refused': 'commands with short buffers fail',
  'adm-long-refused': 'a LIST_QUERY with a long buffer fails',
  'adm-out-of-order': 'a DESTROY takes effect after the command that follows it',
  'adm-reserved-set': 'reserved bytes of replies are 0xff',
  'adm-status-untouched': 'status and qualifier are not written',
  'adm-writes-all': 'replies fill the buffer, however large it is',
  'cap-get-missing': 'LIST_QUERY does not name DEVICE_CAP_GET',
  'cap-list-short': 'CAP_ID_LIST_QUERY leaves out FF_SELECTOR and IPSEC_SA',
  'cap-same-refused': 'DRIVER_CAP_SET of exactly what is offered fails',
  'cap-smaller-refused': 'DRIVER_CAP_SET of less than is offered fails',
  'cap-busy-unchecked': 'DRIVER_CAP_SET succeeds where it should be EBUSY',
  'cap-unknown-as-einval': 'an unknown capability is EINVAL, not ENXIO',
  'cap-unset-allowed': 'objects can be created without capabilities',
  'obj-disabled-as-enomem': 'commands on objects fail with ENOMEM where it should be EINVAL',
  'obj-exists-as-einval': 'an object that exists is EINVAL, not EEXIST',
  'obj-missing-as-einval': 'an object that does not exist is EINVAL, not ENXIO',
  'obj-full-as-einval': 'a full table is EINVAL, not ENOSPC',
  'obj-busy-unchecked': 'commands on objects that others need succeed',
  'obj-invalid-accepted': 'a CREATE with invalid parameters succeeds',
  'obj-modify-refused': 'every MODIFY fails',
  'obj-flags-refused': 'a CREATE with flags fails',
  'obj-id-once': 'an object cannot be created again',
  'obj-ids-in-order': 'ids of objects must be 0, 1, 2 …',
  'obj-two-only': 'there is room for two objects',
  'obj-modify-destroys': 'a MODIFY that fails destroys the object',
  'obj-query-zeros': 'QUERY gives zeros',
  'obj-query-stale': 'QUERY gives what CREATE has set, whatever MODIFY did',
  'reset-keeps-capabilities': 'a reset keeps the driver capabilities',
  'reset-keeps-objects': 'a reset keeps the objects',
  'reset-keeps-queues': 'queues are worked on after a reset',
  'reset-keeps-features': 'driver_feature keeps what was written before a reset',
  'early-start': 'queues are worked on before DRIVER_OK',
  'queue-reset-ignored': 'queue_reset is ignored',
  'queue-reset-half': 'a queue that was reset is worked on',
  'queue-reset-for-good': 'a queue that was reset does not work any more',
  'queue-reset-one': 'queue_reset reads 1',
  'queue-enable-one': 'queue_enable reads 1',
  'queue-size-sticks': 'queues have their largest size, whatever the driver set',
  'queue-size-any': 'queue_size is not 0 for queues that do not exist',
  'features-ok-always': 'FEATURES_OK reads as set',
  'features-once': 'every second FEATURES_OK is refused',
  'feature-wraps': 'device_feature shows features again beyond bit 127',
  'driver-feature-zero': 'driver_feature reads 0',
  'admin-index-zero': 'admin_queue_index reads 0',
  'admin-num-high': 'admin_queue_num reads 0xffff',
  'vector-sticks': 'events are mapped to vector 0 when they are not mapped',
  'vector-kept': 'events cannot be unmapped',
  'vector-zero-only': 'events can be mapped to vector 0 only',
  'vector-wrong': 'vectors read one higher than they are',
  'vector-any': 'vectors that do not exist read as mapped',
  'capability-malformed': 'the IPsec SA capability names more modes than it holds',
  'used-id-bogus': 'used buffers have an id that no driver gave out',
  'used-id-twice': 'each buffer is returned twice',
  'used-length-too-long': 'used lengths are longer than the buffer',
  'used-length-short': 'used lengths are 8 at most',
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
