/**
 * The messages of vfio-user, version 0.0, for both sides: layouts, encoders, decoders.
 *
 * Source: QEMU, `docs/interop/vfio-user.rst` (the text at libvfio-user differs); structures that it borrows from
 * linux/vfio.h are laid out as there. Offsets count from the end of the 16-byte header. Integers are in host byte order, little-endian
 * on every machine that this package runs on.
 *
 * A decoder takes the payload of one message, which the other side chose: whatever does not fit throws VfioError
 * `PROTOCOL`. Encoders return whole messages; the sender sets the id. `message-socket.ts` frames them.
 *
 * Left out: migration, dirty page logging, twin sockets, REGION_WRITE_MULTI, REGION_IO_FDS.
 */
import { VfioError } from '../errors.ts';
import { readU16, readU32, readU64, writeU16, writeU32, writeU64 } from '../sys/little-endian.ts';

/** "Commands". */
export const Command = {
  version: 1,
  dmaMap: 2,
  dmaUnmap: 3,
  deviceGetInfo: 4,
  deviceGetRegionInfo: 5,
  deviceGetRegionIoFds: 6,
  deviceGetIrqInfo: 7,
  deviceSetIrqs: 8,
  regionRead: 9,
  regionWrite: 10,
  /** Sent by the server, like `dmaWrite`. */
  dmaRead: 11,
  dmaWrite: 12,
  deviceReset: 13,
} as const;

/** "Header": offsets and length. */
export const Header = { id: 0, command: 2, size: 4, flags: 8, error: 12, length: 16 } as const;
export const HeaderFlag = { typeMask: 0xf, request: 0, reply: 1, noReply: 0x10, error: 0x20 } as const;

/** "VFIO_USER_VERSION". */
export const Version = { major: 0, minor: 2, data: 4, fixed: 4 } as const;
export const PROTOCOL_MAJOR = 0;
export const PROTOCOL_MINOR = 0;

/** "VFIO_USER_DMA_MAP". */
export const DmaMap = { argsz: 0, flags: 4, offset: 8, address: 16, size: 24, length: 32 } as const;
export const DmaMapFlag = { readable: 1, writeable: 2 } as const;
/** "VFIO_USER_DMA_UNMAP"; request and reply. `all` is VFIO_DMA_UNMAP_FLAG_ALL: every mapping, address and size 0. */
export const DmaUnmap = { argsz: 0, flags: 4, address: 8, size: 16, length: 24 } as const;
export const DmaUnmapFlag = { all: 2 } as const;

/** "VFIO_USER_DEVICE_GET_INFO"; request and reply. */
export const DeviceInfoLayout = { argsz: 0, flags: 4, regions: 8, irqs: 12, length: 16 } as const;
export const DeviceFlag = { reset: 1, pci: 2 } as const;

/** "VFIO_USER_DEVICE_GET_REGION_INFO"; request and reply, in which capabilities may follow. */
export const RegionInfoLayout = {
  argsz: 0,
  flags: 4,
  index: 8,
  capOffset: 12,
  size: 16,
  offset: 24,
  length: 32,
} as const;
export const RegionFlag = { read: 1, write: 2, mmap: 4, caps: 8 } as const;
/** "VFIO cap header format": `next` counts from the start of the region info, 0 ends the list. */
export const RegionCap = { id: 0, version: 2, next: 4, length: 8 } as const;
export const RegionCapId = { sparseMmap: 1 } as const;
/** "VFIO region info cap sparse mmap", after the header of the capability; areas of offset u64, size u64. */
export const SparseMmap = { areas: 8, reserved: 12, first: 16, areaOffset: 0, areaSize: 8, areaLength: 16 } as const;

/** "VFIO_USER_DEVICE_GET_IRQ_INFO"; request and reply. */
export const IrqInfoLayout = { argsz: 0, flags: 4, index: 8, count: 12, length: 16 } as const;
export const IrqFlag = { eventfd: 1, maskable: 2, automasked: 4, noResize: 8 } as const;
/** Interrupt types of a PCI device (linux/vfio.h). */
export const PciIrq = { intx: 0, msi: 1, msix: 2, error: 3, request: 4 } as const;

