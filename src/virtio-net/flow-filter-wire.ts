/**
 * Flow filter capabilities and objects as they travel in administration commands (Virtio 1.4, 5.1.6.5.7 "Flow filter").
 *
 * Used by the driver and by the software device; the same in every wire revision. Decoding throws VirtioError
 * `MALFORMED_CAPABILITY` or `MALFORMED_OBJECT` and never reads past the bytes given; fixed fields that a shorter buffer leaves out read as
 * zeros. Which selectors may follow which is not checked here: that is the device's decision about a classifier.
 */
import { VirtioError } from '../errors.ts';
import { CapabilityId, ResourceType } from '../virtio/admin-wire.ts';
import { get8, get16, get32, getBytes, put8, put16, put32, putBytes } from '../virtio/little-endian.ts';

/** Capability ids (Virtio 1.4, 5.1.5). */
export const FlowFilterCapability = {
  resource: CapabilityId.NET_FF_RESOURCE,
  selector: CapabilityId.NET_FF_SELECTOR,
  action: CapabilityId.NET_FF_ACTION,
} as const;

/** Resource object types (Virtio 1.4, 5.1.6). */
export const FlowFilterObject = {
  group: ResourceType.NET_FF_GROUP,
  classifier: ResourceType.NET_FF_CLASSIFIER,
  rule: ResourceType.NET_FF_RULE,
} as const;

/** Table "Flow filter selector types". 0 is reserved. */
export const SelectorType = { eth: 1, ipv4: 2, ipv6: 3, tcp: 4, udp: 5, esp: 6 } as const;

/** Bytes of mask and key by `SelectorType`; index 0 is unused. */
export const SELECTOR_LENGTH: readonly number[] = [0, 14, 20, 40, 20, 8, 8];

/** Bits of a selector's `flags`, also seen in the flags of the create command. */
export const SelectorFlag = { partialMask: 1 << 0 } as const;

/** Table "Flow filter rule actions". 0 is reserved. */
export const FlowFilterAction = { drop: 1, directRxVq: 2, ipsec: 3, ipsecRecirculate: 4 } as const;

/** VIRTIO_NET_FF_RESOURCE_CAP. */
export interface FlowFilterLimits {
  readonly groups: number;
  readonly classifiers: number;
  readonly rules: number;
  readonly rulesPerGroup: number;
  /** Rule priorities stay below it. */
  readonly lastRulePriority: number;
  readonly selectorsPerClassifier: number;
}

/** An entry of VIRTIO_NET_FF_SELECTOR_CAP, or of a classifier. */
export interface FlowSelector {
  /** `SelectorType`, or a number that is not defined yet. */
  readonly type: number;
  /** `SelectorFlag`. */
  readonly flags: number;
  /** A mask of the header, in the order of bytes on the wire. */
  readonly mask: Uint8Array;
}

/** VIRTIO_NET_RESOURCE_OBJ_FF_GROUP. */
export interface FlowGroup {
  /** 0 to 65535; a higher number is tried first. */
  readonly priority: number;
}

/** VIRTIO_NET_RESOURCE_OBJ_FF_CLASSIFIER. */
export interface FlowClassifier {
  readonly selectors: readonly FlowSelector[];
}

/** VIRTIO_NET_RESOURCE_OBJ_FF_RULE. */
export interface FlowRule {
  readonly groupId: number;
  readonly classifierId: number;
  /** 0 to 255; a higher number is tried first. */
  readonly priority: number;
  /** `FlowFilterAction`. */
  readonly action: number;
  /** Index of a receive virtqueue, for `directRxVq`. */
  readonly queueIndex: number;
  /** The keys of all selectors one after the other, at most 255 bytes. */
  readonly key: Uint8Array;
}

/** `struct virtio_net_ff_cap_data`. */
const LimitsLayout = {
  size: 20,
  groups: 0, // le32
  classifiers: 4, // le32
  rules: 8, // le32
  rulesPerGroup: 12, // le32
  lastRulePriority: 16, // u8
  selectorsPerClassifier: 17, // u8, reserved[2]
} as const;

/** `struct virtio_net_ff_cap_mask_data` and `struct virtio_net_resource_obj_ff_classifier`: count u8, reserved[7], selectors. */
const SelectorsLayout = { count: 0, entries: 8, maxCount: 255 } as const;

/** `struct virtio_net_ff_selector`. */
const SelectorLayout = { type: 0, flags: 1, length: 4, mask: 8, maxLength: 255 } as const;

/** `struct virtio_net_ff_actions`. */
const ActionsLayout = { count: 0, entries: 8, maxCount: 255 } as const;

/** `struct virtio_net_resource_obj_ff_group`. */
const GroupLayout = { size: 2, priority: 0 } as const;

