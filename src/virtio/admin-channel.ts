/**
 * How administration commands get to the device and back (Virtio 1.4, 2.13): a virtqueue of slots, several commands in
 * flight, each a promise with a deadline. The commands themselves are in `admin.ts`.
 *
 * A command lives in a *slot*: a piece of DMA memory for the part that the device reads and one for the part it writes.
 * A slot is used again only after the device has returned it, so an answer that comes after the deadline cannot hit
 * another command; until then its command stays as it was, because the device may still be reading it. Both parts
 * are wiped when the slot comes back: they may hold keys.
 *
 * Completion is found by polling while something is pending; an interrupt, if there is one, makes it quicker
 * (`poll()`). Left out: more than one administration queue, the SR-IOV group.
 */
import { AdminCommandError, VfioError, VirtioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';
import { type DeviceFunction, releaseDma } from '../vfio/function.ts';
import { createVirtqueue, virtqueueBytes } from '../virtqueue/create.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';
import {
  AdminCommandField,
  AdminGroup,
  AdminOpcode,
  AdminReplyField,
  AdminStatus,
  adminOpcodeName,
  adminPartLength,
  adminQualifierName,
  adminStatusName,
  decodeAdminReply,
  encodeAdminCommand,
} from './admin-wire.ts';
import { Feature, type FeatureSet } from './features.ts';
import { DeviceStatus, NO_VECTOR } from './pci-layout.ts';
import { ringFormat, ringOptions } from './ring-format.ts';
import type { QueueNotifier, VirtioTransport } from './transport.ts';

export interface AdminChannelOptions {
  /** Commands in flight at most. Default 32. */
  readonly slots?: number;
  /** Bytes of the largest command and of the largest reply, headers included. Default 2048 each. */
  readonly commandBytes?: number;
  readonly replyBytes?: number;
  /** Milliseconds after which a command is given up. Default 5000. */
  readonly timeout?: number;
  /** MSI-X vector of the queue; `poll()` is to be called when it fires. Default none. */
  readonly vector?: number;
}

/** Polling: immediately for the first milliseconds of silence, then with growing pauses. */
const EAGER_MS = 2;
const MAX_PAUSE_MS = 10;
/** How often, while waiting, the device is asked whether it is still there. */
const LIVENESS_MS = 50;
/** Pace at which slots are awaited whose commands were given up. */
const ABANDONED_PAUSE_MS = 200;

/** A command that waits for a slot or for its answer. */
interface Pending {
  readonly opcode: number;
  /** What the command is about, for messages. */
  readonly subject: string;
  /** The device-readable part; wiped when it has been copied to a slot. */
  readonly bytes: Uint8Array;
  /** Bytes of result that the caller expects at most. */
  readonly resultLength: number;
  /** LIST_USE must be alone on the queue (2.12.1). */
  readonly alone: boolean;
  /** When it was given, and, once the device has it, when it is given up. */
  readonly since: number;
  deadline: number;
  resolve(result: Uint8Array): void;
  reject(error: Error): void;
}

export class AdminChannel {
  readonly #transport: VirtioTransport;
  /** The queue, and from byte `#queueBytes` on the slots. */
  readonly #memory: DmaMemory;
  readonly #queueBytes: number;
  readonly #freeMemory: (memory: DmaMemory) => void;
  readonly #queue: Virtqueue;
  readonly #notifier: QueueNotifier;
  readonly #commandBytes: number;
  readonly #replyBytes: number;
  readonly #timeout: number;
  readonly #interrupts: boolean;
  /** By slot: the command in it, null when it was given up, undefined when the slot is free. */
  readonly #slots: (Pending | null | undefined)[];
  readonly #waiting: Pending[] = [];
  #inFlight = 0;
  /** Commands are in the queue that the device wants to be told of, and was not. */
  #unnotified = false;
  #abandoned = 0;
  #timer: NodeJS.Timeout | NodeJS.Immediate | undefined;
  #quietSince = 0;
  #pause = 0;
  #lastLiveness = 0;
  #lastProgress = 0;
  #closed: Error | undefined;
  #released = false;
  readonly #pieces = new Uint32Array(6);
  readonly #takenSlots: Uint32Array;
  readonly #takenLengths: Uint32Array;

  /**
   * Sets up the first administration queue. To be called in step 7 of the initialisation; commands may be given after
   * DRIVER_OK. Throws `VirtioError` ADMIN_QUEUE or QUEUE_SIZE when the device has no usable queue.
   */
  constructor(
    transport: VirtioTransport,
    fn: Pick<DeviceFunction, 'allocateDma' | 'freeDma' | 'gone'>,
    features: FeatureSet,
    options: AdminChannelOptions = {},
  ) {
    this.#transport = transport;
    this.#freeMemory = (memory) => releaseDma(fn, memory);
    this.#commandBytes = adminPartLength(options.commandBytes ?? 2048);
    this.#replyBytes = adminPartLength(options.replyBytes ?? 2048);
    this.#timeout = options.timeout ?? 5000;

    const index = transport.adminQueues().first;
    const max = transport.maxQueueSize(index);
    const indirect = features.has(Feature.INDIRECT_DESC);
    const perCommand = indirect ? 1 : 2;
    // A chain, even in an indirect table, must not be longer than the queue (2.7.5.3.1): at least 2 descriptors.
    const wanted = Math.max(2, 2 ** Math.ceil(Math.log2((options.slots ?? 32) * perCommand)));
    const queueOptions = {
      index,
      size: max === 0 ? 0 : Math.min(max, wanted),
      ...ringOptions(features),
      indirectEntries: indirect ? 2 : 0,
    };
    const format = ringFormat(features);
    const queueBytes = Math.ceil(virtqueueBytes(format, queueOptions) / 64) * 64;
    const slots = Math.min(options.slots ?? 32, Math.floor(queueOptions.size / perCommand));
    if (queueOptions.size < 2)
      throw new VirtioError('QUEUE_SIZE', `queue ${index}: too small for an administration command`);

    this.#memory = fn.allocateDma(queueBytes + slots * (this.#commandBytes + this.#replyBytes));
    this.#queueBytes = queueBytes;
    this.#queue = createVirtqueue(format, this.#memory, queueOptions);
    this.#slots = new Array<Pending | null | undefined>(slots).fill(undefined);
    this.#takenSlots = new Uint32Array(slots);
    this.#takenLengths = new Uint32Array(slots);
    try {
      this.#notifier = transport.enableQueue(index, {
        size: queueOptions.size,
        descriptorArea: this.#queue.descriptorArea,
        driverArea: this.#queue.driverArea,
        deviceArea: this.#queue.deviceArea,
        vector: options.vector ?? NO_VECTOR,
        position: this.#queue,
      });
    } catch (error) {
      releaseDma(fn, this.#memory);
      throw error;
    }
    this.#interrupts = (options.vector ?? NO_VECTOR) !== NO_VECTOR;
    if (this.#interrupts) this.#queue.enableInterrupts();
  }

  /** Index of the queue on the device. */
  get index(): number {
    return this.#queue.index;
  }

  /** Bytes of the largest result that a command can have. */
  get maxResult(): number {
    return this.#replyBytes - AdminReplyField.result;
  }

  /** Commands given and not yet answered. */
  get pending(): number {
    return this.#waiting.length + this.#inFlight - this.#abandoned;
  }

  /**
   * Sends one command for the function itself and gives its `command_specific_result`: at most `resultLength` bytes, and
   * fewer when the device wrote fewer. `data` is copied before this returns.
   *
   * Rejects with `AdminCommandError` ADMIN_… when the device answers with another status than OK, `VirtioError`
   * ADMIN_TOO_LONG, ADMIN_TIMEOUT, ADMIN_REPLY, ADMIN_CLOSED or the code that broke the queue, `VfioError` DEVICE_GONE.
   */
  command(opcode: number, data: Uint8Array, resultLength: number, subject = ''): Promise<Uint8Array> {
    if (this.#closed !== undefined) return Promise.reject(this.#closed);
    const length = adminPartLength(AdminCommandField.data + data.length);
    if (length > this.#commandBytes || AdminReplyField.result + resultLength > this.#replyBytes) {
      const text = `${adminOpcodeName(opcode)}: ${data.length} bytes of data and ${resultLength} of result`;
      return Promise.reject(new VirtioError('ADMIN_TOO_LONG', `${text} do not fit a slot`));
    }
    const bytes = new Uint8Array(length);
    encodeAdminCommand(bytes, { opcode, groupType: AdminGroup.SELF, groupMemberId: 0n, data });
    return new Promise((resolve, reject) => {
      this.#waiting.push({
        opcode,
        subject,
        bytes,
        resultLength,
        alone: opcode === AdminOpcode.LIST_USE,
        since: performance.now(),
        deadline: Number.POSITIVE_INFINITY,
        resolve,
        reject,
      });
      this.#stirred();
      const idle = this.#inFlight === 0;
      this.#guard(() => {
        this.#submit();
        // Commands that are given together share a notification: the first has one of its own, the others wait for the next tick.
        if (idle) this.#notify();
      });
      this.#unschedule();
      this.#schedule();
    });
  }

  /** Looks for answers now. To be called when the queue's interrupt fired; otherwise the queue polls by itself. */
  poll(): void {
    if (this.#closed !== undefined) return;
    this.#guard(() => {
      this.#reap();
      // With event indices an interrupt is asked for one at a time; true says that more has come meanwhile.
      if (this.#interrupts && this.#queue.enableInterrupts()) this.#reap();
      this.#submit();
      this.#notify();
    });
    this.#schedule();
  }

  /**
   * Rejects what is pending, wipes and frees the memory. Only after the device or the queue was reset, or is gone.
   * Idempotent.
   */
  close(reason: Error = new VirtioError('ADMIN_CLOSED', 'the administration queue was closed')): void {
    if (this.#closed === undefined) this.#rejectAll(reason);
    if (this.#released) return;
    this.#released = true;
    this.#memory.u8.fill(0, this.#queueBytes);
    this.#freeMemory(this.#memory);
  }

  /** After this the queue touches no shared memory any more. */
  #rejectAll(reason: Error): void {
    this.#closed = reason;
    this.#queue.fail(
      reason instanceof VirtioError ? reason : new VirtioError('QUEUE_CLOSED', 'the administration queue was closed'),
    );
    this.#unschedule();
    const pending = [...this.#slots.filter((slot) => slot != null), ...this.#waiting];
    this.#slots.fill(undefined);
    this.#waiting.length = 0;
    this.#inFlight = 0;
    this.#abandoned = 0;
    for (const command of pending) {
      command.bytes.fill(0);
      command.reject(reason);
    }
  }

  /** Runs something that touches the device; when the device turns out broken or lost, everything pending ends. */
  #guard(action: () => void): void {
    try {
      action();
      if (this.#queue.broken !== null) this.#rejectAll(this.#queue.broken);
    } catch (error) {
      this.#rejectAll(error instanceof Error ? error : new VirtioError('ADMIN_CLOSED', String(error)));
    }
  }

  #commandAt(slot: number): number {
    return this.#queueBytes + slot * (this.#commandBytes + this.#replyBytes);
  }

  /** Moves waiting commands into free slots. */
  #submit(): void {
    let posted = false;
    while (this.#waiting.length > 0) {
      const next = this.#waiting[0];
      const slot = this.#slots.indexOf(undefined);
      if (slot < 0 || (this.#inFlight > 0 && (next.alone || this.#runsAlone()))) break;
      const at = this.#commandAt(slot);
      const replyLength = adminPartLength(AdminReplyField.result + next.resultLength);
      const pieces = this.#pieces;
      pieces[0] = this.#memory.iovaLow + at;
      pieces[1] = this.#memory.iovaHigh;
      pieces[2] = next.bytes.length;
      pieces[3] = this.#memory.iovaLow + at + this.#commandBytes;
      pieces[4] = this.#memory.iovaHigh;
      pieces[5] = replyLength;
      this.#memory.u8.set(next.bytes, at);
      if (!this.#queue.postChain(slot, pieces, 1, 1)) {
        this.#memory.u8.fill(0, at, at + next.bytes.length);
        break;
      }
      next.bytes.fill(0);
      next.deadline = performance.now() + this.#timeout;
      this.#waiting.shift();
      this.#slots[slot] = next;
      this.#inFlight++;
      posted = true;
    }
    if (posted && this.#queue.publish()) this.#unnotified = true;
  }

  /** Tells the device of what was submitted, if it wants to be told. */
  #notify(): void {
    if (!this.#unnotified) return;
    this.#unnotified = false;
    this.#notifier.notify();
  }

  #runsAlone(): boolean {
    return this.#slots.some((slot) => slot?.alone === true);
  }

  /** Takes the slots that the device has returned. */
  #reap(): void {
    const count = this.#queue.take(this.#takenSlots, this.#takenLengths, this.#takenSlots.length);
    for (let i = 0; i < count; i++) {
      const slot = this.#takenSlots[i];
      const at = this.#commandAt(slot);
      const replyAt = at + this.#commandBytes;
      const command = this.#slots[slot];
      // One copy of what the device says it wrote; only the copy is looked at.
      const reply = this.#memory.u8.slice(replyAt, replyAt + this.#takenLengths[i]);
      this.#memory.u8.fill(0, at, at + this.#commandBytes + this.#replyBytes);
      this.#slots[slot] = undefined;
      this.#inFlight--;
      if (command == null) {
        this.#abandoned--;
        reply.fill(0);
      } else {
        this.#answer(command, reply);
      }
    }
    if (count === 0) return;
    this.#stirred();
    this.#lastProgress = this.#quietSince;
  }

  #answer(command: Pending, reply: Uint8Array): void {
    const name = `${adminOpcodeName(command.opcode)}${command.subject && ` of ${command.subject}`}`;
    if (reply.length < AdminReplyField.qualifier) {
      // Missing fields read as zero, but `status` is one that the device must always write (2.13): its absence is no OK.
      command.reject(new VirtioError('ADMIN_REPLY', `${name}: the reply of ${reply.length} bytes has no status`));
      return;
    }
    const { status, qualifier, result } = decodeAdminReply(reply);
    if (status === AdminStatus.OK) {
      const wanted = result.slice(0, command.resultLength);
      reply.fill(0);
      command.resolve(wanted);
      return;
    }
    reply.fill(0);
    // A status that the standard does not define counts as EINVAL (2.12.1).
    const known = Object.values<number>(AdminStatus).includes(status);
    command.reject(
      new AdminCommandError(
        `ADMIN_${known ? adminStatusName(status) : 'EINVAL'}`,
        `${name}: ${adminStatusName(status)} (${adminQualifierName(qualifier)})`,
        { opcode: command.opcode, status, qualifier },
      ),
    );
  }

  /**
   * Gives up the commands whose time is over. Those in flight leave their slot occupied; those that wait are patient as
   * long as the device answers others.
   */
  #expire(now: number): void {
    const late = (command: Pending) => {
      const name = `${adminOpcodeName(command.opcode)}${command.subject && ` of ${command.subject}`}`;
      command.reject(new VirtioError('ADMIN_TIMEOUT', `${name}: no answer within ${this.#timeout} ms`));
    };
    for (let slot = 0; slot < this.#slots.length; slot++) {
      const command = this.#slots[slot];
      if (command == null || command.deadline > now) continue;
      this.#slots[slot] = null;
      this.#abandoned++;
      late(command);
    }
    while (this.#waiting.length > 0 && now - Math.max(this.#waiting[0].since, this.#lastProgress) >= this.#timeout) {
      const command = this.#waiting.shift();
      command?.bytes.fill(0);
      if (command !== undefined) late(command);
    }
  }

  /** A device that stopped answering may be gone, or may ask for a reset: both show in the status register. */
  #checkLiveness(now: number): void {
    if (now - this.#lastLiveness < LIVENESS_MS) return;
    this.#lastLiveness = now;
    if (this.#transport.gone) throw new VfioError('DEVICE_GONE', `${this.#transport.address}: the device is gone`);
    if ((this.#transport.readStatus() & DeviceStatus.DEVICE_NEEDS_RESET) !== 0) {
      throw new VirtioError('DEVICE_NEEDS_RESET', `${this.#transport.address}: the device asks for a reset`);
    }
  }

  #stirred(): void {
    this.#quietSince = performance.now();
    this.#lastLiveness = this.#quietSince;
    this.#pause = 0;
  }

  #unschedule(): void {
    if (this.#timer === undefined) return;
    if ('refresh' in this.#timer) clearTimeout(this.#timer);
    else clearImmediate(this.#timer);
    this.#timer = undefined;
  }

  #schedule(): void {
    if (this.#closed !== undefined || this.#timer !== undefined) return;
    if (this.pending === 0) {
      if (this.#abandoned === 0) return;
      // Only to wipe what comes back late: must not keep the process alive.
      this.#timer = setTimeout(() => this.#tick(), ABANDONED_PAUSE_MS).unref();
    } else if (performance.now() - this.#quietSince < EAGER_MS) {
      this.#timer = setImmediate(() => this.#tick());
    } else {
      this.#pause = Math.min(this.#pause + 1, MAX_PAUSE_MS);
      this.#timer = setTimeout(() => this.#tick(), this.#pause);
    }
  }

  #tick(): void {
    this.#timer = undefined;
    this.#guard(() => {
      this.#reap();
      const now = performance.now();
      this.#expire(now);
      this.#submit();
      this.#notify();
      if (this.pending > 0) this.#checkLiveness(now);
    });
    this.#schedule();
  }
}
