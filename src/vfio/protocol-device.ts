/** vfio-user: what a device says of itself, and how its interrupts are set. `protocol.ts` is the entry. */
import { VfioError } from '../errors.ts';
import { readU16, readU32, readU64, writeU16, writeU32, writeU64 } from '../sys/little-endian.ts';
import {
  atLeast,
  Command,
  DeviceInfoLayout,
  exact,
  exactly,
  Header,
  IrqInfoLayout,
  protocolError,
  RegionCap,
  RegionCapId,
  RegionFlag,
  RegionInfoLayout,
  request,
  SetIrqs,
  SetIrqsFlag,
  SparseMmap,
} from './protocol-layout.ts';

const SET_IRQS_DATA = SetIrqsFlag.dataNone | SetIrqsFlag.dataBool | SetIrqsFlag.dataEventfd;
const SET_IRQS_ACTION = SetIrqsFlag.mask | SetIrqsFlag.unmask | SetIrqsFlag.trigger;

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
  /**
   * The parts that can be mapped, from the sparse mmap capability; null without one (then all of it, if `mmap` is
   * set).
   */
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
 * The payload of a reply to a client that takes `argsz` bytes. A reply that does not fit leaves the capabilities out,
 * but says where they would be and how much room they need: QEMU asks again with that.
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
