import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import {
  Feature,
  type Nic,
  type NicOptions,
  openNic,
  RxCounter,
  type SecurityAssociationInput,
} from '../../src/index.ts';
import { ProtocolFeature, Request } from '../../src/virtio/vhost-user-protocol.ts';
import {
  cleanUp,
  descriptors,
  type FakeBackEnd,
  type FakeDevice,
  type FakeOptions,
  startBackEnd,
} from '../virtio/vhost-user/fake.ts';
import { until } from './support.ts';
import { vipsec } from './vipsec.ts';

const nics: Nic[] = [];

afterEach(async () => {
  for (const nic of nics.splice(0)) await nic.close();
  await cleanUp();
});

const BASE = [Feature.VERSION_1];
const ALL_PROTOCOL = [
  ProtocolFeature.MQ,
  ProtocolFeature.REPLY_ACK,
  ProtocolFeature.STATUS,
  ProtocolFeature.CONFIGURE_MEM_SLOTS,
  ProtocolFeature.RESET_DEVICE,
];

async function port(
  device: FakeDevice,
  options: NicOptions = {},
  fake: FakeOptions = {},
): Promise<{ nic: Nic; backEnd: FakeBackEnd }> {
  const backEnd = await startBackEnd({ ...fake, device: { loop: true, ...device } });
  const nic = await openNic(`vhost-user:${backEnd.path}`, options);
  nics.push(nic);
  return { nic, backEnd };
}

/** A frame of `length` bytes whose content tells its number. */
function frame(number: number, length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (i < 12 ? 2 : (number * 31 + i) & 0xff));
}

/**
 * Sends frames on a queue and returns what comes back on it, in order. No more than `window` are under way at once, so that the receive ring
 * always has room for them.
 */
async function exchange(nic: Nic, lengths: readonly number[], queue = 0, window = 32): Promise<Uint8Array[]> {
  const { rx, tx } = nic.queues[queue];
  const pool = nic.packets;
  const packets = new Uint32Array(64);
  const received: Uint8Array[] = [];
  let sent = 0;
  const step = (): boolean => {
    const n = pool.allocate(packets, Math.min(window - (sent - received.length), lengths.length - sent));
    for (let i = 0; i < n; i++) pool.write(packets[i], frame(sent + i, lengths[sent + i]));
    const taken = n === 0 ? 0 : tx.burst(packets, n);
    pool.free(packets.slice(taken, n), n - taken);
    sent += taken;
    const arrived = rx.burst(packets, 64);
    for (let i = 0; i < arrived; i++) received.push(pool.readChain(packets[i]));
    pool.freeChains(packets, arrived);
    return received.length >= lengths.length;
  };
  await until(step, () => `${received.length} of ${lengths.length} frames, ${sent} sent, broken: ${nic.broken}`);
  return received;
}

const LENGTHS = Array.from({ length: 700 }, (_, i) => 60 + ((i * 37) % 1400));
const EXPECTED = LENGTHS.map((length, i) => Buffer.from(frame(i, length)).toString('hex'));

