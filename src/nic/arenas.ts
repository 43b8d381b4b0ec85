/**
 * Memory that the application has registered with a NIC, so that the device can read it: see `packet/references.ts`.
 */
import { VirtioError } from '../errors.ts';
import type { PacketPool } from '../packet/pool.ts';
import type { PacketArena } from '../packet/references.ts';
import { type DeviceFunction, releaseDma } from '../vfio/function.ts';

export class NicArenas {
  readonly #fn: DeviceFunction;
  readonly #pool: PacketPool;

  constructor(fn: DeviceFunction, pool: PacketPool) {
    this.#fn = fn;
    this.#pool = pool;
  }

  /** As `Nic.registerMemory`. */
  register(fd: number, offset: number, size: number): PacketArena {
    const fn = this.#fn;
    if (fn.importDma === undefined) {
      throw new VirtioError('NO_ARENAS', `${fn.address} takes no memory of the application`);
    }
    const memory = fn.importDma(fd, offset, size);
    try {
      return this.#pool.references.open(memory);
    } catch (error) {
      releaseDma(fn, memory);
      throw error;
    }
  }

  /** As `Nic.unregisterMemory`. */
  unregister(arena: PacketArena): void {
    const { references } = this.#pool;
    if (!references.knows(arena)) return;
    references.close(arena);
    releaseDma(this.#fn, arena.memory);
  }
}
