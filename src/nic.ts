/**
 * An open NIC: a virtio network function with its queues, its packets and its SAs, ready for bursts.
 *
 * ```ts
 * await using nic = await openNic('vfio-user:/run/nic.sock');
 * const out = await nic.ipsec.addSa({ … });
 * const [q] = nic.queues;
 * const n = q.rx.burst(packets, 64);
 * ```
 *
 * The control path is promises, the data path is bursts of packet numbers and never throws: when the device breaks its rules or is lost,
 * bursts give 0, whatever is pending rejects, and `broken` says why. Left out: packed rings, GSO, the control queue but for the
 * number of queue pairs.
 */
import { AdminCommandError, VfioError, VipsecError, VirtioError } from './errors.ts';
import { SoftwareIpsec } from './fallback/software.ts';
import { VERDICTS } from './fallback/verdict.ts';
import { InboundRules } from './ipsec/inbound-rules.ts';
import { InlineIpsec, type MutableSaTable } from './ipsec/inline.ts';
import type { Ipsec } from './ipsec/ipsec.ts';
import { IpsecManager } from './ipsec/manager.ts';
import { NonceGuard } from './ipsec/nonce-guard.ts';
import { namedCounters } from './ipsec/sa-state.ts';
import { ipsecWire } from './ipsec/wire/revisions.ts';
import { featuresFor, type NicOptions, openFunction, type ResolvedOptions, resolveOptions } from './nic-options.ts';
import { NicRxQueue, NicTxQueue } from './nic-queues.ts';
import { NicRings } from './nic-rings.ts';
import type { PacketPool } from './packet/pool.ts';
import type { PciFunction } from './vfio/function.ts';
import { AdminQueue } from './virtio/admin.ts';
import { AdminOpcode, adminOpcodeName } from './virtio/admin-wire.ts';
import { Feature, type FeatureSet } from './virtio/features.ts';
import { initializeDevice, resetDevice } from './virtio/initialize.ts';
import { findObjectOpcodes } from './virtio/objects.ts';
import { openStandardTransport } from './virtio/standard.ts';
import type { VirtioTransport } from './virtio/transport.ts';
import { type NetConfig, readNetConfig } from './virtio-net/config.ts';
import { FlowFilter, type FlowGroupHandle } from './virtio-net/flow-filter.ts';
import { encodeGroup, FlowFilterObject } from './virtio-net/flow-filter-wire.ts';
import { RxCounter } from './virtio-net/rx.ts';
import { TxCounter } from './virtio-net/tx.ts';

/** Virtio device type of a network device (5). */
const NETWORK_DEVICE = 1;

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

/** A receive and a transmit queue. */
export interface NicQueue {
  readonly rx: NicRxQueue;
  readonly tx: NicTxQueue;
}

export interface NicLink {
  readonly up: boolean;
  /** Mbit/s; null when the device does not say. */
  readonly speed: number | null;
  readonly duplex: 'half' | 'full' | null;
}

/** Sums over all queues since the NIC was opened. */
export interface NicStatistics {
  readonly rx: {
    readonly packets: number;
    readonly bytes: number;
    /** Dropped because the device wrote something impossible. */
    readonly invalid: number;
    /** Not processed, or failed, in the device's IPsec; delivered unless software dropped them. */
    readonly securityError: number;
    /** Marked as secured by an SA that does not exist; delivered as not secured. */
    readonly unknownSa: number;
    /** Refills that found too few free packets. */
    readonly poolExhausted: number;
    /** Dropped by software IPsec, or by an SA's selector; by reason. */
    readonly dropped: Readonly<Record<string, number>>;
  };
  readonly tx: {
    readonly packets: number;
    readonly bytes: number;
    /** Dropped because they were not packets that can be sent. */
    readonly invalid: number;
    /** Times that a burst was not taken as a whole. */
    readonly ringFull: number;
    /** Dropped because the SA that was asked for does not exist or could not carry them; by reason. */
    readonly dropped: Readonly<Record<string, number>>;
  };
}

