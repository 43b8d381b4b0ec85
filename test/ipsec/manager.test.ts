import { inspect } from 'node:util';
import { beforeEach, describe, expect, it, vi } from 'vitest';
import { IpsecError, VirtioError } from '../../src/errors.ts';
import type { SaCounters } from '../../src/fallback/software.ts';
import { Verdict } from '../../src/fallback/verdict.ts';
import { InboundRules } from '../../src/ipsec/inbound-rules.ts';
import { InlineIpsec, type MutableSaTable } from '../../src/ipsec/inline.ts';
import { IpsecManager, type IpsecManagerOptions } from '../../src/ipsec/manager.ts';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import type { SoftwareSide } from '../../src/ipsec/own-sas.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { SaPlace } from '../../src/ipsec/sa-state.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { AdminStatus } from '../../src/virtio/admin-wire.ts';
import { FlowFilter } from '../../src/virtio-net/flow-filter.ts';
import { type FakeAdmin, refuse } from '../virtio-net/fake-admin.ts';
import { ipsecDevice } from './fake-device.ts';
import { inbound, key, outbound } from './support.ts';

const code = (name: string) => expect.objectContaining({ code: name });
const IDS = [0x800, 0x801, 0x802, 0x803, 0x804];

/** The software side as far as the control path sees it. */
class FakeSoftware implements SoftwareSide {
  readonly sas = new Map<number, { key: Uint8Array; sequence: bigint }>();
  closed = false;
  fail: Error | null = null;

  add(handle: number, sa: SecurityAssociation): void {
    if (this.fail !== null) throw this.fail;
    this.sas.set(handle, { key: sa.aead!.key.slice(), sequence: sa.initial.sequence });
  }

  modify(handle: number, sa: SecurityAssociation): void {
    this.add(handle, sa);
  }

  remove(handle: number): void {
    this.sas.delete(handle);
  }

  take(): never {
    throw new Error('no thread takes it');
  }

  counters(handle: number): SaCounters {
    const { sequence } = this.sas.get(handle)!;
    const none = { packets: 7n, bytes: 700n, dropped: { icv: 1 }, softExpired: false };
    return { ...none, sequence, engine: 'noble', transform: 'aes-128-gcm-16' };
  }

  setMtu(): void {}
  protect(): void {}
  unprotect(): void {}
  close(): void {
    this.closed = true;
  }
}

interface Setup {
  admin: FakeAdmin;
  software: FakeSoftware;
  memory: NonceMemory;
  manager: IpsecManager;
  table: MutableSaTable;
}

async function open(change: Partial<IpsecManagerOptions> = {}): Promise<Setup> {
  const admin = ipsecDevice();
  const filter = await FlowFilter.open(admin, IDS);
  const table: MutableSaTable = { resourceId: new Uint32Array(0), handle: new Uint32Array(0) };
  const inline = await InlineIpsec.open(admin, IDS, {
    wire: ipsecWire('virtio-1.4'),
    rules: filter === null ? null : new InboundRules(filter),
    table,
    handles: 4,
    maxSas: 8,
    quiesceTransmit: async () => true,
    receiveQueues: 1,
  });
  const software = new FakeSoftware();
  const memory = new NonceMemory();
  const manager = new IpsecManager({
    inline,
    inlineObstacle: null,
    software: () => software,
    guard: new NonceGuard({ memory }),
    mtu: 1500,
    handles: 4,
    ...change,
  });
  return { admin, software, memory, manager, table };
}

const sha512 = {
  cipher: { name: 'aes-cbc', key: key(16) },
  auth: { name: 'hmac-sha512', key: key(64), icvLength: 32 },
} as const;
const icv8 = { aead: { name: 'aes-gcm', key: key(16, 0x70), salt: key(4), icvLength: 8 } } as const;
const otherKey = { aead: { name: 'aes-gcm', key: key(16, 0x33), salt: key(4), icvLength: 16 } } as const;

