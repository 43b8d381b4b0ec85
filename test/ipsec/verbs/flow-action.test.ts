import { inspect } from 'node:util';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { VirtioError } from '../../../src/errors.ts';
import { Verdict } from '../../../src/fallback/verdict.ts';
import type { FlowActionEspAttributes } from '../../../src/ipsec/verbs/attributes.ts';
import { createFlowActionEsp, FlowActionEsp, type VerbsNic } from '../../../src/ipsec/verbs/flow-action.ts';
import { type Flow, FlowTable } from '../../../src/ipsec/verbs/flow-table.ts';
import { EspFlag, EspMask, FlowSpecType } from '../../../src/ipsec/verbs/numbers.ts';
import { AdminStatus } from '../../../src/virtio/admin-wire.ts';
import { refuse } from '../../virtio-net/fake-admin.ts';
import { closeMoves, ipPacket, type MoveSetup, openForMoves } from '../move-support.ts';
import { key, outbound } from '../support.ts';

const code = (name: string) => expect.objectContaining({ code: name });
const gcm = (first: number) => ({ salt: key(4, 0x50), icvLen: 16, aesKey: key(16, first) });
const encap = [{ type: FlowSpecType.ipv4, val: { srcIp: '192.0.2.1', dstIp: '192.0.2.2' } }] as const;
const attr = (change: object = {}) => ({ spi: 0x1000, flags: EspFlag.fullOffload | EspFlag.encrypt, ...change });
const encrypting = (change: Partial<FlowActionEspAttributes> = {}): FlowActionEspAttributes => ({
  espAttr: attr(),
  keymat: gcm(1),
  espEncap: encap,
  ...change,
});
const decrypting = (change: Partial<FlowActionEspAttributes> = {}) =>
  encrypting({ espAttr: { spi: 0x1000, flags: EspFlag.fullOffload }, replay: { size: 64 }, ...change });
/** Full offload that no virtio device can be told of. */
const software = (change: Partial<FlowActionEspAttributes> = {}) =>
  encrypting({ espAttr: attr({ tfcPad: 4 }), ...change });

let setup: MoveSetup;
let nic: VerbsNic;
let table: FlowTable;
beforeEach(async () => {
  setup = await openForMoves();
  nic = { ipsec: setup.manager, packets: setup.pool };
  table = new FlowTable(nic);
});
afterEach(closeMoves);

const to = (dstIp: string) => [{ type: FlowSpecType.ipv4, val: { dstIp } }] as const;
const egress = (action: FlowActionEsp, dstIp = '10.0.0.0/8'): Flow =>
  table.create({ direction: 'egress', specs: to(dstIp), action });

/** The SAs that packets to these addresses get, in one burst. */
function route(...destinations: string[]): number[] {
  const n = destinations.length;
  const packets = new Uint32Array(n);
  const verdicts = new Uint8Array(n);
  setup.pool.allocate(packets, n);
  destinations.forEach((destination, i) => {
    const packet = ipPacket();
    packet.set(destination.split('.').map(Number), 16);
    setup.pool.write(packets[i], packet);
  });
  table.egress(packets, n, 0, new Uint8Array(n), verdicts);
  const handles = [...packets].map((p) => setup.pool.sa[p]);
  handles.forEach((handle, i) => {
    expect(verdicts[i]).toBe(handle === 0 ? Verdict.notIpsec : Verdict.ok);
  });
  setup.pool.free(packets, n);
  return handles;
}

const spis = () => setup.manager.list().map(({ direction, spi }) => `${direction} ${spi.toString(16)}`);

