/** The guest as a place for bodies: NICs behind the kernel's VFIO, wires that end on the host (`serveWires`). */
import { bindFunction } from '../../src/vfio/bind.ts';
import type { Place } from '../bodies/place.ts';
import type { WireAnswer } from '../bodies/wire.ts';
import type { WireNote } from '../host/wire.ts';
import type { Guest } from './guest.ts';

const FIRST_RECEIVE_VECTOR = 1;

/** The function `id` as a place, bound to vfio-pci. */
export function guestPlace(guest: Guest, id: string, check: Place['check'] = guest.check.bind(guest)): Place {
  const address = guest.address(id);
  bindFunction(address);
  return {
    address,
    check,
    wire: async (request) => {
      tell(guest, { nic: id, request });
      return answerOf(await guest.hear(`wire ${id}`));
    },
    interrupts: (pair) => countInterrupts(guest.read('/proc/interrupts'), address, FIRST_RECEIVE_VECTOR + pair),
  };
}

/** No body needs a wire any more. */
export function endWires(guest: Guest): void {
  tell(guest, null);
}

function tell(guest: Guest, note: WireNote): void {
  guest.tell('wire', note);
}

function answerOf(body: unknown): WireAnswer {
  if (typeof body !== 'object' || body === null) throw new Error('the wire does not answer');
  if ('error' in body) throw new Error(`on the wire: ${String(body.error)}`);
  return 'answer' in body && typeof body.answer === 'object' && body.answer !== null ? body.answer : {};
}

/** What the kernel has counted of MSI-X vector `vector` of a function that VFIO has: ` 31: 4 0 PCI-MSI … vfio-msix[1](0000:01:00.0)`. */
export function countInterrupts(table: string, address: string, vector: number): number {
  const line = table.split('\n').find((text) => text.includes(`vfio-msix[${vector}](${address})`));
  const counts = /^\s*\d+:((?:\s+\d+)+)\s/.exec(line ?? '')?.[1] ?? '';
  return counts
    .trim()
    .split(/\s+/)
    .reduce((sum, count) => sum + Number(count), 0);
}
