import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import {
  type FlowAction,
  type FlowFilter,
  type FlowMatch,
  type Nic,
  PacketFlag,
  type SaHandle,
  WIRE_REVISIONS,
} from '../../src/index.ts';
import { capture, cleanUp, fixChecksum, freshKey, open, type Received, saPair, send, startDevice } from './support.ts';

afterAll(cleanUp);

const SECURED = PacketFlag.secured;
const ETHERTYPE = 12;
const http = capture('http-ipv4').filter((frame) => frame.readUInt16BE(ETHERTYPE) === 0x0800);
const mixed = ['http-ipv4', 'http-ipv6', 'dns-ipv4', 'dns-ipv6', 'ping-ipv4', 'ping-ipv6'].flatMap((name) =>
  capture(name).slice(0, 30),
);

const isV4 = (frame: Buffer) => frame.readUInt16BE(ETHERTYPE) === 0x0800;
const isV6 = (frame: Buffer) => frame.readUInt16BE(ETHERTYPE) === 0x86dd;
const protocolOf = (frame: Buffer) => (isV4(frame) ? frame[23] : isV6(frame) ? frame[20] : -1);
const transportOf = (frame: Buffer) => (isV4(frame) ? 34 : 54);
const port = (frame: Buffer, at: 0 | 2) => frame.readUInt16BE(transportOf(frame) + at);

/** An address and its first bits, from the captures, so that it is there. */
const someV4 = http[0].subarray(30, 34);
const someV6 = mixed.find((frame) => isV6(frame) && protocolOf(frame) === 6)?.subarray(38, 54) ?? Buffer.alloc(16);
const someMac = http[0].subarray(0, 6);

/** Each selector, with whole and with partial masks, and what it means in plain words. */
const selectors: [string, FlowMatch, (frame: Buffer) => boolean][] = [
  ['ETH, type', { eth: { etherType: 0x0806 } }, (f) => f.readUInt16BE(ETHERTYPE) === 0x0806],
  ['ETH, address', { eth: { destination: someMac } }, (f) => f.subarray(0, 6).equals(someMac)],
  [
    'ETH, part of an address',
    { eth: { destination: { address: new Uint8Array(6).fill(1), mask: Uint8Array.of(1, 0, 0, 0, 0, 0) } } },
    (f) => (f[0] & 1) === 1,
  ],
  ['IPV4', { ipv4: {} }, isV4],
  [
    'IPV4, address',
    { ipv4: { destination: { address: someV4 } } },
    (f) => isV4(f) && f.subarray(30, 34).equals(someV4),
  ],
  [
    'IPV4, part of an address',
    { ipv4: { source: { address: someV4, length: 31 } } },
    (f) => isV4(f) && f.readUInt32BE(26) >>> 1 === someV4.readUInt32BE(0) >>> 1,
  ],
  ['IPV4, protocol', { ipv4: { protocol: 1 } }, (f) => isV4(f) && protocolOf(f) === 1],
  ['IPV4, TTL', { ipv4: { ttl: { value: 64, mask: 0xc0 } } }, (f) => isV4(f) && (f[22] & 0xc0) === 64],
  ['IPV6', { ipv6: {} }, isV6],
  [
    'IPV6, part of an address',
    { ipv6: { destination: { address: someV6, length: 64 } } },
    (f) => isV6(f) && f.subarray(38, 46).equals(someV6.subarray(0, 8)),
  ],
  ['TCP, port', { ipv4: {}, tcp: { destinationPort: 80 } }, (f) => isV4(f) && protocolOf(f) === 6 && port(f, 2) === 80],
  [
    'TCP, control bits',
    { ipv4: {}, tcp: { flags: { value: 2, mask: 2 } } },
    (f) => isV4(f) && protocolOf(f) === 6 && (f[transportOf(f) + 13] & 2) === 2,
  ],
  ['TCP over IPV6', { ipv6: {}, tcp: {} }, (f) => isV6(f) && protocolOf(f) === 6],
  [
    'UDP, part of a port',
    { ipv4: {}, udp: { destinationPort: { value: 0, mask: 0xff00 } } },
    (f) => isV4(f) && protocolOf(f) === 17 && port(f, 2) < 256,
  ],
  ['UDP over IPV6', { ipv6: {}, udp: { sourcePort: 53 } }, (f) => isV6(f) && protocolOf(f) === 17 && port(f, 0) === 53],
];

