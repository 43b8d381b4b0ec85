/**
 * Large packets between a NIC that we drive and the TCP of a kernel: a bridge (`bridge.ts`) gives the applications of a network namespace the
 * NIC as a TAP interface. TCP says whether every byte arrived, and the kernel's counters whether every checksum that it looked at was right;
 * that packets were large, the bridge saw itself.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { Application } from './application.ts';
import { Bridge, type BridgeReport, type Crossed } from './bridge.ts';
import type { Guest } from './guest.ts';
import { ip } from './namespaces.ts';
import { inNamespace } from './network-namespace.ts';

/** Of a TCP stream, each way. */
export const STREAM_BYTES = 256 * 1024;
const ETHERNET = 14;
const TSO_SEGMENTS = 40;
/** Packets of which a TCP stream has enough, where they are large at all. */
const FEW = 4;

export interface BridgedNic {
  /** PCI address of the function, which is bound to vfio-pci. */
  readonly address: string;
  readonly ring: 'split' | 'packed';
  /** Name of the network namespace and of the TAP interface in it. */
  readonly name: string;
  readonly mac: string;
  /** With the length of the prefix: `10.0.0.1/24`. */
  readonly addresses: readonly string[];
}

/** The NIC as an interface of a new network namespace, with an application in it, until it is disposed of. */
export class BridgedNamespace implements AsyncDisposable {
  readonly #guest: Guest;
  readonly #name: string;
  readonly #bridge: Bridge;
  readonly #application: Application;

  private constructor(guest: Guest, name: string, bridge: Bridge, application: Application) {
    this.#guest = guest;
    this.#name = name;
    this.#bridge = bridge;
    this.#application = application;
  }

  static async open(guest: Guest, { address, ring, name, mac, addresses }: BridgedNic): Promise<BridgedNamespace> {
    const bridge = await Bridge.open(address, name, ring);
    ip(guest, null, [`netns add ${name}`, `link set ${name} netns ${name}`]);
    const own = addresses.map((text) => `addr add ${text} dev ${name} ${text.includes(':') ? 'nodad' : ''}`);
    ip(guest, name, [`link set ${name} address ${mac} up`, ...own]);
    sendLarge(name);
    return new BridgedNamespace(guest, name, bridge, await Application.start(name));
  }

  /** A TCP stream to the echo server at each of `destinations`, and back. Returns what has crossed since `open`. */
  async stream(destinations: readonly string[]): Promise<BridgeReport> {
    for (const to of destinations) await this.#application.stream(to, STREAM_BYTES);
    mustBeClean(this.#name);
    const report = this.#bridge.report();
    if (report.dropped !== 0) throw new Error(JSON.stringify(report));
    return report;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#application[Symbol.asyncDispose]();
    await this.#bridge.close();
    ip(this.#guest, null, [`netns del ${this.#name}`]);
  }
}

/** Throws unless packets longer than the MTU have crossed, and says how many. */
export function mustBeLarge(what: string, { packets, large, longest }: Crossed, mtu = 1500): string {
  if (large < FEW || longest <= mtu + ETHERNET) {
    throw new Error(`${what}: ${large} of ${packets} packets are large, the longest has ${longest} bytes`);
  }
  return `${what}: ${large} of ${packets} are large, up to ${longest} bytes`;
}

/** Has TCP of a namespace send so many segments as one packet at least, when it has as many: a slow machine would see two. */
export function sendLarge(namespace: string): void {
  inNamespace(namespace, () => writeFileSync('/proc/sys/net/ipv4/tcp_min_tso_segs', String(TSO_SEGMENTS)));
}

/** Throws if TCP of a namespace (null: the first one) has counted a packet with a wrong checksum, or one that was none. */
export function mustBeClean(namespace: string | null): void {
  const [tcp, extended] = inNamespace(namespace, () => [
    counters('/proc/thread-self/net/snmp', 'Tcp:'),
    counters('/proc/thread-self/net/netstat', 'TcpExt:'),
  ]);
  // To a slow guest the other end sends its SYN again, and who has a connection counts that as an error, too (RFC 5961, 4.2).
  const errors = Number(tcp.get('InErrs')) - Number(extended.get('TCPSYNChallenge'));
  const wrong = Number(tcp.get('InCsumErrors'));
  if (errors > 0 || wrong !== 0 || Number.isNaN(errors)) {
    throw new Error(`${namespace ?? 'the first namespace'}: ${errors} errors, ${wrong} wrong checksums`);
  }
}

/** A group of counters: a line with their names, and one with their values. */
function counters(path: string, group: string): ReadonlyMap<string, string> {
  const lines = readFileSync(path, 'utf8').split('\n');
  const [names = [], values = []] = lines.filter((line) => line.startsWith(group)).map((line) => line.split(' '));
  return new Map(names.map((name, i) => [name, values[i]]));
}
