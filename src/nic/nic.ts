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
 * bursts give 0, whatever is pending rejects, and `broken` says why.
 */
import { VfioError, VipsecError, VirtioError } from '../errors.ts';
import { SoftwareIpsec } from '../fallback/software.ts';
import type { MutableSaTable } from '../ipsec/inline.ts';
import type { Ipsec } from '../ipsec/ipsec.ts';
import { IpsecManager } from '../ipsec/manager.ts';
import { NonceGuard } from '../ipsec/nonce-guard.ts';
import type { PacketPool } from '../packet/pool.ts';
import type { PacketArena } from '../packet/references.ts';
import type { DeviceFunction } from '../vfio/function.ts';
import { AdminQueue } from '../virtio/admin.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { initializeDevice } from '../virtio/initialize.ts';
import { DeviceStatus } from '../virtio/pci-layout.ts';
import type { VirtioTransport } from '../virtio/transport.ts';
import { type NetConfig, readNetConfig } from '../virtio-net/config.ts';
import type { FlowFilter } from '../virtio-net/flow-filter.ts';
import type { NetControl } from '../virtio-net/net-control.ts';
import type { WorkerQueue } from '../worker/worker-queue.ts';
import { WorkerQueues } from '../worker/worker-queues.ts';
import { Announcements, type Announcer } from './announce.ts';
import { NicArenas } from './arenas.ts';
import { type NicDevice, openDevice } from './device.ts';
import { openInline } from './inline.ts';
import { featuresFor, type NicOptions, type ResolvedOptions, resolveOptions } from './options.ts';
import { release } from './release.ts';
import { NicRings } from './rings.ts';
import { NicRxQueue } from './rx-queue.ts';
import { type NicQueue, type NicStatistics, poolStatistics, sumStatistics } from './statistics.ts';
import { NicTxQueue } from './tx-queue.ts';
import { type OpenOptions, withRevision } from './wire.ts';

/** Virtio device type of a network device (5). */
const NETWORK_DEVICE = 1;
/** How often the link is looked at when the device does not tell of changes. */
const LINK_INTERVAL_MS = 1000;
/** How long closing waits for worker threads. One that has not let go by then harms nobody: what it has mapped stays its own. */
const WORKER_PATIENCE_MS = 2000;

export interface NicLink {
  readonly up: boolean;
  /** Mbit/s; null when the device does not say. */
  readonly speed: number | null;
  readonly duplex: 'half' | 'full' | null;
}

/**
 * Opens the network device at `address`: `0000:01:00.0` (kernel VFIO), `vfio-user:/path` or `vhost-user:/path`. Throws InputError `NIC_OPTION`,
 * `DEVICE_ADDRESS`; VfioError; VirtioError, such as `FEATURES_MISSING`; AdminCommandError. Nothing stays open then.
 */
export async function openNic(address: string, options: NicOptions = {}): Promise<Nic> {
  const resolved = resolveOptions(options);
  const guard = new NonceGuard(resolved.nonceFile === undefined ? {} : { path: resolved.nonceFile });
  const { connectTimeout } = resolved;
  let device: NicDevice;
  try {
    device = await openDevice(address, connectTimeout === undefined ? {} : { connectTimeoutMs: connectTimeout });
  } catch (error) {
    guard.close();
    throw error;
  }
  return openNicOn(device, guard, resolved);
}

