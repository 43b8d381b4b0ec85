/**
 * Opens a PCI function in a process of its own and says on stdout how that went, as one JSON document:
 * `node open-function.js ADDRESS [BYTES [hold]]`. With BYTES it allocates DMA memory; with `hold` it stays until its
 * stdin ends.
 */
import { once } from 'node:events';
import { openKernelVfio } from '../../src/vfio/kernel.ts';

const [address = '', bytes = '0', hold] = process.argv.slice(2);
try {
  const fn = openKernelVfio(address, { hugePages: false });
  if (Number(bytes) > 0) fn.allocateDma(Number(bytes));
  process.stdout.write(`${JSON.stringify({ opened: true })}\n`);
  if (hold === 'hold') await once(process.stdin.resume(), 'end');
  fn.close();
} catch (error) {
  const { code, hint, message } = Object(error);
  process.stdout.write(`${JSON.stringify({ opened: false, code, hint, message })}\n`);
}
