/**
 * Where something happens in the life of an inline SA: its limits, and the end of its sequence numbers, as counts of what it has carried.
 */
import { SEQUENCE_LOW } from '../fallback/sequence.ts';
import type { Lifetime, SecurityAssociation } from './sa.ts';

/**
 * The limits of one inline SA, as counts of what it has carried since it was made; `Infinity` is none. SAs without limits of their own
 * share one object.
 */
export interface Limits {
  /** What had been carried when its key was set: limits are those of a key. */
  readonly packetsBefore: number;
  readonly bytesBefore: number;
  readonly softPackets: number;
  readonly softBytes: number;
  readonly hardPackets: number;
  readonly hardBytes: number;
  /** Outbound: `sequence-low`, and the packet with the last number. Inbound: `Infinity`. */
  readonly lowAt: number;
  readonly lastAt: number;
}

const SEQUENCE_SPACE_32 = 1n << 32n;
const SEQUENCE_SPACE_64 = 1n << 64n;

/** Sequence numbers that an SA has from its first one on; an inbound one has no end. */
export function numbersOf(sa: SecurityAssociation): number {
  if (sa.direction === 'inbound') return Number.POSITIVE_INFINITY;
  return Number((sa.options.esn ? SEQUENCE_SPACE_64 : SEQUENCE_SPACE_32) - sa.initial.sequence);
}

/** The limits of a key with which the SA begins when it has carried so much; `lastAt` is the packet with the last number. */
export function limitsOf(packetsBefore: number, bytesBefore: number, lastAt: number, lifetime: Lifetime): Limits {
  const { softPackets, softBytes, hardPackets, hardBytes } = lifetime;
  const usual = (softPackets | softBytes | hardPackets | hardBytes) === 0n && packetsBefore === 0 && bytesBefore === 0;
  const shared = usual ? USUAL_LIMITS.find((one) => one.lastAt === lastAt) : undefined;
  return shared ?? makeLimits(packetsBefore, bytesBefore, lastAt, lifetime);
}

/** A limit as a number; 0 is none. */
function atLeast(limit: bigint): number {
  return limit === 0n ? Number.POSITIVE_INFINITY : Number(limit);
}

function makeLimits(packetsBefore: number, bytesBefore: number, lastAt: number, lifetime: Lifetime): Limits {
  return {
    packetsBefore,
    bytesBefore,
    softPackets: packetsBefore + atLeast(lifetime.softPackets),
    softBytes: bytesBefore + atLeast(lifetime.softBytes),
    hardPackets: packetsBefore + atLeast(lifetime.hardPackets),
    hardBytes: bytesBefore + atLeast(lifetime.hardBytes),
    lowAt: lastAt - Number(SEQUENCE_LOW),
    lastAt,
  };
}

/** The limits of SAs that begin with 1 and have no lifetime: outbound without and with ESN, inbound. */
const USUAL_LIMITS: readonly Limits[] = [
  Number(SEQUENCE_SPACE_32 - 1n),
  Number(SEQUENCE_SPACE_64 - 1n),
  Number.POSITIVE_INFINITY,
].map((lastAt) => makeLimits(0, 0, lastAt, { softPackets: 0n, softBytes: 0n, hardPackets: 0n, hardBytes: 0n }));