describe('the SAs of a NIC', () => {
  let setup: Setup;
  beforeEach(async () => {
    setup = await open();
  });

  it('run inline when the device can express them, else in software, and say why', async () => {
    const { manager, software, admin } = setup;
    const inline = await manager.addSa(outbound());
    expect(inline.placement).toEqual({ where: 'inline', because: 'the device can express all of it' });
    expect(admin.objects.has('0x203/0')).toBe(true);
    const soft = await manager.addSa(outbound({ ...icv8, spi: 2 }));
    expect(soft.placement).toEqual({ where: 'software', because: 'ICV length 8 is not expressible' });
    expect([...software.sas.keys()]).toEqual([soft.handle]);
    expect([inline.handle, soft.handle]).toEqual([1, 2]);
    expect(manager.list()).toEqual([inline, soft]);
    expect(manager.get(2)).toBe(soft);
    expect(manager.state.place[1]).toBe(SaPlace.inlineOutbound);
    expect(manager.state.place[2]).toBe(SaPlace.softwareOutbound);
  });

  it('go where they are required, or nowhere', async () => {
    const { manager } = setup;
    await expect(manager.addSa(outbound(sha512), { require: 'inline' })).rejects.toThrow(code('NOT_OFFLOADABLE'));
    const soft = await manager.addSa(outbound(), { require: 'software' });
    expect(soft.placement.where).toBe('software');
    const none = await open({ software: null });
    await expect(none.manager.addSa(outbound(sha512))).rejects.toThrow(code('NO_PLACE_FOR_SA'));
    const noInline = await open({ inline: null, inlineObstacle: 'the device does not offer VIRTIO_NET_F_IPSEC' });
    const placed = await noInline.manager.addSa(outbound());
    expect(placed.placement.because).toBe('the device does not offer VIRTIO_NET_F_IPSEC');
  });

  it('go to software when the device refuses them, and with their nonces unused', async () => {
    const { manager, admin } = setup;
    admin.fail = () => refuse(0xa, AdminStatus.ENOSPC);
    const sa = await manager.addSa(outbound());
    expect(sa.placement).toEqual({ where: 'software', because: 'the device refused it with ADMIN_REFUSED' });
    await expect(manager.addSa(outbound(otherKey), { require: 'inline' })).rejects.toThrow(code('ADMIN_REFUSED'));
    admin.fail = () => null;
    await manager.addSa(outbound(otherKey), { require: 'inline' });
  });

  it('go nowhere when the device does not answer: it may have the SA', async () => {
    const { manager, admin, software } = setup;
    admin.fail = () => new VirtioError('ADMIN_TIMEOUT', 'late');
    await expect(manager.addSa(outbound())).rejects.toThrow(code('ADMIN_TIMEOUT'));
    expect(software.sas.size).toBe(0);
    admin.fail = () => null;
    await expect(manager.addSa(outbound(), { require: 'software' })).rejects.toThrow(code('NONCE_REUSE'));
  });

  it('never come back with the key and salt that ran inline', async () => {
    const { manager } = setup;
    const sa = await manager.addSa(outbound());
    await expect(manager.addSa(outbound({ spi: 2 }))).rejects.toThrow(code('NONCE_REUSE'));
    await sa.remove();
    await expect(manager.addSa(outbound())).rejects.toThrow(code('NONCE_REUSE'));
    await expect(manager.addSa(outbound(), { require: 'software' })).rejects.toThrow(code('NONCE_REUSE'));
    await manager.addSa(outbound(otherKey));
  });

  it('may come back in software behind the last nonce', async () => {
    const { manager, software } = setup;
    const sa = await manager.addSa(outbound(), { require: 'software' });
    software.sas.get(sa.handle)!.sequence = 100n;
    await sa.remove();
    const from = (sequence: bigint) => outbound({ initial: { sequence } });
    await expect(manager.addSa(from(99n), { require: 'software' })).rejects.toThrow(code('NONCE_REUSE'));
    await manager.addSa(from(100n), { require: 'software' });
  });

  it('are refused with an SPI that an inbound SA of the device has, and go to software beside one of software', async () => {
    const { manager } = setup;
    const first = await manager.addSa(inbound());
    expect(first.placement.where).toBe('inline');
    await expect(manager.addSa(inbound())).rejects.toThrow(code('SA_EXISTS'));
    await expect(manager.addSa(inbound(), { require: 'software' })).rejects.toThrow(code('SA_EXISTS'));
    const soft = await manager.addSa(inbound({ spi: 9 }), { require: 'software' });
    const twin = await manager.addSa(inbound({ spi: 9 }));
    expect(twin.placement).toEqual({ where: 'software', because: 'a software SA has the same SPI' });
    await soft.remove();
    await twin.remove();
    expect((await manager.addSa(inbound({ spi: 9 }))).placement.where).toBe('inline');
  });

  it('deliver no packet without having held it against their selector, when they come and when they go', async () => {
    const { manager, table, admin } = setup;
    const seen: string[] = [];
    admin.fail = (what) => {
      if (table.handle[0] !== 0) seen.push(`${what}: selective ${manager.state.selective[table.handle[0]]}`);
      return null;
    };
    const one = await manager.addSa(inbound({ selector: { protocol: 17 } }));
    expect(table.handle[0]).toBe(one.handle);
    expect(manager.state.selective[one.handle]).toBe(1);
    const gone = one.remove();
    expect(table.handle[0]).toBe(0);
    await gone;
    expect(seen).toEqual([]);
  });

  it('are as many as there are handles', async () => {
    const { manager } = setup;
    const sas = [];
    for (let spi = 1; spi <= 4; spi++) sas.push(await manager.addSa(inbound({ spi })));
    await expect(manager.addSa(inbound({ spi: 5 }))).rejects.toThrow(code('SA_LIMIT'));
    await sas[1].remove();
    expect((await manager.addSa(inbound({ spi: 5 }))).handle).toBe(2);
  });

  it('leave their handle to nobody when they could not be made', async () => {
    const { manager, software } = setup;
    software.fail = new IpsecError('TRANSFORM_UNSUPPORTED', 'no');
    for (let i = 0; i < 10; i++) {
      await expect(manager.addSa(outbound(), { require: 'software' })).rejects.toThrow(code('TRANSFORM_UNSUPPORTED'));
    }
    software.fail = null;
    await manager.addSa(outbound(), { require: 'software' });
    expect(manager.list()).toHaveLength(1);
  });

  it('are checked field by field before anything else', async () => {
    const wrong = { ...outbound(), spi: 0 };
    await expect(setup.manager.addSa(wrong)).rejects.toThrow(expect.objectContaining({ path: 'sa.spi' }));
    const short = outbound({ aead: { name: 'aes-gcm', key: key(15), salt: key(4), icvLength: 16 } });
    await expect(setup.manager.addSa(short)).rejects.toThrow(expect.objectContaining({ path: 'sa.aead.key' }));
  });

  it('get no longer sequence numbers than their IVs last, where these would come back to earlier ones', async () => {
    const { manager, software } = await open();
    const first = await manager.addSa(outbound(icv8));
    software.sas.get(first.handle)!.sequence = 5n;
    await first.remove();
    const iv = Uint8Array.of(255, 255, 255, 255, 0, 0, 0, 0);
    const near = { ...outbound(icv8), initial: { sequence: 1n, iv } };
    const second = await manager.addSa(near);
    const withEsn = { ...near, options: { ...near.options, esn: true } };
    await expect(second.modify(withEsn)).rejects.toThrow(code('NONCE_REUSE'));
    await second.modify({ ...near, options: { ...near.options, ecn: true } });
    await second.remove();
    // Without earlier ones they may go round.
    const other = { aead: { ...icv8.aead, key: key(16, 0x90) } };
    const third = await manager.addSa({ ...near, ...other });
    await third.modify({ ...withEsn, ...other });
  });

  it('are modified where they are, as a whole or not at all', async () => {
    const { manager, admin } = setup;
    const sa = await manager.addSa(outbound());
    await expect(sa.modify(outbound({ spi: 2 }))).rejects.toThrow(code('SA_MODIFY'));
    await expect(sa.modify(inbound())).rejects.toThrow(code('SA_MODIFY'));
    await expect(sa.modify(outbound(icv8))).rejects.toThrow(code('NOT_OFFLOADABLE'));
    await expect(sa.modify(outbound())).rejects.toThrow(code('NONCE_REUSE'));
    admin.fail = () => refuse(0xb, AdminStatus.EINVAL);
    await expect(sa.modify(outbound(otherKey))).rejects.toThrow(code('ADMIN_REFUSED'));
    admin.fail = () => null;
    await sa.modify(outbound(otherKey));
    await expect(manager.addSa(outbound())).rejects.toThrow(code('NONCE_REUSE'));
    expect((await sa.query())?.spi).toBe(0x1000);
  });

  it('keep counting in software when they are modified with the same key, and begin anew with another', async () => {
    const { manager, software } = setup;
    const sa = await manager.addSa(outbound(), { require: 'software' });
    await sa.modify(outbound({ lifetime: { softPackets: 5n, hardPackets: 0n, softBytes: 0n, hardBytes: 0n } }));
    software.sas.get(sa.handle)!.sequence = 50n;
    await sa.modify(outbound(otherKey));
    const back = outbound({ initial: { sequence: 49n } });
    await expect(manager.addSa(back, { require: 'software' })).rejects.toThrow(code('NONCE_REUSE'));
    await manager.addSa(outbound({ initial: { sequence: 50n } }), { require: 'software' });
  });

  it('show no key, whatever is printed of them', async () => {
    const secret = key(16, 0xc0);
    const aead = { name: 'aes-gcm', key: secret, salt: key(4), icvLength: 16 } as const;
    for (const require of ['inline', 'software'] as const) {
      const { manager } = await open();
      const sa = await manager.addSa(outbound({ aead, name: 'east' }), { require });
      const shown = [inspect(sa, { depth: 9 }), inspect(manager, { depth: 9 }), inspect(await sa.query())].join();
      expect(shown).not.toContain('192, 193, 194');
      expect(shown).not.toContain('c0 c1 c2');
      expect(sa.name).toBe('east');
    }
  });

  it('tell what happens to them once, after the burst in which it happened', async () => {
    const { manager } = setup;
    const lifetime = { softPackets: 2n, hardPackets: 4n, softBytes: 0n, hardBytes: 0n };
    const sa = await manager.addSa(outbound({ lifetime }));
    const soft = vi.fn();
    const hard = vi.fn();
    const removed = vi.fn();
    sa.on('soft-expiry', soft).on('hard-expiry', hard).on('soft-expiry', removed).off('soft-expiry', removed);
    const verdicts = [1, 2, 3, 4, 5, 6].map(() => {
      manager.state.packets[sa.handle]++;
      manager.state.bytes[sa.handle] += 100;
      const due = manager.state.packets[sa.handle] >= manager.state.packetsAlert[sa.handle];
      return due ? manager.state.check(sa.handle, 100) : Verdict.ok;
    });
    expect(verdicts).toEqual([0, 0, 0, 0, Verdict.expired, Verdict.expired]);
    expect(soft).not.toHaveBeenCalled();
    await Promise.resolve();
    expect(soft.mock.calls).toEqual([['packets']]);
    expect(hard.mock.calls).toEqual([['packets']]);
    expect(removed).not.toHaveBeenCalled();
    expect(sa.traffic()).toMatchObject({ packets: 4n, bytes: 400n, softExpired: true });
  });

  it('are over when the NIC closes: keys are wiped and new SAs refused', async () => {
    const { manager, software, memory } = setup;
    const inline = await manager.addSa(outbound());
    const soft = await manager.addSa(outbound(icv8), { require: 'software' });
    manager.close(new VirtioError('NIC_CLOSED', 'closed'));
    expect(software.closed).toBe(true);
    expect(manager.list()).toEqual([]);
    expect(manager.state.outbound).toBe(0);
    expect(soft.traffic().packets).toBe(7n);
    expect(inline.traffic().packets).toBe(0n);
    await expect(manager.addSa(inbound())).rejects.toThrow(code('NIC_CLOSED'));
    await expect(soft.modify(outbound(icv8))).rejects.toThrow(code('NIC_CLOSED'));
    await soft.remove();
    const guard = new NonceGuard({ memory });
    expect(() => guard.claim(outbound(), 'inline')).toThrow(code('NONCE_REUSE'));
  });

  it('keep their last counters when they are removed', async () => {
    const sa = await setup.manager.addSa(outbound(), { require: 'software' });
    await sa.remove();
    expect(sa.traffic()).toMatchObject({ packets: 7n, dropped: { icv: 1 } });
    expect(setup.manager.get(sa.handle)).toBeUndefined();
    await sa.remove();
    await expect(sa.modify(outbound())).rejects.toThrow(code('NO_SUCH_SA'));
  });
});

