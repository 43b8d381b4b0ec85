import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import {
  CapabilityId as C,
  encodeIdList,
  AdminOpcode as O,
  AdminQualifier as Q,
  ResourceType as R,
  AdminStatus as S,
} from '../../src/virtio/admin-wire.ts';
import {
  encodeActionCapability,
  encodeClassifier,
  encodeFlowFilterLimits,
  encodeGroup,
  encodeRule,
  encodeSelectorCapability,
  FlowFilterAction,
  type FlowSelector,
  SELECTOR_LENGTH,
  SelectorType,
} from '../../src/virtio-net/flow-filter-wire.ts';
import { runs } from '../depth.ts';
import { AdminBench } from './helpers/admin.ts';
import { encodeSa, inboundObject, saObject } from './helpers/sa.ts';

const benches: AdminBench[] = [];
const wire = ipsecWire('virtio-1.4');

function bench(...args: ConstructorParameters<typeof AdminBench>): AdminBench {
  const made = new AdminBench(...args);
  benches.push(made);
  return made;
}

afterEach(() => {
  for (const made of benches.splice(0)) made.close();
});

const OK = { status: S.OK, qualifier: Q.OK };
const einval = (qualifier: number) => ({ status: S.EINVAL, qualifier });
const INVALID_FIELD = einval(Q.INVALID_FIELD);

/** A mask of ones in the bytes given as [from, length]. */
function selector(type: number, ...ones: readonly (readonly [number, number])[]): FlowSelector {
  const mask = new Uint8Array(SELECTOR_LENGTH[type]);
  for (const [from, length] of ones) mask.fill(0xff, from, from + length);
  return { type, flags: 0, mask };
}

const ETH_TYPE = selector(SelectorType.eth, [12, 2]);
const IPV4_PROTOCOL = selector(SelectorType.ipv4, [9, 1]);
const ESP_SPI = selector(SelectorType.esp, [0, 4]);
const ESP_CLASSIFIER = { selectors: [ETH_TYPE, IPV4_PROTOCOL, ESP_SPI] };

function rule(change: Partial<Parameters<typeof encodeRule>[0]> = {}): Uint8Array {
  const key = new Uint8Array(14 + 20 + 8);
  key[12] = 8;
  key[14 + 9] = 50;
  const base = { groupId: 0, classifierId: 0, priority: 1, action: FlowFilterAction.ipsec, queueIndex: 0, key };
  return encodeRule({ ...base, ...change });
}

