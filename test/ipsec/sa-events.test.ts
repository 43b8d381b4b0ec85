import { afterEach, describe, expect, it } from 'vitest';
import { Verdict } from '../../src/fallback/verdict.ts';
import type { SaHandle, SaNotification } from '../../src/ipsec/ipsec.ts';
import type { IpsecManager } from '../../src/ipsec/manager.ts';
import { closeMoves, openForMoves } from './move-support.ts';
import { inbound, key, outbound } from './support.ts';

const none = { softPackets: 0n, hardPackets: 0n, softBytes: 0n, hardBytes: 0n };
const gcm = (first: number) => ({
  aead: { name: 'aes-gcm', key: key(16, first), salt: key(4), icvLength: 16 } as const,
});
const cbc = (first: number) => ({
  cipher: { name: 'aes-cbc', key: key(16, first) } as const,
  auth: { name: 'hmac-sha256', key: key(32, first), icvLength: 16 } as const,
});

/** Packets of 28 bytes that the device has delivered. */
function deliver(manager: IpsecManager, sa: SaHandle, n: number): void {
  for (let i = 0; i < n; i++) manager.state.countInbound(sa.handle, 1, 28);
}

function record(sa: SaHandle): string[] {
  const told: string[] = [];
  sa.on('soft-expiry', (limit) => told.push(`soft ${limit}`));
  sa.on('hard-expiry', (limit) => told.push(`hard ${limit}`));
  sa.on('sequence-low', () => told.push('low'));
  sa.on('sequence-overflow', () => told.push('overflow'));
  return told;
}

afterEach(closeMoves);

describe('the events of SAs', () => {
  it('are the same stream wherever an SA runs, once each', async () => {
    const setup = await openForMoves();
    const { manager, send, receive } = setup;
    const stream: string[] = [];
    const name = ({ sa, event, limit }: SaNotification) => stream.push(`${sa.name} ${event} ${limit}`);
    const stop = manager.onSaEvent(name);
    const lifetime = { ...none, softPackets: 2n, hardPackets: 4n };
    const ends = async (require: 'inline' | 'software', first: number) => {
      const change = { lifetime, name: require, spi: first, ...gcm(first) };
      const out = await manager.addSa(outbound({ ...change, name: `${require} out` }), { require });
      const inn = await manager.addSa(inbound({ ...change, name: `${require} in` }), { require });
      expect(send(out.handle, 6)).toEqual([0, 0, 0, 0, Verdict.expired, Verdict.expired]);
      if (require === 'inline') deliver(manager, inn, 4);
      else for (let n = 1n; n <= 6n; n++) receive(inbound(change), n);
    };
    await ends('inline', 0x10);
    await ends('software', 0x60);
    await Promise.resolve();
    expect(stream).toEqual(
      ['inline out', 'inline in', 'software out', 'software in'].flatMap((who) => [
        `${who} soft-expiry packets`,
        `${who} hard-expiry packets`,
      ]),
    );
    stop();
    const last = await manager.addSa(outbound({ lifetime, ...gcm(0x90) }));
    send(last.handle, 6);
    await Promise.resolve();
    expect(stream).toHaveLength(8);
  });

  it('say that the device saw the soft limit first, and nothing of it a second time', async () => {
    const { manager } = await openForMoves();
    const sa = await manager.addSa(inbound({ lifetime: { ...none, softPackets: 3n } }), { require: 'inline' });
    const told = record(sa);
    manager.state.deviceSoftExpiry(sa.handle);
    deliver(manager, sa, 5);
    manager.state.deviceSoftExpiry(sa.handle);
    await Promise.resolve();
    expect(told).toEqual(['soft device']);
  });

  it('say that an inbound SA of the device is over when no packet fits its bytes any more', async () => {
    const { manager } = await openForMoves();
    const sa = await manager.addSa(inbound({ lifetime: { ...none, softBytes: 28n, hardBytes: 70n } }));
    const told = record(sa);
    deliver(manager, sa, 1);
    await Promise.resolve();
    expect(told).toEqual(['soft bytes']);
    deliver(manager, sa, 1);
    await Promise.resolve();
    expect(told).toEqual(['soft bytes', 'hard bytes']);
  });

  it('let nothing more pass after a hard limit of bytes, also not a packet that would still fit', async () => {
    const { manager } = await openForMoves();
    const sa = await manager.addSa(outbound({ lifetime: { ...none, hardBytes: 100n } }));
    const { state } = manager;
    const sized = (bytes: number) => {
      state.count(sa.handle, 1, bytes);
      const due = state.packetsUntilAlert(sa.handle) <= 0 || state.bytesUntilAlert(sa.handle) <= 0;
      return due ? state.check(sa.handle, bytes) : Verdict.ok;
    };
    expect([sized(60), sized(60), sized(20), sized(1)]).toEqual([0, 6, 6, 6]);
    expect(sa.traffic()).toMatchObject({ packets: 1n, bytes: 60n });
  });
});

