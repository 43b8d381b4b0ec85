/**
 * Traffic between the two ends of the demo, then two attacks on each, and the numbers that come of them.
 */
import { Esp, Ethernet, EtherType, InputError, IpProtocol, Ipv4, Ipv6, VfioError } from '../../src/index.ts';
import type { DeviceProcess } from './device-process.ts';
import type { Check, DemoReport } from './report.ts';
import type { OwnedSa, Station } from './station.ts';
import type { Traffic } from './traffic.ts';
import { otherSide, SIDES, type Side, type Wire } from './wire.ts';

/** Descriptors of each ring. A notification costs a message and its answer: the more frames for each, the better. */
export const RING = 1024;
/** Frames on their way in one direction, at most: half of what the rings hold, so that none is dropped. */
const WINDOW = RING / 2;
/** Milliseconds without any frame after which the demo gives up. */
const SILENCE = 20_000;
/** A byte of the ICV of AES-GCM. */
const CORRUPTED_FROM_END = 5;

const Names = ['east', 'west'] as const;

export interface ExchangeOptions {
  /** How often all captures are sent. */
  readonly rounds: number;
  readonly signal: AbortSignal;
  /** Told what is going on, often. */
  readonly progress: (describe: () => string) => void;
}

/** What the demo has measured before anybody else has looked at the wire. */
export type Measured = Omit<DemoReport, 'ok' | 'tshark' | 'checks' | 'files'> & {
  readonly checks: Check[];
  /** Packets that were replayed and corrupted on the wire. */
  readonly replayed: number;
  readonly corrupted: number;
};

/** Stations and the wire between them; `inlineDevice` is the device of the first one. */
export class Exchange {
  readonly #stations: readonly [Station, Station];
  readonly #wire: Wire;
  readonly #inlineDevice: DeviceProcess;
  readonly #options: ExchangeOptions;
  /** From each side: ESP and other frames on the wire, the last ESP frame, and whether the next one is to be changed. */
  readonly #esp: [number, number] = [0, 0];
  readonly #clear: [number, number] = [0, 0];
  readonly #last: [Uint8Array | null, Uint8Array | null] = [null, null];
  readonly #corrupt: [boolean, boolean] = [false, false];
  #lastArrival = 0;

  constructor(
    stations: readonly [Station, Station],
    wire: Wire,
    inlineDevice: DeviceProcess,
    options: ExchangeOptions,
  ) {
    this.#stations = stations;
    this.#wire = wire;
    this.#inlineDevice = inlineDevice;
    this.#options = options;
    stations[0].peer = stations[1];
    stations[1].peer = stations[0];
    wire.tap = (from, frame) => this.#tap(from, frame);
  }

