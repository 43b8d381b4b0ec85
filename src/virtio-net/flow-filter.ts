/**
 * The driver's flow filter: groups, classifiers and rules on the device (Virtio 1.4, 5.1.6.5.7).
 *
 * Limits are kept here so that the device need not be relied on to refuse: rule ids run to the lower of `rules_limit` and
 * `rules_per_group_limit`, as the standard words it, the number of groups to the lower of `groups_limit` and `rules_per_group_limit`,
 * and rule priorities stay below `last_rule_priority`. Classifiers with the same selectors are shared between rules. What depends on
 * something goes before it: rules, then classifiers and groups.
 */
import { AdminCommandError, VirtioError } from '../errors.ts';
import type { AdminQueue } from '../virtio/admin.ts';
import { AdminStatus } from '../virtio/admin-wire.ts';
import { ObjectIds } from '../virtio/object-ids.ts';
import {
  decodeActionCapability,
  decodeFlowFilterLimits,
  decodeSelectorCapability,
  encodeActionCapability,
  encodeClassifier,
  encodeFlowFilterLimits,
  encodeGroup,
  encodeRule,
  encodeSelectorCapability,
  FlowFilterAction,
  FlowFilterCapability,
  type FlowFilterLimits,
  FlowFilterObject,
  type FlowSelector,
  SelectorFlag,
  SelectorType,
} from './flow-filter-wire.ts';
import { type CompiledMatch, compileMatch, type FlowMatch, whyNotMatch } from './flow-match.ts';

/** The commands that a flow filter needs: those of `AdminQueue`. */
export type FlowFilterAdmin = Pick<
  AdminQueue,
  'deviceCapability' | 'setDriverCapability' | 'createObject' | 'destroyObject'
>;

/** What happens to a packet that matches. `queue` is a receive queue, counted from 0. */
export type FlowAction = 'drop' | 'ipsec' | 'ipsec-recirculate' | { readonly queue: number };

export interface FlowRuleOptions {
  readonly group: FlowGroupHandle;
  readonly match: FlowMatch;
  readonly action: FlowAction;
  /** Higher is tried first. Default 0. */
  readonly priority?: number;
}

export interface FlowGroupHandle {
  readonly id: number;
  /** Distinct between groups; higher is tried first. */
  readonly priority: number;
}

export interface FlowRuleHandle {
  readonly id: number;
  readonly group: FlowGroupHandle;
}

/** A classifier on the device, and the rules that use it. */
interface Classifier {
  readonly id: number;
  readonly text: string;
  /** Resolves when the object exists. */
  readonly ready: Promise<void>;
  users: number;
}

/** What driver and device have agreed on. */
export interface FlowFilterCapabilities {
  readonly limits: FlowFilterLimits;
  readonly selectors: readonly FlowSelector[];
  readonly actions: readonly number[];
}

const KNOWN_ACTIONS: readonly number[] = Object.values(FlowFilterAction);
const KNOWN_SELECTORS: readonly number[] = Object.values(SelectorType);

export class FlowFilter {
  readonly capabilities: FlowFilterCapabilities;
  readonly #admin: FlowFilterAdmin;
  readonly #groupIds: ObjectIds;
  readonly #classifierIds: ObjectIds;
  readonly #ruleIds: ObjectIds;
  readonly #groups = new Map<number, { readonly handle: FlowGroupHandle; rules: number }>();
  /** By the text of their selectors. */
  readonly #classifiers = new Map<string, Classifier>();
  readonly #rules = new Map<FlowRuleHandle, Classifier>();

  private constructor(admin: FlowFilterAdmin, capabilities: FlowFilterCapabilities) {
    this.#admin = admin;
    this.capabilities = capabilities;
    const { limits } = capabilities;
    this.#groupIds = new ObjectIds(Math.min(limits.groups, limits.rulesPerGroup));
    this.#classifierIds = new ObjectIds(limits.classifiers);
    this.#ruleIds = new ObjectIds(Math.min(limits.rules, limits.rulesPerGroup));
  }