describe('a modify of an SA on the device', () => {
  it('begins its limits and its sequence numbers anew when it brings a new key', async () => {
    const { manager, send } = await openForMoves();
    const lifetime = { ...none, softPackets: 2n, hardPackets: 3n };
    const sa = await manager.addSa(outbound({ lifetime }));
    const told = record(sa);
    send(sa.handle, 4);
    await sa.modify(outbound({ lifetime, ...gcm(0x70) }));
    expect(sa.traffic().softExpired).toBe(false);
    expect(send(sa.handle, 4)).toEqual([0, 0, 0, Verdict.expired]);
    await Promise.resolve();
    expect(told).toEqual(['soft packets', 'hard packets', 'soft packets', 'hard packets']);
    expect(sa.traffic().packets).toBe(6n);
  });

  it('gives it no new sequence numbers with the key that it has, because the device may not restart them', async () => {
    const { manager } = await openForMoves();
    const { state } = manager;
    const sa = await manager.addSa(outbound(cbc(0x20)));
    state.count(sa.handle, 2 ** 32 - 2, 0);
    const more = () => {
      state.count(sa.handle, 1, 28);
      return state.check(sa.handle, 28);
    };
    expect(more()).toBe(Verdict.ok);
    await sa.modify(outbound({ ...cbc(0x20), lifetime: { ...none, softPackets: 5n } }));
    expect(more()).toBe(Verdict.sequenceOverflow);
    await sa.modify(outbound(cbc(0x30)));
    expect(more()).toBe(Verdict.ok);
  });

  it('may lift a hard limit that was reached', async () => {
    const { manager, send } = await openForMoves();
    const sa = await manager.addSa(outbound({ ...cbc(0x20), lifetime: { ...none, hardPackets: 1n } }));
    expect(send(sa.handle, 2)).toEqual([0, Verdict.expired]);
    await sa.modify(outbound({ ...cbc(0x20), lifetime: { ...none, hardPackets: 2n } }));
    expect(send(sa.handle, 2)).toEqual([0, Verdict.expired]);
  });
});

describe('an SA on the device without extended sequence numbers', () => {
  it('stops in the driver at 2^32 - 1 packets, with a warning long before', async () => {
    const { manager, sent, send } = await openForMoves();
    const sa = await manager.addSa(outbound());
    const told = record(sa);
    manager.state.count(sa.handle, 2 ** 32 - 2 ** 29 - 2, 0);
    send(sa.handle, 1);
    await Promise.resolve();
    expect(told).toEqual(['low']);
    manager.state.count(sa.handle, 2 ** 29 - 1, 0);
    const before = sent.length;
    expect(send(sa.handle, 3)).toEqual([Verdict.ok, Verdict.sequenceOverflow, Verdict.sequenceOverflow]);
    expect(sent.length).toBe(before + 1);
    expect(sa.traffic().packets).toBe(2n ** 32n - 1n);
    await Promise.resolve();
    expect(told).toEqual(['low', 'overflow']);
  });
});
