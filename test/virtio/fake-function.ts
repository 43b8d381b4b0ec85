/** A virtio PCI function in memory: configuration space, one BAR with registers that behave, and a log of accesses. */
import type { PciFunction, Region } from '../../src/vfio/function.ts';
import { FeatureSet } from '../../src/virtio/features.ts';
import { CommonCfgField, NO_VECTOR, VirtioCfgType } from '../../src/virtio/pci-layout.ts';
import { TestMemory } from '../virtqueue/support.ts';

export interface FakeCapability {
  readonly type: number;
  bar: number;
  offset: number;
  length: number;
  /** Bytes of the capability in configuration space. */
  readonly capLength: number;
  readonly multiplier?: number;
}

/** Where the structures are in BAR 4. */
export const Place = { common: 0x000, notify: 0x1000, isr: 0x2000, device: 0x3000 } as const;

export class FakeFunction implements PciFunction {
  readonly address = 'fake-pci:0';
  readonly memory = new TestMemory();
  readonly behindIommu = false;
  readonly iovaRanges = [{ start: 0, last: 2 ** 48 - 1 }];
  readonly interruptVectors = 3;
  gone = false;
  vendor = 0x1af4;
  device = 0x1041;
  subsystem = 0x1100;
  readonly capabilities: FakeCapability[] = [
    { type: VirtioCfgType.COMMON, bar: 4, offset: Place.common, length: 64, capLength: 16 },
    { type: VirtioCfgType.NOTIFY, bar: 4, offset: Place.notify, length: 0x100, capLength: 20, multiplier: 4 },
    { type: VirtioCfgType.ISR, bar: 4, offset: Place.isr, length: 1, capLength: 16 },
    { type: VirtioCfgType.DEVICE, bar: 4, offset: Place.device, length: 28, capLength: 16 },
  ];
  /** Makes the list of capabilities return to its start. */
  loop = false;
  readonly bar4 = new Uint8Array(0x4000);
  /** `r16 22`: width and offset in BAR 4. */
  readonly log: string[] = [];

  offered = FeatureSet.fromWords([0x80000001, 2, 3, 0x40000000]);
  readonly driverFeatures = [0, 0, 0, 0];
  readonly queueSizes = [8, 256, 16];
  /** Fields of each queue as the driver wrote them, by offset. */
  readonly queues = new Map<number, Map<number, number>>();
  adminIndex = 2;
  adminNum = 1;
  mapsVectors = true;
  enables = true;
  notifyOff = (queue: number) => queue;
  /** What queues are called in notifications (NOTIF_CONFIG_DATA). */
  notificationId = (queue: number) => 0x1230 + queue;
  /** Reads of queue_reset that still show 1 after a reset of a queue was asked for. */
  queueResetReads = 0;
  /** Called before each read of the device configuration: may change it and the generation. */
  onConfigRead: (offset: number) => void = () => {};
  readonly notifications: { offset: number; value: number }[] = [];

  get config(): Region {
    const space = new Uint8Array(256);
    const view = new DataView(space.buffer);
    view.setUint16(0, this.vendor, true);
    view.setUint16(2, this.device, true);
    view.setUint16(4, this.#command, true);
    view.setUint16(6, 0x10, true);
    view.setUint16(0x2e, this.subsystem, true);
    let at = 0x40;
    space[0x34] = at;
    for (const [i, cap] of this.capabilities.entries()) {
      const next = i + 1 < this.capabilities.length ? at + 0x20 : this.loop ? 0x40 : 0;
      space.set([9, next, cap.capLength, cap.type, cap.bar], at);
      view.setUint32(at + 8, cap.offset, true);
      view.setUint32(at + 12, cap.length, true);
      if (cap.capLength >= 20) view.setUint32(at + 16, cap.multiplier ?? 0, true);
      at += 0x20;
    }
    const write = (offset: number, value: number) => {
      if (offset === 4) this.#command = value;
    };
    return region(7, 256, (offset, width) => read(view, offset, width), write);
  }
  #command = 0;
  #resetting = 0;

  get command(): number {
    return this.#command;
  }

  bar(index: number): Region {
    if (index !== 4) return region(index, 0, unexpected, unexpected);
    const { bar4 } = this;
    const view = new DataView(bar4.buffer);
    return region(
      4,
      bar4.length,
      (offset, width) => {
        this.log.push(`r${width * 8} ${offset}`);
        const special = this.#readRegister(offset);
        if (special !== undefined) return special;
        if (offset >= Place.device) this.onConfigRead(offset - Place.device);
        return read(view, offset, width);
      },
      (offset, value, width) => {
        this.log.push(`w${width * 8} ${offset}`);
        this.#writeRegister(view, offset, value, width);
      },
    );
  }

  #selected(): number {
    return this.bar4[CommonCfgField.queueSelect] | (this.bar4[CommonCfgField.queueSelect + 1] << 8);
  }

