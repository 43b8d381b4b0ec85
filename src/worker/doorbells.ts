/**
 * How a worker thread tells the device of new buffers: it writes to the notification register, if it can map it, or to an eventfd that stands
 * for it; else the control thread does so when its event loop comes to it, which busy queues hardly need: the device asks for none.
 */
import { EventFd } from '../sys/eventfd.ts';
import { PAGE_SIZE } from '../sys/libc.ts';
import { type MappedMemory, mapShared, unmapMemory } from '../sys/memory.ts';
import { Registers } from '../sys/registers.ts';
import type { QueueNotifier } from '../virtio/transport.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';
import type { ControlBlock } from './control-block.ts';
import type { WorkerDoorbell } from './handle.ts';

export interface OpenDoorbell {
  readonly notifier: QueueNotifier;
  /** What was mapped for it. */
  readonly memory: MappedMemory | null;
}

/** Opens the doorbell of a ring. Throws SystemError. */
export function openDoorbell(
  doorbell: WorkerDoorbell,
  queue: Virtqueue,
  control: ControlBlock,
  which: 'rx' | 'tx',
): OpenDoorbell {
  if ('relay' in doorbell) {
    const notifier = new Relay(EventFd.adopt(doorbell.relay), queue, control.position(which));
    return { notifier, memory: null };
  }
  const { register, id, withPosition } = doorbell;
  if (register.kind === 'eventfd') return { notifier: new Signal(EventFd.adopt(register.fd)), memory: null };
  const memory = mapShared(register.fd, register.offset, PAGE_SIZE, { write: true });
  try {
    const registers = new Registers(memory);
    const notifier = withPosition
      ? new PositionRegister(registers, register.at, id, queue)
      : new IdRegister(registers, register.at, id);
    return { notifier, memory };
  } catch (error) {
    unmapMemory(memory);
    throw error;
  }
}

/** An eventfd that the device watches. The descriptor is the NIC's. */
class Signal implements QueueNotifier {
  readonly #eventfd: EventFd;

  constructor(eventfd: EventFd) {
    this.#eventfd = eventfd;
  }

  notify(): void {
    // hot:
    this.#eventfd.signal();
  }
}

/** An eventfd that the control thread watches; with NOTIFICATION_DATA it needs to know where the ring stands. */
class Relay implements QueueNotifier {
  readonly #eventfd: EventFd;
  readonly #queue: Virtqueue;
  readonly #position: { next: number };

  constructor(eventfd: EventFd, queue: Virtqueue, position: { next: number }) {
    this.#eventfd = eventfd;
    this.#queue = queue;
    this.#position = position;
  }

  notify(): void {
    // hot:
    this.#position.next = this.#queue.next;
    this.#eventfd.signal();
  }
}

/** The register itself (Virtio 1.4, 4.1.5.2), 16 bits. */
class IdRegister implements QueueNotifier {
  readonly #registers: Registers;
  readonly #at: number;
  readonly #id: number;

  constructor(registers: Registers, at: number, id: number) {
    this.#registers = registers;
    this.#at = at;
    this.#id = id;
  }

  notify(): void {
    // hot:
    this.#registers.write16(this.#at, this.#id);
  }
}

/** The register with NOTIFICATION_DATA (4.1.5.2), 32 bits. */
class PositionRegister implements QueueNotifier {
  readonly #registers: Registers;
  readonly #at: number;
  readonly #id: number;
  readonly #queue: Virtqueue;

  constructor(registers: Registers, at: number, id: number, queue: Virtqueue) {
    this.#registers = registers;
    this.#at = at;
    this.#id = id;
    this.#queue = queue;
  }

  notify(): void {
    // hot:
    this.#registers.write32(this.#at, (this.#id | (this.#queue.next << 16)) >>> 0);
  }
}