/** "VFIO_USER_DEVICE_SET_IRQS". One data flag and one action flag are set. */
export const SetIrqs = { argsz: 0, flags: 4, index: 8, start: 12, count: 16, data: 20, length: 20 } as const;
export const SetIrqsFlag = { dataNone: 1, dataBool: 2, dataEventfd: 4, mask: 8, unmask: 16, trigger: 32 } as const;
const SET_IRQS_DATA = SetIrqsFlag.dataNone | SetIrqsFlag.dataBool | SetIrqsFlag.dataEventfd;
const SET_IRQS_ACTION = SetIrqsFlag.mask | SetIrqsFlag.unmask | SetIrqsFlag.trigger;

/** "VFIO_USER_REGION_READ" and "VFIO_USER_REGION_WRITE"; requests and replies. */
export const RegionAccess = { offset: 0, region: 8, count: 12, data: 16, length: 16 } as const;
/** "VFIO_USER_DMA_READ" and "VFIO_USER_DMA_WRITE"; requests and replies. */
export const DmaAccess = { address: 0, count: 8, data: 16, length: 16 } as const;

/** "Capabilities" of VERSION: the values that hold when a side does not name them. */
export const DEFAULT_CAPABILITIES: Capabilities = {
  maxMessageDescriptors: 1,
  maxDataTransfer: 1048576,
  maxDmaMaps: 65535,
  pageSizes: 4096,
};

/** What one side of a session can take. */
export interface Capabilities {
  /** max_msg_fds: descriptors in one message. */
  readonly maxMessageDescriptors: number;
  /** max_data_xfer_size: bytes of data in one read or write message. */
  readonly maxDataTransfer: number;
  /** max_dma_maps: mappings at one time. */
  readonly maxDmaMaps: number;
  /** pgsizes: page sizes of DMA mappings, or'ed together. */
  readonly pageSizes: number;
}

/** The largest message that either side has reason to send: data of the default size and room for any fixed part. */
export const MAX_MESSAGE_SIZE = 1048576 + 4096;
/** The longest region info that makes sense: 4095 sparse areas. */
export const MAX_REGION_INFO_SIZE = 65536;

/** A violation of the protocol by the other side. */
export function protocolError(message: string, cause?: unknown): VfioError {
  return new VfioError('PROTOCOL', `vfio-user: ${message}`, cause === undefined ? {} : { cause });
}

const COMMAND_NAMES = new Map<number, string>(
  Object.entries(Command).map(([name, value]) => [value, name.replace(/[A-Z]/g, '_$&').toUpperCase()]),
);

/** Name of a command as the protocol spells it: `DMA_MAP`. */
export function commandName(command: number): string {
  return COMMAND_NAMES.get(command) ?? `command ${command}`;
}

/** The command of a message that was encoded here. */
export function commandOf(message: Uint8Array): number {
  return readU16(message, Header.command);
}

// --- messages

/** A request with `payloadLength` zeroed bytes of payload. */
export function request(command: number, payloadLength: number, flags: number = HeaderFlag.request): Uint8Array {
  const message = new Uint8Array(Header.length + payloadLength);
  writeU16(message, Header.command, command);
  writeU32(message, Header.size, message.length);
  writeU32(message, Header.flags, flags);
  return message;
}

/** The reply to request `id`, with `payload`. */
export function reply(id: number, command: number, payload: Uint8Array = EMPTY): Uint8Array {
  const message = request(command, payload.length, HeaderFlag.reply);
  writeU16(message, Header.id, id);
  message.set(payload, Header.length);
  return message;
}

/** The reply that request `id` failed with `errno`; it has no payload. */
export function errorReply(id: number, command: number, errno: number): Uint8Array {
  const message = request(command, 0, HeaderFlag.reply | HeaderFlag.error);
  writeU16(message, Header.id, id);
  writeU32(message, Header.error, errno);
  return message;
}

const EMPTY = new Uint8Array(0);

// --- VERSION

export interface VersionMessage {
  readonly major: number;
  readonly minor: number;
  readonly capabilities: Capabilities;
}

