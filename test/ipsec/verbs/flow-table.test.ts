import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { VirtioError } from '../../../src/errors.ts';
import { SoftwareIpsec } from '../../../src/fallback/software.ts';
import { Verdict, verdictNames } from '../../../src/fallback/verdict.ts';
import type { SecurityAssociation } from '../../../src/ipsec/sa.ts';
import type { FlowActionEspAttributes } from '../../../src/ipsec/verbs/attributes.ts';
import { createFlowActionEsp, type VerbsNic } from '../../../src/ipsec/verbs/flow-action.ts';
import { type FlowSpec, FlowTable } from '../../../src/ipsec/verbs/flow-table.ts';
import { EspFlag, EspMask, FlowSpecType } from '../../../src/ipsec/verbs/numbers.ts';
import { concat, ethernet, ipv4, ipv6, toHex } from '../../fallback/support.ts';
import { closeMoves, type MoveSetup, openForMoves } from '../move-support.ts';
import { inbound, key, outbound } from '../support.ts';

const code = (name: string) => expect.objectContaining({ code: name });
const keymat = (first: number) => ({ salt: key(4, 0x50), icvLen: 16, aesKey: key(16, first) });
const aead = (first: number) => ({
  aead: { name: 'aes-gcm', key: key(16, first), salt: key(4, 0x50), icvLength: 16 } as const,
});
const crypto = (first: number, flags: number, change: object = {}): FlowActionEspAttributes => ({
  espAttr: { flags },
  keymat: keymat(first),
  ...change,
});
const encap = [{ type: FlowSpecType.ipv4, val: { srcIp: '192.0.2.1', dstIp: '192.0.2.2' } }] as const;
const offload = (first: number, change: object = {}): FlowActionEspAttributes => ({
  espAttr: { spi: 0x1000 + first, flags: EspFlag.fullOffload | EspFlag.encrypt, ...change },
  keymat: keymat(first),
  espEncap: encap,
});
const esp = (spi: number, ip: object = {}): FlowSpec[] => [
  { type: FlowSpecType.ipv4, val: ip },
  { type: FlowSpecType.esp, val: { spi } },
];

let setup: MoveSetup;
let nic: VerbsNic;
let table: FlowTable;
let peer: SoftwareIpsec;
beforeEach(async () => {
  setup = await openForMoves();
  nic = { ipsec: setup.manager, packets: setup.pool };
  table = new FlowTable(nic);
  peer = new SoftwareIpsec(setup.pool, { engine: 'noble' });
});
afterEach(() => {
  peer.close();
  closeMoves();
});

interface Outcome {
  readonly verdict: string;
  readonly bytes: Uint8Array;
  readonly sa: number;
  readonly next: number;
}

function run(inputs: readonly Uint8Array[], linkHeader: number, next: number, work: Work): Outcome[] {
  const n = inputs.length;
  const packets = new Uint32Array(n);
  const nextHeaders = new Uint8Array(n).fill(next);
  const verdicts = new Uint8Array(n).fill(0xff);
  expect(setup.pool.allocate(packets, n)).toBe(n);
  inputs.forEach((bytes, i) => {
    setup.pool.write(packets[i], bytes);
  });
  work(packets, n, linkHeader, nextHeaders, verdicts);
  const out = inputs.map((_, i) => ({
    verdict: verdictNames[verdicts[i]],
    bytes: setup.pool.read(packets[i]).slice(),
    sa: setup.pool.sa[packets[i]],
    next: nextHeaders[i],
  }));
  setup.pool.free(packets, n);
  return out;
}

type Work = FlowTable['egress'];

const egress = (inputs: readonly Uint8Array[], linkHeader = 0, next = 0) =>
  run(inputs, linkHeader, next, (...all) => table.egress(...all));
const ingress = (inputs: readonly Uint8Array[], linkHeader = 0) =>
  run(inputs, linkHeader, 0, (...all) => table.ingress(...all));

/** The peer's SA opens or makes a packet. */
function unprotect(input: Uint8Array, sa: SecurityAssociation, linkHeader = 0): Outcome {
  peer.add(1, sa);
  const [out] = run([input], linkHeader, 0, (packets, n, link, _next, verdicts) =>
    peer.unprotect(packets, n, link, verdicts),
  );
  peer.remove(1);
  return out;
}

function protect(input: Uint8Array, sa: SecurityAssociation): Uint8Array {
  peer.add(1, sa);
  const [out] = run([input], 0, 0, (packets, n, link, _next, verdicts) => {
    setup.pool.sa[packets[0]] = 1;
    peer.protect(packets, n, link, verdicts);
  });
  peer.remove(1);
  return out.bytes;
}

