import { beforeEach, describe, expect, it } from 'vitest';
import { VirtioError } from '../../src/errors.ts';
import { AdminStatus } from '../../src/virtio/admin-wire.ts';
import { FlowFilter } from '../../src/virtio-net/flow-filter.ts';
import {
  decodeActionCapability,
  decodeClassifier,
  decodeFlowFilterLimits,
  decodeRule,
  decodeSelectorCapability,
  encodeActionCapability,
  encodeFlowFilterLimits,
  encodeSelectorCapability,
  type FlowFilterLimits,
  FlowFilterObject,
  SELECTOR_LENGTH,
  SelectorType,
} from '../../src/virtio-net/flow-filter-wire.ts';
import { compileMatch, whyNotMatch } from '../../src/virtio-net/flow-match.ts';
import { FakeAdmin, refuse } from './fake-admin.ts';

const code = (name: string) => expect.objectContaining({ code: name });
const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');

const limits: FlowFilterLimits = {
  groups: 2,
  classifiers: 2,
  rules: 3,
  rulesPerGroup: 4,
  lastRulePriority: 4,
  selectorsPerClassifier: 3,
};

function fullSelector(type: number, flags = 1) {
  return { type, flags, mask: new Uint8Array(SELECTOR_LENGTH[type]).fill(0xff) };
}

function deviceWith(change: Partial<FlowFilterLimits> = {}): FakeAdmin {
  const admin = new FakeAdmin();
  admin.capabilities.set(0x800, encodeFlowFilterLimits({ ...limits, ...change }));
  admin.capabilities.set(0x801, encodeSelectorCapability([1, 2, 3, 4, 5, 6].map((type) => fullSelector(type))));
  admin.capabilities.set(0x802, encodeActionCapability([1, 2, 3, 4]));
  return admin;
}

const IDS = [0x800, 0x801, 0x802];
const espTo = (spi: number) => ({ ipv4: {}, esp: { spi } });

async function open(admin: FakeAdmin): Promise<FlowFilter> {
  const filter = await FlowFilter.open(admin, IDS);
  if (filter === null) throw new Error('no flow filter');
  return filter;
}

describe('a compiled match', () => {
  it('fills in the EtherType and the protocol, and puts keys one after the other', () => {
    const destination = { address: Uint8Array.of(192, 0, 2, 2) };
    const { selectors, key } = compileMatch({ ipv4: { destination }, esp: { spi: 0x01020304 } });
    expect(selectors.map(({ type, flags }) => [type, flags])).toEqual([
      [SelectorType.eth, 0],
      [SelectorType.ipv4, 0],
      [SelectorType.esp, 0],
    ]);
    expect(selectors.map(({ mask }) => hex(mask))).toEqual([
      `${'00'.repeat(12)}ffff`,
      `${'00'.repeat(9)}ff${'00'.repeat(6)}ffffffff`,
      'ffffffff00000000',
    ]);
    expect(hex(key)).toBe(`${'00'.repeat(12)}0800${'00'.repeat(9)}32${'00'.repeat(6)}c00002020102030400000000`);
  });

  it('has IPv6 fields where IPv6 has them', () => {
    const source = { address: new Uint8Array(16).fill(0xab) };
    const { selectors, key } = compileMatch({ ipv6: { source }, udp: { destinationPort: 4500 } });
    expect(selectors.map(({ type }) => type)).toEqual([SelectorType.eth, SelectorType.ipv6, SelectorType.udp]);
    expect(hex(key.subarray(12))).toBe(
      `86dd${'00'.repeat(6)}11${'00'.repeat(1)}${'ab'.repeat(16)}${'00'.repeat(16)}0000119400000000`,
    );
  });

  it('marks prefixes as partial masks and drops the bits behind them', () => {
    const source = { address: Uint8Array.of(10, 1, 0xff, 0xff), length: 12 };
    const { selectors, key } = compileMatch({ ipv4: { source } });
    expect(selectors[1].flags).toBe(1);
    expect(hex(selectors[1].mask.subarray(12, 16))).toBe('fff00000');
    expect(hex(key.subarray(14 + 12, 14 + 16))).toBe('0a000000');
  });

  it.each([
    ['both IP versions', { ipv4: {}, ipv6: {} }],
    ['two transports', { ipv4: {}, tcp: {}, udp: {} }],
    ['a transport without IP', { esp: { spi: 1 } }],
    ['a protocol that is not the transport', { ipv4: { protocol: 17 }, esp: { spi: 1 } }],
    ['an EtherType that is not the IP version', { eth: { etherType: 0x86dd }, ipv4: {} }],
    ['an address of the other family', { ipv4: { source: { address: new Uint8Array(16) } } }],
    ['a prefix that is too long', { ipv4: { source: { address: new Uint8Array(4), length: 33 } } }],
    ['a port that is too large', { ipv4: {}, udp: { sourcePort: 65536 } }],
    ['a MAC address of five bytes', { eth: { source: new Uint8Array(5) } }],
  ])('is refused with %s', (_what, match) => {
    expect(() => compileMatch(match)).toThrow(code('FLOW_MATCH'));
  });

  it('is compared with what the device can match', () => {
    const { selectors } = compileMatch({ ipv4: { source: { address: Uint8Array.of(10, 0, 0, 0), length: 8 } } });
    const eth = fullSelector(SelectorType.eth);
    expect(whyNotMatch(selectors, [eth, fullSelector(SelectorType.ipv4)])).toBeNull();
    expect(whyNotMatch(selectors, [eth])).toMatch(/no IPV4 selector/);
    expect(whyNotMatch(selectors, [eth, fullSelector(SelectorType.ipv4, 0)])).toMatch(/parts of fields/);
    const onlyProtocol = { ...fullSelector(SelectorType.ipv4), mask: new Uint8Array(20).fill(0xff, 9, 10) };
    expect(whyNotMatch(selectors, [eth, onlyProtocol])).toMatch(/these fields of the IPV4 header/);
  });
});

