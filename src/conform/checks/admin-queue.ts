/** Administration virtqueues: lengths of buffers, order (Virtio 1.4, 2.13.1). */
import { AdminOpcode, AdminStatus, decodeIdList, ResourceType } from '../../virtio/admin-wire.ts';
import { encodeGroup } from '../../virtio-net/flow-filter-wire.ts';
import { type Check, expect, must, should, untried } from '../check.ts';
import { UNTOUCHED } from '../console.ts';
import { excerpt, isEqual } from '../frames.ts';
import { succeeded } from '../offer.ts';
import {
  BAD_OPCODE,
  adminConsole as console,
  INITIAL,
  usedCommands as used,
  withCapabilities,
} from './admin-support.ts';

const QUEUE = '2.13.1';

export const adminQueueChecks: readonly Check[] = [
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
];
