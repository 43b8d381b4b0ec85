import { afterEach, describe, expect, it } from 'vitest';
import { WIRE_REVISIONS } from '../../src/index.ts';
import { capture, cleanUp, open, openPair, receive, receiveUpTo, saPair, send, startDevice, until } from './support.ts';

afterEach(cleanUp);

const code = (name: string) => expect.objectContaining({ code: name });
const ip = capture('http-ipv4').filter((frame) => frame.readUInt16BE(12) === 0x0800);

describe.each(WIRE_REVISIONS)('packets that are not what was sent, by %s', (revision) => {
  it.each(['inline', 'software'] as const)(
    'are refused when they were changed, cut or replayed: receiver %s',
    async (where) => {
      const { a, b, wire } = await openPair(
        { wire: revision },
        where === 'software' ? { ipsec: false } : { wire: revision },
      );
      const { outbound, inbound } = saPair();
      const out = await a.ipsec.addSa(outbound);
      const inn = await b.ipsec.addSa(inbound);
      expect(inn.placement.where).toBe(where);
      const frames = ip.slice(0, 10);
      const [, first] = await Promise.all([send(a, frames, out), receive(b, 10)]);
      expect(first).toHaveLength(10);

      const [one, two] = wire.frames.map(({ frame }) => frame);
      wire.inject(one, 'b');
      wire.inject(two, 'b');
      const changed = Buffer.from(one);
      changed[changed.length - 20] ^= 1;
      changed.writeUInt32BE(100, 14 + 20 + 4);
      wire.inject(changed, 'b');
      const cut = Buffer.from(two.subarray(0, two.length - 8));
      wire.inject(cut, 'b');
      wire.inject(one.subarray(0, 40), 'b');
      const noSa = Buffer.from(one);
      noSa.writeUInt32BE(0xdeadbeef, 14 + 20);
      wire.inject(noSa, 'b');
      const clear = ip[0];
      wire.inject(clear, 'b');
      // The last one tells that the others are through.
      const after = await receiveUpTo(b, clear);
      // What nobody could verify never arrives as secured; what was sent in clear arrives as that.
      expect(after.every(({ sa, flags }) => sa === 0 && (flags & 4) === 0)).toBe(true);
      expect(after.some(({ frame }) => frame.equals(clear))).toBe(true);
      expect(after.some(({ frame }) => frames.some((sent) => sent !== clear && sent.equals(frame)))).toBe(false);
      expect(inn.traffic().packets).toBe(10n);
      if (where === 'software') {
        expect(inn.traffic().dropped).toMatchObject({ replay: 2, icv: 1 });
        expect(b.statistics().rx.dropped).toMatchObject({ 'no-sa': 1 });
        expect(after).toHaveLength(1);
      }
      // And the SA goes on.
      const [, last] = await Promise.all([send(a, ip.slice(10, 20), out), receive(b, 10)]);
      expect(last.filter(({ sa }) => sa === inn.handle)).toHaveLength(10);
    },
  );
});

describe.each(WIRE_REVISIONS)('packets without an SA, by %s', (revision) => {
  it('are dropped and counted when they name one that was removed, is inbound, or never was', async () => {
    const { a, b, wire } = await openPair({ wire: revision }, { wire: revision });
    const inline = await a.ipsec.addSa(saPair().outbound);
    const software = await a.ipsec.addSa(saPair().outbound, { require: 'software' });
    const inbound = await a.ipsec.addSa(saPair().inbound);
    const still = await a.ipsec.addSa(saPair().outbound);
    const never = { ...inline, handle: 12345 };
    await inline.remove();
    await software.remove();
    const frames = ip.slice(0, 4);
    const wrong = [inline, software, inbound, never];
    for (const sa of wrong) expect(await send(a, frames, { handle: sa.handle } as typeof still)).toBe(4);
    await still.remove();
    for (const sa of wrong) expect(await send(a, frames, { handle: sa.handle } as typeof still)).toBe(4);
    await receive(b, 0, 50);
    expect(wire.frames).toHaveLength(0);
    expect(a.statistics().tx.dropped['no-sa']).toBe(32);
    expect(a.statistics().tx.packets).toBe(0);
  });

  it('do not leave when they are too long for the link once protected', async () => {
    const { a, wire } = await openPair({ wire: revision }, { wire: revision });
    const frame = Buffer.concat([ip[0].subarray(0, 14), Buffer.alloc(1480, 0x45)]);
    frame.writeUInt16BE(1480, 16);
    for (const require of ['inline', 'software'] as const) {
      const sa = await a.ipsec.addSa(saPair().outbound, { require });
      expect(await send(a, [frame], sa)).toBe(1);
      expect(sa.traffic().dropped).toEqual({ 'too-big': 1 });
      expect(sa.traffic().packets).toBe(0n);
    }
    expect(wire.frames).toHaveLength(0);
  });
});