describe('administration commands', () => {
  it('offers its commands and lets the driver use a subset', () => {
    const b = bench();
    const list = b.command(O.LIST_QUERY);
    expect(list).toMatchObject(OK);
    expect([...(list.result ?? [])]).toEqual([0x83, 0x3f, 0, 0, 0, 0, 0, 0]);
    expect(b.use([0, 1, 7])).toMatchObject(OK);
    expect(b.command(O.CAP_ID_LIST_QUERY)).toMatchObject(OK);
    expect(b.command(O.DEVICE_CAP_GET)).toMatchObject(einval(Q.INVALID_OPCODE));
  });

  it('takes only LIST_QUERY and LIST_USE before LIST_USE', () => {
    const b = bench();
    for (let opcode = 2; opcode < 20; opcode++) expect(b.command(opcode)).toMatchObject(einval(Q.INVALID_OPCODE));
  });

  it.each([2, 14, 63])('refuses to use opcode %i, and goes on with what was used before', (opcode) => {
    const b = bench();
    b.use([0, 1, 7]);
    expect(b.use([0, 1, 8, opcode])).toMatchObject(INVALID_FIELD);
    expect(b.command(O.CAP_ID_LIST_QUERY)).toMatchObject(OK);
    expect(b.command(O.DEVICE_CAP_GET)).toMatchObject(einval(Q.INVALID_OPCODE));
  });

  it('ignores what follows the list of LIST_USE', () => {
    const b = bench();
    const list = new Uint8Array(24).fill(0xff);
    list.set(encodeIdList([0, 1, 7]));
    expect(b.command(O.LIST_USE, list)).toMatchObject(OK);
  });

  it('lets a driver block the list commands', () => {
    const b = bench();
    expect(b.use([7])).toMatchObject(OK);
    expect(b.command(O.LIST_QUERY)).toMatchObject(einval(Q.INVALID_OPCODE));
    b.admin.clear();
    expect(b.command(O.LIST_QUERY)).toMatchObject(OK);
  });

  it('checks the group first, then the opcode, then the member', () => {
    const b = bench();
    b.use();
    for (const group of [1, 2, 0xffff]) {
      expect(b.command(0x7fff, undefined, group, 5n)).toMatchObject(einval(Q.INVALID_GROUP));
      expect(b.command(O.LIST_QUERY, undefined, group)).toMatchObject(einval(Q.INVALID_GROUP));
    }
    expect(b.command(0x7fff, undefined, 0, 5n)).toMatchObject(einval(Q.INVALID_OPCODE));
    expect(b.command(O.CAP_ID_LIST_QUERY, undefined, 0, 1n)).toMatchObject(einval(Q.INVALID_MEMBER));
    expect(b.command(O.CAP_ID_LIST_QUERY, undefined, 0, 1n << 63n)).toMatchObject(einval(Q.INVALID_MEMBER));
    // The list commands do not use the member.
    expect(b.command(O.LIST_QUERY, undefined, 0, 1n)).toMatchObject(OK);
  });

  it('treats a command of no bytes as LIST_QUERY of the self group', () => {
    expect(bench().raw(new Uint8Array(0))).toMatchObject(OK);
  });

  it('survives any bytes, and answers with a status that exists', () => {
    const b = bench().enable();
    const known = new Set<number>(Object.values(S));
    const bytes = fc.tuple(
      fc.integer({ min: 0, max: 16 }),
      fc.uint8Array({ maxLength: 300 }),
      fc.constantFrom(0, 0, 0, 1),
    );
    fc.assert(
      fc.property(bytes, ([opcode, data, group]) => {
        const { status, qualifier } = b.command(opcode, data, group);
        expect(known.has(status)).toBe(true);
        expect(qualifier === 0).toBe(status === S.OK);
      }),
      { numRuns: runs(200) },
    );
    b.admin.clear();
    expect(b.ipsec.inUse || b.flowFilter.inUse).toBe(false);
  });
});

