/**
 * A software device in the test's own process, whose functions are reached by calls instead of messages: for tests of what a device does, not
 * of the way to it. A register access takes a microsecond, where a message to another process and its reply take two hundred of processor time.
 */
import { Arena } from '../../src/device/arena.ts';
import { makeFunction, makePool, maxFrameOf } from '../../src/device/assemble.ts';
import { BackingFiles } from '../../src/device/backing.ts';
import { faultSet } from '../../src/device/faults.ts';
import type { FramePool } from '../../src/device/frame-pool.ts';
import type { VirtioFunction } from '../../src/device/function.ts';
import type { DeviceRings, PersonalityName } from '../../src/device/index.ts';
import { type Link, pollableLink } from '../../src/device/links/link.ts';
import { makeLinks } from '../../src/device/links/parse.ts';
import type { NetDevice } from '../../src/device/net.ts';
import { CONFIG_SPACE_SIZE, Command } from '../../src/device/pci.ts';
import { Pump } from '../../src/device/pump.ts';
import { FcntlCommand, fcntl } from '../../src/sys/libc.ts';
import type { DmaMemory } from '../../src/sys/memory.ts';
import { DmaArena } from '../../src/vfio/dma.ts';
import { type PciFunction, PciRegion, type Region } from '../../src/vfio/function.ts';
import type { WireRevision } from '../../src/virtio/revision.ts';

export interface LocalSetup {
  /** `pair` has two functions; default `loopback`. */
  readonly link?: 'loopback' | 'pair';
  readonly wire?: WireRevision;
  readonly ipsec?: boolean;
  readonly personality?: PersonalityName;
  readonly rings?: DeviceRings;
  readonly queuePairs?: number;
  readonly faults?: readonly string[];
}

/** Bytes of address space, and packets, that the devices of a process have one after the other. */
const MEMORY = 32 * 2 ** 20;
const PACKETS = 1024;
const MTU = 1500;
const IOVAS = [{ start: 0x1_0000, last: 2 ** 39 - 1 }] as const;

/** The garbage collector goes through everything for each few arenas: so there is one. */
let memory: { readonly arena: Arena; readonly pool: FramePool } | null = null;

function sharedMemory(): { readonly arena: Arena; readonly pool: FramePool } {
  if (memory === null) {
    const arena = new Arena(MEMORY);
    memory = { arena, pool: makePool(arena, PACKETS, maxFrameOf(MTU)) };
  }
  return memory;
}

export class LocalDevice {
  readonly #arena: Arena;
  readonly #pool: FramePool;
  readonly #available: number;
  readonly #pump = new Pump((error) => this.#failures.push(error));
  readonly #failures: unknown[] = [];
  readonly #links: readonly Link[];
  readonly #functions: VirtioFunction[] = [];
  readonly #devices: NetDevice[] = [];

