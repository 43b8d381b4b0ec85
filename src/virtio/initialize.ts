/**
 * Device initialisation: the numbered steps of Virtio 1.4, 3.1.1.
 *
 * Feature negotiation knows two sets: what the driver *requires*, without which it gives up and says what is missing, and
 * what it *wants*. VERSION_1 is always required. A wanted feature whose own requirements (5.1.3.1) the device does not
 * offer is left out.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { VirtioError } from '../errors.ts';
import { Feature, FeatureSet, withRequirementsMet } from './features.ts';
import { DeviceStatus } from './pci-layout.ts';
import type { VirtioTransport } from './transport.ts';

export interface InitializeOptions {
  readonly required: FeatureSet;
  readonly wanted: FeatureSet;
  /** Milliseconds to wait for a reset; hardware may take seconds. Default 5000. */
  readonly resetTimeout?: number;
  /** Step 7: queues and the rest of the set-up, with the negotiated features. Nothing may be notified yet. */
  readonly setup: (features: FeatureSet) => void | Promise<void>;
}

const DEFAULT_RESET_TIMEOUT = 5000;

/** Resets the device and waits until it says that it has been (2.4.1). Throws `VirtioError` RESET_TIMEOUT. */
export async function resetDevice(transport: VirtioTransport, timeout = DEFAULT_RESET_TIMEOUT): Promise<void> {
  transport.writeStatus(0);
  const deadline = performance.now() + timeout;
  for (let wait = 0; transport.readStatus() !== 0; wait = Math.min(wait + 1, 20)) {
    if (performance.now() >= deadline) {
      throw new VirtioError(
        'RESET_TIMEOUT',
        `${transport.address}: the device did not finish its reset in ${timeout} ms`,
      );
    }
    await sleep(wait);
  }
}

const HINTS = new Map<number, string>([
  [Feature.VERSION_1, 'A device without VIRTIO_F_VERSION_1 is a legacy device, which this driver does not drive.'],
  [
    Feature.ACCESS_PLATFORM,
    'Behind an IOMMU a device must say that it keeps to it; for a QEMU device that is the property iommu_platform=on.',
  ],
]);

/**
 * Resets one queue, while the others run, and waits until the device says that it has been (2.6.1.1.2). Throws `VirtioError`
 * QUEUE_RESET_TIMEOUT; the queue's memory must not be touched or freed then.
 */
export async function resetQueue(
  transport: VirtioTransport,
  index: number,
  timeout = DEFAULT_RESET_TIMEOUT,
): Promise<void> {
  transport.startQueueReset(index);
  const deadline = performance.now() + timeout;
  for (let wait = 0; !transport.isQueueReset(index); wait = Math.min(wait + 1, 20)) {
    if (performance.now() >= deadline) {
      throw new VirtioError(
        'QUEUE_RESET_TIMEOUT',
        `${transport.address}: the device did not finish the reset of queue ${index} in ${timeout} ms`,
      );
    }
    await sleep(wait);
  }
}

/**
 * What to accept of what the device offers. Throws `VirtioError` FEATURES_MISSING, naming each required feature that is
 * not offered or whose requirements are not.
 */
export function negotiateFeatures(offered: FeatureSet, required: FeatureSet, wanted: FeatureSet): FeatureSet {
  const needed = required.with(Feature.VERSION_1);
  const accepted = withRequirementsMet(offered.and(needed.or(wanted)));
  const missing = needed.minus(accepted);
  if (!missing.isEmpty) {
    const hint = [...HINTS].find(([bit]) => missing.has(bit))?.[1];
    throw new VirtioError(
      'FEATURES_MISSING',
      `the device does not offer ${missing.names().join(', ')}`,
      hint === undefined ? {} : { hint },
    );
  }
  return accepted;
}

/**
 * Takes the device from any state to DRIVER_OK and returns the negotiated features. When a step fails, the FAILED bit is
 * set, as the standard asks, and the error is thrown: RESET_TIMEOUT, FEATURES_MISSING, FEATURES_REJECTED, DEVICE_NEEDS_RESET
 * (all `VirtioError`), or what `setup` throws.
 */
export async function initializeDevice(transport: VirtioTransport, options: InitializeOptions): Promise<FeatureSet> {
  try {
    // 1. Reset the device.
    await resetDevice(transport, options.resetTimeout);

    // 2. Set the ACKNOWLEDGE status bit.
    let status: number = DeviceStatus.ACKNOWLEDGE;
    transport.writeStatus(status);

    // 3. Set the DRIVER status bit.
    status |= DeviceStatus.DRIVER;
    transport.writeStatus(status);

    // 4. Read the feature bits, and write the subset that we understand.
    const required = options.required.or(transport.requiredFeatures ?? FeatureSet.empty);
    const features = negotiateFeatures(transport.readDeviceFeatures(), required, options.wanted);
    transport.writeDriverFeatures(features);

    // 5. Set the FEATURES_OK status bit.
    status |= DeviceStatus.FEATURES_OK;
    transport.writeStatus(status);

    // 6. Re-read it: if it is not set any more, the device does not support this subset.
    if ((transport.readStatus() & DeviceStatus.FEATURES_OK) === 0) {
      throw new VirtioError('FEATURES_REJECTED', `the device refuses the features ${features.names().join(', ')}`);
    }

    // 7. Device-specific set-up: queues, configuration.
    await options.setup(features);

    // 8. Set the DRIVER_OK status bit: the device is live.
    status |= DeviceStatus.DRIVER_OK;
    transport.writeStatus(status);
    if ((transport.readStatus() & DeviceStatus.DEVICE_NEEDS_RESET) !== 0) {
      throw new VirtioError('DEVICE_NEEDS_RESET', `${transport.address}: the device failed while it was being started`);
    }
    return features;
  } catch (error) {
    giveUp(transport);
    throw error;
  }
}

/** Sets FAILED. The device may be gone: the error that led here is the one to report. */
function giveUp(transport: VirtioTransport): void {
  if (transport.gone) return;
  try {
    transport.writeStatus(transport.readStatus() | DeviceStatus.FAILED);
  } catch {
    // Nothing more can be done to a device that does not answer.
  }
}

/** Features that a driver of any device type takes when they are offered: nothing depends on what they are used for. */
export const GENERIC_FEATURES = FeatureSet.of(
  Feature.VERSION_1,
  Feature.ACCESS_PLATFORM,
  Feature.ORDER_PLATFORM,
  Feature.INDIRECT_DESC,
  Feature.EVENT_IDX,
  Feature.RING_PACKED,
  Feature.IN_ORDER,
  Feature.NOTIFICATION_DATA,
  Feature.NOTIF_CONFIG_DATA,
  Feature.RING_RESET,
);
