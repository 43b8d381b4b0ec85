/**
 * The application under test: a process that drives a NIC through the public API, with an SA each way, and gives what comes out
 * of the tunnel to the kernel of a network namespace by a TUN interface, and the other way round.
 * `node gateway.js DEVICE PEER_MAC`; its parent sets the SAs over the IPC channel.
 */
import { type Nic, openNic, type SaHandle, type SecurityAssociationInput } from '../../src/index.ts';
import { Tun } from './tun.ts';

export const TUN_NAME = 'tun0';

/** A request to the process, and its answers. */
export type GatewayRequest =
  | { readonly kind: 'sas'; readonly outbound: SecurityAssociationInput; readonly inbound: SecurityAssociationInput }
  /** Ends both SAs: nothing goes either way until there are new ones. */
  | { readonly kind: 'clear' }
  | { readonly kind: 'report' }
  | { readonly kind: 'close' };
export type GatewayAnswer =
  | { readonly ok: true; readonly placement?: readonly string[]; readonly report?: GatewayReport }
  | { readonly ok: false; readonly detail: string };
export interface GatewayReport {
  /** Packets that reached the application under the SA. */
  readonly opened: number;
  readonly protected: number;
  /** Packets that the NIC sent since it was opened. */
  readonly sent: number;
  /** IP packets that arrived in the clear; none of them is passed on. */
  readonly inTheClear: number;
  readonly dropped: Readonly<Record<string, number>>;
}

const HEADER = 14;
const BURST = 32;
/** Whoever sleeps looks again after so long, should nothing wake it. */
const LOOK_MS = 100;
const ETHERTYPE = { 4: [0x08, 0x00], 6: [0x86, 0xdd] } as const;

class Gateway {
  readonly #nic: Nic;
  readonly #tun = new Tun(TUN_NAME);
  readonly #watch = this.#tun.watch(() => this.#wake());
  readonly #burst = new Uint32Array(BURST);
  readonly #header: Uint8Array;
  #outbound: SaHandle | undefined;
  #inbound: SaHandle | undefined;
  #opened = 0;
  #protected = 0;
  #inTheClear = 0;
  #wake = () => {};
  #arrival: Promise<unknown> | undefined;
  closed = false;

  constructor(nic: Nic, peerMac: string) {
    this.#nic = nic;
    nic.queues[0].rx.policy = 'interrupt';
    this.#header = new Uint8Array([...Buffer.from(peerMac.replaceAll(':', ''), 'hex'), ...nic.mac, 0, 0]);
  }

