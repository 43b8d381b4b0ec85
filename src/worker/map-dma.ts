/**
 * DMA memory in another thread than the one that has made it known to the device: mapped once more, at the same I/O virtual addresses.
 */
import { type DmaMemory, mapShared } from '../sys/memory.ts';
import { IOVA_BOUNDARY } from '../vfio/dma.ts';
import type { SharedDma } from '../vfio/function.ts';

/** To be given to `unmapMemory`. Throws SystemError. */
export function mapDma({ fd, offset, size, iova }: SharedDma): DmaMemory {
  const memory = mapShared(fd, offset, size, { write: true, populate: true, secret: true });
  const [iovaLow, iovaHigh] = [iova % IOVA_BOUNDARY, Math.floor(iova / IOVA_BOUNDARY)];
  // The object that `unmapMemory` knows.
  return Object.assign(memory, { iova, iovaLow, iovaHigh });
}