/**
 * Opens the network function at `address`: `0000:01:00.0` (kernel VFIO) or `vfio-user:/path`. Throws InputError `NIC_OPTION`,
 * `DEVICE_ADDRESS`; VfioError; VirtioError, such as `FEATURES_MISSING`; AdminCommandError. Nothing stays open then.
 */
export async function openNic(address: string, options: NicOptions = {}): Promise<Nic> {
  const resolved = resolveOptions(options);
  const guard = new NonceGuard(resolved.nonceFile === undefined ? {} : { path: resolved.nonceFile });
  let fn: PciFunction;
  try {
    fn = openFunction(address);
  } catch (error) {
    guard.close();
    throw error;
  }
  return openNicOn(fn, guard, resolved);
}

/** The steps of `openNic` once the PCI function is there. Takes over `fn` and `guard`. */
async function openNicOn(fn: PciFunction, guard: NonceGuard, options: ResolvedOptions): Promise<Nic> {
  const table: MutableSaTable = { resourceId: new Uint32Array(0), handle: new Uint32Array(0) };
  let rings: NicRings | null = null;
  let admin: AdminQueue | null = null;
  let transport: VirtioTransport | null = null;
  try {
    const found = openStandardTransport(fn);
    transport = found;
    if (found.deviceType !== NETWORK_DEVICE) {
      throw new VirtioError(
        'NOT_A_NIC',
        `${fn.address} is a virtio device of type ${found.deviceType}, not a network device`,
      );
    }
    let config: NetConfig | null = null;
    const features = await initializeDevice(found, {
      ...featuresFor(options),
      resetTimeout: options.resetTimeout,
      setup: (negotiated) => {
        config = readNetConfig(found, negotiated);
        rings = new NicRings(fn, found, negotiated, config, table, options);
        if (negotiated.hasAll(Feature.ADMIN_VQ, Feature.IPSEC)) {
          const { wire: revision, commandTimeout: timeout } = options;
          admin = new AdminQueue(found, fn, negotiated, { revision, timeout });
        }
      },
    });
    const parts = { fn, transport: found, features, rings: present<NicRings>(rings), admin, table, options, guard };
    const nic = new Nic(parts, present<NetConfig>(config));
    await nic.start();
    return nic;
  } catch (error) {
    guard.close();
    await release(fn, transport, rings, admin, options.resetTimeout);
    throw error;
  }
}

/** `initializeDevice` has called `setup`, which TypeScript cannot see. */
function present<T>(value: T | null): T {
  if (value === null) throw new VirtioError('SETUP', 'the device was not set up');
  return value;
}

/** Resets the device if it still answers, and gives everything back that it had. Never throws. */
async function release(
  fn: PciFunction,
  transport: VirtioTransport | null,
  rings: NicRings | null,
  admin: AdminQueue | null,
  resetTimeout: number,
): Promise<void> {
  if (transport !== null && !fn.gone) {
    // A device that does not finish its reset loses its DMA mappings below.
    await resetDevice(transport, resetTimeout).catch(() => {});
  }
  admin?.close();
  rings?.close();
  fn.close();
}

interface NicParts {
  readonly fn: PciFunction;
  readonly transport: VirtioTransport;
  readonly features: FeatureSet;
  readonly rings: NicRings;
  readonly admin: AdminQueue | null;
  readonly table: MutableSaTable;
  readonly options: ResolvedOptions;
  readonly guard: NonceGuard;
}

export class Nic implements AsyncDisposable {
  /** The device address as it was given. */
  readonly address: string;
  /** What was negotiated. */
  readonly features: FeatureSet;
  /** All packets of the NIC: those in the rings and those that the application holds. */
  readonly packets: PacketPool;
  readonly mac: Uint8Array;
  /** Bytes of the longest IP packet. */
  readonly mtu: number;
  readonly #parts: NicParts;
  #queues: readonly NicQueue[] = [];
  #ipsec: IpsecManager | null = null;
  #flowFilter: FlowFilter | null = null;
  #broken: VipsecError | null = null;
  #closing: Promise<void> | null = null;
  readonly #listeners = new Set<(error: VipsecError) => void>();

  /** Not to be called: use `openNic`. */
  constructor(parts: NicParts, config: NetConfig) {
    this.#parts = parts;
    this.address = parts.fn.address;
    this.features = parts.features;
    this.packets = parts.rings.pool;
    this.mac = config.mac ?? randomMac();
    this.mtu = parts.rings.mtu;
  }