  /**
   * Gets the three capabilities, sets what this driver knows of them, and returns the flow filter; null when the device, whose
   * capability ids are `ids`, has none. Throws AdminCommandError, or VirtioError `MALFORMED_CAPABILITY`.
   */
  static async open(admin: FlowFilterAdmin, ids: readonly number[]): Promise<FlowFilter | null> {
    const { resource, selector, action } = FlowFilterCapability;
    if (![resource, selector, action].every((id) => ids.includes(id))) return null;
    const limits = decodeFlowFilterLimits(await admin.deviceCapability(resource));
    const selectors = decodeSelectorCapability(await admin.deviceCapability(selector)).filter(({ type }) =>
      KNOWN_SELECTORS.includes(type),
    );
    const known = selectors.map(({ type, flags, mask }) => ({ type, flags: flags & SelectorFlag.partialMask, mask }));
    const actions = decodeActionCapability(await admin.deviceCapability(action)).filter((one) =>
      KNOWN_ACTIONS.includes(one),
    );
    await admin.setDriverCapability(resource, encodeFlowFilterLimits(limits));
    await admin.setDriverCapability(selector, encodeSelectorCapability(known));
    await admin.setDriverCapability(action, encodeActionCapability(actions));
    return new FlowFilter(admin, { limits, selectors: known, actions });
  }

  /** Why a rule with this match and action is not possible on the device, or null. Says nothing about free ids. */
  obstacle(match: FlowMatch, action: FlowAction): string | null {
    const number = actionNumber(action);
    if (!this.capabilities.actions.includes(number)) return `the device's flow filter has no action ${number}`;
    const { selectors } = compileMatch(match);
    const most = this.capabilities.limits.selectorsPerClassifier;
    if (selectors.length > most) return `the device's flow filter takes ${most} selectors, not ${selectors.length}`;
    return whyNotMatch(selectors, this.capabilities.selectors);
  }

  /** Creates a group. Throws VirtioError `FLOW_PRIORITY` (taken) or `FLOW_LIMIT`, AdminCommandError. */
  async addGroup(priority: number): Promise<FlowGroupHandle> {
    for (const { handle } of this.#groups.values()) {
      if (handle.priority === priority)
        throw new VirtioError('FLOW_PRIORITY', `a group has priority ${priority} already`);
    }
    const object = encodeGroup({ priority });
    const id = this.#takeId(this.#groupIds, 'groups');
    const handle = { id, priority };
    this.#groups.set(id, { handle, rules: 0 });
    await this.#create(this.#groupIds, FlowFilterObject.group, id, object, 0n, () => this.#groups.delete(id));
    return handle;
  }

  /** Destroys a group. Throws VirtioError `FLOW_IN_USE` while it has rules, AdminCommandError. */
  async removeGroup(group: FlowGroupHandle): Promise<void> {
    const entry = this.#group(group);
    if (entry.rules > 0) throw new VirtioError('FLOW_IN_USE', `group ${group.id} has ${entry.rules} rules`);
    this.#groups.delete(group.id);
    await this.#destroy(this.#groupIds, FlowFilterObject.group, group.id);
  }

