/**
 * Packets over several slots, and references behind them: how long they are, and made one piece again for whoever works on packets in place.
 */
import { NO_PACKET, type PacketPool } from './pool.ts';

const rest = new Uint32Array(1);

/** Bytes of the packet that begins with slot `p`; 0 when it is none, has an empty piece, or has more than `most` bytes. */
export function measureChain(pool: PacketPool, p: number, most: number): number {
  // hot:
  const { count, stride, offset, length, next, references } = pool;
  let bytes = 0;
  for (let q = p; q !== NO_PACKET; q = next[q]) {
    if (q >= count) {
      if (!references.has(q)) return 0;
      bytes += references.length[q - count];
    } else {
      const at = offset[q];
      const size = length[q];
      if (size === 0 || at < pool.slot(q) || at + size > pool.slot(q) + stride) return 0;
      bytes += size;
    }
    // Also ends a chain that leads back to itself.
    if (bytes > most) return 0;
  }
  return bytes;
}

/**
 * Copies all of the packet that begins with slot `p` into that slot, behind the default headroom, and gives the other slots and the references
 * back. False, with nothing changed, when it does not fit there or the chain is not one.
 */
export function gatherChain(pool: PacketPool, p: number): boolean {
  const { u8, count, stride, headroom, offset, length, next, references } = pool;
  const bytes = measureChain(pool, p, stride - headroom);
  if (bytes === 0) return false;
  const to = pool.slot(p) + headroom;
  u8.copyWithin(to, offset[p], offset[p] + length[p]);
  let at = to + length[p];
  for (let q = next[p]; q !== NO_PACKET; q = next[q]) {
    const size = q < count ? length[q] : references.length[q - count];
    if (q < count) u8.copyWithin(at, offset[q], offset[q] + size);
    else references.copy(q, 0, size, u8, at);
    at += size;
  }
  rest[0] = next[p];
  if (rest[0] !== NO_PACKET) pool.freeChains(rest, 1);
  offset[p] = to;
  length[p] = bytes;
  next[p] = NO_PACKET;
  return true;
}
