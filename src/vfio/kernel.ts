/**
 * A PCI function through the kernel's VFIO: its IOMMU group, a container with a type 1 (v2) IOMMU, the device descriptor
 * (Documentation/driver-api/vfio.rst). The function must be bound to vfio-pci first: see `bind.ts`.
 *
 * Left out: iommufd and device cdevs (kernel 6.2 and later still have groups), several functions in one container, INTx,
 * no-IOMMU mode, which is refused with the reason: without an IOMMU any mistake of the device reaches any memory.
 */
import { constants as os } from 'node:os';
import { SystemError, VfioError } from '../errors.ts';
import { EventFd } from '../sys/eventfd.ts';
import { ffi, type Watch } from '../sys/ffi/ffi.ts';
import { close, getrlimit, OpenFlag, open, ResourceLimit } from '../sys/libc.ts';
import type { DmaMemory } from '../sys/memory.ts';
import { groupNotViable, noIommu } from './bind.ts';
import { ConfigHeader, PciCommand, updateCommand } from './config-space.ts';
import { DmaArena, type DmaMapping } from './dma.ts';
import type { IovaRange, PciFunction, Region, SharedDma } from './function.ts';
import { PciRegion } from './function.ts';
import { DeviceFlag, GroupFlag, IommuType, IrqIndex, VFIO_API_VERSION, VfioCalls } from './kernel-abi.ts';
import { absentRegion, ConfigRegion, type OpenRegion, openBar, type RegionOwner } from './kernel-region.ts';
import {
  describeFunction,
  KERNEL_FILES,
  type KernelFiles,
  normalizeAddress,
  type PciDescription,
  VFIO_DRIVER,
} from './sysfs.ts';

export interface KernelVfioOptions {
  /** I/O virtual addresses to use; they must lie in what the IOMMU allows. Default: all of it above 1 MiB. */
  readonly iovaWindow?: IovaRange;
  /** Use 2 MiB pages for large allocations where the system has them. Default true. */
  readonly hugePages?: boolean;
  readonly files?: KernelFiles;
}

const CONTAINER = '/dev/vfio/vfio';
const BAR_COUNT = 6;
/** Address 0 is never given out: it would hide a pointer that was not set. */
const LOWEST_IOVA = 2 ** 20;
/** What x86 IOMMUs of every width can map: all but the interrupt window, used where the kernel does not say (before 5.4). */
const DEFAULT_RANGES: readonly IovaRange[] = [
  { start: 0, last: 0xfedfffff },
  { start: 0xfef00000, last: 2 ** 39 - 1 },
];
const { EACCES, EPERM, ENOENT, ENODEV, ENXIO, EIO, EBUSY, ENOMEM, ENOSPC, EINVAL } = os.errno;

/**
 * Opens function `address`. Throws InputError `BAD_ADDRESS`, VfioError: `NO_SUCH_FUNCTION`, `NOT_BOUND` (names the driver), `NO_IOMMU`,
 * `NOT_PERMITTED`, `BUSY`, `GROUP_NOT_VIABLE` (names who is in the way), `VFIO_UNUSABLE`, `IOVA_OUTSIDE`. Nothing stays open then.
 */
export function openKernelVfio(address: string, options: KernelVfioOptions = {}): PciFunction {
  const normal = normalizeAddress(address);
  const description = checkReady(normal, options.files ?? KERNEL_FILES);
  const undo: (() => void)[] = [];
  try {
    return new KernelFunction(description, options, undo);
  } catch (error) {
    for (const step of undo.reverse()) step();
    throw error;
  }
}

/** What sysfs says already is said better than by an errno: what it says of a function that may be opened. */
function checkReady(address: string, files: KernelFiles): PciDescription {
  const fn = describeFunction(address, files);
  if (fn.group === null || fn.noIommu) throw noIommu(address);
  if (fn.driver !== VFIO_DRIVER) {
    throw new VfioError('NOT_BOUND', `${address} is not bound to vfio-pci but to ${fn.driver ?? 'no driver'}`, {
      hint: `as root: vipsec bind ${address}`,
    });
  }
  const held = fn.others.filter((other) => !other.harmless);
  if (held.length > 0) throw groupNotViable(fn, held);
  return fn;
}

