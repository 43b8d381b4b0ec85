/**
 * One end of the demo: an open NIC, the frames it is to send and the frames it is to receive.
 *
 * The path keeps the order of frames, so the n-th frame that arrives must be the n-th that was sent, byte for byte, and under
 * the SA that it was sent under. Anything else that arrives is counted as unexpected.
 */
import {
  Ethernet,
  type Nic,
  OutboundPolicy,
  type SaHandle,
  type SecurityAssociation,
  type Selector,
  Verdict,
} from '../../src/index.ts';

/** Packets in one burst. */
const BURST = 32;

/** What a frame is protected by: the SPI, or 0 for nothing. */
export type Protection = number;

/** A frame on its way: what must arrive. */
interface Expected {
  readonly frame: Uint8Array;
  readonly protection: Protection;
}

export interface StationCounters {
  sent: number;
  sentBytes: number;
  sentProtected: number;
  received: number;
  receivedBytes: number;
  /** Arrived under an SA and as sent. */
  verified: number;
  /** Arrived in the clear and was to. */
  clear: number;
  /** Arrived, but not what was next, or not as it was sent. */
  unexpected: number;
}

export interface OwnedSa {
  readonly handle: SaHandle;
  readonly sa: SecurityAssociation;
}

export class Station {
  readonly nic: Nic;
  readonly outbound: readonly OwnedSa[];
  readonly inbound: readonly OwnedSa[];
  readonly counters: StationCounters = {
    sent: 0,
    sentBytes: 0,
    sentProtected: 0,
    received: 0,
    receivedBytes: 0,
    verified: 0,
    clear: 0,
    unexpected: 0,
  };
  /** Where what this station sends must arrive. */
  peer: Station | null = null;
  readonly #policy: OutboundPolicy;
  readonly #spiOf = new Map<number, number>();
  readonly #expected: Expected[] = [];
  #expectedAt = 0;
  readonly #packets = new Uint32Array(BURST);
  readonly #verdicts = new Uint8Array(BURST);
  readonly #arrived = new Uint32Array(BURST);

  constructor(nic: Nic, outbound: readonly OwnedSa[], inbound: readonly OwnedSa[]) {
    this.nic = nic;
    this.outbound = outbound;
    this.inbound = inbound;
    const entries = outbound.map(({ handle, sa }): { selector: Selector; handle: number } => ({
      selector: sa.selector,
      handle: handle.handle,
    }));
    this.#policy = new OutboundPolicy(entries);
    for (const { handle } of [...outbound, ...inbound]) this.#spiOf.set(handle.handle, handle.spi);
  }

  /** Frames that are on their way to this station. */
  get awaited(): number {
    return this.#expected.length - this.#expectedAt;
  }

  /** Announces a frame that will arrive; `lost` ones are never announced. */
  expect(frame: Uint8Array, protection: Protection): void {
    // What has arrived is forgotten now and then.
    if (this.#expectedAt > 4096) {
      this.#expected.splice(0, this.#expectedAt);
      this.#expectedAt = 0;
    }
    this.#expected.push({ frame, protection });
  }

  /**
   * Sends up to a burst of `frames[from…]`; returns how many went. `lost` frames are not expected at the peer.
   */
  send(frames: readonly Uint8Array[], from: number, lost = false): number {
    const { tx } = this.nic.queues[0];
    const pool = this.nic.packets;
    const n = pool.allocate(this.#packets, Math.min(BURST, frames.length - from));
    for (let i = 0; i < n; i++) pool.write(this.#packets[i], frames[from + i]);
    this.#policy.classify(pool, this.#packets, n, Ethernet.length, this.#verdicts);
    // A frame that the policy cannot judge must not leave; the captures hold none.
    const bad = this.#verdicts
      .subarray(0, n)
      .findIndex((verdict) => verdict !== Verdict.ok && verdict !== Verdict.notIpsec);
    if (bad >= 0) throw new Error(`frame ${from + bad} cannot be judged by the policy`);
    const handles = Array.from(this.#packets.subarray(0, n), (p) => pool.sa[p]);
    const taken = tx.burst(this.#packets, n);
    for (let i = 0; i < taken; i++) {
      const frame = frames[from + i];
      this.counters.sent++;
      this.counters.sentBytes += frame.length;
      if (handles[i] !== 0) this.counters.sentProtected++;
      if (!lost) this.peer?.expect(frame, this.#spiOf.get(handles[i]) ?? 0);
    }
    if (taken < n) pool.free(this.#packets.subarray(taken, n), n - taken);
    return taken;
  }

  /** Takes what has arrived and compares it; returns how many frames that were. */
  receive(): number {
    const { rx, tx } = this.nic.queues[0];
    const pool = this.nic.packets;
    const n = rx.burst(this.#arrived, BURST);
    for (let i = 0; i < n; i++) this.#check(this.#arrived[i]);
    if (n > 0) pool.free(this.#arrived, n);
    tx.reclaim();
    return n;
  }

  #check(p: number): void {
    const pool = this.nic.packets;
    const { counters } = this;
    const length = pool.length[p];
    counters.received++;
    counters.receivedBytes += length;
    const next = this.#expected[this.#expectedAt];
    const spi = this.#spiOf.get(pool.sa[p]) ?? 0;
    const at = pool.offset[p];
    if (next === undefined || next.protection !== spi || !same(pool.u8, at, length, next.frame)) {
      counters.unexpected++;
      return;
    }
    this.#expectedAt++;
    if (spi === 0) counters.clear++;
    else counters.verified++;
  }
}

function same(u8: Uint8Array, at: number, length: number, frame: Uint8Array): boolean {
  if (length !== frame.length) return false;
  for (let i = 0; i < length; i++) if (u8[at + i] !== frame[i]) return false;
  return true;
}
