/**
 * A virtio function as a PCI device shows it: configuration space, BARs, interrupts, reset. What it is a function of
 * is the `DeviceModel` behind it.
 *
 * Everything a driver can reach comes in through `readConfig`, `writeConfig`, `readBar`, `writeBar` and guest memory;
 * none of them throws for anything a driver does.
 */

import { Feature, type FeatureSet } from '../virtio/features.ts';
import { CommonCfgLength, IsrBit, NO_VECTOR } from '../virtio/pci-layout.ts';
import { CommonConfig, type QueueConfig, queueAddresses } from './common-config.ts';
import { applyLayoutFaults } from './fault-hooks.ts';
import { FaultyQueue } from './fault-queue.ts';
import { configFaults, type Registers, withRegisterFaults } from './fault-registers.ts';
import type { FaultSet } from './faults.ts';
import type { GuestMemory } from './guest-memory.ts';
import { Msix } from './msix.ts';
import { NET_CONFIG_SIZE } from './net-config.ts';
import { PackedDeviceQueue } from './packed-queue.ts';
import { Command, ConfigSpace, MsixControl, type PciLayout } from './pci.ts';
import { MsixBar, VirtioBar } from './personalities/standard.ts';
import type { DeviceQueue, QueueOptions } from './queues.ts';
import { SplitDeviceQueue } from './split-queue.ts';

/** What a function does, between DRIVER_OK and reset. */
export interface DeviceModel {
  /** Whether these features, a consistent subset of those offered, are enough to work with. */
  acceptsFeatures(features: FeatureSet): boolean;
  /** DRIVER_OK. */
  start(features: FeatureSet): void;
  /** Reset: forget the driver and everything it made. Also called when nothing was started. */
  stop(): void;
  /** Queue `index` can be used from now on; `started` may still be to come. */
  attachQueue(queue: DeviceQueue): void;
  /** Queue `index` is reset: it is not touched any more. */
  detachQueue(index: number): void;
  /** The driver has notified of buffers in queue `index`, which may be any number. */
  notified(index: number): void;
  /** Device-specific configuration; `width` is 1, 2 or 4. */
  readConfig(offset: number, width: number): number;
}

/**
 * What a personality puts in the place of the standard's BARs and interrupts: everything a driver reaches but configuration space and MSI-X.
 * Its queues are packed, whatever was negotiated, and go only as far as the driver has notified.
 */
export interface RegisterWindow {
  read(bar: number, offset: number, width: number): number;
  write(bar: number, offset: number, width: number, value: number): void;
  /** How far queue `index` goes: `next_off` and `next_wrap` of the last notification (2.9). */
  reach(index: number): { readonly next: number };
  /** hot: a used buffer notification. */
  interruptQueue(index: number): void;
  interruptConfig(needsReset: boolean): void;
  /** A queue was attached. */
  queueEnabled(): void;
  /** Function-level reset, or a new session. */
  reset(): void;
  close(): void;
}

/** What a window needs of its function. */
export interface WindowHost {
  readonly registers: Registers;
  /** A byte of the device-specific configuration. */
  readConfig(at: number): number;
  /** Queue `index` was notified. */
  notified(index: number): void;
  fire(vector: number): void;
  /** Whether the driver wants interrupts of queue `index` now. */
  wantsInterrupts(index: number): boolean;
}

export interface VirtioFunctionOptions {
  readonly layout: PciLayout;
  readonly offered: FeatureSet;
  /** Virtqueues without and with administration. */
  readonly queues: number;
  readonly adminQueues: number;
  maxQueueSize(index: number): number;
  readonly faults: FaultSet;
  /** Makes the event loop poll this function. */
  readonly wake: () => void;
  /** Registers other than those of the standard. */
  readonly window?: (host: WindowHost) => RegisterWindow;
}

