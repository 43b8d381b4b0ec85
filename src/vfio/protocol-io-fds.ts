/** vfio-user: DEVICE_GET_REGION_IO_FDS, registers that are written to by way of a descriptor. `protocol.ts` is the entry. */
import { readU32, readU64, writeU32, writeU64 } from '../sys/little-endian.ts';
import {
  atLeast,
  Command,
  exact,
  Header,
  IoFdType,
  protocolError,
  RegionIoFds,
  request,
  SubRegion,
} from './protocol-layout.ts';

/** The longest reply that makes sense: more than a thousand sub-regions. */
export const MAX_IO_FDS_SIZE = 65536;

/** Bytes of a region whose writes are told of by a descriptor. */
export interface IoFdArea {
  /** Bytes from the start of the region. */
  readonly offset: number;
  /** Bytes; 0 when the width of the access does not matter. */
  readonly size: number;
  /** Index among the descriptors that come with the message; several areas may share one. */
  readonly descriptor: number;
  /** `IoFdType`. */
  readonly type: number;
  /** 0, or conditions on the access. */
  readonly flags: number;
}

export interface IoFds {
  readonly index: number;
  readonly areas: readonly IoFdArea[];
}

/** The request for region `index`; a reply that is longer than `MAX_IO_FDS_SIZE` comes without its areas. */
export function encodeIoFdsRequest(index: number): Uint8Array {
  const message = request(Command.deviceGetRegionIoFds, RegionIoFds.length);
  writeU32(message, Header.length + RegionIoFds.argsz, MAX_IO_FDS_SIZE);
  writeU32(message, Header.length + RegionIoFds.index, index);
  return message;
}

/** The payload of a reply to a client that takes `argsz` bytes. One that does not fit has no areas but says how many there are. */
export function encodeIoFds({ index, areas }: IoFds, argsz: number): Uint8Array {
  const needed = RegionIoFds.length + areas.length * SubRegion.length;
  const payload = new Uint8Array(needed <= argsz ? needed : RegionIoFds.length);
  writeU32(payload, RegionIoFds.argsz, needed);
  writeU32(payload, RegionIoFds.index, index);
  writeU32(payload, RegionIoFds.count, areas.length);
  if (payload.length < needed) return payload;
  areas.forEach((area, i) => {
    const at = RegionIoFds.length + i * SubRegion.length;
    writeU64(payload, at + SubRegion.offset, area.offset);
    writeU64(payload, at + SubRegion.size, area.size);
    writeU32(payload, at + SubRegion.fdIndex, area.descriptor);
    writeU32(payload, at + SubRegion.type, area.type);
    writeU32(payload, at + SubRegion.flags, area.flags);
  });
  return payload;
}

/** A reply. Areas are as the server says: whether they lie in the region, and have a descriptor, is for the caller to see. */
export function decodeIoFds(payload: Uint8Array): IoFds {
  atLeast('DEVICE_GET_REGION_IO_FDS', payload, RegionIoFds.length);
  const index = readU32(payload, RegionIoFds.index);
  const count = readU32(payload, RegionIoFds.count);
  const argsz = readU32(payload, RegionIoFds.argsz);
  if (count === 0 || payload.length === RegionIoFds.length) return { index, areas: [] };
  const length = (argsz - RegionIoFds.length) / count;
  if (argsz > payload.length || !Number.isInteger(length) || length < SubRegion.length) {
    throw protocolError(`DEVICE_GET_REGION_IO_FDS with ${count} areas in ${argsz} of ${payload.length} bytes`);
  }
  const areas = Array.from({ length: count }, (_, i): IoFdArea => {
    const at = RegionIoFds.length + i * length;
    return {
      offset: exact('area offset', readU64(payload, at + SubRegion.offset)),
      size: exact('area size', readU64(payload, at + SubRegion.size)),
      descriptor: readU32(payload, at + SubRegion.fdIndex),
      type: readU32(payload, at + SubRegion.type),
      flags: readU32(payload, at + SubRegion.flags),
    };
  });
  return { index, areas };
}

/** The area whose descriptor stands for a write of `width` bytes at `offset`, whatever is written; undefined when there is none. */
export function ioeventfdAt({ areas }: IoFds, offset: number, width: number): IoFdArea | undefined {
  return areas.find(
    (area) =>
      area.offset === offset &&
      (area.size === 0 || area.size === width) &&
      area.type === IoFdType.ioeventfd &&
      area.flags === 0,
  );
}
