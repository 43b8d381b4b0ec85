import { afterEach, describe, expect, it } from 'vitest';
import type { SaHandle } from '../../src/index.ts';
import { capture, cleanUp, isProtected, openPair, receive, saPair, send, until } from './support.ts';
import { type Host, hire, reversed, type Spinning, turns } from './worker-support.ts';

afterEach(cleanUp);

const frames = capture('http-ipv4').filter(isProtected);
const code = (name: string) => expect.objectContaining({ code: name });
const either = (...names: string[]) =>
  expect.objectContaining({ code: expect.stringMatching(`^(${names.join('|')})$`) });

/** Behind the Ethernet and IPv4 headers of an ESP packet: SPI, sequence number, explicit IV. */
function esp(frame: Buffer): { sequence: number; iv: string } {
  if (frame.readUInt16BE(12) !== 0x0800 || frame[23] !== 50) throw new Error(`in the clear: ${frame.toString('hex')}`);
  const at = 14 + (frame[14] & 0xf) * 4;
  return { sequence: frame.readUInt32BE(at + 4), iv: frame.toString('hex', at + 8, at + 16) };
}

interface Crew {
  readonly first: Host;
  readonly second: Host;
}

/** Two NICs with a wire between them; that of `a` has queue pair 0, and two threads have 1 and 2. */
async function wired(ipsec: 'software' | 'auto', commandTimeout = 10_000) {
  const nic = { queuePairs: 3, workerQueues: 2, ipsec, commandTimeout } as const;
  const pair = await openPair({ queuePairs: 3, nic }, { nic: { ipsec } });
  const [first, second] = await Promise.all(pair.a.workerQueues.map((queue) => hire(queue)));
  // A thread that has no outbound SA at all leaves it to the ring to drop what names one.
  for (const queue of [0, 1, 2]) await pair.a.ipsec.addSa(saPair().outbound, { queue });
  return { ...pair, first, second };
}

/** The same, with an SA on queue pair 1 that has sent five packets. */
async function sending(ipsec: 'software' | 'auto', commandTimeout?: number) {
  const all = await wired(ipsec, commandTimeout);
  const { outbound } = saPair();
  const sa = await all.a.ipsec.addSa(outbound, { queue: 1 });
  await all.first.send(1, frames.slice(0, 5), sa.handle);
  return { ...all, sa, outbound };
}

/** What was sent under the one SA that there is: each number and each IV once, and none left out. */
function checkWire(sent: readonly { from: 'a' | 'b'; frame: Buffer }[], count: bigint): void {
  const packets = sent.filter(({ from }) => from === 'a').map(({ frame }) => esp(frame));
  const numbers = packets.map(({ sequence }) => sequence).sort((a, b) => a - b);
  expect(numbers).toEqual(Array.from({ length: Number(count) }, (_, i) => i + 1));
  expect(new Set(packets.map(({ iv }) => iv)).size).toBe(packets.length);
}

/** Has the thread stop until `go`. */
function hold(host: Host): { go(): Promise<void> } {
  const words = new Int32Array(new SharedArrayBuffer(4));
  const blocked = host.do('block', { words });
  blocked.catch(() => {});
  const go = async () => {
    Atomics.store(words, 0, 1);
    Atomics.notify(words, 0);
    await blocked;
  };
  return { go };
}

/** Waits until a thread has let go of the SA, whose packets are then nobody's. */
async function onTheWay(
  crew: Crew,
  a: { statistics(): { tx: { dropped: Readonly<Record<string, number>> } } },
  sa: SaHandle,
) {
  const foreign = () => a.statistics().tx.dropped['foreign-sa'] ?? 0;
  const deadline = performance.now() + 20_000;
  for (const before = foreign(); foreign() === before; ) {
    if (performance.now() > deadline) throw new Error('the thread still has the SA');
    await crew.first.send(1, frames.slice(0, 1), sa.handle);
  }
}

