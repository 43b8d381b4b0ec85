import { createDecipheriv } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Device, DeviceOptions } from '../../src/device/index.ts';
import type { SaObject } from '../../src/ipsec/wire/codec.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import {
  AdminOpcode,
  encodeAdminCommand,
  encodeResourceCommand,
  ResourceType as R,
} from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import {
  FlowFilterAction as Action,
  encodeClassifier,
  encodeGroup,
  encodeRule,
  SelectorType,
} from '../../src/virtio-net/flow-filter-wire.ts';
import { NetHeaderFlag as H } from '../../src/virtio-net/header.ts';
import { NetDriver, udpFrame } from './helpers/net-driver.ts';
import { pause } from './helpers/raw-client.ts';
import { encodeSa, inboundObject, saObject } from './helpers/sa.ts';
import { startDevice } from './helpers/start.ts';

let folder = '';
let device: Device;
const drivers: NetDriver[] = [];

function start(options: Partial<DeviceOptions> = {}): string[] {
  const sockets = options.link === 'pair' ? [join(folder, 'a'), join(folder, 'b')] : [join(folder, 'a')];
  device = startDevice({ sockets, mtu: 1700, ...options });
  return sockets;
}

async function open(path: string, options: Parameters<typeof NetDriver.open>[1] = {}): Promise<NetDriver> {
  const net = await NetDriver.open(path, options);
  drivers.push(net);
  await net.fill();
  return net;
}

const counters = (n = 0) => device.functions[n].statistics();
const wire = ipsecWire('virtio-1.4');

/** Ethernet and IPv4 protocol in whole, and the SPI when `spi` is given. */
async function espRule(net: NetDriver, id: number, action: number, spi?: number): Promise<void> {
  const eth = new Uint8Array(14);
  eth.fill(0xff, 12);
  const ip = new Uint8Array(20);
  ip[9] = 0xff;
  const esp = new Uint8Array(8);
  if (spi !== undefined) esp.fill(0xff, 0, 4);
  const selectors = [
    { type: SelectorType.eth, flags: 0, mask: eth },
    { type: SelectorType.ipv4, flags: 0, mask: ip },
    { type: SelectorType.esp, flags: 0, mask: esp },
  ];
  const key = new Uint8Array(42);
  key[12] = 8;
  key[14 + 9] = 50;
  if (spi !== undefined) key.set([spi >>> 24, spi >>> 16, spi >>> 8, spi], 34);
  await net.create(R.NET_FF_CLASSIFIER, id, encodeClassifier({ selectors }));
  const rule = { groupId: 0, classifierId: id, priority: id, action, queueIndex: 0, key };
  await net.create(R.NET_FF_RULE, id, encodeRule(rule));
}

async function udpRule(net: NetDriver, id: number, action: number, port: number, queueIndex = 0): Promise<void> {
  const masks = [14, 20, 8].map((length) => new Uint8Array(length));
  masks[0].fill(0xff, 12);
  masks[1][9] = 0xff;
  masks[2].fill(0xff, 2, 4);
  const types = [SelectorType.eth, SelectorType.ipv4, SelectorType.udp];
  const selectors = masks.map((mask, i) => ({ type: types[i], flags: 0, mask }));
  const key = new Uint8Array(42);
  key[12] = 8;
  key[23] = 17;
  key.set([port >>> 8, port], 36);
  await net.create(R.NET_FF_CLASSIFIER, id, encodeClassifier({ selectors }));
  await net.create(
    R.NET_FF_RULE,
    id,
    encodeRule({ groupId: 0, classifierId: id, priority: id, action, queueIndex, key }),
  );
}

async function secure(net: NetDriver, change: Partial<SaObject> = {}, id = 3): Promise<void> {
  const codec = ipsecWire(net.revision);
  await net.create(R.NET_IPSEC_OUTB_SA, id, encodeSa(codec, saObject(change)));
  const { tunnel: _, mode, ...rest } = change;
  await net.create(
    R.NET_IPSEC_INB_SA,
    id + 4,
    encodeSa(codec, inboundObject({ ...rest, ...(mode === undefined ? {} : { mode }) })),
  );
}

const tagged = (resourceId: number, resourceType: number = R.NET_IPSEC_OUTB_SA) => ({
  flags: H.SECURITY,
  resourceId,
  resourceType,
});

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-ipsec-'));
});

