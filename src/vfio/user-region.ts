/**
 * A region of a vfio-user device: messages to the server, and plain memory accesses where the server lets us map it, and cannot end this process with
 * it: a file that may become shorter is not mapped.
 */
import { constants } from 'node:fs';
import { SystemError, VfioError } from '../errors.ts';
import { EventFd } from '../sys/eventfd.ts';
import { close, FcntlCommand, fcntl, fstat, Seal } from '../sys/libc.ts';
import { readU16, readU32, writeU16, writeU32 } from '../sys/little-endian.ts';
import { type MappedMemory, mapShared, unmapMemory } from '../sys/memory.ts';
import { checkAccess, Registers } from '../sys/registers.ts';
import type { Region, SharedRegister } from './function.ts';
import * as protocol from './protocol.ts';
import type { UserSession } from './user-session.ts';

/** More areas than this are left unmapped and reached by messages. */
const MAX_AREAS = 64;
const PAGE_SIZE = 4096;
/** File type bits of a mode (inode(7)). */
const { S_IFMT, S_IFREG } = constants;

interface MappedArea {
  readonly start: number;
  readonly end: number;
  readonly memory: MappedMemory;
  readonly registers: Registers;
}

export class UserRegion implements Region {
  readonly index: number;
  readonly size: number;
  /** Do not wait for the replies to writes that take a message. */
  postWrites = false;
  readonly #flags: number;
  readonly #session: UserSession;
  readonly #areas: MappedArea[];
  readonly #value = new Uint8Array(4);
  /** By offset: what stands for a register that was signalled, or null when nothing does. */
  readonly #signals = new Map<number, EventFd | null>();

  /** `fd` is the descriptor that came with `info`, or -1; it stays the caller's. */
  constructor(session: UserSession, info: protocol.RegionInfo, fd: number) {
    this.index = info.index;
    this.size = info.size;
    this.#flags = info.flags;
    this.#session = session;
    this.#areas = fd < 0 ? [] : mapAreas(info, fd);
  }

  /** Whether any of it is reached without messages. */
  get mapped(): boolean {
    return this.#areas.length > 0;
  }

  read8(offset: number): number {
    const area = this.#enter(offset, 1, protocol.RegionFlag.read);
    return area === null ? this.#read(offset, 1)[0] : area.registers.read8(offset - area.start);
  }

