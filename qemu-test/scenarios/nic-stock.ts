/**
 * Our driver on QEMU's own virtio-net, through the kernel's VFIO, with split and with packed virtqueues: the bodies that also run over
 * vfio-user and on the IPsec function.
 */
import { Feature } from '../../src/index.ts';
import { IpsecCheck, ipsecBody } from '../bodies/ipsec.ts';
import { NicCheck, nicBody } from '../bodies/nic.ts';
import { endWires, guestPlace } from '../guest/place.ts';
import { serveWires } from '../host/wire.ts';
import type { Scenario } from '../scenario.ts';

const MTU = 1400;
const NICS = { split: '52:54:00:00:05:01', packed: '52:54:00:00:05:02' } as const;
const RINGS = ['split', 'packed'] as const;
/** QEMU stops sending when its back end makes it wait, with packed virtqueues and EVENT_IDX: the driver gets it going (docs/decisions.md). */
const FEATURES = { split: [Feature.EVENT_IDX], packed: [Feature.EVENT_IDX, Feature.RING_PACKED] } as const;

export const scenario: Scenario = {
  title: "our driver on QEMU's virtio-net through kernel VFIO",
  machine: { qemu: 'stock' },
  devices: RINGS.map((ring) => ({
    kind: 'virtio-net',
    id: ring,
    mac: NICS[ring],
    mtu: MTU,
    iommu: true,
    link: 'host',
    properties: { packed: ring === 'packed' },
  })),
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 300,
  checks: [
    ...RINGS.flatMap((ring) => Object.values(NicCheck).map((check) => `${ring}: ${check}`)),
    ...Object.values(IpsecCheck).map((check) => `software IPsec: ${check}`),
  ],

  async guest(guest) {
    const placeOf = (ring: (typeof RINGS)[number], prefix: string) =>
      guestPlace(guest, ring, (name, body) => guest.check(`${prefix}: ${name}`, body));
    for (const ring of RINGS) {
      const features = [...FEATURES[ring], Feature.ACCESS_PLATFORM, Feature.MTU];
      await nicBody(placeOf(ring, ring), { mac: NICS[ring], mtu: MTU, features });
    }
    // The device has no IPsec: the same application, in software.
    await ipsecBody(placeOf('packed', 'software IPsec'), 'software');
    endWires(guest);
  },

  host: serveWires,
};