/** The payload of a VERSION request or reply. */
export function encodeVersion(version: VersionMessage): Uint8Array {
  const { capabilities } = version;
  const json = JSON.stringify({
    capabilities: {
      max_msg_fds: capabilities.maxMessageDescriptors,
      max_data_xfer_size: capabilities.maxDataTransfer,
      max_dma_maps: capabilities.maxDmaMaps,
      pgsizes: capabilities.pageSizes,
    },
  });
  const data = new TextEncoder().encode(`${json}\0`);
  const payload = new Uint8Array(Version.fixed + data.length);
  writeU16(payload, Version.major, version.major);
  writeU16(payload, Version.minor, version.minor);
  payload.set(data, Version.data);
  return payload;
}

/** Capabilities that are missing take their defaults; unknown ones are ignored; those of a wrong type are `PROTOCOL`. */
export function decodeVersion(payload: Uint8Array): VersionMessage {
  atLeast('VERSION', payload, Version.fixed);
  return {
    major: readU16(payload, Version.major),
    minor: readU16(payload, Version.minor),
    capabilities: decodeCapabilities(payload.subarray(Version.data)),
  };
}

function decodeCapabilities(data: Uint8Array): Capabilities {
  if (data.length === 0) return DEFAULT_CAPABILITIES;
  if (data.indexOf(0) !== data.length - 1) throw protocolError('VERSION data does not end with its only NUL');
  let json: unknown;
  try {
    json = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(data.subarray(0, data.length - 1)));
  } catch (cause) {
    throw protocolError('VERSION data is not JSON', cause);
  }
  if (!isObject(json)) throw protocolError('VERSION data is not a JSON object');
  const { capabilities: given = {} } = json;
  if (!isObject(given)) throw protocolError('capabilities is not a JSON object');
  const number = (name: string, least: number, fallback: number): number => {
    const value = given[name];
    if (value === undefined) return fallback;
    if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < least) {
      throw protocolError(`capability ${name} is not an integer of at least ${least}`);
    }
    return value;
  };
  return {
    maxMessageDescriptors: number('max_msg_fds', 0, DEFAULT_CAPABILITIES.maxMessageDescriptors),
    maxDataTransfer: number('max_data_xfer_size', 8, DEFAULT_CAPABILITIES.maxDataTransfer),
    maxDmaMaps: number('max_dma_maps', 0, DEFAULT_CAPABILITIES.maxDmaMaps),
    pageSizes: number('pgsizes', 1, DEFAULT_CAPABILITIES.pageSizes),
  };
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

// --- DMA_MAP and DMA_UNMAP

export interface DmaMapMessage {
  /** `DmaMapFlag`. */
  readonly flags: number;
  /** Offset in the file whose descriptor comes along. */
  readonly offset: number;
  readonly address: number;
  readonly size: number;
}

/** `argsz` is what the sender says of the size of its message, or of the reply that it takes. */
export function encodeDmaMap(map: DmaMapMessage): Uint8Array {
  const message = request(Command.dmaMap, DmaMap.length);
  const payload = message.subarray(Header.length);
  writeU32(payload, DmaMap.argsz, DmaMap.length);
  writeU32(payload, DmaMap.flags, map.flags);
  writeU64(payload, DmaMap.offset, map.offset);
  writeU64(payload, DmaMap.address, map.address);
  writeU64(payload, DmaMap.size, map.size);
  return message;
}

export function decodeDmaMap(payload: Uint8Array): DmaMapMessage {
  atLeast('DMA_MAP', payload, DmaMap.length);
  const offset = exact('DMA_MAP offset', readU64(payload, DmaMap.offset));
  const address = exact('DMA_MAP address', readU64(payload, DmaMap.address));
  const size = exact('DMA_MAP size', readU64(payload, DmaMap.size));
  exact('DMA_MAP end', address + size);
  exact('DMA_MAP end of file', offset + size);
  if (size === 0) throw protocolError('DMA_MAP of no bytes');
  return { flags: readU32(payload, DmaMap.flags), offset, address, size };
}

export interface DmaUnmapMessage {
  readonly flags: number;
  /** The nearest double when beyond 2^53, as QEMU may name all of a 64-bit space. */
  readonly address: number;
  readonly size: number;
}

