/**
 * How a NIC ends, whatever its device does: each step is taken though others fail. The function is closed last, and with it goes all that the device would
 * not let go of.
 */
import { VipsecError } from '../errors.ts';
import type { DeviceFunction } from '../vfio/function.ts';
import type { AdminQueue } from '../virtio/admin.ts';
import { resetDevice } from '../virtio/initialize.ts';
import type { VirtioTransport } from '../virtio/transport.ts';
import type { NicRings } from './rings.ts';

/** Takes all steps; then throws what failed first, if anything did. */
export function takeAll(steps: readonly (() => void)[]): void {
  let failed = false;
  let first: unknown = null;
  for (const step of steps) {
    try {
      step();
    } catch (error) {
      if (!failed) first = error;
      failed = true;
    }
  }
  if (failed) throw first;
}

/** Resets the device if it still answers, and gives everything back that it had. Refusals of the device are not thrown. */
export async function release(
  fn: Pick<DeviceFunction, 'gone' | 'close'>,
  transport: VirtioTransport | null,
  rings: Pick<NicRings, 'close'> | null,
  admin: Pick<AdminQueue, 'close'> | null,
  resetTimeout: number,
): Promise<void> {
  if (transport !== null && !fn.gone) {
    // A device that does not finish its reset loses its DMA mappings below.
    await resetDevice(transport, resetTimeout).catch(() => {});
  }
  try {
    takeAll([() => admin?.close(), () => rings?.close(), () => fn.close()]);
  } catch (error) {
    if (!(error instanceof VipsecError)) throw error;
  }
}