export class VirtioFunction {
  readonly memory: GuestMemory;
  readonly config: ConfigSpace;
  readonly msix: Msix;
  readonly common: CommonConfig;
  readonly faults: FaultSet;
  /** Virtqueues, those for administration included. */
  readonly queueCount: number;
  /** Why the function needs a reset; null while all is well. */
  failure: string | null = null;
  readonly #options: VirtioFunctionOptions;
  readonly #scratch: number;
  readonly #scratchSize: number;
  /** The common configuration, with its faults. */
  readonly #registers: Registers;
  readonly #configFaults: ReturnType<typeof configFaults>;
  readonly #window: RegisterWindow | null;
  /** Only with a window: the queues that are attached. */
  readonly #packed = new Map<number, PackedDeviceQueue>();
  #model: DeviceModel | null = null;
  #isr = 0;
  #notifications = 0;
  /** Queues that the driver has reset, for a fault. */
  readonly #wasReset = new Set<number>();
  /** Faults: queues are worked on whatever device_status says. */
  readonly #undead: boolean;

  constructor(memory: GuestMemory, options: VirtioFunctionOptions) {
    this.memory = memory;
    this.faults = options.faults;
    this.#undead = this.faults.has('reset-keeps-queues') || this.faults.has('early-start');
    this.#options = options;
    this.queueCount = options.queues + options.adminQueues;
    this.#scratchSize = MAX_QUEUE_BYTES;
    this.#scratch = memory.arena.allocate(this.#scratchSize);
    this.config = new ConfigSpace(options.layout, {
      functionLevelReset: () => this.reset(),
      msixControl: () => this.#msixControl(),
      readBar: (bar, offset, width) => (this.faults.has('pci-cfg-read') ? 0 : this.readBar(bar, offset, width)),
      writeBar: (bar, offset, width, value) => {
        if (!this.faults.has('pci-cfg-write')) this.writeBar(bar, offset, width, value);
      },
    });
    this.msix = new Msix(options.layout.msix.vectors);
    this.common = new CommonConfig(
      {
        offered: options.offered,
        queues: options.queues,
        adminQueues: options.adminQueues,
        maxQueueSize: (index) => options.maxQueueSize(index),
        vectors: options.layout.msix.vectors,
      },
      {
        reset: () => this.#stop(),
        acceptsFeatures: (features) =>
          !this.faults.has('features-ok-refused') && this.#device.acceptsFeatures(features),
        driverOk: () => this.#start(),
        queueEnabled: (queue) => this.#enable(queue),
        queueReset: (queue) => this.#resetQueue(queue.index),
      },
    );
    this.#registers = withRegisterFaults(this.common, this.faults);
    this.#configFaults = configFaults(this.faults);
    this.#window = options.window?.(this.#windowHost()) ?? null;
    if (this.#window === null) applyLayoutFaults(this.config, this.faults);
  }

  #windowHost(): WindowHost {
    return {
      registers: this.#registers,
      readConfig: (at) => (at < NET_CONFIG_SIZE ? this.#readDeviceConfig(at, 1) : 0),
      notified: (index) => this.kick(index),
      fire: (vector) => this.msix.fire(vector),
      wantsInterrupts: (index) => this.#packed.get(index)?.wantsInterrupts() ?? false,
    };
  }

  /** Whether notifications go to registers of the standard's kind. */
  get hasStandardRegisters(): boolean {
    return this.#window === null;
  }

  /** Connects the model; once, before anything else. */
  set model(model: DeviceModel) {
    this.#model = model;
  }

  get #device(): DeviceModel {
    if (this.#model === null) throw new Error('a function without a model');
    return this.#model;
  }

  /** hot: whether queues may be worked on: the driver is ready, and the function may do DMA. */
  get isLive(): boolean {
    return (this.common.isLive || this.#undead) && (this.config.bytes[COMMAND_BYTE] & Command.busMaster) !== 0;
  }

  /**
   * Function-level reset, DEVICE_RESET, or the end of a session: everything as it was made. Guest memory stays
   * mapped.
   */
  reset(): void {
    this.common.clear();
    this.#stop();
    this.config.reset();
    this.msix.reset();
    this.#syncMsixControl();
    this.#window?.reset();
  }

  close(): void {
    this.reset();
    this.#window?.close();
    this.msix.disconnectAll();
    this.memory.clear();
    this.memory.arena.release(this.#scratch, this.#scratchSize);
  }

  readConfig(offset: number, length: number): Uint8Array {
    return this.config.read(offset, length);
  }

  writeConfig(offset: number, data: Uint8Array): void {
    const busMaster = this.config.command & Command.busMaster;
    this.config.write(offset, data);
    if ((this.config.command & Command.busMaster) !== busMaster) this.#options.wake();
  }

  /** Sets the MSI-X enable bit as a client does that sets eventfds for vectors, or takes the last one away. */
  msixConnected(): void {
    let any = false;
    for (let v = 0; v < this.msix.vectors; v++) any ||= this.msix.isConnected(v);
    this.msix.setControl(any, this.msix.functionMasked);
    this.#syncMsixControl();
  }

  /** Reads `width` (1, 2, 4) bytes at an aligned offset inside a BAR. */
  readBar(bar: number, offset: number, width: number): number {
    const nothing = width === 1 ? 0xff : width === 2 ? 0xffff : 0xffffffff;
    if (bar === MsixBar.index) return this.#readMsix(offset, width);
    if (this.#window !== null) return this.#window.read(bar, offset, width);
    if (bar !== VirtioBar.index) return nothing;
    if (offset < VirtioBar.common + CommonCfgLength.full) return this.#registers.read(offset - VirtioBar.common, width);
    if (offset === VirtioBar.isr) return this.#readIsr();
    if (offset >= VirtioBar.device && offset < VirtioBar.device + NET_CONFIG_SIZE) {
      return this.#readDeviceConfig(offset - VirtioBar.device, width);
    }
    return 0;
  }

  #readDeviceConfig(at: number, width: number): number {
    if (this.faults.has('config-unstable')) this.common.configChanged();
    this.common.configRead();
    const value = this.#device.readConfig(at, width);
    return this.#configFaults?.(at, value, this.common.status) ?? value;
  }

  writeBar(bar: number, offset: number, width: number, value: number): void {
    if (bar === MsixBar.index) {
      if (width === 4 && offset + 4 <= this.msix.tableSize) this.msix.writeTable(offset, value);
      return;
    }
    if (this.#window !== null) {
      this.#window.write(bar, offset, width, value);
      return;
    }
    if (bar !== VirtioBar.index) return;
    if (offset < VirtioBar.common + CommonCfgLength.full)
      this.#registers.write(offset - VirtioBar.common, width, value);
    else if (offset >= VirtioBar.notify && width >= 2) this.#notified(offset - VirtioBar.notify, width, value);
    else this.common.violations++;
  }

  /** An available buffer notification. */
  #notified(at: number, width: number, value: number): void {
    const queue = Math.floor(at / VirtioBar.notifyMultiplier);
    this.common.checkNotification(queue, width, value);
    this.kick(queue);
  }

  /** The driver has notified queue `queue`, by its register or by the eventfd that stands for it. */
  kick(queue: number): void {
    this.#device.notified(queue);
    if (this.faults.has('notifications-fatal') && ++this.#notifications > MANY) this.fail('fault notifications-fatal');
    this.#options.wake();
  }

  /** The driver broke a rule that cannot be refused, or the device cannot go on: DEVICE_NEEDS_RESET (2.1.2). */
  fail(reason: string): void {
    this.failure ??= reason;
    if (this.common.needsReset()) this.#interruptConfig(true);
  }

  /** The device-specific configuration is not what it was: tells the driver (4.1.5.4). */
  configChanged(): void {
    this.common.configChanged();
    if (this.common.isLive) this.#interruptConfig(false);
  }

  /** hot: a used buffer notification for queue `index` (4.1.5.3). */
  interruptQueue(index: number): void {
    if (this.faults.has('no-interrupts')) return;
    if (this.#window !== null) {
      this.#window.interruptQueue(index);
      return;
    }
    if (!this.msix.enabled) {
      if (!this.faults.has('isr-never')) this.#isr |= IsrBit.QUEUE;
      this.config.interruptStatus = !this.faults.has('interrupt-status-never');
      return;
    }
    const vector = this.common.queues[index].vector;
    if (vector !== NO_VECTOR) this.msix.fire(vector);
    else if (this.faults.has('interrupts-anyway')) this.msix.fire(0);
  }

  #interruptConfig(needsReset: boolean): void {
    if (this.#window !== null) {
      this.#window.interruptConfig(needsReset);
      return;
    }
    this.#isr |= IsrBit.CONFIG;
    if (!this.msix.enabled) this.config.interruptStatus = true;
    else if (this.common.configVector !== NO_VECTOR) this.msix.fire(this.common.configVector);
  }

  #readIsr(): number {
    const value = this.#isr;
    if (this.faults.has('isr-sticks')) return value;
    this.#isr = 0;
    this.config.interruptStatus = false;
    return value;
  }

  #readMsix(offset: number, width: number): number {
    if (offset + width <= MsixBar.table + this.msix.tableSize) {
      const word = this.msix.readTable(offset & ~3);
      const shifted = word >>> (8 * (offset & 3));
      return width === 4 ? shifted : shifted & ((1 << (8 * width)) - 1);
    }
    const pending = offset - MsixBar.pba;
    if (pending < 0 || pending + width > this.msix.pendingSize) return 0;
    let value = 0;
    for (let i = width - 1; i >= 0; i--) value = value * 256 + this.msix.readPending(pending + i);
    return value;
  }