export function encodeDmaUnmap(unmap: DmaUnmapMessage): Uint8Array {
  const message = request(Command.dmaUnmap, DmaUnmap.length);
  const payload = message.subarray(Header.length);
  writeU32(payload, DmaUnmap.argsz, DmaUnmap.length);
  writeU32(payload, DmaUnmap.flags, unmap.flags);
  writeU64(payload, DmaUnmap.address, unmap.address);
  writeU64(payload, DmaUnmap.size, unmap.size);
  return message;
}

/** Request or reply (the reply repeats the request: send `payload.slice(0, DmaUnmap.length)`). */
export function decodeDmaUnmap(payload: Uint8Array): DmaUnmapMessage {
  atLeast('DMA_UNMAP', payload, DmaUnmap.length);
  return {
    flags: readU32(payload, DmaUnmap.flags),
    address: readU64(payload, DmaUnmap.address),
    size: readU64(payload, DmaUnmap.size),
  };
}

/** Checks that the payload of a reply says that exactly this range was unmapped. */
export function checkUnmapped(payload: Uint8Array, address: number, size: number): void {
  exactly('DMA_UNMAP reply', payload, DmaUnmap.length);
  const unmapped = decodeDmaUnmap(payload);
  if (unmapped.address !== address || unmapped.size !== size)
    throw protocolError('another range was unmapped than asked');
}

// --- DEVICE_GET_INFO

export interface DeviceInfo {
  /** `DeviceFlag`. */
  readonly flags: number;
  readonly regions: number;
  readonly irqs: number;
}

export function encodeDeviceInfoRequest(): Uint8Array {
  const message = request(Command.deviceGetInfo, DeviceInfoLayout.length);
  writeU32(message, Header.length + DeviceInfoLayout.argsz, DeviceInfoLayout.length);
  return message;
}

/** The payload of a reply. */
export function encodeDeviceInfo(info: DeviceInfo): Uint8Array {
  const payload = new Uint8Array(DeviceInfoLayout.length);
  writeU32(payload, DeviceInfoLayout.argsz, DeviceInfoLayout.length);
  writeU32(payload, DeviceInfoLayout.flags, info.flags);
  writeU32(payload, DeviceInfoLayout.regions, info.regions);
  writeU32(payload, DeviceInfoLayout.irqs, info.irqs);
  return payload;
}

export function decodeDeviceInfo(payload: Uint8Array): DeviceInfo {
  exactly('DEVICE_GET_INFO', payload, DeviceInfoLayout.length);
  return {
    flags: readU32(payload, DeviceInfoLayout.flags),
    regions: readU32(payload, DeviceInfoLayout.regions),
    irqs: readU32(payload, DeviceInfoLayout.irqs),
  };
}

// --- DEVICE_GET_REGION_INFO

export interface MappableArea {
  /** Bytes from the start of the region. */
  readonly offset: number;
  readonly size: number;
}

export interface RegionInfo {
  readonly index: number;
  /** `RegionFlag`, without `caps`, which follows from `areas`. */
  readonly flags: number;
  /** Bytes. */
  readonly size: number;
  /** Where the region begins in the file whose descriptor comes along. */
  readonly offset: number;
  /** The parts that can be mapped, from the sparse mmap capability; null without one (then all of it, if `mmap` is set). */
  readonly areas: readonly MappableArea[] | null;
}

/** The request for region `index`; `argsz` is the longest reply payload that is welcome, at least 32. */
export function encodeRegionInfoRequest(index: number, argsz: number): Uint8Array {
  const message = request(Command.deviceGetRegionInfo, RegionInfoLayout.length);
  writeU32(message, Header.length + RegionInfoLayout.argsz, argsz);
  writeU32(message, Header.length + RegionInfoLayout.index, index);
  return message;
}

/** What a client asks with `argsz` and `index`: DEVICE_GET_REGION_INFO and DEVICE_GET_IRQ_INFO start alike. */
export function decodeInfoRequest(name: string, payload: Uint8Array): { argsz: number; index: number } {
  atLeast(name, payload, RegionInfoLayout.index + 4);
  return { argsz: readU32(payload, RegionInfoLayout.argsz), index: readU32(payload, RegionInfoLayout.index) };
}

/**
 * The payload of a reply to a client that takes `argsz` bytes. A reply that does not fit leaves the capabilities out, but says
 * where they would be and how much room they need: QEMU asks again with that.
 */
