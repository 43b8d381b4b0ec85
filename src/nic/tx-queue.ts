/**
 * The transmit queue of a NIC: a ring with IPsec in front of it.
 *
 * A packet whose SA runs in software is protected in place before it enters the ring, one whose SA runs inline is counted and then tagged by
 * the ring; what stands for several packets is cut into them first (`segments.ts`). A packet whose SA does not exist, or cannot carry it, is
 * dropped and counted; it never leaves in the clear. When there is no SA, a burst goes straight to the ring.
 */
import type { VirtioError } from '../errors.ts';
import { VERDICTS, Verdict } from '../fallback/verdict.ts';
import { SaPlace } from '../ipsec/sa-state.ts';
import { fillChecksum } from '../packet/fill-checksum.ts';
import { NO_PACKET, PacketFlag, type PacketPool } from '../packet/pool.ts';
import { MAX_SEGMENTS } from '../packet/segment.ts';
import { TxCounter, type TxQueue } from '../virtio-net/tx.ts';
import { CHUNK, type DataPathIpsec, LINK_HEADER, type NicQueueOptions } from './data-path.ts';
import { gatherToProtect } from './one-piece.ts';
import { Found, SaSegments, Split } from './segments.ts';

/** What is used of the ring. */
export type TxRing = Pick<
  TxQueue,
  'burst' | 'reclaim' | 'size' | 'room' | 'broken' | 'counters' | 'enableInterrupts' | 'disableInterrupts'
>;

export class NicTxQueue {
  /** Packets dropped in front of the ring, by `Verdict`. */
  readonly dropped: Float64Array;
  readonly #ring: TxRing;
  readonly #pool: PacketPool;
  readonly #ipsec: DataPathIpsec;
  readonly #onBroken: () => void;
  readonly #send = new Uint32Array(CHUNK);
  readonly #software = new Uint32Array(CHUNK);
  readonly #drop = new Uint32Array(CHUNK);
  readonly #verdicts = new Uint8Array(CHUNK);
  readonly #segments: SaSegments;
  /** Packets, and segments of those that were cut. */
  readonly #cut = new Uint32Array(CHUNK + MAX_SEGMENTS);
  readonly #single = new Uint32Array(1);
  /** Whether the burst that is being sent may have chains of slots. */
  #hasChains = false;

  constructor(ring: TxRing, pool: PacketPool, ipsec: DataPathIpsec, options: NicQueueOptions = {}) {
    this.#ring = ring;
    this.#pool = pool;
    this.#ipsec = ipsec;
    this.#segments = new SaSegments(pool, ipsec.state);
    this.#onBroken = options.onBroken ?? (() => {});
    this.dropped = options.dropped ?? new Float64Array(VERDICTS);
  }

  /** By `TxCounter`: packets and bytes that entered the ring, and what the ring dropped. */
  get counters(): Float64Array {
    return this.#ring.counters;
  }

  get broken(): VirtioError | null {
    return this.#ring.broken;
  }

