/** What follows from an SA: small questions that the manager of SAs asks. */
import type { SaEvent } from '../fallback/lifetime.ts';
import { encapsulationOf, largestInner } from '../fallback/pmtu.ts';
import { isRestrictive } from '../fallback/selector.ts';
import { Ipv4, Ipv6 } from '../packet/fields.ts';
import type { SaEvents } from './ipsec.ts';
import { keyId } from './key-id.ts';
import type { Where } from './placement.ts';
import type { SecurityAssociation } from './sa.ts';
import { SaPlace } from './sa-state.ts';

/** Where the packets of an SA go that is in that place. */
export function placeOf(sa: SecurityAssociation, where: Where): SaPlace {
  if (sa.direction === 'outbound') return where === 'inline' ? SaPlace.inlineOutbound : SaPlace.softwareOutbound;
  return where === 'inline' ? SaPlace.inlineInbound : SaPlace.softwareInbound;
}

/** How a device finds an inbound SA. */
export function identityOf(sa: Pick<SecurityAssociation, 'protocol' | 'spi'>): string {
  return `${sa.protocol} ${sa.spi}`;
}

/** The selector that decapsulated packets of an inline inbound SA must fit: the device does not check it. */
export function selectorOf(sa: SecurityAssociation): SecurityAssociation['selector'] | null {
  return sa.direction === 'inbound' && isRestrictive(sa.selector) ? sa.selector : null;
}

/**
 * What nonces an SA in software will have that is modified to `sa`, with another key, and had the key `before` (`keyId`): under an authenticator that
 * stays the sequence numbers go on, and IVs are sequence numbers, wherever those are; else they begin where `sa` says.
 */
export function withNonces(sa: SecurityAssociation, before: string): SecurityAssociation {
  return keyId(sa) === before ? { ...sa, initial: { sequence: 1n } } : sa;
}

/** The longest IP packet that still fits the link when `sa` protects it, whichever IP version it has. */
export function longestFrame(sa: SecurityAssociation, mtu: number): number {
  if (sa.direction === 'inbound') return 0;
  const how = encapsulationOf(sa);
  return Math.min(largestInner(how, mtu, Ipv4.minLength), largestInner(how, mtu, Ipv6.length));
}

/** What software IPsec tells, in the words of `SaEvents`. */
export function eventOf(event: SaEvent): readonly [keyof SaEvents, SaEvents[keyof SaEvents]] {
  if (event === 'soft-packets') return ['soft-expiry', ['packets']];
  if (event === 'soft-bytes') return ['soft-expiry', ['bytes']];
  if (event === 'hard-packets') return ['hard-expiry', ['packets']];
  if (event === 'hard-bytes') return ['hard-expiry', ['bytes']];
  return [event, []];
}
