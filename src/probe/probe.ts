/**
 * The bring-up report of a device: everything that a virtio network function says about itself, without changing it.
 *
 * The function is reset, brought up far enough to read (features, configuration, administration commands and
 * capabilities; no capability is set, no object created, no packet queue enabled) and reset again. A step that fails is
 * noted in `problems`, and the steps that do not need it go on: the report is for people whose device does not work yet.
 */
import { VipsecError, VirtioError } from '../errors.ts';
import { algorithmNames, modeName, optionNamesOf } from '../ipsec/capability.ts';
import type { SaLimits } from '../ipsec/wire/codec.ts';
import { recogniseRevision } from '../ipsec/wire/recognise.ts';
import { ipsecWire } from '../ipsec/wire/revisions.ts';
import { platformFeatures } from '../nic/options.ts';
import { formatMac } from '../packet/addresses.ts';
import {
  ExtendedCapabilityId,
  type MsixCapability,
  CapabilityId as PciCapabilityId,
  type PciIdentity,
  readBars,
  readIdentity,
  readMsix,
  readPciExpress,
  readVirtioCapabilities,
  walkCapabilities,
  walkExtendedCapabilities,
} from '../vfio/config-space.ts';
import type { PciFunction } from '../vfio/function.ts';
import { AdminQueue } from '../virtio/admin.ts';
import { AdminOpcode, adminOpcodeName, CapabilityId, decodeDevicePartsCapability } from '../virtio/admin-wire.ts';
import { FEATURE_BITS, Feature, FeatureSet, featureName } from '../virtio/features.ts';
import { GENERIC_FEATURES, initializeDevice, resetDevice } from '../virtio/initialize.ts';
import { octepModel } from '../virtio/octep-layout.ts';
import { VirtioCfgType } from '../virtio/pci-layout.ts';
import type { WireRevision } from '../virtio/revision.ts';
import { openStandardTransport, virtioDeviceType } from '../virtio/standard.ts';
import type { VirtioTransport } from '../virtio/transport.ts';
import { type NetConfig, readNetConfig } from '../virtio-net/config.ts';
import {
  decodeActionCapability,
  decodeFlowFilterLimits,
  decodeSelectorCapability,
  FlowFilterAction,
  type FlowFilterLimits,
  SelectorFlag,
  SelectorType,
} from '../virtio-net/flow-filter-wire.ts';
import { type OctepReport, octepReport, walkOctep } from './octep.ts';
import type { PortReport } from './port.ts';

/** A step that failed. */
export interface Problem {
  readonly step: string;
  readonly code: string;
  readonly message: string;
  /** What can be done about it. */
  readonly hint?: string;
}

export interface PciReport extends PciIdentity {
  /** What the ids say: a virtio device type, or none. */
  readonly virtioDeviceType: number | null;
  readonly capabilities: readonly { offset: number; id: number; name: string }[];
  readonly bars: readonly { index: number; kind: string; prefetchable: boolean; size: number }[];
  readonly msix: MsixCapability | null;
  readonly functionLevelReset: boolean;
  readonly structures: readonly {
    name: string;
    type: number;
    bar: number;
    offset: number;
    length: number;
    notifyMultiplier?: number;
  }[];
}

export interface CapabilityReport {
  readonly id: number;
  readonly name: string;
  readonly bytes: number;
  /** Whether this driver does anything with it. */
  readonly used: boolean;
  /** DEV_PARTS: how many resource objects for getting and for setting device parts there may be. */
  readonly deviceParts?: { readonly get: number; readonly set: number };
}

export interface ModeReport {
  readonly name: string;
  readonly mode: number;
  readonly aeads: readonly string[];
  readonly ciphers: readonly string[];
  readonly macs: readonly string[];
  readonly options: readonly string[];
  readonly maxReplayWindow: number;
  readonly maxCipherKeyLength: number;
  readonly maxAuthKeyLength: number;
}