afterEach(async () => {
  for (const driver of drivers.splice(0)) driver.close();
  await pause(20);
  expect(device.internalErrors).toBe(0);
  expect(device.packetsInUse).toBe(0);
  device.close();
  rmSync(folder, { recursive: true, force: true });
});

describe.each(['virtio-1.4', 'rfc-2025-01'] as const)('IPsec through a function of %s', (revision) => {
  it.each<[string, Partial<SaObject>]>([
    ['AES-128-GCM tunnel', {}],
    ['AES-256-GCM tunnel with ESN', { cipherKey: new Uint8Array(32).fill(3), options: 1n }],
    [
      'ChaCha20-Poly1305 transport',
      { mode: 2, tunnel: null, cipherAlgorithm: 3n, cipherKey: new Uint8Array(32).fill(4) },
    ],
    ['AES-CBC with HMAC-SHA256', { cipherAlgorithm: 3n, authAlgorithm: 4n, authKey: new Uint8Array(32).fill(5) }],
    ['AES-CTR with AES-CMAC', { cipherAlgorithm: 4n, authAlgorithm: 26n, authKey: new Uint8Array(16).fill(5) }],
    [
      'NULL with HMAC-SHA1',
      { cipherAlgorithm: 0n, cipherKey: new Uint8Array(0), authAlgorithm: 2n, authKey: new Uint8Array(20).fill(5) },
    ],
    [
      'AES-GMAC',
      { cipherAlgorithm: 0n, cipherKey: new Uint8Array(0), authAlgorithm: 41n, authKey: new Uint8Array(16).fill(5) },
    ],
  ])('protects and opens with %s', async (_, change) => {
    const [path] = start({ wire: revision });
    const net = await open(path, { ipsec: true, revision });
    await secure(net, change);
    await net.create(R.NET_FF_GROUP, 0, encodeGroup({ priority: 1 }));
    await espRule(net, 0, Action.ipsec);
    for (const length of [60, 61, 590, 1514]) {
      await net.send(udpFrame(length), tagged(3));
      const { header, frame } = await net.receive();
      expect(frame).toEqual(udpFrame(length));
      expect(header).toMatchObject({ flags: H.SECURITY, resourceId: 7, resourceType: R.NET_IPSEC_INB_SA });
    }
    expect(counters()).toMatchObject({ protect: { ok: 4 }, unprotect: { ok: 4 }, txNoSa: 0 });
  });
});

