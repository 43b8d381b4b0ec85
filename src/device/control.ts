/**
 * The control virtqueue of a network device (Virtio 1.4, 5.1.9.5): the number of queue pairs in use.
 *
 * Left out: all other classes, whose features are not offered; they are answered with VIRTIO_NET_ERR.
 */
import type { Arena } from './arena.ts';
import { type DeviceQueue, NO_BUFFER } from './queues.ts';

/** `struct virtio_net_ctrl` (5.1.9.5). */
const ControlField = { class: 0, command: 1, data: 2 } as const;
const Ack = { OK: 0, ERR: 1, size: 1 } as const;
/** Class and command of automatic receive steering (5.1.9.5.6). */
const Mq = { class: 4, pairsSet: 0 } as const;

/** Bytes of a command that are read. */
const COMMAND_MAX = 64;
const COMMANDS_PER_POLL = 16;

export class ControlProcessor {
  readonly #arena: Arena;
  readonly #setPairs: (pairs: number) => boolean;
  readonly #scratch: number;

  /** `setPairs` uses that many queue pairs from now on; false when it cannot. */
  constructor(arena: Arena, setPairs: (pairs: number) => boolean) {
    this.#arena = arena;
    this.#setPairs = setPairs;
    this.#scratch = arena.allocate(COMMAND_MAX);
  }

  close(): void {
    this.#arena.release(this.#scratch, COMMAND_MAX);
  }

  /** Works on what the queue holds; returns how many commands that was. The caller publishes. */
  poll(queue: DeviceQueue): number {
    let done = 0;
    while (done < COMMANDS_PER_POLL) {
      const id = queue.take();
      if (id === NO_BUFFER) break;
      done++;
      const read = queue.gather(0, COMMAND_MAX, this.#scratch);
      if (read < 0) break;
      const command = this.#arena.u8.slice(this.#scratch, this.#scratch + read);
      this.#arena.u8[this.#scratch] = this.#execute(command) ? Ack.OK : Ack.ERR;
      const written = queue.scatter(0, Ack.size, this.#scratch);
      if (written < 0) break;
      queue.complete(id, written);
    }
    return done;
  }

  #execute(command: Uint8Array): boolean {
    if (command.length < ControlField.data + 2) return false;
    if (command[ControlField.class] !== Mq.class || command[ControlField.command] !== Mq.pairsSet) return false;
    return this.#setPairs(command[ControlField.data] | (command[ControlField.data + 1] << 8));
  }
}
