/**
 * The queues of an open NIC: the rings of `virtio-net/` with IPsec in front of them.
 *
 * Transmit: a packet whose SA runs in software is protected in place before it enters the ring, one whose SA runs inline is counted
 * and then tagged by the ring; what stands for several packets is cut into them first (`nic-segments.ts`). A packet whose SA does not exist, or cannot carry it, is dropped and counted; it never
 * leaves in the clear. Receive: what the device has processed is counted and held against the SA's selector; what is still ESP or
 * AH is offered to the software side. When there is no SA for it, a burst goes straight to the ring.
 */

import { VirtioError } from './errors.ts';
import { selectorMatches } from './fallback/selector.ts';
import { VERDICTS, Verdict } from './fallback/verdict.ts';
import type { InlineIpsec } from './ipsec/inline.ts';
import type { SoftwareSide } from './ipsec/manager.ts';
import { SaPlace, type SaState } from './ipsec/sa-state.ts';
import { burstsOf, type Sleeper, type WaitPolicy, waitForPackets } from './nic-interrupts.ts';
import { Found, SaSegments, Split } from './nic-segments.ts';
import { Ethernet } from './packet/fields.ts';
import { fillChecksum } from './packet/fill-checksum.ts';
import { NO_PACKET, PacketFlag, type PacketPool } from './packet/pool.ts';
import { MAX_SEGMENTS } from './packet/segment.ts';
import type { RxQueue } from './virtio-net/rx.ts';
import type { TxQueue } from './virtio-net/tx.ts';

/** What is used of the rings. */
export type TxRing = Pick<
  TxQueue,
  'burst' | 'reclaim' | 'size' | 'room' | 'broken' | 'counters' | 'enableInterrupts' | 'disableInterrupts'
>;
export type RxRing = Pick<
  RxQueue,
  'burst' | 'hasChains' | 'networkHeader' | 'broken' | 'counters' | 'enableInterrupts' | 'disableInterrupts'
>;

/** What is used of the SAs: the parts of `IpsecManager` that are on the data path. Another thread has its own. */
export interface DataPathIpsec {
  readonly state: SaState;
  readonly software: Pick<SoftwareSide, 'protect' | 'unprotect'> | null;
  readonly device: Pick<InlineIpsec, 'awaitsDrain' | 'drained'> | null;
}

export interface NicQueueOptions {
  /** Called whenever a burst finds the ring broken. */
  readonly onBroken?: () => void;
  /** By `Verdict`: where to count what is dropped, for others to see. */
  readonly dropped?: Float64Array;
}

export interface NicRxQueueOptions extends NicQueueOptions {
  /** Without it the queue can only be polled. */
  readonly sleeper?: Sleeper;
}

/** Packets that are looked at together; no more than one burst of a crypto engine. */
const CHUNK = 256;

/** The bytes of link header in front of the IP packet. */
const LINK_HEADER = Ethernet.length;

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
    if (count <= 0) return ring.burst(packets, n);
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

export class NicRxQueue {
  /** Index among the receive queues. */
  readonly index: number;
  /** Packets dropped behind the ring, by `Verdict`. */
  readonly dropped: Float64Array;
  readonly #ring: RxRing;
  readonly #pool: PacketPool;
  readonly #ipsec: DataPathIpsec;
  readonly #onBroken: () => void;
  readonly #sleeper: Sleeper | null;
  /** `enableInterrupts` was called. */
  #armed = false;
  /** How `wait` waits. */
  policy: WaitPolicy = 'adaptive';
  readonly #candidates = new Uint32Array(CHUNK);
  readonly #drop = new Uint32Array(CHUNK);
  readonly #verdicts = new Uint8Array(CHUNK);

  constructor(index: number, ring: RxRing, pool: PacketPool, ipsec: DataPathIpsec, options: NicRxQueueOptions = {}) {
    this.#sleeper = options.sleeper ?? null;
    this.index = index;
    this.#ring = ring;
    this.#pool = pool;
    this.#ipsec = ipsec;
    this.#onBroken = options.onBroken ?? (() => {});
    this.dropped = options.dropped ?? new Float64Array(VERDICTS);
  }

