/**
 * How the faults of `faults.ts` that concern administration commands are made: each is a rule around the execution of
 * a command.
 *
 * A rule gets the command and `next`, which executes it, or another, as the device would. It may ask `next` several
 * times.
 */
import type { WireLayout } from '../ipsec/wire/codec.ts';
import { rfc202501Layout } from '../ipsec/wire/rfc-2025-01.ts';
import { virtio14Layout } from '../ipsec/wire/virtio-1.4.ts';
import {
  type AdminCommand,
  AdminOpcode,
  AdminQualifier,
  AdminStatus,
  CapabilityCommandField,
  encodeIdList,
  ResourceCommandField,
  ResourceType,
} from '../virtio/admin-wire.ts';
import type { WireRevision } from '../virtio/revision.ts';
import { type CommandResult, failed, OK_RESULT, succeeded } from './command-result.ts';
import type { FaultName, FaultSet } from './faults.ts';

/** A command with the lengths of its buffers. */
export interface AdminCall extends AdminCommand {
  /** Bytes of the device-readable and the device-writable part. */
  readonly readable: number;
  readonly writable: number;
}

export type Execute = (call: AdminCall) => CommandResult;
export type Rule = (call: AdminCall, next: Execute) => CommandResult;

/** What a rule may know of the device. */
export interface RuleContext {
  readonly revision: WireRevision;
  readonly supported: readonly number[];
  /** DEVICE_NEEDS_RESET. */
  fail(reason: string): void;
}

const { EINVAL, ENOMEM, EBUSY, EEXIST, ENXIO, ENOSPC, OK } = AdminStatus;
const Q = AdminQualifier;
const O = AdminOpcode;
const LISTS: readonly number[] = [O.LIST_QUERY, O.LIST_USE];
/** `struct virtio_admin_cmd` without data and result. */
const Part = { readable: 24, writable: 8 } as const;
/** Marks bytes that nobody has written: what tests fill buffers with. */
const UNTOUCHED = 0xee;

function useList(call: AdminCall, opcodes: readonly number[]): AdminCall {
  return { ...call, opcode: O.LIST_USE, data: padded(encodeIdList(opcodes)) };
}

/** Command data is followed by zeros. */
function padded(bytes: Uint8Array): Uint8Array {
  const out = new Uint8Array(64);
  out.set(bytes);
  return out;
}

const INVALID_FIELD = failed(EINVAL, Q.INVALID_FIELD);
const OBJECTS: readonly number[] = [
  O.RESOURCE_OBJ_CREATE,
  O.RESOURCE_OBJ_MODIFY,
  O.RESOURCE_OBJ_QUERY,
  O.RESOURCE_OBJ_DESTROY,
];

/** The result of a command of `opcodes` with another one in place of those of `status`. */
function replaced(
  call: AdminCall,
  next: Execute,
  opcodes: readonly number[],
  status: number,
  instead: CommandResult,
): CommandResult {
  const result = next(call);
  return opcodes.includes(call.opcode) && result.status === status ? instead : result;
}

/** Whether a DRIVER_CAP_SET sets what the device offers. */
function isSame(call: AdminCall, next: Execute): boolean {
  if (call.opcode !== O.DRIVER_CAP_SET) return false;
  const offered = next({ ...call, opcode: O.DEVICE_CAP_GET }).result;
  const { data } = CapabilityCommandField;
  return offered?.every((byte, i) => byte === call.data[data + i]) ?? false;
}

/** Type and id of the object that a command is about, as text. */
function objectName({ data }: AdminCall): string {
  return Buffer.from(data.subarray(ResourceCommandField.type, ResourceCommandField.flags)).toString('hex');
}

/** LIST_QUERY names further commands. */
function names(bits: number): Rule {
  return (call, next) => {
    const result = next(call);
    if (call.opcode !== O.LIST_QUERY || result.result === undefined) return result;
    const list = result.result.slice();
    for (let byte = 0; byte < 4; byte++) list[byte] |= bits >>> (8 * byte);
    return succeeded(list);
  };
}
/** LEGACY_COMMON_CFG_WRITE and LEGACY_NOTIFY_INFO; DEV_PARTS_GET (2.12.1). */
const LEGACY_SOME = (1 << 2) | (1 << 6);
const PARTS_SOME = 1 << 0xf;

