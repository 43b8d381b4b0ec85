/**
 * Flows that refer to ESP actions: which packets an action encrypts or decrypts (`ibv_create_flow(3)` with an ACTION_HANDLE specification).
 *
 * An application runs its bursts through the table: `egress` before `tx.burst`, `ingress` behind `rx.burst`.
 *
 * - Egress, full offload: the first flow whose headers fit the packet decides; `pool.sa[p]` becomes the SA.
 * - Egress and ingress, inline crypto: the packet has an ESP header; it is encrypted or decrypted in place. The verdict is what the
 *   verbs report in the completion.
 * - Ingress, full offload: the NIC finds SAs by their SPI itself, so the flow only has to fit its action. An inbound action takes
 *   effect when it is made.
 *
 * Left out: the Ethernet header, masks within ports, tunnels as specifications, priorities (flows are tried in the order in which they
 * were made).
 */
import { IpsecError } from '../../errors.ts';
import { Chain, walkIpv6 } from '../../fallback/extension-headers.ts';
import { Verdict } from '../../fallback/verdict.ts';
import { type ParsedPrefix, parsePrefix } from '../../packet/addresses.ts';
import { Esp, Ethernet, EtherType, IpProtocol, Ipv4, Ipv6 } from '../../packet/fields.ts';
import type { PacketPool } from '../../packet/pool.ts';
import { OutboundPolicy } from '../policy.ts';
import type { Selector } from '../sa.ts';
import type { EspParameters } from './attributes.ts';
import { FlowActionEsp, type FlowUser, type VerbsNic } from './flow-action.ts';
import { FlowSpecType } from './numbers.ts';

/** A header that a packet must have. Absent fields fit anything; addresses are prefixes, such as `10.0.0.0/8`. */
export type FlowSpec =
  | { readonly type: typeof FlowSpecType.ipv4 | typeof FlowSpecType.ipv4Ext; readonly val: IpSpec }
  | { readonly type: typeof FlowSpecType.ipv6; readonly val: IpSpec }
  | { readonly type: typeof FlowSpecType.tcp | typeof FlowSpecType.udp; readonly val: PortSpec }
  | { readonly type: typeof FlowSpecType.esp; readonly val: { readonly spi: number } };

export interface IpSpec {
  readonly srcIp?: string;
  readonly dstIp?: string;
  readonly proto?: number;
}

export interface PortSpec {
  readonly srcPort?: number;
  readonly dstPort?: number;
}

export interface FlowOptions {
  readonly direction: 'egress' | 'ingress';
  /** At most one IP header, and one header behind it. */
  readonly specs: readonly FlowSpec[];
  readonly action: FlowActionEsp;
}

/** A flow that exists. */
export interface Flow {
  readonly direction: 'egress' | 'ingress';
  readonly action: FlowActionEsp;
  /** Idempotent. */
  destroy(): void;
}

/** Specifications, checked. */
interface Match {
  readonly version: 4 | 6 | null;
  readonly selector: Selector;
  readonly spi: number | null;
}

interface Entry extends Flow, FlowUser {
  readonly match: Match;
}

/** No flow of inline crypto has this SPI. */
const NO_ENTRIES: readonly Entry[] = [];

/** Packets that are looked at together. */
const CHUNK = 256;

export class FlowTable {
  readonly #nic: VerbsNic;
  readonly #entries: Entry[] = [];
  /** Full offload, egress. Replaced as a whole: that is the point at which all flows change. */
  #policy = new OutboundPolicy([]);
  #offloads = 0;
  /** Inline crypto, by SPI as a signed number, which is never an object. */
  readonly #egressCrypto = new Map<number, readonly Entry[]>();
  readonly #ingressCrypto = new Map<number, readonly Entry[]>();
  readonly #chain = new Uint32Array(Chain.length);
  readonly #packets = new Uint32Array(CHUNK);
  readonly #contexts = new Uint32Array(CHUNK);
  readonly #nextHeaders = new Uint8Array(CHUNK);
  readonly #verdicts = new Uint8Array(CHUNK);
  readonly #positions = new Uint32Array(CHUNK);
  #ended = false;

  constructor(nic: VerbsNic) {
    this.#nic = nic;
    nic.ipsec.onClose(() => {
      this.#ended = true;
    });
  }

