/**
 * Linux's own virtio_net drives the software device (IPsec not negotiated), with split and with packed virtqueues, several queues and
 * offloads on: a driver that we did not write judges rings, interrupts, configuration, control queue, steering, checksums and segmentation.
 */
import { readdirSync, readlinkSync, writeFileSync } from 'node:fs';
import { basename } from 'node:path';
import { LargeCheck, largeDevices, largePackets } from '../bodies/linux-large.ts';
import { Application } from '../guest/application.ts';
import type { Guest } from '../guest/guest.ts';
import { same } from '../guest/guest.ts';
import { ip, ping } from '../guest/namespaces.ts';
import type { Scenario, ScenarioDevice } from '../scenario.ts';

const RINGS = ['split', 'packed'] as const;
type Rings = (typeof RINGS)[number];

const PAIRS = 2;
const TCP_BYTES = 128 * 1024;
const PING_SIZES = [0, 56, 1472];
const UDP_SIZES = [0, 1, 17, 64, 511, 1000, 1472];
/** Flows that are to be spread over the queues, of a datagram of so many bytes and its echo. */
const FLOWS = 32;
const FLOW_BYTES = 64;
/** What is not one of them has a hash too, or comes by the queue of what has none: only so few. */
const STRANGERS = 3;
/** Positions of features in sysfs's string of bits, which before Linux 6.18 has no room for IPSEC (70). */
const Bit = {
  csum: 0,
  guestCsum: 1,
  mac: 5,
  guestTso4: 7,
  hostTso4: 11,
  mergeable: 15,
  status: 16,
  controlQueue: 17,
  multiQueue: 22,
  version1: 32,
  accessPlatform: 33,
  rss: 60,
} as const;
const RING_PACKED = 34;
const IPSEC = 70;
/** Of `ethtool -k`. */
const OFFLOADS = ['rx-checksumming', 'tx-checksumming', 'tcp-segmentation-offload', 'generic-receive-offload'];

const Check = {
  bind: 'virtio_net binds the function and takes the MAC of the device',
  features: 'offloads, several queues and RSS are negotiated and IPSEC is not',
  link: 'the link is up and MSI-X interrupts are in use, some for each queue',
  ethtool: 'ethtool reads driver, rings and offloads, which are on',
  ping: 'ping crosses, small and of full size, both ways',
  udp: 'UDP datagrams of all sizes come back unchanged',
  tcp: 'a TCP bulk transfer crosses, both ways, with segmentation',
  channels: 'the number of queues changes, and ping crosses with each',
  rss: 'the indirection table is read and set, and packets follow it',
  statistics: 'the statistics of the queues add up to those of the interface',
  rebind: 'the driver lets go, binds again, and ping still crosses',
} as const;

const named = (rings: Rings, check: string) => `${rings}: ${check}`;

interface Ends {
  readonly rings: Rings;
  readonly mac: string;
  readonly peerMac: string;
  /** Addresses of the function and of the NIC at the other end of its link. */
  readonly here: string;
  readonly there: string;
}

function endsOf(rings: Rings): Ends {
  const n = RINGS.indexOf(rings);
  return {
    rings,
    mac: `52:54:00:00:0a:${n}1`,
    peerMac: `52:54:00:00:0a:${n}2`,
    here: `10.7.${n}.1`,
    there: `10.7.${n}.2`,
  };
}

const peerOf = (rings: Rings) => `peer-${rings}`;

const devices: readonly ScenarioDevice[] = RINGS.map(endsOf).flatMap<ScenarioDevice>(({ rings, mac, peerMac }) => [
  {
    kind: 'vfio-user',
    id: rings,
    link: 'wire',
    args: ['--mac', mac, '--rings', rings, '--queue-pairs', String(PAIRS)],
  },
  { kind: 'virtio-net', id: peerOf(rings), mac: peerMac, iommu: false, link: { device: rings } },
]);

export const scenario: Scenario = {
  title: "Linux's virtio_net drives the software device: rings, queues, offloads, RSS, large packets",
  machine: { qemu: 'vfioUser' },
  devices: [...devices, ...largeDevices],
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1', 'tun'],
  timeout: 420,
  checks: [
    ...RINGS.flatMap((rings) => Object.values(Check).map((check) => named(rings, check))),
    ...Object.values(LargeCheck),
  ],

  async guest(guest) {
    for (const rings of RINGS) await drive(guest, endsOf(rings));
    const { mac, here, there } = endsOf('packed');
    await largePackets(guest, { id: 'packed', mac, here, there, namespace: peerOf('packed') });
    ip(
      guest,
      null,
      RINGS.map((rings) => `netns del ${peerOf(rings)}`),
    );
  },
};