export interface ProbeReport {
  readonly device: string;
  readonly problems: Problem[];
  pci?: PciReport;
  /** Only for octeon_ep class functions, which configuration space does not call virtio. */
  octep?: OctepReport;
  /** All 128 bits that are offered or have a name. */
  features?: readonly { bit: number; name: string; offered: boolean }[];
  config?: Omit<NetConfig, 'mac'> & { mac?: string };
  queues?: readonly { index: number; name: string; maxSize: number }[];
  admin?: {
    queues: { first: number; count: number };
    commands: readonly { opcode: number; name: string }[];
    capabilities: readonly CapabilityReport[];
  };
  flowFilter?: {
    limits?: FlowFilterLimits;
    selectors?: readonly { name: string; partialMask: boolean; mask: string }[];
    actions?: readonly string[];
  };
  ipsec?: { revision: WireRevision; limits?: SaLimits; modes?: readonly ModeReport[] };
  /** A vhost-user port, which has no PCI function, administration queue or IPsec. */
  port?: PortReport;
}

/** Keeps the order of what is read and the names of what fails. */
class Steps {
  readonly #problems: Problem[];
  constructor(problems: Problem[]) {
    this.#problems = problems;
  }

  async run<T>(step: string, work: () => T | Promise<T>): Promise<T | undefined> {
    try {
      return await work();
    } catch (error) {
      const code = error instanceof VipsecError ? error.code : 'UNEXPECTED';
      const message = error instanceof Error ? error.message : String(error);
      const hint = error instanceof VipsecError ? error.hint : undefined;
      this.#problems.push({ step, code, message, ...(hint !== undefined && { hint }) });
      return undefined;
    }
  }
}

export interface ProbeOptions {
  /**
   * Milliseconds for a reset, for each answer of the administration queue, and for an octeon_ep class function to be ready. Default 5000.
   */
  readonly timeout?: number;
}

const DEFAULT_TIMEOUT = 5000;

/** Reads everything from `fn`, which stays open and is left reset. Only the loss of the function throws. */
export async function probeFunction(
  fn: PciFunction,
  revision: WireRevision | 'auto',
  { timeout = DEFAULT_TIMEOUT }: ProbeOptions = {},
): Promise<ProbeReport> {
  const report: ProbeReport = { device: fn.address, problems: [] };
  const steps = new Steps(report.problems);
  const assign = <K extends keyof ProbeReport>(key: K, value: ProbeReport[K] | undefined): void => {
    if (value !== undefined) Object.assign(report, { [key]: value });
  };
  assign('pci', await steps.run('PCI configuration space', () => readPci(fn)));
  const model = report.pci === undefined ? null : octepModel(report.pci);
  if (model !== null) report.octep = octepReport(model);
  const { octep: walk } = report;
  const transport =
    walk === undefined
      ? await steps.run('virtio structures', () => openStandardTransport(fn))
      : await steps.run('bring-up', () => walkOctep(fn, walk, timeout));
  if (transport === undefined) return report;
  const reset = await steps.run('reset', async () => {
    await resetDevice(transport, timeout);
    return true;
  });
  const offered = await steps.run('features', () => transport.readDeviceFeatures());
  if (offered === undefined) return report;
  assign('features', namedFeatures(offered));
  assign('config', await steps.run('device configuration', () => readConfig(transport, offered)));
  if (reset === undefined) return report;
  await steps.run('initialisation', () => bringUp(fn, transport, offered, revision, timeout, report, steps));
  await steps.run('reset', () => resetDevice(transport, timeout));
  return report;
}

function readPci(fn: PciFunction): PciReport {
  const identity = readIdentity(fn.config);
  const list = walkCapabilities(fn.config);
  const capabilities = [
    ...list.map(({ id, offset }) => ({ offset, id, name: nameIn(PciCapabilityId, id) })),
    ...walkExtendedCapabilities(fn.config).map(({ id, offset }) => ({
      offset,
      id,
      name: nameIn(ExtendedCapabilityId, id),
    })),
  ];
  const sizeOf = (index: number): number => fn.bar(index).size;
  return {
    ...identity,
    virtioDeviceType: virtioDeviceType(identity),
    capabilities,
    bars: readBars(fn.config, sizeOf).map(({ index, kind, prefetchable }) => ({
      index,
      kind,
      prefetchable,
      size: sizeOf(index),
    })),
    msix: readMsix(fn.config, list),
    functionLevelReset: readPciExpress(fn.config, list)?.functionLevelReset ?? false,
    structures: readVirtioCapabilities(fn.config, list).map(({ type, bar, offset, length, extra }) => ({
      name: nameIn(VirtioCfgType, type),
      type,
      bar,
      offset,
      length,
      ...(type === VirtioCfgType.NOTIFY && extra.length >= 4 ? { notifyMultiplier: word(extra) } : {}),
    })),
  };
}