  async run(traffic: Traffic): Promise<Measured> {
    const seconds = await this.#exchange(traffic);
    const counted = this.#stations.map(({ counters }) => ({ ...counters }));
    for (const side of SIDES) await this.#attack(side, traffic[side]);
    const refusedByDevice = (await this.#inlineDevice.statistics()).unprotect;
    const frames = counted.reduce((sum, { received }) => sum + received, 0);
    const bytes = counted.reduce((sum, { receivedBytes }) => sum + receivedBytes, 0);
    return {
      seconds,
      packetsPerSecond: Math.round(frames / seconds),
      megabitsPerSecond: Math.round((bytes * 8) / seconds / 1e6),
      directions: SIDES.map((side) => this.#direction(side, refusedByDevice)),
      sas: this.#sas(),
      wire: {
        frames: this.#wire.frames[0] + this.#wire.frames[1],
        esp: this.#esp[0] + this.#esp[1],
        clear: this.#clear[0] + this.#clear[1],
      },
      checks: this.#checks(traffic, refusedByDevice),
      replayed: 2,
      corrupted: 2,
    };
  }

  /** Sends everything both ways; returns how many seconds that took. */
  async #exchange(traffic: Traffic): Promise<number> {
    const start = performance.now();
    const total = (traffic[0].length + traffic[1].length) * this.#options.rounds;
    const amounts = SIDES.map((side) => traffic[side].length * this.#options.rounds);
    const next: [number, number] = [0, 0];
    await this.#pump(
      () => SIDES.every((side) => next[side] === amounts[side] && this.#stations[side].awaited === 0),
      () => {
        for (const side of SIDES) {
          if (next[side] === amounts[side] || this.#stations[otherSide(side)].awaited >= WINDOW) continue;
          next[side] += this.#stations[side].send(traffic[side], next[side] % traffic[side].length);
        }
        this.#options.progress(() => this.#progress(total, start));
      },
    );
    return (performance.now() - start) / 1000;
  }

  #progress(total: number, start: number): string {
    const [east, west] = this.#stations.map(({ counters }) => counters);
    const received = east.received + west.received;
    const rate = Math.round(received / (performance.now() - start));
    return `${received} of ${total} packets, ${east.verified + west.verified} verified, ${rate} kpps`;
  }

  /**
   * On the way from `from`: the last ESP packet once more, and one whose bits are changed. Then a good one: when it is there, the
   * others have been dealt with, because the wire keeps the order.
   */
  async #attack(from: Side, frames: readonly Uint8Array[]): Promise<void> {
    const sender = this.#stations[from];
    const receiver = this.#stations[otherSide(from)];
    const last = this.#last[from];
    const frame = frames.find((candidate) => etherType(candidate) === EtherType.ipv4);
    if (last === null || frame === undefined) throw new VfioError('DEMO', 'no protected packet was seen on the wire');
    this.#options.progress(() => `replaying and corrupting a packet towards ${Names[otherSide(from)]}`);
    this.#wire.send(otherSide(from), last);
    this.#corrupt[from] = true;
    sender.send([frame], 0, true);
    sender.send([frame], 0);
    await this.#pump(
      () => receiver.awaited === 0,
      () => {},
    );
  }

  /** Lets frames arrive, and the wire work, until `done`. */
  async #pump(done: () => boolean, step: () => void): Promise<void> {
    this.#lastArrival = performance.now();
    while (!done()) {
      if (this.#options.signal.aborted) throw new InputError('INTERRUPTED', 'interrupted');
      step();
      let arrived = 0;
      for (const side of SIDES) arrived += this.#stations[side].receive();
      this.#watch(arrived);
      await new Promise(setImmediate);
    }
  }

  #watch(arrived: number): void {
    for (const { nic } of this.#stations) if (nic.broken !== null) throw nic.broken;
    if (this.#wire.failure !== null) throw this.#wire.failure;
    const now = performance.now();
    if (arrived > 0) this.#lastArrival = now;
    else if (now - this.#lastArrival > SILENCE) {
      const awaited = this.#stations.map((one, side) => `${one.awaited} for ${Names[side]}`).join(', ');
      throw new VfioError('DEMO_STALLED', `packets were lost: ${awaited}`);
    }
  }

  #tap(from: Side, frame: Uint8Array): boolean {
    if (!isEsp(frame)) {
      this.#clear[from]++;
      return true;
    }
    this.#esp[from]++;
    if (this.#corrupt[from]) {
      this.#corrupt[from] = false;
      frame[frame.length - CORRUPTED_FROM_END] ^= 0x10;
    } else {
      this.#last[from] = frame.slice();
    }
    return true;
  }

