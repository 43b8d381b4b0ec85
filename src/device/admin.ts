/**
 * The administration virtqueue (Virtio 1.4, 2.12.1, 2.13): commands of the self group, capabilities, resource
 * objects.
 *
 * Readable and writable parts may have any length, zero too: what is missing reads as zero, what is too much is
 * ignored, what does not fit is not written, and the used length is exactly what was written. A command that fails
 * changes nothing. The order of checks is the standard's: group type, opcode, member, then the command itself.
 *
 * Opcodes of MODIFY and QUERY are those of the text (spec-notes, 2). The SR-IOV group does not exist: the function
 * has no such capability.
 */

import { VirtioError } from '../errors.ts';
import {
  AdminGroup,
  AdminOpcode,
  AdminQualifier,
  AdminStatus,
  CapabilityId,
  decodeAdminCommand,
  decodeCapabilityCommand,
  decodeIdList,
  decodeResourceCommand,
  encodeAdminReply,
  encodeIdList,
  type ResourceCommand,
  ResourceType,
} from '../virtio/admin-wire.ts';
import type { WireRevision } from '../virtio/revision.ts';
import type { Arena } from './arena.ts';
import type { CapabilityTable } from './capabilities.ts';
import { type CommandResult, failed, OK_RESULT, succeeded } from './command-result.ts';
import { type AdminCall, type Execute, faultyReply, withFaults } from './fault-admin.ts';
import type { FaultSet } from './faults.ts';
import type { FlowFilter } from './flow-filter.ts';
import type { DeviceIpsec } from './ipsec.ts';
import { type DeviceQueue, NO_BUFFER } from './queues.ts';

/** Bytes of a command that are read; no command of ours is longer. */
const COMMAND_MAX = 4096;
/** Most commands in a row before other queues get their turn. */
const COMMANDS_PER_POLL = 64;

const SUPPORTED: readonly number[] = [
  AdminOpcode.LIST_QUERY,
  AdminOpcode.LIST_USE,
  AdminOpcode.CAP_ID_LIST_QUERY,
  AdminOpcode.DEVICE_CAP_GET,
  AdminOpcode.DRIVER_CAP_SET,
  AdminOpcode.RESOURCE_OBJ_CREATE,
  AdminOpcode.RESOURCE_OBJ_MODIFY,
  AdminOpcode.RESOURCE_OBJ_QUERY,
  AdminOpcode.RESOURCE_OBJ_DESTROY,
];
/** What a driver may use before it has said what it uses (2.12.1). */
const INITIAL: readonly number[] = [AdminOpcode.LIST_QUERY, AdminOpcode.LIST_USE];
/** `device_admin_cmd_opcodes` is one 64-bit word: all our opcodes are below 64. */
const LIST_SIZE = 8;

export interface AdminOptions {
  readonly arena: Arena;
  readonly revision: WireRevision;
  readonly capabilities: CapabilityTable;
  readonly flowFilter: FlowFilter;
  readonly ipsec: DeviceIpsec;
  readonly faults: FaultSet;
  isReceiveQueue(index: number): boolean;
  /** DEVICE_NEEDS_RESET. */
  fail(reason: string): void;
}

export class AdminProcessor {
  /** Commands processed. */
  commands = 0;
  readonly #options: AdminOptions;
  readonly #scratch: number;
  readonly #command = new Uint8Array(COMMAND_MAX);
  /** Objects of the flow filter as they were set, by type and id, for QUERY. */
  readonly #flowObjects = new Map<string, Uint8Array>();
  readonly #execute: Execute;
  #used: ReadonlySet<number> = new Set(INITIAL);

  constructor(options: AdminOptions) {
    this.#options = options;
    const { faults, fail, revision } = options;
    this.#execute = withFaults((call) => this.#run(call), faults, { supported: SUPPORTED, revision, fail });
    this.#scratch = options.arena.allocate(COMMAND_MAX);
  }

  /** Device reset: no capability set, no object, only LIST_QUERY and LIST_USE in use. */
  clear(): void {
    const { faults } = this.#options;
    this.commands = 0;
    this.#used = new Set(INITIAL);
    if (!faults.has('reset-keeps-capabilities')) this.#options.capabilities.clear();
    if (!faults.has('reset-keeps-objects')) this.#clearObjects();
  }

