/**
 * Administration commands for the members of a group: the legacy interface (Virtio 1.4, 2.12.1.1) and device parts
 * (2.12.1.4). The suite drives one function by itself, so of most statements it says only that.
 */
import { AdminGroup, AdminStatus, decodeIdList } from '../../virtio/admin-wire.ts';
import { type Check, expect, must, need, untried } from '../check.ts';
import { succeeded } from '../offer.ts';

const LEGACY = '2.12.1.1.6';
const PARTS = '2.12.1.4.4.1';
/** Opcodes (2.12.1): COMMON_CFG_WRITE and READ, DEV_CFG_WRITE and READ; PARTS_METADATA_GET, PARTS_GET, PARTS_SET, MODE_SET. */
const LEGACY_COMMANDS = [2, 3, 4, 5] as const;
const NOTIFY_INFO = 6;
const PARTS_COMMANDS = [0xe, 0xf, 0x10, 0x11] as const;
const MEMBER =
  'the command works on a virtual function of the function that executes it, and this suite drives one function';

/** Of commands that belong together, a device has all or none. */
function allOrNone(id: Check['id'], section: string, title: string, opcodes: readonly number[], fault: string): Check {
  return must(id, section, title, [fault], async (bench) => {
    const admin = bench.console(await bench.up({ admin: true }));
    const own = decodeIdList(succeeded(await admin.listQuery()));
    const group = await admin.listQuery({ groupType: AdminGroup.SR_IOV });
    const lists = [own, ...(group.status === AdminStatus.OK ? [decodeIdList(group.result)] : [])];
    need(
      lists.some((list) => opcodes.some((opcode) => list.includes(opcode))),
      'the device has none of these commands',
    );
    for (const list of lists) {
      const has = opcodes.filter((opcode) => list.includes(opcode));
      expect(
        has.length === 0 || has.length === opcodes.length,
        `of commands ${opcodes.join(', ')} the device has ${has.join(', ')} only`,
      );
    }
  });
}

/** Statements about what the commands do. */
function aboutMembers(
  section: string,
  first: number,
  statements: readonly (readonly ['MUST' | 'SHOULD', string])[],
): Check[] {
  return statements.map(([level, title], i) => {
    return untried(`ADM-${String(first + i).padStart(3, '0')}`, section, level, title, MEMBER);
  });
}

export const memberCommandChecks: readonly Check[] = [
  allOrNone(
    'ADM-030',
    LEGACY,
    'All of the commands for legacy configuration are supported, or none',
    LEGACY_COMMANDS,
    'adm-legacy-half',
  ),
  must(
    'ADM-031',
    LEGACY,
    'With LEGACY_NOTIFY_INFO, all commands for legacy configuration are supported',
    ['adm-legacy-half'],
    async (bench) => {
      const admin = bench.console(await bench.up({ admin: true }));
      const list = decodeIdList(succeeded(await admin.listQuery()));
      need(list.includes(NOTIFY_INFO), 'the device has no LEGACY_NOTIFY_INFO');
      const missing = LEGACY_COMMANDS.filter((opcode) => !list.includes(opcode));
      expect(missing.length === 0, `commands ${missing.join(', ')} are missing`);
    },
  ),
  ...aboutMembers(LEGACY, 32, [
    ['MUST', 'data of the legacy configuration commands is little-endian'],
    ['MUST', 'LEGACY_COMMON_CFG commands fail for what is not a single field of the common configuration'],
    ['MUST', 'LEGACY_DEV_CFG commands fail for what is not a single field of the device configuration'],
    ['MUST', 'LEGACY_COMMON_CFG_WRITE has the effect of a write through the legacy interface'],
    ['MUST', 'LEGACY_COMMON_CFG_READ has the effect of a read through the legacy interface'],
    ['MUST', 'LEGACY_DEV_CFG_WRITE has the effect of a write through the legacy interface'],
    ['MUST', 'LEGACY_DEV_CFG_READ has the effect of a read through the legacy interface'],
    ['SHOULD', 'Owner and member have revision and subsystem ids of non-transitional devices'],
    ['SHOULD', 'The owner has the PCI device id of a non-transitional device'],
    ['MUST', 'A notification at an address of LEGACY_NOTIFY_INFO works as one by LEGACY_COMMON_CFG_WRITE'],
    ['MUST', 'The last entry of LEGACY_NOTIFY_INFO has flags 0'],
    ['MUST', 'Valid entries of LEGACY_NOTIFY_INFO name a BAR that is not hardwired to zero'],
    ['MUST', 'Valid entries of LEGACY_NOTIFY_INFO have an offset that is 2-byte aligned'],
  ]),
  allOrNone(
    'ADM-045',
    PARTS,
    'All of the commands for device parts are supported, or none',
    PARTS_COMMANDS,
    'adm-parts-half',
  ),
  ...aboutMembers(PARTS, 46, [
    ['MUST', 'Device parts can be got several times'],
    ['MUST', 'Device parts come in the order of the table'],
    ['SHOULD', 'DEV_PARTS_SET fails if the device is not stopped'],
    ['MUST', 'The same or different device parts can be set several times'],
    ['MUST', 'DEV_PARTS_SET fails when the length of a part is another than in the device'],
    ['MUST', 'DEV_PARTS_SET does not set DEV_FEATURES, but verifies that they are the same'],
    ['MUST', 'A member that is stopped initiates no PCI transaction'],
    ['MUST', 'Outstanding PCI transactions are finished before DEV_MODE_SET completes'],
    ['MUST', 'A member that is stopped has written the descriptors of all buffers that it has observed'],
    ['MUST', 'A member that is stopped accepts notifications'],
    ['MUST', 'A member that is stopped answers PCI reads with valid values'],
    ['MUST', 'A member works the same way for PCI interfaces in any mode'],
    ['MUST', 'A member that is stopped generates no PME'],
    ['MUST', 'A device that is stopped does not access virtqueues, or what they refer to'],
    ['MUST', 'A device that is stopped sends no notification'],
    ['MUST', 'DEV_MODE_SET and DEV_PARTS_SET are answered after a function-level reset in progress'],
    ['MUST', 'DEV_MODE_SET and DEV_PARTS_SET are answered after a device reset in progress'],
    ['MUST', 'DEV_MODE_SET and DEV_PARTS_SET are answered after a power state transition in progress'],
    ['MUST', 'Stopping a device that is stopped succeeds'],
    ['MUST', 'Resuming a device that is not stopped succeeds'],
    ['MUST', 'A reset or function-level reset of the member clears its parts to their defaults'],
    ['MUST', 'DRV_FEATURES and PCI_COMMON_CFG come after DEV_FEATURES'],
    ['SHOULD', 'DEV_PARTS_SET verifies DEV_FEATURES, PCI_COMMON_CFG and DEV_CFG, and does not apply them'],
  ]),
];
