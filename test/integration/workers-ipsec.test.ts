import { afterEach, describe, expect, it } from 'vitest';
import { HashType, type SaNotification, SaPair } from '../../src/index.ts';
import { ffi } from '../../src/sys/ffi/ffi.ts';
import { MappingLedger } from '../../src/sys/mapping-ledger.ts';
import {
  capture,
  cleanUp,
  fixChecksum,
  isProtected,
  openPair,
  type Received,
  receive,
  saPair,
  send,
  until,
} from './support.ts';
import { Host, handOver, hire, reversed, type Spinning, turns } from './worker-support.ts';

afterEach(cleanUp);

const frames = capture('http-ipv4').filter(isProtected);
const code = (name: string) => expect.objectContaining({ code: name });

/** SPI and sequence number of an ESP packet over IPv4; null for anything else. */
function esp(frame: Buffer): { spi: number; sequence: number } | null {
  if (frame.readUInt16BE(12) !== 0x0800 || frame[23] !== 50) return null;
  const at = 14 + (frame[14] & 0xf) * 4;
  return { spi: frame.readUInt32BE(at), sequence: frame.readUInt32BE(at + 4) };
}

/** Two NICs with a wire between them; that of `a` has its last `pairs - 1` queue pairs in worker threads. */
async function wired(ipsec: 'software' | 'auto', pairs = 2) {
  const nic = { queuePairs: pairs, workerQueues: pairs - 1, ipsec } as const;
  return openPair({ queuePairs: pairs, nic }, { nic: { ipsec } });
}

/** Sends under the SA from a thread that polls, until `until` holds. */
async function flood(spinning: Spinning, handle: number, wanted: () => boolean): Promise<void> {
  Atomics.store(spinning.words, 1, handle);
  await until(wanted, () => 'the thread sends too little');
}

/** What must hold for everything on the wire: nothing in the clear, no sequence number twice. */
function checkWire(sent: readonly { from: 'a' | 'b'; frame: Buffer }[]): Map<number, number[]> {
  const bySpi = new Map<number, number[]>();
  for (const { from, frame } of sent) {
    if (from !== 'a') continue;
    const packet = esp(frame);
    if (packet === null) throw new Error(`in the clear: ${frame.toString('hex')}`);
    const numbers = bySpi.get(packet.spi) ?? [];
    numbers.push(packet.sequence);
    bySpi.set(packet.spi, numbers);
  }
  for (const numbers of bySpi.values()) expect(new Set(numbers).size).toBe(numbers.length);
  return bySpi;
}

