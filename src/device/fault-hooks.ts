/** How the faults of `faults.ts` that concern configuration space and rings are made. */
import { VirtioCapField, VirtioCfgType } from '../virtio/pci-layout.ts';
import type { FaultSet } from './faults.ts';
import { CapabilityKind, ConfigField, type ConfigSpace } from './pci.ts';
import type { DeviceQueue } from './queues.ts';

/** Offsets of the capabilities, in the order of the list. */
function capabilities(config: ConfigSpace): number[] {
  const list: number[] = [];
  for (let at = config.bytes[ConfigField.capabilities]; at !== 0; at = config.bytes[at + VirtioCapField.next]) {
    list.push(at);
  }
  return list;
}

/** Breaks the capability list as told. */
export function applyLayoutFaults(config: ConfigSpace, faults: FaultSet): void {
  const list = capabilities(config);
  const last = list[list.length - 1];
  const structure = (type: number) =>
    list.find(
      (at) => config.bytes[at] === CapabilityKind.vendor && config.bytes[at + VirtioCapField.cfgType] === type,
    ) ?? last;
  const common = structure(VirtioCfgType.COMMON);
  if (faults.has('capability-loop')) config.patch(last + VirtioCapField.next, 1, list[0]);
  if (faults.has('capability-outside-config')) config.patch(last + VirtioCapField.next, 1, ConfigField.bar0);
  if (faults.has('capability-outside-bar')) config.patch(common + VirtioCapField.offset, 4, 0x7ffffff0);
  if (faults.has('no-common-config')) config.patch(common + VirtioCapField.cfgType, 1, 0x77);
  if (faults.has('capability-bad-bar')) config.patch(structure(VirtioCfgType.NOTIFY) + VirtioCapField.bar, 1, 5);
}

/** A queue that lies in its used ring. */
export class FaultyQueue implements DeviceQueue {
  readonly #inner: DeviceQueue;
  readonly #faults: FaultSet;

  constructor(inner: DeviceQueue, faults: FaultSet) {
    this.#inner = inner;
    this.#faults = faults;
  }

  get index(): number {
    return this.#inner.index;
  }
  get size(): number {
    return this.#inner.size;
  }
  get broken(): string | null {
    return this.#inner.broken;
  }
  get low(): Uint32Array {
    return this.#inner.low;
  }
  get high(): Uint32Array {
    return this.#inner.high;
  }
  get length(): Uint32Array {
    return this.#inner.length;
  }
  get readable(): number {
    return this.#inner.readable;
  }
  get segments(): number {
    return this.#inner.segments;
  }
  get readableBytes(): number {
    return this.#inner.readableBytes;
  }
  get writableBytes(): number {
    return this.#inner.writableBytes;
  }
  available(): number {
    return this.#inner.available();
  }
  take(): number {
    return this.#inner.take();
  }
  putBack(count: number): void {
    this.#inner.putBack(count);
  }
  gather(skip: number, max: number, to: number): number {
    return this.#inner.gather(skip, max, to);
  }
  scatter(skip: number, bytes: number, from: number): number {
    return this.#inner.scatter(skip, bytes, from);
  }

  complete(id: number, written: number): void {
    const shown = this.#faults.has('used-id-bogus') ? id + this.size : id;
    const length = this.#faults.has('used-length-too-long') ? written + 0x100000 : written;
    this.#inner.complete(shown, length);
    if (this.#faults.has('used-id-twice')) this.#inner.complete(shown, length);
    if (!this.#faults.has('used-index-jump')) return;
    for (let i = 0; i < this.size; i++) this.#inner.complete(id, 0);
  }

  publish(): boolean {
    return this.#inner.publish();
  }
  suppress(): void {
    this.#inner.suppress();
  }
  arm(seen: number): boolean {
    return this.#inner.arm(seen);
  }
  close(): void {
    this.#inner.close();
  }
}
