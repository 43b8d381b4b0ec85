/**
 * What transports over PCI have in common: structures inside BARs, notifications, the administration queue's fields (Virtio 1.4, 4.1.4
 * and 4.1.5).
 *
 * A structure is checked against its BAR once; accesses inside it stay there by construction.
 */
import { VirtioError } from '../errors.ts';
import type { VirtioCapability } from '../vfio/config-space.ts';
import type { PciFunction, Region } from '../vfio/function.ts';
import { Feature, type FeatureSet } from './features.ts';
import { CommonCfgField, CommonCfgLength } from './pci-layout.ts';
import type { Doorbell, QueueNotifier, QueueSetup } from './transport.ts';

/** BARs are 0 to 5; a capability that names another is to be ignored (4.1.4). */
export const LAST_BAR = 5;
/** Bytes of a notification (4.1.4.4), and with NOTIFICATION_DATA. */
const NOTIFICATION_BYTES = 2;
const NOTIFICATION_DATA_BYTES = 4;
/** Attempts to read a configuration that does not change meanwhile: so many, or so many milliseconds, but for a few. */
const ConfigAttempts = { most: 64, least: 4, ms: 2000 } as const;

/** A structure inside a BAR. */
export interface Structure {
  readonly bar: Region;
  readonly offset: number;
  readonly length: number;
  readonly extra: Uint8Array;
}

/** The first structure of a type, checked against its BAR. Throws `VirtioError` STRUCTURE_MISSING, STRUCTURE_BOUNDS. */
export function findStructure(
  fn: Pick<PciFunction, 'address' | 'bar'>,
  capabilities: readonly VirtioCapability[],
  name: string,
  type: number,
  minLength: number,
  alignment: number,
): Structure {
  const found = capabilities.find((cap) => cap.type === type && cap.bar <= LAST_BAR && fn.bar(cap.bar).size > 0);
  if (found === undefined) {
    throw new VirtioError('STRUCTURE_MISSING', `${fn.address} has no ${name} structure`, {
      hint: 'A function without the structures of virtio 1.0 and later is a legacy device, which this driver does not drive.',
    });
  }
  const bar = fn.bar(found.bar);
  const where = `${name} structure at ${found.offset} of BAR ${found.bar}`;
  if (found.length < minLength || found.offset + found.length > bar.size || found.offset % alignment !== 0) {
    const text = `${fn.address}: ${where} with ${found.length} bytes: needs ${minLength}, aligned to ${alignment}`;
    throw new VirtioError('STRUCTURE_BOUNDS', `${text}, inside the BAR's ${bar.size}`);
  }
  return { bar, offset: found.offset, length: found.length, extra: found.extra };
}

/** `notify_off_multiplier`, which follows the capability of the notification structure (4.1.4.4). */
export function notifyMultiplier(address: string, { extra }: Structure): number {
  if (extra.length < 4) {
    throw new VirtioError('STRUCTURE_BOUNDS', `${address}: the notification capability has no multiplier`);
  }
  return (extra[0] | (extra[1] << 8) | (extra[2] << 16) | (extra[3] << 24)) >>> 0;
}

/** The administration queues, from the two fields at the end of the common configuration (4.1.4.3.1). Throws `VirtioError` ADMIN_QUEUE. */
export function readAdminQueues(
  address: string,
  common: Structure,
  queueCount: number,
): { readonly first: number; readonly count: number } {
  if (common.length < CommonCfgLength.full) {
    throw new VirtioError('ADMIN_QUEUE', `${address}: the common configuration has no administration queue fields`);
  }
  const first = common.bar.read16(common.offset + CommonCfgField.adminQueueIndex);
  const count = common.bar.read16(common.offset + CommonCfgField.adminQueueNum);
  if (count === 0) throw new VirtioError('ADMIN_QUEUE', `${address}: the device has no administration queue`);
  // Beyond the other queues, and within 16 bits.
  if (first < queueCount || first + count > 0x10000) {
    throw new VirtioError('ADMIN_QUEUE', `${address}: ${count} administration queues from index ${first} on`);
  }
  return { first, count };
}

