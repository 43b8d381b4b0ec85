/**
 * Finds libipsec-mb, checks its version and sets up its one manager of this thread.
 *
 * A manager holds the job slots and the half-done work of all jobs; two threads must not share one. It lives in memory of
 * ours (`imb_set_pointers_mb_mgr`), so that it is wiped and unmapped when the last engine closes.
 */
import { ffi } from '../../sys/ffi/ffi.ts';
import { FfiError, type Library, type NativeFunction } from '../../sys/ffi/provider.ts';
import { type MappedMemory, unmapMemory } from '../../sys/memory.ts';
import { EngineError } from './engine.ts';
import { type ImbLayout, LAYOUTS } from './ipsec-mb-layout.ts';
import { mapUnbroken } from './native-memory.ts';

/** Newest first: a machine that has both runs the newer. */
const LIBRARIES = ['libIPSec_MB.so.2', 'libIPSec_MB.so.1'] as const;
/** Name or path of the library to use instead of those. */
export const LIBRARY_VARIABLE = 'VIPSEC_IPSEC_MB';

export interface ImbManager {
  readonly layout: ImbLayout;
  /** Held as long as its code may be called: function pointers alone do not keep it from being unloaded. */
  readonly library: Library;
  /** IMB_MGR. */
  readonly memory: MappedMemory;
  /** uint32_t f(IMB_MGR *, uint32_t n, IMB_JOB **jobs). */
  readonly getNextBurst: NativeFunction;
  readonly submitBurst: NativeFunction;
  readonly submitBurstNoCheck: NativeFunction;
  readonly flushBurst: NativeFunction;
  /** uint32_t imb_set_session(IMB_MGR *, IMB_JOB *); absent before 1.4. */
  readonly setSession: NativeFunction | undefined;
  /** The function whose pointer is at byte `offset` of IMB_MGR: no result, `args` pointers. Bound once. */
  functionAt(offset: number, args: number): NativeFunction;
}

let current: ImbManager | undefined;
let users = 0;

/** The manager of this thread. Throws `EngineError` when there is no library that we know. */
export function acquireManager(): ImbManager {
  current ??= createManager();
  users++;
  return current;
}

/** Gives one `acquireManager` back; the last one wipes and unmaps the manager. */
export function releaseManager(): void {
  if (current === undefined || --users > 0) return;
  current.memory.u8.fill(0);
  unmapMemory(current.memory);
  current = undefined;
}

function openLibrary(): Library {
  const chosen = process.env[LIBRARY_VARIABLE];
  const names = chosen === undefined || chosen === '' ? LIBRARIES : [chosen];
  for (const name of names) {
    try {
      return ffi().open(name);
    } catch (error) {
      if (!(error instanceof FfiError)) throw error;
    }
  }
  throw new EngineError('ENGINE_LIBRARY_MISSING', `ipsec-mb: ${names.join(' or ')} is not installed`, {
    hint: 'install libipsec-mb1 (Debian 12) or libipsec-mb2 (Debian 13)',
  });
}

function layoutOf(library: Library): ImbLayout {
  const version = library.func('imb_get_version', 'u32', [])();
  const layout = LAYOUTS.find((known) => known.version === version);
  if (layout !== undefined) return layout;
  const text = `${version >>> 16}.${(version >>> 8) & 0xff}.${version & 0xff}`;
  const known = LAYOUTS.map(({ name }) => name).join(' and ');
  throw new EngineError('ENGINE_VERSION_UNKNOWN', `ipsec-mb: version ${text} is installed, ${known} are known`);
}

function createManager(): ImbManager {
  if (process.arch !== 'x64') throw new EngineError('ENGINE_UNSUPPORTED', `ipsec-mb: not made for ${process.arch}`);
  if (!ffi().callsPointers) {
    throw new EngineError('ENGINE_NEEDS_POINTERS', `ipsec-mb: ${ffi().name} cannot call through function pointers`, {
      hint: 'set VIPSEC_FFI=koffi',
    });
  }
  const library = openLibrary();
  let layout: ImbLayout;
  let memory: MappedMemory;
  try {
    layout = layoutOf(library);
    const size = library.func('imb_get_mb_mgr_size', 'u64', [])();
    const setPointers = library.func('imb_set_pointers_mb_mgr', 'i64', ['i64', 'u64', 'u32']);
    const init = library.func('init_mb_mgr_auto', 'void', ['i64', 'i64']);
    if (size < layout.manager.jobs)
      throw new EngineError('ENGINE_VERSION_UNKNOWN', `ipsec-mb: manager of ${size} bytes`);
    memory = mapUnbroken(size);
    setPointers(memory.address, 0, 1);
    init(memory.address, 0);
  } catch (error) {
    if (!(error instanceof FfiError)) throw error;
    throw new EngineError('ENGINE_VERSION_UNKNOWN', 'ipsec-mb: the library lacks a function of its interface', {
      cause: error,
    });
  }
  const { manager } = layout;
  const errno = memory.u32[manager.errno >> 2];
  if (errno !== 0 || pointer(memory, manager.submitBurst) === 0) {
    unmapMemory(memory);
    throw new EngineError('ENGINE_UNSUPPORTED', `ipsec-mb: no implementation for this processor (error ${errno})`);
  }
  const functions = new Map<number, NativeFunction>();
  const burst = (offset: number) => ffi().funcAt(pointer(memory, offset), 'u32', ['i64', 'u32', 'i64']);
  return {
    layout,
    library,
    memory,
    getNextBurst: burst(manager.getNextBurst),
    submitBurst: burst(manager.submitBurst),
    submitBurstNoCheck: burst(manager.submitBurstNoCheck),
    flushBurst: burst(manager.flushBurst),
    setSession: layout.session && library.func('imb_set_session', 'u32', ['i64', 'i64']),
    functionAt: (offset, args) => {
      let bound = functions.get(offset);
      if (bound === undefined) {
        const types = Array.from({ length: args }, () => 'i64' as const);
        bound = ffi().funcAt(pointer(memory, offset), 'void', types);
        functions.set(offset, bound);
      }
      return bound;
    },
  };
}

function pointer(memory: MappedMemory, offset: number): number {
  return memory.u32[offset >> 2] + memory.u32[(offset >> 2) + 1] * 2 ** 32;
}
