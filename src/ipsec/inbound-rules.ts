/**
 * The flow filter rules that lead inbound packets to IPsec processing on the device (Virtio 1.4, 5.1.6.5.7 and "IPsec Operation").
 *
 * A rule names no SA: the device finds it by SPI. ESP has a rule per SA with its SPI, and its destination where the SA and the device know it.
 * AH and UDP-encapsulated ESP have no selector for the SPI, so one rule with the protocol, or with the port, serves all such SAs. An SA
 * whose IP version nobody knows has a rule for each.
 */
import { IpProtocol } from '../packet/fields.ts';
import type { FlowFilter, FlowGroupHandle, FlowRuleHandle } from '../virtio-net/flow-filter.ts';
import type { FlowMatch, IpMatch } from '../virtio-net/flow-match.ts';
import type { SecurityAssociation } from './sa.ts';

/** Priority of the group that holds these rules: groups of an application may stand above and below. */
export const IPSEC_GROUP_PRIORITY = 0x8000;

/** The parts of `FlowFilter` that are used. */
export type RuleMaker = Pick<FlowFilter, 'obstacle' | 'addGroup' | 'addRule' | 'removeRule'>;

/** A rule that serves several SAs. */
interface SharedRule {
  readonly text: string;
  readonly rule: Promise<FlowRuleHandle>;
  users: number;
}

/** The rules of one SA, to be given back: its own, and those that it shares. */
export type SaRules = readonly (FlowRuleHandle | SharedRule)[];

export class InboundRules {
  readonly #filter: RuleMaker;
  #group: Promise<FlowGroupHandle> | null = null;
  readonly #rules = new Map<string, SharedRule>();

  constructor(filter: RuleMaker) {
    this.#filter = filter;
  }

  /** Why no rule of the device leads packets of `sa` to IPsec processing, or null. */
  obstacle(sa: SecurityAssociation): string | null {
    let obstacle: string | null = null;
    for (const rules of this.#matches(sa)) {
      obstacle = rules.map((match) => this.#filter.obstacle(match, 'ipsec')).find((why) => why !== null) ?? null;
      if (obstacle === null) break;
    }
    return obstacle;
  }

  /** Makes the rules of `sa`, or shares those that are there. Throws what `FlowFilter` throws; then none is left behind. */
  async add(sa: SecurityAssociation): Promise<SaRules> {
    const ways = this.#matches(sa);
    const possible = ways.find((rules) => rules.every((match) => this.#filter.obstacle(match, 'ipsec') === null));
    const taken: (FlowRuleHandle | SharedRule)[] = [];
    try {
      for (const match of possible ?? ways[0]) {
        if (match.esp !== undefined) {
          taken.push(await this.#make(match));
          continue;
        }
        const shared = this.#share(match);
        taken.push(shared);
        await shared.rule;
      }
      return taken;
    } catch (error) {
      await this.remove(taken).catch(() => {});
      throw error;
    }
  }

  /** Gives the rules of an SA back; those that no other SA uses are destroyed. */
  async remove(rules: SaRules): Promise<void> {
    for (const shared of rules) {
      if (!('users' in shared)) {
        await this.#filter.removeRule(shared);
        continue;
      }
      shared.users--;
      if (shared.users > 0) continue;
      this.#rules.delete(shared.text);
      const rule = await shared.rule.catch(() => null);
      if (rule !== null) await this.#filter.removeRule(rule);
    }
  }

  #share(match: FlowMatch): SharedRule {
    const text = JSON.stringify(match, (_key, value: unknown) => (value instanceof Uint8Array ? [...value] : value));
    let shared = this.#rules.get(text);
    if (shared === undefined) {
      shared = { text, rule: this.#make(match), users: 0 };
      this.#rules.set(text, shared);
    }
    shared.users++;
    return shared;
  }

  async #make(match: FlowMatch): Promise<FlowRuleHandle> {
    this.#group ??= this.#filter.addGroup(IPSEC_GROUP_PRIORITY);
    const making = this.#group;
    const group = await making.catch((error: unknown) => {
      if (this.#group === making) this.#group = null;
      throw error;
    });
    return this.#filter.addRule({ group, match, action: 'ipsec' });
  }

  /** Ways to match the packets of `sa`, the most exact first; each is a list of rules that are all needed. */
  #matches(sa: SecurityAssociation): FlowMatch[][] {
    const destination = outerDestination(sa);
    if (destination === null) return [[matchOf(sa, 4, {}), matchOf(sa, 6, {})]];
    const version = destination.length === 4 ? 4 : 6;
    return [[matchOf(sa, version, { destination: { address: destination } })], [matchOf(sa, version, {})]];
  }
}

/** The destination address that packets of an inbound SA carry, if the SA says. In transport mode it is the selector's. */
function outerDestination(sa: SecurityAssociation): Uint8Array | null {
  if (sa.tunnel !== undefined) return sa.tunnel.destination;
  const prefix = sa.mode === 'transport' ? sa.selector.destination : undefined;
  return prefix !== undefined && prefix.length === prefix.address.length * 8 ? prefix.address : null;
}

function matchOf(sa: SecurityAssociation, version: 4 | 6, ip: IpMatch): FlowMatch {
  const under = (match: IpMatch) => (version === 4 ? { ipv4: match } : { ipv6: match });
  if (sa.protocol === 'ah') return under({ ...ip, protocol: IpProtocol.ah });
  if (sa.udpEncap !== undefined) return { ...under(ip), udp: { destinationPort: sa.udpEncap.destinationPort } };
  return { ...under(ip), esp: { spi: sa.spi } };
}