describe('what goes over the wire', () => {
  it('is an ESP packet that OpenSSL opens', async () => {
    const [a, b] = start({ link: 'pair', ipsec: [true, false] });
    const left = await open(a, { ipsec: true });
    const right = await open(b);
    await secure(left);
    await left.send(udpFrame(100), tagged(3));
    const { frame } = await right.receive();
    expect([...frame.subarray(0, 14)]).toEqual([...udpFrame().subarray(0, 14)]);
    const ip = frame.subarray(14);
    expect([ip[0], ip[8], ip[9]]).toEqual([0x45, 64, 50]);
    expect([...ip.subarray(12, 20)]).toEqual([192, 0, 2, 1, 192, 0, 2, 2]);
    const esp = ip.subarray(20);
    expect([...esp.subarray(0, 8)]).toEqual([0, 0, 0x10, 1, 0, 0, 0, 1]);
    const nonce = Buffer.concat([Uint8Array.of(1, 2, 3, 4), esp.subarray(8, 16)]);
    const decipher = createDecipheriv('aes-128-gcm', new Uint8Array(16).fill(7), nonce);
    decipher.setAAD(esp.subarray(0, 8));
    decipher.setAuthTag(esp.subarray(-16));
    const plain = Buffer.concat([decipher.update(esp.subarray(16, -16)), decipher.final()]);
    const pad = plain[plain.length - 2];
    expect(plain[plain.length - 1]).toBe(4);
    expect(new Uint8Array(plain.subarray(0, plain.length - 2 - pad))).toEqual(udpFrame(100).slice(14));
  });

  it.each<[string, object]>([
    ['an id that was never created', tagged(4)],
    ['an inbound SA', tagged(7, R.NET_IPSEC_INB_SA)],
    ['an inbound SA as if it were outbound', tagged(7)],
    ['an id of 2^32 - 1', tagged(0xffffffff)],
    ['a type that does not exist', tagged(3, 0)],
  ])('is nothing when a packet asks for %s', async (_, header) => {
    const [a, b] = start({ link: 'pair', ipsec: [true, false] });
    const left = await open(a, { ipsec: true });
    const right = await open(b);
    await secure(left);
    await left.send(udpFrame(), header);
    await left.send(udpFrame(77));
    expect((await right.receive()).frame).toEqual(udpFrame(77));
    expect(counters()).toMatchObject({ txNoSa: 1, txPackets: 1 });
  });

  it('is nothing when a packet asks for SECURITY and its SA has been destroyed', async () => {
    const [a, b] = start({ link: 'pair', ipsec: [true, false] });
    const left = await open(a, { ipsec: true });
    const right = await open(b);
    await secure(left);
    expect(await left.destroy(R.NET_IPSEC_OUTB_SA, 3)).toBe(0);
    await left.send(udpFrame(), tagged(3));
    await left.send(udpFrame(77));
    expect((await right.receive()).frame).toEqual(udpFrame(77));
  });

  it('is nothing when what asks for SECURITY is no IP packet', async () => {
    const [a, b] = start({ link: 'pair', ipsec: [true, false] });
    const left = await open(a, { ipsec: true });
    const right = await open(b);
    await secure(left);
    const arp = udpFrame(60);
    arp.set([8, 6], 12);
    await left.send(arp, tagged(3));
    await left.send(udpFrame(77));
    expect((await right.receive()).frame).toEqual(udpFrame(77));
    expect(counters()).toMatchObject({ txIpsec: 1 });
  });

  it('is in the clear without the SECURITY flag, whatever the resource is', async () => {
    const [a, b] = start({ link: 'pair', ipsec: [true, false] });
    const left = await open(a, { ipsec: true });
    const right = await open(b);
    await secure(left);
    await left.send(udpFrame(), { ...tagged(3), flags: 0 });
    expect((await right.receive()).frame).toEqual(udpFrame());
  });
});