  read16(offset: number): number {
    const area = this.#enter(offset, 2, protocol.RegionFlag.read);
    return area === null ? readU16(this.#read(offset, 2), 0) : area.registers.read16(offset - area.start);
  }

  read32(offset: number): number {
    const area = this.#enter(offset, 4, protocol.RegionFlag.read);
    return area === null ? readU32(this.#read(offset, 4), 0) : area.registers.read32(offset - area.start);
  }

  write8(offset: number, value: number): void {
    const area = this.#enter(offset, 1, protocol.RegionFlag.write);
    if (area !== null) {
      area.registers.write8(offset - area.start, value);
      return;
    }
    this.#value[0] = value;
    this.#write(offset, 1);
  }

  write16(offset: number, value: number): void {
    const area = this.#enter(offset, 2, protocol.RegionFlag.write);
    if (area !== null) {
      area.registers.write16(offset - area.start, value);
      return;
    }
    writeU16(this.#value, 0, value);
    this.#write(offset, 2);
  }

  write32(offset: number, value: number): void {
    const area = this.#enter(offset, 4, protocol.RegionFlag.write);
    if (area !== null) {
      area.registers.write32(offset - area.start, value);
      return;
    }
    writeU32(this.#value, 0, value);
    this.#write(offset, 4);
  }

  /**
   * Asks the server for a descriptor that stands for the register ("VFIO_USER_DEVICE_GET_REGION_IO_FDS"). Null when it has none, or does
   * not know the question.
   */
  share(offset: number, width: 2 | 4): SharedRegister | null {
    this.#enter(offset, width, protocol.RegionFlag.write);
    const received: number[] = [];
    try {
      const request = protocol.encodeIoFdsRequest(this.index);
      const payload = this.#session.request(request, [], received, Number.POSITIVE_INFINITY);
      return this.#checked(() => eventfdFor(protocol.decodeIoFds(payload), this.index, offset, width, received));
    } catch (error) {
      if (error instanceof VfioError && error.code === 'DEVICE_REFUSED') return null;
      throw error;
    } finally {
      for (const fd of received) close(fd);
    }
  }

  /** By the descriptor that `share` gives, for which the server is asked once: a system call instead of a message and its reply. */
  signal(offset: number, width: 2 | 4): boolean {
    let eventfd = this.#signals.get(offset);
    if (eventfd === undefined) {
      // What is mapped is written faster.
      const area = this.#enter(offset, width, protocol.RegionFlag.write);
      const register = area === null ? this.share(offset, width) : null;
      eventfd = register?.kind === 'eventfd' ? EventFd.adopt(register.fd) : null;
      this.#signals.set(offset, eventfd);
    }
    if (eventfd === null) return false;
    this.#session.check();
    eventfd.signal();
    return true;
  }

  /** Unmaps what is mapped, and closes what was given. */
  close(): void {
    for (const eventfd of this.#signals.values()) eventfd?.close();
    this.#signals.clear();
    for (const area of this.#areas.splice(0)) unmapMemory(area.memory);
  }

  /** Checks an access; the area that holds all of it, or null when it takes a message. */
  #enter(offset: number, width: number, right: number): MappedArea | null {
    this.#session.check();
    checkAccess(offset, width, this.size);
    if ((this.#flags & right) === 0) {
      const what = right === protocol.RegionFlag.read ? 'read' : 'written';
      throw new VfioError('REGION_ACCESS', `region ${this.index} cannot be ${what}`);
    }
    for (const area of this.#areas) if (offset >= area.start && offset + width <= area.end) return area;
    return null;
  }

  #read(offset: number, count: number): Uint8Array {
    const payload = this.#session.request(protocol.encodeRegionRead(this.index, offset, count));
    return this.#checkReply(payload, offset, count, true).data;
  }

  /** Writes the first `count` bytes of `#value`. */
  #write(offset: number, count: number): void {
    const data = this.#value.subarray(0, count);
    if (this.postWrites) {
      this.#session.post(protocol.encodeRegionWrite(this.index, offset, data, protocol.HeaderFlag.noReply));
      return;
    }
    const payload = this.#session.request(protocol.encodeRegionWrite(this.index, offset, data));
    this.#checkReply(payload, offset, count, false);
  }

  #checkReply(payload: Uint8Array, offset: number, count: number, carriesData: boolean): protocol.RegionAccessMessage {
    return this.#checked(() => {
      const access = protocol.decodeRegionAccess(payload, carriesData);
      if (access.region !== this.index || access.offset !== offset || access.count !== count) {
        throw protocol.protocolError('the reply is about another access than the request');
      }
      return access;
    });
  }

  /** Whatever is wrong with a reply ends the session. */
  #checked<T>(look: () => T): T {
    try {
      return look();
    } catch (error) {
      throw error instanceof VfioError ? this.#session.fail(error) : error;
    }
  }
}

/** Takes the descriptor for the register out of `received`; null when there is none. */
function eventfdFor(
  fds: protocol.IoFds,
  index: number,
  offset: number,
  width: number,
  received: number[],
): SharedRegister | null {
  if (fds.index !== index) throw protocol.protocolError(`descriptors of region ${fds.index} instead of ${index}`);
  const area = protocol.ioeventfdAt(fds, offset, width);
  if (area === undefined) return null;
  const fd = received[area.descriptor];
  if (fd === undefined) throw protocol.protocolError(`no descriptor ${area.descriptor} came with region ${index}`);
  try {
    // Anything else might block who writes to it.
    EventFd.adopt(fd);
  } catch (cause) {
    if (!(cause instanceof SystemError)) throw cause;
    throw protocol.protocolError(`a descriptor of region ${index} is no eventfd`, cause);
  }
  received.splice(area.descriptor, 1);
  return { kind: 'eventfd', fd };
}

/** Whether touching a mapping of the file could end this process with SIGBUS: a file with pages, without a seal that keeps them. */
function mayShrink(fd: number): boolean {
  if ((fstat(fd).mode & S_IFMT) !== S_IFREG) return false;
  try {
    return (fcntl(fd, FcntlCommand.getSeals) & Seal.shrink) === 0;
  } catch (error) {
    // Only files in memory can be sealed.
    if (error instanceof SystemError) return true;
    throw error;
  }
}

/** Maps the areas that `info` names. Those that are not whole pages stay with messages. */
function mapAreas(info: protocol.RegionInfo, fd: number): MappedArea[] {
  if (mayShrink(fd)) return [];
  const areas = info.areas ?? [{ offset: 0, size: info.size }];
  const write = (info.flags & protocol.RegionFlag.write) !== 0;
  const mapped: MappedArea[] = [];
  try {
    for (const { offset, size } of areas.slice(0, MAX_AREAS)) {
      if (size === 0 || size % PAGE_SIZE !== 0 || (info.offset + offset) % PAGE_SIZE !== 0) continue;
      const memory = mapShared(fd, info.offset + offset, size, { write });
      mapped.push({ start: offset, end: offset + size, memory, registers: new Registers(memory) });
    }
    return mapped;
  } catch (cause) {
    for (const area of mapped) unmapMemory(area.memory);
    throw protocol.protocolError(`region ${info.index} cannot be mapped as the server says`, cause);
  }
}