describe('a NIC at a vhost-user port', () => {
  for (const packed of [false, true]) {
    for (const [name, extra] of [
      ['alone', []],
      ['with event indices', [Feature.EVENT_IDX]],
      ['with indirect descriptors and in-order use', [Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.IN_ORDER]],
    ] as const) {
      it(`gets every frame back unchanged over a ${packed ? 'packed' : 'split'} ring ${name}`, async () => {
        const features = [...BASE, ...extra, ...(packed ? [Feature.RING_PACKED] : [])];
        const { nic, backEnd } = await port({ features }, { ring: packed ? 'packed' : 'split', queueSize: 64 });
        expect(nic.features.has(Feature.RING_PACKED)).toBe(packed);
        const received = await exchange(nic, LENGTHS);
        expect(received.map((bytes) => Buffer.from(bytes).toString('hex'))).toEqual(EXPECTED);
        expect(nic.queues[0].rx.counters[RxCounter.packets]).toBe(LENGTHS.length);
        await nic.close();
        await backEnd.settled();
        expect(backEnd.violations).toEqual([]);
      });
    }
  }

  it.each(['split', 'packed'] as const)('takes frames that are spread over mergeable buffers, %s', async (ring) => {
    const features = [...BASE, Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.RING_PACKED];
    const { nic, backEnd } = await port(
      { features, receivePiece: 256 },
      { ring, queueSize: 64, offloads: { mergeBuffers: true } },
    );
    expect(nic.features.has(Feature.MRG_RXBUF)).toBe(true);
    const received = await exchange(nic, LENGTHS.slice(0, 200), 0, 4);
    expect(received.map((bytes) => Buffer.from(bytes).toString('hex'))).toEqual(EXPECTED.slice(0, 200));
    expect(backEnd.violations).toEqual([]);
  });

  it.each([
    ['nothing beyond the original protocol', []],
    ['acknowledgements', [ProtocolFeature.REPLY_ACK]],
    ['a status', [ProtocolFeature.STATUS]],
    ['memory slots without acknowledgements', [ProtocolFeature.CONFIGURE_MEM_SLOTS]],
    ['everything', ALL_PROTOCOL],
  ])('works with a back-end that knows %s', async (_, protocol) => {
    const { nic, backEnd } = await port({ features: BASE, protocol });
    expect(await exchange(nic, [60, 1500])).toEqual([frame(0, 60), frame(1, 1500)]);
    await nic.close();
    await backEnd.settled();
    expect(backEnd.violations).toEqual([]);
  });

  it.each(['split', 'packed'] as const)('uses several queue pairs, each by itself, with %s rings', async (ring) => {
    const features = [...BASE, Feature.MQ, Feature.CTRL_VQ, Feature.EVENT_IDX, Feature.RING_PACKED];
    const { nic, backEnd } = await port(
      { features, protocol: ALL_PROTOCOL, queuePairs: 4 },
      { queuePairs: 3, ring, queueSize: 64 },
    );
    for (const queue of [2, 0, 1]) expect(await exchange(nic, [60, 61, 62], queue)).toHaveLength(3);
    expect(nic.queues.map(({ rx }) => rx.counters[RxCounter.packets])).toEqual([3, 3, 3]);
    await nic.close();
    await backEnd.settled();
    expect(backEnd.violations).toEqual([]);
  });

  it('has a control queue without several queue pairs too, which the back-end never hears of', async () => {
    const features = [...BASE, Feature.MQ, Feature.CTRL_VQ];
    const { nic, backEnd } = await port({ features, protocol: ALL_PROTOCOL, queuePairs: 4 });
    expect(nic.features.has(Feature.MQ)).toBe(false);
    expect(nic.features.has(Feature.CTRL_VQ)).toBe(true);
    expect(await exchange(nic, [60])).toEqual([frame(0, 60)]);
    await backEnd.settled();
    const rings = backEnd.messages.filter(({ request }) => request === Request.SET_VRING_NUM);
    expect(rings.map(({ payload }) => payload[0])).toEqual([0, 1]);
    expect(backEnd.violations).toEqual([]);
  });

  it('refuses more queue pairs than the back-end has', async () => {
    const features = [...BASE, Feature.MQ];
    const opening = port({ features, protocol: ALL_PROTOCOL, queuePairs: 2 }, { queuePairs: 3 });
    await expect(opening).rejects.toMatchObject({ code: 'QUEUE_PAIRS' });
  });

  it.each(['split', 'packed'] as const)('wakes who waits for frames, %s', async (ring) => {
    const features = [...BASE, Feature.EVENT_IDX, Feature.RING_PACKED];
    const { nic, backEnd } = await port({ features }, { ring, queueSize: 64 });
    const [{ rx, tx }] = nic.queues;
    rx.policy = 'interrupt';
    const packets = new Uint32Array(4);
    for (let i = 0; i < 20; i++) {
      const woken = rx.wait(5000);
      await sleep(2);
      nic.packets.allocate(packets, 1);
      nic.packets.write(packets[0], frame(i, 60));
      expect(tx.burst(packets, 1)).toBe(1);
      expect(await woken).toBe(true);
      expect(rx.burst(packets, 4)).toBe(1);
      expect(nic.packets.read(packets[0])).toEqual(frame(i, 60));
      nic.packets.free(packets, 1);
    }
    expect(backEnd.violations).toEqual([]);
  });

  it('waits for the back-end when it is the one that listens', async () => {
    const backEnd = await startBackEnd({ connect: true, device: { features: BASE, loop: true } });
    const nic = await openNic(`vhost-user:${backEnd.path},server=1`);
    nics.push(nic);
    expect(await exchange(nic, [60])).toEqual([frame(0, 60)]);
    expect(backEnd.violations).toEqual([]);
  });

  it('has the address that it is given, or one of its own', async () => {
    const mac = Uint8Array.of(2, 0, 0, 0, 0, 7);
    const { nic } = await port({ features: BASE }, { mac });
    expect(nic.mac).toEqual(mac);
    const other = await port({ features: BASE });
    expect(other.nic.mac[0] & 3).toBe(2);
  });

  it('has the address and the link that the back-end has, when it tells', async () => {
    const config = [2, 0, 0, 0, 0, 9, 0, 0, ...Array(20).fill(0)];
    const protocol = [...ALL_PROTOCOL, ProtocolFeature.CONFIG];
    const { nic } = await port({ features: [...BASE, Feature.MAC, Feature.STATUS], protocol, config });
    expect(nic.mac).toEqual(Uint8Array.of(2, 0, 0, 0, 0, 9));
    expect(nic.link.up).toBe(false);
  });
});