  /** By `RxCounter`: what the ring delivered and dropped. */
  get counters(): Float64Array {
    return this.#ring.counters;
  }

  get broken(): VirtioError | null {
    return this.#ring.broken;
  }

  /**
   * Takes up to `max` packets that have arrived into `out` and returns how many. They are the caller's: to be freed or sent.
   * `pool.sa[p]` of 0 means that packet p arrived in the clear, or as IPsec that nobody here has an SA for. 0 may also
   * mean that all that arrived was dropped.
   */
  burst(out: Uint32Array, max: number): number {
    // hot:
    const ipsec = this.#ipsec;
    const n = this.#ring.burst(out, max);
    const { state } = ipsec;
    if (ipsec.device?.awaitsDrain === true && n < max) ipsec.device.drained(this.index);
    if (n === 0) {
      if (this.#ring.broken !== null) this.#onBroken();
      return 0;
    }
    if ((state.inlineInbound | state.softwareInbound) === 0) return n;
    if (!this.#ring.hasChains && this.#countRun(out, n)) return n;
    let kept = 0;
    for (let from = 0; from < n; from += CHUNK) kept = this.#chunk(out, from, Math.min(from + CHUNK, n), kept);
    return kept;
  }

  /**
   * hot: the usual burst. If the first `n` of `packets` all came secured by one SA without a selector, and there is nothing to be told, they are counted at
   * once; if not, nothing is counted. None is a chain.
   */
  #countRun(packets: Uint32Array, n: number): boolean {
    const { sa, flags, length } = this.#pool;
    const { state } = this.#ipsec;
    const handle = sa[packets[0]];
    let bytes = 0;
    let others = 0;
    let all = -1;
    let any = 0;
    let i = 0;
    // Four at a time, as in `SaSegments.look`.
    for (; i + 4 <= n; i += 4) {
      const a = packets[i];
      const b = packets[i + 1];
      const c = packets[i + 2];
      const d = packets[i + 3];
      others |= (sa[a] ^ handle) | (sa[b] ^ handle) | (sa[c] ^ handle) | (sa[d] ^ handle);
      all &= flags[a] & flags[b] & flags[c] & flags[d];
      any |= flags[a] | flags[b] | flags[c] | flags[d];
      bytes += length[a] + length[b] + length[c] + length[d];
    }
    for (; i < n; i++) {
      const p = packets[i];
      others |= sa[p] ^ handle;
      all &= flags[p];
      any |= flags[p];
      bytes += length[p];
    }
    if (others !== 0 || (all & PacketFlag.secured) === 0 || (any & PacketFlag.softExpiry) !== 0) return false;
    if (state.selective[handle] !== 0) return false;
    state.countInbound(handle, n, bytes - n * LINK_HEADER);
    return true;
  }

  /** hot: examines `out[from..to)` and moves what is delivered to `out[kept…)`. Returns the new `kept`. */
  #chunk(out: Uint32Array, from: number, to: number, kept: number): number {
    const { sa, flags, length, next: chained } = this.#pool;
    const hasChains = this.#ring.hasChains;
    const { state } = this.#ipsec;
    const { selective } = state;
    const candidates = this.#candidates;
    const offered = this.#openInSoftware(out, from, to);
    let next = 0;
    let dropped = 0;
    let end = kept;
    // Packets of one SA come in runs: they are counted when the run ends.
    let current = 0;
    let run = 0;
    let runBytes = 0;
    for (let i = from; i < to; i++) {
      const p = out[i];
      let verdict: number = Verdict.ok;
      if (next < offered && candidates[next] === p) {
        verdict = this.#verdicts[next++];
        if (verdict === Verdict.ok) flags[p] &= ~PacketFlag.securityError;
        else if (verdict === Verdict.notIpsec) verdict = Verdict.ok;
        else this.dropped[verdict]++;
      } else if ((flags[p] & PacketFlag.secured) !== 0) {
        const handle = sa[p];
        if (selective[handle] === 0 || this.#fits(p, handle)) {
          if (handle !== current) {
            if (run !== 0) state.countInbound(current, run, runBytes);
            current = handle;
            run = 0;
            runBytes = 0;
          }
          run++;
          runBytes += (hasChains && chained[p] !== NO_PACKET ? this.#pool.chainLength(p) : length[p]) - LINK_HEADER;
          if ((flags[p] & PacketFlag.softExpiry) !== 0) state.deviceSoftExpiry(handle);
        } else {
          verdict = Verdict.selector;
        }
      }
      if (verdict === Verdict.ok) out[end++] = p;
      else this.#drop[dropped++] = p;
    }
    if (run !== 0) state.countInbound(current, run, runBytes);
    if (dropped !== 0) this.#pool.freeChains(this.#drop, dropped);
    return end;
  }

  /** hot: has the software side open what the device has not secured; says how many packets are in `#candidates` and `#verdicts`. */
  #openInSoftware(out: Uint32Array, from: number, to: number): number {
    const { state, software } = this.#ipsec;
    if (software === null || state.softwareInbound === 0) return 0;
    const { flags } = this.#pool;
    const candidates = this.#candidates;
    let offered = 0;
    for (let i = from; i < to; i++) {
      if ((flags[out[i]] & PacketFlag.secured) === 0) candidates[offered++] = out[i];
    }
    if (offered !== 0) software.unprotect(candidates, offered, LINK_HEADER, this.#verdicts);
    return offered;
  }

  /** Whether a packet that the device has secured is one that its SA may carry (RFC 4301, 5.2, step 4); counts it if not. */
  #fits(p: number, handle: number): boolean {
    const pool = this.#pool;
    const { state } = this.#ipsec;
    const selector = state.selector(handle);
    const at = pool.offset[p] + LINK_HEADER;
    const end = pool.offset[p] + pool.length[p];
    if (selector !== undefined && at < end && selectorMatches(selector, pool.u8, at, end)) return true;
    this.dropped[Verdict.selector]++;
    state.drop(handle, Verdict.selector);
    return false;
  }

