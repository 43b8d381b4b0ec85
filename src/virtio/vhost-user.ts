/**
 * A vhost-user port as a virtio network device: the driver is the front-end, the back-end is a port of a switch in user space
 * (OVS-DPDK, VPP, DPDK's net_vhost) or any other program that takes virtqueues over a Unix socket (QEMU's
 * docs/interop/vhost-user.rst). No virtual machine, no IOMMU, no privileges.
 *
 * There is no PCI function: the messages replace the registers, eventfds the notifications and interrupts, and the back-end
 * reaches memory through the descriptor of the arena. It is told nothing of a queue until DRIVER_OK; then it gets the memory, the
 * features and each ring, and is stopped by GET_VRING_BASE. What vhost-user leaves to the front-end is done here: the
 * configuration (unless CONFIG was negotiated) and the control queue, with which the driver sets the number of queue pairs.
 *
 * Left out: everything above feature bit 63, and so IPsec and the administration queue; ACCESS_PLATFORM, that is an IOTLB;
 * steering, receive modes, statistics and link state, which have no messages; requests of the back-end; reconnection; migration.
 */
import { type VfioError, VirtioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';
import type { DeviceFunction, SharedDma } from '../vfio/function.ts';
import { Feature, FeatureSet } from './features.ts';
import { DeviceStatus, DeviceType, NO_VECTOR } from './pci-layout.ts';
import type { ConfigReader, QueueNotifier, QueueSetup, VirtioTransport } from './transport.ts';
import { readStable, VhostUserConfig } from './vhost-user-config.ts';
import { ControlDevice } from './vhost-user-control.ts';
import { VhostUserMemory } from './vhost-user-memory.ts';
import { type BackEnd, openBackEnd, type VhostUserOptions } from './vhost-user-open.ts';
import {
  decodeNumber,
  encodeEmpty,
  encodeFeatures,
  encodeU64,
  ProtocolFeature,
  Request,
  VhostFeature,
} from './vhost-user-protocol.ts';
import { VhostUserRings } from './vhost-user-rings.ts';

export type { VhostUserOptions } from './vhost-user-open.ts';

/** Largest queue, split or packed (2.7, 2.8): the protocol has no way to ask for less. */
const MAX_QUEUE_SIZE = 32768;
/** The control queue is served in place, so it never holds more than a command. */
const CONTROL_QUEUE_SIZE = 64;
/** What the driver may know of the back-end's features: that which works without messages of its own. */
const PASSED_ON = FeatureSet.of(
  Feature.CSUM,
  Feature.GUEST_CSUM,
  Feature.GUEST_TSO4,
  Feature.GUEST_TSO6,
  Feature.GUEST_ECN,
  Feature.GUEST_UFO,
  Feature.GUEST_USO4,
  Feature.GUEST_USO6,
  Feature.HOST_TSO4,
  Feature.HOST_TSO6,
  Feature.HOST_ECN,
  Feature.HOST_UFO,
  Feature.HOST_USO,
  Feature.MRG_RXBUF,
  Feature.GUEST_HDRLEN,
  Feature.INDIRECT_DESC,
  Feature.EVENT_IDX,
  Feature.VERSION_1,
  Feature.RING_PACKED,
  Feature.IN_ORDER,
  Feature.ORDER_PLATFORM,
  Feature.RING_RESET,
);
/** What the driver may know besides when the back-end has a configuration. */
const PASSED_ON_WITH_CONFIG = FeatureSet.of(Feature.MAC, Feature.STATUS, Feature.MTU, Feature.SPEED_DUPLEX);

/**
 * Opens the port at `path`. Throws VfioError `CONNECT_FAILED`, `NOT_VHOST_USER`, `PROTOCOL`, `TIMEOUT`, `DEVICE_GONE`.
 * Nothing stays open then.
 */
export async function openVhostUser(path: string, options: VhostUserOptions = {}): Promise<VhostUserDevice> {
  const backEnd = await openBackEnd(path, options);
  try {
    return new VhostUserDevice(`vhost-user:${path}`, backEnd, options.hugePages ?? false);
  } catch (error) {
    backEnd.session.close();
    throw error;
  }
}

export class VhostUserDevice implements DeviceFunction, VirtioTransport {
  readonly address: string;
  readonly deviceType: number = DeviceType.NET;
  readonly behindIommu = false;
  readonly announcesChanges = false;
  /** One for each queue that there can be, and one for the configuration. */
  readonly interruptVectors: number;
  /** What the back-end said about itself. */
  readonly backEnd: BackEnd;
  readonly #memory: VhostUserMemory;
  readonly #config: VhostUserConfig;
  readonly #rings: VhostUserRings;
  #status = 0;
  #features = FeatureSet.empty;
  #closed = false;

  /** Takes over the session of `backEnd`. Use `openVhostUser`. */
  constructor(address: string, backEnd: BackEnd, hugePages: boolean) {
    this.address = address;
    this.backEnd = backEnd;
    // Data queues, control queue, configuration.
    this.interruptVectors = 2 * backEnd.queuePairs + 2;
    this.#memory = new VhostUserMemory(backEnd.session, backEnd.memorySlots, hugePages);
    this.#config = new VhostUserConfig(backEnd);
    this.#rings = new VhostUserRings(backEnd.session, backEnd.features.has(VhostFeature.PROTOCOL_FEATURES));
  }

  get gone(): boolean {
    return this.backEnd.session.lost;
  }

  onGone(listener: (reason: VfioError) => void): void {
    this.backEnd.session.onLost(listener);
  }

  allocateDma(size: number): DmaMemory {
    return this.#memory.allocate(size);
  }

  importDma(fd: number, offset: number, size: number): DmaMemory {
    return this.#memory.import(fd, offset, size);
  }

  freeDma(memory: DmaMemory): void {
    this.#memory.free(memory);
  }

  shareDma(memory: DmaMemory): SharedDma {
    return this.#memory.share(memory);
  }

  setInterrupts(eventfds: readonly number[]): void {
    if (eventfds.length > this.interruptVectors) {
      throw new RangeError(`${eventfds.length} eventfds for ${this.interruptVectors} vectors`);
    }
    this.backEnd.session.check();
    this.#rings.setInterrupts(eventfds);
  }

  /** Stops the rings if the back-end is still there, releases all memory, closes descriptors. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    try {
      if (!this.gone) this.#reset();
    } catch {
      // A back-end that does not stop loses the socket now, and our side of the memory.
    }
    this.#rings.close();
    this.#memory.close();
    this.backEnd.session.close();
  }

  readStatus(): number {
    const { session, protocol } = this.backEnd;
    session.check();
    if (!protocol.has(ProtocolFeature.STATUS)) return this.#status;
    return session.askFor(encodeEmpty(Request.GET_STATUS), (payload) =>
      decodeNumber(Request.GET_STATUS, payload, 0xff),
    );
  }

  writeStatus(status: number): void {
    this.backEnd.session.check();
    if (status === 0) {
      this.#reset();
      return;
    }
    // The back-end may begin with the rings as soon as it hears of DRIVER_OK.
    if ((status & DeviceStatus.DRIVER_OK) !== 0 && !this.#running) {
      this.#memory.publish();
      this.#rings.startAll(this.#features.has(Feature.RING_PACKED));
    }
    this.#tellStatus(status);
    this.#status = status;
  }

  /** What the driver may negotiate. All that the back-end offers is `backEnd.features`. */
  readDeviceFeatures(): FeatureSet {
    const { features, protocol, queuePairs } = this.backEnd;
    const known = protocol.has(ProtocolFeature.CONFIG) ? PASSED_ON.or(PASSED_ON_WITH_CONFIG) : PASSED_ON;
    const passed = known.and(features);
    return queuePairs > 1 ? passed.with(Feature.MQ, Feature.CTRL_VQ) : passed;
  }

  writeDriverFeatures(features: FeatureSet): void {
    const { session, features: offered } = this.backEnd;
    this.#features = features;
    // The control queue is ours; the back-end hears of it when it knows of one.
    const shared = features.and(offered);
    const own = offered.has(VhostFeature.PROTOCOL_FEATURES) ? shared.with(VhostFeature.PROTOCOL_FEATURES) : shared;
    session.tell(encodeFeatures(Request.SET_FEATURES, own));
    session.settle();
  }

  /** By what was negotiated (5.1.2): one pair without MQ, and a control queue behind the pairs with CTRL_VQ. */
  queueCount(): number {
    return this.#dataQueues + (this.#features.has(Feature.CTRL_VQ) ? 1 : 0);
  }

  adminQueues(): never {
    throw new VirtioError('ADMIN_QUEUE', `${this.address}: a vhost-user port has no administration queue`);
  }

  maxQueueSize(index: number): number {
    if (index < this.#dataQueues) return MAX_QUEUE_SIZE;
    return index < this.queueCount() ? CONTROL_QUEUE_SIZE : 0;
  }

  enableQueue(index: number, setup: QueueSetup): QueueNotifier {
    this.backEnd.session.check();
    const max = this.maxQueueSize(index);
    if (setup.size === 0 || setup.size > max) {
      throw new VirtioError(
        'QUEUE_SIZE',
        `${this.address}: queue ${index} takes ${max} descriptors, not ${setup.size}`,
      );
    }
    this.#checkVector(setup.vector, `queue ${index}`);
    if (index >= this.#dataQueues) return this.#openControl(setup);
    const notifier = this.#rings.add(index, setup);
    if (this.#running) this.#rings.start();
    return notifier;
  }

  /** The protocol stops a ring by GET_VRING_BASE, and it has stopped when the answer is there. */
  startQueueReset(index: number): void {
    this.backEnd.session.check();
    this.#rings.remove(index);
  }

  isQueueReset(index: number): boolean {
    return !this.#rings.has(index);
  }

  /** No vector ever fires for them. */
  setConfigVector(vector: number): void {
    this.#checkVector(vector, 'configuration changes');
  }

  readIsr(): number {
    this.backEnd.session.check();
    return 0;
  }

  readConfig<T>(read: (config: ConfigReader) => T): T {
    this.backEnd.session.check();
    return readStable(this.#config, read, this.address);
  }

  get #dataQueues(): number {
    return this.#features.has(Feature.MQ) ? 2 * this.backEnd.queuePairs : 2;
  }

  get #running(): boolean {
    return (this.#status & DeviceStatus.DRIVER_OK) !== 0;
  }

  #checkVector(vector: number, event: string): void {
    if (vector !== NO_VECTOR && vector >= this.interruptVectors) {
      throw new VirtioError('MSIX_VECTOR', `${this.address}: no vector ${vector} for ${event}`);
    }
  }

  #tellStatus(status: number): void {
    const { session, protocol } = this.backEnd;
    if (protocol.has(ProtocolFeature.STATUS)) session.tell(encodeU64(Request.SET_STATUS, status));
  }

  #openControl(setup: QueueSetup): QueueNotifier {
    return new ControlDevice(setup, {
      find: (iova, count) => this.#memory.find(iova, count),
      eventIdx: this.#features.has(Feature.EVENT_IDX),
      packed: this.#features.has(Feature.RING_PACKED),
      // 5.1.9.5.6: from 1 to what there is, and only those that the driver has described.
      setQueuePairs: (pairs) => pairs >= 1 && pairs <= this.backEnd.queuePairs && this.#rings.enablePairs(pairs),
      interrupt: () => this.#rings.interrupt(setup.vector),
    });
  }

  /** Stops every ring, so that their memory may go, and forgets them. */
  #reset(): void {
    const { session, protocol } = this.backEnd;
    this.#rings.removeAll();
    if (protocol.has(ProtocolFeature.RESET_DEVICE)) session.tell(encodeEmpty(Request.RESET_DEVICE));
    this.#tellStatus(0);
    this.#memory.withdraw();
    this.#status = 0;
    this.#features = FeatureSet.empty;
  }
}
