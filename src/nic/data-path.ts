/**
 * What the queues of a NIC share: bursts of packets, with IPsec between the application and the ring. Whoever has SAs has one `DataPathIpsec`
 * for each thread.
 */
import type { InlineIpsec } from '../ipsec/inline.ts';
import type { SoftwareSide } from '../ipsec/own-sas.ts';
import type { SaState } from '../ipsec/sa-state.ts';
import { Ethernet } from '../packet/fields.ts';

/** What is used of the SAs: the parts of `IpsecManager` that are on the data path. Another thread has its own. */
export interface DataPathIpsec {
  readonly state: SaState;
  readonly software: Pick<SoftwareSide, 'protect' | 'unprotect'> | null;
  readonly device: Pick<InlineIpsec, 'awaitsDrain' | 'drained'> | null;
}

export interface NicQueueOptions {
  /** Called whenever a burst finds the ring broken. */
  readonly onBroken?: () => void;
  /** By `Verdict`: where to count what is dropped, for others to see. */
  readonly dropped?: Float64Array;
}

/** Packets that are looked at together; no more than one burst of a crypto engine. */
export const CHUNK = 256;

/** The bytes of link header in front of the IP packet. */
export const LINK_HEADER = Ethernet.length;
