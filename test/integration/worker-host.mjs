/**
 * A worker thread that does with a queue pair what a test tells it: `{ id, name, … }` is answered by `{ id, value }` or `{ id, error }`.
 */
import { parentPort } from 'node:worker_threads';
import { openQueue } from '../../dist/src/worker/open-queue.js';

const queues = new Map();
const packets = new Uint32Array(64);
/** Arenas, by a name that the test gives. */
const arenas = new Map();

/** Writes frames into packets and sends them under `sa`; those that find no room are tried again. */
async function send(queue, frames, sa) {
  let next = 0;
  const deadline = performance.now() + 10_000;
  while (next < frames.length && queue.broken === null && performance.now() < deadline) {
    const n = queue.packets.allocate(packets, Math.min(32, frames.length - next));
    for (let i = 0; i < n; i++) {
      queue.packets.write(packets[i], frames[next + i]);
      queue.packets.sa[packets[i]] = sa;
    }
    const taken = queue.tx.burst(packets, n);
    queue.packets.free(packets.subarray(taken), n - taken);
    next += taken;
    queue.tx.reclaim();
    if (n === 0 || taken < n) await new Promise((resolve) => setTimeout(resolve, 1));
  }
  return next;
}

/** Takes `count` packets, or what comes until none does for `quiet` milliseconds. */
async function receive(queue, count, quiet) {
  const out = [];
  while (out.length < count && (await queue.rx.wait(quiet))) {
    const n = queue.rx.burst(packets, packets.length);
    for (let i = 0; i < n; i++) {
      const p = packets[i];
      out.push({ frame: queue.packets.read(p), sa: queue.packets.sa[p], flags: queue.packets.flags[p] });
    }
    queue.packets.free(packets, n);
  }
  return out;
}

/**
 * Polls and never comes to the event loop: sends `frame` under the SA whose number `words[1]` has, unless that is 0, until `words[0]` is set
 * or the queue is broken. `words[2]` counts turns. It rests for a millisecond after each 16 turns: the others need the cores more than it does.
 */
function spin(queue, words, frame) {
  while (words[0] === 0 && queue.broken === null) {
    const sa = Atomics.load(words, 1);
    if (sa !== 0) {
      const n = queue.packets.allocate(packets, 8);
      for (let i = 0; i < n; i++) {
        queue.packets.write(packets[i], frame);
        queue.packets.sa[packets[i]] = sa;
      }
      const taken = queue.tx.burst(packets, n);
      queue.packets.free(packets.subarray(taken), n - taken);
    }
    const got = queue.rx.burst(packets, packets.length);
    queue.packets.free(packets, got);
    queue.tx.reclaim();
    if ((Atomics.add(words, 2, 1) & 15) === 0) Atomics.wait(words, 3, 0, 1);
  }
  return queue.broken?.code ?? null;
}

/** Sends `frame` `count` times, each time under the SA whose number `words[0]` has then; the last ones when that has become another. */
async function sendWhile(queue, words, frame, count) {
  const first = Atomics.load(words, 0);
  const deadline = performance.now() + 10_000;
  let sent = 0;
  while (sent < count && queue.broken === null) {
    while (sent === count - 20 && Atomics.load(words, 0) === first && performance.now() < deadline) {
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    sent += await send(queue, [frame], Atomics.load(words, 0));
    if (sent % 8 === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }
  return sent;
}

/**
 * Sends frames under `sa`: each `header`, and behind it pieces `[start, length]` of the arena `name`. Resolves to the starts of the pieces in the order in which
 * they came back, when all have.
 */
async function sendPieces(queue, name, header, frames, sa) {
  const arena = arenas.get(name);
  const one = new Uint32Array(1);
  const starts = new Uint32Array(64);
  const back = [];
  const wanted = frames.flat().length;
  const deadline = performance.now() + 10_000;
  for (let next = 0; back.length < wanted && performance.now() < deadline; ) {
    if (next < frames.length && queue.packets.allocate(one, 1) === 1) {
      queue.packets.write(one[0], header);
      queue.packets.sa[one[0]] = sa;
      let last = one[0];
      for (const [start, length] of frames[next]) {
        const p = queue.packets.refer(arena, start, length);
        if (p === 0xffffffff) break;
        queue.packets.next[last] = p;
        last = p;
      }
      if (queue.tx.burst(one, 1) === 1) next++;
      else queue.packets.freeChains(one, 1);
    }
    queue.tx.reclaim();
    const n = arena.reclaim(starts);
    back.push(...starts.subarray(0, n));
    if (n === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }
  return back;
}

const actions = {
  openMemory: ({ queue, arena, handle }) => {
    arenas.set(arena, queue.openMemory(handle));
  },
  registerMemory: async ({ queue, arena, fd, offset, size }) => {
    arenas.set(arena, await queue.registerMemory(fd, offset, size));
  },
  unregisterMemory: ({ queue, arena }) => queue.unregisterMemory(arenas.get(arena)),
  readMemory: ({ arena, start, length }) => arenas.get(arena).memory.u8.slice(start, start + length),
  /** Puts a piece into a packet, which is not sent. */
  hold: ({ queue, arena }) => {
    const held = new Uint32Array(1);
    queue.packets.allocate(held, 1);
    queue.packets.next[held[0]] = queue.packets.refer(arenas.get(arena), 0, 10);
    return held[0];
  },
  letGo: ({ queue, arena, packet }) => {
    queue.packets.freeChains(Uint32Array.of(packet), 1);
    return arenas.get(arena).reclaim(new Uint32Array(1));
  },
  sendPieces: ({ queue, arena, header, frames, sa }) => sendPieces(queue, arena, header, frames, sa),
  sendWhile: ({ queue, words, frame, count }) => sendWhile(queue, words, frame, count),
  open: ({ handle }) => {
    const queue = openQueue(handle);
    queues.set(handle.index, queue);
    return { index: queue.index, mtu: queue.mtu, packets: queue.packets.count };
  },
  send: ({ queue, frames, sa }) => send(queue, frames, sa),
  receive: ({ queue, count, quiet }) => receive(queue, count, quiet),
  spin: ({ queue, words, frame }) => spin(queue, words, frame),
  policy: ({ queue, policy }) => {
    queue.rx.policy = policy;
  },
  wait: ({ queue, timeout }) => queue.rx.wait(timeout),
  /** Sends `frame`, and does not look what becomes of it. */
  burst: ({ queue, frame }) => {
    const one = new Uint32Array(1);
    queue.packets.allocate(one, 1);
    queue.packets.write(one[0], frame);
    return queue.tx.burst(one, 1);
  },
  broken: ({ queue }) => queue.broken?.code ?? null,
  block: ({ words }) => Atomics.wait(words, 0, 0, 20_000),
  throw: () => {
    setImmediate(() => {
      throw new Error('a bug of the application');
    });
  },
  close: ({ queue }) => queue.close(),
  /** Closes everything: for the next test. */
  reset: async () => {
    for (const queue of queues.values()) await queue.close();
    queues.clear();
    arenas.clear();
  },
};

parentPort.on('message', async ({ id, name, index, ...rest }) => {
  try {
    const value = await actions[name]({ ...rest, queue: queues.get(index) });
    parentPort.postMessage({ id, value });
  } catch (error) {
    parentPort.postMessage({ id, error: error.code ?? error.message });
  }
});
