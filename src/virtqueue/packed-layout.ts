/**
 * Where the parts of a packed virtqueue are in its memory (Virtio 1.4, 2.8), and the bits in them.
 *
 * ```
 *   | descriptor ring 16 * size | driver event suppression 4 | device event suppression 4 | indirect tables |
 *     written by both             by the driver                by the device                by the driver
 * ```
 */
import { alignPart, checkQueueSize, DESCRIPTOR_BYTES } from './descriptor.ts';
import type { QueueLayout } from './driver-queue.ts';
import type { VirtqueueOptions } from './virtqueue.ts';

/**
 * Flags that say whose a descriptor is, besides those of `DescriptorFlag` (2.8.1): available when AVAIL is the wrap counter
 * and USED is not, used when both are.
 */
export const RingFlag = { AVAIL: 1 << 7, USED: 1 << 15 } as const;
export const RING_FLAGS = RingFlag.AVAIL | RingFlag.USED;

/** The last word of a descriptor: the buffer id, and in its upper half the flags (2.8.13). */
export const FLAGS_SHIFT = 16;
/** Where the flags are, in 16-bit units. */
export const FLAGS_HALF = 7;

/** `struct pvirtq_event_suppress` (2.8.14) as one word: offset and wrap counter, and in its upper half the flags. */
export const EventFlag = { ENABLE: 0, DISABLE: 1, DESC: 2 } as const;
export const EVENT_FLAG_MASK = 3;
/** Bit of the wrap counter, beside an offset (2.8.14, 2.9). */
export const WRAP_SHIFT = 15;
export const OFFSET_MASK = (1 << WRAP_SHIFT) - 1;

/** Throws `VirtioError` QUEUE_SIZE. */
export function packedLayout(options: Pick<VirtqueueOptions, 'index' | 'size' | 'indirectEntries'>): QueueLayout {
  const { index, size, indirectEntries = 0 } = options;
  checkQueueSize(index, size, false);
  const driver = alignPart(DESCRIPTOR_BYTES * size);
  const device = alignPart(driver + 4);
  const indirect = alignPart(device + 4);
  return { driver, device, indirect, bytes: indirect + size * indirectEntries * DESCRIPTOR_BYTES };
}

/** An offset with its wrap counter, from the ring flags of an available descriptor there, as events and notifications say it. */
export function ringPosition(at: number, availableFlags: number): number {
  return at | ((availableFlags & RingFlag.AVAIL) === 0 ? 0 : 1 << WRAP_SHIFT);
}

/** hot: whether the descriptor at `event` is among the `count` ones from `from` on, both being positions (2.8.10). */
export function isAmongNext(event: number, from: number, count: number, size: number): boolean {
  const offset = (event & OFFSET_MASK) - (from & OFFSET_MASK);
  // In the next round when the wrap counters differ; behind us, so in the one after that, when the offset is too.
  const ahead = event >>> WRAP_SHIFT === from >>> WRAP_SHIFT ? offset : offset + size;
  return (ahead < 0 ? ahead + 2 * size : ahead) < count;
}
