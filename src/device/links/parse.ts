/** Makes links of what a user writes: `loopback`, `pair`, `pcap:IN,OUT`, `unix:PATH`, `unix-connect:PATH`, `tap:NAME`. */
import { InputError } from '../../errors.ts';
import type { PacketPool } from '../../packet/pool.ts';
import { isInterfaceName } from '../../sys/tun.ts';
import type { Arena } from '../arena.ts';
import type { Link } from './link.ts';
import { loopbackLink, pairLink } from './pair.ts';
import { PcapLink } from './pcap.ts';
import { TapLink } from './tap.ts';
import { UnixLink } from './unix.ts';

export interface LinkContext {
  readonly arena: Arena;
  readonly pool: PacketPool;
  /** Number of functions. */
  readonly functions: number;
  /** Bytes of the largest frame. */
  readonly maxFrame: number;
  /** Told of what a user should know, once each. */
  readonly warn: (text: string) => void;
}

/** One link for each function. Throws InputError `DEVICE_OPTION`, and what opening files and sockets throws. */
export function makeLinks(text: string, context: LinkContext): Link[] {
  const { arena, pool, maxFrame, warn } = context;
  const colon = text.indexOf(':');
  const kind = colon < 0 ? text : text.slice(0, colon);
  const rest = colon < 0 ? '' : text.slice(colon + 1);
  if (kind === 'pair') {
    if (context.functions !== 2) throw invalid('link pair needs two sockets');
    return pairLink(pool);
  }
  if (context.functions !== 1) throw invalid(`link ${kind} is for one socket: two are wired together with \`pair\``);
  if (kind === 'loopback') return [loopbackLink(pool)];
  if (kind === 'pcap') {
    const comma = rest.indexOf(',');
    if (comma < 0) throw invalid('write pcap:IN,OUT; either may be empty');
    const files = { input: rest.slice(0, comma), output: rest.slice(comma + 1) };
    return [new PcapLink({ pool, ...files, maxFrame, warn })];
  }
  if ((kind === 'unix' || kind === 'unix-connect') && rest !== '') {
    return [new UnixLink({ arena, pool, path: rest, mode: kind === 'unix' ? 'listen' : 'connect', maxFrame })];
  }
  if (kind === 'tap') {
    if (!isInterfaceName(rest)) throw invalid(`${JSON.stringify(rest)} is no name of a network interface`);
    return [new TapLink({ pool, name: rest, maxFrame, warn })];
  }
  throw invalid(`there is no link ${text}`);
}

function invalid(message: string): InputError {
  return new InputError('DEVICE_OPTION', message, {
    hint: 'links are loopback, pair, pcap:IN,OUT, unix:PATH, unix-connect:PATH and tap:NAME (at most 15 characters)',
  });
}