const inner = ipv4(key(30), { destination: Uint8Array.of(10, 9, 9, 9) });
const outer = { protocol: 50, source: Uint8Array.of(192, 0, 2, 1), destination: Uint8Array.of(192, 0, 2, 2) };

/** ESP header, IV field and payload, as the caller of inline crypto supplies them. */
function espHeader(spi: number, sequence: number, payload: Uint8Array): Uint8Array {
  const header = Buffer.alloc(16);
  header.writeUInt32BE(spi, 0);
  header.writeUInt32BE(sequence, 4);
  return concat(header, payload);
}

describe('flows of full offload', () => {
  it('give a packet the SA of the first that fits it', async () => {
    const one = await createFlowActionEsp(nic, offload(1));
    const two = await createFlowActionEsp(nic, offload(0x20));
    const flows: [readonly FlowSpec[], typeof one][] = [
      [[{ type: FlowSpecType.ipv4, val: { dstIp: '10.1.0.0/16' } }, udp(53)], one],
      [[{ type: FlowSpecType.ipv4Ext, val: { dstIp: '10.1.0.0/16', srcIp: '10.0.0.1', proto: 6 } }], two],
      [[{ type: FlowSpecType.ipv6, val: {} }], one],
    ];
    for (const [specs, action] of flows) table.create({ direction: 'egress', specs, action });
    const to = (port: number, change: object = {}) =>
      ipv4(Uint8Array.of(1, 2, 0, port, 0, 8, 0, 0), { destination: Uint8Array.of(10, 1, 5, 5), ...change });
    const packets = [
      to(53),
      to(54),
      to(54, { protocol: 6 }),
      to(54, { protocol: 6, source: Uint8Array.of(10, 0, 0, 2) }),
      to(53, { destination: Uint8Array.of(10, 2, 5, 5) }),
      ipv6(key(8)),
      ipv4(key(8), { destination: Uint8Array.of(10, 1, 5, 5), flags: 1 }),
    ];
    const [a, b] = [one.handle, two.handle];
    const out = egress(packets.map(ethernet), 14);
    expect(out.map(({ sa }) => sa)).toEqual([a, 0, b, 0, 0, a, 0]);
    const left = 'not-ipsec';
    expect(out.map(({ verdict }) => verdict)).toEqual(['ok', left, 'ok', left, left, 'ok', 'fragment']);
    table.clear();
    expect(egress([to(53)])[0]).toMatchObject({ sa: 0, verdict: left });
    expect([one.flows, two.flows]).toEqual([0, 0]);
  });

  it('are refused where the action could not be for them', async () => {
    const out = await createFlowActionEsp(nic, offload(1));
    const decrypt = { espAttr: { spi: 0x1000, flags: EspFlag.fullOffload }, keymat: keymat(0x30), espEncap: encap };
    const inn = await createFlowActionEsp(nic, decrypt);
    const nat = await createFlowActionEsp(nic, {
      ...decrypt,
      espAttr: { spi: 0x1001, flags: EspFlag.fullOffload },
      espEncap: [...encap, { type: FlowSpecType.udp, val: { srcPort: 4500, dstPort: 4500 } }],
    });
    const cases: ['egress' | 'ingress', readonly FlowSpec[], typeof out, string | null][] = [
      ['ingress', esp(0x1001), out, 'FLOW_MISMATCH'],
      ['egress', [], inn, 'FLOW_MISMATCH'],
      ['egress', esp(0x1001), out, 'FLOW_MISMATCH'],
      ['egress', [], out, null],
      ['ingress', esp(0x1000), inn, null],
      ['ingress', esp(0x1001), inn, 'FLOW_MISMATCH'],
      ['ingress', [{ type: FlowSpecType.ipv4, val: {} }], inn, 'FLOW_MISMATCH'],
      ['ingress', [{ type: FlowSpecType.ipv4, val: {} }, udp(4500)], nat, null],
      ['egress', [udp(53)], out, null],
      ['egress', [udp(53), udp(53)], out, 'FLOW_SPEC'],
      [
        'egress',
        [
          { type: FlowSpecType.ipv4, val: {} },
          { type: FlowSpecType.ipv4, val: {} },
        ],
        out,
        'FLOW_SPEC',
      ],
      ['egress', [{ type: FlowSpecType.ipv4, val: { proto: 6 } }, udp(53)], out, 'FLOW_SPEC'],
      ['egress', [{ type: FlowSpecType.ipv4, val: { dstIp: '2001:db8::/32' } }], out, 'FLOW_SPEC'],
      ['egress', [{ type: FlowSpecType.ipv4, val: { dstIp: '10.0.0.1/8' } }], out, 'FLOW_SPEC'],
      ['egress', [{ type: FlowSpecType.ipv4, val: {} }, udp(65536)], out, 'FLOW_SPEC'],
      ['egress', [{ type: 0x20, val: {} } as unknown as FlowSpec], out, 'FLOW_SPEC'],
    ];
    for (const [direction, specs, action, why] of cases) {
      const create = () => table.create({ direction, specs, action });
      if (why === null) create();
      else expect(create, JSON.stringify(specs)).toThrow(code(why));
    }
  });

  it('keep the SPI of an inbound action as it is, because they name it', async () => {
    const espAttr = { spi: 0x1000, flags: EspFlag.fullOffload };
    const inn = await createFlowActionEsp(nic, { espAttr, keymat: keymat(1), espEncap: encap });
    const flow = table.create({ direction: 'ingress', specs: esp(0x1000), action: inn });
    await expect(inn.modify({ espAttr: { ...espAttr, spi: 0x2000 } })).rejects.toThrow(code('FLOW_MISMATCH'));
    flow.destroy();
    await inn.modify({ espAttr: { ...espAttr, spi: 0x2000 } });
    expect(setup.manager.list().map(({ spi }) => spi)).toEqual([0x2000]);
  });
});

