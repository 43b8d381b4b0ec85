/**
 * Device and driver capabilities (Virtio 1.4, 2.12.1.2, 5.1.6): what the device offers, and what the driver has said
 * that it uses.
 *
 * A capability that the driver has not set, or has set to nothing, is disabled: limits count as zero, and commands on
 * its objects fail. All of a group (flow filter; IPsec) must be enabled for any of its objects.
 */
import { VirtioError } from '../errors.ts';
import type { IpsecWire, ModeCapability } from '../ipsec/wire/codec.ts';
import { AdminQualifier, AdminStatus, CapabilityId, encodeIdList } from '../virtio/admin-wire.ts';
import {
  decodeActionCapability,
  decodeFlowFilterLimits,
  decodeSelectorCapability,
  encodeActionCapability,
  encodeFlowFilterLimits,
  encodeSelectorCapability,
  FlowFilterAction,
  type FlowFilterLimits,
  type FlowSelector,
  SELECTOR_LENGTH,
  SelectorFlag,
  SelectorType,
} from '../virtio-net/flow-filter-wire.ts';
import { type CommandResult, failed, OK_RESULT, succeeded } from './command-result.ts';
import type { FaultSet } from './faults.ts';
import { DeviceIpsec, type IpsecUse, SA_LIMIT } from './ipsec.ts';

/** What the flow filter takes. */
const LIMITS: FlowFilterLimits = {
  groups: 16,
  classifiers: 64,
  rules: 65536,
  rulesPerGroup: 65536,
  lastRulePriority: 255,
  selectorsPerClassifier: 3,
};

/** Capabilities of the flow filter, as the driver has set them. */
export interface FlowUse {
  readonly limits: FlowFilterLimits;
  readonly selectors: readonly FlowSelector[];
  readonly actions: readonly number[];
}

export class CapabilityTable {
  readonly #wire: IpsecWire;
  readonly #offered: ReadonlyMap<number, Uint8Array>;
  readonly #selectors: readonly FlowSelector[];
  readonly #actions: readonly number[];
  readonly #modes: readonly ModeCapability[];
  // What the driver has set; null is not set.
  #flowLimits: FlowFilterLimits | null = null;
  #flowSelectors: readonly FlowSelector[] | null = null;
  #flowActions: readonly number[] | null = null;
  #saLimits: { inbound: number; outbound: number } | null = null;
  #saModes: readonly ModeCapability[] | null = null;

