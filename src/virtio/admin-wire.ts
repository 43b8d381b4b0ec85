/**
 * Group administration commands on the wire (Virtio 1.4, 2.12 and 2.13), for the driver and for the device.
 *
 * Both sides accept shorter and longer buffers than they expect (2.13): a decoder here reads what is missing as zero and
 * ignores what is too much. Everything is little-endian. What a capability or an object contains is not known here.
 * Left out: the legacy-interface and device-parts commands (numbers and names only).
 */
import { get8, get16, get32, get64, put16, put32, put64 } from './little-endian.ts';
import type { WireRevision } from './revision.ts';

/**
 * Opcodes (2.12.1). The table of the standard has MODIFY and QUERY the other way round than the text of the commands:
 * these are the text's; `AdminOpcodeTable` holds the table's.
 */
export const AdminOpcode = {
  LIST_QUERY: 0x0,
  LIST_USE: 0x1,
  LEGACY_COMMON_CFG_WRITE: 0x2,
  LEGACY_COMMON_CFG_READ: 0x3,
  LEGACY_DEV_CFG_WRITE: 0x4,
  LEGACY_DEV_CFG_READ: 0x5,
  LEGACY_NOTIFY_INFO: 0x6,
  CAP_ID_LIST_QUERY: 0x7,
  DEVICE_CAP_GET: 0x8,
  DRIVER_CAP_SET: 0x9,
  RESOURCE_OBJ_CREATE: 0xa,
  RESOURCE_OBJ_MODIFY: 0xb,
  RESOURCE_OBJ_QUERY: 0xc,
  RESOURCE_OBJ_DESTROY: 0xd,
  DEV_PARTS_METADATA_GET: 0xe,
  DEV_PARTS_GET: 0xf,
  DEV_PARTS_SET: 0x10,
  DEV_MODE_SET: 0x11,
} as const;

/** The two opcodes as the table of 2.12.1 has them. */
export const AdminOpcodeTable = { RESOURCE_OBJ_QUERY: 0xb, RESOURCE_OBJ_MODIFY: 0xc } as const;

/** `status` of a reply (2.12.1); the numbers are Linux errno values. EEXIST is the text's "EEXIT" and missing in its table. */
export const AdminStatus = {
  OK: 0,
  ENXIO: 6,
  EAGAIN: 11,
  ENOMEM: 12,
  EBUSY: 16,
  EEXIST: 17,
  EINVAL: 22,
  ENOSPC: 28,
} as const;

/** `status_qualifier` of a reply (2.12.1). */
export const AdminQualifier = {
  OK: 0,
  INVALID_COMMAND: 1,
  INVALID_OPCODE: 2,
  INVALID_FIELD: 3,
  INVALID_GROUP: 4,
  INVALID_MEMBER: 5,
  NORESOURCE: 6,
  TRYAGAIN: 7,
} as const;

/** Group types (2.12). */
export const AdminGroup = { SELF: 0, SR_IOV: 1 } as const;

/** Capability ids: generic below 0x800 (2.12.1.3), the network device's from 0x800 (5.1.5). */
export const CapabilityId = {
  DEV_PARTS: 0x0,
  NET_FF_RESOURCE: 0x800,
  NET_FF_SELECTOR: 0x801,
  NET_FF_ACTION: 0x802,
  NET_IPSEC_RESOURCE: 0x803,
  NET_IPSEC_SA: 0x804,
} as const;

/** Resource object types: generic below 0x200 (2.12.1.4), the network device's from 0x200 (5.1.6). */
export const ResourceType = {
  DEV_PARTS: 0x0,
  NET_FF_GROUP: 0x200,
  NET_FF_CLASSIFIER: 0x201,
  NET_FF_RULE: 0x202,
  NET_IPSEC_OUTB_SA: 0x203,
  NET_IPSEC_INB_SA: 0x204,
} as const;

/** `struct virtio_admin_cmd`, the device-readable part (2.12.1). */
export const AdminCommandField = {
  opcode: 0,
  groupType: 2,
  reserved: 4,
  groupMemberId: 16,
  data: 24,
} as const;