  #direction(from: Side, refusedByDevice: Readonly<Record<string, number>>): DemoReport['directions'][number] {
    const sender = this.#stations[from];
    const receiver = this.#stations[otherSide(from)];
    const { sent, sentBytes, sentProtected } = sender.counters;
    const { received, receivedBytes, verified, clear, unexpected } = receiver.counters;
    return {
      name: `${Names[from]} to ${Names[otherSide(from)]}`,
      protectedBy: sender.outbound[0].handle.placement.where,
      verifiedBy: receiver.inbound[0].handle.placement.where,
      sent: { sent, sentBytes, sentProtected },
      arrived: { received, receivedBytes, verified, clear, unexpected },
      refused: this.#refused(otherSide(from), refusedByDevice),
    };
  }

  /** What one end refused: counted by its device where that does IPsec, and by the driver. */
  #refused(side: Side, refusedByDevice: Readonly<Record<string, number>>): Record<string, number> {
    const refused: Record<string, number> = { ...this.#stations[side].nic.statistics().rx.dropped };
    if (side !== 0) return refused;
    for (const [reason, count] of Object.entries(refusedByDevice)) {
      if (reason !== 'ok' && reason !== 'not-ipsec') refused[reason] = (refused[reason] ?? 0) + count;
    }
    return refused;
  }

  #sas(): DemoReport['sas'] {
    return this.#stations.flatMap((one, side) =>
      [...one.outbound, ...one.inbound].map(({ handle }) => {
        const { packets, bytes, dropped } = handle.traffic();
        const { where, because } = handle.placement;
        const { direction, spi } = handle;
        return {
          station: Names[side],
          name: handle.name ?? '',
          direction,
          spi,
          where,
          because,
          packets,
          bytes,
          dropped,
        };
      }),
    );
  }

  #checks(traffic: Traffic, refusedByDevice: Readonly<Record<string, number>>): Check[] {
    const checks: Check[] = [];
    const check = (what: string, expected: number | string, actual: number | string): void => {
      checks.push({ what, expected, actual });
    };
    for (const from of SIDES) {
      const sender = this.#stations[from];
      const receiver = this.#stations[otherSide(from)];
      const way = `${Names[from]} to ${Names[otherSide(from)]}`;
      const sent = sender.counters;
      const arrived = receiver.counters;
      // Beside the captures: the packet that is corrupted and the good one behind it.
      check(`${way}: packets sent`, traffic[from].length * this.#options.rounds + 2, sent.sent);
      check(`${way}: arrived as sent, under their SA`, sent.sentProtected - 1, arrived.verified);
      check(`${way}: arrived as sent, in the clear`, sent.sent - sent.sentProtected, arrived.clear);
      check(`${way}: arrived and not expected`, 0, arrived.unexpected);
      check(`${way}: ESP packets on the wire`, sent.sentProtected, this.#esp[from]);
      check(`${way}: packets in the clear on the wire`, arrived.clear, this.#clear[from]);
      check(`${way}: counted by the outbound SAs`, sent.sentProtected, packetsOf(sender.outbound));
      check(`${way}: counted by the inbound SAs`, arrived.verified, packetsOf(receiver.inbound));
      const { replay = 0, icv = 0, ...others } = this.#refused(otherSide(from), refusedByDevice);
      check(`${way}: replayed packet refused`, 1, replay);
      check(`${way}: corrupted packet refused`, 1, icv);
      check(`${way}: refused for another reason`, 0, total(others));
    }
    for (const [side, where] of [
      [0, 'inline'],
      [1, 'software'],
    ] as const) {
      const { outbound, inbound } = this.#stations[side];
      const places = new Set([...outbound, ...inbound].map(({ handle }) => handle.placement.where));
      check(`SAs of ${Names[side]}`, where, [...places].join(' and '));
    }
    return checks;
  }
}

function packetsOf(sas: readonly OwnedSa[]): number {
  return sas.reduce((sum, { handle }) => sum + Number(handle.traffic().packets), 0);
}

function total(counts: Readonly<Record<string, number>>): number {
  return Object.values(counts).reduce((sum, count) => sum + count, 0);
}

function etherType(frame: Uint8Array): number {
  return (frame[Ethernet.type] << 8) | frame[Ethernet.type + 1];
}

function isEsp(frame: Uint8Array): boolean {
  const type = etherType(frame);
  const protocolAt = type === EtherType.ipv4 ? Ipv4.protocol : type === EtherType.ipv6 ? Ipv6.nextHeader : -1;
  return (
    protocolAt >= 0 && frame.length > Ipv6.length + Esp.length && frame[Ethernet.length + protocolAt] === IpProtocol.esp
  );
}
