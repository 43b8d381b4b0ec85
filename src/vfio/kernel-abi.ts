/**
 * The kernel's VFIO interface, as far as one PCI function behind a type 1 IOMMU needs it: requests, structures and
 * capability chains of `linux/vfio.h`. Structures are laid out by hand in mapped memory; 64-bit fields are two u32.
 *
 * Left out: iommufd and device cdevs, dirty page tracking, migration, hot reset of a whole bus, INTx and MSI.
 */
import { VfioError } from '../errors.ts';
import { ioctl } from '../sys/libc.ts';
import { type MappedMemory, mapAnonymous, unmapMemory } from '../sys/memory.ts';

/** `_IO(';', 100 + n)`: VFIO's requests carry no size; each structure begins with its own (`argsz`). */
const request = (n: number) => (0x3b << 8) | (100 + n);

export const VfioRequest = {
  getApiVersion: request(0),
  checkExtension: request(1),
  setIommu: request(2),
  groupGetStatus: request(3),
  groupSetContainer: request(4),
  groupGetDeviceFd: request(6),
  deviceGetInfo: request(7),
  deviceGetRegionInfo: request(8),
  deviceGetIrqInfo: request(9),
  deviceSetIrqs: request(10),
  deviceReset: request(11),
  iommuGetInfo: request(12),
  iommuMapDma: request(13),
  iommuUnmapDma: request(14),
} as const;

export const VFIO_API_VERSION = 0;
/** Arguments of checkExtension and setIommu. */
export const IommuType = { type1v2: 3, noIommu: 8 } as const;
export const GroupFlag = { viable: 1, containerSet: 2 } as const;
export const DeviceFlag = { reset: 1, pci: 2 } as const;
export const RegionFlag = { read: 1, write: 2, mmap: 4, capabilities: 8 } as const;
const IommuInfoFlag = { pageSizes: 1, capabilities: 2 } as const;
const DmaFlag = { read: 1, write: 2 } as const;
/** Interrupt indices of a PCI function. */
export const IrqIndex = { msix: 2, error: 3, request: 4 } as const;
const IrqSetFlag = { dataNone: 1, dataEventfd: 4, actionTrigger: 0x20 } as const;
/** Ids in the capability chain of the IOMMU, and of a region. */
const IommuCapability = { iovaRange: 1 } as const;
const RegionCapability = { sparseMmap: 1 } as const;

/** Byte offsets. Every structure begins with argsz u32 @0 and flags u32 @4. */
const Info = { argsz: 0, flags: 4 } as const;
const DeviceInfo = { regions: 8, irqs: 12, size: 16 } as const;
const RegionInfo = { index: 8, capabilities: 12, length: 16, offset: 24, size: 32 } as const;
const IrqInfo = { index: 8, count: 12, size: 16 } as const;
const IrqSet = { index: 8, start: 12, count: 16, data: 20 } as const;
const IommuInfo = { pageSizes: 8, capabilities: 16, size: 24 } as const;
const DmaMap = { address: 8, iova: 16, length: 24, size: 32 } as const;
const DmaUnmap = { iova: 8, length: 16, size: 24 } as const;
/** A capability: id u16, version u16, next u32 (offset from the start of the structure, 0 ends the chain). */
const Capability = { id: 0, next: 4, size: 8 } as const;
/** Both lists: count u32, reserved u32, then pairs of u64. */
const PairList = { count: 8, pairs: 16, pairSize: 16 } as const;

const SCRATCH_SIZE = 16384;
const MAX_CAPABILITIES = 64;
const NAME_MAX = 64;
const TWO_32 = 2 ** 32;

export interface RegionDescription {
  readonly flags: number;
  /** Bytes. */
  readonly size: number;
  /** Where it lies in the device descriptor, for mmap, pread and pwrite. */
  readonly offset: number;
  /** The parts that can be mapped when not all of it can; empty without such a list. */
  readonly areas: readonly { readonly offset: number; readonly size: number }[];
}

export interface IommuDescription {
  /** Page sizes of the IOMMU: the smallest one, in bytes. */
  readonly pageSize: number;
  /** Inclusive ranges of addresses that can be mapped; empty when the kernel does not say (before 5.4). */
  readonly ranges: readonly { readonly start: number; readonly last: number }[];
}