/** `struct virtio_admin_cmd`, the device-writable part (2.12.1). */
export const AdminReplyField = { status: 0, qualifier: 2, reserved: 4, result: 8 } as const;

/** Both parts are multiples of 64 bits (2.13). */
export const ADMIN_PART_ALIGNMENT = 8;

/** `struct virtio_admin_cmd_cap_get_data` and `…_cap_set_data` (2.12.1.3). */
export const CapabilityCommandField = { id: 0, reserved: 2, data: 8 } as const;

/** `struct virtio_admin_cmd_resource_obj_cmd_hdr` and what follows it (2.12.1.4). */
export const ResourceCommandField = { type: 0, reserved: 2, id: 4, flags: 8, object: 16 } as const;
/** Bytes of the bare header: all that DESTROY has in `virtio-1.4`. */
const RESOURCE_HEADER = 8;

export interface AdminCommand {
  readonly opcode: number;
  readonly groupType: number;
  readonly groupMemberId: bigint;
  /** `command_specific_data`: a view of the decoded bytes, not a copy. */
  readonly data: Uint8Array;
}

export interface AdminReply {
  readonly status: number;
  readonly qualifier: number;
  /** `command_specific_result`: a view of the decoded bytes, not a copy. */
  readonly result: Uint8Array;
}

export interface ResourceCommand {
  readonly type: number;
  readonly id: number;
  readonly flags: bigint;
  /** `resource_obj_specific_data`: a view, not a copy; empty when absent. */
  readonly object: Uint8Array;
}

/** `length` rounded up to the alignment of a part. */
export function adminPartLength(length: number): number {
  return Math.ceil(length / ADMIN_PART_ALIGNMENT) * ADMIN_PART_ALIGNMENT;
}

/**
 * Writes the device-readable part of `command` to the start of `out`, padded with zeros to a multiple of 8, and returns
 * its length. Throws RangeError when `out` is too small.
 */
export function encodeAdminCommand(out: Uint8Array, command: AdminCommand): number {
  const length = adminPartLength(AdminCommandField.data + command.data.length);
  if (length > out.length) throw new RangeError(`an administration command of ${length} bytes needs a larger buffer`);
  out.fill(0, 0, length);
  put16(out, AdminCommandField.opcode, command.opcode);
  put16(out, AdminCommandField.groupType, command.groupType);
  put64(out, AdminCommandField.groupMemberId, command.groupMemberId);
  out.set(command.data, AdminCommandField.data);
  return length;
}

/** Reads a device-readable part of any length. */
export function decodeAdminCommand(bytes: Uint8Array): AdminCommand {
  return {
    opcode: get16(bytes, AdminCommandField.opcode),
    groupType: get16(bytes, AdminCommandField.groupType),
    groupMemberId: get64(bytes, AdminCommandField.groupMemberId),
    data: bytes.subarray(AdminCommandField.data),
  };
}

/**
 * The device-writable part for a reply, a multiple of 8 long. A device writes as much of it as the driver's buffer
 * holds, and reports that as used length.
 */
export function encodeAdminReply(reply: { status: number; qualifier: number; result?: Uint8Array }): Uint8Array {
  const result = reply.result;
  const out = new Uint8Array(adminPartLength(AdminReplyField.result + (result?.length ?? 0)));
  put16(out, AdminReplyField.status, reply.status);
  put16(out, AdminReplyField.qualifier, reply.qualifier);
  if (result !== undefined) out.set(result, AdminReplyField.result);
  return out;
}

/** Reads a device-writable part; `bytes` is as long as the used length says. */
export function decodeAdminReply(bytes: Uint8Array): AdminReply {
  return {
    status: get16(bytes, AdminReplyField.status),
    qualifier: get16(bytes, AdminReplyField.qualifier),
    result: bytes.subarray(AdminReplyField.result),
  };
}

/** A list of opcodes (LIST_QUERY, LIST_USE) or capability ids (CAP_ID_LIST_QUERY) as an array of le64 bit masks. */
export function encodeIdList(ids: Iterable<number>): Uint8Array {
  const list = [...ids];
  const last = list.reduce((max, id) => Math.max(max, id), 0);
  const out = new Uint8Array((Math.floor(last / 64) + 1) * 8);
  for (const id of list) out[id >>> 3] |= 1 << (id & 7);
  return out;
}

