/** Administration commands (Virtio 1.4, 2.12.1.5). */
import { AdminOpcode, AdminQualifier, AdminStatus, decodeIdList, ResourceType } from '../../virtio/admin-wire.ts';
import { encodeGroup } from '../../virtio-net/flow-filter-wire.ts';
import { type Check, expect, hex, must, need, should, untried } from '../check.ts';
import { outcome, type Reply } from '../console.ts';
import { hasVirtualFunctions } from '../extended.ts';
import { excerpt, isEqual } from '../frames.ts';
import { succeeded } from '../offer.ts';
import {
  BAD_OPCODE,
  adminConsole as console,
  INITIAL,
  needCommand,
  usedCommands as used,
  withGroup,
} from './admin-support.ts';

const COMMANDS = '2.12.1.5';

/** Values that nothing has: a reserved group type, a member of the self group other than itself. */
const BAD_GROUP = 0x7777;
const BAD_MEMBER = 5n;
const SR_IOV = 1;

function expectInvalid(reply: Reply, qualifier: number): void {
  const wanted = { status: AdminStatus.EINVAL, qualifier };
  expect(
    reply.status === wanted.status && reply.qualifier === qualifier,
    () => `${reply.name}: expected ${outcome(wanted)}, came ${outcome(reply)}`,
  );
}

function expectFailed(reply: Reply): void {
  expect(reply.status !== AdminStatus.OK, `${reply.name} succeeded`);
}

