/**
 * How a driver reaches a virtio device, whatever the bus looks like (Virtio 1.4, chapter 4): status, features, device
 * configuration, queues, notifications. `standard.ts` is the modern PCI transport, `octep.ts` that of octeon_ep class functions.
 *
 * All calls are synchronous. Each throws `VfioError` DEVICE_GONE once the function is lost.
 */
import type { SharedRegister } from '../vfio/function.ts';
import type { FeatureSet } from './features.ts';

/** What the device must know of a queue before it is enabled. Addresses are IOVAs. */
export interface QueueSetup {
  /** Number of descriptors, not above `maxQueueSize`. */
  readonly size: number;
  readonly descriptorArea: number;
  readonly driverArea: number;
  readonly deviceArea: number;
  /** MSI-X vector for used buffers, or `NO_VECTOR`. */
  readonly vector: number;
  /** With NOTIFICATION_DATA, what notifications say (2.9): `next_off`, and `next_wrap` in bit 15. Usually the `Virtqueue`. */
  readonly position?: { readonly next: number };
}

/** Tells the device that a queue has new buffers. */
export interface QueueNotifier {
  notify(): void;
  /** How another thread of this process can notify by itself; null, or no such method, when it cannot. */
  share?(): Doorbell | null;
}

/** A notification without its `QueueNotifier`. The descriptor is the caller's to close. */
export interface Doorbell {
  readonly register: SharedRegister;
  /** What is written there: `id` in 16 bits, or with `withPosition` in the lower half of 32 bits, above it where the queue stands (4.1.5.2). */
  readonly id: number;
  readonly withPosition: boolean;
}

/** Reads of the device configuration, of exact width; offsets count from its start. Past its end, they throw. */
export interface ConfigReader {
  /** Bytes of device configuration. */
  readonly size: number;
  read8(offset: number): number;
  read16(offset: number): number;
  read32(offset: number): number;
}

/**
 * A device whose interrupts belong to queues from the start, several to one: a flag says which queue one was for. `enableQueue` maps none
 * there, and the device looks only once, at DRIVER_OK, whether any queue wants interrupts at all.
 */
export interface InterruptCauses {
  /** Whether there was an interrupt for queue `index` since this was last asked. */
  take(index: number): boolean;
}

export interface VirtioTransport {
  /** The device address as the user wrote it. */
  readonly address: string;
  /** Virtio device type (5): 1 is a network device. */
  readonly deviceType: number;
  /** MSI-X vectors that events can be mapped to. */
  readonly interruptVectors: number;
  /** True once the device is lost. */
  readonly gone: boolean;
  /** What such a device does not work without, besides VERSION_1. */
  readonly requiredFeatures?: FeatureSet;
  /** Only where interrupts are not mapped by the driver. */
  readonly causes?: InterruptCauses;

  readStatus(): number;
  /** Writing 0 starts a reset, which is over when `readStatus` gives 0. */
  writeStatus(status: number): void;
  readDeviceFeatures(): FeatureSet;
  writeDriverFeatures(features: FeatureSet): void;

  /** Number of queues, administration queues not counted. */
  queueCount(): number;
  /** The administration queues; only with ADMIN_VQ negotiated. Throws `VirtioError` ADMIN_QUEUE when they cannot be. */
  adminQueues(): { readonly first: number; readonly count: number };
  /** Largest size of queue `index`; 0 when there is no such queue. */
  maxQueueSize(index: number): number;
  /** Describes queue `index` to the device, maps its interrupt and enables it. Throws `VirtioError` when that fails. */
  enableQueue(index: number, setup: QueueSetup): QueueNotifier;
  /**
   * Starts the reset of queue `index` (2.6.1), which is over when `isQueueReset` says so; then it may be enabled again. Only with
   * RING_RESET negotiated. See `resetQueue` in `initialize.ts`.
   */
  startQueueReset(index: number): void;
  isQueueReset(index: number): boolean;
  /** False when the device has no way to tell that its configuration has changed. */
  readonly announcesChanges?: boolean;
  /** Maps configuration changes to an MSI-X vector, or to none with `NO_VECTOR`. Throws `VirtioError` MSIX_VECTOR. */
  setConfigVector(vector: number): void;
  /** ISR status bits, cleared by the read. Not to be used with MSI-X. */
  readIsr(): number;
  /**
   * Reads device configuration so that all that `read` returns belongs together: it is called again while the device
   * changes its configuration (2.5.1). Throws `VirtioError` CONFIG_UNSTABLE when that does not end.
   */
  readConfig<T>(read: (config: ConfigReader) => T): T;
}
