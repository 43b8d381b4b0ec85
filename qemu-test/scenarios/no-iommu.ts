/** A machine without an IOMMU: the driver does not take functions there, and says why. */
import { bindFunction } from '../../src/vfio/bind.ts';
import { openKernelVfio } from '../../src/vfio/kernel.ts';
import { describeFunction } from '../../src/vfio/sysfs.ts';
import { mustFail, same } from '../guest/guest.ts';
import type { Scenario } from '../scenario.ts';

const Check = {
  list: 'the list says that there is no IOMMU',
  bind: 'bind is refused',
  open: 'open is refused',
} as const;

export const scenario: Scenario = {
  title: 'without an IOMMU nothing is bound or opened',
  machine: { qemu: 'stock', iommu: 'none' },
  devices: [{ kind: 'virtio-net', id: 'nic', mac: '52:54:00:00:04:01', iommu: false, link: 'host' }],
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 120,
  checks: Object.values(Check),

  async guest(guest) {
    const nic = guest.address('nic');
    await guest.check(Check.list, () => same('first thing missing', describeFunction(nic).missing[0], 'no IOMMU'));
    await guest.check(Check.bind, () => mustFail('NO_IOMMU', () => bindFunction(nic)));
    await guest.check(Check.open, () => mustFail('NO_IOMMU', () => openKernelVfio(nic)));
  },
};
