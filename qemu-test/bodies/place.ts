/**
 * Where a body runs: in a guest, on a function behind the kernel's VFIO, or on the host, on a device process behind a socket. A body is
 * given a place and knows nothing else of the difference; what it does is what an application does.
 */
import type { WireAnswer, WireRequest } from './wire.ts';

export interface Place {
  /** The device as `openNic` takes it. */
  readonly address: string;
  /** Makes check `name`, which passes when `body` does not throw; what it returns is shown. Returns whether it passed. */
  check(name: string, body: () => unknown): Promise<boolean>;
  /** Has the other end of the wire do something. Rejects when it could not, or saw what it should not. */
  wire(request: WireRequest): Promise<WireAnswer>;
  /** How often receive queue `pair` of the open NIC has interrupted, where somebody counts it who is not the driver. */
  interrupts?(pair: number): number;
}
