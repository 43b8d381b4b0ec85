/**
 * A thread of `forwarding.ts`: the owner of a queue pair, the loop device at the other end of its rings, or both.
 */
import { workerData } from 'node:worker_threads';
import { openQueue } from '../src/index.ts';
import type { PacketPool } from '../src/packet/pool.ts';
import { EventFd } from '../src/sys/eventfd.ts';
import { mapShared } from '../src/sys/memory.ts';
import { splitLayout } from '../src/virtqueue/split-layout.ts';
import type { QueueHandle, RingHandle } from '../src/worker/handle.ts';
import type { WorkerNicQueue } from '../src/worker/worker-nic-queue.ts';
import { Shared } from './forwarding.ts';
import { LoopDevice, type LoopRing } from './loop-device.ts';
import { pinThread } from './pin.ts';

export type ThreadRole = 'forward' | 'wake' | 'both' | 'device' | 'sleepy-device';

export interface ThreadData {
  readonly role: ThreadRole;
  readonly index: number;
  readonly handle: QueueHandle | null;
  readonly rings: Omit<QueueHandle, 'port'>;
  /** Bytes of a packet header. */
  readonly header: number;
  readonly words: Int32Array;
  readonly times: Float64Array;
}

const BURST = 32;
const PACKET_BYTES = 64;
/** Packets that go round. */
const IN_FLIGHT = 128;
/** Bursts between looks at what the main thread wants. */
const TURNS = 256;
/** Milliseconds that the sleepy device keeps a packet: the driver sleeps by then. */
const KEEP_MS = 2;

const { role, index, handle, rings, header, words, times }: ThreadData = workerData;
const stopped = () => Atomics.load(words, Shared.stop) !== 0;
const active = () => (Atomics.load(words, Shared.active) & (1 << index)) !== 0;

/** An Ethernet frame of 64 bytes with an IPv4 UDP packet. */
function frame(): Uint8Array {
  const bytes = new Uint8Array(PACKET_BYTES);
  bytes.set([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x08, 0x00, 0x45, 0, 0, PACKET_BYTES - 14, 0, 1, 0, 0, 64, 17]);
  bytes.set([0x66, 0xb9, 10, 0, 0, 1, 10, 0, 0, 2, 0x30, 0x39, 0, 9, 0, PACKET_BYTES - 34], 24);
  return bytes;
}

function loopRing({ memory, options }: RingHandle): LoopRing {
  const { fd, offset, size, iova } = memory;
  const layout = splitLayout(options);
  const [iovaLow, iovaHigh] = [iova, 0];
  return {
    size: options.size,
    descriptorArea: iova,
    driverArea: iova + layout.driver,
    deviceArea: iova + layout.device,
    memory: { ...mapShared(fd, offset, size, { write: true, populate: true }), iova, iovaLow, iovaHigh },
  };
}

function loopDevice(): LoopDevice {
  const { fd, offset, size, iova } = rings.pool.memory;
  const packets = mapShared(fd, offset, size, { write: true, populate: true });
  const said = { length: header, flags: 0, resourceId: 0, resourceType: 0 };
  const device = new LoopDevice(loopRing(rings.tx), loopRing(rings.rx), packets, iova, said, PACKET_BYTES);
  device.suppressNotifications();
  return device;
}

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
  const device = loopDevice();
  Atomics.add(words, Shared.ready, 1);
  while (!stopped()) for (let turn = 0; turn < TURNS; turn++) device.run();
}

const now = () => Number(process.hrtime.bigint() / 100n) / 10;

/** Sends a packet, sleeps until it comes back, and notes how long after the device's interrupt that was. */
async function wake(queue: WorkerNicQueue): Promise<void> {
  const { packets: pool, rx, tx } = queue;
  const burst = new Uint32Array(BURST);
  rx.policy = 'interrupt';
  Atomics.add(words, Shared.ready, 1);
  while (!stopped()) {
    if (pool.allocate(burst, 2) !== 2) throw new Error('there are too few packets');
    for (let i = 0; i < 2; i++) pool.write(burst[i], frame());
    tx.burst(burst, 2);
    await rx.wait();
    const woken = now();
    const done = Atomics.load(words, Shared.active);
    if (done < times.length - 1) {
      // Element 0 is when the device interrupted.
      times[done + 1] = woken - times[0];
      Atomics.store(words, Shared.active, done + 1);
    }
    const n = rx.burst(burst, BURST);
    if (n !== 2) throw new Error('woken for nothing');
    pool.free(burst, n);
    tx.reclaim();
  }
}

/** Keeps what it gets for a while, and interrupts when it gives it back. */
async function doze(): Promise<void> {
  const device = loopDevice();
  const tx = loopRing(rings.tx);
  const avail = ((tx.driverArea - tx.memory.iova) >>> 1) + 1;
  const interrupt = EventFd.adopt(rings.interrupt ?? -1);
  let seen = 0;
  Atomics.add(words, Shared.ready, 1);
  while (!stopped()) {
    if (Atomics.load(tx.memory.u16, avail) === seen) {
      await new Promise((resolve) => setTimeout(resolve, 1));
      continue;
    }
    await new Promise((resolve) => setTimeout(resolve, KEEP_MS));
    seen = Atomics.load(tx.memory.u16, avail);
    device.run();
    times[0] = now();
    interrupt.signal();
  }
}

// Who only waits may be anywhere.
if (role !== 'wake' && role !== 'sleepy-device') pinThread(role === 'device' ? index + 1 : index);
switch (role) {
  case 'forward':
    forward(open(), null);
    break;
  case 'both': {
    const queue = open();
    forward(queue, loopDevice());
    break;
  }
  case 'device':
    play();
    break;
  case 'wake':
    await wake(open());
    break;
  case 'sleepy-device':
    await doze();
    break;
}