function readConfig(transport: VirtioTransport, offered: FeatureSet): NonNullable<ProbeReport['config']> {
  const { mac, ...config } = readNetConfig(transport, offered);
  return { ...(mac !== undefined && { mac: formatMac(mac) }), ...config };
}

function namedFeatures(offered: FeatureSet): ProbeReport['features'] {
  const bits: { bit: number; name: string; offered: boolean }[] = [];
  for (let bit = 0; bit < FEATURE_BITS; bit++) {
    const name = featureName(bit);
    if (offered.has(bit) || name !== `bit ${bit}`) bits.push({ bit, name, offered: offered.has(bit) });
  }
  return bits;
}

/** Negotiates what reading needs, reads queue sizes, and asks the administration queue. */
async function bringUp(
  fn: PciFunction,
  transport: VirtioTransport,
  offered: FeatureSet,
  revision: WireRevision | 'auto',
  timeout: number,
  report: ProbeReport,
  steps: Steps,
): Promise<void> {
  let admin: AdminQueue | undefined;
  // Where the device must keep to an IOMMU it is given no memory unless it says that it does.
  const required = offered.and(FeatureSet.of(Feature.VERSION_1)).or(platformFeatures(fn));
  // IPSEC has the device show its capabilities; what else a driver would take does not matter for reading.
  const wanted = GENERIC_FEATURES.with(Feature.ADMIN_VQ, Feature.IPSEC, Feature.MAC, Feature.STATUS);
  const setup = async (features: FeatureSet): Promise<void> => {
    const controlQueue = offered.has(Feature.CTRL_VQ) ? 2 * (report.config?.maxQueuePairs ?? 1) : -1;
    report.queues = Array.from({ length: transport.queueCount() }, (_, index) => ({
      index,
      name: index === controlQueue ? 'controlq' : `${index % 2 === 0 ? 'receiveq' : 'transmitq'}${(index >> 1) + 1}`,
      maxSize: transport.maxQueueSize(index),
    }));
    const odd = offered.has(Feature.RING_PACKED)
      ? undefined
      : report.queues.find(({ maxSize }) => !isPowerOfTwo(maxSize));
    if (odd !== undefined) {
      await steps.run('queues', () => {
        throw new VirtioError('QUEUE_SIZE', `the size of ${odd.name} is ${odd.maxSize}, not a power of two (2.7)`);
      });
    }
    if (!features.has(Feature.ADMIN_VQ)) return;
    admin = await steps.run('administration queue', () => new AdminQueue(transport, fn, features, { timeout }));
  };
  try {
    await initializeDevice(transport, { required, wanted, setup, resetTimeout: timeout });
    if (admin === undefined) return;
    const queue = admin;
    const asked = await steps.run('administration commands', () => askCommands(transport, queue));
    if (asked === undefined) return;
    report.admin = asked;
    if (!asked.commands.some(({ opcode }) => opcode === AdminOpcode.CAP_ID_LIST_QUERY)) return;
    await readCapabilities(queue, report, revision, steps);
  } finally {
    if (admin !== undefined) {
      await resetDevice(transport, timeout).catch(() => {});
      admin.close();
    }
  }
}

/** Lists the commands and takes the two that read capabilities into use; nothing else is sent. */
async function askCommands(transport: VirtioTransport, admin: AdminQueue): Promise<NonNullable<ProbeReport['admin']>> {
  const opcodes = await admin.listQuery();
  const reading: readonly number[] = [
    AdminOpcode.LIST_QUERY,
    AdminOpcode.LIST_USE,
    AdminOpcode.CAP_ID_LIST_QUERY,
    AdminOpcode.DEVICE_CAP_GET,
  ];
  await admin.listUse(opcodes.filter((opcode) => reading.includes(opcode)));
  return {
    queues: transport.adminQueues(),
    commands: opcodes.map((opcode) => ({ opcode, name: adminOpcodeName(opcode) })),
    capabilities: [],
  };
}