const NOWHERE = -1;

/** A field of `width` bytes of each SA that is created has `value`, whatever the driver says. */
function saField(
  field: (at: WireLayout['sa']) => number,
  width: number,
  value: number,
): (context: RuleContext) => Rule {
  return ({ revision }) =>
    (call, next) => {
      const at = field((revision === 'virtio-1.4' ? virtio14Layout : rfc202501Layout).sa);
      const isSa = call.data[ResourceCommandField.type] >= FIRST_SA_TYPE;
      if (call.opcode === O.RESOURCE_OBJ_CREATE && isSa && at !== NOWHERE) {
        call.data.fill(0, ResourceCommandField.object + at, ResourceCommandField.object + at + width);
        call.data[ResourceCommandField.object + at] = value;
      }
      return next(call);
    };
}
/** The lower byte of the type of outbound SAs; that of inbound ones is the next. */
const FIRST_SA_TYPE = ResourceType.NET_IPSEC_OUTB_SA & 0xff;

/** Makes the rule of each fault, with a state of its own. */
const RULES: Partial<Record<FaultName, (context: RuleContext) => Rule>> = {
  'admin-error': () => (call, next) => (LISTS.includes(call.opcode) ? next(call) : failed(ENOMEM, Q.NORESOURCE)),
  'admin-list-empty': () => (call, next) => {
    if (!LISTS.includes(call.opcode)) return failed(EINVAL, Q.INVALID_OPCODE);
    return call.opcode === O.LIST_QUERY ? succeeded(encodeIdList(LISTS)) : next(call);
  },
  'query-modify-swapped': () => (call, next) => {
    if (call.opcode === O.RESOURCE_OBJ_MODIFY) return next({ ...call, opcode: O.RESOURCE_OBJ_QUERY });
    return next(call.opcode === O.RESOURCE_OBJ_QUERY ? { ...call, opcode: O.RESOURCE_OBJ_MODIFY } : call);
  },
  'adm-group-unchecked': () => (call, next) => next({ ...call, groupType: 0 }),
  'adm-opcode-unchecked':
    ({ supported }) =>
    (call, next) =>
      supported.includes(call.opcode) ? next(call) : OK_RESULT,
  'adm-member-unchecked': () => (call, next) => next({ ...call, groupMemberId: 0n }),
  'adm-opcode-first':
    ({ supported }) =>
    (call, next) =>
      supported.includes(call.opcode) ? next(call) : failed(EINVAL, Q.INVALID_OPCODE),
  'adm-member-first': () => (call, next) => (call.groupMemberId === 0n ? next(call) : failed(EINVAL, Q.INVALID_MEMBER)),
  'adm-invalid-as-enomem': () => (call, next) => {
    const result = next(call);
    return result.status === EINVAL ? failed(ENOMEM, Q.NORESOURCE) : result;
  },
  'adm-ok-as-ebusy': () => (call, next) => {
    const result = next(call);
    return result.status === OK ? failed(EBUSY, Q.INVALID_COMMAND) : result;
  },
  'adm-failure-as-ok': () => (call, next) => {
    const result = next(call);
    return result.status === OK ? result : OK_RESULT;
  },
  'adm-list-use-sticks': () => (call, next) => {
    const result = next(call);
    if (call.opcode === O.LIST_USE && result.status !== OK) next(useList(call, LISTS));
    return result;
  },
  'adm-error-state':
    ({ fail }) =>
    (call, next) => {
      const result = next(call);
      if (result.status === EINVAL) fail('fault adm-error-state');
      return result;
    },
  'adm-create-first': () => (call, next) => {
    const result = next(call);
    if (call.opcode === O.RESOURCE_OBJ_CREATE && result.status === EEXIST) {
      next({ ...call, opcode: O.RESOURCE_OBJ_MODIFY });
    }
    return result;
  },
  'adm-all-in-use':
    ({ supported }) =>
    (call, next) => {
      if (supported.includes(call.opcode) && !LISTS.includes(call.opcode)) next(useList(call, supported));
      return next(call);
    },
  'adm-list-use-ignored': () => (call, next) => (call.opcode === O.LIST_USE ? OK_RESULT : next(call)),
  'adm-list-shrinks': () => {
    let used: Uint8Array | null = null;
    return (call, next) => {
      if (call.opcode === O.LIST_USE) used = call.data.slice(0, 8);
      return call.opcode === O.LIST_QUERY && used !== null ? succeeded(used) : next(call);
    };
  },
  'adm-list-use-once': () => {
    const seen = new Set<string>();
    return (call, next) => {
      const list = call.opcode === O.LIST_USE ? Buffer.from(call.data.subarray(0, 8)).toString('hex') : '';
      if (seen.has(list)) return failed(EINVAL, Q.INVALID_FIELD);
      if (list !== '') seen.add(list);
      return next(call);
    };
  },
  'adm-short-refused': () => (call, next) => {
    const result = next(call);
    const whole = Part.writable + (result.result?.length ?? 0);
    const short = call.readable < Part.readable || call.writable < whole;
    return short ? failed(EINVAL, Q.INVALID_COMMAND) : result;
  },
  'adm-long-refused': () => (call, next) => {
    const long = call.opcode === O.LIST_QUERY && call.readable > Part.readable;
    return long ? failed(EINVAL, Q.INVALID_COMMAND) : next(call);
  },
  'adm-out-of-order': () => {
    let late: AdminCall | null = null;
    return (call, next) => {
      const before = late;
      late = call.opcode === O.RESOURCE_OBJ_DESTROY ? { ...call, data: call.data.slice() } : null;
      const result = late === null ? next(call) : OK_RESULT;
      if (before !== null) next(before);
      return result;
    };
  },
  'cap-get-missing': () => (call, next) => {
    const result = next(call);
    if (call.opcode === O.LIST_QUERY && result.result !== undefined) result.result[1] &= ~1;
    return result;
  },
  'adm-legacy-half': () => names(LEGACY_SOME),
  'adm-parts-half': () => names(PARTS_SOME),
  'cap-list-short': () => (call, next) => {
    const result = next(call);
    // Capabilities 0x801 and 0x804.
    if (call.opcode === O.CAP_ID_LIST_QUERY && result.result !== undefined) result.result[0x100] &= ~0x12;
    return result;
  },
  'cap-same-refused': () => (call, next) => (isSame(call, next) ? failed(EINVAL, Q.INVALID_FIELD) : next(call)),
  'cap-smaller-refused': () => (call, next) =>
    call.opcode === O.DRIVER_CAP_SET && !isSame(call, next) ? failed(EINVAL, Q.INVALID_FIELD) : next(call),
  'cap-busy-unchecked': () => (call, next) => replaced(call, next, [O.DRIVER_CAP_SET], EBUSY, OK_RESULT),
  'cap-unknown-as-einval': () => (call, next) =>
    replaced(call, next, [O.DEVICE_CAP_GET, O.DRIVER_CAP_SET], ENXIO, INVALID_FIELD),
  'cap-unset-allowed': () => (call, next) => replaced(call, next, [O.RESOURCE_OBJ_CREATE], EINVAL, OK_RESULT),
  'obj-disabled-as-enomem': () => (call, next) => replaced(call, next, OBJECTS, EINVAL, failed(ENOMEM, Q.NORESOURCE)),
  'obj-exists-as-einval': () => (call, next) => replaced(call, next, OBJECTS, EEXIST, INVALID_FIELD),
  'obj-missing-as-einval': () => (call, next) => replaced(call, next, OBJECTS, ENXIO, INVALID_FIELD),
  'obj-full-as-einval': () => (call, next) => replaced(call, next, OBJECTS, ENOSPC, INVALID_FIELD),
  'obj-busy-unchecked': () => (call, next) => replaced(call, next, OBJECTS, EBUSY, OK_RESULT),
  'obj-invalid-accepted': () => (call, next) => replaced(call, next, [O.RESOURCE_OBJ_CREATE], EINVAL, OK_RESULT),
  'obj-modify-refused': () => (call, next) =>
    call.opcode === O.RESOURCE_OBJ_MODIFY ? failed(ENOMEM, Q.NORESOURCE) : next(call),
  'obj-flags-refused': () => (call, next) =>
    call.opcode === O.RESOURCE_OBJ_CREATE && call.data[ResourceCommandField.flags] !== 0 ? INVALID_FIELD : next(call),
  'obj-id-once': () => {
    const destroyed = new Set<string>();
    return (call, next) => {
      if (call.opcode === O.RESOURCE_OBJ_CREATE && destroyed.has(objectName(call))) return INVALID_FIELD;
      if (call.opcode === O.RESOURCE_OBJ_DESTROY) destroyed.add(objectName(call));
      return next(call);
    };
  },
  'obj-ids-in-order': () => {
    let created = 0;
    return (call, next) => {
      if (call.opcode !== O.RESOURCE_OBJ_CREATE) return next(call);
      return call.data[ResourceCommandField.id] === created++ ? next(call) : INVALID_FIELD;
    };
  },
  'obj-two-only': () => {
    const objects = new Set<string>();
    return (call, next) => {
      if (call.opcode === O.RESOURCE_OBJ_DESTROY) objects.delete(objectName(call));
      if (call.opcode !== O.RESOURCE_OBJ_CREATE) return next(call);
      objects.add(objectName(call));
      return objects.size > 2 ? failed(ENOSPC, Q.NORESOURCE) : next(call);
    };
  },
  'obj-modify-destroys': () => (call, next) => {
    const result = next(call);
    if (call.opcode === O.RESOURCE_OBJ_MODIFY && result.status !== OK) {
      next({ ...call, opcode: O.RESOURCE_OBJ_DESTROY });
    }
    return result;
  },
  'obj-query-zeros': () => (call, next) => {
    const result = next(call);
    if (call.opcode === O.RESOURCE_OBJ_QUERY && result.result !== undefined) {
      return succeeded(new Uint8Array(result.result.length));
    }
    return result;
  },
  'obj-query-stale': () => {
    const created = new Map<string, Uint8Array>();
    return (call, next) => {
      const result = next(call);
      if (call.opcode === O.RESOURCE_OBJ_CREATE) {
        created.set(objectName(call), call.data.slice(ResourceCommandField.object, 512));
      }
      const first = created.get(objectName(call));
      return call.opcode === O.RESOURCE_OBJ_QUERY && result.status === OK && first !== undefined
        ? succeeded(first)
        : result;
    };
  },
  'ipsec-replay-unchecked': saField((at) => at.replayWindow, 4, 0),
  'ipsec-replay-always': saField((at) => at.replayWindow, 4, 64),
  'ipsec-options-ignored': saField((at) => at.options, 8, 0),
  'ipsec-limits-ignored': saField((at) => at.lifetime?.softPackets ?? NOWHERE, 32, 0),
};

/** Changes to the bytes of a reply. */
const REPLIES: Partial<Record<FaultName, (bytes: Uint8Array, writable: number) => Uint8Array>> = {
  'admin-short-reply': (bytes) => bytes.subarray(0, 4),
  'adm-reserved-set': (bytes) => bytes.fill(0xff, 4, 8),
  'adm-status-untouched': (bytes) => bytes.fill(UNTOUCHED, 0, 4),
  'adm-writes-all': (bytes, writable) => {
    const all = new Uint8Array(Math.max(bytes.length, Math.min(writable, 4096)));
    all.set(bytes);
    return all;
  },
};

/** `execute` with the rules of `faults` around it; `execute` itself when there are none. */
export function withFaults(execute: Execute, faults: FaultSet, context: RuleContext): Execute {
  let chain = execute;
  for (const name of faults) {
    const rule = RULES[name]?.(context);
    if (rule === undefined) continue;
    const next = chain;
    chain = (call) => rule(call, next);
  }
  return chain;
}

/** The reply as the faults have it. */
export function faultyReply(bytes: Uint8Array, writable: number, faults: FaultSet): Uint8Array {
  let reply = bytes;
  for (const name of faults) reply = REPLIES[name]?.(reply, writable) ?? reply;
  return reply;
}
