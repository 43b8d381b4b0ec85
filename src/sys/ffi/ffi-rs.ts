/**
 * The ffi-rs provider: 3 to 9 µs a call, so for control paths and as a second opinion, not for bursts.
 *
 * Its table of symbols is shared by all threads without locks, so it is refused outside of the main thread. It cannot
 * call through a function pointer, and has no hold on the event loop: `watch` is one timer that asks poll(2) about all
 * watched descriptors once a millisecond.
 */
import { createRequire } from 'node:module';
import { isMainThread } from 'node:worker_threads';
import { type CType, type Ffi, FfiError, type Library, type NativeFunction, type Watch } from './provider.ts';

type FfiRs = typeof import('ffi-rs');
type Call = (args: unknown[]) => { value: unknown; errnoCode: number };

/** Name under which the process itself is registered with ffi-rs; its path is empty. */
const SELF = 'vipsec:self';
const RTLD_NOW = 2;
const WATCH_INTERVAL_MS = 1;
/** struct pollfd: fd i32 @0, events i16 @4, revents i16 @6. */
const POLLFD_SIZE = 8;
const POLLIN = 0x0001;

export function createFfiRs(): Ffi {
  if (!isMainThread) {
    throw new FfiError('FFI_MAIN_THREAD_ONLY', 'ffi-rs works in the main thread only', {
      hint: 'set VIPSEC_FFI=koffi',
    });
  }
  const ffi = load();
  const { DataType } = ffi;
  const TYPE = { void: DataType.Void, i32: DataType.I32, u32: DataType.U32, i64: DataType.I64, u64: DataType.U64 };
  let errno = 0;

  const bind = (library: string, name: string, result: CType, args: readonly CType[]): NativeFunction => {
    const definition = { library, retType: TYPE[result], paramsType: args.map((type) => TYPE[type]), errno: true };
    const call: Call = ffi.define({ [name]: definition })[name] as Call;
    return (...values) => {
      const reply = call(values);
      errno = reply.errnoCode;
      const value = typeof reply.value === 'number' ? reply.value : 0;
      // ffi-rs hands a u64 above 2^63 over as a negative number.
      return result === 'u64' && value < 0 ? value + 2 ** 64 : value;
    };
  };

  ffi.open({ library: SELF, path: '' });
  const loader = ffi.define({
    dlopen: { library: SELF, retType: DataType.I64, paramsType: [DataType.String, DataType.I32] },
    dlsym: { library: SELF, retType: DataType.I64, paramsType: [DataType.I64, DataType.String] },
    // memmove of nothing returns its first argument: the way from an address to the pointer object that a view needs.
    memmove: { library: SELF, retType: DataType.External, paramsType: [DataType.I64, DataType.I64, DataType.U64] },
  });
  const self = bind(SELF, 'dlopen', 'i64', ['i64', 'i32'])(0, RTLD_NOW);

  const open = (path: string | null): Library => {
    let handle = self;
    if (path !== null) {
      // ffi-rs looks a symbol up at the first call; ask the loader first, so that a missing one is known when bound.
      handle = loader.dlopen([path, RTLD_NOW]);
      if (handle === 0) throw new FfiError('FFI_LIBRARY_NOT_FOUND', `library ${path} cannot be opened`);
      ffi.open({ library: path, path });
    }
    return {
      func(name, result, args) {
        if (loader.dlsym([handle, name]) === 0) {
          throw new FfiError('FFI_SYMBOL_NOT_FOUND', `${path ?? 'node'} has no function ${name}`);
        }
        return bind(path ?? SELF, name, result, args);
      },
    };
  };

  const view = (address: number, length: number): ArrayBuffer => {
    const buffer = ffi.createExternalBuffer(loader.memmove([address, address, 0]), length);
    if (!(buffer.buffer instanceof ArrayBuffer) || buffer.byteOffset !== 0 || buffer.buffer.byteLength !== length) {
      throw new FfiError('FFI_UNSUPPORTED', 'this runtime copies external memory instead of sharing it');
    }
    return buffer.buffer;
  };

  const poller = createPoller(bind, view);
  return {
    name: 'ffi-rs',
    callsPointers: false,
    open,
    funcAt() {
      throw new FfiError('FFI_UNSUPPORTED', 'ffi-rs cannot call through a function pointer', {
        hint: 'set VIPSEC_FFI=koffi',
      });
    },
    view,
    errno: () => errno,
    watch: poller,
    // In the main thread, where this provider works, it is the default one.
    eventLoop: () => bind(SELF, 'uv_default_loop', 'i64', [])(),
  };
}

function load(): FfiRs {
  try {
    return createRequire(import.meta.url)('ffi-rs');
  } catch (cause) {
    throw new FfiError('FFI_UNAVAILABLE', 'the ffi-rs module cannot be loaded', { cause });
  }
}

interface Entry {
  readonly fd: number;
  readonly onReadable: () => void;
  held: boolean;
}

/** One interval timer for all watches. It holds the loop open while one of them does. */
function createPoller(
  bind: (library: string, name: string, result: CType, args: readonly CType[]) => NativeFunction,
  view: (address: number, length: number) => ArrayBuffer,
): (fd: number, onReadable: () => void) => Watch {
  const poll = bind(SELF, 'poll', 'i32', ['i64', 'u64', 'i32']);
  const calloc = bind(SELF, 'calloc', 'i64', ['u64', 'u64']);
  const free = bind(SELF, 'free', 'void', ['i64']);
  const entries: Entry[] = [];
  let timer: NodeJS.Timeout | null = null;
  let capacity = 0;
  let address = 0;
  let fields = new Int32Array(0);

  const reserve = (count: number) => {
    if (count <= capacity) return;
    // The old view is dropped with its memory: `fields` is the only reference to it.
    fields = new Int32Array(0);
    if (address !== 0) free(address);
    capacity = Math.max(8, 2 * count);
    address = calloc(capacity, POLLFD_SIZE);
    if (address === 0) throw new FfiError('FFI_UNSUPPORTED', 'out of native memory');
    fields = new Int32Array(view(address, capacity * POLLFD_SIZE));
  };

  const tick = () => {
    const round = entries.slice();
    for (let i = 0; i < round.length; i++) {
      fields[2 * i] = round[i].fd;
      fields[2 * i + 1] = POLLIN;
    }
    if (poll(address, round.length, 0) <= 0) return;
    const ready = round.filter((_, i) => fields[2 * i + 1] >>> 16 !== 0);
    for (const entry of ready) if (entries.includes(entry)) entry.onReadable();
  };

  const update = () => {
    if (entries.length === 0) {
      if (timer !== null) clearInterval(timer);
      timer = null;
      return;
    }
    timer ??= setInterval(tick, WATCH_INTERVAL_MS);
    if (entries.some((entry) => entry.held)) timer.ref();
    else timer.unref();
  };

  return (fd, onReadable) => {
    const entry: Entry = { fd, onReadable, held: true };
    reserve(entries.length + 1);
    entries.push(entry);
    update();
    return {
      close() {
        const at = entries.indexOf(entry);
        if (at < 0) return;
        entries.splice(at, 1);
        update();
      },
      ref() {
        entry.held = true;
        update();
      },
      unref() {
        entry.held = false;
        update();
      },
    };
  };
}