describe.each(['software', 'auto'] as const)('SAs of worker threads, ipsec %s', (ipsec) => {
  it('protect what their thread sends, and only that', async () => {
    const { a, b, wire } = await wired(ipsec, 3);
    const [first, second] = await Promise.all(a.workerQueues.map((queue) => hire(queue)));
    const pairs = [saPair(), saPair(), saPair()];
    const [mine, one, two] = [
      await a.ipsec.addSa(pairs[0].outbound),
      await a.ipsec.addSa(pairs[1].outbound, { queue: 1 }),
      await a.ipsec.addSa(pairs[2].outbound, { queue: 2 }),
    ];
    expect([mine, one, two].map(({ queue }) => queue)).toEqual([null, 1, 2]);
    for (const { inbound } of pairs) await b.ipsec.addSa(inbound);
    const want = { where: ipsec === 'auto' ? 'inline' : 'software' };
    expect(one.placement).toMatchObject(want);

    await send(a, frames.slice(0, 10), mine);
    await first.send(1, frames.slice(0, 20), one.handle);
    await second.send(2, frames.slice(0, 30), two.handle);
    const got = await receive(b, 60);
    expect(got).toHaveLength(60);
    expect(got.every(({ sa }) => sa !== 0)).toBe(true);
    expect([mine, one, two].map((sa) => sa.traffic().packets)).toEqual([10n, 20n, 30n]);
    const inner = frames.slice(0, 20).reduce((sum, { length }) => sum + length - 14, 0);
    expect(one.traffic().bytes).toBe(BigInt(inner));

    // Each on every queue but its own.
    await send(a, frames.slice(0, 4), one);
    await send(a, frames.slice(0, 4), two);
    for (const sa of [mine, two]) await first.send(1, frames.slice(0, 4), sa.handle);
    for (const sa of [mine, one]) await second.send(2, frames.slice(0, 4), sa.handle);
    // And one that nobody has.
    await first.send(1, frames.slice(0, 4), 77);
    expect(a.statistics().tx.dropped).toEqual({ 'foreign-sa': 24, 'no-sa': 4 });
    await first.send(1, frames.slice(0, 1), one.handle);
    expect(await receive(b, 1)).toHaveLength(1);
    const numbers = [...checkWire(wire.frames).values()].map((all) => all.length);
    expect(numbers.sort()).toEqual([10, 21, 30]);
  });

  it('are made and removed while the thread polls, and say how far they came', async () => {
    const { a, wire } = await wired(ipsec);
    const host = await hire(a.workerQueues[0]);
    const spinning = host.spin(1, frames[0]);
    const spis: number[] = [];
    for (let i = 0; i < 3; i++) {
      const { outbound } = saPair();
      const sa = await a.ipsec.addSa(outbound, { queue: 1 });
      spis.push(Number(outbound.spi));
      await flood(spinning, sa.handle, () => sa.traffic().packets > 50n);
      // The thread goes on asking for the SA that is gone.
      await sa.remove();
      const { packets } = sa.traffic();
      await turns(spinning);
      expect(sa.traffic().packets).toBe(packets);
      // A key that has been used is not taken again, in whichever thread.
      for (const queue of [0, 1]) {
        await expect(a.ipsec.addSa(outbound, { queue })).rejects.toThrow(code('NONCE_REUSE'));
      }
      if (ipsec === 'software') {
        // Software has counted, so it may come back behind its last number.
        const more = { ...outbound, initial: { sequence: packets + 1n } };
        const again = await a.ipsec.addSa(more, { queue: 1 });
        await flood(spinning, again.handle, () => again.traffic().packets > 20n);
        await again.remove();
      }
    }
    spinning.words[0] = 1;
    expect(await spinning.ended).toBeNull();
    expect([...checkWire(wire.frames).keys()].sort()).toEqual(spis.sort());
    expect(a.statistics().tx.dropped['no-sa']).toBeGreaterThan(0);
  });

  it('are over with their thread, and their nonces used, however it ends in the middle of a burst', async () => {
    const { a, wire } = await wired(ipsec);
    const [queue] = a.workerQueues;
    const kill = (host: Host) => host.worker.terminate();
    const giveBack = async (host: Host, spinning: Spinning) => {
      spinning.words[0] = 1;
      await spinning.ended;
      return host.do('close', { index: 1 });
    };
    for (const end of [kill, giveBack]) {
      const host = await hire(queue);
      const { outbound } = saPair();
      const sa = await a.ipsec.addSa(outbound, { queue: 1 });
      const spinning = host.spin(1, frames[0]);
      await flood(spinning, sa.handle, () => sa.traffic().packets > 50n);
      await end(host, spinning);
      await until(
        () => a.ipsec.get(sa.handle) === undefined,
        () => 'the SA is still there',
      );
      expect(sa.traffic().packets).toBeGreaterThan(50n);
      await expect(sa.modify(outbound)).rejects.toThrow(code('NO_SUCH_SA'));
      await sa.remove();
      await expect(a.ipsec.addSa(outbound, { queue: 1 })).rejects.toThrow(code('SA_QUEUE'));
      await expect(a.ipsec.addSa(outbound, { queue: 0 })).rejects.toThrow(code('NONCE_REUSE'));
      const next = end === kill ? new Host() : host;
      await handOver(queue, next);
      await expect(a.ipsec.addSa(outbound, { queue: 1 })).rejects.toThrow(code('NONCE_REUSE'));
      // A new key goes.
      const other = await a.ipsec.addSa(saPair().outbound, { queue: 1 });
      await other.remove();
      await next.do('close', { index: 1 });
      await until(
        () => queue.state === 'free',
        () => 'the queue did not come back',
      );
    }
    checkWire(wire.frames);
  });

  it('tell of what happens to them on the stream of the NIC', async () => {
    const { a } = await wired(ipsec);
    const host = await hire(a.workerQueues[0]);
    const told: [string, string | null, number][] = [];
    a.ipsec.onSaEvent(({ sa, event, limit }: SaNotification) => told.push([event, limit, sa.handle]));
    const sa = await a.ipsec.addSa(saPair({ lifetime: { softPackets: 5n, hardPackets: 8n } }).outbound, { queue: 1 });
    await host.send(1, frames.slice(0, 12), sa.handle);
    await until(
      () => told.length === 2,
      () => `told: ${JSON.stringify(told)}`,
    );
    expect(told).toEqual([
      ['soft-expiry', 'packets', sa.handle],
      ['hard-expiry', 'packets', sa.handle],
    ]);
    expect(sa.traffic()).toMatchObject({ packets: 8n, softExpired: true, dropped: { expired: 4 } });
    expect(a.statistics().tx.dropped).toEqual({ expired: 4 });
  });

  it('get new parameters between two bursts, and go on counting with the key that they have', async () => {
    const { a, b, wire } = await wired(ipsec);
    const host = await hire(a.workerQueues[0]);
    const { outbound, inbound } = saPair();
    const [sa, peer] = [await a.ipsec.addSa(outbound, { queue: 1 }), await b.ipsec.addSa(inbound)];
    await host.send(1, frames.slice(0, 5), sa.handle);
    expect(await receive(b, 5)).toHaveLength(5);
    const next = saPair();
    const rekeyed = {
      outbound: { ...next.outbound, spi: outbound.spi },
      inbound: { ...next.inbound, spi: outbound.spi },
    };
    if (ipsec === 'software') {
      await sa.modify({ ...outbound, lifetime: { softPackets: 100n } });
      await host.send(1, frames.slice(0, 5), sa.handle);
      expect(await receive(b, 5)).toHaveLength(5);
    } else {
      // The standard does not say whether the device would repeat its numbers.
      await expect(sa.modify(outbound)).rejects.toThrow(code('NONCE_REUSE'));
    }
    await peer.modify(rekeyed.inbound);
    await sa.modify(rekeyed.outbound);
    await host.send(1, frames.slice(0, 5), sa.handle);
    const got = await receive(b, 5);
    expect(got.map(({ sa: handle }) => handle)).toEqual(Array(5).fill(peer.handle));
    const counts = [...(ipsec === 'software' ? [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] : [1, 2, 3, 4, 5]), 1, 2, 3, 4, 5];
    expect(wire.frames.map(({ frame }) => esp(frame)?.sequence)).toEqual(counts);
    await expect(sa.move(ipsec === 'software' ? 'inline' : 'software', rekeyed.outbound)).rejects.toThrow(
      code('SA_MOVE'),
    );
  });
});