  async clear(): Promise<void> {
    const old = [this.#outbound, this.#inbound];
    this.#outbound = undefined;
    this.#inbound = undefined;
    for (const sa of old) await sa?.remove();
  }

  async setSas(outbound: SecurityAssociationInput, inbound: SecurityAssociationInput): Promise<string[]> {
    this.#opened = 0;
    this.#protected = 0;
    this.#inTheClear = 0;
    this.#inbound = await this.#nic.ipsec.addSa(inbound);
    this.#outbound = await this.#nic.ipsec.addSa(outbound);
    return [this.#outbound, this.#inbound].map(({ placement: { where, because } }) => `${where}: ${because}`);
  }

  report(): GatewayReport {
    const { rx, tx } = this.#nic.statistics();
    const invalid = rx.invalid + tx.invalid;
    const dropped = { ...rx.dropped, ...tx.dropped, ...(invalid === 0 ? {} : { invalid }) };
    return {
      opened: this.#opened,
      protected: this.#protected,
      sent: tx.packets,
      inTheClear: this.#inTheClear,
      dropped,
    };
  }

  /** One round each way; false when there was nothing to do. */
  step(): boolean {
    if (this.#nic.broken !== null) throw this.#nic.broken;
    const received = this.#fromNic();
    return this.#toNic() || received;
  }

  /** Sleeps until there may be something to do: polling would take most of the time that an emulated machine has. */
  async readable(): Promise<void> {
    const { rx } = this.#nic.queues[0];
    this.#arrival ??= rx.wait(LOOK_MS).finally(() => {
      this.#arrival = undefined;
    });
    const tun = new Promise<void>((resolve) => {
      this.#wake = resolve;
    });
    await Promise.race([tun, this.#arrival]);
  }

  async close(): Promise<void> {
    this.closed = true;
    await this.#arrival;
    this.#watch.close();
    this.#tun.close();
    await this.#nic.close();
  }

  #fromNic(): boolean {
    const { packets } = this.#nic;
    const n = this.#nic.queues[0].rx.burst(this.#burst, BURST);
    for (let i = 0; i < n; i++) {
      const frame = packets.read(this.#burst[i]);
      const isIp = (frame[12] === 0x08 && frame[13] === 0x00) || (frame[12] === 0x86 && frame[13] === 0xdd);
      // The kernel's multicast (router solicitations, group reports) is not for us.
      if (!isIp || (frame[0] & 1) !== 0) continue;
      if (packets.sa[this.#burst[i]] !== this.#inbound?.handle) this.#inTheClear++;
      else if (this.#tun.send(frame.subarray(HEADER))) this.#opened++;
    }
    packets.free(this.#burst, n);
    return n > 0;
  }

  #toNic(): boolean {
    const { packets, queues } = this.#nic;
    const { tx } = queues[0];
    tx.reclaim();
    let n = 0;
    const room = Math.min(BURST, tx.room);
    while (n < room) {
      const packet = this.#tun.receive();
      if (packet === undefined) break;
      // Without an SA it goes nowhere: never in the clear. Multicast (router solicitations) is not for the peer.
      if (this.#outbound === undefined || isMulticast(packet) || packets.allocate(this.#burst.subarray(n), 1) === 0)
        continue;
      const [high, low] = ETHERTYPE[packet[0] >> 4 === 6 ? 6 : 4];
      const frame = new Uint8Array(HEADER + packet.length);
      frame.set(this.#header);
      frame[12] = high;
      frame[13] = low;
      frame.set(packet, HEADER);
      packets.write(this.#burst[n], frame);
      packets.sa[this.#burst[n]] = this.#outbound.handle;
      n++;
    }
    const taken = tx.burst(this.#burst, n);
    if (taken < n) packets.free(this.#burst.subarray(taken), n - taken);
    this.#protected += taken;
    return n > 0;
  }
}

function isMulticast(packet: Uint8Array): boolean {
  return packet[0] >> 4 === 6 ? packet[24] === 0xff : packet[16] >> 4 === 0xe;
}

async function run(gateway: Gateway): Promise<void> {
  while (!gateway.closed) {
    if (gateway.step()) await new Promise((resolve) => setImmediate(resolve));
    else await gateway.readable();
  }
}

async function answer(gateway: Gateway, request: GatewayRequest): Promise<GatewayAnswer> {
  try {
    if (request.kind === 'sas') return { ok: true, placement: await gateway.setSas(request.outbound, request.inbound) };
    if (request.kind === 'clear') await gateway.clear();
    if (request.kind === 'report') return { ok: true, report: gateway.report() };
    if (request.kind === 'close') await gateway.close();
    return { ok: true };
  } catch (error) {
    return { ok: false, detail: error instanceof Error ? error.message : String(error) };
  }
}

function isRequest(message: unknown): message is GatewayRequest {
  return typeof message === 'object' && message !== null && 'kind' in message;
}

const [device = '', peerMac = ''] = process.argv.slice(2);
const gateway = new Gateway(await openNic(device), peerMac);
process.on('message', async (message) => {
  if (!isRequest(message)) return;
  process.send?.(await answer(gateway, message));
  if (message.kind === 'close') process.disconnect();
});
process.send?.({ ok: true });
await run(gateway);
