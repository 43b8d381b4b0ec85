/**
 * What the control thread and the owner of a queue say to each other. A command has a number, and its answer the same; commands are carried
 * out in order, between two bursts. The keys of an SA do not travel in messages, whose copies nobody could wipe, but in shared memory: see `sa-parcel.ts`.
 */
import type { SaEvents } from '../ipsec/ipsec.ts';
import type { SaEntry, SaProgress } from '../ipsec/sa-thread.ts';
import type { ArenaHandle } from './arena-loans.ts';

export type Command =
  | { readonly name: 'add'; readonly entry: SaEntry }
  /** Answered by what the SA's next sequence number was. */
  | { readonly name: 'modify'; readonly entry: SaEntry; readonly rekeyed: boolean }
  /** Answered by the SA's next sequence number, if it ran in software and sent; null otherwise. */
  | { readonly name: 'remove'; readonly handle: number }
  /** Answered by how far the SA has come; from then on the thread does not have it. */
  | { readonly name: 'take'; readonly handle: number }
  /** What has become of a `register`. */
  | { readonly name: 'granted'; readonly request: number; readonly result: Granted }
  /** Answered by how many packets the device has not sent yet. */
  | { readonly name: 'unsent' }
  /** To let go; there is no answer but `released`. */
  | { readonly name: 'look' };

/** Memory that was registered for the thread, or why not. */
export type Granted = ArenaHandle | { readonly code: string; readonly message: string };

export interface CommandMessage {
  readonly id: number;
  /** A command is carried out by whoever takes its ticket, or never if the sender has taken it back. */
  readonly ticket: SharedArrayBuffer;
  readonly command: Command;
}

export function makeTicket(): SharedArrayBuffer {
  return new SharedArrayBuffer(4);
}

/** True for one caller, of either side. */
export function takeTicket(ticket: SharedArrayBuffer): boolean {
  return Atomics.exchange(new Int32Array(ticket), 0, 1) === 0;
}

export type Answer = bigint | number | SaProgress | null;

export type WorkerMessage =
  | { readonly type: 'answer'; readonly id: number; readonly value: Answer }
  | { readonly type: 'failure'; readonly id: number; readonly code: string; readonly message: string }
  /** The queue was opened. */
  | { readonly type: 'opened' }
  | { readonly type: 'broken'; readonly code: string; readonly message: string }
  | {
      readonly type: 'event';
      readonly handle: number;
      readonly event: keyof SaEvents;
      readonly args: SaEvents[keyof SaEvents];
    }
  /** Asks for memory of the application to be registered; answered by a command. */
  | {
      readonly type: 'register';
      readonly request: number;
      readonly fd: number;
      readonly offset: number;
      readonly size: number;
    }
  /** The thread has no use for an arena any more. */
  | { readonly type: 'arena'; readonly id: number }
  /**
   * The last one: nothing of the queue is used any more. Next sequence numbers of the SAs that sent in software; arenas of which pieces may
   * still be in the ring; whether the device has sent all that was in it.
   */
  | {
      readonly type: 'released';
      readonly sequences: ReadonlyMap<number, bigint>;
      readonly arenas: readonly number[];
      readonly isSent: boolean;
    };
