/**
 * Our driver on QEMU's own virtio-net with every offload that it has: split and packed virtqueues, one queue and two, polling and interrupts,
 * receive-side scaling. The other end is the host's kernel behind a tap, which answers what arrives with a right checksum.
 */
import { Feature } from '../../src/index.ts';
import { arenaBody, arenaName } from '../bodies/arenas.ts';
import { flowBody, flowChecks } from '../bodies/flows.ts';
import { usoBody, usoName } from '../bodies/uso.ts';
import { FlowCrew, workerBody, workerChecks } from '../bodies/workers.ts';
import { BridgedNamespace, mustBeLarge } from '../guest/large.ts';
import { guestPlace } from '../guest/place.ts';
import { type Scenario, type ScenarioDevice, tapAddresses } from '../scenario.ts';

const PAIRS = 2;
const RINGS = ['split', 'packed'] as const;
const PROPERTIES = { rss: true, hash: true, in_order: true } as const;
const FEATURES = [
  Feature.CSUM,
  Feature.GUEST_CSUM,
  Feature.MRG_RXBUF,
  Feature.HOST_TSO4,
  Feature.HOST_TSO6,
  Feature.GUEST_TSO4,
  Feature.GUEST_TSO6,
  Feature.CTRL_RX,
  Feature.CTRL_VLAN,
  Feature.INDIRECT_DESC,
  Feature.EVENT_IDX,
  Feature.IN_ORDER,
  Feature.RING_RESET,
];

/** The rings on which a worker thread is ended: the last ones, because nobody starts another, which takes seconds. */
const ENDING = 'packed';
const largeName = (ring: string): string => `${ring}: TCP crosses in packets longer than the MTU, both ways`;

const devices: readonly ScenarioDevice[] = RINGS.map((ring, i) => ({
  kind: 'virtio-net',
  id: ring,
  mac: `52:54:00:00:0d:0${i + 1}`,
  iommu: true,
  queuePairs: PAIRS,
  link: 'tap',
  properties: { ...PROPERTIES, packed: ring === 'packed' },
}));

export const scenario: Scenario = {
  title: "our driver on QEMU's virtio-net: rings, queues, waiting, RSS, offloads",
  machine: { qemu: 'vfioUser' },
  devices,
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1', 'tun'],
  timeout: 480,
  checks: RINGS.flatMap((ring) => [
    ...flowChecks(ring, PAIRS),
    ...workerChecks(ring, ring === ENDING),
    arenaName(ring),
    usoName(ring),
    largeName(ring),
  ]),

  async guest(guest) {
    let crew: FlowCrew | null = null;
    for (const ring of RINGS) {
      const { host, mac, guest: own } = tapAddresses(devices, ring);
      const peer = { mac: Buffer.from(mac.replaceAll(':', ''), 'hex'), address: numbers(host), own: numbers(own) };
      const place = guestPlace(guest, ring);
      await flowBody(place, { ring, pairs: PAIRS, peer, features: FEATURES });
      const features = [Feature.MQ, Feature.RING_RESET];
      // Not before: its threads take seconds of both processors to start.
      crew ??= new FlowCrew();
      await workerBody(place, crew, { ring, peer, features, doorbell: 'memory', ending: ring === ENDING });
      await arenaBody(place, ring, peer);
      await usoBody(place, ring, peer);
      await guest.check(largeName(ring), async () => {
        const mac = `52:54:00:00:0d:0${RINGS.indexOf(ring) + 1}`;
        const nic = { address: place.address, ring, name: `large-${ring}`, mac, addresses: [`${own}/24`] };
        await using bridged = await BridgedNamespace.open(guest, nic);
        const { toDevice, fromDevice } = await bridged.stream([host]);
        return `${mustBeLarge('sent', toDevice)}; ${mustBeLarge('received', fromDevice)}`;
      });
    }
    await crew?.end();
  },
};

function numbers(address: string): number[] {
  return address.split('.').map(Number);
}