/** `struct virtio_net_resource_obj_ff_rule`. */
const RuleLayout = {
  groupId: 0, // le32
  classifierId: 4, // le32
  priority: 8, // u8
  keyLength: 9, // u8
  action: 10, // u8, reserved
  queueIndex: 12, // le16, reserved1[2]
  key: 16,
  maxKeyLength: 255,
} as const;

export function encodeFlowFilterLimits(limits: FlowFilterLimits): Uint8Array {
  const out = new Uint8Array(LimitsLayout.size);
  put32(out, LimitsLayout.groups, inRange('groups_limit', limits.groups, 0xffffffff));
  put32(out, LimitsLayout.classifiers, inRange('classifiers_limit', limits.classifiers, 0xffffffff));
  put32(out, LimitsLayout.rules, inRange('rules_limit', limits.rules, 0xffffffff));
  put32(out, LimitsLayout.rulesPerGroup, inRange('rules_per_group_limit', limits.rulesPerGroup, 0xffffffff));
  put8(out, LimitsLayout.lastRulePriority, inRange('last_rule_priority', limits.lastRulePriority, 0xff));
  const selectors = inRange('selectors_per_classifier_limit', limits.selectorsPerClassifier, 0xff);
  put8(out, LimitsLayout.selectorsPerClassifier, selectors);
  return out;
}

export function decodeFlowFilterLimits(bytes: Uint8Array): FlowFilterLimits {
  return {
    groups: get32(bytes, LimitsLayout.groups),
    classifiers: get32(bytes, LimitsLayout.classifiers),
    rules: get32(bytes, LimitsLayout.rules),
    rulesPerGroup: get32(bytes, LimitsLayout.rulesPerGroup),
    lastRulePriority: get8(bytes, LimitsLayout.lastRulePriority),
    selectorsPerClassifier: get8(bytes, LimitsLayout.selectorsPerClassifier),
  };
}

export function encodeSelectorCapability(selectors: readonly FlowSelector[]): Uint8Array {
  return encodeSelectors(selectors);
}

/** The entries are ordered by type and each type is there once, as the standard says; anything else is malformed. */
export function decodeSelectorCapability(bytes: Uint8Array): FlowSelector[] {
  const selectors = decodeSelectors(bytes, 'MALFORMED_CAPABILITY');
  for (let i = 1; i < selectors.length; i++) {
    if (selectors[i].type <= selectors[i - 1].type) {
      throw new VirtioError(
        'MALFORMED_CAPABILITY',
        `selector type ${selectors[i].type} follows ${selectors[i - 1].type}`,
      );
    }
  }
  return selectors;
}

export function encodeActionCapability(actions: readonly number[]): Uint8Array {
  if (actions.length > ActionsLayout.maxCount) throw new RangeError(`${actions.length} actions`);
  const out = new Uint8Array(ActionsLayout.entries + actions.length);
  put8(out, ActionsLayout.count, actions.length);
  actions.forEach((action, i) => {
    put8(out, ActionsLayout.entries + i, inRange('action', action, 0xff));
  });
  return out;
}

/** The entries ascend and each is there once, as the standard says; anything else is malformed. */
export function decodeActionCapability(bytes: Uint8Array): number[] {
  const count = get8(bytes, ActionsLayout.count);
  if (count > 0 && ActionsLayout.entries + count > bytes.length) {
    throw new VirtioError('MALFORMED_CAPABILITY', `${count} flow filter actions in ${bytes.length} bytes`);
  }
  const actions = Array.from(getBytes(bytes, ActionsLayout.entries, count));
  for (let i = 1; i < count; i++) {
    if (actions[i] <= actions[i - 1]) {
      throw new VirtioError('MALFORMED_CAPABILITY', `flow filter action ${actions[i]} follows ${actions[i - 1]}`);
    }
  }
  return actions;
}

export function encodeGroup(group: FlowGroup): Uint8Array {
  const out = new Uint8Array(GroupLayout.size);
  put16(out, GroupLayout.priority, inRange('group_priority', group.priority, 0xffff));
  return out;
}

export function decodeGroup(bytes: Uint8Array): FlowGroup {
  return { priority: get16(bytes, GroupLayout.priority) };
}

export function encodeClassifier(classifier: FlowClassifier): Uint8Array {
  return encodeSelectors(classifier.selectors);
}

export function decodeClassifier(bytes: Uint8Array): FlowClassifier {
  return { selectors: decodeSelectors(bytes, 'MALFORMED_OBJECT') };
}

export function encodeRule(rule: FlowRule): Uint8Array {
  const keyLength = inRange('key_length', rule.key.length, RuleLayout.maxKeyLength);
  const out = new Uint8Array(RuleLayout.key + keyLength);
  put32(out, RuleLayout.groupId, inRange('group_id', rule.groupId, 0xffffffff));
  put32(out, RuleLayout.classifierId, inRange('classifier_id', rule.classifierId, 0xffffffff));
  put8(out, RuleLayout.priority, inRange('rule_priority', rule.priority, 0xff));
  put8(out, RuleLayout.keyLength, keyLength);
  put8(out, RuleLayout.action, inRange('action', rule.action, 0xff));
  put16(out, RuleLayout.queueIndex, inRange('vq_index', rule.queueIndex, 0xffff));
  putBytes(out, RuleLayout.key, rule.key);
  return out;
}

