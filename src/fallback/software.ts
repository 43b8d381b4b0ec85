/**
 * ESP and AH in software, for bursts of packet numbers (RFC 4301 to 4303).
 *
 * Signatures first: the inside is in work.
 */
import type { SecurityAssociation } from '../ipsec/sa.ts';
import type { PacketPool } from '../packet/pool.ts';
import type { CryptoEngine, EngineName } from './engines/engine.ts';

/** What the user is told about an SA, once each. */
export type SaEvent =
  | 'soft-packets'
  | 'soft-bytes'
  | 'hard-packets'
  | 'hard-bytes'
  | 'sequence-low'
  | 'sequence-overflow';

export interface SoftwareIpsecOptions {
  /** Which engine; `auto` (the default) picks per transform the fastest that can do it. Or engines that the caller made and owns. */
  readonly engine?: 'auto' | EngineName | readonly CryptoEngine[];
  /** Called after the burst in which it happened; must not throw. It may add, modify and remove SAs. */
  readonly onEvent?: (handle: number, event: SaEvent) => void;
}

/** Counters of one SA. Bytes are those of the IP packet without protection (tunnel mode: the inner packet). */
export interface SaCounters {
  readonly packets: bigint;
  readonly bytes: bigint;
  /** Packets dropped on this SA, by `Verdict` number. */
  readonly dropped: Readonly<Record<string, number>>;
  /** Outbound: number of the next packet. Inbound: highest number accepted. */
  readonly sequence: bigint;
  /** What does the arithmetic, such as `ipsec-mb`. */
  readonly engine: EngineName;
  /** A soft limit has been reached. */
  readonly softExpired: boolean;
}

export declare class SoftwareIpsec {
  constructor(pool: PacketPool, options?: SoftwareIpsecOptions);
  /** Handles are 1 to 2^24 - 1, chosen by the caller. Throws IpsecError (`HANDLE_IN_USE`, `SA_EXISTS`, `TRANSFORM_UNSUPPORTED`). */
  add(handle: number, sa: SecurityAssociation): void;
  /** Switches to new parameters between two bursts, or throws and leaves the old ones in force. */
  modify(handle: number, sa: SecurityAssociation): void;
  remove(handle: number): void;
  counters(handle: number): SaCounters;
  /** Largest inner packet, in bytes, that fits a link of `mtu` bytes (RFC 4301, 8.2). */
  largestInner(handle: number, mtu: number): number;
  /** Refuse packets (`Verdict.tooBig`) that do not fit `mtu`; 0 is no limit. */
  setMtu(handle: number, mtu: number): void;
  /** Outbound: the SA of packet p is pool.sa[p]; 0 is left alone. In place; offset and length are updated. */
  protect(packets: Uint32Array, n: number, linkHeader: number, verdicts: Uint8Array): void;
  /** Inbound: finds the SA; sets pool.sa[p] and PacketFlag.secured. In place; offset and length are updated. */
  unprotect(packets: Uint32Array, n: number, linkHeader: number, verdicts: Uint8Array): void;
  /** Whether an outbound packet matches the selector of an SA is `selectorMatches` in selector.ts. */
  close(): void;
}
