/**
 * A driver of a few lines for tests: it writes registers and rings by hand, so that it can also do everything that a
 * driver must not.
 */
import { eventfd, ftruncate, close as libcClose, memfdCreate } from '../../../src/sys/libc.ts';
import { type MappedMemory, mapShared, unmapMemory } from '../../../src/sys/memory.ts';
import * as protocol from '../../../src/vfio/protocol.ts';
import { FeatureSet } from '../../../src/virtio/features.ts';
import { CommonCfgField as F } from '../../../src/virtio/pci-layout.ts';
import { RawClient, until } from './raw-client.ts';
import '../../equality.ts';

export const GUEST_SIZE = 4 * 2 ** 20;
/** High enough that the upper half of an address matters. */
export const GUEST_IOVA = 0x1_4000_0000;
const BAR = 0;
const NOTIFY = 0x3000;
const CONFIG = 7;

/** One split virtqueue in guest memory. */
export class Ring {
  readonly memory: MappedMemory;
  readonly base: number;
  readonly size: number;
  readonly descriptors: number;
  readonly avail: number;
  readonly used: number;
  nextAvail = 0;
  nextUsed = 0;

  /** `base` is an offset in guest memory, a multiple of 4096. */
  constructor(memory: MappedMemory, base: number, size: number) {
    this.memory = memory;
    this.base = base;
    this.size = size;
    this.descriptors = base;
    this.avail = base + size * 16;
    this.used = Math.ceil((this.avail + 6 + 2 * size) / 4096) * 4096;
  }

  get end(): number {
    return this.used + 6 + 8 * this.size;
  }

  descriptor(index: number, offset: number, length: number, flags: number, next = 0, iova = GUEST_IOVA): void {
    const at = (this.descriptors + index * 16) >>> 2;
    const address = iova + offset;
    this.memory.u32[at] = address;
    this.memory.u32[at + 1] = Math.floor(address / 2 ** 32);
    this.memory.u32[at + 2] = length;
    this.memory.u32[at + 3] = (flags & 0xffff) | (next << 16);
  }

  /** Makes the chain at `head` available. */
  offer(head: number): void {
    this.memory.u16[(this.avail >>> 1) + 2 + (this.nextAvail % this.size)] = head;
    this.nextAvail = (this.nextAvail + 1) & 0xffff;
    Atomics.store(this.memory.u16, (this.avail >>> 1) + 1, this.nextAvail);
  }

  get usedIndex(): number {
    return Atomics.load(this.memory.u16, (this.used >>> 1) + 1);
  }

  /** The next used entry; null when there is none. */
  take(): { id: number; length: number } | null {
    if (this.usedIndex === this.nextUsed) return null;
    const at = (this.used + 4 + (this.nextUsed % this.size) * 8) >>> 2;
    this.nextUsed = (this.nextUsed + 1) & 0xffff;
    return { id: this.memory.u32[at], length: this.memory.u32[at + 1] };
  }

  async wait(timeout = 3000): Promise<{ id: number; length: number }> {
    await until('a used buffer', () => this.usedIndex !== this.nextUsed, timeout);
    const entry = this.take();
    if (entry === null) throw new Error('unreachable');
    return entry;
  }
}

export class MiniDriver {
  readonly client: RawClient;
  readonly memory: MappedMemory;
  readonly fd: number;
  readonly eventfds: number[] = [];
  #top = 0;

  private constructor(client: RawClient) {
    this.client = client;
    this.fd = memfdCreate('guest');
    ftruncate(this.fd, GUEST_SIZE);
    this.memory = mapShared(this.fd, 0, GUEST_SIZE, { write: true });
  }

  /** Connects, maps memory, enables memory space and bus mastering. */
  static async open(path: string): Promise<MiniDriver> {
    const driver = new MiniDriver(await RawClient.open(path));
    const errno = await driver.client.dmaMap(GUEST_IOVA, GUEST_SIZE, driver.fd);
    if (errno !== 0) throw new Error(`DMA_MAP: ${errno}`);
    await driver.client.write(CONFIG, 4, 2, 6);
    return driver;
  }

  /** Offset of `size` bytes of guest memory that nobody else has. */
  allocate(size: number, align = 4096): number {
    const at = Math.ceil(this.#top / align) * align;
    this.#top = at + size;
    if (this.#top > GUEST_SIZE) throw new Error('guest memory is full');
    return at;
  }

  read(field: number, width: number): Promise<number> {
    return this.client.read(BAR, field, width);
  }

  write(field: number, width: number, value: number): Promise<void> {
    return this.client.write(BAR, field, width, value);
  }

  status(): Promise<number> {
    return this.read(F.deviceStatus, 1);
  }

  setStatus(value: number): Promise<void> {
    return this.write(F.deviceStatus, 1, value);
  }

  async offered(): Promise<FeatureSet> {
    const words: number[] = [];
    for (let word = 0; word < 4; word++) {
      await this.write(F.deviceFeatureSelect, 4, word);
      words.push(await this.read(F.deviceFeature, 4));
    }
    return FeatureSet.fromWords(words);
  }

  async accept(features: FeatureSet): Promise<void> {
    for (let word = 0; word < 4; word++) {
      await this.write(F.driverFeatureSelect, 4, word);
      await this.write(F.driverFeature, 4, features.words[word]);
    }
  }

  /** Steps 1 to 6; returns whether FEATURES_OK held. */
  async negotiate(features: FeatureSet): Promise<boolean> {
    await this.setStatus(0);
    await this.setStatus(1);
    await this.setStatus(3);
    await this.accept(features);
    await this.setStatus(11);
    return (await this.status()) === 11;
  }

  async queue(index: number, size: number, vector = 0xffff): Promise<Ring> {
    const ring = new Ring(this.memory, this.allocate(size * 16 + 4096 + size * 8 + 4096), size);
    this.memory.u8.fill(0, ring.base, ring.end);
    await this.configure(index, ring, vector);
    return ring;
  }

  async configure(index: number, ring: Ring, vector = 0xffff): Promise<void> {
    await this.write(F.queueSelect, 2, index);
    await this.write(F.queueSize, 2, ring.size);
    await this.write(F.queueMsixVector, 2, vector);
    for (const [field, offset] of [
      [F.queueDesc, ring.descriptors],
      [F.queueDriver, ring.avail],
      [F.queueDevice, ring.used],
    ]) {
      const address = GUEST_IOVA + offset;
      await this.write(field, 4, address % 2 ** 32);
      await this.write(field + 4, 4, Math.floor(address / 2 ** 32));
    }
    await this.write(F.queueEnable, 2, 1);
  }

  driverOk(): Promise<void> {
    return this.setStatus(15);
  }

  notify(index: number): Promise<void> {
    return this.client.write(BAR, NOTIFY + 4 * index, 2, index);
  }

  /** Connects `count` MSI-X vectors to eventfds. */
  async interrupts(count: number): Promise<void> {
    for (let i = 0; i < count; i++) this.eventfds.push(eventfd());
    const { dataEventfd, trigger } = protocol.SetIrqsFlag;
    const message = protocol.encodeSetIrqs({
      flags: dataEventfd | trigger,
      index: protocol.PciIrq.msix,
      start: 0,
      count,
      data: new Uint8Array(0),
    });
    const { error } = await this.client.request(message, this.eventfds);
    if (error !== 0) throw new Error(`SET_IRQS: ${error}`);
  }

  close(): void {
    this.client.close();
    for (const fd of this.eventfds.splice(0)) libcClose(fd);
    unmapMemory(this.memory);
    libcClose(this.fd);
  }
}
