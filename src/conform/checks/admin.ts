/** Administration commands and their virtqueue (Virtio 1.4, 2.12.1.5 and 2.13.1). */
import { AdminOpcode, AdminQualifier, AdminStatus, decodeIdList, ResourceType } from '../../virtio/admin-wire.ts';
import { encodeGroup } from '../../virtio-net/flow-filter-wire.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, hex, must, need, should, untried } from '../check.ts';
import { type AdminConsole, outcome, type Reply, UNTOUCHED } from '../console.ts';
import { hasVirtualFunctions } from '../extended.ts';
import { excerpt, isEqual } from '../frames.ts';
import { succeeded, useCommands } from '../offer.ts';

const COMMANDS = '2.12.1.5';
const QUEUE = '2.13.1';

/** Values that nothing has: a reserved group type, a reserved opcode, a member of the self group other than itself. */
const BAD_GROUP = 0x7777;
const BAD_OPCODE = 0x7abc;
const BAD_MEMBER = 5n;
const SR_IOV = 1;

async function console(bench: Bench): Promise<AdminConsole> {
  return bench.console(await bench.up({ admin: true }));
}

/** With all commands in use. */
async function used(bench: Bench): Promise<{ admin: AdminConsole; supported: readonly number[] }> {
  const admin = await console(bench);
  return { admin, supported: await useCommands(admin) };
}

async function withCapabilities(bench: Bench): Promise<AdminConsole> {
  const { admin, supported } = await used(bench);
  needCommand(supported, AdminOpcode.CAP_ID_LIST_QUERY);
  return admin;
}

function needCommand(supported: readonly number[], ...opcodes: readonly number[]): void {
  for (const opcode of opcodes) need(supported.includes(opcode), `the device does not support command ${hex(opcode)}`);
}

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

const INITIAL = [AdminOpcode.LIST_QUERY, AdminOpcode.LIST_USE];