describe('capabilities', () => {
  it('lists the five of a network device', () => {
    const b = bench();
    b.use();
    const bits = b.command(O.CAP_ID_LIST_QUERY).result ?? new Uint8Array(0);
    expect(bits.length % 8).toBe(0);
    expect(bits[0x100]).toBe(0x1f);
    expect(bits.reduce((sum, byte) => sum + byte, 0)).toBe(0x1f);
  });

  it.each([0, 0x7ff, 0x805, 0xffff])('does not have capability 0x%s', (id) => {
    const b = bench();
    b.use();
    expect(b.getCapability(id)).toMatchObject({ status: S.ENXIO });
    expect(b.setCapability(id, new Uint8Array(8))).toMatchObject({ status: S.ENXIO });
  });

  it('can be set to what is offered, and to less', () => {
    const b = bench();
    b.use();
    for (const id of [0x800, 0x801, 0x802, 0x803, 0x804]) {
      expect(b.setCapability(id, b.getCapability(id).result ?? new Uint8Array(0)), String(id)).toMatchObject(OK);
    }
    const { inbound } = wire.decodeSaLimits(b.getCapability(C.NET_IPSEC_RESOURCE).result ?? new Uint8Array(0));
    expect(
      b.setCapability(C.NET_IPSEC_RESOURCE, wire.encodeSaLimits({ inbound: inbound - 1, outbound: 1 })),
    ).toMatchObject(OK);
    const [mode] = wire.decodeModes(b.getCapability(C.NET_IPSEC_SA).result ?? new Uint8Array(0));
    expect(
      b.setCapability(C.NET_IPSEC_SA, wire.encodeModes([{ ...mode, ciphers: 0n, macs: 0n, options: 1 }])),
    ).toMatchObject(OK);
    expect(b.setCapability(C.NET_FF_ACTION, encodeActionCapability([1, 3]))).toMatchObject(OK);
    expect(b.setCapability(C.NET_FF_SELECTOR, encodeSelectorCapability([ETH_TYPE]))).toMatchObject(OK);
  });

  it.each<[string, number, () => Uint8Array]>([
    ['more inbound SAs', C.NET_IPSEC_RESOURCE, () => wire.encodeSaLimits({ inbound: 65537, outbound: 1 })],
    ['more outbound SAs', C.NET_IPSEC_RESOURCE, () => wire.encodeSaLimits({ inbound: 1, outbound: 0xffffffff })],
    ['an action that does not exist', C.NET_FF_ACTION, () => encodeActionCapability([1, 5])],
    ['actions out of order', C.NET_FF_ACTION, () => encodeActionCapability([3, 1])],
    [
      'a selector that does not exist',
      C.NET_FF_SELECTOR,
      () => encodeSelectorCapability([{ type: 7, flags: 0, mask: new Uint8Array(4) }]),
    ],
    ['an unknown selector flag', C.NET_FF_SELECTOR, () => encodeSelectorCapability([{ ...ETH_TYPE, flags: 2 }])],
    ['more selectors than there are bytes', C.NET_FF_SELECTOR, () => Uint8Array.of(255)],
    ['more modes than there are bytes', C.NET_IPSEC_SA, () => Uint8Array.of(200)],
    [
      'more groups',
      C.NET_FF_RESOURCE,
      () =>
        encodeFlowFilterLimits({
          groups: 17,
          classifiers: 1,
          rules: 1,
          rulesPerGroup: 1,
          lastRulePriority: 1,
          selectorsPerClassifier: 1,
        }),
    ],
    [
      'more selectors',
      C.NET_FF_RESOURCE,
      () =>
        encodeFlowFilterLimits({
          groups: 1,
          classifiers: 1,
          rules: 1,
          rulesPerGroup: 1,
          lastRulePriority: 1,
          selectorsPerClassifier: 4,
        }),
    ],
  ])('cannot be set to %s', (_, id, data) => {
    const b = bench();
    b.use();
    expect(b.setCapability(id, data())).toMatchObject(INVALID_FIELD);
  });

  it.each(['mode', 'maxReplayWindow', 'options', 'ciphers', 'macs', 'aeads', 'maxCipherKeyLength', 'maxAuthKeyLength'])(
    'cannot be set to more %s than offered',
    (field) => {
      const b = bench();
      b.use();
      const [mode] = wire.decodeModes(b.getCapability(C.NET_IPSEC_SA).result ?? new Uint8Array(0));
      const big = field === 'ciphers' || field === 'macs';
      const more = { ...mode, [field]: big ? mode[field] | (1n << 60n) : field === 'mode' ? 9 : 0x7fffffff };
      expect(b.setCapability(C.NET_IPSEC_SA, wire.encodeModes([more]))).toMatchObject(INVALID_FIELD);
    },
  );

  it('is disabled until set, and objects are refused as an invalid opcode', () => {
    const b = bench();
    b.use();
    const sa = encodeSa(wire, saObject());
    for (const type of [R.NET_IPSEC_OUTB_SA, R.NET_IPSEC_INB_SA, R.NET_FF_GROUP, R.NET_FF_CLASSIFIER, R.NET_FF_RULE]) {
      for (const opcode of [
        O.RESOURCE_OBJ_CREATE,
        O.RESOURCE_OBJ_MODIFY,
        O.RESOURCE_OBJ_QUERY,
        O.RESOURCE_OBJ_DESTROY,
      ]) {
        expect(b.object(opcode, type, 0, sa)).toMatchObject(einval(Q.INVALID_OPCODE));
      }
    }
    b.enable();
    expect(b.create(R.NET_IPSEC_OUTB_SA, 0, sa)).toMatchObject(OK);
    b.destroy(R.NET_IPSEC_OUTB_SA, 0);
    b.setCapability(C.NET_IPSEC_SA, wire.encodeModes([]));
    expect(b.create(R.NET_IPSEC_OUTB_SA, 0, sa)).toMatchObject(einval(Q.INVALID_OPCODE));
  });

  it('is busy while objects depend on it, but can be set to the same again', () => {
    const b = bench().enable();
    b.create(R.NET_IPSEC_OUTB_SA, 0, encodeSa(wire, saObject()));
    b.create(R.NET_FF_GROUP, 0, encodeGroup({ priority: 1 }));
    expect(b.setCapability(C.NET_IPSEC_RESOURCE, wire.encodeSaLimits({ inbound: 0, outbound: 0 }))).toMatchObject({
      status: S.EBUSY,
    });
    expect(b.setCapability(C.NET_IPSEC_SA, wire.encodeModes([]))).toMatchObject({ status: S.EBUSY });
    expect(b.setCapability(C.NET_FF_ACTION, encodeActionCapability([]))).toMatchObject({ status: S.EBUSY });
    for (const id of [0x800, 0x801, 0x802, 0x803, 0x804]) {
      expect(b.setCapability(id, b.getCapability(id).result ?? new Uint8Array(0))).toMatchObject(OK);
    }
  });

  it('is forgotten at a reset', () => {
    const b = bench().enable();
    expect(b.capabilities.ipsec).not.toBeNull();
    b.admin.clear();
    expect([b.capabilities.ipsec, b.capabilities.flow]).toEqual([null, null]);
  });
});