export const adminChecks: readonly Check[] = [
  must(
    'ADM-001',
    COMMANDS,
    'A command with an invalid group_type fails with EINVAL and INVALID_GROUP',
    ['adm-group-unchecked', 'adm-invalid-as-enomem'],
    async (bench) => {
      const admin = await console(bench);
      expectInvalid(
        await admin.listQuery({ groupType: BAD_GROUP, name: `LIST_QUERY of group ${hex(BAD_GROUP)}` }),
        AdminQualifier.INVALID_GROUP,
      );
    },
  ),
  must(
    'ADM-002',
    COMMANDS,
    'A command with an invalid opcode fails with EINVAL and INVALID_OPCODE',
    ['adm-opcode-unchecked', 'adm-invalid-as-enomem'],
    async (bench) => {
      const { admin } = await used(bench);
      expectInvalid(await admin.command(BAD_OPCODE), AdminQualifier.INVALID_OPCODE);
    },
  ),
  must(
    'ADM-003',
    COMMANDS,
    'A command that uses group_member_id fails with EINVAL and INVALID_MEMBER for an invalid one',
    ['adm-member-unchecked', 'adm-invalid-as-enomem'],
    async (bench) => {
      const admin = bench.console(await bench.up({ ipsec: true }));
      const reply = await admin.create(ResourceType.NET_FF_GROUP, 0, encodeGroup({ priority: 1 }), 0n, {
        memberId: BAD_MEMBER,
        name: `CREATE for member ${BAD_MEMBER} of the self group`,
      });
      expectInvalid(reply, AdminQualifier.INVALID_MEMBER);
    },
  ),
  must(
    'ADM-004',
    COMMANDS,
    'An invalid group_type comes before an invalid opcode',
    ['adm-opcode-first'],
    async (bench) => {
      const admin = await console(bench);
      expectInvalid(await admin.command(BAD_OPCODE, undefined, { groupType: BAD_GROUP }), AdminQualifier.INVALID_GROUP);
    },
  ),
  must(
    'ADM-005',
    COMMANDS,
    'An invalid opcode comes before an invalid group_member_id',
    ['adm-member-first'],
    async (bench) => {
      const { admin } = await used(bench);
      expectInvalid(
        await admin.command(BAD_OPCODE, undefined, { memberId: BAD_MEMBER }),
        AdminQualifier.INVALID_OPCODE,
      );
    },
  ),
  must(
    'ADM-006',
    COMMANDS,
    'A command that completes successfully has status OK',
    ['adm-ok-as-ebusy'],
    async (bench) => {
      const admin = await console(bench);
      const opcodes = decodeIdList(succeeded(await admin.listQuery()));
      bench.log(`supported: ${opcodes.map((opcode) => hex(opcode)).join(' ')}`);
      expect(
        INITIAL.every((opcode) => opcodes.includes(opcode)),
        'LIST_QUERY does not name LIST_QUERY and LIST_USE',
      );
      succeeded(await admin.listUse(INITIAL));
    },
  ),
  must('ADM-007', COMMANDS, 'A command that fails has a status other than OK', ['adm-failure-as-ok'], async (bench) => {
    const { admin } = await used(bench);
    expectFailed(await admin.command(BAD_OPCODE));
  }),
  must(
    'ADM-008',
    COMMANDS,
    'A command that fails with EINVAL has no side effects',
    ['adm-list-use-sticks'],
    async (bench) => {
      const { admin, supported } = await used(bench);
      needCommand(supported, AdminOpcode.CAP_ID_LIST_QUERY);
      const unsupported = [2, 3, 4, 5, 6, 62].find((opcode) => !supported.includes(opcode)) ?? 63;
      const refused = await admin.listUse([0, 1, unsupported]);
      need(refused.status === AdminStatus.EINVAL, `LIST_USE of an unsupported command came to ${outcome(refused)}`);
      succeeded(await admin.capabilityIds());
    },
  ),
  must(
    'ADM-009',
    COMMANDS,
    'A command that fails with EINVAL does not take the device into an error state',
    ['adm-error-state'],
    async (bench) => {
      const { admin } = await used(bench);
      const reply = await admin.command(BAD_OPCODE);
      need(reply.status === AdminStatus.EINVAL, `an invalid opcode came to ${outcome(reply)}`);
      expect(!bench.needsReset(), 'the device asks for a reset');
      succeeded(await admin.listQuery());
    },
  ),
  should(
    'ADM-010',
    COMMANDS,
    'A command that fails leaves the device state as it was',
    ['adm-create-first'],
    async (bench) => {
      const admin = await withGroup(bench);
      const group = encodeGroup({ priority: 7 });
      expectFailed(await admin.create(ResourceType.NET_FF_GROUP, 0, encodeGroup({ priority: 9 })));
      const now = succeeded(await admin.query(ResourceType.NET_FF_GROUP, 0)).subarray(0, group.length);
      expect(isEqual(now, group), `the group is ${excerpt(now)} after a refused CREATE, it was ${excerpt(group)}`);
    },
  ),
  untried(
    'ADM-011',
    COMMANDS,
    'MUST',
    'Commands of different group types operate independently',
    "a second group type exists on a physical function with virtual functions enabled, which is not the driver's to set up",
  ),
  must(
    'ADM-012',
    COMMANDS,
    'After reset, only LIST_QUERY and LIST_USE are legal',
    ['adm-all-in-use'],
    async (bench) => {
      const admin = await console(bench);
      expectInvalid(await admin.capabilityIds(), AdminQualifier.INVALID_OPCODE);
      succeeded(await admin.listQuery());
    },
  ),
  must(
    'ADM-013',
    COMMANDS,
    'LIST_USE sets the list of legal commands to the one supplied',
    ['adm-list-use-ignored', 'adm-all-in-use'],
    async (bench) => {
      const { admin, supported } = await used(bench);
      needCommand(supported, AdminOpcode.CAP_ID_LIST_QUERY);
      succeeded(await admin.capabilityIds());
      succeeded(await admin.listUse(INITIAL));
      expectInvalid(await admin.capabilityIds(), AdminQualifier.INVALID_OPCODE);
      succeeded(await admin.listUse([...INITIAL, AdminOpcode.CAP_ID_LIST_QUERY]));
      succeeded(await admin.capabilityIds());
    },
  ),
  must(
    'ADM-014',
    COMMANDS,
    'A supported command that is not in the list in use fails with EINVAL and INVALID_OPCODE',
    ['adm-all-in-use', 'adm-invalid-as-enomem'],
    async (bench) => {
      const { admin, supported } = await used(bench);
      needCommand(supported, AdminOpcode.CAP_ID_LIST_QUERY, AdminOpcode.DEVICE_CAP_GET);
      succeeded(await admin.listUse([...INITIAL, AdminOpcode.CAP_ID_LIST_QUERY]));
      const [id] = decodeIdList(succeeded(await admin.capabilityIds()));
      expectInvalid(await admin.capabilityGet(id ?? 0), AdminQualifier.INVALID_OPCODE);
    },
  ),
  must('ADM-015', COMMANDS, 'The list of supported commands does not shrink', ['adm-list-shrinks'], async (bench) => {
    const { admin, supported } = await used(bench);
    succeeded(await admin.listUse(INITIAL));
    const expectAll = (now: readonly number[], when: string) => {
      const gone = supported.filter((opcode) => !now.includes(opcode));
      expect(
        gone.length === 0,
        `${when}, LIST_QUERY does not name ${gone.map((opcode) => hex(opcode)).join(', ')} any more`,
      );
    };
    expectAll(decodeIdList(succeeded(await admin.listQuery())), 'after LIST_USE of fewer commands');
    const after = await console(bench);
    expectAll(decodeIdList(succeeded(await after.listQuery())), 'after a reset');
  }),
  should(
    'ADM-016',
    COMMANDS,
    'A list that was used successfully can be used again after a reset',
    ['adm-list-use-once'],
    async (bench) => {
      const { supported } = await used(bench);
      const again = await console(bench);
      succeeded(await again.listUse(supported));
    },
  ),
  must(
    'ADM-017',
    COMMANDS,
    'Commands for the SR-IOV group fail with EINVAL and INVALID_GROUP while there are no virtual functions',
    ['adm-group-unchecked'],
    async (bench) => {
      need(!hasVirtualFunctions(bench.target.fn.config), 'virtual functions are enabled');
      const admin = await console(bench);
      expectInvalid(
        await admin.listQuery({ groupType: SR_IOV, name: 'LIST_QUERY of the SR-IOV group' }),
        AdminQualifier.INVALID_GROUP,
      );
    },
  ),
  untried(
    'ADM-018',
    COMMANDS,
    'MUST',
    'Commands for a virtual function beyond NumVFs fail with EINVAL and INVALID_MEMBER',
    "needs a physical function with virtual functions enabled, which is not the driver's to set up",
  ),
  untried(
    'ADM-029',
    COMMANDS,
    'MUST',
    'A list that was used before a reset is not refused after it because of the list',
    'why a device refuses something does not show',
  ),
];
