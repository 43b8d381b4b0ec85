/**
 * A PCI function behind a vfio-user socket: the client side of the protocol in `protocol.ts`.
 *
 * Every call has a deadline. When the server breaks the protocol, dies or stalls, the call throws VfioError
 * (`PROTOCOL`, `DEVICE_GONE`,
 * `TIMEOUT`), the function is `gone`, and all later calls throw `DEVICE_GONE`.
 */
import { SystemError, VfioError } from '../errors.ts';
import { close } from '../sys/libc.ts';
import type { DmaMemory } from '../sys/memory.ts';
import { UnixSocket } from '../sys/unix-socket.ts';
import { initiateFunctionLevelReset, readPciExpress, walkCapabilities } from './config-space.ts';
import { DmaArena, type DmaMapping } from './dma.ts';
import { type IovaRange, type PciFunction, PciRegion, type Region, type SharedDma } from './function.ts';
import { isReply, MessageSocket } from './message-socket.ts';
import * as protocol from './protocol.ts';
import { UserRegion } from './user-region.ts';
import { UserSession } from './user-session.ts';

export interface VfioUserOptions {
  /** Deadline of connecting and of every call, in milliseconds. Default 5000. */
  readonly timeoutMs?: number;
  /** Where DMA memory may lie. Default: 39 bits without the first 64 KiB and without the window of x86 interrupts. */
  readonly iovaRanges?: readonly IovaRange[];
  /** Use 2 MiB pages for large DMA memory if there are any. Default false. */
  readonly hugePages?: boolean;
  /**
   * Send writes to BARs without waiting for a reply, as PCI posts them, unless a part of a BAR is mapped: later reads
   * still see their effect, but a refused write goes unnoticed. Default false.
   */
  readonly postWrites?: boolean;
}

/** Like the address space of a small x86 IOMMU, which is what a device has to cope with. */
const DEFAULT_IOVA_RANGES: readonly IovaRange[] = [
  { start: 0x1_0000, last: 0xfedf_ffff },
  { start: 0xfef0_0000, last: 2 ** 39 - 1 },
];
const DEFAULT_TIMEOUT_MS = 5000;
/** Descriptors that the server may put in one message: those of notification registers are the only ones of which there are several. */
const MAX_DESCRIPTORS = 16;
const CONFIG_SIZES = [256, 4096];
/** The size of an MSI-X table (PCI 3.0 section 6.8.2). */
const MAX_VECTORS = 2048;
const REGION_COUNT = PciRegion.config + 1;
const REGION_INFO_ARGSZ = 1024;

/**
 * Connects to the vfio-user server at `path` and describes its function to itself. Throws VfioError:
 * `CONNECT_FAILED`; `NOT_VFIO_USER`,
 * `VERSION_REFUSED` when no session comes about; `NOT_PCI`; or what a call may throw.
 */
export function openVfioUser(path: string, options: VfioUserOptions = {}): PciFunction {
  const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
  if (!(timeoutMs > 0)) throw new RangeError(`timeoutMs ${timeoutMs} is not positive`);
  const socket = new MessageSocket(connect(path, timeoutMs), MAX_DESCRIPTORS);
  let session: UserSession;
  let capabilities: protocol.Capabilities;
  try {
    capabilities = negotiate(socket, path, timeoutMs);
    session = new UserSession(socket, timeoutMs);
  } catch (error) {
    socket.close();
    throw error;
  }
  const regions: UserRegion[] = [];
  try {
    const info = readDeviceInfo(session);
    for (let i = 0; i < REGION_COUNT; i++) regions.push(openRegion(session, i));
    if (options.postWrites === true) postBarWrites(regions);
    const vectors = info.irqs > protocol.PciIrq.msix ? readVectors(session) : 0;
    return new VfioUserFunction(path, session, capabilities, info, regions, vectors, options);
  } catch (error) {
    for (const region of regions) region.close();
    session.close();
    throw error;
  }
}

function connect(path: string, timeoutMs: number): UnixSocket {
  try {
    return UnixSocket.connect(path, performance.now() + timeoutMs);
  } catch (cause) {
    if (!(cause instanceof SystemError)) throw cause;
    throw new VfioError('CONNECT_FAILED', `cannot connect to ${path}: ${cause.message}`, {
      cause,
      hint: cause.hint ?? 'is the device process running, and is this its socket?',
    });
  }
}

