/**
 * Large packets between a NIC that we drive and the TCP of a kernel: a bridge (`bridge.ts`) gives the applications of a network namespace the
 * NIC as a TAP interface. TCP says whether every byte arrived, and the kernel's counters whether every checksum that it looked at was right;
 * that packets were large, the bridge saw itself.
 */
import { Bridge, type BridgeReport, type Crossed } from './bridge.ts';
import type { Guest } from './guest.ts';
import { addNamespace, Traffic } from './namespaces.ts';

/** Of a TCP stream, each way. */
export const STREAM_BYTES = 512 * 1024;
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

/** The NIC as an interface of a new network namespace, with a traffic process in it, until it is disposed of. */
export class BridgedNamespace implements AsyncDisposable {
  readonly traffic: Traffic;
  readonly #guest: Guest;
  readonly #name: string;
  readonly #bridge: Bridge;

  private constructor(guest: Guest, name: string, bridge: Bridge, traffic: Traffic) {
    this.#guest = guest;
    this.#name = name;
    this.#bridge = bridge;
    this.traffic = traffic;
  }

  static async open(guest: Guest, { address, ring, name, mac, addresses }: BridgedNic): Promise<BridgedNamespace> {
    addNamespace(guest, name);
    const bridge = await Bridge.open(address, name, ring);
    guest.must(`ip link set ${name} netns ${name}`);
    guest.must(`ip -n ${name} link set ${name} address ${mac} up`);
    for (const own of addresses) {
      guest.must(`ip -n ${name} addr add ${own} dev ${name} ${own.includes(':') ? 'nodad' : ''}`);
    }
    sendLarge(guest, name);
    return new BridgedNamespace(guest, name, bridge, await Traffic.start(guest, name));
  }

  /** A TCP stream to the echo server at each of `destinations`, and back. Returns what has crossed since `open`. */
  async stream(destinations: readonly string[]): Promise<BridgeReport> {
    for (const to of destinations) await this.traffic.request({ kind: 'tcp', to, bytes: STREAM_BYTES });
    mustBeClean(this.#guest, this.#name);
    const report = this.#bridge.report();
    if (report.dropped !== 0) throw new Error(JSON.stringify(report));
    return report;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.traffic.stop();
    await this.#bridge.close();
    this.#guest.must(`ip netns del ${this.#name}`);
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
export function sendLarge(guest: Guest, namespace: string): void {
  guest.must(`ip netns exec ${namespace} sh -c 'echo ${TSO_SEGMENTS} > /proc/sys/net/ipv4/tcp_min_tso_segs'`);
}

/** Throws if TCP or IP of a namespace (null: the first one) has counted something wrong. */
export function mustBeClean(guest: Guest, namespace: string | null): void {
  const command = 'cat /proc/net/snmp';
  const lines = guest.must(namespace === null ? command : `ip netns exec ${namespace} ${command}`).split('\n');
  const [names, values] = lines.filter((line) => line.startsWith('Tcp:')).map((line) => line.split(' '));
  for (const counter of ['InErrs', 'InCsumErrors']) {
    const value = values[names.indexOf(counter)];
    if (value !== '0') throw new Error(`${namespace ?? 'the first namespace'}: ${counter} is ${value}`);
  }
}
