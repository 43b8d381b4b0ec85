/**
 * Opens a queue pair in a worker thread from what `WorkerQueue.transfer` has made in the thread that opened the NIC.
 *
 * ```ts
 * import { parentPort } from 'node:worker_threads';
 * import { openQueue } from 'virtio-ipsec';
 *
 * parentPort.once('message', async (handle) => {
 *   using queue = openQueue(handle);
 *   const packets = new Uint32Array(64);
 *   while (queue.broken === null) {
 *     const n = queue.rx.burst(packets, 64);
 *     …
 *   }
 * });
 * ```
 */
import { VirtioError } from '../errors.ts';
import { makeQueues } from '../nic/pair.ts';
import { PacketPool } from '../packet/pool.ts';
import { dropLedger, keepLedger, MappingLedger } from '../sys/mapping-ledger.ts';
import { type MappedMemory, unmapMemory } from '../sys/memory.ts';
import type { SharedDma } from '../vfio/function.ts';
import { FeatureSet } from '../virtio/features.ts';
import { ringFormat } from '../virtio/ring-format.ts';
import { createVirtqueue } from '../virtqueue/create.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';
import { ControlBlock, Owner } from './control-block.ts';
import { openDoorbell } from './doorbells.ts';
import type { QueueHandle, RingHandle } from './handle.ts';
import { mapDma } from './map-dma.ts';
import type { WorkerMessage } from './messages.ts';
import { WorkerArenas } from './worker-arenas.ts';
import { WorkerIpsec } from './worker-ipsec.ts';
import { WorkerNicQueue } from './worker-nic-queue.ts';
import { WorkerSleeper } from './worker-sleeper.ts';

/**
 * Takes the queue pair over: from now on it is this thread's alone, until `close`, the end of the thread, or of the NIC. An open queue holds
 * the event loop of its thread open. Throws VirtioError `QUEUE_TAKEN` for a handle that was opened before or taken back; SystemError; FfiError
 * `FFI_MAIN_THREAD_ONLY` with ffi-rs.
 */
export function openQueue(handle: QueueHandle): WorkerNicQueue {
  const control = new ControlBlock(handle.control);
  if (!control.pass(Owner.offered, Owner.worker)) {
    throw new VirtioError('QUEUE_TAKEN', `queue pair ${handle.index} was opened before, or its NIC is closed`);
  }
  const ledger = new MappingLedger(handle.ledger);
  keepLedger(ledger);
  const mappings: MappedMemory[] = [];
  try {
    const map = (dma: SharedDma) => {
      const memory = mapDma(dma);
      mappings.push(memory);
      return memory;
    };
    const features = FeatureSet.fromWords([...handle.features]);
    const { memory, ...slots } = handle.pool;
    const pool = new PacketPool(map(memory), slots);
    pool.keepForReceive(handle.rx.options.size);
    const open = ({ options, memory }: RingHandle) => createVirtqueue(ringFormat(features), map(memory), options);
    const rings = { rx: open(handle.rx), tx: open(handle.tx) };
    pool.keepForReceive(rings.rx.size);
    const notifier = (which: 'rx' | 'tx', ring: Virtqueue) => {
      const bell = openDoorbell(handle[which].doorbell, ring, control, which);
      if (bell.memory !== null) mappings.push(bell.memory);
      return bell.notifier;
    };
    const { port, index, mac, mtu, wire } = handle;
    const post = (message: WorkerMessage) => port.postMessage(message);
    const ipsec = new WorkerIpsec(handle.sas, pool, mtu, (sa, event, args) => {
      post({ type: 'event', handle: sa, event, args });
    });
    const queues = makeQueues(
      { features, wire, mtu },
      pool,
      ipsec.table,
      { queue: rings.rx, notifier: notifier('rx', rings.rx), counters: control.counters.rx.counters },
      { queue: rings.tx, notifier: notifier('tx', rings.tx), counters: control.counters.tx.counters },
    );
    const arenas = new WorkerArenas(control.tenancy, pool.references, post);
    const sleeper = new WorkerSleeper(handle.interrupt);
    post({ type: 'opened' });
    const parts = { index, mac, mtu, pool, rings, queues, control, ipsec, arenas, sleeper, port, mappings, ledger };
    const queue = new WorkerNicQueue(parts);
    queues.rx.refill();
    return queue;
  } catch (error) {
    for (const memory of mappings) unmapMemory(memory);
    dropLedger(ledger);
    control.pass(Owner.worker, Owner.none);
    handle.port.close();
    throw error;
  }
}
