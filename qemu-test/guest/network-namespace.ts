/**
 * Work of this process in another network namespace (setns(2)): sockets that it makes and processes that it starts there stay there
 * (network_namespaces(7)). So one process can be the applications of several namespaces, of which each would take an emulated machine
 * seconds to start.
 */
import { ffi } from '../../src/sys/ffi/ffi.ts';
import { close, OpenFlag, open, systemError } from '../../src/sys/libc.ts';

const CLONE_NEWNET = 0x40000000;
const OWN = '/proc/thread-self/ns/net';

/** Does `work` with this thread in network namespace `name` (ip-netns(8)); null: where it is. Nothing of it may be asynchronous. */
export function inNamespace<T>(name: string | null, work: () => T): T {
  const leave = enter(name);
  try {
    return work();
  } finally {
    leave();
  }
}

/**
 * The same for what Node does in the next tick of the event loop, as to make a socket. Other work of this tick, which is under way before
 * this begins, must make none.
 */
export async function inNamespaceForATick<T>(name: string | null, work: () => T): Promise<T> {
  const leave = enter(name);
  try {
    const result = work();
    await new Promise<void>((resolve) => process.nextTick(resolve));
    return result;
  } finally {
    leave();
  }
}

let away = false;

/** Returns what takes this thread back. */
function enter(name: string | null): () => void {
  if (away) throw new Error('this process is in another network namespace');
  if (name === null) return () => {};
  const own = open(OWN, OpenFlag.readOnly);
  try {
    setNamespace(`/run/netns/${name}`);
  } catch (error) {
    close(own);
    throw error;
  }
  away = true;
  return () => {
    setns(own);
    away = false;
    close(own);
  };
}

function setNamespace(path: string): void {
  const there = open(path, OpenFlag.readOnly);
  try {
    setns(there);
  } finally {
    close(there);
  }
}

let native: ((fd: number, kind: number) => number) | undefined;

function setns(fd: number): void {
  native ??= ffi().open(null).func('setns', 'i32', ['i32', 'i32']);
  if (native(fd, CLONE_NEWNET) < 0) throw systemError('setns', ffi().errno());
}
