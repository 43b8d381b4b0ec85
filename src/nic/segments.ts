/**
 * Cuts what an SA is to protect. A packet that stands for several (`PacketFlag.segmented`) becomes these before IPsec sees it, whether its SA
 * runs in software or inline: each segment is a packet of its own under the SA, with its own sequence number. The driver of an
 * inline SA has to keep packets below the path MTU itself (Virtio 1.4, 5.1.9.7), and nothing tells a device that can segment what it
 * protects from one that cannot.
 *
 * TCP segments are made no longer than what the SA can carry; datagrams keep the length that was asked for, because it means something to
 * who receives them.
 */
import type { SaState } from '../ipsec/sa-state.ts';
import { measureChain } from '../packet/chains.ts';
import { Ethernet } from '../packet/fields.ts';
import { baseType, GsoType } from '../packet/gso.ts';
import { NO_PACKET, PacketFlag, type PacketPool } from '../packet/pool.ts';
import { MAX_LARGE_FRAME, MAX_SEGMENTS, Segmenter } from '../packet/segment.ts';

/** What `split` gives, if not a number of segments. */
export const Split = {
  /** There is no room for all of them now. */
  later: 0,
  /** The packet cannot be cut. */
  refused: -1,
} as const;

/** What `look` finds. */
export const Found = {
  /** A packet that stands for several. */
  segmented: 1,
  /** A chain of slots. */
  chain: 2,
} as const;

export class SaSegments {
  readonly #pool: PacketPool;
  readonly #state: Pick<SaState, 'longest'>;
  readonly #segmenter: Segmenter;
  readonly #request = { gsoType: 0, gsoSize: 0, csumStart: 0, csumOffset: 0, outerThOffset: 0, innerNhOffset: 0 };
  readonly #fresh = new Uint32Array(MAX_SEGMENTS);
  readonly #single = new Uint32Array(1);
  /** The slot whose bytes are copied next, and how many of them have been. */
  #slot = 0;
  #used = 0;

  constructor(pool: PacketPool, state: Pick<SaState, 'longest'>) {
    this.#pool = pool;
    this.#state = state;
    this.#segmenter = new Segmenter(pool);
  }

  /** hot: looks for packets that are not one in one slot among the first `n` of `packets`: bits of `Found`. */
  look(packets: Uint32Array, n: number): number {
    const { flags, next } = this.#pool;
    let any = 0;
    let last = -1;
    let i = 0;
    // Four at a time: what an access to an array costs besides the access itself is then paid once for four.
    for (; i + 4 <= n; i += 4) {
      const a = packets[i];
      const b = packets[i + 1];
      const c = packets[i + 2];
      const d = packets[i + 3];
      any |= flags[a] | flags[b] | flags[c] | flags[d];
      last &= next[a] & next[b] & next[c] & next[d];
    }
    for (; i < n; i++) {
      any |= flags[packets[i]];
      last &= next[packets[i]];
    }
    return ((any & PacketFlag.segmented) !== 0 ? Found.segmented : 0) | (last !== (NO_PACKET | 0) ? Found.chain : 0);
  }

  /** hot: whether packet `p` is to be cut. */
  concerns(p: number): boolean {
    const { flags, sa } = this.#pool;
    return (flags[p] & PacketFlag.segmented) !== 0 && sa[p] !== 0;
  }

  /**
   * hot: replaces packet `p`, also a chain, by its segments in `out[from…)`; gives their number, at most `room` and `MAX_SEGMENTS`, or one of `Split`, with
   * nothing done then. `size` is the most that there could ever be room for.
   */
  split(p: number, out: Uint32Array, from: number, room: number, size: number): number {
    const pool = this.#pool;
    const count = this.#plan(p);
    if (count === 0 || count > size || count > pool.count) return Split.refused;
    if (count > room || count > pool.available) return Split.later;
    const segmenter = this.#segmenter;
    const handle = pool.sa[p];
    pool.allocate(this.#fresh, count);
    this.#slot = p;
    this.#used = segmenter.headers;
    for (let k = 0; k < count; k++) {
      const segment = this.#fresh[k];
      const to = pool.offset[segment];
      this.#copyPayload(to + segmenter.headers, segmenter.payload(k));
      pool.length[segment] = segmenter.seal(k, to);
      pool.sa[segment] = handle;
      out[from + k] = segment;
    }
    this.#single[0] = p;
    pool.freeChains(this.#single, 1);
    return count;
  }

  /** hot: how many segments packet `p` makes; 0 when it cannot be cut. */
  #plan(p: number): number {
    const pool = this.#pool;
    const request = this.#request;
    const at = pool.offset[p];
    const inSlot = pool.length[p];
    if (at < pool.slot(p) || at + inSlot > pool.slot(p) + pool.stride) return 0;
    if ((pool.flags[p] & PacketFlag.needsChecksum) === 0) return 0;
    const total = measureChain(pool, p, MAX_LARGE_FRAME);
    if (total === 0) return 0;
    request.gsoType = pool.gsoType[p];
    request.gsoSize = pool.gsoSize[p];
    request.csumStart = pool.checksumStart[p];
    request.csumOffset = pool.checksumOffset[p];
    request.outerThOffset = pool.outerTransport[p];
    request.innerNhOffset = pool.innerNetwork[p];
    const base = baseType(request.gsoType);
    if (base !== GsoType.TCPV4 && base !== GsoType.TCPV6 && base !== GsoType.UDP_L4) return 0;
    const segmenter = this.#segmenter;
    let count = segmenter.plan(request, at, total, inSlot);
    const handle = pool.sa[p];
    const { longest } = this.#state;
    // An SA that does not exist is found out by whoever protects.
    const most = handle < longest.length && longest[handle] !== 0 ? longest[handle] + Ethernet.length : MAX_LARGE_FRAME;
    const isTooLong = segmenter.headers + segmenter.size > most && total > most;
    if (count !== 0 && isTooLong && base !== GsoType.UDP_L4 && most > segmenter.headers) {
      request.gsoSize = most - segmenter.headers;
      count = segmenter.plan(request, at, total, inSlot);
    }
    return count !== 0 && segmenter.headers + segmenter.payload(0) <= pool.stride - pool.headroom ? count : 0;
  }

  /** hot: copies the next `bytes` of the packet to `to`. */
  #copyPayload(to: number, bytes: number): void {
    const { u8, count, offset, length, next, references } = this.#pool;
    let done = 0;
    while (done < bytes) {
      const slot = this.#slot;
      const left = (slot < count ? length[slot] : references.length[slot - count]) - this.#used;
      if (left === 0) {
        this.#slot = next[slot];
        this.#used = 0;
        continue;
      }
      const n = Math.min(left, bytes - done);
      if (slot < count) {
        const from = offset[slot] + this.#used;
        u8.copyWithin(to + done, from, from + n);
      } else {
        references.copy(slot, this.#used, n, u8, to + done);
      }
      this.#used += n;
      done += n;
    }
  }
}
