/**
 * Where the parts of a split virtqueue are in its memory (Virtio 1.4, 2.7).
 *
 * ```
 *   | descriptor table 16 * size | available ring 6 + 2 * size | used ring 6 + 8 * size | indirect tables |
 *     written by the driver        written by the driver         written by the device    by the driver
 * ```
 */
import { alignPart, checkQueueSize, DESCRIPTOR_BYTES } from './descriptor.ts';
import type { QueueLayout } from './driver-queue.ts';
import type { VirtqueueOptions } from './virtqueue.ts';

/** `struct virtq_desc` (2.7.5): `next` is the upper half of the last word, the flags are the lower one. */
export const NEXT_SHIFT = 16;

/** `struct virtq_avail` and `struct virtq_used` (2.7.6, 2.7.8), in 16-bit units. */
export const RingField = { flags: 0, idx: 1, ring: 2 } as const;
export const NO_NOTIFICATIONS = 1;

/** Throws `VirtioError` QUEUE_SIZE. */
export function splitLayout(options: Pick<VirtqueueOptions, 'index' | 'size' | 'indirectEntries'>): QueueLayout {
  const { index, size, indirectEntries = 0 } = options;
  checkQueueSize(index, size, true);
  const driver = alignPart(DESCRIPTOR_BYTES * size);
  const device = alignPart(driver + 6 + 2 * size);
  const indirect = alignPart(device + 6 + 8 * size);
  return { driver, device, indirect, bytes: indirect + size * indirectEntries * DESCRIPTOR_BYTES };
}
