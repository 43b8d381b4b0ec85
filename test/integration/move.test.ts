import { afterEach, describe, expect, it } from 'vitest';
import { capture, cleanUp, freshKey, openPair, receive, saPair, send } from './support.ts';

afterEach(cleanUp);

const code = (name: string) => expect.objectContaining({ code: name });
const ip = capture('http-ipv4').filter((frame) => frame.readUInt16BE(12) === 0x0800);
const draft = { wire: 'rfc-2025-01', nic: { wire: 'rfc-2025-01' } } as const;
const offEsp = { spi: 34, sequence: 38, iv: 42 };

describe('a live SA', () => {
  it('moves between device and software with new keys, and its packets arrive in order all the way', async () => {
    const { a, b, wire } = await openPair({}, { ipsec: false });
    const keys = Array.from({ length: 4 }, () => ({ name: 'aes-gcm', key: freshKey(), salt: '01020304' }) as const);
    const { outbound, inbound } = saPair({ aead: keys[0] });
    const out = await a.ipsec.addSa(outbound, { require: 'inline' });
    const inn = await b.ipsec.addSa(inbound);
    for (const [i, where] of (['inline', 'software', 'inline', 'software'] as const).entries()) {
      if (i > 0) {
        await inn.modify({ ...inbound, aead: keys[i] });
        await out.move(where, { ...outbound, aead: keys[i] });
      }
      expect(out.placement.where).toBe(where);
      const frames = ip.slice(10 * i, 10 * i + 10);
      const [, received] = await Promise.all([send(a, frames, out), receive(b, 10)]);
      expect(received.map(({ frame, sa }) => sa === inn.handle && frame.toString('hex'))).toEqual(
        frames.map((frame) => frame.toString('hex')),
      );
    }
    expect(out.traffic().packets).toBe(40n);
    expect(wire.frames.map(({ frame }) => frame.readUInt32BE(offEsp.sequence))).toEqual(
      Array.from({ length: 40 }, (_, i) => (i % 10) + 1),
    );
    await expect(out.move('inline', { ...outbound, aead: keys[0] })).rejects.toThrow(code('NONCE_REUSE'));
  });

  it.each([
    ['virtio-1.4', {}],
    ['the draft', draft],
  ] as const)(
    'goes to the device before its first packet and to software before its first packet: %s',
    async (_n, setup) => {
      const { a, b, wire } = await openPair(setup, setup);
      const { outbound, inbound } = saPair();
      const out = await a.ipsec.addSa(outbound, { require: 'software' });
      const inn = await b.ipsec.addSa(inbound, { require: 'software' });
      for (const where of ['inline', 'software', 'inline'] as const) {
        await out.move(where, outbound);
        await inn.move(where, inbound);
      }
      const frames = ip.slice(0, 10);
      const [, received] = await Promise.all([send(a, frames, out), receive(b, 10)]);
      expect(received.filter(({ sa }) => sa === inn.handle)).toHaveLength(10);
      const ivs = wire.frames.map(({ frame }) => frame.readBigUInt64BE(offEsp.iv));
      expect(new Set(ivs).size).toBe(10);
      await expect(out.move('software', outbound)).rejects.toThrow(code('SA_MOVE'));
      await expect(inn.move('software', inbound)).rejects.toThrow(code('SA_MOVE'));
      const [, more] = await Promise.all([send(a, frames, out), receive(b, 10)]);
      expect(more.filter(({ sa }) => sa === inn.handle)).toHaveLength(10);
    },
  );

  it('goes on in a device of the draft beyond the numbers that software has used, with the key that it has', async () => {
    const { a, b, wire } = await openPair(draft, { ipsec: false });
    const cipher = { name: 'aes-cbc', key: freshKey() } as const;
    const auth = { name: 'hmac-sha256', key: freshKey(32) } as const;
    const { outbound, inbound } = saPair({ cipher, auth, options: { esn: true } });
    const out = await a.ipsec.addSa(outbound, { require: 'software' });
    const inn = await b.ipsec.addSa(inbound);
    await Promise.all([send(a, ip.slice(0, 10), out), receive(b, 10)]);
    await out.move('inline', outbound);
    const [, received] = await Promise.all([send(a, ip.slice(10, 20), out), receive(b, 10)]);
    expect(received.filter(({ sa }) => sa === inn.handle)).toHaveLength(10);
    const numbers = wire.frames.map(({ frame }) => frame.readUInt32BE(offEsp.sequence));
    expect(numbers.slice(0, 10)).toEqual(Array.from({ length: 10 }, (_, i) => i + 1));
    expect(numbers.slice(10)).toEqual(Array.from({ length: 10 }, (_, i) => 2 ** 24 + 11 + i));
    expect(inn.traffic()).toMatchObject({ packets: 20n, dropped: {} });
  });

  it('accepts no packet twice, wherever it was accepted before', async () => {
    const { a, b, wire } = await openPair({ ipsec: false }, {});
    const { outbound, inbound } = saPair();
    const out = await a.ipsec.addSa(outbound);
    for (const where of ['software', 'inline'] as const) {
      const inn = await b.ipsec.addSa(inbound, { require: where });
      wire.frames.length = 0;
      const frames = ip.slice(0, 5);
      const [, received] = await Promise.all([send(a, frames, out), receive(b, 5)]);
      expect(received.filter(({ sa }) => sa === inn.handle)).toHaveLength(5);
      const there = where === 'software' ? 'inline' : 'software';
      await expect(inn.move(there, inbound)).rejects.toThrow(code('SA_MOVE'));
      await expect(inn.move(there, { ...inbound, replayWindow: 0 })).rejects.toThrow(code('SA_MOVE'));
      for (const { frame } of [...wire.frames]) wire.inject(frame, 'b');
      const replayed = await receive(b, 0, 100);
      expect(replayed.filter(({ sa }) => sa === inn.handle)).toHaveLength(0);
      await inn.remove();
    }
  });
});
