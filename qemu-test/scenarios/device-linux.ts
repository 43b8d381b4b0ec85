/**
 * Linux's own virtio_net drives the software device (IPsec not negotiated), with split and with packed virtqueues, several queues and
 * offloads on: a driver that we did not write judges rings, interrupts, configuration, control queue, steering, checksums and segmentation.
 */
import { LargeCheck, largeDevices, largePackets } from '../bodies/linux-large.ts';
import type { Guest } from '../guest/guest.ts';
import { same } from '../guest/guest.ts';
import { addNamespace, ping, Traffic } from '../guest/namespaces.ts';
import type { Scenario, ScenarioDevice } from '../scenario.ts';

const RINGS = ['split', 'packed'] as const;
type Rings = (typeof RINGS)[number];

const PAIRS = 2;
const TCP_BYTES = 256 * 1024;
const UDP_SIZES = [0, 1, 17, 64, 511, 1000, 1472];
/** Flows that are to be spread over the queues, and the datagrams of each. */
const FLOWS = 16;
const FLOW_SIZES = [64, 64, 64, 64];
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
  // Linux uses no more queues than it has processors.
  machine: { qemu: 'vfioUser', cpus: PAIRS },
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
  },
};

async function drive(guest: Guest, ends: Ends): Promise<void> {
  const { rings, mac, here, there } = ends;
  const check = (name: string, body: () => unknown) => guest.check(named(rings, name), body);
  const address = guest.address(rings);
  let name = guest.interface(rings);
  await check(Check.bind, () => {
    same('MAC', guest.read(`/sys/class/net/${name}/address`), mac);
    return guest.must(`ethtool -i ${name}`).split('\n')[0];
  });
  await check(Check.features, () => negotiated(guest, address, rings));
  const namespace = peerOf(rings);
  addNamespace(guest, namespace);
  const peer = guest.interface(namespace);
  guest.must(`ip link set ${peer} netns ${namespace}`);
  guest.must(`ip -n ${namespace} addr add ${there}/24 dev ${peer} && ip -n ${namespace} link set ${peer} up`);
  guest.must(`ip addr add ${here}/24 dev ${name} && ip link set ${name} up`);
  await check(Check.link, () => {
    same('carrier', guest.read(`/sys/class/net/${name}/carrier`), '1');
    const vectors = guest.must(`ls /sys/bus/pci/devices/${address}/msi_irqs`).trim().split(/\s+/).length;
    if (vectors < 1 + 2 * PAIRS) throw new Error(`${vectors} vectors`);
    return `${vectors} vectors`;
  });
  await check(Check.ethtool, () => readAll(guest, name));
  await check(Check.ping, () => {
    const sizes = [0, 56, 1472].map((size) => ping(guest, null, there, 3, size));
    return [...sizes, ping(guest, namespace, here)].join(', ');
  });
  const near = await Traffic.start(guest, null);
  const far = await Traffic.start(guest, namespace);
  await check(Check.udp, () => near.request({ kind: 'udp', to: there, sizes: UDP_SIZES }));
  await check(Check.tcp, async () => {
    const out = await near.request({ kind: 'tcp', to: there, bytes: TCP_BYTES });
    const back = await far.request({ kind: 'tcp', to: here, bytes: TCP_BYTES });
    return `${out}; ${back}`;
  });
  await check(Check.channels, () => {
    for (const queues of [1, PAIRS]) {
      guest.must(`ethtool -L ${name} combined ${queues}`);
      const { current, most } = channels(guest, name);
      same('queues now, and at most', [current, most], [queues, PAIRS]);
      ping(guest, null, there);
    }
    return `1, ${PAIRS}`;
  });
  await check(Check.rss, () => steer(guest, name, far, here));
  await check(Check.statistics, () => compareStatistics(guest, name));
  near.stop();
  await check(Check.rebind, () => {
    const driver = '/sys/bus/pci/drivers/virtio-pci';
    guest.must(`echo ${address} > ${driver}/unbind && echo ${address} > ${driver}/bind`);
    name = guest.interface(rings);
    guest.must(`ip addr add ${here}/24 dev ${name} && ip link set ${name} up`);
    return ping(guest, null, there);
  });
  far.stop();
}

function negotiated(guest: Guest, address: string, rings: Rings): string {
  const virtio = guest.must(`ls /sys/bus/pci/devices/${address}`).match(/virtio\d+/)?.[0];
  const text = guest.read(`/sys/bus/pci/devices/${address}/${virtio}/features`);
  const bits = [...text].flatMap((bit, i) => (bit === '1' ? [i] : []));
  for (const [feature, bit] of Object.entries(Bit)) {
    if (!bits.includes(bit)) throw new Error(`${feature} (${bit}) is not among ${bits.join(' ')}`);
  }
  same('RING_PACKED', bits.includes(RING_PACKED), rings === 'packed');
  same('IPSEC', bits.includes(IPSEC), false);
  return bits.join(' ');
}

