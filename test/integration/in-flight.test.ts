import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { PacketFlag, WIRE_REVISIONS } from '../../src/index.ts';
import { capture, cleanUp, openPair, type Received, receive, saPair, send, settled, until } from './support.ts';

afterEach(cleanUp);

/** Milliseconds. */
const PATIENCE = 25_000;

const ip = capture('http-ipv4').filter((frame) => frame.readUInt16BE(12) === 0x0800);
const numbered = (from: number, count: number) =>
  Array.from({ length: count }, (_, i) => {
    const frame = Buffer.from(ip[0]);
    frame.writeUInt32BE(from + i, frame.length - 4);
    return frame;
  });

describe.each(WIRE_REVISIONS)('SAs that end while packets are on their way, by %s', (revision) => {
  it('cost the others no packet, at either end', async () => {
    const { a, b, wire } = await openPair({ wire: revision }, { wire: revision });
    const stays = saPair();
    const out = await a.ipsec.addSa(stays.outbound, { require: 'inline' });
    const inn = await b.ipsec.addSa(stays.inbound, { require: 'inline' });
    let done = false;
    let ended = 0;
    const churn = (async () => {
      while (!done) {
        const { outbound, inbound } = saPair();
        const [from, to] = [
          await a.ipsec.addSa(outbound, { require: 'inline' }),
          await b.ipsec.addSa(inbound, { require: 'inline' }),
        ];
        await send(a, ip.slice(0, 8), from);
        // Both ends at once: some of its packets are in rings, some on the wire.
        await Promise.all([from.remove(), to.remove()]);
        ended++;
      }
    })();
    let sent = 0;
    const sending = (async () => {
      const deadline = performance.now() + PATIENCE;
      // As many as it takes to have a few others end meanwhile.
      while (sent < 1000 || (ended < 4 && performance.now() < deadline)) {
        sent += await send(a, numbered(sent, 50), out);
        await sleep(1);
      }
      done = true;
    })();
    const mine: Received[] = [];
    const receiving = (async () => {
      const deadline = performance.now() + PATIENCE;
      while ((!done || mine.length < sent) && performance.now() < deadline) {
        mine.push(...(await receive(b, 0, 20)).filter(({ sa }) => sa === inn.handle));
      }
    })();
    await Promise.all([sending, receiving, churn]);
    expect(ended).toBeGreaterThan(3);
    expect(mine.map(({ frame }) => frame.readUInt32BE(frame.length - 4))).toEqual(
      Array.from({ length: sent }, (_, i) => i),
    );
    expect(out.traffic()).toMatchObject({ packets: BigInt(sent), dropped: {} });
    expect(inn.traffic()).toMatchObject({ packets: BigInt(sent), dropped: {} });
    expect(wire.frames.every(({ frame }) => frame[14 + 9] === 50)).toBe(true);
  });

  it('leave packets that nobody takes for those of the SA that gets their id', async () => {
    const one = { maxSas: 1 };
    const { a, b, wire } = await openPair({ wire: revision }, { wire: revision, nic: { ...one, ipsec: 'inline' } });
    const [old, young] = [saPair(), saPair()];
    const out = await a.ipsec.addSa(old.outbound);
    const inn = await b.ipsec.addSa(old.inbound);
    await send(a, ip.slice(0, 10), out);
    // The device has opened them and put them into the ring, from which nobody has taken them yet.
    await until(
      () => wire.frames.length === 10,
      () => `${wire.frames.length} of 10 packets on the wire`,
    );
    await settled(b);
    await inn.remove();
    const next = await b.ipsec.addSa(young.inbound);
    expect((await next.query())?.objectId).toBe(0);
    const left = await receive(b, 10, 30);
    expect(left).toHaveLength(10);
    expect(left.every(({ sa, flags }) => sa === 0 && (flags & PacketFlag.secured) === 0)).toBe(true);
    const then = await a.ipsec.addSa(young.outbound);
    const [, mine] = await Promise.all([send(a, ip.slice(0, 10), then), receive(b, 10, 10)]);
    expect(mine.map(({ sa, frame }) => [sa, frame])).toEqual(ip.slice(0, 10).map((frame) => [next.handle, frame]));
  });
});
