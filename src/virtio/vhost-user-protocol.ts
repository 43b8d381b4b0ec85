/**
 * The messages of vhost-user as a front-end sends and reads them (QEMU's docs/interop/vhost-user.rst, "Message
 * Specification" and "Front-end message types"): numbers, layouts, codecs. Numbers are in machine order, which is
 * little-endian on the machines that this package runs on.
 *
 * Left out: messages for migration, IOTLB, in-flight tracking, in-band notifications, cryptographic sessions and
 * everything that a back-end may ask of a front-end.
 */
import { VfioError } from '../errors.ts';
import { readU32, writeU32, writeU64 } from '../sys/little-endian.ts';
import { FeatureSet } from './features.ts';

/** "Header": three 32-bit fields in front of the payload. */
export const Header = { request: 0, flags: 4, size: 8, length: 12 } as const;
/** "Header": the two lowest bits of the flags are the version. */
export const HeaderFlag = { version: 1, versionMask: 3, reply: 4, needReply: 8 } as const;

/** "Front-end message types". */
export const Request = {
  GET_FEATURES: 1,
  SET_FEATURES: 2,
  SET_OWNER: 3,
  SET_MEM_TABLE: 5,
  SET_VRING_NUM: 8,
  SET_VRING_ADDR: 9,
  SET_VRING_BASE: 10,
  GET_VRING_BASE: 11,
  SET_VRING_KICK: 12,
  SET_VRING_CALL: 13,
  SET_VRING_ERR: 14,
  GET_PROTOCOL_FEATURES: 15,
  SET_PROTOCOL_FEATURES: 16,
  GET_QUEUE_NUM: 17,
  SET_VRING_ENABLE: 18,
  GET_CONFIG: 24,
  RESET_DEVICE: 34,
  GET_MAX_MEM_SLOTS: 36,
  ADD_MEM_REG: 37,
  REM_MEM_REG: 38,
  SET_STATUS: 39,
  GET_STATUS: 40,
} as const;

const requestNames = new Map<number, string>(Object.entries(Request).map(([name, id]) => [id, name]));

/** Name of a request as the protocol spells it, without its prefix. */
export function requestName(request: number): string {
  return requestNames.get(request) ?? `request ${request}`;
}

/** Feature bits that belong to vhost, not to virtio: they are the transport's own ("Communication", "Migration"). */
export const VhostFeature = { LOG_ALL: 26, PROTOCOL_FEATURES: 30 } as const;

/** "Protocol features". */
export const ProtocolFeature = {
  MQ: 0,
  LOG_SHMFD: 1,
  RARP: 2,
  REPLY_ACK: 3,
  MTU: 4,
  BACKEND_REQ: 5,
  CROSS_ENDIAN: 6,
  CRYPTO_SESSION: 7,
  PAGEFAULT: 8,
  CONFIG: 9,
  BACKEND_SEND_FD: 10,
  HOST_NOTIFIER: 11,
  INFLIGHT_SHMFD: 12,
  RESET_DEVICE: 13,
  INBAND_NOTIFICATIONS: 14,
  CONFIGURE_MEM_SLOTS: 15,
  STATUS: 16,
  XEN_MMAP: 17,
  SHARED_OBJECT: 18,
  DEVICE_STATE: 19,
} as const;

const protocolNames = new Map<number, string>(Object.entries(ProtocolFeature).map(([name, bit]) => [bit, name]));

/** Name of a protocol feature without its prefix, or `bit 45`. */
export function protocolFeatureName(bit: number): string {
  return protocolNames.get(bit) ?? `bit ${bit}`;
}

/** "A vring state description", "A vring address description", "Memory regions description", "Virtio device config space". */
export const Payload = { u64: 8, ringState: 8, ringAddress: 40, region: 32, regionsHead: 8, configHead: 12 } as const;

/** SET_MEM_TABLE describes this many regions at most. */
export const MAX_TABLE_REGIONS = 8;
/** SET_VRING_KICK, _CALL and _ERR name a ring with 8 bits; bit 8 says that no descriptor comes with them. */
export const MAX_RINGS = 256;
const NO_DESCRIPTOR = 0x100;

/** Memory that the back-end may reach. Both its addresses are names that the front-end chooses. */
export interface MemoryRegion {
  /** What descriptors in rings say: our IOVA. */
  readonly guestAddress: number;
  /** What SET_VRING_ADDR says. */
  readonly userAddress: number;
  readonly size: number;
  /** File that holds it, and where in that. */
  readonly fd: number;
  readonly offset: number;
}

/** A message with room for `length` bytes of payload from `Header.length` on. */
function message(request: number, length = 0): Uint8Array {
  const bytes = new Uint8Array(Header.length + length);
  writeU32(bytes, Header.request, request);
  writeU32(bytes, Header.flags, HeaderFlag.version);
  writeU32(bytes, Header.size, length);
  return bytes;
}

