import { beforeEach, describe, expect, it } from 'vitest';
import { VirtioError } from '../../src/errors.ts';
import { InboundRules } from '../../src/ipsec/inbound-rules.ts';
import { InlineIpsec, type MutableSaTable } from '../../src/ipsec/inline.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { SaObjectType } from '../../src/ipsec/wire/numbers.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { AdminStatus } from '../../src/virtio/admin-wire.ts';
import { FlowFilter } from '../../src/virtio-net/flow-filter.ts';
import { decodeRule } from '../../src/virtio-net/flow-filter-wire.ts';
import { NOT_INLINE } from '../../src/virtio-net/sa-table.ts';
import { type FakeAdmin, refuse } from '../virtio-net/fake-admin.ts';
import { ipsecDevice } from './fake-device.ts';
import { inbound, key, outbound } from './support.ts';

const code = (name: string) => expect.objectContaining({ code: name });
const wire = ipsecWire('virtio-1.4');
const IDS = [0x800, 0x801, 0x802, 0x803, 0x804];

interface Setup {
  admin: FakeAdmin;
  table: MutableSaTable;
  inline: InlineIpsec;
  quiesced: number;
}

async function open(
  change: { limits?: { inbound: number; outbound: number }; receiveQueues?: number; drains?: boolean } = {},
): Promise<Setup> {
  const admin = ipsecDevice(change.limits);
  const filter = await FlowFilter.open(admin, IDS);
  const table: MutableSaTable = { resourceId: new Uint32Array(0), handle: new Uint32Array(0) };
  const setup = { admin, table, quiesced: 0 };
  const inline = await InlineIpsec.open(admin, IDS, {
    wire,
    rules: filter === null ? null : new InboundRules(filter),
    table,
    handles: 16,
    maxSas: 8,
    quiesceTransmit: async () => {
      Object.assign(setup, { quiesced: setup.quiesced + 1 });
      return change.drains ?? true;
    },
    receiveQueues: change.receiveQueues ?? 0,
  });
  if (inline === null) throw new Error('no inline IPsec');
  admin.log.length = 0;
  return Object.assign(setup, { inline });
}