describe.each(['virtio-1.4', 'rfc-2025-01'] as const)('SA objects of %s', (revision) => {
  const codec = ipsecWire(revision);
  const sa = (change = {}) => encodeSa(codec, saObject(change));
  const inbound = (change = {}) => encodeSa(codec, inboundObject(change));

  it('are created, queried as they were set, modified, destroyed, and created again', () => {
    const b = bench(revision).enable();
    expect(b.create(R.NET_IPSEC_OUTB_SA, 5, sa())).toMatchObject(OK);
    expect([...(b.query(R.NET_IPSEC_OUTB_SA, 5).result ?? [])]).toEqual([...sa()]);
    const next = sa({ spi: 0x2002, cipherKey: new Uint8Array(32).fill(9), salt: Uint8Array.of(9, 9, 9, 9) });
    expect(b.modify(R.NET_IPSEC_OUTB_SA, 5, next)).toMatchObject(OK);
    expect([...(b.query(R.NET_IPSEC_OUTB_SA, 5).result ?? [])]).toEqual([...next]);
    expect(b.destroy(R.NET_IPSEC_OUTB_SA, 5)).toMatchObject(OK);
    expect(b.query(R.NET_IPSEC_OUTB_SA, 5)).toMatchObject({ status: S.ENXIO });
    expect(b.create(R.NET_IPSEC_OUTB_SA, 5, sa())).toMatchObject(OK);
  });

  it('are EEXIST when created twice and ENXIO when they are not there', () => {
    const b = bench(revision).enable();
    b.create(R.NET_IPSEC_INB_SA, 1, inbound());
    expect(b.create(R.NET_IPSEC_INB_SA, 1, inbound())).toMatchObject({ status: S.EEXIST });
    expect(b.create(R.NET_IPSEC_OUTB_SA, 1, sa())).toMatchObject(OK);
    expect(b.modify(R.NET_IPSEC_INB_SA, 2, inbound())).toMatchObject({ status: S.ENXIO });
    expect(b.destroy(R.NET_IPSEC_INB_SA, 2)).toMatchObject({ status: S.ENXIO });
  });

  it('have ids below the limit that the driver has set', () => {
    const b = bench(revision).enable();
    b.setCapability(C.NET_IPSEC_RESOURCE, codec.encodeSaLimits({ inbound: 2, outbound: 3 }));
    expect(b.create(R.NET_IPSEC_OUTB_SA, 3, sa())).toMatchObject(INVALID_FIELD);
    expect(b.create(R.NET_IPSEC_OUTB_SA, 2, sa())).toMatchObject(OK);
    expect(b.create(R.NET_IPSEC_INB_SA, 2, inbound())).toMatchObject(INVALID_FIELD);
    expect(b.create(R.NET_IPSEC_INB_SA, 0xffffffff, inbound())).toMatchObject(INVALID_FIELD);
    expect(b.create(R.NET_IPSEC_INB_SA, 1, inbound())).toMatchObject(OK);
  });

  it.each<[string, Partial<ReturnType<typeof saObject>>]>([
    ['mode 0', { mode: 0 }],
    ['mode 5', { mode: 5 }],
    ['the other direction', { direction: 2 }],
    ['direction 0', { direction: 0 }],
    ['SPI 0', { spi: 0 }],
    ['an unknown option', { options: 1n << 63n }],
    ['no tunnel header in tunnel mode', { tunnel: null }],
    ['a cipher key of 17 bytes', { cipherKey: new Uint8Array(17) }],
    ['no cipher key', { cipherKey: new Uint8Array(0) }],
    ['an AEAD that does not exist', { cipherAlgorithm: 9n }],
    ['a cipher that does not exist', { cipherAlgorithm: 1n, authAlgorithm: 4n, authKey: new Uint8Array(32) }],
    ['a MAC that is not offered', { cipherAlgorithm: 3n, authAlgorithm: 6n, authKey: new Uint8Array(32) }],
    [
      'UDP encapsulation of AH',
      {
        mode: 3,
        options: 2n,
        cipherAlgorithm: 0n,
        cipherKey: new Uint8Array(0),
        authAlgorithm: 4n,
        authKey: new Uint8Array(32),
      },
    ],
  ])('are refused with %s, and leave nothing behind', (_, change) => {
    const b = bench(revision).enable();
    expect(b.create(R.NET_IPSEC_OUTB_SA, 0, sa(change))).toMatchObject(INVALID_FIELD);
    expect(b.ipsec.inUse).toBe(false);
    expect(b.ipsec.outboundHandle(0)).toBe(0);
    b.create(R.NET_IPSEC_OUTB_SA, 0, sa());
    expect(b.modify(R.NET_IPSEC_OUTB_SA, 0, sa(change))).toMatchObject(INVALID_FIELD);
    expect([...(b.query(R.NET_IPSEC_OUTB_SA, 0).result ?? [])]).toEqual([...sa()]);
  });

  it('are refused when the driver has not set the mode, option or algorithm', () => {
    const b = bench(revision).enable();
    const modes = codec.decodeModes(b.getCapability(C.NET_IPSEC_SA).result ?? new Uint8Array(0));
    const [tunnel] = modes;
    b.setCapability(C.NET_IPSEC_SA, codec.encodeModes([{ ...tunnel, options: 0, aeads: 2, maxReplayWindow: 32 }]));
    expect(b.create(R.NET_IPSEC_OUTB_SA, 0, sa({ mode: 2, tunnel: null }))).toMatchObject(INVALID_FIELD);
    expect(b.create(R.NET_IPSEC_OUTB_SA, 0, sa({ options: 1n }))).toMatchObject(INVALID_FIELD);
    const chacha = { cipherAlgorithm: 3n, cipherKey: new Uint8Array(32) };
    expect(b.create(R.NET_IPSEC_OUTB_SA, 0, sa(chacha))).toMatchObject(INVALID_FIELD);
    expect(b.create(R.NET_IPSEC_INB_SA, 0, inbound({ replayWindow: 64 }))).toMatchObject(INVALID_FIELD);
    expect(b.create(R.NET_IPSEC_INB_SA, 0, inbound({ replayWindow: 32 }))).toMatchObject(OK);
    expect(b.create(R.NET_IPSEC_OUTB_SA, 0, sa())).toMatchObject(OK);
  });

  it('of one protocol and SPI are refused inbound, allowed outbound', () => {
    const b = bench(revision).enable();
    expect(b.create(R.NET_IPSEC_INB_SA, 0, inbound())).toMatchObject(OK);
    expect(b.create(R.NET_IPSEC_INB_SA, 1, inbound({ cipherKey: new Uint8Array(16).fill(1) }))).toMatchObject(
      INVALID_FIELD,
    );
    expect(b.create(R.NET_IPSEC_INB_SA, 1, inbound({ spi: 77 }))).toMatchObject(OK);
    expect(b.modify(R.NET_IPSEC_INB_SA, 1, inbound())).toMatchObject(INVALID_FIELD);
    b.destroy(R.NET_IPSEC_INB_SA, 0);
    expect(b.modify(R.NET_IPSEC_INB_SA, 1, inbound())).toMatchObject(OK);
    expect(b.create(R.NET_IPSEC_OUTB_SA, 0, sa())).toMatchObject(OK);
    expect(b.create(R.NET_IPSEC_OUTB_SA, 1, sa({ cipherKey: new Uint8Array(16).fill(1) }))).toMatchObject(OK);
  });

  it('may be cut where what follows is zero, and longer than they are', () => {
    const b = bench(revision).enable();
    const whole = sa();
    let end = whole.length;
    while (whole[end - 1] === 0) end--;
    expect(b.create(R.NET_IPSEC_OUTB_SA, 0, whole.slice(0, end))).toMatchObject(OK);
    expect([...(b.query(R.NET_IPSEC_OUTB_SA, 0).result ?? [])]).toEqual([...whole]);
    const longer = new Uint8Array(whole.length + 100).fill(0xee);
    longer.set(sa({ spi: 9 }));
    expect(b.create(R.NET_IPSEC_OUTB_SA, 1, longer)).toMatchObject(OK);
    expect(b.query(R.NET_IPSEC_OUTB_SA, 1).result?.length).toBe(codec.saObjectSize);
  });

  it('are all gone after a reset', () => {
    const b = bench(revision).enable();
    for (let id = 0; id < 100; id++) {
      b.create(R.NET_IPSEC_OUTB_SA, id, sa({ spi: 1 + id }));
      b.create(R.NET_IPSEC_INB_SA, id, inbound({ spi: 1 + id }));
    }
    b.admin.clear();
    expect(b.ipsec.inUse).toBe(false);
    b.enable();
    expect(b.create(R.NET_IPSEC_INB_SA, 3, inbound({ spi: 50 }))).toMatchObject(OK);
  });
});

