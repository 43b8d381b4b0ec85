/**
 * What the suite must know of a device before it starts: how it reads what the standard leaves open, and whether its
 * link leads back.
 *
 * Finding out is no check: a device on which this fails fails the checks for the same reason.
 */
import { VipsecError } from '../errors.ts';
import { AdminOpcode, AdminOpcodeTable, AdminStatus, CapabilityId, ResourceType } from '../virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../virtio/features.ts';
import { OCTEP_REQUIRED } from '../virtio/octep-layout.ts';
import type { WireRevision } from '../virtio/revision.ts';
import { encodeGroup } from '../virtio-net/flow-filter-wire.ts';
import { Bench } from './bench.ts';
import { Failed, NotApplicable, Untestable } from './check.ts';
import type { AdminConsole } from './console.ts';
import { Driver } from './driver.ts';
import { isEqual, udpFrame } from './frames.ts';
import { offeredCapabilities, useCapabilities, useCommands } from './offer.ts';
import type { RingFormat } from './ring.ts';
import type { Target } from './target.ts';
import type { Patience } from './time.ts';

export interface Readings {
  readonly revision: WireRevision;
  /** Which opcodes QUERY and MODIFY have (spec-notes, 13). */
  readonly queryOpcode: number;
  readonly modifyOpcode: number;
}

/** What the device wants of its driver. */
export interface Demands {
  /** Features without which it does not work, beside those that 6.2 lets devices insist on. */
  readonly insists: FeatureSet;
  /** The format of virtqueues, where a check does not choose. */
  readonly ring: RingFormat;
}

export interface Profile extends Readings, Demands {
  /** Whether what the device sends comes back to it: found out when it is asked for the first time. */
  loopsBack(): Promise<boolean>;
  /** What `loopsBack` has found; null before. */
  readonly loopback: boolean | null;
}

const TEXT = { queryOpcode: AdminOpcode.RESOURCE_OBJ_QUERY, modifyOpcode: AdminOpcode.RESOURCE_OBJ_MODIFY } as const;
const TABLE = {
  queryOpcode: AdminOpcodeTable.RESOURCE_OBJ_QUERY,
  modifyOpcode: AdminOpcodeTable.RESOURCE_OBJ_MODIFY,
} as const;
/** Bytes of an entry of VIRTIO_NET_IPSEC_SA_CAP in the draft, and of what stands before the first. */
const ModeEntry = { head: 8, draft: 40 } as const;
const PRIORITY = 0x0102;

/** What devices are known to insist on, tried in this order: Octeon's does on both. */
const DEMANDS = [
  FeatureSet.empty,
  FeatureSet.of(Feature.RING_PACKED),
  FeatureSet.of(Feature.RING_PACKED, Feature.NOTIFICATION_DATA),
] as const;

export interface ProfileOptions {
  readonly wire: WireRevision | 'auto';
  /** `auto`: split virtqueues, unless the device takes packed ones only. */
  readonly ring: RingFormat | 'auto';
}

/** Asks the device how it reads the standard. */
export async function findProfile(
  target: Target,
  patience: Patience,
  { wire, ring }: ProfileOptions,
): Promise<Profile> {
  const insists = (await attempt(target, patience, () => findDemands(target, patience))) ?? FeatureSet.empty;
  const only: RingFormat = insists.has(Feature.RING_PACKED) ? 'packed' : 'split';
  const usual: Readings & Demands = {
    revision: wire === 'auto' ? 'virtio-1.4' : wire,
    ...TEXT,
    insists,
    ring: ring === 'auto' ? only : ring,
  };
  // While it is being asked, what it would say is taken for granted.
  const assumed = { loopback: true, loopsBack: async () => true };
  const found = await attempt(target, patience, () =>
    findReadings(new Bench(target, null, patience, { ...usual, ...assumed }), wire),
  );
  const profile = { ...usual, ...found, loopback: null as boolean | null };
  const seek = () => findLoopback(new Bench(target, null, patience, { ...profile, ...assumed }));
  return Object.assign(profile, {
    loopsBack: async () => {
      profile.loopback ??= (await attempt(target, patience, seek)) ?? false;
      return profile.loopback;
    },
  });
}

/** What `find` finds; undefined when the device does not let it. */
async function attempt<T>(target: Target, patience: Patience, find: () => Promise<T>): Promise<T | undefined> {
  try {
    target.connect();
    await target.prepare(patience);
    return await find();
  } catch (error) {
    const expected = [Failed, NotApplicable, Untestable, VipsecError].some((kind) => error instanceof kind);
    if (!expected) throw error;
    return undefined;
  } finally {
    target.tidy();
  }
}

/** The fewest features that the device takes; none beside the basic ones when it takes nothing of what is tried. */
async function findDemands(target: Target, patience: Patience): Promise<FeatureSet> {
  // What takes anything and then does not work cannot be asked.
  if (target.structures.isOctep) return OCTEP_REQUIRED.without(Feature.VERSION_1);
  const offered = target.offered();
  const basic = offered.and(FeatureSet.of(Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.ORDER_PLATFORM));
  for (const more of DEMANDS) {
    if (!more.minus(offered).isEmpty) break;
    if (await Driver.negotiate(target, patience, basic.or(more))) return more;
  }
  return FeatureSet.empty;
}

async function findReadings(bench: Bench, wire: WireRevision | 'auto'): Promise<Readings> {
  const admin = bench.console(await bench.bringUp(bench.target, { features: [Feature.ADMIN_VQ, Feature.IPSEC] }));
  await useCommands(admin);
  if (wire === 'auto') admin.revision = await findRevision(admin);
  await useCapabilities(admin, await offeredCapabilities(admin));
  return { revision: admin.revision, ...(await findOpcodes(admin)) };
}

/** The revisions differ in the length of a mode's entry, and the device says how many there are. */
async function findRevision(admin: AdminConsole): Promise<WireRevision> {
  const { result } = await admin.capabilityGet(CapabilityId.NET_IPSEC_SA);
  const isDraft = result.length > 0 && result[0] > 0 && result.length === ModeEntry.head + result[0] * ModeEntry.draft;
  return isDraft ? 'rfc-2025-01' : 'virtio-1.4';
}

/** A command 0xc on a group is a QUERY when it returns the group. */
async function findOpcodes(admin: AdminConsole): Promise<Pick<Profile, 'queryOpcode' | 'modifyOpcode'>> {
  const group = encodeGroup({ priority: PRIORITY });
  await admin.create(ResourceType.NET_FF_GROUP, 0, group);
  const opcode = AdminOpcode.RESOURCE_OBJ_QUERY;
  const reply = await admin.command(opcode, admin.objectData(opcode, ResourceType.NET_FF_GROUP, 0, group));
  return reply.status === AdminStatus.OK && isEqual(reply.result.subarray(0, group.length), group) ? TEXT : TABLE;
}

/** A frame to the device's own address comes back. */
async function findLoopback(bench: Bench): Promise<boolean> {
  const { driver, network } = await bench.network();
  const frame = udpFrame(network.outward);
  await network.send(frame);
  return await bench.patience.until(() => driver.holds(frame), bench.patience.timeout / 2);
}