describe('an action in full offload', () => {
  it('is an SA on the device when the device can express it, else in software', async () => {
    const inline = await createFlowActionEsp(nic, encrypting());
    expect(inline.placement).toEqual({ where: 'inline', because: 'the device can express all of it' });
    expect(setup.admin.objects.has('0x203/0')).toBe(true);
    const soft = await createFlowActionEsp(nic, software({ keymat: gcm(0x20) }));
    expect(soft.placement).toEqual({ where: 'software', because: 'TFC padding is not expressible' });
    const withIv = await createFlowActionEsp(nic, encrypting({ keymat: { ...gcm(0x40), iv: 100n } }));
    expect(withIv.placement).toEqual({ where: 'software', because: 'an initial IV is not expressible' });
    egress(withIv);
    setup.send(withIv.handle, 2);
    expect(setup.sent.map(({ iv }) => iv)).toEqual([100n, 101n]);
    const inbound = await createFlowActionEsp(nic, decrypting());
    expect(inbound.placement.where).toBe('inline');
    expect(spis()).toEqual(['outbound 1000', 'outbound 1000', 'outbound 1000', 'inbound 1000']);
  });

  it('is refused a key that is in use', async () => {
    await createFlowActionEsp(nic, encrypting());
    await expect(createFlowActionEsp(nic, encrypting({ espAttr: attr({ spi: 2 }) }))).rejects.toThrow(
      code('NONCE_REUSE'),
    );
    const inline: FlowActionEspAttributes = { espAttr: { flags: EspFlag.encrypt }, keymat: gcm(1) };
    await expect(createFlowActionEsp(nic, inline)).rejects.toThrow(code('NONCE_REUSE'));
    expect(spis()).toHaveLength(1);
  });

  it('serves several flows, and a modify changes all of them between two bursts', async () => {
    const action = await createFlowActionEsp(nic, encrypting());
    const flows = [egress(action, '10.1.0.0/16'), egress(action, '10.2.0.0/16'), egress(action, '10.3.0.1')];
    const all = ['10.1.0.1', '10.2.0.1', '10.3.0.1', '10.3.0.2'];
    const old = action.handle;
    expect(action.flows).toBe(3);
    expect(route(...all)).toEqual([old, old, old, 0]);
    const seen = new Set<string>();
    setup.admin.fail = () => {
      seen.add(route(...all).join());
      return null;
    };
    await action.modify({ espAttr: attr({ spi: 0x2000 }), keymat: gcm(0x20) });
    setup.admin.fail = () => null;
    const next = action.handle;
    expect(next).not.toBe(old);
    expect(route(...all)).toEqual([next, next, next, 0]);
    // While the device was told, packets had all the old SA or all the new one.
    expect([...seen].sort()).toEqual([`${old},${old},${old},0`, `${next},${next},${next},0`].sort());
    expect(spis()).toEqual(['outbound 2000']);
    flows[1].destroy();
    flows[1].destroy();
    expect(route(...all)).toEqual([next, 0, next, 0]);
  });

  it('is what it was when a modify fails, whatever it was that failed', async () => {
    const action = await createFlowActionEsp(nic, software());
    egress(action);
    const other = await createFlowActionEsp(nic, encrypting({ keymat: gcm(0x60) }));
    setup.send(action.handle, 3);
    const before = { handle: action.handle, spi: action.spi, spis: spis() };
    const attempts: [object, string][] = [
      [{ espAttr: attr({ spi: 0x2000 }) }, 'NONCE_REUSE'],
      [{ espAttr: attr({ spi: 0x2000 }), keymat: gcm(0x60) }, 'NONCE_REUSE'],
      [{ keymat: gcm(0x60) }, 'NONCE_REUSE'],
      [{ keymat: { ...gcm(0x20), icvLen: 11 } }, 'FLOW_ACTION_ATTRIBUTE'],
      [{ espAttr: attr({ flags: EspFlag.fullOffload }) }, 'FLOW_ACTION_ATTRIBUTE'],
      [{ espAttr: attr({ tfcPad: 70_000 }) }, 'SA_VALUE'],
      [{ replay: { size: 64 } }, 'FLOW_ACTION_ATTRIBUTE'],
      [{ espEncap: [] }, 'FLOW_ACTION_ATTRIBUTE'],
      [{ compMask: EspMask.esn, esn: 1 }, 'FLOW_ACTION_ATTRIBUTE'],
    ];
    for (const [change, why] of attempts) {
      await expect(action.modify(change), JSON.stringify(change)).rejects.toThrow(code(why));
      expect({ handle: action.handle, spi: action.spi, spis: spis() }).toEqual(before);
      expect(route('10.1.1.1')).toEqual([before.handle]);
    }
    setup.send(action.handle, 1);
    expect(setup.sent.map(({ sequence }) => sequence)).toEqual([1n, 2n, 3n, 4n]);
    expect(other.placement.where).toBe('inline');
  });

  it('keeps the SA that it has when the device refuses the next one', async () => {
    const action = await createFlowActionEsp(nic, encrypting());
    egress(action);
    setup.admin.fail = (what) => (what.startsWith('modify') ? refuse(0xb, AdminStatus.EINVAL) : null);
    await expect(action.modify({ keymat: gcm(0x20) })).rejects.toThrow(code('ADMIN_REFUSED'));
    setup.admin.fail = () => null;
    expect(setup.send(action.handle, 1)).toEqual([Verdict.ok]);
    await action.modify({ keymat: gcm(0x20) });
    expect(spis()).toEqual(['outbound 1000']);
  });

  it('goes on counting under another limit in software, and is refused one on the device, whose counting nobody knows', async () => {
    const soft = await createFlowActionEsp(nic, software());
    setup.send(soft.handle, 2);
    await soft.modify({ espAttr: attr({ tfcPad: 4, hardLimitPkts: 3n }) });
    expect(setup.send(soft.handle, 2)).toEqual([Verdict.ok, Verdict.expired]);
    expect(setup.sent.map(({ sequence }) => sequence)).toEqual([1n, 2n, 3n]);
    const inline = await createFlowActionEsp(nic, encrypting({ keymat: gcm(0x20) }));
    setup.send(inline.handle, 2);
    await expect(inline.modify({ espAttr: attr({ hardLimitPkts: 3n }) })).rejects.toThrow(code('NONCE_REUSE'));
    expect(setup.send(inline.handle, 2)).toEqual([Verdict.ok, Verdict.ok]);
    await inline.modify({ espAttr: attr({ hardLimitPkts: 3n }), keymat: gcm(0x40) });
    expect(setup.send(inline.handle, 4)).toEqual([0, 0, 0, Verdict.expired]);
  });

  it('has its sequence number and IV set with a new key only', async () => {
    const made = software({ keymat: { ...gcm(1), iv: 50n }, compMask: EspMask.esn, esn: 1 });
    const action = await createFlowActionEsp(nic, made);
    setup.send(action.handle, 2);
    const soft = (change: object) => attr({ tfcPad: 4, ...change });
    for (const change of [
      { espAttr: soft({ seq: 9 }) },
      { compMask: EspMask.esn, esn: 0 },
      { keymat: { ...gcm(1), iv: 49n } },
      { keymat: gcm(1) },
    ]) {
      await expect(action.modify(change)).rejects.toThrow(code('FLOW_ACTION_ATTRIBUTE'));
    }
    setup.send(action.handle, 1);
    await action.modify({ espAttr: soft({ seq: 9 }), keymat: { ...gcm(0x20), iv: 7n }, compMask: EspMask.esn, esn: 2 });
    setup.send(action.handle, 1);
    await action.modify({ keymat: gcm(0x40) });
    setup.send(action.handle, 1);
    expect(setup.sent.map(({ sequence, iv }) => `${sequence} ${iv}`)).toEqual(['0 50', '1 51', '2 52', '9 7', '1 1']);
    const { sequence } = action.sa!.traffic();
    expect(sequence).toBe(2n);
  });

  it('moves to software when the device cannot be told what it becomes, with the new key that it needs for that', async () => {
    const action = await createFlowActionEsp(nic, encrypting());
    setup.send(action.handle, 1);
    await action.modify({ keymat: { ...gcm(0x20), icvLen: 8 } });
    expect(action.placement.where).toBe('software');
    expect(setup.send(action.handle, 1)).toEqual([Verdict.ok]);
    expect(setup.admin.objects.has('0x203/0')).toBe(false);
  });

  it('is not destroyed while flows refer to it, and of no use afterwards', async () => {
    const action = await createFlowActionEsp(nic, encrypting());
    const flow = egress(action);
    await expect(action.destroy()).rejects.toThrow(code('FLOW_ACTION_IN_USE'));
    expect(route('10.0.0.1')).toEqual([action.handle]);
    flow.destroy();
    await action.destroy();
    await action.destroy();
    expect(spis()).toEqual([]);
    expect(() => egress(action)).toThrow(code('FLOW_ACTION_DESTROYED'));
    await expect(action.modify({})).rejects.toThrow(code('FLOW_ACTION_DESTROYED'));
  });

  it('modifies in the order in which it was asked', async () => {
    const action = await createFlowActionEsp(nic, encrypting());
    const keys = [0x20, 0x30, 0x40, 0x60];
    await Promise.all(
      keys.map((first, i) => action.modify({ espAttr: attr({ spi: 0x2000 + i }), keymat: gcm(first) })),
    );
    expect(spis()).toEqual(['outbound 2003']);
    expect(action.spi).toBe(0x2003);
  });

  it('shows no key', async () => {
    const action = await createFlowActionEsp(nic, encrypting({ keymat: gcm(0xc0) }));
    expect(inspect(action, { depth: 12 })).not.toContain('192, 193, 194');
    expect(inspect(action, { depth: 12, showHidden: true })).not.toContain('c0 c1 c2');
  });
});

