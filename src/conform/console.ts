/**
 * Administration commands for checks: any bytes, any length, one or many at a time (Virtio 1.4, 2.12.1, 2.13).
 */
import {
  AdminGroup,
  AdminOpcode,
  AdminStatus,
  adminOpcodeName,
  adminPartLength,
  adminQualifierName,
  adminStatusName,
  capabilityName,
  decodeAdminReply,
  encodeAdminCommand,
  encodeCapabilityCommand,
  encodeIdList,
  encodeResourceCommand,
  ResourceType,
  resourceTypeName,
} from '../virtio/admin-wire.ts';
import type { WireRevision } from '../virtio/revision.ts';
import { Failed, hex } from './check.ts';
import type { Trace } from './driver.ts';
import type { CheckRing, Piece } from './ring.ts';
import type { Target } from './target.ts';
import type { Patience } from './time.ts';

/** What the device left in a reply that it did not touch. */
export const UNTOUCHED = 0xee;
/** Bytes of a command, and of a reply. */
const COMMAND = 8192;
const REPLY = 8192;
/** Bytes of room for a result, unless a check wants another. */
const ROOM = 4088;

export interface Reply {
  /** What was sent, for messages: `LIST_QUERY`. */
  readonly name: string;
  readonly status: number;
  readonly qualifier: number;
  readonly result: Uint8Array;
  /** As the device reported. */
  readonly length: number;
  /** The whole writable part, `UNTOUCHED` where the device wrote nothing. */
  readonly bytes: Uint8Array;
}

export interface CommandOptions {
  readonly groupType?: number;
  readonly memberId?: bigint;
  /** Bytes of the readable part, if it is to be cut or filled up (with ones). */
  readonly readable?: number;
  /** Bytes of the writable part. */
  readonly writable?: number;
  /** Into how many descriptors each part is split. */
  readonly split?: number;
  /** What this is, for messages. */
  readonly name?: string;
}

/** Bytes of a reply before its result, and of a command on an object before the object (2.13). */
const STATUS_LENGTH = 8;
const ObjectCommand = { opcode: 0, type: 24, object: 40 } as const;

/** Whether a command is about an SA object, which has keys. */
function isAboutSa(command: Uint8Array): boolean {
  const at = (offset: number) => command[offset] | (command[offset + 1] << 8);
  const isObject = command.length > ObjectCommand.type && at(ObjectCommand.opcode) >= AdminOpcode.RESOURCE_OBJ_CREATE;
  return isObject && SA_TYPES.includes(at(ObjectCommand.type));
}

const SA_TYPES: readonly number[] = [ResourceType.NET_IPSEC_OUTB_SA, ResourceType.NET_IPSEC_INB_SA];

function shownName(name: string, command: Uint8Array): string {
  return isAboutSa(command) ? `${name}, the SA left out` : name;
}

/** A command without the SA in it: reports show no keys, not even those that nobody uses. */
function withoutSa(command: Uint8Array): Uint8Array {
  return isAboutSa(command) ? command.subarray(0, ObjectCommand.object) : command;
}

/** `EINVAL/INVALID_OPCODE`. */
export function outcome({ status, qualifier }: Pick<Reply, 'status' | 'qualifier'>): string {
  return `${adminStatusName(status)}/${adminQualifierName(qualifier)}`;
}

export interface AdminConsoleOptions {
  readonly patience: Patience;
  readonly revision: WireRevision;
  readonly log: (line: string) => void;
  readonly trace: Trace;
  readonly kick: () => void;
}

export class AdminConsole {
  readonly ring: CheckRing;
  /** How objects are laid out. */
  revision: WireRevision;
  /** QUERY and MODIFY: the standard contradicts itself (spec-notes, 13). */
  queryOpcode: number = AdminOpcode.RESOURCE_OBJ_QUERY;
  modifyOpcode: number = AdminOpcode.RESOURCE_OBJ_MODIFY;
  /** Whether commands that succeed are left out of the report. */
  #quiet = false;
  readonly #target: Target;
  readonly #patience: Patience;
  readonly #log: (line: string) => void;
  readonly #trace: Trace;
  readonly #kick: () => void;
  readonly #command: number;
  readonly #reply: number;

