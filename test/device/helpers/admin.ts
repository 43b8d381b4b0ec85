/** An administration processor without a queue, and commands for it. */
import { AdminProcessor } from '../../../src/device/admin.ts';
import { Arena } from '../../../src/device/arena.ts';
import { CapabilityTable } from '../../../src/device/capabilities.ts';
import type { CommandResult } from '../../../src/device/command-result.ts';
import { faultSet } from '../../../src/device/faults.ts';
import { FlowFilter } from '../../../src/device/flow-filter.ts';
import { DeviceIpsec } from '../../../src/device/ipsec.ts';
import { ipsecWire } from '../../../src/ipsec/wire/revisions.ts';
import { PacketPool } from '../../../src/packet/pool.ts';
import {
  AdminOpcode,
  CapabilityId,
  encodeAdminCommand,
  encodeCapabilityCommand,
  encodeIdList,
  encodeResourceCommand,
} from '../../../src/virtio/admin-wire.ts';
import type { WireRevision } from '../../../src/virtio/revision.ts';

/** Opcodes that the device knows. */
export const ALL_OPCODES = [0, 1, 7, 8, 9, 10, 11, 12, 13];
const POOL_SIZE = 2 ** 20;

export class AdminBench {
  readonly arena = new Arena(4 * 2 ** 20);
  readonly pool: PacketPool;
  readonly ipsec: DeviceIpsec;
  readonly flowFilter = new FlowFilter();
  readonly capabilities: CapabilityTable;
  readonly admin: AdminProcessor;
  readonly revision: WireRevision;

  constructor(revision: WireRevision = 'virtio-1.4', faults: readonly string[] = []) {
    this.revision = revision;
    this.arena.allocate(POOL_SIZE);
    const { address, u8, u16, u32 } = this.arena;
    this.pool = new PacketPool({ address, size: POOL_SIZE, u8, u16, u32 }, { headroom: 192 });
    const wire = ipsecWire(revision);
    this.ipsec = new DeviceIpsec(this.pool, wire);
    this.capabilities = new CapabilityTable(wire, faultSet(faults));
    this.admin = new AdminProcessor({
      arena: this.arena,
      revision,
      capabilities: this.capabilities,
      flowFilter: this.flowFilter,
      ipsec: this.ipsec,
      faults: faultSet(faults),
      isReceiveQueue: (index) => index === 0 || index === 2,
      fail: () => {},
    });
  }

  /** Executes a command whose readable part is `bytes`, extended by zeros as the queue does. */
  raw(bytes: Uint8Array): CommandResult {
    const full = new Uint8Array(4096);
    full.set(bytes.subarray(0, 4096));
    return this.admin.execute(full);
  }

  command(opcode: number, data: Uint8Array = new Uint8Array(0), groupType = 0, groupMemberId = 0n): CommandResult {
    const out = new Uint8Array(4096);
    const length = encodeAdminCommand(out, { opcode, groupType, groupMemberId, data });
    return this.raw(out.subarray(0, length));
  }

  /** LIST_USE of everything. */
  use(opcodes: readonly number[] = ALL_OPCODES): CommandResult {
    return this.command(AdminOpcode.LIST_USE, encodeIdList(opcodes));
  }

  setCapability(id: number, data: Uint8Array): CommandResult {
    return this.command(AdminOpcode.DRIVER_CAP_SET, encodeCapabilityCommand(id, data));
  }

  getCapability(id: number): CommandResult {
    return this.command(AdminOpcode.DEVICE_CAP_GET, encodeCapabilityCommand(id));
  }

  /** Uses all opcodes, and sets all capabilities to what the device offers. */
  enable(): this {
    this.use();
    for (const id of Object.values(CapabilityId)) {
      const offered = this.getCapability(id).result;
      if (offered !== undefined) this.setCapability(id, offered);
    }
    return this;
  }

  object(opcode: number, type: number, id: number, object?: Uint8Array, flags?: bigint): CommandResult {
    const command = {
      type,
      id,
      ...(object === undefined ? {} : { object }),
      ...(flags === undefined ? {} : { flags }),
    };
    return this.command(opcode, encodeResourceCommand(this.revision, opcode, command));
  }

  create(type: number, id: number, object: Uint8Array, flags?: bigint): CommandResult {
    return this.object(AdminOpcode.RESOURCE_OBJ_CREATE, type, id, object, flags);
  }

  modify(type: number, id: number, object: Uint8Array): CommandResult {
    return this.object(AdminOpcode.RESOURCE_OBJ_MODIFY, type, id, object);
  }

  query(type: number, id: number): CommandResult {
    return this.object(AdminOpcode.RESOURCE_OBJ_QUERY, type, id);
  }

  destroy(type: number, id: number): CommandResult {
    return this.object(AdminOpcode.RESOURCE_OBJ_DESTROY, type, id);
  }

  close(): void {
    this.admin.close();
    this.ipsec.close();
    this.arena.close();
  }
}