describe('a thread that does not look at its queue', () => {
  it('gets no SA later that was refused meanwhile, and its key is as new', async () => {
    const nic = { queuePairs: 2, workerQueues: 1, ipsec: 'software', commandTimeout: 400 } as const;
    const { a, wire } = await openPair({ queuePairs: 2, nic }, { nic: { ipsec: 'off' } });
    const host = await hire(a.workerQueues[0]);
    const { outbound } = saPair();
    const words = new Int32Array(new SharedArrayBuffer(4));
    const blocked = host.do('block', { words });
    await expect(a.ipsec.addSa(outbound, { queue: 1 })).rejects.toThrow(code('QUEUE_TIMEOUT'));
    expect(a.ipsec.list()).toEqual([]);
    Atomics.store(words, 0, 1);
    Atomics.notify(words, 0);
    await blocked;
    // Nothing of it reached the thread: the handle that it would have had means nothing there.
    await host.send(1, frames.slice(0, 3), 1);
    expect(a.statistics().tx.dropped).toEqual({ 'no-sa': 3 });
    const sa = await a.ipsec.addSa(outbound, { queue: 1 });
    await host.send(1, frames.slice(0, 3), sa.handle);
    await until(
      () => wire.frames.length === 3,
      () => `${wire.frames.length} frames`,
    );
    expect(wire.frames.map(({ frame }) => esp(frame)?.sequence)).toEqual([1, 2, 3]);
  });
});

