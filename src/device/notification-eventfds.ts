/**
 * Notification registers as eventfds ("VFIO_USER_DEVICE_GET_REGION_IO_FDS"): a driver that has one tells the device of new buffers by
 * a system call of its own, from any thread and without a message. What it would have written is not told, and not needed: each queue has a
 * register of its own (4.1.4.4).
 *
 * With fewer descriptors than queues several queues share one, and all of them are looked at when it is signalled.
 */
import { EventFd } from '../sys/eventfd.ts';
import { ffi, type Watch } from '../sys/ffi/ffi.ts';
import { type IoFdArea, IoFdType } from '../vfio/protocol.ts';
import type { VirtioFunction } from './function.ts';
import { VirtioBar } from './personalities/standard.ts';

interface Doorbell {
  readonly eventfd: EventFd;
  readonly watch: Watch;
}

export class NotificationEventFds {
  readonly #fn: VirtioFunction;
  readonly #doorbells: Doorbell[] = [];
  #closed = false;

  constructor(fn: VirtioFunction) {
    this.#fn = fn;
  }

  /** The areas of region `index`, and the descriptors that they index: at most `max`, and as many each time. */
  describe(index: number, max: number): { areas: IoFdArea[]; descriptors: number[] } {
    const { queueCount, hasStandardRegisters } = this.#fn;
    // Where a notification carries data (2.9), an eventfd is none.
    if (!hasStandardRegisters || index !== VirtioBar.index || max < 1 || this.#closed)
      return { areas: [], descriptors: [] };
    if (this.#doorbells.length === 0) {
      const count = Math.min(queueCount, max);
      for (let i = 0; i < count; i++) this.#doorbells.push(this.#open(i, count));
    }
    const areas = Array.from({ length: queueCount }, (_, queue) => ({
      offset: VirtioBar.notify + queue * VirtioBar.notifyMultiplier,
      size: 0,
      descriptor: queue % this.#doorbells.length,
      type: IoFdType.ioeventfd,
      flags: 0,
    }));
    return { areas, descriptors: this.#doorbells.map(({ eventfd }) => eventfd.fd) };
  }

  /** Idempotent. */
  close(): void {
    this.#closed = true;
    for (const { eventfd, watch } of this.#doorbells.splice(0)) {
      watch.close();
      eventfd.close();
    }
  }

  /** The descriptor of queue `first` and every `step`-th after it. */
  #open(first: number, step: number): Doorbell {
    const eventfd = EventFd.create();
    const rung = () => {
      if (eventfd.drain() === 0) return;
      for (let queue = first; queue < this.#fn.queueCount; queue += step) this.#fn.kick(queue);
    };
    return { eventfd, watch: ffi().watch(eventfd.fd, rung) };
  }
}
