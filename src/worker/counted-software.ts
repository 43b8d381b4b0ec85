/**
 * Software IPsec of a worker thread, counted where the control thread can see it: packets and bytes of each SA are added up burst by burst,
 * what was dropped is copied now and then, because a dropped packet does not say which SA it was dropped on.
 */
import type { SoftwareProgress } from '../fallback/sa-progress.ts';
import { SoftwareIpsec, type SoftwareIpsecOptions } from '../fallback/software.ts';
import { VERDICTS, Verdict, verdictNames } from '../fallback/verdict.ts';
import type { SecurityAssociation } from '../ipsec/sa.ts';
import type { SaState } from '../ipsec/sa-state.ts';
import type { PacketPool } from '../packet/pool.ts';

/** Longest burst of a queue. */
const MAX_BURST = 256;
/** Milliseconds between two looks at what was dropped. */
const PUBLISH_MS = 50;

export class CountedSoftware {
  /** Something was dropped since `publish`. */
  stale = false;
  readonly #inner: SoftwareIpsec;
  readonly #pool: PacketPool;
  readonly #state: SaState;
  readonly #inbound = new Set<number>();
  readonly #lengths = new Uint32Array(MAX_BURST);
  #published = 0;

  constructor(pool: PacketPool, state: SaState, options: SoftwareIpsecOptions) {
    this.#inner = new SoftwareIpsec(pool, options);
    this.#pool = pool;
    this.#state = state;
  }

  add(handle: number, sa: SecurityAssociation, mtu: number, progress: SoftwareProgress | null = null): void {
    this.#inner.add(handle, sa, progress);
    if (sa.direction === 'outbound') this.#inner.setMtu(handle, mtu);
    else this.#inbound.add(handle);
  }

  modify(handle: number, sa: SecurityAssociation): void {
    this.#inner.modify(handle, sa);
  }

  /** The SA's next sequence number, or the highest that was accepted. */
  sequence(handle: number): bigint {
    return this.#inner.counters(handle).sequence;
  }

  remove(handle: number): void {
    if (this.#inbound.has(handle)) this.#publishOne(handle);
    this.#inbound.delete(handle);
    this.#inner.remove(handle);
  }

  /** As `SoftwareIpsec.take`. */
  take(handle: number): SoftwareProgress {
    if (this.#inbound.has(handle)) this.#publishOne(handle);
    this.#inbound.delete(handle);
    return this.#inner.take(handle);
  }

  close(): void {
    this.#inner.close();
  }

  protect(packets: Uint32Array, n: number, linkHeader: number, verdicts: Uint8Array): void {
    // hot:
    const { length, sa } = this.#pool;
    const lengths = this.#lengths;
    for (let i = 0; i < n; i++) lengths[i] = length[packets[i]];
    this.#inner.protect(packets, n, linkHeader, verdicts);
    this.#count(packets, n, linkHeader, verdicts, sa, lengths);
  }

  unprotect(packets: Uint32Array, n: number, linkHeader: number, verdicts: Uint8Array): void {
    // hot:
    const { length, sa } = this.#pool;
    const lengths = this.#lengths;
    this.#inner.unprotect(packets, n, linkHeader, verdicts);
    for (let i = 0; i < n; i++) {
      lengths[i] = length[packets[i]];
      if (verdicts[i] > Verdict.notIpsec) this.stale = true;
    }
    this.#count(packets, n, linkHeader, verdicts, sa, lengths);
  }

  /** hot: packets of one SA come in runs. */
  #count(
    packets: Uint32Array,
    n: number,
    linkHeader: number,
    verdicts: Uint8Array,
    sa: Uint32Array,
    lengths: Uint32Array,
  ): void {
    const state = this.#state;
    let current = 0;
    let run = 0;
    let bytes = 0;
    for (let i = 0; i < n; i++) {
      const verdict = verdicts[i];
      const handle = sa[packets[i]];
      if (handle === 0 || verdict === Verdict.notIpsec) continue;
      if (verdict !== Verdict.ok) {
        if (!this.#inbound.has(handle)) state.drop(handle, verdict);
        continue;
      }
      if (handle !== current) {
        if (run !== 0) state.count(current, run, bytes);
        current = handle;
        run = 0;
        bytes = 0;
      }
      run++;
      bytes += lengths[i] - linkHeader;
    }
    if (run !== 0) state.count(current, run, bytes);
  }

  /** Shows what was dropped on inbound SAs, unless that was done a moment ago. */
  publish(): void {
    const now = performance.now();
    if (now - this.#published < PUBLISH_MS) return;
    this.#published = now;
    this.stale = false;
    for (const handle of this.#inbound) this.#publishOne(handle);
  }

  #publishOne(handle: number): void {
    const { dropped } = this.#inner.counters(handle);
    for (let verdict = 0; verdict < VERDICTS; verdict++) {
      this.#state.setDropped(handle, verdict, dropped[verdictNames[verdict]] ?? 0);
    }
  }
}