describe('an action of inline crypto', () => {
  const crypto = (first: number, flags = EspFlag.encrypt as number, change = {}): FlowActionEspAttributes => ({
    espAttr: { flags },
    keymat: gcm(first),
    ...change,
  });

  it('runs in software, whatever the device can do', async () => {
    const action = await createFlowActionEsp(nic, crypto(1));
    expect(action.placement).toEqual({ where: 'software', because: 'virtio has no inline crypto' });
    expect([action.sa, action.fullOffload, action.encrypts]).toEqual([null, false, true]);
    expect(setup.admin.log.filter((one) => one.startsWith('create 0x20'))).toEqual([]);
    await action.destroy();
    expect(FlowActionEsp.cryptoOf(setup.pool)).toBeNull();
  });

  it('shares its key with nobody, and gives back the IVs that it did not use', async () => {
    const action = await createFlowActionEsp(nic, crypto(1));
    const sa = (iv: number) =>
      outbound({
        aead: { name: 'aes-gcm', key: key(16, 1), salt: key(4, 0x50), icvLength: 16 },
        initial: { sequence: 1n, iv: Uint8Array.of(0, 0, 0, 0, 0, 0, 0, iv) },
      });
    const soft = { require: 'software' } as const;
    await expect(setup.manager.addSa(sa(200), soft)).rejects.toThrow(code('NONCE_REUSE'));
    await expect(createFlowActionEsp(nic, crypto(1))).rejects.toThrow(code('NONCE_REUSE'));
    FlowActionEsp.cryptoOf(setup.pool)?.skipIvs(action.handle, 10n);
    await action.destroy();
    await expect(createFlowActionEsp(nic, crypto(1))).rejects.toThrow(code('NONCE_REUSE'));
    await expect(setup.manager.addSa(sa(9), soft)).rejects.toThrow(code('NONCE_REUSE'));
    await setup.manager.addSa(sa(10), soft);
    // Whoever decrypts counts nothing.
    await createFlowActionEsp(nic, crypto(1, EspFlag.decrypt));
    await createFlowActionEsp(nic, crypto(1, EspFlag.decrypt));
  });

  it('takes a new key from one packet to the next, and no other ICV length with the key that it has', async () => {
    const action = await createFlowActionEsp(nic, crypto(1));
    const first = action.handle;
    await expect(action.modify({ keymat: { ...gcm(1), icvLen: 8 } })).rejects.toThrow(code('NONCE_REUSE'));
    expect(action.handle).toBe(first);
    await action.modify({ keymat: { ...gcm(0x20), icvLen: 8 } });
    expect(action.handle).not.toBe(first);
    expect(() => FlowActionEsp.cryptoOf(setup.pool)?.counters(first)).toThrow(code('NO_SUCH_SA'));
    await expect(action.modify({ espAttr: { flags: EspFlag.encrypt, spi: 1 } })).rejects.toThrow(
      code('FLOW_ACTION_ATTRIBUTE'),
    );
    await expect(action.modify({ compMask: EspMask.esn, esn: 1 })).rejects.toThrow(code('FLOW_ACTION_ATTRIBUTE'));
  });

  it('ends with the NIC', async () => {
    const action = await createFlowActionEsp(nic, crypto(1));
    setup.manager.close(new VirtioError('NIC_CLOSED', 'closed'));
    expect(FlowActionEsp.cryptoOf(setup.pool)).toBeNull();
    await expect(action.modify({ keymat: gcm(0x20) })).rejects.toThrow(code('FLOW_ACTION_DESTROYED'));
    await action.destroy();
    await expect(createFlowActionEsp(nic, crypto(0x30))).rejects.toThrow(code('NIC_CLOSED'));
  });
});