  constructor({ link = 'loopback', queuePairs = 1, ...setup }: LocalSetup) {
    const functions = link === 'pair' ? 2 : 1;
    const { arena, pool } = sharedMemory();
    this.#arena = arena;
    this.#pool = pool;
    this.#available = arena.available;
    const files = new BackingFiles(arena);
    this.#links = makeLinks(link, { arena, pool, functions, maxFrame: maxFrameOf(MTU), warn: () => {} });
    for (const [i, end] of this.#links.entries()) {
      const { fn, device } = makeFunction({
        ...{ arena, files, pool, link: end, queuePairs, mtu: MTU },
        wire: setup.wire ?? 'virtio-1.4',
        ipsec: setup.ipsec ?? true,
        mac: Uint8Array.of(2, 0, 0, 0, 0, i + 1),
        faults: faultSet(setup.faults ?? []),
        rings: setup.rings ?? 'both',
        personality: setup.personality ?? 'standard',
        wake: () => this.#pump.wake(),
      });
      this.#functions.push(fn);
      this.#devices.push(device);
      this.#pump.add(device);
    }
    for (const end of this.#links) this.#pump.add(pollableLink(end));
  }

  /** Function `index` as a driver has it that opens it: reset. */
  open(index = 0): PciFunction {
    return new LocalFunction(this.#functions[index], `local:${index}`);
  }

  /** Ends it. Throws what it had to survive, and when it leaves memory or packets behind. */
  close(): void {
    this.#pump.close();
    for (const fn of this.#functions) fn.close();
    for (const device of this.#devices) device.close();
    for (const link of this.#links) link.close();
    if (this.#failures.length > 0) throw this.#failures[0];
    const packets = this.#pool.count - this.#pool.available;
    const bytes = this.#available - this.#arena.available;
    if (packets !== 0 || bytes !== 0) throw new Error(`the device has left ${packets} packets, ${bytes} bytes behind`);
  }
}

class LocalFunction implements PciFunction {
  readonly address: string;
  readonly behindIommu = false;
  readonly gone = false;
  readonly iovaRanges = IOVAS;
  readonly interruptVectors: number;
  readonly config: Region;
  readonly #fn: VirtioFunction;
  readonly #memory: DmaArena;
  readonly #bars: readonly Region[];

  constructor(fn: VirtioFunction, address: string) {
    fn.reset();
    this.address = address;
    this.#fn = fn;
    this.interruptVectors = fn.msix.vectors;
    this.config = configRegion(fn);
    this.#bars = Array.from({ length: 6 }, (_, bar) => barRegion(fn, bar));
    const mapper = {
      map: ({ iova, size, fd, offset }: { iova: number; size: number; fd: number; offset: number }) =>
        fn.memory.map(iova, size, fcntl(fd, FcntlCommand.duplicate), offset, true),
      unmap: ({ iova, size }: { iova: number; size: number }) => {
        fn.memory.unmap(iova, size);
      },
    };
    this.#memory = new DmaArena(mapper, IOVAS);
  }

  bar(index: number): Region {
    return this.#bars[index];
  }

  allocateDma(size: number): DmaMemory {
    return this.#memory.allocate(size);
  }

  freeDma(memory: DmaMemory): void {
    this.#memory.free(memory);
  }

  setInterrupts(eventfds: readonly number[]): void {
    const { msix } = this.#fn;
    msix.disconnectAll();
    for (const [vector, fd] of eventfds.entries()) msix.connect(vector, fcntl(fd, FcntlCommand.duplicate));
    this.#fn.msixConnected();
  }

  reset(): void {
    this.#fn.reset();
  }

  close(): void {
    this.#fn.msix.disconnectAll();
    this.#fn.reset();
    this.#memory.close(true);
    this.#fn.memory.clear();
  }
}

/** A region of which `width` bytes are read and written so. */
function region(
  index: number,
  size: number,
  read: (offset: number, width: number) => number,
  write: (offset: number, width: number, value: number) => void,
): Region {
  const check = (offset: number, width: number) => {
    if (offset % width !== 0 || offset < 0 || offset + width > size)
      throw new RangeError(`${width} bytes at ${offset}`);
  };
  const readAs = (width: number) => (offset: number) => {
    check(offset, width);
    return read(offset, width);
  };
  const writeAs = (width: number) => (offset: number, value: number) => {
    check(offset, width);
    write(offset, width, value);
  };
  return {
    ...{ index, size },
    ...{ read8: readAs(1), read16: readAs(2), read32: readAs(4) },
    ...{ write8: writeAs(1), write16: writeAs(2), write32: writeAs(4) },
  };
}

function configRegion(fn: VirtioFunction): Region {
  const read = (offset: number, width: number) => Buffer.from(fn.readConfig(offset, width)).readUIntLE(0, width);
  const write = (offset: number, width: number, value: number) => {
    const bytes = Buffer.alloc(width);
    bytes.writeUIntLE(value, 0, width);
    fn.writeConfig(offset, bytes);
  };
  return region(PciRegion.config, CONFIG_SPACE_SIZE, read, write);
}

/** Without the Memory Space bit it does not answer: reads are all ones. */
function barRegion(fn: VirtioFunction, bar: number): Region {
  const answers = () => (fn.config.command & Command.memory) !== 0;
  const read = (offset: number, width: number) =>
    answers() ? fn.readBar(bar, offset, width) >>> 0 : 2 ** (8 * width) - 1;
  const write = (offset: number, width: number, value: number) => {
    if (answers()) fn.writeBar(bar, offset, width, value);
  };
  return region(bar, fn.config.layout.bars[bar]?.size ?? 0, read, write);
}