  /**
   * Where the device says that the IP header of packet `p` begins, in bytes from its start; 0 when it does not say (OUT_NET_HEADER). To be
   * asked before the packet is changed.
   */
  networkHeader(p: number): number {
    return this.#ring.networkHeader(p);
  }

  /**
   * Resolves to true when packets may have arrived, to false when none has within `timeout` milliseconds. `policy` says how. Not while
   * `enableInterrupts` is in use. Rejects with the reason when the NIC is broken or closed.
   */
  async wait(timeout: number = Number.POSITIVE_INFINITY): Promise<boolean> {
    if (this.#sleeper === null) throw new VirtioError('NO_INTERRUPTS', 'this queue can only be polled');
    try {
      return await waitForPackets(this.#ring, this.index, this.#sleeper, this.policy, timeout);
    } catch (error) {
      if (this.#ring.broken !== null) this.#onBroken();
      throw error;
    }
  }

  /** Bursts of at most `max` packets, as they come: see `burstsOf`. */
  bursts(max?: number): AsyncGenerator<Uint32Array, void, void> {
    return burstsOf(this, max);
  }

  [Symbol.asyncIterator](): AsyncGenerator<Uint32Array, void, void> {
    return this.bursts();
  }

  /** Asks for an interrupt at the next packet; true when one is there already. */
  enableInterrupts(): boolean {
    this.#armed = true;
    return this.#ring.enableInterrupts();
  }

  disableInterrupts(): void {
    this.#armed = false;
    this.#ring.disableInterrupts();
  }

  /** After a reset of the ring, which comes back with interrupts off: who waits, or has asked for one, is served as before. */
  rearm(): void {
    if (this.#armed) this.#ring.enableInterrupts();
    this.#sleeper?.wake(this.index);
  }
}