describe.each(['software', 'auto'] as const)('an SA that sends and goes from queue to queue, ipsec %s', (ipsec) => {
  it('uses each sequence number and each IV once, while all threads ask for it all the time', async () => {
    const { a, wire, first, second } = await wired(ipsec);
    const { outbound } = saPair();
    const sa = await a.ipsec.addSa(outbound, { queue: 1 });
    expect(sa.placement.where).toBe(ipsec === 'auto' ? 'inline' : 'software');
    const spinning: Spinning[] = [first.spin(1, frames[0]), second.spin(2, frames[0])];
    for (const { words } of spinning) Atomics.store(words, 1, sa.handle);
    for (const queue of [2, 0, 1, 0, 2, 1, 2, 1, 0, 1]) {
      const { packets } = sa.traffic();
      const own = sa.queue === null ? send(a, frames.slice(0, 5), sa) : null;
      await until(
        () => sa.traffic().packets > packets + 4n,
        () => `queue ${sa.queue} does not send`,
      );
      await own;
      await sa.moveToQueue(queue, outbound);
      expect(sa.queue).toBe(queue === 0 ? null : queue);
      expect(sa.traffic().packets).toBeGreaterThan(packets);
    }
    await turns(spinning[0]);
    for (const { words } of spinning) words[0] = 1;
    expect(await Promise.all(spinning.map(({ ended }) => ended))).toEqual([null, null]);
    const { packets, dropped } = sa.traffic();
    expect(dropped).toEqual({});
    await until(
      () => wire.frames.length >= Number(packets),
      () => `${wire.frames.length} of ${packets} packets`,
    );
    checkWire(wire.frames, packets);
    expect(a.statistics().tx.dropped['foreign-sa']).toBeGreaterThan(0);
    expect(a.statistics().tx.dropped['no-sa']).toBeUndefined();
    await sa.remove();
    expect(sa.traffic().packets).toBe(packets);
  });

  it('keeps its counters, its limits and what has been told', async () => {
    const { a, first, second } = await wired(ipsec);
    const told: (string | null)[] = [];
    a.ipsec.onSaEvent(({ event, limit }) => told.push(event, limit));
    const { outbound } = saPair({ lifetime: { softPackets: 6n, hardPackets: 20n } });
    const sa = await a.ipsec.addSa(outbound, { queue: 1 });
    await first.send(1, frames.slice(0, 8), sa.handle);
    await until(
      () => told.length === 2,
      () => 'the soft limit was not told of',
    );
    const before = sa.traffic();
    await sa.moveToQueue(2, outbound);
    const { packets, bytes, softExpired } = sa.traffic();
    expect({ packets, bytes, softExpired }).toEqual({
      packets: before.packets,
      bytes: before.bytes,
      softExpired: true,
    });
    await second.send(2, frames.slice(0, 8), sa.handle);
    await sa.moveToQueue(0, outbound);
    expect(sa.traffic()).toMatchObject({ packets: 16n, softExpired: true });
    await send(a, frames.slice(0, 8), sa);
    await sa.moveToQueue(1, outbound);
    await first.send(1, frames.slice(0, 3), sa.handle);
    expect(sa.traffic()).toMatchObject({ packets: 20n, dropped: { expired: 7 }, softExpired: true });
    expect(told).toEqual(['soft-expiry', 'packets', 'hard-expiry', 'packets']);
  });

  it('is refused where it cannot go, and stays as it is', async () => {
    const { a, first } = await wired(ipsec);
    const { outbound } = saPair();
    const sa = await a.ipsec.addSa(outbound, { queue: 1 });
    await expect(sa.moveToQueue(1, outbound)).rejects.toThrow(code('SA_MOVE'));
    await expect(sa.moveToQueue(3, outbound)).rejects.toThrow(code('SA_QUEUE'));
    for (const other of [
      { ...outbound, lifetime: { hardPackets: 5n } },
      { ...outbound, options: { copyDscp: true } },
      { ...saPair().outbound, spi: outbound.spi },
    ]) {
      await expect(sa.moveToQueue(2, other)).rejects.toThrow(code('SA_MOVE'));
    }
    await expect(sa.moveToQueue(2, saPair().outbound)).rejects.toThrow(code('SA_MODIFY'));
    await first.send(1, frames.slice(0, 3), sa.handle);
    expect(sa.traffic().packets).toBe(3n);
    await first.do('close', { index: 1 });
    await until(
      () => a.ipsec.get(sa.handle) === undefined,
      () => 'the SA is still there',
    );
    await expect(sa.moveToQueue(2, outbound)).rejects.toThrow(code('NO_SUCH_SA'));
  });

  it('goes back when the other thread does not look at its queue, and is not entered there later', async () => {
    const { a, wire, first, second, sa, outbound } = await sending(ipsec, 1500);
    const held = hold(second);
    await expect(sa.moveToQueue(2, outbound)).rejects.toThrow(code('QUEUE_TIMEOUT'));
    expect(sa.queue).toBe(1);
    await first.send(1, frames.slice(0, 5), sa.handle);
    await held.go();
    await second.send(2, frames.slice(0, 5), sa.handle);
    expect(a.statistics().tx.dropped).toEqual({ 'foreign-sa': 5 });
    expect(sa.traffic().packets).toBe(10n);
    // Nor does it leave a thread that does not look.
    const blocked = hold(first);
    await expect(sa.moveToQueue(2, outbound)).rejects.toThrow(code('QUEUE_TIMEOUT'));
    await blocked.go();
    await first.send(1, frames.slice(0, 5), sa.handle);
    await sa.moveToQueue(2, outbound);
    await second.send(2, frames.slice(0, 5), sa.handle);
    await until(
      () => wire.frames.length >= 20,
      () => `${wire.frames.length} packets`,
    );
    checkWire(wire.frames, 20n);
  });

  it('is over when the thread dies to which it is on its way, and its nonces are used', async () => {
    const { a, wire, first, second, sa, outbound } = await sending(ipsec);
    hold(second);
    const moving = sa.moveToQueue(2, outbound);
    moving.catch(() => {});
    await onTheWay({ first, second }, a, sa);
    const { packets } = sa.traffic();
    expect(packets).toBeGreaterThanOrEqual(5n);
    await second.worker.terminate();
    // The one when it was on its way, the other when it was still to be sent.
    await expect(moving).rejects.toThrow(either('QUEUE_GONE', 'NO_SUCH_SA'));
    expect(a.ipsec.get(sa.handle)).toBeUndefined();
    expect(sa.traffic().packets).toBe(packets);
    for (const sequence of [1n, packets + 1n, 1_000_000n]) {
      await expect(a.ipsec.addSa({ ...outbound, initial: { sequence } }, { queue: 1 })).rejects.toThrow(
        code('NONCE_REUSE'),
      );
    }
    checkWire(wire.frames, packets);
  });

  it('arrives though the thread dies that it comes from, once that has let go', async () => {
    const { a, wire, first, second, sa, outbound } = await sending(ipsec);
    const held = hold(second);
    const moving = sa.moveToQueue(2, outbound);
    await onTheWay({ first, second }, a, sa);
    const { packets } = sa.traffic();
    await first.worker.terminate();
    await until(
      () => a.workerQueues[0].state === 'free',
      () => 'the queue did not come back',
    );
    await held.go();
    await moving;
    expect(sa.queue).toBe(2);
    await second.send(2, frames.slice(0, 5), sa.handle);
    expect(sa.traffic().packets).toBe(packets + 5n);
    await until(
      () => wire.frames.length >= Number(packets) + 5,
      () => `${wire.frames.length} packets`,
    );
    checkWire(wire.frames, packets + 5n);
  });

  it('is over when the thread dies that has it, before it lets go', async () => {
    const { a, first, sa, outbound } = await sending(ipsec);
    hold(first);
    const moving = sa.moveToQueue(2, outbound);
    moving.catch(() => {});
    await first.worker.terminate();
    await expect(moving).rejects.toThrow(code('QUEUE_GONE'));
    expect(a.ipsec.get(sa.handle)).toBeUndefined();
    await expect(a.ipsec.addSa(outbound, { queue: 2 })).rejects.toThrow(code('NONCE_REUSE'));
  });

  it('repeats no number and no IV, whenever either thread is killed while it goes to and fro', async () => {
    const { a, wire, first, second } = await wired(ipsec);
    const hosts = [first, second];
    for (let round = 0; round < 4; round++) {
      const { outbound } = saPair();
      const from = wire.frames.length;
      const sa = await a.ipsec.addSa(outbound, { queue: 1 });
      const spinning = hosts.map((host, i) => host.spin(i + 1, frames[0]));
      for (const { words } of spinning) Atomics.store(words, 1, sa.handle);
      let moves = 0;
      const goesOn = async () => {
        for (;;) {
          await sa.moveToQueue(sa.queue === 1 ? 2 : 1, outbound);
          moves++;
        }
      };
      const moving = goesOn();
      moving.catch(() => {});
      const enough = 3 + 2 * round;
      await until(
        () => moves >= enough && wire.frames.length > from,
        () => `${moves} moves, ${wire.frames.length - from} packets`,
      );
      const victim = round % 2;
      await hosts[victim].worker.terminate();
      await expect(moving).rejects.toThrow();
      await until(
        () => a.workerQueues[victim].state === 'free',
        () => 'the queue did not come back',
      );
      const survivor = spinning[1 - victim];
      if (a.ipsec.get(sa.handle) === undefined) {
        // Beyond what was used, too: nobody knows how far the thread came.
        const far = { ...outbound, initial: { sequence: 1_000_000n } };
        await expect(a.ipsec.addSa(far, { queue: 2 - victim })).rejects.toThrow(code('NONCE_REUSE'));
      } else {
        expect(sa.queue).toBe(2 - victim);
        const { packets } = sa.traffic();
        await until(
          () => sa.traffic().packets > packets,
          () => 'the thread that is left does not send',
        );
      }
      survivor.words[0] = 1;
      await survivor.ended;
      await sa.remove();
      const packets = wire.frames.slice(from).filter((one) => one.from === 'a');
      const seen = packets.map(({ frame }) => esp(frame));
      expect(new Set(seen.map(({ sequence }) => sequence)).size).toBe(seen.length);
      expect(new Set(seen.map(({ iv }) => iv)).size).toBe(seen.length);
      expect(seen.length).toBeGreaterThan(0);
      hosts[victim] = await hire(a.workerQueues[victim]);
      await a.ipsec.addSa(saPair().outbound, { queue: victim + 1 });
    }
  });

  it('is over with the NIC, also on its way', async () => {
    const { a, first, second, sa, outbound } = await sending(ipsec, 2500);
    hold(second);
    const moving = sa.moveToQueue(2, outbound);
    moving.catch(() => {});
    await onTheWay({ first, second }, a, sa);
    await a.close();
    await expect(moving).rejects.toThrow();
    expect(sa.traffic().packets).toBeGreaterThanOrEqual(5n);
  });
});