describe('what comes in', () => {
  /** `left` sends what a test wants; `right` has the SA and the rules. */
  async function pair(action: number = Action.ipsec) {
    const [a, b] = start({ link: 'pair' });
    const left = await open(a, { ipsec: true });
    const right = await open(b, { ipsec: true });
    await secure(left);
    await secure(right);
    await right.create(R.NET_FF_GROUP, 0, encodeGroup({ priority: 1 }));
    await espRule(right, 0, action);
    return { left, right };
  }

  /** The ESP frames that `left` makes of plain ones. */
  async function capture(left: NetDriver, right: NetDriver, n: number): Promise<Uint8Array[]> {
    await right.destroy(R.NET_FF_RULE, 0);
    const frames: Uint8Array[] = [];
    for (let i = 0; i < n; i++) {
      await left.send(udpFrame(60 + i), tagged(3));
      frames.push((await right.receive()).frame);
    }
    const key = new Uint8Array(42);
    key[12] = 8;
    key[23] = 50;
    await right.create(
      R.NET_FF_RULE,
      0,
      encodeRule({ groupId: 0, classifierId: 0, priority: 0, action: Action.ipsec, queueIndex: 0, key }),
    );
    return frames;
  }

  it('stays ESP without a rule, and without any flag', async () => {
    const { left, right } = await pair();
    const [frame] = await capture(left, right, 1);
    expect(frame[14 + 9]).toBe(50);
  });

  it('is opened once: a replayed packet is dropped', async () => {
    const { left, right } = await pair();
    const frames = await capture(left, right, 3);
    for (const i of [0, 0, 2, 1, 1, 2]) await left.send(frames[i]);
    await left.send(udpFrame(99));
    const lengths: number[] = [];
    for (let i = 0; i < 4; i++) lengths.push((await right.receive()).frame.length);
    expect(lengths).toEqual([60, 62, 61, 99]);
    expect(counters(1)).toMatchObject({ unprotect: { ok: 3, replay: 3 }, rxIpsec: 3 });
  });

  it('is dropped when a bit has been flipped, wherever it is', async () => {
    const { left, right } = await pair();
    const [frame] = await capture(left, right, 1);
    for (const at of [14 + 24, 14 + 28, 14 + 36, frame.length - 1]) {
      const bad = frame.slice();
      bad[at] ^= 1;
      await left.send(bad);
    }
    await left.send(frame);
    const { frame: good, header } = await right.receive();
    expect(good).toEqual(udpFrame(60));
    expect(header.flags).toBe(H.SECURITY);
    expect(right.rx.take()).toBeNull();
  });

  it('is passed on as it came, with SECURITY and SECURITY_ERR, when no SA has its SPI', async () => {
    const { left, right } = await pair();
    const [frame] = await capture(left, right, 1);
    frame.set([9, 9, 9, 9], 34);
    await left.send(frame);
    const received = await right.receive();
    expect(received.frame).toEqual(frame);
    expect(received.header).toMatchObject({ flags: H.SECURITY | H.SECURITY_ERR, resourceType: 0 });
  });

  it('is passed on without flags when a rule sends something to IPsec that is none', async () => {
    const [a, b] = start({ link: 'pair' });
    const left = await open(a, { ipsec: true });
    const right = await open(b, { ipsec: true });
    await right.create(R.NET_FF_GROUP, 0, encodeGroup({ priority: 1 }));
    await udpRule(right, 0, Action.ipsec, 2000);
    await left.send(udpFrame());
    expect(await right.receive()).toMatchObject({ frame: udpFrame(), header: { flags: 0 } });
  });

  it('has its soft expiry flagged and is passed on with an error after the hard limit', async () => {
    const [path] = start();
    const net = await open(path, { ipsec: true });
    await net.create(R.NET_IPSEC_OUTB_SA, 0, encodeSa(wire, saObject()));
    const limits = { options: 1n << 6n, softPackets: 2n, hardPackets: 4n };
    await net.create(R.NET_IPSEC_INB_SA, 0, encodeSa(wire, inboundObject(limits)));
    await net.create(R.NET_FF_GROUP, 0, encodeGroup({ priority: 1 }));
    await espRule(net, 0, Action.ipsec);
    const flags: number[] = [];
    for (let i = 0; i < 5; i++) {
      await net.send(udpFrame(), tagged(0));
      flags.push((await net.receive()).header.flags);
    }
    const soft = H.SECURITY | H.SECURITY_SA_SOFT_EXPIRY_WARN;
    expect(flags[0]).toBe(H.SECURITY);
    expect(flags.slice(2, 4)).toEqual([soft, soft]);
    expect(flags[4]).toBe(H.SECURITY | H.SECURITY_ERR);
  });

  it('goes through the filter again after RECIRCULATE, and only once', async () => {
    const { left, right } = await pair(Action.ipsecRecirculate);
    await udpRule(right, 1, Action.drop, 2000);
    await left.send(udpFrame(100, { destination: 2000 }), tagged(3));
    await left.send(udpFrame(101, { destination: 3000 }), tagged(3));
    const { frame, header } = await right.receive();
    expect(frame.length).toBe(101);
    expect(header.flags).toBe(H.SECURITY);
    expect(counters(1)).toMatchObject({ rxFiltered: 1, unprotect: { ok: 2 } });
  });

  it('does not go through the filter again after IPSEC', async () => {
    const { left, right } = await pair(Action.ipsec);
    await udpRule(right, 1, Action.drop, 2000);
    await left.send(udpFrame(100, { destination: 2000 }), tagged(3));
    expect((await right.receive()).frame.length).toBe(100);
  });

  it('is dropped or directed by rules that have nothing to do with IPsec', async () => {
    const { left, right } = await pair();
    await udpRule(right, 1, Action.drop, 2000);
    await udpRule(right, 2, Action.directRxVq, 3000);
    await left.send(udpFrame(100, { destination: 2000 }));
    await left.send(udpFrame(101, { destination: 3000 }));
    await left.send(udpFrame(102, { destination: 4000 }));
    expect((await right.receive()).frame.length).toBe(101);
    expect((await right.receive()).frame.length).toBe(102);
    expect(counters(1)).toMatchObject({ rxFiltered: 1 });
  });

  it('loses no packet of an SA while others are made and destroyed', async () => {
    const { left, right } = await pair();
    let received = 0;
    for (let round = 0; round < 10; round++) {
      for (let i = 0; i < 20; i++) left.offer(udpFrame(), tagged(3));
      await left.driver.notify(1);
      const other = 100 + round;
      await right.create(R.NET_IPSEC_INB_SA, other, encodeSa(wire, inboundObject({ spi: 5000 + round })));
      await right.destroy(R.NET_IPSEC_INB_SA, other);
      for (let i = 0; i < 20; i++) {
        await left.tx.wait();
        if ((await right.receive()).header.flags === H.SECURITY) received++;
      }
    }
    expect(received).toBe(200);
  });
});

