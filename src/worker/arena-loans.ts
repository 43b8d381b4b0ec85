/**
 * Memory of the application that the thread with a queue pair has: lent to it, or registered on its behalf. A loan ends when the thread gives it
 * back; what may still be in its ring when it ends waits until the device has reset the ring.
 */
import { VipsecError } from '../errors.ts';
import type { NicArenas } from '../nic/arenas.ts';
import type { PacketArena } from '../packet/references.ts';
import { close, FcntlCommand, fcntl } from '../sys/libc.ts';
import type { SharedDma } from '../vfio/function.ts';

/** An arena on its way to the thread that has the queue: plain data, to be opened there by `openMemory`. The descriptor is the NIC's. */
export interface ArenaHandle {
  /** `ControlBlock.tenancy` of those to whom it is lent. */
  readonly tenancy: number;
  readonly id: number;
  readonly memory: SharedDma;
}

interface Loan {
  readonly arena: PacketArena;
  readonly fd: number;
  /** It was registered for the thread, and goes with the loan. */
  readonly isItsOwn: boolean;
}

/** The loans of one queue pair. */
export class ArenaLoans {
  readonly #arenas: NicArenas;
  /** Those of the thread that has the queue. */
  #open = new Map<number, Loan>();
  /** Those of threads that have ended, which the device may still read. */
  #stuck: Loan[] = [];
  #nextId = 1;

  constructor(arenas: NicArenas) {
    this.#arenas = arenas;
  }

  /** Throws VirtioError `NO_ARENA` when `arena` is not one of the NIC, `NO_SHARED_MEMORY`. */
  lend(tenancy: number, arena: PacketArena, isItsOwn = false): ArenaHandle {
    const shared = this.#arenas.lend(arena);
    let fd: number;
    try {
      fd = fcntl(shared.fd, FcntlCommand.duplicate, 0);
    } catch (error) {
      this.#arenas.giveBack(arena);
      throw error;
    }
    const id = this.#nextId++;
    this.#open.set(id, { arena, fd, isItsOwn });
    return { tenancy, id, memory: { ...shared, fd } };
  }

  /** Registers memory for the thread. Throws as `Nic.registerMemory`. */
  register(tenancy: number, fd: number, offset: number, size: number): ArenaHandle {
    const arena = this.#arenas.register(fd, offset, size);
    try {
      return this.lend(tenancy, arena, true);
    } catch (error) {
      this.#arenas.unregister(arena);
      throw error;
    }
  }

  /** The thread has no use for it any more, and nothing of it is in the ring. */
  giveBack(id: number): void {
    const loan = this.#open.get(id);
    if (loan === undefined) return;
    this.#open.delete(id);
    close(loan.fd);
    this.#end(loan);
  }

  /** The thread has ended. Pieces of those in `kept` are in its ring; null when nobody knows. */
  ended(kept: readonly number[] | null): void {
    for (const [id, loan] of this.#open) {
      close(loan.fd);
      if (kept === null || kept.includes(id)) this.#stuck.push(loan);
      else this.#end(loan);
    }
    this.#open = new Map();
  }

  /** Whether threads that have ended still have some. */
  get areStuck(): boolean {
    return this.#stuck.length > 0;
  }

  /** The rings are as new. */
  reset(): void {
    for (const loan of this.#stuck.splice(0)) this.#end(loan);
  }

  #end({ arena, isItsOwn }: Loan): void {
    this.#arenas.giveBack(arena);
    if (!isItsOwn) return;
    try {
      this.#arenas.unregister(arena);
    } catch (error) {
      // The device did not confirm: nobody uses its addresses again, and nobody is left to be told.
      if (!(error instanceof VipsecError)) throw error;
    }
  }
}

/** What went wrong with a request of a thread, as a message carries it. */
export function refusalOf(error: unknown): { readonly code: string; readonly message: string } {
  const code = error instanceof Error && 'code' in error ? String(error.code) : 'QUEUE_COMMAND';
  return { code, message: error instanceof Error ? error.message : String(error) };
}
