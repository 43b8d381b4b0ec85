/**
 * The flow filter of the device: groups, classifiers, rules, and matching packets against them (Virtio 1.4,
 * 5.1.9.6).
 *
 * `FlowFilter` holds the objects and checks what the standard says a device refuses; the administration queue calls
 * it. Matching is in `flow-matcher.ts`.
 */

import { Ethernet, Ipv4, Ipv6 } from '../packet/fields.ts';
import { AdminQualifier, AdminStatus, ResourceType } from '../virtio/admin-wire.ts';
import {
  decodeClassifier,
  decodeGroup,
  decodeRule,
  type FlowClassifier,
  FlowFilterAction,
  type FlowFilterLimits,
  type FlowRule,
  type FlowSelector,
  hasWholeFields,
  keyLengthOf,
  SELECTOR_LENGTH,
  SelectorType,
} from '../virtio-net/flow-filter-wire.ts';
import { type CommandResult, failed, OK_RESULT } from './command-result.ts';
import { withFlowFaults } from './fault-flow.ts';
import { type FaultSet, NO_FAULTS } from './faults.ts';
import { type MatcherRule, NO_MATCH, RuleMatcher } from './flow-matcher.ts';

/** What the driver may use: its own limits, selectors and actions, out of what the device offers. */
export interface FlowFilterUse {
  readonly limits: FlowFilterLimits;
  readonly selectors: readonly FlowSelector[];
  readonly actions: readonly number[];
  /** Virtqueue indices of the receive queues in use. */
  isReceiveQueue(index: number): boolean;
}

interface Group {
  readonly priority: number;
}

export class FlowFilter {
  readonly #faults: FaultSet;
  readonly #groups = new Map<number, Group>();
  readonly #classifiers = new Map<number, FlowClassifier>();
  readonly #rules = new Map<number, FlowRule>();
  /** How many rules there are of each group and with each classifier, by `type:id`: 65536 rules are too many to look through. */
  readonly #users = new Map<string, number>();
  /** Counters of packets that a rule matched, by action number. */
  readonly matched = new Float64Array(8);

  /** Made at the first packet after a change. */
  #matcher: RuleMatcher | null = null;

  constructor(faults: FaultSet = NO_FAULTS) {
    this.#faults = faults;
  }

  /** hot: number of rules. */
  get size(): number {
    return this.#rules.size;
  }

  /** Whether there are objects, so that the capabilities must not change. */
  get inUse(): boolean {
    return this.#groups.size + this.#classifiers.size + this.#rules.size > 0;
  }

  clear(): void {
    this.#groups.clear();
    this.#classifiers.clear();
    this.#rules.clear();
    this.#users.clear();
    this.matched.fill(0);
    this.#matcher = null;
  }

  /**
   * Creates or, when `replace`, modifies an object; `bytes` may be of any length. Throws VirtioError for bytes that
   * are malformed.
   */
  set(type: number, id: number, bytes: Uint8Array, use: FlowFilterUse, replace: boolean): CommandResult {
    const result = this.#set(type, id, bytes, use, replace);
    if (result.status === AdminStatus.OK) this.#matcher = null;
    return result;
  }

  has(type: number, id: number): boolean {
    return this.#table(type).has(id);
  }

  /** EBUSY for a group or classifier that rules depend on (2.12.1.3). */
  destroy(type: number, id: number): CommandResult {
    if (this.#isNeeded(type, id)) return failed(AdminStatus.EBUSY, AdminQualifier.INVALID_COMMAND);
    const rule = type === ResourceType.NET_FF_RULE ? this.#rules.get(id) : undefined;
    if (rule !== undefined) this.#use(rule, -1);
    this.#table(type).delete(id);
    this.#matcher = null;
    return OK_RESULT;
  }

  #table(type: number): Map<number, unknown> {
    if (type === ResourceType.NET_FF_GROUP) return this.#groups;
    return type === ResourceType.NET_FF_CLASSIFIER ? this.#classifiers : this.#rules;
  }

