/**
 * What stands in the way of an SA besides the SA itself: what the device can do, and which other SAs there are.
 */
import { IpsecError } from '../errors.ts';
import type { InlineIpsec } from './inline.ts';
import type { SecurityAssociation } from './sa.ts';
import type { SaRegistry } from './sa-registry.ts';

export class Obstacles {
  readonly #noInline: string | null;
  readonly #device: Pick<InlineIpsec, 'obstacle' | 'hasInbound'> | null;
  readonly #registry: SaRegistry;

  /** `noInline`: why nothing runs inline, or null. */
  constructor(
    noInline: string | null,
    device: Pick<InlineIpsec, 'obstacle' | 'hasInbound'> | null,
    registry: SaRegistry,
  ) {
    this.#noInline = noInline;
    this.#device = device;
    this.#registry = registry;
  }

  /** Why an SA cannot run inline, or null. With `isThere` it runs in software now, and counts as one of those there. */
  inline(sa: SecurityAssociation, isThere = false): string | null {
    return this.#noInline ?? this.#device?.obstacle(sa) ?? this.#twin(sa, isThere);
  }

  /** The device would get the packets of both. */
  #twin(sa: SecurityAssociation, isThere: boolean): string | null {
    if (sa.direction === 'outbound' || this.#registry.twins(sa) <= (isThere ? 1 : 0)) return null;
    return `${isThere ? 'another' : 'a'} software SA has the same SPI`;
  }

  /**
   * The device finds an inbound SA by SPI alone, so a second one with the same SPI would get the first one's packets: throws IpsecError
   * `SA_EXISTS`.
   */
  refuseDuplicate(sa: SecurityAssociation): void {
    if (sa.direction === 'inbound' && this.#device?.hasInbound(sa) === true) {
      const spi = `0x${sa.spi.toString(16)}`;
      throw new IpsecError('SA_EXISTS', `an inbound SA with SPI ${spi} is on the device`, { path: 'sa.spi' });
    }
  }
}
