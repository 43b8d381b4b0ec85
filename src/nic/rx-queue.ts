/**
 * The receive queue of a NIC: a ring with IPsec behind it.
 *
 * What the device has processed is counted and held against the SA's selector; what is still ESP or AH is offered to the software side. When there is
 * no SA, a burst comes straight from the ring.
 */
import { VirtioError } from '../errors.ts';
import { selectorMatches } from '../fallback/selector.ts';
import { VERDICTS, Verdict } from '../fallback/verdict.ts';
import { NO_PACKET, PacketFlag, type PacketPool } from '../packet/pool.ts';
import type { RxQueue } from '../virtio-net/rx.ts';
import { CHUNK, type DataPathIpsec, LINK_HEADER, type NicQueueOptions } from './data-path.ts';
import { burstsOf, LOOKS_PER_TURN, type Sleeper, type WaitPolicy, waitForPackets } from './interrupts.ts';
import { gatherToOpen } from './one-piece.ts';

/** What is used of the ring. */
export type RxRing = Pick<
  RxQueue,
  'burst' | 'hasChains' | 'networkHeader' | 'broken' | 'counters' | 'enableInterrupts' | 'disableInterrupts'
>;

export interface NicRxQueueOptions extends NicQueueOptions {
  /** Without it the queue can only be polled. */
  readonly sleeper?: Sleeper;
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
  #waits = 0;
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
    if (this.#ring.hasChains) gatherToOpen(this.#pool, candidates, offered);
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
  wait(timeout: number = Number.POSITIVE_INFINITY): Promise<boolean> {
    const sleeper = this.#sleeper;
    if (sleeper === null) return Promise.reject(new VirtioError('NO_INTERRUPTS', 'this queue can only be polled'));
    const afterTurn = ++this.#waits % LOOKS_PER_TURN === 0;
    return waitForPackets(this.#ring, this.index, sleeper, this.policy, timeout, this.#onBroken, afterTurn);
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