describe('the administration queue', () => {
  const query = (length: number) => {
    const out = new Uint8Array(64);
    encodeAdminCommand(out, {
      opcode: AdminOpcode.LIST_QUERY,
      groupType: 0,
      groupMemberId: 0n,
      data: new Uint8Array(0),
    });
    return out.slice(0, length);
  };

  it.each([0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 100, 1024])(
    'writes no more than %i bytes of reply, and says how many',
    async (writable) => {
      const [path] = start();
      const net = await open(path, { ipsec: true });
      const reply = await net.command(query(24), writable);
      expect(reply.length).toBe(Math.min(writable, 16));
      if (writable >= 10) expect(reply.result[0]).toBe(0x83);
    },
  );

  it.each([0, 1, 2, 3, 16, 23, 24, 25, 64])('takes a command of %i bytes', async (readable) => {
    const [path] = start();
    const net = await open(path, { ipsec: true });
    expect(await net.command(query(readable), 16)).toMatchObject({ status: 0, length: 16 });
  });

  it('takes a command of 64 KiB, of which it looks at what it knows', async () => {
    const [path] = start();
    const net = await open(path, { ipsec: true });
    const at = net.driver.allocate(0x10000);
    net.driver.memory.u8.set(query(24), at);
    const reply = net.driver.allocate(4096);
    const ring = net.admin;
    if (ring === null) throw new Error('no administration queue');
    ring.descriptor(0, at, 0x10000, 1, 1);
    ring.descriptor(1, reply, 4096, 2);
    ring.offer(0);
    await net.driver.notify(2);
    expect((await ring.wait()).length).toBe(16);
  });

  it('answers commands in the order in which they came', async () => {
    const [path] = start();
    const net = await open(path, { ipsec: true });
    const ring = net.admin;
    if (ring === null) throw new Error('no administration queue');
    const area = net.driver.allocate(16 * 1024);
    const sa = encodeSa(wire, saObject());
    for (let i = 0; i < 8; i++) {
      const opcode = i % 2 === 0 ? AdminOpcode.RESOURCE_OBJ_CREATE : AdminOpcode.RESOURCE_OBJ_DESTROY;
      const data = encodeResourceCommand('virtio-1.4', opcode, { type: R.NET_IPSEC_OUTB_SA, id: 1, object: sa });
      const out = new Uint8Array(512);
      const length = encodeAdminCommand(out, { opcode, groupType: 0, groupMemberId: 0n, data });
      net.driver.memory.u8.set(out, area + i * 1024);
      ring.descriptor(2 * i, area + i * 1024, length, 1, 2 * i + 1);
      ring.descriptor(2 * i + 1, area + i * 1024 + 512, 8, 2);
      ring.offer(2 * i);
    }
    await net.driver.notify(2);
    for (let i = 0; i < 8; i++) {
      expect(await ring.wait()).toEqual({ id: 2 * i, length: 8 });
      expect(net.driver.memory.u8[area + i * 1024 + 512]).toBe(0);
    }
  });

  it('is not there without ADMIN_VQ', async () => {
    const [path] = start();
    const net = await open(path, { features: FeatureSet.of(Feature.VERSION_1) });
    await net.driver.write(0x16, 2, 3);
    expect(await net.driver.read(0x18, 2)).toBe(0);
  });

  it('forgets all SAs and rules at a reset', async () => {
    const [path] = start();
    const net = await open(path, { ipsec: true });
    await secure(net);
    net.close();
    drivers.length = 0;
    const next = await open(path, { ipsec: true });
    await secure(next);
    expect(await next.destroy(R.NET_FF_GROUP, 0)).toBe(6);
  });
});