describe('the limits of an inline SA', () => {
  it('end it before its sequence numbers repeat, with a warning long before', async () => {
    const { manager } = await open();
    const sa = await manager.addSa(outbound());
    const told: string[] = [];
    sa.on('sequence-low', () => told.push('low')).on('sequence-overflow', () => told.push('overflow'));
    const { state } = manager;
    const at = (packets: number) => {
      state.packets[sa.handle] = packets;
      return packets >= state.packetsAlert[sa.handle] ? state.check(sa.handle, 0) : Verdict.ok;
    };
    expect(at(2 ** 32 - 2 ** 29 - 2)).toBe(Verdict.ok);
    await Promise.resolve();
    expect(told).toEqual([]);
    expect(at(2 ** 32 - 2 ** 29 - 1)).toBe(Verdict.ok);
    expect(at(2 ** 32 - 1)).toBe(Verdict.ok);
    expect(at(2 ** 32)).toBe(Verdict.sequenceOverflow);
    expect(at(2 ** 32)).toBe(Verdict.sequenceOverflow);
    await Promise.resolve();
    expect(told).toEqual(['low', 'overflow']);
  });

  it('count bytes too', async () => {
    const { manager } = await open();
    const lifetime = { softPackets: 0n, hardPackets: 0n, softBytes: 150n, hardBytes: 300n };
    const sa = await manager.addSa(outbound({ lifetime }));
    const { state } = manager;
    const send = () => {
      state.packets[sa.handle]++;
      state.bytes[sa.handle] += 100;
      return state.bytes[sa.handle] >= state.bytesAlert[sa.handle] ? state.check(sa.handle, 100) : Verdict.ok;
    };
    expect([send(), send(), send(), send(), send()]).toEqual([0, 0, 0, Verdict.expired, Verdict.expired]);
    expect(sa.traffic()).toMatchObject({ packets: 3n, bytes: 300n, softExpired: true });
  });
});