  #isNeeded(type: number, id: number): boolean {
    return this.#users.has(`${type}:${id}`);
  }

  /** A rule uses its group and its classifier from now on, or not any more. */
  #use(rule: FlowRule, by: 1 | -1): void {
    const used = [
      `${ResourceType.NET_FF_GROUP}:${rule.groupId}`,
      `${ResourceType.NET_FF_CLASSIFIER}:${rule.classifierId}`,
    ];
    for (const key of used) {
      const users = (this.#users.get(key) ?? 0) + by;
      if (users === 0) this.#users.delete(key);
      else this.#users.set(key, users);
    }
  }

  #set(type: number, id: number, bytes: Uint8Array, use: FlowFilterUse, replace: boolean): CommandResult {
    if (replace && this.#isNeeded(type, id)) return failed(AdminStatus.EBUSY, AdminQualifier.INVALID_COMMAND);
    if (type === ResourceType.NET_FF_GROUP) return this.#setGroup(id, bytes, use, replace);
    if (type === ResourceType.NET_FF_CLASSIFIER) return this.#setClassifier(id, bytes, use, replace);
    return this.#setRule(id, bytes, use, replace);
  }

  #setGroup(id: number, bytes: Uint8Array, use: FlowFilterUse, replace: boolean): CommandResult {
    const group = decodeGroup(bytes);
    const most = Math.min(use.limits.groups, use.limits.rulesPerGroup);
    if (!replace && this.#groups.size >= most) return NO_SPACE;
    if (id >= use.limits.groups) return INVALID_FIELD;
    for (const [other, { priority }] of this.#groups) {
      if (other !== id && priority === group.priority) return INVALID_FIELD;
    }
    this.#groups.set(id, group);
    return OK_RESULT;
  }

  #setClassifier(id: number, bytes: Uint8Array, use: FlowFilterUse, replace: boolean): CommandResult {
    const classifier = decodeClassifier(bytes);
    if (!replace && this.#classifiers.size >= use.limits.classifiers) return NO_SPACE;
    if (id >= use.limits.classifiers || !isClassifierAllowed(classifier, use)) return INVALID_FIELD;
    this.#classifiers.set(id, classifier);
    return OK_RESULT;
  }

  #setRule(id: number, bytes: Uint8Array, use: FlowFilterUse, replace: boolean): CommandResult {
    const rule = decodeRule(bytes);
    const { limits } = use;
    if (!replace && this.#rules.size >= limits.rules) return NO_SPACE;
    const classifier = this.#classifiers.get(rule.classifierId);
    const bad =
      id >= Math.min(limits.rules, limits.rulesPerGroup) ||
      rule.priority >= limits.lastRulePriority ||
      !use.actions.includes(rule.action) ||
      (rule.action === FlowFilterAction.directRxVq && !use.isReceiveQueue(rule.queueIndex));
    if (bad) return INVALID_FIELD;
    if (classifier === undefined || !this.#groups.has(rule.groupId)) return NO_SUCH;
    if (rule.key.length !== keyLengthOf(classifier.selectors)) return INVALID_FIELD;
    const before = this.#rules.get(id);
    const inGroup = this.#users.get(`${ResourceType.NET_FF_GROUP}:${rule.groupId}`) ?? 0;
    const others = before?.groupId === rule.groupId ? inGroup - 1 : inGroup;
    if (others >= limits.rulesPerGroup) return NO_SPACE;
    if (before !== undefined) this.#use(before, -1);
    this.#use(rule, 1);
    this.#rules.set(id, rule);
    return OK_RESULT;
  }

  #compile(): RuleMatcher {
    const ordered: MatcherRule[] = [...this.#rules].map(([id, rule]) => ({
      id,
      rule,
      groupPriority: this.#groups.get(rule.groupId)?.priority ?? 0,
      selectors: this.#classifiers.get(rule.classifierId)?.selectors ?? [],
    }));
    this.#matcher = new RuleMatcher(withFlowFaults(ordered, this.#faults));
    return this.#matcher;
  }

  /** hot: action of the rule that `match` returned. */
  action(rule: number): number {
    return this.#matcher === null ? 0 : this.#matcher.actions[rule];
  }

  /** hot: virtqueue index of the rule that `match` returned. */
  queueIndex(rule: number): number {
    return this.#matcher === null ? 0 : this.#matcher.queues[rule];
  }

  /**
   * hot: the first rule that matches the frame of `length` bytes at `at`, or `NO_MATCH`. Reads nothing beyond the
   * frame.
   */
  match(u8: Uint8Array, at: number, length: number): number {
    if (this.#rules.size === 0) return NO_MATCH;
    const matcher = this.#matcher ?? this.#compile();
    const rule = matcher.match(u8, at, length);
    if (rule !== NO_MATCH) this.matched[matcher.actions[rule] & 7]++;
    return rule;
  }
}

const INVALID_FIELD = failed(AdminStatus.EINVAL, AdminQualifier.INVALID_FIELD);
const NO_SUCH = failed(AdminStatus.ENXIO, AdminQualifier.INVALID_FIELD);
const NO_SPACE = failed(AdminStatus.ENOSPC, AdminQualifier.NORESOURCE);

/**
 * ETH, then IPV4 or IPV6, then TCP, UDP or ESP; only bits that the capability has; EtherType and protocol whole
 * (5.1.9.6.3).
 */
function isClassifierAllowed(classifier: FlowClassifier, use: FlowFilterUse): boolean {
  const { selectors } = classifier;
  const count = selectors.length;
  if (count === 0 || count > use.limits.selectorsPerClassifier || count > STACK.length) return false;
  for (const [i, selector] of selectors.entries()) {
    if (!STACK[i].includes(selector.type)) return false;
    const offered = use.selectors.find((candidate) => candidate.type === selector.type);
    if (offered === undefined || selector.mask.length !== SELECTOR_LENGTH[selector.type]) return false;
    for (const [b, bits] of selector.mask.entries()) if ((bits & ~offered.mask[b]) !== 0) return false;
    const partial = (offered.flags & 1) !== 0;
    if (!partial && !hasWholeFields(selector)) return false;
  }
  if (count >= 2 && !isAllOnes(selectors[0].mask, Ethernet.type, 2)) return false;
  const protocolAt = selectors[1]?.type === SelectorType.ipv6 ? Ipv6.nextHeader : Ipv4.protocol;
  return count < 3 || isAllOnes(selectors[1].mask, protocolAt, 1);
}

/** Which selector types may stand at each place. */
const STACK: readonly (readonly number[])[] = [
  [SelectorType.eth],
  [SelectorType.ipv4, SelectorType.ipv6],
  [SelectorType.tcp, SelectorType.udp, SelectorType.esp],
];

function isAllOnes(mask: Uint8Array, at: number, length: number): boolean {
  for (let i = at; i < at + length; i++) if (mask[i] !== 0xff) return false;
  return true;
}