describe('an SA that receives in software and goes from queue to queue', () => {
  it('has one window all the way: no packet is accepted twice, and none is lost that came to its queue', async () => {
    const { a, b, wire, first, second } = await wired('software');
    const { outbound, inbound } = saPair();
    const sa = await a.ipsec.addSa(inbound, { queue: 1 });
    const peer = await b.ipsec.addSa(outbound);
    const fromPeer = () => wire.frames.filter(({ from }) => from === 'b').map(({ frame }) => frame);
    /** From now on the device delivers the flow to the queue on which it was answered. */
    const steer = async (queue: number, answer: Buffer) => {
      if (queue === 0) await send(a, [answer], null);
      else await (queue === 1 ? first : second).send(queue, [answer]);
    };
    const take = (queue: number, count: number) =>
      queue === 0 ? receive(a, count, 2000) : (queue === 1 ? first : second).receive(queue, count, 2000);
    await send(b, frames.slice(0, 1), peer);
    await until(
      () => fromPeer().length === 1,
      () => 'nothing on the wire',
    );
    const answer = reversed(fromPeer()[0]);
    await Promise.all([first.receive(1, 1, 200), second.receive(2, 1, 200), receive(a, 0, 200)]);
    let opened = sa.traffic().packets;
    let replays = 0;
    /** What was accepted last. */
    let known: Buffer[] = [];
    for (const queue of [1, 2, 0, 2, 1, 0, 1]) {
      if ((sa.queue ?? 0) !== queue) await sa.moveToQueue(queue, inbound);
      // A thread that is left says exactly what it has counted.
      expect(replaysOf(sa)).toBe(replays);
      expect(sa.traffic().packets).toBe(opened);
      await steer(queue, answer);
      const got = take(queue, 6);
      // What was accepted at the queue before, once more, and then what is new: it comes in this order.
      for (const frame of known) wire.inject(frame, 'a');
      await send(b, frames.slice(0, 6), peer);
      const fresh = (await got).filter(({ sa: handle }) => handle === sa.handle);
      expect(fresh).toHaveLength(6);
      opened += 6n;
      replays += known.length;
      known = fromPeer().slice(-6);
    }
    await sa.moveToQueue(2, inbound);
    expect([replaysOf(sa), sa.traffic().packets]).toEqual([36, opened]);
  });

  it('stays on all queues when it runs on the device', async () => {
    const { a } = await wired('auto');
    const { inbound } = saPair();
    const sa = await a.ipsec.addSa(inbound);
    expect(sa.placement.where).toBe('inline');
    await expect(sa.moveToQueue(1, inbound)).rejects.toThrow(code('SA_MOVE'));
  });
});

function replaysOf(sa: SaHandle): number {
  const { replay = 0 } = sa.traffic().dropped;
  return replay;
}