/** The steps of `openNic` once the device is there. Takes over `device` and `guard`. */
async function openNicOn(device: NicDevice, guard: NonceGuard, given: ResolvedOptions): Promise<Nic> {
  const { fn } = device;
  const table: MutableSaTable = { resourceId: new Uint32Array(0), handle: new Uint32Array(0) };
  let rings: NicRings | null = null;
  let admin: AdminQueue | null = null;
  let transport: VirtioTransport | null = null;
  try {
    const found = device.openTransport();
    transport = found;
    if (found.deviceType !== NETWORK_DEVICE) {
      throw new VirtioError(
        'NOT_A_NIC',
        `${fn.address} is a virtio device of type ${found.deviceType}, not a network device`,
      );
    }
    const options = await withRevision(fn, found, given);
    let config: NetConfig | null = null;
    const features = await initializeDevice(found, {
      ...featuresFor(options, fn, found.requiredFeatures),
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
    await release(fn, transport, rings, admin, given.resetTimeout);
    throw error;
  }
}

/** `initializeDevice` has called `setup`, which TypeScript cannot see. */
function present<T>(value: T | null): T {
  if (value === null) throw new VirtioError('SETUP', 'the device was not set up');
  return value;
}

interface NicParts {
  readonly fn: DeviceFunction;
  readonly transport: VirtioTransport;
  readonly features: FeatureSet;
  readonly rings: NicRings;
  readonly admin: AdminQueue | null;
  readonly table: MutableSaTable;
  readonly options: OpenOptions;
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
  readonly #arenas: NicArenas;
  #queues: readonly NicQueue[] = [];
  #workers: WorkerQueues | null = null;
  #ipsec: IpsecManager | null = null;
  #flowFilter: FlowFilter | null = null;
  #broken: VipsecError | null = null;
  #closing: Promise<void> | null = null;
  readonly #listeners = new Set<(error: VipsecError) => void>();
  readonly #linkListeners = new Set<(link: NicLink) => void>();
  readonly #announcements: Announcements;
  #lastLink: NicLink | null = null;
  #linkTimer: NodeJS.Timeout | null = null;

  /** Not to be called: use `openNic`. */
  constructor(parts: NicParts, config: NetConfig) {
    this.#parts = parts;
    this.address = parts.fn.address;
    this.features = parts.features;
    this.packets = parts.rings.pool;
    this.#arenas = new NicArenas(parts.fn, this.packets);
    this.mac = config.mac ?? parts.options.mac?.slice() ?? randomMac();
    this.mtu = parts.rings.mtu;
    this.#announcements = new Announcements(
      () => readNetConfig(parts.transport, parts.features).announce,
      async () => parts.rings.control?.acknowledgeAnnounce(),
    );
  }

  /** What follows DRIVER_OK: administration commands, and the first notifications. */
  async start(): Promise<void> {
    const { fn, rings, options, guard } = this.#parts;
    rings.onLost = (error) => this.#lost(error);
    fn.onGone?.((error) => this.#lost(error));
    const { inline, obstacle, flowFilter } = await openInline(this.#parts);
    this.#flowFilter = flowFilter;
    const software = options.ipsec === 'auto' || options.ipsec === 'software';
    const handles = 2 * options.maxSas;
    if (rings.workerPairs.length > 0) {
      this.#workers = new WorkerQueues({
        rings,
        arenas: this.#arenas,
        address: this.address,
        mac: this.mac,
        handles,
        inboundLimit: inline?.capability.limits.inbound ?? 0,
        engine: software ? options.engine : null,
        commandTimeout: options.commandTimeout,
        onBroken: (error) => this.#lost(error),
      });
    }
    this.#ipsec = new IpsecManager({
      inline,
      inlineObstacle: obstacle,
      software: software ? (onEvent) => new SoftwareIpsec(this.packets, { engine: options.engine, onEvent }) : null,
      guard,
      mtu: this.mtu,
      handles,
      ...(this.#workers === null ? {} : { threads: this.#workers }),
      ...(options.ipsec === 'inline' ? { require: 'inline' as const } : {}),
    });
    const manager = this.#ipsec;
    if (this.#workers !== null) this.#workers.listener = manager.threads;
    const onBroken = () => void this.broken;
    this.#queues = rings.pairs.map((pair, i) => {
      const rx = new NicRxQueue(i, pair.rx, this.packets, manager, { onBroken, sleeper: rings.interrupts });
      const tx = new NicTxQueue(pair.tx, this.packets, manager, { onBroken });
      const reset = async (which?: 'rx' | 'tx') => {
        if (which !== 'tx') {
          await rings.resetQueue(i, 'rx');
          rx.rearm();
        }
        if (which !== 'rx') await rings.resetQueue(i, 'tx');
      };
      return { rx, tx, reset };
    });
    rings.interrupts.onConfigChange(() => this.#configChanged());
    await rings.setQueuePairs(options.queuePairs);
    rings.start();
    if (this.#broken !== null) throw this.#broken;
  }

  /** Queue pairs of this thread. */
  get queues(): readonly NicQueue[] {
    return this.#queues;
  }

  /** Queue pairs for worker threads: the last ones, as many as the option `workerQueues` says. */
  get workerQueues(): readonly WorkerQueue[] {
    return this.#workers?.list ?? [];
  }

  get ipsec(): Ipsec {
    if (this.#ipsec === null) throw new VirtioError('SETUP', 'the NIC has not been started');
    return this.#ipsec;
  }

  /** Null when the device has none, or when inline IPsec is not wanted: they come with the same queue. */
  get flowFilter(): FlowFilter | null {
    return this.#flowFilter;
  }

  /** What the device can be told besides: filters, steering, coalescing, statistics. Null when it has no control queue. */
  get control(): NetControl | null {
    return this.#parts.rings.control;
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

  /**
   * Calls `listener` when the link has changed, from the event loop; returns how to stop. Needs STATUS. Where the device has no interrupt for
   * it, it is asked once a second. Does not hold the event loop open.
   */
  onLink(listener: (link: NicLink) => void): () => void {
    if (this.#linkListeners.size === 0 && this.#broken === null) this.#lastLink = this.link;
    this.#linkListeners.add(listener);
    this.#lookAtLink();
    return () => {
      this.#linkListeners.delete(listener);
      this.#lookAtLink();
    };
  }

  /**
   * Calls `announcer` when the device asks that the addresses be made known (GUEST_ANNOUNCE), from the event loop; returns how to stop. When all
   * announcers are done, the device is told. Asks and interrupts as with `onLink`. Throws VirtioError `NO_ANNOUNCE`.
   */
  onAnnounce(announcer: Announcer): () => void {
    if (!this.features.has(Feature.GUEST_ANNOUNCE)) {
      throw new VirtioError('NO_ANNOUNCE', `${this.address}: GUEST_ANNOUNCE was not negotiated`);
    }
    const stop = this.#announcements.add(announcer);
    this.#lookAtLink();
    // It may have asked before anybody listened.
    setImmediate(() => this.#configChanged());
    return () => {
      stop();
      this.#lookAtLink();
    };
  }

  /** Without interrupts: looks at the configuration from time to time while somebody wants to know. */
  #lookAtLink(): void {
    const listens = this.#linkListeners.size > 0 || this.#announcements.wanted;
    const wanted = listens && this.#broken === null && !this.#parts.rings.tellsOfChanges;
    if (!wanted) {
      if (this.#linkTimer !== null) clearInterval(this.#linkTimer);
      this.#linkTimer = null;
    } else if (this.#linkTimer === null) {
      this.#linkTimer = setInterval(() => this.#configChanged(), LINK_INTERVAL_MS);
      this.#linkTimer.unref();
    }
  }

  /** A configuration change interrupt: the link, or a device that has failed and asks for a reset (2.1.2). */
  #configChanged(): void {
    if (this.#broken !== null) return;
    try {
      const { transport } = this.#parts;
      if ((transport.readStatus() & DeviceStatus.DEVICE_NEEDS_RESET) !== 0) {
        this.#lost(new VirtioError('DEVICE_NEEDS_RESET', `${this.address}: the device asks for a reset`));
        return;
      }
      this.#announcements.look();
      const link = this.link;
      const { up, speed, duplex } = this.#lastLink ?? link;
      this.#lastLink = link;
      if (link.up === up && link.speed === speed && link.duplex === duplex) return;
      for (const listener of [...this.#linkListeners]) listener(link);
    } catch (error) {
      // A configuration that does not come to rest is looked at with the next change.
      if (error instanceof VfioError) this.#lost(error);
      else if (!(error instanceof VipsecError)) throw error;
    }
  }

  /** Sums over all queues since the NIC was opened; those of worker threads as they are while traffic runs. */
  statistics(): NicStatistics {
    const queues = sumStatistics([...this.#queues, ...this.workerQueues.flatMap((queue) => queue.counters)]);
    return { ...queues, pool: poolStatistics(this.packets) };
  }

  /**
   * Makes `size` bytes of a memfd known to the device, from `offset` on, in whole pages: `packets.refer` puts pieces of it into chains that are
   * sent, without a copy. The memfd must be sealed against shrinking; the descriptor stays the caller's. The device can write there, too, and the
   * memory is not wiped when the NIC is closed. Throws VfioError `DMA_RANGE`, `DMA_SEAL`, `DMA_OVERLAP`, or when the device takes no more
   * regions; VirtioError `ARENA_LIMIT`.
   */
  registerMemory(fd: number, offset: number, size: number): PacketArena {
    if (this.#broken !== null) throw this.#broken;
    return this.#arenas.register(fd, offset, size);
  }

  /**
   * Takes memory from the device again: its views read zeros from now on. Throws VirtioError `ARENA_BUSY` while pieces of it are in packets, or other
   * threads have it. Idempotent.
   */
  unregisterMemory(arena: PacketArena): void {
    this.#arenas.unregister(arena);
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
    this.#lookAtLink();
    try {
      await this.#workers?.release(reason, WORKER_PATIENCE_MS);
      await release(fn, transport, rings, admin, options.resetTimeout);
    } finally {
      // The SAs end last: their nonces were in use until the device was reset.
      if (this.#ipsec === null) guard.close();
      else this.#ipsec.close(reason);
    }
  }

  /** The data path stops at once; the rest follows when whoever is in the middle of something has finished. */
  #lost(error: VipsecError): void {
    if (this.#broken !== null) return;
    this.#broken = error;
    this.#parts.rings.fail(error);
    this.#workers?.stop(error);
    this.#lookAtLink();
    queueMicrotask(() => {
      // An administration queue may outlive a packet queue that the device broke; not the device itself.
      if (this.#parts.fn.gone && this.#closing === null) this.#parts.admin?.close(error);
      this.#ipsec?.close(error);
      for (const listener of this.#listeners) listener(error);
      this.#listeners.clear();
    });
  }
}

/** A device without an address leaves it to the driver (5.1.4.2): random, locally administered, unicast. */
function randomMac(): Uint8Array {
  const mac = crypto.getRandomValues(new Uint8Array(6));
  mac[0] = (mac[0] & 0xfc) | 0x02;
  return mac;
}
