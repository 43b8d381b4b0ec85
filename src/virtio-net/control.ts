/**
 * The control virtqueue (Virtio 1.4, 5.1.9.5): one command at a time, each with a deadline. What the commands are is the
 * business of `net-control.ts`.
 */
import { InputError, type VipsecError, VirtioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';
import { type DeviceFunction, releaseDma } from '../vfio/function.ts';
import type { FeatureSet } from '../virtio/features.ts';
import { NO_VECTOR } from '../virtio/pci-layout.ts';
import { ringFormat, ringOptions } from '../virtio/ring-format.ts';
import type { QueueNotifier, VirtioTransport } from '../virtio/transport.ts';
import { createVirtqueue, virtqueueBytes } from '../virtqueue/create.ts';
import type { Virtqueue } from '../virtqueue/virtqueue.ts';
import { Ack, ControlField } from './control-wire.ts';

/** What `ack` holds until the device writes it: neither OK nor ERR. */
const ACK_NONE = 0xff;

/** Bytes of the largest command, and of the largest ack and result, which have a place of their own behind it. */
const COMMAND_BYTES = 16384;
const REPLY_BYTES = 4096;
const ALIGNMENT = 64;
/** A command takes two descriptors. */
const COMMAND_DESCRIPTORS = 2;
/** QEMU (11.1) never finishes a chain that fills a packed ring with IN_ORDER: docs/decisions.md. */
const QUEUE_SIZE = 4;
const POLL_MS = 1;

export class ControlQueue {
  readonly #memory: DmaMemory;
  readonly #freeMemory: () => void;
  readonly #ring: Virtqueue;
  readonly #notifier: QueueNotifier;
  readonly #commandAt: number;
  readonly #timeout: number;
  readonly #tokens = new Uint32Array(1);
  readonly #written = new Uint32Array(1);
  /** Set while the device has a command. */
  #isOut = false;
  #last: Promise<unknown> = Promise.resolve();

  /** In step 7 of the initialisation. `index` is that of the queue. Throws VirtioError `QUEUE_SIZE`. */
  constructor(fn: DeviceFunction, transport: VirtioTransport, features: FeatureSet, index: number, timeout: number) {
    const max = transport.maxQueueSize(index);
    if (max < COMMAND_DESCRIPTORS)
      throw new VirtioError('QUEUE_SIZE', `control queue ${index} takes ${max} descriptors`);
    const options = { index, size: Math.min(QUEUE_SIZE, max), ...ringOptions(features) };
    const format = ringFormat(features);
    const ringBytes = Math.ceil(virtqueueBytes(format, options) / ALIGNMENT) * ALIGNMENT;
    const memory = fn.allocateDma(ringBytes + COMMAND_BYTES + REPLY_BYTES);
    this.#memory = memory;
    this.#freeMemory = () => releaseDma(fn, memory);
    this.#commandAt = ringBytes;
    this.#timeout = timeout;
    this.#ring = createVirtqueue(format, memory, options);
    const { size, descriptorArea, driverArea, deviceArea } = this.#ring;
    try {
      const setup = { size, descriptorArea, driverArea, deviceArea, vector: NO_VECTOR, position: this.#ring };
      this.#notifier = transport.enableQueue(index, setup);
    } catch (error) {
      releaseDma(fn, memory);
      throw error;
    }
  }

  /**
   * Gives the device a command and resolves with its result, at most `resultBytes` long, when it has acknowledged it. Throws
   * InputError `CONTROL_ARGUMENT` when it is too long; rejects with VirtioError `CONTROL_REFUSED`, `CONTROL_TIMEOUT`, or
   * why the queue is closed.
   */
  command(classNumber: number, command: number, data: Uint8Array, resultBytes = 0): Promise<Uint8Array> {
    if (ControlField.data + data.length > COMMAND_BYTES || Ack.size + resultBytes > REPLY_BYTES) {
      throw new InputError(
        'CONTROL_ARGUMENT',
        `control command ${classNumber}/${command} with ${data.length} bytes of data`,
      );
    }
    const run = () => this.#run(classNumber, command, data, resultBytes);
    const done = this.#last.then(run, run);
    this.#last = done.catch(() => {});
    return done;
  }

  async #run(classNumber: number, command: number, data: Uint8Array, resultBytes: number): Promise<Uint8Array> {
    const { u8, iovaLow, iovaHigh } = this.#memory;
    if (this.#ring.broken !== null) throw this.#ring.broken;
    // A command that was given up on is the device's until it answers: its memory must not change.
    if (this.#isOut && this.#ring.take(this.#tokens, this.#written, 1) === 0) {
      throw new VirtioError('CONTROL_TIMEOUT', 'the device still holds an earlier control command');
    }
    this.#isOut = false;
    const at = this.#commandAt;
    const ackAt = at + COMMAND_BYTES;
    u8[at + ControlField.class] = classNumber;
    u8[at + ControlField.command] = command;
    u8.set(data, at + ControlField.data);
    u8[ackAt] = ACK_NONE;
    const length = ControlField.data + data.length;
    const reply = Ack.size + resultBytes;
    const pieces = Uint32Array.of(iovaLow + at, iovaHigh, length, iovaLow + ackAt, iovaHigh, reply);
    if (!this.#ring.postChain(0, pieces, 1, 1)) {
      throw this.#ring.broken ?? new VirtioError('CONTROL_TIMEOUT', 'the control queue has no room');
    }
    this.#isOut = true;
    if (this.#ring.publish()) this.#notifier.notify();
    const deadline = performance.now() + this.#timeout;
    while (this.#ring.take(this.#tokens, this.#written, 1) === 0) {
      if (this.#ring.broken !== null) throw this.#ring.broken;
      if (performance.now() >= deadline) {
        throw new VirtioError('CONTROL_TIMEOUT', `control command ${classNumber}/${command}: no answer`);
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    this.#isOut = false;
    const written = this.#written[0];
    const ack = written === 0 ? ACK_NONE : u8[ackAt];
    if (ack !== Ack.OK) {
      throw new VirtioError('CONTROL_REFUSED', `the device refused control command ${classNumber}/${command}`);
    }
    return u8.slice(ackAt + Ack.size, ackAt + written);
  }

  /** Pending commands reject; no shared memory is touched any more. */
  close(reason: VipsecError): void {
    this.#ring.fail(reason instanceof VirtioError ? reason : new VirtioError(reason.code, reason.message));
  }

  /** Frees the memory. Only after the device was reset, or is gone. */
  release(): void {
    this.#freeMemory();
  }
}
