/**
 * The window of an octeon_ep class function, and the firmware behind it.
 *
 * The window is memory: what is written is there at once, and reads back. The firmware polls the common configuration and compares it with what it
 * knows; only then does anything happen, in the order of the registers, not of the writes. So a driver that does not wait until its selections are
 * acknowledged reads what was selected before, one that writes 0 to `device_status` and goes on has reset nothing, and a
 * notification of 16 bits tells where a queue stands to nobody. None of it is refused: hardware would not either.
 *
 * A poll takes place each time the driver sees that something is not acknowledged yet, and `POLL_MS` after a write. The rules are those of
 * `CommonConfig`, which the firmware applies when it looks. The mailbox that carries virtqueue state answers as the published firmware does, which takes any
 * state and always says that a queue is at its start.
 */

import {
  AcknowledgeBit,
  CAUSE_FLAG,
  InterruptCount,
  OctepBar,
  OctepRegister,
  OctepWindow,
  READY_MARK,
  WINDOW_SIGNATURE,
} from '../../virtio/octep-layout.ts';
import { CommonCfgLength, DeviceStatus, CommonCfgField as F, IsrBit } from '../../virtio/pci-layout.ts';
import type { RegisterWindow, WindowHost } from '../function.ts';
import { OCTEP_INTERRUPTS, OCTEP_MAX_QUEUES, OCTEP_QUEUE_SIZE } from './octep.ts';
import type { OctepFault } from './octep-faults.ts';
import { answerMailbox, get, Mailbox, PAGE, Place, put, writeWindow } from './octep-firmware.ts';

/** Milliseconds until the firmware looks by itself. */
const POLL_MS = 5;
/** Polls until a selected queue is acknowledged, and until DRIVER_OK counts. */
const DELAY = { queueSelect: 3, driverOk: 3 } as const;
/** No queue, or no feature word, is selected. */
const NONE = -1;
const NO_SELECTION = 0xffffffff;
/** Where a queue stands at first: at its start, with a wrap counter of 1. */
const START = 0x8000;
const LATE_MS = 500;
/** Bits of `device_status` that the firmware looks at. */
const STATUS_MASK = 0x7f;

/** Registers of the selected queue, as the firmware keeps them for each: offset and width. */
const QUEUE_FIELDS: readonly (readonly [at: number, width: number])[] = [
  [F.queueSize, 2],
  [F.queueMsixVector, 2],
  [F.queueDesc, 4],
  [F.queueDesc + 4, 4],
  [F.queueDriver, 4],
  [F.queueDriver + 4, 4],
  [F.queueDevice, 4],
  [F.queueDevice + 4, 4],
];

export interface WindowOptions {
  /** Bytes of BAR 4. */
  readonly size: number;
  /** Receive and transmit queues. */
  readonly dataQueues: number;
  /** All queues, administration included. */
  readonly queues: number;
  /** Words of features that the firmware knows: 2, or 4 with the features of Virtio 1.4. */
  readonly featureWords: number;
  readonly faults: ReadonlySet<OctepFault>;
}

export class FirmwareWindow implements RegisterWindow {
  readonly #host: WindowHost;
  readonly #options: WindowOptions;
  readonly #interruptCount: number;
  /** How interrupts belonged to queues in 2024. */
  readonly #inTurn: boolean;
  readonly #memory: Uint8Array;
  /** The common configuration as the firmware has seen it last. */
  readonly #seen = new Uint8Array(CommonCfgLength.full);
  /** By queue: what its registers were when it was selected last. */
  readonly #queues = new Map<number, number[]>();
  readonly #positions: { next: number }[];
  /** The two halves of the ready mark's register. */
  readonly #ready = new Uint32Array(2);
  #selectedQueue: number = NONE;
  #driverWord: number = NONE;
  #selectPolls = 0;
  #startPolls = 0;
  #started = false;
  #interrupts = false;
  #timer: NodeJS.Timeout | null = null;
  #lateTimer: NodeJS.Timeout | null = null;

  constructor(host: WindowHost, options: WindowOptions) {
    this.#host = host;
    this.#options = options;
    const { faults } = options;
    this.#interruptCount = faults.has('octep-no-interrupts')
      ? 0
      : faults.has('octep-one-interrupt')
        ? 1
        : OCTEP_INTERRUPTS;
    this.#inTurn = faults.has('octep-interrupts-in-turn');
    this.#memory = new Uint8Array(options.size);
    this.#positions = Array.from({ length: options.queues }, () => ({ next: START }));
  }

