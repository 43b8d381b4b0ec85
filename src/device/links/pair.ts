/**
 * `pair`: two functions of one process, wired together; and `loopback`: one function whose frames come back to it.
 *
 * A frame is not copied. While the receiver's backlog is full, the sender is held back; when it has not moved for 20
 * ms, its driver has stopped, and frames are dropped as on a cable.
 */
import type { PacketPool } from '../../packet/pool.ts';
import type { FrameSource } from '../frame-source.ts';
import { Unfinished } from '../unfinished.ts';
import { ANY_ROOM, type FrameSink, type Link, type LinkCounters } from './link.ts';

/** Milliseconds for which a sender waits for a receiver that does not move. */
const STUCK_AFTER = 20;

class DirectLink implements Link {
  readonly counters: LinkCounters = { sent: 0, received: 0, dropped: 0 };
  readonly up = true;
  readonly isOutside = false;
  readonly blocked = false;
  readonly #pool: PacketPool;
  #sink: FrameSink | null = null;
  /** The end whose function gets what is sent here. */
  #peer: DirectLink | null = null;
  /** When the receiver was first found full; 0 while it is not. */
  #fullSince = 0;

  constructor(pool: PacketPool) {
    this.#pool = pool;
  }

  connect(peer: DirectLink): void {
    this.#peer = peer;
  }

  attach(sink: FrameSink): void {
    this.#sink = sink;
  }

  get taken(): number {
    // hot:
    const sink = this.#peer === null ? null : this.#peer.#sink;
    return sink === null ? Unfinished.nothing : sink.taken;
  }

  sendDirect(packet: number, source: FrameSource): boolean {
    // hot:
    const peer = this.#peer;
    if (peer === null || peer.#sink === null || !peer.#sink.receiveDirect(packet, source)) return false;
    this.counters.sent++;
    peer.counters.received++;
    return true;
  }

  send(packets: Uint32Array, n: number): void {
    // hot:
    const peer = this.#peer;
    if (peer === null || peer.#sink === null) {
      this.counters.dropped += n;
      this.#pool.free(packets, n);
      return;
    }
    this.counters.sent += n;
    peer.counters.received += n;
    peer.#sink.deliver(packets, n);
  }

  room(): number {
    // hot:
    const sink = this.#peer === null ? null : this.#peer.#sink;
    if (sink === null) return ANY_ROOM;
    const room = sink.room();
    if (room > 0) {
      this.#fullSince = 0;
      return room;
    }
    const now = performance.now();
    if (this.#fullSince === 0) this.#fullSince = now;
    return now - this.#fullSince > STUCK_AFTER ? ANY_ROOM : 0;
  }

  poll(): number {
    return 0;
  }

  idle(): boolean {
    return false;
  }

  close(): void {
    this.#peer = null;
    this.#sink = null;
  }
}

/** The two ends of a wire. */
export function pairLink(pool: PacketPool): [Link, Link] {
  const a = new DirectLink(pool);
  const b = new DirectLink(pool);
  a.connect(b);
  b.connect(a);
  return [a, b];
}

/** A wire that leads back. */
export function loopbackLink(pool: PacketPool): Link {
  const link = new DirectLink(pool);
  link.connect(link);
  return link;
}
