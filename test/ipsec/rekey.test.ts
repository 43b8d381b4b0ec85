import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { AdminCommandError, VirtioError } from '../../src/errors.ts';
import { Verdict } from '../../src/fallback/verdict.ts';
import type { SaNotification } from '../../src/ipsec/ipsec.ts';
import { SaPair, type SaPairInput } from '../../src/ipsec/rekey.ts';
import { AdminStatus } from '../../src/virtio/admin-wire.ts';
import { refuse } from '../virtio-net/fake-admin.ts';
import { closeMoves, type MoveSetup, openForMoves } from './move-support.ts';
import { inbound, key, outbound } from './support.ts';

const code = (name: string) => expect.objectContaining({ code: name });

/** The `n`th pair, with keys and SPIs of its own. */
function pair(n: number, change: Parameters<typeof outbound>[0] = {}): SaPairInput {
  const aead = (first: number) => ({ name: 'aes-gcm', key: key(16, first), salt: key(4), icvLength: 16 }) as const;
  return {
    outbound: outbound({ spi: 0x100 + n, aead: aead(0x20 * n), ...change }),
    inbound: inbound({ spi: 0x200 + n, aead: aead(0x20 * n + 0x10), ...change }),
  };
}

describe('a pair of SAs', () => {
  let setup: MoveSetup;
  beforeEach(async () => {
    vi.useFakeTimers();
    setup = await openForMoves();
  });
  afterEach(() => {
    vi.useRealTimers();
    closeMoves();
  });

  const spis = () => setup.manager.list().map(({ direction, spi }) => `${direction} ${spi.toString(16)}`);

  it('is made as a whole or not at all', async () => {
    const sas = await SaPair.open(setup.manager, pair(1));
    expect(spis()).toEqual(['inbound 201', 'outbound 101']);
    expect(sas.handle).toBe(sas.outbound.handle);
    expect(sas.accepts(sas.inbound.handle)).toBe(true);
    expect(sas.accepts(sas.outbound.handle)).toBe(false);
    const used = { ...pair(2), outbound: pair(1).outbound };
    await expect(SaPair.open(setup.manager, used)).rejects.toThrow(code('NONCE_REUSE'));
    expect(spis()).toEqual(['inbound 201', 'outbound 101']);
    const crossed = { outbound: pair(2).inbound, inbound: pair(2).outbound };
    await expect(SaPair.open(setup.manager, crossed)).rejects.toThrow(code('SA_PAIR'));
    await expect(SaPair.open(setup.manager, pair(3), { graceMs: -1 })).rejects.toThrow(code('SA_PAIR'));
    await sas.close();
    await sas.close();
    expect(spis()).toEqual([]);
  });

  it('has its next SAs beside the current ones, uses them from one packet to the next, and lets the old ones go later', async () => {
    const sas = await SaPair.open(setup.manager, pair(1), { graceMs: 500 });
    const old = { outbound: sas.outbound, inbound: sas.inbound };
    const next = await sas.prepare(pair(2));
    expect(spis()).toEqual(['inbound 201', 'outbound 101', 'inbound 202', 'outbound 102']);
    expect(sas.handle).toBe(old.outbound.handle);
    expect(sas.accepts(next.inbound.handle)).toBe(true);
    const retirement = next.switchOver();
    expect(sas.handle).toBe(next.outbound.handle);
    expect([sas.outbound, sas.inbound]).toEqual([next.outbound, next.inbound]);
    await vi.advanceTimersByTimeAsync(499);
    expect(sas.accepts(old.inbound.handle)).toBe(true);
    expect(setup.send(old.outbound.handle, 1)).toEqual([Verdict.ok]);
    await vi.advanceTimersByTimeAsync(1);
    await retirement.done;
    expect(spis()).toEqual(['inbound 202', 'outbound 102']);
    expect(sas.accepts(old.inbound.handle)).toBe(false);
    expect(setup.send(old.outbound.handle, 1)).toEqual([Verdict.noSa]);
    expect(() => next.switchOver()).toThrow(code('SA_PAIR'));
  });

  it('removes the old outbound SA before the old inbound one', async () => {
    const sas = await SaPair.open(setup.manager, pair(1), { graceMs: 0 });
    setup.admin.log.length = 0;
    const { done } = await sas.rekey(pair(2));
    await vi.advanceTimersByTimeAsync(0);
    await done;
    const objects = setup.admin.log.filter((one) => /0x20[34]/.test(one));
    expect(objects).toEqual(['create 0x204/1', 'create 0x203/1', 'destroy 0x203/0', 'destroy 0x204/0']);
  });

  it('ends the grace period when the peer says so', async () => {
    const sas = await SaPair.open(setup.manager, pair(1));
    const retirement = await sas.rekey(pair(2));
    await retirement.now();
    await retirement.now();
    expect(spis()).toEqual(['inbound 202', 'outbound 102']);
    await vi.advanceTimersByTimeAsync(60_000);
    expect(spis()).toEqual(['inbound 202', 'outbound 102']);
  });

  it('waits for the peer before it switches, and stays as it is when the peer does not come', async () => {
    const sas = await SaPair.open(setup.manager, pair(1));
    const first = sas.handle;
    const peerReady = async () => {
      expect(spis()).toHaveLength(4);
      expect(sas.handle).toBe(first);
      throw new Error('no answer');
    };
    await expect(sas.rekey(pair(2), { peerReady })).rejects.toThrow('no answer');
    expect(spis()).toEqual(['inbound 201', 'outbound 101']);
    expect(sas.handle).toBe(first);
    await sas.rekey(pair(3), { peerReady: async () => {} });
    expect(sas.outbound.spi).toBe(0x103);
  });

  it.each([
    ['the inbound SA', '0x204'],
    ['the outbound SA', '0x203'],
  ])('stays as it is when the device refuses %s', async (_name, type) => {
    const sas = await SaPair.open(setup.manager, pair(1), { require: 'inline' });
    setup.admin.fail = (what) => (what.startsWith(`create ${type}`) ? refuse(0xa, AdminStatus.ENOSPC) : null);
    await expect(sas.rekey(pair(2))).rejects.toThrow(AdminCommandError);
    expect(spis()).toEqual(['inbound 201', 'outbound 101']);
    expect(setup.send(sas.handle, 1)).toEqual([Verdict.ok]);
    setup.admin.fail = () => null;
    await sas.rekey(pair(3));
    expect(setup.send(sas.handle, 1)).toEqual([Verdict.ok]);
  });

  it('takes no second set of next SAs while it has one, and one after that is settled', async () => {
    const sas = await SaPair.open(setup.manager, pair(1));
    const [one, two] = await Promise.allSettled([sas.prepare(pair(2)), sas.prepare(pair(3))]);
    expect(two).toEqual({ status: 'rejected', reason: code('SA_PAIR') });
    if (one.status === 'rejected') throw one.reason;
    await expect(sas.prepare(pair(4))).rejects.toThrow(code('SA_PAIR'));
    await one.value.abandon();
    await expect(one.value.abandon()).rejects.toThrow(code('SA_PAIR'));
    await sas.rekey(pair(5));
    await sas.rekey(pair(6));
    expect(spis()).toHaveLength(6);
    await sas.close();
    expect(spis()).toEqual([]);
  });

  it('is refused the keys that it had', async () => {
    const sas = await SaPair.open(setup.manager, pair(1));
    await (await sas.rekey(pair(2))).now();
    const again = { ...pair(3), outbound: { ...pair(1).outbound, spi: 0x103 } };
    await expect(sas.rekey(again)).rejects.toThrow(code('NONCE_REUSE'));
    expect(spis()).toEqual(['inbound 202', 'outbound 102']);
  });

  it('says once per generation that it is time, whichever of its SAs it is', async () => {
    const lifetime = { softPackets: 2n, hardPackets: 4n, softBytes: 0n, hardBytes: 0n };
    const sas = await SaPair.open(setup.manager, pair(1, { lifetime }));
    const due: string[] = [];
    const stop = sas.onDue(({ sa, event, limit }: SaNotification) =>
      due.push(`${sa.spi.toString(16)} ${event} ${limit}`),
    );
    const old = sas.handle;
    setup.send(old, 3);
    setup.manager.state.countInbound(sas.inbound.handle, 3, 90);
    await Promise.resolve();
    expect(due).toEqual(['101 soft-expiry packets']);
    await sas.rekey(pair(2, { lifetime }));
    setup.send(old, 3);
    setup.manager.state.countInbound(sas.inbound.handle, 3, 90);
    await Promise.resolve();
    expect(due).toEqual(['101 soft-expiry packets', '202 soft-expiry packets']);
    stop();
    await sas.rekey(pair(3, { lifetime }));
    setup.send(sas.handle, 3);
    await Promise.resolve();
    expect(due).toHaveLength(2);
  });

  it('says that its sequence numbers run out', async () => {
    const sas = await SaPair.open(setup.manager, pair(1));
    const due: string[] = [];
    sas.onDue(({ event }) => due.push(event));
    setup.manager.state.count(sas.handle, 2 ** 32 - 2 ** 29, 0);
    setup.send(sas.handle, 1);
    await Promise.resolve();
    expect(due).toEqual(['sequence-low']);
  });

  it('tells whoever asks that the device did not let the old SAs go', async () => {
    const sas = await SaPair.open(setup.manager, pair(1));
    const retirement = await sas.rekey(pair(2));
    setup.admin.fail = (what) => (what === 'destroy 0x203/0' ? refuse(0xd, AdminStatus.EAGAIN) : null);
    await expect(retirement.now()).rejects.toThrow(code('ADMIN_REFUSED'));
    expect(spis()).toEqual(['inbound 202', 'outbound 102']);
    expect(setup.send(sas.handle, 1)).toEqual([Verdict.ok]);
  });

  it('leaves nothing behind when it is closed in the middle of everything, or the NIC is', async () => {
    const sas = await SaPair.open(setup.manager, pair(1));
    await sas.rekey(pair(2));
    await sas.prepare(pair(3));
    await sas.close();
    expect(spis()).toEqual([]);
    expect(setup.admin.objects.size).toBe(1); // the group of the inbound rules
    await expect(sas.prepare(pair(4))).rejects.toThrow(code('SA_PAIR'));

    const other = await SaPair.open(setup.manager, pair(4));
    const preparing = other.prepare(pair(5));
    const closing = other.close();
    await expect(preparing).rejects.toThrow(code('SA_PAIR'));
    await closing;
    expect(spis()).toEqual([]);

    const last = await SaPair.open(setup.manager, pair(6));
    const { done } = await last.rekey(pair(7));
    setup.manager.close(new VirtioError('NIC_CLOSED', 'closed'));
    await vi.advanceTimersByTimeAsync(60_000);
    await done;
    await last.close();
  });
});