describe.each(WIRE_REVISIONS)('flow filter rules of a device that speaks %s', (revision) => {
  let nic: Nic;
  let filter: FlowFilter;
  const undo: (() => Promise<void>)[] = [];

  beforeAll(async () => {
    const device = await startDevice({ queuePairs: 2, wire: revision });
    nic = await open(device.addresses[0], { queuePairs: 2, wire: 'auto', packets: 8192 });
    if (nic.flowFilter === null) throw new Error('no flow filter');
    filter = nic.flowFilter;
  });

  afterEach(async () => {
    for (const step of undo.splice(0).reverse()) await step();
  });

  async function group(priority: number) {
    const made = await filter.addGroup(priority);
    undo.push(() => filter.removeGroup(made));
    return made;
  }

  async function rule(match: FlowMatch, action: FlowAction, where: Awaited<ReturnType<typeof group>>, priority = 0) {
    const made = await filter.addRule({ group: where, match, action, priority });
    undo.push(() => filter.removeRule(made));
    return made;
  }

  async function addSa(sa: Parameters<Nic['ipsec']['addSa']>[0], where: 'inline' | 'software' = 'inline') {
    const made = await nic.ipsec.addSa(sa, { require: where });
    undo.push(() => made.remove());
    return made;
  }

  /** Over the loop; what comes back, by queue. The device steers what no rule steers as it likes. */
  async function loop(frames: readonly Buffer[], sa: SaHandle | null, count = frames.length): Promise<Received[][]> {
    await send(nic, frames, sa);
    const out: Received[][] = [[], []];
    let quiet = 0;
    const deadline = performance.now() + 5000;
    while (performance.now() < deadline && (out[0].length + out[1].length < count || quiet < 20)) {
      const one = takeAll(nic, 0);
      const two = takeAll(nic, 1);
      quiet = one.length + two.length === 0 ? quiet + 1 : 0;
      out[0].push(...one);
      out[1].push(...two);
      await sleep(1);
    }
    return out;
  }

  const loopFlat = async (...args: Parameters<typeof loop>) => (await loop(...args)).flat();

  const frameOf = ({ frame }: Received) => frame.toString('hex');

  it.each(selectors)('match %s', async (_name, match, means) => {
    expect(mixed.some(means)).toBe(true);
    expect(mixed.every(means)).toBe(false);
    await rule(match, 'drop', await group(0xf000));
    const rest = mixed.filter((frame) => !means(frame));
    const received = (await loop(mixed, null, rest.length)).flat();
    expect(received.map(frameOf).sort()).toEqual(rest.map((frame) => frame.toString('hex')).sort());
  });

  it('are tried by the priority of the group, then by that of the rule', async () => {
    const [high, low] = [await group(0xf001), await group(0xf000)];
    const match = { ipv4: {}, tcp: {} };
    await rule(match, 'drop', low, 200);
    await rule(match, { queue: 1 }, high, 1);
    expect((await loop(http.slice(0, 8), null)).map((one) => one.length)).toEqual([0, 8]);
    await rule({ ipv4: {} }, { queue: 0 }, high, 2);
    expect((await loop(http.slice(0, 8), null)).map((one) => one.length)).toEqual([8, 0]);
    await expect(filter.addGroup(0xf001)).rejects.toThrow(expect.objectContaining({ code: 'FLOW_PRIORITY' }));
    const last = filter.capabilities.limits.lastRulePriority;
    const beyond = filter.addRule({ group: high, match, action: 'drop', priority: last });
    await expect(beyond).rejects.toThrow(expect.objectContaining({ code: 'FLOW_PRIORITY' }));
  });

  it('of an SA are there as long as it is, and beside those of others', async () => {
    const { outbound, inbound } = saPair();
    const other = saPair();
    const out = await addSa(outbound);
    await addSa(other.inbound);
    const before = await loopFlat(http.slice(0, 4), out);
    expect(before.map(({ sa, flags }) => [sa, flags & (SECURED | PacketFlag.securityError)])).toEqual(
      Array(4).fill([0, 0]),
    );
    const inn = await addSa(inbound);
    const during = await loopFlat(http.slice(0, 4), out);
    expect(during.map(({ frame, sa }) => [frame, sa])).toEqual(http.slice(0, 4).map((frame) => [frame, inn.handle]));
    await inn.remove();
    const after = await loopFlat(http.slice(0, 4), out);
    // Not an SA's any more: neither processed nor said to have failed.
    expect(after.map(({ sa, flags }) => [sa, flags & (SECURED | PacketFlag.securityError)])).toEqual(
      Array(4).fill([0, 0]),
    );
    expect(after.every(({ frame }) => protocolOf(frame) === 50)).toBe(true);
  });

  it('send what IPsec has opened through the filter again, with IPSEC_RECIRCULATE', async () => {
    const { outbound, inbound } = saPair();
    const [out, inn] = [await addSa(outbound), await addSa(inbound)];
    const mine = await group(0xf000);
    const inner = { ipv4: {}, tcp: { destinationPort: 80 } };
    const toServer = (frame: Buffer) => port(frame, 2) === 80;
    const frames = http.slice(0, 20).filter((frame) => protocolOf(frame) === 6);
    const count = frames.filter(toServer).length;
    expect(count).toBeGreaterThan(0);
    expect(count).toBeLessThan(frames.length);
    const steer = await rule(inner, 'drop', mine, 1);

    // With IPSEC alone the rule for the inner packet is not looked at.
    const hex = (some: readonly Buffer[]) => some.map((frame) => frame.toString('hex')).sort();
    const alone = await loopFlat(frames, out);
    expect(alone.map(frameOf).sort()).toEqual(hex(frames));
    await filter.removeRule(steer);
    undo.pop();
    await rule(inner, 'drop', mine, 1);
    await rule({ ipv4: {}, esp: { spi: out.spi } }, 'ipsec-recirculate', mine, 2);
    const rest = await loopFlat(frames, out, frames.length - count);
    expect(rest.map(frameOf).sort()).toEqual(hex(frames.filter((frame) => !toServer(frame))));
    expect(rest.every(({ sa, flags }) => sa === inn.handle && (flags & SECURED) !== 0)).toBe(true);

    await rule(inner, { queue: 1 }, mine, 3);
    const [, steered] = await loop(frames, out);
    expect(hex(steered.map(({ frame }) => frame).filter(toServer))).toEqual(hex(frames.filter(toServer)));
    expect(steered.every(({ sa, flags }) => sa === inn.handle && (flags & SECURED) !== 0)).toBe(true);
  });

  it('do so exactly once: ESP inside ESP is opened once', async () => {
    const [one, two] = [saPair(), saPair()];
    const [outerOut, outerIn] = [await addSa(one.outbound), await addSa(one.inbound)];
    const innerOut = await addSa(two.outbound);
    // Without its inbound SA, what the inner SA protects comes back as it is on the wire.
    const wrapped = await loopFlat(http.slice(0, 3), innerOut);
    expect(wrapped.every(({ frame }) => protocolOf(frame) === 50)).toBe(true);
    const innerIn = await addSa(two.inbound);
    const mine = await group(0xf000);
    await rule({ ipv4: {}, esp: {} }, 'ipsec-recirculate', mine);
    const opened = await loopFlat(
      wrapped.map(({ frame }) => frame),
      outerOut,
    );
    expect(opened.map(frameOf)).toEqual(wrapped.map(frameOf));
    expect(opened.every(({ sa }) => sa === outerIn.handle)).toBe(true);
    expect(innerIn.traffic().packets).toBe(0n);
    // The inner packets themselves are still good: nobody has seen their sequence numbers.
    const clear = await loopFlat(
      wrapped.map(({ frame }) => frame),
      null,
    );
    expect(clear.map(frameOf)).toEqual(http.slice(0, 3).map((frame) => frame.toString('hex')));
    expect(clear.every(({ sa }) => sa === innerIn.handle)).toBe(true);
  });

  it('lead ESP in UDP to its SA, and leave IKE and keepalives of the same port alone', async () => {
    const { outbound, inbound } = saPair({ udpEncap: {} });
    const [out, inn] = [await addSa(outbound), await addSa(inbound)];
    const opened = await loopFlat(http.slice(0, 5), out);
    expect(opened.map(({ frame, sa }) => [frame, sa])).toEqual(http.slice(0, 5).map((frame) => [frame, inn.handle]));
    const ike = [udp4500(Buffer.concat([Buffer.alloc(4), Buffer.from('an IKE message')])), udp4500(Buffer.of(0xff))];
    const left = await loopFlat(ike, null);
    expect(left.map(frameOf)).toEqual(ike.map((frame) => frame.toString('hex')));
    expect(left.every(({ sa, flags }) => sa === 0 && (flags & (SECURED | PacketFlag.securityError)) === 0)).toBe(true);
  });

  it('may lead packets to IPsec that only software can open; then it does', async () => {
    const auth = () => ({ name: 'hmac-sha256', key: freshKey(32) }) as const;
    const [inlinePair, softwarePair] = [
      saPair({ protocol: 'ah', auth: auth() }),
      saPair({ protocol: 'ah', auth: auth() }),
    ];
    // The rule of the inline SA leads all AH to the device's IPsec, which knows nothing of the other SA.
    await addSa(inlinePair.inbound);
    const out = await addSa(softwarePair.outbound, 'software');
    const errors = nic.statistics().rx.securityError;
    const unopened = await loopFlat(http.slice(0, 4), out);
    expect(unopened.map(({ sa, flags }) => [sa, flags & (SECURED | PacketFlag.securityError)])).toEqual(
      Array(4).fill([0, PacketFlag.securityError]),
    );
    const inn = await addSa(softwarePair.inbound, 'software');
    const opened = await loopFlat(http.slice(0, 4), out);
    expect(opened.map(({ frame, sa }) => [frame, sa])).toEqual(http.slice(0, 4).map((frame) => [frame, inn.handle]));
    expect(opened.every(({ flags }) => (flags & (SECURED | PacketFlag.securityError)) === SECURED)).toBe(true);
    expect(nic.statistics().rx.securityError - errors).toBe(8);
  });
});

function takeAll(nic: Nic, queue: number): Received[] {
  const packets = new Uint32Array(256);
  const n = nic.queues[queue].rx.burst(packets, packets.length);
  const out = Array.from(packets.subarray(0, n), (p) => ({
    frame: Buffer.from(nic.packets.read(p)),
    sa: nic.packets.sa[p],
    flags: nic.packets.flags[p],
  }));
  nic.packets.free(packets, n);
  return out;
}

/** A UDP packet between ports 4500, its checksum 0. */
function udp4500(payload: Buffer): Buffer {
  const udp = Buffer.alloc(8 + payload.length);
  udp.writeUInt16BE(4500, 0);
  udp.writeUInt16BE(4500, 2);
  udp.writeUInt16BE(udp.length, 4);
  payload.copy(udp, 8);
  const frame = Buffer.concat([http[0].subarray(0, 34), udp]);
  frame.writeUInt16BE(20 + udp.length, 16);
  frame[23] = 17;
  frame.writeUInt32BE(0xc0000201, 26);
  frame.writeUInt32BE(0xc0000202, 30);
  fixChecksum(frame);
  return frame;
}