const key = '00112233445566778899aabbccddeeff';
const SA = {
  mode: 'tunnel',
  protocol: 'esp',
  spi: 0x1001,
  aead: { name: 'aes-gcm', key, salt: '01020304', icvLength: 16 },
  tunnel: { source: '192.0.2.1', destination: '192.0.2.2', ttl: 64 },
} as const;

describe('IPsec at a vhost-user port', () => {
  it('runs in software, and says why', async () => {
    const { nic } = await port({ features: BASE });
    const inbound = await nic.ipsec.addSa({ ...SA, name: 'in', direction: 'inbound' } as SecurityAssociationInput);
    const outbound = await nic.ipsec.addSa({ ...SA, name: 'out', direction: 'outbound' } as SecurityAssociationInput);
    expect(outbound.placement).toEqual({ where: 'software', because: 'the device does not offer VIRTIO_NET_F_IPSEC' });
    const pool = nic.packets;
    const packets = new Uint32Array(4);
    pool.allocate(packets, 1);
    // An IPv4 packet with 20 bytes of payload behind an Ethernet header.
    const packet = Buffer.from(
      `0202020202020202020202020800${'450000280001000040110000c0a80001c0a80002'}${'5a'.repeat(20)}`,
      'hex',
    );
    pool.write(packets[0], packet);
    pool.sa[packets[0]] = outbound.handle;
    expect(nic.queues[0].tx.burst(packets, 1)).toBe(1);
    let n = 0;
    await until(
      () => {
        n = nic.queues[0].rx.burst(packets, 4);
        return n > 0;
      },
      () => 'nothing came back',
    );
    expect(pool.sa[packets[0]]).toBe(inbound.handle);
    expect(Buffer.from(pool.read(packets[0])).subarray(14)).toEqual(packet.subarray(14));
  });

  it('is refused when it has to be inline', async () => {
    const opening = port({ features: BASE }, { ipsec: 'inline' });
    await expect(opening).rejects.toMatchObject({ code: 'FEATURES_MISSING' });
  });
});

