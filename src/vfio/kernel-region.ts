/**
 * Regions of a function behind the kernel's VFIO: a BAR that is mapped into this process, one of which only parts are, one
 * that is read and written through the device descriptor, and the configuration space.
 */
import { VfioError } from '../errors.ts';
import { FcntlCommand, fcntl, PAGE_SIZE, pread, pwrite } from '../sys/libc.ts';
import { type MappedMemory, mapAnonymous, mapShared, unmapMemory } from '../sys/memory.ts';
import { checkAccess, Registers } from '../sys/registers.ts';
import { ConfigHeader, PciCommand } from './config-space.ts';
import type { Region, SharedRegister } from './function.ts';
import { type RegionDescription, RegionFlag } from './kernel-abi.ts';

/** A region that is not there. */
export function absentRegion(index: number): Region {
  const refuse = (): never => {
    throw new RangeError(`region ${index} is absent`);
  };
  return {
    index,
    size: 0,
    read8: refuse,
    read16: refuse,
    read32: refuse,
    write8: refuse,
    write16: refuse,
    write32: refuse,
  };
}

/** What the regions of one function share. */
export interface RegionOwner {
  readonly device: number;
  /** Called when a read gave all ones, which is also what reads give once a function is gone: throws then. */
  checkPresent(): void;
  /** Turns the failure of an access into the error to throw; notes that the function is gone. */
  failed(error: unknown): Error;
}

/** Reads and writes through the device descriptor: a system call each. */
export class DescriptorRegion implements Region {
  readonly index: number;
  readonly size: number;
  readonly #owner: RegionOwner;
  readonly #offset: number;
  /** Where an access is read to and written from. */
  readonly #memory: MappedMemory;

  constructor(owner: RegionOwner, index: number, { size, offset }: RegionDescription) {
    this.index = index;
    this.size = size;
    this.#owner = owner;
    this.#offset = offset;
    this.#memory = mapAnonymous(8);
  }

  read8(offset: number): number {
    this.#read(offset, 1);
    return this.#memory.u8[0];
  }

  read16(offset: number): number {
    this.#read(offset, 2);
    return this.#memory.u16[0];
  }

  read32(offset: number): number {
    this.#read(offset, 4);
    return this.#memory.u32[0];
  }

  write8(offset: number, value: number): void {
    this.#memory.u8[0] = value;
    this.#write(offset, 1);
  }

  write16(offset: number, value: number): void {
    this.#memory.u16[0] = value;
    this.#write(offset, 2);
  }

  write32(offset: number, value: number): void {
    this.#memory.u32[0] = value;
    this.#write(offset, 4);
  }

  close(): void {
    unmapMemory(this.#memory);
  }

  #read(offset: number, width: number): void {
    checkAccess(offset, width, this.size);
    this.#check(() => pread(this.#owner.device, this.#memory.address, width, this.#offset + offset), width);
  }

  #write(offset: number, width: number): void {
    checkAccess(offset, width, this.size);
    this.#check(() => pwrite(this.#owner.device, this.#memory.address, width, this.#offset + offset), width);
  }

  #check(access: () => number, width: number): void {
    let done: number;
    try {
      done = access();
    } catch (error) {
      throw this.#owner.failed(error);
    }
    if (done !== width)
      throw new VfioError('VFIO_ANSWER', `an access to region ${this.index} moved ${done} bytes of ${width}`);
  }
}

/**
 * The configuration space. Memory decoding stays on whatever is written to the command register: a load from a mapped BAR
 * that does not decode ends the process.
 */
export class ConfigRegion extends DescriptorRegion {
  override write8(offset: number, value: number): void {
    super.write8(offset, offset === ConfigHeader.command ? value | PciCommand.memorySpace : value);
  }

  override write16(offset: number, value: number): void {
    super.write16(offset, offset === ConfigHeader.command ? value | PciCommand.memorySpace : value);
  }

  override write32(offset: number, value: number): void {
    super.write32(offset, offset === ConfigHeader.command ? value | PciCommand.memorySpace : value);
  }
}

/** A BAR that is mapped as a whole: an access is a load or a store. */
export class MappedRegion implements Region {
  readonly index: number;
  readonly size: number;
  readonly #owner: RegionOwner;
  readonly #offset: number;
  readonly #memory: MappedMemory;
  readonly #registers: Registers;

