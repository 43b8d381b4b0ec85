/**
 * The part of a bring-up report that is about octeon_ep class functions: each step from the PCI ids to queues that the firmware acknowledges,
 * with what was read and what was expected, up to the one that fails.
 */
import { VipsecError, VirtioError } from '../errors.ts';
import type { PciFunction } from '../vfio/function.ts';
import { FEATURE_BITS, featureName } from '../virtio/features.ts';
import { resetDevice } from '../virtio/initialize.ts';
import { openOctepTransport } from '../virtio/octep.ts';
import type { BringUpStep } from '../virtio/octep-bring-up.ts';
import { OCTEP_REQUIRED, type OctepModel } from '../virtio/octep-layout.ts';
import type { VirtioTransport } from '../virtio/transport.ts';

export interface OctepReport {
  /** `CN106K`. */
  readonly model: string;
  readonly virtualFunction: boolean;
  /** Whether the firmware emulates virtio; null when that could not be seen. The ids do not tell. */
  speaksVirtio: boolean | null;
  readonly steps: BringUpStep[];
}

/** Bits that firmware of before Virtio 1.4 has. */
const OLD_FEATURE_BITS = 64;
/** A receive and a transmit queue. */
const LEAST_QUEUES = 2;
const FIRMWARE_HINT = 'Restart the virtio application of the DPU: its control thread polls this window.';
const FEATURE_HINT =
  'The firmware is of another version, or emulates another device: such a function has packed rings and notifications with data, and no others.';

/**
 * Takes all steps that `report` is to have, with `timeout` milliseconds for the ready mark and for the reset; the transport if it got that far.
 * Throws what the step that failed did.
 */
export async function walkOctep(fn: PciFunction, report: OctepReport, timeout: number): Promise<VirtioTransport> {
  const { steps } = report;
  const onStep = (step: BringUpStep): void => {
    steps.push(step);
    if (step.step.startsWith('firmware signature')) report.speaksVirtio = step.ok;
  };
  const transport = await openOctepTransport(fn, { readyTimeout: timeout, onStep });
  await attempt(
    steps,
    { step: 'reset (device_status = 0x80)', expected: `device_status 0 within ${timeout} ms` },
    () => resetDevice(transport, timeout),
    () => 'device_status 0',
  );
  const features = await attempt(
    steps,
    { step: 'feature selection', expected: 'every word acknowledged' },
    () => transport.readDeviceFeatures(),
    (offered) => `${offered.bits().length} features`,
  );
  const missing = OCTEP_REQUIRED.minus(features);
  const required = OCTEP_REQUIRED.names().join(', ');
  steps.push({
    step: 'required features',
    expected: required,
    read: missing.isEmpty ? 'all of them' : `not offered: ${missing.names().join(', ')}`,
    ok: missing.isEmpty,
    ...(missing.isEmpty ? {} : { hint: FEATURE_HINT }),
  });
  const upper = features.bits().filter((bit) => bit >= OLD_FEATURE_BITS);
  steps.push({
    step: `features ${OLD_FEATURE_BITS} to ${FEATURE_BITS - 1}`,
    expected: 'of their own, where IPsec is to be offloaded',
    read: upper.length > 0 ? upper.map(featureName).join(', ') : 'none: IPsec runs in software',
    ok: true,
  });
  await attempt(
    steps,
    { step: 'queue selection', expected: `${LEAST_QUEUES} queues or more, each acknowledged` },
    () => readQueueSizes(transport),
    (sizes) => `${sizes.length} queues of up to ${[...new Set(sizes)].join(', ')} descriptors`,
  );
  return transport;
}

export function octepReport({ name, virtual }: OctepModel): OctepReport {
  return { model: name, virtualFunction: virtual, speaksVirtio: null, steps: [] };
}

function readQueueSizes(transport: VirtioTransport): number[] {
  const count = transport.queueCount();
  if (count < LEAST_QUEUES) throw new VirtioError('QUEUE_COUNT', `${transport.address}: num_queues is ${count}`);
  return Array.from({ length: count }, (_, index) => transport.maxQueueSize(index));
}

/** Runs one step; `show` says what was read. */
async function attempt<T>(
  steps: BringUpStep[],
  { step, expected }: Pick<BringUpStep, 'step' | 'expected'>,
  work: () => T | Promise<T>,
  show: (value: T) => string,
): Promise<T> {
  try {
    const value = await work();
    steps.push({ step, expected, read: show(value), ok: true });
    return value;
  } catch (error) {
    if (error instanceof VipsecError)
      steps.push({ step, expected, read: error.message, ok: false, hint: FIRMWARE_HINT });
    throw error;
  }
}