/** The ids of a bit mask of any length, ascending. Ids above 0xffff cannot exist and are ignored. */
export function decodeIdList(bytes: Uint8Array): number[] {
  const ids: number[] = [];
  const end = Math.min(bytes.length, 0x10000 / 8);
  for (let i = 0; i < end; i++) {
    for (let bit = 0; bit < 8; bit++) if ((bytes[i] >>> bit) & 1) ids.push(i * 8 + bit);
  }
  return ids;
}

/** Command data of DEVICE_CAP_GET (without `data`) and DRIVER_CAP_SET. */
export function encodeCapabilityCommand(id: number, data?: Uint8Array): Uint8Array {
  const out = new Uint8Array(CapabilityCommandField.data + (data?.length ?? 0));
  put16(out, CapabilityCommandField.id, id);
  if (data !== undefined) out.set(data, CapabilityCommandField.data);
  return out;
}

/** Reads command data of DEVICE_CAP_GET or DRIVER_CAP_SET, of any length. */
export function decodeCapabilityCommand(data: Uint8Array): { readonly id: number; readonly data: Uint8Array } {
  return { id: get16(data, CapabilityCommandField.id), data: data.subarray(CapabilityCommandField.data) };
}

/** True when the command has the `flags` field: all but DESTROY, and in the draft DESTROY too. */
function hasFlags(revision: WireRevision, opcode: number): boolean {
  return revision === 'rfc-2025-01' || opcode !== AdminOpcode.RESOURCE_OBJ_DESTROY;
}

/** Command data of RESOURCE_OBJ_CREATE, MODIFY, QUERY or DESTROY. */
export function encodeResourceCommand(
  revision: WireRevision,
  opcode: number,
  command: { type: number; id: number; flags?: bigint; object?: Uint8Array },
): Uint8Array {
  const flags = hasFlags(revision, opcode);
  const object = flags ? command.object : undefined;
  const out = new Uint8Array((flags ? ResourceCommandField.object : RESOURCE_HEADER) + (object?.length ?? 0));
  put16(out, ResourceCommandField.type, command.type);
  put32(out, ResourceCommandField.id, command.id);
  if (flags) put64(out, ResourceCommandField.flags, command.flags ?? 0n);
  if (object !== undefined) out.set(object, ResourceCommandField.object);
  return out;
}

/** Reads command data of RESOURCE_OBJ_CREATE, MODIFY, QUERY or DESTROY, of any length. */
export function decodeResourceCommand(revision: WireRevision, opcode: number, data: Uint8Array): ResourceCommand {
  const flags = hasFlags(revision, opcode);
  return {
    type: get16(data, ResourceCommandField.type),
    id: get32(data, ResourceCommandField.id),
    flags: flags ? get64(data, ResourceCommandField.flags) : 0n,
    object: flags ? data.subarray(ResourceCommandField.object) : new Uint8Array(0),
  };
}

/** `capability_specific_data` of VIRTIO_DEV_PARTS_CAP (2.12.1.5): known, shown, not used. */
export function decodeDevicePartsCapability(data: Uint8Array): { readonly get: number; readonly set: number } {
  return { get: get8(data, 0), set: get8(data, 1) };
}

function nameOf(table: Readonly<Record<string, number>>, value: number): string | undefined {
  return Object.keys(table).find((name) => table[name] === value);
}

/** Names for messages: `RESOURCE_OBJ_CREATE`, or the number in hexadecimal. */
export function adminOpcodeName(opcode: number): string {
  return nameOf(AdminOpcode, opcode) ?? `0x${opcode.toString(16)}`;
}

export function adminStatusName(status: number): string {
  return nameOf(AdminStatus, status) ?? `status ${status}`;
}

export function adminQualifierName(qualifier: number): string {
  return nameOf(AdminQualifier, qualifier) ?? `qualifier ${qualifier}`;
}

export function capabilityName(id: number): string {
  return nameOf(CapabilityId, id) ?? `0x${id.toString(16)}`;
}

export function resourceTypeName(type: number): string {
  return nameOf(ResourceType, type) ?? `0x${type.toString(16)}`;
}
