/**
 * The application under test: it drives a NIC through the public API, with an SA each way for each pair of hosts, and gives what comes out of the
 * tunnels to the kernel of a network namespace by a TUN interface, and the other way round. Packets are protected by the SA of the host that they
 * are for, and accepted only by that of the host that they come from.
 */
import { type Nic, openNic, type SaHandle, type SecurityAssociationInput } from '../../src/index.ts';
import { type Epoll, Ready } from './epoll.ts';
import { Tun } from './tun.ts';

export interface PairReport {
  /** Packets that reached the application under the pair's SA. */
  readonly opened: number;
  readonly protected: number;
}

const HEADER = 14;
const BURST = 32;
/** For a packet of the TUN interface, whose MTU is less. */
const ROOM = 1500;
/** What a receive queue sleeps at most. */
const LOOK_MS = 100;
/** ETHERTYPE of IPv4 and IPv6, and the last byte of the addresses in their headers: the number of the host. */
const IP = {
  4: { high: 0x08, low: 0x00, source: 15, destination: 19 },
  6: { high: 0x86, low: 0xdd, source: 23, destination: 39 },
} as const;

class Pair {
  readonly outbound: SaHandle;
  readonly inbound: SaHandle;
  opened = 0;
  protected = 0;

  constructor(outbound: SaHandle, inbound: SaHandle) {
    this.outbound = outbound;
    this.inbound = inbound;
  }
}

export class Gateway {
  readonly #nic: Nic;
  readonly #epoll: Epoll;
  readonly #tun: Tun;
  readonly #burst = new Uint32Array(BURST);
  readonly #header: Uint8Array;
  /** By host number. */
  readonly #pairs = new Map<number, Pair>();
  #inTheClear = 0;
  #strayed = 0;
  #asleep: Promise<unknown> | undefined;

