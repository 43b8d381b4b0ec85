/**
 * What the device's capabilities are, and taking them into use as a driver does (Virtio 1.4, 2.12.1.2).
 */
import { driverModes } from '../ipsec/capability.ts';
import type { ModeCapability, SaLimits } from '../ipsec/wire/codec.ts';
import { ipsecWire } from '../ipsec/wire/revisions.ts';
import { AdminOpcode, AdminStatus, CapabilityId, decodeIdList } from '../virtio/admin-wire.ts';
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
  SelectorType,
} from '../virtio-net/flow-filter-wire.ts';
import { expect } from './check.ts';
import { type AdminConsole, outcome, type Reply } from './console.ts';

/** Capabilities of the device, decoded. */
export interface Offer {
  readonly ids: readonly number[];
  readonly flow: FlowFilterLimits | null;
  readonly selectors: readonly FlowSelector[];
  readonly actions: readonly number[];
  readonly sas: SaLimits | null;
  readonly modes: readonly ModeCapability[];
}

/** Limits that the driver sets below what the device offers; capabilities that it leaves out. */
export interface Limits {
  readonly flow?: Partial<FlowFilterLimits>;
  readonly sas?: Partial<SaLimits>;
  readonly without?: readonly number[];
}

/** Throws `Failed` unless the command succeeded. */
export function succeeded(reply: Reply): Uint8Array {
  expect(reply.status === AdminStatus.OK, () => `${reply.name}: expected OK, came ${outcome(reply)}`);
  return reply.result;
}

/** LIST_QUERY and LIST_USE of every command that this suite knows; returns what the device supports. */
export async function useCommands(admin: AdminConsole): Promise<readonly number[]> {
  const supported = decodeIdList(succeeded(await admin.listQuery()));
  const known: readonly number[] = Object.values(AdminOpcode);
  succeeded(await admin.listUse(supported.filter((opcode) => known.includes(opcode))));
  return supported;
}

/** CAP_ID_LIST_QUERY, and DEVICE_CAP_GET of each capability that concerns a network device. */
export function offeredCapabilities(admin: AdminConsole): Promise<Offer> {
  return admin.quietly(() => readCapabilities(admin));
}

async function readCapabilities(admin: AdminConsole): Promise<Offer> {
  const ids = decodeIdList(succeeded(await admin.capabilityIds()));
  const get = async <T>(id: number, decode: (bytes: Uint8Array) => T, none: T): Promise<T> =>
    ids.includes(id) ? decode(succeeded(await admin.capabilityGet(id))) : none;
  const wire = ipsecWire(admin.revision);
  const types: readonly number[] = Object.values(SelectorType);
  const actions: readonly number[] = Object.values(FlowFilterAction);
  const modes = await get(CapabilityId.NET_IPSEC_SA, (bytes) => wire.decodeModes(bytes), []);
  return {
    ids,
    flow: await get<FlowFilterLimits | null>(CapabilityId.NET_FF_RESOURCE, decodeFlowFilterLimits, null),
    selectors: (await get(CapabilityId.NET_FF_SELECTOR, decodeSelectorCapability, [])).filter(({ type }) =>
      types.includes(type),
    ),
    actions: (await get(CapabilityId.NET_FF_ACTION, decodeActionCapability, [])).filter((action) =>
      actions.includes(action),
    ),
    sas: await get<SaLimits | null>(CapabilityId.NET_IPSEC_RESOURCE, (bytes) => wire.decodeSaLimits(bytes), null),
    modes: driverModes(modes, wire),
  };
}

/** DRIVER_CAP_SET of all that is offered, within `limits`. */
export async function useCapabilities(admin: AdminConsole, offer: Offer, limits: Limits = {}): Promise<void> {
  for (const [id, bytes] of driverCapabilities(admin, offer, limits)) {
    if (limits.without?.includes(id) !== true) succeeded(await admin.capabilitySet(id, bytes));
  }
}

/** What a driver sets of each capability. */
export function driverCapabilities(admin: AdminConsole, offer: Offer, limits: Limits = {}): Map<number, Uint8Array> {
  const wire = ipsecWire(admin.revision);
  const out = new Map<number, Uint8Array>();
  const { flow, selectors, actions, sas, modes } = offer;
  if (flow !== null) out.set(CapabilityId.NET_FF_RESOURCE, encodeFlowFilterLimits(smaller(flow, limits.flow)));
  if (selectors.length > 0) out.set(CapabilityId.NET_FF_SELECTOR, encodeSelectorCapability(selectors));
  if (actions.length > 0) out.set(CapabilityId.NET_FF_ACTION, encodeActionCapability(actions));
  if (sas !== null) out.set(CapabilityId.NET_IPSEC_RESOURCE, wire.encodeSaLimits(smaller(sas, limits.sas)));
  if (modes.length > 0) out.set(CapabilityId.NET_IPSEC_SA, wire.encodeModes(modes));
  return out;
}

/** `offered` with the fields of `wanted` that are smaller. */
function smaller<T extends object>(offered: T, wanted: Partial<T> = {}): T {
  const lower = Object.entries(wanted).filter(([name, value]) => Number(value) < Number(Reflect.get(offered, name)));
  return { ...offered, ...Object.fromEntries(lower) };
}
