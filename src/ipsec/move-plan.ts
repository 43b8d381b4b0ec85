/**
 * Whether a live SA may move between the device and software, and where its numbers go on. Decides only; `move.ts` does it.
 *
 * An SA has state that only the place where it runs knows: outbound the next sequence number and IV, inbound the replay window. An SA object
 * has no field for it, but for `esn` of the draft, and no command reads it back. So with the key that it has, an SA moves when
 *
 * | direction | from     | to       | allowed                                                                                |
 * |-----------|----------|----------|----------------------------------------------------------------------------------------|
 * | any       | any      | any      | nothing has passed yet                                                                  |
 * | outbound  | inline   | software | never: the device's numbers and IVs are not known                                        |
 * | outbound  | software | inline   | never on virtio-1.4; on the draft with ESN, beyond the last number, unless its IVs count   |
 * | inbound   | any      | any      | without replay window, if the high half of extended numbers is known                     |
 *
 * A counter-mode SA (GCM …) may go to the draft's device when the caller knows that the device uses the sequence number as explicit
 * IV. With a new key everything is allowed: nothing of the old state matters. A windowed inbound SA does not move even if its user would
 * accept replays for a while: the way that loses nothing is a new SA beside the old one (`rekey.ts`).
 */
import type { Where } from './placement.ts';

/**
 * How many sequence numbers are skipped when an outbound SA that sends goes on inline, so that it need not stop while the device makes its object.
 * The receiver's window moves forward by as much (RFC 4303, 3.4.3).
 */
export const SEQUENCE_GAP = 1n << 24n;

const SEQUENCE_END = 1n << 64n;

/** What is known of the SA where it is, and what is asked for. */
export interface MoveFacts {
  readonly direction: 'outbound' | 'inbound';
  readonly to: Where;
  readonly sameKey: boolean;
  /** Whether surely no packet has passed since it is where it is. */
  readonly untouched: boolean;
  /** Its number in the words of `SecurityAssociation.initial`; null when only the device knows. */
  readonly sequence: bigint | null;
  /** The number that it started with where it is. */
  readonly start: bigint;
  readonly esn: boolean;
  /** Replay windows before and after. */
  readonly windows: readonly [number, number];
  /** Whether the device can be told the initial sequence number. */
  readonly hasInitialSequence: boolean;
}

/** Where numbers begin in the new place, `given` being what the caller's SA says; or why it may not move. */
export type MovePlan = { readonly initial: bigint | 'given' } | { readonly refused: string };

export function planMove(facts: MoveFacts): MovePlan {
  if (!facts.sameKey) return { initial: 'given' };
  if (facts.untouched) return { initial: facts.sequence ?? facts.start };
  return facts.direction === 'outbound' ? planOutbound(facts) : planInbound(facts);
}

function planOutbound({ to, sequence, hasInitialSequence }: MoveFacts): MovePlan {
  if (to === 'software' || sequence === null) {
    return { refused: 'only the device knows which sequence numbers and IVs the SA has used' };
  }
  if (!hasInitialSequence) return { refused: 'the device cannot be told at which sequence number the SA goes on' };
  if (sequence + SEQUENCE_GAP >= SEQUENCE_END) return { refused: 'too few sequence numbers are left' };
  return { initial: sequence + SEQUENCE_GAP };
}

function planInbound({ to, sequence, esn, windows, hasInitialSequence }: MoveFacts): MovePlan {
  if (windows[0] !== 0 || windows[1] !== 0) {
    return { refused: 'packets that were accepted already would be accepted again: the replay window cannot move' };
  }
  if (!esn) return { initial: 0n };
  if (sequence === null) return { refused: 'only the device knows the high half of the sequence number' };
  if (to === 'inline' && !hasInitialSequence) {
    // A receiver that starts at 0 takes a number in the lower half of the first 2^32 for what it is.
    if (sequence < 1n << 31n) return { initial: 0n };
    return { refused: 'the device cannot be told the high half of the sequence number' };
  }
  return { initial: sequence };
}