class KernelFunction implements PciFunction, RegionOwner {
  readonly address: string;
  readonly device: number;
  readonly config: Region;
  readonly iovaRanges: readonly IovaRange[];
  readonly behindIommu = true;
  readonly interruptVectors: number;
  readonly #calls: VfioCalls;
  readonly #bars: Region[] = [];
  readonly #arena: DmaArena;
  readonly #canReset: boolean;
  readonly #undo: (() => void)[];
  readonly #listeners = new Set<(reason: VfioError) => void>();
  #interruptsOn = false;
  #closed = false;
  #gone: VfioError | null = null;

  /** `undo` gets a step for everything that is opened, so that it can be taken back in the reverse order. */
  constructor(fn: PciDescription, options: KernelVfioOptions, undo: (() => void)[]) {
    const { address } = fn;
    this.address = address;
    this.#undo = undo;
    this.#calls = new VfioCalls();
    undo.push(() => this.#calls.close());
    const calls = this.#calls;
    const group = openGroup(fn, undo);
    if ((calls.groupStatus(group) & GroupFlag.viable) === 0) throw groupNotViable(fn, fn.others);
    const container = openContainer(calls, group, undo);
    this.device = explain(`opening ${address}`, () => calls.deviceFd(group, address));
    undo.push(() => close(this.device));
    const info = calls.deviceInfo(this.device);
    if ((info.flags & DeviceFlag.pci) === 0) throw unusable(`${address} is not a PCI function to the kernel`);
    this.#canReset = (info.flags & DeviceFlag.reset) !== 0;

    const config = new ConfigRegion(this, PciRegion.config, calls.regionInfo(this.device, PciRegion.config));
    undo.push(() => config.close());
    this.config = config;
    updateCommand(config, PciCommand.memorySpace | PciCommand.busMaster);
    for (let index = 0; index < BAR_COUNT; index++) this.#bars.push(this.#openBar(index));
    this.interruptVectors = calls.irqCount(this.device, IrqIndex.msix);
    this.#watchRequests(info.irqs);

    const iommu = calls.iommuInfo(container);
    this.iovaRanges = usableRanges(iommu.ranges, options.iovaWindow);
    this.#arena = new DmaArena(
      {
        map: (mapping) => this.#map(container, mapping),
        unmap: ({ iova, size }) => calls.unmapDma(container, iova, size),
      },
      this.iovaRanges,
      { hugePages: options.hugePages ?? true, pageSize: iommu.pageSize },
    );
    undo.push(() => this.#arena.close(true));
    // Last, so that it is done first: nothing is unmapped under a function that still writes.
    undo.push(() => this.#stopDma());
  }

  get gone(): boolean {
    return this.#gone !== null;
  }

  onGone(listener: (reason: VfioError) => void): void {
    if (this.#gone === null) this.#listeners.add(listener);
    else listener(this.#gone);
  }

  bar(index: number): Region {
    this.#check();
    const region = this.#bars[index];
    if (region === undefined) throw new RangeError(`there is no BAR ${index}`);
    return region;
  }

  allocateDma(size: number): DmaMemory {
    this.#check();
    return this.#arena.allocate(size);
  }

  importDma(fd: number, offset: number, size: number): DmaMemory {
    this.#check();
    return this.#arena.import(fd, offset, size);
  }

  freeDma(memory: DmaMemory): void {
    this.#arena.free(memory);
  }

  shareDma(memory: DmaMemory): SharedDma {
    return this.#arena.share(memory);
  }

  setInterrupts(eventfds: readonly number[]): void {
    this.#check();
    if (eventfds.length > this.interruptVectors) {
      throw new RangeError(`${eventfds.length} vectors, but the function has ${this.interruptVectors}`);
    }
    try {
      // The number of vectors that are on cannot change while they are.
      if (this.#interruptsOn) this.#calls.setIrqs(this.device, IrqIndex.msix, []);
      this.#interruptsOn = false;
      if (eventfds.length === 0) return;
      this.#calls.setIrqs(this.device, IrqIndex.msix, eventfds);
      this.#interruptsOn = true;
    } catch (error) {
      throw this.failed(error);
    }
  }

  reset(): void {
    this.#check();
    if (!this.#canReset) {
      throw new VfioError('NO_RESET', `${this.address} cannot be reset alone`, {
        hint: 'a PCI Express function resets only behind a root port or a switch, not on the root bus',
      });
    }
    try {
      this.#calls.reset(this.device);
      updateCommand(this.config, PciCommand.memorySpace | PciCommand.busMaster);
    } catch (error) {
      throw this.failed(error);
    }
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    let first: unknown;
    for (const step of this.#undo.splice(0).reverse()) {
      try {
        step();
      } catch (error) {
        first ??= error;
      }
    }
    this.#gone ??= new VfioError('DEVICE_GONE', `${this.address} was closed`);
    if (first !== undefined) throw first;
  }

  checkPresent(): void {
    this.#check();
    if (this.config.read16(ConfigHeader.vendorId) === 0xffff) throw this.#lose('it no longer answers');
  }

  failed(error: unknown): Error {
    if (error instanceof SystemError && [ENODEV, ENXIO, EIO].includes(error.errno)) return this.#lose(error.message);
    return error instanceof Error ? error : new Error(String(error));
  }

  #check(): void {
    if (this.#closed) throw new VfioError('DEVICE_GONE', `${this.address} was closed`);
    if (this.#gone !== null) throw this.#gone;
  }

  #lose(why: string): VfioError {
    if (this.#gone !== null) return this.#gone;
    const reason = new VfioError('DEVICE_GONE', `${this.address} is gone: ${why}`);
    this.#gone = reason;
    for (const listener of this.#listeners) listener(reason);
    this.#listeners.clear();
    return reason;
  }

  #openBar(index: number): Region {
    const description = this.#calls.regionInfo(this.device, index);
    if (description.size === 0) return absentRegion(index);
    const region: OpenRegion = openBar(this, index, description);
    this.#undo.push(() => region.close());
    return region;
  }

  /** The kernel says with an eventfd each that it wants the function back (unplugged, unbound), or that it failed (AER). */
  #watchRequests(irqs: number): void {
    const events = [
      [IrqIndex.request, 'the kernel asks for it back'],
      [IrqIndex.error, 'it reported a fatal PCI Express error'],
    ] as const;
    for (const [index, why] of events) {
      if (index >= irqs || this.#calls.irqCount(this.device, index) === 0) continue;
      const eventfd = EventFd.create();
      this.#undo.push(() => eventfd.close());
      this.#calls.setIrqs(this.device, index, [eventfd.fd]);
      const watch: Watch = ffi().watch(eventfd.fd, () => {
        if (eventfd.drain() > 0) this.#lose(why);
      });
      watch.unref();
      this.#undo.push(() => watch.close());
    }
  }

  /** After this the function starts no transfer of its own. */
  #stopDma(): void {
    if (this.#gone !== null) return;
    try {
      if (this.#interruptsOn) this.#calls.setIrqs(this.device, IrqIndex.msix, []);
      updateCommand(this.config, 0, PciCommand.busMaster);
      if (this.#canReset) this.#calls.reset(this.device);
    } catch (error) {
      // A function that is gone does no harm; the descriptors are closed next in any case.
      this.failed(error);
    }
  }

  #map(container: number, { address, iova, size }: DmaMapping): void {
    this.#check();
    try {
      this.#calls.mapDma(container, address, iova, size);
    } catch (error) {
      throw mapFailure(error, iova, size);
    }
  }
}

function openGroup({ address, group: number }: PciDescription, undo: (() => void)[]): number {
  const path = `/dev/vfio/${number}`;
  const group = explain(path, () => open(path, OpenFlag.readWrite), {
    [EBUSY]: () => new VfioError('BUSY', `another process drives ${address} (${path} is in use)`),
    [EACCES]: () => notPermitted(path),
    [EPERM]: () => notPermitted(path),
    [ENOENT]: () => unusable(`${path} is not there although ${address} is bound to vfio-pci`),
  });
  undo.push(() => close(group));
  return group;
}

function openContainer(calls: VfioCalls, group: number, undo: (() => void)[]): number {
  const container = explain(CONTAINER, () => open(CONTAINER, OpenFlag.readWrite), {
    [EACCES]: () => notPermitted(CONTAINER),
    [ENOENT]: () => unusable(`${CONTAINER} is not there`, 'as root: modprobe vfio'),
    [ENODEV]: () => unusable(`${CONTAINER} is not there`, 'as root: modprobe vfio'),
  });
  undo.push(() => close(container));
  const version = calls.apiVersion(container);
  if (version !== VFIO_API_VERSION) throw unusable(`the kernel speaks version ${version} of VFIO`);
  if (!calls.hasExtension(container, IommuType.type1v2)) {
    throw unusable('the kernel has no type 1 IOMMU for VFIO', 'as root: modprobe vfio_iommu_type1');
  }
  explain('joining group and container', () => calls.setContainer(group, container));
  explain('setting the IOMMU up', () => calls.setIommu(container, IommuType.type1v2), {
    [EPERM]: () =>
      unusable('the IOMMU does not remap interrupts', 'turn interrupt remapping on in the firmware or the kernel'),
  });
  return container;
}

/** Runs a step; an errno with an explanation of its own becomes that, any other one a VfioError that names the step. */
function explain<T>(step: string, body: () => T, reasons: Readonly<Record<number, () => VfioError>> = {}): T {
  try {
    return body();
  } catch (error) {
    if (!(error instanceof SystemError)) throw error;
    const reason = reasons[error.errno];
    throw reason === undefined ? unusable(`${step}: ${error.message}`) : reason();
  }
}

function unusable(what: string, hint?: string): VfioError {
  return new VfioError('VFIO_UNUSABLE', what, hint === undefined ? {} : { hint });
}

function notPermitted(path: string): VfioError {
  return new VfioError('NOT_PERMITTED', `not allowed to open ${path}`, {
    hint: `run as root, or give the file to your user (chown $USER ${path})`,
  });
}

/** What the kernel's refusal to map memory means. */
function mapFailure(error: unknown, iova: number, size: number): unknown {
  if (!(error instanceof SystemError)) return error;
  if (error.errno === ENOMEM) {
    const { soft } = getrlimit(ResourceLimit.lockedMemory);
    const limit = soft === Infinity ? 'none' : `${soft / 1024} KiB`;
    const message = `the kernel does not lock ${size / 1024} KiB more memory for DMA (limit RLIMIT_MEMLOCK: ${limit})`;
    return new VfioError('LOCKED_MEMORY_LIMIT', message, { hint: 'raise it: ulimit -l unlimited, or LimitMEMLOCK=' });
  }
  if (error.errno === ENOSPC) {
    const hint = 'raise dma_entry_limit of the module vfio_iommu_type1';
    return new VfioError('TOO_MANY_MAPPINGS', 'the kernel keeps no more DMA mappings for this process', { hint });
  }
  if (error.errno === EINVAL) return outside(iova, size);
  return new VfioError('DMA_MAP', `mapping ${size} bytes at I/O address 0x${iova.toString(16)}: ${error.message}`);
}

function outside(iova: number, size: number): VfioError {
  const last = iova + size - 1;
  return new VfioError(
    'IOVA_OUTSIDE',
    `I/O addresses 0x${iova.toString(16)} to 0x${last.toString(16)} are outside of what the IOMMU can map`,
    { hint: 'leave iovaWindow out, or choose it inside of iovaRanges' },
  );
}

/** The ranges of the IOMMU above `LOWEST_IOVA`; within `window` if there is one, which then must be inside of one range. */
function usableRanges(ranges: readonly IovaRange[], window: IovaRange | undefined): IovaRange[] {
  const all = (ranges.length === 0 ? DEFAULT_RANGES : ranges)
    .map(({ start, last }) => ({ start: Math.max(start, LOWEST_IOVA), last }))
    .filter(({ start, last }) => start < last);
  if (window === undefined) return all;
  if (all.some(({ start, last }) => window.start >= start && window.last <= last)) return [window];
  throw outside(window.start, window.last - window.start + 1);
}