export function encodeRegionInfo(info: RegionInfo, argsz: number): Uint8Array {
  const areas = info.areas ?? [];
  const capLength = info.areas === null ? 0 : SparseMmap.first + areas.length * SparseMmap.areaLength;
  const needed = RegionInfoLayout.length + capLength;
  const payload = new Uint8Array(needed <= argsz ? needed : RegionInfoLayout.length);
  writeU32(payload, RegionInfoLayout.argsz, needed);
  writeU32(payload, RegionInfoLayout.flags, info.flags | (capLength > 0 ? RegionFlag.caps : 0));
  writeU32(payload, RegionInfoLayout.index, info.index);
  writeU32(payload, RegionInfoLayout.capOffset, capLength > 0 ? RegionInfoLayout.length : 0);
  writeU64(payload, RegionInfoLayout.size, info.size);
  writeU64(payload, RegionInfoLayout.offset, info.offset);
  if (payload.length === RegionInfoLayout.length) return payload;
  const at = RegionInfoLayout.length;
  writeU16(payload, at + RegionCap.id, RegionCapId.sparseMmap);
  writeU16(payload, at + RegionCap.version, 1);
  writeU32(payload, at + SparseMmap.areas, areas.length);
  areas.forEach((area, i) => {
    const entry = at + SparseMmap.first + i * SparseMmap.areaLength;
    writeU64(payload, entry + SparseMmap.areaOffset, area.offset);
    writeU64(payload, entry + SparseMmap.areaSize, area.size);
  });
  return payload;
}

/** A reply: the region, or how many bytes of payload its description needs when the request allowed too few. */
export function decodeRegionInfo(payload: Uint8Array): RegionInfo | { needs: number } {
  atLeast('DEVICE_GET_REGION_INFO', payload, RegionInfoLayout.length);
  const argsz = readU32(payload, RegionInfoLayout.argsz);
  const flags = readU32(payload, RegionInfoLayout.flags);
  const hasCaps = (flags & RegionFlag.caps) !== 0;
  if (hasCaps && argsz > payload.length) return { needs: argsz };
  const size = exact('region size', readU64(payload, RegionInfoLayout.size));
  const offset = exact('region offset', readU64(payload, RegionInfoLayout.offset));
  exact('region end', offset + size);
  return {
    index: readU32(payload, RegionInfoLayout.index),
    flags: (flags & ~RegionFlag.caps) >>> 0,
    size,
    offset,
    areas: hasCaps ? sparseAreas(payload, size) : null,
  };
}

/** Walks the capabilities; all but sparse mmap are passed over. */
function sparseAreas(payload: Uint8Array, regionSize: number): MappableArea[] | null {
  const seen = new Set<number>();
  let areas: MappableArea[] | null = null;
  for (let at = readU32(payload, RegionInfoLayout.capOffset); at !== 0; at = readU32(payload, at + RegionCap.next)) {
    if (seen.has(at)) throw new VfioError('CAPABILITY_LOOP', `vfio-user: region capability ${at} leads back to itself`);
    seen.add(at);
    if (at < RegionInfoLayout.length || at + RegionCap.length > payload.length) throw outside(at);
    if (readU16(payload, at + RegionCap.id) !== RegionCapId.sparseMmap) continue;
    if (at + SparseMmap.first > payload.length) throw outside(at);
    const count = readU32(payload, at + SparseMmap.areas);
    if (at + SparseMmap.first + count * SparseMmap.areaLength > payload.length) throw outside(at);
    areas = [];
    for (let i = 0; i < count; i++) {
      const entry = at + SparseMmap.first + i * SparseMmap.areaLength;
      const area = {
        offset: readU64(payload, entry + SparseMmap.areaOffset),
        size: readU64(payload, entry + SparseMmap.areaSize),
      };
      if (area.offset + area.size > regionSize) {
        throw new VfioError(
          'CAPABILITY_BOUNDS',
          `vfio-user: mappable area at ${area.offset} ends outside of its region`,
        );
      }
      areas.push(area);
    }
  }
  return areas;
}

function outside(at: number): VfioError {
  return new VfioError('CAPABILITY_BOUNDS', `vfio-user: region capability at ${at} is outside of its message`);
}

