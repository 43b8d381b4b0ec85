/**
 * A function that checks work on: opened once, opened again when a check has lost it.
 */
import { VipsecError } from '../errors.ts';
import { EventFd } from '../sys/eventfd.ts';
import type { DmaMemory } from '../sys/memory.ts';
import { PciCommand, type PciIdentity, readIdentity, updateCommand } from '../vfio/config-space.ts';
import type { PciFunction } from '../vfio/function.ts';
import type { FeatureSet } from '../virtio/features.ts';
import { CommonCfgField, DeviceStatus } from '../virtio/pci-layout.ts';
import { Failed } from './check.ts';
import { readOffered, Structures } from './structures.ts';
import type { Patience } from './time.ts';

/** What a report says of a function. */
export interface FunctionDescription extends PciIdentity {
  readonly address: string;
  readonly interruptVectors: number;
}

/** Bytes of DMA memory that a check has for rings and buffers. */
const MEMORY = 2 ** 21;

export class Target {
  readonly #open: () => PciFunction;
  #fn: PciFunction | null = null;
  #memory: DmaMemory | null = null;
  #structures: Structures | null = null;
  #identity: PciIdentity | null = null;
  #offered: FeatureSet | null = null;
  #top = 0;
  #eventfds: EventFd[] = [];

  constructor(open: () => PciFunction) {
    this.#open = open;
  }

  /** Opens the function if it is not open. Throws what opening throws. */
  connect(): void {
    if (this.#fn !== null && !this.#fn.gone) return;
    this.close();
    this.#fn = this.#open();
  }

  get fn(): PciFunction {
    if (this.#fn === null) throw new Failed('the device is gone');
    return this.#fn;
  }

  get gone(): boolean {
    return this.#fn === null || this.#fn.gone;
  }

  /** The ids: read once, as they stay. */
  get identity(): PciIdentity {
    this.#identity ??= readIdentity(this.fn.config);
    return this.#identity;
  }

  /** The virtio structures. Throws VfioError when the list of capabilities is broken. */
  get structures(): Structures {
    this.#structures ??= new Structures(this.fn);
    return this.#structures;
  }

  get memory(): DmaMemory {
    this.#memory ??= this.fn.allocateDma(MEMORY);
    return this.#memory;
  }

  /** Offset in `memory` of `size` zeroed bytes, aligned to 64, that nobody else has until the next `prepare`. */
  allocate(size: number): number {
    const at = this.#top;
    this.#top = Math.ceil((at + size) / 64) * 64;
    if (this.#top > this.memory.size) throw new RangeError('a check needs more memory than there is');
    this.memory.u8.fill(0, at, this.#top);
    return at;
  }

  /** Memory space and bus mastering on, interrupts off, reset, all memory free: the state in which a check begins. */
  async prepare(patience: Patience): Promise<void> {
    updateCommand(this.fn.config, PciCommand.memorySpace | PciCommand.busMaster);
    this.#top = 0;
    this.#offered = null;
    try {
      await this.reset(patience);
    } catch (error) {
      // A device that cannot be reset, or found, fails the checks that need it.
      if (!(error instanceof VipsecError) && !(error instanceof Failed)) throw error;
    }
  }

  get status(): number {
    return this.structures.common.read8(CommonCfgField.deviceStatus);
  }

  set status(value: number) {
    this.structures.common.write8(CommonCfgField.deviceStatus, value);
  }

  /** Writes 0 to `device_status` and waits until it reads 0 (2.4). Throws `Failed` when it does not. */
  async reset(patience: Patience): Promise<void> {
    this.status = 0;
    if (!(await patience.until(() => this.status === 0))) {
      throw new Failed(`device_status reads ${this.status}, not 0, after 0 was written to it`);
    }
  }

  /** What the device offers: read once for each check. */
  offered(): FeatureSet {
    this.#offered ??= readOffered(this.structures.common);
    return this.#offered;
  }

  /** Connects `count` MSI-X vectors, which enables MSI-X. */
  enableVectors(count: number): readonly EventFd[] {
    this.disableVectors();
    const { fn } = this;
    if (count > fn.interruptVectors) throw new RangeError(`${count} vectors of ${fn.interruptVectors}`);
    this.#eventfds = Array.from({ length: count }, () => EventFd.create());
    fn.setInterrupts(this.#eventfds.map(({ fd }) => fd));
    return this.#eventfds;
  }

  disableVectors(): void {
    if (this.#eventfds.length === 0) return;
    const eventfds = this.#eventfds;
    this.#eventfds = [];
    try {
      if (!this.gone) this.fn.setInterrupts([]);
    } finally {
      for (const eventfd of eventfds) eventfd.close();
    }
  }

  /** After a check: the function as it was before, or gone. Never throws. */
  tidy(): void {
    quietly(() => this.disableVectors());
    quietly(() => {
      if (!this.gone) this.status = 0;
    });
  }

  close(): void {
    quietly(() => this.disableVectors());
    quietly(() => this.#fn?.close());
    this.#fn = null;
    this.#memory = null;
    this.#structures = null;
    this.#identity = null;
    this.#offered = null;
  }

  /** What the report says of the device. */
  describe(): FunctionDescription {
    const { fn, identity } = this;
    return { address: fn.address, ...identity, interruptVectors: fn.interruptVectors };
  }
}

/** What the device breaks while it is tidied up does not concern the next check. */
function quietly(step: () => void): void {
  try {
    step();
  } catch (error) {
    if (!(error instanceof VipsecError) && !(error instanceof Failed)) throw error;
  }
}

/** Bits of `device_status` while a driver works. */
export const RUNNING =
  DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK;