  /**
   * Makes a flow. Throws IpsecError `FLOW_SPEC` for specifications that there are not; `FLOW_MISMATCH` when the action is for the other direction, or
   * the flow matches what the action cannot be for; `FLOW_ACTION_DESTROYED`.
   */
  create({ direction, specs, action }: FlowOptions): Flow {
    const match = readSpecs(specs);
    const entry: Entry = {
      direction,
      action,
      match,
      check: (next) => checkFit(direction, match, next),
      switchOver: () => this.#rebuild(),
      destroy: () => this.#remove(entry),
    };
    action.attach(entry);
    this.#entries.push(entry);
    this.#rebuild();
    return entry;
  }

  /** Ends all flows. */
  clear(): void {
    for (const entry of [...this.#entries]) entry.destroy();
  }

  #remove(entry: Entry): void {
    const at = this.#entries.indexOf(entry);
    if (at < 0) return;
    this.#entries.splice(at, 1);
    entry.action.detach(entry);
    this.#rebuild();
  }

  #rebuild(): void {
    const offloads = this.#entries.filter(({ direction, action }) => direction === 'egress' && action.fullOffload);
    this.#egressCrypto.clear();
    this.#ingressCrypto.clear();
    for (const entry of this.#entries) {
      if (entry.action.fullOffload || entry.match.spi === null) continue;
      const table = entry.direction === 'egress' ? this.#egressCrypto : this.#ingressCrypto;
      const spi = entry.match.spi | 0;
      table.set(spi, [...(table.get(spi) ?? NO_ENTRIES), entry]);
    }
    this.#offloads = offloads.length;
    this.#policy = new OutboundPolicy(
      offloads.map(({ match, action }) => ({ selector: selectorOf(match), handle: action.handle })),
    );
  }

  /**
   * Applies the flows to `n` packets that are about to be sent. Sets `pool.sa[p]` of each: the SA of its flow, or 0. `linkHeader`: 0, or bytes of
   * link header, of which the last two are the EtherType. `nextHeaders[i]` goes into the trailer of packet i where an action of inline crypto
   * has TRANSPORT; with TUNNEL it follows from the packet. Verdicts: `ok`, to be sent; `notIpsec`: no flow; others: to be dropped.
   */
  egress(packets: Uint32Array, n: number, linkHeader: number, nextHeaders: Uint8Array, verdicts: Uint8Array): void {
    // hot:
    const pool = this.#nic.packets;
    if (this.#offloads !== 0) this.#policy.classify(pool, packets, n, linkHeader, verdicts);
    else {
      for (let i = 0; i < n; i++) {
        pool.sa[packets[i]] = 0;
        verdicts[i] = Verdict.notIpsec;
      }
    }
    if (this.#egressCrypto.size !== 0) this.#crypto(packets, n, linkHeader, nextHeaders, verdicts, true);
  }

  /**
   * Applies the flows of inline crypto to `n` packets that have arrived. Of a packet that was decrypted, `ok`, `nextHeaders[i]` is what its ESP trailer
   * named. `notIpsec`: no flow, the packet is as it was; others: to be dropped.
   */
  ingress(packets: Uint32Array, n: number, linkHeader: number, nextHeaders: Uint8Array, verdicts: Uint8Array): void {
    // hot:
    verdicts.fill(Verdict.notIpsec, 0, n);
    if (this.#ingressCrypto.size !== 0) this.#crypto(packets, n, linkHeader, nextHeaders, verdicts, false);
  }

  /** Encrypts or decrypts those that are `notIpsec` so far and have a flow. */
  #crypto(
    packets: Uint32Array,
    n: number,
    linkHeader: number,
    nextHeaders: Uint8Array,
    verdicts: Uint8Array,
    out: boolean,
  ): void {
    // hot:
    const table = out ? this.#egressCrypto : this.#ingressCrypto;
    let count = 0;
    for (let i = 0; i < n; i++) {
      if (count === CHUNK) {
        this.#run(count, linkHeader, nextHeaders, verdicts, out);
        count = 0;
      }
      if (verdicts[i] !== Verdict.notIpsec) continue;
      const p = packets[i];
      const action = this.#find(table, p, linkHeader);
      if (action === null) continue;
      this.#packets[count] = p;
      this.#contexts[count] = action.handle;
      this.#nextHeaders[count] = out ? this.#nextHeader(action, p, linkHeader, nextHeaders[i]) : 0;
      this.#positions[count++] = i;
    }
    if (count !== 0) this.#run(count, linkHeader, nextHeaders, verdicts, out);
  }

  #run(count: number, linkHeader: number, nextHeaders: Uint8Array, verdicts: Uint8Array, out: boolean): void {
    // hot:
    const crypto = this.#ended ? null : FlowActionEsp.cryptoOf(this.#nic.packets);
    const done = this.#verdicts;
    if (crypto === null) done.fill(Verdict.noSa, 0, count);
    else if (out) crypto.encrypt(this.#packets, this.#contexts, this.#nextHeaders, count, linkHeader, done);
    else crypto.decrypt(this.#packets, this.#contexts, this.#nextHeaders, count, linkHeader, done);
    for (let k = 0; k < count; k++) {
      // It had a flow: what inline crypto leaves alone must not go on as if it had none.
      verdicts[this.#positions[k]] = done[k] === Verdict.notIpsec ? Verdict.malformed : done[k];
      if (!out && done[k] === Verdict.ok) nextHeaders[this.#positions[k]] = this.#nextHeaders[k];
    }
  }

  /** The action of the first flow that a packet with an ESP header fits, or null. */
  #find(table: ReadonlyMap<number, readonly Entry[]>, p: number, linkHeader: number): FlowActionEsp | null {
    // hot:
    const pool = this.#nic.packets;
    const { u8 } = pool;
    const esp = espOf(pool, p, linkHeader, this.#chain);
    if (esp < 0) return null;
    const spi = (u8[esp] << 24) | (u8[esp + 1] << 16) | (u8[esp + 2] << 8) | u8[esp + 3];
    const entries = table.get(spi);
    if (entries === undefined) return null;
    const ip = pool.offset[p] + linkHeader;
    for (let i = 0; i < entries.length; i++) if (fits(entries[i].match, u8, ip)) return entries[i].action;
    return null;
  }

  /** In tunnel mode the payload is an IP packet (RFC 4303, 2.6). */
  #nextHeader(action: FlowActionEsp, p: number, linkHeader: number, given: number): number {
    // hot:
    if (action.transport) return given;
    const esp = espOf(this.#nic.packets, p, linkHeader, this.#chain);
    const inner = this.#nic.packets.u8[esp + Esp.length + IV_LENGTH] >>> 4;
    return inner === 6 ? IpProtocol.ipv6 : IpProtocol.ipv4;
  }
}

/** Bytes of the IV of AES-GCM in a packet (RFC 4106, 3.1). */
const IV_LENGTH = 8;

/** Where the ESP header of packet `p` is, or -1. */
function espOf(pool: PacketPool, p: number, linkHeader: number, chain: Uint32Array): number {
  // hot:
  const { u8 } = pool;
  const ip = pool.offset[p] + linkHeader;
  const end = pool.offset[p] + pool.length[p];
  if (ip + Ipv4.minLength > end) return -1;
  const version = u8[ip] >>> 4;
  if (linkHeader >= Ethernet.length) {
    const type = (u8[ip - 2] << 8) | u8[ip - 1];
    if (type !== (version === 4 ? EtherType.ipv4 : EtherType.ipv6)) return -1;
  }
  if (version === 4) {
    if (u8[ip + Ipv4.protocol] !== IpProtocol.esp) return -1;
    const header = ip + ((u8[ip] & 15) << 2);
    return header + Esp.length + IV_LENGTH > end ? -1 : header;
  }
  if (version !== 6 || ip + Ipv6.length > end || walkIpv6(u8, ip, end, false, chain) !== Verdict.ok) return -1;
  if (chain[Chain.protocol] !== IpProtocol.esp || chain[Chain.offset] + Esp.length + IV_LENGTH > end) return -1;
  return chain[Chain.offset];
}

/** Whether the addresses of the IP packet at `ip` are those of the match. */
function fits({ version, selector }: Match, u8: Uint8Array, ip: number): boolean {
  // hot:
  const six = u8[ip] >>> 4 === 6;
  if (version !== null && (version === 6) !== six) return false;
  const header = six ? Ipv6 : Ipv4;
  return (
    hasPrefix(u8, ip + header.source, selector.source) && hasPrefix(u8, ip + header.destination, selector.destination)
  );
}

function hasPrefix(u8: Uint8Array, at: number, prefix: ParsedPrefix | undefined): boolean {
  // hot:
  if (prefix === undefined) return true;
  const { address, length } = prefix;
  for (let i = 0; i * 8 < length; i++) {
    const mask = length - i * 8 >= 8 ? 0xff : (0xff00 >>> (length - i * 8)) & 0xff;
    if (((u8[at + i] ^ address[i]) & mask) !== 0) return false;
  }
  return true;
}

function invalid(what: string, path: string): IpsecError {
  return new IpsecError('FLOW_SPEC', `${path}: ${what}`, { path });
}

function readSpecs(specs: readonly FlowSpec[]): Match {
  let version: 4 | 6 | null = null;
  let spi: number | null = null;
  let protocol: number | undefined;
  let ports: PortSpec = {};
  const prefixes: { source?: ParsedPrefix; destination?: ParsedPrefix } = {};
  for (const [i, spec] of specs.entries()) {
    const path = `specs[${i}]`;
    if (i > 1 || (i === 1 && version === null)) throw invalid('at most an IP header and one behind it', path);
    switch (spec.type) {
      case FlowSpecType.ipv4:
      case FlowSpecType.ipv4Ext:
      case FlowSpecType.ipv6: {
        if (i !== 0) throw invalid('an IP header comes first', path);
        version = spec.type === FlowSpecType.ipv6 ? 6 : 4;
        protocol = spec.val.proto === undefined ? undefined : number(`${path}.proto`, spec.val.proto, 255);
        if (spec.val.srcIp !== undefined) prefixes.source = prefix(`${path}.srcIp`, spec.val.srcIp, version);
        if (spec.val.dstIp !== undefined) prefixes.destination = prefix(`${path}.dstIp`, spec.val.dstIp, version);
        break;
      }
      case FlowSpecType.tcp:
      case FlowSpecType.udp: {
        const own = spec.type === FlowSpecType.tcp ? IpProtocol.tcp : IpProtocol.udp;
        if (protocol !== undefined && protocol !== own) throw invalid(`the IP header has protocol ${protocol}`, path);
        protocol = own;
        ports = spec.val;
        for (const [name, port] of Object.entries(ports))
          if (port !== undefined) number(`${path}.${name}`, port, 0xffff);
        break;
      }
      case FlowSpecType.esp:
        if (protocol !== undefined && protocol !== IpProtocol.esp) {
          throw invalid(`the IP header has protocol ${protocol}`, path);
        }
        spi = number(`${path}.spi`, spec.val.spi, 0xffffffff);
        break;
      default:
        throw invalid('is not a known type', path);
    }
  }
  const { srcPort, dstPort } = ports;
  return {
    version,
    spi,
    selector: {
      ...prefixes,
      ...(protocol === undefined ? {} : { protocol }),
      ...(srcPort === undefined ? {} : { sourcePort: srcPort }),
      ...(dstPort === undefined ? {} : { destinationPort: dstPort }),
    },
  };
}

function number(path: string, value: number, max: number): number {
  if (!Number.isInteger(value) || value < 0 || value > max) throw invalid(`must be an integer of 0 to ${max}`, path);
  return value;
}

function prefix(path: string, text: string, version: 4 | 6): ParsedPrefix {
  const parsed = parsePrefix(text);
  if (parsed === null || (parsed.address.length === 4) !== (version === 4)) {
    throw invalid(`is not an IPv${version} address or prefix`, path);
  }
  return parsed;
}

/** The manual page: encryption on egress, decryption on ingress; inline crypto with an IP and an ESP header. */
function checkFit(direction: 'egress' | 'ingress', match: Match, action: EspParameters): void {
  const misfit = (what: string) => new IpsecError('FLOW_MISMATCH', `the flow does not fit its action: ${what}`);
  if (action.encrypt !== (direction === 'egress')) throw misfit('encryption is for egress, decryption for ingress');
  if (!action.fullOffload) {
    if (match.version === null || match.spi === null) throw misfit('inline crypto needs an IP and an ESP header');
    return;
  }
  if (direction === 'egress') {
    if (match.spi !== null) throw misfit('packets have no ESP header before full offload');
    return;
  }
  if (match.spi !== null && match.spi !== action.spi) throw misfit('the SPI is not that of the action');
  const udp = action.encap.some(({ type }) => type === FlowSpecType.udp);
  const inUdp = udp && match.selector.protocol === IpProtocol.udp;
  if (match.spi === null && !inUdp) throw misfit('an ESP header with the SPI of the action is needed');
}

/** An IP version without addresses is a prefix that every address of it has. */
function selectorOf({ version, selector }: Match): Selector {
  if (version === null || selector.source !== undefined || selector.destination !== undefined) return selector;
  return { ...selector, source: { address: new Uint8Array(version === 4 ? 4 : 16), length: 0 } };
}
