/**
 * The other side of the device under test: what it sends is seen there, and what arrives at it comes from there.
 *
 * Either a second function that is wired to it (`peer`), or the device itself, whose link leads back to it
 * (`loopback`). Frames that checks did not send (a real network has neighbours) are passed over.
 */
import { Ethernet } from '../packet/fields.ts';
import type { NetHeader } from '../virtio-net/header.ts';
import { Failed } from './check.ts';
import type { Driver, Received, TransmitOptions } from './driver.ts';
import { isEqual } from './frames.ts';
import type { Patience } from './time.ts';

export class Network {
  readonly kind: 'loopback' | 'peer';
  readonly #device: Driver;
  readonly #other: Driver;
  readonly #patience: Patience;
  readonly #addresses: readonly Uint8Array[];

  /** `other` is `device` itself when its link is a loopback. `addresses`: of both, 6 bytes each. */
  constructor(device: Driver, other: Driver, patience: Patience, addresses: readonly [Uint8Array, Uint8Array]) {
    this.kind = device === other ? 'loopback' : 'peer';
    this.#device = device;
    this.#other = other;
    this.#patience = patience;
    this.#addresses = addresses;
  }

  /** Addresses of a frame to the device under test. */
  get inward(): { destination: Uint8Array; source: Uint8Array } {
    return { destination: this.#addresses[0], source: this.#addresses[1] };
  }

  /** Addresses of a frame from the device under test. */
  get outward(): { destination: Uint8Array; source: Uint8Array } {
    return { destination: this.#addresses[1], source: this.#addresses[0] };
  }

  /** Sends a frame to the device under test, in the clear. */
  async inject(frame: Uint8Array, options: TransmitOptions = {}): Promise<void> {
    await this.#other.transmit(frame, options);
  }

  /** Has the device under test send a frame. */
  async send(frame: Uint8Array, header: Partial<NetHeader> = {}, options: TransmitOptions = {}): Promise<void> {
    await this.#device.transmit(frame, { ...options, header });
  }

  /** The next frame that the device under test receives; null when none comes. */
  arrived(limit?: number, queue = 0): Promise<Received | null> {
    return this.#next(this.#device, limit, queue);
  }

  /** The next frame that the device under test sent; null when none comes. */
  async sent(limit?: number): Promise<Uint8Array | null> {
    const received = await this.#next(this.#other, limit, 0);
    return received === null ? null : received.frame;
  }

  /** A frame that the device under test receives though none should come; null when none does. */
  arrivedAfterAll(queue = 0): Promise<Received | null> {
    return this.#afterAll(this.#device, queue);
  }

  /** A frame that the device under test sent though it should send none; null when it did not. */
  async sentAfterAll(): Promise<Uint8Array | null> {
    const received = await this.#afterAll(this.#other, 0);
    return received === null ? null : received.frame;
  }

  /** Answers of the device show that it has had its turn, however slow its machine is. */
  async #afterAll(driver: Driver, queue: number): Promise<Received | null> {
    for (;;) {
      const quiet = await this.#patience.quietly(
        () => driver.ring(queue).pending > 0,
        () => driver.target.status,
      );
      const received = quiet ? null : await driver.receive(undefined, queue);
      if (received === null || this.#isOurs(received.frame)) return received;
    }
  }

  async #next(driver: Driver, limit: number | undefined, queue: number): Promise<Received | null> {
    const start = performance.now();
    const patience = limit ?? this.#patience.timeout;
    for (;;) {
      const left = patience - (performance.now() - start);
      const received = left < 0 ? null : await driver.receive(left, queue);
      if (received === null || this.#isOurs(received.frame)) return received;
    }
  }

  #isOurs(frame: Uint8Array): boolean {
    const at = (offset: number) => frame.subarray(offset, offset + 6);
    const known = (address: Uint8Array) => this.#addresses.some((one) => isEqual(one, address));
    return known(at(Ethernet.destination)) && known(at(Ethernet.source));
  }

  /** The frame that arrives at the device under test next. Throws `Failed` when none does. */
  async arrival(what: string, queue = 0): Promise<Received> {
    const received = await this.arrived(undefined, queue);
    if (received === null) throw new Failed(`${what} did not arrive`);
    return received;
  }

  /** The frame that the device under test sends next. Throws `Failed` when it sends none. */
  async departure(what: string): Promise<Uint8Array> {
    const frame = await this.sent();
    if (frame === null) throw new Failed(`${what} was not sent`);
    return frame;
  }
}
