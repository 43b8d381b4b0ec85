/**
 * A thread of `forwarding.ts`: the owner of a queue pair, the loop device at the other end of its rings, or both.
 */
import { workerData } from 'node:worker_threads';
import { openQueue } from '../src/index.ts';
import type { PacketPool } from '../src/packet/pool.ts';
import type { QueueHandle } from '../src/worker/handle.ts';
import type { WorkerNicQueue } from '../src/worker/worker-nic-queue.ts';
import { Shared } from './forwarding.ts';
import type { LoopDevice } from './loop-device.ts';
import { pinThread } from './pin.ts';
import { frame, loopDevice, PACKET_BYTES, type PairRings } from './shared-pair.ts';

export type ThreadRole = 'forward' | 'both' | 'device';

export interface ThreadData {
  readonly role: ThreadRole;
  readonly index: number;
  readonly handle: QueueHandle | null;
  readonly rings: PairRings;
  readonly words: Int32Array;
}

const BURST = 32;
/** Packets that go round. */
const IN_FLIGHT = 128;
/** Bursts between looks at what the main thread wants. */
const TURNS = 256;

const { role, index, handle, rings, words }: ThreadData = workerData;
const stopped = () => Atomics.load(words, Shared.stop) !== 0;
const active = () => (Atomics.load(words, Shared.active) & (1 << index)) !== 0;

/** hot: destination becomes source, and the other way round. Packets begin at multiples of 4. */
function swapAddresses({ u32, offset }: PacketPool, packets: Uint32Array, n: number): void {
  for (let i = 0; i < n; i++) {
    const at = offset[packets[i]] >>> 2;
    const a = u32[at];
    const b = u32[at + 1];
    const c = u32[at + 2];
    u32[at] = (b >>> 16) | (c << 16);
    u32[at + 1] = (c >>> 16) | (a << 16);
    u32[at + 2] = (a >>> 16) | (b << 16);
  }
}

function open(): WorkerNicQueue {
  if (handle === null) throw new Error('a driver without a queue');
  return openQueue(handle);
}

/** Sends the packets that will go round. */
function inject({ packets: pool, tx }: WorkerNicQueue): void {
  const packets = new Uint32Array(BURST);
  for (let left = IN_FLIGHT; left > 0; left -= BURST) {
    if (pool.allocate(packets, BURST) !== BURST) throw new Error('there are too few packets');
    for (const p of packets) pool.write(p, frame());
    if (tx.burst(packets, BURST) !== BURST) throw new Error('the ring is too small');
  }
}

function check({ packets: pool }: WorkerNicQueue, p: number): void {
  const bytes = pool.read(p);
  // Forwarded an even or an odd number of times.
  const [a, b] = [bytes[5], bytes[11]];
  if (bytes.length !== PACKET_BYTES || a + b !== 3 || bytes[14] !== 0x45) throw new Error('packets were changed');
}

function forward(queue: WorkerNicQueue, device: LoopDevice | null): void {
  const { packets: pool, rx, tx } = queue;
  const burst = new Uint32Array(BURST);
  inject(queue);
  Atomics.add(words, Shared.ready, 1);
  while (!stopped()) {
    if (!active()) {
      Atomics.wait(words, Shared.stop, 0, 1);
      continue;
    }
    for (let turn = 0; turn < TURNS; turn++) {
      device?.run();
      const n = rx.burst(burst, BURST);
      if (n === 0) continue;
      swapAddresses(pool, burst, n);
      if (tx.burst(burst, n) !== n) throw new Error('packets were lost');
    }
    if (queue.broken !== null) throw queue.broken;
    // One look at what goes round.
    const n = rx.burst(burst, BURST);
    if (n === 0) continue;
    check(queue, burst[0]);
    if (tx.burst(burst, n) !== n) throw new Error('packets were lost');
  }
}

function play(): void {
  // The driver clears the rings when it opens its queue.
  while (Atomics.load(words, Shared.ready) === 0) Atomics.wait(words, Shared.ready, 0, 1);
  const device = loopDevice(rings);
  Atomics.add(words, Shared.ready, 1);
  while (!stopped()) for (let turn = 0; turn < TURNS; turn++) device.run();
}

pinThread(role === 'device' ? index + 1 : index);
switch (role) {
  case 'forward':
    forward(open(), null);
    break;
  case 'both': {
    const queue = open();
    forward(queue, loopDevice(rings));
    break;
  }
  case 'device':
    play();
    break;
}
