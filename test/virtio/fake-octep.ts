/** An octeon_ep class function in memory: the device's own window and registers behind the interface of a PCI function. */
import { CommonConfig, type QueueConfig } from '../../src/device/common-config.ts';
import { ConfigSpace, type PciLayout } from '../../src/device/pci.ts';
import { OCTEP_QUEUE_SIZE, octepFeatures, octepLayout, octepQueueCount } from '../../src/device/personalities/octep.ts';
import type { OctepFault } from '../../src/device/personalities/octep-faults.ts';
import { FirmwareWindow } from '../../src/device/personalities/octep-window.ts';
import type { PciFunction, Region } from '../../src/vfio/function.ts';
import type { FeatureSet } from '../../src/virtio/features.ts';
import { TestMemory } from '../virtqueue/support.ts';

/** Where the published firmware puts the common configuration, and the notifications of a queue. */
export const COMMON = 0x90;
export const ISR = 0xd0;
export const CONFIG = 0x100;
export const notifyAt = (queue: number): number => 0x1000 * (1 + queue);

export interface FakeOctepOptions {
  readonly faults?: readonly OctepFault[];
  readonly ipsec?: boolean;
  readonly queuePairs?: number;
}

export class FakeOctep implements PciFunction {
  readonly address = 'fake-octep:0';
  readonly memory = new TestMemory();
  readonly behindIommu = false;
  readonly iovaRanges = [{ start: 0, last: 2 ** 48 - 1 }];
  interruptVectors = 8;
  gone = false;
  readonly layout: PciLayout;
  readonly offered: FeatureSet;
  readonly common: CommonConfig;
  readonly window: FirmwareWindow;
  readonly space: ConfigSpace;
  /** What the firmware did: `reset`, `features`, `enabled 0`, `started`, `notified 1`, `fired 2`. */
  readonly log: string[] = [];
  /** `w16 0x4 0x8000`: accesses to BAR 4. */
  readonly accesses: string[] = [];
  readonly enabled: QueueConfig[] = [];
  /** Whether receive queues want interrupts. */
  wanted = true;
  /** The device configuration. */
  readonly config64 = Uint8Array.from({ length: 64 }, (_, i) => i);

  constructor(options: FakeOctepOptions = {}) {
    const { ipsec = false, queuePairs = 2 } = options;
    const faults = new Set(options.faults);
    this.layout = octepLayout({ queuePairs, ipsec }, faults);
    this.offered = octepFeatures({ queuePairs, ipsec, wire: 'virtio-1.4', rings: 'packed' }, faults);
    this.space = new ConfigSpace(this.layout, {
      functionLevelReset: () => {},
      msixControl: () => {},
      readBar: () => 0,
      writeBar: () => {},
    });
    const queues = octepQueueCount({ queuePairs, ipsec });
    this.common = new CommonConfig(
      {
        offered: this.offered,
        queues: 2 * queuePairs + 1,
        adminQueues: ipsec ? 1 : 0,
        maxQueueSize: () => OCTEP_QUEUE_SIZE,
        vectors: 8,
      },
      {
        reset: () => this.log.push('reset'),
        acceptsFeatures: () => true,
        driverOk: () => this.log.push('started'),
        queueEnabled: (queue) => {
          this.enabled.push({ ...queue, words: queue.words.slice() });
          this.log.push(`enabled ${queue.index}`);
          this.window.queueEnabled();
        },
        queueReset: () => {},
      },
    );
    this.window = new FirmwareWindow(
      {
        registers: this.common,
        readConfig: (at) => {
          this.common.configRead();
          return this.config64[at];
        },
        notified: (index) => this.log.push(`notified ${index}`),
        fire: (vector) => this.log.push(`fired ${vector}`),
        wantsInterrupts: () => this.wanted,
      },
      {
        size: this.layout.bars[4].size,
        dataQueues: 2 * queuePairs,
        queues,
        featureWords: ipsec ? 4 : 2,
        faults,
      },
    );
    this.window.reset();
  }

  get config(): Region {
    return {
      index: 7,
      size: 4096,
      read8: (at) => number(this.space.read(at, 1)),
      read16: (at) => number(this.space.read(at, 2)),
      read32: (at) => number(this.space.read(at, 4)),
      write8: (at, value) => this.space.write(at, bytes(value, 1)),
      write16: (at, value) => this.space.write(at, bytes(value, 2)),
      write32: (at, value) => this.space.write(at, bytes(value, 4)),
    };
  }

  bar(index: number): Region {
    const size = this.layout.bars[index]?.size ?? 0;
    const check = (at: number, width: number) => {
      if (at % width !== 0 || at + width > size) throw new Error(`access of ${width} at ${at} of BAR ${index}`);
    };
    const read = (width: number) => (at: number) => {
      check(at, width);
      return this.window.read(index, at, width);
    };
    const write = (width: number) => (at: number, value: number) => {
      check(at, width);
      if (index === 4) this.accesses.push(`w${8 * width} 0x${at.toString(16)} 0x${value.toString(16)}`);
      this.window.write(index, at, width, value);
    };
    return {
      index,
      size,
      read8: read(1),
      read16: read(2),
      read32: read(4),
      write8: write(1),
      write16: write(2),
      write32: write(4),
    };
  }

  allocateDma(size: number) {
    return this.memory.allocateDma(size);
  }

  freeDma(memory: ReturnType<TestMemory['allocateDma']>): void {
    this.memory.freeDma(memory);
  }

  setInterrupts(): void {}
  reset(): void {}
  close(): void {
    this.window.close();
  }
}

function number(data: Uint8Array): number {
  return data.reduceRight((value, byte) => value * 256 + byte, 0);
}

function bytes(value: number, width: number): Uint8Array {
  return Uint8Array.from({ length: width }, (_, i) => value >>> (8 * i));
}
