/**
 * Our driver on QEMU's own virtio-net with every offload that it has: split and packed virtqueues, one queue and two, polling and interrupts,
 * receive-side scaling. The other end is the host's kernel behind a tap, which answers what arrives with a right checksum.
 */
import { Feature } from '../../src/index.ts';
import { flowBody, flowChecks } from '../bodies/flows.ts';
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
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 150,
  checks: RINGS.flatMap((ring) => flowChecks(ring, PAIRS)),

  async guest(guest) {
    for (const ring of RINGS) {
      const { host, mac, guest: own } = tapAddresses(devices, ring);
      const peer = { mac: Buffer.from(mac.replaceAll(':', ''), 'hex'), address: numbers(host), own: numbers(own) };
      await flowBody(guestPlace(guest, ring), { ring, pairs: PAIRS, peer, features: FEATURES });
    }
  },
};

function numbers(address: string): number[] {
  return address.split('.').map(Number);
}