  /** What follows DRIVER_OK: administration commands, and the first notifications. */
  async start(): Promise<void> {
    const { fn, rings, options, guard } = this.#parts;
    rings.onLost = (error) => this.#lost(error);
    fn.onGone?.((error) => this.#lost(error));
    const { inline, obstacle } = await this.#openInline();
    const software = options.ipsec === 'auto' || options.ipsec === 'software';
    this.#ipsec = new IpsecManager({
      inline,
      inlineObstacle: obstacle,
      software: software ? (onEvent) => new SoftwareIpsec(this.packets, { engine: options.engine, onEvent }) : null,
      guard,
      mtu: this.mtu,
      handles: 2 * options.maxSas,
      ...(options.ipsec === 'inline' ? { require: 'inline' as const } : {}),
    });
    const manager = this.#ipsec;
    this.#queues = rings.pairs.map(({ rx, tx }, i) => ({
      rx: new NicRxQueue(i, rx, this.packets, manager),
      tx: new NicTxQueue(tx, this.packets, manager),
    }));
    await rings.setQueuePairs(options.queuePairs);
    rings.start();
    if (this.#broken !== null) throw this.#broken;
  }

  /** In `auto` mode a device whose IPsec cannot be used is a device without. A device that is lost is lost. */
  async #openInline(): Promise<{ inline: InlineIpsec | null; obstacle: string | null }> {
    const { admin, options, features } = this.#parts;
    if (options.ipsec === 'software' || options.ipsec === 'off')
      return { inline: null, obstacle: 'inline IPsec is not wanted' };
    if (!features.has(Feature.IPSEC)) {
      return { inline: null, obstacle: 'the device does not offer VIRTIO_NET_F_IPSEC' };
    }
    if (admin === null) return { inline: null, obstacle: 'the device does not offer VIRTIO_F_ADMIN_VQ' };
    try {
      const inline = await this.#useCapabilities(admin);
      if (inline !== null) return { inline, obstacle: null };
      throw new VirtioError('CAPABILITY_MISSING', 'the device has no usable IPsec capabilities');
    } catch (error) {
      const gone = error instanceof VfioError || this.#parts.fn.gone;
      if (options.ipsec === 'inline' || gone || !(error instanceof VipsecError)) throw error;
      return { inline: null, obstacle: `${error.message} [${error.code}]` };
    }
  }

  /** In the order of the standard: LIST_QUERY, LIST_USE, CAP_ID_LIST_QUERY, then each capability. */
  async #useCapabilities(admin: AdminQueue): Promise<InlineIpsec | null> {
    const { options, table, rings } = this.#parts;
    const offered = await admin.listQuery();
    const missing = OBJECT_COMMANDS.filter((opcode) => !offered.includes(opcode));
    if (missing.length > 0) {
      const names = missing.map((opcode) => adminOpcodeName(opcode)).join(', ');
      throw new VirtioError('ADMIN_COMMANDS_MISSING', `the device does not offer ${names}`);
    }
    await admin.listUse([AdminOpcode.LIST_QUERY, AdminOpcode.LIST_USE, ...OBJECT_COMMANDS]);
    const ids = await admin.capabilityIds();
    this.#flowFilter = await FlowFilter.open(admin, ids);
    if (this.#flowFilter !== null) await learnObjectOpcodes(admin, this.#flowFilter);
    return InlineIpsec.open(admin, ids, {
      wire: ipsecWire(options.wire, { tunnelTypeBase: options.tunnelTypeBase }),
      rules: this.#flowFilter === null ? null : new InboundRules(this.#flowFilter),
      table,
      handles: 2 * options.maxSas,
      maxSas: options.maxSas,
      quiesceTransmit: () => rings.quiesceTransmit(),
      receiveQueues: rings.pairs.length,
    });
  }

  /** Queue pairs. */
  get queues(): readonly NicQueue[] {
    return this.#queues;
  }

  get ipsec(): Ipsec {
    if (this.#ipsec === null) throw new VirtioError('SETUP', 'the NIC has not been started');
    return this.#ipsec;
  }

  /** Null when the device has none, or when inline IPsec is not wanted: they come with the same queue. */
  get flowFilter(): FlowFilter | null {
    return this.#flowFilter;
  }

  /** Why the NIC carries nothing any more, or null. */
  get broken(): VipsecError | null {
    if (this.#broken === null) {
      for (const { rx, tx } of this.#parts.rings.pairs) {
        const error = rx.broken ?? tx.broken;
        if (error !== null) this.#lost(error);
      }
    }
    return this.#broken;
  }

  /** Calls `listener` once, with the reason, when the NIC breaks; soon if it already has. Returns how to stop. */
  onBroken(listener: (error: VipsecError) => void): () => void {
    const { broken } = this;
    if (broken !== null) queueMicrotask(() => listener(broken));
    else this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** The link as the device sees it now. Throws VfioError `DEVICE_GONE`. */
  get link(): NicLink {
    const { linkUp, speed = null, duplex = null } = readNetConfig(this.#parts.transport, this.features);
    return { up: linkUp, speed, duplex };
  }

  statistics(): NicStatistics {
    const sum = (counters: readonly Float64Array[], index: number) =>
      counters.reduce((all, one) => all + one[index], 0);
    const rx = this.#queues.map((queue) => queue.rx.counters);
    const tx = this.#queues.map((queue) => queue.tx.counters);
    const dropped = (of: readonly { dropped: Float64Array }[]) => {
      const all = new Float64Array(VERDICTS);
      for (const one of of)
        one.dropped.forEach((count, i) => {
          all[i] += count;
        });
      return namedCounters(all);
    };
    const txDropped = dropped(this.#queues.map((queue) => queue.tx));
    const noSa = sum(tx, TxCounter.droppedSa) + (txDropped['no-sa'] ?? 0);
    return {
      rx: {
        packets: sum(rx, RxCounter.packets),
        bytes: sum(rx, RxCounter.bytes),
        invalid: sum(rx, RxCounter.droppedInvalid),
        securityError: sum(rx, RxCounter.securityError),
        unknownSa: sum(rx, RxCounter.unknownSa),
        poolExhausted: sum(rx, RxCounter.poolExhausted),
        dropped: dropped(this.#queues.map((queue) => queue.rx)),
      },
      tx: {
        packets: sum(tx, TxCounter.packets),
        bytes: sum(tx, TxCounter.bytes),
        invalid: sum(tx, TxCounter.droppedInvalid),
        ringFull: sum(tx, TxCounter.ringFull),
        dropped: noSa === 0 ? txDropped : { ...txDropped, 'no-sa': noSa },
      },
    };
  }

  /**
   * Resets the device, which destroys its SAs; wipes keys and packets, unmaps and frees all memory. Packets that the
   * application holds are gone. Idempotent; never throws.
   */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(): Promise<void> {
    const { fn, transport, rings, admin, options, guard } = this.#parts;
    const reason = this.#broken ?? new VirtioError('NIC_CLOSED', `${this.address} was closed`);
    this.#broken = reason;
    rings.fail(reason);
    await release(fn, transport, rings, admin, options.resetTimeout);
    // The SAs end last: their nonces were in use until the device was reset.
    if (this.#ipsec === null) guard.close();
    else this.#ipsec.close(reason);
  }

  /** The data path stops at once; the rest follows when whoever is in the middle of something has finished. */
  #lost(error: VipsecError): void {
    if (this.#broken !== null) return;
    this.#broken = error;
    this.#parts.rings.fail(error);
    queueMicrotask(() => {
      // An administration queue may outlive a packet queue that the device broke; not the device itself.
      if (this.#parts.fn.gone && this.#closing === null) this.#parts.admin?.close(error);
      this.#ipsec?.close(error);
      for (const listener of this.#listeners) listener(error);
      this.#listeners.clear();
    });
  }
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

/** A device without an address leaves it to the driver (5.1.4.2): random, locally administered, unicast. */
function randomMac(): Uint8Array {
  const mac = crypto.getRandomValues(new Uint8Array(6));
  mac[0] = (mac[0] & 0xfc) | 0x02;
  return mac;
}