// --- DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS

export interface IrqInfo {
  readonly index: number;
  /** `IrqFlag`. */
  readonly flags: number;
  readonly count: number;
}

export function encodeIrqInfoRequest(index: number): Uint8Array {
  const message = request(Command.deviceGetIrqInfo, IrqInfoLayout.length);
  writeU32(message, Header.length + IrqInfoLayout.argsz, IrqInfoLayout.length);
  writeU32(message, Header.length + IrqInfoLayout.index, index);
  return message;
}

/** The payload of a reply. */
export function encodeIrqInfo(info: IrqInfo): Uint8Array {
  const payload = new Uint8Array(IrqInfoLayout.length);
  writeU32(payload, IrqInfoLayout.argsz, IrqInfoLayout.length);
  writeU32(payload, IrqInfoLayout.flags, info.flags);
  writeU32(payload, IrqInfoLayout.index, info.index);
  writeU32(payload, IrqInfoLayout.count, info.count);
  return payload;
}

export function decodeIrqInfo(payload: Uint8Array): IrqInfo {
  exactly('DEVICE_GET_IRQ_INFO', payload, IrqInfoLayout.length);
  return {
    index: readU32(payload, IrqInfoLayout.index),
    flags: readU32(payload, IrqInfoLayout.flags),
    count: readU32(payload, IrqInfoLayout.count),
  };
}

export interface SetIrqsMessage {
  /** `SetIrqsFlag`: one data flag, one action flag. */
  readonly flags: number;
  readonly index: number;
  readonly start: number;
  readonly count: number;
  /** One byte per interrupt with `dataBool`, else empty. */
  readonly data: Uint8Array;
}

export function encodeSetIrqs(set: SetIrqsMessage): Uint8Array {
  const message = request(Command.deviceSetIrqs, SetIrqs.length + set.data.length);
  const payload = message.subarray(Header.length);
  writeU32(payload, SetIrqs.argsz, payload.length);
  writeU32(payload, SetIrqs.flags, set.flags);
  writeU32(payload, SetIrqs.index, set.index);
  writeU32(payload, SetIrqs.start, set.start);
  writeU32(payload, SetIrqs.count, set.count);
  payload.set(set.data, SetIrqs.data);
  return message;
}

/** Whether the interrupts exist is for the caller to check: `start + count` may be anything below 2^33. */
export function decodeSetIrqs(payload: Uint8Array): SetIrqsMessage {
  atLeast('DEVICE_SET_IRQS', payload, SetIrqs.length);
  const flags = readU32(payload, SetIrqs.flags);
  const count = readU32(payload, SetIrqs.count);
  if (!isOneBit(flags & SET_IRQS_DATA) || !isOneBit(flags & SET_IRQS_ACTION) || flags >>> 6 !== 0) {
    throw protocolError(`DEVICE_SET_IRQS flags 0x${flags.toString(16)} are not one data and one action flag`);
  }
  const dataLength = (flags & SetIrqsFlag.dataBool) !== 0 ? count : 0;
  atLeast('DEVICE_SET_IRQS', payload, SetIrqs.length + dataLength);
  return {
    flags,
    index: readU32(payload, SetIrqs.index),
    start: readU32(payload, SetIrqs.start),
    count,
    data: payload.slice(SetIrqs.data, SetIrqs.data + dataLength),
  };
}

function isOneBit(bits: number): boolean {
  return bits !== 0 && (bits & (bits - 1)) === 0;
}

// --- REGION_READ and REGION_WRITE

export interface RegionAccessMessage {
  readonly region: number;
  readonly offset: number;
  readonly count: number;
  /** `count` bytes, or none in a message that carries none; a view of the payload. */
  readonly data: Uint8Array;
}

export function encodeRegionRead(region: number, offset: number, count: number): Uint8Array {
  const message = request(Command.regionRead, RegionAccess.length);
  writeRegionAccess(message.subarray(Header.length), region, offset, count);
  return message;
}

export function encodeRegionWrite(region: number, offset: number, data: Uint8Array, flags = 0): Uint8Array {
  const message = request(Command.regionWrite, RegionAccess.length + data.length, flags);
  writeRegionAccess(message.subarray(Header.length), region, offset, data.length);
  message.set(data, Header.length + RegionAccess.data);
  return message;
}