  #queue(): Map<number, number> {
    const index = this.#selected();
    const queue = this.queues.get(index) ?? new Map<number, number>();
    this.queues.set(index, queue);
    return queue;
  }

  #readRegister(offset: number): number | undefined {
    const F = CommonCfgField;
    const select = this.bar4[F.deviceFeatureSelect];
    if (offset === F.deviceFeature) return this.offered.words[select] ?? 0;
    if (offset === F.numQueues) return 2;
    if (offset === F.adminQueueIndex) return this.adminIndex;
    if (offset === F.adminQueueNum) return this.adminNum;
    if (offset === F.queueSize) return this.#queue().get(offset) ?? this.queueSizes[this.#selected()] ?? 0;
    if (offset === F.queueNotifyOff) return this.notifyOff(this.#selected());
    if (offset === F.queueNotifConfigData) return this.notificationId(this.#selected());
    if (offset === F.queueReset) return this.#resetting > 0 && this.#resetting-- > 0 ? 1 : 0;
    if (offset === F.queueMsixVector) return this.mapsVectors ? (this.#queue().get(offset) ?? NO_VECTOR) : NO_VECTOR;
    if (offset === F.queueEnable) return this.enables ? (this.#queue().get(offset) ?? 0) : 0;
    return undefined;
  }

  #writeRegister(view: DataView, offset: number, value: number, width: number): void {
    const F = CommonCfgField;
    if (offset >= Place.notify && offset < Place.isr) this.notifications.push({ offset: offset - Place.notify, value });
    else if (offset === F.driverFeature) this.driverFeatures[this.bar4[F.driverFeatureSelect]] = value;
    else if (offset === F.queueReset) {
      this.#resetting = this.queueResetReads;
      this.queues.delete(this.#selected());
    } else if (offset > F.queueSelect && offset < F.queueNotifConfigData) this.#queue().set(offset, value);
    else if (width === 1) view.setUint8(offset, value);
    else if (width === 2) view.setUint16(offset, value, true);
    else view.setUint32(offset, value, true);
  }

  allocateDma(size: number) {
    return this.memory.allocateDma(size);
  }

  freeDma(memory: ReturnType<TestMemory['allocateDma']>): void {
    this.memory.freeDma(memory);
  }

  setInterrupts(): void {}
  reset(): void {}
  close(): void {}
}

function unexpected(): never {
  throw new Error('an access to a BAR that is not there');
}

function read(view: DataView, offset: number, width: number): number {
  if (width === 1) return view.getUint8(offset);
  return width === 2 ? view.getUint16(offset, true) : view.getUint32(offset, true);
}

/** Refuses what `Region` forbids: accesses that are not aligned or not inside. */
function region(
  index: number,
  size: number,
  onRead: (offset: number, width: number) => number,
  onWrite: (offset: number, value: number, width: number) => void,
): Region {
  const check = (offset: number, width: number) => {
    if (offset % width !== 0 || offset < 0 || offset + width > size) throw new Error(`access of ${width} at ${offset}`);
  };
  const reader = (width: number) => (offset: number) => {
    check(offset, width);
    return onRead(offset, width);
  };
  const writer = (width: number) => (offset: number, value: number) => {
    check(offset, width);
    if (!Number.isInteger(value) || value < 0 || value >= 2 ** (8 * width)) throw new Error(`value ${value}`);
    onWrite(offset, value, width);
  };
  return {
    index,
    size,
    read8: reader(1),
    read16: reader(2),
    read32: reader(4),
    write8: writer(1),
    write16: writer(2),
    write32: writer(4),
  };
}
