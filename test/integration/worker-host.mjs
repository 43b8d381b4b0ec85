/**
 * A worker thread that does with a queue pair what a test tells it: `{ id, name, … }` is answered by `{ id, value }` or `{ id, error }`.
 */
import { parentPort } from 'node:worker_threads';
import { openQueue } from '../../dist/src/index.js';

const queues = new Map();
const packets = new Uint32Array(64);

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
 * or the queue is broken. `words[2]` counts turns.
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
    Atomics.add(words, 2, 1);
  }
  return queue.broken?.code ?? null;
}

/** Sends `frame` `count` times, each time under the SA whose number `words[0]` has then. */
async function sendWhile(queue, words, frame, count) {
  let sent = 0;
  while (sent < count && queue.broken === null) {
    sent += await send(queue, [frame], Atomics.load(words, 0));
    if (sent % 8 === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }
  return sent;
}

const actions = {
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
  broken: ({ queue }) => queue.broken?.code ?? null,
  block: ({ words }) => Atomics.wait(words, 0, 0, 20_000),
  throw: () => {
    setImmediate(() => {
      throw new Error('a bug of the application');
    });
  },
  close: ({ queue }) => queue.close(),
};

parentPort.on('message', async ({ id, name, index, ...rest }) => {
  try {
    const value = await actions[name]({ ...rest, queue: queues.get(index) });
    parentPort.postMessage({ id, value });
  } catch (error) {
    parentPort.postMessage({ id, error: error.code ?? error.message });
  }
});
