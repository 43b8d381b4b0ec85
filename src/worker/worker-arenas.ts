/**
 * Memory of the application in a worker thread: arenas that the NIC has lent to its queue pair, and such that the thread has had registered. They
 * are mapped here once more, from their descriptors, and pieces of them go into packets of this queue pair's pool: see `packet/references.ts`.
 */
import { VirtioError } from '../errors.ts';
import type { PacketArena, PacketReferences } from '../packet/references.ts';
import { unmapMemory } from '../sys/memory.ts';
import type { ArenaHandle } from './arena-loans.ts';
import { mapDma } from './map-dma.ts';
import type { Granted, WorkerMessage } from './messages.ts';

interface Request {
  readonly resolve: (arena: PacketArena) => void;
  readonly reject: (error: Error) => void;
}

export class WorkerArenas {
  readonly #tenancy: number;
  readonly #references: PacketReferences;
  readonly #send: (message: WorkerMessage) => void;
  /** Ids of the loans. */
  readonly #open = new Map<PacketArena, number>();
  /** Ids of handles that were opened: their descriptors may be others by now. */
  readonly #opened = new Set<number>();
  readonly #requests = new Map<number, Request>();
  #nextRequest = 1;
  #end: Error | null = null;

  constructor(tenancy: number, references: PacketReferences, send: (message: WorkerMessage) => void) {
    this.#tenancy = tenancy;
    this.#references = references;
    this.#send = send;
  }

  /** As `WorkerNicQueue.openMemory`. */
  open(handle: ArenaHandle): PacketArena {
    if (this.#end !== null) throw this.#end;
    if (handle.tenancy !== this.#tenancy || this.#opened.has(handle.id)) {
      throw new VirtioError('NO_ARENA', 'the memory was lent to another thread, or was opened before');
    }
    const arena = this.#map(handle);
    this.#opened.add(handle.id);
    return arena;
  }

  #map({ id, memory: shared }: ArenaHandle): PacketArena {
    const memory = mapDma(shared);
    try {
      const arena = this.#references.open(memory);
      this.#open.set(arena, id);
      return arena;
    } catch (error) {
      unmapMemory(memory);
      throw error;
    }
  }

  /** As `WorkerNicQueue.registerMemory`. */
  register(fd: number, offset: number, size: number): Promise<PacketArena> {
    if (this.#end !== null) return Promise.reject(this.#end);
    const request = this.#nextRequest++;
    return new Promise((resolve, reject) => {
      this.#requests.set(request, { resolve, reject });
      this.#send({ type: 'register', request, fd, offset, size });
    });
  }

  /** The control thread has registered memory, or refused it. Throws when it cannot be mapped: then it goes back. */
  granted(request: number, result: Granted): void {
    const waiting = this.#requests.get(request);
    this.#requests.delete(request);
    if ('code' in result) {
      waiting?.reject(new VirtioError(result.code, result.message));
      return;
    }
    try {
      waiting?.resolve(this.#map(result));
    } catch (error) {
      waiting?.reject(error instanceof Error ? error : new Error(String(error)));
      throw error;
    }
  }

  /** As `WorkerNicQueue.unregisterMemory`. */
  close(arena: PacketArena): void {
    const id = this.#open.get(arena);
    if (id === undefined) return;
    this.#references.close(arena);
    this.#open.delete(arena);
    unmapMemory(arena.memory);
    this.#send({ type: 'arena', id });
  }

  /** The queue ends: unmaps all. Returns the loans of which pieces are still in the ring. */
  end(reason: Error): number[] {
    this.#end = reason;
    for (const { reject } of this.#requests.values()) reject(reason);
    this.#requests.clear();
    const kept: number[] = [];
    for (const [arena, id] of this.#open) {
      if (arena.inFlight !== 0) kept.push(id);
      unmapMemory(arena.memory);
    }
    this.#open.clear();
    return kept;
  }
}