/** A request without payload. */
export function encodeEmpty(request: number): Uint8Array {
  return message(request);
}

export function encodeU64(request: number, low: number, high = 0): Uint8Array {
  const bytes = message(request, Payload.u64);
  writeU32(bytes, Header.length, low);
  writeU32(bytes, Header.length + 4, high);
  return bytes;
}

/** A set of features or of protocol features. Throws RangeError for bits from 64 on. */
export function encodeFeatures(request: number, features: FeatureSet): Uint8Array {
  const [low, high, ...rest] = features.words;
  if (rest.some((word) => word !== 0)) throw new RangeError('vhost-user carries 64 feature bits');
  return encodeU64(request, low, high);
}

export function encodeRingState(request: number, index: number, num: number): Uint8Array {
  const bytes = message(request, Payload.ringState);
  writeU32(bytes, Header.length, index);
  writeU32(bytes, Header.length + 4, num);
  return bytes;
}

export interface RingAddresses {
  readonly descriptorArea: number;
  readonly driverArea: number;
  readonly deviceArea: number;
}

/** SET_VRING_ADDR, with user addresses; dirty pages are not logged. */
export function encodeRingAddresses(index: number, areas: RingAddresses): Uint8Array {
  const bytes = message(Request.SET_VRING_ADDR, Payload.ringAddress);
  writeU32(bytes, Header.length, index);
  writeU64(bytes, Header.length + 8, areas.descriptorArea);
  writeU64(bytes, Header.length + 16, areas.deviceArea);
  writeU64(bytes, Header.length + 24, areas.driverArea);
  return bytes;
}

/** SET_VRING_KICK, SET_VRING_CALL or SET_VRING_ERR; without a descriptor the ring is polled. */
export function encodeRingEvent(request: number, index: number, hasDescriptor: boolean): Uint8Array {
  return encodeU64(request, hasDescriptor ? index : index | NO_DESCRIPTOR);
}

/** SET_MEM_TABLE; the descriptors of the regions go with it, in their order. */
export function encodeMemoryTable(regions: readonly MemoryRegion[]): Uint8Array {
  if (regions.length > MAX_TABLE_REGIONS) throw new RangeError(`${regions.length} regions in a table`);
  const bytes = message(Request.SET_MEM_TABLE, Payload.regionsHead + regions.length * Payload.region);
  writeU32(bytes, Header.length, regions.length);
  for (const [i, region] of regions.entries()) {
    putRegion(bytes, Header.length + Payload.regionsHead + i * Payload.region, region);
  }
  return bytes;
}

/** ADD_MEM_REG, with the region's descriptor, or REM_MEM_REG. */
export function encodeRegion(request: number, region: MemoryRegion): Uint8Array {
  const bytes = message(request, Payload.regionsHead + Payload.region);
  putRegion(bytes, Header.length + Payload.regionsHead, region);
  return bytes;
}

function putRegion(bytes: Uint8Array, at: number, region: MemoryRegion): void {
  writeU64(bytes, at, region.guestAddress);
  writeU64(bytes, at + 8, region.size);
  writeU64(bytes, at + 16, region.userAddress);
  writeU64(bytes, at + 24, region.offset);
}

/** GET_CONFIG of `size` bytes from `offset` on: the answer has room in the question. */
export function encodeGetConfig(offset: number, size: number): Uint8Array {
  const bytes = message(Request.GET_CONFIG, Payload.configHead + size);
  writeU32(bytes, Header.length, offset);
  writeU32(bytes, Header.length + 4, size);
  return bytes;
}

/** The bytes of a reply to GET_CONFIG; null when the back-end says that it does not have them. */
export function decodeConfig(payload: Uint8Array, offset: number, size: number): Uint8Array | null {
  if (payload.length === 0 || payload.length === Payload.configHead) return null;
  if (payload.length !== Payload.configHead + size || readU32(payload, 0) !== offset || readU32(payload, 4) !== size) {
    throw protocolError(`an answer of ${payload.length} bytes to GET_CONFIG of ${size} bytes at ${offset}`);
  }
  return payload.subarray(Payload.configHead);
}

export function decodeFeatures(payload: Uint8Array): FeatureSet {
  return FeatureSet.fromWords([readU32(payload, 0), readU32(payload, 4)]);
}

/** A number that must not be above `max`, below 2^32. */
export function decodeNumber(request: number, payload: Uint8Array, max: number): number {
  const [low, high] = [readU32(payload, 0), readU32(payload, 4)];
  if (high !== 0 || low > max) throw protocolError(`${requestName(request)} gives more than ${max}`);
  return low;
}

export function protocolError(text: string, cause?: unknown): VfioError {
  return new VfioError('PROTOCOL', `vhost-user: ${text}`, cause === undefined ? {} : { cause });
}