  constructor(owner: RegionOwner, index: number, { size, offset }: RegionDescription) {
    this.index = index;
    this.size = size;
    this.#owner = owner;
    this.#offset = offset;
    this.#memory = mapShared(owner.device, offset, size, { write: true });
    this.#registers = new Registers(this.#memory);
  }

  read8(offset: number): number {
    const value = this.#registers.read8(offset);
    if (value === 0xff) this.#owner.checkPresent();
    return value;
  }

  read16(offset: number): number {
    const value = this.#registers.read16(offset);
    if (value === 0xffff) this.#owner.checkPresent();
    return value;
  }

  read32(offset: number): number {
    const value = this.#registers.read32(offset);
    if (value === 0xffffffff) this.#owner.checkPresent();
    return value;
  }

  write8(offset: number, value: number): void {
    this.#registers.write8(offset, value);
  }

  write16(offset: number, value: number): void {
    this.#registers.write16(offset, value);
  }

  write32(offset: number, value: number): void {
    this.#registers.write32(offset, value);
  }

  share(offset: number, width: 2 | 4): SharedRegister {
    checkAccess(offset, width, this.size);
    const at = offset % PAGE_SIZE;
    const fd = fcntl(this.#owner.device, FcntlCommand.duplicate, 0);
    return { kind: 'memory', fd, offset: this.#offset + offset - at, at };
  }

  close(): void {
    unmapMemory(this.#memory);
  }
}

/** A BAR of which the kernel lets parts be mapped; the rest goes through the descriptor. */
export class SparseRegion implements Region {
  readonly index: number;
  readonly size: number;
  readonly #rest: DescriptorRegion;
  readonly #areas: readonly { readonly first: number; readonly end: number; readonly region: MappedRegion }[];

  constructor(owner: RegionOwner, index: number, description: RegionDescription) {
    this.index = index;
    this.size = description.size;
    this.#rest = new DescriptorRegion(owner, index, description);
    this.#areas = description.areas.map(({ offset, size }) => {
      const area = { ...description, offset: description.offset + offset, size };
      return { first: offset, end: offset + size, region: new MappedRegion(owner, index, area) };
    });
  }

  read8(offset: number): number {
    const area = this.#areaOf(offset);
    return area === undefined ? this.#rest.read8(offset) : area.region.read8(offset - area.first);
  }

  read16(offset: number): number {
    const area = this.#areaOf(offset);
    return area === undefined ? this.#rest.read16(offset) : area.region.read16(offset - area.first);
  }

  read32(offset: number): number {
    const area = this.#areaOf(offset);
    return area === undefined ? this.#rest.read32(offset) : area.region.read32(offset - area.first);
  }

  write8(offset: number, value: number): void {
    const area = this.#areaOf(offset);
    if (area === undefined) this.#rest.write8(offset, value);
    else area.region.write8(offset - area.first, value);
  }

  write16(offset: number, value: number): void {
    const area = this.#areaOf(offset);
    if (area === undefined) this.#rest.write16(offset, value);
    else area.region.write16(offset - area.first, value);
  }

  write32(offset: number, value: number): void {
    const area = this.#areaOf(offset);
    if (area === undefined) this.#rest.write32(offset, value);
    else area.region.write32(offset - area.first, value);
  }

  share(offset: number, width: 2 | 4): SharedRegister | null {
    const area = this.#areaOf(offset);
    return area === undefined ? null : area.region.share(offset - area.first, width);
  }

  close(): void {
    for (const { region } of this.#areas) region.close();
    this.#rest.close();
  }

  #areaOf(offset: number) {
    return this.#areas.find(({ first, end }) => offset >= first && offset < end);
  }
}

export type OpenRegion = DescriptorRegion | MappedRegion | SparseRegion;

/** The cheapest way to reach BAR `index`. */
export function openBar(owner: RegionOwner, index: number, description: RegionDescription): OpenRegion {
  if ((description.flags & RegionFlag.mmap) === 0) return new DescriptorRegion(owner, index, description);
  if (description.areas.length > 0) return new SparseRegion(owner, index, description);
  return new MappedRegion(owner, index, description);
}