/** "VFIO_USER_VERSION": agrees on version 0.0; returns what the server can take. */
function negotiate(socket: MessageSocket, path: string, timeoutMs: number): protocol.Capabilities {
  const id = 0;
  const proposal = { major: protocol.PROTOCOL_MAJOR, minor: protocol.PROTOCOL_MINOR };
  const capabilities = { ...protocol.DEFAULT_CAPABILITIES, maxMessageDescriptors: MAX_DESCRIPTORS };
  const payload = protocol.encodeVersion({ ...proposal, capabilities });
  const message = protocol.request(protocol.Command.version, payload.length);
  message.set(payload, protocol.Header.length);

  const answer = (() => {
    const deadline = performance.now() + timeoutMs;
    try {
      socket.send(message, id, deadline);
      return socket.receive(deadline);
    } catch (cause) {
      if (!(cause instanceof VfioError)) throw cause;
      if (cause.code === 'PEER_CLOSED') {
        throw new VfioError('VERSION_REFUSED', `${path} closed the connection instead of agreeing on a version`, {
          cause,
        });
      }
      throw notVfioUser(path, cause.code === 'TIMEOUT' ? `no answer in ${timeoutMs} ms` : cause.message, cause);
    }
  })();
  for (const fd of answer.descriptors) close(fd);
  if (!isReply(answer) || answer.id !== id || answer.command !== protocol.Command.version) {
    throw notVfioUser(path, 'its first message is no reply to VERSION');
  }
  if ((answer.flags & protocol.HeaderFlag.error) !== 0) {
    throw new VfioError('VERSION_REFUSED', `${path} refused vfio-user ${proposal.major}.${proposal.minor}`);
  }
  const version = protocol.decodeVersion(answer.payload);
  if (version.major !== proposal.major || version.minor > proposal.minor) {
    throw new VfioError(
      'VERSION_REFUSED',
      `${path} speaks vfio-user ${version.major}.${version.minor}, not ${proposal.major}.${proposal.minor}`,
    );
  }
  return version.capabilities;
}

function notVfioUser(path: string, why: string, cause?: unknown): VfioError {
  return new VfioError(
    'NOT_VFIO_USER',
    `${path} does not speak vfio-user: ${why}`,
    cause === undefined ? {} : { cause },
  );
}

/** "VFIO_USER_DEVICE_GET_INFO". */
function readDeviceInfo(session: UserSession): protocol.DeviceInfo {
  const info = protocol.decodeDeviceInfo(session.request(protocol.encodeDeviceInfoRequest()));
  if ((info.flags & protocol.DeviceFlag.pci) === 0 || info.regions < REGION_COUNT) {
    throw new VfioError('NOT_PCI', 'the vfio-user device is not a PCI function');
  }
  return info;
}

/** "VFIO_USER_DEVICE_GET_REGION_INFO" for one region, asked again with more room when its capabilities need it. */
function openRegion(session: UserSession, index: number): UserRegion {
  let argsz = REGION_INFO_ARGSZ;
  for (;;) {
    const descriptors: number[] = [];
    try {
      const payload = session.request(protocol.encodeRegionInfoRequest(index, argsz), [], descriptors, 1);
      const info = protocol.decodeRegionInfo(payload);
      if ('needs' in info) {
        if (info.needs <= argsz || info.needs > protocol.MAX_REGION_INFO_SIZE) {
          throw protocol.protocolError(`region info of ${info.needs} bytes`);
        }
        argsz = info.needs;
        continue;
      }
      checkRegion(info, index, descriptors);
      return new UserRegion(session, info, descriptors[0] ?? -1);
    } finally {
      // A mapping outlives the descriptor it was made from.
      for (const fd of descriptors) close(fd);
    }
  }
}

/**
 * Writes to configuration space are never posted. Neither are those to BARs once any of them is mapped: an access to
 * the mapped part does not wait for what was posted before it.
 */
function postBarWrites(regions: readonly UserRegion[]): void {
  if (regions.some((region) => region.mapped)) return;
  for (const region of regions) region.postWrites = region.index !== PciRegion.config;
}

