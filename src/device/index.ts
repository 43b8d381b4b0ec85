/**
 * The software device: virtio-net functions with IPsec behind vfio-user sockets.
 *
 * `startDevice` serves from the event loop of the calling thread until it is closed. The driver must be in another
 * process or thread: its calls block until the device answers.
 */
import { createHash } from 'node:crypto';
import { InputError } from '../errors.ts';
import { PAGE_SIZE } from '../sys/libc.ts';
import { WIRE_REVISIONS, type WireRevision } from '../virtio/revision.ts';
import { ARENA_MAX, Arena } from './arena.ts';
import { makeFunction, makePool, maxFrameOf } from './assemble.ts';
import { BackingFiles } from './backing.ts';
import { faultSet } from './faults.ts';
import type { FramePool } from './frame-pool.ts';
import type { VirtioFunction } from './function.ts';
import { type Link, pollableLink } from './links/link.ts';
import { makeLinks } from './links/parse.ts';
import type { NetDevice } from './net.ts';
import { isOctepFault, type OctepFault } from './personalities/octep-faults.ts';
import { PERSONALITIES, type PersonalityName } from './personalities/personality.ts';
import { DEVICE_RINGS, type DeviceRings, MAX_QUEUE_PAIRS } from './personalities/standard.ts';
import { Pump } from './pump.ts';
import { VfioUserServer } from './vfio-user-server.ts';
import { BoundedWarnings } from './warnings.ts';

export { WIRE_REVISIONS, type WireRevision } from '../virtio/revision.ts';
export { FAULTS, type FaultName } from './faults.ts';
export { OCTEP_FAULTS, type OctepFault } from './personalities/octep-faults.ts';
export { PERSONALITIES, type PersonalityName } from './personalities/personality.ts';
export { DEVICE_RINGS, type DeviceRings } from './personalities/standard.ts';

export interface DeviceOptions {
  /** Paths of the sockets, one for each function; one or two. */
  readonly sockets: readonly string[];
  /** `loopback` (default), `pair` (two sockets), `pcap:IN,OUT`, `unix:PATH`, `unix-connect:PATH`, `tap:NAME`. */
  readonly link?: string;
  readonly wire?: WireRevision;
  /** Whether functions offer IPsec: all of them, or each. Default true. */
  readonly ipsec?: boolean | readonly boolean[];
  /** Kind of function: `standard` (default), or `octep`, which has packed virtqueues only. */
  readonly personality?: PersonalityName;
  /** Formats of virtqueues that drivers may use: `both` (default), `split`, or `packed`, like some hardware. */
  readonly rings?: DeviceRings;
  /** 1 (default) to 62. More than one needs the control virtqueue to be used. */
  readonly queuePairs?: number;
  /** One for each function, such as `02:00:00:00:00:01`; default: derived from the socket's path. */
  readonly macs?: readonly string[];
  /** 68 to 9000; default 1500. */
  readonly mtu?: number;
  /** Names from `FAULTS`, with personality `octep` also `OCTEP_FAULTS`, for all functions, or `NAME@2` for the second one alone. */
  readonly faults?: readonly string[];
  /**
   * Bytes of address space for its packets and for the guest memory that drivers map, in whole pages; default and most 2 GiB. For processes
   * with many devices: each 2 GiB make the garbage collector go through everything.
   */
  readonly memory?: number;
  /** Told of sessions that ended badly, and of faults of the device itself: ten times a minute at most, and of how many it was not told. */
  readonly onWarning?: (text: string) => void;
}

/** One function of a running device. */
export interface DeviceFunction {
  readonly socket: string;
  readonly mac: string;
  readonly ipsec: boolean;
  /** Counters and state, for reports. */
  statistics(): Record<string, unknown>;
  /** Asks its driver to announce its addresses, as after a migration (GUEST_ANNOUNCE). */
  announce(): void;
}

export interface Device {
  readonly functions: readonly DeviceFunction[];
  readonly link: string;
  readonly wire: WireRevision;
  readonly queuePairs: number;
  readonly mtu: number;
  /** Faults of the device itself that it has survived: none, unless it has a bug. */
  readonly internalErrors: number;
  /** Packets of the pool that are on their way somewhere. */
  readonly packetsInUse: number;
  /** Ends all sessions, removes the sockets, frees all memory. Idempotent. */
  close(): void;
}

