/**
 * Memory that the application has registered with a NIC, so that the device can read it: see `packet/references.ts`.
 */
import { VirtioError } from '../errors.ts';
import type { PacketPool } from '../packet/pool.ts';
import type { PacketArena } from '../packet/references.ts';
import { type DeviceFunction, releaseDma, type SharedDma } from '../vfio/function.ts';

export class NicArenas {
  readonly #fn: DeviceFunction;
  readonly #pool: PacketPool;
  /** How many threads have an arena. */
  readonly #lent = new Map<PacketArena, number>();

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
    const threads = this.#lent.get(arena) ?? 0;
    if (threads !== 0) throw new VirtioError('ARENA_BUSY', `${threads} other threads have the arena`);
    references.close(arena);
    releaseDma(this.#fn, arena.memory);
  }

  /**
   * Another thread is to use the arena, which cannot be unregistered until it is given back. Returns where it is. Throws VirtioError
   * `NO_ARENA` when it is not registered here, `NO_SHARED_MEMORY`.
   */
  lend(arena: PacketArena): SharedDma {
    if (!this.#pool.references.knows(arena)) throw new VirtioError('NO_ARENA', 'this memory is not registered');
    const shared = this.#fn.shareDma?.(arena.memory);
    if (shared === undefined) throw new VirtioError('NO_SHARED_MEMORY', 'the memory of this device is for one thread');
    this.#lent.set(arena, (this.#lent.get(arena) ?? 0) + 1);
    return shared;
  }

  giveBack(arena: PacketArena): void {
    const left = (this.#lent.get(arena) ?? 0) - 1;
    if (left > 0) this.#lent.set(arena, left);
    else this.#lent.delete(arena);
  }
}