  constructor(wire: IpsecWire, faults: FaultSet) {
    this.#wire = wire;
    this.#selectors = Object.values(SelectorType)
      .sort((a, b) => a - b)
      .map((type) => ({
        type,
        flags: SelectorFlag.partialMask,
        mask: new Uint8Array(SELECTOR_LENGTH[type]).fill(0xff),
      }));
    this.#actions = Object.values(FlowFilterAction).sort((a, b) => a - b);
    this.#modes = DeviceIpsec.modes(wire);
    const modes = wire.encodeModes(this.#modes);
    if (faults.has('capability-malformed')) modes[0] = 200;
    this.#offered = new Map([
      [CapabilityId.NET_FF_RESOURCE, encodeFlowFilterLimits(LIMITS)],
      [CapabilityId.NET_FF_SELECTOR, encodeSelectorCapability(this.#selectors)],
      [CapabilityId.NET_FF_ACTION, encodeActionCapability(this.#actions)],
      [CapabilityId.NET_IPSEC_RESOURCE, wire.encodeSaLimits({ inbound: SA_LIMIT, outbound: SA_LIMIT })],
      [CapabilityId.NET_IPSEC_SA, modes],
    ]);
  }

  /** Device reset: "the device MUST reset all driver capabilities". */
  clear(): void {
    this.#flowLimits = null;
    this.#flowSelectors = null;
    this.#flowActions = null;
    this.#saLimits = null;
    this.#saModes = null;
  }

  list(): CommandResult {
    return succeeded(encodeIdList(this.#offered.keys()));
  }

  get(id: number): CommandResult {
    const bytes = this.#offered.get(id);
    return bytes === undefined ? NO_SUCH : succeeded(bytes);
  }

  /** What flow filter objects may use; null while one of its capabilities is disabled. */
  get flow(): FlowUse | null {
    const limits = this.#flowLimits;
    const selectors = this.#flowSelectors;
    const actions = this.#flowActions;
    if (limits === null || selectors === null || actions === null) return null;
    const none = limits.groups === 0 && limits.classifiers === 0 && limits.rules === 0;
    return none || selectors.length === 0 || actions.length === 0 ? null : { limits, selectors, actions };
  }

  /** What SA objects may use; null while one of the capabilities is disabled. */
  get ipsec(): IpsecUse | null {
    const limits = this.#saLimits;
    const modes = this.#saModes;
    if (limits === null || modes === null || modes.length === 0) return null;
    return limits.inbound === 0 && limits.outbound === 0 ? null : { limits, modes };
  }

  /**
   * DRIVER_CAP_SET. `data` is followed by enough zeros for any capability. `inUse`: objects that depend on the
   * capability exist, so that it may be set again, but not to anything else.
   */
  set(id: number, data: Uint8Array, inUse: boolean): CommandResult {
    if (!this.#offered.has(id)) return NO_SUCH;
    try {
      return this.#set(id, data, inUse);
    } catch (error) {
      if (error instanceof VirtioError) return INVALID_FIELD;
      throw error;
    }
  }

  #set(id: number, data: Uint8Array, inUse: boolean): CommandResult {
    switch (id) {
      case CapabilityId.NET_FF_RESOURCE: {
        const limits = decodeFlowFilterLimits(data);
        if (!isWithin(limits, LIMITS)) return INVALID_FIELD;
        if (inUse && !isSame(limits, this.#flowLimits)) return BUSY;
        this.#flowLimits = limits;
        return OK_RESULT;
      }
      case CapabilityId.NET_FF_SELECTOR: {
        const selectors = decodeSelectorCapability(data);
        if (!selectors.every((selector) => isSubset(selector, this.#selectors))) return INVALID_FIELD;
        if (inUse && !isSame(selectors, this.#flowSelectors)) return BUSY;
        this.#flowSelectors = selectors;
        return OK_RESULT;
      }
      case CapabilityId.NET_FF_ACTION: {
        const actions = decodeActionCapability(data);
        if (!actions.every((action) => this.#actions.includes(action))) return INVALID_FIELD;
        if (inUse && !isSame(actions, this.#flowActions)) return BUSY;
        this.#flowActions = actions;
        return OK_RESULT;
      }
      case CapabilityId.NET_IPSEC_RESOURCE: {
        const limits = this.#wire.decodeSaLimits(data);
        if (limits.inbound > SA_LIMIT || limits.outbound > SA_LIMIT) return INVALID_FIELD;
        if (inUse && !isSame(limits, this.#saLimits)) return BUSY;
        this.#saLimits = limits;
        return OK_RESULT;
      }
      default: {
        const modes = this.#wire.decodeModes(data);
        if (!modes.every((mode) => isModeWithin(mode, this.#modes))) return INVALID_FIELD;
        if (inUse && !isSame(modes, this.#saModes)) return BUSY;
        this.#saModes = modes;
        return OK_RESULT;
      }
    }
  }
}

const INVALID_FIELD = failed(AdminStatus.EINVAL, AdminQualifier.INVALID_FIELD);
const NO_SUCH = failed(AdminStatus.ENXIO, AdminQualifier.INVALID_FIELD);
const BUSY = failed(AdminStatus.EBUSY, AdminQualifier.INVALID_COMMAND);

function isWithin(limits: FlowFilterLimits, offered: FlowFilterLimits): boolean {
  return (
    limits.groups <= offered.groups &&
    limits.classifiers <= offered.classifiers &&
    limits.rules <= offered.rules &&
    limits.rulesPerGroup <= offered.rulesPerGroup &&
    limits.lastRulePriority <= offered.lastRulePriority &&
    limits.selectorsPerClassifier <= offered.selectorsPerClassifier
  );
}

function isSubset(selector: FlowSelector, offered: readonly FlowSelector[]): boolean {
  const match = offered.find((candidate) => candidate.type === selector.type);
  if (match === undefined || (selector.flags & ~match.flags) !== 0) return false;
  return selector.mask.every((bits, i) => (bits & ~match.mask[i]) === 0);
}

function isModeWithin(mode: ModeCapability, offered: readonly ModeCapability[]): boolean {
  const match = offered.find((candidate) => candidate.mode === mode.mode);
  return (
    match !== undefined &&
    mode.maxReplayWindow <= match.maxReplayWindow &&
    (mode.options & ~match.options) === 0 &&
    (mode.ciphers & ~match.ciphers) === 0n &&
    (mode.macs & ~match.macs) === 0n &&
    (mode.aeads & ~match.aeads) === 0 &&
    mode.maxCipherKeyLength <= match.maxCipherKeyLength &&
    mode.maxAuthKeyLength <= match.maxAuthKeyLength
  );
}

/** Equal in all fields: small values of the control path. */
function isSame(a: unknown, b: unknown): boolean {
  const text = (value: unknown) =>
    JSON.stringify(value, (_, part) =>
      typeof part === 'bigint' ? `${part}n` : part instanceof Uint8Array ? [...part] : part,
    );
  return text(a) === text(b);
}