const DEFAULT_MTU = 1500;
const MTU_RANGE = { min: 68, max: 9000 } as const;
/** Packets for each queue pair: backlogs, bursts, frames on their way through a link. */
const PACKETS_PER_PAIR = 4096;

/**
 * Starts the device. Throws InputError `DEVICE_OPTION`; DeviceError and SystemError when sockets or links cannot be
 * set up.
 */
export function startDevice(options: DeviceOptions): Device {
  return new RunningDevice(resolve(options));
}

interface Resolved {
  readonly sockets: readonly string[];
  readonly link: string;
  readonly wire: WireRevision;
  readonly ipsec: readonly boolean[];
  readonly rings: DeviceRings;
  readonly personality: PersonalityName;
  readonly queuePairs: number;
  readonly macs: readonly Uint8Array[];
  readonly mtu: number;
  readonly faults: readonly ReturnType<typeof faultSet>[];
  readonly octepFaults: readonly ReadonlySet<OctepFault>[];
  readonly memory: number;
  readonly onWarning: (text: string) => void;
}

function resolve(options: DeviceOptions): Resolved {
  const { sockets } = options;
  const count = sockets.length;
  if (count < 1 || count > 2 || new Set(sockets).size !== count) throw invalid('one socket, or two different ones');
  const wire = options.wire ?? 'virtio-1.4';
  if (!WIRE_REVISIONS.includes(wire)) throw invalid(`there is no wire revision ${wire}`);
  const rings = options.rings ?? 'both';
  if (!DEVICE_RINGS.includes(rings)) throw invalid(`there are no ${rings} rings`);
  const personality = options.personality ?? 'standard';
  if (!PERSONALITIES.includes(personality)) throw invalid(`there is no personality ${personality}`);
  if (personality === 'octep' && rings === 'split') throw invalid('personality octep has packed virtqueues only');
  const faults = sockets.map((_, i) => faultsOf(options.faults ?? [], i + 1));
  // A standard function knows nothing of them.
  const isOwn = (name: string): boolean => personality === 'octep' && isOctepFault(name);
  const each = <T>(value: T | readonly T[] | undefined, fallback: T): T[] =>
    sockets.map((_, i) => (isList(value) ? value[i] : value) ?? fallback);
  const macs = options.macs ?? [];
  if (macs.length > count) throw invalid('more MAC addresses than sockets');
  return {
    sockets,
    wire,
    link: options.link ?? (count === 2 ? 'pair' : 'loopback'),
    ipsec: each(options.ipsec, true),
    rings,
    personality,
    queuePairs: inRange('queue pairs', options.queuePairs ?? 1, 1, MAX_QUEUE_PAIRS),
    macs: sockets.map((path, i) => (macs[i] === undefined ? derivedMac(path) : parseMac(macs[i]))),
    mtu: inRange('MTU', options.mtu ?? DEFAULT_MTU, MTU_RANGE.min, MTU_RANGE.max),
    faults: faults.map((names) => faultSet(names.filter((name) => !isOwn(name)))),
    octepFaults: faults.map((names) => new Set(names.filter(isOctepFault).filter(isOwn))),
    memory: memoryOf(options.memory ?? ARENA_MAX),
    onWarning: bounded(options.onWarning ?? (() => {})),
  };
}

function bounded(tell: (text: string) => void): (text: string) => void {
  const warnings = new BoundedWarnings(tell);
  return (text) => warnings.warn(text);
}

function memoryOf(size: number): number {
  if (size % PAGE_SIZE !== 0) throw invalid(`memory ${size}: not in whole pages`);
  return inRange('memory', size, PAGE_SIZE, ARENA_MAX);
}

/** Names without `@`, and those for function `number`. */
function faultsOf(names: readonly string[], number: number): string[] {
  return names.flatMap((name) => {
    const [bare, which] = name.split('@');
    return which === undefined || which === String(number) ? [bare] : [];
  });
}

function isList<T>(value: T | readonly T[] | undefined): value is readonly T[] {
  return Array.isArray(value);
}

function inRange(name: string, value: number, min: number, max: number): number {
  if (!Number.isInteger(value) || value < min || value > max) throw invalid(`${name} ${value}: ${min} to ${max}`);
  return value;
}

function invalid(message: string): InputError {
  return new InputError('DEVICE_OPTION', message);
}