describe('the flow filter', () => {
  let admin: FakeAdmin;
  let filter: FlowFilter;
  beforeEach(async () => {
    admin = deviceWith();
    filter = await open(admin);
    admin.log.length = 0;
  });

  const objects = (type: number) =>
    [...admin.objects.keys()].filter((key) => key.startsWith(`0x${type.toString(16)}/`));

  it('is absent from a device without all three capabilities', async () => {
    expect(await FlowFilter.open(admin, [0x800, 0x801])).toBeNull();
  });

  it('sets what the device offers and the driver knows, before it creates anything', async () => {
    const device = deviceWith();
    device.capabilities.set(
      0x801,
      encodeSelectorCapability([fullSelector(SelectorType.eth, 0xff), { type: 9, flags: 0, mask: new Uint8Array(3) }]),
    );
    device.capabilities.set(0x802, encodeActionCapability([1, 3, 200]));
    await open(device);
    expect(device.log).toEqual(['set 0x800', 'set 0x801', 'set 0x802']);
    const set = (id: number) => device.driverCapabilities.get(id) ?? new Uint8Array(0);
    expect(decodeFlowFilterLimits(set(0x800))).toEqual(limits);
    expect(decodeSelectorCapability(set(0x801))).toEqual([fullSelector(SelectorType.eth, 1)]);
    expect(decodeActionCapability(set(0x802))).toEqual([1, 3]);
  });

  it('creates classifier and rule, and destroys them in reverse order', async () => {
    const group = await filter.addGroup(7);
    const rule = await filter.addRule({ group, match: espTo(0x1234), action: 'ipsec', priority: 3 });
    await filter.removeRule(rule);
    await filter.removeGroup(group);
    expect(admin.log).toEqual([
      'create 0x200/0',
      'create 0x201/0',
      'create 0x202/0',
      'destroy 0x202/0',
      'destroy 0x201/0',
      'destroy 0x200/0',
    ]);
  });

  it('writes the rule that was asked for', async () => {
    const group = await filter.addGroup(7);
    await filter.addRule({
      group,
      match: { ipv4: {}, udp: { destinationPort: 53 } },
      action: { queue: 3 },
      priority: 2,
    });
    const rule = decodeRule(admin.objects.get('0x202/0')!.bytes);
    expect(rule).toMatchObject({ groupId: 0, classifierId: 0, priority: 2, action: 2, queueIndex: 6 });
    const { selectors } = decodeClassifier(admin.objects.get('0x201/0')!.bytes);
    expect(rule.key.length).toBe(selectors.reduce((sum, { mask }) => sum + mask.length, 0));
  });

  it('says PARTIAL_MASK in the selector and in the flags of both commands', async () => {
    const group = await filter.addGroup(7);
    const match = { ipv4: { source: { address: Uint8Array.of(10, 0, 0, 0), length: 8 } } };
    await filter.addRule({ group, match, action: 'drop' });
    expect(admin.objects.get('0x201/0')?.flags).toBe(1n);
    expect(admin.objects.get('0x202/0')?.flags).toBe(1n);
    expect(decodeClassifier(admin.objects.get('0x201/0')!.bytes).selectors[1].flags).toBe(1);
  });

  it('shares a classifier between rules that look at the same fields, also when they are made at once', async () => {
    const group = await filter.addGroup(7);
    const rules = await Promise.all(
      [1, 2, 3].map((spi) => filter.addRule({ group, match: espTo(spi), action: 'ipsec', priority: spi })),
    );
    expect(objects(FlowFilterObject.classifier)).toHaveLength(1);
    await filter.removeRule(rules[0]);
    expect(objects(FlowFilterObject.classifier)).toHaveLength(1);
    await filter.removeRule(rules[1]);
    await filter.removeRule(rules[2]);
    expect(objects(FlowFilterObject.classifier)).toHaveLength(0);
  });

  it('keeps the limits of the standard without asking the device', async () => {
    const group = await filter.addGroup(1);
    await filter.addGroup(2);
    await expect(filter.addGroup(3)).rejects.toThrow(code('FLOW_LIMIT'));
    await expect(filter.addGroup(2)).rejects.toThrow(code('FLOW_PRIORITY'));
    for (const spi of [1, 2, 3]) await filter.addRule({ group, match: espTo(spi), action: 'ipsec' });
    await expect(filter.addRule({ group, match: espTo(4), action: 'ipsec' })).rejects.toThrow(code('FLOW_LIMIT'));
    await expect(filter.addRule({ group, match: espTo(5), action: 'drop', priority: 4 })).rejects.toThrow(
      code('FLOW_PRIORITY'),
    );
    expect(objects(FlowFilterObject.rule)).toHaveLength(3);
  });

  it('refuses what the capabilities do not have', async () => {
    const device = deviceWith({ selectorsPerClassifier: 2 });
    device.capabilities.set(0x802, encodeActionCapability([1]));
    const small = await open(device);
    const group = await small.addGroup(1);
    await expect(small.addRule({ group, match: espTo(1), action: 'ipsec' })).rejects.toThrow(
      code('FLOW_NOT_SUPPORTED'),
    );
    await expect(small.addRule({ group, match: espTo(1), action: 'drop' })).rejects.toThrow(/takes 2 selectors, not 3/);
  });

  it('leaves nothing behind when the device refuses a rule', async () => {
    const group = await filter.addGroup(1);
    admin.fail = (what) => (what.startsWith('create 0x202') ? refuse(0xa, AdminStatus.ENOSPC) : null);
    await expect(filter.addRule({ group, match: espTo(1), action: 'ipsec' })).rejects.toThrow(code('ADMIN_REFUSED'));
    expect(objects(FlowFilterObject.classifier)).toHaveLength(0);
    admin.fail = () => null;
    for (const spi of [1, 2, 3]) await filter.addRule({ group, match: espTo(spi), action: 'ipsec' });
    expect(objects(FlowFilterObject.rule)).toEqual(['0x202/1', '0x202/2', '0x202/0']);
  });

  it('does not use an id again when nobody knows whether its object exists', async () => {
    const group = await filter.addGroup(1);
    admin.fail = (what) => (what.startsWith('create 0x202') ? new VirtioError('ADMIN_TIMEOUT', 'late') : null);
    await expect(filter.addRule({ group, match: espTo(1), action: 'ipsec' })).rejects.toThrow(code('ADMIN_TIMEOUT'));
    admin.fail = () => null;
    await filter.addRule({ group, match: espTo(1), action: 'ipsec' });
    await filter.addRule({ group, match: espTo(2), action: 'ipsec' });
    await expect(filter.addRule({ group, match: espTo(3), action: 'ipsec' })).rejects.toThrow(code('FLOW_LIMIT'));
  });

  it('refuses to remove a group that has rules, and anything twice', async () => {
    const group = await filter.addGroup(1);
    const rule = await filter.addRule({ group, match: espTo(1), action: 'ipsec' });
    await expect(filter.removeGroup(group)).rejects.toThrow(code('FLOW_IN_USE'));
    await filter.removeRule(rule);
    await expect(filter.removeRule(rule)).rejects.toThrow(code('FLOW_UNKNOWN'));
    await filter.removeGroup(group);
    await expect(filter.removeGroup(group)).rejects.toThrow(code('FLOW_UNKNOWN'));
    await expect(filter.addRule({ group, match: espTo(1), action: 'ipsec' })).rejects.toThrow(code('FLOW_UNKNOWN'));
  });
});
