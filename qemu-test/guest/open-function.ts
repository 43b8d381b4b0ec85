/**
 * Opens a PCI function in a process of its own, as often as it is asked: `node open-function.js ADDRESS`, a `Helper`. What was opened is closed by
 * the next request, or when the other side disconnects.
 */
import type { PciFunction } from '../../src/vfio/function.ts';
import { openKernelVfio } from '../../src/vfio/kernel.ts';

/** Opens the function and allocates so much DMA memory, in ordinary pages. */
export interface OpenRequest {
  readonly bytes: number;
}

/** How that went; the rest is that of the error. */
export interface OpenAnswer {
  readonly opened: boolean;
  readonly code?: string;
  readonly message?: string;
  readonly hint?: string;
}

const [, , address = ''] = process.argv;
let fn: PciFunction | null = null;

function close(): void {
  fn?.close();
  fn = null;
}

function open(bytes: number): OpenAnswer {
  close();
  try {
    fn = openKernelVfio(address, { hugePages: false });
    fn.allocateDma(bytes);
    return { opened: true };
  } catch (error) {
    close();
    const { code, hint, message } = Object(error);
    return { opened: false, code, hint, message };
  }
}

process.on('message', ({ bytes }: OpenRequest) => process.send?.(open(bytes)));
process.on('disconnect', close);
process.send?.({ ready: true });
