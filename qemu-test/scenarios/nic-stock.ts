/** Our driver on QEMU's own virtio-net, through the kernel's VFIO: the bodies that also run over vfio-user and on the IPsec function. */
import { Feature } from '../../src/index.ts';
import { IpsecCheck, ipsecBody } from '../bodies/ipsec.ts';
import { NicCheck, nicBody } from '../bodies/nic.ts';
import { endWires, guestPlace } from '../guest/place.ts';
import { serveWires } from '../host/wire.ts';
import type { QemuNic, Scenario } from '../scenario.ts';

const MAC = '52:54:00:00:05:01';
const MTU = 1400;

export const scenario = nicScenario('', {}, []);

/** The scenario on a device with more properties, of which `features` are to be negotiated too. */
export function nicScenario(how: string, properties: NonNullable<QemuNic['properties']>, features: number[]): Scenario {
  return {
    title: `our driver on QEMU's virtio-net through kernel VFIO${how}`,
    machine: { qemu: 'stock' },
    devices: [{ kind: 'virtio-net', id: 'nic', mac: MAC, mtu: MTU, iommu: true, link: 'host', properties }],
    modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
    timeout: 120,
    checks: [...Object.values(NicCheck), ...Object.values(IpsecCheck)],

    async guest(guest) {
      const place = guestPlace(guest, 'nic');
      const needed = [...features, Feature.ACCESS_PLATFORM, Feature.MTU];
      await nicBody(place, { mac: MAC, mtu: MTU, features: needed });
      // The device has no IPsec: the same application, in software.
      await ipsecBody(place, 'software');
      endWires(guest);
    },

    host: serveWires,
  };
}