  #msixControl(): void {
    const control = this.config.msixControl;
    this.msix.setControl((control & MsixControl.enable) !== 0, (control & MsixControl.functionMask) !== 0);
  }

  #syncMsixControl(): void {
    this.config.msixControl =
      (this.msix.enabled ? MsixControl.enable : 0) | (this.msix.functionMasked ? MsixControl.functionMask : 0);
  }

  #resetQueue(index: number): void {
    if (this.faults.has('queue-reset-half')) return;
    this.#wasReset.add(index);
    this.#device.detachQueue(index);
  }

  #enable(queue: QueueConfig): void {
    if (this.faults.has('queue-reset-for-good') && this.#wasReset.has(queue.index)) return;
    const features = this.common.features;
    const { faults, memory } = this;
    const addresses = queueAddresses(queue);
    const scratch = this.#scratch;
    const queueOptions: QueueOptions = {
      index: queue.index,
      size: faults.has('queue-size-sticks') ? queue.maxSize : queue.size,
      addresses,
      eventIdx: faults.has('event-idx-swapped') ? !features.has(Feature.EVENT_IDX) : features.has(Feature.EVENT_IDX),
      indirect: features.has(Feature.INDIRECT_DESC),
      // Faults lie about one buffer at a time.
      inOrder: features.has(Feature.IN_ORDER) && faults.size === 0,
      scratch,
    };
    const honest = this.#makeQueue(queueOptions);
    this.#device.attachQueue(
      faults.size === 0 ? honest : new FaultyQueue(honest, { faults, memory, addresses, scratch }),
    );
    if (this.faults.has('early-start')) this.#device.start(features);
    this.#window?.queueEnabled();
    this.#options.wake();
  }

  #makeQueue(options: QueueOptions): DeviceQueue {
    const { memory } = this;
    if (this.#window !== null) {
      const queue = new PackedDeviceQueue(memory, { ...options, reach: this.#window.reach(options.index) });
      this.#packed.set(options.index, queue);
      return queue;
    }
    const packed = this.common.features.has(Feature.RING_PACKED);
    return packed ? new PackedDeviceQueue(memory, options) : new SplitDeviceQueue(memory, options);
  }

  #start(): void {
    this.#device.start(this.common.features);
    if (this.faults.has('needs-reset-at-start')) this.fail('fault needs-reset-at-start');
    this.#options.wake();
  }

  #stop(): void {
    this.failure = null;
    this.#packed.clear();
    this.#wasReset.clear();
    this.#isr = 0;
    this.config.interruptStatus = false;
    if (this.faults.has('reset-keeps-queues')) {
      this.#options.wake();
      return;
    }
    for (const queue of this.common.queues) this.#device.detachQueue(queue.index);
    this.#device.stop();
  }
}

/** The command byte of the header that holds the bits we use. */
const COMMAND_BYTE = 0x04;
/** Room for the largest indirect table. */
const MAX_QUEUE_BYTES = 1024 * 16;
/** More notifications than this are too many for a fault. */
const MANY = 20;