describe('a thread with SAs that dies', () => {
  it('leaves no key in memory', async () => {
    const { a } = await wired('software');
    const [queue] = a.workerQueues;
    const host = new Host();
    const handle = await queue.transfer();
    await host.open(handle);
    await until(
      () => queue.state === 'open',
      () => queue.state,
    );
    const { outbound } = saPair({
      aead: { name: 'aes-gcm', key: '8f1d2c3b4a59687786a5b4c3d2e1f00f', salt: '01020304' },
    });
    const sa = await a.ipsec.addSa(outbound, { queue: 1 });
    await host.send(1, frames.slice(0, 3), sa.handle);
    const { entries } = new MappingLedger(handle.ledger);
    // Rings, packets, and whatever the engine has.
    expect(entries.length).toBeGreaterThanOrEqual(3);
    const contents = () => entries.map(({ address, size }) => Buffer.from(ffi().view(address, size)));
    expect(contents().some((bytes) => bytes.some((byte) => byte !== 0))).toBe(true);
    await host.worker.terminate();
    await until(
      () => queue.state === 'free',
      () => queue.state,
    );
    for (const bytes of contents()) expect(bytes.every((byte) => byte === 0)).toBe(true);
  });

  it('does not disturb those of other threads, nor the library that they share', async () => {
    const { a, b, wire } = await wired('software', 3);
    const [first, second] = await Promise.all(a.workerQueues.map((queue) => hire(queue)));
    const pairs = [saPair(), saPair(), saPair()];
    for (const { inbound } of pairs) await b.ipsec.addSa(inbound);
    const [mine, one, two] = await Promise.all(
      pairs.map(({ outbound }, i) => a.ipsec.addSa(outbound, i === 0 ? {} : { queue: i })),
    );
    const spinning = first.spin(1, frames[0]);
    await flood(spinning, one.handle, () => one.traffic().packets > 20n);
    await first.worker.terminate();
    await until(
      () => a.workerQueues[0].state === 'free',
      () => 'the queue did not come back',
    );
    await second.send(2, frames.slice(0, 20), two.handle);
    await send(a, frames.slice(0, 20), mine);
    const got = await receive(b, 40 + Number(one.traffic().packets), 200);
    expect(got.every(({ sa }) => sa !== 0)).toBe(true);
    expect([mine, two].map((sa) => sa.traffic().packets)).toEqual([20n, 20n]);
    const other = await a.ipsec.addSa(saPair().outbound, { queue: 2 });
    await second.send(2, frames.slice(0, 5), other.handle);
    expect(other.traffic().packets).toBe(5n);
    checkWire(wire.frames);
  });
});