/** The requests on a container, a group and a device, through one piece of scratch memory. */
export class VfioCalls {
  readonly #memory: MappedMemory;
  readonly #u32: Uint32Array;

  constructor() {
    this.#memory = mapAnonymous(SCRATCH_SIZE);
    this.#u32 = this.#memory.u32;
  }

  close(): void {
    unmapMemory(this.#memory);
  }

  apiVersion(container: number): number {
    return ioctl(container, VfioRequest.getApiVersion, 0);
  }

  hasExtension(container: number, extension: number): boolean {
    return ioctl(container, VfioRequest.checkExtension, extension) === 1;
  }

  setIommu(container: number, type: number): void {
    ioctl(container, VfioRequest.setIommu, type);
  }

  /** `GroupFlag` bits. */
  groupStatus(group: number): number {
    return this.#ask(group, VfioRequest.groupGetStatus, 8).flags;
  }

  setContainer(group: number, container: number): void {
    this.#u32[0] = container;
    ioctl(group, VfioRequest.groupSetContainer, this.#memory.address);
  }

  /** Opens function `address` of the group; returns its descriptor. */
  deviceFd(group: number, address: string): number {
    const { u8 } = this.#memory;
    u8.fill(0, 0, NAME_MAX);
    new TextEncoder().encodeInto(address, u8.subarray(0, NAME_MAX - 1));
    return ioctl(group, VfioRequest.groupGetDeviceFd, this.#memory.address);
  }

  deviceInfo(device: number): { flags: number; regions: number; irqs: number } {
    const { flags } = this.#ask(device, VfioRequest.deviceGetInfo, DeviceInfo.size);
    return { flags, regions: this.#read32(DeviceInfo.regions), irqs: this.#read32(DeviceInfo.irqs) };
  }

  regionInfo(device: number, index: number): RegionDescription {
    this.#write32(RegionInfo.index, index);
    const { flags, length } = this.#askAll(
      device,
      VfioRequest.deviceGetRegionInfo,
      RegionInfo.size,
      RegionInfo.index,
      index,
    );
    const areas: { offset: number; size: number }[] = [];
    if ((flags & RegionFlag.capabilities) !== 0) {
      const at = this.#findCapability(this.#read32(RegionInfo.capabilities), RegionCapability.sparseMmap, length);
      if (at !== 0) {
        for (const [offset, size] of this.#pairs(at, length)) if (size > 0) areas.push({ offset, size });
      }
    }
    return { flags, size: this.#read64(RegionInfo.length), offset: this.#read64(RegionInfo.offset), areas };
  }

  /** Number of vectors of interrupt `index`; 0 when the function has none. */
  irqCount(device: number, index: number): number {
    this.#write32(IrqInfo.index, index);
    this.#ask(device, VfioRequest.deviceGetIrqInfo, IrqInfo.size);
    return this.#read32(IrqInfo.count);
  }

  /** Routes vectors 0, 1, … of interrupt `index` to eventfds; an empty list turns the interrupt off. */
  setIrqs(device: number, index: number, eventfds: readonly number[]): void {
    const size = IrqSet.data + 4 * eventfds.length;
    if (size > SCRATCH_SIZE) throw new RangeError(`${eventfds.length} vectors are too many`);
    const data = eventfds.length === 0 ? IrqSetFlag.dataNone : IrqSetFlag.dataEventfd;
    this.#write32(Info.argsz, size);
    this.#write32(Info.flags, data | IrqSetFlag.actionTrigger);
    this.#write32(IrqSet.index, index);
    this.#write32(IrqSet.start, 0);
    this.#write32(IrqSet.count, eventfds.length);
    for (const [i, fd] of eventfds.entries()) this.#write32(IrqSet.data + 4 * i, fd);
    ioctl(device, VfioRequest.deviceSetIrqs, this.#memory.address);
  }

  reset(device: number): void {
    ioctl(device, VfioRequest.deviceReset, 0);
  }

  iommuInfo(container: number): IommuDescription {
    const { flags, length } = this.#askAll(container, VfioRequest.iommuGetInfo, IommuInfo.size);
    const sizes = (flags & IommuInfoFlag.pageSizes) === 0 ? 0 : this.#read32(IommuInfo.pageSizes);
    const ranges: { start: number; last: number }[] = [];
    if ((flags & IommuInfoFlag.capabilities) !== 0) {
      const at = this.#findCapability(this.#read32(IommuInfo.capabilities), IommuCapability.iovaRange, length);
      if (at !== 0) for (const [start, last] of this.#pairs(at, length)) ranges.push({ start, last });
    }
    return { pageSize: sizes === 0 ? 4096 : (sizes & -sizes) >>> 0, ranges };
  }

  /** Lets the device read and write `size` bytes of this process at `address` under `iova`. */
  mapDma(container: number, address: number, iova: number, size: number): void {
    this.#write32(Info.argsz, DmaMap.size);
    this.#write32(Info.flags, DmaFlag.read | DmaFlag.write);
    this.#write64(DmaMap.address, address);
    this.#write64(DmaMap.iova, iova);
    this.#write64(DmaMap.length, size);
    ioctl(container, VfioRequest.iommuMapDma, this.#memory.address);
  }

  unmapDma(container: number, iova: number, size: number): void {
    this.#write32(Info.argsz, DmaUnmap.size);
    this.#write32(Info.flags, 0);
    this.#write64(DmaUnmap.iova, iova);
    this.#write64(DmaUnmap.length, size);
    ioctl(container, VfioRequest.iommuUnmapDma, this.#memory.address);
  }

  #ask(fd: number, what: number, size: number): { flags: number } {
    this.#write32(Info.argsz, size);
    this.#write32(Info.flags, 0);
    ioctl(fd, what, this.#memory.address);
    return { flags: this.#read32(Info.flags) };
  }

  /** Asks with room for the fixed part, and again with room for the capabilities if there are some. */
  #askAll(fd: number, what: number, size: number, indexAt?: number, index = 0): { flags: number; length: number } {
    let { flags } = this.#ask(fd, what, size);
    const length = this.#read32(Info.argsz);
    if (length <= size) return { flags, length: size };
    if (length > SCRATCH_SIZE) throw malformed(`it needs ${length} bytes for one answer`);
    if (indexAt !== undefined) this.#write32(indexAt, index);
    ({ flags } = this.#ask(fd, what, length));
    return { flags, length };
  }

  /** Offset of capability `id` in the chain that begins at `first`; 0 when it is not there. */
  #findCapability(first: number, id: number, length: number): number {
    let at = first;
    for (let seen = 0; at !== 0; seen++) {
      if (seen === MAX_CAPABILITIES || at % 4 !== 0 || at + Capability.size > length)
        throw malformed(`capability at ${at}`);
      if ((this.#read32(at + Capability.id) & 0xffff) === id) return at;
      at = this.#read32(at + Capability.next);
    }
    return 0;
  }

  #pairs(at: number, length: number): [number, number][] {
    if (at + PairList.pairs > length) throw malformed(`a list at ${at}`);
    const count = this.#read32(at + PairList.count);
    if (at + PairList.pairs + count * PairList.pairSize > length) throw malformed(`a list of ${count} entries`);
    const pairs: [number, number][] = [];
    for (let i = 0; i < count; i++) {
      const entry = at + PairList.pairs + i * PairList.pairSize;
      pairs.push([this.#read64(entry), this.#read64(entry + 8)]);
    }
    return pairs;
  }

  #read32(offset: number): number {
    return this.#u32[offset >>> 2];
  }

  /** A u64 as a number; above 2^53 it is rounded down to what a number holds exactly. */
  #read64(offset: number): number {
    const value = this.#read32(offset + 4) * TWO_32 + this.#read32(offset);
    return Math.min(value, Number.MAX_SAFE_INTEGER);
  }

  #write32(offset: number, value: number): void {
    this.#u32[offset >>> 2] = value;
  }

  #write64(offset: number, value: number): void {
    this.#write32(offset, value % TWO_32);
    this.#write32(offset + 4, Math.floor(value / TWO_32));
  }
}

function malformed(what: string): VfioError {
  return new VfioError('VFIO_ANSWER', `the kernel's VFIO gave an answer that cannot be read: ${what}`);
}