async function drive(guest: Guest, ends: Ends): Promise<void> {
  const { rings, mac, here, there } = ends;
  const check = (name: string, body: () => unknown) => guest.check(named(rings, name), body);
  const address = guest.address(rings);
  let name = guest.interface(rings);
  await check(Check.bind, () => {
    same('MAC', guest.read(`/sys/class/net/${name}/address`), mac);
    const driver = basename(readlinkSync(`/sys/class/net/${name}/device/driver`));
    same('driver', driver, 'virtio_net');
    return driver;
  });
  await check(Check.features, () => negotiated(guest, name, rings));
  const namespace = peerOf(rings);
  const peer = guest.interface(namespace);
  // Linux begins with as many queues as it has processors.
  guest.must(`ethtool -L ${name} combined ${PAIRS}`);
  const own = [`addr add ${here}/24 dev ${name}`, `link set ${name} up`];
  ip(guest, null, [`netns add ${namespace}`, `link set ${peer} netns ${namespace}`, ...own]);
  ip(guest, namespace, [`addr add ${there}/24 dev ${peer}`, `link set ${peer} up`]);
  await check(Check.link, () => {
    same('carrier', guest.read(`/sys/class/net/${name}/carrier`), '1');
    const vectors = readdirSync(`/sys/bus/pci/devices/${address}/msi_irqs`).length;
    if (vectors < 1 + 2 * PAIRS) throw new Error(`${vectors} vectors`);
    return `${vectors} vectors`;
  });
  await check(Check.ethtool, () => readAll(guest, name));
  await check(Check.ping, () =>
    [ping(guest, null, there, PING_SIZES), ping(guest, namespace, here, PING_SIZES)].join(', '),
  );
  {
    await using near = await Application.start(null);
    await using far = await Application.start(namespace);
    await check(Check.udp, () => near.datagrams(there, UDP_SIZES));
    await check(Check.tcp, async () => {
      const out = await near.stream(there, TCP_BYTES);
      return `${out}; ${await far.stream(here, TCP_BYTES)}`;
    });
    await check(Check.channels, () => {
      for (const queues of [1, PAIRS]) {
        const { current, most } = channels(guest.must(`ethtool -L ${name} combined ${queues} && ethtool -l ${name}`));
        same('queues now, and at most', [current, most], [queues, PAIRS]);
        ping(guest, null, there);
      }
      return `1, ${PAIRS}`;
    });
    await check(Check.rss, () => steer(guest, name, far, here));
  }
  await check(Check.statistics, () => compareStatistics(guest, name));
  await check(Check.rebind, () => {
    for (const step of ['unbind', 'bind']) writeFileSync(`/sys/bus/pci/drivers/virtio-pci/${step}`, address);
    name = guest.interface(rings);
    ip(guest, null, [`addr add ${here}/24 dev ${name}`, `link set ${name} up`]);
    return ping(guest, null, there);
  });
}

function negotiated(guest: Guest, name: string, rings: Rings): string {
  const text = guest.read(`/sys/class/net/${name}/device/features`);
  const bits = [...text].flatMap((bit, i) => (bit === '1' ? [i] : []));
  for (const [feature, bit] of Object.entries(Bit)) {
    if (!bits.includes(bit)) throw new Error(`${feature} (${bit}) is not among ${bits.join(' ')}`);
  }
  same('RING_PACKED', bits.includes(RING_PACKED), rings === 'packed');
  same('IPSEC', bits.includes(IPSEC), false);
  return bits.join(' ');
}