/**
 * Calls `attempt` until it gives a value. A device that changes its configuration each time, and takes its time to answer, is not read for hours: throws
 * `VirtioError` CONFIG_UNSTABLE.
 */
export function untilStable<T>(address: string, attempt: () => { readonly value: T } | null): T {
  const { most, least, ms } = ConfigAttempts;
  const deadline = performance.now() + ms;
  for (let tried = 0; tried < least || (tried < most && performance.now() < deadline); tried++) {
    const result = attempt();
    if (result !== null) return result.value;
  }
  throw new VirtioError('CONFIG_UNSTABLE', `${address}: the device configuration never stops changing`);
}

/** Reads again while `generation` changes meanwhile (2.5.1). Throws `VirtioError` CONFIG_UNSTABLE. */
export function readUnchanged<T>(address: string, generation: () => number, read: () => T): T {
  return untilStable(address, () => {
    const before = generation();
    const value = read();
    return generation() === before ? { value } : null;
  });
}

class PlainNotifier implements QueueNotifier {
  readonly #bar: Region;
  readonly #offset: number;
  readonly #id: number;

  /** `id` is the queue's index, or what the device wants instead (NOTIF_CONFIG_DATA). */
  constructor(bar: Region, offset: number, id: number) {
    this.#bar = bar;
    this.#offset = offset;
    this.#id = id;
  }

  notify(): void {
    // hot:
    if (this.#bar.signal?.(this.#offset, NOTIFICATION_BYTES) !== true) this.#bar.write16(this.#offset, this.#id);
  }

  share(): Doorbell | null {
    const register = this.#bar.share?.(this.#offset, NOTIFICATION_BYTES) ?? null;
    return register === null ? null : { register, id: this.#id, withPosition: false };
  }
}

/** NOTIFICATION_DATA (4.1.5.2): 32 bits, which also say where the queue stands. */
class DataNotifier implements QueueNotifier {
  readonly #bar: Region;
  readonly #offset: number;
  readonly #id: number;
  readonly #position: { readonly next: number };

  constructor(bar: Region, offset: number, id: number, position: { readonly next: number }) {
    this.#bar = bar;
    this.#offset = offset;
    this.#id = id;
    this.#position = position;
  }

  notify(): void {
    // hot: a server that has another way to be told says that it does not need to know what is written.
    if (this.#bar.signal?.(this.#offset, NOTIFICATION_DATA_BYTES) === true) return;
    this.#bar.write32(this.#offset, (this.#id | (this.#position.next << 16)) >>> 0);
  }

  share(): Doorbell | null {
    const register = this.#bar.share?.(this.#offset, NOTIFICATION_DATA_BYTES) ?? null;
    return register === null ? null : { register, id: this.#id, withPosition: true };
  }
}

/** Where and as what a queue is notified of. */
export interface NotificationPlace {
  readonly index: number;
  /** Bytes from the start of the notification structure: queue_notify_off times the multiplier. */
  readonly offset: number;
  /** What names the queue (4.1.5.2). */
  readonly id: number;
}

/** 4.1.4.4, 4.1.5.2. Throws `VirtioError` STRUCTURE_BOUNDS when the place is outside of the structure. */
export function makeNotifier(
  address: string,
  { bar, offset: start, length }: Structure,
  place: NotificationPlace,
  features: FeatureSet,
  setup: QueueSetup,
): QueueNotifier {
  const { index, offset, id } = place;
  const withData = features.has(Feature.NOTIFICATION_DATA);
  const bytes = withData ? NOTIFICATION_DATA_BYTES : NOTIFICATION_BYTES;
  if (offset + bytes > length || (start + offset) % bytes !== 0) {
    throw new VirtioError(
      'STRUCTURE_BOUNDS',
      `${address}: queue ${index} is notified at ${offset} of a structure of ${length} bytes at ${start}`,
    );
  }
  if (!withData) return new PlainNotifier(bar, start + offset, id);
  if (setup.position === undefined) throw new RangeError(`queue ${index}: NOTIFICATION_DATA needs its position`);
  return new DataNotifier(bar, start + offset, id, setup.position);
}