describe('the life of an SA', () => {
  it('ends at its hard limit, after a warning, wherever it runs', async () => {
    for (const require of ['inline', 'software'] as const) {
      const { a, wire } = await openPair();
      const lifetime = { softPackets: 5, hardPackets: 8 };
      const sa = await a.ipsec.addSa(saPair({ lifetime }).outbound, { require });
      const told: string[] = [];
      sa.on('soft-expiry', (limit) => told.push(`soft ${limit}`)).on('hard-expiry', (limit) =>
        told.push(`hard ${limit}`),
      );
      await send(a, ip.slice(0, 20), sa);
      // What is sent behind them in clear leaves behind them.
      await send(a, [ip[0]], null);
      await until(
        () => wire.frames.some(({ frame }) => frame.equals(ip[0])),
        () => 'the last packet did not leave',
      );
      expect(wire.frames).toHaveLength(8 + 1);
      expect(told).toEqual(['soft packets', 'hard packets']);
      expect(sa.traffic()).toMatchObject({ packets: 8n, dropped: { expired: 12 }, softExpired: true });
      await cleanUp();
    }
  });

  it('is told of when the device sees its soft limit on receive', async () => {
    const { a, b } = await openPair({}, {});
    const { outbound, inbound } = saPair();
    const out = await a.ipsec.addSa(outbound);
    const inn = await b.ipsec.addSa({ ...inbound, lifetime: { softPackets: 3 } }, { require: 'inline' });
    const told: string[] = [];
    inn.on('soft-expiry', (limit) => told.push(limit));
    await Promise.all([send(a, ip.slice(0, 10), out), receive(b, 10)]);
    expect(told).toEqual(['device']);
    expect(inn.traffic().softExpired).toBe(true);
  });

  it('never brings a key back, through close, reopen and software', async () => {
    const device = await startDevice();
    const { outbound } = saPair();
    const nic = await open(device.addresses[0]);
    const sa = await nic.ipsec.addSa(outbound);
    await sa.remove();
    await expect(nic.ipsec.addSa(outbound)).rejects.toThrow(code('NONCE_REUSE'));
    await nic.close();
    const again = await open(device.addresses[0]);
    await expect(again.ipsec.addSa(outbound)).rejects.toThrow(code('NONCE_REUSE'));
    await expect(again.ipsec.addSa(outbound, { require: 'software' })).rejects.toThrow(code('NONCE_REUSE'));
  });

  it('does not touch the traffic of others when it ends in the middle of it', async () => {
    const { a, b } = await openPair({}, { ipsec: false });
    const stays = saPair();
    const out = await a.ipsec.addSa(stays.outbound);
    const inn = await b.ipsec.addSa(stays.inbound);
    const total = 400;
    const frames = Array.from({ length: total }, (_, i) => ip[i % ip.length]);
    const churn = (async () => {
      for (let i = 0; i < 10; i++) {
        const pair = saPair();
        const sa = await a.ipsec.addSa(pair.outbound);
        await send(a, ip.slice(0, 5), sa);
        await sa.remove();
      }
    })();
    const [, received] = await Promise.all([send(a, frames, out), receive(b, total), churn]);
    expect(received.filter(({ sa }) => sa === inn.handle)).toHaveLength(total);
    expect(out.traffic().packets).toBe(BigInt(total));
  });

  it('is refused with a key of a wrong length or an SPI that is taken, and the device is not asked', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0]);
    const wrong = saPair({ aead: { name: 'aes-gcm', key: '00'.repeat(15), salt: '01020304' } });
    await expect(nic.ipsec.addSa(wrong.outbound)).rejects.toThrow(expect.objectContaining({ path: 'sa.aead.key' }));
    const { inbound } = saPair();
    await nic.ipsec.addSa(inbound);
    await expect(nic.ipsec.addSa({ ...inbound })).rejects.toThrow(code('SA_EXISTS'));
  });

  it('is refused beyond the limit that was agreed', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0], { ipsec: 'inline', maxSas: 2 });
    expect(nic.ipsec.inline?.limits).toEqual({ inbound: 2, outbound: 2 });
    await nic.ipsec.addSa(saPair().outbound);
    const second = await nic.ipsec.addSa(saPair().outbound);
    await expect(nic.ipsec.addSa(saPair().outbound)).rejects.toThrow(code('NOT_OFFLOADABLE'));
    await second.remove();
    await nic.ipsec.addSa(saPair().outbound);
    await until(
      () => nic.ipsec.list().length === 2,
      () => 'two SAs',
    );
  });
});