/** The payload of the reply to a REGION_READ (`data` as read), or to a REGION_WRITE of `count` bytes (no `data`). */
export function encodeRegionReply(region: number, offset: number, count: number, data: Uint8Array = EMPTY): Uint8Array {
  const payload = new Uint8Array(RegionAccess.length + data.length);
  writeRegionAccess(payload, region, offset, count);
  payload.set(data, RegionAccess.data);
  return payload;
}

function writeRegionAccess(payload: Uint8Array, region: number, offset: number, count: number): void {
  writeU64(payload, RegionAccess.offset, offset);
  writeU32(payload, RegionAccess.region, region);
  writeU32(payload, RegionAccess.count, count);
}

/**
 * A request or reply. `carriesData`: a REGION_WRITE request or a REGION_READ reply, in which exactly `count` bytes follow; nothing
 * follows in the other two.
 */
export function decodeRegionAccess(payload: Uint8Array, carriesData: boolean): RegionAccessMessage {
  const name = 'REGION_READ or REGION_WRITE';
  atLeast(name, payload, RegionAccess.length);
  const count = readU32(payload, RegionAccess.count);
  exactly(name, payload, RegionAccess.length + (carriesData ? count : 0));
  return {
    region: readU32(payload, RegionAccess.region),
    offset: readU64(payload, RegionAccess.offset),
    count,
    data: payload.subarray(RegionAccess.data),
  };
}

// --- DMA_READ and DMA_WRITE

export interface DmaAccessMessage {
  readonly address: number;
  readonly count: number;
  /** `count` bytes, or none in a message that carries none; a view of the payload. */
  readonly data: Uint8Array;
}

/** Server: asks for `count` bytes of client memory. */
export function encodeDmaRead(address: number, count: number): Uint8Array {
  const message = request(Command.dmaRead, DmaAccess.length);
  writeDmaAccess(message.subarray(Header.length), address, count);
  return message;
}

/** Server: stores `data` to client memory. */
export function encodeDmaWrite(address: number, data: Uint8Array): Uint8Array {
  const message = request(Command.dmaWrite, DmaAccess.length + data.length);
  writeDmaAccess(message.subarray(Header.length), address, data.length);
  message.set(data, Header.length + DmaAccess.data);
  return message;
}

/** The payload of the reply to a DMA_READ (`data` as read), or to a DMA_WRITE of `count` bytes (no `data`). */
export function encodeDmaReply(address: number, count: number, data: Uint8Array = EMPTY): Uint8Array {
  const payload = new Uint8Array(DmaAccess.length + data.length);
  writeDmaAccess(payload, address, count);
  payload.set(data, DmaAccess.data);
  return payload;
}

function writeDmaAccess(payload: Uint8Array, address: number, count: number): void {
  writeU64(payload, DmaAccess.address, address);
  writeU64(payload, DmaAccess.count, count);
}

/** A request or reply; `carriesData` as for `decodeRegionAccess`: a DMA_WRITE request or a DMA_READ reply. */
export function decodeDmaAccess(payload: Uint8Array, carriesData: boolean): DmaAccessMessage {
  const name = 'DMA_READ or DMA_WRITE';
  atLeast(name, payload, DmaAccess.length);
  const count = readU64(payload, DmaAccess.count);
  exactly(name, payload, DmaAccess.length + (carriesData ? count : 0));
  return { address: readU64(payload, DmaAccess.address), count, data: payload.subarray(DmaAccess.data) };
}

// --- checks

/** A fixed structure, after which a newer peer may put more. */
function atLeast(name: string, payload: Uint8Array, length: number): void {
  if (payload.length < length) throw protocolError(`${name} of ${payload.length} bytes, too short for ${length}`);
}

function exactly(name: string, payload: Uint8Array, length: number): void {
  if (payload.length !== length) throw protocolError(`${name} of ${payload.length} bytes instead of ${length}`);
}

/** A number that must be exact to be of use. */
function exact(name: string, value: number): number {
  if (!Number.isSafeInteger(value)) throw protocolError(`${name} is beyond 2^53`);
  return value;
}