describe('flow filter objects', () => {
  const classifier = encodeClassifier(ESP_CLASSIFIER);

  function ready(): AdminBench {
    const b = bench().enable();
    expect(b.create(R.NET_FF_GROUP, 0, encodeGroup({ priority: 5 }))).toMatchObject(OK);
    expect(b.create(R.NET_FF_CLASSIFIER, 0, classifier)).toMatchObject(OK);
    return b;
  }

  it('are created, queried as they were set, and destroyed in reverse order', () => {
    const b = ready();
    expect(b.create(R.NET_FF_RULE, 0, rule())).toMatchObject(OK);
    expect([...(b.query(R.NET_FF_RULE, 0).result ?? [])]).toEqual([...rule()]);
    expect([...(b.query(R.NET_FF_CLASSIFIER, 0).result ?? [])]).toEqual([...classifier]);
    expect([...(b.query(R.NET_FF_GROUP, 0).result ?? [])]).toEqual([5, 0]);
    expect(b.destroy(R.NET_FF_GROUP, 0)).toMatchObject({ status: S.EBUSY });
    expect(b.destroy(R.NET_FF_CLASSIFIER, 0)).toMatchObject({ status: S.EBUSY });
    expect(b.modify(R.NET_FF_GROUP, 0, encodeGroup({ priority: 6 }))).toMatchObject({ status: S.EBUSY });
    for (const type of [R.NET_FF_RULE, R.NET_FF_CLASSIFIER, R.NET_FF_GROUP])
      expect(b.destroy(type, 0)).toMatchObject(OK);
    expect(b.flowFilter.inUse).toBe(false);
  });

  it('accept a classifier whose command has the PARTIAL_MASK flag', () => {
    const b = bench().enable();
    expect(b.create(R.NET_FF_CLASSIFIER, 0, classifier, 1n)).toMatchObject(OK);
  });

  it('cannot have two groups of one priority, nor more groups than the lower limit', () => {
    const b = bench().enable();
    b.setCapability(
      C.NET_FF_RESOURCE,
      encodeFlowFilterLimits({
        groups: 4,
        classifiers: 4,
        rules: 8,
        rulesPerGroup: 2,
        lastRulePriority: 9,
        selectorsPerClassifier: 3,
      }),
    );
    expect(b.create(R.NET_FF_GROUP, 0, encodeGroup({ priority: 5 }))).toMatchObject(OK);
    expect(b.create(R.NET_FF_GROUP, 1, encodeGroup({ priority: 5 }))).toMatchObject({ status: S.EINVAL });
    expect(b.create(R.NET_FF_GROUP, 1, encodeGroup({ priority: 6 }))).toMatchObject(OK);
    expect(b.create(R.NET_FF_GROUP, 2, encodeGroup({ priority: 7 }))).toMatchObject({ status: S.ENOSPC });
  });

  it.each<[string, () => Uint8Array]>([
    ['a queue that is no receive queue', () => rule({ action: FlowFilterAction.directRxVq, queueIndex: 1 })],
    ['a queue that does not exist', () => rule({ action: FlowFilterAction.directRxVq, queueIndex: 4 })],
    ['the last priority', () => rule({ priority: 255 })],
    ['an action that does not exist', () => rule({ action: 9 })],
    ['action 0', () => rule({ action: 0 })],
    ['a key of another length', () => rule({ key: new Uint8Array(41) })],
    ['no key', () => rule({ key: new Uint8Array(0) })],
  ])('cannot have a rule with %s', (_, make) => {
    const b = ready();
    expect(b.create(R.NET_FF_RULE, 0, make())).toMatchObject({ status: S.EINVAL });
    expect(b.flowFilter.size).toBe(0);
  });

  it('cannot have a rule without its group or its classifier', () => {
    const b = ready();
    expect(b.create(R.NET_FF_RULE, 0, rule({ groupId: 1 }))).toMatchObject({ status: S.ENXIO });
    expect(b.create(R.NET_FF_RULE, 0, rule({ classifierId: 1 }))).toMatchObject({ status: S.ENXIO });
  });

  it('have rule ids below the lower of both limits, and no more rules than allowed', () => {
    const b = bench().enable();
    b.setCapability(
      C.NET_FF_RESOURCE,
      encodeFlowFilterLimits({
        groups: 2,
        classifiers: 1,
        rules: 8,
        rulesPerGroup: 2,
        lastRulePriority: 9,
        selectorsPerClassifier: 3,
      }),
    );
    b.create(R.NET_FF_GROUP, 0, encodeGroup({ priority: 5 }));
    b.create(R.NET_FF_CLASSIFIER, 0, classifier);
    expect(b.create(R.NET_FF_CLASSIFIER, 1, classifier)).toMatchObject({ status: S.ENOSPC });
    expect(b.create(R.NET_FF_RULE, 2, rule())).toMatchObject(INVALID_FIELD);
    expect(b.create(R.NET_FF_RULE, 1, rule())).toMatchObject(OK);
  });

  it.each<[string, FlowSelector[]]>([
    ['no selector', []],
    ['IPv4 first', [IPV4_PROTOCOL]],
    ['two Ethernet selectors', [ETH_TYPE, ETH_TYPE]],
    ['ESP without IP', [ETH_TYPE, ESP_SPI]],
    ['IPv4 without the EtherType', [selector(SelectorType.eth, [0, 6]), IPV4_PROTOCOL]],
    ['ESP without the protocol', [ETH_TYPE, selector(SelectorType.ipv4, [12, 4]), ESP_SPI]],
    ['four selectors', [ETH_TYPE, IPV4_PROTOCOL, ESP_SPI, ESP_SPI]],
  ])('cannot have a classifier with %s', (_, selectors) => {
    const b = bench().enable();
    expect(b.create(R.NET_FF_CLASSIFIER, 0, encodeClassifier({ selectors }))).toMatchObject(INVALID_FIELD);
  });

  it('take half a field only where partial masks were agreed on', () => {
    const b = bench().enable();
    const half = encodeClassifier({ selectors: [selector(SelectorType.eth, [0, 3])] });
    expect(b.create(R.NET_FF_CLASSIFIER, 0, half)).toMatchObject(OK);
    b.destroy(R.NET_FF_CLASSIFIER, 0);
    const whole = { type: SelectorType.eth, flags: 0, mask: new Uint8Array(14).fill(0xff) };
    expect(b.setCapability(C.NET_FF_SELECTOR, encodeSelectorCapability([whole]))).toMatchObject(OK);
    expect(b.create(R.NET_FF_CLASSIFIER, 0, half)).toMatchObject(INVALID_FIELD);
  });

  it('cannot use bits of a mask that the driver has not set', () => {
    const b = bench().enable();
    b.setCapability(C.NET_FF_SELECTOR, encodeSelectorCapability([ETH_TYPE]));
    expect(
      b.create(R.NET_FF_CLASSIFIER, 0, encodeClassifier({ selectors: [selector(SelectorType.eth, [0, 6], [12, 2])] })),
    ).toMatchObject(INVALID_FIELD);
    expect(b.create(R.NET_FF_CLASSIFIER, 0, encodeClassifier({ selectors: [ETH_TYPE] }))).toMatchObject(OK);
  });

  it('do not change when a modify fails', () => {
    const b = ready();
    b.create(R.NET_FF_RULE, 0, rule());
    expect(b.modify(R.NET_FF_RULE, 0, rule({ action: 9 }))).toMatchObject(INVALID_FIELD);
    expect([...(b.query(R.NET_FF_RULE, 0).result ?? [])]).toEqual([...rule()]);
    expect(b.modify(R.NET_FF_RULE, 0, rule({ priority: 7 }))).toMatchObject(OK);
    expect(b.query(R.NET_FF_RULE, 0).result?.[8]).toBe(7);
  });

  it.each([0x0, 0x1ff, 0x205, 0x4ff, 0xffff])('do not exist with type 0x%s', (type) => {
    expect(bench().enable().create(type, 0, rule())).toMatchObject(INVALID_FIELD);
  });
});

describe('faults of the administration queue', () => {
  it('fail every command, offer nothing, swap opcodes, or lie about a capability', () => {
    const failing = bench('virtio-1.4', ['admin-error']);
    failing.use();
    expect(failing.command(O.CAP_ID_LIST_QUERY)).toMatchObject({ status: S.ENOMEM });
    const poor = bench('virtio-1.4', ['admin-list-empty']);
    expect([...(poor.command(O.LIST_QUERY).result ?? [])][0]).toBe(3);
    const swapped = bench('virtio-1.4', ['query-modify-swapped']).enable();
    swapped.create(R.NET_IPSEC_OUTB_SA, 0, encodeSa(wire, saObject()));
    expect(swapped.modify(R.NET_IPSEC_OUTB_SA, 0, new Uint8Array(0)).result?.length).toBe(196);
    const liar = bench('virtio-1.4', ['capability-malformed']);
    liar.use();
    expect(() => wire.decodeModes(liar.getCapability(C.NET_IPSEC_SA).result ?? new Uint8Array(0))).toThrow();
  });
});
