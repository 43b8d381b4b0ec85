/**
 * What the demo found, as data: numbers, and the checks that they must pass.
 */
import type { Where } from '../../src/index.ts';
import type { StationCounters } from './station.ts';
import type { TsharkVerdict } from './tshark.ts';

/** A number that must be what it is expected to be. */
export interface Check {
  readonly what: string;
  readonly expected: number | string;
  readonly actual: number | string;
}

export interface SaReport {
  readonly station: string;
  readonly name: string;
  readonly direction: string;
  readonly spi: number;
  readonly where: Where;
  readonly because: string;
  readonly packets: bigint;
  readonly bytes: bigint;
  readonly dropped: Readonly<Record<string, number>>;
}

export interface DirectionReport {
  readonly name: string;
  /** Who protects and who verifies. */
  readonly protectedBy: Where;
  readonly verifiedBy: Where;
  readonly sent: Pick<StationCounters, 'sent' | 'sentBytes' | 'sentProtected'>;
  readonly arrived: Pick<StationCounters, 'received' | 'receivedBytes' | 'verified' | 'clear' | 'unexpected'>;
  /** What the receiver refused, by reason. */
  readonly refused: Readonly<Record<string, number>>;
}

export interface DemoReport {
  readonly ok: boolean;
  /** Of traffic, start-up not counted. */
  readonly seconds: number;
  readonly packetsPerSecond: number;
  readonly megabitsPerSecond: number;
  readonly directions: readonly DirectionReport[];
  readonly sas: readonly SaReport[];
  readonly wire: { readonly frames: number; readonly esp: number; readonly clear: number };
  /** `null`: tshark is not installed. */
  readonly tshark: TsharkVerdict | null;
  readonly checks: readonly (Check & { readonly ok: boolean })[];
  /** Files that were left on request. */
  readonly files: readonly string[];
}

/** Marks each check as passed or failed. */
export function judge(checks: readonly Check[]): DemoReport['checks'] {
  return checks.map((check) => ({ ...check, ok: check.expected === check.actual }));
}
