/**
 * From a live device to inline IPsec, in the order of the standard (Virtio 1.4, 2.12.1): LIST_QUERY, LIST_USE, CAP_ID_LIST_QUERY,
 * then each capability.
 */
import { AdminCommandError, VfioError, VipsecError, VirtioError } from '../errors.ts';
import { InboundRules } from '../ipsec/inbound-rules.ts';
import { InlineIpsec, type MutableSaTable } from '../ipsec/inline.ts';
import { IpsecCapability } from '../ipsec/wire/numbers.ts';
import { recogniseRevision } from '../ipsec/wire/recognise.ts';
import { ipsecWire } from '../ipsec/wire/revisions.ts';
import type { DeviceFunction } from '../vfio/function.ts';
import type { AdminQueue } from '../virtio/admin.ts';
import { AdminOpcode, adminOpcodeName } from '../virtio/admin-wire.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { findObjectOpcodes } from '../virtio/objects.ts';
import type { WireRevision } from '../virtio/revision.ts';
import { FlowFilter, type FlowGroupHandle } from '../virtio-net/flow-filter.ts';
import { encodeGroup, FlowFilterObject } from '../virtio-net/flow-filter-wire.ts';
import type { NicRings } from './rings.ts';
import type { OpenOptions } from './wire.ts';

/** Commands that inline IPsec and the flow filter need. */
const OBJECT_COMMANDS: readonly number[] = [
  AdminOpcode.CAP_ID_LIST_QUERY,
  AdminOpcode.DEVICE_CAP_GET,
  AdminOpcode.DRIVER_CAP_SET,
  AdminOpcode.RESOURCE_OBJ_CREATE,
  AdminOpcode.RESOURCE_OBJ_MODIFY,
  AdminOpcode.RESOURCE_OBJ_QUERY,
  AdminOpcode.RESOURCE_OBJ_DESTROY,
];

/** Priority of the group that tells which opcodes the device means; any but 0. */
const PROBE_PRIORITY = 0xffff;

export interface InlineParts {
  readonly fn: DeviceFunction;
  readonly features: FeatureSet;
  readonly rings: NicRings;
  readonly admin: AdminQueue | null;
  readonly table: MutableSaTable;
  readonly options: OpenOptions;
}

export interface OpenInline {
  readonly inline: InlineIpsec | null;
  /** Why there is no inline IPsec; null when there is. */
  readonly obstacle: string | null;
  readonly flowFilter: FlowFilter | null;
}

/**
 * Inline IPsec as far as the options want it and the device has it. In `auto` mode a device whose IPsec cannot be used is a device
 * without; one that is lost is lost. Throws VfioError; in `inline` mode also VirtioError and AdminCommandError.
 */
export async function openInline(parts: InlineParts): Promise<OpenInline> {
  const { fn, admin, options, features } = parts;
  const without = (obstacle: string): OpenInline => ({ inline: null, obstacle, flowFilter: null });
  if (options.unknownRevision !== null) return without(options.unknownRevision);
  if (options.ipsec === 'software' || options.ipsec === 'off') return without('inline IPsec is not wanted');
  if (!features.has(Feature.IPSEC)) return without('the device does not offer VIRTIO_NET_F_IPSEC');
  if (admin === null) return without('the device does not offer VIRTIO_F_ADMIN_VQ');
  try {
    return await useCapabilities(admin, parts);
  } catch (error) {
    const gone = error instanceof VfioError || fn.gone;
    // With the wrong revision packet headers are wrong too, so software is no way out.
    const hopeless = gone || !(error instanceof VipsecError) || error.code === 'WIRE_REVISION';
    if (options.ipsec === 'inline' || hopeless) throw error;
    return without(`${error.message} [${error.code}]`);
  }
}

async function useCapabilities(admin: AdminQueue, parts: InlineParts): Promise<OpenInline> {
  const { options, table, rings } = parts;
  const offered = await admin.listQuery();
  const missing = OBJECT_COMMANDS.filter((opcode) => !offered.includes(opcode));
  if (missing.length > 0) {
    const names = missing.map((opcode) => adminOpcodeName(opcode)).join(', ');
    throw new VirtioError('ADMIN_COMMANDS_MISSING', `the device does not offer ${names}`);
  }
  await admin.listUse([AdminOpcode.LIST_QUERY, AdminOpcode.LIST_USE, ...OBJECT_COMMANDS]);
  const ids = await admin.capabilityIds();
  if (ids.includes(IpsecCapability.sa)) await checkRevision(admin, options.wire);
  const flowFilter = await FlowFilter.open(admin, ids);
  if (flowFilter !== null) await learnObjectOpcodes(admin, flowFilter);
  const inline = await InlineIpsec.open(admin, ids, {
    wire: ipsecWire(options.wire, { tunnelTypeBase: options.tunnelTypeBase }),
    rules: flowFilter === null ? null : new InboundRules(flowFilter),
    table,
    handles: 2 * options.maxSas,
    maxSas: options.maxSas,
    quiesceTransmit: () => rings.quiesceTransmit(),
    receiveQueues: rings.pairs.length,
  });
  if (inline === null) throw new VirtioError('CAPABILITY_MISSING', 'the device has no usable IPsec capabilities');
  return { inline, obstacle: null, flowFilter };
}

/** A device that speaks the other revision takes every SA, and every packet, for something else. */
async function checkRevision(admin: AdminQueue, wire: WireRevision): Promise<void> {
  const spoken = recogniseRevision(await admin.deviceCapability(IpsecCapability.sa));
  if (spoken === null || spoken === wire) return;
  throw new VirtioError('WIRE_REVISION', `the device speaks ${spoken}, not ${wire}`, {
    hint: "Open it with wire: 'auto', or with the revision that it speaks.",
  });
}

/**
 * The standard contradicts itself about the opcodes of QUERY and MODIFY: a group that nobody uses yet tells what this device means. One that
 * does not answer is taken by the text.
 */
async function learnObjectOpcodes(admin: AdminQueue, filter: FlowFilter): Promise<void> {
  let group: FlowGroupHandle | null = null;
  try {
    group = await filter.addGroup(PROBE_PRIORITY);
    await findObjectOpcodes(admin, FlowFilterObject.group, group.id, encodeGroup(group));
  } catch (error) {
    if (!(error instanceof AdminCommandError || (error instanceof VirtioError && error.code === 'FLOW_LIMIT')))
      throw error;
  } finally {
    if (group !== null) await filter.removeGroup(group);
  }
}
