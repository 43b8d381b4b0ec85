/** How the faults of `faults.ts` that concern matching are made: rules of the flow filter as they are not. */
import { FlowFilterAction as Action, SELECTOR_LENGTH, SelectorType } from '../virtio-net/flow-filter-wire.ts';
import type { FaultName, FaultSet } from './faults.ts';
import type { MatcherRule } from './flow-matcher.ts';

const ABOVE_ALL = 0x10000;
const BELOW_ALL = -1;
const LAST_PRIORITY = { group: 0xffff, rule: 0xff } as const;

/** Matches every packet. */
const ANY = {
  selectors: [{ type: SelectorType.eth, flags: 0, mask: new Uint8Array(SELECTOR_LENGTH[SelectorType.eth]) }],
  key: new Uint8Array(SELECTOR_LENGTH[SelectorType.eth]),
} as const;

function withAction(rule: MatcherRule, action: number): MatcherRule {
  return { ...rule, rule: { ...rule.rule, action, queueIndex: 0 } };
}

const CHANGES: Partial<Record<FaultName, (rules: readonly MatcherRule[]) => readonly MatcherRule[]>> = {
  'flow-ignored': () => [],
  'flow-groups-reversed': (rules) =>
    rules.map((rule) => ({ ...rule, groupPriority: LAST_PRIORITY.group - rule.groupPriority })),
  'flow-rules-reversed': (rules) =>
    rules.map((rule) => ({ ...rule, rule: { ...rule.rule, priority: LAST_PRIORITY.rule - rule.rule.priority } })),
  'flow-top-group-only': (rules) => {
    const top = Math.max(...rules.map(({ groupPriority }) => groupPriority));
    return rules.filter(({ groupPriority }) => groupPriority === top);
  },
  'flow-drop-first': (rules) =>
    rules.map((rule) => (rule.rule.action === Action.drop ? { ...rule, groupPriority: ABOVE_ALL } : rule)),
  'flow-drops-unmatched': (rules) => [
    ...rules,
    {
      id: ABOVE_ALL,
      groupPriority: BELOW_ALL,
      selectors: ANY.selectors,
      rule: { groupId: 0, classifierId: ABOVE_ALL, priority: 0, action: Action.drop, queueIndex: 0, key: ANY.key },
    },
  ],
  'flow-ipsec-ignored': (rules) =>
    rules.map((rule) => (rule.rule.action >= Action.ipsec ? withAction(rule, Action.directRxVq) : rule)),
  'flow-recirculate-ignored': (rules) =>
    rules.map((rule) => (rule.rule.action === Action.ipsecRecirculate ? withAction(rule, Action.ipsec) : rule)),
};

/** The rules with the faults. */
export function withFlowFaults(rules: readonly MatcherRule[], faults: FaultSet): readonly MatcherRule[] {
  let changed = rules;
  for (const name of faults) changed = CHANGES[name]?.(changed) ?? changed;
  return changed;
}
