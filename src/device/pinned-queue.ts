/**
 * Where the ring of a queue lies: what the device sides of split and packed virtqueues share besides their buffers. Its three areas
 * are found in guest memory when they are first needed, and again when the driver has unmapped a part of them since.
 */
import { SystemError } from '../errors.ts';
import { DeviceError } from './errors.ts';
import type { GuestMemory, Pin } from './guest-memory.ts';
import { QueueBuffer } from './queue-buffer.ts';
import type { QueueAddresses, QueueOptions } from './queues.ts';

/** Bytes of each area, and whether the device writes there. The driver area it only reads. */
export interface RingAreas {
  readonly descriptor: { readonly bytes: number; readonly write: boolean };
  readonly driverBytes: number;
  readonly deviceBytes: number;
}

export abstract class PinnedQueue extends QueueBuffer {
  protected readonly eventIdx: boolean;
  protected readonly indirect: boolean;
  protected readonly inOrder: boolean;
  protected readonly scratch: number;
  protected readonly u16: Uint16Array;
  protected readonly u32: Uint32Array;
  /** Arena offsets of the areas. */
  protected descriptorAt = 0;
  protected driverAt = 0;
  protected deviceAt = 0;
  /** False while the ring was not found. */
  protected found = false;
  readonly #addresses: QueueAddresses;
  readonly #areas: RingAreas;
  #pins: readonly Pin[] = [];

  constructor(memory: GuestMemory, options: QueueOptions, areas: RingAreas) {
    super(memory, options.index, options.size);
    this.eventIdx = options.eventIdx;
    this.indirect = options.indirect;
    this.inOrder = options.inOrder ?? false;
    this.scratch = options.scratch;
    this.u16 = memory.arena.u16;
    this.u32 = memory.arena.u32;
    this.#addresses = options.addresses;
    this.#areas = areas;
  }

  /** hot: finds the ring again if need be; false when it is not all there, and the queue is broken then. */
  protected located(): boolean {
    const pins = this.#pins;
    if (pins.length === 3 && pins[0].valid && pins[1].valid && pins[2].valid) return true;
    return this.#locate();
  }

  #locate(): boolean {
    if (this.broken !== null) return false;
    this.close();
    const { descriptorLow, descriptorHigh, driverLow, driverHigh, deviceLow, deviceHigh } = this.#addresses;
    const { descriptor, driverBytes, deviceBytes } = this.#areas;
    const areas = [
      [descriptorLow, descriptorHigh, descriptor.bytes, descriptor.write],
      [driverLow, driverHigh, driverBytes, false],
      [deviceLow, deviceHigh, deviceBytes, true],
    ] as const;
    const pins: Pin[] = [];
    this.#pins = pins;
    let why = 'a part of the ring is not mapped';
    try {
      for (const [low, high, size, write] of areas) {
        const pin = this.memory.pin(low, high, size, write);
        if (pin === null) break;
        pins.push(pin);
      }
    } catch (error) {
      // A driver can use up what rings in scattered pages need: that is the end of its own queue, and of no other function.
      if (!(error instanceof DeviceError || error instanceof SystemError)) throw error;
      why = `the ring cannot be mapped: ${error.message}`;
    }
    if (pins.length < areas.length) {
      this.close();
      return this.fail(why);
    }
    [this.descriptorAt, this.driverAt, this.deviceAt] = pins.map(({ offset }) => offset);
    this.found = true;
    return true;
  }

  close(): void {
    for (const pin of this.#pins) this.memory.unpin(pin);
    this.#pins = [];
    this.found = false;
  }
}
