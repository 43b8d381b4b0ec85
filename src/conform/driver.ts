/**
 * The driver that a check works with: a function brought up as the standard says (3.1.1), with queues in the open.
 */
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { CommonCfgField, DeviceStatus, NO_VECTOR, VirtioCfgType } from '../virtio/pci-layout.ts';
import type { WireRevision } from '../virtio/revision.ts';
import {
  decodeNetHeader,
  encodeNetHeader,
  NetHeader,
  type NetHeaderLayout,
  netHeaderLayout,
} from '../virtio-net/header.ts';
import { Failed } from './check.ts';
import type { AdminConsole } from './console.ts';
import { pieces } from './console.ts';
import type { ControlConsole } from './control-console.ts';
import type { CheckRing, Piece } from './ring.ts';
import { PackedRing } from './ring-packed.ts';
import { SplitRing } from './ring-split.ts';
import type { Window } from './structures.ts';
import { writeAccepted } from './structures.ts';
import { RUNNING, type Target } from './target.ts';
import type { Patience } from './time.ts';

/** Bytes of a receive buffer and of a transmit buffer. */
const BUFFER = 4096;
const TRANSMIT_SLOTS = 32;
/** Where `next_off` begins in a notification with data (2.9). */
const POSITION_SHIFT = 16;

/** Told of bytes that are sent or come. */
export type Trace = (way: 'sent' | 'came', what: string, bytes: Uint8Array) => void;

export interface Received {
  readonly header: NetHeader;
  /** The whole header and frame as they stood in the buffers. */
  readonly bytes: Uint8Array;
  readonly frame: Uint8Array;
  /** Used lengths of the buffers. */
  readonly lengths: readonly number[];
  readonly queue: number;
}

export interface TransmitOptions {
  readonly header?: Partial<NetHeader>;
  /** Where the buffer is split into descriptors: offsets from its start. */
  readonly cuts?: readonly number[];
  readonly queue?: number;
  /** Fields of the header that are overwritten: offset, 16-bit value. */
  readonly raw?: readonly (readonly [at: number, value: number])[];
}

/** Receive buffers of one queue. */
interface Posted {
  readonly at: number;
  readonly size: number;
}

export class Driver {
  readonly target: Target;
  readonly patience: Patience;
  readonly features: FeatureSet;
  readonly layout: NetHeaderLayout;
  readonly rings = new Map<number, CheckRing>();
  admin: AdminConsole | null = null;
  control: ControlConsole | null = null;
  /** Told of each packet that is sent or comes: header and frame. */
  trace: Trace = () => {};
  readonly #notify: Window;
  readonly #multiplier: number;
  readonly #notifyOffsets = new Map<number, number>();
  /** By queue and head descriptor. */
  readonly #posted = new Map<number, Map<number, Posted>>();
  #transmitAt = -1;
  #transmitted = 0;

  constructor(target: Target, patience: Patience, features: FeatureSet, revision: WireRevision) {
    this.target = target;
    this.patience = patience;
    this.features = features;
    this.layout = netHeaderLayout(features, revision);
    const { structures } = target;
    this.#notify = structures.window(VirtioCfgType.NOTIFY);
    this.#multiplier = structures.notifyMultiplier;
  }

  /**
   * Steps 1 to 6: reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK. False when the device did not take the features.
   */
  static async negotiate(target: Target, patience: Patience, features: FeatureSet): Promise<boolean> {
    await target.reset(patience);
    target.status = DeviceStatus.ACKNOWLEDGE;
    target.status = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER;
    writeAccepted(target.structures.common, features);
    target.status = RUNNING & ~DeviceStatus.DRIVER_OK;
    return (target.status & DeviceStatus.FEATURES_OK) !== 0;
  }

  /** Describes a queue to the device and enables it. */
  addQueue(
    index: number,
    options: { size?: number; vector?: number; before?: (ring: CheckRing) => void } = {},
  ): CheckRing {
    const { common } = this.target.structures;
    const F = CommonCfgField;
    common.write16(F.queueSelect, index);
    const max = common.read16(F.queueSize);
    if (max === 0) throw new Failed(`queue ${index} does not exist: queue_size is 0`);
    const size = Math.min(options.size ?? 64, max);
    const ring = this.#makeRing(index, size);
    options.before?.(ring);
    this.configure(ring, options.vector ?? NO_VECTOR);
    this.rings.set(index, ring);
    this.#notifyOffsets.set(index, common.read16(F.queueNotifyOff) * this.#multiplier);
    return ring;
  }