  constructor(target: Target, ring: CheckRing, options: AdminConsoleOptions) {
    this.ring = ring;
    this.revision = options.revision;
    this.#target = target;
    this.#patience = options.patience;
    this.#log = options.log;
    this.#trace = options.trace;
    this.#kick = options.kick;
    this.#command = target.allocate(COMMAND);
    this.#reply = target.allocate(REPLY);
  }

  /** Does something that is no part of what a check is about. */
  async quietly<T>(work: () => Promise<T>): Promise<T> {
    const before = this.#quiet;
    this.#quiet = true;
    try {
      return await work();
    } finally {
      this.#quiet = before;
    }
  }

  /** Sends any bytes, and takes a reply of up to `writable` bytes. */
  async raw(bytes: Uint8Array, writable: number, name: string, split = 1): Promise<Reply> {
    const { u8 } = this.#target.memory;
    u8.set(bytes, this.#command);
    u8.fill(UNTOUCHED, this.#reply, this.#reply + REPLY);
    this.ring.offer(
      ...pieces(this.#command, bytes.length, split, false),
      ...pieces(this.#reply, writable, split, true),
    );
    if (!this.#quiet) this.#trace('sent', shownName(name, bytes), withoutSa(bytes));
    this.#kick();
    const { length } = await this.ring.wait(this.#patience);
    if (!this.#quiet) this.#traceReply(name, bytes, this.#reply, Math.min(length, writable));
    return this.#read(this.#reply, writable, length, name);
  }

  #traceReply(name: string, command: Uint8Array, at: number, length: number): void {
    const came = this.#target.memory.u8.slice(at, at + length);
    // A query gives what an SA was made with.
    this.#trace('came', shownName(name, command), isAboutSa(command) ? came.subarray(0, STATUS_LENGTH) : came);
  }

  #read(at: number, writable: number, length: number, name: string): Reply {
    const { u8 } = this.#target.memory;
    const bytes = u8.slice(at, at + writable);
    if (length > writable) throw new Failed(`${name}: used length ${length} of a buffer of ${writable} bytes`);
    const { status, qualifier, result } = decodeAdminReply(bytes.subarray(0, length));
    const reply = { name, status, qualifier, result, length, bytes };
    if (!this.#quiet || status !== AdminStatus.OK)
      this.#log(`${name} → ${outcome(reply)}${result.length > 0 ? `, ${result.length} bytes` : ''}`);
    return reply;
  }

  /** Sends a command of the self group, unless told otherwise. */
  command(opcode: number, data: Uint8Array = new Uint8Array(0), options: CommandOptions = {}): Promise<Reply> {
    const bytes = this.#encode(opcode, data, options);
    const name = options.name ?? adminOpcodeName(opcode);
    return this.raw(bytes, options.writable ?? 8 + ROOM, name, options.split);
  }

  #encode(opcode: number, data: Uint8Array, options: CommandOptions): Uint8Array {
    const natural = new Uint8Array(COMMAND);
    const length = encodeAdminCommand(natural, {
      opcode,
      groupType: options.groupType ?? AdminGroup.SELF,
      groupMemberId: options.memberId ?? 0n,
      data,
    });
    const wanted = options.readable ?? length;
    if (wanted > length) natural.fill(0xff, length, wanted);
    return natural.subarray(0, wanted);
  }

  /** Sends several commands at once; the replies in the order in which the device used them. */
  async batch(
    commands: readonly { opcode: number; data: Uint8Array; name: string }[],
  ): Promise<(Reply & { readonly place: number })[]> {
    const room = 1024;
    const heads: number[] = [];
    const { u8 } = this.#target.memory;
    u8.fill(UNTOUCHED, this.#reply, this.#reply + REPLY);
    let at = this.#command;
    for (const [i, { opcode, data }] of commands.entries()) {
      const bytes = this.#encode(opcode, data, {});
      u8.set(bytes, at);
      heads.push(
        this.ring.chain({ at, length: bytes.length }, { at: this.#reply + i * room, length: room, write: true }),
      );
      at += adminPartLength(bytes.length);
    }
    for (const head of heads) this.ring.available(head);
    this.#kick();
    const replies: (Reply & { readonly place: number })[] = [];
    while (replies.length < commands.length) {
      const { id, length } = await this.ring.wait(this.#patience);
      const place = heads.indexOf(id);
      if (place < 0)
        throw new Failed(`the administration queue returned buffer ${id}, which is not one of ${heads.join(', ')}`);
      replies.push({ ...this.#read(this.#reply + place * room, room, length, commands[place].name), place });
    }
    return replies;
  }

  listQuery(options?: CommandOptions): Promise<Reply> {
    return this.command(AdminOpcode.LIST_QUERY, undefined, options);
  }

  listUse(opcodes: Iterable<number>): Promise<Reply> {
    const list = [...opcodes];
    return this.command(AdminOpcode.LIST_USE, encodeIdList(list), {
      name: `LIST_USE {${list.map((o) => hex(o)).join(' ')}}`,
    });
  }

  capabilityIds(options?: CommandOptions): Promise<Reply> {
    return this.command(AdminOpcode.CAP_ID_LIST_QUERY, undefined, options);
  }

  capabilityGet(id: number, options: CommandOptions = {}): Promise<Reply> {
    const name = `DEVICE_CAP_GET ${capabilityName(id)}`;
    return this.command(AdminOpcode.DEVICE_CAP_GET, encodeCapabilityCommand(id), { name, ...options });
  }

  capabilitySet(id: number, data: Uint8Array, options: CommandOptions = {}): Promise<Reply> {
    const name = `DRIVER_CAP_SET ${capabilityName(id)}`;
    return this.command(AdminOpcode.DRIVER_CAP_SET, encodeCapabilityCommand(id, data), { name, ...options });
  }

  create(type: number, id: number, object: Uint8Array, flags = 0n, options: CommandOptions = {}): Promise<Reply> {
    return this.#object(AdminOpcode.RESOURCE_OBJ_CREATE, 'CREATE', type, id, { object, flags }, options);
  }

  modify(type: number, id: number, object: Uint8Array, options: CommandOptions = {}): Promise<Reply> {
    return this.#object(this.modifyOpcode, 'MODIFY', type, id, { object }, options);
  }

  query(type: number, id: number, options: CommandOptions = {}): Promise<Reply> {
    return this.#object(this.queryOpcode, 'QUERY', type, id, {}, options);
  }

  destroy(type: number, id: number, options: CommandOptions = {}): Promise<Reply> {
    return this.#object(AdminOpcode.RESOURCE_OBJ_DESTROY, 'DESTROY', type, id, {}, options);
  }

  #object(
    opcode: number,
    verb: string,
    type: number,
    id: number,
    more: { object?: Uint8Array; flags?: bigint },
    options: CommandOptions,
  ): Promise<Reply> {
    const name = `${verb} ${resourceTypeName(type)} ${id}`;
    return this.command(opcode, encodeResourceCommand(this.revision, opcode, { type, id, ...more }), {
      name,
      ...options,
    });
  }

  /** The bytes of an object command, for `batch`. */
  objectData(opcode: number, type: number, id: number, object?: Uint8Array): Uint8Array {
    return encodeResourceCommand(this.revision, opcode, { type, id, ...(object && { object }) });
  }
}

/** `length` bytes from `at` on in `count` pieces of about the same length. */
export function pieces(at: number, length: number, count: number, write: boolean): Piece[] {
  if (length === 0) return [];
  const out: Piece[] = [];
  let from = 0;
  for (let i = 1; i <= count; i++) {
    const to = Math.floor((length * i) / count);
    if (to > from) out.push({ at: at + from, length: to - from, write });
    from = to;
  }
  return out;
}