  private constructor(nic: Nic, peerMac: string, tun: string, epoll: Epoll) {
    this.#nic = nic;
    this.#epoll = epoll;
    this.#tun = new Tun(tun);
    nic.queues[0].rx.policy = 'interrupt';
    this.#header = new Uint8Array([...Buffer.from(peerMac.replaceAll(':', ''), 'hex'), ...nic.mac, 0, 0]);
    epoll.watch(this.#tun.fd, Ready.in, () => this.#toNic());
  }

  /** On the function `device`, whose link ends at `peerMac`, with a new TUN interface `tun`, which is read in `epoll.dispatch`. */
  static async open(device: string, peerMac: string, tun: string, epoll: Epoll): Promise<Gateway> {
    const nic = await openNic(device);
    try {
      return new Gateway(nic, peerMac, tun, epoll);
    } catch (error) {
      await nic.close();
      throw error;
    }
  }

  /** SAs for the pair of hosts with this number. Returns where each of the two runs, and why. */
  async add(host: number, outbound: SecurityAssociationInput, inbound: SecurityAssociationInput): Promise<string[]> {
    const into = await this.#nic.ipsec.addSa(inbound);
    const pair = new Pair(await this.#nic.ipsec.addSa(outbound), into);
    this.#pairs.set(host, pair);
    return [pair.outbound, pair.inbound].map(({ placement: { where, because } }) => `${where}: ${because}`);
  }

  /** Ends all SAs: nothing goes either way any more. */
  async removeAll(): Promise<void> {
    const sas = [...this.#pairs.values()].flatMap(({ outbound, inbound }) => [outbound, inbound]);
    this.#pairs.clear();
    await Promise.all(sas.map((sa) => sa.remove()));
  }

  report(host: number): PairReport {
    const { opened = 0, protected: sent = 0 } = this.#pairs.get(host) ?? {};
    return { opened, protected: sent };
  }

  /** What went wrong since it was opened, by name: nothing may. None of what came in the clear is passed on. */
  trouble(): Readonly<Record<string, number>> {
    const { rx, tx } = this.#nic.statistics();
    const counts = { invalid: rx.invalid + tx.invalid, inTheClear: this.#inTheClear, strayed: this.#strayed };
    const bad = Object.entries({ ...rx.dropped, ...tx.dropped, ...counts }).filter(([, count]) => count > 0);
    return Object.fromEntries(bad);
  }

  /** Passes on what the NIC has received; false when that is nothing. */
  step(): boolean {
    if (this.#nic.broken !== null) throw this.#nic.broken;
    const { packets } = this.#nic;
    const n = this.#nic.queues[0].rx.burst(this.#burst, BURST);
    for (let i = 0; i < n; i++) this.#open(this.#burst[i]);
    packets.free(this.#burst, n);
    return n > 0;
  }

  /** Sleeps until the NIC or the epoll set may have something: polling would take most of the time that an emulated machine has. */
  async sleep(): Promise<void> {
    this.#asleep ??= this.#nic.queues[0].rx.wait(LOOK_MS).finally(() => {
      this.#asleep = undefined;
    });
    await Promise.race([this.#epoll.sleep(LOOK_MS), this.#asleep]);
  }

  /** The epoll set stays open. */
  async close(): Promise<void> {
    await this.#asleep?.catch(() => {});
    this.#epoll.forget(this.#tun.fd);
    this.#tun.close();
    await this.#nic.close();
  }

  #open(p: number): void {
    const { offset, length, sa, memory } = this.#nic.packets;
    const { u8 } = memory;
    const at = offset[p];
    const ip = ipOf(u8, at);
    // The kernel's multicast (router solicitations, group reports) is not for us.
    if (ip === undefined || (u8[at] & 1) !== 0) return;
    const pair = this.#pairs.get(u8[at + HEADER + ip.source]);
    if (sa[p] === 0) this.#inTheClear++;
    else if (sa[p] !== pair?.inbound.handle || u8[at + HEADER + ip.source] !== u8[at + HEADER + ip.destination])
      this.#strayed++;
    else if (this.#tun.send(memory.address + at + HEADER, length[p] - HEADER)) pair.opened++;
  }

  #toNic(): void {
    const { packets, queues } = this.#nic;
    const { tx } = queues[0];
    const burst = this.#burst;
    tx.reclaim();
    const got = packets.allocate(burst, Math.min(BURST, tx.room));
    let n = 0;
    while (n < got) {
      const length = this.#tun.receive(packets.memory.address + packets.offset[burst[n]] + HEADER, ROOM);
      if (length === 0) break;
      if (this.#protect(burst[n], length)) n++;
    }
    if (tx.burst(burst, n) < n) throw new Error('a ring with room takes no packet');
    if (n < got) packets.free(burst.subarray(n), got - n);
  }

  /** Makes the IP packet in packet `p` a frame for its host; false when it has no SA: then it goes nowhere, and never in the clear. */
  #protect(p: number, length: number): boolean {
    const { u8, offset, length: lengths, sa } = this.#nic.packets;
    const at = offset[p];
    const ip = u8[at + HEADER] >> 4 === 6 ? IP[6] : IP[4];
    const pair = this.#pairs.get(u8[at + HEADER + ip.destination]);
    // Multicast (router solicitations) is not for the peer.
    if (pair === undefined || isMulticast(u8, at + HEADER)) return false;
    u8.set(this.#header, at);
    u8[at + HEADER - 2] = ip.high;
    u8[at + HEADER - 1] = ip.low;
    lengths[p] = HEADER + length;
    sa[p] = pair.outbound.handle;
    pair.protected++;
    return true;
  }
}

/** Where the addresses of the frame at `at` are, when it is of IP. */
function ipOf(u8: Uint8Array, at: number): (typeof IP)[4 | 6] | undefined {
  return [IP[4], IP[6]].find(({ high, low }) => u8[at + HEADER - 2] === high && u8[at + HEADER - 1] === low);
}

function isMulticast(u8: Uint8Array, ip: number): boolean {
  return u8[ip] >> 4 === 6 ? u8[ip + 24] === 0xff : u8[ip + 16] >> 4 === 0xe;
}
