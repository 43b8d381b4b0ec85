/**
 * The device side of a control virtqueue (Virtio 1.4, 5.1.9.5), inside the front-end: vhost-user has no message that carries
 * control commands, so the front-end executes them itself. The one that makes sense here is VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
 * every other command is answered with VIRTIO_NET_ERR.
 *
 * Driver and device are the same process, and `notify` serves all that is available before it returns. The ring may be split (2.7)
 * or packed (2.8); indirect descriptors are left out, because a control queue is made without.
 */
import { VirtioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';
import type { QueueNotifier, QueueSetup } from './transport.ts';

/** Finds memory by IOVA. */
export type MemoryLookup = (iova: number, count: number) => { memory: DmaMemory; offset: number } | null;

/** `class` and `command` (5.1.9.5.6), and the bytes of that command: class, command, le16 pairs. */
const Mq = { class: 4, pairsSet: 0, length: 4 } as const;
/** `ack` (5.1.9.5). */
const Ack = { OK: 0, ERR: 1 } as const;

const DESCRIPTOR_BYTES = 16;
const DescriptorFlag = { NEXT: 1, WRITE: 2, INDIRECT: 4, AVAIL: 0x80, USED: 0x8000 } as const;

interface Piece {
  readonly bytes: Uint8Array;
  readonly writable: boolean;
}

export interface ControlOptions {
  readonly find: MemoryLookup;
  /** EVENT_IDX was negotiated. */
  readonly eventIdx: boolean;
  readonly packed: boolean;
  /** Takes `pairs` queue pairs into use; false when there are not so many. */
  readonly setQueuePairs: (pairs: number) => boolean;
  /** Called when a command has been answered. */
  readonly interrupt: () => void;
}

export class ControlDevice implements QueueNotifier {
  readonly #options: ControlOptions;
  readonly #size: number;
  readonly #descriptors: Uint32Array;
  readonly #descriptorFlags: Uint16Array;
  /** Split rings only. */
  readonly #avail: Uint16Array;
  readonly #used: Uint16Array;
  readonly #usedElements: Uint32Array;
  /** Position of the next buffer; packed: with the wrap counter that it will have. */
  #next = 0;
  #wrap = true;

  /** Throws VirtioError `QUEUE_ADDRESS` when the ring is not in memory that was allocated for the device. */
  constructor(setup: QueueSetup, options: ControlOptions) {
    this.#options = options;
    this.#size = setup.size;
    const { memory, offset } = this.#at(setup.descriptorArea, setup.size * DESCRIPTOR_BYTES);
    this.#descriptors = memory.u32.subarray(offset / 4, offset / 4 + setup.size * 4);
    this.#descriptorFlags = memory.u16.subarray(offset / 2, offset / 2 + setup.size * 8);
    const driver = this.#at(setup.driverArea, options.packed ? 4 : 6 + 2 * setup.size);
    const device = this.#at(setup.deviceArea, options.packed ? 4 : 6 + 8 * setup.size);
    this.#avail = driver.memory.u16.subarray(driver.offset / 2);
    this.#used = device.memory.u16.subarray(device.offset / 2);
    this.#usedElements = device.memory.u32.subarray(device.offset / 4 + 1);
  }

  /** Executes every command that is available. */
  notify(): void {
    if (this.#options.packed) while (this.#servePacked());
    else while (this.#serveSplit());
  }

  #serveSplit(): boolean {
    const { eventIdx, interrupt } = this.#options;
    const mask = this.#size - 1;
    const avail = this.#avail;
    // struct virtq_avail: flags, idx, ring; struct virtq_used: flags, idx, elements of id and length.
    if (Atomics.load(avail, 1) === (this.#next & 0xffff)) return false;
    const head = avail[2 + (this.#next & mask)];
    const pieces: Piece[] = [];
    for (let id = head, last = false; !last; ) {
      const flags = this.#descriptorFlags[id * 8 + 6];
      pieces.push(this.#piece(id, flags));
      last = (flags & DescriptorFlag.NEXT) === 0 || pieces.length === this.#size;
      id = this.#descriptorFlags[id * 8 + 7] & mask;
    }
    const written = this.#execute(pieces);
    const at = 2 * (this.#next & mask);
    this.#usedElements[at] = head;
    this.#usedElements[at + 1] = written;
    this.#next = (this.#next + 1) & 0xffff;
    // 2.7.10.1: avail_event stands behind the elements; the driver notifies at the next buffer then.
    if (eventIdx) Atomics.store(this.#used, 2 + 4 * this.#size, this.#next);
    Atomics.store(this.#used, 1, this.#next);
    interrupt();
    return true;
  }

  #servePacked(): boolean {
    const first = this.#next;
    const wrap = this.#wrap;
    const flagsAt = first * 8 + 7;
    const available = Atomics.load(this.#descriptorFlags, flagsAt);
    // 2.8.1: available when AVAIL is the wrap counter and USED is not.
    if (((available & DescriptorFlag.AVAIL) !== 0) !== wrap || ((available & DescriptorFlag.USED) !== 0) === wrap) {
      return false;
    }
    const pieces: Piece[] = [];
    let id = 0;
    for (let last = false; !last; ) {
      const flags = this.#descriptorFlags[this.#next * 8 + 7];
      // The buffer id is that of the last descriptor.
      id = this.#descriptorFlags[this.#next * 8 + 6];
      pieces.push(this.#piece(this.#next, flags));
      last = (flags & DescriptorFlag.NEXT) === 0 || pieces.length === this.#size;
      this.#next++;
      if (this.#next === this.#size) {
        this.#next = 0;
        this.#wrap = !this.#wrap;
      }
    }
    this.#descriptors[first * 4 + 2] = this.#execute(pieces);
    this.#descriptorFlags[first * 8 + 6] = id;
    const used = wrap ? DescriptorFlag.AVAIL | DescriptorFlag.USED : 0;
    Atomics.store(this.#descriptorFlags, flagsAt, used | DescriptorFlag.WRITE);
    this.#options.interrupt();
    return true;
  }

  /** Executes one command and returns how many bytes were written. */
  #execute(pieces: readonly Piece[]): number {
    const command = Buffer.concat(pieces.filter(({ writable }) => !writable).map(({ bytes }) => bytes));
    const answer = pieces.find(({ writable, bytes }) => writable && bytes.length > 0);
    let ack: number = Ack.ERR;
    if (command.length === Mq.length && command[0] === Mq.class && command[1] === Mq.pairsSet) {
      if (this.#options.setQueuePairs(command[2] | (command[3] << 8))) ack = Ack.OK;
    }
    if (answer === undefined) return 0;
    answer.bytes[0] = ack;
    return 1;
  }

  /** The buffer of a descriptor: address at word 0, length at word 2. */
  #piece(index: number, flags: number): Piece {
    if ((flags & DescriptorFlag.INDIRECT) !== 0) {
      throw new VirtioError('QUEUE_ADDRESS', 'an indirect descriptor in the control queue');
    }
    const w = index * 4;
    const length = this.#descriptors[w + 2];
    const { memory, offset } = this.#at(this.#descriptors[w + 1] * 2 ** 32 + this.#descriptors[w], length);
    return { bytes: memory.u8.subarray(offset, offset + length), writable: (flags & DescriptorFlag.WRITE) !== 0 };
  }

  #at(iova: number, count: number): { memory: DmaMemory; offset: number } {
    const found = this.#options.find(iova, count);
    if (found === null) throw new VirtioError('QUEUE_ADDRESS', 'the control queue is outside of the device memory');
    return found;
  }
}
