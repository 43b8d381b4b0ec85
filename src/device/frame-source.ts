/**
 * A large frame that is still in the buffer of the driver that sends it, for somebody who copies it from there in pieces, one after the other.
 * Its headers were copied before, and checked; what is read here is payload, which means nothing to the device.
 */
import type { GuestMemory } from './guest-memory.ts';
import type { DeviceQueue } from './queues.ts';

export class FrameSource {
  readonly queue: DeviceQueue;
  readonly #memory: GuestMemory;
  /** Bytes of header in front of the frame. */
  readonly #skip: number;
  /** Bytes of the frame that are in its packet, too: all of its headers. */
  head = 0;
  /** The descriptor that was copied from last, and the bytes of the buffer in front of it. */
  #piece = 0;
  #before = 0;

  /** Of frames in `queue`, in buffers of `memory`. */
  constructor(queue: DeviceQueue, memory: GuestMemory, skip: number) {
    this.queue = queue;
    this.#memory = memory;
    this.#skip = skip;
  }

  /** hot: the buffer that was taken last is the next frame. */
  begin(head: number): void {
    this.head = head;
    this.#piece = 0;
    this.#before = 0;
  }

  /** hot: copies `bytes` from byte `from` of the frame to offset `to` of the arena; false when they are not all there. */
  copy(from: number, bytes: number, to: number): boolean {
    const { queue } = this;
    const memory = this.#memory;
    const { u8 } = memory.arena;
    const start = from + this.#skip;
    if (start < this.#before) this.begin(this.head);
    let piece = this.#piece;
    let before = this.#before;
    let done = 0;
    while (done < bytes) {
      if (piece >= queue.readable) return false;
      const over = start + done - before;
      const length = queue.length[piece];
      if (over >= length) {
        before += length;
        piece++;
        continue;
      }
      const low = queue.low[piece] + over;
      const carry = low >= 0x100000000 ? 1 : 0;
      const at = memory.translate(low - carry * 0x100000000, queue.high[piece] + carry, false);
      if (at < 0) return false;
      const n = Math.min(length - over, bytes - done, memory.run);
      u8.copyWithin(to + done, at, at + n);
      done += n;
    }
    this.#piece = piece;
    this.#before = before;
    return true;
  }
}