export function decodeRule(bytes: Uint8Array): FlowRule {
  const keyLength = get8(bytes, RuleLayout.keyLength);
  if (keyLength > 0 && RuleLayout.key + keyLength > bytes.length) {
    throw new VirtioError(
      'MALFORMED_OBJECT',
      `a flow filter rule of ${bytes.length} bytes names a key of ${keyLength}`,
    );
  }
  return {
    groupId: get32(bytes, RuleLayout.groupId),
    classifierId: get32(bytes, RuleLayout.classifierId),
    priority: get8(bytes, RuleLayout.priority),
    action: get8(bytes, RuleLayout.action),
    queueIndex: get16(bytes, RuleLayout.queueIndex),
    key: getBytes(bytes, RuleLayout.key, keyLength),
  };
}

/** Bytes of all masks of `selectors`: the `key_length` of a rule that uses them. */
export function keyLengthOf(selectors: readonly FlowSelector[]): number {
  let sum = 0;
  for (const selector of selectors) sum += selector.mask.length;
  return sum;
}

/**
 * Bits of each field of a header, in order: without partial masks a field is matched whole or not at all. TCP control
 * bits are single fields.
 */
const FIELD_BITS: Readonly<Record<number, readonly number[]>> = {
  [SelectorType.eth]: [48, 48, 16],
  [SelectorType.ipv4]: [4, 4, 6, 2, 16, 16, 3, 13, 8, 8, 16, 32, 32],
  [SelectorType.ipv6]: [4, 8, 20, 16, 8, 8, 128, 128],
  [SelectorType.tcp]: [16, 16, 32, 32, 4, 4, 1, 1, 1, 1, 1, 1, 1, 1, 16, 16, 16],
  [SelectorType.udp]: [16, 16, 16, 16],
  [SelectorType.esp]: [32, 32],
};

/** Whether the mask has every field whole or not at all, so that it needs no PARTIAL_MASK. The type is one of `SelectorType`. */
export function hasWholeFields(selector: Pick<FlowSelector, 'type' | 'mask'>): boolean {
  let bit = 0;
  for (const width of FIELD_BITS[selector.type]) {
    let ones = 0;
    for (let i = 0; i < width; i++, bit++) ones += (selector.mask[bit >>> 3] >>> (7 - (bit & 7))) & 1;
    if (ones !== 0 && ones !== width) return false;
  }
  return true;
}

function encodeSelectors(selectors: readonly FlowSelector[]): Uint8Array {
  inRange('count', selectors.length, SelectorsLayout.maxCount);
  const size = selectors.length * SelectorLayout.mask + keyLengthOf(selectors);
  const out = new Uint8Array(SelectorsLayout.entries + size);
  put8(out, SelectorsLayout.count, selectors.length);
  let at: number = SelectorsLayout.entries;
  for (const { type, flags, mask } of selectors) {
    put8(out, at + SelectorLayout.type, inRange('type', type, 0xff));
    put8(out, at + SelectorLayout.flags, inRange('flags', flags, 0xff));
    put8(out, at + SelectorLayout.length, inRange('length', mask.length, SelectorLayout.maxLength));
    putBytes(out, at + SelectorLayout.mask, mask);
    at += SelectorLayout.mask + mask.length;
  }
  return out;
}

function decodeSelectors(bytes: Uint8Array, code: 'MALFORMED_CAPABILITY' | 'MALFORMED_OBJECT'): FlowSelector[] {
  const count = get8(bytes, SelectorsLayout.count);
  const selectors: FlowSelector[] = [];
  let at: number = SelectorsLayout.entries;
  while (selectors.length < count) {
    const type = get8(bytes, at + SelectorLayout.type);
    const length = get8(bytes, at + SelectorLayout.length);
    if (at + SelectorLayout.mask + length > bytes.length) {
      throw new VirtioError(
        code,
        `selector ${selectors.length} of ${count} ends after the ${bytes.length} bytes given`,
      );
    }
    if (type < SELECTOR_LENGTH.length && length !== SELECTOR_LENGTH[type]) {
      throw new VirtioError(code, `a selector of type ${type} has ${length} bytes, not ${SELECTOR_LENGTH[type]}`);
    }
    const flags = get8(bytes, at + SelectorLayout.flags);
    selectors.push({ type, flags, mask: getBytes(bytes, at + SelectorLayout.mask, length) });
    at += SelectorLayout.mask + length;
  }
  return selectors;
}

function inRange(name: string, value: number, max: number): number {
  if (!Number.isInteger(value) || value < 0 || value > max)
    throw new RangeError(`${name} ${value} is not in 0 to ${max}`);
  return value;
}