function readAll(guest: Guest, name: string): string {
  const text = guest.must(['-i', '-g', '-k'].map((question) => `ethtool ${question} ${name}`).join(' && '));
  if (!text.startsWith('driver: virtio_net\n')) throw new Error(`another driver: ${text}`);
  const off = OFFLOADS.filter((offload) => !text.includes(`${offload}: on`));
  if (off.length > 0) throw new Error(`off: ${off.join(', ')}`);
  // Some have no answer without an optional feature; none may fail in another way.
  const others = `said=$(ethtool $question ${name} 2>&1) || echo "$question: $said"`;
  const failed = guest.must(`for question in -P -a -c; do ${others}; done`);
  for (const line of failed.trim().split('\n')) {
    if (line !== '' && !/not supported/i.test(line)) throw new Error(failed);
  }
  return `rings of ${[...text.matchAll(/^RX:\s+(\d+)/gm)].map((match) => match[1]).join(' of ')}, ${OFFLOADS.join(', ')}`;
}

function channels(text: string): { most: number; current: number } {
  const [most, current] = [...text.matchAll(/^Combined:\s+(\d+)/gm)].map((match) => Number(match[1]));
  return { most, current };
}

/** Packets that each receive queue has had, as the driver counts. */
function received(statistics: string): number[] {
  return [...statistics.matchAll(/^\s*rx_queue_(\d+)_packets: (\d+)$/gm)].map((match) => Number(match[2]));
}

/** Sets the table to the first queue only, to the second only, and to both, and looks by which of them new flows come. */
async function steer(guest: Guest, name: string, far: Application, here: string): Promise<string> {
  const table = guest.must(`ethtool -x ${name}`);
  if (!/RSS hash key:\n[0-9a-f:]+/.test(table)) throw new Error(`no key in ${table}`);
  const seen: string[] = [];
  for (const weights of ['1 0', '0 1', '1 1']) {
    const wanted = weights.split(' ').map((weight) => weight === '1');
    sendBy(name, wanted);
    const set = guest.must(`ethtool -X ${name} weight ${weights} && ethtool -x ${name} && ethtool -S ${name}`);
    const entries = [...set.matchAll(/^\s*\d+:((?:\s+\d+)+)$/gm)].flatMap((match) => match[1].trim().split(/\s+/));
    same(
      'queues in the table',
      ['0', '1'].map((queue) => entries.includes(queue)),
      wanted,
    );
    const before = received(set);
    await far.flows(here, FLOWS, FLOW_BYTES);
    const got = received(guest.must(`ethtool -S ${name}`)).map((packets, queue) => packets - before[queue]);
    const isAsWanted = got.every((packets, queue) => packets > STRANGERS === wanted[queue]);
    const sum = got.reduce((a, b) => a + b, 0);
    if (!isAsWanted || sum < FLOWS) throw new Error(`weights ${weights}: ${got.join(' and ')} packets`);
    seen.push(got.join(' + '));
  }
  return `${seen.join(', ')} packets`;
}

/**
 * Has packets leave by the queues that are used (Documentation/networking/scaling.rst, XPS). Linux (6.1) tells the device, together with an
 * indirection table, of as many transmit queues as there were processors when it found the device, and may send by others none the less.
 */
function sendBy(name: string, used: readonly boolean[]): void {
  for (const [queue, isUsed] of used.entries()) {
    writeFileSync(`/sys/class/net/${name}/queues/tx-${queue}/xps_cpus`, isUsed ? '1' : '0');
  }
}

/** What the interface counts is looked at before and after the queues: packets may come meanwhile. */
function compareStatistics(guest: Guest, name: string): string {
  const counters = ['rx', 'tx'].flatMap((direction) => ['packets', 'bytes'].map((what) => ({ direction, what })));
  const ofInterface = () =>
    counters.map(({ direction, what }) => Number(guest.read(`/sys/class/net/${name}/statistics/${direction}_${what}`)));
  const before = ofInterface();
  const statistics = guest.must(`ethtool -S ${name}`);
  const after = ofInterface();
  const totals = counters.map(({ direction, what }, i) => {
    const lines = statistics.matchAll(new RegExp(`^\\s*${direction}_queue_\\d+_${what}: (\\d+)$`, 'gm'));
    const queues = [...lines].reduce((all, match) => all + Number(match[1]), 0);
    if (queues < before[i] || queues > after[i] || after[i] === 0)
      throw new Error(`${direction} ${what}: ${before[i]}, ${queues}, ${after[i]}`);
    return `${direction} ${queues} ${what}`;
  });
  for (const counter of ['rx_errors', 'rx_length_errors', 'rx_frame_errors', 'tx_errors']) {
    same(counter, guest.read(`/sys/class/net/${name}/statistics/${counter}`), '0');
  }
  return totals.join(', ');
}