describe('inbound SAs', () => {
  it('that run in software open what comes to their queue, with one window; elsewhere it stays what it was', async () => {
    const { a, b, wire } = await wired('software');
    const host = await hire(a.workerQueues[0]);
    const { outbound, inbound } = saPair();
    const sa = await a.ipsec.addSa(inbound, { queue: 1 });
    const peer = await b.ipsec.addSa(outbound);
    const fromPeer = () => wire.frames.filter(({ from }) => from === 'b').map(({ frame }) => frame);
    const sendPeer = async (some: readonly Buffer[]) => {
      const before = fromPeer().length;
      await send(b, some, peer);
      await until(
        () => fromPeer().length === before + some.length,
        () => 'packets are missing',
      );
    };
    // Whichever queue that goes to; from then on the device delivers the flow to the queue on which it was answered last.
    await sendPeer(frames.slice(0, 1));
    const [first] = fromPeer();
    expect(esp(first)).toEqual({ spi: inbound.spi, sequence: 1 });
    await host.receive(1, 1, 200);
    const before = sa.traffic().packets;
    await receive(a, 0);
    await send(a, [reversed(first)], null);
    await sendPeer(frames.slice(0, 1));
    const [closed] = await receive(a, 1);
    expect(closed).toMatchObject({ sa: 0, frame: fromPeer()[1] });
    await host.send(1, [reversed(first)]);
    const got = host.receive(1, 4, 2000);
    await sendPeer(frames.slice(1, 5));
    const opened = await got;
    // Once more what was on the wire: a replay.
    for (const frame of fromPeer().slice(2, 4)) wire.inject(frame, 'a');
    await host.receive(1, 1, 300);
    expect(opened.filter(({ sa: handle }) => handle === sa.handle).map(({ frame }) => frame)).toEqual(
      frames.slice(1, 5),
    );
    expect(sa.traffic().packets).toBe(before + 4n);
    expect(a.statistics().rx.dropped).toEqual({ replay: 2 });
    await sa.remove();
    expect(sa.traffic()).toMatchObject({ packets: before + 4n, dropped: { replay: 2 } });
  });

  it('that run on the device are known to every queue, also one that is opened later, and counted together', async () => {
    const pairs = 3;
    const nic = { queuePairs: pairs, workerQueues: 2, ipsec: 'auto' } as const;
    const { a, b } = await openPair({ queuePairs: pairs, nic }, { nic: { ipsec: 'software' } });
    const { outbound, inbound } = saPair({ lifetime: { softPackets: 12n } });
    const told: string[] = [];
    a.ipsec.onSaEvent(({ event }) => told.push(event));
    const first = await hire(a.workerQueues[0]);
    const sa = await a.ipsec.addSa(inbound);
    expect(sa.placement.where).toBe('inline');
    const second = await hire(a.workerQueues[1]);
    const peer = await b.ipsec.addSa({ ...outbound, lifetime: {} });
    const to = async (host: Host, index: number, from: number) => {
      // From now on the device delivers this flow to the queue that it was sent on.
      await host.send(index, [reversed(frames[0])]);
      const got = host.receive(index, from, 1500);
      await send(b, frames.slice(0, 1).concat(Array(4).fill(frames[0])).slice(0, from), peer);
      return got;
    };
    for (const [host, index] of [
      [first, 1],
      [second, 2],
    ] as const) {
      const got = await to(host, index, 5);
      expect(got.map(({ sa: handle }) => handle)).toEqual(Array(5).fill(sa.handle));
    }
    expect(sa.traffic().packets).toBe(10n);
    expect(told).toEqual([]);
    expect(await to(first, 1, 5)).toHaveLength(5);
    await until(
      () => told.length > 0,
      () => 'the soft limit was not told of',
    );
    expect(told).toEqual(['soft-expiry']);
    // What a thread has counted stays when it ends.
    await first.worker.terminate();
    await until(
      () => a.workerQueues[0].state === 'free',
      () => 'the queue did not come back',
    );
    expect(sa.traffic().packets).toBe(15n);
    await sa.remove();
    // What comes for it now is nobody's; the id may have another SA next, which gets nothing of it.
    await b.ipsec.addSa(saPair().outbound);
    const next = await a.ipsec.addSa(saPair().inbound);
    const left = await to(second, 2, 3);
    expect(left.every(({ sa: handle }) => handle === 0)).toBe(true);
    expect(next.traffic().packets).toBe(0n);
  });

  it('that run on the device are spread over the threads by RSS, each packet once', async () => {
    const nic = { queuePairs: 3, workerQueues: 2, ipsec: 'auto', offloads: { rss: true } } as const;
    const { a, b } = await openPair({ queuePairs: 3, nic }, { nic: { ipsec: 'software' } });
    const [first, second] = await Promise.all(a.workerQueues.map((queue) => hire(queue)));
    await a.control?.setRss({
      hashTypes: HashType.UDPV4,
      unclassifiedQueue: 0,
      indirectionTable: [0, 1, 2, 1],
      maxTransmitQueues: 3,
      key: Uint8Array.from({ length: 40 }, (_, i) => i * 37 + 11),
    });
    const { outbound, inbound } = saPair();
    const sa = await a.ipsec.addSa(inbound);
    const peer = await b.ipsec.addSa(outbound);
    const flows = Array.from({ length: 60 }, (_, i) => udpFrame(2000 + i));
    await send(b, flows, peer);
    const all: Received[][] = [[], [], []];
    const deadline = performance.now() + 20_000;
    // Once more after the last one: each may come once only.
    for (let more = true; more; ) {
      more = all.flat().length < flows.length && performance.now() < deadline;
      all[0].push(...(await receive(a, 0, 1)));
      all[1].push(...(await first.receive(1, flows.length, 50)));
      all[2].push(...(await second.receive(2, flows.length, 50)));
    }
    for (const some of all) expect(some.length).toBeGreaterThan(0);
    expect(all.flat().every(({ sa: handle }) => handle === sa.handle)).toBe(true);
    const text = (some: readonly Uint8Array[]) => some.map((frame) => Buffer.from(frame).toString('hex')).sort();
    expect(text(all.flat().map(({ frame }) => frame))).toEqual(text(flows));
    expect(sa.traffic().packets).toBe(60n);
    expect(a.statistics().rx).toMatchObject({ packets: 60, securityError: 0, unknownSa: 0 });
  });

  it('are rekeyed in pairs while a thread sends, without a gap', async () => {
    const { a, b, wire } = await wired('software');
    const host = await hire(a.workerQueues[0]);
    const out = saPair();
    const back = saPair();
    const mine = await SaPair.open(
      a.ipsec,
      { outbound: out.outbound, inbound: back.inbound },
      { queue: 1, graceMs: 0 },
    );
    const first = await b.ipsec.addSa(out.inbound);
    const words = new Int32Array(mine.current.buffer);
    const sending = host.do('sendWhile', { index: 1, words, frame: frames[0], count: 200 });
    await until(
      () => mine.outbound.traffic().packets >= 50n,
      () => 'the thread sends too little',
    );
    const next = [saPair(), saPair()];
    const second = await b.ipsec.addSa(next[0].inbound);
    const retired = await mine.rekey({ outbound: next[0].outbound, inbound: next[1].inbound });
    await retired.done;
    expect(await sending).toBe(200);
    const got = await receive(b, 200);
    expect(got).toHaveLength(200);
    const bySa = [first, second].map(({ handle }) => got.filter(({ sa }) => sa === handle).length);
    expect(bySa[0] + bySa[1]).toBe(200);
    expect(bySa[0]).toBeGreaterThanOrEqual(50);
    expect(bySa[1]).toBeGreaterThan(0);
    // Never the old one again after the new one.
    const spis = wire.frames.map(({ frame }) => esp(frame)?.spi ?? 0);
    expect(spis.lastIndexOf(Number(out.outbound.spi))).toBeLessThan(spis.indexOf(Number(next[0].outbound.spi)));
    checkWire(wire.frames);
    await mine.close();
  });
});

/** A UDP packet over IPv4 from a port. */
function udpFrame(port: number): Buffer {
  const frame = Buffer.alloc(64);
  frame.write('02000000000202000000000108004500003200010000401100000a0000010a000002', 'hex');
  fixChecksum(frame);
  frame.writeUInt16BE(port, 34);
  frame.writeUInt16BE(9, 36);
  frame.writeUInt16BE(30, 38);
  return frame;
}