  #clearObjects(): void {
    this.#options.flowFilter.clear();
    this.#options.ipsec.clear();
    this.#flowObjects.clear();
  }

  close(): void {
    this.clear();
    this.#clearObjects();
    this.#options.arena.release(this.#scratch, COMMAND_MAX);
  }

  /** Works on what the queue holds; returns how many commands that was. The caller publishes. */
  poll(queue: DeviceQueue): number {
    let done = 0;
    while (done < COMMANDS_PER_POLL) {
      const id = queue.take();
      if (id === NO_BUFFER) break;
      done++;
      this.commands++;
      const written = this.#serve(queue);
      if (written < 0) break;
      if (!this.#options.faults.has('admin-silent')) queue.complete(id, written);
    }
    return done;
  }

  /** One command; returns the bytes written, or -1 when its memory is not there. */
  #serve(queue: DeviceQueue): number {
    const { u8 } = this.#options.arena;
    const read = queue.gather(0, COMMAND_MAX, this.#scratch);
    if (read < 0) return -1;
    // A private copy, zeros where the driver sent nothing: it can be wrong, but it cannot change.
    this.#command.fill(0);
    for (let i = 0; i < read; i++) this.#command[i] = u8[this.#scratch + i];
    const writable = queue.writableBytes;
    const result = this.execute(this.#command, queue.readableBytes, writable);
    this.#command.fill(0);
    const reply = faultyReply(encodeAdminReply(result), writable, this.#options.faults);
    const bytes = reply.subarray(0, COMMAND_MAX);
    u8.set(bytes, this.#scratch);
    const written = queue.scatter(0, bytes.length, this.#scratch);
    // Object bytes hold keys, in both directions.
    u8.fill(0, this.#scratch, this.#scratch + COMMAND_MAX);
    reply.fill(0);
    return written;
  }

  /** Executes a command, of which `bytes` is the readable part followed by zeros. The lengths are those of the driver's buffers. */
  execute(bytes: Uint8Array, readable = bytes.length, writable = COMMAND_MAX): CommandResult {
    return this.#execute({ ...decodeAdminCommand(bytes), readable, writable });
  }

  #run({ opcode, groupType, groupMemberId, data }: AdminCall): CommandResult {
    if (groupType !== AdminGroup.SELF) return failed(AdminStatus.EINVAL, AdminQualifier.INVALID_GROUP);
    if (!SUPPORTED.includes(opcode) || !this.#used.has(opcode)) {
      return failed(AdminStatus.EINVAL, AdminQualifier.INVALID_OPCODE);
    }
    if (opcode === AdminOpcode.LIST_QUERY) return succeeded(encodeIdList(SUPPORTED));
    if (opcode === AdminOpcode.LIST_USE) return this.#listUse(data);
    if (groupMemberId !== 0n) return failed(AdminStatus.EINVAL, AdminQualifier.INVALID_MEMBER);
    const { capabilities } = this.#options;
    if (opcode === AdminOpcode.CAP_ID_LIST_QUERY) return capabilities.list();
    if (opcode === AdminOpcode.DEVICE_CAP_GET) return capabilities.get(decodeCapabilityCommand(data).id);
    if (opcode === AdminOpcode.DRIVER_CAP_SET) return this.#capabilitySet(data);
    return this.#resource(opcode, decodeResourceCommand(this.#options.revision, opcode, data));
  }

  #listUse(data: Uint8Array): CommandResult {
    const opcodes = decodeIdList(data.subarray(0, LIST_SIZE));
    if (!opcodes.every((opcode) => SUPPORTED.includes(opcode))) return INVALID_FIELD;
    this.#used = new Set(opcodes);
    return OK_RESULT;
  }

  #capabilitySet(data: Uint8Array): CommandResult {
    const { id, data: bytes } = decodeCapabilityCommand(data);
    const isFlow = id <= CapabilityId.NET_FF_ACTION;
    const inUse = isFlow ? this.#options.flowFilter.inUse : this.#options.ipsec.inUse;
    return this.#options.capabilities.set(id, bytes, inUse);
  }

  #resource(opcode: number, command: ResourceCommand): CommandResult {
    const { type } = command;
    const { capabilities } = this.#options;
    if (type === ResourceType.NET_IPSEC_OUTB_SA || type === ResourceType.NET_IPSEC_INB_SA) {
      const use = capabilities.ipsec;
      return use === null ? DISABLED : this.#saObject(opcode, command, use);
    }
    if (type < ResourceType.NET_FF_GROUP || type > ResourceType.NET_FF_RULE) return INVALID_FIELD;
    const use = capabilities.flow;
    return use === null ? DISABLED : this.#flowObject(opcode, command, use);
  }

  #saObject(
    opcode: number,
    { type, id, object }: ResourceCommand,
    use: NonNullable<CapabilityTable['ipsec']>,
  ): CommandResult {
    const { ipsec } = this.#options;
    const refusal = existence(opcode, ipsec.has(type, id));
    if (refusal !== null) return refusal;
    if (opcode === AdminOpcode.RESOURCE_OBJ_QUERY) return succeeded(ipsec.query(type, id) ?? new Uint8Array(0));
    if (opcode === AdminOpcode.RESOURCE_OBJ_DESTROY) {
      ipsec.destroy(type, id);
      return OK_RESULT;
    }
    return ipsec.set(type, id, object, use, opcode === AdminOpcode.RESOURCE_OBJ_MODIFY);
  }

  #flowObject(opcode: number, command: ResourceCommand, use: NonNullable<CapabilityTable['flow']>): CommandResult {
    const { type, id, object } = command;
    const { flowFilter } = this.#options;
    const key = `${type}:${id}`;
    const refusal = existence(opcode, flowFilter.has(type, id));
    if (refusal !== null) return refusal;
    if (opcode === AdminOpcode.RESOURCE_OBJ_QUERY) return succeeded(this.#flowObjects.get(key) ?? new Uint8Array(0));
    if (opcode === AdminOpcode.RESOURCE_OBJ_DESTROY) {
      const result = flowFilter.destroy(type, id);
      if (result.status === AdminStatus.OK) this.#flowObjects.delete(key);
      return result;
    }
    try {
      const full = { ...use, isReceiveQueue: (index: number) => this.#options.isReceiveQueue(index) };
      const replace = opcode === AdminOpcode.RESOURCE_OBJ_MODIFY;
      const result = flowFilter.set(type, id, object, full, replace);
      if (result.status === AdminStatus.OK) this.#flowObjects.set(key, object.slice(0, flowObjectLength(type, object)));
      return result;
    } catch (error) {
      if (error instanceof VirtioError) return INVALID_FIELD;
      throw error;
    }
  }
}

const INVALID_FIELD = failed(AdminStatus.EINVAL, AdminQualifier.INVALID_FIELD);
/** A capability that the object depends on is disabled (5.1.9.6.4, 5.1.9.7.4; spec-notes, 12). */
const DISABLED = failed(AdminStatus.EINVAL, AdminQualifier.INVALID_OPCODE);

/** EEXIST for a CREATE of what is there, ENXIO for anything else of what is not (2.12.1.3). */
function existence(opcode: number, exists: boolean): CommandResult | null {
  const create = opcode === AdminOpcode.RESOURCE_OBJ_CREATE;
  if (create && exists) return failed(AdminStatus.EEXIST, AdminQualifier.INVALID_FIELD);
  if (!create && !exists) return failed(AdminStatus.ENXIO, AdminQualifier.INVALID_FIELD);
  return null;
}

/** Bytes of a flow filter object that was accepted. */
function flowObjectLength(type: number, object: Uint8Array): number {
  if (type === ResourceType.NET_FF_GROUP) return GROUP_LENGTH;
  if (type === ResourceType.NET_FF_RULE) return Rule.fixed + object[Rule.keyLength];
  let length: number = Selectors.fixed;
  for (let i = 0; i < object[Selectors.count]; i++)
    length += Selectors.entryFixed + object[length + Selectors.entryLength];
  return length;
}

/** The lengths in `struct virtio_net_resource_obj_ff_group`, `…_rule` and `…_classifier` (5.1.9.6.3). */
const GROUP_LENGTH = 2;
const Rule = { fixed: 16, keyLength: 9 } as const;
const Selectors = { fixed: 8, count: 0, entryFixed: 8, entryLength: 4 } as const;
