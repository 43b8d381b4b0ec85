/**
 * What a queue pair's two threads share besides messages: a few words, and the counters of the queue. Each word has one writer, but for the
 * owner, which changes by compare-and-exchange.
 *
 * `attention` is what makes messages reach a thread that polls its rings and never comes to its event loop: the control thread adds
 * one after whatever it has sent, and the worker looks at the word once per burst, with a plain load: a burst calls Atomics, so the compiler
 * cannot keep an old value.
 *
 * Counters are 64-bit floating-point numbers, which are stored and loaded in one access: whoever sums them up while traffic runs sees each
 * one as it was a moment ago.
 */
import { VERDICTS } from '../fallback/verdict.ts';
import { RX_COUNTERS } from '../virtio-net/rx.ts';
import { TX_COUNTERS } from '../virtio-net/tx.ts';

/** Who has the queue. */
export const Owner = {
  /** The handle was made, and nobody has opened it yet. */
  offered: 0,
  worker: 1,
  /** The worker has let go, or the control thread has taken the handle back. */
  none: 2,
} as const;

/** What the control thread wants. */
export const Wish = {
  run: 0,
  /** The device is lost: the rings are not touched any more. */
  stop: 1,
  /** The memory goes: all is to be let go. */
  close: 2,
} as const;

/** Indices of 32-bit words. Those that different threads write are a cache line apart. */
const Word = { owner: 0, attention: 16, wish: 17, reasonLength: 18, tenancy: 19, rxNext: 32, txNext: 33 } as const;
const REASON = { at: 192, max: 832 } as const;
const COUNTERS_AT = 1024;
const LENGTHS = [RX_COUNTERS, VERDICTS, TX_COUNTERS, VERDICTS];
const BYTES = COUNTERS_AT + 8 * LENGTHS.reduce((a, b) => a + b);

/** The counters of a queue pair; one thread writes. */
export interface PairCounters {
  readonly rx: { readonly counters: Float64Array; readonly dropped: Float64Array };
  readonly tx: { readonly counters: Float64Array; readonly dropped: Float64Array };
}

/** Why a queue ends, as it is told to the worker. */
export interface Reason {
  readonly code: string;
  readonly message: string;
}

export class ControlBlock {
  readonly buffer: SharedArrayBuffer;
  readonly counters: PairCounters;
  /** For the data path, which looks at `[ATTENTION]`. */
  readonly words: Int32Array;

  constructor(buffer: SharedArrayBuffer = new SharedArrayBuffer(BYTES)) {
    this.buffer = buffer;
    this.words = new Int32Array(buffer, 0, COUNTERS_AT / 4);
    let at = COUNTERS_AT;
    const [rx, rxDropped, tx, txDropped] = LENGTHS.map((length) => {
      const array = new Float64Array(buffer, at, length);
      at += 8 * length;
      return array;
    });
    this.counters = { rx: { counters: rx, dropped: rxDropped }, tx: { counters: tx, dropped: txDropped } };
  }

  get owner(): number {
    return Atomics.load(this.words, Word.owner);
  }

  /** From one owner to the next; false when it was another. */
  pass(from: number, to: number): boolean {
    return Atomics.compareExchange(this.words, Word.owner, from, to) === from;
  }

  /** Stands for this handing over: what was meant for another one is told by it. Written before the handle is posted. */
  get tenancy(): number {
    return Atomics.load(this.words, Word.tenancy);
  }

  set tenancy(token: number) {
    Atomics.store(this.words, Word.tenancy, token);
  }

  /** Makes the worker look at its messages, and at `wish`. */
  callAttention(): void {
    Atomics.add(this.words, ATTENTION, 1);
  }

  get attention(): number {
    return Atomics.load(this.words, ATTENTION);
  }

  get wish(): number {
    return Atomics.load(this.words, Word.wish);
  }

  /** Says what is wanted and why; the first reason stays. A wish never becomes less. */
  ask(wish: number, reason: Reason): void {
    if (this.wish === Wish.run) this.#writeReason(reason);
    Atomics.store(this.words, Word.wish, Math.max(wish, this.wish));
    this.callAttention();
  }

  /** Null while nothing is wanted. */
  get reason(): Reason | null {
    if (this.wish === Wish.run) return null;
    const length = Math.min(Atomics.load(this.words, Word.reasonLength), REASON.max);
    const text = new TextDecoder().decode(new Uint8Array(this.buffer, REASON.at, length).slice());
    const at = text.indexOf(' ');
    return { code: text.slice(0, at), message: text.slice(at + 1) };
  }

  #writeReason({ code, message }: Reason): void {
    const bytes = new TextEncoder().encode(`${code} ${message}`).subarray(0, REASON.max);
    new Uint8Array(this.buffer, REASON.at, REASON.max).set(bytes);
    Atomics.store(this.words, Word.reasonLength, bytes.length);
  }

  /** Where a ring stands, for a notification that the control thread makes in place of the worker (Virtio 1.4, 2.9). */
  position(which: 'rx' | 'tx'): { next: number } {
    const { words } = this;
    const word = which === 'rx' ? Word.rxNext : Word.txNext;
    return {
      get next() {
        return Atomics.load(words, word);
      },
      set next(value) {
        Atomics.store(words, word, value);
      },
    };
  }
}

/** Index in `ControlBlock.words`. */
export const ATTENTION = Word.attention;