  read(bar: number, offset: number, width: number): number {
    if (bar === OctepBar.registers) return this.#readRegister(offset, width);
    if (bar !== OctepBar.window) return 0;
    const common = offset - Place.common;
    if (common === F.configGeneration && width === 1) return this.#host.registers.read(F.configGeneration, 1);
    if (offset >= Place.config && offset + width <= Place.config + Place.configLength) {
      let value = 0;
      for (let i = width - 1; i >= 0; i--) value = value * 256 + this.#host.readConfig(offset - Place.config + i);
      return value;
    }
    const value = this.#get(offset, width);
    if (isAwaited(common, value) || offset === Place.mailbox + Mailbox.status) this.#poll();
    return value;
  }

  write(bar: number, offset: number, width: number, value: number): void {
    if (bar === OctepBar.registers) {
      this.#writeRegister(offset, width, value);
      return;
    }
    if (bar !== OctepBar.window) return;
    this.#put(offset, width, value);
    if (offset >= Place.notify) this.#notified(offset);
    else if (offset >= Place.common && offset < Place.common + CommonCfgLength.full) this.#pollSoon();
    else if (offset >= Place.mailbox && offset < Place.mailbox + Mailbox.length) this.#pollSoon();
  }

  #readRegister(offset: number, width: number): number {
    if (width !== 4) return 0;
    const { ready, inputControl } = OctepRegister;
    if (offset === ready || offset === ready + 4) return this.#ready[(offset - ready) >>> 2];
    if (offset !== inputControl + 4) return 0;
    return this.#interruptCount << InterruptCount.shift;
  }

  #writeRegister(offset: number, width: number, value: number): void {
    const at = offset - OctepRegister.ready;
    if (width === 4 && (at === 0 || at === 4)) this.#ready[at >>> 2] = value;
  }

  /** A notification: the firmware takes the upper half of the register, whatever was written. */
  #notified(offset: number): void {
    const index = Math.floor(offset / PAGE) - 1;
    const position = this.#positions[index];
    // The cause flag is the next word, and nothing is behind it.
    if (position === undefined || offset % PAGE >= CAUSE_FLAG) return;
    position.next = this.#get(PAGE * (1 + index) + 2, 2);
    this.#host.notified(index);
  }

  reach(index: number): { readonly next: number } {
    return this.#positions[index];
  }

  /**
   * For receive queues when one of them wanted interrupts as the device was started, whatever they want now; for others while they want them, but never
   * with the firmware of 2024.
   */
  interruptQueue(index: number): void {
    // hot:
    const receives = index % 2 === 0 && index < this.#options.dataQueues;
    const wanted = receives ? this.#interrupts : !this.#inTurn && this.#host.wantsInterrupts(index);
    if (!wanted || this.#interruptCount === 0) return;
    this.#memory[PAGE * (1 + index) + CAUSE_FLAG] = 1;
    this.#host.fire((this.#inTurn ? index >>> 1 : index) % this.#interruptCount);
  }

  #receiversWantInterrupts(): boolean {
    for (let index = 0; index < this.#options.dataQueues; index += 2)
      if (this.#host.wantsInterrupts(index)) return true;
    return false;
  }

  interruptConfig(needsReset: boolean): void {
    if (needsReset) {
      const at = Place.common + F.deviceStatus;
      this.#memory[at] |= DeviceStatus.DEVICE_NEEDS_RESET;
      this.#seen[F.deviceStatus] = this.#memory[at];
    }
    this.#memory[Place.isr] = IsrBit.CONFIG;
    this.#host.fire(0);
  }

  queueEnabled(): void {
    if (this.#started) this.#interrupts ||= this.#receiversWantInterrupts();
  }

  /** As after power on: the firmware runs, and the driver of the physical function has left its mark. */
  reset(): void {
    this.close();
    const { faults } = this.#options;
    this.#memory.fill(0);
    this.#ready.fill(0);
    if (faults.has('octep-not-ready')) return;
    if (faults.has('octep-ready-late')) this.#lateTimer = setTimeout(() => this.#boot(), LATE_MS);
    else this.#boot();
  }

  close(): void {
    if (this.#timer !== null) clearTimeout(this.#timer);
    if (this.#lateTimer !== null) clearTimeout(this.#lateTimer);
    this.#timer = null;
    this.#lateTimer = null;
  }

  #boot(): void {
    const { faults } = this.#options;
    if (!faults.has('octep-ready-taken')) this.#ready[0] = READY_MARK;
    if (!faults.has('octep-no-signature')) writeWindow(this.#memory, this.#options.queues, faults);
    this.#defaults();
  }

  /** The common configuration after a reset. */
  #defaults(): void {
    const { registers } = this.#host;
    this.#memory.fill(0, Place.common, Place.common + CommonCfgLength.full);
    this.#field(F.deviceFeatureSelect, 4, NO_SELECTION);
    this.#field(F.driverFeatureSelect, 4, NO_SELECTION);
    this.#field(F.numQueues, 2, registers.read(F.numQueues, 2));
    this.#field(F.adminQueueIndex, 2, registers.read(F.adminQueueIndex, 2));
    this.#field(F.adminQueueNum, 2, registers.read(F.adminQueueNum, 2));
    this.#memory[Place.isr] = 0;
    this.#queues.clear();
    this.#selectedQueue = NONE;
    this.#driverWord = NONE;
    this.#selectPolls = 0;
    this.#startPolls = 0;
    this.#started = false;
    this.#interrupts = false;
    for (const [index, position] of this.#positions.entries()) {
      position.next = START;
      this.#put(PAGE * (1 + index), 4, START * 0x10000);
      this.#put(PAGE * (1 + index) + CAUSE_FLAG, 4, 0);
    }
    this.#remember();
  }

  #pollSoon(): void {
    if (this.#timer !== null) return;
    this.#timer = setTimeout(() => {
      this.#timer = null;
      this.#poll();
    }, POLL_MS);
  }

  /** One look of the firmware at the common configuration. */
  #poll(): void {
    const { faults } = this.#options;
    if (this.#isEmpty()) return;
    if (!faults.has('octep-select-ignored')) {
      this.#pollDeviceFeatures();
      this.#pollDriverFeatures();
    }
    this.#pollQueue();
    this.#pollStatus();
    answerMailbox(this.#memory);
    if (!faults.has('octep-queue-ignored')) this.#pollQueueSelect();
    // Whatever else was written is what it is.
    const pending = this.#selectPolls > 0 || this.#startPolls > 0;
    if (pending) this.#pollSoon();
  }

  /** The firmware does not run. */
  #isEmpty(): boolean {
    return this.#get(OctepWindow.signature, 4) !== WINDOW_SIGNATURE[0];
  }

  #pollDeviceFeatures(): void {
    const select = this.#common(F.deviceFeatureSelect, 4);
    if (select === NO_SELECTION || (select & AcknowledgeBit.select) === 0) return;
    const word = select & ~AcknowledgeBit.select;
    // Firmware that does not know a word leaves the one before it where it is.
    if (word < this.#options.featureWords) {
      this.#host.registers.write(F.deviceFeatureSelect, 4, word);
      this.#field(F.deviceFeature, 4, this.#host.registers.read(F.deviceFeature, 4));
    }
    this.#field(F.deviceFeatureSelect, 4, word);
  }

  #pollDriverFeatures(): void {
    this.#keepDriverFeatures();
    const select = this.#common(F.driverFeatureSelect, 4);
    if (select === NO_SELECTION || (select & AcknowledgeBit.select) === 0) return;
    const word = select & ~AcknowledgeBit.select;
    this.#driverWord = word;
    if (word < this.#options.featureWords) {
      this.#host.registers.write(F.driverFeatureSelect, 4, word);
      this.#field(F.driverFeature, 4, this.#host.registers.read(F.driverFeature, 4));
    }
    this.#field(F.driverFeatureSelect, 4, word);
  }

  /** What the driver has written belongs to the word that was selected last. */
  #keepDriverFeatures(): void {
    const value = this.#common(F.driverFeature, 4);
    if (this.#driverWord === NONE || this.#driverWord >= this.#options.featureWords) return;
    if (value === get(this.#seen, F.driverFeature, 4)) return;
    this.#host.registers.write(F.driverFeature, 4, value);
    this.#field(F.driverFeature, 4, value);
  }

  /** Keeps the registers of the selected queue, and enables it when that was written. */
  #pollQueue(): void {
    const index = this.#selectedQueue;
    if (index === NONE) return;
    const values = QUEUE_FIELDS.map(([at, width]) => this.#common(at, width));
    this.#queues.set(index, values);
    const enable = this.#common(F.queueEnable, 2);
    if (enable === get(this.#seen, F.queueEnable, 2)) return;
    put(this.#seen, F.queueEnable, 2, enable);
    const { registers } = this.#host;
    if (enable !== 1 || index >= this.#options.queues) return;
    registers.write(F.queueSelect, 2, index);
    for (const [i, [at, width]] of QUEUE_FIELDS.entries()) {
      if (at !== F.queueMsixVector) registers.write(at, width, values[i]);
    }
    registers.write(F.queueEnable, 2, 1);
  }

  #pollStatus(): void {
    const value = this.#common(F.deviceStatus, 1);
    if (value === this.#seen[F.deviceStatus] && this.#startPolls === 0) return;
    const status = value & STATUS_MASK;
    if (status === 0) {
      if (this.#options.faults.has('octep-reset-ignored')) return;
      this.#host.registers.write(F.deviceStatus, 1, 0);
      this.#defaults();
      return;
    }
    this.#seen[F.deviceStatus] = value;
    const { registers } = this.#host;
    const early = status & ~DeviceStatus.DRIVER_OK & ~DeviceStatus.DEVICE_NEEDS_RESET;
    if (early !== 0) registers.write(F.deviceStatus, 1, early);
    if ((status & DeviceStatus.DRIVER_OK) === 0 || this.#started) return;
    // Writes are not seen in order: the firmware looks a few times more before it starts.
    if (++this.#startPolls <= DELAY.driverOk) return;
    this.#startPolls = 0;
    this.#started = true;
    this.#interrupts = this.#receiversWantInterrupts();
    registers.write(F.deviceStatus, 1, status & ~DeviceStatus.DEVICE_NEEDS_RESET);
  }

  #pollQueueSelect(): void {
    const select = this.#common(F.queueSelect, 2);
    if ((select & AcknowledgeBit.select) === 0) return;
    if (++this.#selectPolls <= DELAY.queueSelect) return;
    this.#selectPolls = 0;
    const index = select & ~AcknowledgeBit.select;
    // The firmware has no such queue, and says nothing.
    if (index >= OCTEP_MAX_QUEUES) return;
    if (index !== this.#selectedQueue) this.#load(index);
    this.#field(F.queueSelect, 2, index);
  }

  /** Puts the registers of queue `index` into the window. */
  #load(index: number): void {
    const { registers } = this.#host;
    this.#selectedQueue = index;
    const kept = this.#queues.get(index);
    for (const [i, [at, width]] of QUEUE_FIELDS.entries()) {
      this.#field(at, width, kept?.[i] ?? (at === F.queueSize ? OCTEP_QUEUE_SIZE : 0));
    }
    registers.write(F.queueSelect, 2, index);
    this.#field(F.queueEnable, 2, index < this.#options.queues ? registers.read(F.queueEnable, 2) : 0);
    this.#field(F.queueNotifyOff, 2, index);
  }

  /** Writes a field of the common configuration so that the firmware does not take it for the driver's doing. */
  #field(at: number, width: number, value: number): void {
    this.#put(Place.common + at, width, value);
    put(this.#seen, at, width, value);
  }

  #common(at: number, width: number): number {
    return this.#get(Place.common + at, width);
  }

  #remember(): void {
    this.#seen.set(this.#memory.subarray(Place.common, Place.common + CommonCfgLength.full));
  }

  #get(at: number, width: number): number {
    return get(this.#memory, at, width);
  }

  #put(at: number, width: number, value: number): void {
    put(this.#memory, at, width, value);
  }
}

/** Whether the driver sees that something is still to be acknowledged. */
function isAwaited(at: number, value: number): boolean {
  if (at === F.deviceStatus) return value === AcknowledgeBit.reset;
  if (at !== F.deviceFeatureSelect && at !== F.driverFeatureSelect && at !== F.queueSelect) return false;
  return value !== NO_SELECTION && (value & AcknowledgeBit.select) !== 0;
}