describe('inline IPsec', () => {
  let setup: Setup;
  beforeEach(async () => {
    setup = await open();
  });
  const object = (what: string) => setup.admin.objects.get(what)?.bytes ?? new Uint8Array(0);

  it('sets what it uses of the capabilities, at most as many SAs as asked for', async () => {
    const device = ipsecDevice({ inbound: 100, outbound: 4 });
    const options = { wire, rules: null, table: setup.table, handles: 16, maxSas: 8, receiveQueues: 0 };
    await InlineIpsec.open(device, IDS, { ...options, quiesceTransmit: async () => true });
    const limits = wire.decodeSaLimits(device.driverCapabilities.get(0x803) ?? new Uint8Array(0));
    expect(limits).toEqual({ inbound: 8, outbound: 4 });
    expect(device.driverCapabilities.has(0x804)).toBe(true);
  });

  it('is absent when the device has no capability, or nothing in it', async () => {
    const options = { wire, rules: null, table: setup.table, handles: 16, maxSas: 8, receiveQueues: 0 };
    const none = { ...options, quiesceTransmit: async () => true };
    expect(await InlineIpsec.open(setup.admin, [0x803], none)).toBeNull();
    expect(await InlineIpsec.open(ipsecDevice({ inbound: 0, outbound: 0 }), IDS, none)).toBeNull();
  });

  it('makes an outbound SA one object, whose obj_id is its id, and tells the transmit queue', async () => {
    await setup.inline.create(5, outbound());
    expect(setup.admin.log).toEqual(['create 0x203/0']);
    const sa = wire.decodeSa(object('0x203/0'));
    expect(sa).toMatchObject({ objectId: 0, spi: 0x1000, direction: 1 });
    expect(sa.cipherKey).toEqual(key(16));
    expect(setup.table.resourceId[5]).toBe(0);
    await setup.inline.create(6, outbound({ spi: 0x1001 }));
    expect(wire.decodeSa(object('0x203/1')).objectId).toBe(1);
  });

  it('makes an inbound SA an object and a rule for its SPI and destination, in that order, and takes both away in reverse', async () => {
    await setup.inline.create(5, inbound());
    expect(setup.admin.log).toEqual(['create 0x204/0', 'create 0x200/0', 'create 0x201/0', 'create 0x202/0']);
    expect(setup.table.handle[0]).toBe(5);
    const rule = decodeRule(object('0x202/0'));
    expect(rule.action).toBe(3);
    const keyHex = Buffer.from(rule.key).toString('hex');
    expect(keyHex.slice(24, 28)).toBe('0800');
    expect(keyHex.slice(28 + 18, 28 + 20)).toBe('32');
    expect(keyHex.slice(28 + 32, 28 + 40)).toBe('c0000202');
    expect(keyHex.slice(68)).toBe('0000100000000000');
    setup.admin.log.length = 0;
    await setup.inline.destroy(5);
    expect(setup.admin.log).toEqual(['destroy 0x202/0', 'destroy 0x201/0', 'destroy 0x204/0']);
    expect(setup.table.handle[0]).toBe(0);
  });

  it('leads AH, and ESP in UDP, to IPsec with rules that such SAs share', async () => {
    const ah = { protocol: 'ah', auth: { name: 'hmac-sha1', key: key(20), icvLength: 12 } } as const;
    const udpEncap = { sourcePort: 4500, destinationPort: 4500 };
    await setup.inline.create(1, inbound({ ...ah, spi: 1 }));
    await setup.inline.create(2, inbound({ ...ah, spi: 2 }));
    await setup.inline.create(3, inbound({ udpEncap, spi: 3 }));
    await setup.inline.create(4, inbound({ udpEncap, spi: 4 }));
    const rules = () => [...setup.admin.objects.keys()].filter((what) => what.startsWith('0x202/'));
    expect(rules()).toHaveLength(2);
    await setup.inline.destroy(1);
    await setup.inline.destroy(3);
    expect(rules()).toHaveLength(2);
    await setup.inline.destroy(2);
    await setup.inline.destroy(4);
    expect(rules()).toHaveLength(0);
  });

  it('looks for packets of both IP versions when the SA does not say which', async () => {
    await setup.inline.create(1, inbound({ mode: 'transport' }));
    const rules = [...setup.admin.objects.keys()].filter((what) => what.startsWith('0x202/'));
    expect(rules.map((what) => Buffer.from(decodeRule(object(what)).key.subarray(12, 14)).toString('hex'))).toEqual([
      '0800',
      '86dd',
    ]);
  });

  it('refuses a second inbound SA with the SPI of one that is there or is being made', async () => {
    const first = setup.inline.create(1, inbound());
    await expect(setup.inline.create(2, inbound())).rejects.toThrow(code('SA_EXISTS'));
    await first;
    await expect(setup.inline.create(2, inbound())).rejects.toThrow(code('SA_EXISTS'));
    expect(setup.inline.hasInbound(inbound())).toBe(true);
    await setup.inline.destroy(1);
    await setup.inline.create(2, inbound());
  });

  it('refuses more SAs than the limit without asking the device', async () => {
    const small = await open({ limits: { inbound: 1, outbound: 2 } });
    await small.inline.create(1, outbound());
    await small.inline.create(2, outbound());
    await expect(small.inline.create(3, outbound())).rejects.toThrow(code('SA_LIMIT'));
    expect(small.inline.obstacle(outbound())).toBe('all 2 outbound SAs of the device are in use');
    expect(small.admin.log).toEqual(['create 0x203/0', 'create 0x203/1']);
    await small.inline.destroy(1);
    await small.inline.create(3, outbound());
    expect(small.table.resourceId[3]).toBe(0);
    expect(small.table.resourceId[1]).toBe(NOT_INLINE);
  });

  it('leaves nothing behind when the device refuses the rule of an inbound SA', async () => {
    setup.admin.fail = (what) => (what.startsWith('create 0x202') ? refuse(0xa, AdminStatus.ENOSPC) : null);
    await expect(setup.inline.create(1, inbound())).rejects.toThrow(code('ADMIN_REFUSED'));
    expect([...setup.admin.objects.keys()]).toEqual(['0x200/0']);
    expect(setup.table.handle[0]).toBe(0);
    setup.admin.fail = () => null;
    await setup.inline.create(1, inbound());
  });

  it('does not use the id of an object again that may exist on a device which did not answer', async () => {
    setup.admin.fail = () => new VirtioError('ADMIN_TIMEOUT', 'late');
    await expect(setup.inline.create(1, outbound())).rejects.toThrow(code('ADMIN_TIMEOUT'));
    setup.admin.fail = () => null;
    await setup.inline.create(1, outbound());
    expect(setup.table.resourceId[1]).toBe(1);
  });

  it('takes an outbound SA off the data path before it waits for the queues and destroys the object', async () => {
    await setup.inline.create(1, outbound());
    const gone = setup.inline.destroy(1);
    expect(setup.table.resourceId[1]).toBe(NOT_INLINE);
    expect(setup.admin.objects.has('0x203/0')).toBe(true);
    await gone;
    expect(setup.quiesced).toBe(1);
    expect(setup.admin.objects.size).toBe(0);
    await setup.inline.destroy(1);
  });

  it('takes an inbound SA off the data path before it asks the device for anything', async () => {
    await setup.inline.create(1, inbound());
    const gone = setup.inline.destroy(1);
    expect(setup.table.handle[0]).toBe(0);
    expect(setup.admin.objects.has('0x202/0')).toBe(true);
    await gone;
    expect(setup.admin.objects.has('0x202/0')).toBe(false);
  });

  it('does not use the id of an outbound SA again of which a packet may still be in a ring', async () => {
    const two = await open({ limits: { inbound: 0, outbound: 2 }, drains: false });
    await two.inline.create(1, outbound());
    await two.inline.destroy(1);
    await two.inline.create(2, outbound());
    expect(two.table.resourceId[2]).toBe(1);
    await expect(two.inline.create(3, outbound())).rejects.toThrow(code('SA_LIMIT'));
    expect(two.admin.log.at(-1)).toBe('create 0x203/1');
  });

  it('gives the packets of a used-again inbound id to the new SA only when every receive queue was empty', async () => {
    const two = await open({ limits: { inbound: 1, outbound: 0 }, receiveQueues: 2 });
    await two.inline.create(1, inbound());
    expect(two.inline.awaitsDrain).toBe(false);
    expect(two.table.handle[0]).toBe(1);
    await two.inline.destroy(1);
    await two.inline.create(2, inbound());
    expect(two.table.handle[0]).toBe(0);
    two.inline.drained(0);
    expect(two.table.handle[0]).toBe(0);
    two.inline.drained(1);
    expect(two.table.handle[0]).toBe(2);
    expect(two.inline.awaitsDrain).toBe(false);
  });

  it('modifies an object in place and returns what the device keeps without its keys', async () => {
    await setup.inline.create(1, outbound());
    const aead = { name: 'aes-gcm', key: key(32, 9), salt: key(4, 3), icvLength: 16 } as const;
    await setup.inline.modify(1, outbound({ aead }));
    expect(wire.decodeSa(object('0x203/0')).cipherKey).toEqual(key(32, 9));
    const seen = await setup.inline.query(1);
    expect(seen).toMatchObject({ spi: 0x1000, cipherKeyLength: 32, authKeyLength: 0 });
    expect(seen).not.toHaveProperty('cipherKey');
    expect(seen).not.toHaveProperty('authKey');
    expect(seen).not.toHaveProperty('salt');
    await expect(setup.inline.query(2)).rejects.toThrow(code('NO_SUCH_SA'));
    await expect(setup.inline.modify(2, outbound())).rejects.toThrow(code('NO_SUCH_SA'));
  });

  it('wipes the bytes that it gave to the administration queue', async () => {
    const given: Uint8Array[] = [];
    const { admin } = setup;
    const create = admin.createObject.bind(admin);
    admin.createObject = (type, id, bytes, flags) => {
      given.push(bytes);
      return create(type, id, bytes, flags);
    };
    await setup.inline.create(1, outbound());
    admin.fail = () => refuse(0xa, AdminStatus.EINVAL);
    await expect(setup.inline.create(2, outbound())).rejects.toThrow();
    expect(given.map((bytes) => bytes.every((byte) => byte === 0))).toEqual([true, true]);
  });

  it('takes no inbound SAs without a flow filter that leads to them', async () => {
    const options = { wire, rules: null, table: setup.table, handles: 16, maxSas: 8, receiveQueues: 0 };
    const inline = await InlineIpsec.open(ipsecDevice(), IDS, { ...options, quiesceTransmit: async () => true });
    expect(inline?.obstacle(inbound())).toMatch(/no flow filter/);
    expect(inline?.obstacle(outbound())).toBeNull();
  });

  it('says why not with the words of the capability', () => {
    const sha512: Partial<SecurityAssociation> = {
      cipher: { name: 'aes-cbc', key: key(16) },
      auth: { name: 'hmac-sha512', key: key(64), icvLength: 32 },
    };
    expect(setup.inline.obstacle(outbound(sha512))).toBe('hmac-sha512 key does not fit the SA object');
    expect(SaObjectType.outbound).toBe(0x203);
  });
});
