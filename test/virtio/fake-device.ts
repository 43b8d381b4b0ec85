/**
 * A virtio device in memory, behind the transport interface: registers as plain fields, queues as naive devices. A test
 * makes it break the rules by setting a field.
 */
import { VfioError, VirtioError } from '../../src/errors.ts';
import { decodeAdminCommand, encodeAdminReply } from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { DeviceStatus } from '../../src/virtio/pci-layout.ts';
import type { ConfigReader, QueueNotifier, QueueSetup, VirtioTransport } from '../../src/virtio/transport.ts';
import { type Chain, NaiveSplitDevice, TestMemory } from '../virtqueue/support.ts';

export class FakeDevice implements VirtioTransport {
  readonly memory = new TestMemory();
  readonly address = 'fake:0';
  deviceType = 1;
  interruptVectors = 4;
  gone = false;

  status = 0;
  /** Reads of the status after a reset that still show the old one; Infinity: it never ends. */
  resetReads = 0;
  offered = FeatureSet.of(Feature.VERSION_1, Feature.ADMIN_VQ);
  accepted = FeatureSet.empty;
  acceptsFeatures = true;
  maxSize = 64;
  adminCount = 1;
  config: Uint8Array<ArrayBuffer> = new Uint8Array(64);
  /** What happened, in order. */
  readonly log: string[] = [];
  readonly queues = new Map<number, NaiveSplitDevice>();
  /** Called for each notification. */
  onNotify: (queue: number) => void = () => {};
  #resetting = 0;

  #alive(): void {
    if (this.gone) throw new VfioError('DEVICE_GONE', 'the device is gone');
  }

  readStatus(): number {
    this.#alive();
    if (this.#resetting > 0) {
      this.#resetting--;
      return this.status;
    }
    if (this.#resetting === 0 && this.log.at(-1) === 'status 0') this.status = 0;
    return this.status;
  }

  writeStatus(status: number): void {
    this.#alive();
    this.log.push(`status ${status}`);
    if (status === 0) {
      this.#resetting = this.resetReads;
      this.queues.clear();
      return;
    }
    this.status = this.acceptsFeatures ? status : status & ~DeviceStatus.FEATURES_OK;
  }

  readDeviceFeatures(): FeatureSet {
    this.#alive();
    return this.offered;
  }

  writeDriverFeatures(features: FeatureSet): void {
    this.log.push('features');
    this.accepted = features;
  }

  queueCount(): number {
    return 2;
  }

  adminQueues(): { first: number; count: number } {
    if (this.adminCount === 0) throw new VirtioError('ADMIN_QUEUE', 'none');
    return { first: 2, count: this.adminCount };
  }

  maxQueueSize(): number {
    return this.maxSize;
  }

  enableQueue(index: number, setup: QueueSetup): QueueNotifier {
    this.log.push(`queue ${index}`);
    this.queues.set(index, new NaiveSplitDevice(this.memory, setup, this.accepted.has(Feature.EVENT_IDX)));
    return {
      notify: () => {
        this.#alive();
        if ((this.status & DeviceStatus.DRIVER_OK) === 0) throw new Error('a notification before DRIVER_OK');
        this.onNotify(index);
      },
    };
  }

  startQueueReset(index: number): void {
    this.log.push(`reset ${index}`);
    this.queues.delete(index);
  }

  isQueueReset(): boolean {
    return true;
  }

  setConfigVector(): void {}

  readIsr(): number {
    return 0;
  }

  readConfig<T>(read: (config: ConfigReader) => T): T {
    const view = new DataView(this.config.buffer);
    return read({
      size: this.config.length,
      read8: (at) => view.getUint8(at),
      read16: (at) => view.getUint16(at, true),
      read32: (at) => view.getUint32(at, true),
    });
  }

  allocateDma(size: number) {
    return this.memory.allocateDma(size);
  }

  freeDma(memory: ReturnType<TestMemory['allocateDma']>): void {
    this.memory.freeDma(memory);
  }
}

/** A command as the device got it, and the buffer for its answer. */
export interface ReceivedCommand {
  readonly head: number;
  readonly opcode: number;
  readonly data: Uint8Array;
  /** Lengths of the two parts. */
  readonly readable: number;
  readonly writable: number;
  /** The device-readable part itself, in shared memory. */
  readonly shared: Uint8Array;
  /** Writes the start of the device-writable part and returns the buffer with this used length (default: what was written). */
  answer(bytes: Uint8Array, usedLength?: number): void;
  reply(status: number, qualifier?: number, result?: Uint8Array): void;
}

/** The device's side of an administration queue. */
export function receiveCommands(device: FakeDevice, queue: NaiveSplitDevice): ReceivedCommand[] {
  const commands: ReceivedCommand[] = [];
  for (let chain = queue.fetch(); chain !== undefined; chain = queue.fetch())
    commands.push(received(device, queue, chain));
  // Notify me of the next one.
  queue.setAvailEvent(queue.lastAvail);
  return commands;
}

function received(device: FakeDevice, queue: NaiveSplitDevice, chain: Chain): ReceivedCommand {
  const [readable, writable] = chain.pieces;
  if (chain.pieces.length !== 2 || readable.writable || !writable.writable) throw new Error('not a command');
  const shared = device.memory.bytes(readable.iova, readable.length);
  const { opcode, data } = decodeAdminCommand(shared.slice());
  const answer = (bytes: Uint8Array, usedLength = bytes.length) => {
    device.memory.bytes(writable.iova, writable.length).set(bytes.subarray(0, writable.length));
    queue.complete(chain.head, usedLength);
  };
  return {
    head: chain.head,
    opcode,
    data,
    readable: readable.length,
    writable: writable.length,
    shared,
    answer,
    reply: (status, qualifier = 0, result = new Uint8Array(0)) =>
      answer(encodeAdminReply({ status, qualifier, result }).subarray(0, writable.length)),
  };
}
