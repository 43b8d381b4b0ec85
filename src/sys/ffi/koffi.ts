/**
 * The koffi provider: calls of 0.05 to 0.3 µs, function pointers, and descriptors watched by the event loop itself.
 */
import { createRequire } from 'node:module';
import { type CType, type Ffi, FfiError, type Library, type NativeFunction, type Watch } from './provider.ts';

type Koffi = typeof import('koffi');
type KoffiCall = (...args: number[]) => number | bigint;

const TYPE = { void: 'void', i32: 'int32', u32: 'uint32', i64: 'int64', u64: 'uint64' } as const;

/** Poll handles stop when they are collected as garbage: whatever is watched is held here. */
const watched = new Set<object>();

export function createKoffi(): Ffi {
  const koffi = load();

  const open = (path: string | null): Library => {
    let library: ReturnType<Koffi['load']>;
    try {
      library = koffi.load(path);
    } catch (cause) {
      throw new FfiError('FFI_LIBRARY_NOT_FOUND', `library ${path ?? 'node'} cannot be opened`, { cause });
    }
    return {
      func(name, result, args) {
        let call: KoffiCall;
        try {
          call = library.func(
            name,
            TYPE[result],
            args.map((type) => TYPE[type]),
          );
        } catch (cause) {
          throw new FfiError('FFI_SYMBOL_NOT_FOUND', `${path ?? 'node'} has no function ${name}`, { cause });
        }
        return numeric(call, result);
      },
    };
  };

  const funcAt = (address: number, result: CType, args: readonly CType[]): NativeFunction => {
    const prototype = koffi.proto(
      TYPE[result],
      args.map((type) => TYPE[type]),
    );
    return numeric(koffi.decode(address, prototype), result);
  };

  return {
    name: 'koffi',
    callsPointers: true,
    open,
    funcAt,
    view: (address, length) => koffi.view(address, length),
    errno: () => koffi.errno(),
    watch: (fd, onReadable) => watch(koffi, fd, onReadable),
    eventLoop: () => eventLoop(koffi),
  };
}

function load(): Koffi {
  try {
    return createRequire(import.meta.url)('koffi');
  } catch (cause) {
    throw new FfiError('FFI_UNAVAILABLE', 'the koffi module cannot be loaded', { cause });
  }
}

/** koffi returns 64-bit values beyond 2^53 as BigInt; our functions return numbers only. */
function numeric(call: KoffiCall, result: CType): NativeFunction {
  // Only 64-bit results can be BigInt, so the others go without the 20 ns of a wrapper.
  if (result === 'i64' || result === 'u64') return (...args) => Number(call(...args));
  return call as NativeFunction;
}

/** Each thread has its own; Node-API knows which one belongs to an environment. */
function eventLoop(koffi: Koffi): number {
  const get = koffi.load(null).func('napi_get_uv_event_loop', 'int', ['void *', koffi.out('int64 *')]);
  const loop: (number | bigint)[] = [0];
  const status: number = get(koffi.node.env, loop);
  if (status !== 0) throw new FfiError('FFI_UNSUPPORTED', `Node-API gives no event loop (status ${status})`);
  return Number(loop[0]);
}

/**
 * The callback of a poll handle runs outside of Node's callback scope: promises that it resolves would wait for some
 * other event, and what it throws would be lost. It therefore only schedules the real callback for the check phase,
 * which follows at once in the same turn of the loop.
 */
function watch(koffi: Koffi, fd: number, onReadable: () => void): Watch {
  let open = true;
  let scheduled = false;
  const run = () => {
    scheduled = false;
    if (open) onReadable();
  };
  const onPoll = () => {
    if (!open || scheduled) return;
    scheduled = true;
    setImmediate(run);
  };
  // On POLLERR libuv stops the handle and reports a negative status: start again, whoever reads will see the error.
  const onEvent = (status: unknown) => {
    onPoll();
    if (typeof status === 'number' && status < 0 && open) handle.start({ readable: true }, onEvent);
  };
  const handle = koffi.node.poll(fd, { readable: true }, onEvent);
  watched.add(handle);
  return {
    close() {
      if (!open) return;
      open = false;
      watched.delete(handle);
      handle.close();
    },
    ref() {
      if (open) handle.ref();
    },
    unref() {
      if (open) handle.unref();
    },
  };
}
