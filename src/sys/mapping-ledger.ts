/**
 * What a thread has mapped, written down in shared memory: when the thread ends without a chance to clean up, another one knows where
 * its memory was, with the keys in it, and takes it away. One thread writes; nobody reads before it has ended.
 */

/** A crypto engine and a queue pair take about ten. What does not fit is not written down. */
const ENTRIES = 512;

export class MappingLedger {
  readonly buffer: SharedArrayBuffer;
  /** Addresses, 0 where there is none; and behind them sizes. */
  readonly #words: Float64Array;

  constructor(buffer: SharedArrayBuffer = new SharedArrayBuffer(16 * ENTRIES)) {
    this.buffer = buffer;
    this.#words = new Float64Array(buffer);
  }

  add(address: number, size: number): void {
    const at = this.#words.subarray(0, ENTRIES).indexOf(0);
    if (at < 0) return;
    this.#words[ENTRIES + at] = size;
    this.#words[at] = address;
  }

  remove(address: number): void {
    const at = this.#words.subarray(0, ENTRIES).indexOf(address);
    if (at >= 0) this.#words[at] = 0;
  }

  get entries(): { readonly address: number; readonly size: number }[] {
    const words = this.#words;
    const all: { address: number; size: number }[] = [];
    for (let i = 0; i < ENTRIES; i++) if (words[i] !== 0) all.push({ address: words[i], size: words[ENTRIES + i] });
    return all;
  }
}

/** Those of the queues that are open in this thread. The first one is written to. */
const open: MappingLedger[] = [];

/** From now on what this thread maps is written down, in one ledger if there are several. */
export function keepLedger(ledger: MappingLedger): void {
  open.push(ledger);
}

/** What is left in the ledger goes on in another one, if there is another. */
export function dropLedger(ledger: MappingLedger): void {
  const at = open.indexOf(ledger);
  if (at < 0) return;
  open.splice(at, 1);
  for (const { address, size } of ledger.entries) {
    ledger.remove(address);
    open[0]?.add(address, size);
  }
}

/** The thread has mapped memory. */
export function noteMapped(address: number, size: number): void {
  open[0]?.add(address, size);
}

export function noteUnmapped(address: number): void {
  open[0]?.remove(address);
}
