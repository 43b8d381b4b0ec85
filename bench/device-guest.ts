/** The software device without a socket, as benchmarks drive it: guest memory, and the steps of the initialisation. */
import type { VirtioFunction } from '../src/device/function.ts';
import { ftruncate, memfdCreate } from '../src/sys/libc.ts';
import { type DmaMemory, type MappedMemory, mapShared, roundToPages, unmapMemory } from '../src/sys/memory.ts';
import type { FeatureSet } from '../src/virtio/features.ts';
import { CommonCfgField, DeviceStatus } from '../src/virtio/pci-layout.ts';
import type { SplitVirtqueue } from '../src/virtqueue/split.ts';

const IOVA = 0x10_0000;
const CONFIG_COMMAND = 4;
const MEMORY_AND_MASTER = 6;
const BAR = 0;

/** Guest memory: files that the device has mapped, as they are with a driver in another process. */
export class Guest {
  readonly #fn: VirtioFunction;
  readonly #pieces: MappedMemory[] = [];
  #top = IOVA;

  constructor(fn: VirtioFunction) {
    this.#fn = fn;
  }

  allocate(size: number): DmaMemory {
    const bytes = roundToPages(size);
    const fd = memfdCreate('bench');
    ftruncate(fd, bytes);
    const memory = mapShared(fd, 0, bytes, { write: true });
    this.#pieces.push(memory);
    const iova = this.#top;
    this.#top += bytes;
    // The device owns the descriptor from here on.
    this.#fn.memory.map(iova, bytes, fd, 0, true);
    return { ...memory, iova, iovaLow: iova, iovaHigh: 0 };
  }

  close(): void {
    for (const memory of this.#pieces) unmapMemory(memory);
  }
}

/** Steps 1 to 8 of the initialisation (Virtio 1.4, 3.1). */
export function initialize(fn: VirtioFunction, features: FeatureSet, rings: readonly SplitVirtqueue[]): void {
  const F = CommonCfgField;
  const write = (at: number, width: number, value: number) => fn.writeBar(BAR, at, width, value);
  fn.writeConfig(CONFIG_COMMAND, Uint8Array.of(MEMORY_AND_MASTER, 0));
  const { ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK } = DeviceStatus;
  write(F.deviceStatus, 1, ACKNOWLEDGE | DRIVER);
  for (const [word, bits] of features.words.entries()) {
    write(F.driverFeatureSelect, 4, word);
    write(F.driverFeature, 4, bits);
  }
  write(F.deviceStatus, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK);
  for (const ring of rings) {
    write(F.queueSelect, 2, ring.index);
    write(F.queueSize, 2, ring.size);
    write(F.queueDesc, 4, ring.descriptorArea);
    write(F.queueDriver, 4, ring.driverArea);
    write(F.queueDevice, 4, ring.deviceArea);
    write(F.queueEnable, 2, 1);
  }
  write(F.deviceStatus, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
  if (!fn.isLive) throw new Error('the function is not live');
}