function readAll(guest: Guest, name: string): string {
  const rings = guest.must(`ethtool -g ${name}`);
  const offloads = guest.must(`ethtool -k ${name}`);
  const off = OFFLOADS.filter((offload) => !offloads.includes(`${offload}: on`));
  if (off.length > 0) throw new Error(`off: ${off.join(', ')}`);
  // Some have no answer without an optional feature; none may fail in another way.
  for (const question of ['-P', '-a', '-c']) {
    const { status, stderr } = guest.sh(`ethtool ${question} ${name}`);
    if (status !== 0 && !/not supported/i.test(stderr)) throw new Error(`${question}: ${stderr}`);
  }
  return `rings of ${[...rings.matchAll(/^RX:\s+(\d+)/gm)].map((match) => match[1]).join(' of ')}, ${OFFLOADS.join(', ')}`;
}

function channels(guest: Guest, name: string): { most: number; current: number } {
  const [most, current] = [...guest.must(`ethtool -l ${name}`).matchAll(/^Combined:\s+(\d+)/gm)].map((m) =>
    Number(m[1]),
  );
  return { most, current };
}

/** Packets that each receive queue has had, as the driver counts. */
function received(guest: Guest, name: string): number[] {
  const statistics = guest.must(`ethtool -S ${name}`);
  return [...statistics.matchAll(/^\s*rx_queue_(\d+)_packets: (\d+)$/gm)].map((match) => Number(match[2]));
}

/** Sets the table to the first queue only, to the second only, and to both, and looks by which of them new flows come. */
async function steer(guest: Guest, name: string, far: Traffic, here: string): Promise<string> {
  const table = guest.must(`ethtool -x ${name}`);
  if (!/RSS hash key:\n[0-9a-f:]+/.test(table)) throw new Error(`no key in ${table}`);
  const seen: string[] = [];
  for (const weights of ['1 0', '0 1', '1 1']) {
    guest.must(`ethtool -X ${name} weight ${weights}`);
    const entries = [...guest.must(`ethtool -x ${name}`).matchAll(/^\s*\d+:((?:\s+\d+)+)$/gm)].flatMap((match) =>
      match[1].trim().split(/\s+/),
    );
    const wanted = weights.split(' ').map((weight) => weight === '1');
    same(
      'queues in the table',
      ['0', '1'].map((queue) => entries.includes(queue)),
      wanted,
    );
    const before = received(guest, name);
    for (let flow = 0; flow < FLOWS; flow++) await far.request({ kind: 'udp', to: here, sizes: FLOW_SIZES });
    const got = received(guest, name).map((packets, queue) => packets - before[queue]);
    // What is not UDP has a hash too, or comes by the queue of what has none: only few.
    got.forEach((packets, queue) => {
      const isUsed = packets >= FLOW_SIZES.length;
      if (isUsed !== wanted[queue]) throw new Error(`weights ${weights}: ${got.join(' and ')} packets`);
    });
    seen.push(got.join(' + '));
  }
  return `${seen.join(', ')} packets`;
}

function compareStatistics(guest: Guest, name: string): string {
  const sum = (direction: string, what: string): number => {
    const lines = guest
      .must(`ethtool -S ${name}`)
      .matchAll(new RegExp(`^\\s*${direction}_queue_\\d+_${what}: (\\d+)$`, 'gm'));
    return [...lines].reduce((all, match) => all + Number(match[1]), 0);
  };
  const totals: string[] = [];
  for (const direction of ['rx', 'tx']) {
    for (const what of ['packets', 'bytes']) {
      const before = Number(guest.read(`/sys/class/net/${name}/statistics/${direction}_${what}`));
      const queues = sum(direction, what);
      const after = Number(guest.read(`/sys/class/net/${name}/statistics/${direction}_${what}`));
      if (queues < before || queues > after || after === 0)
        throw new Error(`${direction} ${what}: ${before}, ${queues}, ${after}`);
      totals.push(`${direction} ${queues} ${what}`);
    }
  }
  for (const counter of ['rx_errors', 'rx_length_errors', 'rx_frame_errors', 'tx_errors']) {
    same(counter, guest.read(`/sys/class/net/${name}/statistics/${counter}`), '0');
  }
  return totals.join(', ');
}