  /**
   * Sends the first of `packets[0..n)` and returns how many were taken; the others stay the caller's. Taken packets belong to the
   * NIC, also those that it dropped, and come back to the pool when they are sent. A packet must not be given twice. 0 when `broken`.
   */
  burst(packets: Uint32Array, n: number): number {
    // hot:
    const ring = this.#ring;
    if (ring.broken !== null) {
      this.#onBroken();
      return 0;
    }
    if (this.#ipsec.state.outbound === 0) return ring.burst(packets, n);
    if (ring.room < n) ring.reclaim();
    const count = Math.min(n, ring.room, packets.length);
    if (count <= 0) {
      // Not the ring's to find out: it would look once more, and take what nobody has counted or protected.
      if (n > 0) ring.counters[TxCounter.ringFull]++;
      return 0;
    }
    if (this.#countRun(packets, count)) return ring.burst(packets, count);
    const found = this.#segments.look(packets, count);
    this.#hasChains = (found & Found.chain) !== 0;
    if ((found & Found.segmented) !== 0) return this.#burstCut(packets, count);
    for (let from = 0; from < count; from += CHUNK) this.#chunk(packets, from, Math.min(from + CHUNK, count));
    return count;
  }

  /**
   * hot: the usual burst. If the first `n` of `packets` are single packets in single slots that all name one inline SA, which can carry them
   * and has no limit near, they are counted at once; if not, nothing is counted.
   */
  #countRun(packets: Uint32Array, n: number): boolean {
    const { sa, flags, length, next } = this.#pool;
    const { state } = this.#ipsec;
    const handle = sa[packets[0]];
    if (handle >= state.place.length || state.place[handle] !== SaPlace.inlineOutbound) return false;
    const longest = state.longest[handle] + LINK_HEADER;
    const shortest = LINK_HEADER + 1;
    let bytes = 0;
    let others = 0;
    let any = 0;
    let last = -1;
    // Negative as soon as one length is out of range.
    let fits = 0;
    let i = 0;
    // Four at a time, as in `SaSegments.look`.
    for (; i + 4 <= n; i += 4) {
      const a = packets[i];
      const b = packets[i + 1];
      const c = packets[i + 2];
      const d = packets[i + 3];
      others |= (sa[a] ^ handle) | (sa[b] ^ handle) | (sa[c] ^ handle) | (sa[d] ^ handle);
      any |= flags[a] | flags[b] | flags[c] | flags[d];
      last &= next[a] & next[b] & next[c] & next[d];
      const bytesA = length[a];
      const bytesB = length[b];
      const bytesC = length[c];
      const bytesD = length[d];
      fits |= (longest - bytesA) | (longest - bytesB) | (longest - bytesC) | (longest - bytesD);
      fits |= (bytesA - shortest) | (bytesB - shortest) | (bytesC - shortest) | (bytesD - shortest);
      bytes = (bytes + bytesA + bytesB + bytesC + bytesD) | 0;
    }
    for (; i < n; i++) {
      const p = packets[i];
      others |= sa[p] ^ handle;
      any |= flags[p];
      last &= next[p];
      fits |= (longest - length[p]) | (length[p] - shortest);
      bytes = (bytes + length[p]) | 0;
    }
    bytes -= n * LINK_HEADER;
    if (others !== 0 || fits < 0 || (any & PacketFlag.segmented) !== 0 || last !== (NO_PACKET | 0)) return false;
    if (n >= state.packetsUntilAlert(handle) || bytes >= state.bytesUntilAlert(handle)) return false;
    state.count(handle, n, bytes);
    return true;
  }

  /** hot: as `burst`, when there may be packets to cut; takes fewer when there is no room for all segments of the next one. */
  #burstCut(packets: Uint32Array, count: number): number {
    const ring = this.#ring;
    const segments = this.#segments;
    const list = this.#cut;
    let filled = 0;
    let taken = 0;
    let room = ring.room;
    for (; taken < count && room > 0; taken++) {
      const p = packets[taken];
      let made = 1;
      if (segments.concerns(p)) made = segments.split(p, list, filled, room, ring.size);
      else list[filled] = p;
      if (made === Split.later) break;
      if (made === Split.refused) {
        this.#single[0] = this.#refuse(p, this.#pool.sa[p], Verdict.malformed);
        this.#pool.freeChains(this.#single, 1);
        continue;
      }
      filled += made;
      room -= made;
      if (filled >= CHUNK) filled = this.#chunks(filled);
    }
    this.#chunks(filled);
    return taken;
  }

