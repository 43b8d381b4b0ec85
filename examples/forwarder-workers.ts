/**
 * Sends back what arrives, MAC addresses swapped, with one worker thread per queue pair.
 *
 * ```
 * vipsec device --socket /tmp/nic.sock --queue-pairs 2 &
 * node dist/examples/forwarder-workers.js vfio-user:/tmp/nic.sock 2
 * ```
 *
 * The main thread opens the NIC and hands its queue pairs over; it keeps what is slow: SAs, the link, statistics. Each worker has
 * rings and packets of its own and shares nothing with the others. Ends with SIGINT and prints what was counted.
 */
import { isMainThread, Worker, workerData } from 'node:worker_threads';
import { openNic, openQueue, type QueueHandle, type WorkerNicQueue } from '../src/index.ts';

const BURST = 64;
/** Bursts between two looks at the event loop. */
const BUSY = 256;

async function main(): Promise<void> {
  const [address, count = '1'] = process.argv.slice(2);
  if (address === undefined) {
    process.stderr.write('usage: forwarder-workers DEVICE [WORKERS]\n');
    process.exit(2);
  }
  const pairs = Number(count);
  await using nic = await openNic(address, { queuePairs: pairs, workerQueues: pairs, ipsec: 'off' });
  const interrupted = new Promise((resolve) => process.once('SIGINT', resolve));
  const broken = new Promise((resolve) => nic.onBroken(resolve));
  for (const queue of nic.workerQueues) {
    const handle = await queue.transfer();
    new Worker(new URL(import.meta.url), { workerData: handle, transferList: [handle.port] });
    queue.onEnd((end) => process.stdout.write(`queue pair ${queue.index}: ${end}\n`));
  }
  process.stdout.write(`forwarding on ${pairs} threads\n`);
  // Holds the event loop open.
  const clock = setInterval(() => {}, 1000);
  await Promise.race([interrupted, broken]);
  clearInterval(clock);
  const { rx, tx } = nic.statistics();
  process.stdout.write(`received ${rx.packets}, sent ${tx.packets}\n`);
}

async function work(queue: WorkerNicQueue): Promise<void> {
  const { rx, tx, packets: pool } = queue;
  const packets = new Uint32Array(BURST);
  while (queue.broken === null) {
    let moved = 0;
    for (let i = 0; i < BUSY; i++) {
      const n = rx.burst(packets, BURST);
      if (n === 0) continue;
      moved += n;
      for (let j = 0; j < n; j++) swapAddresses(pool.u8, pool.offset[packets[j]]);
      const sent = tx.burst(packets, n);
      if (sent < n) pool.free(packets.subarray(sent), n - sent);
    }
    // With nothing to do, sleep until the device interrupts; otherwise only let the event loop have its turn.
    if (moved === 0) await rx.wait().catch(() => false);
    else await new Promise((resolve) => setImmediate(resolve));
  }
}

function swapAddresses(u8: Uint8Array, at: number): void {
  for (let i = 0; i < 6; i++) {
    const byte = u8[at + i];
    u8[at + i] = u8[at + 6 + i];
    u8[at + 6 + i] = byte;
  }
}

if (isMainThread) {
  await main();
} else {
  const handle: QueueHandle = workerData;
  await work(openQueue(handle));
}