  /**
   * Creates a rule, and the classifier that it needs. Throws VirtioError `FLOW_MATCH`, `FLOW_NOT_SUPPORTED`, `FLOW_PRIORITY` or
   * `FLOW_LIMIT`, AdminCommandError.
   */
  async addRule(options: FlowRuleOptions): Promise<FlowRuleHandle> {
    const { group, action, priority = 0 } = options;
    const groupEntry = this.#group(group);
    const obstacle = this.obstacle(options.match, action);
    if (obstacle !== null) throw new VirtioError('FLOW_NOT_SUPPORTED', obstacle);
    const end = Math.max(1, this.capabilities.limits.lastRulePriority);
    if (!Number.isInteger(priority) || priority < 0 || priority >= end) {
      throw new VirtioError('FLOW_PRIORITY', `rule priority ${priority} is not in 0 to ${end - 1}`);
    }
    const compiled = compileMatch(options.match);
    const id = this.#takeId(this.#ruleIds, 'rules');
    const handle = { id, group };
    groupEntry.rules++;
    const classifier = await this.#acquireClassifier(compiled).catch((error: unknown) => {
      groupEntry.rules--;
      this.#ruleIds.give(id);
      throw error;
    });
    this.#rules.set(handle, classifier);
    const queueIndex = typeof action === 'object' ? 2 * action.queue : 0;
    const object = encodeRule({
      groupId: group.id,
      classifierId: classifier.id,
      priority,
      action: actionNumber(action),
      queueIndex,
      key: compiled.key,
    });
    try {
      await this.#create(this.#ruleIds, FlowFilterObject.rule, id, object, commandFlags(compiled), () => {
        this.#rules.delete(handle);
        groupEntry.rules--;
      });
    } catch (error) {
      if (surelyNotCreated(error)) await this.#releaseClassifier(classifier).catch(() => {});
      throw error;
    }
    return handle;
  }

  /** Destroys a rule, and its classifier when no other rule needs it. Throws VirtioError `FLOW_UNKNOWN`, AdminCommandError. */
  async removeRule(rule: FlowRuleHandle): Promise<void> {
    const classifier = this.#rules.get(rule);
    if (classifier === undefined) throw new VirtioError('FLOW_UNKNOWN', `flow filter rule ${rule.id} does not exist`);
    this.#rules.delete(rule);
    await this.#destroy(this.#ruleIds, FlowFilterObject.rule, rule.id);
    const group = this.#groups.get(rule.group.id);
    if (group !== undefined) group.rules--;
    await this.#releaseClassifier(classifier);
  }

  #group(group: FlowGroupHandle): { rules: number } {
    const entry = this.#groups.get(group.id);
    if (entry?.handle !== group) throw new VirtioError('FLOW_UNKNOWN', `flow filter group ${group.id} does not exist`);
    return entry;
  }

  #takeId(ids: ObjectIds, what: string): number {
    const taken = ids.take();
    if (taken === null) throw new VirtioError('FLOW_LIMIT', `the device takes ${ids.limit} flow filter ${what}`);
    return taken.id;
  }

  async #acquireClassifier(compiled: CompiledMatch): Promise<Classifier> {
    const object = encodeClassifier({ selectors: compiled.selectors });
    const text = Buffer.from(object).toString('hex');
    let classifier = this.#classifiers.get(text);
    if (classifier === undefined) {
      const id = this.#takeId(this.#classifierIds, 'classifiers');
      const flags = commandFlags(compiled);
      const forget = () => this.#classifiers.delete(text);
      const ready = this.#create(this.#classifierIds, FlowFilterObject.classifier, id, object, flags, forget);
      classifier = { id, text, ready, users: 0 };
      this.#classifiers.set(text, classifier);
    }
    classifier.users++;
    await classifier.ready;
    return classifier;
  }

  async #releaseClassifier(classifier: Classifier): Promise<void> {
    classifier.users--;
    if (classifier.users > 0) return;
    this.#classifiers.delete(classifier.text);
    await this.#destroy(this.#classifierIds, FlowFilterObject.classifier, classifier.id);
  }

  async #create(
    ids: ObjectIds,
    type: number,
    id: number,
    object: Uint8Array,
    flags: bigint,
    forget: () => void,
  ): Promise<void> {
    try {
      await this.#admin.createObject(type, id, object, flags);
    } catch (error) {
      forget();
      if (surelyNotCreated(error)) ids.give(id);
      throw error;
    }
  }

  /** An id whose object may still exist, because the device did not say that it is gone, is not used again. */
  async #destroy(ids: ObjectIds, type: number, id: number): Promise<void> {
    await this.#admin.destroyObject(type, id);
    ids.give(id);
  }
}

/** Whether the device has said that there is no such object: after a timeout there may be one, and its id is not used again. */
function surelyNotCreated(error: unknown): boolean {
  return error instanceof AdminCommandError && error.status !== AdminStatus.EEXIST;
}

function actionNumber(action: FlowAction): number {
  if (typeof action === 'object') return FlowFilterAction.directRxVq;
  if (action === 'drop') return FlowFilterAction.drop;
  return action === 'ipsec' ? FlowFilterAction.ipsec : FlowFilterAction.ipsecRecirculate;
}

/** PARTIAL_MASK is a flag of the selector, but the standard also speaks of the command's flags: it is set in both. */
function commandFlags(compiled: CompiledMatch): bigint {
  const partial = compiled.selectors.some(({ flags }) => (flags & SelectorFlag.partialMask) !== 0);
  return partial ? BigInt(SelectorFlag.partialMask) : 0n;
}
