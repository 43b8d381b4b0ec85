import { createDecipheriv } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Feature, PacketFlag, type SaHandle, type SecurityAssociationInput, WIRE_REVISIONS } from '../../src/index.ts';
import {
  capture,
  cleanUp,
  isProtected,
  openPair,
  type Pair,
  type Received,
  receive,
  saPair,
  send,
  type Wire,
} from './support.ts';

afterAll(cleanUp);

const ESP = 50;

/** Where the ESP header of a wire frame is; -1 when it is none. */
function espAt(frame: Buffer): number {
  const type = frame.readUInt16BE(12);
  if (type === 0x0800 && frame[14 + 9] === ESP) return 14 + 20;
  if (type === 0x86dd && frame[14 + 6] === ESP) return 14 + 40;
  return -1;
}

/** Opens an ESP tunnel packet with AES-128-GCM by node:crypto alone (RFC 4303, 4106): the inner packet. Throws when the ICV is wrong. */
function openEsp(frame: Buffer, key: string, salt: string): Buffer {
  const at = espAt(frame);
  const [sequenceEnd, ivEnd, icvAt] = [at + 8, at + 16, frame.length - 16];
  const nonce = Buffer.concat([Buffer.from(salt, 'hex'), frame.subarray(sequenceEnd, ivEnd)]);
  const decipher = createDecipheriv('aes-128-gcm', Buffer.from(key, 'hex'), nonce);
  decipher.setAAD(frame.subarray(at, sequenceEnd)).setAuthTag(frame.subarray(icvAt));
  const plain = Buffer.concat([decipher.update(frame.subarray(ivEnd, icvAt)), decipher.final()]);
  return plain.subarray(0, plain.length - 2 - plain[plain.length - 2]);
}

/** Every frame that should be protected is ESP with this SPI, opens to itself, and nothing of it is readable on the wire. */
function expectNothingInClear(wire: Wire, sent: readonly Buffer[], sa: SecurityAssociationInput): void {
  const protectedFrames = sent.filter(isProtected);
  const onWire = wire.frames.map(({ frame }) => frame);
  const esp = onWire.filter((frame) => espAt(frame) >= 0);
  expect(esp).toHaveLength(protectedFrames.length);
  expect(esp.every((frame) => frame.readUInt32BE(espAt(frame)) === sa.spi)).toBe(true);
  const opened = esp.map((frame) => openEsp(frame, String(sa.aead?.key), String(sa.aead?.salt)));
  expect(opened.every((inner, i) => inner.equals(protectedFrames[i].subarray(14)))).toBe(true);
  expect(esp.map((frame) => frame.readUInt32BE(espAt(frame) + 4))).toEqual(esp.map((_, i) => i + 1));
  expect(onWire).toHaveLength(sent.length);
  const all = Buffer.concat(onWire);
  for (const frame of protectedFrames) {
    const secret = frame.subarray(14 + 20, 14 + 20 + 24);
    if (new Set(secret).size > 4) expect(all.includes(secret)).toBe(false);
  }
}

function expectArrived(received: readonly Received[], sent: readonly Buffer[], sa: SaHandle): void {
  expect(received).toHaveLength(sent.length);
  received.forEach(({ frame, sa: by, flags }, i) => {
    expect(frame.equals(sent[i]), `frame ${i}`).toBe(true);
    const secured = isProtected(sent[i]);
    expect(by).toBe(secured ? sa.handle : 0);
    expect((flags & PacketFlag.secured) !== 0).toBe(secured);
  });
}

const names = ['ping', 'dns', 'http', 'fragments', 'bulk'].flatMap((what) => [`${what}-ipv4`, `${what}-ipv6`]);

const kinds = WIRE_REVISIONS.flatMap((revision) => [
  { revision, ring: 'split' as const },
  { revision, ring: 'packed' as const },
]);

describe.each(kinds)(
  'real traffic over $ring rings, inline on one side by $revision and in software on the other',
  ({ revision, ring }) => {
    let pair: Pair;
    beforeAll(async () => {
      pair = await openPair({ wire: revision, nic: { ring } }, { ipsec: false, nic: { ring } });
      for (const nic of [pair.a, pair.b]) expect(nic.features.has(Feature.RING_PACKED)).toBe(ring === 'packed');
    });

    it.each(names)('%s goes out of the device encrypted and comes back whole, both ways', async (name) => {
      const { a, b, wire } = pair;
      wire.frames.length = 0;
      const frames = capture(name).slice(0, 400);
      const forth = saPair();
      const back = saPair({}, true);
      const [outA, inB] = [await a.ipsec.addSa(forth.outbound), await b.ipsec.addSa(forth.inbound)];
      const [outB, inA] = [await b.ipsec.addSa(back.outbound), await a.ipsec.addSa(back.inbound)];
      expect([outA, inB, outB, inA].map((sa) => sa.placement.where)).toEqual([
        'inline',
        'software',
        'software',
        'inline',
      ]);

      const under = (sa: SaHandle) => (frame: Uint8Array) => (isProtected(Buffer.from(frame)) ? sa : null);
      const [, atB] = await Promise.all([send(a, frames, under(outA)), receive(b, frames.length)]);
      expectArrived(atB, frames, inB);
      expectNothingInClear(wire, frames, forth.outbound);

      wire.frames.length = 0;
      const [, atA] = await Promise.all([send(b, frames, under(outB)), receive(a, frames.length)]);
      expectArrived(atA, frames, inA);
      expectNothingInClear(wire, frames, back.outbound);

      const count = BigInt(frames.filter(isProtected).length);
      for (const sa of [outA, inB, outB, inA]) expect(sa.traffic()).toMatchObject({ packets: count, dropped: {} });
      for (const sa of [outA, inB, outB, inA]) await sa.remove();
      expect(a.statistics().rx.securityError + b.statistics().rx.securityError).toBe(0);
    });
  },
);
