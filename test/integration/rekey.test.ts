import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { type Nic, SaPair, type SaPairInput } from '../../src/index.ts';
import { capture, cleanUp, openPair, type Pair, saPair, until } from './support.ts';

afterEach(cleanUp);

const [template] = capture('http-ipv4').filter((frame) => frame.readUInt16BE(12) === 0x0800);

/** A frame that carries `number`; its IP header is one from a capture. */
function numbered(number: number): Buffer {
  const frame = Buffer.alloc(14 + 20 + 40);
  template.copy(frame, 0, 0, 34);
  frame.writeUInt16BE(60, 16);
  frame.writeUInt32BE(number, 34);
  return frame;
}

/** The most packets on their way at a time: fewer than the rings hold, so that only what is wrong loses one. */
const WINDOW = 100;

/** Packets in one direction, numbered, from one station's pair of SAs to the other's, until it is stopped. */
class Stream {
  sent = 0;
  readonly received: number[] = [];
  readonly wrong: string[] = [];
  readonly usedOutbound = new Set<number>();
  readonly usedInbound = new Set<number>();
  #stopped = false;
  readonly #from: Nic;
  readonly #to: Nic;
  readonly #sender: SaPair;
  readonly #receiver: SaPair;
  readonly #packets = new Uint32Array(32);

  constructor(from: Nic, sender: SaPair, to: Nic, receiver: SaPair) {
    this.#from = from;
    this.#to = to;
    this.#sender = sender;
    this.#receiver = receiver;
  }

  async run(): Promise<void> {
    while (!this.#stopped) {
      this.#send();
      this.#receive();
      await sleep(0);
    }
  }

  /** Sends no more and waits for what is on its way. */
  async stop(): Promise<void> {
    this.#stopped = true;
    const missing = () => `${this.sent - this.received.length} of ${this.sent} packets did not arrive`;
    await until(() => {
      this.#receive();
      return this.received.length >= this.sent;
    }, missing);
  }

  #send(): void {
    const { packets, queues } = this.#from;
    const [{ tx }] = queues;
    tx.reclaim();
    const want = Math.min(8, WINDOW - (this.sent - this.received.length));
    if (want <= 0) return;
    const n = packets.allocate(this.#packets, want);
    for (let i = 0; i < n; i++) {
      packets.write(this.#packets[i], numbered(this.sent + i));
      packets.sa[this.#packets[i]] = this.#sender.handle;
    }
    this.usedOutbound.add(this.#sender.handle);
    const taken = tx.burst(this.#packets, n);
    packets.free(this.#packets.subarray(taken), n - taken);
    this.sent += taken;
  }

  #receive(): void {
    const { packets, queues } = this.#to;
    const n = queues[0].rx.burst(this.#packets, this.#packets.length);
    for (let i = 0; i < n; i++) {
      const p = this.#packets[i];
      const handle = packets.sa[p];
      if (this.#receiver.accepts(handle)) this.received.push(Buffer.from(packets.read(p)).readUInt32BE(34));
      else this.wrong.push(Buffer.from(packets.read(p)).toString('hex'));
      this.usedInbound.add(handle);
    }
    packets.free(this.#packets, n);
  }
}

/** SAs for both directions, for both stations. */
function both(): { a: SaPairInput; b: SaPairInput } {
  const forth = saPair();
  const back = saPair();
  return {
    a: { outbound: forth.outbound, inbound: back.inbound },
    b: { outbound: back.outbound, inbound: forth.inbound },
  };
}

const places: [string, () => Promise<Pair>][] = [
  ['on two devices', () => openPair()],
  ['on a device and in software', () => openPair({}, { ipsec: false })],
  ['in software', () => openPair({ ipsec: false }, { ipsec: false })],
  ['on two devices of the draft', () => openPair(draft, draft)],
];
const draft = { wire: 'rfc-2025-01', nic: { wire: 'rfc-2025-01' } } as const;

describe('rekeying while traffic runs', () => {
  it.each(places)('loses, repeats and exposes no packet: %s', async (_name, opened) => {
    const { a, b, wire } = await opened();
    const first = both();
    const atA = await SaPair.open(a.ipsec, first.a, { graceMs: 60_000 });
    const atB = await SaPair.open(b.ipsec, first.b, { graceMs: 60_000 });
    const forth = new Stream(a, atA, b, atB);
    const back = new Stream(b, atB, a, atA);
    const running = [forth.run(), back.run()];
    for (let round = 0; round < 4; round++) {
      const before = [forth.received.length, back.received.length];
      await until(
        () => forth.received.length > before[0] + 100 && back.received.length > before[1] + 100,
        () => `the traffic stands still: ${forth.wrong.length} and ${back.wrong.length} packets came without an SA`,
      );
      const next = both();
      // As IKE does it: A asks, B prepares and answers, A switches, B switches when it sees that.
      const preparedA = await atA.prepare(next.a);
      const preparedB = await atB.prepare(next.b);
      const oldA = preparedA.switchOver();
      await until(
        () => forth.usedInbound.has(preparedB.inbound.handle),
        () => 'the new SA was never used',
      );
      const oldB = preparedB.switchOver();
      // The peers tell each other that nothing more comes with the old SAs, which a loaded machine may delay for long.
      const under = [forth.sent, back.sent];
      await until(
        () => forth.received.length >= under[0] && back.received.length >= under[1],
        () => 'packets under the old SAs did not arrive',
      );
      await Promise.all([oldA.now(), oldB.now()]);
    }
    await forth.stop();
    await back.stop();
    await Promise.all(running);
    for (const stream of [forth, back]) {
      expect(stream.wrong).toEqual([]);
      expect(stream.received).toEqual(Array.from({ length: stream.sent }, (_, i) => i));
      expect(stream.usedOutbound.size).toBe(5);
      expect(stream.usedInbound.size).toBe(5);
    }
    expect(a.ipsec.list()).toHaveLength(2);
    expect(b.ipsec.list()).toHaveLength(2);
    expect(wire.frames.every(({ frame }) => frame[14 + 9] === 50)).toBe(true);
    const spis = new Set(wire.frames.map(({ frame, from }) => `${from} ${frame.readUInt32BE(34)}`));
    expect(spis.size).toBe(10);
  });
});