describe('flows of inline crypto', () => {
  it('encrypt what the caller has laid out, so that a peer opens it, in tunnel and in transport mode', async () => {
    const tunnel = await createFlowActionEsp(nic, crypto(1, EspFlag.encrypt));
    const transport = await createFlowActionEsp(nic, crypto(0x20, EspFlag.encrypt | EspFlag.transport));
    table.create({ direction: 'egress', specs: esp(0x1000), action: tunnel });
    table.create({ direction: 'egress', specs: esp(0x2000), action: transport });
    const payload = inner.subarray(20);
    const packets = [ipv4(espHeader(0x1000, 5, inner), outer), ipv4(espHeader(0x2000, 6, payload), outer)];
    const [a, b] = egress(packets.map(ethernet), 14, 17);
    expect([a.verdict, a.sa, b.verdict, b.sa]).toEqual(['ok', 0, 'ok', 0]);
    const opened = unprotect(a.bytes, inbound({ ...aead(1) }), 14);
    expect([opened.verdict, toHex(opened.bytes.subarray(14))]).toEqual(['ok', toHex(inner)]);
    const second = unprotect(b.bytes, inbound({ ...aead(0x20), spi: 0x2000, mode: 'transport' }), 14);
    expect(second.verdict).toBe('ok');
    expect(toHex(second.bytes.subarray(34))).toBe(toHex(payload));
    expect(second.bytes[14 + 9]).toBe(17);
  });

  it('name an IPv6 packet in a tunnel as what it is', async () => {
    const action = await createFlowActionEsp(nic, crypto(1, EspFlag.encrypt));
    table.create({ direction: 'egress', specs: esp(0x1000), action });
    const six = ipv6(key(20));
    const [out] = egress([ipv4(espHeader(0x1000, 1, six), outer)]);
    const opened = unprotect(out.bytes, inbound(aead(1)));
    expect([opened.verdict, toHex(opened.bytes)]).toEqual(['ok', toHex(six)]);
  });

  it('decrypt in place what a peer has made and report the next header; what does not fit stays as it is', async () => {
    const action = await createFlowActionEsp(nic, crypto(1, EspFlag.decrypt));
    const specs = esp(0x1000, { srcIp: '192.0.2.0/24', dstIp: '192.0.2.2' });
    table.create({ direction: 'ingress', specs, action });
    const made = protect(inner, outbound(aead(1)));
    const changed = made.slice();
    changed[changed.length - 1] ^= 1;
    const elsewhere = protect(inner, outbound({ ...aead(1), spi: 0x2000 }));
    const out = ingress([made, changed, elsewhere, inner, ipv6(key(30), { nextHeader: 50 })]);
    expect(out.map(({ verdict }) => verdict)).toEqual(['ok', 'icv', 'not-ipsec', 'not-ipsec', 'not-ipsec']);
    expect(out[0].next).toBe(4);
    expect(toHex(out[0].bytes.subarray(36))).toBe(toHex(inner));
    expect(toHex(out[0].bytes.subarray(20, 36))).toBe(toHex(made.subarray(20, 36)));
    expect(out[1].bytes.length).toBe(0);
    expect(toHex(out[2].bytes)).toBe(toHex(elsewhere));
    expect(toHex(out[3].bytes)).toBe(toHex(inner));
  });

  it('several on one action follow the same state of extended numbers, from one burst to the next', async () => {
    const state = (esn: number, newWindow: boolean) => ({
      espAttr: { flags: EspFlag.decrypt | (newWindow ? EspFlag.esnNewWindow : 0) },
      compMask: EspMask.esn,
      esn,
    });
    const action = await createFlowActionEsp(nic, { keymat: keymat(1), ...state(0, false) });
    for (const spi of [0x1000, 0x2000, 0xfffffff0]) table.create({ direction: 'ingress', specs: esp(spi), action });
    const options = { esn: true, copyDscp: false, copyDf: false, decrementTtl: false, ecn: false };
    const numbered = (sequence: bigint) =>
      [0x1000, 0x2000, 0xfffffff0].map((spi) =>
        protect(inner, outbound({ ...aead(1), spi, options, initial: { sequence } })),
      );
    const opens = (sequence: bigint) => new Set(ingress(numbered(sequence)).map(({ verdict }) => verdict));
    expect(opens(2n ** 31n)).toEqual(new Set(['ok']));
    expect(opens(2n ** 32n + 5n)).toEqual(new Set(['icv']));
    await action.modify(state(0, true));
    expect(opens(2n ** 32n + 5n)).toEqual(new Set(['ok']));
    expect(opens(2n ** 32n - 5n)).toEqual(new Set(['ok']));
    await action.modify(state(1, false));
    expect(opens(2n ** 32n + 2n ** 31n)).toEqual(new Set(['ok']));
    expect(opens(2n ** 32n - 5n)).toEqual(new Set(['icv']));
  });

  it('never repeat an IV, whatever number the caller writes and however the action is modified', async () => {
    const action = await createFlowActionEsp(nic, crypto(1, EspFlag.encrypt, { compMask: EspMask.esn, esn: 0 }));
    table.create({ direction: 'egress', specs: esp(0x1000), action });
    table.create({ direction: 'egress', specs: esp(0x2000), action });
    const ivs = new Set<bigint>();
    for (let round = 0; round < 5; round++) {
      const inputs = [0x1000, 0x2000, 0x1000].map((spi) => ipv4(espHeader(spi, 1, inner), outer));
      for (const { bytes } of egress(inputs)) ivs.add(Buffer.from(bytes).readBigUInt64BE(28));
      await action.modify({ compMask: EspMask.esn, esn: round % 2 });
    }
    expect(ivs.size).toBe(15);
  });

  it('need an IP and an ESP header, and the direction of their action', async () => {
    const action = await createFlowActionEsp(nic, crypto(1, EspFlag.encrypt));
    const ip = { type: FlowSpecType.ipv4, val: {} } as const;
    const mismatch = code('FLOW_MISMATCH');
    expect(() => table.create({ direction: 'egress', specs: [ip], action })).toThrow(mismatch);
    expect(() => table.create({ direction: 'egress', specs: [], action })).toThrow(mismatch);
    expect(() => table.create({ direction: 'ingress', specs: esp(1), action })).toThrow(mismatch);
  });

  it('let nothing go on in the clear that they should have encrypted', async () => {
    const action = await createFlowActionEsp(nic, crypto(1, EspFlag.encrypt));
    table.create({ direction: 'egress', specs: esp(0x1000), action });
    const packet = ipv4(espHeader(0x1000, 1, inner), outer);
    const cut = packet.slice(0, -3);
    const pieces = ipv4(espHeader(0x1000, 1, inner), { ...outer, flags: 0x2000 });
    expect(egress([cut, pieces]).map(({ verdict }) => verdict)).toEqual(['malformed', 'fragment']);
    setup.manager.close(new VirtioError('NIC_CLOSED', 'closed'));
    expect(egress([packet])[0].verdict).toBe(verdictNames[Verdict.noSa]);
  });

  it('take bursts of any length', async () => {
    const action = await createFlowActionEsp(nic, crypto(1, EspFlag.encrypt));
    table.create({ direction: 'egress', specs: esp(0x1000), action });
    const one = new Uint32Array(1);
    setup.pool.allocate(one, 1);
    const [p] = one;
    // One slot, many times: what counts is that no position is lost.
    const n = 700;
    const packets = new Uint32Array(n).fill(p);
    setup.pool.write(p, inner);
    const verdicts = new Uint8Array(n).fill(0xff);
    table.egress(packets, n, 0, new Uint8Array(n), verdicts);
    expect(new Set(verdicts)).toEqual(new Set([Verdict.notIpsec]));
  });
});

function udp(dstPort: number): FlowSpec {
  return { type: FlowSpecType.udp, val: { dstPort } };
}