  /** hot: sends or drops the first `n` of what was cut. */
  #chunks(n: number): 0 {
    for (let from = 0; from < n; from += CHUNK) this.#chunk(this.#cut, from, Math.min(from + CHUNK, n));
    return 0;
  }

  /** hot: sends or drops `packets[from..to)`; the ring has room for them. */
  #chunk(packets: Uint32Array, from: number, to: number): void {
    const { sa, length, next } = this.#pool;
    const hasChains = this.#hasChains;
    const { state } = this.#ipsec;
    const { place } = state;
    const send = this.#send;
    const software = this.#software;
    let sending = 0;
    let inSoftware = 0;
    let dropped = 0;
    // Packets of one SA come in runs: what is known of the SA, and counted for it, is kept here until the run ends.
    let current = 0;
    let where: number = SaPlace.none;
    let longest = 0;
    let run = 0;
    let runBytes = 0;
    let packetsLeft = 0;
    let bytesLeft = 0;
    for (let i = from; i < to; i++) {
      const p = packets[i];
      const handle = sa[p];
      if (handle === 0) {
        send[sending++] = p;
        continue;
      }
      if (handle !== current) {
        if (run !== 0) state.count(current, run, runBytes);
        current = handle;
        where = handle < place.length ? place[handle] : SaPlace.none;
        run = 0;
        runBytes = 0;
        longest = where === SaPlace.inlineOutbound ? state.longest[handle] : 0;
        packetsLeft = state.packetsUntilAlert(handle);
        bytesLeft = state.bytesUntilAlert(handle);
      }
      if (where === SaPlace.softwareOutbound) {
        software[inSoftware++] = p;
        send[sending++] = p;
        continue;
      }
      const bytes = (hasChains && next[p] !== NO_PACKET ? this.#pool.chainLength(p) : length[p]) - LINK_HEADER;
      let verdict: number = where === SaPlace.inlineOutbound ? Verdict.tooBig : state.whyUnknown(handle);
      if (bytes > 0 && bytes <= longest) {
        run++;
        runBytes += bytes;
        if (run < packetsLeft && runBytes < bytesLeft) {
          send[sending++] = p;
          continue;
        }
        state.count(handle, run, runBytes);
        run = 0;
        runBytes = 0;
        verdict = state.check(handle, bytes);
        packetsLeft = state.packetsUntilAlert(handle);
        bytesLeft = state.bytesUntilAlert(handle);
      }
      if (verdict === Verdict.ok) send[sending++] = p;
      else this.#drop[dropped++] = this.#refuse(p, handle, verdict);
    }
    if (run !== 0) state.count(current, run, runBytes);
    if (inSoftware !== 0) {
      const kept = this.#protect(inSoftware, sending, dropped);
      dropped += sending - kept;
      sending = kept;
    }
    if (dropped !== 0) this.#pool.freeChains(this.#drop, dropped);
    if (sending !== 0) this.#transmit(sending);
  }

  /** hot: protects what is in `#software`; takes what failed out of `#send` and puts it behind `dropped` others. Returns how many stay. */
  #protect(count: number, sending: number, dropped: number): number {
    const pool = this.#pool;
    const send = this.#send;
    const software = this.#software;
    const verdicts = this.#verdicts;
    const engine = this.#ipsec.software;
    if (this.#hasChains) gatherToProtect(pool, software, count);
    for (let i = 0; i < count; i++) {
      if ((pool.flags[software[i]] & PacketFlag.needsChecksum) !== 0) fillChecksum(pool, software[i]);
    }
    if (engine === null) verdicts.fill(Verdict.noSa, 0, count);
    else engine.protect(software, count, LINK_HEADER, verdicts);
    let kept = 0;
    let next = 0;
    let drop = dropped;
    for (let i = 0; i < sending; i++) {
      const p = send[i];
      if (next < count && software[next] === p) {
        const verdict = verdicts[next++];
        if (verdict !== Verdict.ok) {
          this.#drop[drop++] = p;
          this.dropped[verdict]++;
          continue;
        }
        // It is ESP or AH now, and nothing more is to be done to it.
        pool.sa[p] = 0;
      }
      send[kept++] = p;
    }
    return kept;
  }

  #transmit(sending: number): void {
    const send = this.#send;
    const taken = this.#ring.burst(send, sending);
    if (taken === sending) return;
    // The ring has broken meanwhile. These packets are not what the caller gave, so they do not go back.
    send.copyWithin(0, taken, sending);
    this.#pool.freeChains(send, sending - taken);
    this.dropped[Verdict.engine] += sending - taken;
  }

  #refuse(p: number, handle: number, verdict: number): number {
    this.dropped[verdict]++;
    this.#ipsec.state.drop(handle, verdict);
    return p;
  }

  /** Returns the packets that the device is done with to the pool, and says how many. */
  reclaim(): number {
    const n = this.#ring.reclaim();
    if (n === 0 && this.#ring.broken !== null) this.#onBroken();
    return n;
  }

  /** Packets that `burst` would take now without waiting for the device. */
  get room(): number {
    return this.#ring.room;
  }

  /** Asks for an interrupt when the device is done with a packet; true when one is done already. */
  enableInterrupts(): boolean {
    return this.#ring.enableInterrupts();
  }

  disableInterrupts(): void {
    this.#ring.disableInterrupts();
  }
}
