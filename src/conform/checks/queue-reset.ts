/** Resetting a single virtqueue (Virtio 1.4, 2.6.1), for the checks that do so. */
import { CommonCfgField as F } from '../../virtio/pci-layout.ts';
import type { Bench } from '../bench.ts';
import { expect } from '../check.ts';

/** Writes 1 to `queue_reset`, and waits until the reset is over (4.1.5.1.3). */
export async function resetQueue(bench: Bench, index: number): Promise<void> {
  const { common } = bench.target.structures;
  common.write16(F.queueSelect, index);
  common.write16(F.queueReset, 1);
  await bench.eventually(() => common.read16(F.queueReset) === 0, `queue_reset of queue ${index} does not return to 0`);
  const enabled = common.read16(F.queueEnable);
  bench.log(`queue ${index}: wrote 1 to queue_reset, queue_enable reads ${enabled}`);
  expect(enabled === 0, `queue_enable of queue ${index} reads ${enabled} after the reset of the queue`);
}
