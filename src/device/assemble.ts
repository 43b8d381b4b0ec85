/**
 * Puts the parts of a network function together: PCI function, network device, packet pool. Sockets and the event
 * loop are not its business, so that tests and benchmarks can do without.
 */
import { ipsecWire } from '../ipsec/wire/revisions.ts';
import { PAGE_SIZE } from '../sys/libc.ts';
import { Feature } from '../virtio/features.ts';
import type { WireRevision } from '../virtio/revision.ts';
import type { Arena } from './arena.ts';
import type { BackingFiles } from './backing.ts';
import { withFeatureFaults } from './fault-features.ts';
import type { FaultSet } from './faults.ts';
import { AREAS_SIZE, FramePool } from './frame-pool.ts';
import { VirtioFunction } from './function.ts';
import { GuestMemory } from './guest-memory.ts';
import type { Link } from './links/link.ts';
import { NetDevice } from './net.ts';
import type { OctepFault } from './personalities/octep-faults.ts';
import { type PersonalityName, personalityOf } from './personalities/personality.ts';
import type { DeviceRings } from './personalities/standard.ts';

/**
 * Space in a slot before and behind the largest frame: outer headers, ESP header and IV, link header; padding,
 * trailer, ICV.
 */
const HEADROOM = 192;
const TAILROOM = 320;
const SLOT_ALIGNMENT = 64;
/** Ethernet with two VLAN tags. */
const FRAME_OVERHEAD = 22;

export interface FunctionOptions {
  readonly arena: Arena;
  /** Of the arena, for all functions. Default: for this one. */
  readonly files?: BackingFiles;
  readonly pool: FramePool;
  readonly link: Link;
  readonly queuePairs: number;
  readonly wire: WireRevision;
  readonly ipsec: boolean;
  /** 6 bytes. */
  readonly mac: Uint8Array;
  readonly mtu: number;
  readonly faults: FaultSet;
  /** Default `both`. */
  readonly rings?: DeviceRings;
  /** Default `standard`. */
  readonly personality?: PersonalityName;
  readonly octepFaults?: ReadonlySet<OctepFault>;
  /** There may be work: poll the device. */
  readonly wake: () => void;
}

export interface AssembledFunction {
  readonly fn: VirtioFunction;
  readonly device: NetDevice;
}

/** Bytes of the largest frame, for IP packets of up to `mtu` bytes. */
export function maxFrameOf(mtu: number): number {
  return mtu + FRAME_OVERHEAD;
}

/** A pool of `slots` packets at the start of a fresh arena, so that its offsets are the arena's. */
export function makePool(arena: Arena, slots: number, maxFrame: number): FramePool {
  const stride = Math.ceil((HEADROOM + maxFrame + TAILROOM) / SLOT_ALIGNMENT) * SLOT_ALIGNMENT;
  const size = Math.ceil((slots * stride) / PAGE_SIZE) * PAGE_SIZE;
  if (arena.allocate(size) !== 0) throw new Error('the pool is not at the start of the arena');
  const { address, u8, u16, u32 } = arena;
  return new FramePool({ address, size, u8, u16, u32 }, arena.allocate(AREAS_SIZE), { stride, headroom: HEADROOM });
}

export function makeFunction(options: FunctionOptions): AssembledFunction {
  const { arena, pool, link, queuePairs, wire, ipsec, faults, wake } = options;
  const { rings = 'both', personality: name = 'standard' } = options;
  const personality = personalityOf(name, { queuePairs, ipsec, wire, rings }, options.octepFaults);
  const { layout, required, window } = personality;
  const offered = withFeatureFaults(personality.offered, faults);
  // 5.1.2: receive and transmit queues in turn, the control queue behind them, if there is one.
  const hasControl = offered.has(Feature.CTRL_VQ);
  const fn = new VirtioFunction(new GuestMemory(arena, options.files), {
    layout,
    offered,
    queues: 2 * queuePairs + (hasControl ? 1 : 0),
    adminQueues: ipsec ? 1 : 0,
    maxQueueSize: (index) => personality.maxQueueSize(index, offered),
    faults,
    wake,
    ...(window === undefined ? {} : { window }),
  });
  const device = new NetDevice(fn, {
    arena,
    pool,
    queuePairs,
    mac: options.mac,
    mtu: options.mtu,
    maxFrame: maxFrameOf(options.mtu),
    offered,
    required,
    revision: wire,
    wire: ipsec ? ipsecWire(wire) : null,
    link,
    wake,
  });
  fn.model = device;
  return { fn, device };
}