async function readCapabilities(
  admin: AdminQueue,
  report: ProbeReport,
  revision: WireRevision | 'auto',
  steps: Steps,
): Promise<void> {
  const ids = await steps.run('capability list', () => admin.capabilityIds());
  const bytes = new Map<number, Uint8Array>();
  for (const id of ids ?? []) {
    const name = nameIn(CapabilityId, id);
    const value = await steps.run(`capability ${name}`, () => admin.deviceCapability(id));
    if (value !== undefined) bytes.set(id, value);
  }
  if (report.admin !== undefined) {
    report.admin.capabilities = [...bytes].map(([id, value]) => describeCapability(id, value));
  }
  const decode = <T>(id: number, work: (value: Uint8Array) => T): Promise<T | undefined> => {
    const value = bytes.get(id);
    return value === undefined ? Promise.resolve(undefined) : steps.run(nameIn(CapabilityId, id), () => work(value));
  };
  await readFlowFilter(report, decode);
  await readIpsec(report, revision, bytes.get(CapabilityId.NET_IPSEC_SA), decode);
}

/** What is known of one capability, also of one that this driver has no use for. */
export function describeCapability(id: number, value: Uint8Array): CapabilityReport {
  const name = nameIn(CapabilityId, id);
  const known = { id, name, bytes: value.length };
  if (id === CapabilityId.DEV_PARTS) return { ...known, used: false, deviceParts: decodeDevicePartsCapability(value) };
  return { ...known, used: Object.values<number>(CapabilityId).includes(id) };
}

type Decode = <T>(id: number, work: (value: Uint8Array) => T) => Promise<T | undefined>;

async function readFlowFilter(report: ProbeReport, decode: Decode): Promise<void> {
  const limits = await decode(CapabilityId.NET_FF_RESOURCE, decodeFlowFilterLimits);
  const selectors = await decode(CapabilityId.NET_FF_SELECTOR, decodeSelectorCapability);
  const actions = await decode(CapabilityId.NET_FF_ACTION, decodeActionCapability);
  if (limits === undefined && selectors === undefined && actions === undefined) return;
  report.flowFilter = {
    ...(limits && { limits }),
    ...(selectors && {
      selectors: selectors.map(({ type, flags, mask }) => ({
        name: nameIn(SelectorType, type),
        partialMask: (flags & SelectorFlag.partialMask) !== 0,
        mask: Buffer.from(mask).toString('hex'),
      })),
    }),
    ...(actions && { actions: actions.map((action) => nameIn(FlowFilterAction, action)) }),
  };
}

async function readIpsec(
  report: ProbeReport,
  revision: WireRevision | 'auto',
  modes: Uint8Array | undefined,
  decode: Decode,
): Promise<void> {
  const spoken = revision === 'auto' ? ((modes && recogniseRevision(modes)) ?? 'virtio-1.4') : revision;
  const wire = ipsecWire(spoken);
  const limits = await decode(CapabilityId.NET_IPSEC_RESOURCE, (value) => wire.decodeSaLimits(value));
  const entries = await decode(CapabilityId.NET_IPSEC_SA, (value) => wire.decodeModes(value));
  if (limits === undefined && entries === undefined) return;
  report.ipsec = {
    revision: spoken,
    ...(limits && { limits }),
    ...(entries && {
      modes: entries.map((entry) => ({
        name: modeName(entry.mode),
        mode: entry.mode,
        ...algorithmNames(entry),
        options: optionNamesOf(entry.options),
        maxReplayWindow: entry.maxReplayWindow,
        maxCipherKeyLength: entry.maxCipherKeyLength,
        maxAuthKeyLength: entry.maxAuthKeyLength,
      })),
    }),
  };
}

function isPowerOfTwo(value: number): boolean {
  return value > 0 && (value & (value - 1)) === 0;
}

/** The key of `value` in a table of numbers. */
function nameIn(table: Readonly<Record<string, number>>, value: number): string {
  return Object.keys(table).find((name) => table[name] === value) ?? `0x${value.toString(16)}`;
}

function word(bytes: Uint8Array): number {
  return (bytes[0] | (bytes[1] << 8) | (bytes[2] << 16) | (bytes[3] << 24)) >>> 0;
}
