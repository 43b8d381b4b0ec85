/**
 * The rings of a vhost-user port: what the back-end is told of each (QEMU's docs/interop/vhost-user.rst, "Ring states").
 *
 * A ring is stopped until its kick descriptor is set, and again from GET_VRING_BASE on. With protocol features it begins disabled, and is
 * enabled when its queue pair is in use; without, it cannot be disabled.
 */
import { VfioError, VirtioError } from '../errors.ts';
import { EventFd } from '../sys/eventfd.ts';
import { ffi, type Watch } from '../sys/ffi/ffi.ts';
import { FcntlCommand, fcntl } from '../sys/libc.ts';
import { readU32 } from '../sys/little-endian.ts';
import { NO_VECTOR } from './pci-layout.ts';
import type { Doorbell, QueueNotifier, QueueSetup } from './transport.ts';
import {
  encodeRingAddresses,
  encodeRingEvent,
  encodeRingState,
  Payload,
  protocolError,
  Request,
} from './vhost-user-protocol.ts';
import type { VhostUserSession } from './vhost-user-session.ts';

/** Avail and used index 0, both wrap counters 1: where a packed ring begins. A split one begins at 0. */
const PACKED_BASE = 0x8000_8000;

/** A queue that the driver has described. */
interface Ring {
  readonly index: number;
  readonly setup: QueueSetup;
  readonly kick: EventFd;
  /** The back-end has been told of it. */
  started: boolean;
}

export class VhostUserRings {
  readonly #session: VhostUserSession;
  /** Whether rings can be disabled. */
  readonly #switched: boolean;
  readonly #rings = new Map<number, Ring>();
  readonly #error: EventFd;
  readonly #errorWatch: Watch;
  #enabledPairs = 0;
  #packed = false;
  #eventfds: readonly number[] = [];

  constructor(session: VhostUserSession, switched: boolean) {
    this.#session = session;
    this.#switched = switched;
    this.#error = EventFd.create();
    this.#errorWatch = ffi().watch(this.#error.fd, () => this.#failed());
    this.#errorWatch.unref();
  }

  has(index: number): boolean {
    return this.#rings.has(index);
  }

  /** A queue that is to start with the device, or with `start`. Throws VirtioError `QUEUE_ENABLE` when it is there already. */
  add(index: number, setup: QueueSetup): QueueNotifier {
    if (this.#rings.has(index)) throw new VirtioError('QUEUE_ENABLE', `queue ${index} is enabled already`);
    const kick = EventFd.create();
    this.#rings.set(index, { index, setup, kick, started: false });
    return new KickNotifier(kick);
  }

  /** Starts every ring that has not started, the first pair enabled (5.1.5). */
  startAll(packed: boolean): void {
    this.#packed = packed;
    this.#enabledPairs = 1;
    this.start();
  }

  /** Starts what was added meanwhile. */
  start(): void {
    for (const ring of this.#rings.values()) if (!ring.started) this.#start(ring);
    this.#session.settle();
  }

  /** Enables the first `pairs` queue pairs and disables the others; false when some of them were not added. */
  enablePairs(pairs: number): boolean {
    for (let index = 0; index < 2 * pairs; index++) if (!this.#rings.has(index)) return false;
    this.#enabledPairs = pairs;
    for (const ring of this.#rings.values()) this.#tellEnabled(ring);
    this.#session.settle();
    return true;
  }

  /** Stops a ring and forgets it. */
  remove(index: number): void {
    const ring = this.#rings.get(index);
    if (ring === undefined) return;
    if (ring.started) this.#stop(ring);
    ring.kick.close();
    this.#rings.delete(index);
  }

  removeAll(): void {
    for (const index of [...this.#rings.keys()]) this.remove(index);
    this.#enabledPairs = 0;
  }

  /** Vector i is eventfd i. Rings that run are told of theirs at once. */
  setInterrupts(eventfds: readonly number[]): void {
    this.#eventfds = [...eventfds];
    for (const ring of this.#rings.values()) if (ring.started) this.#tellCall(ring);
  }

  /** Signals a vector in place of the back-end. */
  interrupt(vector: number): void {
    if (vector === NO_VECTOR || vector >= this.#eventfds.length) return;
    // Not ours to close, only to signal.
    EventFd.adopt(this.#eventfds[vector]).signal();
  }

  /** Closes descriptors without telling the back-end, which has been told or is gone. */
  close(): void {
    for (const { kick } of this.#rings.values()) kick.close();
    this.#rings.clear();
    this.#errorWatch.close();
    this.#error.close();
  }

  #start(ring: Ring): void {
    const session = this.#session;
    const { index, setup } = ring;
    ring.started = true;
    session.tell(encodeRingState(Request.SET_VRING_NUM, index, setup.size));
    session.tell(encodeRingState(Request.SET_VRING_BASE, index, this.#packed ? PACKED_BASE : 0));
    session.tell(encodeRingAddresses(index, setup));
    session.tell(encodeRingEvent(Request.SET_VRING_ERR, index, true), [this.#error.fd]);
    this.#tellCall(ring);
    session.tell(encodeRingEvent(Request.SET_VRING_KICK, index, true), [ring.kick.fd]);
    this.#tellEnabled(ring);
  }

  #stop(ring: Ring): void {
    const check = (payload: Uint8Array): void => {
      const index = readU32(payload, 0);
      if (index !== ring.index) throw protocolError(`GET_VRING_BASE of ring ${ring.index} answers for ${index}`);
    };
    this.#session.askFor(encodeRingState(Request.GET_VRING_BASE, ring.index, 0), check, Payload.ringState);
    ring.started = false;
  }

  /** Where the back-end signals used buffers. One that must not interrupt is told so in the ring, too. */
  #tellCall({ index, setup: { vector } }: Ring): void {
    const fd = vector === NO_VECTOR ? undefined : this.#eventfds[vector];
    const message = encodeRingEvent(Request.SET_VRING_CALL, index, fd !== undefined);
    this.#session.tell(message, fd === undefined ? [] : [fd]);
  }

  #tellEnabled({ index, started }: Ring): void {
    if (!started || !this.#switched) return;
    const enabled = index < 2 * this.#enabledPairs ? 1 : 0;
    this.#session.tell(encodeRingState(Request.SET_VRING_ENABLE, index, enabled));
  }

  /** The back-end signalled that a ring is in error; which one it does not say. */
  #failed(): void {
    if (this.#error.drain() === 0) return;
    this.#session.fail(new VfioError('DEVICE_GONE', 'the back-end reported an error in a ring'));
  }
}

/** Tells the back-end of new buffers; once the ring is gone it does nothing. */
class KickNotifier implements QueueNotifier {
  readonly #kick: EventFd;

  constructor(kick: EventFd) {
    this.#kick = kick;
  }

  notify(): void {
    // hot:
    this.#kick.signal();
  }

  share(): Doorbell {
    const fd = fcntl(this.#kick.fd, FcntlCommand.duplicate, 0);
    return { register: { kind: 'eventfd', fd }, id: 0, withPosition: false };
  }
}
