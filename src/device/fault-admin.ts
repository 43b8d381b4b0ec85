/**
 * How the faults of `faults.ts` that concern administration commands are made: each is a rule around the execution of a command.
 *
 * A rule gets the command and `next`, which executes it, or another, as the device would. It may ask `next` several times.
 */
import { type AdminCommand, AdminOpcode, AdminQualifier, AdminStatus, encodeIdList } from '../virtio/admin-wire.ts';
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
  readonly supported: readonly number[];
  /** DEVICE_NEEDS_RESET. */
  fail(reason: string): void;
}

const { EINVAL, ENOMEM, EBUSY, EEXIST, OK } = AdminStatus;
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