function checkRegion(info: protocol.RegionInfo, index: number, descriptors: readonly number[]): void {
  if (info.index !== index) throw protocol.protocolError(`information about region ${info.index} instead of ${index}`);
  const mappable = (info.flags & protocol.RegionFlag.mmap) !== 0 && info.size > 0;
  if (mappable !== descriptors.length > 0) {
    throw protocol.protocolError(
      `region ${index} ${mappable ? 'can be mapped but has no' : 'has an unexpected'} descriptor`,
    );
  }
  const right = protocol.RegionFlag.read | protocol.RegionFlag.write;
  if (index === PciRegion.config && (!CONFIG_SIZES.includes(info.size) || (info.flags & right) !== right)) {
    throw protocol.protocolError(`PCI configuration space of ${info.size} bytes, flags ${info.flags}`);
  }
}

/** "VFIO_USER_DEVICE_GET_IRQ_INFO" of MSI-X. */
function readVectors(session: UserSession): number {
  const info = protocol.decodeIrqInfo(session.request(protocol.encodeIrqInfoRequest(protocol.PciIrq.msix)));
  if (info.index !== protocol.PciIrq.msix || info.count > MAX_VECTORS) {
    throw protocol.protocolError(`interrupt type ${info.index} with ${info.count} vectors`);
  }
  return (info.flags & protocol.IrqFlag.eventfd) === 0 ? 0 : info.count;
}

class VfioUserFunction implements PciFunction {
  readonly address: string;
  readonly config: Region;
  readonly iovaRanges: readonly IovaRange[];
  /** The server at the other end of the socket finds all memory by the mappings that it was told of. */
  readonly behindIommu = false;
  readonly interruptVectors: number;
  readonly #session: UserSession;
  readonly #capabilities: protocol.Capabilities;
  readonly #info: protocol.DeviceInfo;
  readonly #regions: readonly UserRegion[];
  readonly #arena: DmaArena;
  #interrupts = false;
  #closed = false;

