/**
 * The checksum that a packet has left to the device (Virtio 1.4, 5.1.9.2), for a packet that the device will not see as it is.
 */
import { addBytes, finish } from './checksum.ts';
import { PacketFlag, type PacketPool } from './pool.ts';

/** Fills the checksum that the device would have filled, because the packet is about to be encrypted. */
export function fillChecksum(pool: PacketPool, p: number): void {
  pool.flags[p] &= ~PacketFlag.needsChecksum;
  const start = pool.checksumStart[p];
  const field = start + pool.checksumOffset[p];
  const size = pool.length[p];
  if (field + 2 > size) return;
  const at = pool.offset[p];
  // The field holds the sum of the pseudo header (Virtio 1.4, 5.1.9.2), which thereby is counted in.
  // 0xffff stands for 0, which in UDP would mean that there is no checksum.
  const sum = finish(addBytes(pool.u8, at + start, size - start, 0)) || 0xffff;
  pool.u8[at + field] = sum >>> 8;
  pool.u8[at + field + 1] = sum & 0xff;
}