describe('a back-end that dies', () => {
  it('breaks the NIC: bursts give 0, what is pending rejects, and nothing is left open', async () => {
    const before = descriptors();
    const { nic, backEnd } = await port({ features: BASE }, {}, { process: true });
    await exchange(nic, [60]);
    const heard = new Promise<Error>((resolve) => nic.onBroken(resolve));
    await backEnd.kill();
    expect(await heard).toMatchObject({ code: 'DEVICE_GONE' });
    expect(nic.broken).toMatchObject({ code: 'DEVICE_GONE' });
    const packets = new Uint32Array(4);
    expect(nic.packets.allocate(packets, 1)).toBe(1);
    expect(nic.queues[0].tx.burst(packets, 1)).toBe(0);
    expect(nic.queues[0].rx.burst(packets, 4)).toBe(0);
    await expect(nic.ipsec.addSa({ ...SA, direction: 'outbound' } as SecurityAssociationInput)).rejects.toThrow();
    await nic.close();
    await until(
      () => descriptors() <= before,
      () => `${descriptors()} descriptors, ${before} before`,
    );
  });

  it('does not keep a NIC from opening again once there is another', async () => {
    const first = await port({ features: BASE }, {}, { process: true });
    await first.backEnd.kill();
    await first.nic.close();
    const second = await port({ features: BASE });
    expect(await exchange(second.nic, [77])).toEqual([frame(0, 77)]);
  });
});

describe('vipsec probe of a vhost-user port', () => {
  const features = [Feature.VERSION_1, Feature.MRG_RXBUF, Feature.MQ, Feature.GUEST_ANNOUNCE, 62];
  const protocol = [ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.LOG_SHMFD, ProtocolFeature.CONFIG];

  it('tells what the back-end offers, what reaches the driver, and what is ours', async () => {
    const config = [2, 0, 0, 0, 0, 9, 0, 0, ...Array(20).fill(0)];
    const device = { features: [...features, Feature.MAC], protocol, queuePairs: 4, config };
    const backEnd = await startBackEnd({ device });
    const { code, stdout, stderr } = await vipsec(['probe', `vhost-user:${backEnd.path}`, '--json']);
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    const report = JSON.parse(stdout);
    const offered = (list: { name: string; offered: boolean }[]): string[] =>
      list.filter((one) => one.offered).map(({ name }) => name);
    expect(offered(report.features)).toEqual([
      'VIRTIO_NET_F_MAC',
      'VIRTIO_NET_F_MRG_RXBUF',
      'VIRTIO_NET_F_GUEST_ANNOUNCE',
      'VIRTIO_NET_F_MQ',
      'VHOST_USER_F_PROTOCOL_FEATURES',
      'VIRTIO_F_VERSION_1',
      'VIRTIO_NET_F_STANDBY',
    ]);
    expect(offered(report.port.protocolFeatures)).toEqual(['MQ', 'LOG_SHMFD', 'REPLY_ACK', 'CONFIG']);
    expect(report.port).toMatchObject({
      queuePairs: 4,
      memoryRegions: 8,
      memorySlots: false,
      withheld: ['VIRTIO_NET_F_GUEST_ANNOUNCE', 'VHOST_USER_F_PROTOCOL_FEATURES', 'VIRTIO_NET_F_STANDBY'],
      added: ['VIRTIO_NET_F_CTRL_VQ'],
    });
    expect(report.config).toMatchObject({ mac: '02:00:00:00:00:09', maxQueuePairs: 4 });
    expect(report.problems).toEqual([]);
    await backEnd.settled();
    expect(backEnd.violations).toEqual([]);
  });

  it('prints it for people, and says what is missing', async () => {
    const backEnd = await startBackEnd({ device: { features: [], protocol } });
    const { code, stdout } = await vipsec(['probe', `vhost-user:${backEnd.path}`]);
    expect(code).toBe(1);
    for (const text of [
      /REPLY_ACK +yes +yes/,
      /LOG_SHMFD +yes +-/,
      /in software/,
      /8 regions in one table/,
      /FEATURES_MISSING/,
    ]) {
      expect(stdout).toMatch(text);
    }
  });

  it('fails in one line when there is no back-end', async () => {
    const { code, stderr } = await vipsec(['probe', 'vhost-user:/nonexistent/port.sock']);
    expect(code).toBe(1);
    expect(stderr).toMatch(/^vipsec: error: cannot connect to .* \[CONNECT_FAILED\]\nhint: .*\n$/);
  });
});