  constructor(
    path: string,
    session: UserSession,
    capabilities: protocol.Capabilities,
    info: protocol.DeviceInfo,
    regions: readonly UserRegion[],
    vectors: number,
    options: VfioUserOptions,
  ) {
    this.address = `vfio-user:${path}`;
    this.config = regions[PciRegion.config];
    this.iovaRanges = options.iovaRanges ?? DEFAULT_IOVA_RANGES;
    this.interruptVectors = vectors;
    this.#session = session;
    this.#capabilities = capabilities;
    this.#info = info;
    this.#regions = regions;
    const mapper = {
      map: (mapping: DmaMapping) => this.#map(mapping),
      unmap: (mapping: DmaMapping) => this.#unmap(mapping),
    };
    this.#arena = new DmaArena(mapper, this.iovaRanges, {
      hugePages: options.hugePages ?? false,
      pageSize: smallestPage(capabilities.pageSizes),
    });
    session.serveDma((iova, count) => this.#arena.find(iova, count));
  }

  get gone(): boolean {
    return this.#session.lost;
  }

  onGone(listener: (reason: VfioError) => void): void {
    this.#session.onLost(listener);
  }

  bar(index: number): Region {
    if (!Number.isInteger(index) || index < PciRegion.bar0 || index > PciRegion.bar5)
      throw new RangeError(`no BAR ${index}`);
    return this.#regions[index];
  }

  allocateDma(size: number): DmaMemory {
    this.#session.check();
    return this.#arena.allocate(size);
  }

  importDma(fd: number, offset: number, size: number): DmaMemory {
    this.#session.check();
    return this.#arena.import(fd, offset, size);
  }

  freeDma(memory: DmaMemory): void {
    this.#arena.free(memory);
  }

  shareDma(memory: DmaMemory): SharedDma {
    return this.#arena.share(memory);
  }

  setInterrupts(eventfds: readonly number[]): void {
    if (eventfds.length > this.interruptVectors) {
      throw new RangeError(`${eventfds.length} eventfds for ${this.interruptVectors} vectors`);
    }
    const { maxMessageDescriptors } = this.#capabilities;
    if (eventfds.length > 0 && maxMessageDescriptors < 1) {
      throw new VfioError('NO_DESCRIPTORS', 'the device takes no descriptors, so it cannot interrupt');
    }
    // Vectors that are in use are taken down first: a device may refuse to change a set in parts.
    if (this.#interrupts) this.#setIrqs(protocol.SetIrqsFlag.dataNone, 0, 0, []);
    this.#interrupts = false;
    for (let start = 0; start < eventfds.length; start += maxMessageDescriptors) {
      const part = eventfds.slice(start, start + maxMessageDescriptors);
      this.#interrupts = true;
      this.#setIrqs(protocol.SetIrqsFlag.dataEventfd, start, part.length, part);
    }
  }

  /** RESET when the server knows it, else a function-level reset. */
  reset(): void {
    if ((this.#info.flags & protocol.DeviceFlag.reset) !== 0) {
      this.#confirm(this.#session.request(protocol.request(protocol.Command.deviceReset, 0)));
      return;
    }
    const express = readPciExpress(this.config, walkCapabilities(this.config));
    if (express?.functionLevelReset !== true) throw new VfioError('NO_RESET', 'the device cannot be reset');
    initiateFunctionLevelReset(this.config, express);
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    try {
      this.#quiet(() => this.reset());
      this.#quiet(() => this.setInterrupts([]));
      this.#arena.close(!this.gone);
    } finally {
      for (const region of this.#regions) region.close();
      this.#session.close();
    }
  }

  /** Does one step of closing; a device that refuses or is gone does not keep us from the next. */
  #quiet(step: () => void): void {
    try {
      if (!this.gone) step();
    } catch (error) {
      if (!(error instanceof VfioError)) throw error;
    }
  }

  #map(mapping: DmaMapping): void {
    if (this.#arena.count >= this.#capabilities.maxDmaMaps) {
      throw new VfioError('DMA_EXHAUSTED', `the device takes ${this.#capabilities.maxDmaMaps} DMA mappings, no more`);
    }
    const flags = protocol.DmaMapFlag.readable | protocol.DmaMapFlag.writeable;
    // Without descriptors the server reaches the memory by DMA_READ and DMA_WRITE.
    const canMap = this.#capabilities.maxMessageDescriptors > 0;
    const { iova: address, size, offset, fd } = mapping;
    const message = protocol.encodeDmaMap({ flags, offset: canMap ? offset : 0, address, size });
    this.#confirm(this.#session.request(message, canMap ? [fd] : []));
  }

  #unmap(mapping: DmaMapping): void {
    const message = protocol.encodeDmaUnmap({ flags: 0, address: mapping.iova, size: mapping.size });
    const payload = this.#session.request(message);
    // The reply repeats the request; servers that leave that out are understood all the same.
    if (payload.length > 0) this.#check(() => protocol.checkUnmapped(payload, mapping.iova, mapping.size));
  }

  #setIrqs(dataFlag: number, start: number, count: number, eventfds: readonly number[]): void {
    const flags = dataFlag | protocol.SetIrqsFlag.trigger;
    const message = protocol.encodeSetIrqs({
      flags,
      index: protocol.PciIrq.msix,
      start,
      count,
      data: new Uint8Array(0),
    });
    this.#confirm(this.#session.request(message, eventfds));
  }

  /** A reply that has no payload. */
  #confirm(payload: Uint8Array): void {
    if (payload.length > 0)
      throw this.#session.fail(protocol.protocolError(`${payload.length} bytes in a reply that has none`));
  }

  #check(decode: () => void): void {
    try {
      decode();
    } catch (error) {
      throw error instanceof VfioError ? this.#session.fail(error) : error;
    }
  }
}

/** Smallest of the page sizes that are or'ed together in `sizes`. */
function smallestPage(sizes: number): number {
  let page = 1;
  while (sizes % (2 * page) === 0) page *= 2;
  if (page > MAX_PAGE_SIZE) throw new VfioError('PAGE_SIZE', `the device maps pages of ${page} bytes only`);
  return page;
}

/** 2 MiB: rounding every allocation up to more than that is no sensible use of memory. */
const MAX_PAGE_SIZE = 2 * 1024 * 1024;