/** A flow filter group, for commands that need an object. */
async function withGroup(bench: Bench): Promise<AdminConsole> {
  const admin = bench.console(await bench.up({ ipsec: true }));
  succeeded(await admin.create(ResourceType.NET_FF_GROUP, 0, encodeGroup({ priority: 7 })));
  return admin;
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
  must(
    'ADM-019',
    QUEUE,
    'What a short device-readable part leaves out counts as zero',
    ['adm-short-refused'],
    async (bench) => {
      const admin = await console(bench);
      const whole = succeeded(await admin.listQuery());
      // 8 bytes: opcode, group type, and nothing of group_member_id.
      const short = succeeded(await admin.listQuery({ readable: 8, name: 'LIST_QUERY of 8 bytes' }));
      expect(
        isEqual(short, whole),
        `a LIST_QUERY of 8 bytes gives ${excerpt(short)}, one of 24 bytes ${excerpt(whole)}`,
      );
    },
  ),
  must(
    'ADM-020',
    QUEUE,
    'What does not fit a short device-writable part is discarded',
    ['adm-short-refused', 'used-length-too-long'],
    async (bench) => {
      const admin = await withCapabilities(bench);
      const reply = await admin.capabilityIds({ writable: 16, name: 'CAP_ID_LIST_QUERY with room for 16 bytes' });
      succeeded(reply);
      expect(reply.length <= 16, `the used length is ${reply.length}`);
    },
  ),
  must(
    'ADM-021',
    QUEUE,
    'What a long device-readable part has too much is ignored',
    ['adm-long-refused'],
    async (bench) => {
      const admin = await console(bench);
      const whole = succeeded(await admin.listQuery());
      const long = succeeded(await admin.listQuery({ readable: 4096, name: 'LIST_QUERY of 4096 bytes' }));
      expect(
        isEqual(long, whole),
        `a LIST_QUERY of 4096 bytes gives ${excerpt(long)}, one of 24 bytes ${excerpt(whole)}`,
      );
    },
  ),
  must(
    'ADM-022',
    QUEUE,
    'Of a long device-writable part only the expected structure is written, and its length reported',
    ['adm-writes-all', 'used-length-short'],
    async (bench) => {
      const admin = await console(bench);
      const reply = await admin.listQuery({ writable: 4096 });
      const opcodes = decodeIdList(succeeded(reply));
      const needed = 8 + (Math.floor(Math.max(...opcodes) / 64) + 1) * 8;
      // The array may be larger, with entries of zeros, but not as large as any buffer.
      expect(reply.length < 4096, `LIST_QUERY reports ${reply.length} bytes, its reply has ${needed}`);
      const beyond = reply.bytes.subarray(reply.length).findIndex((byte) => byte !== UNTOUCHED);
      expect(beyond < 0, `LIST_QUERY reports ${reply.length} bytes and wrote byte ${reply.length + beyond}`);
    },
  ),
  should(
    'ADM-023',
    QUEUE,
    'The device-writable part is initialised up to the length of the structure',
    ['admin-short-reply', 'adm-reserved-set'],
    async (bench) => {
      const admin = await console(bench);
      const reply = await admin.listUse(INITIAL);
      expect(reply.length >= 8, `LIST_USE wrote ${reply.length} bytes of struct virtio_admin_cmd, which has 8`);
      const reserved = reply.bytes.subarray(4, 8);
      expect(
        reserved.every((byte) => byte === 0),
        `reserved2 reads ${excerpt(reserved)}`,
      );
    },
  ),
  must(
    'ADM-024',
    QUEUE,
    'No command fails just because its buffers are shorter or longer than expected',
    ['adm-short-refused', 'adm-long-refused'],
    async (bench) => {
      const admin = await console(bench);
      for (const [readable, writable] of [
        [8, 8],
        [16, 8],
        [8, 4096],
        [24, 8],
        [4096, 8],
        [4096, 4096],
      ]) {
        const reply = await admin.listQuery({
          readable,
          writable,
          name: `LIST_QUERY of ${readable} bytes with room for ${writable}`,
        });
        succeeded(reply);
      }
    },
  ),
  must(
    'ADM-025',
    QUEUE,
    'A device-writable part that is a multiple of 64 bits is initialised',
    ['admin-short-reply'],
    async (bench) => {
      const admin = await console(bench);
      const reply = await admin.listQuery({ writable: 8 });
      expect(reply.length === 8, `of 8 writable bytes ${reply.length} were written`);
    },
  ),
  must('ADM-026', QUEUE, 'status and status_qualifier are initialised', ['adm-status-untouched'], async (bench) => {
    const { admin } = await used(bench);
    const untouched = UNTOUCHED * 0x101;
    for (const reply of [await admin.listQuery(), await admin.command(BAD_OPCODE)]) {
      expect(reply.length >= 4, `${reply.name}: ${reply.length} bytes written`);
      expect(
        reply.status !== untouched && reply.qualifier !== untouched,
        `${reply.name}: status or qualifier was left as it was`,
      );
    }
  }),
  must(
    'ADM-027',
    QUEUE,
    'Commands of one queue are processed in the order in which they are queued',
    ['adm-out-of-order'],
    async (bench) => {
      const admin = bench.console(await bench.up({ ipsec: true }));
      const type = ResourceType.NET_FF_GROUP;
      const step = (opcode: number, name: string, object?: Uint8Array) => ({
        opcode,
        name,
        data: admin.objectData(opcode, type, 0, object),
      });
      const group = encodeGroup({ priority: 3 });
      const create = step(AdminOpcode.RESOURCE_OBJ_CREATE, 'CREATE', group);
      const query = step(admin.queryOpcode, 'QUERY');
      const destroy = step(AdminOpcode.RESOURCE_OBJ_DESTROY, 'DESTROY');
      const replies = await admin.batch([create, query, destroy, create, destroy, query]);
      const statuses = [...replies].sort((a, b) => a.place - b.place).map(({ status }) => status === AdminStatus.OK);
      expect(
        statuses.join() === 'true,true,true,true,true,false',
        `CREATE, QUERY, DESTROY, CREATE, DESTROY, QUERY of one object succeed as ${statuses.join(', ')}`,
      );
    },
  ),
  untried(
    'ADM-028',
    QUEUE,
    'MUST',
    'A command that fails with EAGAIN or ENOMEM has no side effects',
    'a driver cannot make a device run out of memory, or ask to be asked again',
  ),
  untried(
    'ADM-029',
    COMMANDS,
    'MUST',
    'A list that was used before a reset is not refused after it because of the list',
    'why a device refuses something does not show',
  ),
];