  #makeRing(index: number, size: number): CheckRing {
    const { features, target } = this;
    const Ring = features.has(Feature.RING_PACKED) ? PackedRing : SplitRing;
    const options = {
      index,
      size,
      eventIdx: features.has(Feature.EVENT_IDX),
      inOrder: features.has(Feature.IN_ORDER),
    };
    return new Ring(target.memory, target.allocate(Ring.bytes(size)), options);
  }

  /** Tells the device where a ring is, and enables the queue. */
  configure(ring: CheckRing, vector: number): void {
    const { common } = this.target.structures;
    const { memory } = ring;
    const F = CommonCfgField;
    common.write16(F.queueSelect, ring.index);
    common.write16(F.queueSize, ring.size);
    common.write16(F.queueMsixVector, vector);
    for (const [field, offset] of [
      [F.queueDesc, ring.descriptors],
      [F.queueDriver, ring.driverArea],
      [F.queueDevice, ring.deviceArea],
    ]) {
      common.write32(field, memory.iovaLow + offset);
      common.write32(field + 4, memory.iovaHigh);
    }
    common.write16(F.queueEnable, 1);
    if (common.read16(F.queueEnable) !== 1) throw new Failed(`queue ${ring.index}: queue_enable does not become 1`);
  }

  /** Maps the events of a queue to a vector. */
  configureVector(index: number, vector: number): void {
    const { common } = this.target.structures;
    common.write16(CommonCfgField.queueSelect, index);
    common.write16(CommonCfgField.queueMsixVector, vector);
    const came = common.read16(CommonCfgField.queueMsixVector);
    if (came !== vector)
      throw new Failed(`queue ${index}: mapped to vector ${vector}, queue_msix_vector reads ${came}`);
  }

  /** DRIVER_OK. */
  start(): void {
    this.target.status = RUNNING;
    const { status } = this.target;
    if ((status & (DeviceStatus.DRIVER_OK | DeviceStatus.DEVICE_NEEDS_RESET)) !== DeviceStatus.DRIVER_OK) {
      throw new Failed(`device_status is ${status} after DRIVER_OK was set`);
    }
  }

  /** Tells the device of new buffers, unless it has asked not to be told (2.7.10, 2.8.10). */
  kick(ring: CheckRing): void {
    if (ring.wantsNotification()) this.notify(ring.index);
  }

  /** An available buffer notification, wanted or not (4.1.5.2). */
  notify(index: number): void {
    const at = this.#notifyOffsets.get(index) ?? 0;
    const position = this.rings.get(index)?.position ?? 0;
    if (!this.features.has(Feature.NOTIFICATION_DATA)) this.#notify.write16(at, index);
    else this.#notify.write32(at, (index | (position << POSITION_SHIFT)) >>> 0);
  }

  /** Forgets a queue that was reset. */
  forget(index: number): void {
    this.#posted.delete(index);
    this.rings.delete(index);
  }

  ring(index: number): CheckRing {
    const ring = this.rings.get(index);
    if (ring === undefined) throw new RangeError(`there is no queue ${index}`);
    return ring;
  }

  /** Indices of the queues that have receive buffers. */
  get receiveQueues(): readonly number[] {
    return [...this.#posted.keys()];
  }

  /** Gives `count` receive buffers of `size` bytes, in `split` descriptors each, to queue `index`. */
  fill(index = 0, count = 16, size = BUFFER, split = 1): void {
    const ring = this.ring(index);
    const posted = this.#posted.get(index) ?? new Map<number, Posted>();
    this.#posted.set(index, posted);
    for (let i = 0; i < count; i++) {
      const at = this.target.allocate(size);
      posted.set(ring.offer(...pieces(at, size, split, true)), { at, size });
    }
    this.kick(ring);
  }

  /** Sends a frame; resolves when the device has used the buffer. The buffer, as it was and as it is then. */
  async transmit(
    frame: Uint8Array,
    options: TransmitOptions = {},
  ): Promise<{ before: Uint8Array; after: Uint8Array; length: number }> {
    const { at, length } = this.place(frame, options.header);
    for (const [field, value] of options.raw ?? []) {
      this.target.memory.u8[at + field] = value;
      this.target.memory.u8[at + field + 1] = value >>> 8;
    }
    const ring = this.ring(options.queue ?? 1);
    const before = this.target.memory.u8.slice(at, at + length);
    this.trace('sent', `header and packet, queue ${ring.index}`, before);
    const head = ring.offer(...cut(at, length, options.cuts ?? []));
    this.kick(ring);
    const used = await ring.wait(this.patience);
    if (used.id !== head) throw new Failed(`queue ${ring.index}: buffer ${used.id} came back instead of ${head}`);
    return { before, after: this.target.memory.u8.slice(at, at + length), length: used.length };
  }

  /** Puts header and frame into DMA memory. */
  place(frame: Uint8Array, header: Partial<NetHeader> = {}): { at: number; length: number } {
    if (this.#transmitAt < 0) this.#transmitAt = this.target.allocate(TRANSMIT_SLOTS * BUFFER);
    const at = this.#transmitAt + (this.#transmitted++ % TRANSMIT_SLOTS) * BUFFER;
    const { u8 } = this.target.memory;
    const length = this.layout.length + frame.length;
    if (length > BUFFER) throw new RangeError(`a frame of ${frame.length} bytes`);
    encodeNetHeader(this.layout, Object.assign(new NetHeader(), header), u8, at);
    u8.set(frame, at + this.layout.length);
    return { at, length };
  }

  /** The next frame in queue `index`; null when none comes in time. Its buffers are given to the device again. */
  async receive(limit?: number, index = 0): Promise<Received | null> {
    const ring = this.ring(index);
    if (!(await this.patience.until(() => ring.pending > 0, limit))) return null;
    const first = this.#takeBuffer(ring);
    const header = new NetHeader();
    if (!decodeNetHeader(this.layout, first, 0, first.length, header)) {
      throw new Failed(`a received buffer of ${first.length} bytes holds no header of ${this.layout.length}`);
    }
    const parts = [first];
    while (parts.length < header.numBuffers) {
      if (!(await this.patience.until(() => ring.pending > 0))) {
        throw new Failed(`num_buffers is ${header.numBuffers}, but only ${parts.length} buffers came`);
      }
      parts.push(this.#takeBuffer(ring));
    }
    this.kick(ring);
    const bytes = Uint8Array.from(parts.flatMap((part) => [...part]));
    this.trace('came', `header and packet, queue ${index}`, bytes);
    const lengths = parts.map(({ length }) => length);
    return { header, bytes, frame: bytes.subarray(this.layout.length), lengths, queue: index };
  }

  /** Whether a receive buffer of queue `index` holds a frame that begins so, whatever the device says about it. */
  holds(frame: Uint8Array, index = 0): boolean {
    const { u8 } = this.target.memory;
    const buffers = [...(this.#posted.get(index)?.values() ?? [])];
    return buffers.some(({ at, size }) => {
      const from = at + this.layout.length;
      return frame.length + this.layout.length <= size && frame.every((byte, i) => u8[from + i] === byte);
    });
  }

  #takeBuffer(ring: CheckRing): Uint8Array {
    const used = ring.take();
    const posted = used === null ? undefined : this.#posted.get(ring.index)?.get(used.id);
    if (used === null || posted === undefined)
      throw new Failed(`queue ${ring.index}: a used entry for a buffer that is not out`);
    if (used.length > posted.size) {
      throw new Failed(`queue ${ring.index}: used length ${used.length} of a buffer of ${posted.size} bytes`);
    }
    const bytes = this.target.memory.u8.slice(posted.at, posted.at + used.length);
    ring.available(used.id);
    return bytes;
  }
}

/** `length` bytes from `at` on, in pieces that end at `cuts`. */
function cut(at: number, length: number, cuts: readonly number[]): Piece[] {
  const ends = [...cuts.filter((end) => end > 0 && end < length), length];
  return ends.map((end, i) => {
    const from = i === 0 ? 0 : ends[i - 1];
    return { at: at + from, length: end - from };
  });
}
