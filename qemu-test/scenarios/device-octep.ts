/**
 * Our driver in the guest, through kernel VFIO and the vIOMMU, on a function of the octep personality: the window as mapped by the kernel, and the
 * bodies that also run on functions of the standard.
 */
import { Feature, openFunction, probeFunction } from '../../src/index.ts';
import { IpsecCheck, ipsecBody } from '../bodies/ipsec.ts';
import { NicCheck, nicBody } from '../bodies/nic.ts';
import type { Place } from '../bodies/place.ts';
import { same } from '../guest/guest.ts';
import { endWires, guestPlace } from '../guest/place.ts';
import { serveWires } from '../host/wire.ts';
import type { Scenario } from '../scenario.ts';

const MAC = '52:54:00:00:0d:01';
const MTU = 1500;

const Check = { report: 'every step of the bring-up report is ok' } as const;

export const scenario: Scenario = {
  title: 'our driver on an octeon_ep class function, through VFIO and the vIOMMU',
  machine: { qemu: 'vfioUser' },
  devices: [{ kind: 'vfio-user', id: 'nic', link: 'host', args: ['--mac', MAC, '--personality', 'octep'] }],
  modules: ['vfio_pci', 'vfio_iommu_type1'],
  timeout: 300,
  checks: [...Object.values(Check), ...Object.values(NicCheck), ...Object.values(IpsecCheck)],

  async guest(guest) {
    const { address, check, wire } = guestPlace(guest, 'nic');
    // Its interrupts are not those of the standard: they come on vector 0, and whether anybody waits or not.
    const place: Place = { address, check, wire };
    await guest.check(Check.report, async () => {
      const fn = openFunction(address);
      try {
        const { octep, problems } = await probeFunction(fn, 'auto');
        same('problems', problems, []);
        const failed = octep?.steps.filter(({ ok }) => !ok);
        same('steps that failed', failed, []);
        return `${octep?.model}, ${octep?.steps.length} steps`;
      } finally {
        fn.close();
      }
    });
    const { ACCESS_PLATFORM, RING_PACKED, NOTIFICATION_DATA, IPSEC } = Feature;
    const features = [ACCESS_PLATFORM, RING_PACKED, NOTIFICATION_DATA, IPSEC];
    await nicBody(place, { mac: MAC, mtu: MTU, features });
    await ipsecBody(place, 'inline', { ipsec: 'inline' });
    endWires(guest);
  },

  host: serveWires,
};
