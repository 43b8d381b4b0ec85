/**
 * vfio-user on the wire: numbers, offsets, headers, and the checks that all decoders share. `protocol.ts` is the entry.
 */
import { VfioError } from '../errors.ts';
import { readU16, writeU16, writeU32 } from '../sys/little-endian.ts';

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

/**
 * "VFIO_USER_DEVICE_GET_REGION_IO_FDS"; request and reply, in which `count` sub-regions follow. The length of one follows from `argsz`: 40
 * bytes in the text, 48 as libvfio-user sends them, which differ behind `padding` only.
 */
export const RegionIoFds = { argsz: 0, flags: 4, index: 8, count: 12, length: 16 } as const;
/** "Sub-Region IO FD info format (ioeventfd)". */
export const SubRegion = { offset: 0, size: 8, fdIndex: 16, type: 20, flags: 24, padding: 28, length: 40 } as const;
export const IoFdType = { ioeventfd: 0, ioregionfd: 1 } as const;

/** "VFIO_USER_DEVICE_GET_IRQ_INFO"; request and reply. */
export const IrqInfoLayout = { argsz: 0, flags: 4, index: 8, count: 12, length: 16 } as const;
export const IrqFlag = { eventfd: 1, maskable: 2, automasked: 4, noResize: 8 } as const;
/** Interrupt types of a PCI device (linux/vfio.h). */
export const PciIrq = { intx: 0, msi: 1, msix: 2, error: 3, request: 4 } as const;

/** "VFIO_USER_DEVICE_SET_IRQS". One data flag and one action flag are set. */
export const SetIrqs = { argsz: 0, flags: 4, index: 8, start: 12, count: 16, data: 20, length: 20 } as const;
export const SetIrqsFlag = { dataNone: 1, dataBool: 2, dataEventfd: 4, mask: 8, unmask: 16, trigger: 32 } as const;

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

/** No payload, no data. */
export const EMPTY = new Uint8Array(0);

/** A fixed structure, after which a newer peer may put more. */
export function atLeast(name: string, payload: Uint8Array, length: number): void {
  if (payload.length < length) throw protocolError(`${name} of ${payload.length} bytes, too short for ${length}`);
}

export function exactly(name: string, payload: Uint8Array, length: number): void {
  if (payload.length !== length) throw protocolError(`${name} of ${payload.length} bytes instead of ${length}`);
}

/** A number that must be exact to be of use. */
export function exact(name: string, value: number): number {
  if (!Number.isSafeInteger(value)) throw protocolError(`${name} is beyond 2^53`);
  return value;
}
