/**
 * Makes virtqueues of either format: the choice is made once for all queues of a device (RING_PACKED), when they are made.
 */
import type { DmaMemory } from '../sys/memory.ts';
import type { PciFunction } from '../vfio/function.ts';
import { PackedVirtqueue } from './packed.ts';
import { packedLayout } from './packed-layout.ts';
import { SplitVirtqueue } from './split.ts';
import { splitLayout } from './split-layout.ts';
import type { Virtqueue, VirtqueueOptions } from './virtqueue.ts';

/** `split` (Virtio 1.4, 2.7) or `packed` (2.8). */
export type RingFormat = 'split' | 'packed';

/** Bytes of memory that a queue needs. Throws `VirtioError` QUEUE_SIZE. */
export function virtqueueBytes(format: RingFormat, options: VirtqueueOptions): number {
  return format === 'packed' ? packedLayout(options).bytes : splitLayout(options).bytes;
}

/** A queue in `memory`, which is cleared. Throws `VirtioError` QUEUE_SIZE. */
export function createVirtqueue(format: RingFormat, memory: DmaMemory, options: VirtqueueOptions): Virtqueue {
  return format === 'packed' ? new PackedVirtqueue(memory, options) : new SplitVirtqueue(memory, options);
}

/** A queue in memory of its own. Throws `VirtioError` QUEUE_SIZE, and what `allocateDma` throws. */
export function allocateVirtqueue(
  format: RingFormat,
  fn: Pick<PciFunction, 'allocateDma'>,
  options: VirtqueueOptions,
): Virtqueue {
  return createVirtqueue(format, fn.allocateDma(virtqueueBytes(format, options)), options);
}
