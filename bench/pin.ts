/**
 * A core for each thread that spins: two of them that take turns on one core measure the scheduler (sched_setaffinity(2)).
 */
import { ffi } from '../src/sys/ffi/ffi.ts';
import { mapAnonymous, unmapMemory } from '../src/sys/memory.ts';

/** Bytes of a set of cores. */
const SET_BYTES = 128;

/** Keeps the calling thread on the `n`-th of the cores that it may use, counted round. */
export function pinThread(n: number): void {
  const c = ffi().open(null);
  const get = c.func('sched_getaffinity', 'i32', ['i32', 'u64', 'i64']);
  const set = c.func('sched_setaffinity', 'i32', ['i32', 'u64', 'i64']);
  const memory = mapAnonymous(SET_BYTES);
  try {
    const { address, u8 } = memory;
    if (get(0, SET_BYTES, address) < 0) return;
    const cores: number[] = [];
    for (let core = 0; core < 8 * SET_BYTES; core++) if ((u8[core >>> 3] & (1 << (core & 7))) !== 0) cores.push(core);
    if (cores.length < 2) return;
    const core = cores[n % cores.length];
    u8.fill(0);
    u8[core >>> 3] = 1 << (core & 7);
    set(0, SET_BYTES, address);
  } finally {
    unmapMemory(memory);
  }
}
