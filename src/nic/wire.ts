/**
 * Finding out which wire revision a device speaks, before it is brought up: `wire: 'auto'`.
 *
 * The packet header depends on the revision, and rings are made before the device answers the administration commands that tell. So the
 * device is started once with nothing but its administration queue, asked for its IPsec capability, and reset.
 */
import { VfioError, VipsecError } from '../errors.ts';
import { IpsecCapability } from '../ipsec/wire/numbers.ts';
import { recogniseRevision } from '../ipsec/wire/recognise.ts';
import type { DeviceFunction } from '../vfio/function.ts';
import { AdminQueue } from '../virtio/admin.ts';
import { AdminOpcode } from '../virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../virtio/features.ts';
import { initializeDevice, resetDevice } from '../virtio/initialize.ts';
import type { WireRevision } from '../virtio/revision.ts';
import type { VirtioTransport } from '../virtio/transport.ts';
import { genericFeatures, platformFeatures, type ResolvedOptions } from './options.ts';

/** Options of which the revision is known. */
export type OpenOptions = ResolvedOptions & {
  readonly wire: WireRevision;
  /** Why inline IPsec cannot be had, when the device has it and does not say which revision it speaks; else null. */
  readonly unknownRevision: string | null;
};

/** What a device speaks that does not say: without IPsec the revisions are the same. */
const DEFAULT_REVISION: WireRevision = 'virtio-1.4';

const READING: readonly number[] = [
  AdminOpcode.LIST_QUERY,
  AdminOpcode.LIST_USE,
  AdminOpcode.CAP_ID_LIST_QUERY,
  AdminOpcode.DEVICE_CAP_GET,
];

/** What was found out: the revision, or why not; neither when the device has no inline IPsec. */
interface Answer {
  readonly revision: WireRevision | null;
  readonly obstacle: string | null;
}

const NO_IPSEC: Answer = { revision: null, obstacle: null };

/**
 * `options` with the revision that the device speaks. The packet header with IPSEC depends on it, so of a device that does not tell IPSEC is not
 * taken, unless it must be. Throws VfioError; whatever else is wrong shows when the device is brought up.
 */
export async function withRevision(
  fn: DeviceFunction,
  transport: VirtioTransport,
  options: ResolvedOptions,
): Promise<OpenOptions> {
  if (options.wire !== 'auto') return { ...options, wire: options.wire, unknownRevision: null };
  const inlineWanted = options.ipsec === 'auto' || options.ipsec === 'inline';
  const { revision, obstacle } = inlineWanted ? await askDevice(fn, transport, options) : NO_IPSEC;
  const known = { ...options, wire: revision ?? DEFAULT_REVISION, unknownRevision: null };
  if (obstacle === null || options.ipsec !== 'auto') return known;
  return { ...known, ipsec: 'software', unknownRevision: obstacle };
}

async function askDevice(fn: DeviceFunction, transport: VirtioTransport, options: ResolvedOptions): Promise<Answer> {
  const made: AdminQueue[] = [];
  const required = platformFeatures(fn);
  const wanted = genericFeatures(options).or(FeatureSet.of(Feature.ADMIN_VQ, Feature.IPSEC));
  const setup = (features: FeatureSet): void => {
    if (!features.hasAll(Feature.ADMIN_VQ, Feature.IPSEC)) return;
    made.push(new AdminQueue(transport, fn, features, { timeout: options.commandTimeout }));
  };
  try {
    await initializeDevice(transport, { required, wanted, resetTimeout: options.resetTimeout, setup });
    return made.length === 0 ? NO_IPSEC : await readRevision(made[0]);
  } catch (error) {
    if (error instanceof VfioError || fn.gone || !(error instanceof VipsecError)) throw error;
    return { revision: null, obstacle: `${error.message} [${error.code}]` };
  } finally {
    // The queue's memory may go only when the device does not use it any more.
    if (!fn.gone) await resetDevice(transport, options.resetTimeout).catch(() => {});
    for (const admin of made) admin.close();
  }
}

async function readRevision(admin: AdminQueue): Promise<Answer> {
  const unknown = (obstacle: string): Answer => ({ revision: null, obstacle });
  const offered = await admin.listQuery();
  if (!READING.every((opcode) => offered.includes(opcode))) {
    return unknown('the device does not offer the commands that read capabilities');
  }
  await admin.listUse(READING);
  const ids = await admin.capabilityIds();
  if (!ids.includes(IpsecCapability.sa)) return unknown('the device has no VIRTIO_NET_IPSEC_SA_CAP');
  const revision = recogniseRevision(await admin.deviceCapability(IpsecCapability.sa));
  return revision === null
    ? unknown('the device does not tell which wire revision it speaks')
    : { revision, obstacle: null };
}
