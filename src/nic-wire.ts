/**
 * Finding out which wire revision a device speaks, before it is brought up: `wire: 'auto'`.
 *
 * The packet header depends on the revision, and rings are made before the device answers the administration commands that tell. So the
 * device is started once with nothing but its administration queue, asked for its IPsec capability, and reset.
 */
import { VfioError, VipsecError } from './errors.ts';
import { IpsecCapability } from './ipsec/wire/numbers.ts';
import { recogniseRevision } from './ipsec/wire/recognise.ts';
import { genericFeatures, platformFeatures, type ResolvedOptions } from './nic-options.ts';
import type { DeviceFunction } from './vfio/function.ts';
import { AdminQueue } from './virtio/admin.ts';
import { AdminOpcode } from './virtio/admin-wire.ts';
import { Feature, FeatureSet } from './virtio/features.ts';
import { initializeDevice, resetDevice } from './virtio/initialize.ts';
import type { WireRevision } from './virtio/revision.ts';
import type { VirtioTransport } from './virtio/transport.ts';

/** Options of which the revision is known. */
export type OpenOptions = ResolvedOptions & { readonly wire: WireRevision };

/** What a device speaks that does not say: without IPsec the revisions are the same. */
const DEFAULT_REVISION: WireRevision = 'virtio-1.4';

const READING: readonly number[] = [
  AdminOpcode.LIST_QUERY,
  AdminOpcode.LIST_USE,
  AdminOpcode.CAP_ID_LIST_QUERY,
  AdminOpcode.DEVICE_CAP_GET,
];

/** `options` with the revision that the device speaks. Throws VfioError; whatever else is wrong shows when the device is brought up. */
export async function withRevision(
  fn: DeviceFunction,
  transport: VirtioTransport,
  options: ResolvedOptions,
): Promise<OpenOptions> {
  if (options.wire !== 'auto') return { ...options, wire: options.wire };
  const inlineWanted = options.ipsec === 'auto' || options.ipsec === 'inline';
  const revision = inlineWanted ? await askDevice(fn, transport, options) : null;
  return { ...options, wire: revision ?? DEFAULT_REVISION };
}

async function askDevice(
  fn: DeviceFunction,
  transport: VirtioTransport,
  options: ResolvedOptions,
): Promise<WireRevision | null> {
  const made: AdminQueue[] = [];
  const required = platformFeatures(fn);
  const wanted = genericFeatures(options).or(FeatureSet.of(Feature.ADMIN_VQ, Feature.IPSEC));
  const setup = (features: FeatureSet): void => {
    if (!features.hasAll(Feature.ADMIN_VQ, Feature.IPSEC)) return;
    made.push(new AdminQueue(transport, fn, features, { timeout: options.commandTimeout }));
  };
  try {
    await initializeDevice(transport, { required, wanted, resetTimeout: options.resetTimeout, setup });
    return made.length === 0 ? null : await readRevision(made[0]);
  } catch (error) {
    if (error instanceof VfioError || fn.gone || !(error instanceof VipsecError)) throw error;
    return null;
  } finally {
    // The queue's memory may go only when the device does not use it any more.
    if (!fn.gone) await resetDevice(transport, options.resetTimeout).catch(() => {});
    for (const admin of made) admin.close();
  }
}

async function readRevision(admin: AdminQueue): Promise<WireRevision | null> {
  const offered = await admin.listQuery();
  if (!READING.every((opcode) => offered.includes(opcode))) return null;
  await admin.listUse(READING);
  const ids = await admin.capabilityIds();
  if (!ids.includes(IpsecCapability.sa)) return null;
  return recogniseRevision(await admin.deviceCapability(IpsecCapability.sa));
}
