/** What a scenario can do on the host while its guest runs. */
import { Mailbox } from '../messages.ts';
import type { FramePort } from './frames.ts';

/** No scenario takes longer: what ends the waiting is the end of the guest's half, which the scenario's time bounds. */
const NOTE_TIMEOUT_MS = 3_600_000;

export interface HostParts {
  readonly links: ReadonlyMap<string, FramePort>;
  /** Takes the link of a NIC down, or up again. */
  readonly setLink: (id: string, up: boolean) => Promise<void>;
  readonly unplug: (id: string) => Promise<unknown>;
  readonly send: (topic: string, body: unknown) => void;
  /** Aborted when the guest's half has ended: nothing more will come from it. */
  readonly ended: AbortSignal;
  /** Makes a check, as `Guest.check`. */
  readonly check: (name: string, body: () => unknown) => Promise<boolean>;
}

export class Host {
  readonly #parts: HostParts;
  readonly mailbox = new Mailbox();

  constructor(parts: HostParts) {
    this.#parts = parts;
  }

  /** The host's end of the NIC `id`, whose link is `host`. */
  link(id: string): FramePort {
    const port = this.#parts.links.get(id);
    if (port === undefined) throw new Error(`device ${id} has no link to the host`);
    return port;
  }

  setLink(id: string, up: boolean): Promise<void> {
    return this.#parts.setLink(id, up);
  }

  check(name: string, body: () => unknown): Promise<boolean> {
    return this.#parts.check(name, body);
  }

  tell(topic: string, body: unknown = null): void {
    this.#parts.send(topic, body);
  }

  hear(topic: string, timeoutMs = NOTE_TIMEOUT_MS): Promise<unknown> {
    return this.mailbox.take(topic, timeoutMs, this.#parts.ended);
  }

  /** Asks the guest to let go of device `id`, which QEMU then takes away. */
  async unplug(id: string): Promise<void> {
    await this.#parts.unplug(id);
  }
}