/** A unicast address of six bytes. */
function parseMac(text: string): Uint8Array {
  const bytes = text.split(':').map((part) => (/^[0-9a-f]{2}$/i.test(part) ? Number.parseInt(part, 16) : -1));
  if (bytes.length !== 6 || bytes.includes(-1) || (bytes[0] & 1) !== 0) throw invalid(`${text} is not a MAC address`);
  return Uint8Array.from(bytes);
}

/** The same socket has the same address every time, and two sockets have different ones. */
function derivedMac(path: string): Uint8Array {
  const mac = new Uint8Array(createHash('sha256').update(path).digest()).slice(0, 6);
  mac[0] = (mac[0] & 0xfc) | 0x02;
  return mac;
}

function macText(mac: Uint8Array): string {
  return Array.from(mac, (byte) => byte.toString(16).padStart(2, '0')).join(':');
}

class RunningDevice implements Device {
  readonly functions: readonly DeviceFunction[];
  readonly link: string;
  readonly wire: WireRevision;
  readonly queuePairs: number;
  readonly mtu: number;
  internalErrors = 0;
  readonly #arena: Arena;
  readonly #files: BackingFiles;
  readonly #pump: Pump;
  readonly #servers: VfioUserServer[] = [];
  readonly #devices: NetDevice[] = [];
  readonly #virtio: VirtioFunction[] = [];
  #pool: FramePool | null = null;
  #links: readonly Link[] = [];
  #closed = false;

  constructor(options: Resolved) {
    this.link = options.link;
    this.wire = options.wire;
    this.queuePairs = options.queuePairs;
    this.mtu = options.mtu;
    const count = options.sockets.length;
    const maxFrame = maxFrameOf(options.mtu);
    const slots = PACKETS_PER_PAIR * count * options.queuePairs;
    this.#arena = new Arena(options.memory);
    this.#files = new BackingFiles(this.#arena);
    this.#pump = new Pump((error) => this.#survive(error, options.onWarning));
    try {
      const pool = makePool(this.#arena, slots, maxFrame);
      this.#pool = pool;
      this.#links = makeLinks(options.link, {
        arena: this.#arena,
        pool,
        functions: count,
        maxFrame,
        warn: options.onWarning,
      });
      this.functions = options.sockets.map((_, i) => this.#addFunction(options, i, pool, this.#links[i]));
      for (const link of this.#links) this.#pump.add(pollableLink(link));
    } catch (error) {
      this.close();
      throw error;
    }
  }

  #addFunction(options: Resolved, i: number, pool: FramePool, link: Link): DeviceFunction {
    const ipsec = options.ipsec[i];
    const { fn, device } = makeFunction({
      arena: this.#arena,
      files: this.#files,
      pool,
      link,
      queuePairs: options.queuePairs,
      rings: options.rings,
      personality: options.personality,
      octepFaults: options.octepFaults[i],
      wire: options.wire,
      ipsec,
      mac: options.macs[i],
      mtu: options.mtu,
      faults: options.faults[i],
      wake: () => this.#pump.wake(),
    });
    this.#virtio.push(fn);
    this.#devices.push(device);
    this.#pump.add(device);
    const socket = options.sockets[i];
    this.#servers.push(
      new VfioUserServer({
        path: socket,
        fn,
        onSessionEnd: (reason) => {
          if (reason !== null) options.onWarning(`${socket}: the session was ended: ${reason}`);
        },
      }),
    );
    return {
      socket,
      mac: macText(options.macs[i]),
      ipsec,
      statistics: () => ({ ...device.statistics(), link: { up: link.up, ...link.counters } }),
      announce: () => device.announce(),
    };
  }

  get packetsInUse(): number {
    return this.#pool === null ? 0 : this.#pool.count - this.#pool.available;
  }

  /** A bug of this program must not end it, nor hide: every function asks for a reset. */
  #survive(error: unknown, warn: (text: string) => void): void {
    this.internalErrors++;
    warn(`internal error: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`);
    for (const fn of this.#virtio) fn.fail('internal error');
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#pump.close();
    for (const server of this.#servers) server.close();
    for (const fn of this.#virtio) fn.close();
    for (const device of this.#devices) device.close();
    for (const link of this.#links) link.close();
    this.#arena.close();
  }
}
