/** vfio-user: DMA mappings, and accesses to regions and to DMA memory. `protocol.ts` is the entry. */
import { readU32, readU64, writeU32, writeU64 } from '../sys/little-endian.ts';
import {
  atLeast,
  Command,
  DmaAccess,
  DmaMap,
  DmaUnmap,
  EMPTY,
  exact,
  exactly,
  Header,
  protocolError,
  RegionAccess,
  request,
} from './protocol-layout.ts';

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
 * A request or reply. `carriesData`: a REGION_WRITE request or a REGION_READ reply, in which exactly `count` bytes
 * follow; nothing follows in the other two.
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
