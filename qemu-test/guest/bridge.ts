/**
 * A bridge between a NIC that we drive and a TAP interface, with segmentation offload on both: large packets of the kernel's TCP are sent as
 * large packets, and what the device gives us as large packets the kernel gets so.
 */
import { setTimeout as sleep, setImmediate as turn } from 'node:timers/promises';
import { Feature, type Nic, NO_PACKET, openNic, PacketFlag } from '../../src/index.ts';
import { noOffload, Tap } from './tap.ts';

/** What has crossed in one direction: packets, those longer than the MTU allows a frame to be, and the length of the longest. */
export interface Crossed {
  packets: number;
  large: number;
  longest: number;
}

export interface BridgeReport {
  readonly fromDevice: Crossed;
  readonly toDevice: Crossed;
  /** Packets that one of the two sides did not take. */
  readonly dropped: number;
}

const ETHERNET = 14;
const BURST = 32;
const MOST_SLOTS = 40;
/** Data offset of a TCP header, in words of 4 bytes, in the upper half of this byte. */
const TCP_LENGTH_AT = 12;
/** Empty rounds before a pause; a pause lets the other processes of a small machine run. */
const IDLE_ROUNDS = 100;
const PAUSE_MS = 1;

const OFFLOADS = [
  Feature.MRG_RXBUF,
  Feature.HOST_TSO4,
  Feature.HOST_TSO6,
  Feature.GUEST_TSO4,
  Feature.GUEST_TSO6,
] as const;

export class Bridge {
  readonly #nic: Nic;
  readonly #tap: Tap;
  readonly #burst = new Uint32Array(BURST);
  readonly #slots = new Uint32Array(MOST_SLOTS);
  readonly #fromDevice: Crossed = { packets: 0, large: 0, longest: 0 };
  readonly #toDevice: Crossed = { packets: 0, large: 0, longest: 0 };
  readonly #received = noOffload();
  /** A frame of the kernel's that waits for room. */
  #waiting: Uint8Array | undefined;
  #refused = 0;

  /** Settled when the bridge has ended, by `close` or by an error. */
  readonly #over: Promise<Error | null>;
  #closed = false;

  private constructor(nic: Nic, tap: Tap) {
    this.#nic = nic;
    this.#tap = tap;
    this.#over = this.#run().then(
      () => null,
      (error: unknown) => (error instanceof Error ? error : new Error(String(error))),
    );
  }

  /** Between the function at `address` and a new TAP interface `name`. Throws when the device does not negotiate segmentation both ways. */
  static async open(address: string, name: string, ring: 'split' | 'packed'): Promise<Bridge> {
    const nic = await openNic(address, { ring, ipsec: 'off', offloads: { largeReceive: true } });
    try {
      if (!nic.features.hasAll(...OFFLOADS)) throw new Error(`negotiated ${nic.features.names().join(' ')}`);
      return new Bridge(nic, new Tap(name));
    } catch (error) {
      await nic.close();
      throw error;
    }
  }

  report(): BridgeReport {
    const { rx, tx } = this.#nic.statistics();
    const dropped = this.#refused + rx.invalid + tx.invalid;
    return { fromDevice: this.#fromDevice, toDevice: this.#toDevice, dropped };
  }

  /** Throws what ended the bridge before. */
  async close(): Promise<void> {
    this.#closed = true;
    const error = await this.#over;
    this.#tap.close();
    await this.#nic.close();
    if (error !== null) throw error;
  }

  async #run(): Promise<void> {
    for (let idle = 0; !this.#closed; ) {
      idle = this.#step() ? 0 : idle + 1;
      if (idle < IDLE_ROUNDS) await turn();
      else await sleep(PAUSE_MS);
    }
  }

  /** One round each way; false when there was nothing to do. */
  #step(): boolean {
    if (this.#nic.broken !== null) throw this.#nic.broken;
    const received = this.#fromNic();
    return this.#toNic() || received;
  }

  #fromNic(): boolean {
    const { packets, queues } = this.#nic;
    const n = queues[0].rx.burst(this.#burst, BURST);
    for (let i = 0; i < n; i++) {
      const p = this.#burst[i];
      const frame = packets.readChain(p);
      const isLarge = (packets.flags[p] & PacketFlag.segmented) !== 0;
      const offload = this.#received;
      offload.needsChecksum = (packets.flags[p] & PacketFlag.needsChecksum) !== 0;
      offload.checksumStart = packets.checksumStart[p];
      offload.checksumOffset = packets.checksumOffset[p];
      offload.gsoType = isLarge ? packets.gsoType[p] : 0;
      offload.gsoSize = isLarge ? packets.gsoSize[p] : 0;
      const transport = offload.checksumStart;
      offload.headerLength = isLarge ? transport + (frame[transport + TCP_LENGTH_AT] >>> 4) * 4 : 0;
      if (this.#tap.send(frame, offload)) this.#count(this.#fromDevice, frame);
      // What comes before the interface is up is not for it.
      else if (this.#fromDevice.packets > 0) this.#refused++;
    }
    packets.freeChains(this.#burst, n);
    return n > 0;
  }

  #toNic(): boolean {
    this.#nic.queues[0].tx.reclaim();
    let n = 0;
    for (; n < BURST; n++) {
      this.#waiting ??= this.#tap.receive();
      if (this.#waiting === undefined || !this.#send(this.#waiting)) break;
      this.#count(this.#toDevice, this.#waiting);
      this.#waiting = undefined;
    }
    return n > 0;
  }

  /** Sends a frame of the kernel's; false when there is no room for it. */
  #send(frame: Uint8Array): boolean {
    const { packets, queues } = this.#nic;
    const slots = this.#slots;
    const each = packets.stride - packets.headroom;
    const count = Math.ceil(frame.length / each);
    const got = packets.allocate(slots, count);
    if (got < count) {
      packets.free(slots, got);
      return false;
    }
    for (let i = 0; i < count; i++) {
      packets.write(slots[i], frame.subarray(i * each, (i + 1) * each));
      packets.next[slots[i]] = i + 1 < count ? slots[i + 1] : NO_PACKET;
    }
    const [head] = slots;
    const { offload } = this.#tap;
    if (offload.needsChecksum) {
      packets.flags[head] = PacketFlag.needsChecksum;
      packets.checksumStart[head] = offload.checksumStart;
      packets.checksumOffset[head] = offload.checksumOffset;
    }
    if (offload.gsoType !== 0) {
      packets.flags[head] |= PacketFlag.segmented;
      packets.gsoType[head] = offload.gsoType;
      packets.gsoSize[head] = offload.gsoSize;
    }
    if (queues[0].tx.burst(slots, 1) === 1) return true;
    packets.freeChains(slots, 1);
    return false;
  }

  #count(crossed: Crossed, { length }: Uint8Array): void {
    crossed.packets++;
    if (length > this.#nic.mtu + ETHERNET) crossed.large++;
    crossed.longest = Math.max(crossed.longest, length);
  }
}
